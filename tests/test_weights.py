"Portable encoders: round trips, input contracts, and every way in which a folder can be wrong."
import json
import os
import re
import runpy
import shutil

import pytest
import torch

from cromss.classes import SCHEMES
from cromss.config import WeightsError
from cromss.models import CrossModalSegmenter
from cromss.sensors import SENSORS
from cromss.weights import load_encoder, save_encoder

S1, S2 = SENSORS["s1"], SENSORS["s2"]


def small(bands=None, **options):
    torch.manual_seed(0)
    options = {"encoder": "resnet18", "encoder_depth": 3, "decoder_channels": (16, 8, 8), **options}
    return CrossModalSegmenter(bands or {"s1": 2, "s2": 13}, **options)


@pytest.fixture(scope="module")
def model():
    return small()


@pytest.fixture
def folder(model, tmp_path):
    return save_encoder(model, "s2", tmp_path / "with spaces" / "s2", scheme=SCHEMES["dynamic-world"], run="r1")


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
    with pytest.raises(WeightsError, match="another encoder is there"): save_encoder(model, "s2", folder, run="r2")
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
    import hashlib
    import pickle

    class Touch:
        def __reduce__(self): return (open, (str(tmp_path / "touched"), "w"))
    blob = pickle.dumps(Touch())
    (folder / "model.safetensors").write_bytes(blob)
    rewrite(folder, size=len(blob), sha256=hashlib.sha256(blob).hexdigest())
    with pytest.raises(WeightsError, match="not a safetensors file"): load_encoder(folder)
    assert not (tmp_path / "touched").exists()
