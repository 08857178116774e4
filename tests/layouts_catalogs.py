"Smallest data sets for cromss.catalogs, and a file server with faults: `python layouts_catalogs.py FOLDER` prints its port."
import base64
import http.server
import json
import re
import sys
import time
from collections import Counter
from pathlib import Path
from urllib.parse import unquote, urlsplit

HOME = "127.0.0.1"
FAULTS = ("busy", "down", "forbidden", "hang", "cut", "login")


class Handler(http.server.BaseHTTPRequestHandler):
    "Serves files with Range; /FAULT/path serves path with that fault: the first two requests for a file are answered 503, ..."
    protocol_version = "HTTP/1.1"
    folder, asked = Path("."), Counter()

    def log_message(self, *args): pass

    def do_HEAD(self): self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.asked[path] += 1
        first, _, rest = path[1:].partition("/")
        fault, name = (first, rest) if first in FAULTS else ("", path[1:])
        if fault == "hang": return time.sleep(60)
        if fault == "down" or fault == "busy" and self.asked[path] <= 2: return self.send_error(503)
        if fault == "forbidden": return self.send_error(403)
        if fault == "login" and self.headers.get("Authorization") != "Basic " + base64.b64encode(b"me:pass@word").decode(): return self.send_error(401)
        if not (self.folder / name).is_file(): return self.send_error(404)
        self.answer((self.folder / name).read_bytes(), fault == "cut")

    def answer(self, data, cut):
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start, end = (int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)) if asked else (0, len(data) - 1)
        if start >= len(data): return self.send_error(416)
        self.send_response(206 if asked else 200)
        if asked: self.send_header("Content-Range", f"bytes {start}-{end}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - start + 1))
        self.end_headers()
        if cut: end, self.close_connection = (start + end) // 2, True
        if self.command == "GET": self.wfile.write(data[start:end + 1])


if __name__ == "__main__":
    Handler.folder = Path(sys.argv[1])
    server = http.server.ThreadingHTTPServer((HOME, 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()

import numpy as np
import rasterio
from rasterio.crs import CRS
from rasterio.transform import Affine


UTM, PLACE, SIZE = CRS.from_epsg(32631), Affine(10, 0, 500000, 0, -10, 5600000), 24
S2_NAMES = ("B02", "B03", "B04")


def write_tif(path, values, bands=None, nodata=None, tags=None, transform=PLACE, crs=UTM, driver="GTiff"):
    "A raster in the way that most are: tiled GeoTIFF with band descriptions."
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", driver=driver, count=len(values), height=values.shape[1], width=values.shape[2], dtype=values.dtype, crs=crs, transform=transform, nodata=nodata) as f:
        f.write(values)
        f.update_tags(**(tags or {}))
        if bands: f.descriptions = bands
    return path


def image(role, seed=0, size=SIZE):
    "Values of a role, with its bands and nodata."
    rng = np.random.default_rng(seed)
    if role == "s1": return rng.normal(-14, 3, (2, size, size)).astype(np.float32), ("VV", "VH"), np.nan
    if role == "s2": return rng.integers(300, 3000, (3, size, size)).astype(np.uint16), S2_NAMES, 0
    return np.tile(np.arange(size, dtype=np.uint8) * 9 // size, (1, size, 1)), None, 255


def write_pattern(folder):
    "Two locations of two seasons in flat folders, one a sensor, masks for labels."
    for i, name in enumerate(("a_1_2021-04", "a_1_2021-07", "b_2021-04", "b_2021-07")):
        for role, at in (("s1", "s1"), ("s2", "optical"), ("label", "mask")): write_tif(folder / "set" / at / f"{name}.tif", *image(role, i))
    return folder / "set", {"kind": "pattern", "pattern": "{sensor}/{location}_{season}.tif", "roles": {"optical": "s2", "mask": "label"}}


def write_table(folder):
    "Two locations of two seasons, one file without radar."
    rows = ["location,season,s1,s2,label,cover"]
    for i, (key, season) in enumerate((k, s) for k in "ab" for s in ("2021-04", "2021-07")):
        for role in ("s1", "s2", "label"): write_tif(folder / "files" / f"{role} {i}.tif", *image(role, i))
        rows.append(f"{key},{season},{'' if i == 3 else f'files/s1 {i}.tif'},files/s2 {i}.tif,\"files/label {i}.tif\",crops")
    (folder / "places.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder / "places.csv", {"kind": "table"}


def item(name, day="2021-04-17", **assets):
    "A STAC item."
    return {"type": "Feature", "stac_version": "1.0.0", "stac_extensions": [], "id": name, "properties": {"datetime": f"{day}T10:50:31Z"}, "geometry": None, "links": [],
            "assets": {key: value if isinstance(value, dict) else {"href": value} for key, value in assets.items()}}


def band_assets(folder, role, seed, at="bands", told=None, add=0):
    "A raster for each band of a role, and their assets."
    values, bands, nodata = image(role, seed)
    assets = {}
    for band, one in zip(bands, values):
        write_tif(folder / at / f"{seed}_{band}.tif", one[None] + np.array(add, one.dtype), nodata=nodata)
        assets[band.lower() if role == "s1" else band] = {"href": f"{at}/{seed}_{band}.tif", **(told or {})}
    return assets


def write_stac(folder):
    "An ItemCollection of two locations of two seasons, each band a file."
    items = []
    for i, (key, day) in enumerate((k, s) for k in ("31UCR", "31UDR") for s in ("2021-04-17", "2021-07-16")):
        write_tif(folder / f"bands/{i}_label.tif", *image("label"))
        one = item(f"scene{i}", day, **band_assets(folder, "s1", i), **band_assets(folder, "s2", i), label=f"bands/{i}_label.tif")
        one["properties"]["grid:code"] = f"MGRS-{key}"
        items.append(one)
    (folder / "items.json").write_text(json.dumps({"type": "FeatureCollection", "features": items}), encoding="utf-8")
    return folder / "items.json", {"kind": "stac"}
