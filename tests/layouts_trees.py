"The smallest valid data sets in the layouts that are published as trees: each `write_KIND(folder)` gives (path to open, options)."
import warnings
import zipfile
from pathlib import Path

import numpy as np
import rasterio
from rasterio.crs import CRS
from rasterio.transform import Affine

from cromss.sensors import SENSORS, encode

UTM, PLACE, SIZE = CRS.from_epsg(32631), Affine(10, 0, 500000, 0, -10, 5600000), 24
OPTICAL = ("20200604T054639_20200604T054831_T43RCP", "20200823T054639_20200823T055618_T43RCP")
RADAR = ("S1B_IW_GRDH_1SDV_20200607T010800_20200607T010825_032904_03CFBA_D457", "S1A_IW_GRDH_1SDV_20200903T131212_20200903T131237_034195_03F8F5_AC1C")
FACTOR = {"B1": 6, "B9": 6, "B10": 6, "B2": 1, "B3": 1, "B4": 1, "B8": 1}
TILES = ("-0.0520777954_32.9493499204-20190816", "12.5_-3.25-20200107")


def write_tif(path, values, transform=PLACE, crs=UTM, nodata=None, names=None, tags=None, **profile):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = values.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(path, "w", driver="GTiff", count=count, height=height, width=width, dtype=values.dtype, crs=crs, transform=transform, nodata=nodata, **profile) as f:
            f.write(values)
            f.update_tags(**(tags or {}))
            if names: f.descriptions = names
    return values


def radar(size=SIZE, seed=0):
    "VV and VH in dB, float32 (2, size, size)."
    return np.random.default_rng(seed).normal(-14, 3, (2, size, size)).astype(np.float32)


def optical(size=SIZE, seed=0, dtype=np.uint16):
    "DN of 13 bands, (13, size, size), the cirrus band dark."
    values = np.random.default_rng(seed).integers(600, 3000, (13, size, size)).astype(dtype)
    values[10] = values[10] % 40
    return values


def classes(count=9, size=SIZE, start=0):
    "Columns of the values start, start + 1, ..., uint8 (1, size, size)."
    return (np.tile(np.arange(size) * count // size, (1, size, 1)) + start).astype(np.uint8)


def zip_folder(folder, archive, method=zipfile.ZIP_DEFLATED):
    "All files of a folder in an archive, by their paths in it."
    with zipfile.ZipFile(archive, "w", method) as file:
        for path in sorted(p for p in Path(folder).rglob("*") if p.is_file() and p != Path(archive)): file.write(path, path.relative_to(folder))
    return archive


def ssl4eo(folder, key="0000007", coded=False, labels=True):
    "One location of two seasons of the SSL4EO-S12 v1 tree; `coded`: in eight bits."
    for i, (ours, theirs) in enumerate(zip(OPTICAL, RADAR)):
        for b, band in enumerate(SENSORS["s2"].bands):
            f = FACTOR.get(band, 2)
            values = optical(SIZE // f, i)[b:b + 1]
            if coded: values = encode(values, SENSORS["s2"].select([band]))[0]
            write_tif(folder / "s2c" / key / ours / f"{band}.tif", values, PLACE * Affine.scale(f))
        for b, band in enumerate(("VV", "VH")):
            values = radar(seed=i)[b:b + 1]
            if coded: values = encode(values, SENSORS["s1"].select([band]))[0]
            write_tif(folder / "s1" / key / theirs / f"{band}.tif", values)
        if labels: write_tif(folder / "dw_noisy_labels" / key / ours / "label.tif", classes(), nodata=255)
    (folder / "s2c" / key / "metadata.json").write_text("{}")
    (folder / "void_ids.csv").write_text("0000003\n")


def write_ssl4eo(folder):
    ssl4eo(folder)
    return folder, {}


def write_ssl4eo_coded(folder):
    ssl4eo(folder / "0k_251k_uint8_jpeg_tif", coded=True)
    return folder / "0k_251k_uint8_jpeg_tif", {}


def write_ssl4eo_zipped_labels(folder):
    ssl4eo(folder)
    (folder / "dw_noisy_labels").rename(folder / "x")
    (folder / "y/ssl4eo_s12_nol").mkdir(parents=True)
    (folder / "x").rename(folder / "y/ssl4eo_s12_nol/dw_noisy_labels")
    zip_folder(folder / "y", folder / "ssl4eo_s12_nol.zip")
    for path in sorted((folder / "y").rglob("*"), reverse=True): path.unlink() if path.is_file() else path.rmdir()
    (folder / "y").rmdir()
    (folder / "ids.csv").write_text("ids,sub1,sub2,sub3,sub4\n" + ",".join(("7", *OPTICAL, "", "")) + "\n")
    return folder, {"labels": folder / "ssl4eo_s12_nol.zip", "ids": folder / "ids.csv"}


def dfc2020(folder, split, number, size=SIZE, seed=0, renamed=False, kinds=("s1", "s2", "dfc", "lc")):
    "One tile of DFC2020, {kind: values}."
    values = {"s1": radar(size, seed).astype(np.float64), "s2": optical(size, seed), "dfc": classes(10, size, 1), "lc": np.repeat(classes(17, size, 1), 4, 0)}
    for kind in kinds:
        at = f"{split}/{kind}_{split}" if renamed else f"ROIs0000_{split}/{kind}_{'validation' if split == 'validation' else 0}"
        write_tif(folder / at / f"ROIs0000_{split}_{kind}_0_p{number}.tif", values[kind])
    return values


def write_dfc2020(folder):
    dfc2020(folder, "validation", 2)
    dfc2020(folder, "test", 10, seed=1)
    return folder, {"split": "all"}


def noldo(folder, tree, place, size=SIZE, seed=0):
    "One tile of SSL4EO-S12@DW or @OSM, {kind: values}."
    name = place.replace(".", "p") if tree.endswith("test") else place
    values = {"s1": radar(size, seed), "s2": optical(size, seed, np.int16), "dw": classes(11, size), "osm": classes(14, size)}
    for kind in ("s1", "s2"): write_tif(folder / tree / f"image_{kind}" / f"{kind}_{name}.tif", values[kind])
    for kind in ("dw", "osm") if tree.startswith("osm") else ("dw",): write_tif(folder / tree / f"label_{kind}" / f"{kind}_{name}.tif", values[kind])
    return values


def write_noldo_trees(folder):
    for tree in ("dw_train", "dw_test"): noldo(folder, tree, TILES[0])
    return folder, {"split": "all"}


def write_noldo_zip(folder):
    for tree in ("osm_train", "osm_test"): noldo(folder / "x/data_s12", tree, TILES[1])
    zip_folder(folder / "x", folder / "ssl4eo_s12_osm.zip")
    for path in sorted((folder / "x").rglob("*"), reverse=True): path.unlink() if path.is_file() else path.rmdir()
    (folder / "x").rmdir()
    (folder / "README.md").write_text("OpenStreetMap tiles")
    return folder / "ssl4eo_s12_osm.zip", {"split": "all"}
