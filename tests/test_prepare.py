"Preparing: any source to a store, with what was left out counted."
import io
import json
import os
import sys

import numpy as np
import pytest
import rasterio
from test_sources import OPTICAL, RADAR, RGBN, SIZE, coded, label, plain, s1, s2, season, tree, write_tif  # noqa: F401 (fixtures)

from cromss import prepare as module
from cromss.classes import SCHEMES
from cromss.config import ConfigError, DataError, StoreError
from cromss.prepare import cut_patches, level_quantiles, patch_starts, prepare, track
from cromss.scenes import ScenesSource
from cromss.sensors import SENSORS
from cromss.sources import SkipLocation, open_source, read_raster
from cromss.store import Location, Store

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")     # affine's `*`


def report(store):
    "The report of a store, which must survive JSON."
    value = store.manifest["info"]["report"]
    assert json.loads(json.dumps(value)) == value
    return value


class Memory:
    "A source of its own kind, with no more than a source must have."
    kind, root, scheme = "memory", "memory", SCHEMES["dynamic-world"]
    sensors = {"s1": SENSORS["s1"], "s2": SENSORS["s2"].select(["B2"])}

    def __init__(self, count=3, size=24, missing=(), skip=()):
        self.count, self.size, self.missing, self.skip = count, size, missing, skip

    def keys(self): return [f"m{i}" for i in range(self.count)]

    def describe(self): return "in memory"

    def read(self, key):
        if key in self.skip: raise SkipLocation("id mismatch", f"{key}: nobody knows it")
        rng = np.random.default_rng(int(key[1:]))
        images = {n: [rng.integers(0, 256, (s.num_bands, self.size, self.size), np.uint8) for _ in range(3)] for n, s in self.sensors.items()}
        for place, sensor, t in self.missing:
            if place == key: images[sensor][t] = None
        return Location(key, ("x", "y", "z"), images, [rng.integers(0, 9, (self.size, self.size), np.uint8) for _ in range(3)])


# -- real tiles -------------------------------------------------------------------------------------------------------------------------------------

def test_seasons_sample(sample, tmp_path):
    store = prepare(sample / "seasons", tmp_path / "store", progress=False)
    assert len(store) == 3 and store.season_count == 4 and store.sensors["s2"].level == "L2A" and Store.open(tmp_path / "store").verify().ok
    source = open_source(sample / "seasons")
    for i, key in enumerate(store.keys):
        place = source.read(key)
        assert store.labelled(i) == [0, 1, 2, 3] and store.crs(i) == "EPSG:32631" and store.transform(i) == place.transform
        for s in range(4):
            got = store.read(i, s)
            assert got["valid"].all() and all(np.array_equal(got["images"][n], place.images[n][s]) for n in ("s1", "s2"))
        assert np.array_equal(store.read_labels(i), np.stack(place.labels))
    counts = np.bincount(np.concatenate([store.read_labels(i).ravel() for i in range(3)]), minlength=9)
    shares = report(store)["class_shares"]
    assert list(shares.values()) == pytest.approx(counts / counts.sum(), abs=1e-6)
    with_dn = np.concatenate([read_raster(p, lambda *_: [2]).values.ravel() for p in sample.glob("seasons/*/*/s2.tif")])      # band 2 is B3
    low, middle, high = report(store)["quantiles"]["s2"]["B3"]
    assert [low, middle, high] == pytest.approx(np.quantile(with_dn, (0.01, 0.5, 0.99)), abs=2 * 4 * 1183.63 / 255)


def test_scenes_sample(sample, tmp_path):
    store = prepare(sample / "scenes", tmp_path / "store", progress=False, patch=100)
    assert len(store) == 27 and store.has_reference and store.shape(0) == (100, 100) and store.keys[8] == "282D_485L_3_3@124,124"
    right = known = 0
    for folder in sample.glob("scenes/*/*"):
        with rasterio.open(folder / "label.tif") as a, rasterio.open(folder / "reference.tif") as b: ours, theirs = a.read(1), b.read(1)
        known, right = known + (theirs != 255).sum(), right + (ours == theirs)[theirs != 255].sum()
    found = report(store)
    assert found["kept"] == 3 and found["patches"] == 27 and found["reference"] == {"compared_pixels": int(known), "agreement": pytest.approx(right / known, abs=1e-6)}
    with rasterio.open(sample / "scenes/282D_485L_3_3/2021-07-23/s2.tif") as f:
        expected, corner = coded(f.read()[:, 124:, 124:].astype(int) - 1000, SENSORS["s2"]), f.transform
    assert np.array_equal(store.read(8, 0)["images"]["s2"], expected)
    assert store.transform(8)[2] == pytest.approx(corner.c + 1240) and store.transform(8)[5] == pytest.approx(corner.f - 1240)


@pytest.mark.parametrize("grid", ["array", "geo"])
def test_ssl4eo_sample(sample, tmp_path, grid):
    store = prepare(sample / "ssl4eo-s12", tmp_path / "store", progress=False, grid=grid)
    found = report(store)
    assert len(store) == 1 and store.seasons(0)[0].startswith("20200604") and store.shape(0) == (264, 264) and grid in store.source
    assert found["grid_offsets"]["s1"]["median"] == pytest.approx([-4, -3], abs=0.02) and found["grid_offsets"]["s2 60 m"]["largest"] == pytest.approx(2.5)
    assert found["days_between_sensors"]["largest"] == pytest.approx(11.3, abs=0.1)
    masked = found["counts"]["masked_pixels"]
    assert (masked == {"s1": 0, "s2": 0}) == (grid == "array") and store.read(0, 0)["valid"].all() == (grid == "array")


# -- any source -------------------------------------------------------------------------------------------------------------------------------------

def test_any_source(tmp_path):
    store = prepare(Memory(missing=[("m1", "s1", 0)], skip=("m2",)), tmp_path / "store", progress=False)
    assert store.keys == ["m0", "m1"] and store.seasons(1) == ("y", "z") and store.source == "in memory"
    assert report(store)["dropped"] == {"id mismatch": ["m2"]} and report(store)["details"] == {"id mismatch": ["m2: nobody knows it"]}


def test_scenes_source(tmp_path):
    store = prepare(ScenesSource(count=3, size=32, seasons=2), tmp_path / "a", progress=False)
    again = prepare("scenes", tmp_path / "b", progress=False, count=3, size=32, seasons=2)
    assert np.array_equal(store.read(1, 1)["images"]["s2"], again.read(1, 1)["images"]["s2"]) and store.id == again.id
    assert 0.3 < report(store)["reference"]["agreement"] < 0.9


def test_options_are_checked(plain, tmp_path):       # fault 10
    for options, word in (({"patch": 0}, "patch"), ({"patch": 2.5}, "patch"), ({"seasons_required": 0}, "seasons_required"), ({"shard_size": -1}, "shard_size"),
                          ({"coding": "jpeg"}, "coding"), ({"alow_resample": True}, "allow_resample")):
        with pytest.raises(ConfigError, match=word): prepare(plain, tmp_path / "store", progress=False, **options)
    with pytest.raises(ConfigError, match="grid"): prepare(Memory(), tmp_path / "store", grid="geo")
    with pytest.raises(ConfigError, match="uint8"): prepare(Memory(), tmp_path / "store", coding="raw")
    assert not (tmp_path / "store").exists()


def test_target_is_never_overwritten(plain, tmp_path):
    store = prepare(plain, tmp_path / "store", progress=False)
    with pytest.raises(StoreError): prepare(plain, tmp_path / "store", progress=False)
    assert Store.open(tmp_path / "store").id == store.id
    with pytest.raises(DataError, match="Store.open"): prepare(tmp_path / "store", tmp_path / "other", progress=False)


def test_raw_coding(plain, tmp_path):
    bad = s1(); bad[:, :2] = np.nan
    write_tif(plain / "a/2021-04/s1.tif", bad, ("VV", "VH"))
    store = prepare(plain, tmp_path / "raw", coding="raw", progress=False)
    got, bytes_ = store.read(0, 0), prepare(plain, tmp_path / "bytes", progress=False)
    assert store.coding == "raw" and got["images"]["s1"].dtype == np.float32 and np.array_equal(got["images"]["s1"][:, 2:], bad[:, 2:])
    assert not got["valid"][:2].any() and got["valid"][2:].all() and np.array_equal(got["images"]["s2"], s2())
    assert report(store)["quantiles"] == report(bytes_)["quantiles"] and report(store)["counts"] == report(bytes_)["counts"]


# -- what is left out -------------------------------------------------------------------------------------------------------------------------------

def test_incomplete_seasons_and_locations(plain, tmp_path):      # faults 11, 12
    (plain / "a/2021-04/s1.tif").unlink()
    (plain / "b/2021-07/s2.tif").write_bytes(b"no raster")
    (plain / "c").mkdir()
    season(plain / "d/2021-04")
    (plain / "d/2021-04/label.tif").unlink()
    one = prepare(plain, tmp_path / "one", progress=False)
    assert one.keys == ["a", "b"] and one.seasons(0) == ("2021-07",) and one.seasons(1) == ("2021-04",)
    found = report(one)
    assert found["dropped"] == {"missing season": ["c"], "no label": ["d"]} and found["kept"] == 2 and found["seasons"] == 2
    assert found["dropped_seasons"] == {"missing sensor": ["a/2021-04"], "bad raster": ["b/2021-07"]}
    assert str(tmp_path) not in json.dumps(found)            # details do not depend on where the data lie
    (plain / "a/2021-04/s1.tif").write_bytes((plain / "a/2021-07/s1.tif").read_bytes())
    two = prepare(plain, tmp_path / "two", progress=False, seasons_required=2)
    assert two.keys == ["a"] and report(two)["dropped"]["bad raster"] == ["b"]


def test_tree_keys_that_disagree(tree, tmp_path):                # fault 13
    for folder, key in (("s2c", "0000008"), ("dw_noisy_labels", "0000010")): (tree / folder / key).mkdir()
    for folder in ("s1", "s2c", "dw_noisy_labels"): (tree / folder / "0000011").mkdir()
    (tree / "s2c/0000011" / OPTICAL[0]).mkdir()
    (tree / "dw_noisy_labels/0000011" / OPTICAL[1]).mkdir()
    store = prepare(tree, tmp_path / "store", progress=False)
    assert store.keys == ["0000007"] and report(store)["dropped"] == {"missing sensor": ["0000008", "0000010"], "id mismatch": ["0000011"]}


def test_nothing_left(plain, tmp_path):
    for path in plain.glob("*/*/label.tif"): path.unlink()
    with pytest.raises(DataError, match="none of 2 locations can be used: 2 no label, such as a/2021-04"): prepare(plain, tmp_path / "store", progress=False)
    with pytest.raises(DataError): prepare(Memory(count=0), tmp_path / "store", progress=False)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("store") and p.is_dir() and list(p.glob("manifest.json"))] and not (tmp_path / "store").exists()


def test_systematic_faults_stop_and_leave_nothing(plain, tmp_path):     # faults 15, 17, 19
    ids = label(); ids[0, 0, 0] = 77
    write_tif(plain / "b/2021-07/label.tif", ids, nodata=255)
    with pytest.raises(DataError, match=r"77 \(1 px\)"): prepare(plain, tmp_path / "store", progress=False)
    write_tif(plain / "b/2021-07/label.tif", label(), nodata=255)
    write_tif(plain / "b/2021-04/s1.tif", 10 ** (s1() / 10), ("VV", "VH"))
    with pytest.raises(DataError, match="dB"): prepare(plain, tmp_path / "store", progress=False)
    assert not (tmp_path / "store").exists()
    write_tif(plain / "b/2021-04/s1.tif", s1(), ("VV", "VH"))
    assert len(prepare(plain, tmp_path / "store", progress=False)) == 2         # and the next attempt is not hindered


def test_masked_and_unlabelled_are_counted(plain, tmp_path):     # faults 20, 23
    radar = s1(); radar[0, :, :5] = np.nan
    write_tif(plain / "a/2021-04/s1.tif", radar, ("VV", "VH"))
    write_tif(plain / "b/2021-07/s2.tif", np.zeros((4, SIZE, SIZE), np.uint16), RGBN, 0)
    write_tif(plain / "b/2021-07/label.tif", np.full((1, SIZE, SIZE), 255, np.uint8), nodata=255)
    found = report(prepare(plain, tmp_path / "store", progress=False))
    assert found["counts"]["masked_pixels"] == {"s1": 5 * SIZE, "s2": SIZE * SIZE} and found["counts"]["seasons_without_labels"] == 1
    assert found["counts"]["unlabelled_share"] == 0.25 and found["counts"]["masked_share"]["s2"] == 0.25
    assert sum(found["class_shares"].values()) == pytest.approx(1, abs=1e-5)


# -- patches ----------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size, patch", [(24, 24), (24, 30), (25, 24), (48, 24), (100, 33), (7, 3)])
def test_patches_cover_every_pixel(size, patch):
    starts = patch_starts(size, patch)
    covered = np.zeros(size, bool)
    for s in starts: covered[s:s + patch] = True
    assert covered.all() and starts[0] == 0 and max(starts) == max(0, size - patch) and len(set(starts)) == len(starts) == -(-size // patch)


def test_patches_of_oblong_places():
    image = np.arange(24 * 60, dtype=np.uint16).astype(np.uint8).reshape(1, 24, 60)
    place = Location("p", ("x",), {"s2": [image]}, [image[0] % 9], reference=[None], valid={"s2": [image[0] > 3]})
    parts = cut_patches(place, 32)
    assert [p.key for p in parts] == ["p@0,0", "p@0,28"] and parts[1].shape == (24, 32) and parts[1].transform is None
    assert np.array_equal(parts[1].valid["s2"][0], place.valid["s2"][0][:, 28:]) and np.array_equal(parts[1].labels[0], place.labels[0][:, 28:])
    assert cut_patches(place, None) == [place] and cut_patches(place, 60) == [place]


def test_many_patches_stream(tmp_path):
    store = prepare(Memory(count=5, size=40), tmp_path / "store", patch=16, shard_size=2, progress=False)
    assert len(store) == 45 and [s["count"] for s in store.manifest["shards"]] == [18, 18, 9] and store.verify().ok


# -- numbers and progress ---------------------------------------------------------------------------------------------------------------------------

def test_level_quantiles():
    levels = np.zeros((1, 256), np.int64)
    levels[0, [10, 127, 200]] = 2, 96, 2
    sensor = SENSORS["s2"].select(["B2"])
    low, middle, high = level_quantiles(levels, sensor)["B2"]
    step = 4 * sensor.std[0] / 255
    assert [(v - sensor.mean[0]) / step + 127.5 for v in (low, middle, high)] == pytest.approx([10.5, 127.5, 200.5], abs=0.01)
    assert level_quantiles(np.zeros((1, 256), np.int64), sensor) == {}


def test_progress_lines(monkeypatch, capsys):
    clock = iter(np.arange(0, 100, 1.0))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    assert list(track(list(range(11)), every=5)) == list(range(11))
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["5 of 11 locations, 00:06 left", "10 of 11 locations, 00:01 left"]
    assert list(track([1, 2], progress=False)) == [1, 2] and not capsys.readouterr().err


def test_progress_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self): return True
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(track([1, 2, 3])) == [1, 2, 3] and "3/3" in sys.stderr.getvalue() and "location" in sys.stderr.getvalue()


def test_prepare_is_silent_when_quick(plain, tmp_path, capfd):
    prepare(plain, tmp_path / "store")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("patch", [None, 16])
def test_probabilities_are_cut_and_left_out_with_their_season(tmp_path, patch):
    class Told(Memory):
        def read(self, key):
            place = super().read(key)
            place.probabilities = [np.random.default_rng(s).integers(0, 256, (9, self.size, self.size), np.uint8) for s in range(3)]
            return place
    store = prepare(Told(2, missing=[("m1", "s1", 0)]), tmp_path / "store", patch=patch, progress=False)
    i, told = store.keys.index("m1@0,8" if patch else "m1"), np.random.default_rng(1).integers(0, 256, (9, 24, 24), np.uint8)
    assert store.seasons(i) == ("y", "z") and np.array_equal(store.read_probabilities(i, 0), told[:, :16, 8:] if patch else told)


def test_a_store_inside_its_data_is_refused(plain):
    with pytest.raises(ConfigError, match="lies in the data's own folder .*choose a folder outside"): prepare(plain, plain / "store", progress=False)


# -- odd paths (fault 39) ---------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["with some spaces", "größe-世界", "a" * 120 + "/" + "b" * 120, "100% (#1) [x]"])
def test_odd_paths_work(plain, tmp_path, name):
    data = tmp_path / name / "data"
    data.parent.mkdir(parents=True)
    plain.rename(data)
    store = prepare(data, tmp_path / name / "the store", progress=False)
    assert len(store) == 2 and store.verify().ok and store.read(0, 0)["valid"].all()


def test_names_that_are_not_utf_8(plain, tmp_path):
    "A target folder may be called anything; a location's name must be text."
    odd = os.fsencode(tmp_path) + b"/caf\xe9"
    store = prepare(plain, os.fsdecode(odd), progress=False)
    assert os.path.isdir(odd) and store.verify().ok
    os.rename(os.fsencode(plain) + b"/b", os.fsencode(plain) + b"/b\xff")
    other = prepare(plain, tmp_path / "other", progress=False)
    assert other.keys == ["a"] and report(other)["dropped"] == {"bad raster": ["b\\udcff"]}      # left out, and named in letters that can be printed


def test_clock_that_jumps(plain, tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: -1e9)
    assert len(prepare(plain, tmp_path / "store", progress=False)) == 2
