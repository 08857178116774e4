"A network for a task: any architecture and size, joined sensors, frozen encoders, and its folder."
import json

import pytest
import torch
from torch import nn

from cromss.classes import DYNAMIC_WORLD
from cromss.config import ConfigError, DataError, WeightsError
from cromss.inputs import InputContract, InputLayer, ValueLayer
from cromss.segmenter import Join, Segmenter, load_predictor, save_predictor
from cromss.sensors import SENSORS

S1, S2 = SENSORS["s1"], SENSORS["s2"]
SMALL = dict(encoders="resnet18", encoder_depth=3, decoder_channels=(16, 8, 8))


def made(sensors=("s2",), **options):
    torch.manual_seed(0)
    return Segmenter({s: InputContract(SENSORS[s]) for s in sensors}, DYNAMIC_WORLD, **{**SMALL, **options})


def values(sensors=("s2",), height=32, width=32, batch=1, seed=0):
    torch.manual_seed(seed)
    spread = {s: (torch.tensor(SENSORS[s].mean).view(-1, 1, 1), torch.tensor(SENSORS[s].std).view(-1, 1, 1)) for s in sensors}
    return {s: mean + std * torch.randn(batch, len(mean), height, width) for s, (mean, std) in spread.items()}


# the input

def test_clip_is_the_published_scaling():
    x = values()["s2"]
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (S2.mean, S2.std))
    assert torch.allclose(InputLayer(InputContract(S2))(x), ((x - mean + 2 * std) / (4 * std)).clamp(0, 1), atol=1e-6)


def test_other_scalings_and_their_ends():
    x = values()["s2"]
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (S2.mean, S2.std))
    assert torch.allclose(InputLayer(InputContract(S2, "standard"))(x), (x - mean) / std, atol=1e-5)
    assert torch.allclose(InputLayer(InputContract(S2, "divide", 10000.0, 0.0, 0.2))(x), (x / 10000).clamp(0, 0.2), atol=1e-6)


@pytest.mark.parametrize("missing", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("scaling", ["clip", "standard", "divide"])
def test_what_is_missing_is_zero(scaling, missing):
    x = values()["s2"]
    x[0, 3, 4, 5] = missing
    y = InputLayer(InputContract(S2, scaling))(x)
    assert y[0, 3, 4, 5] == 0 and y.isfinite().all()


def test_bytes_become_values_and_come_back():
    coded = torch.randint(0, 256, (2, 13, 8, 8)).float() / 255
    valid = torch.ones(2, 8, 8, dtype=torch.bool)
    valid[0, 0, 0] = False
    again = ValueLayer(S2)(coded, valid)
    assert again[0, :, 0, 0].isnan().all() and torch.allclose(InputLayer(InputContract(S2))(again)[1], coded[1], atol=1e-6)


def test_impossible_contracts():
    with pytest.raises(ConfigError, match="scaling='log': choose one of 'clip'"): InputContract(S2, "log")
    with pytest.raises(ConfigError, match="divisor=0"): InputContract(S2, "divide", 0)
    with pytest.raises(ConfigError, match="unknown field of an input contract 'scale'; did you mean 'scaling'"): InputContract.from_dict({"sensor": S2.to_dict(), "scale": "clip"})
    with pytest.raises(DataError, match="s1: 13 bands given, 2 expected \\(VV, VH\\)"): InputLayer(InputContract(S1))(values()["s2"])


# the network

@pytest.mark.parametrize("architecture", ["unet", "unetplusplus", "linknet", "manet", "fpn", "pspnet", "deeplabv3", "deeplabv3plus", "pan", "upernet", "segformer"])
def test_every_architecture_takes_any_size_and_two_sensors(architecture):
    both = ("s1", "s2")
    model = made(both, architecture=architecture, encoder_depth=None, decoder_channels=None).eval()
    height, width = (134, 131) if architecture == "pan" else (70, 51)      # it halves the coarsest features three times more
    assert model(values(both, height, width)).shape == (1, 9, height, width)


def test_padding_repeats_the_edge_and_is_cut_off():
    model, x = made().eval(), values(height=29, width=32)["s2"]
    padded = torch.cat([x, x[:, :, -1:].repeat(1, 1, 3, 1)], 2)
    with torch.no_grad(): assert model.stride == 8 and torch.allclose(model({"s2": x}), model({"s2": padded})[..., :29, :], atol=1e-5)


def test_a_join_begins_as_the_mean_and_mixes_unequal_encoders():
    a, b = ([torch.randn(1, c, 4, 4) for c in channels] for channels in ((2, 6), (13, 6)))
    assert torch.allclose(Join([[2, 6], [13, 6]])([a, b])[1], (a[1] + b[1]) / 2, atol=1e-6)
    model = made(("s1", "s2"), encoders={"s1": "mobilenet_v2", "s2": "resnet18"})
    assert model.eval()(values(("s1", "s2"))).shape == (1, 9, 32, 32)


def test_both_sensors_count():
    model = made(("s1", "s2")).eval()
    x = values(("s1", "s2"))
    with torch.no_grad(): whole, other = model(x), [model({**x, s: x[s] + 3 * torch.tensor(SENSORS[s].std).view(-1, 1, 1)}) for s in x]
    assert all(not torch.allclose(whole, o) for o in other)


def test_frozen_encoders_stay_as_they_are_and_the_rest_learns():
    both = ("s1", "s2")
    model = made(both).freeze().train()
    before = {k: v.clone() for k, v in model.encoders.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for seed in range(2):
        optimizer.zero_grad()
        model(values(both, batch=2, seed=seed)).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.encoders.state_dict().items()) and all(p.grad is None for p in model.encoders.parameters())
    assert all(p.grad.abs().sum() > 0 for p in [*model.decoder.parameters(), *model.head.parameters(), model.join.mixers[0].weight])
    assert not any(m.training for m in model.encoders.modules()) and model.decoder.training


def test_drifting_moves_statistics_and_no_weight():
    model = made().freeze("drifting").train()
    before = {k: v.clone() for k, v in model.encoders.state_dict().items()}
    model(values(batch=2))
    moved = {k.rpartition(".")[2] for k, v in model.encoders.state_dict().items() if not torch.equal(v, before[k])}
    assert {"running_mean", "running_var"} <= moved <= {"running_mean", "running_var", "num_batches_tracked"}


@pytest.mark.parametrize("call, message", [
    (lambda: made(architecture="dpt"), "architecture='dpt' takes a transformer's tokens"),
    (lambda: made(architecture="unett"), "architecture='unett'"),
    (lambda: Segmenter({}, DYNAMIC_WORLD), "needs a sensor"),
    (lambda: made()({"s1": values(("s1",))["s1"]}), "s2 is not given: this network was made for s2"),
    (lambda: made()({"s2": values(("s1",))["s1"]}), "2 bands given, 13 expected")])
def test_what_cannot_be(call, message):
    with pytest.raises((ConfigError, DataError), match=message): call()


# its folder

@pytest.fixture
def folder(tmp_path): return save_predictor(made(("s1", "s2")).eval(), tmp_path / "a b" / "predictor", run="r1", origins={"s1": "random weights"})


def test_the_folder_gives_it_back(folder):
    model, again, x = made(("s1", "s2")).eval(), load_predictor(folder), values(("s1", "s2"), 40, 33)
    with torch.no_grad(): assert torch.equal(model(x), again(x))
    assert again.scheme == DYNAMIC_WORLD and again.contracts == model.contracts and not again.training
    assert "random weights" in (folder / "README.md").read_text() and "predict_scene" in (folder / "README.md").read_text()


def test_loading_leaves_the_random_state(folder):
    before = torch.random.get_rng_state()
    load_predictor(folder)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_run_folder_will_do(folder):
    (folder.parent / "config.yaml").write_text("kind: transfer\n")
    assert isinstance(load_predictor(folder.parent), nn.Module)


def test_another_is_not_overwritten_unless_asked(folder):
    other = made(("s1",))
    assert save_predictor(load_predictor(folder), folder, run="r1", origins={"s1": "random weights"}) == folder
    with pytest.raises(WeightsError, match="other weights are there"): save_predictor(other, folder)
    assert list(load_predictor(save_predictor(other, folder, overwrite=True)).sensors) == ["s1"] and [p.name for p in folder.parent.iterdir()] == ["predictor"]


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in {**config, **changes}.items() if v is not None}))


@pytest.mark.parametrize("damage, message", [
    (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-8]), "cut short or replaced"),
    (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    (lambda f: (f / "config.json").unlink(), "no predictor there"),
    (lambda f: edit(f, format="cromss-encoder"), "does not describe a predictor"),
    (lambda f: edit(f, version=9), "layout version 9 is not 1"),
    (lambda f: edit(f, classes=None), "classes not given"),
    (lambda f: edit(f, network={"architecture": "unet", "encoders": "resnet34"}), "the tensors are not those of the network"),
    (lambda f: edit(f, network={"architecture": "boat"}), "architecture='boat'"),
    (lambda f: edit(f, inputs={"s1": {"sensor": {"name": "s1"}}}), "not given")])
def test_damaged_folders_are_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(WeightsError, match=message): load_predictor(folder)


def test_a_flipped_byte_is_refused(folder):
    blob = bytearray((folder / "model.safetensors").read_bytes())
    blob[-5] ^= 1
    (folder / "model.safetensors").write_bytes(blob)
    with pytest.raises(WeightsError, match="checksum differs"): load_predictor(folder)
