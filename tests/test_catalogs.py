"Catalogs: files by pattern, table and STAC items read as they were written; every fault of names, tables, items and servers ends in one line."
import inspect
import json
import os
import pickle
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import layouts_catalogs
from layouts_catalogs import HOME, PLACE, band_assets, image, item, write_pattern, write_stac, write_table, write_tif
from rasterio.crs import CRS
from rasterio.transform import Affine
from refusals import refused, skipped

from cromss import catalogs, sources
from cromss.catalogs import PatternSource, StacSource, TableSource, Url, locate, remote_options, shown
from cromss.config import ConfigError
from cromss.dataset import PatchDataset
from cromss.prepare import prepare
from cromss.sources import open_source

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")     # affine's `*`


def same(location, seeds):
    "Whether raw images of a location are those that were written with these seeds, one a season."
    for role in ("s1", "s2"):
        for got, seed in zip(location.images[role], seeds, strict=True): assert np.array_equal(got, image(role, seed)[0]), (role, seed)
    assert all(np.array_equal(got, image("label")[0][0]) for got in location.labels)
    return True


# -- all three ---------------------------------------------------------------------------------------------------------------------------------------

LAYOUTS = {"pattern": write_pattern, "table": write_table, "stac": write_stac}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_into_a_store(kind, tmp_path):
    path, options = LAYOUTS[kind](tmp_path / "data")
    source = open_source(path, coding="raw", **options)
    first, second = source.keys()
    assert source.kind == kind and same(source.read(first), (0, 1)) and source.describe().endswith("classes dynamic-world") and "\n" not in source.describe()
    assert same(source.read(second), (2,) if kind == "table" else (2, 3)) and source.read(first).crs == "EPSG:32631" and source.sensors["s2"].bands == ("B2", "B3", "B4")
    again = pickle.loads(pickle.dumps(source))
    assert again.keys() == source.keys() and same(again.read(first), (0, 1))
    refused(lambda: source.files("nowhere"), "nowhere")
    store = prepare(open_source(path, **options), tmp_path / "store", progress=False)
    assert len(store) == 2 and store.manifest["info"]["report"]["kept"] == 2
    sample = PatchDataset(store, crop=16)[0]
    assert sample["image_s1"].shape == (2, 16, 16) and sample["image_s2"].shape == (3, 16, 16) and sample["mask"].shape == (16, 16)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_faults_of_grids(kind, tmp_path):
    "Another CRS, another UTM zone, a shift, no CRS, a rotated grid are refused by file; south-up rows are read."
    path, options = LAYOUTS[kind](tmp_path / "data")
    source = open_source(path, coding="raw", **options)
    key, season = source.keys()[0], list(source.files(source.keys()[0]))[0]
    at = Path(source.files(key)[season]["label"])
    values, _, nodata = image("label")

    def label(**grid):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            write_tif(at, values, nodata=nodata, **grid)
        return lambda: source.read(key)
    refused(label(crs=CRS.from_epsg(32632)), at.name, "EPSG:32632", "allow_resample")
    refused(label(transform=PLACE * Affine.translation(0.8, 0)), at.name, "0.80 px east")
    refused(label(crs=None, transform=PLACE), at.name, "no CRS")
    refused(label(transform=PLACE * Affine.rotation(10)), at.name, "rotated", "gdalwarp")
    south = Affine(10, 0, 500000, 0, 10, 5600000 - 240)
    write_tif(at, values[:, ::-1], nodata=nodata, transform=south)
    assert same(source.read(key), (0, 1))
    label(crs=CRS.from_epsg(32632))
    moved = open_source(path, coding="raw", allow_resample=True, **options).read(key)
    assert (moved.labels[0] == 255).all() and np.array_equal(moved.labels[1], values[0])        # a zone of 6 degrees is far away: nothing is known there


@pytest.mark.parametrize("crs, transform", [(32601, Affine(10, 0, 299880, 0, -10, 8000000)), (4326, Affine(0.0001, 0, 179.999, 0, -0.0001, 10)), (3031, Affine(10, 0, -120, 0, -10, 120))],
                         ids=["zone 1, across the antimeridian", "degrees beyond 180", "around the south pole"])
def test_antimeridian_and_pole(crs, transform, tmp_path):
    for role in ("s1", "s2", "label"): write_tif(tmp_path / "data" / f"{role}.tif", *image(role), transform=transform, crs=CRS.from_epsg(crs))
    (tmp_path / "data/t.csv").write_text("location,season,s1,s2,label\na,1,s1.tif,s2.tif,label.tif\n")
    location = TableSource(tmp_path / "data/t.csv", coding="raw").read("a")
    assert same(location, (0,)) and location.crs == f"EPSG:{crs}" and location.transform == tuple(transform)[:6]
    prepare(tmp_path / "data/t.csv", tmp_path / "store", kind="table", progress=False)


# -- by a pattern ------------------------------------------------------------------------------------------------------------------------------------

def tree(folder, *names, role="s2"):
    for name in names: write_tif(folder / name, *image(role))
    return folder


def test_pattern_forms(tmp_path):
    for role in ("s1", "s2", "label"): write_tif(tmp_path / f"site 7/2021/site 7-{role}.tif", *image(role))
    source = PatternSource(tmp_path, "{location}/{season}/{location}-{sensor}.tif")
    assert source.keys() == ["site 7"] and source.read("site 7").seasons == ("2021",)
    tree(tmp_path, "site 7/2021/other-s2.tif")                                     # the field that stands twice is not the same
    assert "1 files follow it not, such as site 7/2021/other-s2.tif" in PatternSource(tmp_path, "{location}/{season}/{location}-{sensor}.tif").describe()
    for role in ("s1", "s2", "label"): write_tif(tmp_path / f"flat/x_{role}.tif", *image(role))
    assert PatternSource(tmp_path / "flat", "{location}_{sensor}.tif").read("x").seasons == ("0",)


def test_pattern_needs_no_order_of_names(tmp_path):
    "Sensors are known, so names with the separator inside are told apart; hidden files and other depths are left alone."
    for name in ("s1_a_b_2021.tif", "s2_a_b_2021.tif", ".s2_c_2021.tif", "deep/s2_d_2021.tif"): tree(tmp_path, name, role=name[:2] if name[0] == "s" else "s2")
    write_tif(tmp_path / "label_a_b_2021.tif", *image("label"))
    source = PatternSource(tmp_path, "{sensor}_{location}_{season}.tif")
    assert source.keys() == ["a_b"] and set(source.files("a_b")["2021"]) == {"s1", "s2", "label"}


def test_pattern_counts_what_it_leaves(tmp_path):
    path, options = write_pattern(tmp_path)
    for name in ("cloud/a_1_2021-04.tif", "cloud/z_2021-04.tif", "optical/odd.tif"): write_tif(path / name, *image("label"))
    (path / "optical/notes.txt").write_text("")
    source = open_source(path, **options)
    assert source.examine("a_1").counts == {"files of no known role": 1} and not source.examine("b").counts
    assert "2 files follow it not, such as cloud/z_2021-04.tif" in source.describe()
    (path / "s1/b_2021-04.tif").unlink()
    reading = open_source(path, **options).examine("b")
    assert reading.dropped[0][:2] == ("missing sensor", "b/2021-04") and reading.location.seasons == ("2021-07",)


def test_two_files_of_one_role(tmp_path):
    path, options = write_pattern(tmp_path)
    tree(path, "s2/b_2021-07.tif")
    refused(lambda: open_source(path, **options), "location b, season 2021-07", "optical and s2 are both s2")


@pytest.mark.parametrize("pattern, words", [("{sensor}.tif", ["{location} is missing"]), ("{location}.tif", ["{sensor} is missing"]), ("{tile}/{sensor}.tif", ["'tile'"]),
                                            ("{location/{sensor}", ["give a path"]), ("/data/{location}/{sensor}.tif", ["below the root"]), ("../{location}/{sensor}.tif", ["below the root"]),
                                            ("{location}\\{sensor}.tif", ["below the root"]), ("{location:07d}/{sensor}.tif", ["names only"]), ("{location!r}/{sensor}.tif", ["names only"]),
                                            ("{}/{sensor}.tif", ["field in pattern"]), (7, ["give a path"])])
def test_pattern_that_is_none(pattern, words, tmp_path): refused(lambda: PatternSource(tmp_path, pattern), *words, error=ConfigError)


def test_pattern_errors(tmp_path):
    path, options = write_pattern(tmp_path)
    refused(lambda: PatternSource(path), "give pattern=", error=ConfigError)
    refused(lambda: PatternSource(path, "{sensor}/{location}+{season}.tif"), "no file follows the pattern", "such as mask/a_1_2021-04.tif")
    refused(lambda: PatternSource(path, options["pattern"], roles={"optical": "s22"}), "'s22'", "did you mean", error=ConfigError)
    refused(lambda: PatternSource(path, options["pattern"], roles=["s2"]), "roles=", error=ConfigError)
    refused(lambda: PatternSource(tmp_path / "nowhere", options["pattern"]), "no such folder")


@pytest.mark.skipif('"pattern"' not in inspect.getsource(sources.read_settings) or "catalogs" not in sources.FORMATS, reason="dataset.yaml does not know the field yet")
def test_pattern_in_dataset_yaml(tmp_path):
    path, options = write_pattern(tmp_path)
    (path / "dataset.yaml").write_text("pattern: '{sensor}/{location}_{season}.tif'\nroles: {optical: s2, mask: label}\n")
    source = open_source(path, coding="raw")
    assert source.kind == "pattern" and same(source.read("a_1"), (0, 1))
    (path / "dataset.yaml").write_text("pattern: 7\n")
    refused(lambda: open_source(path), "pattern=7", error=ConfigError)


def test_names_of_files(tmp_path):
    "Spaces, other alphabets and 200 characters work; a name that is not UTF-8 is refused by name, but only where it matters."
    deep = tmp_path / ("d" * 120) / "mit Leerzeichen" / ("ü" * 60)
    for role in ("s1", "s2", "label"): write_tif(deep / f"Ort 1 北京/{role}.tif", *image(role))
    assert len(str(deep)) > 200
    source = PatternSource(deep, "{location}/{sensor}.tif", coding="raw")
    assert source.keys() == ["Ort 1 北京"] and same(source.read("Ort 1 北京"), (0,))
    prepare(source, tmp_path / "store", coding="raw", progress=False)
    raw = os.fsencode(deep)
    (deep / "note.txt").rename(deep / "n.txt") if (deep / "note.txt").exists() else open(raw + b"/\xff.txt", "w").close()
    assert PatternSource(deep, "{location}/{sensor}.tif").keys() == ["Ort 1 北京"]
    os.mkdir(raw + b"/\xff")
    open(raw + b"/\xff/s2.tif", "w").close()
    refused(lambda: PatternSource(deep, "{location}/{sensor}.tif"), "not UTF-8", "\\udcff")
    refused(lambda: PatternSource(os.fsdecode(raw + b"/\xff"), "{location}{sensor}.tif"), "not UTF-8")


# -- by a table --------------------------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def table(tmp_path):
    path, _ = write_table(tmp_path / "data")

    def write(*lines, header="location,season,s1,s2,label", encoding="utf-8"):
        path.write_bytes("\n".join([header, *lines]).encode(encoding))
        return path
    write.path = path
    return write


GOOD = "a,2021-04,files/s1 0.tif,files/s2 0.tif,files/label 0.tif"


@pytest.mark.parametrize("lines, words", [
    ([GOOD, GOOD], ["line 3", "twice", "line 2", "location a, season 2021-04"]),
    ([GOOD, "b,2021-04,files/s1.tif"], ["line 3", "3 cells", "5 columns"]),
    ([GOOD, GOOD + ",more"], ["line 3", "6 cells"]),
    ([GOOD, ",2021-04,,,"], ["line 3", "location"]), ([GOOD, "b,,,,"], ["line 3", "no season"]), ([GOOD, "x/y,1,,,"], ["line 3", "without '/'"]),
    ([GOOD, "b" * 401 + ",1,,,"], ["line 3", "400 bytes"]),
    ([GOOD, 'b,"1,,,'], ["line 3", "quotes"]), ([GOOD, 'b,"1"x,,,'], ["line 3", "quotes"]), ([GOOD, "b,1,\0,,"], ["line 3", "zero byte"]),
    ([], ["no line below the header"])])
def test_table_lines(lines, words, table): refused(lambda: TableSource(table(*lines)), "places.csv", *words)


@pytest.mark.parametrize("header, words", [("location,season,s1,label", ["no column s2", "roles="]), ("place,season,s1,s2,label", ["no column location", "place"]), ("location,season,s1,s2,mask", ["no column label"]),
                                           ("location,season,s1,s1,label", ["two columns s1"]), ("", ["no column location, season"])])
def test_table_header(header, words, table): refused(lambda: TableSource(table(GOOD, header=header)), "line 1", *words)


def test_table_is_no_text(table):
    table.path.write_bytes(b"location,season,s1,s2,label\n" + GOOD.encode() + b"\ncaf\xe9,1,,,\n")
    refused(lambda: TableSource(table.path), "line 3", "UTF-8")
    table(GOOD, encoding="utf-16")
    refused(lambda: TableSource(table.path), "line 1", "UTF-8")
    table.path.write_bytes(b"")
    refused(lambda: TableSource(table.path), "no column")
    refused(lambda: TableSource(table.path.parent / "none.csv"), "no such file")


@pytest.mark.parametrize("form", ["semicolons", "tabs", "bom", "crlf", "quotes", "blank lines"])
def test_forms_of_tables(form, table):
    header = "location,season,s1,s2,label"
    text = "\n".join([header, GOOD, GOOD.replace("2021-04", "2021-07").replace(" 0.", " 1."), ""])
    text = {"semicolons": text.replace(",", ";"), "tabs": text.replace(",", "\t"), "bom": "\ufeff" + text, "crlf": text.replace("\n", "\r\n"), "blank lines": "\n" + text.replace("\n", "\n\n"),
            "quotes": text.replace("a,", '"a\nb",')}[form]
    table.path.write_bytes(text.encode())
    source = TableSource(table.path, coding="raw")
    assert same(source.read("a\nb" if form == "quotes" else "a"), (0, 1))


def test_table_roles_and_gaps(table):
    header = "location,season,radar,s2,label,cover,reference"
    rows = [f"{GOOD},crops,files/label 1.tif", "a,2021-07,files/s1 1.tif,files/s2 1.tif,,,", "b,2021-04,files/s1 9.tif,files/s2 2.tif,files/label 2.tif,,"]
    table(*rows, header=header)
    source = TableSource(table.path, roles={"radar": "s1"}, coding="raw")
    reading = source.examine("a")
    assert same(reading.location, (0,)) and reading.dropped[0][:2] == ("no label", "a/2021-07") and reading.location.reference[0] is not None
    skipped(lambda: source.read("b"), "bad raster", "s1 9.tif")
    refused(lambda: TableSource(table.path, roles={"radar": "s1", "cover": "s1"}), "radar and cover are both s1")


@pytest.mark.parametrize("cell", ["C:\\data\\s1.tif", "C:/data/s1.tif", "data\\s1.tif"])
@pytest.mark.skipif(os.name == "nt", reason="such paths are right there")
def test_paths_of_windows(cell, table):
    table(GOOD.replace("files/s1 0.tif", cell))
    refused(lambda: TableSource(table.path).read("a"), "line 2", "a path of Windows")


def test_table_that_changes(table):
    source = TableSource(table(GOOD))
    table(GOOD, "b,1,,,")
    refused(lambda: source.read("a"), "changed since it was opened")
    table.path.unlink()
    refused(lambda: source.read("a"), "cannot be read")


def test_gdal_names_in_tables(table, tmp_path):
    "An archive's member, a part of a file and an absolute path are opened as they are."
    import zipfile
    files = table.path.parent / "files"
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as z: z.write(files / "s1 0.tif", "in/s1.tif")
    table(f"a,2021-04,/vsizip/{tmp_path}/x.zip/in/s1.tif,GTIFF_DIR:1:{files}/s2 0.tif,file://{files}/label%200.tif")
    assert same(TableSource(table.path, coding="raw").read("a"), (0,))


def test_large_table(tmp_path):
    "100,000 locations of four seasons are listed in seconds; only where lines start is kept."
    for role in ("s1", "s2", "label"): write_tif(tmp_path / f"{role}.tif", *image(role))
    with open(tmp_path / "t.csv", "w") as f:
        f.write("location,season,s1,s2,label\n")
        f.writelines(f"{i:07d},2021-{s:02d},s1.tif,s2.tif,label.tif\n" for i in range(25000) for s in (1, 4, 7, 10))
    started = time.process_time()
    source = TableSource(tmp_path / "t.csv", coding="raw")
    assert time.process_time() - started < 10 and len(source.keys()) == 25000 and len(pickle.dumps(source)) < 4e6
    assert source.read("0024999").seasons == ("2021-01", "2021-04", "2021-07", "2021-10")


# -- by STAC items -----------------------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def items(tmp_path):
    "Writes an ItemCollection; its path."
    folder = tmp_path / "stac"
    write_tif(folder / "label.tif", *image("label"))

    def write(*features, **more):
        (folder / "items.json").write_text(json.dumps({"type": "FeatureCollection", "features": features, **more}))
        return folder / "items.json"
    write.folder = folder
    write.scene = lambda name="a", told=None, add=0, **properties: _with(item(name, label="label.tif", **band_assets(folder, "s1", 0), **band_assets(folder, "s2", 0, told=told, add=add)), properties)
    return write


def _with(one, properties):
    one["properties"].update(properties)
    return one


def read_items(path, **options): return StacSource(path, coding="raw", **options).read("a")


@pytest.mark.parametrize("how", ["self-contained", "absolute", "folder of items", "collection of items", "one item"])
def test_written_by_pystac(how, tmp_path, items):
    "Catalogs as pystac writes them: links and assets count from the item."
    import pystac
    scenes = [pystac.Item.from_dict(items.scene(name)) for name in "ab"]
    for one in scenes:
        one.set_self_href(str(items.folder / "items.json"))
        one.make_asset_hrefs_absolute()
    catalog = pystac.Catalog("root", "test")
    inner = pystac.Catalog("inner", "test")
    catalog.add_child(inner)
    inner.add_items(scenes)
    out = tmp_path / "catalog"
    if how == "collection of items":
        (tmp_path / "c").mkdir()
        pystac.ItemCollection(scenes).save_object(str(tmp_path / "c/all.json"))
        path = tmp_path / "c/all.json"
    else:
        catalog.normalize_hrefs(str(out))
        if how != "absolute": catalog.make_all_asset_hrefs_relative()
        catalog.save(pystac.CatalogType.ABSOLUTE_PUBLISHED if how == "absolute" else pystac.CatalogType.SELF_CONTAINED)
        path = {"folder of items": out / "inner", "one item": out / "inner/a/a.json"}.get(how, out / "catalog.json")
        if how == "folder of items": (path / "catalog.json").unlink()
    source = StacSource(path, coding="raw")
    assert source.keys() == (["a"] if how == "one item" else ["a", "b"]) and same(source.read("a"), (0,))
    assert StacSource.recognises(path) or how == "folder of items"
    assert StacSource.recognises(out) if how == "self-contained" else True


def test_bands_by_common_name(items):
    one = items.scene()
    for key, name in (("B02", "blue"), ("B03", "green"), ("B04", "red")): one["assets"][name] = one["assets"].pop(key) | {"eo:bands": [{"name": name, "common_name": name}]}
    assert same(read_items(items(one)), (0,))
    for name in ("blue", "green", "red"): one["assets"][name] = {"href": one["assets"][name]["href"], "bands": [{"eo:common_name": name}]}
    assert same(read_items(items(one)), (0,))
    one["assets"] |= {"visual": {"href": "tci.tif", "eo:bands": [{"name": n} for n in ("red", "green", "blue")]}, "scl": {"href": "scl.tif"}, "thumbnail": {"href": "t.jpg"}}
    assert same(read_items(items(one)), (0,))                                        # a picture of three bands does not count where they are files of their own
    one["assets"]["red-jp2"] = one["assets"]["red"]
    refused(lambda: read_items(items(one)), "red and red-jp2 are both B4", "assets=")
    assert same(read_items(items(one), assets={"s2": ["blue", "green", "red"]}), (0,))


def test_one_file_of_several_bands(items):
    values, names, _ = image("s2")
    write_tif(items.folder / "whole.tif", values[[2, 0, 1]])
    one = items.scene()
    for key in ("B02", "B03", "B04"): del one["assets"][key]
    one["assets"]["data"] = {"href": "whole.tif", "eo:bands": [{"name": n} for n in ("B04", "B02", "B03")]}
    assert same(read_items(items(one), bands={"s2": ["B2", "B3", "B4"]}), (0,))
    assert read_items(items(one), bands={"s2": ["B4"]}).images["s2"][0].tolist() == values[[2]].tolist()
    one["assets"]["s2"] = one["assets"].pop("data")                          # called as the role
    assert read_items(items(one)).images["s2"][0].shape == (3, 24, 24)
    one["assets"]["s2"]["eo:bands"].pop()
    refused(lambda: read_items(items(one)), "tells of 2 bands, the file has 3")
    one["assets"]["s2"] = {"href": "s2.tif"}
    write_tif(items.folder / "s2.tif", *image("s2"))
    assert same(read_items(items(one)), (0,))


@pytest.mark.parametrize("told, add, properties", [({"raster:scale": 0.0001, "raster:offset": -0.1}, 1000, {}), ({"raster:bands": [{"scale": 0.0001, "offset": o} for o in (-0.1, -0.1, 0)]}, [[[1000]], [[1000]], [[0]]], {}),
                                                   ({"raster:bands": [{"scale": 0.0001, "offset": -0.1}] * 3}, 0, {"earthsearch:boa_offset_applied": True})])
def test_offsets_of_one_file(told, add, properties, items):
    one = _with(items.scene(), properties)
    for key in ("B02", "B03", "B04"): del one["assets"][key]
    write_tif(items.folder / "s2.tif", (image("s2")[0] + np.array(add)).astype(np.uint16), image("s2")[1])
    one["assets"]["s2"] = {"href": "s2.tif", **told}
    assert same(read_items(items(one)), (0,))
    write_tif(items.folder / "s2.tif", image("s2")[0][:2], ("B02", "B03"))
    if "raster:bands" in told: refused(lambda: read_items(items(one)), "tells of 3 bands", "has 2")


def test_stacked_files_have_one_band(items):
    one = items.scene()
    write_tif(items.folder / "bands/0_B03.tif", image("s2")[0])
    refused(lambda: read_items(items(one)), "0_B03.tif", "3 bands", "one each")
    one["assets"]["B03"]["eo:bands"] = [{"name": "B03"}, {"name": "B05"}]
    refused(lambda: read_items(items(one), assets={"s2": ["B02", "B03"]}), "asset B03", "2 bands")
    one = items.scene()
    one["assets"]["B03"]["eo:bands"] = [{"name": "visible"}]                       # a name that tells nothing: the key does
    assert same(read_items(items(one), assets={"s2": ["B02", "B03", "B04"]}), (0,)) and same(read_items(items(one)), (0,))


def test_items_of_one_sensor_each(items):
    scene = items.scene()
    radar, optical = (item(name, day, **{k: scene["assets"][k] for k in keys}) for name, day, keys in (("x", "2021-04-16", ["vv", "vh"]), ("y", "2021-04-17", ["B02", "B03", "B04", "label"])))
    for one in (radar, optical): one["properties"].update({"site": "a", "season": "spring"})
    source = StacSource(items(radar, optical), group_by="site", season_by="season", coding="raw")
    assert source.keys() == ["a"] and same(source.read("a"), (0,)) and source.read("a").seasons == ("spring",)
    skipped(lambda: StacSource(items(radar, optical), group_by="site").read("a"), "missing sensor")      # two days are two seasons
    refused(lambda: StacSource(items(radar, optical), group_by="tile"), "item x", "no property tile")
    refused(lambda: StacSource(items(optical, dict(optical, id="z"), radar), group_by="site"), "item z", "another item has s2")


REFLECTANCE = {"raster:bands": [{"scale": 0.0001, "offset": -0.1, "nodata": 0}]}


@pytest.mark.parametrize("told, add, properties, options", [
    (REFLECTANCE, 1000, {}, {}),
    ({"bands": [{"raster:scale": 0.0001, "raster:offset": -0.1}]}, 1000, {}, {}), ({"raster:scale": 0.0001, "raster:offset": -0.1}, 1000, {}, {}),
    ({"raster:bands": [{"offset": -1000}]}, 1000, {}, {}),
    (REFLECTANCE, 0, {"earthsearch:boa_offset_applied": True, "s2:processing_baseline": "05.09"}, {}),
    (REFLECTANCE, 1000, {"earthsearch:boa_offset_applied": False, "s2:processing_baseline": "05.09"}, {}),
    (None, 0, {"s2:processing_baseline": "02.12"}, {}), (None, 1000, {"s2:processing_baseline": "04.00"}, {"offset": -1000}), (None, 0, {"processing:version": "05.10"}, {"offset": 0}),
    (REFLECTANCE, 0, {}, {"offset": 0})])
def test_offsets_of_items(told, add, properties, options, items): assert same(read_items(items(items.scene(told=told, add=add, **properties)), **options), (0,))


def test_offsets_that_nobody_can_tell(items):
    refused(lambda: read_items(items(items.scene(**{"s2:processing_baseline": "05.09"}))), "05.09", "offset=-1000 or offset=0", "item a")
    refused(lambda: read_items(items(items.scene(told={"raster:bands": [{"offset": -0.1}]}))), "no scale", "asset B02")
    refused(lambda: read_items(items(items.scene(told={"raster:bands": [{"scale": "much"}]}))), "scale", "number")
    refused(lambda: read_items(items(items.scene(told={"raster:bands": [{"scale": 0}]}))), "scale is 0")
    refused(lambda: read_items(items(items.scene()), offset="x"), "offset='x'", error=ConfigError)
    one = items.scene(told=REFLECTANCE, add=1000)
    for band in ("B02", "B03", "B04"): write_tif(items.folder / f"bands/0_{band}.tif", image("s2")[0][:1] + 1000, tags={"RADIO_ADD_OFFSET": -1000})
    assert np.array_equal(read_items(items(one)).images["s2"][0][0], image("s2")[0][0])            # file and item say the same: once
    refused(lambda: read_items(items(one), offset=-500), "-500", "-1000")
    one["assets"]["label"] = {"href": "label.tif", **REFLECTANCE}
    refused(lambda: read_items(items(one)), "asset label", "no labels")


def test_scaled_radar_and_nodata_of_items(items):
    "Decibels as whole hundredths, with a nodata value that only the item tells."
    db = np.round(image("s1")[0] * 100).astype(np.int16)
    db[:, 3, 4] = -32768
    for band, values in zip(("VV", "VH"), db): write_tif(items.folder / f"{band}.tif", values[None])
    one = items.scene()
    for band in ("VV", "VH"): one["assets"][band.lower()] = {"href": f"{band}.tif", "raster:bands": [{"scale": 0.01, "offset": 0, "nodata": -32768}]}
    got = read_items(items(one))
    assert np.isnan(got.images["s1"][0][:, 3, 4]).all() and not got.valid["s1"][0][3, 4] and got.valid["s1"][0].sum() == 24 * 24 - 1
    assert np.allclose(got.images["s1"][0][:, 5:], db[:, 5:] / 100, atol=1e-5)


def test_zero_in_all_bands_is_no_data(items):
    one = items.scene(told={"raster:bands": [{"scale": 0.0001, "offset": -0.1}]})
    for i, band in enumerate(("B02", "B03", "B04")):
        values = image("s2")[0][i:i + 1] + 1000
        values[0, 2, 2], values[0, 5, 5] = 0, 0 if i == 0 else 2000
        write_tif(items.folder / f"bands/0_{band}.tif", values)
    got = read_items(items(one))
    assert not got.valid["s2"][0][2, 2] and got.valid["s2"][0][5, 5] and got.images["s2"][0][:, 5, 5].tolist() == [-1000, 1000, 1000]


def test_bands_of_several_sizes(items):
    one = items.scene()
    coarse = image("s2")[0][:1, ::2, ::2]
    write_tif(items.folder / "coarse.tif", coarse, transform=PLACE * Affine.scale(2))
    one["assets"]["B11"] = {"href": "coarse.tif"}
    refused(lambda: read_items(items(one)), "coarse.tif", "12 x 12 px", "allow_resample")
    assert same(read_items(items(one), bands={"s2": ["B2", "B3", "B4"]}), (0,))
    got = read_items(items(one), allow_resample=True)
    assert got.images["s2"][0].shape == (4, 24, 24) and np.array_equal(got.images["s2"][0][:3], image("s2")[0]) and abs(got.images["s2"][0][3].mean() - coarse.mean()) < 60


def test_level_of_items(items):
    one = items.scene(**{"s2:product_type": "S2MSI2A"})
    assert StacSource(items(one)).sensors["s2"].level == "L2A"
    assert StacSource(items(dict(items.scene(), collection="sentinel-2-l2a"))).sensors["s2"].level == "L2A" and StacSource(items(dict(items.scene(), collection="sentinel-2-c1-l2a"))).sensors["s2"].level == "L2A"
    assert StacSource(items(items.scene())).sensors["s2"].level == "L1C"
    refused(lambda: StacSource(items(one), level="L1C"), "contradicts")
    source = StacSource(items(items.scene(), dict(items.scene("b"), collection="sentinel-2-l2a")))
    refused(lambda: source.read("b"), "L2A", "L1C")


def test_coded_bytes_are_refused(items):
    one = items.scene(**{"s2:product_type": "S2MSI2A"})
    for band in ("B02", "B03", "B04"): write_tif(items.folder / f"bands/0_{band}.tif", image("label")[0] + np.uint8(5))
    refused(lambda: read_items(items(one)), "uint8", "original DN")


@pytest.mark.parametrize("change, words", [
    (lambda i: i.pop("assets"), ["assets"]), (lambda i: i.update(assets=[]), ["assets"]), (lambda i: i["assets"].update(x=3), ["asset x"]), (lambda i: i["assets"]["label"].pop("href"), ["href", "label"]),
    (lambda i: i["assets"]["label"].update(href="a\0b"), ["no path"]), (lambda i: i["assets"]["label"].update(href="\ud800.tif"), ["UTF-8"]), (lambda i: i.pop("id"), ["id"]), (lambda i: i.update(id="x/y"), ["without '/'"]),
    (lambda i: i.update(id=""), ["location"]), (lambda i: i["properties"].update(datetime=None), ["datetime"]), (lambda i: i["properties"].update(datetime="soon"), ["soon"]), (lambda i: i.update(properties=None), ["properties"]),
    (lambda i: i["assets"]["vv"].update({"eo:bands": [3]}), ["a band is 3"]), (lambda i: i["assets"]["vv"].update({"eo:bands": {}}), ["eo:bands"]), (lambda i: i["assets"]["vv"].update({"eo:bands": [{}], "raster:bands": [{}, {}]}), ["[1, 2] bands"]),
    (lambda i: i["assets"]["label"].update(href="C:\\x.tif"), ["Windows"]), (lambda i: i["assets"].pop("label"), ["no item has label", "assets="]), (lambda i: i["assets"].pop("vv") and i["assets"].pop("vh"), ["no item has s1", "B02"])])
def test_damaged_items(change, words, items):
    one = items.scene()
    change(one)
    refused(lambda: StacSource(items(one)), "items.json", *words)


def test_what_is_no_stac(items, tmp_path):
    path = items()
    refused(lambda: StacSource(path), "no STAC item")
    refused(lambda: StacSource(items(items.scene(), links=[{"rel": "next", "href": "?page=2"}])), "one page of a search")
    for text, words in (("{", "not valid JSON"), ("[1]", "no STAC"), ('{"type": "Topology"}', "no STAC"), ("[" * 100000, "not valid JSON"), ("\xff", "not valid JSON"), ('{"type": "FeatureCollection"}', "features")):
        path.write_bytes(text.encode("latin-1"))
        refused(lambda: StacSource(path), "items.json", words)
    (tmp_path / "empty").mkdir()
    refused(lambda: StacSource(tmp_path / "empty"), "no STAC item")
    for links, words in (([{"rel": "item", "href": "gone.json"}], "gone.json"), ([{"rel": "child"}], "href"), (3, "links"), ([{"rel": "child", "href": "catalog.json"}], "no STAC item")):
        (tmp_path / "empty/catalog.json").write_text(json.dumps({"type": "Catalog", "stac_version": "1.0.0", "id": "x", "description": "", "links": links}))
        refused(lambda: StacSource(tmp_path / "empty"), words)
    refused(lambda: StacSource(path, assets={"s1": 3}), "assets=", error=ConfigError)
    refused(lambda: StacSource(path, assets={"label": ["a", "b"]}), "one file", error=ConfigError)
    (tmp_path / "empty/in").mkdir()
    for at, href in (("catalog.json", "in/catalog.json"), ("in/catalog.json", "../catalog.json")):                 # round and round
        (tmp_path / "empty" / at).write_text(json.dumps({"type": "Catalog", "stac_version": "1.0.0", "links": [{"rel": "child", "href": href}]}))
    refused(lambda: StacSource(tmp_path / "empty"), "no STAC item")
    assert not StacSource.recognises(tmp_path / "nowhere") and not StacSource.recognises(tmp_path)


# -- by URL ------------------------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def server(tmp_path_factory):
    "A file server in a process of its own (GDAL holds Python's lock while it opens a URL): its folder and address."
    folder = tmp_path_factory.mktemp("www")
    for role in ("s1", "s2", "label"): write_tif(folder / f"a b/{role}.tif", *image(role), driver="COG")
    process = subprocess.Popen([sys.executable, layouts_catalogs.__file__, str(folder)], stdout=subprocess.PIPE, text=True)
    yield folder, f"http://{HOME}:{process.stdout.readline().strip()}"
    process.kill()
    process.wait()


@pytest.fixture(autouse=True)
def _network(monkeypatch):
    "Nothing but this machine, and short pauses."
    for name in ("http_proxy", "https_proxy", "all_proxy"): monkeypatch.delenv(name, raising=False); monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("GDAL_HTTP_RETRY_DELAY", "0.01")
    monkeypatch.setenv("GDAL_HTTP_TIMEOUT", "1")


def by_url(folder, base, *faults, name="t.csv", count=1):
    "A table whose files are at base, each with its fault; its source's maker."
    rows = ["location,season,s1,s2,label"] + [f"{k:03d},1," + ",".join(f"{base}{f'/{fault}' if fault else ''}/a%20b/{role}.tif?sig=SECRET" for role, fault in zip(("s1", "s2", "label"), faults or ("",) * 3)) for k in range(count)]
    (folder / name).write_text("\n".join(rows))
    return lambda **options: TableSource(folder / name, coding="raw", **options)


def test_cogs_by_url(server, tmp_path):
    folder, base = server
    source = by_url(tmp_path, base)()
    assert same(source.read("000"), (0,))
    assert same(by_url(tmp_path, base, "busy", "busy", "busy")().read("000"), (0,))                    # 503 twice, then an answer
    (folder / "t.csv").write_text("location,season,s1,s2,label\na,1,a b/s1.tif,a b/s2.tif,a b/label.tif\n")
    (folder / "items.json").write_text(json.dumps({"type": "FeatureCollection", "features": [item("a", s1="a b/s1.tif", s2="a%20b/s2.tif", label="a b/label.tif")]}))
    for kind, url in (("table", f"{base}/t.csv"), ("table", f"{base}/t.csv?sig=SECRET"), ("stac", f"{base}/items.json?sig=SECRET")):
        source = open_source(url, coding="raw", kind=kind)
        assert same(source.read("a"), (0,)) and "SECRET" not in source.describe() + str(source.root) + repr(source.files("a"))
        assert open_source(url.replace("?sig=SECRET", ""), coding="raw").kind == kind
        assert same(pickle.loads(pickle.dumps(source)).read("a"), (0,))


def test_passwords(server, tmp_path):
    folder, base = server
    (folder / "t.csv").write_text("location,season,s1,s2,label\na,1,a b/s1.tif,a b/s2.tif,a b/label.tif\n")
    inside = base.replace("http://", "http://me:pass%40word@")
    source = TableSource(f"{inside}/login/t.csv", coding="raw")
    assert same(source.read("a"), (0,)) and "pass" not in source.describe() + str(source.root)
    text = refused(lambda: TableSource(f"{base.replace('http://', 'http://me:wrong@')}/login/t.csv"), "401", "***")
    assert "wrong" not in text and "me:" not in text


@pytest.mark.parametrize("fault, word", [("down", "503"), ("forbidden", "403"), ("cut", "s1.tif"), ("hang", "timed out"), ("gone", "404")])
def test_faults_of_servers(fault, word, server, tmp_path, monkeypatch, caplog):
    "At a source's first files they stop it; later they drop the location. No secret is shown, and no read waits for ever."
    folder, base = server
    monkeypatch.setenv("GDAL_HTTP_MAX_RETRY", "1" if fault == "down" else "0")
    started = time.monotonic()
    if fault != "cut": assert "?***" in refused(by_url(tmp_path, base, fault, "", ""), "none of the first 1 s1 rasters", word, "network")      # it is the pixels that are cut
    source = by_url(tmp_path, base)()
    lines = (tmp_path / "t.csv").read_text().replace("/a%20b/s1", f"/{fault}/a%20b/s1")
    (tmp_path / "t.csv").write_text(lines)
    source._stamp = catalogs._stamp(tmp_path / "t.csv")                           # the server fails after the source was opened
    text = skipped(lambda: source.read("000"), "bad raster", word, "?***")
    assert "SECRET" not in text + caplog.text and time.monotonic() - started < 50
    assert fault != "down" or "Retrying" in caplog.text


def test_a_stalled_server(server, tmp_path, monkeypatch):
    "Without a limit of the whole time, an answer that stalls is given up."
    folder, base = server
    monkeypatch.delenv("GDAL_HTTP_TIMEOUT")
    monkeypatch.setenv("GDAL_HTTP_LOW_SPEED_TIME", "1")
    assert catalogs.REMOTE["GDAL_HTTP_LOW_SPEED_LIMIT"] == "1000"
    refused(by_url(tmp_path, base, "hang", "", ""), "too slow")


def test_what_comes_later_is_seen(server, tmp_path):
    "GDAL does not remember that a file was missing, or what it held."
    folder, base = server
    make = by_url(tmp_path, base)
    source = make()
    (tmp_path / "t.csv").write_text((tmp_path / "t.csv").read_text().replace("a%20b/label", "late"))
    source._stamp = catalogs._stamp(tmp_path / "t.csv")
    skipped(lambda: source.read("000"), "bad raster", "404")
    write_tif(folder / "late.tif", *image("label"))
    assert same(source.read("000"), (0,))
    write_tif(folder / "late.tif", np.zeros((1, 24, 24), np.uint8), nodata=255)
    assert not source.read("000").labels[0].any()


def test_proxies_are_used(server, tmp_path, monkeypatch):
    folder, base = server
    (folder / "t.csv").write_text("location,season,s1,s2,label\na,1,x,x,x\n")
    monkeypatch.setenv("http_proxy", f"http://{HOME}:1")
    refused(by_url(tmp_path, base), "none of the first")
    refused(lambda: TableSource(f"{base}/t.csv"), "cannot be read")


def test_refused_connections(tmp_path):
    refused(by_url(tmp_path, f"http://{HOME}:1"), "none of the first", f"{HOME}:1")
    for path in ("t.csv", "items.json"): refused(lambda: open_source(f"http://{HOME}:1/{path}?sig=SECRET"), "cannot be read", "?***")
    refused(lambda: TableSource("s3://bucket/t.csv"), "http or https")


def test_a_server_that_dies_ends_everything(server, tmp_path):
    "Not 250,000 dropped locations: one error after ten in a row. Files that are not there are another matter."
    folder, base = server
    source = by_url(tmp_path, base, count=40)()
    text = (tmp_path / "t.csv").read_text().split("\n")
    (tmp_path / "t.csv").write_text("\n".join(text[:4] + [line.replace("/a%20b/", "/forbidden/a%20b/") for line in text[4:]]))
    source = TableSource(tmp_path / "t.csv")
    assert "SECRET" not in refused(lambda: prepare(source, tmp_path / "store", progress=False), "10 locations in a row", "403", "credentials")
    assert not (tmp_path / "store").exists()
    (tmp_path / "t.csv").write_text((tmp_path / "t.csv").read_text().replace("/forbidden/", "/gone/"))
    report = prepare(TableSource(tmp_path / "t.csv"), tmp_path / "store", progress=False).manifest["info"]["report"]
    assert report["kept"] == 3 and "SECRET" not in json.dumps(report)


@pytest.mark.parametrize("fault, word", [("down", "503"), ("forbidden", "403"), ("cut", "IncompleteRead"), ("hang", "timed out"), ("gone", "404")])
def test_faults_of_tables_by_url(fault, word, server, monkeypatch):
    folder, base = server
    monkeypatch.setenv("GDAL_HTTP_MAX_RETRY", "1")
    (folder / "t.csv").write_text("location,season,s1,s2,label\na,1,x,x,x\n")
    assert "SECRET" not in refused(lambda: TableSource(f"{base}/{fault}/t.csv?sig=SECRET"), "cannot be read", word, "?***")


def test_options_of_gdal(monkeypatch):
    import rasterio
    assert remote_options()["GDAL_HTTP_MAX_RETRY"] == "3" and "GDAL_DISABLE_READDIR_ON_OPEN" not in remote_options(alone=False)
    assert "GDAL_HTTP_RETRY_DELAY" not in remote_options()                                          # the environment has it
    monkeypatch.setenv("GDAL_HTTP_MAX_RETRY", "9")
    with rasterio.Env(GDAL_HTTP_CONNECTTIMEOUT=2): assert not {"GDAL_HTTP_MAX_RETRY", "GDAL_HTTP_CONNECTTIMEOUT"} & set(remote_options())


def test_s3(server, tmp_path, monkeypatch):
    "Object storage, here the same server, by GDAL's own settings."
    folder, base = server
    for role in ("s1", "s2", "label"): write_tif(folder / f"bucket/{role}.tif", *image(role), driver="COG")
    for name, value in (("AWS_NO_SIGN_REQUEST", "YES"), ("AWS_S3_ENDPOINT", base[7:]), ("AWS_HTTPS", "NO"), ("AWS_VIRTUAL_HOSTING", "FALSE")): monkeypatch.setenv(name, value)
    (tmp_path / "t.csv").write_text("location,season,s1,s2,label\na,1,s3://bucket/s1.tif,/vsis3/bucket/s2.tif,s3://bucket/label.tif\n")
    assert same(TableSource(tmp_path / "t.csv", coding="raw").read("a"), (0,))


@pytest.mark.parametrize("text, clean", [
    ("https://me:p@ss@host/a.tif", "https://***@host/a.tif"), ("https://h/a.tif?sv=1&sig=x%3D", "https://h/a.tif?***"), ("/vsicurl/https://me:x@h/a.tif?b=c: 404", "/vsicurl/https://***@h/a.tif?*** 404"),
    ("/vsicurl?url=https://h/a&header.Authorization=Bearer%20x", "/vsicurl?***"), ("data/a?.tif", "data/a?.tif"), ("a@b/c.tif", "a@b/c.tif"), ("'https://h/a?b=c' and 'http://h/d?e'", "'https://h/a?***' and 'http://h/d?***'")])
def test_secrets(text, clean): assert shown(text) == clean


def test_locate():
    assert locate("b/../c.tif", Url("https://h/a/t.csv?x=y")).text == "https://h/a/c.tif" and locate("/data/x.tif", Path("a/t.csv")) == Path("/data/x.tif")
    assert locate("https://h/a?b", Path("t.csv")) == Url("https://h/a?b") and "b" not in str(locate("https://h/a?b", Path("t.csv"))).split("a")[1]
