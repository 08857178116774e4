"Overlays lie where rasterio puts them; pages show all names as text, and the offline ones ask for nothing; files carry the grid, the values and their meaning."
import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from datetime import datetime, timezone
from xml.etree import ElementTree

import cv2
import folium
import numpy as np
import pystac
import pytest
import rasterio
import torch
from pystac.extensions.classification import ClassificationExtension
from pystac.extensions.projection import ProjectionExtension
from pystac.extensions.raster import RasterExtension
from pystac.validation import validate_dict
from rasterio import Affine
from rasterio.enums import ColorInterp
from rasterio.warp import Resampling, array_bounds, reproject, transform, transform_bounds
from rio_cogeo.cogeo import cog_validate

from cromss.classes import DYNAMIC_WORLD, ClassScheme
from cromss.config import ConfigError, DataError
from cromss.maps import (MARK, VERDICT, export_geotiff, export_place, folium_map, footprint, is_located, offline_page, outline, overlay, pixel_at, save_map, share_names, stac_item, write_qml)
from cromss.selection import corrected_labels, joint_belief, sensor_log_probabilities
from cromss.sensors import SENSORS
from cromss.sources import _apply
from cromss.views import Place, layer_names, layer_title, make_layer, paint_layer

NORTH = ("EPSG:32632", (10.0, 0.0, 600000.0, 0.0, -10.0, 5400000.0))
GRIDS = {"north": NORTH, "south": ("EPSG:32733", (10.0, 0.0, 300000.0, 0.0, -10.0, 6300000.0)), "rotated": ("EPSG:32632", (8.0, 3.0, 600000.0, 3.0, -8.0, 5400000.0)),
         "south up": ("EPSG:32632", (10.0, 0.0, 600000.0, 0.0, 10.0, 5400000.0)), "degrees": ("EPSG:4326", (1e-4, 0.0, 11.0, 0.0, -1e-4, 48.0)), "oblong": ("EPSG:3035", (20.0, 0.0, 4321000.0, 0.0, -10.0, 3210000.0)),
         "date line": ("EPSG:32601", (10.0, 0.0, 302400.0, 0.0, -10.0, 6000000.0))}
HOSTILE = ("<img src=x onerror=alert(1)>", "</script><script>alert(2)</script>", "{{ 7*7 }} & 'quotes\"")


def place_of(crs, affine, shape=(40, 52), scheme=DYNAMIC_WORLD, key="here", sensors=("s1", "s2"), reference=True):
    "A place of random values, with a hole in its label."
    rng, (h, w) = np.random.default_rng(0), shape
    specs = {name: SENSORS[s] for name, s in zip(sensors, ("s1", "s2"))}
    label = rng.integers(0, scheme.num_classes, shape).astype(np.uint8)
    label[:5, :7] = 255
    log_p = sensor_log_probabilities({s: torch.from_numpy(2 * rng.normal(size=(1, scheme.num_classes, h, w))).float() for s in specs})
    return Place(key, 0, 1, specs, scheme, {s: rng.random((spec.num_bands, h, w), np.float32) for s, spec in specs.items()}, label, np.stack([label] * 4), np.ones(shape, bool),
                 label.copy() if reference else None, log_p, crs, affine)


@pytest.fixture(scope="module")
def place(): return place_of(*NORTH)


def counted(shape):
    "A picture whose colours are the pixels' numbers."
    return np.arange(1, np.prod(shape) + 1, dtype=np.uint32).reshape(shape).view(np.uint8).reshape(*shape, 4)


# where a place lies

@pytest.mark.parametrize("name", GRIDS)
def test_an_overlay_lies_where_rasterio_puts_it(name):
    place = place_of(*GRIDS[name])
    rgba, ((south, west), (north, east)) = overlay(place, counted(place.shape))
    (x0, x1), (y0, y1) = transform("EPSG:4326", "EPSG:3857", [west, min(east, 180)], [south, north])
    if east > 180: x1 = east * 20037508.342789244 / 180
    h, w = rgba.shape[:2]
    x, y = np.meshgrid(x0 + (np.arange(w) + .5) / w * (x1 - x0), y1 - (np.arange(h) + .5) / h * (y1 - y0))
    lon, lat = transform("EPSG:3857", "EPSG:4326", x.ravel(), y.ravel())
    column, row = _apply(~Affine(*place.transform), *np.array(transform("EPSG:4326", place.crs, lon, lat)))
    number = rgba.view(np.uint32).reshape(-1).astype(int) - 1
    shown, inside = number >= 0, (row > .01) & (column > .01) & (row < 39.99) & (column < 51.99)
    assert shown[inside].all() and set(number[shown]) == set(range(40 * 52))
    assert np.abs(number // 52 + .5 - row)[shown].max() < .51 and np.abs(number % 52 + .5 - column)[shown].max() < .51       # the pixel that is shown is the one that lies there
    step = [np.abs(np.diff(v.reshape(h, w), axis=a)).max() for v in (row, column) for a in (0, 1)]
    assert max(step) < .8                                                                                                   # and a pixel of the overlay is finer than one of the place


def test_an_overlay_is_what_rasterio_warps(place):
    rgba, ((south, west), (north, east)) = overlay(place, counted(place.shape))
    bounds = array_bounds(*place.shape, Affine(*place.transform))
    assert np.allclose((west, south, east, north), transform_bounds(place.crs, "EPSG:4326", *bounds, densify_pts=50), atol=1e-7)
    (x0, x1), (y0, y1) = transform("EPSG:4326", "EPSG:3857", [west, east], [south, north])
    warped = np.zeros(rgba.shape[:2], np.uint32)
    reproject(counted(place.shape).view(np.uint32)[..., 0], warped, src_transform=Affine(*place.transform), src_crs=place.crs, dst_crs="EPSG:3857", resampling=Resampling.nearest, tolerance=0,
              dst_transform=rasterio.transform.from_bounds(x0, y0, x1, y1, *rgba.shape[1::-1]), src_nodata=0)
    assert (warped == rgba.view(np.uint32)[..., 0]).mean() > .999


@pytest.mark.parametrize("name", [*GRIDS, "nowhere"])
def test_a_point_leads_to_its_pixel_and_back(name):
    place = place_of(*GRIDS.get(name, ("", None)))
    for row, column in ((0, 0), (39, 51), (17, 3), (20, 40)):
        corners = np.array(outline(place, row, column))
        assert corners.shape == (4, 2) and pixel_at(place, *corners.mean(0)) == (row, column) and pixel_at(place, corners[:, 0].mean(), corners[:, 1].mean() - 360) == (row, column)
    (south, west), (north, east) = overlay(place, counted(place.shape))[1]
    assert pixel_at(place, south - .01, west) is None and pixel_at(place, (south + north) / 2, east + .01) is None
    assert all(south - 1e-9 <= lat <= north + 1e-9 and west - 1e-9 <= lon <= east + 1e-9 for lat, lon in outline(place, 0, 0))


@pytest.mark.parametrize("crs,affine", [("", None), ("", NORTH[1]), ("EPSG:32632", None), ("EPSG:3031", (10.0, 0.0, -200.0, 0.0, -10.0, 200.0)), ("no such CRS", NORTH[1]), ("EPSG:32632", (10.0, 0.0, 1e12, 0.0, -10.0, 1e12))])
def test_a_place_without_position_is_laid_at_the_origin(crs, affine, place):
    nowhere = place_of(crs, affine)
    rgba, ((south, west), (north, east)) = overlay(nowhere, counted(nowhere.shape))
    assert not is_located(nowhere) and is_located(place) and rgba.shape == (80, 104, 4)
    assert (south, west) == pytest.approx((-north, -east)) and east * 2 == pytest.approx(520 / 111319.49, rel=1e-4)
    assert (rgba[::2, ::2] == counted(nowhere.shape)).all() and (rgba[1::2, 1::2] == counted(nowhere.shape)).all()


def test_a_place_across_the_date_line_is_whole():
    place = place_of("EPSG:32601", (10.0, 0.0, 302400.0, 0.0, -10.0, 6000000.0), (100, 400))
    (south, west), (north, east) = overlay(place, counted(place.shape))[1]
    assert east - west < .1 and (west < 180 < east or west < -180 < east) and 54 < south < north < 54.2
    shape, bbox = footprint(place)
    assert shape["type"] == "MultiPolygon" and bbox[0] > 179.9 and bbox[2] < -179.9
    sides = [np.array(ring[0])[:, 0] for ring in shape["coordinates"]]
    assert sorted(np.sign(s.mean()) for s in sides) == [-1, 1] and all(np.abs(s).max() == 180 and (s[0] == s[-1]) for s in sides)


def test_a_place_around_a_pole_has_a_footprint():
    shape, bbox = footprint(place_of("EPSG:3031", (1000.0, 0.0, -20000.0, 0.0, -1000.0, 20000.0), (40, 40)))
    ring = np.array(shape["coordinates"][0])
    assert bbox[0::2] == [-180, 180] and bbox[1] == -90 and -90 < bbox[3] < -89 and ring[:, 0].min() == -180 and ring[:, 0].max() == 180 and (ring[0] == ring[-1]).all()


# pages

def picture_of(page, title):
    "A picture of an offline page, RGBA."
    data = json.loads(re.search(r"const data = (.*);\n", page)[1])
    code = data["places"][0]["pictures"][title].split(",")[1]
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(__import__("base64").b64decode(code), np.uint8), cv2.IMREAD_UNCHANGED), cv2.COLOR_BGRA2RGBA)


def test_a_page_shows_the_layers_in_their_colours(place):
    selection = place.select()
    page = offline_page(place, selection=selection)
    for name in layer_names(place):
        assert (picture_of(page, layer_title(place, name)) == overlay(place, paint_layer(make_layer(place, selection, name), place.scheme))[0]).all(), name
    ids = overlay(place, np.dstack([place.label] * 3 + [np.full(place.shape, 255, np.uint8)]))[0]
    shown = picture_of(page, "Label")
    for i, color in enumerate(place.scheme.rgb()): assert (shown[(ids[..., 0] == i) & (ids[..., 3] > 0)] == (*color, 255)).all()
    assert (shown[(ids[..., 0] == 255) & (ids[..., 3] > 0)][:, 3] == 0).all()


def test_a_page_shows_what_was_chosen(place):
    data = json.loads(re.search(r"const data = (.*);\n", offline_page(place, ["label", "selected s1", "label"]))[1])
    assert data["layers"] == ["Label", layer_title(place, "selected s1")] and data["legend"]["shares"] == [] and data["legend"]["mark"] == "#%02X%02X%02X" % MARK
    assert data["legend"]["classes"] == [[n, c] for n, c in zip(DYNAMIC_WORLD.names, DYNAMIC_WORLD.colors)] and data["title"] == "here, season 2" and data["places"][0]["km"] == pytest.approx(.52, rel=.03)


def test_pages_refuse_what_they_cannot_show(place, tmp_path):
    with pytest.raises(ConfigError, match="layer 'labels': there is image s1"): folium_map(place, ["labels"])
    with pytest.raises(ConfigError, match="81 places: a page shows 1 to 80"): offline_page([place] * 81)
    with pytest.raises(ConfigError, match="0 places"): offline_page([])
    with pytest.raises(ConfigError, match="1 selections for 2 places"): offline_page([place] * 2, selection=[None])
    with pytest.raises(ConfigError, match="nowhere, season 2: its position is not known"): folium_map([place, place_of("", None, key="nowhere")], ["label"])
    with pytest.raises(ConfigError, match="base='nothing at all'"): folium_map(place, ["label"], base="nothing at all")
    with pytest.raises(ConfigError, match="an offline page fetches nothing"): save_map(tmp_path / "x.html", place, offline=True, base="Esri WorldImagery")
    with pytest.raises(ConfigError, match="x.html: .*cannot be written"): save_map(tmp_path / "no" / "x.html", place, ["label"])
    assert not list(tmp_path.iterdir())


def test_a_page_that_is_too_large_is_refused(place, monkeypatch):
    monkeypatch.setattr("cromss.maps.MOST_BYTES", 1000)
    with pytest.raises(ConfigError, match="MB of pictures: more than a browser takes"): offline_page(place, ["label"])


def test_a_map_asks_for_leaflet_alone(place, tmp_path):
    page = save_map(tmp_path / "map.html", place).read_text("utf-8")
    asked = re.findall(r"(?:src|href)=\"(https?:[^\"]+)\"", page)
    assert sorted(re.sub(r"@[\d.]+", "", url).split("npm/")[1] for url in asked) == ["leaflet/dist/leaflet.css", "leaflet/dist/leaflet.js"]
    assert isinstance(folium_map(place, ["label"]), folium.Map) and "arcgisonline" in folium_map(place, ["label"], base="Esri WorldImagery").get_root().render()
    assert [p.name for p in tmp_path.iterdir()] == ["map.html"]


# pages in a browser

@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None: pytest.skip("no Chromium on this machine")
    with sync.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def leaflet(tmp_path_factory):
    "The folder of Leaflet's files, of the version that folium asks for, from npm."
    folder, version = tmp_path_factory.mktemp("leaflet"), re.search(r"leaflet@([\d.]+)", folium.folium._default_js[0][1])[1]
    if shutil.which("npm") is None: pytest.skip("npm is not installed, so Leaflet cannot be had")
    try: subprocess.run(["npm", "pack", f"leaflet@{version}"], cwd=folder, check=True, capture_output=True, timeout=60)
    except (subprocess.SubprocessError, OSError): pytest.skip(f"npm cannot fetch leaflet@{version}")
    shutil.unpack_archive(next(folder.glob("*.tgz")), folder, filter="data")
    return folder / "package" / "dist"


@pytest.fixture
def look(browser):
    "Opens a file; gives the page, and lists of what it asked for and of what went wrong."
    pages = []
    def open_(path, answers=None):
        page, asked, wrong = browser.new_page(viewport={"width": 1100, "height": 720}), [], []
        pages.append(page)
        def answer(route):
            url = route.request.url
            if url.startswith(("data:", "file:")): return route.continue_()
            asked.append(url)
            found = answers and answers / url.rsplit("/", 1)[-1]
            return route.fulfill(path=found, content_type="text/css" if found.suffix == ".css" else "text/javascript") if found and found.is_file() else route.abort()
        page.route("**/*", answer)
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
        page.on("dialog", lambda d: (wrong.append(d.message), d.dismiss()))
        page.goto(path.as_uri())
        return page, asked, wrong
    yield open_
    for page in pages: page.close()


def pixels(page):
    page.wait_for_timeout(250)
    return cv2.imdecode(np.frombuffer(page.screenshot(), np.uint8), cv2.IMREAD_COLOR)[..., ::-1].astype(int)


def share_of(page, color):
    "Pixels of the map's middle that have a colour."
    middle = pixels(page)[60:660, 300:1060]
    return (np.abs(middle - np.array([int(color[i:i + 2], 16) for i in (1, 3, 5)])).max(-1) <= 2).sum()


def plain(names=("water", "trees"), **more):
    "A place whose label is of the first class, and its reference of the second."
    place = place_of(*NORTH, scheme=ClassScheme("plain", names, ("#419BDF", "#397D49", "#E49635")[:len(names)]), **more)
    return replace(place, label=np.zeros(place.shape, np.uint8), reference=np.ones(place.shape, np.uint8))


def test_an_offline_page_asks_for_nothing_and_shows_the_pictures(look, tmp_path):
    path = save_map(tmp_path / "page.html", plain(), ["label", "reference", "label weight s1"], offline=True)
    assert not re.search(r"https?://", path.read_text("utf-8"))
    page, asked, wrong = look(path)
    water = share_of(page, "#419BDF")
    assert water > 50_000 and share_of(page, "#397D49") == 0
    page.get_by_label("Compare with").select_option(label="Reference")
    half = share_of(page, "#419BDF"), share_of(page, "#397D49")
    assert half[0] == pytest.approx(water / 2, rel=.05) and half[1] == pytest.approx(water / 2, rel=.05)
    slider = page.get_by_label("Swipe: seen right of")
    slider.focus()
    page.keyboard.press("Home")
    assert share_of(page, "#419BDF") == 0 and "Swipe: seen right of\n0 %" in page.locator("aside").inner_text()
    page.get_by_label("Its opacity").fill("50")
    assert share_of(page, "#397D49") == 0
    page.get_by_label("Layer").select_option(label=layer_title(plain(), "label weight s1"))
    page.get_by_label("Zoom").fill("2")
    page.mouse.move(650, 300)
    assert re.search(r"Latitude 48\.\d{5}°, longitude 10\.\d{5}°", page.locator("aside").inner_text())
    assert (asked, wrong) == ([], [])


def test_an_offline_page_of_several_places(look, tmp_path):
    page, asked, wrong = look(save_map(tmp_path / "page.html", [plain(), place_of("", None, key="nowhere")], ["label"], offline=True))
    assert "position is not known" not in page.locator("aside").inner_text()
    water = share_of(page, "#419BDF")
    page.get_by_label("Place").select_option(label="nowhere, season 2")
    assert 0 < share_of(page, "#419BDF") < water and "position is not known" in page.locator("aside").inner_text() and (asked, wrong) == ([], [])


def test_a_map_with_leaflet(look, leaflet, tmp_path):
    page, asked, wrong = look(save_map(tmp_path / "map.html", [plain(), plain(key="there")], ["label", "reference", "label confidence s2"]), leaflet)
    assert page.locator(".leaflet-control-layers-overlays label").all_inner_texts() == [" Label", " Reference", " Label confidence S2"]
    text = page.locator(".cromss-panel").inner_text()
    assert all(word in text for word in ("water", "trees", "Confidences and weights", "share, no unit"))
    water = share_of(page, "#419BDF")
    assert water > 20_000
    page.get_by_label("Compare with").select_option(label="Reference")
    half = share_of(page, "#419BDF"), share_of(page, "#397D49")
    assert half == (pytest.approx(water / 2, rel=.1), pytest.approx(water / 2, rel=.1))
    page.get_by_label("Swipe: seen right of").focus()
    page.keyboard.press("Home")
    assert share_of(page, "#419BDF") == 0
    page.get_by_label("Compare with").select_option(label="nothing")
    page.get_by_role("checkbox", name="Label confidence S2").check()
    assert share_of(page, "#419BDF") == 0
    page.get_by_role("checkbox", name="Label confidence S2").uncheck()
    assert share_of(page, "#419BDF") == pytest.approx(water, rel=.02)
    page.get_by_label("Place").select_option(label="there, season 2")
    assert len(asked) == 2 and wrong == []


@pytest.mark.parametrize("offline", [True, False])
def test_hostile_names_are_text(offline, request, look, tmp_path):
    place = plain(names=HOSTILE, key='"><svg onload=alert(3)>', sensors=("<svg/onload=x()>", "s2"))
    page, asked, wrong = look(save_map(tmp_path / "map.html", place, offline=offline, title=HOSTILE[1], layers=[n for n in layer_names(place) if "image" not in n]), None if offline else request.getfixturevalue("leaflet"))
    hostile = layer_title(place, "label weight <svg/onload=x()>")
    assert "<svg/onload=x()>" in hostile.lower()
    page.get_by_label("Compare with").select_option(label=hostile)
    page.get_by_label("Compare with").select_option(label="Label")
    text = page.locator("body").inner_text()
    assert page.title() == HOSTILE[1] and HOSTILE[0] in text and HOSTILE[1] in text and hostile in text
    assert wrong == [] and len(asked) == (0 if offline else 2) and not page.locator("img[src=x], svg[onload], body script:nth-of-type(4)").count()
    if not offline: assert f" {hostile}" in page.locator(".leaflet-control-layers-overlays label").all_inner_texts()


def test_a_map_is_escaped_in_a_notebook(place):
    map_ = folium_map(replace(place, key=HOSTILE[1]), ["label"])
    assert HOSTILE[1] not in map_.get_root().render() and HOSTILE[1] not in html.unescape(map_._repr_html_())


# files

def check_cog(path):
    "What GDAL's validate_cloud_optimized_geotiff.py looks at: tiles, overviews, the order of the directories and of the data."
    with rasterio.open(path) as file:
        assert file.driver == "GTiff" and file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG" and file.profile["tiled"]
        levels = file.overviews(1)
        assert bool(levels) == (max(file.shape) > 512) and all(levels == file.overviews(b) for b in file.indexes) and levels == sorted(levels)
        directories = [int(file.get_tag_item("IFD_OFFSET", "TIFF", 1, ovr=n)) for n in (None, *range(len(levels)))]
        data = [int(file.get_tag_item("BLOCK_OFFSET_0_0", "TIFF", 1, ovr=n)) for n in (None, *range(len(levels)))]
        assert directories == sorted(directories) and data == sorted(data, reverse=True) and max(directories) < min(data)
    valid, errors, _ = cog_validate(path, strict=True, quiet=True)
    assert valid, errors
    head = open(path, "rb").read(2000)
    assert head[:2] == b"II" and b"LAYOUT=IFDS_BEFORE_DATA" in head and b"KNOWN_INCOMPATIBLE_EDITION=NO" in head


@pytest.mark.parametrize("shape", [(40, 52), (530, 600)])
def test_geotiffs_hold_the_layers_on_the_grid_of_the_input(shape, tmp_path):
    place = place_of(*NORTH, shape)
    selection = place.select()
    files = export_geotiff(place, tmp_path / "maps", selection, tags={"RUN": "abc"})
    assert {n: p.name for n, p in files.items()} == {"label": "label.tif", "suggested label": "suggested-label.tif", "probably wrong": "probably-wrong.tif", "shares": "shares.tif"} and sorted(p.name for p in (tmp_path / "maps").iterdir()) == sorted(p.name for p in files.values())
    for name, path in files.items():
        check_cog(path)
        with rasterio.open(path) as file:
            assert file.crs == place.crs and tuple(file.transform)[:6] == place.transform and file.shape == shape
            assert (file.tags()["RUN"], file.tags()["LOCATION"], file.tags()["SEASON"]) == ("abc", "here", "2")
            if name == "shares":
                assert file.descriptions == tuple(n.replace(" ", "_") for n in share_names(place)) and set(file.dtypes) == {"float32"} and np.isnan(file.nodata)
                for n, values in zip(share_names(place), file.read()): np.testing.assert_array_equal(values, make_layer(place, selection, n).values.astype(np.float32))
            else:
                assert file.dtypes == ("uint8",) and file.nodata == 255 and file.descriptions == (name.replace(" ", "_"),) and file.colorinterp == (ColorInterp.palette,)
                scheme, read = VERDICT if name == "probably wrong" else DYNAMIC_WORLD, file.read(1)
                assert (read == make_layer(place, selection, name).values)[read != 255].all() and ((read == 255) == (place.label == 255)).all()
                assert [file.colormap(1)[i][:3] for i in range(scheme.num_classes)] == [tuple(c) for c in scheme.rgb().tolist()] and [file.tags(1)[f"CLASS_{i}"] for i in range(scheme.num_classes)] == list(scheme.names)
                if file.overviews(1):
                    small = file.read(1, out_shape=tuple(-(-n // 2) for n in shape))
                    assert set(np.unique(small)) <= set(np.unique(file.read(1)))          # overviews of classes hold classes
    assert "entangled_label_confidence_s2" in {n.replace(" ", "_") for n in share_names(place)} and len(share_names(place)) == 10


@pytest.mark.parametrize("crs,affine,said", [("", NORTH[1], "here: no CRS or no transform"), ("EPSG:32632", None, "here: no CRS or no transform"), ("no such CRS", NORTH[1], "here: CRS 'no such CRS' is not known")])
def test_a_place_without_crs_is_no_geotiff(crs, affine, said, tmp_path):
    place = place_of(crs, affine)
    for write in (export_geotiff, export_place):
        with pytest.raises(DataError, match=said): write(place, tmp_path / "maps")
    with pytest.raises(DataError, match=said): stac_item(place, {})
    assert not list(tmp_path.iterdir())


def test_a_transform_that_leads_nowhere_is_refused():
    with pytest.raises(DataError, match="leads to no place on the Earth"): footprint(place_of("EPSG:32632", (10.0, 0.0, 1e12, 0.0, -10.0, 1e12)))


def test_what_is_probably_wrong_is_a_file_of_its_own(place, tmp_path):
    path = export_geotiff(place, tmp_path)["probably wrong"]
    suggested = corrected_labels(torch.from_numpy(place.label).long()[None], joint_belief(place.log_p))[0].numpy()
    with rasterio.open(path) as file: found, colours, nodata = file.read(1), file.colormap(1), file.nodata
    assert nodata == 255 and colours[1][:3] == (0xD5, 0x5E, 0x00) and set(np.unique(found)) == {0, 1, 255}
    assert ((found == 255) == (place.label == 255)).all() and ((found == 1) == (suggested != place.label)).all()


def test_a_place_is_exported_whole(place, tmp_path):
    folder = tmp_path / "maps"
    files = export_place(place, folder, when=("2020-06-01", datetime(2020, 8, 31, tzinfo=timezone.utc)))
    names = {"item.json", *(f"{n}.{end}" for n in ("label", "suggested-label", "probably-wrong", "shares") for end in ("tif", "qml"))}
    assert {p.name for p in folder.iterdir()} == names == {p.name for p in files.values()}
    with pytest.raises(ConfigError, match="is there already"): export_place(place, folder)
    (folder / "notes.txt").write_text("mine")
    before = (folder / "item.json").read_bytes()
    assert export_place(place, folder, when="2020-06-01", overwrite=True) == files and {p.name for p in folder.iterdir()} == names | {"notes.txt"} and (folder / "item.json").read_bytes() != before


def test_an_export_that_fails_leaves_nothing_behind(place, tmp_path, monkeypatch):
    def refuse(*_, **__): raise OSError(28, "No space left on device")
    monkeypatch.setattr("cromss.maps.write_qml", lambda *a: refuse())
    with pytest.raises(OSError): export_place(place, tmp_path / "maps")
    assert not list((tmp_path / "maps").iterdir())


def test_qgis_styles_name_the_classes(tmp_path):
    scheme = ClassScheme("hostile", (*HOSTILE[:2], "bell \x07"), ("#419BDF", "#397D49", "#E49635"))
    text = write_qml(tmp_path / "label.qml", scheme).read_text("utf-8")
    assert text.startswith("<!DOCTYPE qgis ")
    renderer = ElementTree.fromstring(text).find("pipe/rasterrenderer")
    assert renderer.attrib["type"] == "paletted" and [(e.get("value"), e.get("color"), e.get("label")) for e in renderer.iter("paletteEntry")] == [
        ("0", "#419bdf", HOSTILE[0]), ("1", "#397d49", HOSTILE[1]), ("2", "#e49635", "bell  ")]
    renderer = ElementTree.fromstring(write_qml(tmp_path / "shares.qml", None).read_text("utf-8")).find("pipe/rasterrenderer")
    items = [(float(i.get("value")), i.get("color")) for i in renderer.iter("item")]
    assert renderer.attrib["type"] == "singlebandpseudocolor" and items[0] == (0, "#00224e") and items[-1] == (1, "#fee838") and [v for v, _ in items] == sorted(v for v, _ in items)
    with pytest.raises(ConfigError, match="cannot be written"): write_qml(tmp_path / "no" / "x.qml", None)


def test_a_stac_item_says_where_and_what(place, tmp_path):
    files = export_place(place, tmp_path, when="2020-07-01T10:30:00+02:00")
    text = json.loads(files["item"].read_text("utf-8"))
    validate_dict({**text, "stac_extensions": []})                # the core's schemas come with pystac, the extensions' lie in the web
    item = pystac.Item.from_file(str(files["item"]))
    assert item.datetime == datetime(2020, 7, 1, 8, 30, tzinfo=timezone.utc) and item.id == "here-season-2" and {a.href for a in item.assets.values()} == {"./label.tif", "./suggested-label.tif", "./probably-wrong.tif", "./shares.tif"}
    projection = ProjectionExtension.ext(item)
    assert (projection.epsg, projection.shape, tuple(projection.transform)) == (32632, [40, 52], place.transform)
    assert np.allclose(item.bbox, transform_bounds(place.crs, "EPSG:4326", *array_bounds(*place.shape, Affine(*place.transform)), densify_pts=21), atol=1e-6)
    ring = np.array(item.geometry["coordinates"][0])
    assert (ring[0] == ring[-1]).all() and (ring[:-1, 0] * ring[1:, 1] - ring[1:, 0] * ring[:-1, 1]).sum() > 0 and [*ring.min(0), *ring.max(0)] == pytest.approx(item.bbox)
    classes = ClassificationExtension.ext(item.assets["label"]).classes
    assert [(c.value, c.description, f"#{c.color_hint}") for c in classes] == [(i, n, c) for i, (n, c) in enumerate(zip(DYNAMIC_WORLD.names, DYNAMIC_WORLD.colors))]
    assert all(re.fullmatch("[0-9A-Za-z_-]+", c.name) for c in classes)
    bands = RasterExtension.ext(item.assets["shares"]).bands
    with rasterio.open(files["shares"]) as file: assert [b["name"] for b in text["assets"]["shares"]["bands"]] == list(file.descriptions)
    assert len(bands) == 10 and {(b.nodata, b.data_type) for b in bands} == {("nan", "float32")} and RasterExtension.ext(item.assets["label"]).bands[0].nodata == 255


def test_a_stac_item_of_other_crs_and_times(place):
    own = replace(place, crs="+proj=laea +lat_0=48 +lon_0=10 +datum=WGS84", transform=(10.0, 0.0, 0.0, 0.0, -10.0, 0.0))
    item = stac_item(own, {}, ("2020-06-01", "2020-08-31")).to_dict(include_self_link=False)
    validate_dict({**item, "stac_extensions": []})
    assert "Lambert" in item["properties"]["proj:wkt2"] and item["properties"]["datetime"] is None and item["properties"]["end_datetime"] == "2020-08-31T00:00:00Z"
    assert "time of the images is not known" in stac_item(place, {}).properties["description"]
    for when, said in (("summer", "give a datetime or ISO text"), (("2021-01-01", "2020-01-01"), "ends before it starts"), (5, "give a datetime")):
        with pytest.raises(ConfigError, match=said): stac_item(place, {}, when)


def test_names_that_are_no_identifiers_become_such():
    place = place_of(*NORTH, scheme=ClassScheme("odd", ("<b>", "a b", "Äcker"), ("#419BDF", "#397D49", "#E49635")), key="../ä/b c")
    item = stac_item(place, {"label": "label.tif"})
    classes = ClassificationExtension.ext(item.assets["label"]).classes
    assert [c.description for c in classes] == ["<b>", "a b", "Äcker"] and all(re.fullmatch("[0-9A-Za-z_-]+", c.name) for c in classes) and len({c.name for c in classes}) == 3 and re.fullmatch(r"[\w.-]+", item.id)
