"The benchmark compares like with like: the transcription agrees with the published outputs and with the package; the tables say what was timed."
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import bench  # noqa: E402
import published  # noqa: E402
import same  # noqa: E402

EPOCHS = (0, 40, 90)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    "The same two small locations as a Store of the package and as published records."
    folder = tmp_path_factory.mktemp("stores")
    store, records = bench.make_stores(folder, locations=2, size=40)
    return store, published.PublishedDataset(records, len(store), crop=32)


# ---- the transcription and the package

def test_priors_are_the_same(stores): same.check_priors(*stores)


@pytest.mark.parametrize("epoch", EPOCHS)
def test_selection_and_losses_are_the_same(epoch):
    logits, labels, targets = same.example(batch=2, size=32, patch=8, grad=True)
    same.check_selection(logits, labels, epoch)
    same.check_losses(logits, labels, targets, epoch)


def test_a_check_notices_a_difference():
    logits, labels, targets = same.example(batch=2, size=32, patch=8, grad=True)
    weights = published.select(logits, labels, 40)
    with pytest.raises(AssertionError, match="label weights differ"): same.close(weights[0][0] + 1e-3, weights[0][0], "label weights", atol=1e-5)
    labels[0, 0, 0] = (labels.max() + 1) % published.CLASSES if len(labels.unique()) < published.CLASSES else 0
    assert not torch.equal(published.select(logits, labels, 40)[0][0], weights[0][0])


def test_networks_and_steps_are_the_same():
    torch.manual_seed(0)
    net, batch = published.MiddleFusion(encoder="mobilenet_v2"), bench.make_batch(2, 32)
    model = same.twin(net, "mobilenet_v2")
    same.check_network(net, model, batch)
    theirs, ours = published.make_optimizer(net), bench.make_optimizer(model)
    losses = published.training_step(net, theirs, batch, 40), bench.our_step(model, ours, batch, False)
    assert abs(losses[0] - losses[1]) < 2e-3 * losses[0]        # the histogram moves weights by up to 2^-8
    a, b = net.head[0].weight, model.nets["s1"].segmentation_head[0].weight
    assert (a - b).abs().median() < 1e-4                        # where gradients are near 0, Adam's first step is a matter of their sign


# ---- the transcription and the published outputs

@pytest.fixture(scope="module")
def reference(golden): return {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(golden / "case_a.npz").items()}


def test_published_priors_and_weights(reference):
    season, labels = int(reference["season"]), reference["labels_seasons"]
    prior = torch.from_numpy(np.stack([published.prior(l, season) for l in labels.numpy()]))
    same.close(prior, reference["prior_ts"].float(), "priors", atol=1e-6)
    logits = [reference[f"logits_{s}"] for s in same.SENSORS]
    label, prediction = published.select(logits, labels[:, season].long(), int(reference["epoch"]))
    for s, l, p in zip(same.SENSORS, label, prediction):
        same.close(l, reference[f"w_label_{s}"].float(), "label weights", atol=1e-5)
        same.close(p, reference[f"w_pred_{s}"].float(), "prediction weights", atol=1e-5)


def test_published_loss_and_gradients(reference):
    labels = reference["labels_seasons"][:, int(reference["season"])].long()
    logits = [reference[f"logits_{s}"].clone().requires_grad_() for s in same.SENSORS]
    loss = published.losses(logits, published.smoothed_targets(labels, reference["prior_ts"]), *published.select(logits, labels, int(reference["epoch"])))
    same.close(loss.double(), reference["loss_total"].double(), "losses", rtol=1e-4)
    for s, g in zip(same.SENSORS, torch.autograd.grad(loss, logits)): same.close(g, reference[f"grad_{s}"].float(), "gradients", atol=1e-7)


# ---- the transcription by itself

def test_published_samples(stores):
    _, records = stores
    for _ in range(6):                                       # some of them turned
        sample = records[1]
        assert {k: tuple(v.shape) for k, v in sample.items()} == {"s1": (2, 32, 32), "s2": (13, 32, 32), "prior": (9, 32, 32), "label": (32, 32)}
        assert sample["s2"].max() <= 1 and torch.allclose(sample["prior"].sum(0), torch.ones(32, 32), atol=1e-5)


def test_both_ways_to_rank_agree():
    logits, labels, _ = same.example(batch=2, size=32, patch=8)
    for a, b in zip(*(published.select(logits, labels, 40, rank=rank)[0] for rank in ("topk", "kthvalue"))): assert torch.equal(a, b)


def test_the_known_defect_is_transcribed():
    "A class with a single pixel has weight 0, where the package gives it 1."
    logits, labels, _ = same.example(batch=1, size=16, patch=8)
    labels[:] = 0
    labels[0, 0, 0] = 5
    weights = published.select(logits, labels, 0)[0][0]
    assert weights[0, 0, 0] == 0 and weights.count_nonzero() == weights.numel() - 1


# ---- the tables

def test_rows_and_tables(tmp_path):
    results, settings = bench.Results("a machine"), bench.QUICK
    results.add(bench.Row("something", [0.2, 0.4, 0.2], [0.1, 0.1, 0.1], "samples/s", 8, "10"))
    results.limits.append(bench.Limit("a part", 0.004, 0.001, "copying"))
    bench.write(results, settings, tmp_path / "results.md")
    text = (tmp_path / "results.md").read_text()
    assert "| something | 40 samples/s | 80 samples/s | **2.00** (2.00 to 4.00) | 10 |" in text and "| a part | 4.00 ms | 1.00 ms | 4.0 | copying |" in text
    values = json.loads((tmp_path / "results.json").read_text())
    assert values["rows"][0]["ratio"] == 2 and values["limits"][0]["what"] == "a part" and values["machine"] == "a machine"


def test_turns_alternate():
    calls = []
    times = bench.by_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, bench.replace(bench.QUICK, rounds=2, least=0.0))
    assert calls == list("ababab") and [len(t) for t in times.values()] == [2, 2]


def test_command_refuses_unknown_rows(capsys):
    with pytest.raises(SystemExit): bench.main(["--only", "everything"])
    assert "input" in capsys.readouterr().err


def test_the_readme_quotes_the_measured_table():
    "Every ratio of README's section on speed is one that `make bench` has written."
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Speed")[1].split("\n## ")[0]
    quoted, measured = re.findall(r"\*\*([\d.]+)\*\*", section), (ROOT / "bench" / "results.md").read_text(encoding="utf-8")
    assert len(quoted) >= 5 and all(f"**{ratio}**" in measured for ratio in quoted)
