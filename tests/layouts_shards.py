"The smallest SSL4EO-S12 v1.1: Zarr v2 shards in zip files, named, typed and chunked as published, with a tree of labels."
import warnings

import numpy as np
import rasterio
import zarr
from numcodecs import Blosc
from rasterio.transform import Affine

from cromss.sensors import SENSORS

TILE = "T51UVP"
OPTICAL = tuple(f"{d}T023001_{d}T022955_{TILE}" for d in ("20200310", "20200618", "20200920", "20201116"))      # in time order, as published
RADAR = ("S1A_IW_GRDH_1SDV_20200312T214646_20200312T214711_031620_03A4F7_0001", "S1A_IW_GRDH_1SDV_20201118T214646_20201118T214711_035300_041F2C_0002",
         "S1B_IW_GRDH_1SDV_20200617T214613_20200617T214638_022070_029E39_0003", "S1B_IW_GRDH_1SDV_20200922T214617_20200922T214642_023470_02C92D_0004")
RADAR_OF = (0, 2, 3, 1)       # which radar image belongs to which optical one: theirs are in the order of their names
IDS = ("0080717", "0060573", "0179869")
CORNER, EPSG = (714900, 4728300), 32651
NAMES = {"S1GRD": ("vv", "vh"), "S2L1C": tuple("B8A" if b == "B8A" else f"B{int(b[1:]):02d}" for b in SENSORS["s2"].bands)}
NAMES["S2L2A"] = tuple(b for b in NAMES["S2L1C"] if b != "B10")
SENSOR_OF = {"S1GRD": SENSORS["s1"], "S2L1C": SENSORS["s2"], "S2L2A": SENSORS["s2a"]}


def pixels(folder, count=3, size=24, seed=0):
    "Values of a sensor as the shards hold them, (count, 4, bands, size, size): int16 DN + 1000, or float16 dB."
    sensor, rng = SENSOR_OF[folder], np.random.default_rng(seed)
    mean, std = (np.array(v)[:, None, None] for v in (sensor.mean, sensor.std))
    values = mean + std * rng.uniform(-0.9, 0.9, (count, 4, sensor.num_bands, size, size))
    return values.astype(np.float16) if folder == "S1GRD" else (values.round() + 1000).clip(1).astype(np.int16)


def coordinates(count, size, corner=CORNER, step=10):
    "x_ and y_ of `count` samples, each 3 km east of the one before: pixel centres."
    centres = step * (np.arange(size) + 0.5)
    starts = corner[0] + 3000 * np.arange(count)[:, None]
    return starts + centres, np.full((count, 1), float(corner[1])) - centres


def arrays(folder, values, ids=IDS, products=None, places=None, corner=CORNER):
    "All arrays of a shard by name. `places`: which of the places each sample has."
    count, size = len(ids), values.shape[-1]
    order = list(range(count)) if places is None else list(places)
    x, y = coordinates(max(order) + 1, size, corner)
    products = products or [RADAR if folder == "S1GRD" else OPTICAL] * count
    found = {"bands": values, "sample": np.array(ids), "band": np.array(NAMES[folder]), "time": np.arange(4), "x": np.arange(size), "y": np.arange(size), "file_id": np.array(products),
             "sample_id": np.array([[f"{i}_{t}" for t in range(4)] for i in ids]), "time_": np.zeros((count, 4), np.int64), "center_lat": np.full(count, 42.66), "center_lon": np.full(count, 125.6),
             "crs": np.full(count, EPSG), "x_": x[order], "y_": y[order]}
    return found | ({"cloud_mask": np.zeros((count, 4, size, size), np.uint8)} if folder != "S1GRD" else {})


def write_zarr(path, found, chunks=None, compressor=Blosc(cname="lz4", clevel=5, shuffle=1)):
    "Write arrays as a Zarr v2 group in a zip file. `chunks`: of bands; None: each time of each sample."
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(), zarr.storage.ZipStore(path, mode="w") as store:
        warnings.simplefilter("ignore")      # of names that are in the zip file twice, as xarray writes them too
        group = zarr.create_group(store, zarr_format=2)
        for name, a in found.items():
            shape = (chunks or (1, 1, *a.shape[2:])) if name == "bands" else a.shape
            group.create_array(name, shape=a.shape, dtype=a.dtype, chunks=shape, compressors=compressor, config={"write_empty_chunks": True})[...] = a
        zarr.consolidate_metadata(store)


def shard(root, folder, number=1, split="train"):
    "Path of a shard's file."
    return root / split / folder / f"ssl4eos12_{split}_seasonal_data_{number:06d}.zarr.zip"


def class_ids(size=24, seed=0):
    "Class ids of a label, uint8 (size, size): 0..8, some 255."
    ids = np.random.default_rng(seed).integers(0, 10, (size, size), np.uint8)
    return np.where(ids == 9, 255, ids).astype(np.uint8)


def write_label(folder, key, product, ids, corner=CORNER, place=0, epsg=EPSG):
    "Write label.tif of a product."
    path = folder / key / product / "label.tif"
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", driver="GTiff", count=1, height=ids.shape[0], width=ids.shape[1], dtype=ids.dtype, crs=epsg and f"EPSG:{epsg}",
                       transform=Affine(10, 0, corner[0] + 3000 * place, 0, -10, corner[1])) as file: file.write(ids, 1)
    return path


def read_all(source):
    "A number for each location, for processes that read it."
    return [int(source.read(key).images["s1"][0].sum()) for key in source.keys()]


def write_ssl4eo_s12_v1_1(folder):
    "Two locations of 24 px in one shard, both sensors, with labels."
    root = folder / "v1.1"
    for name in ("S2L1C", "S1GRD"): write_zarr(shard(root, name), arrays(name, pixels(name, 2), IDS[:2]))
    for place, key in enumerate(IDS[:2]):
        for n, product in enumerate(OPTICAL): write_label(root / "dw_noisy_labels", key, product, class_ids(seed=4 * place + n), place=place)
    return root, {}
