"LMDBs of others: every published layout read right, hostile pickles refused unread, damage and change of files found before they end the process."
import multiprocessing
import os
import pickle
import shutil
import subprocess

import cv2
import numpy as np
import pytest
import rasterio
from layouts_records import (NAMES, PRETRAINING, SIZE, WRITERS, change, columns, dump, pretraining, read_all, s1, s2, s2_bands, tile_name,
                             write_cromss_lmdb, write_dfc2020_lmdb, write_lmdb, write_noldo_lmdb, write_rico_hdl_lmdb)
from safetensors.numpy import save

from cromss import records
from cromss.config import ConfigError, DataError
from cromss.dataset import PatchDataset
from cromss.prepare import prepare
from cromss.records import DFC2020LMDB, NoldoLMDB, PretrainLMDB, RicoSource, load_bands, load_record, peek, walk_records
from cromss.sensors import SENSORS, decode, encode
from cromss.sources import SkipLocation, open_source

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def skipped(source, key):
    "Why a location is left out: (reason, detail)."
    with pytest.raises(SkipLocation) as e: source.read(key)
    return e.value.reason, e.value.detail


def put(path, **values): change(path, {k.strip("_"): v for k, v in values.items()})


def drop(path, key): change(path, {key: None})


# All kinds

@pytest.mark.parametrize("kind", WRITERS)
def test_recognised_prepared_and_read_as_a_batch(kind, tmp_path):
    path, options = WRITERS[kind](tmp_path / "a b")
    source = open_source(path, **options)
    assert source.kind == kind and str(len(source.keys())) in source.describe()
    store = prepare(source, tmp_path / "store", progress=False)
    assert [store.key(i) for i in range(len(store))] == source.keys()
    batch = PatchDataset(store, crop=16)[0]
    assert batch["image_s2"].shape == (source.sensors["s2"].num_bands, 16, 16) and batch["mask"].shape == (16, 16)
    for i, key in enumerate(source.keys()):
        place, kept = source.read(key), store.location(i)
        assert all(np.array_equal(a, b) for name in place.images for a, b in zip(place.images[name], kept.images[name])) and np.array_equal(place.labels, kept.labels)


def test_an_lmdb_may_be_one_file(tmp_path):
    path, _ = write_dfc2020_lmdb(tmp_path / "folder")
    shutil.copyfile(path / "data.mdb", tmp_path / "one.lmdb")
    assert open_source(tmp_path / "one.lmdb").keys() == open_source(path).keys() == ["00000", "00001"]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_sources_go_to_processes_of_either_kind_without_another_walk(method, tmp_path):
    sources = [open_source(path, **options) for path, options in (write(tmp_path / kind) for kind, write in WRITERS.items())]
    expected = [int(source.read(key).images["s2"][0].sum()) for source in sources for key in source.keys()]      # the environments are open when the process forks
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    children = [context.Process(target=read_all, args=(sources, queue)) for _ in range(2)]
    for child in children: child.start()
    found = [queue.get(timeout=60) for _ in children]
    for child in children: child.join()
    assert all(sums == expected for _, _, sums in found) and len({os.getpid(), *(pid for pid, _, _ in found)}) == 3 and {c.exitcode for c in children} == {0}
    assert method == "fork" or all(walked == 0 for _, walked, _ in found)
    assert [int(source.read(key).images["s2"][0].sum()) for source in sources for key in source.keys()] == expected


@pytest.mark.parametrize("kind", WRITERS)
def test_pickled_small_and_listed_once(kind, tmp_path, monkeypatch):
    path, options = WRITERS[kind](tmp_path / "data")
    source, ran = open_source(path, **options), []
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: ran.append(a))
    assert len(pickle.dumps(source)) < 10_000 and "lmdb" not in str(pickle.loads(pickle.dumps(source)).__dict__.values()).replace(".lmdb", "").replace("_lmdb", "")
    for _ in range(3): [source.read(key) for key in source.keys()]
    assert open_source(path, **options).keys() == source.keys() and ran == []


# Files that change or are damaged

@pytest.mark.parametrize("how", ["grow", "cut", "gone", "touch"])
@pytest.mark.parametrize("opened", [False, True])
def test_a_file_that_changes_after_it_was_opened_is_refused(how, opened, tmp_path):
    path, _ = write_dfc2020_lmdb(tmp_path / "data", tiles=8)
    source = open_source(path)
    if opened: source.read("00000")
    data = path / "data.mdb"
    if how == "grow": put(path, s1_8=bytes(10 ** 6))
    if how == "cut": os.truncate(data, data.stat().st_size // 2)
    if how == "gone": data.unlink()
    if how == "touch": os.utime(data, ns=(0, 0))
    with pytest.raises(DataError, match="cannot be read" if how == "gone" else "was written to while it was in use") as e: source.read("00007")
    assert not isinstance(e.value, SkipLocation) and str(data) in str(e.value)


@pytest.mark.parametrize("part", [0.1, 0.3, 0.6, 0.9])
def test_a_truncated_lmdb_is_refused_by_a_process_of_its_own(part, tmp_path):
    path, _ = write_dfc2020_lmdb(tmp_path / "data", tiles=8)
    data = path / "data.mdb"
    os.truncate(data, int(data.stat().st_size * part))
    with pytest.raises(DataError, match="inner structure is damaged; copy it again"): DFC2020LMDB(path)
    with pytest.raises(DataError): open_source(path)


def test_lmdb_pages_of_zeros_are_refused(tmp_path):
    path, _ = write_dfc2020_lmdb(tmp_path / "data", tiles=8)
    data = path / "data.mdb"
    whole, pages = data.read_bytes(), data.stat().st_size // 4096
    refused = 0
    for page in range(2, pages, pages // 12):
        data.write_bytes(whole[:page * 4096] + bytes(4096) + whole[(page + 1) * 4096:])
        os.utime(data, ns=(page, page))
        try: source = DFC2020LMDB(path)
        except DataError: refused += 1; continue
        for key in source.keys():
            try: source.read(key)
            except DataError: refused += 1
    data.write_bytes(whole)
    assert refused


def test_what_is_no_lmdb(tmp_path):
    (tmp_path / "text.lmdb").write_text("no database" * 100)
    (tmp_path / "empty").mkdir()
    for path, message in ((tmp_path / "text.lmdb", "is no LMDB"), (tmp_path / "empty", "is no LMDB"), (tmp_path / "none", "not there")):
        with pytest.raises(DataError, match=message): walk_records(path)
        assert peek(path) == (b"", b"")
        assert not any(cls.recognises(path) for cls in (PretrainLMDB, DFC2020LMDB, NoldoLMDB, RicoSource))
    empty = write_lmdb(tmp_path / "empty.lmdb", {})
    assert walk_records(empty)[1] == [] and peek(empty) == (b"", b"")
    with pytest.raises(DataError): open_source(empty)


def test_prepared_stores_are_not_taken_for_records(tmp_path):
    path, _ = write_dfc2020_lmdb(tmp_path / "data")
    prepare(path, tmp_path / "store", progress=False)
    assert not RicoSource.recognises(tmp_path / "store" / "shard-00000.lmdb") and not RicoSource.recognises(tmp_path / "store")


# Pickles

class Harm:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


class Built:
    def __setstate__(self, state): os.mkdir(state)


def harmful(folder):
    "Pickles that would make a folder if they were loaded, or name what no record needs."
    harm, array, built = folder / "harm", np.zeros((4, 4, 4), np.uint8), Built()
    built.a, name = str(harm), str(harm).encode()
    parts = [Harm(harm), (Harm(harm), array.shape, 1), (array.tobytes(), (4, Harm(harm), 4), 1), array]
    parts += [(array.tobytes(), array.shape, third) for third in (Harm(harm), built, np.array([1, 2]), np.array([Harm(harm)], object))]
    by_hand = [b"\x80\x02cos\nmkdir\nX" + len(name).to_bytes(4, "little") + name + b"\x85" + call + b"." for call in (b"R", b"\x81")]
    by_hand += [b"(ios\nmkdir\n.", b"(cos\nmkdir\no.", b"\x80\x04\x8c\x01aQ.", b"Pabc\n.", b"\x80\x02\x82\x01.",
                b"\x80\x04cnumpy\ndtype\nX\x02\x00\x00\x00O8\x85R.", b"cnumpy\ndtype\n(tb.", b"K\x01)R.", b")b."]
    return [pickle.dumps(p, protocol=protocol) for p in parts for protocol in (2, 3, 4, 5)] + by_hand


def test_no_pickle_runs_anything(tmp_path):
    for blob in harmful(tmp_path):
        with pytest.raises(DataError, match="a.lmdb: record 7: is no plain record, .* could run code") as e: load_record(blob, "a.lmdb", "7")
        assert not isinstance(e.value, SkipLocation) and "\n" not in str(e.value)
    for blob in (pickle.dumps(Harm(tmp_path / "harm"), protocol=p) for p in (0, 1)):
        with pytest.raises(DataError, match="a.lmdb: record 7"): load_record(blob, "a.lmdb", "7")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("number", [np.float64(3), np.datetime64("2020-01-01"), np.complex64(1), np.bool_(True), np.str_("a"), np.dtype("i8"), np.array(3)])
def test_other_numpy_values_are_refused_too(number):
    with pytest.raises(DataError, match="a.lmdb: record 7"): load_record(pickle.dumps((b"1", (1,), number)), "a.lmdb", "7")


@pytest.mark.parametrize("kind,role", [("cromss-lmdb", "labels"), ("cromss-lmdb", "s2"), ("dfc2020-lmdb", "s1_1"), ("noldo-lmdb", "s2_1")])
def test_a_record_that_would_run_code_stops_everything(kind, role, tmp_path):
    path, _ = WRITERS[kind](tmp_path / "data")
    harm = pickle.dumps((b"1234", (2, 2), Harm(tmp_path / "harm")))
    put(path / PRETRAINING[role] if role in PRETRAINING else path, **({"_1": harm} if role in PRETRAINING else {role: harm}))
    with pytest.raises(DataError, match="could run code; do not use this file") as e:
        source = open_source(path)
        for key in source.keys(): source.read(key)
    assert not isinstance(e.value, SkipLocation) and not (tmp_path / "harm").exists()
    assert ("record 1:" if role in PRETRAINING else f"record {role}:") in str(e.value)


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("name", [(), (200,), (0,), (255,), (70_000,), (2 ** 40,), (-1,), ("s1_-0.05_32.9-20190816.tif",), ("ü" * 200,), (None,),
                                  (np.int64(251_078),), (np.int32(-3),), (np.uint8(7),)])
@pytest.mark.parametrize("size", [3, 200])
def test_what_the_published_writers_write_is_read(protocol, name, size):
    array = np.random.default_rng(0).integers(0, 256, (4, size, size), np.uint8)
    record = load_record(dump(array, *name, protocol=protocol), "a.lmdb", "7")
    assert record.name == (name[0] if name else None) and type(record.name) in (int, str, type(None)) and record.shape == array.shape
    assert np.array_equal(record.array(np.uint8, 4, None, None), array)


def test_numpy_scalars_of_numpy_1_are_read():
    blob = dump(np.zeros((2, 2), np.uint8), np.int64(12), protocol=3)
    old = blob.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert old != blob and load_record(old, "a", "b").name == 12


def test_records_of_other_content_are_damaged():
    bomb = b"\x80\x04)" + b"\x94h\x00h\x00\x86" * 100 + b"."
    long = b"\x80\x04\x8a\xff" + b"\x01" * 255 + b"."
    array = np.zeros((2, 2), np.uint8)
    others = [b"", b".", b"\x80\x04.", b"no pickle", bomb, long, dump(array, 1)[:-1], dump(array, 1)[:20], dump(array, 1) + b".", b"\x80\x04h\x05.", b"\x80\x04\x85.",
              b"t.", b"\x80\x04\x8e" + b"\xff" * 8 + b".", b"\x80\x04X\x02\x00\x00\x00\xff\xfe.", b"c", b"N" * 300]
    others += [pickle.dumps(v) for v in (
        3, [1, 2], {"a": 1}, (1, 2), (b"1234", (2, 2), 1, 1), (b"1234", (2, 2.0)), (b"1234", (2, True)), (b"", (0, 2)), (b"1", (1,) * 5), (b"1", (20_001,)), (b"1", (-1,)),
        ("1", (1,)), (b"1", (1,), 1.5), (b"1", (1,), b"a"), (b"1", (1,), "x" * 2000))]
    for blob in others:
        with pytest.raises(DataError, match="a.lmdb: record 7") as e: load_record(blob, "a.lmdb", "7")
        assert isinstance(e.value, SkipLocation) and e.value.reason == "bad raster" or blob == b"c"


def test_random_bytes_are_never_a_record():
    rng = np.random.default_rng(0)
    opcodes = np.frombuffer(bytes(records._STEPS) + b".", np.uint8)
    for i in range(6_000):
        blob = rng.choice(opcodes, rng.integers(1, 30)).tobytes() if i % 2 else rng.integers(0, 256, rng.integers(1, 30), np.uint8).tobytes()
        try: load_record(blob, "a", "b")
        except DataError: pass


def test_flipped_bits_of_a_record_are_refused_or_harmless():
    whole = dump(np.zeros((2, 2), np.uint8), np.int64(12))
    for i in range(len(whole)):
        for bit in range(8):
            blob = bytearray(whole)
            blob[i] ^= 1 << bit
            try: record = load_record(bytes(blob), "a", "b").array(np.uint8, None, None)
            except DataError: continue
            assert record.size == 4


CODED = np.zeros((4, 2, 8, 8), np.uint8)


@pytest.mark.parametrize("array,message", [(CODED, None), (CODED[0], r"shape \(2, 8, 8\); \(4, 2, any, any\) is expected"), (CODED[:3], r"shape \(3, 2, 8, 8\)"),
                                           (CODED.astype(np.uint16), "1024 bytes; .* of uint8 are 512")])
def test_sizes_and_shapes_must_agree(array, message):
    record = load_record(dump(array, 1), "a", "b")
    if message is None: assert record.array(np.uint8, 4, 2, None, None).shape == array.shape; return
    with pytest.raises(SkipLocation, match=message): record.array(np.uint8, 4, 2, None, None)


# The pretraining LMDBs

def test_pretraining_values_are_those_that_were_written(tmp_path):
    path, _ = write_cromss_lmdb(tmp_path / "data", rows=12)      # as texts, row 10 comes before row 2
    source = open_source(path)
    assert source.keys() == [f"{200 + i:07d}" for i in range(12)] and source.root == path
    for i, key in enumerate(source.keys()):
        place, written = source.read(key), pretraining(i)
        assert place.key == key and place.seasons == ("0", "1", "2", "3") and place.valid is None and place.crs is None
        assert all(np.array_equal(place.images[s], written[s]) for s in ("s1", "s2")) and np.array_equal(place.labels, written["labels"])
        place.check(source.sensors, source.scheme, "uint8")


def test_pretraining_bands_and_raw_values(tmp_path):
    path, _ = write_cromss_lmdb(tmp_path / "data")
    written = pretraining(1)["s2"][2]
    some = open_source(path, bands={"s2": ["B4", "B03"]}, sensors=["s2"]).read("0000201")
    assert list(some.images) == ["s2"] and np.array_equal(some.images["s2"][2], written[[3, 2]])
    raw = open_source(path, coding="raw").read("0000201").images["s2"][2]
    assert raw.dtype == np.float32 and np.array_equal(raw, decode(written, SENSORS["s2"])) and np.array_equal(encode(raw, SENSORS["s2"])[0], written)


def test_pretraining_one_sensor_needs_no_other_lmdb(tmp_path):
    path, _ = write_cromss_lmdb(tmp_path / "data")
    shutil.rmtree(path / PRETRAINING["s1"])
    assert len(open_source(path, sensors="s2").read("0000200").labels) == 4
    with pytest.raises(DataError, match=r"no \*s1.lmdb; name the one with s1="): open_source(path)
    shutil.copytree(path / PRETRAINING["s2"], path / "other_s2c.lmdb")
    with pytest.raises(DataError, match=r"several \*s2c.lmdb"): open_source(path, sensors="s2")
    assert open_source(path, sensors="s2", s2=path / "other_s2c.lmdb").keys() == ["0000200", "0000201"]


def test_pretraining_holes_mismatches_and_damage_leave_out_one_location(tmp_path):
    path, _ = write_cromss_lmdb(tmp_path / "data", rows=8)
    drop(path / PRETRAINING["s1"], "1")
    drop(path / PRETRAINING["labels"], "2")
    put(path / PRETRAINING["s2"], _3=dump(pretraining(3)["s2"], 999))
    put(path / PRETRAINING["s2"], _4=dump(pretraining(4)["s2"], 204)[:-30])
    put(path / PRETRAINING["labels"], _5=b"damaged")
    put(path / PRETRAINING["labels"], _6=dump(np.zeros((4, 20, 20), np.uint8), 206))
    source = open_source(path)
    assert source.keys() == [f"{200 + i:07d}" for i in range(8)]
    reasons = {int(k[-1]): skipped(source, k) for k in source.keys()[1:7]}
    assert [reasons[i][0] for i in range(1, 7)] == ["missing sensor", "no label", "id mismatch", "bad raster", "bad raster", "grid mismatch"]
    assert "no record 1 (id 0000201)" in reasons[1][1] and "id 999, and 203 in another LMDB" in reasons[3][1] and "cut short" in reasons[4][1]
    assert len(prepare(source, tmp_path / "store", progress=False)) == 2


def test_pretraining_row_without_any_readable_id(tmp_path):
    path, _ = write_cromss_lmdb(tmp_path / "data")
    for name in PRETRAINING.values(): put(path / name, _5=b"damaged")
    source = open_source(path)
    assert source.keys() == ["row-5", "0000200", "0000201"] and skipped(source, "row-5")[0] == "bad raster"
    for key in ("row-6", "0000300", "200", "row-05", "x", "", "-1"):
        with pytest.raises(DataError, match="no location"): source.read(key)


def test_pretraining_unlabelled_season_and_labels_of_no_class(tmp_path):
    path, _ = write_cromss_lmdb(tmp_path / "data")
    labels = pretraining(0)["labels"]
    labels[1] = 255
    put(path / PRETRAINING["labels"], _0=dump(labels, 200))
    place = open_source(path).read("0000200")
    assert (place.labels[1] == 255).all() and np.array_equal(place.labels[0], labels[0])
    labels[0, 0, 0] = 12
    put(path / PRETRAINING["labels"], _0=dump(labels, 200))
    with pytest.raises(DataError, match=r"record 0: 1 of 2304 labels are no class of dynamic-world: 12") as e: open_source(path).read("0000200")
    assert not isinstance(e.value, SkipLocation)


def test_pretraining_two_rows_of_one_id_and_other_keys(tmp_path):
    path, _ = write_cromss_lmdb(tmp_path / "data")
    put(path / PRETRAINING["labels"], _7=dump(pretraining(0)["labels"], 200))
    with pytest.raises(DataError, match="id 200 is that of the rows 0 and 7"): open_source(path)
    drop(path / PRETRAINING["labels"], "7")
    put(path / PRETRAINING["labels"], length=b"2")
    with pytest.raises(DataError, match="key length; the pretraining LMDBs have numbers of rows"): open_source(path)


def test_options_are_checked(tmp_path):
    path, _ = write_cromss_lmdb(tmp_path / "data")
    for options, message in (({"sensors": "s3"}, "unknown sensor"), ({"coding": "float"}, "coding='float'"), ({"bands": {"s2": 7}}, "no subset of 7 bands"),
                             ({"allow_resample": True}, "unknown option")):
        with pytest.raises((ConfigError, DataError), match=message): open_source(path, **options)


# DFC2020

def test_dfc2020_published_labels_are_ids(tmp_path):
    path, _ = write_dfc2020_lmdb(tmp_path / "data", tiles=12)
    source = open_source(path, coding="raw")
    assert source.scheme.name == "dfc2020" and source.keys() == [f"{i:05d}" for i in range(12)]
    place, stored = source.read("00011"), columns(range(9))
    assert np.array_equal(place.images["s1"][0], s1(np.float64, 11).astype(np.float32)) and np.array_equal(place.images["s2"][0], s2(11)) and place.seasons == ("0",)
    assert np.array_equal(place.labels[0], np.where(stored == 8, 255, stored))
    uint8 = open_source(path, bands={"s2": 9}).read("00011")
    assert np.array_equal(uint8.images["s2"][0], encode(s2(11), SENSORS["s2"])[0][[1, 2, 3, 4, 5, 6, 7, 11, 12]])


def test_dfc2020_raw_labels_are_told_and_translated(tmp_path):
    path, _ = write_dfc2020_lmdb(tmp_path / "data")
    for i in range(2): put(path, **{f"lbl_{i}": dump(columns(range(1, 11)))})
    expected = columns([1, 5, 255, 2, 3, 4, 6, 255, 7, 0])
    assert np.array_equal(open_source(path).read("00001").labels[0], expected) and np.array_equal(open_source(path, labels="raw").read("00001").labels[0], expected)
    with pytest.raises(DataError, match="9 and 10 are no ids but raw values"): open_source(path, labels="ids").read("00000")


def test_dfc2020_labels_that_could_be_either_must_be_said(tmp_path):
    path, _ = write_dfc2020_lmdb(tmp_path / "data", tiles=1)
    for values in ((1, 4), (0, 9)):
        put(path, lbl_0=dump(columns(values)))
        with pytest.raises(DataError, match="could be ids or raw values; say labels="): open_source(path)
    put(path, lbl_0=dump(columns((1, 4))))
    assert open_source(path, labels="ids").read("00000").labels[0][0, :2].tolist() == [1, 4]
    assert open_source(path, labels="raw").read("00000").labels[0][0, :2].tolist() == [1, 2]
    with pytest.raises(ConfigError, match="choose 'ids'"): open_source(path, labels="dw")


def test_dfc2020_missing_damaged_and_uneven_records(tmp_path):
    path, _ = write_dfc2020_lmdb(tmp_path / "data", tiles=7)
    drop(path, "s1_1"); drop(path, "lbl_2")
    put(path, s1_3=dump(s1(np.float32, 3)), s2_4=dump(s2(4)[:12]), s2_5=dump(s2(5, 20)), lbl_6=dump(columns(range(9))[None]))
    source = open_source(path)
    found = [skipped(source, f"0000{i}") for i in range(1, 7)]
    assert [reason for reason, _ in found] == ["missing sensor", "no label", "bad raster", "bad raster", "grid mismatch", "bad raster"]
    assert "4608 bytes; (2, 24, 24) of float64 are 9216" in found[2][1] and "s2 has 20 x 20 px" in found[4][1]


def test_dfc2020_units_nodata_and_nan(tmp_path):
    path, _ = write_dfc2020_lmdb(tmp_path / "data")
    radar, optical = s1(np.float64), s2()
    radar[0, 0, 0], radar[1, 0, 1], optical[:, 5, 5] = np.nan, -np.inf, 0
    put(path, s1_0=dump(radar), s2_0=dump(optical), s1_1=dump(10 ** (s1(np.float64) / 10)))
    for coding in ("raw", "uint8"):
        place = open_source(path, coding=coding).read("00000")
        assert np.argwhere(~place.valid["s1"][0]).tolist() == [[0, 0], [0, 1]] and np.argwhere(~place.valid["s2"][0]).tolist() == [[5, 5]]
    with pytest.raises(DataError, match="record s1_1: s1 is not in dB"): open_source(path).read("00001")


def test_downstream_keys_of_another_form(tmp_path):
    path, _ = write_dfc2020_lmdb(tmp_path / "data")
    put(path, zzz=b"1")
    with pytest.raises(DataError, match=r"key zzz; expected are s1_<number>, s2_<number>, lbl_<number>"): open_source(path)


# SSL4EO-S12@DW and @OSM

def test_noldo_marks_become_ids(tmp_path):
    path, _ = write_noldo_lmdb(tmp_path / "data", tiles=3)
    osm, dw = open_source(path, coding="raw"), open_source(path, labels="dw")
    key = f"00002_{tile_name(2)}"
    assert osm.keys()[2] == dw.keys()[2] == key and osm.scheme.name == "osm" and dw.scheme.name == "dynamic-world"
    place = osm.read(key)
    assert place.key == key and np.array_equal(place.images["s1"][0], s1(np.float32, 2)) and np.array_equal(place.images["s2"][0], s2(2))
    assert np.array_equal(place.labels[0], columns([255, *range(13)])) and np.array_equal(dw.read(key).labels[0], columns([255, *range(9), 255]))


def test_noldo_of_dw_only(tmp_path):
    path, _ = write_noldo_lmdb(tmp_path / "data", osm=False)
    source = open_source(path)
    assert source.kind == "noldo-lmdb" and source.scheme.name == "dynamic-world"
    with pytest.raises(DataError, match="no osm labels; it has dw"): open_source(path, labels="osm")
    with pytest.raises(ConfigError, match="choose 'dw' or 'osm'"): open_source(path, labels="dwosm")


def test_noldo_small_patches_and_names_that_disagree(tmp_path):
    values = {f"{role}_{i}": dump(array, f"{role}_1.5_2.5-2019.tif_0_{i}") for i in range(2) for role, array in (("s1", s1()), ("s2", s2()), ("dw", columns(range(11))))}
    path = write_lmdb(tmp_path / "dw_small_lmdb", values | {"s2_1": dump(s2(), "s2_another.tif")})
    source = open_source(path)
    assert source.keys() == ["00000_1.5_2.5-2019_0_0", "00001_1.5_2.5-2019_0_1"] and source.read(source.keys()[0]).seasons == ("0",)
    reason, detail = skipped(source, source.keys()[1])
    assert reason == "id mismatch" and "record s2_1" in detail and "another" in detail


def test_noldo_names_that_no_key_may_have(tmp_path):
    path, _ = write_noldo_lmdb(tmp_path / "data")
    arrays = {"s1": s1(), "s2": s2(), "dw": columns(range(11)), "osm": columns(range(14))}
    put(path, **{f"{role}_0": dump(array, f"{role}_../../etc\n\0ü.tif") for role, array in arrays.items()})
    put(path, dw_1=dump(columns(range(11)), 3))
    source = open_source(path, labels="dw")
    assert source.keys()[0] == "00000_..-..-etc-" and source.read(source.keys()[0]).key == source.keys()[0]
    assert skipped(source, source.keys()[1])[0] == "bad raster"
    with pytest.raises(DataError, match="no location"): source.read("00000")


# rico-hdl

def table(path, *lines): (path / "pairs.csv").write_text("\n".join(lines) + "\n")


def test_rico_values_bands_and_sizes(tmp_path):
    path, _ = write_rico_hdl_lmdb(tmp_path / "data")
    source = open_source(path, coding="raw")
    place = source.read("T33UUP_70_1")
    assert source.sensors["s2"].level == "L2A" and source.sensors["s2"].bands == SENSORS["s2a"].bands and place.seasons == ("2017-06-13",)
    assert np.array_equal(place.images["s1"][0], s1(seed=1)) and np.array_equal(place.labels[0], columns(range(9)))
    image, written = place.images["s2"][0], s2(1)
    assert image.shape == (12, SIZE, SIZE) and np.array_equal(image[[1, 2, 3, 7]], written[[1, 2, 3, 7]])
    assert np.array_equal(image[4], cv2.resize(written[4, ::2, ::2].astype(np.float32), (SIZE, SIZE), interpolation=cv2.INTER_LINEAR))


def test_rico_ssl4eo_with_labels_in_a_folder_and_two_seasons(tmp_path):
    values = {f"s1_0000200_S1A_{t}": save({"VV": s1(seed=t)[0], "VH": s1(seed=t)[1]}) for t in range(2)}
    values |= {f"s2c_0000200_{t}_T43RCP": s2_bands(s2(t)) for t in range(2)}
    path = write_lmdb(tmp_path / "Encoded-SSL4EO-S12.lmdb", values, subdir=False)
    for t in range(2):
        label = tmp_path / "dw_noisy_labels" / "0000200" / f"{t}_T43RCP" / "label.tif"
        label.parent.mkdir(parents=True)
        with rasterio.open(label, "w", driver="GTiff", count=1, height=12, width=12, dtype="uint8") as f: f.write(columns([t, 5], 12)[None])
    pairs = tmp_path / "my pairs.csv"
    rows = [f"0000200,s1_0000200_S1A_{t},s2c_0000200_{t}_T43RCP,0000200/{t}_T43RCP/label.tif" for t in range(2)]
    pairs.write_text("\n".join(["\ufefflocation,s1,s2,label", *rows]), encoding="utf-8")
    source = open_source(path, pairs=pairs, labels=tmp_path / "dw_noisy_labels", bands={"s2": "B4,B10"})
    place = source.read("0000200")
    assert source.sensors["s2"].level == "L1C" and place.seasons == ("0", "1") and np.array_equal(place.images["s2"][1][0], encode(s2(1), SENSORS["s2"])[0][3])
    assert place.labels[1][0, :4].tolist() == [1, 1, 5, 5]
    label.unlink()
    reading = open_source(path, pairs=pairs, labels=tmp_path / "dw_noisy_labels").examine("0000200")
    assert reading.location.seasons == ("0",) and reading.dropped[0][:2] == ("no label", "0000200/1")


def test_rico_labels_in_a_second_lmdb_and_one_coarse_band(tmp_path):
    path, _ = write_rico_hdl_lmdb(tmp_path / "data")
    maps = write_lmdb(tmp_path / "maps.lmdb", {f"S2A_T33UUP_70_{i}_reference_map": save({"map": columns([3], 12, np.int16)}) for i in range(2)})
    place = open_source(path, labels=maps, bands={"s2": "B5"}).read("T33UUP_70_0")
    assert (place.labels[0] == 3).all() and place.labels[0].shape == (SIZE, SIZE) and place.images["s2"][0].shape == (1, SIZE, SIZE)


def test_rico_records_that_are_missing_damaged_or_of_another_size(tmp_path):
    path, _ = write_rico_hdl_lmdb(tmp_path / "data", places=9)
    def s2_key(i): return f"S2A_T33UUP_70_{i}"
    drop(path, "S1A_33UUP_70_1"); drop(path, s2_key(2) + "_reference_map")
    change(path, {s2_key(3): b"damaged", s2_key(4): s2_bands(s2(4), ["B02", "B03"]), s2_key(5): s2_bands(s2(5, 30), [b for b in NAMES if b != "B10"]),
                  "S1A_33UUP_70_6": save({"VV": s1()[0], "VH": s1(size=20)[1]}), "S1A_33UUP_70_7": save({"VV": s1(), "VH": s1()}),
                  s2_key(8) + "_reference_map": save({"a": columns([1]), "b": columns([1])})})
    source = open_source(path)
    found = [skipped(source, f"T33UUP_70_{i}") for i in range(1, 9)]
    assert [reason for reason, _ in found] == ["missing sensor", "no label", "bad raster", "missing sensor", "grid mismatch", "grid mismatch", "bad raster", "bad raster"]
    assert "no record 'S1A_33UUP_70_1'" in found[0][1] and "no band B1, B4" in found[3][1] and "one band, (H, W), is expected" in found[6][1] and "2 tensors" in found[7][1]


def test_rico_tables_that_cannot_be(tmp_path):
    path, _ = write_rico_hdl_lmdb(tmp_path / "data")
    row = "a,1,S1A_33UUP_70_0,S2A_T33UUP_70_0,S2A_T33UUP_70_0_reference_map"
    head = "location,season,s1,s2,label"
    for lines, message in (
            ((head,), "has no row"), (("location,s1,label", "a,b,c"), "no column s2"), ((head, row, row), "line 3: season '1' of a is empty, or there twice"),
            ((head, row + ",x"), "another number of columns"), ((head, "a,1,b"), "another number of columns"), ((head, "a/b" + row[1:]), "give 1 to 400 bytes"),
            ((head, row[1:]), "give 1 to 400 bytes"), ((head, "a" * 401 + row[1:]), "give 1 to 400 bytes"), ((head, 'a,1,b,"c\nd",e'), "line 3: 'c.nd' has characters"),
            ((head, "a,1,b,c,../../etc"), "or a path below labels="), ((head, "a,1,b,c,/etc"), "or a path below labels="), ((head, 'a,1,b,c,"d'), "is no CSV"),
            ((head, "a,1,b,c,d"), "no readable s1 record"), ((head, "a,1,S2A_T33UUP_70_0,S1A_33UUP_70_0,x"), "no band of s1")):
        table(path, *lines)
        with pytest.raises(DataError, match=message) as e: open_source(path)
        assert not isinstance(e.value, SkipLocation)
    (path / "pairs.csv").write_bytes(b"location\xff")
    with pytest.raises(DataError, match="is no CSV in UTF-8"): open_source(path)
    (path / "pairs.csv").unlink()
    with pytest.raises(DataError, match="it says which records belong together"): open_source(path)
    with pytest.raises(DataError, match="no location 'b'"): (table(path, head, row), open_source(path).read("b"))


def test_rico_offset_of_newer_baselines(tmp_path):
    path, _ = write_rico_hdl_lmdb(tmp_path / "data", places=1)
    optical = s2() + np.uint16(100)
    change(path, {"S2A_T33UUP_70_0": s2_bands(optical + np.uint16(1000))})
    with pytest.raises(DataError, match="record S2A_T33UUP_70_0: s2 seems to carry the .1000 DN"): open_source(path).read("T33UUP_70_0")
    optical[:, 4:8, 4:8] = 0
    change(path, {"S2A_T33UUP_70_0": s2_bands(optical + np.uint16(1000) * (optical > 0))})
    place = open_source(path, coding="raw", offset=-1000, bands={"s2": ["B2", "B3"]}).read("T33UUP_70_0")
    valid = place.valid["s2"][0]
    assert not valid[4:8, 4:8].any() and valid.sum() == SIZE ** 2 - 16 and np.array_equal(place.images["s2"][0][:, valid], optical[1:3][:, valid])
    with pytest.raises(ConfigError, match="offset='-1000'"): open_source(path, offset="-1000")


def test_rico_labels_of_no_class_and_of_reals(tmp_path):
    path, _ = write_rico_hdl_lmdb(tmp_path / "data")
    for array, message in ((columns([111, 112], dtype=np.uint16), "no class of dynamic-world: 111"), (columns([1], dtype=np.float32), "labels are float32")):
        change(path, {"S2A_T33UUP_70_0_reference_map": save({"Data": array})})
        with pytest.raises(DataError, match=message): open_source(path).read("T33UUP_70_0")


def test_blobs_that_are_none():
    good = save({"B02": columns([1], 4)})
    tensors = {"B2": columns([1], 4), "B02": columns([1], 4)}, {"a": np.zeros((0, 3), np.float32)}, {"a": np.zeros(3, np.float32)}, {}
    for blob in (b"", b"\xff" * 20, good[:-1], good + b"1", bytes(8) + good[8:], *map(save, tensors)):
        with pytest.raises(SkipLocation, match="a.lmdb: record k"): load_bands(blob, "a.lmdb", "k")
    assert list(load_bands(good, "a.lmdb", "k")) == ["B2"]
