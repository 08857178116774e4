"The smallest valid LMDBs of every published layout: `write_KIND(folder)` gives (path, options) for `open_source`."
import multiprocessing
import os
import pickle

import lmdb
import numpy as np
from safetensors.numpy import save

from cromss import records
from cromss.sensors import SENSORS

SIZE = 24
COARSE = {"B01": 4, "B09": 4, "B10": 4, "B05": 2, "B06": 2, "B07": 2, "B8A": 2, "B11": 2, "B12": 2}     # side of a pixel in the finest ones, where not 1
NAMES = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12")


def write_lmdb(path, values, subdir=True):
    "An LMDB with these values, {key: bytes}; added to what is there."
    (path if subdir else path.parent).mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(path), subdir=subdir, map_size=2 ** 28, lock=False) as env, env.begin(write=True) as txn:
        for key, value in values.items(): txn.put(key.encode(), value)
    return path


def change(path, values):
    "Write values into an LMDB, None deletes, from a process of its own: this one may have it open."
    def run():
        with lmdb.open(str(path), map_size=2 ** 28, lock=False) as env, env.begin(write=True) as txn:
            for key, value in values.items(): assert txn.put(key.encode(), value) if value is not None else txn.delete(key.encode())
    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join()
    assert child.exitcode == 0


def read_all(sources, queue):
    "Put into the queue what a process sees of sources: its id, how many LMDBs it walked, and sums of images."
    queue.put((os.getpid(), len(records._WALKED), [int(source.read(key).images["s2"][0].sum()) for source in sources for key in source.keys()]))


def dump(array, *name, protocol=4): return pickle.dumps((array.tobytes(), array.shape, *name), protocol=protocol)


def s1(dtype=np.float32, seed=0, size=SIZE): return np.random.default_rng([1, seed]).normal(-14, 3, (2, size, size)).astype(dtype)


def s2(seed=0, size=SIZE):
    noise = np.random.default_rng([2, seed]).normal(0, 10, (13, size, size))
    return (np.array(SENSORS["s2"].mean)[:, None, None] + noise).clip(1).astype(np.uint16)


def columns(values, size=SIZE, dtype=np.uint8): return np.tile(np.resize(np.array(values), size).astype(dtype), (size, 1))


def coded(*shape, seed=0): return np.random.default_rng([3, seed]).integers(0, 256, shape, np.uint8)


def pretraining(i):
    "What the three pretraining LMDBs hold of one location."
    return {"s1": coded(4, 2, SIZE, SIZE, seed=i), "s2": coded(4, 13, SIZE, SIZE, seed=10 + i), "labels": np.stack([columns(np.arange(9) + t + i) % 9 for t in range(4)])}


PRETRAINING = {"s1": "0k_251k_uint8_s1.lmdb", "s2": "0k_251k_uint8_s2c.lmdb", "labels": "dw_labels.lmdb"}


def write_cromss_lmdb(folder, rows=2):
    for role, name in PRETRAINING.items():
        number = np.int64 if role == "labels" else int
        write_lmdb(folder / name, {str(i): dump(pretraining(i)[role], number(200 + i)) for i in range(rows)})
    return folder, {}


def beside(folder):
    "What else lies in a published folder."
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("LICENSE", "README.md"): (folder / name).write_text(name)


def write_dfc2020_lmdb(folder, tiles=2):
    beside(folder)
    values = {}
    for i in range(tiles): values |= {f"s1_{i}": dump(s1(np.float64, i)), f"s2_{i}": dump(s2(i)), f"lbl_{i}": dump(columns(range(9)))}
    return write_lmdb(folder / "DFC2020_s12_validation.lmdb", values), {}


def tile_name(i): return f"-0.0{i}20777954_32.9493499204-20190816"


def write_noldo_lmdb(folder, tiles=2, osm=True):
    beside(folder)
    values = {}
    for i in range(tiles):
        arrays = {"s1": s1(np.float32, i), "s2": s2(i), "dw": columns(range(11))} | ({"osm": columns(range(14))} if osm else {})
        values |= {f"{role}_{i}": dump(array, f"{role}_{tile_name(i)}.tif") for role, array in arrays.items()}
    return write_lmdb(folder / ("osm_train_lmdb" if osm else "dw_train_lmdb"), values), {}


def s2_bands(image, names=NAMES):
    "A safetensors blob of bands at their own sizes, as rico-hdl writes it."
    steps = {b: COARSE.get(b, 1) for b in names}
    return save({b: np.ascontiguousarray(image[NAMES.index(b)][::steps[b], ::steps[b]]) for b in names})


def write_rico_hdl_lmdb(folder, places=2):
    beside(folder)
    values, table = {}, ["location,season,s1,s2,label"]
    for i in range(places):
        names = f"S1A_33UUP_70_{i}", f"S2A_T33UUP_70_{i}", f"S2A_T33UUP_70_{i}_reference_map"
        blobs = save({"VH": s1(seed=i)[1], "VV": s1(seed=i)[0]}), s2_bands(s2(i), [b for b in NAMES if b != "B10"]), save({"Data": columns(range(9), dtype=np.uint16)})
        values |= dict(zip(names, blobs))
        table.append(",".join((f"T33UUP_70_{i}", "2017-06-13", *names)))
    path = write_lmdb(folder / "Encoded-BigEarthNet", values)
    (path / "pairs.csv").write_text("\n".join(table) + "\n")
    return path, {}


WRITERS = {"cromss-lmdb": write_cromss_lmdb, "dfc2020-lmdb": write_dfc2020_lmdb, "noldo-lmdb": write_noldo_lmdb, "rico-hdl-lmdb": write_rico_hdl_lmdb}
