"Sources: real tiles read right, and every fault that files can have made on real files."
import os
import pickle
import warnings

import numpy as np
import pytest
import rasterio
from rasterio.crs import CRS
from rasterio.transform import Affine
from refusals import refused, skipped

from cromss import sources
from cromss.classes import SCHEMES
from cromss.config import ConfigError, DataError
from cromss.sensors import SENSORS
from cromss.sources import Grid, PlainSource, SkipLocation, file_bands, grid_offset, misfit, open_source, read_raster, resample
from cromss.trees import SSL4EOSource, pair_products, product_date

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")     # affine's `*`
UTM, PLACE, SIZE = CRS.from_epsg(32631), Affine(10, 0, 500000, 0, -10, 5600000), 24
RGBN = ("B2", "B3", "B4", "B8")


def write_tif(path, values, bands=None, nodata=None, tags=None, transform=PLACE, crs=UTM):
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(path, "w", driver="GTiff", count=len(values), height=values.shape[1], width=values.shape[2], dtype=values.dtype,
                           crs=crs, transform=transform, nodata=nodata) as f:
            f.write(values)
            f.update_tags(**(tags or {}))
            if bands: f.descriptions = bands


def s1(size=SIZE, seed=0):
    return np.random.default_rng(seed).normal(-14, 3, (2, size, size)).astype(np.float32)


def s2(count=4, size=SIZE, seed=0):
    return np.random.default_rng(seed).integers(600, 3000, (count, size, size)).astype(np.uint16)


def label(size=SIZE):
    return np.tile(np.arange(size, dtype=np.uint8) * 9 // size, (1, size, 1))


def season(folder, s1_=None, s2_=None, label_=None, **grid):
    write_tif(folder / "s1.tif", s1() if s1_ is None else s1_, ("VV", "VH"), np.nan, **grid)
    write_tif(folder / "s2.tif", s2() if s2_ is None else s2_, RGBN, 0, **grid)
    write_tif(folder / "label.tif", label() if label_ is None else label_, ("label",), 255, **grid)


@pytest.fixture
def plain(tmp_path):
    for place in ("a", "b"):
        for date in ("2021-04", "2021-07"): season(tmp_path / "plain" / place / date)
    return tmp_path / "plain"


def coded(values, sensor):
    "The published coding by hand."
    mean, std = (np.array(v).reshape(-1, 1, 1) for v in (sensor.mean, sensor.std))
    return np.trunc(np.clip((values.astype(np.float64) - (mean - 2 * std)) / (4 * std), 0, 1) * 255).astype(np.uint8)


# -- real tiles -------------------------------------------------------------------------------------------------------------------------------------

def test_seasons_sample(sample):
    source = open_source(sample / "seasons")
    assert source.kind == "plain" and len(source.keys()) == 3 and source.sensors["s2"].level == "L2A" and source.sensors["s2"].num_bands == 9
    sizes = set()
    for key in source.keys():
        place = source.read(key)
        place.check(source.sensors, source.scheme, "uint8")
        assert len(place.seasons) == 4 and place.seasons == tuple(sorted(place.seasons)) and place.crs == "EPSG:32631"
        sizes.add(place.shape)
        with rasterio.open(sample / "seasons" / key / place.seasons[2] / "s2.tif") as f: dn, transform = f.read(), f.transform
        with rasterio.open(sample / "seasons" / key / place.seasons[2] / "s1.tif") as f: db = f.read()
        with rasterio.open(sample / "seasons" / key / place.seasons[2] / "label.tif") as f: ids = f.read(1)
        assert np.array_equal(place.images["s2"][2], coded(dn, SENSORS["s2a"].select(source.sensors["s2"].bands)))
        assert np.array_equal(place.images["s1"][2], coded(db, SENSORS["s1"])) and np.array_equal(place.labels[2], ids)
        assert place.transform == tuple(transform)[:6] and place.reference is None
    assert sizes == {(64, 64), (100, 100)}


def test_scenes_sample(sample):
    source = open_source(sample / "scenes", bands={"s2": 3})
    assert source.sensors["s2"].bands == ("B4", "B3", "B2")
    for key in source.keys():
        place = source.read(key)
        with rasterio.open(sample / "scenes" / key / place.seasons[0] / "s2.tif") as f:
            dn = f.read([4, 3, 2]).astype(int) + int(f.tags().get("RADIO_ADD_OFFSET", 0))
        assert np.array_equal(place.images["s2"][0], coded(dn, SENSORS["s2"].select(("B4", "B3", "B2"))))
        assert place.shape == (224, 224) and set(np.unique(place.reference[0])) <= {*range(9), 255}
    assert "282D_485L_3_3" in source.keys()     # the one with the offset


@pytest.mark.parametrize("grid", ["array", "geo"])
def test_ssl4eo_sample(sample, grid):
    source = open_source(sample / "ssl4eo-s12", grid=grid)
    reading = source.examine("0000200")
    place = reading.location
    place.check(source.sensors, source.scheme, "uint8")
    assert source.kind == "ssl4eo-s12" and place.shape == (264, 264) and not reading.dropped
    assert [s[:8] for s in place.seasons] == ["20200604", "20200823"] and reading.days == pytest.approx([2.8, 11.3], abs=0.1)
    assert reading.offsets["s1"] == pytest.approx((-4, -3), abs=0.02)      # 4 px west, 3 px north
    assert reading.offsets["s2 20 m"] == pytest.approx((-0.5, -0.5), abs=0.01) and reading.offsets["s2 60 m"] == pytest.approx((-2.5, -2.5), abs=0.01)
    tree = sample / "ssl4eo-s12"
    with rasterio.open(tree / "s2c/0000200" / place.seasons[1] / "B4.tif") as f: red = f.read()
    with rasterio.open(tree / "dw_noisy_labels/0000200" / place.seasons[1] / "label.tif") as f: ids = f.read(1)
    covered = slice(None) if grid == "array" else slice(0, 260)            # the 60 m bands end 2.5 px before the 10 m bands do
    assert np.array_equal(place.images["s2"][1][3:4, covered, covered], coded(red, SENSORS["s2"].select(["B4"]))[:, covered, covered])
    assert np.array_equal(place.labels[1], ids)
    radar = next((tree / "s1/0000200").glob("*_20200903T*")) / "VH.tif"
    with rasterio.open(radar) as f: vh = f.read()
    expected = coded(vh, SENSORS["s1"].select(["VH"]))[0]
    if grid == "array":
        assert place.valid is None and np.array_equal(place.images["s1"][1][1], expected)
    else:
        valid = place.valid["s1"][1]
        assert valid[:262, :262].all() and not valid[262:].any() and not valid[:, 262:].any()
        ours, theirs = place.images["s1"][1][1][100:120, 100:120].astype(float), expected[103:123, 104:124].astype(float)
        assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.6       # moved by (4, 3) it is the same scene
        with rasterio.open(tree / "s2c/0000200" / place.seasons[1] / "B12.tif") as f: coarse = f.read(1).astype(float)
        b12 = place.images["s2"][1][12]     # pixel (0, 1) of the 10 m grid lies between columns 0 and 1 of the 20 m grid, both shifted by half a pixel
        row, column = 100, 100              # its centre is 100.5 + 0.5 px from the 20 m origin, which is 50.5 coarse pixels: the centre of column 50
        assert abs(int(b12[row, column]) - int(coded(coarse[None, None, 50, 50:51], SENSORS["s2"].select(["B12"])).item())) <= 1


def test_ssl4eo_single_sensor(sample):
    only = open_source(sample / "ssl4eo-s12", sensors=("s1",)).examine("0000200")
    both = open_source(sample / "ssl4eo-s12").read("0000200")
    assert list(only.location.images) == ["s1"] and np.array_equal(only.location.images["s1"][1], both.images["s1"][1])
    assert only.offsets["s1"] == pytest.approx((-4, -3), abs=0.02) and np.array_equal(only.location.labels[0], both.labels[0])
    few = open_source(sample / "ssl4eo-s12", sensors=("s2",), bands={"s2": ["B12", "B1"]}).read("0000200")     # no 10 m band chosen, 10 m grid
    assert few.shape == (264, 264) and np.array_equal(few.images["s2"][0], both.images["s2"][0][[12, 0]])


def test_samples_above_are_named(sample):
    refused(lambda: open_source(sample), "scenes (plain)", "ssl4eo-s12 (ssl4eo-s12)", "looked for")


# -- what a source is -------------------------------------------------------------------------------------------------------------------------------

def test_options_are_checked(plain, tmp_path):          # fault 10
    for options, hint in (({"sensor": "s1"}, "sensors"), ({"alow_resample": True}, "allow_resample"), ({"kind": "plane"}, "plain")):
        with pytest.raises(ConfigError, match=hint): open_source(plain, **options)
    with pytest.raises(ConfigError, match="sensor in bands"): PlainSource(plain, sensors=("s1",), bands={"s2": 3})
    with pytest.raises(ConfigError, match="level"): PlainSource(plain, level="L3")
    with pytest.raises(ConfigError, match="coding"): PlainSource(plain, coding="float")
    (plain / "dataset.yaml").write_text("class: dynamic-world\n")
    with pytest.raises(ConfigError, match="classes"): PlainSource(plain)


def test_no_data_set(tmp_path):
    refused(lambda: open_source(tmp_path), "looked for")
    refused(lambda: open_source(tmp_path / "nothing"), "no such file or folder")
    season(tmp_path / "x")
    refused(lambda: open_source(tmp_path), "above this one")
    (tmp_path / "manifest.json").write_text("{}")
    refused(lambda: open_source(tmp_path), "Store.open")


def test_no_handle_stays_open(plain):                    # fault 28
    source = PlainSource(plain)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    again = pickle.loads(pickle.dumps(source))
    for key in source.keys(): assert np.array_equal(again.read(key).images["s2"][0], source.read(key).images["s2"][0])
    if before is not None: assert len(os.listdir("/proc/self/fd")) <= before
    error = pickle.loads(pickle.dumps(SkipLocation("no label", "a")))
    assert (error.reason, error.detail) == ("no label", "a")


def test_raw_coding(plain):
    bad = s1(); bad[1, 0, 0] = np.nan
    write_tif(plain / "a/2021-04/s1.tif", bad, ("VV", "VH"))
    place = PlainSource(plain, coding="raw").read("a")
    image = place.images["s1"][0]
    assert image.dtype == np.float32 and np.isnan(image[:, 0, 0]).all() and np.array_equal(image[:, 1:], bad[:, 1:])
    assert not place.valid["s1"][0][0, 0] and place.valid["s1"][0].sum() == SIZE * SIZE - 1


# -- bands ------------------------------------------------------------------------------------------------------------------------------------------

def test_bands_in_any_order_and_spelling(plain):
    write_tif(plain / "b/2021-04/s2.tif", s2()[::-1], ("B08", "B04", "B03", "b2"), 0)
    write_tif(plain / "b/2021-04/s1.tif", s1()[::-1], ("vh", "vv"))
    place = PlainSource(plain).read("b")
    assert np.array_equal(place.images["s2"][0], place.images["s2"][1]) and np.array_equal(place.images["s1"][0], place.images["s1"][1])


def test_bands_without_names(tmp_path):
    at = tmp_path / "a" / "2021"
    season(at)
    write_tif(at / "s2.tif", s2(13))
    write_tif(at / "s1.tif", s1())
    assert PlainSource(tmp_path, bands={"s2": 9}, sensors=("s2",))
    write_tif(at / "s2.tif", s2(12))
    refused(lambda: PlainSource(tmp_path), "12 bands without names", "13")
    assert PlainSource(tmp_path, level="L2A").sensors["s2"].bands == SENSORS["s2a"].bands
    write_tif(at / "s2.tif", s2(4), ("B2", "B3", "", "B4"))
    refused(lambda: PlainSource(tmp_path), "band 3 has no name")
    write_tif(at / "s2.tif", s2(4), ("B2", "B3", "B02", "B4"))
    refused(lambda: PlainSource(tmp_path), "two bands are called B2")
    write_tif(at / "s2.tif", s2(4), ("B2", "B3", "B4", "SCL"))
    refused(lambda: PlainSource(tmp_path), "no band SCL")
    assert PlainSource(tmp_path, bands={"s2": 3}).read("a").images["s2"][0].shape[0] == 3


def test_locations_with_other_bands(plain):
    write_tif(plain / "b/2021-04/s2.tif", s2(3), ("B2", "B3", "B4"), 0)
    refused(lambda: PlainSource(plain).read("b"), "b/2021-04/s2.tif", "a/2021-04/s2.tif", "bands=")
    assert len(PlainSource(plain, bands={"s2": 3}).read("b").seasons) == 2
    refused(lambda: PlainSource(plain, bands={"s2": 9}), "B5")


def test_levels_are_kept_apart(plain):
    write_tif(plain / "b/2021-04/s2.tif", s2(), RGBN, 0, {"LEVEL": "L2A"})
    refused(lambda: PlainSource(plain).read("b"), "L2A", "L1C", "a/2021-04")
    refused(lambda: PlainSource(plain, level="L1C").read("b"), "contradicts")
    assert PlainSource(plain, level="L2A").read("a").images["s2"][0].mean() != PlainSource(plain, level="L1C").read("a").images["s2"][0].mean()


def test_other_sensors_and_classes(plain):
    for place in ("a", "b"): write_tif(plain / place / "dem.tif", np.full((2, SIZE, SIZE), 7, np.int16), ("elevation", "slope"))   # one for all seasons
    (plain / "dataset.yaml").write_text("sensors: {dem: {bands: [elevation, slope], mean: [500, 5], std: [500, 8], units: m}}\n"
                                        "classes: {name: coarse, names: [low, high], remap: {0: 0, 1: 0, 2: 0, 3: 0, 4: 1, 5: 1, 6: 1, 7: 1, 8: 255}}\n")
    source = PlainSource(plain, sensors=("s2", "dem"))
    place = source.read("a")
    assert place.images["dem"][1].shape == (2, SIZE, SIZE) and set(np.unique(place.labels[0])) == {0, 1, 255} and source.scheme.names == ("low", "high")
    refused(lambda: PlainSource(plain, sensors=("s2", "lidar")), "no readable lidar raster")
    write_tif(plain / "a/2021-04/lidar.tif", np.zeros((1, SIZE, SIZE), np.float32))
    refused(lambda: PlainSource(plain, sensors=("s2", "lidar")), "unknown sensor 'lidar'", "dataset.yaml")


def test_file_bands():
    assert file_bands(("b08", "B8a"), SENSORS["s2"], "x") == ("B8", "B8A") and file_bands((None, None), SENSORS["s1"], "x") == ("VV", "VH")


# -- missing and damaged files: left out, reported ----------------------------------------------------------------------------------------------------

def test_missing_files_drop_the_season(plain):           # faults 11, 12
    (plain / "a/2021-04/s1.tif").unlink()
    (plain / "b/2021-07/label.tif").unlink()
    source = PlainSource(plain)
    a, b = source.examine("a"), source.examine("b")
    assert a.location.seasons == ("2021-07",) and a.dropped[0][:2] == ("missing sensor", "a/2021-04")
    assert b.location.seasons == ("2021-04",) and b.dropped[0][:2] == ("no label", "b/2021-07")
    assert len(PlainSource(plain, sensors=("s2",)).read("a").seasons) == 2
    (plain / "a/2021-07/s1.tif").unlink()
    assert "no s1 raster" in skipped(lambda: source.read("a"), "missing sensor")
    (plain / "empty").mkdir()
    skipped(lambda: source.read("empty"), "missing season")
    refused(lambda: source.read("elsewhere"), "no such location")


@pytest.mark.parametrize("damage", ["truncated", "empty", "strip", "text"])
def test_damaged_files_drop_the_season(plain, damage):   # fault 25
    path = plain / "a/2021-04/s2.tif"
    with rasterio.open(path, "w", driver="GTiff", count=4, height=SIZE, width=SIZE, dtype="uint16", crs=UTM, transform=PLACE, compress="deflate") as f:
        f.write(s2())
        f.descriptions = RGBN
    data = path.read_bytes()
    path.write_bytes({"truncated": data[:len(data) // 2], "empty": b"", "strip": data[:len(data) // 2] + b"\xff" * 200 + data[len(data) // 2 + 200:], "text": b"not a raster"}[damage])
    source = PlainSource(plain)                          # the bands come from the next file that can be read
    reading = source.examine("a")
    assert reading.location.seasons == ("2021-07",) and reading.dropped[0][0] == "bad raster" and "s2.tif" in reading.dropped[0][2]


# -- grids ------------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, size", [("label", SIZE - 1), ("s1", SIZE // 2), ("label", SIZE // 2), ("s1", SIZE + 1)])
def test_other_sizes_are_refused(plain, name, size):     # fault 14
    values = s1(size) if name == "s1" else label(size)
    write_tif(plain / f"a/2021-07/{name}.tif", values, transform=PLACE * Affine.scale(SIZE // size if size < SIZE - 1 else 1))
    refused(lambda: PlainSource(plain).read("a"), f"2021-07/{name}.tif", f"{size} x {size} px", f"{SIZE} x {SIZE}", "allow_resample")
    place = PlainSource(plain, allow_resample=True).read("a")
    assert place.shape == (SIZE, SIZE) and set(np.unique(place.labels[1])) <= {*range(9), 255}


@pytest.mark.parametrize("name", ["s1", "label"])
def test_shifted_rasters_are_refused(plain, name):       # fault 15
    values = s1() if name == "s1" else label()
    write_tif(plain / f"a/2021-04/{name}.tif", values, transform=PLACE * Affine.translation(-0.4, 0.4))
    assert PlainSource(plain).read("a").transform == tuple(PLACE)[:6]
    write_tif(plain / f"a/2021-04/{name}.tif", values, transform=PLACE * Affine.translation(-3, -0.7))
    refused(lambda: PlainSource(plain).read("a"), f"{name}.tif", "3.00 px west", "0.70 px north")
    place = PlainSource(plain, allow_resample=True).read("a")
    if name == "s1": assert not place.valid["s1"][0][:, -3:].any() and place.valid["s1"][0][2:-2, 2:-4].all()
    else: assert (place.labels[0][:, -3:] == 255).all() and np.array_equal(place.labels[0][2, :-3], label()[0, 2, 3:])


def test_other_zone_is_refused(plain):                   # fault 15
    write_tif(plain / "a/2021-04/s1.tif", s1(), crs=CRS.from_epsg(32632))
    refused(lambda: PlainSource(plain).read("a"), "EPSG:32632", "EPSG:32631", "s1.tif")


def test_seasons_lie_on_one_grid(plain):
    season(plain / "a/2021-07", transform=PLACE * Affine.translation(5, 0))
    refused(lambda: PlainSource(plain).read("a"), "5.00 px east", "2021-07/s2.tif", "2021-04/s2.tif")


def test_scale_counts_too(plain):
    write_tif(plain / "a/2021-04/s1.tif", s1(), transform=PLACE * Affine.scale(1.1))     # same corner, larger pixels
    refused(lambda: PlainSource(plain).read("a"), "2.40 px east")


def test_rasters_without_crs(plain):                     # fault 16
    write_tif(plain / "a/2021-04/label.tif", label(), crs=None, transform=Affine.identity())
    refused(lambda: PlainSource(plain).read("a"), "label.tif", "no CRS")
    refused(lambda: PlainSource(plain, allow_resample=True).read("a"), "label.tif", "no CRS")
    for date in ("2021-04", "2021-07"): season(plain / "a" / date, crs=None, transform=Affine.identity())
    place = PlainSource(plain).read("a")
    assert place.crs is None and place.transform is None and np.array_equal(place.labels[0], label()[0])


def test_rotated_and_mirrored_are_refused(plain):        # fault 16
    write_tif(plain / "a/2021-04/s1.tif", s1(), transform=PLACE * Affine.rotation(10))
    refused(lambda: PlainSource(plain).read("a"), "s1.tif", "rotated")
    write_tif(plain / "a/2021-04/s1.tif", s1(), transform=Affine(-10, 0, 500240, 0, -10, 5600000))
    refused(lambda: PlainSource(plain).read("a"), "s1.tif", "westward")


def test_south_up_is_flipped(plain):                     # fault 16
    ids = label().transpose(0, 2, 1)                     # classes by row
    expected = PlainSource(plain).read("b")
    season(plain / "a/2021-04", label_=ids)
    write_tif(plain / "a/2021-04/s1.tif", s1()[:, ::-1], ("VV", "VH"), transform=Affine(10, 0, 500000, 0, 10, 5600000 - 10 * SIZE))
    place = PlainSource(plain).read("a")
    assert np.array_equal(place.images["s1"][0], expected.images["s1"][0]) and np.array_equal(place.labels[0], ids[0])
    season(plain / "a/2021-04", s1()[:, ::-1], s2()[:, ::-1], ids[:, ::-1], transform=Affine(10, 0, 500000, 0, 10, 5600000 - 10 * SIZE))
    place = PlainSource(plain).read("a")
    assert place.transform == tuple(PLACE)[:6] and np.array_equal(place.labels[0], ids[0]) and np.array_equal(place.images["s2"][0], expected.images["s2"][0])


def test_offset_across_zones():
    here = Grid((64, 64), Affine(10, 0, 700000, 0, -10, 5600000), UTM)
    there = Grid((64, 64), Affine(10, 0, 276000, 0, -10, 5602000), CRS.from_epsg(32632))
    east, south = grid_offset(there, here)
    assert np.isfinite([east, south]).all() and misfit(there, here).startswith("is in EPSG:32632")
    assert grid_offset(here, here) == pytest.approx((0, 0), abs=1e-6)


def test_resample_never_invents_a_class():
    ids = np.random.default_rng(0).choice([0, 8], (1, 64, 64)).astype(np.uint8)
    grid, target = Grid((64, 64), PLACE, UTM), Grid((150, 150), PLACE * Affine.translation(-3.3, 2.6) * Affine.scale(0.43), UTM)
    assert set(np.unique(resample(ids, grid, target))) == {0, 8, 255}


# -- values -----------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("values, word", [
    (s2().astype(np.float32) / 10000, "reflectance"), ((s2() // 12).astype(np.uint8), "0..255"), (s2().astype(np.complex64), "complex")])
def test_s2_in_other_units_is_refused(plain, values, word):      # fault 17
    write_tif(plain / "a/2021-04/s2.tif", values, RGBN)
    text = refused(lambda: PlainSource(plain).read("a"), "a/2021-04/s2.tif", word)
    if word != "complex": assert "median" in text and "max" in text


def test_s1_in_power_is_refused(plain):                          # fault 17
    write_tif(plain / "a/2021-04/s1.tif", 10 ** (s1() / 10), ("VV", "VH"))
    refused(lambda: PlainSource(plain).read("a"), "a/2021-04/s1.tif", "dB", "median")


def test_offset_is_subtracted_once(plain):                       # fault 18
    write_tif(plain / "a/2021-04/s2.tif", s2() + 1000, RGBN, 0, {"RADIO_ADD_OFFSET": "-1000"})
    place = PlainSource(plain).read("a")
    assert np.array_equal(place.images["s2"][0], place.images["s2"][1])
    write_tif(plain / "a/2021-04/s2.tif", s2() + 1000, RGBN, 0, {"RADIO_ADD_OFFSET": "minus"})
    refused(lambda: PlainSource(plain).read("a"), "RADIO_ADD_OFFSET='minus'")


def test_offset_without_a_tag_is_refused(sample, tmp_path):      # fault 18, on the real scene that has the offset
    scene = sample / "scenes/282D_485L_3_3/2021-07-23"
    for name in ("s1", "s2", "label"):
        with rasterio.open(scene / f"{name}.tif") as f: values, profile, names, tags = f.read(), f.profile, f.descriptions, f.tags()
        tags.pop("RADIO_ADD_OFFSET", None)
        write_tif(tmp_path / "a/2021" / f"{name}.tif", values, names, profile["nodata"], tags, profile["transform"], profile["crs"])
    refused(lambda: PlainSource(tmp_path).read("a"), "s2.tif", "RADIO_ADD_OFFSET=-1000", "median")


def test_nodata_and_nan_are_masked(plain):                       # faults 20, 23
    radar, optical = s1(), s2()
    radar[0, :, :3], radar[1, 0, :], radar[1, 5, 5] = np.nan, -np.inf, np.inf
    optical[2, 7, 7], optical[:, 8, 8] = 65535, 0
    write_tif(plain / "a/2021-04/s1.tif", radar, ("VV", "VH"))
    write_tif(plain / "a/2021-04/s2.tif", optical, RGBN, 65535)
    place = PlainSource(plain).read("a")
    valid = np.ones((SIZE, SIZE), bool); valid[:, :3] = valid[0] = valid[5, 5] = False
    assert np.array_equal(place.valid["s1"][0], valid) and place.valid["s1"][1] is None and (place.images["s1"][0][:, ~valid] == 0).all()
    assert sorted(map(tuple, np.argwhere(~place.valid["s2"][0]))) == [(7, 7), (8, 8)]


def test_all_nodata_is_kept_and_masked(plain):                   # fault 20
    write_tif(plain / "a/2021-04/s1.tif", np.full((2, SIZE, SIZE), np.nan, np.float32), ("VV", "VH"))
    write_tif(plain / "a/2021-04/s2.tif", np.zeros((4, SIZE, SIZE), np.uint16), RGBN, 0)
    write_tif(plain / "a/2021-04/label.tif", np.full((1, SIZE, SIZE), 255, np.uint8), nodata=255)
    place = PlainSource(plain).read("a")
    assert len(place.seasons) == 2 and not place.valid["s1"][0].any() and not place.valid["s2"][0].any() and (place.labels[0] == 255).all()


# -- labels -----------------------------------------------------------------------------------------------------------------------------------------

def test_float_labels_are_refused(plain):                        # fault 17
    write_tif(plain / "a/2021-04/label.tif", label().astype(np.float32))
    refused(lambda: PlainSource(plain).read("a"), "label.tif", "float32")


def test_labels_outside_the_scheme_are_refused(plain):           # fault 19
    ids = label(); ids[0, 0, :5] = 37
    write_tif(plain / "a/2021-04/label.tif", ids, nodata=255)
    refused(lambda: PlainSource(plain).read("a"), "label.tif", "37 (5 px)")
    write_tif(plain / "a/2021-04/label.tif", np.repeat(label(), 2, 0))
    refused(lambda: PlainSource(plain).read("a"), "2 bands")
    write_tif(plain / "a/2021-04/label.tif", label().astype(np.int16) - 1, nodata=-1)
    assert (PlainSource(plain).read("a").labels[0] == 255).sum() == (label() == 0).sum()


def test_nodata_of_labels(plain):                                # fault 19
    write_tif(plain / "a/2021-04/label.tif", label(), nodata=0)
    refused(lambda: PlainSource(plain).read("a"), "label.tif", "'water'", "label_nodata")
    (plain / "dataset.yaml").write_text("label_nodata: [0, 255]\n")
    assert set(np.unique(PlainSource(plain).read("a").labels[0])) == {*range(1, 9), 255}
    (plain / "dataset.yaml").write_text("label_nodata: [255]\n")
    assert set(np.unique(PlainSource(plain).read("a").labels[0])) == set(range(9))
    (plain / "dataset.yaml").write_text("label_nodata: none\n")
    with pytest.raises(ConfigError, match="label_nodata"): PlainSource(plain)
    (plain / "dataset.yaml").unlink()
    write_tif(plain / "a/2021-04/label.tif", label() + 1, nodata=0)      # OpenStreetMap's own values, 0 is no class there
    (plain / "b").rename(plain.parent / "b")
    (plain / "a/2021-07/label.tif").write_bytes((plain / "a/2021-04/label.tif").read_bytes())
    assert np.array_equal(PlainSource(plain, scheme="osm").read("a").labels[0], label()[0])
    assert PlainSource(plain, scheme=SCHEMES["osm"]).scheme.name == "osm"


# -- the SSL4EO-S12 tree ----------------------------------------------------------------------------------------------------------------------------

OPTICAL = ("20200604T054639_20200604T054831_T43RCP", "20200823T054639_20200823T055618_T43RCP")
RADAR = ("S1B_IW_GRDH_1SDV_20200607T010800_20200607T010825_032904_03CFBA_D457", "S1A_IW_GRDH_1SDV_20200903T131212_20200903T131237_034195_03F8F5_AC1C")
FACTOR = {"B1": 6, "B9": 6, "B10": 6, "B2": 1, "B3": 1, "B4": 1, "B8": 1}


@pytest.fixture
def tree(tmp_path):
    root, rng = tmp_path / "tree", np.random.default_rng(0)
    for i, (optical, radar) in enumerate(zip(OPTICAL, RADAR)):
        for band, mean in zip(SENSORS["s2"].bands, SENSORS["s2"].mean):
            f = FACTOR.get(band, 2)
            write_tif(root / "s2c/0000007" / optical / f"{band}.tif", (mean + rng.normal(0, 5, (1, SIZE // f, SIZE // f))).astype(np.uint16), transform=PLACE * Affine.scale(f))
        for b, band in enumerate(("VV", "VH")): write_tif(root / "s1/0000007" / radar / f"{band}.tif", s1(seed=i)[b:b + 1])
        write_tif(root / "dw_noisy_labels/0000007" / optical / "label.tif", label(), nodata=255)
    return root


def test_pairs_by_date():
    assert pair_products(OPTICAL[::-1], RADAR) == dict(zip(OPTICAL, RADAR))       # S1A sorts before S1B, but came later
    assert pair_products(OPTICAL, RADAR[1:]) == {OPTICAL[1]: RADAR[1]} and pair_products(OPTICAL[:1], RADAR) == {OPTICAL[0]: RADAR[0]}
    assert pair_products(OPTICAL, []) == {}
    with pytest.raises(DataError, match="date"): product_date("summer")
    with pytest.raises(DataError, match="date"): product_date("20201399T000000_x")


def test_tree_reads_and_stacks(tree):
    source = open_source(tree)
    place = source.read("0000007")
    assert place.seasons == OPTICAL and place.valid is None and "s2c" in source.describe()
    for i in (0, 1): assert np.array_equal(place.images["s1"][i], coded(s1(seed=i), SENSORS["s1"]))
    assert np.array_equal(place.labels[0], label()[0])


def test_tree_season_order_is_by_date(tree):
    (tree / "s2c/0000007" / OPTICAL[0]).rename(tree / "s2c/0000007/20210604T054639_20210604T054831_T43RCP")
    (tree / "dw_noisy_labels/0000007" / OPTICAL[0]).rename(tree / "dw_noisy_labels/0000007/20210604T054639_20210604T054831_T43RCP")
    (tree / "s1/0000007" / RADAR[0]).rename(tree / "s1/0000007" / RADAR[0].replace("2020", "2021"))
    place = open_source(tree).read("0000007")
    assert [s[:4] for s in place.seasons] == ["2020", "2021"] and np.array_equal(place.images["s1"][1], coded(s1(seed=0), SENSORS["s1"]))


def test_tree_mismatches_are_left_out(tree):             # faults 11, 12, 13
    for folder, key in (("s2c", "0000008"), ("s1", "0000009"), ("dw_noisy_labels", "0000010")): (tree / folder / key).mkdir()
    for folder in ("s1", "s2c"): (tree / folder / "0000011").mkdir()
    source = open_source(tree)
    assert source.keys() == ["0000007", "0000008", "0000009", "0000010", "0000011"]
    for key in ("0000008", "0000009", "0000010"): skipped(lambda: source.read(key), "missing sensor")
    skipped(lambda: source.read("0000011"), "no label")
    (tree / "dw_noisy_labels/0000011/20190604T054639_20190604T054831_T43RCP").mkdir(parents=True)
    skipped(lambda: source.read("0000011"), "missing season")
    (tree / "s2c/0000011" / OPTICAL[0]).mkdir()
    skipped(lambda: source.read("0000011"), "id mismatch")
    (tree / "s1/0000007" / RADAR[0] / "VV.tif").unlink()
    reading = source.examine("0000007")
    assert reading.location.seasons == OPTICAL[1:] and reading.dropped[0][0] == "missing sensor" and "VV" in reading.dropped[0][2]


def test_tree_one_radar_product_missing(tree):
    for path in (tree / "s1/0000007" / RADAR[0]).iterdir(): path.unlink()
    (tree / "s1/0000007" / RADAR[0]).rmdir()
    reading = open_source(tree).examine("0000007")
    assert reading.location.seasons == OPTICAL[1:] and reading.dropped[0][:2] == ("missing sensor", f"0000007/{OPTICAL[0]}")


def test_tree_sizes(tree):                               # fault 14
    path = tree / "s2c/0000007" / OPTICAL[0] / "B5.tif"
    write_tif(path, s2(1, 11), transform=PLACE * Affine.scale(2))
    reading = open_source(tree).examine("0000007")
    assert reading.dropped[0][0] == "grid mismatch" and "11 x 11" in reading.dropped[0][2] and len(reading.location.seasons) == 1
    write_tif(path, s2(1, 12), transform=PLACE * Affine.scale(2) * Affine.translation(100, 0))
    reading = open_source(tree).examine("0000007")
    assert reading.dropped[0][0] == "grid mismatch" and "another place" in reading.dropped[0][2]


@pytest.mark.parametrize("grid", ["array", "geo"])
def test_tree_labels_by_nearest(tree, grid):             # method 1.11 C 1: the published code used a bicubic filter
    ids = np.random.default_rng(0).choice([0, 8], (1, 13, 13)).astype(np.uint8)
    write_tif(tree / "dw_noisy_labels/0000007" / OPTICAL[0] / "label.tif", ids, nodata=255, transform=PLACE * Affine.scale(SIZE / 13))
    reading = open_source(tree, grid=grid).examine("0000007")
    assert set(np.unique(reading.location.labels[0])) == {0, 8} and reading.counts == {"labels resampled": 1}


def test_tree_geo_moves_pixels(tree):
    for band in (0, 1): write_tif(tree / "s1/0000007" / RADAR[0] / f"{('VV', 'VH')[band]}.tif", s1()[band:band + 1], transform=PLACE * Affine.translation(-4, -3))
    array, geo = (open_source(tree, grid=g).examine("0000007") for g in ("array", "geo"))
    assert array.offsets["s1"] == pytest.approx((0, 0)) or array.offsets["s1"] == pytest.approx((-4, -3))
    expected = coded(s1(), SENSORS["s1"])
    assert np.array_equal(array.location.images["s1"][0], expected)
    assert np.array_equal(geo.location.images["s1"][0][:, :SIZE - 3, :SIZE - 4], expected[:, 3:, 4:]) and not geo.location.valid["s1"][0][-3:].any()
    with pytest.raises(ConfigError, match="geo"): SSL4EOSource(tree, grid="warp")


def test_tree_in_eight_bits(tree):                       # the JPEG copy of the data set: bytes of the published coding, for all sensors or none
    for path in tree.glob("s2c/*/*/*.tif"):
        with rasterio.open(path) as f: values, transform = f.read(), f.transform
        write_tif(path, (values // 16).astype(np.uint8), transform=transform)
    refused(lambda: open_source(tree).read("0000007"), "uint8", "values=", OPTICAL[0])
    source = open_source(tree, sensors=("s2",))
    with rasterio.open(tree / "s2c/0000007" / OPTICAL[0] / "B4.tif") as f: assert np.array_equal(source.read("0000007").images["s2"][0][3], f.read(1))
    assert "eight bits" in source.describe()


def test_tree_l2a_and_own_labels(tree, tmp_path):
    (tree / "s2c").rename(tree / "s2a")
    (tree / "dw_noisy_labels").rename(tmp_path / "mine")
    refused(lambda: open_source(tree), "dw_noisy_labels", "labels=")
    source = open_source(tree, labels=tmp_path / "mine")
    assert source.sensors["s2"].bands == SENSORS["s2a"].bands and source.read("0000007").images["s2"][0].shape[0] == 12
    refused(lambda: open_source(tree, labels=tmp_path / "mine", level="L1C"), "s2c")


def test_read_raster_is_closed_and_north_up(tmp_path):
    write_tif(tmp_path / "a.tif", label(), transform=Affine(10, 0, 0, 0, 10, 0))
    raster = read_raster(tmp_path / "a.tif")
    assert raster.grid.transform == Affine(10, 0, 0, 0, -10, 10 * SIZE)
    skipped(lambda: read_raster(tmp_path / "none.tif"), "bad raster")


# -- probabilities ----------------------------------------------------------------------------------------------------------------------------------

DW_BANDS = ("water", "trees", "grass", "flooded_vegetation", "crops", "shrub_and_scrub", "built", "bare", "snow_and_ice")     # as Earth Engine has them


def dirichlet(seed=0): return np.random.default_rng(seed).dirichlet(np.ones(9), (SIZE, SIZE)).transpose(2, 0, 1).astype(np.float32)


def test_probabilities_are_read_by_name_and_coded(plain):
    told = dirichlet()
    told[:, :3] = np.nan
    write_tif(plain / "a/2021-04/probabilities.tif", told[::-1], DW_BANDS[::-1])
    write_tif(plain / "a/2021-07/probabilities.tif", dirichlet(1))                             # without names: in the scheme's order
    place = PlainSource(plain).read("a")
    assert np.array_equal(place.probabilities[0], np.rint(np.nan_to_num(told) * 255).astype(np.uint8)) and not place.probabilities[0][:, :3].any()
    assert np.array_equal(place.probabilities[1], np.rint(dirichlet(1) * 255).astype(np.uint8))
    assert PlainSource(plain).read("b").probabilities is None


def test_what_are_no_probabilities_is_refused(plain):
    path = plain / "a/2021-04/probabilities.tif"
    for values, bands, words in ((dirichlet() * 100, DW_BANDS, ("are no probabilities", "sum to 1")), (dirichlet()[:8], DW_BANDS[:8], ("snow_and_ice",)),
                                 (dirichlet() - 0.2, DW_BANDS, ("are no probabilities",)), (dirichlet()[:4], None, ("one for each class",))):
        write_tif(path, values, bands)
        refused(lambda: PlainSource(plain).read("a"), *words)
    write_tif(path, dirichlet(), DW_BANDS, transform=PLACE * Affine.translation(3, 0))
    refused(lambda: PlainSource(plain).read("a"), "3.00 px east")
    assert PlainSource(plain, allow_resample=True).read("a").probabilities[0].shape == (9, SIZE, SIZE)


def test_probabilities_reach_the_batch(plain, tmp_path):
    from cromss.config import SmoothingConfig
    from cromss.dataset import PatchDataset
    from cromss.prepare import prepare
    for place in ("a", "b"):
        for season_ in ("2021-04", "2021-07"): write_tif(plain / place / season_ / "probabilities.tif", dirichlet(len(place + season_)), DW_BANDS)
    store = prepare(plain, tmp_path / "store", progress=False)
    sample = PatchDataset(store, crop=SIZE, augment=False, smoothing=SmoothingConfig(kind="p"))[0]
    assert store.has_probabilities and np.abs(sample["prior"].numpy() - dirichlet(8)).max() < 0.01 and store.verify().ok


# -- damage -----------------------------------------------------------------------------------------------------------------------------------------


def test_scaled_values_are_refused(plain):
    with rasterio.open(plain / "a/2021-04/s2.tif", "r+") as file: file.scales, file.offsets = [1e-4] * 4, [-0.1] * 4
    refused(lambda: PlainSource(plain).read("a"), "scale of 0.0001 and an offset of -0.1", "gdal_edit.py")


def test_a_format_that_is_defined_anew_in_a_notebook_keeps_its_turn():
    "Executing the notebook of a format registers its classes again: they are asked in the same order as before."
    before, pattern = list(sources.known_sources()), sources.known_sources()["pattern"]
    try:
        sources.register(type("PatternSource", (pattern,), {"__module__": "__main__"}))
        assert list(sources.known_sources()) == before and before.index("pattern") < before.index("plain")
    finally: sources.register(pattern)
