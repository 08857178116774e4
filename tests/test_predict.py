"Maps of scenes: windows give what the whole gives, files lie in the right place, and every fault is told by name with nothing left behind."
import contextlib
import io
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from disks import disk, remount
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.shutil import copy
from rasterio.transform import Affine, from_bounds
from rasterio.warp import transform_bounds
from refusals import refused
from torch import nn

from cromss import predict
from cromss.classes import DYNAMIC_WORLD, ClassScheme
from cromss.config import ConfigError, DataError
from cromss.inputs import InputContract, InputLayer
from cromss.models import build_network
from cromss.predict import cut_tiles, open_scene, predict_array, predict_scene, reach
from cromss.sensors import SENSORS
from cromss.sources import PlainSource
from cromss.trees import SSL4EOSource

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")     # affine's `*`
UTM, PLACE = CRS.from_epsg(32631), Affine(10, 0, 500000, 0, -10, 5600000)
S1, S2 = SENSORS["s1"], SENSORS["s2"].select(("B2", "B3", "B4", "B8"))
EXACT = dict(window=96, margin=32)      # the margin is more than the reach of the network


class Small(nn.Module):
    "A U-Net on the bands of all sensors together."
    def __init__(self, *sensors, scheme=DYNAMIC_WORLD, **options):
        super().__init__()
        self.sensors, self.scheme = {s.name: s for s in sensors}, scheme
        self.inputs = nn.ModuleDict({s.name: InputLayer(InputContract(s)) for s in sensors})
        options = dict(encoder="resnet18", encoder_depth=2, decoder_channels=(16, 8)) | options
        self.network = build_network(sum(s.num_bands for s in sensors), scheme.num_classes, **options)
        self.stride = self.network.encoder.output_stride

    def forward(self, values):
        x = torch.cat([layer(values[name]) for name, layer in self.inputs.items()], 1)
        height, width = x.shape[-2:]
        x = nn.functional.pad(x, (0, -width % self.stride, 0, -height % self.stride))
        return self.network(x)[..., :height, :width]


class Broken(Small):
    "Does something at its third window."
    def __init__(self, fault): super().__init__(S2); self.fault, self.calls = fault, 0

    def forward(self, values):
        self.calls += 1
        logits = super().forward(values)
        return self.fault(logits) if self.calls == 3 else logits


@pytest.fixture(scope="module")
def both():
    torch.manual_seed(1)
    return Small(S1, S2)


@pytest.fixture(scope="module")
def optical():
    torch.manual_seed(2)
    return Small(S2)


def waves(sensor, height, width, seed=0):
    "Values of a sensor, float32, that vary on several scales."
    rng, (rows, columns) = np.random.default_rng(seed), np.mgrid[:height, :width]
    pattern = np.sin(columns / rng.uniform(4, 40, (sensor.num_bands, 1, 1))) * np.cos(rows / rng.uniform(4, 40, (sensor.num_bands, 1, 1))) + rng.normal(0, 0.2, (sensor.num_bands, height, width))
    return (np.array(sensor.mean)[:, None, None] + np.array(sensor.std)[:, None, None] * pattern).astype(np.float32)


def dn(height, width, seed=0, sensor=S2): return np.rint(waves(sensor, height, width, seed)).clip(1, 9000).astype(np.uint16)


def write_tif(path, values, bands=None, nodata=None, tags=None, transform=PLACE, crs=UTM, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(path, "w", driver="GTiff", count=len(values), height=values.shape[1], width=values.shape[2], dtype=values.dtype,
                           crs=crs, transform=transform, nodata=nodata, **options) as f:
            f.write(values)
            f.update_tags(**(tags or {}))
            if bands: f.descriptions = bands
    return path


def pair(folder, height=150, width=203):
    "A scene of two sensors: paths by sensor, and their values."
    radar, ids = waves(S1, height, width), dn(height, width)
    return {"s2": write_tif(folder / "s2.tif", ids, S2.bands, 0), "s1": write_tif(folder / "s1.tif", radar, S1.bands, np.nan)}, {"s1": radar, "s2": ids.astype(np.float32)}


def one(folder, height=150, width=203, **options): return {"s2": write_tif(folder / "s2.tif", dn(height, width), S2.bands, 0, **options)}


def quiet(predictor, images, out, **options):
    return predict_scene(predictor, images, out, **{**EXACT, "progress": False, **options})


def read(path, band=None):
    with rasterio.open(path) as f: return f.read(band)


def names(folder): return sorted(p.name for p in Path(folder).iterdir())


# -- windows ----------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stride, window, margin", [(1, 7, 2), (4, 16, 4), (4, 16, 0), (8, 40, 16), (32, 512, 0.25), (32, 500, 100)])
def test_windows_cover_each_pixel_once_and_keep_their_distance(stride, window, margin):
    real_window, real_margin = predict._sizes(window, margin, stride)
    assert real_window >= window and real_window % stride == real_margin % stride == 0
    for shape in ((1, 1), (stride, 3 * stride + 1), (real_window, real_window + 1), (3 * real_window - 5, 2 * real_window + stride), (real_window * 4, 5)):
        covered = np.zeros(shape, int)
        for tile in cut_tiles(shape, window, margin, stride):
            covered[tile.kept] += 1
            assert max(tile.shape) <= real_window and np.zeros(tile.shape)[tile.inner].shape == tuple(k.stop - k.start for k in tile.kept)
            for seen, kept, length in zip(tile.seen, tile.kept, shape):
                assert seen.start % stride == 0 and kept.stop > kept.start
                assert seen.start == 0 or kept.start - seen.start >= real_margin
                assert seen.stop == length or seen.stop - kept.stop >= real_margin
        assert (covered == 1).all()


@pytest.mark.parametrize("window, margin", [(64, 32), (64, 0.5), (0, 0), (-5, 1), (64, -1), ("64", 8), (64, None), (float("nan"), 8), (True, 0), (8, 1)])
def test_windows_that_keep_nothing_are_refused(window, margin):
    refused(lambda: cut_tiles((100, 100), window, margin, 8), "window=", error=ConfigError)


# -- arrays -----------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (96, 96), (97, 101), (131, 242), (33, 290)])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_windows_equal_the_whole(both, shape, batch_size):
    values = {name: waves(s, *shape) for name, s in both.sensors.items()}
    values["s1"][:, shape[0] // 2:, :shape[1] // 3] = np.nan
    with torch.inference_mode(): whole = both.eval()({n: torch.from_numpy(v)[None] for n, v in values.items()})[0].numpy()
    logits = predict_array(both, values, batch_size=batch_size, **EXACT)
    assert logits.dtype == np.float32 and logits.shape == (9, *shape)
    assert np.abs(logits - whole).max() < 1e-4 and (logits.argmax(0) == whole.argmax(0)).mean() > 0.9999


def test_a_margin_below_the_reach_shows_seams(optical):
    values = {"s2": waves(S2, 200, 200)}
    whole, seams = predict_array(optical, values), predict_array(optical, values, window=64, margin=0)
    assert np.abs(whole - seams).max() > 0.01


def test_how_far_a_network_looks(optical):
    assert reach(optical, 128) == reach(optical, 256) == 29
    assert reach(Small(S2, architecture="pspnet", encoder_depth=None, decoder_channels=None), 128) >= 64       # the whole input


class Point(nn.Module):
    "Each pixel by itself: a number of its first band."
    def __init__(self): super().__init__(); self.sensors, self.scheme, self.stride = {"s2": S2}, ClassScheme("two", ("a", "b")), 1

    def forward(self, values):
        x = values["s2"].nan_to_num()[:, :1]
        return torch.cat([x - 1000, 1000 - x], 1)


def test_a_network_without_weights_that_looks_nowhere_else():
    values = {"s2": waves(S2, 40, 50)}
    assert reach(Point(), 16) == 0
    assert np.array_equal(predict_array(Point(), values, 16, 0).argmax(0), values["s2"][0] <= 1000)


def test_every_part_of_a_network_is_left_in_its_mode(optical):
    optical.train()
    optical.network.encoder.eval()
    predict_array(optical, {"s2": waves(S2, 20, 20)})
    assert optical.training and not optical.network.encoder.bn1.training and optical.network.decoder.training
    optical.eval()
    predict_array(optical, {"s2": torch.from_numpy(waves(S2, 20, 20))}, device="cpu")
    assert not optical.training


def test_arrays_that_do_not_fit(both):
    good = {"s1": waves(S1, 20, 30), "s2": waves(S2, 20, 30)}
    refused(lambda: predict_array(both, {"s1": good["s1"]}), "no values of s2", "s1, s2")
    refused(lambda: predict_array(both, good | {"s2": good["s2"][:3]}), "s2", "(3, 20, 30)", "B2, B3, B4, B8")
    refused(lambda: predict_array(both, good | {"s2": good["s2"][:, :19]}), "sizes differ", "(19, 30)")
    refused(lambda: predict_array(both, good | {"s3": good["s2"]}), "unknown sensor 's3'", error=ConfigError)
    for size in (0, -1, 1.5, True): refused(lambda: predict_array(both, good, batch_size=size), f"batch_size={size!r}", error=ConfigError)
    for device in ("gpu", "cuda:99", 3.5): refused(lambda: predict_array(both, good, device=device), f"device={device!r}", error=ConfigError)


# -- scenes -----------------------------------------------------------------------------------------------------------------------------------------

def test_a_scene_of_two_sensors(both, tmp_path):
    images, values = pair(tmp_path)
    logits = predict_array(both, values, **EXACT)
    done = quiet(both, images, tmp_path / "map.tif", tags={"RUN": "demo-1"})
    assert done.classes == tmp_path / "map.tif" and done.probabilities == tmp_path / "map-probabilities.tif" and names(tmp_path) == ["map-probabilities.tif", "map.tif", "s1.tif", "s2.tif"]
    ids = read(done.classes, 1)
    assert np.array_equal(ids, logits.argmax(0)) and done.pixels == 150 * 203 and done.empty == 0 and done.missing == {"s1": 0, "s2": 0}
    assert list(done.counts.values()) == np.bincount(ids.ravel(), minlength=9).tolist() and list(done.counts) == list(DYNAMIC_WORLD.names)
    shares = torch.from_numpy(logits).softmax(0).numpy()
    assert np.abs(read(done.probabilities) * 0.004 - shares).max() < 0.0021
    for path in (done.classes, done.probabilities):
        with rasterio.open(path) as f, rasterio.open(images["s2"]) as scene:
            assert f.bounds == scene.bounds and f.transform == scene.transform and f.crs == scene.crs and f.shape == scene.shape
            assert f.nodata == 255 and set(f.dtypes) == {"uint8"} and f.tags()["RUN"] == "demo-1" and f.tags()["CLASS_SCHEME"] == "dynamic-world"


@pytest.fixture(scope="module")
def large(optical, tmp_path_factory):
    "Maps with overviews."
    folder = tmp_path_factory.mktemp("large")
    return quiet(optical, one(folder, 700, 1100), folder / "map.tif", window=256)


def test_files_are_cloud_optimized(large):
    for path in (large.classes, large.probabilities):
        with rasterio.open(path) as f:
            assert f.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG" and f.tags(ns="IMAGE_STRUCTURE")["COMPRESSION"] == "DEFLATE"
            assert set(f.block_shapes) == {(512, 512)} and f.overviews(1) == [2, 4]
            at = [int(f.get_tag_item("IFD_OFFSET", "TIFF", 1, ovr=n)) for n in (None, 0, 1)]       # all directories before all data
            data = [int(f.get_tag_item("BLOCK_OFFSET_0_0", "TIFF", 1, ovr=n)) for n in (None, 0, 1)]
            assert at == sorted(at) and data == sorted(data, reverse=True) and max(at) < min(data)
        assert not list(path.parent.glob("*.aux.xml"))


def test_overviews_take_the_mode_of_classes_and_the_mean_of_probabilities(large):
    ids, shares = read(large.classes, 1), read(large.probabilities, 1).astype(float)
    with rasterio.open(large.classes, overview_level=0) as f: small = f.read(1)
    with rasterio.open(large.probabilities, overview_level=0) as f: means = f.read(1)
    four = np.stack([ids[a::2, b::2] for a in (0, 1) for b in (0, 1)])
    assert ((four == small).sum(0) * 2 >= (four == np.sort(four, 0)[1]).sum(0)).all() and set(np.unique(small)) <= set(np.unique(ids))
    assert np.abs(shares.reshape(350, 2, 550, 2).mean((1, 3)) - means).max() <= 0.5


def test_colours_names_and_scales(large):
    with rasterio.open(large.classes) as f:
        colors, tags = f.colormap(1), f.tags(1)
        assert f.count == 1 and f.descriptions == ("label",) and f.colorinterp == (ColorInterp.palette,)
        assert all(colors[i][:3] == tuple(rgb) for i, rgb in enumerate(DYNAMIC_WORLD.rgb().tolist())) and [tags[f"CLASS_{i}"] for i in range(9)] == list(DYNAMIC_WORLD.names)
    with rasterio.open(large.probabilities) as f:
        assert f.descriptions == DYNAMIC_WORLD.names and f.scales == (0.004,) * 9 and f.offsets == (0,) * 9 and f.nodata == 255
        total = f.read().astype(int).sum(0)
        assert abs(total - 250).max() <= 5


def test_probabilities_as_numbers_or_none(optical, tmp_path):
    images = one(tmp_path, 40, 50)
    done = quiet(optical, images, tmp_path / "map.tif", probabilities="float32")
    with rasterio.open(done.probabilities) as f: assert set(f.dtypes) == {"float32"} and np.isnan(f.nodata) and f.scales == (1.0,) * 9 and np.abs(f.read().sum(0) - 1).max() < 1e-5
    assert quiet(optical, images, tmp_path / "plain.tif", probabilities=False).probabilities is None and not (tmp_path / "plain-probabilities.tif").exists()
    refused(lambda: quiet(optical, images, tmp_path / "x.tif", probabilities="int8"), "probabilities='int8'", error=ConfigError)


def test_holes_are_nodata_or_predicted_from_the_other_sensor(both, tmp_path):
    images, values = pair(tmp_path)
    values["s1"][:, :60, :70], values["s2"][:, :30, :40], values["s2"][:, 100:110, 150:] = np.nan, 0, 0
    values["s2"][0, 140, 3] = 0                                     # one dark band is a value
    values["s1"][1, 145, 9] = np.inf                                # one band without a value is none
    write_tif(images["s1"], values["s1"], S1.bands)
    write_tif(images["s2"], values["s2"].astype(np.uint16), S2.bands)
    with pytest.warns(UserWarning) as told: done = quiet(both, images, tmp_path / "map.tif")
    ids, shares = read(done.classes, 1), read(done.probabilities)
    nothing = np.zeros((150, 203), bool)
    nothing[:30, :40] = True
    assert np.array_equal(ids == 255, nothing) and ((shares == 255) == nothing).all() and done.empty == 1200
    assert done.missing == {"s1": 60 * 70 - 1200 + 1, "s2": 10 * 53} and sum(done.counts.values()) == 150 * 203 - 1200
    assert [str(w.message).count(s) for w, s in zip(told, ("3,001 pixels", "530 pixels"))] == [1, 1]
    values["s2"][:, (values["s2"] == 0).all(0)] = np.nan
    values["s1"][:, 145, 9] = np.nan
    assert np.array_equal(ids[~nothing], predict_array(both, values, **EXACT).argmax(0)[~nothing])


def test_a_scene_of_nothing_but_nodata(optical, tmp_path):
    path = write_tif(tmp_path / "s2.tif", np.zeros((4, 50, 40), np.uint16), S2.bands)
    done = quiet(optical, {"s2": path}, tmp_path / "map.tif")
    assert done.empty == done.pixels == 2000 and (read(done.classes) == 255).all() and (read(done.probabilities) == 255).all()


@pytest.mark.parametrize("height, width", [(1, 1), (3, 95), (96, 97)])
@pytest.mark.filterwarnings("ignore:.*1000 DN")      # so few pixels may all be bright
def test_tiny_scenes(optical, tmp_path, height, width):
    images = one(tmp_path, height, width)
    done = quiet(optical, images, tmp_path / "map.tif")
    assert np.array_equal(read(done.classes, 1), predict_array(optical, {"s2": read(images["s2"])}).argmax(0))


def test_a_south_up_scene_becomes_north_up(optical, tmp_path):
    images = one(tmp_path)
    south_up = Affine(10, 0, 500000, 0, 10, 5600000 - 1500)
    flipped = {"s2": write_tif(tmp_path / "flipped.tif", read(images["s2"])[:, ::-1], S2.bands, 0, transform=south_up)}
    a, b = quiet(optical, images, tmp_path / "a.tif"), quiet(optical, flipped, tmp_path / "b.tif")
    with rasterio.open(a.classes) as f, rasterio.open(b.classes) as g: assert f.bounds == g.bounds and f.transform == g.transform and np.array_equal(f.read(), g.read())


def test_a_rotated_scene_is_refused(optical, tmp_path):
    images = one(tmp_path, transform=PLACE * Affine.rotation(20))
    refused(lambda: quiet(optical, images, tmp_path / "map.tif"), "rotated grid", "gdalwarp", "s2.tif")


def test_a_scene_without_a_place(optical, tmp_path):
    images = one(tmp_path, transform=Affine.identity(), crs=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = quiet(optical, images, tmp_path / "map.tif")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(done.classes) as f: assert f.crs is None and f.transform.is_identity and f.shape == (150, 203)


@pytest.mark.parametrize("layout", [dict(tiled=True, blockxsize=64, blockysize=64, compress="deflate"), dict(interleave="band", compress="lzw"), dict(tiled=True, blockxsize=16, blockysize=16)])
def test_any_layout_of_files(optical, tmp_path, layout):
    images = one(tmp_path, **layout)
    assert np.array_equal(read(quiet(optical, images, tmp_path / "map.tif").classes, 1), predict_array(optical, {"s2": read(images["s2"])}, **EXACT).argmax(0))


# -- bands and values -------------------------------------------------------------------------------------------------------------------------------

def test_bands_are_found_by_name(optical, tmp_path):
    whole = dn(60, 70)
    expected = predict_array(optical, {"s2": whole}).argmax(0)
    def ids(path): return read(quiet(optical, {"s2": path}, tmp_path / "map.tif", overwrite=True).classes, 1)
    assert np.array_equal(ids(write_tif(tmp_path / "mixed.tif", whole[[3, 0, 0, 2, 1]], ("b08", "B02", "B12", "B4", "B03"))), expected)
    assert np.array_equal(ids(write_tif(tmp_path / "unnamed.tif", whole)), expected)
    full = SENSORS["s2"]
    every = dn(60, 70, sensor=full)
    every[full.indices(S2.bands)] = whole
    assert np.array_equal(ids(write_tif(tmp_path / "thirteen.tif", every)), expected)
    copy(write_tif(tmp_path / "source.tif", whole, S2.bands), tmp_path / "scene.vrt", driver="VRT")
    assert np.array_equal(ids(tmp_path / "scene.vrt"), expected)
    for band, values in zip(("B02", "B03", "B04", "B08", "B05"), (*whole, whole[0])): write_tif(tmp_path / f"T32ABC_2021_{band}_10m.tif", values[None])
    assert np.array_equal(ids(sorted(tmp_path.glob("T32*.tif"))[::-1]), expected)


def test_bands_that_are_missing_or_unclear(optical, tmp_path):
    values, out = dn(40, 40), tmp_path / "map.tif"
    def told(path, *words): return refused(lambda: quiet(optical, {"s2": path}, out), *words)
    told(write_tif(tmp_path / "rgb.tif", values[:3], ("B4", "B3", "B2")), "rgb.tif", "expected s2 with the bands B2, B3, B4, B8, got B4, B3, B2; lacking B8")
    told(write_tif(tmp_path / "three.tif", values[:3]), "three.tif", "3 bands without names")
    told(write_tif(tmp_path / "twice.tif", values, ("B2", "B02", "B4", "B8")), "two bands are called B2")
    files = [write_tif(tmp_path / f"x_{b}.tif", v[None]) for b, v in zip(("B2", "B3", "B4", "B8", "B8_again"), (*values, values[0]))]
    told(files, "B8 of s2 are in several files")
    told([], "no file is given")
    assert not out.exists()


def test_levels_and_offsets(optical, tmp_path):
    values = dn(60, 70)
    expected = predict_array(optical, {"s2": values}).argmax(0)
    shifted = write_tif(tmp_path / "shifted.tif", values + 1000, S2.bands, tags={"RADIO_ADD_OFFSET": "-1000", "LEVEL": "Level-1C"})
    assert np.array_equal(read(quiet(optical, {"s2": shifted}, tmp_path / "map.tif").classes, 1), expected)
    refused(lambda: quiet(optical, {"s2": write_tif(tmp_path / "a.tif", values, S2.bands, tags={"LEVEL": "L2A"})}, tmp_path / "x.tif"), "a.tif", "LEVEL says L2A", "s2 L1C")
    refused(lambda: quiet(optical, {"s2": write_tif(tmp_path / "b.tif", values, S2.bands, tags={"RADIO_ADD_OFFSET": "much"})}, tmp_path / "x.tif"), "RADIO_ADD_OFFSET='much'")
    files = [write_tif(tmp_path / f"x_{b}.tif", v[None], tags={"RADIO_ADD_OFFSET": str(n)}) for n, (b, v) in enumerate(zip(S2.bands, values))]
    refused(lambda: quiet(optical, {"s2": files}, tmp_path / "x.tif"), "different tags RADIO_ADD_OFFSET")


def test_values_in_other_units(both, tmp_path):
    images, values = pair(tmp_path)
    def told(name, stored, bands, *words): return refused(lambda: quiet(both, images | {name: write_tif(tmp_path / "wrong.tif", stored, bands)}, tmp_path / "map.tif"), "wrong.tif", *words)
    told("s2", values["s2"] / 10000, S2.bands, "looks like reflectance", "multiply by 10000")
    told("s2", (values["s2"] / 40).clip(0, 255).astype(np.uint8), S2.bands, "coded to 0..255")
    told("s1", 10 ** (values["s1"] / 10), S1.bands, "not in dB", "10 log10")
    told("s1", values["s1"].astype(np.complex64), S1.bands, "complex64")
    full = Small(SENSORS["s2"])
    refused(lambda: quiet(full, {"s2": write_tif(tmp_path / "wrong.tif", dn(60, 60, sensor=SENSORS["s2"]) // 8 + 1000)}, tmp_path / "map.tif"), "+1000 DN", "RADIO_ADD_OFFSET")
    with rasterio.open(images["s2"], "r+") as f: f.scales = [1e-4] * 4
    refused(lambda: quiet(both, images, tmp_path / "map.tif"), "carry a scale", "s2.tif")
    assert not list(tmp_path.glob("*map*"))


def test_sensors_that_are_missing_or_unknown(both, tmp_path):
    images, _ = pair(tmp_path)
    refused(lambda: quiet(both, {"s2": images["s2"]}, tmp_path / "map.tif"), "no values of s1")
    refused(lambda: quiet(both, images | {"s3": images["s2"]}, tmp_path / "map.tif"), "unknown sensor 's3'", error=ConfigError)


# -- other grids ------------------------------------------------------------------------------------------------------------------------------------

def test_other_grids_are_refused_with_their_offset(both, tmp_path):
    images, values = pair(tmp_path)
    def told(*words, **place): return refused(lambda: quiet(both, images | {"s1": write_tif(tmp_path / "other.tif", values["s1"], S1.bands, **place)}, tmp_path / "map.tif"), "other.tif", "allow_resample", *words)
    told("4.00 px west", "3.00 px north", transform=PLACE * Affine.translation(-4, -3))
    told("is in EPSG:32632, not in EPSG:32631", crs=CRS.from_epsg(32632))
    told("has no CRS", crs=None)
    write_tif(tmp_path / "coarse.tif", values["s1"][:, ::2, ::2], S1.bands, transform=PLACE * Affine.scale(2))
    refused(lambda: quiet(both, images | {"s1": tmp_path / "coarse.tif"}, tmp_path / "map.tif"), "75 x 102 px where 150 x 203 are expected")


def test_a_shift_by_whole_pixels_is_undone(both, tmp_path):
    images, values = pair(tmp_path)
    wide = waves(S1, 190, 260)
    wide[:, 20:170, 30:233] = values["s1"]
    images["s1"] = write_tif(tmp_path / "wide.tif", wide, S1.bands, transform=PLACE * Affine.translation(-30, -20))
    done = quiet(both, images, tmp_path / "map.tif", allow_resample=True)
    with rasterio.open(done.classes) as f: assert f.transform == PLACE and np.array_equal(f.read(1), predict_array(both, values, **EXACT).argmax(0))


@pytest.mark.parametrize("crs, transform, limit", [(UTM, Affine(20, 0, 499967, 0, -25, 5600056), 1e-3), (CRS.from_epsg(4326), None, 0.03)])
def test_windows_are_resampled_as_the_whole(tmp_path, crs, transform, limit):
    images, values = pair(tmp_path)
    height, width = 60, 130
    smooth = np.stack([np.add.outer(np.arange(height) / 10, np.arange(width) / 20) - 20] * 2).astype(np.float32)
    if transform is None:
        west, south, east, north = transform_bounds(UTM, crs, 500000, 5600000 - 1400, 500000 + 1900, 5600000 + 100)
        transform = from_bounds(west, south, east, north, width, height)
    images["s1"] = write_tif(tmp_path / "other.tif", smooth, S1.bands, np.nan, transform=transform, crs=crs)
    with open_scene(images, {"s1": S1, "s2": S2}, allow_resample=True) as scene:
        whole = scene.read(slice(0, 150), slice(0, 203))["s1"]
        assert np.isfinite(whole).any() and np.isnan(whole[:, -4:]).all()               # the other image ends before this one
        for tile in cut_tiles((150, 203), 64, 8, 4):
            part = scene.read(*tile.seen)["s1"]
            there = np.isfinite(part) & np.isfinite(whole[(slice(None), *tile.seen)])
            assert (np.isfinite(part) == np.isfinite(whole[(slice(None), *tile.seen)])).mean() > 0.98
            assert not there.any() or np.abs(part - whole[(slice(None), *tile.seen)])[there].max() < limit


def test_bands_of_several_resolutions(optical, tmp_path):
    values = dn(60, 80)
    coarse = np.repeat(np.repeat(values[3, ::2, ::2], 2, 0), 2, 1)
    files = [write_tif(tmp_path / f"x_{b}.tif", v[None]) for b, v in zip(S2.bands[:3], values)] + [write_tif(tmp_path / "x_B8.tif", values[3:, ::2, ::2], transform=PLACE * Affine.scale(2))]
    refused(lambda: quiet(optical, {"s2": files[::-1]}, tmp_path / "map.tif"), "x_B8.tif", "30 x 40 px where 60 x 80")
    done = quiet(optical, {"s2": files[::-1]}, tmp_path / "map.tif", allow_resample=True)
    with rasterio.open(done.classes) as f: assert f.transform == PLACE and f.shape == (60, 80)
    with open_scene({"s2": files}, {"s2": S2}, True) as scene: found = scene.read(slice(0, 60), slice(0, 80))["s2"]
    assert np.array_equal(found[:3], values[:3]) and np.corrcoef(found[3].ravel(), coarse.ravel())[0, 1] > 0.95


def test_grids_that_cannot_be_brought_together(both, tmp_path):
    images, values = pair(tmp_path)
    def told(path, *words): refused(lambda: quiet(both, images | {"s1": path}, tmp_path / "map.tif", allow_resample=True), *words)
    told(write_tif(tmp_path / "far.tif", values["s1"], S1.bands, transform=PLACE * Affine.translation(5000, 0)), "far.tif", "lies elsewhere")
    told(write_tif(tmp_path / "nowhere.tif", values["s1"], S1.bands, crs=None), "nowhere.tif", "no CRS")
    told(write_tif(tmp_path / "pole.tif", values["s1"], S1.bands, crs=CRS.from_epsg(3031), transform=Affine(1e7, 0, 0, 0, -1e7, 0)), "pole.tif", "no value of s1 in any pixel")


# -- real tiles -------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("folder", ["scenes", "seasons"])
def test_real_tiles_are_read_as_a_source_reads_them(sample, tmp_path, folder):
    source = PlainSource(sample / folder, coding="raw")
    for key in source.keys():
        place, (date, files) = source.read(key), next(iter(source.files(key).items()))
        with open_scene({n: files[n] for n in ("s2", "s1")}, source.sensors) as scene: found = scene.read(*(slice(0, n) for n in scene.grid.shape))
        for name in ("s1", "s2"): assert np.array_equal(found[name], place.images[name][place.seasons.index(date)], equal_nan=True)
    predictor = Small(*source.sensors.values())
    done = quiet(predictor, {n: files[n] for n in ("s2", "s1")}, tmp_path / "map.tif")
    with rasterio.open(done.classes) as f, rasterio.open(files["s2"]) as image: assert f.bounds == image.bounds and f.crs == image.crs and f.shape == image.shape


def test_a_real_product_of_single_bands(sample, tmp_path):
    source = SSL4EOSource(sample / "ssl4eo-s12", grid="geo", coding="raw")
    product = min((sample / "ssl4eo-s12" / "s2c" / "0000200").iterdir())
    radar = min((sample / "ssl4eo-s12" / "s1" / "0000200").iterdir())
    images = {"s2": list(product.glob("*.tif")), "s1": list(radar.glob("*.tif"))}
    refused(lambda: quiet(Small(*source.sensors.values()), images, tmp_path / "map.tif"), "264", "allow_resample")
    expected = source.read("0000200").images
    with open_scene(images, source.sensors, allow_resample=True) as scene:
        for tile in cut_tiles((264, 264), 128, 32, 32):
            for name, found in scene.read(*tile.seen).items():
                whole = expected[name][0][(slice(None), *tile.seen)]
                assert (np.isfinite(found) == np.isfinite(whole)).mean() > 0.99 and np.nanmax(np.abs(found - whole)) < 0.02 * np.nanstd(whole)


# -- faults -----------------------------------------------------------------------------------------------------------------------------------------

def test_a_truncated_file_is_named_and_nothing_is_left(optical, tmp_path):
    images = one(tmp_path, 600, 300, compress="deflate")
    whole = images["s2"].read_bytes()
    images["s2"].write_bytes(whole[:len(whole) * 2 // 3])
    (tmp_path / "out").mkdir()
    refused(lambda: quiet(optical, images, tmp_path / "out" / "map.tif"), "s2.tif", "cannot be read")
    assert not names(tmp_path / "out")


def test_a_strip_that_is_damaged_later_on(optical, tmp_path):
    images = one(tmp_path, 400, 300, compress="deflate", blockysize=8, tiled=False)
    with rasterio.open(images["s2"]) as f: at = int(f.get_tag_item("BLOCK_OFFSET_0_11", "TIFF", 1))         # between the samples of the first check
    with open(images["s2"], "r+b") as f: f.seek(at); f.write(b"\xff" * 200)
    kept = write_tif(tmp_path / "out" / "map.tif", np.ones((1, 4, 4), np.uint8))
    before = kept.read_bytes()
    refused(lambda: quiet(optical, images, kept, overwrite=True), "s2.tif", "cannot be read at rows")
    assert names(tmp_path / "out") == ["map.tif"] and kept.read_bytes() == before


@pytest.mark.parametrize("content, words", [(b"II*\0 and then nothing", ()), (b"GIF89a", ()), (b'<VRTDataset rasterXSize="9" rasterYSize="9"><VRTRasterBand dataType="UInt16" band="1"><SimpleSource>'
                         b"<SourceFilename>/nowhere/at/all.tif</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>", ())])
def test_files_that_are_no_rasters(tmp_path, content, words):
    (tmp_path / "s2.tif").write_bytes(content)
    torch.manual_seed(0)
    refused(lambda: quiet(Small(S2.select(("B2",))), {"s2": tmp_path / "s2.tif"}, tmp_path / "map.tif"), "s2.tif", "cannot be read", *words)
    refused(lambda: quiet(Small(S2), {"s2": tmp_path / "missing.tif"}, tmp_path / "map.tif"), "missing.tif", "cannot be read")
    assert names(tmp_path) == ["s2.tif"]


def test_what_is_there_stays_unless_asked(optical, tmp_path):
    images = one(tmp_path, 60, 60)
    done = quiet(optical, images, tmp_path / "map.tif")
    before = [done.classes.read_bytes(), done.probabilities.read_bytes()]
    refused(lambda: quiet(optical, images, tmp_path / "map.tif"), "map.tif", "overwrite=True", error=ConfigError)
    done.classes.unlink()
    refused(lambda: quiet(optical, images, tmp_path / "map.tif", probabilities=False), "map-probabilities.tif", "overwrite=True", error=ConfigError)
    (tmp_path / "map.tif.aux.xml").write_text("<PAMDataset/>")
    again = quiet(optical, images, tmp_path / "map.tif", overwrite=True)
    assert [again.classes.read_bytes(), again.probabilities.read_bytes()] == before and names(tmp_path) == ["map-probabilities.tif", "map.tif", "s2.tif"]
    quiet(optical, images, tmp_path / "map.tif", overwrite=True, probabilities=False)
    assert names(tmp_path) == ["map.tif", "s2.tif"]          # probabilities of another map do not stay beside it


def test_an_image_is_no_place_for_a_map(optical, tmp_path):
    images = one(tmp_path, 60, 60)
    os.link(images["s2"], tmp_path / "linked.tif")
    for out in ("s2.tif", "linked.tif"): refused(lambda: quiet(optical, images, tmp_path / out, overwrite=True), "one of the images", error=ConfigError)
    (tmp_path / "folder.tif").mkdir()
    refused(lambda: quiet(optical, images, tmp_path / "folder.tif", overwrite=True), "is a folder", error=ConfigError)
    refused(lambda: quiet(optical, images, tmp_path / "map.png"), "map.png", "name it map.tif", error=ConfigError)
    assert read(images["s2"]).shape == (4, 60, 60)


def stop(logits): raise KeyboardInterrupt


def blind(logits): logits[0, 0, 50, 50] = torch.nan; return logits


def crop(logits): return logits[..., :-1]


@pytest.mark.parametrize("fault, error, words", [(stop, KeyboardInterrupt, ()), (blind, DataError, ("not finite", "row 0, column 64")), (crop, DataError, ("the predictor gives (1, 9, 96, 95) where (1, 9, 96, 96) is expected",))])
def test_stopped_midway_nothing_is_left(tmp_path, fault, error, words):
    images = one(tmp_path, 200, 200)
    (tmp_path / "out" / ".map.tif.partial").mkdir(parents=True)             # of a killed process
    (tmp_path / "out" / ".map.tif.partial" / "x").write_text("x")
    (tmp_path / "out" / "map.tif").write_text("old")
    with pytest.raises(error) as e: quiet(Broken(fault), images, tmp_path / "out" / "map.tif", overwrite=True)
    assert all(w in str(e.value) for w in words) and names(tmp_path / "out") == ["map.tif"] and (tmp_path / "out" / "map.tif").read_text() == "old"


def test_a_read_only_folder(optical, tmp_path):
    images = one(tmp_path, 60, 60)
    with disk(tmp_path / "disk", "1m") as small:
        remount(small, "ro")
        predictor = Broken(stop)
        refused(lambda: quiet(predictor, images, small / "map.tif"), "map.tif", "Read-only file system", error=ConfigError)
        assert predictor.calls == 0
    (tmp_path / "file").write_text("x")
    refused(lambda: quiet(optical, images, tmp_path / "file" / "map.tif"), "cannot be written", error=ConfigError)


FAST = dict(window=400, margin=0)      # one window


@pytest.mark.parametrize("size", ["100k", "1300k", "1500k", "1700k"])
def test_a_full_disk(optical, tmp_path, size):
    images = one(tmp_path, 300, 400)          # 1.2 MB of working files
    with disk(tmp_path / "disk", size) as small:
        kept = small / "map.tif"
        kept.write_text("old")
        refused(lambda: quiet(optical, images, kept, overwrite=True, **FAST), "map", "free space", *(["MB are free"] if size == "100k" else []), error=ConfigError)
        assert names(small) == ["map.tif"] and kept.read_text() == "old"


@pytest.mark.parametrize("size", range(2500, 3000, 50))
def test_a_disk_that_fills_up_while_files_are_made(optical, tmp_path, size):
    images = one(tmp_path, 300, 400)
    with disk(tmp_path / "disk", f"{size}k") as small:
        try: done = quiet(optical, images, small / "map.tif", **FAST)
        except ConfigError as e: assert "cannot be written" in str(e) and "\n" not in str(e) and names(small) == []
        else: assert names(small) == ["map-probabilities.tif", "map.tif"] and np.array_equal(read(done.classes, 1), predict_array(optical, {"s2": read(images["s2"])}, **FAST).argmax(0))


def test_a_loss_that_gdal_does_not_tell_of(optical, tmp_path, monkeypatch):
    def lossy(source, target, **options):
        with rasterio.open(source, "r+") as f: f.write(np.zeros((f.count, 9, 9), f.dtypes[0]) + 7, window=rasterio.windows.Window(20, 20, 9, 9))
        return copy(source, target, **options)
    monkeypatch.setattr(predict, "copy", lossy)
    refused(lambda: quiet(optical, one(tmp_path, 60, 60), tmp_path / "map.tif"), "not all there", error=ConfigError)
    assert names(tmp_path) == ["s2.tif"]


def test_progress_and_memory_of_gdal(optical, tmp_path):
    images, lines = one(tmp_path, 60, 60), io.StringIO()
    before = rasterio.env.get_gdal_config("GDAL_CACHEMAX")
    with contextlib.redirect_stderr(lines): quiet(optical, images, tmp_path / "map.tif")
    assert lines.getvalue() == "" and rasterio.env.get_gdal_config("GDAL_CACHEMAX") == before
    class Slow(Small):
        def forward(self, values): clock[0] += 6; return super().forward(values)
    clock = [0.0]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(lines):
        patch.setattr("cromss.prepare.time.monotonic", lambda: clock[0])
        predict_scene(Slow(S2), one(tmp_path / "x", 200, 100), tmp_path / "y.tif", **EXACT)
    assert "1 of 10 windows" in lines.getvalue() and "left" in lines.getvalue()


def test_names_with_blanks_and_beyond_ascii(optical, tmp_path):
    folder = tmp_path / "Zürich été 2021"
    images = one(folder, 40, 40)
    done = quiet(optical, images, folder / "new" / "Karte von Zürich.tif")
    assert names(folder / "new") == ["Karte von Zürich-probabilities.tif", "Karte von Zürich.tif"] and read(done.classes).shape == (1, 40, 40)
