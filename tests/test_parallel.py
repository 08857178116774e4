"Two processes that train together are one: thresholds, losses, gradients and steps of the global batch, runs that others go on with."
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from test_pretraining import last, learned, same, tiny

from cromss import parallel
from cromss.config import ConfigError, DataError, PretrainConfig, SelectionConfig, dump_config, to_dict
from cromss.losses import cromss_loss
from cromss.parallel import Ranks
from cromss.prepare import prepare
from cromss.pretraining import CromssTask, configure, load_task, pretrain
from cromss.runs import Run
from cromss.scenes import ScenesSource
from cromss.selection import select
from cromss.smoothing import smooth_labels

pytestmark = [pytest.mark.skipif(sys.platform == "win32", reason="torchrun's signals are POSIX"), pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")]
WORLD, C = 2, 9


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def together(processes, tmp_path_factory):
    "Runs a function of (ranks, folder) in two processes that are joined as torchrun would; what they saved, by rank."
    def run(target, *arguments):
        port, folder = free_port(), tmp_path_factory.mktemp("together")
        members = [processes.Process(target=member, args=(rank, port, target, folder, arguments)) for rank in range(WORLD)]
        for p in members: p.start()
        for p in members: p.join(200)
        assert [p.exitcode for p in members] == [0] * WORLD
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]
    return run


def member(rank, port, target, folder, arguments):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD), "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    torch.save(target(parallel.join(), folder, *arguments), folder / f"{rank}.pt")


# what they add up

def facts(ranks, folder):
    assert ranks.first(lambda: os.getpid()) != 0 and parallel.launched()
    try: ranks.first(lambda: refuse(ranks.rank))
    except DataError as e: error = str(e)
    return {"rank": ranks.rank, "world": ranks.world, "local": ranks.local, "sum": ranks.sum(torch.tensor([1., ranks.rank])), "any": ranks.any(ranks.rank == 1), "none": ranks.any(False),
            "first": ranks.first(lambda: f"from {ranks.rank}"), "error": error}


def refuse(rank): raise DataError(f"refused by {rank}")


def test_what_ranks_share(together):
    for rank, found in enumerate(together(facts)):
        assert found["rank"] == rank and found["world"] == found["local"] == 2
        assert found["sum"].tolist() == [2, 1] and found["any"] is True and found["none"] is False and found["first"] == "from 0" and found["error"] == "refused by 0"


def example(absent=False, missing=True):
    "Logits of two sensors that differ by much between the halves of a batch, labels with gaps; the last class is in the second half only."
    g = torch.Generator().manual_seed(3)
    logits = {s: 3 * torch.randn(4, C, 24, 24, generator=g) for s in ("s1", "s2")}
    labels = torch.randint(0, C - 1, (4, 24, 24), generator=g)
    labels[2:][torch.rand(2, 24, 24, generator=g) < 0.3] = C - 1
    for s in logits: logits[s][2:] *= 0.2
    valid = torch.rand(4, 24, 24, generator=g) > 0.1
    if missing: labels[:, :3] = 255
    if absent: valid[:2] = False                              # the first process has nothing to learn from
    prior = torch.rand(4, C, 24, 24, generator=g).softmax(1)
    return logits, labels, valid, prior


def step_on(rows, ranks, config, **kind):
    "Thresholds, loss, parts and the gradients of some rows of the example's logits."
    logits, labels, valid, prior = example(**kind)
    logits = {s: l[rows].clone().requires_grad_() for s, l in logits.items()}
    selection = select(logits, labels[rows], 40, config.selection, valid[rows], ranks.sum)
    loss = cromss_loss(logits, smooth_labels(labels[rows], prior[rows], 0.15, 0.0, C), selection, config, ranks.sum)
    loss.total.backward()
    return {"thresholds": selection.thresholds, "weights": selection.label_weights, "loss": loss.total.detach(), "parts": loss.parts,
            "gradients": {s: l.grad / ranks.world for s, l in logits.items()}}          # DDP divides by the number of processes


CASES = {      # name: (what differs in the configuration, and in the example)
    "default": ({}, {}), "exact": ({"selection": SelectionConfig(method="exact")}, {}), "kl": ({"consistency": "kl"}, {}), "mse, ce": ({"consistency": "mse", "loss": "ce"}, {"missing": False}),
    "one threshold": ({"selection": SelectionConfig(per_class=False)}, {}), "no selection": ({"selection": None}, {}), "nothing in the first half": ({}, {"absent": True})}


def share(ranks, folder):
    rows = slice(2 * ranks.rank, 2 * ranks.rank + 2)
    return {name: step_on(rows, ranks, PretrainConfig(**changes), **kind) for name, (changes, kind) in CASES.items()}


@pytest.fixture(scope="module")
def shares(together):
    "What each of two processes finds in its half, case by case."
    return together(share)


@pytest.mark.parametrize("case", CASES)
def test_two_halves_are_the_whole(shares, case):
    changes, kind = CASES[case]
    halves, whole = [s[case] for s in shares], step_on(slice(None), Ranks(), PretrainConfig(**changes), **kind)
    for s in ("s1", "s2"):
        for half in halves: assert torch.equal(half["thresholds"][s], whole["thresholds"][s])
        assert torch.equal(torch.cat([h["weights"][s] for h in halves]), whole["weights"][s])
        gradients = torch.cat([h["gradients"][s] for h in halves])
        assert whole["gradients"][s].abs().sum() > 0 and (gradients - whole["gradients"][s]).abs().max() <= 1e-6 * whole["gradients"][s].abs().max()
    for half in halves:
        torch.testing.assert_close(half["loss"], whole["loss"], rtol=1e-6, atol=0)
        for name, part in whole["parts"].items(): torch.testing.assert_close(half["parts"][name], part, rtol=1e-6, atol=1e-9)


def test_alone_a_half_is_not_the_whole():
    "The test above can fail: a half's own thresholds and loss are others."
    config = PretrainConfig()
    half, whole = step_on(slice(0, 2), Ranks(), config), step_on(slice(None), Ranks(), config)
    assert not torch.allclose(half["thresholds"]["s1"], whole["thresholds"]["s1"]) and not torch.isclose(half["loss"], whole["loss"], rtol=1e-3)


# a whole step, through DDP

def images():
    logits, labels, valid, prior = example()
    g = torch.Generator().manual_seed(5)
    grown = {"mask": labels, "valid": valid, "prior": prior}
    grown = {k: v.repeat_interleave(2, -1).repeat_interleave(2, -2)[..., :32, :32].contiguous() for k, v in grown.items()}
    return {f"image_{s}": torch.rand(4, n, 32, 32, generator=g) for s, n in (("s1", 2), ("s2", 3))} | grown


def optimizer_step(ranks, folder, rows=None):
    "A step of Adam, norms in evaluation mode, by the task's own pieces; its gradients and parameters."
    from cromss.selection import sensor_log_probabilities
    config = tiny(folder)
    torch.manual_seed(0)
    task = CromssTask(to_dict(config), {"s1": 2, "s2": 3}, C).eval()
    rows = rows or slice(2 * ranks.rank, 2 * ranks.rank + 2)
    batch = {k: v[rows] for k, v in images().items()}
    forward = torch.nn.parallel.DistributedDataParallel(task.model, static_graph=True) if ranks.world > 1 else task.model
    optimizer = torch.optim.Adam(task.parameters(), lr=1e-3, fused=True)
    log_p = sensor_log_probabilities(forward({s: batch[f"image_{s}"] for s in ("s1", "s2")}))
    selection = select(log_p, batch["mask"], 1, config.selection, batch["valid"], ranks.sum)
    cromss_loss(log_p, task.targets(batch), selection, config, ranks.sum).total.backward()
    gradients = {k: p.grad.clone() for k, p in task.model.named_parameters() if p.grad is not None}
    optimizer.step()
    return {"gradients": gradients, "parameters": {k: p.detach().clone() for k, p in task.model.named_parameters()}}


def test_a_step_is_that_of_the_global_batch(together, tmp_path):
    one, two = together(optimizer_step), optimizer_step(Ranks(), tmp_path, slice(None))
    assert same(one[0]["parameters"], one[1]["parameters"])
    largest = max(g.abs().max() for g in two["gradients"].values())
    for k, g in two["gradients"].items(): assert (one[0]["gradients"][k] - g).abs().max() <= 1e-5 * max(g.abs().max(), 1e-3 * largest), k
    sure = {k: g.abs() > 1e-4 * largest for k, g in two["gradients"].items()}           # Adam's first step is the sign of a gradient: noise where that is nothing
    assert sum(s.sum() for s in sure.values()) > 1000
    for k, mask in sure.items(): assert ((one[0]["parameters"][k] - two["parameters"][k]).abs()[mask] <= 1e-5 * two["parameters"][k].abs().max() + 1e-8).all(), k


# whole runs

@pytest.fixture(scope="module")
def place():
    with tempfile.TemporaryDirectory() as name:
        prepare(ScenesSource(count=12, size=32), f"{name}/scenes", progress=False)
        yield Path(name)


def config_of(place, name, **changes):
    return tiny(place, **{"data": str(place / "scenes"), "name": name, "epochs": 3, "min_steps": 4, "batch_size": 2, "devices": WORLD, "schedule": "plateau", **changes})


def cromss(place, config, *more, wait=True):
    "The command, started as from a shell."
    path = place / f"{config.name}.yaml"
    path.write_text(dump_config(config))
    process = subprocess.Popen([sys.executable, "-c", "import sys; from cromss.cli import main; sys.exit(main())", "pretrain", "--config", str(path), *more],
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    if not wait: return process
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def test_two_processes_train_and_one_goes_on(place, undrawn):
    code, out, err = cromss(place, config_of(place, "two"))
    assert code == 0, err[-2000:]
    run = Run.open(place / "runs" / "two")
    assert out.strip() == str(run.folder) and run.metrics()["epoch"].tolist() == [0, 1, 2] and not run.metrics().isna().any().any()
    assert run.timing()["processes"].tolist() == [2, 2, 2] and json.loads((run.folder / "data.json").read_text())["global_batch"] == 4
    assert {"train", "validation"} <= set(run.summary()) and (run.encoders / "s2" / "model.safetensors").exists() and load_task(run)
    assert err.count("100%") == 1 and "Traceback" not in err
    with pytest.warns(UserWarning, match=r"1 process\(es\) now share a step's 4 crops: batch_size is 4"):
        more = pretrain(configure({"resume": str(run.folder), "epochs": 4, "devices": 1}))
    assert more.metrics()["epoch"].tolist() == [0, 1, 2, 3] and more.timing()["processes"].tolist() == [2, 2, 2, 1] and more.config.batch_size == 4
    with pytest.raises(ConfigError, match="devices=2: several processes are started by"): pretrain(configure({"resume": str(run.folder), "epochs": 5, "devices": 2}))


def poisoned(ranks, folder, data):
    "A run in which one process meets NaN in its second step; its weights by step, and what it noted."
    from cromss import pretraining
    from cromss.models import CrossModalSegmenter
    real, weights = CrossModalSegmenter.forward, []
    def forward(model, images):
        if not model.training or not torch.is_grad_enabled(): return real(model, images)
        weights.append({k: v.detach().clone() for k, v in model.named_parameters()})
        return {s: x * (float("nan") if ranks.rank == 1 and len(weights) == 2 else 1) for s, x in real(model, images).items()}
    CrossModalSegmenter.forward, pretraining._finish = forward, lambda *_: None
    run = pretrain(tiny(folder, data=data, name="poisoned", epochs=1, min_steps=4, batch_size=2, encoder="resnet18"))
    return weights, (run.folder / "skipped_steps.log").read_text()


def test_all_processes_skip_a_step_that_is_not_finite_in_one(together, place):
    for weights, log in together(poisoned, str(place / "scenes")):
        assert same(weights[1], weights[2]) and not same(weights[0], weights[1]) and not same(weights[2], weights[3])
        assert {line.split()[0] for line in log.splitlines()} == {"1"}


def validated(ranks, folder, config):
    "The metrics of a run that is not finished."
    from cromss import pretraining
    pretraining._finish = lambda *_: None
    return pretrain(config).metrics()


@pytest.mark.filterwarnings("ignore:norm='per-sensor' splits nothing")
def test_validation_is_shared_out_and_added_up(together, place, monkeypatch):
    "Each process scores its part; with a network that learns nothing and has no batch norm, the figures are those of one process."
    changes = dict(epochs=1, architecture="fpn", encoder="mit_b0", encoder_depth=None, decoder_channels=None, crop=32, learning_rate=0.0, validation=0.3)
    monkeypatch.setattr("cromss.pretraining._finish", lambda *_: None)
    one = pretrain(config_of(place, "one", **{**changes, "devices": 1, "batch_size": 4}))
    a, b = together(validated, config_of(place, "half", **changes))[0].iloc[0], one.metrics().iloc[0]
    for name in (n for n in a.index if n.startswith("val_") and n != "val_loss"): assert a[name] == pytest.approx(b[name], abs=1e-6), name
    assert a["val_loss"] == pytest.approx(b["val_loss"], rel=0.02)               # Dice is of a batch, and batches are cut otherwise


def test_sigterm_stops_all_and_says_it_can_go_on(place):
    process = cromss(place, config_of(place, "told", epochs=500), wait=False)
    table, began = place / "runs" / "told" / "metrics.csv", time.monotonic()
    while not table.exists() and time.monotonic() - began < 150 and process.poll() is None: time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, err[-3000:]
    run = Run.open(place / "runs" / "told")
    assert "go on by: cromss pretrain --resume" in err and [p.name for p in run.checkpoints.iterdir() if p.name.startswith(".")] == []
    done = len(run.metrics())
    assert 0 < done < 500 and len(learned(last(run))) > 0


def test_a_mistake_is_said_once(place):
    code, _, err = cromss(place, config_of(place, "wrong", sensors=("s1", "lidar")))
    assert code == 2 and err.count("cromss: sensors=") == 1 and not (place / "runs" / "wrong").exists()
