"Portable encoders and published checkpoints: round trips, input contracts, other libraries, and every way in which a folder or a file can be wrong."
import argparse
import collections
import hashlib
import json
import os
import pickle
import re
import runpy
import shutil
import warnings
import zipfile

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn

from cromss.classes import SCHEMES
from cromss.config import WeightsError
from cromss.inputs import InputContract, InputLayer
from cromss.models import CrossModalSegmenter
from cromss.sensors import BAND_SUBSETS, SENSORS
from cromss.weights import EncoderWeights, load_encoder, load_published, read_weights, save_encoder, torchgeo_entry

S1, S2 = SENSORS["s1"], SENSORS["s2"]


def small(bands=None, **options):
    torch.manual_seed(0)
    options = {"encoder": "resnet18", "encoder_depth": 3, "decoder_channels": (16, 8, 8), **options}
    return CrossModalSegmenter(bands or {"s1": 2, "s2": 13}, **options)


@pytest.fixture(scope="module")
def model():
    return small()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    return save_encoder(model, "s2", tmp_path_factory.mktemp("saved") / "s2", scheme=SCHEMES["dynamic-world"], run="r1")


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "with spaces" / "s2")


def refused(message, call, *args, **kwargs):
    "The call is refused by a WeightsError of one line."
    with pytest.raises(WeightsError, match=message) as error: call(*args, **kwargs)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("options", [
    dict(), dict(fusion="late"), dict(architecture="deeplabv3plus", encoder_depth=None, decoder_channels=None),
    dict(encoder="efficientnet-b0", encoder_depth=3)], ids=["mid", "late", "deeplab", "efficientnet"])
def test_round_trip(options, tmp_path):
    model = small(**options)
    for sensor in ("s1", "s2"):
        encoder = load_encoder(save_encoder(model, sensor, tmp_path / sensor), bands=SENSORS[sensor])
        assert not encoder.training and encoder.spec == SENSORS[sensor]
        assert same(encoder.state_dict(), model.encoder(sensor).state_dict())


def test_tensors_carry_no_prefix(folder):
    from safetensors.torch import load_file
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight"} <= load_file(folder / "model.safetensors").keys()


def test_loading_leaves_the_random_state(folder):
    before = torch.random.get_rng_state()
    load_encoder(folder, bands=["B4"], match="name")
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_cards_snippet_runs_where_the_folder_lies(folder, monkeypatch):
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    (folder / "snippet.py").write_text(code)
    monkeypatch.chdir(folder)
    got = runpy.run_path("snippet.py")
    assert got["logits"].shape == (1, 9, 64, 64)
    with torch.no_grad():
        assert torch.equal(got["model"].encoder(got["x"][None])[-1], load_encoder(folder)(got["x"][None])[-1])


def test_the_card_states_the_contract(folder):
    text = (folder / "README.md").read_text()
    assert all(word in text for word in ("1605.58", "B8A", "in DN", "mean +- 2 std", "+1000", "flooded", "r1", "L1C"))


# bands -----------------------------------------------------------------------------------------------------------------------------

def test_nine_bands_into_thirteen_are_refused(tmp_path):
    nine = S2.select(("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B11", "B12"))
    folder = save_encoder(small({"s2": 9}), "s2", tmp_path / "nine", spec=nine)
    for match in ("strict", "name"):
        with pytest.raises(WeightsError, match=r"expected bands B1, .*\(13\), got s2 B2, .*\(9\); lacking B1, B8A, B9, B10") as error:
            load_encoder(folder, bands=S2.bands, match=match)
        assert "\n" not in str(error.value)


def test_one_sensor_is_not_another(model, tmp_path):
    folder = save_encoder(model, "s1", tmp_path / "s1")
    with pytest.raises(WeightsError, match="encoder of sensor s1, expected s2"): load_encoder(folder, bands=S2)
    with pytest.raises(WeightsError, match="expected bands B4, B3 .2., got s1 VV, VH .2.; lacking B4, B3"): load_encoder(folder, bands=["B4", "B3"])


def test_another_processing_level_is_refused(folder):
    with pytest.raises(WeightsError, match="encoder of level L1C, expected L2A"): load_encoder(folder, bands=SENSORS["s2a"], match="name")


def test_order_counts_and_names_are_normalised(folder, model):
    swapped = (S2.bands[1], S2.bands[0], *S2.bands[2:])
    with pytest.raises(WeightsError, match="match='name'"): load_encoder(folder, bands=swapped)
    encoder = load_encoder(folder, bands=swapped, match="name")
    conv = model.encoder("s2").conv1.weight
    assert torch.equal(encoder.conv1.weight[:, :2], conv[:, [1, 0]]) and encoder.spec.mean[:2] == S2.mean[1::-1]
    assert load_encoder(folder, bands="b01 B02 B03 B04 B05 B06 B07 B08 b8a B09 B10 B11 B12").spec == S2


def test_only_the_first_layer_is_cut(folder, model):
    got, want = load_encoder(folder, bands=["B8"], match="name").state_dict(), model.encoder("s2").state_dict()
    assert [k for k in want if got[k].shape != want[k].shape] == ["conv1.weight"]


def test_unknown_match(folder):
    with pytest.raises(WeightsError, match="choose one of 'strict', 'name'"): load_encoder(folder, bands=["B4"], match="nearest")


# saving ----------------------------------------------------------------------------------------------------------------------------

def test_a_description_is_wanted_where_bands_are_not_the_built_in_ones(tmp_path):
    with pytest.raises(WeightsError, match="takes 9 bands, but 13 bands are described"): save_encoder(small({"s2": 9}), "s2", tmp_path / "x")
    with pytest.raises(WeightsError, match="no such sensor is built in"): save_encoder(small({"s3": 2}), "s3", tmp_path / "x")
    with pytest.raises(WeightsError, match="has no sensor 's9'"): save_encoder(small({"s1": 2}), "s9", tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_an_equal_folder_stays_and_another_is_refused(model, folder):
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert save_encoder(model, "s2", folder, scheme=SCHEMES["dynamic-world"], run="r1") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(WeightsError, match="other weights are there"): save_encoder(model, "s2", folder, run="r2")
    save_encoder(model, "s2", folder, run="r2", overwrite=True)
    assert json.loads((folder / "config.json").read_text())["run"] == "r2"
    assert [p.name for p in folder.parent.iterdir()] == ["s2"]


def test_a_failed_write_leaves_the_old_folder(model, folder, monkeypatch):
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    def full(fd): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WeightsError, match="No space left on device"): save_encoder(model, "s2", folder, run="r2", overwrite=True)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before and [p.name for p in folder.parent.iterdir()] == ["s2"]


def test_remains_of_a_killed_process_do_not_matter(model, tmp_path):
    (tmp_path / "s1.partial").mkdir()
    (tmp_path / "s1.partial" / "model.safetensors").write_bytes(b"half")
    load_encoder(save_encoder(model, "s1", tmp_path / "s1"))
    assert [p.name for p in tmp_path.iterdir()] == ["s1"]


# damage ----------------------------------------------------------------------------------------------------------------------------

def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def rewrite(folder, **changes):
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("damage, message", [
    (lambda f: flip(f / "model.safetensors"), "checksum differs"),
    (lambda f: os.truncate(f / "model.safetensors", 1000), "1000 bytes, .* expected: cut short"),
    (lambda f: (f / "model.safetensors").unlink(), "no encoder there .model.safetensors: No such file"),
    (lambda f: shutil.rmtree(f), "no encoder there .config.json: No such file"),
    (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    (lambda f: (f / "config.json").write_text("[]"), "does not describe an encoder"),
    (lambda f: rewrite(f, version=99), "layout version 99 is not 1"),
    (lambda f: rewrite(f, sensor={"name": "s2"}), "not given"),
    (lambda f: rewrite(f, network={"architecture": "unet", "encoder": "resnet34", "encoder_depth": 3, "decoder_channels": [16, 8, 8]}), "not those of resnet34"),
], ids=["flipped", "truncated", "no tensors", "no folder", "bad json", "not ours", "version", "sensor", "other network"])
def test_damage_is_refused_in_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(WeightsError, match=message) as error: load_encoder(folder)
    assert "\n" not in str(error.value)


def test_a_pickle_is_not_run(folder, tmp_path):
    class Touch:
        def __reduce__(self): return (open, (str(tmp_path / "touched"), "w"))
    blob = pickle.dumps(Touch())
    (folder / "model.safetensors").write_bytes(blob)
    rewrite(folder, size=len(blob), sha256=hashlib.sha256(blob).hexdigest())
    with pytest.raises(WeightsError, match="not a safetensors file"): load_encoder(folder)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("network, message", [
    ({"architecture": "unet", "encoder": "tu-hf-hub:someone/model"}, "describes no network"), ({"architecture": "unet", "encoder": "../resnet18"}, "describes no network"),
    ({"architecture": "unet", "encoder": "resnet18", "checkpoint_path": "x.pth"}, "describes no network"), ([], "describes no network"),
    ({"architecture": "unet", "encoder": "resnet18", "encoder_depth": "3"}, "no number of stages"), ({"architecture": "unet", "encoder": "resnet19"}, "resnet19"),
    ({"architecture": "unet", "encoder": "resnet18", "encoder_depth": 3, "decoder_channels": 5}, "decoder_channels")], ids=str)
def test_a_config_names_a_network_and_nothing_else(folder, network, message):
    rewrite(folder, network=network)
    refused(message, load_encoder, folder)


def test_deep_json_is_refused(folder):
    (folder / "config.json").write_text("[" * 200_000)
    refused("not valid JSON", load_encoder, folder)


# what EncoderWeights promises ------------------------------------------------------------------------------------------------------

def encoder(name="resnet18", bands=13, depth=5):
    return smp.encoders.get_encoder(name, bands, depth, None)


def weights_of(module, name="resnet18", depth=None, **options):
    return EncoderWeights(name, depth, InputContract(S2), module.state_dict(), "w", **options)


def test_fill_and_build():
    module = encoder()
    weights = weights_of(module)
    assert same(weights.fill(encoder(depth=3)).state_dict(), module.state_dict())
    assert same(weights.build().state_dict(), module.state_dict()) and not weights.build().training


def test_deeper_stages_pass_where_the_library_drops_them():
    whole, shallow = encoder("tu-resnet18"), encoder("tu-resnet18", depth=3)
    assert whole.state_dict().keys() > shallow.state_dict().keys()
    got = weights_of(whole, "tu-resnet18").fill(shallow).state_dict()
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in got.items())


def test_a_module_deeper_than_what_was_trained_is_refused():
    refused("3 stages of resnet18 were trained, 4 are asked for", weights_of(encoder(depth=3), depth=3).fill, encoder(depth=4))


def test_tensors_of_a_larger_encoder_are_not_taken_for_a_smaller():
    larger = encoder("resnet34")
    refused("not in the network", weights_of(larger, "resnet34").fill, encoder("resnet18"))
    refused("missing layer1.2", weights_of(encoder(), "resnet18").fill, larger)


def test_misfits_are_listed():
    refused(r"conv1.weight float32 \(64, 13, 7, 7\) instead of float32 \(64, 9, 7, 7\).*B1, B2.*\(13\)", weights_of(encoder()).fill, encoder(bands=9))
    tensors = dict(encoder().state_dict())
    for i in range(1, 4): tensors.pop(f"layer{i}.0.conv1.weight")
    refused("missing layer1.0.conv1.weight, layer2.0.conv1.weight, layer3.0.conv1.weight$", EncoderWeights("resnet18", None, InputContract(S2), tensors, "w").build)


@pytest.mark.parametrize("spoil, message", [
    (lambda t: t.double(), "is float64, float32 is expected"), (lambda t: t.half(), "is float16"), (lambda t: t.to(torch.complex64), "is complex64"), (lambda t: t.to("meta"), "no dense tensor"),
    (lambda t: t.to_sparse(), "no dense tensor"), (lambda t: t.numpy(), "no dense tensor"), (lambda t: t[:1, :1, :1, :1].expand(1 << 16, 1 << 16, 1 << 8, 1), "no dense tensor"),
    (lambda t: t * float("nan"), "NaN or infinite"), (lambda t: t / 0, "NaN or infinite")], ids=["double", "half", "complex", "meta", "sparse", "array", "huge", "nan", "inf"])
def test_unsound_tensors_are_refused(spoil, message):
    tensors = {**encoder().state_dict()}
    tensors["conv1.weight"] = spoil(tensors["conv1.weight"])
    refused(message, EncoderWeights, "resnet18", None, InputContract(S2), tensors, "w")


def test_integers_for_floats_and_negative_variances_are_refused():
    tensors = {**encoder().state_dict()}
    ints = {**tensors, "conv1.weight": tensors["conv1.weight"].to(torch.int8)}
    refused("conv1.weight int8", EncoderWeights("resnet18", None, InputContract(S2), ints, "w").build)
    refused("bn1.running_var is negative", EncoderWeights, "resnet18", None, InputContract(S2), {**tensors, "bn1.running_var": -tensors["bn1.running_var"]}, "w")


def test_an_encoder_that_smp_has_not():
    refused("no such encoder 'resnet19'", EncoderWeights("resnet19", None, InputContract(S2), {}, "w").build)


def test_channels_are_chosen_for_encoders_of_other_libraries():
    module = encoder("tu-convnext_atto", depth=4)
    chosen = weights_of(module, "tu-convnext_atto", 4).choose(["B4", "B3"], "name")
    first = next(k for k, v in module.state_dict().items() if v.ndim == 4)
    assert torch.equal(chosen.build().state_dict()[first], module.state_dict()[first][:, [3, 2]]) and chosen.contract.sensor.bands == ("B4", "B3")


# places ----------------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def run(model, tmp_path):
    for s in ("s1", "s2"): save_encoder(model, s, tmp_path / "run" / "encoders" / s)
    (tmp_path / "run" / "config.yaml").write_text("preset: demo\n")
    return tmp_path / "run"


def test_a_folder_gives_its_sensor_only(folder):
    got = read_weights(folder, "s2")
    assert (got.encoder, got.depth, got.contract, got.options) == ("resnet18", 3, InputContract(S2), {}) and got.origin == str(folder)
    refused("encoder of sensor s2, expected s1", read_weights, folder, "s1")


def test_a_run_lists_its_sensors(run, model):
    refused("sensor=None: the run has encoders of s1, s2", read_weights, run)
    refused("sensor='dem': the run has encoders of s1, s2", read_weights, run, "dem")
    assert same(read_weights(run, "s1").tensors, model.encoder("s1").state_dict())
    assert load_encoder(run, S2, sensor="s2").contract == InputContract(S2)
    shutil.rmtree(run / "encoders" / "s1")
    assert read_weights(run).contract.sensor == S2
    shutil.rmtree(run / "encoders")
    refused("has no encoders yet", read_weights, run, "s2")


def test_places_are_found_from_the_projects_root(run, tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = cromss\n")
    (tmp_path / "nbs").mkdir()
    monkeypatch.chdir(tmp_path / "nbs")
    assert read_weights("run", "s2").contract.sensor == S2
    refused("nowhere: no encoder there", read_weights, "nowhere")


def test_options_for_the_encoder_are_told_from_the_architectures(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = small({"s2": 13}, encoder="tu-resnet18", encoder_depth=3, decoder_attention_type="scse", act_layer="silu")
    got = read_weights(save_encoder(model, "s2", tmp_path / "tu"))
    assert got.options == {"act_layer": "silu"}
    x = torch.rand(1, 13, 64, 64)
    with torch.no_grad(): assert torch.equal(got.build()(x)[-1], model.eval().encoder("s2")(x)[-1])


# published checkpoints -------------------------------------------------------------------------------------------------------------

def unet(bands):
    return smp.Unet("resnet50", encoder_weights=None, in_channels=bands, classes=9)


class Mid(nn.Module):
    "The published middle fusion, by its names."
    def __init__(self, bands):
        super().__init__()
        net = unet(bands)
        self.encoder1, self.encoder, self.decoder, self.segmentation_head = encoder("resnet50", 2), net.encoder, net.decoder, net.segmentation_head

    def forward(self, s1, s2):
        return [self.segmentation_head(self.decoder(e(x))) for e, x in ((self.encoder1, s1), (self.encoder, s2))]


class Late(nn.Module):
    "The published late fusion, by its names."
    def __init__(self, bands):
        super().__init__()
        self.model1, self.model2 = unet(2), unet(bands)

    def forward(self, s1, s2): return [self.model1(s1), self.model2(s2)]


RANDOM = torch.randn(8_000_000, generator=torch.Generator().manual_seed(0))


def settle(module):
    "Weights, affine parameters and statistics such as a training leaves, each of its own."
    module.to_empty(device="cpu")
    with torch.no_grad():
        for p in module.parameters():
            start = torch.randint(len(RANDOM) - p.numel(), ()).item()
            torch.mul(RANDOM[start:start + p.numel()].view(p.shape), (2 / p[0].numel()) ** .5, out=p)
        for m in module.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(0, .1), m.running_var.uniform_(.5, 2), m.weight.uniform_(.5, 1.5), m.bias.normal_(0, .1), m.num_batches_tracked.fill_(7)
    return module.eval()


def lightning(net, **changes):
    "What Lightning writes: settings in a Namespace, states of the optimizer and of callbacks."
    state = collections.OrderedDict((f"net.{k}", v) for k, v in net.state_dict().items())
    return {"epoch": 199, "global_step": 160000, "pytorch-lightning_version": "2.0.8", "state_dict": state, "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 200}}}},
            "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(.5), "best_k_models": {}, "dirpath": "/data", "kth_value": torch.tensor(float("inf"))}},
            "optimizer_states": [{"state": {0: {"step": torch.tensor(3.), "exp_avg": torch.rand(64, 2, 7, 7)}}, "param_groups": [{"lr": 5e-3, "betas": (.9, .999), "params": [0]}]}],
            "lr_schedulers": [{"factor": .5, "best": float("inf"), "mode_worse": float("inf"), "_last_lr": [5e-3]}], "hparams_name": "args",
            "hyper_parameters": argparse.Namespace(lr=5e-3, bands=[1, 2], nested=argparse.Namespace(a=None), name="cromss"), **changes}


def make(kind, bands):
    torch.manual_seed(bands)
    with torch.device("meta"): net = kind(bands)
    return settle(net)


def write(path, content, **options):
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize("bands", [13, 9])
@pytest.mark.parametrize("kind", [Mid, Late])
def test_the_published_networks_logits(kind, bands, tmp_path):
    net = make(kind, bands)
    path = write(tmp_path / "weights-cromss epoch=199.ckpt", lightning(net))
    images = {"s1": torch.rand(2, 2, 64, 64), "s2": torch.rand(2, bands, 64, 64)}
    model = load_published(path, {"s1": S1, "s2": S2.select(BAND_SUBSETS[bands])})
    with torch.no_grad(): want, got = net(*images.values()), model(images)
    assert all(w.isfinite().all() and w.std() > 1e-3 for w in want)
    for a, b in zip(want, got.values()): torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert model.options["fusion"] == kind.__name__.lower() and not model.training
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
    assert model.contracts == {"s1": InputContract(S1), "s2": InputContract(S2.select(BAND_SUBSETS[bands]))} and model.contracts["s2"].sensor.level == "L1C"
    if kind is Late and bands == 13: return
    weights = read_weights(path, "s2", bands=S2.select(BAND_SUBSETS[bands]))
    assert same(weights.tensors, model.encoder("s2").state_dict()) and weights.contract == model.contracts["s2"] and (weights.encoder, weights.depth) == ("resnet50", 5)
    if bands == 13: return
    assert same(load_encoder(path, sensor="s1").state_dict(), model.encoder("s1").state_dict())


def thin(state):
    "The same names and shapes, with all weights in one storage: a file of a tenth of the size."
    values = torch.rand(max(v.numel() for v in state.values())) + .1
    return {k: values[:v.numel()].view(v.shape) if v.is_floating_point() else v for k, v in state.items()}


@pytest.fixture(scope="module")
def state():
    with torch.device("meta"): names = Mid(9).state_dict()
    return thin({f"net.{k}": v if v.is_floating_point() else torch.tensor(7) for k, v in names.items()})


@pytest.fixture(scope="module")
def published(state, tmp_path_factory):
    return write(tmp_path_factory.mktemp("published") / "mid9.ckpt", {"state_dict": state})


def test_what_is_loaded_goes_out_again(published, tmp_path):
    model = load_published(published)
    folder = save_encoder(model, "s2", tmp_path / "s2")
    assert read_weights(folder).contract == model.contracts["s2"] and same(load_encoder(folder).state_dict(), model.encoder("s2").state_dict())


def test_nine_band_weights_for_thirteen_bands(published):
    for call in (read_weights, load_encoder):
        refused(r"expected bands B1, .*\(13\), got s2 B2, .*\(9\); lacking B1, B8A, B9, B10", call, published, sensor="s2", bands=S2)
    refused("lacking B1", load_published, published, {"s2": S2})
    refused("no sensor 'dem'; it has s1, s2", load_published, published, {"dem": None})
    conv = read_weights(published, "s2").tensors["conv1.weight"]
    assert torch.equal(read_weights(published, "s2", ["B4", "B3", "B2"], "name").tensors["conv1.weight"], conv[:, [2, 1, 0]])
    refused("encoder of sensor s1, expected s2", read_weights, published, "s1", S2)
    refused("sensor=None: the file has s1, s2", read_weights, published)


def test_a_stated_checksum(published):
    digest = hashlib.sha256(published.read_bytes()).hexdigest()
    load_published(published, sha256=digest.upper())
    refused("SHA-256 differs", load_published, published, sha256="0" * 64)


def test_a_network_of_one_sensor(state, tmp_path):
    net, x = make(unet, 2), torch.rand(1, 2, 64, 64)
    path = write(tmp_path / "s1.ckpt", lightning(net))
    with torch.no_grad(): torch.testing.assert_close(load_published(path)({"s1": x})["s1"], net(x), rtol=0, atol=1e-6)
    assert read_weights(path, "s1").contract == InputContract(S1)
    refused("the file has s1", read_weights, path, "s2")
    path = write(tmp_path / "s2.ckpt", {"state_dict": {k: v for k, v in state.items() if "encoder1" not in k}})
    assert read_weights(path, "s2").contract.sensor.bands == BAND_SUBSETS[9]


def test_a_leading_module_and_states_of_other_parts(state, tmp_path):
    path = write(tmp_path / "x.ckpt", {"state_dict": {**{f"module.{k}": v for k, v in state.items()}, "criterion.weight": torch.ones(9)}})
    with pytest.warns(UserWarning, match="passed over what is not the network's: criterion.weight"): model = load_published(path)
    assert torch.equal(model.encoder("s1").conv1.weight, state["net.encoder1.conv1.weight"])


@pytest.mark.parametrize("change, message", [
    (lambda s: {k: v for k, v in s.items() if "layer4.2" not in k or "encoder1" in k}, "missing nets.s2.encoder.layer4.2.bn1.bias, .* and 11 more"),
    (lambda s: {k: v for k, v in s.items() if "encoder.conv1" not in k}, "encoder.conv1.weight is missing"),
    (lambda s: {k: v for k, v in s.items() if "decoder" not in k}, "missing nets.s1.decoder"),
    (lambda s: {k: v for k, v in s.items() if "segmentation_head" not in k}, "segmentation_head.0.weight is missing"),
    (lambda s: {**s, "net.encoder.conv1.weight": torch.rand(64, 2, 7, 7)}, "the branch of s2 takes 2 bands, 3 or 9 or 10 or 12 or 13 expected: weights of another sensor"),
    (lambda s: {**s, "net.encoder1.conv1.weight": torch.rand(64, 13, 7, 7)}, "the branch of s1 takes 13 bands, 2 expected: weights of another sensor"),
    (lambda s: {**s, "net.encoder.conv1.weight": torch.rand(64, 9, 7, 7).double()}, "float64, float32 is expected"),
    (lambda s: {**s, "net.encoder.conv1.weight": torch.full((64, 9, 7, 7), torch.nan)}, "NaN"),
    (lambda s: {**s, "net.encoder.conv1.weight": torch.rand(9)}, "no weight of a convolution"),
    (lambda s: {**s, "net.encoder.bn1.running_var": -torch.ones(64)}, "no variance"),
    (lambda s: {**s, "net.decoder.blocks.0.conv1.0.weight": torch.rand(3, 3)}, "misshapen nets.s1.decoder.blocks.0.conv1.0.weight"),
    (lambda s: {**s, "net.segmentation_head.0.weight": torch.rand(1, 16, 3, 3)}, "two classes or more"),
    (lambda s: {**s, "net.decoder.blocks.9.weight": torch.rand(3)}, "unknown nets.s1.decoder.blocks.9.weight"),
    (lambda s: {**s, "net.projector.weight": torch.rand(3)}, "tensors of no published network: net.projector.weight"),
    (lambda s: {**s, "net.encoder_com.conv1.weight": torch.rand(3)}, "three branches"),
    (lambda s: {"model.nets.s1.encoder.conv1.weight": torch.rand(3)}, "model.nets found.; of a run of this package give the run's folder"),
    (lambda s: {}, "no `state_dict`"), (lambda s: [1], "no `state_dict`"), (lambda s: {1: 2}, "no `state_dict`"), (lambda s: {**s, "net.encoder.conv1.weight": "text"}, "no weight of a conv"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_other_networks_are_refused(change, message, state, tmp_path):
    refused(message, load_published, write(tmp_path / "x.ckpt", {"state_dict": change(state)}))


def test_an_encoder_alone_is_checked_too(state, tmp_path):
    state = {k: v for k, v in state.items() if "encoder" in k and "layer4.2" not in k}
    refused("missing layer4.2.bn1.bias, layer4.2.bn1.running_mean, .* and 11 more", read_weights, write(tmp_path / "x.ckpt", {"state_dict": state}), "s2")


# damaged files

def test_damaged_checkpoints_are_refused(published, tmp_path):
    path = tmp_path / "x.ckpt"
    content = bytearray(published.read_bytes())
    for size in (0, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        refused("cut short|damaged", load_published, path)
    with zipfile.ZipFile(published) as archive: part = max(archive.infolist(), key=lambda i: i.file_size)
    content[part.header_offset + part.file_size // 2] ^= 1        # one bit of a tensor
    path.write_bytes(content)
    refused(f"damaged .CRC of {part.filename} differs", load_published, path)
    refused("damaged", read_weights, path, "s2")


def test_every_flipped_byte_of_a_small_file_is_refused_or_harmless(tmp_path):
    path = write(tmp_path / "x.ckpt", {"state_dict": {"net.encoder.conv1.weight": torch.arange(6.)}})
    content, want = path.read_bytes(), [0., 1, 2, 3, 4, 5]
    from cromss.weights import _read_checkpoint
    passed = 0
    for at in range(0, len(content), 3):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1:])
        try: got = _read_checkpoint(path)
        except WeightsError as e: assert "\n" not in str(e)
        else:
            passed += 1
            assert got["net.encoder.conv1.weight"].tolist() == want      # only bytes that carry nothing: dates, padding
    assert passed < len(content) // 3


@pytest.mark.parametrize("content, message", [
    (b"", "no PyTorch checkpoint"), (b"hello", "no PyTorch checkpoint"), (pickle.dumps({"state_dict": {}}), "no PyTorch checkpoint")], ids=["empty", "text", "pickle"])
def test_other_files(content, message, tmp_path):
    (tmp_path / "x.ckpt").write_bytes(content)
    refused(message, load_published, tmp_path / "x.ckpt")
    refused(message, read_weights, tmp_path / "x.ckpt", "s1")


def test_folders_safetensors_legacy_files_and_other_archives(folder, tmp_path):
    refused("cannot be read .Is a directory", load_published, tmp_path)
    refused("cannot be read .No such file", load_published, tmp_path / "nowhere.ckpt")
    refused("no PyTorch checkpoint", read_weights, folder / "model.safetensors", "s2")
    refused("no PyTorch checkpoint", load_published, write(tmp_path / "old.ckpt", {"state_dict": {}}, _use_new_zipfile_serialization=False))
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive: archive.writestr("a.txt", "a")
    refused("a zip archive, but no PyTorch checkpoint", load_published, tmp_path / "other.zip")
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.pt")
    refused("not PyTorch's|nothing was executed", load_published, tmp_path / "script.pt")
    refused("refused|no Lightning", load_published, write(tmp_path / "module.ckpt", nn.Linear(2, 2)))
    refused("no Lightning checkpoint", load_published, write(tmp_path / "tensor.ckpt", torch.rand(3)))


def rezip(source, target, compression=zipfile.ZIP_STORED, twice=False, **parts):
    "A copy of a checkpoint's archive with other contents, by the end of their names."
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            content = parts.get(name.rpartition("/")[2].replace(".", "_"), old.read(name))
            for _ in range(1 + (twice and name.endswith("data.pkl"))): new.writestr(name, content)
    return target


def test_archives_that_claim_too_much(tmp_path):
    source = write(tmp_path / "x.ckpt", {"state_dict": {"a": torch.zeros(10_000_000)}})
    refused("claim more bytes than the file has", load_published, rezip(source, tmp_path / "bomb.ckpt", zipfile.ZIP_DEFLATED))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused("no PyTorch checkpoint", load_published, rezip(source, tmp_path / "twice.ckpt", twice=True))
    content = bytearray(rezip(source, tmp_path / "stored.ckpt").read_bytes())
    with zipfile.ZipFile(tmp_path / "stored.ckpt") as archive: start = archive.start_dir
    content[start + 20:start + 28] = b"\xf0\xff\xff\xff" * 2        # of the first part: four gigabytes
    (tmp_path / "declared.ckpt").write_bytes(content)
    refused("claim more bytes than the file has", load_published, tmp_path / "declared.ckpt")


# hostile files

class Touch:
    def __init__(self, path): self.path = path
    def __reduce__(self): return (open, (self.path, "w"))


class OwnNamespace(argparse.Namespace):
    pass


def hostile(where, path, touched):
    "A checkpoint that would touch a file when it is unpickled."
    bad, good = Touch(touched), {"net.encoder.conv1.weight": torch.rand(64, 9, 7, 7)}
    if where == "whole file": return path.write_bytes(pickle.dumps(bad))
    if where == "state_dict": return write(path, {"state_dict": bad})
    if where == "tensor": return write(path, {"state_dict": {**good, "net.encoder.bn1.weight": bad}})
    if where == "key": return write(path, {"state_dict": good, "hyper_parameters": {"a": bad}})
    if where == "namespace": return write(path, {"state_dict": good, "hyper_parameters": argparse.Namespace(a=bad)})
    if where == "callbacks": return write(path, {"state_dict": good, "callbacks": [bad]})
    if where == "subclass": return write(path, {"state_dict": good, "hyper_parameters": OwnNamespace(a=1)})
    if where == "code": return rezip(write(path.with_suffix(".good"), {"state_dict": good}), path, data_pkl=b"cos\nsystem\n(S'touch " + touched.encode() + b"'\ntR.")
    if where == "build": return rezip(write(path.with_suffix(".good"), {"state_dict": good}), path,
                                      data_pkl=b"\x80\x02cargparse\nNamespace\nq\x00)\x81}X\x09\x00\x00\x00__class__cbuiltins\nopen\nsb.")
    if where == "eval": return rezip(write(path.with_suffix(".good"), {"state_dict": good}), path, data_pkl=b"\x80\x02c__builtin__\neval\nX\x04\x00\x00\x00exit\x85R.")
    if where == "deep": return rezip(write(path.with_suffix(".good"), {"state_dict": good}), path, data_pkl=b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")
    if where == "junk": return rezip(write(path.with_suffix(".good"), {"state_dict": good}), path, data_pkl=b"\x80\x02\xff\x00\x01")


@pytest.mark.parametrize("where", ["whole file", "state_dict", "tensor", "key", "namespace", "callbacks", "subclass", "code", "build", "eval", "deep", "junk"])
def test_nothing_is_executed(where, tmp_path):
    path, touched = tmp_path / "x.ckpt", tmp_path / "touched"
    hostile(where, path, str(touched))
    for call in (load_published, lambda p: read_weights(p, "s2")):
        refused("refused, nothing was executed|no PyTorch checkpoint|no Lightning checkpoint", call, path)
    assert not touched.exists()


def test_what_other_code_admits_is_not_admitted_here(tmp_path):
    path, touched = tmp_path / "x.ckpt", tmp_path / "touched"
    write(path, {"state_dict": {"a": torch.rand(1)}, "hyper_parameters": OwnNamespace(a=1)})
    before = torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([OwnNamespace, open]):
        inside = torch.serialization.get_safe_globals()
        refused(r"it refers to .*OwnNamespace", load_published, path)
        assert set(torch.serialization.get_safe_globals()) == set(inside)
    assert set(torch.serialization.get_safe_globals()) == set(before) and not touched.exists()
    refused("no published network", load_published, write(path, {"state_dict": {"a": torch.rand(1)}, "hyper_parameters": argparse.Namespace(a=1)}))
    with pytest.raises(pickle.UnpicklingError): torch.load(path, weights_only=True)         # a Namespace is admitted within the call alone


# other libraries -------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def outgoing(tmp_path_factory):
    model = settle(small({"s2": 9}, encoder="resnet50", encoder_depth=5, decoder_channels=(16, 8, 8, 8, 8)))
    folder = save_encoder(model, "s2", tmp_path_factory.mktemp("out with blanks") / "s2", S2.select(BAND_SUBSETS[9]), SCHEMES["dynamic-world"], "r7")
    values = torch.tensor(S2.select(BAND_SUBSETS[9]).mean).view(-1, 1, 1) * (.5 + torch.rand(2, 9, 64, 64))
    values[0, 0, 0, 0] = torch.nan
    x = InputLayer(InputContract(S2.select(BAND_SUBSETS[9])))(values)
    with torch.no_grad(): return folder, values, x, load_encoder(folder)(x)


def tensors_of(folder):
    from safetensors.torch import load_file
    return load_file(folder / "model.safetensors")


def test_timm(outgoing):
    import timm
    folder, _, x, want = outgoing
    other = timm.create_model("resnet50", in_chans=9, num_classes=0)
    other.load_state_dict(tensors_of(folder))
    with torch.no_grad(): got = other.eval().forward_intermediates(x, intermediates_only=True)
    for a, b in zip(got, want[1:], strict=True): torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_torchvision(outgoing):
    from torchvision.models import resnet50
    from torchvision.models.feature_extraction import create_feature_extractor
    folder, _, x, want = outgoing
    other = resnet50(weights=None)
    other.conv1 = nn.Conv2d(9, 64, 7, stride=2, padding=3, bias=False)
    lacking, unknown = other.load_state_dict(tensors_of(folder), strict=False)
    assert set(lacking) == {"fc.weight", "fc.bias"} and not unknown
    with torch.no_grad(): got = create_feature_extractor(other.eval(), ["relu", "layer1", "layer2", "layer3", "layer4"])(x).values()
    for a, b in zip(got, want[1:], strict=True): torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_smp(outgoing):
    folder, _, x, want = outgoing
    other = smp.FPN("resnet50", encoder_weights=None, in_channels=9, classes=3)
    other.encoder.load_state_dict(tensors_of(folder))
    with torch.no_grad(): got = other.eval().encoder(x)
    for a, b in zip(got, want, strict=True): assert torch.equal(a, b)


def test_torchgeo(outgoing):
    models = pytest.importorskip("torchgeo.models")
    folder, values, x, want = outgoing
    entry = torchgeo_entry(folder)
    other = models.resnet50(weights=entry)
    assert torch.equal(entry.transforms(values), x) and torch.equal(entry.transforms(values[1]), x[1]) and entry.url.startswith("file://")
    with torch.no_grad(): torch.testing.assert_close(other.eval().forward_features(entry.transforms(values)), want[-1], rtol=0, atol=1e-5)
    assert entry.meta["bands"] == list(BAND_SUBSETS[9]) and entry.meta["in_chans"] == 9 and entry.meta["run"] == "r7" and not entry.meta["untrained"]
    published = models.ResNet50_Weights.SENTINEL2_ALL_DINO
    assert {"in_chans", "model", "publication", "bands", "ssl_method"} <= entry.meta.keys() & published.meta.keys() and str(entry) == "ResNet50_Weights.S2_CROMSS"


def test_torchgeo_refusals(tmp_path, folder):
    refused("TorchGeo has resnet18, resnet50, resnet152, not efficientnet-b0", torchgeo_entry, save_encoder(small(encoder="efficientnet-b0"), "s1", tmp_path / "e"))
    assert torchgeo_entry(folder).meta["untrained"] == ["layer3", "layer4"]
    entry = torchgeo_entry(folder)
    flip(folder / "model.safetensors")
    refused("checksum differs", torchgeo_entry, folder)
    refused("checksum differs", entry.get_state_dict, progress=True)


def test_every_snippet_of_the_card_runs(tmp_path, monkeypatch):
    pytest.importorskip("torchgeo.models")
    model = settle(small({"s2": 9}, encoder_depth=5, decoder_channels=(16, 8, 8, 8, 8)))
    folder = save_encoder(model, "s2", tmp_path / "s2", S2.select(BAND_SUBSETS[9]), SCHEMES["dynamic-world"], "r7")
    text = (folder / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 4 and "Class scheme: dynamic-world. Run: r7." in text and "never trained" not in text
    monkeypatch.chdir(folder)
    got = {}
    with torch.no_grad(): exec("\n".join(blocks), got)
    want = load_encoder(folder)(got["x"][None])
    torch.testing.assert_close(got["stages"][-1], want[-1], rtol=0, atol=1e-5)
    torch.testing.assert_close(got["features"], want[-1], rtol=1e-3, atol=1e-2)             # values over 4 std, by another order of the same steps
    assert got["scores"].shape == (1, 10)


def test_a_shallow_encoder_says_what_is_random(folder, tmp_path):
    text = (folder / "README.md").read_text()
    assert "the first 3 were trained" in text and "never trained: layer3, layer4." in text
    card = (save_encoder(small(encoder="efficientnet-b0"), "s1", tmp_path / "e") / "README.md").read_text()
    assert "the first 3 were trained" in card and "timm" not in card and "torchvision" not in card
