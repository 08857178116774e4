"Data sets published as trees: pixels as they were written, each fault by its name, into a store and a batch."
import pickle
import shutil
import zipfile

import numpy as np
import pytest
import rasterio
from layouts_trees import (OPTICAL, PLACE, RADAR, SIZE, TILES, classes, dfc2020, noldo, optical, radar, ssl4eo, write_dfc2020, write_noldo_trees, write_noldo_zip, write_ssl4eo,
                           write_ssl4eo_coded, write_ssl4eo_zipped_labels, write_tif, zip_folder)
from rasterio.crs import CRS
from rasterio.transform import Affine
from refusals import refused, skipped

from cromss.classes import DYNAMIC_WORLD, ClassScheme, load_scheme
from cromss.config import ConfigError
from cromss.dataset import PatchDataset
from cromss.prepare import prepare
from cromss.sensors import SENSORS, decode, encode
from cromss.sources import SkipLocation, open_source
from cromss.trees import DFC2020Source, LabelTree, NoLDOSource, pair_products, product_date, read_ids

pytestmark = [pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"), pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")]
WRITERS = [write_ssl4eo, write_ssl4eo_coded, write_ssl4eo_zipped_labels, write_dfc2020, write_noldo_trees, write_noldo_zip]
KINDS = dict(zip(WRITERS, ["ssl4eo-s12"] * 3 + ["dfc2020"] + ["noldo-trees"] * 2))


def coded(values, sensor): return encode(values, SENSORS[sensor])[0]


def damaged_copies(path):
    "A file cut, emptied, and with a flipped byte in its pixels."
    whole = path.read_bytes()
    yield whole[:len(whole) // 2]
    yield b""
    yield b"no raster at all"


# -- every format -----------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("write", WRITERS)
def test_into_a_store_and_a_batch(write, tmp_path):
    path, options = write(tmp_path / "deep/data")
    source = open_source(path, **options)
    again = pickle.loads(pickle.dumps(source))
    assert source.kind == KINDS[write] and len(pickle.dumps(source)) < 20000
    for key in source.keys():
        place = again.read(key)
        place.check(source.sensors, source.scheme, "uint8")
        assert all(np.array_equal(a, b) for s in place.images for a, b in zip(place.images[s], source.read(key).images[s]))
        assert "/" not in key and len(key.encode()) <= 400
    store = prepare(source, tmp_path / "store", progress=False)
    assert sorted(store.keys) == sorted(source.keys())
    sample = PatchDataset(store, crop=16)[0]
    assert sample["image_s2"].shape == (13, 16, 16) and sample["image_s1"].shape == (2, 16, 16)
    assert "\n" not in source.describe() and str(tmp_path) not in source.describe()


@pytest.mark.parametrize("write", WRITERS)
def test_raw_coding(write, tmp_path):
    path, options = write(tmp_path / "data")
    raw, bytes_ = (open_source(path, coding=coding, **options) for coding in ("raw", "uint8"))
    for key in raw.keys():
        for sensor in raw.sensors:
            for a, b in zip(raw.read(key).images[sensor], bytes_.read(key).images[sensor]):
                assert a.dtype == np.float32 and np.array_equal(coded(a, sensor), b)


def test_layouts_are_told_apart(tmp_path):
    "A folder with all of them in it names each."
    for i, write in enumerate((write_ssl4eo, write_dfc2020, write_noldo_trees)): write(tmp_path / "all" / str(i))
    refused(lambda: open_source(tmp_path / "all"), "0 (ssl4eo-s12)", "1 (dfc2020)", "2 (noldo-trees)")
    (tmp_path / "text.zip").write_text("no archive")
    refused(lambda: open_source(tmp_path / "text.zip"), "looked for")
    refused(lambda: open_source(tmp_path / "text.zip", kind="noldo-trees"), "text.zip", "zip archive")
    (tmp_path / "empty").mkdir()
    for kind in ("dfc2020", "noldo-trees", "ssl4eo-s12"): refused(lambda: open_source(tmp_path / "empty", kind=kind), "empty")


def test_a_test_set_must_not_slip_into_training(tmp_path):
    for write, first in ((write_dfc2020, "validation"), (write_noldo_trees, "train"), (write_noldo_zip, "train")):
        path, _ = write(tmp_path / write.__name__)
        refused(lambda: open_source(path), f"split={first!r}", f"--options '{{split: {first}}}'", "'all'")
        one, both = open_source(path, split=first).keys(), open_source(path, split="all").keys()
        assert one and set(one) < set(both) and all(key.startswith(first) for key in one)
        with pytest.raises(ConfigError, match="choose"): open_source(path, split="dev")


# -- SSL4EO-S12 -------------------------------------------------------------------------------------------------------------------------------------

def test_pairing_is_one_to_one_by_time():
    assert pair_products(OPTICAL[::-1], RADAR) == dict(zip(OPTICAL, RADAR)) and pair_products(OPTICAL, []) == {} == pair_products([], RADAR)
    days = [f"2020{m:02d}{d:02d}T000000_x" for m in range(1, 13) for d in (1, 9, 17, 25)]
    theirs = [f"2020{m:02d}{d:02d}T000000_y" for m in range(1, 13) for d in (2, 18)]
    pairs = pair_products(days, theirs)                                     # 48 over 24: not by trying all
    assert sorted(pairs.values()) == theirs and all(abs((product_date(a) - product_date(b)).days) <= 2 for a, b in pairs.items())


def test_values_are_those_written(tmp_path):
    ssl4eo(tmp_path / "t")
    place = open_source(tmp_path / "t").read("0000007")
    for i in (0, 1):
        assert np.array_equal(place.images["s1"][i], coded(radar(seed=i), "s1")) and np.array_equal(place.labels[i], classes()[0])
        for b in (1, 2, 3, 7): assert np.array_equal(place.images["s2"][i][b], coded(optical(seed=i), "s2")[b])


def test_eight_bits_are_read_as_they_are(tmp_path):
    path, _ = write_ssl4eo_coded(tmp_path / "t")
    source = open_source(path)
    place = source.read("0000007")
    assert source.values == "uint8" and "eight bits" in source.describe() and "eight bits" not in open_source(write_ssl4eo(tmp_path / "dn")[0]).describe()
    for i, product in enumerate(OPTICAL):
        for b, band in ((1, "B2"), (7, "B8")):
            with rasterio.open(path / "s2c/0000007" / product / f"{band}.tif") as f: assert np.array_equal(place.images["s2"][i][b], f.read(1))
        assert np.array_equal(place.images["s1"][i], coded(radar(seed=i), "s1"))
    raw = open_source(path, coding="raw").read("0000007")
    assert np.allclose(raw.images["s1"][0], decode(coded(radar(), "s1"), SENSORS["s1"]), atol=1e-5)


def test_eight_bits_as_jpeg(tmp_path):
    path, _ = write_ssl4eo_coded(tmp_path / "t")
    for tif in (path / "s2c").rglob("*.tif"):
        with rasterio.open(tif) as f: values, transform = np.full_like(f.read(), 77), f.transform
        write_tif(tif, values, transform, compress="JPEG", JPEG_QUALITY=75)
    assert all((image == 77).all() for image in open_source(path).read("0000007").images["s2"])


def test_eight_bits_and_others_do_not_mix(tmp_path):
    path, _ = write_ssl4eo_coded(tmp_path / "t")
    ssl4eo(tmp_path / "dn")
    band = path / "s2c/0000007" / OPTICAL[1] / "B8.tif"
    shutil.copy(tmp_path / "dn/s2c/0000007" / OPTICAL[1] / "B8.tif", band)
    refused(lambda: open_source(path).read("0000007"), "B8.tif", "uint16", "values=")
    refused(lambda: open_source(path, values="dn").read("0000007"), "uint8")
    refused(lambda: open_source(tmp_path / "dn", values="uint8").read("0000007"), "uint16")
    refused(lambda: open_source(path, values="int8"), "'uint8'", error=ConfigError)
    shutil.rmtree(path / "s1")
    shutil.copytree(tmp_path / "dn/s1", path / "s1")
    refused(lambda: open_source(path).read("0000007"), "eight")             # Sentinel-1 in dB beside bytes


def test_labels_elsewhere(tmp_path):
    ssl4eo(tmp_path / "t")
    whole = open_source(tmp_path / "t").read("0000007")
    zip_folder(tmp_path / "t/dw_noisy_labels", tmp_path / "labels.zip")
    shutil.copy(tmp_path / "labels.zip", tmp_path / "t/ssl4eo_s12_nol.zip")
    shutil.rmtree(tmp_path / "t/dw_noisy_labels")
    for options in ({}, {"labels": tmp_path / "labels.zip"}, {"labels": str(tmp_path / "t/ssl4eo_s12_nol.zip")}):
        place = open_source(tmp_path / "t", **options).read("0000007")
        assert np.array_equal(place.labels, whole.labels) and place.seasons == whole.seasons
    for only in ("s1", "s2"): assert list(open_source(tmp_path / "t", sensors=only).read("0000007").images) == [only]
    (tmp_path / "t/ssl4eo_s12_nol.zip").unlink()
    refused(lambda: open_source(tmp_path / "t"), "dw_noisy_labels", "labels=")
    refused(lambda: open_source(tmp_path / "t", labels=tmp_path / "none.zip"), "none.zip")


def test_label_tree(tmp_path):                            # faults 11, 13, 25
    for key in ("0000007", "0000008"):
        for product in OPTICAL: write_tif(tmp_path / "x/a/b/labels" / key / product / "label.tif", classes(), nodata=255)
    zip_folder(tmp_path / "x", tmp_path / "nol.zip")
    scheme = load_scheme("dynamic-world")
    for labels in (LabelTree(tmp_path / "x"), LabelTree(tmp_path / "nol.zip"), LabelTree(tmp_path / "nol.zip/a/b")):
        labels = pickle.loads(pickle.dumps(labels))
        assert labels.keys() == ["0000007", "0000008"] and labels.products("0000008") == list(OPTICAL)
        ids, grid = labels.read("0000008", OPTICAL[1], scheme)
        assert np.array_equal(ids, classes()[0]) and ids.dtype == np.uint8 and grid.transform == PLACE and grid.crs == CRS.from_epsg(32631)
        skipped(lambda: labels.products("0000009"), "no label", "0000009")
        skipped(lambda: labels.read("0000007", "20210101T000000_x", scheme), "no label", "20210101T000000_x/label.tif")
    refused(lambda: labels.read("0000007", OPTICAL[0], ClassScheme("two", ("a", "b"))), "nol.zip/a/b/labels/0000007", "2 (")
    (tmp_path / "x/a/c/0000001").mkdir(parents=True); (tmp_path / "x/a/d/0000001").mkdir(parents=True)
    refused(lambda: LabelTree(tmp_path / "x"), "several", "a/c", "a/d")
    (tmp_path / "empty").mkdir()
    refused(lambda: LabelTree(tmp_path / "empty"), "7 digits")
    path = tmp_path / "x/a/b/labels/0000007" / OPTICAL[0] / "label.tif"
    for damage in damaged_copies(path):
        path.write_bytes(damage)
        skipped(lambda: LabelTree(tmp_path / "x/a/b").read("0000007", OPTICAL[0], scheme), "bad raster", "label.tif")
    data = bytearray((tmp_path / "nol.zip").read_bytes())
    data[300] ^= 255
    (tmp_path / "nol.zip").write_bytes(data)
    skipped(lambda: LabelTree(tmp_path / "nol.zip").read("0000007", OPTICAL[0], scheme), "bad raster", "nol.zip/a/b/labels")


def test_list_of_ids(tmp_path):                           # method 1.11 C 5: with a header, or without
    ssl4eo(tmp_path / "t"); ssl4eo(tmp_path / "t", "0000008"); ssl4eo(tmp_path / "t", "0000009")
    csv = tmp_path / "ids.csv"
    def listed(text):
        csv.write_text(text)
        return read_ids(csv)
    rows = f"7,{OPTICAL[0]},{OPTICAL[1]},,\n0000008,{OPTICAL[1]},,,\n"
    for header in ("", "ids,sub1,sub2,sub3,sub4\n"): assert listed(header + rows) == {"0000007": OPTICAL, "0000008": OPTICAL[1:]}
    assert listed(f",sub2,sub1,ids\n0,{OPTICAL[0]},{OPTICAL[1]},12\n") == {"0000012": OPTICAL}
    source = open_source(tmp_path / "t", ids=str(csv)) if listed(rows) else None
    assert source.keys() == ["0000007", "0000008"] and len(source.read("0000007").seasons) == 2
    one = source.examine("0000008")
    assert one.location.seasons == OPTICAL[1:] and one.dropped[0][:2] == ("id mismatch", f"0000008/{OPTICAL[0]}")
    listed("7,20190101T000000_x,,,\n99,20190101T000000_x,,,\n")
    source = open_source(tmp_path / "t", ids=csv)
    skipped(lambda: source.read("0000007"), "id mismatch", "ids.csv")
    skipped(lambda: source.read("0000099"), "missing sensor")
    shutil.rmtree(tmp_path / "t/dw_noisy_labels/0000007" / OPTICAL[1])
    listed(rows)
    assert open_source(tmp_path / "t", ids=csv).examine("0000007").dropped[0][0] == "id mismatch"
    for text, word in (("", "no location"), ("ids,sub1\n", "no location"), ("id,sub1\n7,x\n", "id, sub1"), ("7,summer,,,\n", "line 1: summer"), ("7,x\n", "line 1"), (rows + "7,,,,\n", "line 3"),
                       ("7," + "a" * 200000, "CSV"), ("12345678,,,,\n", "line 1"), ("\n\n", "no location"), ("ids,sub1,sub2\n7,,\n-3,,\n", "line 3")):
        refused(lambda: listed(text), "ids.csv", word)
    csv.write_bytes(b"\xff\xfe\x00")
    refused(lambda: read_ids(csv), "CSV")
    refused(lambda: open_source(tmp_path / "t", ids=tmp_path / "none.csv"), "none.csv")


def test_void_ids_and_metadata_do_not_disturb(tmp_path):
    ssl4eo(tmp_path / "t")
    for folder in ("s1", "s2c", "dw_noisy_labels"):
        (tmp_path / "t" / folder / "metadata.json").write_text("{}")
        (tmp_path / "t" / folder / "void_ids.csv").write_text("x")
        (tmp_path / "t" / folder / "0000007/metadata.json").write_text("{}")
    (tmp_path / "t/s2c/0000003").mkdir()                  # a void id: its folder is empty
    source = open_source(tmp_path / "t")
    assert source.keys() == ["0000003", "0000007"] and len(source.read("0000007").seasons) == 2
    with pytest.raises(SkipLocation): source.read("0000003")


def test_ssl4eo_faults(tmp_path):                         # faults 14, 16, 17, 18, 19, 25
    def case(change, name=f"s2c/0000007/{OPTICAL[0]}/B4.tif", **options):
        shutil.rmtree(tmp_path / "t", ignore_errors=True)
        ssl4eo(tmp_path / "t")
        change(tmp_path / "t" / name)
        return open_source(tmp_path / "t", **options)
    for n in (23, 25, 66):
        reading = case(lambda p: write_tif(p, optical(n)[3:4])).examine("0000007")
        assert reading.dropped[0][0] == "grid mismatch" and f"{n} x {n}" in reading.dropped[0][2] and len(reading.location.seasons) == 1
    refused(lambda: case(lambda p: write_tif(p, optical()[3:4], PLACE * Affine.rotation(10))).read("0000007"), "rotated", "B4.tif")
    south_up = case(lambda p: write_tif(p, optical()[3:4, ::-1], Affine(10, 0, 500000, 0, 10, 5600000 - 10 * SIZE))).read("0000007")
    assert np.array_equal(south_up.images["s2"][0][3], coded(optical(), "s2")[3])
    assert case(lambda p: write_tif(p, optical()[3:4], crs=None, transform=Affine.identity())).read("0000007").crs is not None
    label = f"dw_noisy_labels/0000007/{OPTICAL[0]}/label.tif"
    for change in ({"transform": PLACE * Affine.translation(100, 0)}, {"crs": CRS.from_epsg(3857)}, {"crs": CRS.from_epsg(4326)}):     # another place, or none that can be told
        for name in (label, f"s1/0000007/{RADAR[0]}/VH.tif"):
            values = classes() if name == label else radar()[1:]
            for grid in ("array", "geo"): assert case(lambda p: write_tif(p, values, **change), name, grid=grid).examine("0000007").dropped[0][0] == "grid mismatch"
    refused(lambda: case(lambda p: write_tif(p, classes().astype(np.float32)), label).read("0000007"), "label.tif", "float32")
    refused(lambda: case(lambda p: write_tif(p, classes(11)), label).read("0000007"), "label.tif", "9 (", "10 (")
    refused(lambda: case(lambda p: write_tif(p, classes(), nodata=0), label).read("0000007"), "water")
    def offset(path):
        for p in path.parents[2].rglob("B*.tif"):
            with rasterio.open(p) as f: values, transform = f.read(), f.transform
            write_tif(p, values + 1000, transform)
    refused(lambda: case(offset).read("0000007"), "1000", "B10")
    def tagged(path, values=None):
        "Newer products: 0 is still no data, and the offset is for all others."
        for p in path.parent.glob("B*.tif"):
            with rasterio.open(p) as f: values, transform = f.read(), f.transform
            values[:, 0, 0] = 0
            write_tif(p, np.where(values > 0, values + 1000, 0).astype(np.uint16), transform, tags={"RADIO_ADD_OFFSET": "-1000"})
    valid = case(tagged).read("0000007").valid["s2"][0]
    assert not valid[0, 0] and valid[6:, 6:].all()
    for i in range(3):
        def damage(path): path.write_bytes(list(damaged_copies(path))[i])
        assert case(damage).examine("0000007").dropped[0][0] == "bad raster"


# -- DFC2020 ----------------------------------------------------------------------------------------------------------------------------------------

DFC_IDS = np.array([255, 1, 5, 255, 2, 3, 4, 6, 255, 7, 0])                      # raw 0..10
IGBP_RAW = np.array([0, 1, 1, 1, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 6, 8, 9, 10])     # IGBP 0..17


@pytest.mark.parametrize("renamed", [False, True])
def test_dfc2020_reads_what_was_written(tmp_path, renamed):
    values = dfc2020(tmp_path / "d", "validation", 7, renamed=renamed)
    dfc2020(tmp_path / "d", "validation", 10, seed=1, renamed=renamed)
    dfc2020(tmp_path / "d", "test", 2, renamed=renamed, kinds=("s1", "s2", "dfc"))
    source = open_source(tmp_path / "d", split="all")
    assert source.kind == "dfc2020" and source.keys() == ["validation_0_p7", "validation_0_p10", "test_0_p2"] and source.scheme.name == "dfc2020"
    place = source.read("validation_0_p7")
    assert place.seasons == ("0",) and np.array_equal(place.images["s2"][0], coded(values["s2"], "s2")) and np.array_equal(place.images["s1"][0], coded(values["s1"], "s1"))
    dfc, lc = DFC_IDS[values["dfc"][0]], DFC_IDS[IGBP_RAW[values["lc"][0]]]
    assert np.array_equal(place.labels[0], dfc) and np.array_equal(place.reference[0], lc) and source.read("test_0_p2").reference is None
    noisy = open_source(tmp_path / "d", labels="lc", split="validation")
    assert len(noisy.keys()) == 2 and np.array_equal(noisy.read("validation_0_p7").labels[0], lc) and np.array_equal(noisy.read("validation_0_p7").reference[0], dfc)
    skipped(lambda: open_source(tmp_path / "d", labels="lc", split="all").read("test_0_p2"), "no label")
    assert open_source(tmp_path / "d", split="test").keys() == ["test_0_p2"]
    assert np.array_equal(open_source(tmp_path / "d", bands={"s2": 3}, split="all").read("test_0_p2").images["s2"][0], coded(values["s2"], "s2")[[3, 2, 1]])
    zip_folder(tmp_path, tmp_path / "dfc.zip")
    assert np.array_equal(open_source(tmp_path / "dfc.zip", split="all").read("validation_0_p7").labels[0], dfc)
    shutil.rmtree(tmp_path / "d"); dfc2020(tmp_path / "d", "validation", 1, renamed=renamed, kinds=("s1", "s2", "lc"))
    assert np.array_equal(open_source(tmp_path / "d", split="all").read("validation_0_p1").labels[0], lc)


def test_dfc2020_own_classes(tmp_path):
    values = dfc2020(tmp_path / "d", "test", 0)
    own = ClassScheme("dry", ("land", "water"), remap={**dict.fromkeys(range(1, 10), 0), 10: 1})
    place = DFC2020Source(tmp_path / "d", scheme=own).read("test_0_p0")
    assert np.array_equal(place.labels[0], values["dfc"][0] == 10) and place.reference is None
    assert DFC2020Source(tmp_path / "d", scheme="dfc2020").read("test_0_p0").reference is not None
    for options in ({"split": "train"}, {"labels": "igbp"}, {"sensors": ("s3",)}, {"coding": "float"}):
        with pytest.raises(ConfigError): DFC2020Source(tmp_path / "d", **options)
    refused(lambda: DFC2020Source(tmp_path / "d", split="validation"), "validation")


def test_dfc2020_faults(tmp_path):                        # faults 11 to 14, 16 to 19, 25
    root, name = tmp_path / "d", "ROIs0000_test/{0}_0/ROIs0000_test_{0}_0_p0.tif"
    def case(kind, change):
        shutil.rmtree(root, ignore_errors=True)
        dfc2020(root, "test", 0)
        change(root / name.format(kind))
        return open_source(root).read("test_0_p0")
    for kind in ("s1", "s2"): skipped(lambda: case(kind, lambda p: p.unlink()), "missing sensor", kind, "test_0_p0")
    skipped(lambda: case("dfc", lambda p: p.unlink() or (p.parent / p.name.replace("p0", "p1")).write_bytes(b"x")), "no label")
    for kind in ("s1", "s2", "dfc", "lc"):
        for i in range(3): skipped(lambda: case(kind, lambda p: p.write_bytes(list(damaged_copies(p))[i])), "bad raster", name.format(kind))
    skipped(lambda: case("s1", lambda p: write_tif(p, radar(23))), "grid mismatch", "23 x 23")
    skipped(lambda: case("dfc", lambda p: write_tif(p, classes(10, 25, 1))), "grid mismatch", "25 x 25")
    skipped(lambda: case("dfc", lambda p: write_tif(p, classes(10, SIZE, 1), PLACE * Affine.translation(3, 0))), "grid mismatch", "3.00 px east")
    refused(lambda: case("s1", lambda p: write_tif(p, radar(), PLACE * Affine.rotation(3))), "rotated")
    assert np.array_equal(case("s2", lambda p: write_tif(p, optical()[:, ::-1], Affine(10, 0, 500000, 0, 10, 5600000 - 10 * SIZE))).images["s2"][0], coded(optical(), "s2"))
    refused(lambda: case("dfc", lambda p: write_tif(p, classes(10, SIZE, 1).astype(np.float32))), "float32")
    refused(lambda: case("dfc", lambda p: write_tif(p, classes(12, SIZE, 1))), "11 (", "12 (")
    refused(lambda: case("dfc", lambda p: write_tif(p, np.repeat(classes(), 2, 0))), "2 bands")
    refused(lambda: case("dfc", lambda p: write_tif(p, classes(10, SIZE, 1), nodata=10)), "water")
    assert np.array_equal(case("dfc", lambda p: write_tif(p, classes(10, SIZE, 1).astype(np.int16), nodata=-1)).labels[0], DFC_IDS[classes(10, SIZE, 1)[0]])
    refused(lambda: case("s2", lambda p: write_tif(p, (optical() // 16).astype(np.uint8))), "0..255")
    refused(lambda: case("s2", lambda p: write_tif(p, optical() / np.float32(10000))), "reflectance")
    refused(lambda: case("s2", lambda p: write_tif(p, optical() + 1000)), "1000")
    assert np.array_equal(case("s2", lambda p: write_tif(p, optical() + 1000, tags={"RADIO_ADD_OFFSET": "-1000"})).images["s2"][0], coded(optical(), "s2"))
    refused(lambda: case("s2", lambda p: write_tif(p, optical()[:12])), "12 bands without names")
    refused(lambda: case("s1", lambda p: write_tif(p, 10 ** (radar() / 10))), "dB")
    refused(lambda: case("s2", lambda p: shutil.copy(p, p.parent / "ROIs0000_test_s2_0_px.tif")), "px.tif", "ROIs0000_<split>")
    refused(lambda: case("s2", lambda p: shutil.copy(p, p.parent / "ROIs0000_test_s2_0_p00.tif")), "one place")
    holes = radar(); holes[0, 2:5, 3] = np.nan
    assert (~case("s1", lambda p: write_tif(p, holes)).valid["s1"][0]).sum() == 3


# -- SSL4EO-S12@DW and @OSM -------------------------------------------------------------------------------------------------------------------------

EXPERT = np.array([255, 0, 1, 2, 3, 4, 5, 6, 7, 8, 255])


def test_noldo_reads_what_was_written(tmp_path):
    root = tmp_path / "data_s12"
    train, test = noldo(root, "dw_train", TILES[0], 24), noldo(root, "dw_test", TILES[1], 26, 1)
    noldo(root, "osm_train", TILES[1], 24, 2)
    source = open_source(root, split="all")
    keys = ["test_12.5_-3.25", "train_-0.0520777954_32.9493499204"]
    assert source.kind == "noldo-trees" and source.keys() == keys and source.scheme == DYNAMIC_WORLD
    for key, values, date in zip(keys, (test, train), ("20200107", "20190816")):
        place = source.read(key)
        assert place.seasons == (date,) and np.array_equal(place.images["s1"][0], coded(values["s1"], "s1")) and np.array_equal(place.images["s2"][0], coded(values["s2"], "s2"))
        assert np.array_equal(place.labels[0], EXPERT[values["dw"][0]]) and place.reference is None
    assert open_source(root, split="test").keys() == keys[:1]
    osm = open_source(root, labels="osm", split="all")
    assert osm.keys() == ["train_12.5_-3.25"] and osm.scheme.name == "osm" and np.array_equal(osm.read("train_12.5_-3.25").labels[0], np.array([255, *range(13)])[classes(14)[0]])
    for options in ({"split": "validation"}, {"labels": "esa"}, {"sensors": "dem"}, {"bands": {"s3": 3}}):
        with pytest.raises(ConfigError): open_source(root, **{"split": "all"} | options)
    refused(lambda: open_source(root, labels="osm", split="test"), "osm_test", "osm_train")
    zip_folder(tmp_path, tmp_path / "all.zip")
    zipped = open_source(tmp_path / "all.zip", split="all")
    assert zipped.keys() == keys and np.array_equal(zipped.read(keys[0]).images["s2"][0], coded(test["s2"], "s2"))
    shutil.copytree(root, tmp_path / "other")
    refused(lambda: NoLDOSource(tmp_path), "several")


def test_noldo_dates_are_seasons(tmp_path):
    for i, date in enumerate(("20200901", "20200301")): noldo(tmp_path / "d", "dw_train", f"1.5_2.5-{date}", seed=i)
    place = open_source(tmp_path / "d").read("train_1.5_2.5")
    assert place.seasons == ("20200301", "20200901") and np.array_equal(place.images["s1"][0], coded(radar(seed=1), "s1"))


def test_noldo_labels_as_stored(tmp_path):
    noldo(tmp_path / "d", "dw_train", TILES[0])
    label = next((tmp_path / "d").rglob("dw_*.tif"))
    def labels(values, **options):
        write_tif(label, values, **{k: options.pop(k) for k in ("nodata",) if k in options})
        return open_source(tmp_path / "d", **options).read("train_-0.0520777954_32.9493499204").labels[0]
    expert = EXPERT[classes(11)[0]]
    assert np.array_equal(labels(np.concatenate([classes(3), classes(11), classes(5)])), expert)          # several bands: the second
    assert np.array_equal(labels(classes(11), scheme="dynamic-world"), expert)                            # names of the published classes: published values
    assert np.array_equal(labels(classes(11), nodata=0), expert) and np.array_equal(labels(classes(11).astype(np.int16)), expert)
    raw = ClassScheme("dw-raw", DYNAMIC_WORLD.names, DYNAMIC_WORLD.colors, {i: i for i in range(9)})
    assert np.array_equal(labels(classes(), scheme=raw), classes()[0])                                    # values of one's own
    refused(lambda: labels(classes(12)), "11 (")
    refused(lambda: labels(classes(11), nodata=3), "grass")
    refused(lambda: labels(classes(11).astype(np.float32)), "float32")


def test_noldo_faults(tmp_path):                          # faults 11 to 14, 16 to 18, 25
    root, key = tmp_path / "d", "train_-0.0520777954_32.9493499204"
    def case(kind, change, **options):
        shutil.rmtree(root, ignore_errors=True)
        noldo(root, "dw_train", TILES[0])
        noldo(root, "dw_train", TILES[1])
        change(next(root.rglob(f"{kind}_-0.05*.tif")))
        return open_source(root, **options).read(key)
    for kind in ("s1", "s2"): skipped(lambda: case(kind, lambda p: p.unlink()), "missing sensor", kind, key)
    skipped(lambda: case("dw", lambda p: p.unlink()), "no label", key)
    for kind in ("s1", "s2", "dw"):
        for i in range(3): skipped(lambda: case(kind, lambda p: p.write_bytes(list(damaged_copies(p))[i])), "bad raster", TILES[0])
    for kind, values in (("s1", radar(22)), ("dw", classes(11, 26))): skipped(lambda: case(kind, lambda p: write_tif(p, values)), "grid mismatch", f"{values.shape[1]} x {values.shape[1]}")
    skipped(lambda: case("s1", lambda p: write_tif(p, radar(), PLACE * Affine.translation(0, 4))), "grid mismatch", "4.00 px south")
    skipped(lambda: case("s1", lambda p: write_tif(p, radar(), crs=CRS.from_epsg(32632))), "grid mismatch", "EPSG:32632")
    moved = case("dw", lambda p: write_tif(p, classes(11), PLACE * Affine.translation(4, 0)), allow_resample=True)
    assert (moved.labels[0][:, :4] == 255).all() and np.array_equal(moved.labels[0][:, 4:], EXPERT[classes(11)[0]][:, :-4])
    case("dw", lambda p: write_tif(p, classes(11), crs=None, transform=Affine.identity()))
    assert open_source(root).examine(key).counts == {"rasters without CRS": 1} and open_source(root).examine(key).offsets["s1"] == (0, 0)
    skipped(lambda: case("dw", lambda p: write_tif(p, classes(11, 20), crs=None, transform=Affine.identity()), allow_resample=True), "grid mismatch")
    refused(lambda: case("dw", lambda p: write_tif(p, classes(11), PLACE * Affine.rotation(5))), "rotated")
    refused(lambda: case("s2", lambda p: write_tif(p, optical(dtype=np.int16) + 1000)), "1000")
    refused(lambda: case("s2", lambda p: write_tif(p, optical()[:9])), "9 bands without names")
    named = case("s2", lambda p: write_tif(p, optical()[::-1], names=[b.replace("B", "B0") for b in SENSORS["s2"].bands[::-1]]))
    assert np.array_equal(named.images["s2"][0], coded(optical(), "s2"))
    angle = np.concatenate([radar()[::-1], np.full((1, SIZE, SIZE), 39, np.float32)])
    assert np.array_equal(case("s1", lambda p: write_tif(p, angle, names=["VH", "VV", "angle"])).images["s1"][0], coded(radar(), "s1"))
    refused(lambda: case("s1", lambda p: write_tif(p, radar(), names=["VV", "HH"])), "no band VH")
    for name in ("s2_x.tif", "s1_1.5_2.5-20200101.tif"): refused(lambda: case("s2", lambda p: shutil.copy(p, p.parent / name)), name, "<date>")
    refused(lambda: case("s2", lambda p: shutil.copy(p, p.parent / p.name.replace(".", "p").replace("ptif", ".tif"))), "one place")
    assert case("s2", lambda p: (p.parent / f"{p.name}.aux.xml").write_text("x")).seasons


def test_a_damaged_zip_leaves_the_tile_out(tmp_path):     # fault 25
    path, _ = write_noldo_zip(tmp_path / "z")
    keys = open_source(path, split="all").keys()
    with zipfile.ZipFile(path) as file: info = next(i for i in file.infolist() if "osm_train/image_s2" in i.filename)
    data = bytearray(path.read_bytes())
    data[info.header_offset + 200] ^= 1
    path.write_bytes(data)
    source = open_source(path, split="all")
    train = next(k for k in keys if k.startswith("train"))
    skipped(lambda: source.read(train), "bad raster")
    assert source.keys() == keys and source.read(next(k for k in keys if k.startswith("test")))
    path.write_bytes(data[:-40])
    refused(lambda: NoLDOSource(path), "zip archive")


def test_many_places_are_listed_quickly(tmp_path):        # fault 40: linear, and nothing is opened
    with zipfile.ZipFile(tmp_path / "nol.zip", "w") as file:
        for i in range(5000):
            for product in OPTICAL: file.writestr(f"labels/{i:07d}/{product}/label.tif", b"")
    labels = LabelTree(tmp_path / "nol.zip")
    assert len(labels.keys()) == 5000 and labels.products("0004999") == list(OPTICAL) and len(pickle.dumps(labels)) < 1000
