"Store: round trip, processes, damage of every kind, locks, and disks that refuse. Every fault is really made."
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import lmdb
import numpy as np
import pytest
from safetensors.numpy import load

from cromss import store as store_module
from cromss.classes import SCHEMES
from cromss.config import ConfigError, DataError, StoreError
from cromss.sensors import SENSORS, encode
from cromss.store import Location, Store, write_store

TWO = {s: SENSORS[s] for s in ("s1", "s2")}
DW = SCHEMES["dynamic-world"]


def place(key, size=(20, 24), seasons=("2020-05", "2020-08"), missing=(), labels=True, seed=0, **fields):
    "A location of random bytes; `missing` holds (sensor, season number)."
    rng = np.random.default_rng([seed, *key.encode()])
    def images(s): return [None if (s, t) in missing else rng.integers(0, 256, (TWO[s].num_bands, *size), np.uint8) for t in range(len(seasons))]
    drawn = [rng.integers(0, 9, size, np.uint8) if labels is True or t in labels else None for t in range(len(seasons))]
    return Location(key, seasons, {s: images(s) for s in TWO}, drawn, **fields)


def write(folder, locations, **options): return write_store(folder, locations, TWO, DW, **options)


def same(a, b):
    "Whether two (lists of) arrays are equal, None for None."
    if a is None or b is None: return a is b
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a.dtype == b.dtype and np.array_equal(a, b)


@pytest.fixture
def three(tmp_path):
    "A store of three locations in two shards, and what was written."
    places = [place(k, size=(40, 44)) for k in ("a", "b", "c")]   # large enough for LMDB pages of their own
    return write(tmp_path / "three", places, shard_size=2), places


# What is written is read

def test_round_trip_of_all_that_a_location_holds(tmp_path):
    valid = np.ones((20, 24), bool)
    valid[:3] = False
    reference = [None, np.full((20, 24), 7, np.uint8), None]
    full = place("full", seasons=("x", "y", "z"), missing=[("s1", 1)], labels=(0, 1), reference=reference, crs="EPSG:32632",
                 transform=(10.0, 0.0, 5e5, 0.0, -10.0, 5e6), valid={"s1": [valid, None, None], "s2": [None, np.ones((20, 24), bool), None]})
    bare = place("Größe @1,2", size=(7, 5), seasons=("only",))
    store = write(tmp_path / "a" / "store", [full, bare], source="made here", info={"kept": np.int64(2)})
    back = store.location(0)
    assert (back.key, back.seasons, back.crs, back.transform) == ("full", ("x", "y", "z"), "EPSG:32632", full.transform)
    assert all(same(back.images[s], full.images[s]) for s in TWO) and same(back.labels, full.labels) and same(back.reference, reference)
    assert same(back.valid["s1"], [valid, None, None]) and same(back.valid["s2"], [None] * 3)          # an all-true mask is no mask
    assert store.keys == ["full", "Größe @1,2"] and store.key(-1) == store.keys[1] and len(store) == 2
    assert (store.season_count, store.shape(1), store.crs(1), store.transform(1), store.seasons(1)) == (3, (7, 5), None, None, ("only",))
    assert same(store.location(-1).images["s2"], bare.images["s2"]) and store.location(1).valid is None and store.location(1).reference is None
    assert store.manifest["info"] == {"kept": 2} and store.source == "made here" and store.coding == "uint8" and store.has_reference
    assert store.sensors == TWO and list(store.sensors) == ["s1", "s2"] and store.scheme == DW and store.verify().ok


def test_read_gives_one_season_of_chosen_sensors_and_bands(tmp_path):
    masks = {s: np.random.default_rng(n).random((20, 24)) < 0.5 for n, s in enumerate(TWO)}
    one = place("one", valid={s: [None, m] for s, m in masks.items()})
    store = write(tmp_path / "s", [one])
    read = store.read(0, 1)
    assert same(read["images"]["s2"], one.images["s2"][1]) and same(read["valid"], masks["s1"] & masks["s2"])
    read = store.read(0, np.int64(1), sensors=["s2"], bands={"s2": [3, 2, 1]})
    assert list(read["images"]) == ["s2"] and same(read["images"]["s2"], one.images["s2"][1][[3, 2, 1]]) and same(read["valid"], masks["s2"])
    read["images"]["s2"][:] = 0; read["valid"][:] = False        # a copy: the store does not change
    assert same(store.read(0, 1)["images"]["s2"], one.images["s2"][1]) and store.read(0, 0)["valid"].all()


def test_labels_are_padded_to_the_seasons_of_the_store(tmp_path):
    long, short = place("long", seasons=("a", "b", "c")), place("short", labels=(1,))
    none = place("none", labels=())
    store = write(tmp_path / "s", [long, short, none])
    labels = store.read_labels(1)
    assert labels.shape == (3, 20, 24) and labels.dtype == np.uint8 and same(labels[1], short.labels[1]) and (labels[[0, 2]] == 255).all()
    assert (store.read_labels(2) == 255).all() and store.read_labels(2).shape == (3, 20, 24) and store.read_reference(0) is None and not store.has_reference


def test_labelled_seasons_need_a_labelled_pixel_and_every_sensor(tmp_path):
    empty = place("empty")
    empty.labels[0][:] = 255
    store = write(tmp_path / "s", [place("a", missing=[("s1", 0)]), place("b", labels=(0,)), empty, place("c", seasons=("only",))])
    assert [store.labelled(i) for i in range(4)] == [[1], [0], [1], [0]] and store.labelled(0, ["s2"]) == [0, 1]
    assert [np.flatnonzero(m).tolist() for m in store.labelled_mask()] == [[1], [0], [1], [0]] and store.labelled_mask("s2")[0].all()
    assert same(store.location(2).labels, empty.labels) and store.manifest["counts"]["labelled_seasons"] == 5


def test_raw_values_keep_their_units(tmp_path):
    values = np.random.default_rng(0).normal(-12, 5, (2, 8, 8)).astype(np.float32)
    values[0, 0, 0] = np.nan
    raw = Location("a", ("s",), {"s1": [values]}, [np.zeros((8, 8), np.uint8)])
    store = write_store(tmp_path / "s", [raw], {"s1": SENSORS["s1"]}, DW, coding="raw")
    read = store.read(0, 0)["images"]["s1"]
    assert read.dtype == np.float32 and np.array_equal(read, values, equal_nan=True) and store.verify().ok
    with pytest.raises(DataError, match="is float32; uint8"): write_store(tmp_path / "t", [raw], {"s1": SENSORS["s1"]}, DW)
    with pytest.raises(ConfigError, match="coding"): write_store(tmp_path / "t", [raw], {"s1": SENSORS["s1"]}, DW, coding="int16")


def test_the_same_data_make_the_same_store(tmp_path):
    places = [place("a"), place("b")]
    one, two, other = write(tmp_path / "1", places), write(tmp_path / "2", places), write(tmp_path / "3", places[:1])
    assert one.id == two.id != other.id


def test_values_are_plain_safetensors(three):
    store, places = three
    with lmdb.open(str(store.folder / "shard-00001.lmdb"), subdir=False, readonly=True, lock=False) as env, env.begin() as txn:
        assert [k.decode() for k, _ in txn.cursor()] == ["c/0/s1", "c/0/s2", "c/1/s1", "c/1/s2", "c/labels"]
        assert same(load(txn.get(b"c/1/s2"))["image"], places[2].images["s2"][1])


def test_locations_stream(tmp_path):
    alive = []
    def stream():
        for n in range(6):
            alive.append(n)
            yield place(f"k{n}")
    assert len(write(tmp_path / "s", stream(), shard_size=4)) == 6 and alive == list(range(6))
    assert [s["count"] for s in Store.open(tmp_path / "s").manifest["shards"]] == [4, 2]


def test_info_may_be_told_at_the_end(tmp_path):
    report = {}
    def stream():
        yield place("a")
        report["kept"] = 1
    assert write(tmp_path / "s", stream(), info=lambda: report).manifest["info"] == {"kept": 1}


def test_files_grow_as_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module.lmdb, "open", lambda path, real=lmdb.open, **k: real(path, **{**k, "map_size": min(k["map_size"], 2 ** 16) if not k.get("readonly") else k["map_size"]}))
    store = write(tmp_path / "s", [place(f"k{n}", size=(64, 64)) for n in range(4)])
    assert store.verify().ok and store.manifest["shards"][0]["size"] > 2 ** 18


def test_more_shards_than_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module._Environments, "limit", 3)
    places = [place(f"k{n}", size=(6, 6)) for n in range(8)]
    store = write(tmp_path / "s", places, shard_size=1)
    for i in (*range(8), 0, 7, 3): assert same(store.read(i, 0)["images"]["s1"], places[i].images["s1"][0])
    assert len(store_module.ENVIRONMENTS.open) <= 3


def test_store_of_sample_scenes(sample, tmp_path):
    import rasterio
    sensors = {"s1": SENSORS["s1"]}
    def locations():
        for folder in sorted(sample.glob("scenes/*/*")):
            with rasterio.open(folder / "s1.tif") as f: coded, finite = encode(f.read(), sensors["s1"])
            with rasterio.open(folder / "label.tif") as f: labels = DW.apply(f.read(1), folder.parent.name)
            yield Location(folder.parent.name, (folder.name,), {"s1": [coded]}, [labels], valid={"s1": [finite]}, crs=str(f.crs), transform=tuple(f.transform)[:6])
    store = write_store(tmp_path / "s", locations(), sensors, DW)
    assert len(store) == 3 and store.shape(0) == (224, 224) and store.transform(0)[0] == pytest.approx(10) and store.verify().ok


# What does not fit is refused, and leaves nothing

def change(**fields):
    def apply(p):
        for k, v in fields.items(): setattr(p, k, v(p) if callable(v) else v)
    return apply

def label(value, dtype=np.uint8): return lambda p: [np.full((20, 24), value, dtype)] * 2

@pytest.mark.parametrize("alter, text", [
    (change(labels=label(9)), r"ids outside 0..8 of dynamic-world: 9 \(480 px\)"), (change(labels=label(1, np.float32)), "is float32; uint8"),
    (change(labels=label(1, np.int64)), "is int64; uint8"), (change(reference=label(77)), r"reference of season 2020-05.*77 \(480 px\)"),
    (change(labels=lambda p: p.labels[:1]), "1 entries of label for 2 seasons"), (change(labels=lambda p: [p.labels[0][:, :-1], None]), "has shape"),
    (change(images=lambda p: {**p.images, "s3": [None, None]}), "sensor 's3'"), (change(images=lambda p: {"s1": p.images["s2"]}), "has shape"),
    (change(images=lambda p: {"s1": [a.astype(np.int16) for a in p.images["s1"]]}), "is int16; uint8"),
    (change(images=lambda p: {**p.images, "s1": [a[:, ::2, ::2] for a in p.images["s1"]]}), "has shape"),
    (change(valid={"s1": [np.ones((20, 24), np.uint8), None]}), "is uint8; bool"), (change(valid={"s9": [None, None]}), "s9"),
    (change(seasons=("x", "x")), "different"), (change(seasons=()), "different"), (change(key="a/b"), "'/'"), (change(key=""), "key"), (change(key="ü" * 300), "400 bytes"), (change(key="bad\udcff"), "UTF-8"), (change(seasons=("a", "\udcff")), "different"),
    (change(transform=(1, 2)), "six"), (change(images={}, labels=[None, None]), "no image and no label"),
    (change(images={}, labels=[np.zeros((0, 4), np.uint8)] * 2), "empty"), (change(key="good"), "there before")])
def test_locations_that_do_not_fit_are_refused(tmp_path, alter, text):
    bad = place("bad")
    alter(bad)
    with pytest.raises(DataError, match=text) as error: write(tmp_path / "s", [place("good"), bad])
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == []


def test_nothing_to_write_and_sensors_by_another_name(tmp_path):
    with pytest.raises(DataError, match="no location"): write(tmp_path / "s", [])
    with pytest.raises(ConfigError, match="own name"): write_store(tmp_path / "s", [place("a")], {"s2a": SENSORS["s2a"]}, DW)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError, OSError, KeyboardInterrupt])
def test_a_generator_that_fails_leaves_nothing(tmp_path, error):
    def stream():
        yield place("a")
        yield place("b")
        raise error("in the middle")
    with pytest.raises(error, match="in the middle"): write(tmp_path / "s", stream(), shard_size=1)
    assert os.listdir(tmp_path) == []


def test_an_existing_target_is_never_overwritten(three, tmp_path):
    store, _ = three
    before = {p.name: p.read_bytes() for p in store.folder.iterdir()}
    with pytest.raises(StoreError, match="exists already"): write(store.folder, [place("z")])
    assert before == {p.name: p.read_bytes() for p in store.folder.iterdir()}
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="exists already"): write(tmp_path / "file", [place("z")])
    (tmp_path / "empty").mkdir()
    assert write(tmp_path / "empty", [place("z")]).keys == ["z"]     # an empty folder is as good as none
    def stream():                                                 # it appears while we write
        yield place("a")
        (tmp_path / "late/mine").mkdir(parents=True)
    with pytest.raises(StoreError, match="exists already"): write(tmp_path / "late", stream())
    assert os.listdir(tmp_path / "late") == ["mine"] and not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.lock"))


def test_a_disk_that_refuses_is_a_store_error(tmp_path):
    "A real limit of 300 kB a file, set in a process of its own."
    code = """
        import resource, sys
        sys.path.insert(0, sys.argv[2])
        from test_store import place, write, StoreError
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        try: write(sys.argv[1], (place(f"k{n}", size=(64, 64)) for n in range(9)))
        except StoreError as e: print(e)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "s"), os.path.dirname(__file__)], capture_output=True, text=True)
    assert "cannot be written" in done.stdout and str(tmp_path / "s") in done.stdout, done.stderr
    assert os.listdir(tmp_path) == []


def test_a_parent_that_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"): write(tmp_path / "file" / "s", [place("a")])


# Locks

def test_a_second_writer_is_refused(tmp_path):
    def stream():
        yield place("a")
        with pytest.raises(StoreError, match=f"process {os.getpid()} on {socket.gethostname()}"): write(tmp_path / "s", [place("b")])
        yield place("c")
    assert write(tmp_path / "s", stream()).keys == ["a", "c"] and os.listdir(tmp_path) == ["s"]


def test_the_lock_of_another_host_and_an_unreadable_one_are_respected(tmp_path):
    lock = tmp_path / "s.lock"
    for text in (json.dumps({"pid": 1, "host": "elsewhere", "started": None}), "", "[]"):
        lock.write_text(text)
        with pytest.raises(StoreError, match="s.lock"): write(tmp_path / "s", [place("b")])
    assert os.listdir(tmp_path) == ["s.lock"]


def test_a_killed_writer_is_taken_over(tmp_path):
    code = """
        import sys, time
        sys.path.insert(0, sys.argv[2])
        from test_store import place, write
        def stream():
            yield place("a")
            print("ready", flush=True)
            time.sleep(60)
        write(sys.argv[1], stream())
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "s"), os.path.dirname(__file__)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "ready\n"
        with pytest.raises(StoreError, match=f"process {writer.pid} "): write(tmp_path / "s", [place("b")])
        writer.kill()
    assert sorted(os.listdir(tmp_path)) == ["s.lock", "s.partial"] and writer.returncode == -signal.SIGKILL
    with pytest.warns(UserWarning, match="taken over"): store = write(tmp_path / "s", [place("b")])
    assert store.keys == ["b"] and os.listdir(tmp_path) == ["s"]


def test_a_process_number_that_was_given_again_is_stale(tmp_path):
    (tmp_path / "s.lock").write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": "1"}))
    with pytest.warns(UserWarning, match="taken over"): write(tmp_path / "s", [place("b")])


def test_a_partial_folder_of_something_else_is_kept(tmp_path):
    (tmp_path / "s.partial").mkdir()
    (tmp_path / "s.partial" / "thesis.docx").write_text("years of work")
    with pytest.raises(StoreError, match="thesis.docx"): write(tmp_path / "s", [place("a")])
    assert (tmp_path / "s.partial" / "thesis.docx").exists() and not (tmp_path / "s.lock").exists()


# Opening

def test_opening_does_not_read_the_shards(three):
    store, _ = three
    for shard in store.folder.glob("shard-*"): shard.write_bytes(bytes(shard.stat().st_size))       # same size, nothing in it
    before = {p: os.stat(p).st_atime_ns for p in store.folder.glob("shard-*")}
    again = Store.open(store.folder)
    assert again.keys == ["a", "b", "c"] and again.labelled(2) == [0, 1]
    with open("/proc/self/maps") as maps: assert str(store.folder) not in maps.read()
    assert before == {p: os.stat(p).st_atime_ns for p in before} and not any(str(store.folder) in p for p in store_module.ENVIRONMENTS.open)
    with pytest.raises(StoreError, match="a/0/s1 in .*shard-00000.lmdb: is damaged"): again.read(0, 0)
    assert not again.verify().ok


def test_missing_store_names_the_command(tmp_path):
    with pytest.raises(StoreError, match=f"make it with `cromss prepare SOURCE {tmp_path}/none`"): Store.open(tmp_path / "none")
    with pytest.raises(StoreError, match="cromss prepare"): Store.open(tmp_path)


def test_truncated_or_missing_shards_are_refused_by_size(three):
    store, _ = three
    shard = store.folder / "shard-00001.lmdb"
    whole = shard.read_bytes()
    for content in (whole[:-1], whole[:4096], b"", whole + b"x"):
        shard.write_bytes(content)
        with pytest.raises(StoreError, match=f"shard-00001.lmdb: has {len(content)} bytes instead of {len(whole)}"): Store.open(store.folder)
        with pytest.raises(StoreError, match="bytes instead of"): store.read(2, 0)                  # opened before the damage
    shard.unlink()
    with pytest.raises(StoreError, match="shard-00001.lmdb: missing"): Store.open(store.folder)
    with pytest.raises(StoreError, match="missing"): store.read(2, 0)
    assert store.read(0, 0) and "missing" in store.verify().problems[0]


def edit(path, **fields): path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

def test_manifest_of_another_version_or_changed(three):
    folder = three[0].folder
    path, text = folder / "manifest.json", (folder / "manifest.json").read_text()
    for damage, message in ((lambda: edit(path, version=2), "version 2, this release reads 1.*cromss prepare"), (lambda: edit(path, format="other"), "belongs to no"),
                            (lambda: edit(path, coding="raw"), "edited"), (lambda: path.write_text(text[:100]), "no JSON"), (lambda: path.write_text("[]"), "belongs to no"),
                            (lambda: path.write_bytes(b"\xff\xfe"), "no JSON")):
        damage()
        with pytest.raises(StoreError, match=message): Store.open(folder)
        path.write_text(text)
    assert Store.open(folder).verify().ok


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)

def test_damaged_or_missing_index(three):
    index = three[0].folder / "index.npz"
    flip(index, 200)
    with pytest.raises(StoreError, match="index.npz: is damaged"): Store.open(three[0].folder)
    assert not three[0].verify().ok
    index.unlink()
    with pytest.raises(StoreError, match="index.npz: missing"): Store.open(three[0].folder)


def test_what_is_not_there_is_named(three):
    store, _ = three
    with pytest.raises(StoreError, match="a/2/s1 in .*shard-00000.lmdb: there is no such value; seasons of a: 2020-05, 2020-08"): store.read(0, 2)
    with pytest.raises(StoreError, match="has no sensor 'dem'; it has s1, s2"): store.read(0, 0, ["dem"])
    with pytest.raises(StoreError, match="has no sensor"): store.labelled(0, ["dem"])
    for i in (3, -4):
        with pytest.raises(IndexError): store.read(i, 0)


def test_missing_sensor_of_a_season(tmp_path):
    store = write(tmp_path / "s", [place("a", missing=[("s1", 0)])])
    with pytest.raises(StoreError, match="a/0/s1 in .*no such value"): store.read(0, 0)
    assert list(store.read(0, 0, ["s2"])["images"]) == ["s2"] and store.location(0).images["s1"][0] is None and store.verify().ok


# Damage inside

def position(store, key, at):
    "Where byte `at` of a value's data lies in its shard."
    shard = store.folder / "shard-00000.lmdb"
    with lmdb.open(str(shard), subdir=False, readonly=True, lock=False) as env, env.begin() as txn: return shard, shard.read_bytes().find(bytes(txn.get(key))) + at


@pytest.mark.parametrize("key, at", [(b"b/1/s2", 3000), (b"b/1/s2", 30), (b"b/1/s2", 0), (b"b/1/s2", 110), (b"b/labels", 900)], ids=["data", "header", "length", "metadata", "labels"])
def test_one_flipped_bit_is_found_and_named(three, key, at):
    store, places = three
    flip(*position(store, key, at))
    def read(): return store.read_labels(1) if key.endswith(b"labels") else store.read(1, 1)
    for i in (0, 2): assert same(store.location(i).images["s2"], places[i].images["s2"])
    with pytest.raises(StoreError, match=f"{key.decode()} in .*shard-00000.lmdb: is damaged"): read()


def test_verify_names_every_damaged_value(three):
    store, _ = three
    for key, at in ((b"a/0/s1", 300), (b"b/labels", 400)): flip(*position(store, key, at))
    done = []
    report = store.verify(progress=lambda n, total: done.append((n, total)))
    assert done == [(1, 2), (2, 2)] and len(report.problems) == 3
    assert "shard-00000.lmdb: its checksum disagrees" in report.problems[0] and "a/0/s1" in report.problems[1] and "b/labels" in report.problems[2]


def test_verify_finds_a_flip_in_unused_space(three):
    shard = three[0].folder / "shard-00001.lmdb"
    zeros = np.flatnonzero(np.frombuffer(shard.read_bytes(), np.uint8) == 0)
    flip(shard, zeros[-1])
    assert three[0].location(2).key == "c" and "its checksum disagrees" in three[0].verify().problems[0]


def test_values_in_each_others_place_do_not_pass(three):
    store, _ = three
    blob = store_module.pack(b"a/0/s1", {"image": np.zeros((2, 4, 4), np.uint8)})
    assert store_module.unpack(b"a/0/s1", blob)
    with pytest.raises(ValueError, match="disagrees"): store_module.unpack(b"b/0/s1", blob)
    for bad in (b"", b"\xff" * 20, blob[:40], store_module.save({"image": np.zeros(3, np.uint8)})):
        with pytest.raises(ValueError): store_module.unpack(b"a/0/s1", bad)


def seal(store):
    "Make the manifest agree with files that a test has rewritten."
    path = store.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for shard in manifest["shards"]: shard.update(store_module._fingerprint(store.folder / shard["file"]))
    manifest["id"] = store_module._identity(manifest)
    path.write_text(json.dumps(manifest))
    return Store.open(store.folder)


def test_verify_finds_lost_and_foreign_keys(three):
    shard = str(three[0].folder / "shard-00001.lmdb")
    for change, found in ((lambda txn: txn.delete(b"c/1/s2"), ["c/1/s2 in", "holds 4 values of 1 locations; 5 of 1"]), (lambda txn: txn.put(b"c/1/s2", b"boo"), ["c/1/s2 in"]),
                          (lambda txn: txn.put(b"ghost/0/s1", b"boo"), ["c/1/s2 in", "holds 6 values of 1 locations; 5 of 1"])):
        store_module.ENVIRONMENTS.forget()                        # LMDB opens a file once in a process
        with lmdb.open(shard, subdir=False, lock=False, map_size=2 ** 26) as env, env.begin(write=True) as txn: change(txn)
        problems = seal(three[0]).verify().problems
        assert len(problems) == len(found) and all(text in p for text, p in zip(found, problems))


@pytest.mark.parametrize("page", [0, 1, "leaf", "all"])
def test_damaged_inner_pages_never_end_the_process(three, page):
    store, _ = three
    shard = store.folder / "shard-00000.lmdb"
    data = bytearray(shard.read_bytes())
    leaf = next(p for p in range(len(data) // 4096) if data[p * 4096 + 10] == 2)
    for p in range(len(data) // 4096) if page == "all" else [leaf if page == "leaf" else page]: data[p * 4096:(p + 1) * 4096] = b"\xa5" * 4096
    shard.write_bytes(data)
    report = store.verify()
    assert not report.ok and "shard-00000.lmdb" in report.problems[0]


# Processes and threads

def work(store, i, queue):
    "What a worker reads, whether its environments are its own, and what it had to import."
    inherited = list(store_module.ENVIRONMENTS.open)
    sums = [int(store.read(i, t)["images"]["s2"].sum()) for t in (0, 1)] + [int(store.read_labels(i).sum())]
    queue.put((i, sums, inherited, len(store_module.ENVIRONMENTS.open), "torch" in sys.modules))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_with_environments_of_their_own(three, method):
    store, places = three
    expected = {i: [int(a.sum()) for a in places[i].images["s2"]] + [int(np.stack(places[i].labels).sum())] for i in range(3)}
    for i in range(3): store.read(i, 0)                            # the parent's are open
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    workers = [context.Process(target=work, args=(store, i, queue)) for i in (0, 2)]
    for w in workers: w.start()
    parent = [int(store.read(i, 0)["images"]["s2"].sum()) for i in range(3)]   # at the same time
    for i, sums, inherited, opened, torch in (queue.get(timeout=60) for _ in workers):
        assert sums == expected[i] and inherited == [] and opened == 1 and (method == "fork" or not torch)
    for w in workers: w.join(); assert w.exitcode == 0
    assert parent == [expected[i][0] for i in range(3)] and store.location(1).key == "b"


def test_pickling_is_small_and_finds_a_replaced_store(three, tmp_path):
    store, _ = three
    store.read(0, 0)
    data = pickle.dumps(store)
    assert len(data) < 1000 and pickle.loads(data).id == store.id and same(pickle.loads(data).location(2).labels, store.location(2).labels)
    shutil.rmtree(store.folder)
    other = write(store.folder, [place("other")])
    with pytest.raises(StoreError, match="replaced"): pickle.loads(data)
    assert other.read(0, 0) and other.keys == ["other"]


def test_two_stores_on_one_folder_share_the_files(three):
    store, _ = three
    again = Store.open(store.folder)
    assert same(again.read(0, 0)["images"]["s1"], store.read(0, 0)["images"]["s1"])


def test_threads_may_read_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module._Environments, "limit", 2)
    places = [place(f"k{n}", size=(8, 8)) for n in range(6)]
    store, wrong = write(tmp_path / "s", places, shard_size=1), []
    def read(seed):
        for i in np.random.default_rng(seed).integers(0, 6, 60):
            if not same(store.read(i, 1)["images"]["s2"], places[i].images["s2"][1]): wrong.append(i)
    threads = [threading.Thread(target=read, args=(n,)) for n in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not wrong


def test_a_relative_folder_survives_a_change_of_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = write("with space ü", [place("a")])
    monkeypatch.chdir("/")
    assert store.read(0, 0) and store.folder == tmp_path / "with space ü" and pickle.loads(pickle.dumps(store)).read(0, 1)


def test_opening_scales(tmp_path):
    "Fifty thousand locations in the index: opened in well under a second, and no object is made for each."
    seasons = ("1", "2", "3", "4")
    rows = [dict(key=b"%07d" % i, shape=(264, 264), season=seasons, present=[[True, True]] * 4, reference=[False] * 4, probable=[False] * 4, labelled=[1] * 4,
                 crs="EPSG:32631", transform=(10., 0., 5e5 + i, 0., -10., 5e6)) for i in range(50_000)]
    store = write(tmp_path / "s", [place("a", seasons=seasons)])
    np.savez(store.folder / "index.npz", **store_module._join([store_module._columns(rows, 2)]))
    path = store.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["index"].update(store_module._fingerprint(store.folder / "index.npz"))
    manifest["id"] = store_module._identity(manifest)
    path.write_text(json.dumps(manifest))
    start = time.process_time()
    big = Store.open(store.folder)
    assert len(big) == 50_000 and time.process_time() - start < 2 and "keys" not in vars(big) and big.key(-1) == "0049999"


# -- a store in the making --------------------------------------------------------------------------------------------------------------------------

def test_shards_in_any_order_make_the_same_store(tmp_path):
    places = [place(f"p{i}", seasons=("1", "2")[:1 + i % 2]) for i in range(6)]
    def built(name, order):
        build = store_module.Build(tmp_path / name, TWO, DW)
        with build.open({"what": "six"}):
            for n in order: build.write(n, places[2 * n:2 * n + 2], note=lambda n=n: {"n": n})
            assert build.finished() == [0, 1, 2] and [note["n"] for note in build.notes()] == [0, 1, 2]
            return build.publish("here")
    a, b = built("a", (0, 1, 2)), built("b", (2, 0, 1))
    assert a.id == b.id and a.keys == [p.key for p in places] and a.verify().ok and b.verify().ok and not (tmp_path / "a/parts").exists()
    assert all((a.folder / s["file"]).read_bytes() == (b.folder / s["file"]).read_bytes() for s in a.manifest["shards"])


def test_an_empty_shard_leaves_no_file(tmp_path):
    build = store_module.Build(tmp_path / "s", TWO, DW)
    with build.open({}):
        assert [build.write(0, []), build.write(1, [place("a")])] == [0, 1]
        store = build.publish()
    assert [s["file"] for s in store.manifest["shards"]] == ["shard-00001.lmdb"] and store.keys == ["a"] and store.verify().ok


def test_a_key_in_two_shards_is_refused(tmp_path):
    build = store_module.Build(tmp_path / "s", TWO, DW)
    with build.open({}), pytest.raises(DataError, match="location a: this key was there before"):
        for n in range(2): build.write(n, [place("a")])
        build.publish()
    with pytest.raises(DataError, match="this key was there before"): write(tmp_path / "t", [place("a"), place("b"), place("a")], shard_size=1)
    assert not (tmp_path / "t.partial").exists()


def test_what_is_not_of_a_store_is_not_removed(tmp_path):
    (tmp_path / "s.partial").mkdir()
    (tmp_path / "s.partial/thesis.tex").write_text("...")
    with pytest.raises(StoreError, match="thesis.tex is not part of a store; move it away"), store_module.Build(tmp_path / "s", TWO, DW).open({}): pass
    assert (tmp_path / "s.partial/thesis.tex").exists()


def test_probabilities_are_kept_by_season(tmp_path):
    told = np.random.default_rng(0).integers(0, 256, (9, *place("a").shape), np.uint8)
    one_, bare = place("a", seasons=("1", "2")), place("b")
    one_.probabilities = [None, told]
    store = write(tmp_path / "s", [one_, bare])
    assert store.has_probabilities and store.read_probabilities(0, 0) is None and np.array_equal(store.read_probabilities(0, 1), told)
    assert np.array_equal(store.location(0).probabilities[1], told) and store.location(1).probabilities is None and store.verify().ok
    one_.probabilities = [told[:5], None]
    with pytest.raises(DataError, match="probabilities of season 1 has shape"): write(tmp_path / "t", [one_])


def test_a_store_of_an_earlier_release_has_none(tmp_path):
    store = write(tmp_path / "s", [place("a")])
    with np.load(store.folder / "index.npz") as file: columns = {k: file[k] for k in file.files if k != "probable"}
    np.savez(store.folder / "index.npz", **columns)
    path = store.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["index"].update(store_module._fingerprint(store.folder / "index.npz"))
    manifest["id"] = store_module._identity(manifest)
    path.write_text(json.dumps(manifest))
    assert not Store.open(store.folder).has_probabilities and Store.open(store.folder).verify().ok


def test_write_store_leaves_a_preparation_alone(tmp_path):
    build = store_module.Build(tmp_path / "s", TWO, DW)
    with pytest.raises(KeyboardInterrupt), build.open({"what": "two"}):
        build.write(0, [place("a")])
        raise KeyboardInterrupt
    with pytest.raises(StoreError, match="holds the finished shards of a preparation"): write(tmp_path / "s", [place("z")])
    with build.open({"what": "two"}):
        assert build.finished() == [0]
        build.write(1, [place("b")])
        assert build.publish().keys == ["a", "b"]


def test_a_late_worker_cannot_write_into_the_next_attempt(tmp_path):
    build = store_module.Build(tmp_path / "s", TWO, DW)
    with pytest.raises(KeyboardInterrupt), build.open({"what": "old"}):
        late = pickle.loads(pickle.dumps(build))
        raise KeyboardInterrupt
    with build.open({"what": "new"}):
        with pytest.raises(StoreError, match="the preparation that asked for this shard has ended"): late.write(0, [place("a")])
        assert build.finished() == []
        build.write(0, [place("b")])
        assert build.publish().keys == ["b"]


def test_a_location_by_its_number_or_its_key(tmp_path):
    store = write(tmp_path / "store", [place(key) for key in ("0000002", "7", "place")])
    assert [store.number(n) for n in (0, 2, "place", "0000002", "7", "1", "2")] == [0, 2, 2, 0, 1, 1, 2], "a key of digits comes before a number"
    for wrong in (3, -1, "3", "nowhere"):
        with pytest.raises(ConfigError, match="location"): store.number(wrong)
