"SSL4EO-S12 v1.1: shards in the published layout, joined by names, and what damage does."
import json
import multiprocessing
import os
import pickle
import re
import shutil
import struct
import tempfile
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import rasterio
import zarr
from layouts_shards import (CORNER, IDS, OPTICAL, RADAR_OF, arrays, class_ids, coordinates, pixels, read_all, shard, write_label, write_zarr)
from numcodecs import LZ4, Blosc, GZip, Zlib, Zstd
from rasterio.crs import CRS

from cromss import shards as module
from cromss.config import ConfigError, DataError
from cromss.dataset import PatchDataset
from cromss.prepare import prepare
from cromss.sensors import SENSORS
from cromss.shards import ShardFile, ZarrShards, array_info, product_name, unpack
from cromss.sources import SkipLocation, open_source

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")     # affine's `*`


BUILT = {}      # data sets that were written before, by their options


def build(root, size=24, **options):
    "A copy of the data set that `write` makes."
    known = repr((size, sorted(options.items())))
    if known not in BUILT:
        folder = tempfile.TemporaryDirectory()
        BUILT[known] = folder, *write(Path(folder.name), size, **options)
    folder, values, labels = BUILT[known]
    shutil.copytree(folder.name, root, dirs_exist_ok=True)
    return {name: v.copy() for name, v in values.items()}, labels


def write(root, size=24, radar_rows=(2, 0, 1), labelled=True, optical="S2L1C", label_corner=CORNER, label_size=None, **options):
    "Three locations, the radar file's samples in another order; values by sensor, and labels {(place, time): ids}."
    values = {"s1": pixels("S1GRD", 3, size, 1), "s2": pixels(optical, 3, size, 2)}
    write_zarr(shard(root, optical), arrays(optical, values["s2"]), **options)
    rows = list(radar_rows)
    write_zarr(shard(root, "S1GRD"), arrays("S1GRD", values["s1"][rows], [IDS[r] for r in rows], places=rows), **options)
    labels = {(p, t): class_ids(label_size or size, 10 * p + t) for p in range(3) for t in range(4)}
    for (p, t), ids in (labels if labelled else {}).items(): write_label(root / "dw_noisy_labels", IDS[p], OPTICAL[t], ids, label_corner, p)
    return values, labels


def rewrite(path, change):
    "Write a zip file anew, each member as `change(name, data)` gives it; None leaves it out. Checksums fit."
    with zipfile.ZipFile(path) as old: members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in members.items():
            if (data := change(name, data)) is not None: new.writestr(name, data)


def metadata(path, name, **fields):
    "Change fields of an array's .zarray."
    rewrite(path, lambda member, data: json.dumps(json.loads(data) | fields) if member == f"{name}/.zarray" else data)


def member_at(path, name):
    "Where the data of a member begin in a zip file."
    with zipfile.ZipFile(path) as file: offset = file.getinfo(name).header_offset
    with open(path, "rb") as file:
        file.seek(offset + 26)
        return offset + 30 + sum(struct.unpack("<HH", file.read(4)))


def dropped(source, key):
    "Reasons of the seasons left out, by product."
    return {name.partition("/")[2]: reason for reason, name, _ in source.examine(key).dropped}


# -- what is read -----------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [24, 264])
def test_pixels(tmp_path, size):
    values, labels = build(tmp_path, size)
    source = open_source(tmp_path, coding="raw")
    assert source.kind == "ssl4eo-s12-v1.1" and source.keys() == list(IDS) and source.sensors["s2"].level == "L1C"
    for p, key in enumerate(IDS):
        reading = source.examine(key)
        place = reading.location
        place.check(source.sensors, source.scheme, "raw")
        assert place.seasons == OPTICAL and place.valid is None and reading.dropped == []
        assert place.crs == "EPSG:32651" and place.transform == (10, 0, CORNER[0] + 3000 * p, 0, -10, CORNER[1])
        for t in range(4):
            assert np.array_equal(place.images["s2"][t], values["s2"][p, t].astype(np.float32) - 1000)
            assert np.array_equal(place.images["s1"][t], values["s1"][p, RADAR_OF[t]].astype(np.float32))
            assert np.array_equal(place.labels[t], labels[p, t])
        assert reading.offsets == {"s1": (0, 0), "label": (0, 0)} and reading.counts == {"radar seasons reordered": 3}
        assert [round(d, 1) for d in reading.days] == [2.8, 0.2, 2.8, 2.8]


def test_same_as_zarr(tmp_path):
    path = tmp_path / "a.zarr.zip"
    found = arrays("S2L2A", pixels("S2L2A"))
    write_zarr(path, found)
    with ShardFile(path) as file, zarr.storage.ZipStore(path, mode="r") as store:
        group = zarr.open_group(store, mode="r")
        for name in found: assert np.array_equal(file.read(name), group[name][...]) and file.read(name).dtype == found[name].dtype
        assert np.array_equal(file.read("bands", 2, 3, 5), group["bands"][2, 3, 5]) and file.read("crs", 1) == 32651


def test_coded_and_batch(tmp_path):
    values, labels = build(tmp_path / "data")
    store = prepare(open_source(tmp_path / "data"), tmp_path / "store", progress=False)
    assert len(store) == 3 and store.season_count == 4 and store.verify().ok
    report = store.manifest["info"]["report"]
    assert report["grid_offsets"]["label"]["largest"] == 0 and report["days_between_sensors"]["median"] == 2.8 and report["counts"]["radar seasons reordered"] == 9
    mean, std = np.array(SENSORS["s2"].mean)[:, None, None], np.array(SENSORS["s2"].std)[:, None, None]
    expected = np.clip((values["s2"][1, 2] - 1000.0 - (mean - 2 * std)) / (4 * std), 0, 1) * 255
    at = list(store.keys).index(IDS[1])
    assert np.array_equal(store.read(at, 2)["images"]["s2"], expected.astype(np.uint8)) and np.array_equal(store.read_labels(at)[2], labels[1, 2])
    sample = PatchDataset(store, crop=16)[0]
    assert sample["image_s1"].shape == (2, 16, 16) and sample["image_s2"].shape == (13, 16, 16)


@pytest.mark.parametrize("chunks", [(3, 1, 13, 24, 24), (3, 4, 13, 24, 24), (2, 3, 5, 10, 7), (1, 1, 1, 24, 24)])
def test_any_chunks(tmp_path, chunks, monkeypatch):
    values = pixels("S2L1C")
    write_zarr(tmp_path / "a.zarr.zip", arrays("S2L1C", values), chunks=chunks)
    unpacked = []
    monkeypatch.setattr(module, "CACHE", {})
    monkeypatch.setattr(module, "unpack", lambda data, codec, limit: unpacked.append(limit) or unpack(data, codec, limit))
    for p in range(3):
        with ShardFile(tmp_path / "a.zarr.zip") as file:
            for t in range(4): assert np.array_equal(file.read("bands", p, t), values[p, t])
    if chunks[0] == 3: assert len(unpacked) == 4 // chunks[1]      # what holds all samples is unpacked once


def test_only_what_is_needed(tmp_path, monkeypatch):
    build(tmp_path)
    source, names, member = ZarrShards(tmp_path, sensors=("s2",)), [], ShardFile._member
    monkeypatch.setattr(ShardFile, "_member", lambda self, name, limit: names.append(name) or member(self, name, limit))
    source.read(IDS[1])
    assert sorted(n for n in names if n.startswith("bands/") and n != "bands/.zarray") == [f"bands/1.{t}.0.0.0" for t in range(4)]


def test_cache_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "CACHE", {})
    monkeypatch.setattr(module, "CACHE_BYTES", 1000)
    for n in range(100): module._remember(n, np.zeros(1, np.uint8))
    assert list(module.CACHE) == list(range(36, 100))
    module._remember("large", np.zeros(5000, np.uint8))
    assert list(module.CACHE) == ["large"]
    module._remember("next", np.zeros(600, np.uint8))
    assert list(module.CACHE) == ["next"]


@pytest.mark.parametrize("codec", [None, Blosc(cname="zstd", shuffle=2), Zstd(), LZ4(), Zlib(), GZip()])
def test_codecs(tmp_path, codec):
    values = pixels("S1GRD")
    write_zarr(tmp_path / "a.zarr.zip", arrays("S1GRD", values), compressor=codec)
    with ShardFile(tmp_path / "a.zarr.zip") as file: assert np.array_equal(file.read("bands"), values) and file.texts("sample") == list(IDS)


def test_texts_of_any_length_and_fortran_order(tmp_path):
    found = arrays("S1GRD", pixels("S1GRD"))
    with pytest.warns(UserWarning), zarr.storage.ZipStore(tmp_path / "a.zarr.zip", mode="w") as store:
        group = zarr.create_group(store, zarr_format=2)
        group.create_array("sample", shape=(3,), dtype=str, chunks=(3,))[...] = np.array(["0080717", "ü", ""])
        group.create_array("bands", shape=found["bands"].shape, dtype=">f2", chunks=(2, 2, 2, 24, 24), order="F")[...] = found["bands"]
        zarr.consolidate_metadata(store)
    with ShardFile(tmp_path / "a.zarr.zip") as file:
        assert file.texts("sample") == ["0080717", "ü", ""] and np.array_equal(file.read("bands"), found["bands"]) and file.array("bands").order == "F"


# -- offset, nodata, bands, levels ------------------------------------------------------------------------------------------------------------------

def test_offset(tmp_path):
    values, _ = build(tmp_path, optical="S2L2A")
    source = ZarrShards(tmp_path, coding="raw", offset=-1000)
    assert source.sensors["s2"].level == "L2A" and source.sensors["s2"].num_bands == 12
    assert np.array_equal(source.read(IDS[0]).images["s2"][0], values["s2"][0, 0] - 1000.0)
    assert np.array_equal(ZarrShards(tmp_path, coding="raw").read(IDS[0]).images["s2"][0], values["s2"][0, 0] - 1000.0)
    assert np.array_equal(ZarrShards(tmp_path, coding="raw", offset=0).read(IDS[0]).images["s2"][0], values["s2"][0, 0])      # L2A has no B10 that could tell
    with pytest.raises(ConfigError, match="offset=1000"): ZarrShards(tmp_path, offset=1000)


def test_offset_that_is_gone_already(tmp_path):
    found = arrays("S2L1C", pixels("S2L1C"))
    values = found["bands"].clip(1001) - 1000
    values[0, 0, :, 0, 0], values[0, 0, 3, 1, 1] = 0, 0
    write_zarr(shard(tmp_path, "S2L1C"), found | {"bands": values})
    write_label(tmp_path / "dw_noisy_labels", IDS[0], OPTICAL[0], class_ids())
    with pytest.raises(DataError, match="pass offset=0"): ZarrShards(tmp_path, sensors=("s2",)).read(IDS[0])
    place = ZarrShards(tmp_path, sensors=("s2",), offset=0, coding="raw").read(IDS[0])
    assert np.array_equal(place.images["s2"][0][:, 2:], values[0, 0][:, 2:]) and np.argwhere(~place.valid["s2"][0]).tolist() == [[0, 0]]      # 0 may be measured there
    build(tmp_path / "with")
    with pytest.raises(DataError, match=r"\+1000 DN"): ZarrShards(tmp_path / "with", offset=0).read(IDS[0])


def test_nodata(tmp_path):
    values, labels = build(tmp_path)
    values["s2"][0, 1, :, :2], values["s2"][0, 1, 4, 5, 6] = 0, 0
    write_zarr(shard(tmp_path, "S2L1C"), arrays("S2L1C", values["s2"]))
    values["s1"][0, RADAR_OF[1], 0, 3, 3], values["s1"][0, RADAR_OF[1], 1, 4, 4] = np.nan, -np.inf
    write_zarr(shard(tmp_path, "S1GRD"), arrays("S1GRD", values["s1"]))
    place = ZarrShards(tmp_path).read(IDS[0])
    bad = np.zeros((24, 24), bool)
    bad[:2], bad[5, 6] = True, True
    assert np.array_equal(~place.valid["s2"][1], bad) and place.valid["s2"][0] is None
    assert np.argwhere(~place.valid["s1"][1]).tolist() == [[3, 3], [4, 4]]
    assert (place.labels[0] == 255).any() and set(np.unique(place.labels[0])) <= {*range(9), 255}
    raw = ZarrShards(tmp_path, coding="raw").read(IDS[0])
    assert np.isnan(raw.images["s1"][1][:, 3, 3]).all() and np.isnan(raw.images["s2"][1][:, bad]).all() and np.isfinite(raw.images["s2"][1][:, ~bad]).all()


def test_bands_by_name(tmp_path):
    values, _ = build(tmp_path)
    found, order = arrays("S2L1C", values["s2"]), np.random.default_rng(0).permutation(13)
    write_zarr(shard(tmp_path, "S2L1C"), found | {"bands": values["s2"][:, :, order], "band": found["band"][order]})
    source = ZarrShards(tmp_path, bands={"s2": ["B4", "B11"], "s1": ["VH"]}, coding="raw")
    place = source.read(IDS[2])
    assert np.array_equal(place.images["s2"][3], values["s2"][2, 3][[3, 11]] - 1000.0) and np.array_equal(place.images["s1"][0], values["s1"][2, 0][1:])
    assert ZarrShards(tmp_path, bands={"s2": 9}).sensors["s2"].num_bands == 9
    write_zarr(shard(tmp_path, "S1GRD"), arrays("S1GRD", values["s1"]) | {"band": np.array(["vv", "hh"])})
    with pytest.raises(DataError, match="no band VH of s1 GRD; it has VV, HH"): ZarrShards(tmp_path).read(IDS[0])


def test_level_and_split(tmp_path):
    build(tmp_path)
    write_zarr(shard(tmp_path, "S2L2A"), arrays("S2L2A", pixels("S2L2A")))
    write_zarr(shard(tmp_path, "S2L1C", split="val"), arrays("S2L1C", pixels("S2L1C", 2), ("0000001", "0000002")))
    assert [ZarrShards(tmp_path, level=level).sensors["s2"].level for level in (None, "L1C", "L2A")] == ["L1C", "L1C", "L2A"]
    assert ZarrShards(tmp_path).keys() == [*IDS, "0000001", "0000002"] and ZarrShards(tmp_path, split="train").keys() == list(IDS)
    assert ZarrShards(tmp_path, split="val", sensors="s2").keys() == ["0000001", "0000002"]
    assert "5 locations in 2 shards" in ZarrShards(tmp_path).describe() and "train, val" in ZarrShards(tmp_path).describe()
    with pytest.raises(DataError, match="no shard of s1; looked for val/S1GRD"): ZarrShards(tmp_path, split="val")
    for options in ({"level": "L3"}, {"split": "test"}, {"grid": "utm"}, {"coding": "int"}, {"sensors": ("s3",)}):
        with pytest.raises(ConfigError): ZarrShards(tmp_path, **options)


# -- joins ------------------------------------------------------------------------------------------------------------------------------------------

def test_one_sensor(tmp_path):
    values, labels = build(tmp_path)
    place = ZarrShards(tmp_path, sensors="s1", coding="raw").read(IDS[0])
    assert place.seasons == OPTICAL and all(np.array_equal(place.images["s1"][t], values["s1"][0, RADAR_OF[t]]) for t in range(4))
    place = ZarrShards(tmp_path, sensors="s2", coding="raw").read(IDS[0])
    assert all(np.array_equal(place.labels[t], labels[0, t]) for t in range(4)) and list(place.images) == ["s2"]


def test_products_in_another_order(tmp_path):
    values, labels = build(tmp_path)
    order = [3, 1, 0, 2]
    write_zarr(shard(tmp_path, "S2L1C"), arrays("S2L1C", values["s2"][:, order], products=[[f"a/b/{OPTICAL[t]}.SAFE" for t in order]] * 3))
    place = ZarrShards(tmp_path, coding="raw").read(IDS[1])
    assert place.seasons == OPTICAL
    for t in range(4): assert np.array_equal(place.images["s2"][t], values["s2"][1, t] - 1000.0) and np.array_equal(place.labels[t], labels[1, t])
    for t in range(4): assert np.array_equal(place.images["s1"][t], values["s1"][1, RADAR_OF[t]])


def test_labels_that_do_not_match(tmp_path):
    values, labels = build(tmp_path)
    folder = tmp_path / "dw_noisy_labels"
    other = OPTICAL[2].replace("0920", "0921")
    (folder / IDS[0] / OPTICAL[2]).rename(folder / IDS[0] / other)
    source = ZarrShards(tmp_path, coding="raw")
    place = source.read(IDS[0])
    assert place.seasons == tuple(OPTICAL[t] for t in (0, 1, 3)) and dropped(source, IDS[0]) == {OPTICAL[2]: "no label", other: "id mismatch"}
    assert np.array_equal(place.labels[2], labels[0, 3]) and np.array_equal(place.images["s1"][2], values["s1"][0, RADAR_OF[3]])
    for t in (0, 1, 3): (folder / IDS[0] / OPTICAL[t]).rename(folder / IDS[0] / OPTICAL[t].replace("T51UVP", "T51UVQ"))
    with pytest.raises(SkipLocation, match="no product with a label") as e: source.read(IDS[0])
    assert e.value.reason == "id mismatch"
    (folder / IDS[1] / OPTICAL[0] / "label.tif").write_bytes(b"no tif")
    (folder / IDS[1] / OPTICAL[1] / "label.tif").unlink()
    assert dropped(source, IDS[1]) == {OPTICAL[0]: "bad raster", OPTICAL[1]: "no label"}


def test_labels_missing(tmp_path):
    build(tmp_path, labelled=False)
    with pytest.raises(DataError, match="no labels there.*give NoLDO-S12's folder or zip archive with labels="): ZarrShards(tmp_path)
    with pytest.raises(DataError, match="elsewhere"): ZarrShards(tmp_path, labels=tmp_path / "elsewhere")
    for t in range(4): write_label(tmp_path / "nol", IDS[0], OPTICAL[t], class_ids())
    source = ZarrShards(tmp_path, labels=tmp_path / "nol")
    with pytest.raises(SkipLocation) as e: source.read(IDS[1])
    assert e.value.reason == "no label"
    store = prepare(source, tmp_path / "store", progress=False)
    assert len(store) == 1 and store.manifest["info"]["report"]["dropped"] == {"no label": list(IDS[1:])}


def test_labels_in_a_zip_file_and_by_a_list(tmp_path):
    _, labels = build(tmp_path)
    with zipfile.ZipFile(tmp_path / "nol.zip", "w") as file:
        for path in (tmp_path / "dw_noisy_labels").rglob("label.tif"): file.write(path, path.relative_to(tmp_path))
    (tmp_path / "ids.csv").write_text(f"ids,sub1,sub2\n{int(IDS[0])},{OPTICAL[0]},{OPTICAL[3]}\n")
    assert np.array_equal(ZarrShards(tmp_path, labels=tmp_path / "nol.zip").read(IDS[2]).labels[1], labels[2, 1])
    source = open_source(tmp_path, labels=tmp_path / "nol.zip", ids=tmp_path / "ids.csv")
    assert source.read(IDS[0]).seasons == (OPTICAL[0], OPTICAL[3]) and dropped(source, IDS[0]) == {OPTICAL[1]: "no label", OPTICAL[2]: "no label"}
    with pytest.raises(SkipLocation): source.read(IDS[1])


def test_samples_missing(tmp_path):
    values, _ = build(tmp_path, radar_rows=(2, 0))
    write_zarr(shard(tmp_path, "S2L1C"), arrays("S2L1C", values["s2"][:2], IDS[:2]))
    source = ZarrShards(tmp_path)
    assert source.keys() == list(IDS)                         # the third is known from the radar file
    for key, folder in ((IDS[1], "S1GRD"), (IDS[2], "S2L1C")):
        with pytest.raises(SkipLocation, match=f"{folder}.*no sample {key}") as e: source.read(key)
        assert e.value.reason == "missing sensor"
    shard(tmp_path, "S1GRD").unlink()
    write_zarr(shard(tmp_path, "S1GRD", 2), arrays("S1GRD", pixels("S1GRD", 1), ("0000009",)))
    source = ZarrShards(tmp_path)
    assert source.keys() == [*IDS[:2], "0000009"]
    with pytest.raises(SkipLocation, match="not there") as e: source.read(IDS[0])
    assert e.value.reason == "missing sensor"
    with pytest.raises(DataError, match="no location '0000010'"): source.read("0000010")


def test_ids_twice_or_odd(tmp_path):
    build(tmp_path)
    write_zarr(shard(tmp_path, "S2L1C", 2), arrays("S2L1C", pixels("S2L1C", 1), ("0060573",)))
    with pytest.raises(DataError, match="0060573 is in train/.*000001.* and in train/.*000002"): ZarrShards(tmp_path)
    for ids, text in ((("0060573", "0060573"), "an id twice"), (("0060573", "../../1"), "seven digits"), (("0060573", "12"), "seven digits")):
        write_zarr(shard(tmp_path, "S2L1C", 2), arrays("S2L1C", pixels("S2L1C", 2), ids))
        with pytest.raises(DataError, match=text): ZarrShards(tmp_path)


def test_products_twice_or_without_a_date(tmp_path):
    values, _ = build(tmp_path)
    products = [list(OPTICAL), [OPTICAL[0]] * 4, [*OPTICAL[:3], ""]]
    write_zarr(shard(tmp_path, "S2L1C"), arrays("S2L1C", values["s2"], products=products))
    source = ZarrShards(tmp_path)
    assert len(source.read(IDS[0]).seasons) == 4
    for key, text in ((IDS[1], "one product"), (IDS[2], "holds no date")):
        with pytest.raises(SkipLocation, match=text) as e: source.read(key)
        assert e.value.reason == "id mismatch"


def test_product_name():
    assert {product_name(p) for p in (OPTICAL[0], f"{OPTICAL[0]}.SAFE", f"a/b/{OPTICAL[0]}.SAFE/", f"a\\{OPTICAL[0]} ")} == {OPTICAL[0]}


# -- grids ------------------------------------------------------------------------------------------------------------------------------------------

def test_label_grid(tmp_path):
    _, labels = build(tmp_path, label_corner=(CORNER[0] - 30, CORNER[1] + 20))
    array, geo = ZarrShards(tmp_path).examine(IDS[0]), ZarrShards(tmp_path, grid="geo").examine(IDS[0])
    assert np.allclose(array.offsets["label"], (-3, -2)) and np.allclose(geo.offsets["label"], (-3, -2))
    assert np.array_equal(array.location.labels[1], labels[0, 1]) and "labels resampled" not in array.counts
    expected = np.full((24, 24), 255, np.uint8)
    expected[:-2, :-3] = labels[0, 1][2:, 3:]
    assert np.array_equal(geo.location.labels[1], expected) and geo.counts["labels resampled"] == 4


def test_label_of_another_place_or_size(tmp_path):
    build(tmp_path, label_corner=(CORNER[0] + 130, CORNER[1]))
    with pytest.raises(SkipLocation, match="another place, 13.00 px east") as e: ZarrShards(tmp_path).read(IDS[0])
    assert e.value.reason == "grid mismatch"
    _, labels = build(tmp_path, label_size=12)
    reading = ZarrShards(tmp_path).examine(IDS[0])
    assert np.array_equal(reading.location.labels[0], np.kron(labels[0, 0], np.ones((2, 2), np.uint8))) and reading.counts["labels resampled"] == 4
    write_label(tmp_path / "dw_noisy_labels", IDS[0], OPTICAL[0], np.full((25, 23), 7, np.uint8))
    assert set(np.unique(ZarrShards(tmp_path).read(IDS[0]).labels[0])) == {7}
    write_label(tmp_path / "dw_noisy_labels", IDS[0], OPTICAL[0], np.full((24, 24), 9, np.uint8))
    with pytest.raises(DataError, match="9"): ZarrShards(tmp_path).read(IDS[0])


def test_label_crs(tmp_path):
    build(tmp_path)
    path = tmp_path / "dw_noisy_labels" / IDS[0] / OPTICAL[0] / "label.tif"
    for crs in ('LOCAL_CS["here",UNIT["metre",1]]', 'ENGCRS["here",EDATUM["here"],CS[Cartesian,2],AXIS["easting",east],AXIS["northing",north],LENGTHUNIT["metre",1]]', "EPSG:32601"):
        with rasterio.open(path, "r+") as file: file.crs = CRS.from_user_input(crs)
        reading = ZarrShards(tmp_path).examine(IDS[0])
        assert reading.dropped[0][:2] == ("grid mismatch", f"{IDS[0]}/{OPTICAL[0]}") and reading.offsets["label"] == (0, 0)


def test_radar_grid(tmp_path):
    values, _ = build(tmp_path)
    write_zarr(shard(tmp_path, "S1GRD"), arrays("S1GRD", values["s1"], corner=(CORNER[0] + 20, CORNER[1])))
    array, geo = (ZarrShards(tmp_path, grid=g, coding="raw").examine(IDS[0]) for g in ("array", "geo"))
    assert np.allclose(array.offsets["s1"], (2, 0)) and np.array_equal(array.location.images["s1"][0], values["s1"][0, 0])
    assert np.array_equal(geo.location.images["s1"][0][:, :, 2:], values["s1"][0, 0][:, :, :-2]) and not geo.location.valid["s1"][0][:, :2].any()
    write_zarr(shard(tmp_path, "S1GRD"), arrays("S1GRD", values["s1"], corner=(CORNER[0] + 200, CORNER[1])))
    with pytest.raises(SkipLocation, match="another place"): ZarrShards(tmp_path).read(IDS[0])
    write_zarr(shard(tmp_path, "S1GRD"), arrays("S1GRD", pixels("S1GRD", 3, 22)))
    with pytest.raises(SkipLocation, match="22 x 22 px where 24 x 24") as e: ZarrShards(tmp_path).read(IDS[0])
    assert e.value.reason == "grid mismatch"


@pytest.mark.parametrize("change, error, text", [
    (lambda a: {"x_": a["x_"][:, ::-1]}, SkipLocation, "regular grid"), (lambda a: {"y_": a["y_"] * np.nan}, SkipLocation, "regular grid"),
    (lambda a: {"x_": a["x_"] * np.random.default_rng(0).random((3, 24))}, SkipLocation, "regular grid"), (lambda a: {"crs": a["crs"] * 0 + 99999}, SkipLocation, "EPSG"),
    (lambda a: {"crs": a["crs"] * np.nan}, SkipLocation, "EPSG"), (lambda a: {"crs": np.array(["here"] * 3)}, SkipLocation, "EPSG"),
    (lambda a: {"x_": a["x_"][:, :-1]}, DataError, "x_ and y_"), (lambda a: {"crs": a["crs"][:1]}, DataError, "crs has shape"),
    (lambda a: {"file_id": a["file_id"][:, :2]}, DataError, "bands has shape"), (lambda a: {"sample": a["sample"].astype("S7")}, None, ""), (lambda a: {"crs": a["crs"].astype("i4")}, None, ""),
    (lambda a: {"crs": np.array(["EPSG:32651"] * 3)}, None, ""), (lambda a: {"bands": a["bands"].astype("U5")}, DataError, "text|numbers"),
    (lambda a: {"bands": (a["bands"] / 10000).astype("f4")}, DataError, "s2"), (lambda a: {"bands": (a["bands"] // 100).astype("u1")}, DataError, "s2")])
def test_coordinates_and_types(tmp_path, change, error, text):
    values, _ = build(tmp_path)
    found = arrays("S2L1C", values["s2"])
    write_zarr(shard(tmp_path, "S2L1C"), found | change(found))
    source = ZarrShards(tmp_path)
    if error is None: assert source.read(IDS[1]).crs == "EPSG:32651"
    else:
        with pytest.raises(error, match=text): source.read(IDS[1])


# -- damage -----------------------------------------------------------------------------------------------------------------------------------------

def test_missing_chunk(tmp_path):
    build(tmp_path)
    rewrite(shard(tmp_path, "S2L1C"), lambda name, data: None if name in ("bands/0.2.0.0.0", "file_id/0.1") else data)
    rewrite(shard(tmp_path, "S1GRD"), lambda name, data: None if name == "bands/1.1.0.0.0" else data)      # IDS[0], the last season
    source = ZarrShards(tmp_path)
    reading = source.examine(IDS[0])
    assert {name: reason for reason, name, _ in reading.dropped} == {f"{IDS[0]}/{OPTICAL[t]}": "bad raster" for t in (2, 3)}
    assert re.search(r"S2L1C.*000001.zarr.zip: no bands/0\.2\.0\.0\.0", reading.dropped[0][2]) and "S1GRD" in reading.dropped[1][2]
    rewrite(shard(tmp_path, "S2L1C"), lambda name, data: None if name.startswith("bands/0") else data)
    with pytest.raises(SkipLocation, match="no bands/0.0.0.0.0") as e: source.read(IDS[0])
    assert e.value.reason == "bad raster" and len(source.read(IDS[1]).seasons) == 4
    rewrite(shard(tmp_path, "S2L1C"), lambda name, data: None if name == "x_/.zarray" else data)
    with pytest.raises(SkipLocation, match="no x_/.zarray"): source.read(IDS[1])


def test_flipped_byte(tmp_path):
    build(tmp_path)
    path = shard(tmp_path, "S2L1C")
    at = member_at(path, "bands/0.0.0.0.0") + 100
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    reading = ZarrShards(tmp_path).examine(IDS[0])
    assert reading.dropped[0][:2] == ("bad raster", f"{IDS[0]}/{OPTICAL[0]}") and "Bad CRC" in reading.dropped[0][2] and reading.location.seasons == OPTICAL[1:]


@pytest.mark.parametrize("codec", [Blosc(cname="lz4"), Zstd(), LZ4(), Zlib(), None])
def test_damaged_buffer_with_a_right_checksum(tmp_path, codec):
    build(tmp_path, compressor=codec)
    source, path = ZarrShards(tmp_path, sensors="s2"), shard(tmp_path, "S2L1C")
    whole = path.read_bytes()
    for change in (lambda d: d[:-7], lambda d: d[:5], lambda d: b"", lambda d: d[:4] + b"\xff\xff\xff\x7f" + d[8:], lambda d: bytes(len(d) + 1)):
        path.write_bytes(whole)
        rewrite(path, lambda name, data: change(data) if name == "bands/0.1.0.0.0" else data)
        if codec is None and len(change(b"0" * 20)) == 20: continue      # nothing tells
        reading = source.examine(IDS[0])
        assert [d[0] for d in reading.dropped] == ["bad raster"] and "bands/0.1.0.0.0" in reading.dropped[0][2]


@pytest.mark.parametrize("fields, text", [
    ({"shape": [10 ** 12, 4, 13, 24, 24]}, "shape"), ({"chunks": [2 ** 20, 4, 13, 24, 24]}, "a chunk of"), ({"shape": [3, 4, 13, 2 ** 20, 2 ** 20]}, "bands has shape|more than|do not fit"),
    ({"shape": "many"}, "shape"), ({"shape": []}, "shape"), ({"shape": [3, 4, 13, 24, -24]}, "shape"), ({"shape": [3, 4, 13, 24, True]}, "shape"), ({"chunks": [1, 1, 13, 24]}, "contradicts"),
    ({"chunks": [1, 1, 13, 24, 0]}, "chunks"), ({"dtype": "|O"}, "dtype"), ({"dtype": "|O", "filters": [{"id": "pickle"}]}, "pickle"), ({"dtype": "<M8[ns]"}, "dtype"), ({"dtype": "|V8"}, "dtype"),
    ({"dtype": [["a", "<i2"]]}, "dtype"), ({"dtype": "i2,O"}, "dtype"), ({"dtype": "<U900000000"}, "dtype"), ({"dtype": "("}, "dtype"), ({"filters": [{"id": "delta"}]}, "delta"), ({"filters": 3}, "dtype"),
    ({"compressor": {"id": "pickle"}}, "pickle"), ({"compressor": {"id": ["a"]}}, "compressor"), ({"compressor": 7}, "compressor"), ({"order": "K"}, "contradicts"), ({"zarr_format": 3}, "Zarr v2"),
    ({"dimension_separator": ".."}, "contradicts")])
def test_hostile_metadata(tmp_path, fields, text):
    build(tmp_path)
    source = ZarrShards(tmp_path, sensors="s2")
    metadata(shard(tmp_path, "S2L1C"), "bands", **fields)
    with pytest.raises(DataError, match=text) as e: source.read(IDS[0])
    assert "000001.zarr.zip" in str(e.value) and "\n" not in str(e.value)


class Bomb:
    def __reduce__(self): return os.mkdir, (os.environ["BOMB"],)


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "went off"))
    build(tmp_path)
    path = shard(tmp_path, "S2L1C")
    metadata(path, "sample", dtype="|O", filters=[{"id": "pickle", "protocol": 5}], compressor=None)
    rewrite(path, lambda name, data: pickle.dumps(Bomb()) if name == "sample/0" else data)
    with pytest.raises(DataError, match="pickle"): ZarrShards(tmp_path, sensors="s2")
    assert not (tmp_path / "went off").exists()


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 200_000, b'{"zarr_format": 2}'])
def test_damaged_json(tmp_path, text):
    with pytest.raises(DataError, match="x.zarr: bands"): array_info(text, "x.zarr: bands")
    build(tmp_path)
    source = ZarrShards(tmp_path)
    rewrite(shard(tmp_path, "S2L1C"), lambda name, data: text if name == ".zmetadata" else data)
    assert len(source.read(IDS[0]).seasons) == 4                  # nobody asked it
    rewrite(shard(tmp_path, "S2L1C"), lambda name, data: text if name == "bands/.zarray" else data)
    with pytest.raises(DataError): source.read(IDS[0])


def test_zip_bomb(tmp_path):
    build(tmp_path)
    path = shard(tmp_path, "S2L1C")
    with zipfile.ZipFile(path) as old: members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in members.items(): new.writestr(name, bytes(5_000_000) if name == "bands/1.0.0.0.0" else data)
    reading = ZarrShards(tmp_path).examine(IDS[1])
    assert "5000000 bytes where at most" in reading.dropped[0][2] and len(reading.location.seasons) == 3
    for pack in (Zlib(), GZip()):
        with pytest.raises(ValueError): np.frombuffer(unpack(pack.encode(bytes(10 ** 7)), pack.codec_id, 1000), np.uint8).reshape(1000)


def test_broken_shards(tmp_path):
    values, _ = build(tmp_path)
    for n, ids in ((2, ("0000021", "0000022")), (3, ("0000031", "0000032"))):
        for folder in ("S2L1C", "S1GRD"): write_zarr(shard(tmp_path, folder, n), arrays(folder, pixels(folder, 2), ids))
    for folder in ("S2L1C", "S1GRD"):
        path = shard(tmp_path, folder, 2)
        path.write_bytes(path.read_bytes()[:-1000])
    shard(tmp_path, "S2L1C", 3).write_bytes(b"")
    source, name = ZarrShards(tmp_path), "ssl4eos12_train_seasonal_data_000002"
    assert source.keys() == [*IDS, "0000031", "0000032", name]
    with pytest.raises(SkipLocation, match="000002.zarr.zip: no complete zip file") as e: source.read(name)
    assert e.value.reason == "bad raster"
    for t in range(4): write_label(tmp_path / "dw_noisy_labels", "0000031", OPTICAL[t], class_ids())
    with pytest.raises(SkipLocation, match="S2L1C.*000003.zarr.zip") as e: source.read("0000031")
    assert e.value.reason == "bad raster"
    store = prepare(source, tmp_path / "store", progress=False)
    assert store.manifest["info"]["report"]["dropped"] == {"bad raster": ["0000031", name], "no label": ["0000032"]}
    for folder in ("S2L1C", "S1GRD"):
        for n in (1, 3): shard(tmp_path, folder, n).write_bytes(b"no zip")
    with pytest.raises(DataError, match="no shard can be read, such as .*000001"): ZarrShards(tmp_path)


def test_a_file_that_changes(tmp_path):
    values, _ = build(tmp_path, chunks=(3, 1, 13, 24, 24))
    source = ZarrShards(tmp_path, sensors="s2", coding="raw")
    source.read(IDS[0])
    write_zarr(shard(tmp_path, "S2L1C"), arrays("S2L1C", values["s2"] + np.int16(5)), chunks=(3, 1, 13, 24, 24))
    assert np.array_equal(source.read(IDS[0]).images["s2"][0], values["s2"][0, 0] - 995.0)


# -- many, and elsewhere ----------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_other_processes(tmp_path, start):
    build(tmp_path, chunks=(3, 1, 13, 24, 24))
    source = ZarrShards(tmp_path)
    expected, copy = read_all(source), pickle.loads(pickle.dumps(source))
    assert read_all(copy) == expected and not any(hasattr(v, "close") for v in vars(source).values())
    with ProcessPoolExecutor(1 + (start == "fork"), mp_context=multiprocessing.get_context(start)) as pool: assert list(pool.map(read_all, [source] * 2)) == [expected] * 2


def test_what_is_kept_of_many(tmp_path, monkeypatch):
    build(tmp_path)
    (tmp_path / "train/S1GRD").rename(tmp_path / "elsewhere")
    for n in range(2, 1001): os.link(shard(tmp_path, "S2L1C"), shard(tmp_path, "S2L1C", n))
    monkeypatch.setattr(ShardFile, "texts", lambda self, name, *index: [f"{64 * int(self.path.name[-15:-9]) + i:07d}" for i in range(64)])
    source = ZarrShards(tmp_path, sensors="s2")
    assert len(source.keys()) == 64_000 and source.keys()[64:66] == ["0000128", "0000129"] and len(pickle.dumps(source)) < 700_000
    assert source.shards[source._shard_of[64]] == "train/ssl4eos12_train_seasonal_data_000002.zarr.zip"


def test_recognised(tmp_path):
    data = tmp_path / "set"
    (data / "train/S2L1C").mkdir(parents=True)
    assert not ZarrShards.recognises(data) and not ZarrShards.recognises("https://a.org/train")
    with pytest.raises(DataError, match="no data set was recognised.*SSL4EO-S12 v1.1"): open_source(data)
    build(data)
    assert ZarrShards.recognises(data)
    with pytest.raises(DataError, match=r"these folders in it are: set \(ssl4eo-s12-v1.1\)"): open_source(tmp_path)


def test_coordinates_are_centres():
    x, y = coordinates(2, 24)
    assert x[0, 0] == CORNER[0] + 5 and y[1, 0] == CORNER[1] - 5 and x[1, 0] - x[0, 0] == 3000
