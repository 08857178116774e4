"ONNX files and PyTorch programs: they run as the network does, at other sizes too, or are not written."
import json
import os
import sys

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn

from cromss.classes import SCHEMES
from cromss.config import ConfigError, DataError
from cromss.exports import export_onnx, export_program
from cromss.inputs import InputContract, InputLayer
from cromss.models import CrossModalSegmenter
from cromss.segmenter import Segmenter
from cromss.sensors import SENSORS
from cromss.weights import load_encoder, save_encoder

SCHEME = SCHEMES["dynamic-world"]


def values(size=(1, 32, 32), sensors=("s1", "s2"), seed=0):
    "Values in the sensors' units, with a hole."
    torch.manual_seed(seed)
    batch, height, width = size
    made = {s: torch.tensor(SENSORS[s].mean).view(1, -1, 1, 1) + torch.tensor(SENSORS[s].std).view(1, -1, 1, 1) * torch.randn(batch, SENSORS[s].num_bands, height, width) for s in sensors}
    for x in made.values(): x[..., :3, :5] = torch.nan
    return made


def segmenter(architecture, sensors=("s2",), **options):
    torch.manual_seed(1)
    return Segmenter({s: InputContract(SENSORS[s]) for s in sensors}, SCHEME, architecture, "resnet18", **options).eval()


def session(path):
    import onnxruntime
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def equal(got, want):
    np.testing.assert_allclose(got, want.detach().numpy(), rtol=0, atol=1e-4 * want.abs().max().item())


def refused(message, call, *args, kind=ConfigError, **kwargs):
    with pytest.raises(kind, match=message) as error: call(*args, **kwargs)
    assert "\n" not in str(error.value)


class Tiny(nn.Module):
    "A predictor of one convolution."
    stride = 2

    def __init__(self, forward=None):
        super().__init__()
        self.sensors, self.scheme, self.input, self.net, self.own = {"s1": SENSORS["s1"]}, SCHEME, InputLayer(InputContract(SENSORS["s1"])), nn.Conv2d(2, 9, 3, padding=1), forward

    def forward(self, given):
        x = self.net(self.input(given["s1"]))
        return self.own(x) if self.own else x


def tiny_example(): return values(sensors=("s1",))


# predictors

def test_a_unet_of_two_sensors_as_onnx(tmp_path):
    import onnx
    model = segmenter("unet", ("s1", "s2"), encoder_depth=2, decoder_channels=(8, 8))
    path = export_onnx(model, values(), tmp_path / "new" / "model.onnx")
    run = session(path)
    assert [i.name for i in run.get_inputs()] == ["s1", "s2"] and [o.name for o in run.get_outputs()] == ["logits"]
    for size in ((1, 32, 32), (4, 20, 48)):
        given = values(size, seed=2)
        equal(run.run(None, {s: x.numpy() for s, x in given.items()})[0], model(given))
    notes = {p.key: p.value for p in onnx.load(path).metadata_props}
    inputs = json.loads(notes["inputs"])
    assert inputs["s2"]["bands"] == list(SENSORS["s2"].bands) and inputs["s2"]["units"] == "DN" and inputs["s1"]["units"] == "dB" and inputs["s1"]["level"] == "GRD"
    assert json.loads(notes["classes"]) == list(SCHEME.names) and notes["height_width"] == "multiples of 4" and notes["format"] == "cromss-predictor"
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]


def test_a_pspnet_takes_one_size_and_says_so(tmp_path):
    model, path = segmenter("pspnet"), tmp_path / "psp.onnx"
    with pytest.warns(UserWarning, match="takes images of 64 x 48 px only, as other sizes cannot be exported"): export_onnx(model, values((1, 64, 48), ("s2",)), path)
    given = values((3, 64, 48), ("s2",), seed=4)
    equal(session(path).run(None, {"s2": given["s2"].numpy()})[0], model(given))
    assert session(path).get_modelmeta().custom_metadata_map["height_width"] == "64 x 48"


def test_a_pooling_to_cells_is_met_at_another_size(tmp_path):
    def pyramid(x): return nn.functional.interpolate(nn.functional.adaptive_avg_pool2d(x, 4), x.shape[-2:])
    refused("not exported, nothing was written: .*; size='fixed' takes", export_onnx, Tiny(pyramid), tiny_example(), tmp_path / "x.onnx", size="any")
    assert not list(tmp_path.iterdir())


def test_a_deeplab_as_onnx_and_program(tmp_path):
    model = segmenter("deeplabv3plus", encoder_depth=3)
    for make in (export_program, export_onnx): make(model, values((1, 64, 64), ("s2",)), tmp_path / make.__name__, size="any")
    given = values((2, 32, 96), ("s2",), seed=5)
    want = model(given)
    equal(session(tmp_path / "export_onnx").run(None, {"s2": given["s2"].numpy()})[0], want)
    notes = {"cromss.json": ""}
    program = torch.export.load(tmp_path / "export_program", extra_files=notes).module()
    equal(program(given).detach().numpy(), want)
    assert json.loads(json.loads(notes["cromss.json"])["inputs"])["s2"]["level"] == "L1C"


# encoders

def test_an_encoders_features(tmp_path):
    torch.manual_seed(0)
    model = CrossModalSegmenter({"s1": 2}, encoder="resnet18", encoder_depth=3, decoder_channels=(8, 8, 8))
    encoder = load_encoder(save_encoder(model, "s1", tmp_path / "s1"))
    x = torch.rand(1, 2, 32, 32)
    run = session(export_onnx(encoder, x, tmp_path / "s1.onnx"))
    program = torch.export.load(export_program(encoder, x, tmp_path / "s1.pt2")).module()
    assert [i.name for i in run.get_inputs()] == ["s1"] and [o.name for o in run.get_outputs()] == [f"features_{i}" for i in range(4)]
    x = torch.rand(3, 2, 24, 40)
    for got, also, want in zip(run.run(None, {"s1": x.numpy()}), program(x), encoder(x), strict=True): equal(got, want), equal(also.detach().numpy(), want)
    notes = run.get_modelmeta().custom_metadata_map
    assert InputContract.from_dict(json.loads(notes["contract"])) == encoder.contract and notes["format"] == "cromss-encoder" and notes["height_width"] == "multiples of 8"


# what is refused

def test_the_module_stays_as_it_was(tmp_path):
    model = Tiny().train()
    export_program(model, tiny_example(), tmp_path / "x.pt2")
    assert model.training and model.net.weight.requires_grad


@pytest.mark.parametrize("size, forward, message", [
    (None, lambda x: x + torch.rand_like(x), "its outputs differ by"), ("fixed", lambda x: x + torch.rand_like(x), "its outputs differ by"),
    (None, lambda x: x if x.mean() > 0 else -x, "not exported, nothing was written: [A-Z]"), (None, lambda x: x * float("nan"), "differ by nan")])
def test_a_graph_that_gives_other_numbers_is_not_written(size, forward, message, tmp_path):
    (tmp_path / "x.pt2").write_text("before")
    refused(message, export_program, Tiny(forward), tiny_example(), tmp_path / "x.pt2", size=size)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt2"] and (tmp_path / "x.pt2").read_text() == "before"


def test_a_size_in_the_network_is_met_at_another_size(tmp_path):
    def grid(x): return x + torch.arange(32.)          # fits 32 px alone
    with pytest.warns(UserWarning, match="takes images of 32 x 32 px only, as other sizes cannot be exported"): export_program(Tiny(grid), tiny_example(), tmp_path / "x.pt2")
    assert torch.export.load(tmp_path / "x.pt2").module()(tiny_example()).shape == (1, 9, 32, 32)


@pytest.mark.parametrize("example, kind, message", [
    (torch.rand(1, 2, 32, 32), ConfigError, "takes s1: give the example as a dict"), ({}, ConfigError, "takes s1"), ({"s1": torch.rand(1, 2, 32, 32).double()}, ConfigError, "float32 tensor"),
    ({"s1": torch.rand(2, 32, 32)}, ConfigError, "float32 tensor"), ({"s1": torch.rand(1, 2, 31, 32)}, ConfigError, "multiples of 2"), ({"s1": torch.rand(1, 3, 32, 32)}, DataError, "3 bands given, 2 expected"),
    ({"s2": torch.rand(1, 13, 32, 32)}, ConfigError, "takes s1"), ({"s1": "text"}, ConfigError, "float32 tensor"), (None, ConfigError, "takes s1")])
def test_examples_that_do_not_fit(example, kind, message, tmp_path):
    refused(message, export_program, Tiny(), example, tmp_path / "x.pt2", kind=kind)
    assert not list(tmp_path.iterdir())


def test_other_modules_and_options(tmp_path):
    encoder = smp.encoders.get_encoder("resnet18", 2, depth=1, weights=None)
    encoder.contract = InputContract(SENSORS["s1"])
    refused("an encoder takes one tensor", export_program, encoder, tiny_example(), tmp_path / "x.pt2")
    refused("example of image: a float32 tensor", export_program, encoder, "text", tmp_path / "x.pt2")
    refused("Conv2d states neither", export_onnx, nn.Conv2d(2, 2, 1), torch.rand(1, 2, 8, 8), tmp_path / "x.onnx")
    refused("choose one of 'any', 'fixed', None", export_program, Tiny(), tiny_example(), tmp_path / "x.pt2", size="all")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    refused(rf'{package} is needed .*pip install "cromss\[export\]"', export_onnx, Tiny(), tiny_example(), tmp_path / "x.onnx")


def test_a_full_disk(tmp_path, monkeypatch):
    def full(fd): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    refused("cannot be written .No space left", export_program, Tiny(), tiny_example(), tmp_path / "x.pt2")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    refused("cannot be made", export_program, Tiny(), tiny_example(), tmp_path / "file" / "x.pt2")
