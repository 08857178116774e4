"Samples: drawn by numbers alone, turned as one, the same from any process; and nothing is trained on that is held out."
import pickle
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from cromss.classes import IGNORE, SCHEMES
from cromss.config import ConfigError, DataError, SmoothingConfig, StoreError
from cromss.dataset import Draw, PatchDataset, StepSampler, collate, crops_per_patch, cut, draw, flip_and_turn, later_prior, rotate, split_locations, to_images, windows
from cromss.sensors import SENSORS, encode
from cromss.smoothing import smoothing_prior
from cromss.store import Location, Store, write_store

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")     # affine's `*`
DW, TWO = SCHEMES["dynamic-world"], {s: SENSORS[s] for s in ("s1", "s2")}
SHARP = SmoothingConfig(kind="s", sigma=0.1)       # a Gaussian of one tap: the prior is the one-hot label
UTM = (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0)


def blocks(rng, size, side=4):
    "Random labels in square blocks, uint8 (H, W)."
    h, w = size
    return rng.integers(0, 9, (-(-h // side), -(-w // side)), np.uint8).repeat(side, 0).repeat(side, 1)[:h, :w]


def place(key, size=(48, 52), seasons=4, missing=(), unlabelled=(), invalid=False, side=4, reference=True):
    "A location whose images show its labels: level 20 (label + 1) of every band plus the band's number. `missing`: (sensor, season); `unlabelled`: seasons."
    rng = np.random.default_rng([*key.encode()])
    labels = [blocks(rng, size, side) for _ in range(seasons)]
    def image(n, t): return (20 * (labels[t][None] + 1) + np.arange(n)[:, None, None]).astype(np.uint8)
    images = {s: [None if (s, t) in missing else image(spec.num_bands, t) for t in range(seasons)] for s, spec in TWO.items()}
    valid = {"s1": [None if ("s1", t) in missing else labels[t] != 3 for t in range(seasons)]} if invalid else None
    shown = [None if t in unlabelled else a for t, a in enumerate(labels)]
    return Location(key, tuple(f"2020-{t:02d}" for t in range(1, seasons + 1)), images, shown, labels if reference else None, valid, "EPSG:32632", UTM)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    "Three places of odd sizes; 'b' has no image of S1 in season 1 and no label in season 2."
    places = [place("a", (48, 52), invalid=True), place("b", (64, 37), missing={("s1", 1)}, unlabelled=(2,)), place("c", (51, 51), seasons=2)]
    return write_store(tmp_path_factory.mktemp("dataset") / "store", places, TWO, DW)


def one(folder, *places, **options): return write_store(folder / "one", places, TWO, DW, **options)


def levels(image): return (image * 255).round().int()


def equal(a, b):
    "Whether two samples or batches are equal to the bit."
    return set(a) == set(b) and all(torch.equal(v, b[k]) if torch.is_tensor(v) else v == b[k] for k, v in a.items())


# what a sample gets

def test_a_draw_is_pure():
    arguments = (3, 5, 7, (0, 2), (0, 264, 0, 300), 256, True)
    before = np.random.get_state()[1].copy(), torch.random.get_rng_state()
    assert draw(*arguments) == draw(*arguments)
    assert (np.random.get_state()[1] == before[0]).all() and torch.equal(torch.random.get_rng_state(), before[1])
    others = [draw(*(a + (i == n) if n < 3 else a for n, a in enumerate(arguments))) for i in range(3)]
    assert len({draw(*arguments), *others}) == 4                       # seed, epoch and index all count


def test_draws_cover_seasons_offsets_and_turns():
    many = [draw(0, e, i, (0, 2, 3), (10, 19, 20, 31), 4) for e in range(40) for i in range(40)]
    assert Counter(d.season for d in many).keys() == {0, 2, 3} and min(Counter(d.season for d in many).values()) > 1600 / 3 * 0.85
    assert {d.row for d in many} == set(range(10, 16)) and {d.column for d in many} == set(range(20, 28))
    assert {d.turns for d in many} == {0, 1, 2, 3} and {d.angle for d in many} == {0.0}
    flips = Counter(d.flip for d in many)
    assert abs(flips[False, False] / 1600 - 0.5) < 0.05 and all(abs(flips[f] / 1600 - 1 / 6) < 0.04 for f in ((True, False), (False, True), (True, True)))


def test_published_rotation():
    many = [draw(0, e, 0, (0,), (0, 9, 0, 9), 4, rotation=True) for e in range(2000)]
    angles = [d.angle for d in many if d.angle]
    assert abs(len(angles) / 2000 - 0.2) < 0.03 and -90 <= min(angles) < -80 and 80 < max(angles) <= 90 and {d.turns for d in many} == {0}


def test_epochs_and_repeats_differ(store):
    data = PatchDataset(store, crop=32)
    assert equal(data[2, 1], data[2, 1]) and len({tuple(data[e, 0]["image_s2"].flatten().tolist()) for e in range(6)}) > 3
    assert data[0, len(data)]["key"] == data[0, 0]["key"] and not equal(data[0, len(data)], data[0, 0])


# seasons

def test_only_labelled_seasons_with_all_images_are_drawn(store):
    data = PatchDataset(store, locations=[1], crop=32)
    assert {int(data[e, 0]["season"]) for e in range(40)} == {0, 3}
    assert {int(PatchDataset(store, [1], sensors=["s2"], crop=32)[e, 0]["season"]) for e in range(40)} == {0, 1, 3}
    shown = PatchDataset(store, [1], crop=32, augment=False)
    assert {int(shown[i]["season"]) for i in range(len(shown))} == {0, 3}


def test_missing_seasons_are_255(store):
    for e in range(8):
        b, c = PatchDataset(store, [1], crop=32)[e, 0], PatchDataset(store, [2], crop=32)[e, 0]
        assert b["season_masks"].shape == (4, 32, 32) and (b["season_masks"][2] == IGNORE).all() and (b["season_masks"][[0, 1, 3]] != IGNORE).all()
        assert (c["season_masks"][2:] == IGNORE).all() and (c["season_masks"][:2] != IGNORE).all() and int(c["season"]) < 2


def test_a_season_labelled_255_throughout_is_not_drawn(tmp_path):
    location = place("a", seasons=2)
    location.labels[0] = np.full((48, 52), IGNORE, np.uint8)
    data = PatchDataset(one(tmp_path, location), crop=32)
    assert {int(data[e, 0]["season"]) for e in range(20)} == {1}


# geometry

def test_sample_types(store):
    s = PatchDataset(store, crop=32, smoothing=SmoothingConfig())[0, 0]
    kinds = {k: (tuple(v.shape), v.dtype) for k, v in s.items() if torch.is_tensor(v)}
    assert kinds == {"image_s1": ((2, 32, 32), torch.float32), "image_s2": ((13, 32, 32), torch.float32), "valid": ((32, 32), torch.bool), "mask": ((32, 32), torch.int64),
                     "season_masks": ((4, 32, 32), torch.uint8), "prior": ((9, 32, 32), torch.float32), "reference": ((32, 32), torch.int64), "season": ((), torch.int64)}
    assert s["key"] == "a" and all(v.is_contiguous() for v in s.values() if torch.is_tensor(v))


@pytest.mark.parametrize("location", [0, 1])
def test_crop_flip_and_turn_keep_all_parts_together(store, location):
    data = PatchDataset(store, [location], crop=32, smoothing=SHARP)
    for e in range(24):
        s = data[e, 0]
        assert torch.equal(s["mask"], s["reference"]) and torch.equal(s["season_masks"][s["season"]].long(), s["mask"])
        assert torch.equal(s["prior"].argmax(0), s["mask"]) and torch.equal(s["prior"].max(0).values, torch.ones(32, 32))
        for image in (s["image_s1"], s["image_s2"]):
            assert torch.equal(levels(image), 20 * (s["mask"] + 1).int() + torch.arange(len(image)).view(-1, 1, 1))
        if location == 0: assert torch.equal(s["valid"], s["mask"] != 3) and not s["valid"].all()


def test_every_flip_and_turn_by_hand(store):
    data, whole = PatchDataset(store, [0], crop=32), store.read_labels(0)[2][5:37, 7:39]
    for flip, turns, expected in [((False, False), 0, whole), ((True, False), 0, whole[::-1]), ((False, True), 0, whole[:, ::-1]), ((True, True), 0, whole[::-1, ::-1]),
                                  ((False, False), 1, np.rot90(whole)), ((True, False), 3, np.rot90(whole[::-1], 3))]:
        assert np.array_equal(data.sample(0, Draw(2, 5, 7, flip, turns))["mask"], expected)


def test_free_rotation_invents_no_label_and_keeps_parts_together(tmp_path):
    "Inside large fields, where bilinear and nearest agree, image and label still match."
    data = PatchDataset(one(tmp_path, place("a", (96, 96), side=24, invalid=True)), crop=96, rotation=True, smoothing=SHARP)
    disc = torch.from_numpy(np.hypot(*(np.mgrid[:96, :96] - 47.5)) < 47)
    for angle in (-90, -71.3, -30, 12.5, 45, 89):
        s = data.sample(0, Draw(1, 0, 0, angle=angle))
        assert set(s["mask"].unique().tolist()) <= set(np.unique(data.store.read_labels(0)[1]).tolist())
        assert torch.equal(s["season_masks"][1].long(), s["mask"]) and torch.equal(s["reference"], s["mask"]) and s["valid"].dtype == torch.bool
        gap = (levels(s["image_s2"])[0] - 20 * (s["mask"] + 1).int()).abs()
        assert (gap[disc] <= 1).float().mean() > 0.85 and gap[disc].float().mean() < 8, angle       # all but the pixels at the fields' edges
        sums = s["prior"].sum(0)
        assert (sums - 1).abs().max() < 1e-3 and (s["prior"].argmax(0) == s["mask"])[disc].float().mean() > 0.95
        assert (s["valid"] == (s["mask"] != 3)).all()
        moved = data.sample(0, Draw(1, 0, 0))["mask"]
        assert angle == -90 or not torch.equal(moved, s["mask"])


def test_a_rotation_about_the_centre_has_the_stated_sense():
    picture = np.zeros((9, 9), np.uint8)
    picture[0, 4] = 1                                             # north
    assert rotate(picture, 90)[4, 0] == 1 and rotate(picture, -90)[4, 8] == 1 and rotate(picture, 90).sum() == 1
    for array in (np.random.default_rng(0).random((3, 8, 8), np.float32), np.arange(64, dtype=np.uint8).reshape(8, 8), np.eye(8, dtype=bool)):
        assert np.array_equal(rotate(array, 90), flip_and_turn(array, turns=1)) and rotate(array, 30).dtype == array.dtype


ARRAYS = [np.random.default_rng(0).integers(0, 255, (3, 20, 31), np.uint8), np.random.default_rng(0).random((20, 31), np.float32), np.eye(20, 31, dtype=bool)]


@pytest.mark.parametrize("array", ARRAYS, ids=["uint8", "float32", "bool"])
def test_flips_and_turns_are_numpys(array):
    part = array[..., 3:15, 6:30]
    for flip in ((0, 0), (True, False), (False, True), (1, 1)):
        for turns in range(-1, 5):
            expected = np.rot90(np.flip(part, [axis for axis, do in zip((-2, -1), flip) if do]), turns, (-2, -1))
            found, into = flip_and_turn(part, flip, turns), np.empty(expected.shape, array.dtype)
            assert np.array_equal(found, expected) and found.dtype == array.dtype and found.flags.c_contiguous and not np.shares_memory(found, array)
            assert flip_and_turn(part, flip, turns, into) is into and np.array_equal(into, expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, bool])
@pytest.mark.parametrize("smooth", [True, False])
def test_layers_are_rotated_as_if_alone(dtype, smooth):
    "Four at a time or one by one: not a bit differs."
    rng = np.random.default_rng(0)
    for layers in (1, 2, 3, 4, 5, 7, 9, 13):
        array = (rng.random((layers, 41, 37)) * (255 if dtype == np.uint8 else 1.9)).astype(dtype)
        for angle in (-90, *rng.uniform(-90, 90, 6)):
            found = rotate(array, angle, smooth)
            assert found.dtype == dtype and np.array_equal(found, np.stack([rotate(a, angle, smooth) for a in array]))


def test_small_patches_are_padded(store):
    data = PatchDataset(store, [1], crop=64, smoothing=SmoothingConfig())         # 64 x 37 px
    for e in range(8):
        s = data[e, 0]
        real = s["mask"] != IGNORE
        assert real.sum() == 64 * 37 and torch.equal(s["valid"], real) and torch.equal(s["reference"] != IGNORE, real)
        assert all((s[k][:, ~real] == 0).all() for k in ("image_s1", "image_s2", "prior")) and (s["season_masks"][:, ~real] == IGNORE).all()
        assert torch.equal(levels(s["image_s2"])[0][real], 20 * (s["mask"] + 1)[real].int())


def test_padding_stays_outside_when_rotated(store):
    data = PatchDataset(store, [1], crop=64, rotation=True)
    for angle in (-80.0, 30.0):
        s = data.sample(1, Draw(0, 0, 0, angle=angle))
        pad = s["mask"] == IGNORE
        assert torch.equal(~s["valid"], pad) and torch.equal(s["reference"] == IGNORE, pad) and set(s["mask"].unique().tolist()) <= {*range(9), IGNORE}


def test_cut_at_corners():
    square = np.arange(12).reshape(3, 4)
    assert cut(square, 0, 0, 2).tolist() == [[0, 1], [4, 5]] and cut(square, 2, 3, 2, fill=9).tolist() == [[11, 9], [9, 9]]
    assert cut(square[None], 0, 0, 5).shape == (1, 5, 5) and cut(square, 1, 0, 2).base is not None      # a view where nothing is missing


# smoothing

@pytest.mark.parametrize("kind", ["ts", "t", "s"])
@pytest.mark.parametrize("location", [0, 1, 2])
def test_the_prior_is_that_of_the_whole_patch(store, kind, location):
    data = PatchDataset(store, [location], crop=32, smoothing=SmoothingConfig(kind=kind, sigma=2.0))
    labels = torch.from_numpy(store.read_labels(location))[None]
    for d in (Draw(0, 3, 5), Draw(0, 11, 0, (True, False), 3)):
        whole = smoothing_prior(labels, torch.tensor([0]), 9, kind, 2.0, 4.0)[0].numpy()
        s = data.sample(location, d)
        assert np.array_equal(s["prior"], flip_and_turn(cut(whole, d.row, d.column, 32), d.flip, d.turns))
        assert (s["prior"].sum(0) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("angle", [0.0, -37.5])
@pytest.mark.parametrize("gaps", [False, True])
def test_the_prior_of_a_crop_far_from_the_border(tmp_path, angle, gaps):
    "Only the labels around it are blurred; a free rotation comes after."
    location = place("a", (120, 100))
    if gaps: location.labels = [np.where(np.random.default_rng(0).random(a.shape) < 0.3, IGNORE, a).astype(np.uint8) for a in location.labels]
    data = PatchDataset(one(tmp_path, location), crop=32, smoothing=SmoothingConfig())
    whole = smoothing_prior(torch.from_numpy(data.store.read_labels(0))[None], torch.tensor([2]), 9)[0].numpy()
    for row, column, flip in [(0, 0, (False, False)), (40, 30, (True, False)), (88, 68, (True, True)), (13, 55, (False, True))]:
        s = data.sample(0, Draw(2, row, column, flip, angle=angle))
        expected = flip_and_turn(cut(whole, row, column, 32), flip)
        np.testing.assert_allclose(s["prior"], rotate(expected, angle, smooth=True) if angle else expected, atol=1e-6, rtol=0)


def test_without_a_prior(store):
    for smoothing in (None, SmoothingConfig(kind="none"), SmoothingConfig(prior_weight=0)): assert "prior" not in PatchDataset(store, smoothing=smoothing, crop=32)[0, 0]


# lean samples

@pytest.mark.parametrize("bands", [None, {"s2": ["B4", "B3"]}])
@pytest.mark.parametrize("rotation", [False, True])
def test_a_lean_batch_holds_the_same_numbers(store, bands, rotation):
    full, lean = (PatchDataset(store, bands=bands, crop=32, rotation=rotation, smoothing=SmoothingConfig(), lean=b) for b in (False, True))
    items = [(e, i) for e in range(8) for i in range(len(full))]
    a, b = (collate([data[item] for item in items]) for data in (full, lean))
    assert b["image_s1"].dtype == b["image_s2"].dtype == torch.uint8 and all(v.is_contiguous() for v in b.values() if torch.is_tensor(v))
    assert equal(to_images(b), {k: v for k, v in a.items() if k not in ("season_masks", "reference")}) and b["image_s2"].dtype == torch.uint8


def test_images_of_floats_stay_as_they_are(store):
    batch = collate([PatchDataset(store, crop=32)[0, 0]])
    assert all(v is batch[k] for k, v in to_images(batch).items())
    coded = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    found = to_images({"image_s1": coded.contiguous(memory_format=torch.channels_last), "other": coded})
    assert torch.equal(found["image_s1"], coded / 255) and found["other"] is coded


def test_lean_samples_of_a_raw_store(tmp_path):
    location = place("a", seasons=2)
    location.images = {s: [a.astype(np.float32) for a in images] for s, images in location.images.items()}
    full, lean = (PatchDataset(one(tmp_path, location, coding="raw") if not b else Store.open(tmp_path / "one"), crop=32, lean=b) for b in (False, True))
    for e in range(4): assert equal(lean[e, 0], {k: v for k, v in full[e, 0].items() if k not in ("season_masks", "reference")})


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("augment", [False, True])
def test_a_stand_in_has_the_shape_of_the_others(store, lean, augment, monkeypatch):
    data = PatchDataset(store, [0, 2], crop=32, augment=augment, smoothing=SmoothingConfig(), lean=lean)
    items = [(0, i) for i in range(len(data))] if augment else range(len(data))
    sound = collate([data[i] for i in items])
    def damaged(*_): raise StoreError("it is damaged")
    for name in ("read", "read_labels") + (() if lean else ("read_reference",)):
        with monkeypatch.context() as m:
            m.setattr(Store, name, damaged)
            batch = collate([data[i] for i in items])
        assert {k: (v.shape, v.dtype) for k, v in batch.items() if torch.is_tensor(v)} == {k: (v.shape, v.dtype) for k, v in sound.items() if torch.is_tensor(v)}
        assert all("it is damaged" in q for q in batch["quarantined"]) and not batch["valid"].any() and (batch["prior"] == 0).all() and (batch["mask"] == IGNORE).all()


# windows of validation

def covered(length, crop):
    "How many windows lie over each pixel of a row."
    count = np.zeros(length, int)
    for _, c in windows((0, 1, 0, length), crop): count[c:c + crop] += 1
    return count


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 700), st.integers(1, 256))
def test_windows_cover_all_but_a_strip(length, crop):
    count, starts = covered(length, crop), [c for _, c in windows((0, 1, 0, length), crop)]
    assert (count == 0).sum() <= crop / 8 and starts == sorted(set(starts))
    assert all(0 <= c and (c + crop <= length or len(starts) == 1) for c in starts)
    assert count.sum() <= length + 2 * crop                                 # and no window too many


def test_windows_of_a_region_stay_in_it():
    for r, c in windows((7, 71, 30, 99), 32): assert 7 <= r <= 71 - 32 and 30 <= c <= 99 - 32
    assert windows((5, 15, 5, 15), 32) == [(5, 5)]


@pytest.mark.parametrize("size, crop", [((51, 51), 32), ((264, 264), 256), ((100, 37), 32), ((31, 70), 32)])
def test_validation_shows_every_pixel_untouched(tmp_path, size, crop):
    store = one(tmp_path, place("a", size, seasons=2))
    data, seen = PatchDataset(store, crop=crop, augment=False), np.zeros((2, *size), bool)
    assert len(data) == 2 * len(windows((0, size[0], 0, size[1]), crop))
    for i in range(len(data)):
        s = data[i]
        a, _, c, _, e, f = s["transform"].tolist()
        row, column, season = round((f - UTM[5]) / e), round((c - UTM[2]) / a), int(s["season"])
        h, w = min(crop, size[0] - row), min(crop, size[1] - column)
        assert np.array_equal(s["mask"][:h, :w], store.read_labels(0)[season][row:row + h, column:column + w]) and "prior" not in s
        seen[season, row:row + h, column:column + w] = True
    for axis in (1, 2): assert (~seen.any(axis)).sum(1).max() <= crop / 8
    with pytest.raises(IndexError): data[len(data)]
    with pytest.raises(IndexError): data[-1]
    assert equal(data[np.int64(1)], data[1])


@pytest.mark.parametrize("affine", [Affine(*UTM), Affine(*UTM) @ Affine.rotation(30) @ Affine.scale(1.5, 0.7), Affine(8.98e-5, 0, 75.1, 0, -8.98e-5, 30.2)])
def test_windows_lie_where_rasterio_says(tmp_path, affine):
    location = place("a", (80, 70))
    location.transform = tuple(affine)[:6]
    data = PatchDataset(one(tmp_path, location), crop=32, augment=False)
    corners = windows((0, 80, 0, 70), 32)
    for i, (row, column) in enumerate(corners):
        expected = rasterio.windows.transform(rasterio.windows.Window(column, row, 32, 32), affine)
        assert data[i]["transform"].tolist() == pytest.approx(tuple(expected)[:6], rel=1e-12) and data[i]["crs"] == "EPSG:32632"
    assert "transform" not in PatchDataset(data.store, crop=32)[0, 0]


def test_batches_of_places_with_and_without_a_grid(tmp_path):
    bare = place("b", (32, 32))
    bare.crs = bare.transform = None
    for n, order in enumerate(([place("a", (32, 32)), bare], [bare, place("a", (32, 32))])):
        (tmp_path / str(n)).mkdir()
        data = PatchDataset(one(tmp_path / str(n), *order), crop=32, augment=False)
        collate([data[0], data[len(data) - 1]])


def test_places_without_a_reference(tmp_path):
    data = PatchDataset(one(tmp_path, place("a"), place("b", reference=False)), crop=32)
    batch = collate([data[0, 0], data[0, len(data) - 1]])
    assert batch["key"] == ["a", "b"] and torch.equal(batch["reference"][0], batch["mask"][0]) and (batch["reference"][1] == IGNORE).all()
    (tmp_path / "x").mkdir()
    assert "reference" not in PatchDataset(one(tmp_path / "x", place("b", reference=False)), crop=32)[0, 0]


# bands and values

def test_bands_in_their_order(store):
    data = PatchDataset(store, bands={"s2": ["B4", "B3", "B2"], "s1": ("VH",)}, crop=32)
    s, at = data[0, 0], [TWO["s2"].bands.index(b) for b in ("B4", "B3", "B2")]
    base = 20 * (s["mask"] + 1).int()
    assert torch.equal(levels(s["image_s2"]), base + torch.tensor(at).view(-1, 1, 1)) and torch.equal(levels(s["image_s1"]), base[None] + 1)
    with pytest.raises(DataError, match="B99"): PatchDataset(store, bands={"s2": ["B99"]})


def test_one_sensor(store):
    s = PatchDataset(store, sensors=["s2"], locations=[0], crop=32)[0, 0]
    assert "image_s1" not in s and s["valid"].all()                    # S1's gaps do not matter to S2


def test_missing_sensor_is_refused(store):
    with pytest.raises(DataError, match="no sensor 'dem' in this store; it has s1, s2"): PatchDataset(store, sensors=("s1", "dem"))


@pytest.mark.parametrize("bands", [None, {"s2": ["B12", "B2"], "s1": ["VH"]}])
def test_raw_values_are_coded_as_the_others(tmp_path, bands):
    rng, seasons = np.random.default_rng(0), ("a", "b")
    raw = {n: [rng.normal(np.array(s.mean)[:, None, None], 1.5 * np.array(s.std)[:, None, None], (s.num_bands, 40, 40)).astype(np.float32) for _ in seasons] for n, s in TWO.items()}
    raw["s1"][0][:, :3] = np.nan
    labels = [blocks(rng, (40, 40)) for _ in seasons]
    valid = {"s1": [np.isfinite(a).all(0) for a in raw["s1"]]}
    coded = {n: [encode(a, TWO[n])[0] for a in images] for n, images in raw.items()}
    stores = [write_store(tmp_path / coding, [Location("p", seasons, images, labels, None, valid)], TWO, DW, coding=coding) for coding, images in (("uint8", coded), ("raw", raw))]
    a, b = (PatchDataset(s, bands=bands, crop=32) for s in stores)
    for e in range(6): assert equal(a[e, 0], b[e, 0]) and a[e, 0]["image_s2"].isfinite().all() and a[e, 0]["image_s1"].max() <= 1


# processes

@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_two_workers_give_the_same_batches(store, method):
    import multiprocessing
    if method not in multiprocessing.get_all_start_methods(): pytest.skip(f"no {method} on this system")
    data = PatchDataset(store, crop=32, smoothing=SmoothingConfig())
    data[0, 0]                                                        # opens the store before the processes are made
    step = [0]
    def loader(**how): return DataLoader(data, batch_sampler=StepSampler(len(data), 2, step=lambda: step[0], min_steps=3), collate_fn=collate, **how)
    alone, many = loader(), loader(num_workers=2, multiprocessing_context=method, persistent_workers=True)
    for step[0] in (0, 4):                                            # a second epoch, begun in its midst, by the same workers
        a, b = list(alone), list(many)
        assert len(a) == len(b) > 0 and all(map(equal, a, b))


def test_it_is_small_when_pickled(store):
    data = PatchDataset(store, crop=32, smoothing=SmoothingConfig())
    data[0, 0]
    blob = pickle.dumps(data)
    assert len(blob) < 5000 and equal(pickle.loads(blob)[1, 0], data[1, 0])


# plan

def test_samples_by_area():
    assert [crops_per_patch((0, h, 0, w), 64) for h, w in ((64, 64), (63, 63), (128, 128), (100, 200), (10, 10))] == [1, 1, 4, 4, 1]


def test_each_place_gets_its_share(tmp_path):
    data = PatchDataset(one(tmp_path, place("a", (64, 64)), place("b", (32, 32)), place("c", (64, 96))), crop=32)
    assert Counter(data[0, i]["key"] for i in range(len(data))) == {"a": 4, "b": 1, "c": 6}


def test_places_without_labels_are_passed_over(tmp_path):
    data = PatchDataset(one(tmp_path, place("a"), place("b", unlabelled=range(4))), crop=32)
    assert {data[e, i]["key"] for e in range(3) for i in range(len(data))} == {"a"}


def test_no_label_anywhere(tmp_path):
    store = one(tmp_path, place("a", unlabelled=range(4)))
    with pytest.raises(DataError, match="no location with a labelled season"): PatchDataset(store, crop=32, augment=False)
    with pytest.raises(DataError, match="lower seasons_required"): split_locations(store)


class Fake(SimpleNamespace):
    "Twenty thousand places of a store that is not there."
    def __len__(self): return self.count
    def shape(self, i): return (264, 264)
    def key(self, i): return f"place-{i}"
    def transform(self, i): return UTM
    @property
    def shapes(self): return np.full((self.count, 2), 264, np.int32)
    @property
    def transforms(self): return np.tile(np.array(UTM, float), (self.count, 1))
    def labelled(self, i, sensors=None): return [0, 1, 2, 3]
    def labelled_mask(self, sensors=None): return np.ones((self.count, 4), bool)


def test_a_large_plan_is_quick():
    fake = Fake(count=20_000, folder="fake", sensors=TWO, keys=None)
    began = time.process_time()
    split = split_locations(fake, 0.01, 256)
    parts = [PatchDataset(fake, split.train, crop=256), PatchDataset(fake, split.validation, crop=256, augment=False)]
    first = next(iter(StepSampler(len(parts[0]), 128)))
    assert time.process_time() - began < 2 and [len(p) for p in parts] == [19_800, 800] and len(first) == 128


# priors formed later, from whole batches

@pytest.mark.parametrize("rotation", [False, True])
@pytest.mark.parametrize("kind", ["ts", "t", "s"])
def test_priors_formed_later_are_the_same(tmp_path, kind, rotation):
    store = one(tmp_path, *(place(f"p{i}", (44, 40), unlabelled=(1,) if i == 2 else ()) for i in range(4)))
    smoothing = SmoothingConfig(kind=kind)
    now, later = (PatchDataset(store, crop=32, smoothing=smoothing, rotation=rotation, lean=True, seed=5) for _ in range(2))
    assert later.may_wait
    later.later = True
    items, angles = [(e, i) for e in range(6) for i in range(4)], 0
    expected, batch = collate([now[i] for i in items]), collate([later[i] for i in items])
    assert "prior" not in batch and batch["around"].dtype == torch.uint8
    places, got = batch["place"], later_prior(batch, 9, smoothing, 32)
    assert set(got) == set(expected) and all(torch.equal(got[k], expected[k]) for k in ("mask", "image_s1", "valid", "season"))
    for ours, theirs, chosen in zip(got["prior"], expected["prior"], places):
        angles += bool(chosen["angle"])
        assert (ours - theirs).abs().max() < (0.02 if chosen["angle"] else 1e-6)          # OpenCV turns in 1/32 px
    assert bool(angles) == rotation


def test_priors_of_unlike_patches_cannot_wait(tmp_path):
    store = one(tmp_path, place("a", (32, 32)), place("b", (40, 32)))
    assert not PatchDataset(store, crop=32, smoothing=SmoothingConfig()).may_wait
    assert not PatchDataset(one(tmp_path / "same", place("a", (32, 32))), crop=32).may_wait


# split

def spread(tmp_path, *corners):
    "A store with a location at each (longitude, latitude)."
    places = []
    for n, (x, y) in enumerate(corners):
        one_ = place(f"p{n}", (32, 32))
        one_.crs, one_.transform = "EPSG:4326", (1e-4, 0, x, 0, -1e-4, y)
        places.append(one_)
    return one(tmp_path, *places)


def test_by_blocks_of_the_earth(tmp_path):
    store = spread(tmp_path, *((x + 1e-4 * i, y) for x, y in ((10.1, 50.1), (12.1, 50.1), (14.1, 50.1), (10.1, -33.1), (179.9, 0.6), (-179.9, 0.6)) for i in range(3)))
    for seed in range(8):
        split = split_locations(store, 0.3, 32, seed=seed, block_km=50)
        groups = [{i // 3 for i in part} for part in (split.train.tolist(), split.validation.tolist())]
        assert not groups[0] & groups[1] and len(groups[1]) == 2 and str(split) == "12 locations to train on, 6 held out, by blocks of 50 km"
    with pytest.raises(DataError, match="in one block of 5000 km"): split_locations(spread(tmp_path / "near", (10, 50), (10.1, 50)), 0.3, 32, block_km=5000)
    nowhere = place("n", (32, 32))
    nowhere.crs = nowhere.transform = None
    with pytest.raises(DataError, match="location n has no place on the Earth"): split_locations(one(tmp_path / "lost", nowhere, place("m", (32, 32))), 0.3, 32, block_km=50)


def test_centers(tmp_path):
    store = spread(tmp_path, (10, 50), (-60.5, -3.25))
    assert np.allclose(store.centers(), [[10.0016, 49.9984], [-60.4984, -3.2516]])


# probabilities as the prior

def probable(tmp_path, which=(0, 1)):
    rng = np.random.default_rng(3)
    one_ = place("p", (40, 40), seasons=2)
    told = rng.dirichlet(np.ones(9), (40, 40)).transpose(2, 0, 1)
    told[:, :5] = 0
    one_.probabilities = [np.rint(255 * told).astype(np.uint8) if s in which else None for s in range(2)]
    return one(tmp_path, one_), told


@pytest.mark.parametrize("rotation", [False, True])
def test_probabilities_are_the_prior(tmp_path, rotation):
    store, told = probable(tmp_path)
    smoothing = SmoothingConfig(kind="p", prior_weight=0.95, uniform_weight=0.05)
    data = PatchDataset(store, crop=40, augment=False, smoothing=smoothing)
    sample = data[1]
    prior, mask = sample["prior"].numpy(), sample["mask"].numpy()
    assert np.allclose(prior.sum(0), 1, atol=1e-6) and np.abs(prior[:, 5:] - told[:, 5:]).max() < 0.01
    assert np.array_equal(prior[:, :5].argmax(0), mask[:5]) and (prior[:, :5].max(0) == 1).all()       # unknown: what the label says
    turned = PatchDataset(store, crop=16, smoothing=smoothing, rotation=rotation, lean=True)
    for index in range(6):
        location, chosen = turned._decide(0, index)
        got = turned[(0, index)]["prior"]
        known = PatchDataset(store, crop=16, rotation=rotation).sample(location, chosen)["mask"]
        assert got.shape == (9, 16, 16) and (rotation or torch.allclose(got.sum(0), torch.ones(16, 16), atol=1e-5)) and known.shape == (16, 16)


def test_probabilities_that_are_not_there(tmp_path):
    store, _ = probable(tmp_path, which=(1,))
    data = PatchDataset(store, crop=40, augment=False, smoothing=SmoothingConfig(kind="p"))
    first = data[0]
    assert torch.equal(first["prior"].argmax(0), first["mask"]) and store.read_probabilities(0, 0) is None and store.location(0).probabilities[0] is None
    bare = one(tmp_path / "bare", place("p", (32, 32)))
    with pytest.raises(DataError, match="needs class probabilities, and this store has none"): PatchDataset(bare, crop=16, smoothing=SmoothingConfig(kind="p"))


def test_by_locations(tmp_path):
    store = one(tmp_path, *(place(f"p{i}", (32, 32)) for i in range(10)), place("none", (32, 32), unlabelled=range(4)), place("two", (32, 32), seasons=2))
    split = split_locations(store, 0.2, 32)
    assert split.kind == "locations" and len(split.validation) == 2 and sorted([*split.train, *split.validation]) == [*range(10), 11]
    assert np.array_equal(split_locations(store, 0.2, 32).validation, split.validation)
    assert any(not np.array_equal(split_locations(store, 0.2, 32, seed=s).validation, split.validation) for s in range(5))
    assert len(split_locations(store, 0.2, 32, seasons=4).train) == 8 and 11 not in split_locations(store, 0.2, 32, seasons=4).train
    for fraction, held in ((0.001, 1), (0.5, 6), (0.9, 10)): assert len(split_locations(store, fraction, 32).validation) == held
    assert split_locations(store, 0, 32).kind == "none"
    assert str(split) == "9 locations to train on, 2 held out"


def test_two_locations_leave_one_on_each_side(tmp_path):
    store = one(tmp_path, place("a"), place("b"))
    for fraction in (0.01, 0.5, 0.74): assert [len(p) for p in (split_locations(store, fraction).train, split_locations(store, fraction).validation)] == [1, 1]


def test_two_locations_and_a_large_fraction(tmp_path):
    split = split_locations(one(tmp_path, place("a"), place("b")), 0.9)
    assert [len(split.train), len(split.validation)] == [1, 1]


def shown(data, epochs=1):
    "Columns of the patch that a dataset shows, a set. The image of the store tells each pixel's column."
    found = set()
    for e in range(epochs):
        for i in range(len(data)):
            s = data[e, i] if data.augment else data[i]
            found |= set((s["image_s2"][0][s["valid"]] * 255).round().int().tolist())
    return found


def columns_store(folder, width, height=40):
    "One place whose image is its column's number."
    columns = np.broadcast_to(np.arange(width, dtype=np.uint8), (13, height, width)).copy()
    return write_store(folder / f"w{width}", [Location("p", ("a",), {"s1": [columns[:2]], "s2": [columns]}, [np.zeros((height, width), np.uint8)])], TWO, DW)


@pytest.mark.parametrize("width, fraction", [(64, 0.1), (65, 0.1), (99, 0.1), (128, 0.3), (200, 0.01), (251, 0.5), (70, 0.45)])
def test_blocks_never_overlap(tmp_path, width, fraction):
    store = columns_store(tmp_path, width)
    split = split_locations(store, fraction, 32)
    assert split.kind == "blocks" and "one location in two blocks" in str(split)
    train = shown(PatchDataset(store, split.train, crop=32, region=split.train_region), 60)
    held = shown(PatchDataset(store, split.validation, crop=32, augment=False, region=split.validation_region))
    assert not train & held and len(train) >= 32 and len(held) >= 32 and max(train) < min(held) and len(train | held) >= width - 32 / 8


@pytest.mark.parametrize("width, fraction", [(64, 0.9), (100, 0.8)])
def test_blocks_of_a_large_fraction(tmp_path, width, fraction):
    store = columns_store(tmp_path, width)
    split = split_locations(store, fraction, 32)
    assert not (shown(PatchDataset(store, split.train, crop=32, region=split.train_region), 20)
                & shown(PatchDataset(store, split.validation, crop=32, augment=False, region=split.validation_region)))


def test_patches_of_one_place_are_on_one_side(tmp_path):
    store = one(tmp_path, *(place(f"{p}@{r},{c}", (32, 32)) for p in ("a", "b", "c", "d") for r in (0, 20) for c in (0, 20)))
    split = split_locations(store, 0.25, 32)
    assert not {store.key(i).split("@")[0] for i in split.train} & {store.key(i).split("@")[0] for i in split.validation}


def test_a_single_tiny_location_is_all_trained_on(tmp_path):
    store = one(tmp_path, place("a", (20, 24)))
    split = split_locations(store, 0.1, 32)
    assert split.kind == "none" and split.train.tolist() == [0] and len(split.validation) == 0 and "nothing is held out" in str(split)
    s = PatchDataset(store, split.train, crop=32)[0, 0]
    assert s["valid"].sum() == 20 * 24 and len(PatchDataset(store, split.train, crop=32, augment=False)) == 4


def test_sensors_decide_what_is_usable(store):
    assert len(split_locations(store, 0, 32, seasons=3).train) == 1 and len(split_locations(store, 0, 32, seasons=3, sensors=["s2"]).train) == 2


# sampler

def test_the_sampler_is_pure_in_the_step():
    step = [0]
    sampler = StepSampler(50, 4, seed=3, step=lambda: step[0])
    assert sampler.steps_per_epoch == 12 == len(sampler)
    whole = [batch for step[0] in (0, 12, 24) for batch in sampler]
    assert [len(b) for b in whole] == [4] * 36 and [b[0][0] for b in whole] == [0] * 12 + [1] * 12 + [2] * 12
    for step[0] in (0, 1, 5, 11, 12, 13, 35): assert list(sampler) == whole[step[0]:(step[0] // 12 + 1) * 12]     # a resumed epoch goes on
    for epoch in range(3): assert len({i for b in whole[12 * epoch:12 * epoch + 12] for _, i in b}) == 48
    assert [i for b in whole[:12] for _, i in b] != [i for b in whole[12:24] for _, i in b]
    step[0] = 0
    assert next(iter(StepSampler(50, 4, seed=4, step=lambda: 0))) != whole[0]


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(0, 40))
def test_ranks_and_accumulated_batches_partition_the_epoch(samples, batch, world, accumulate, min_steps, step):
    ranks = [list(StepSampler(samples, batch, step=lambda: step, rank=r, world=world, accumulate=accumulate, min_steps=min_steps)) for r in range(world)]
    one_rank = StepSampler(samples, batch, step=lambda: step, accumulate=accumulate, world=world, min_steps=min_steps)
    epoch, done = divmod(step, one_rank.steps_per_epoch)
    assert one_rank.steps_per_epoch >= min_steps and len(one_rank) == accumulate * one_rank.steps_per_epoch
    assert {len(r) for r in ranks} == {accumulate * (one_rank.steps_per_epoch - done)} and all(len(b) == batch for r in ranks for b in r)
    items = [item for r in ranks for b in r for item in b]
    assert len(set(items)) == len(items) and {e for e, _ in items} == {epoch}
    counts = Counter(i % samples for _, i in items)
    if done == 0 and len(items) >= samples: assert max(counts.values()) - min(counts.values() if len(counts) == samples else [0]) <= 1     # no sample more often than another


def test_few_samples_come_again_with_other_draws(store):
    data = PatchDataset(store, [0], crop=32)
    sampler = StepSampler(len(data), 2, min_steps=4)
    items = [item for batch in sampler for item in batch]
    assert len(items) == 8 > len(data) and len(set(items)) == 8
    assert len({tuple(data[item]["image_s1"].flatten().tolist()) for item in items}) > 4


def test_order_does_not_depend_on_ranks():
    alone = [i for b in StepSampler(24, 6) for _, i in b]
    two = [list(StepSampler(24, 3, rank=r, world=2)) for r in (0, 1)]
    for n in range(4): assert sorted(i for r in two for _, i in r[n]) == sorted(alone[6 * n:6 * n + 6])       # a step is that of the same global batch


def test_a_store_reopened_elsewhere(store):
    again = Store.open(store.folder)
    assert equal(PatchDataset(again, crop=32)[3, 2], PatchDataset(store, crop=32)[3, 2])


def test_every_pixel_has_a_number_of_its_own_wherever_it_is_turned(store):
    data, labels = PatchDataset(store, crop=16, lean=True, extras=("origin", "season_masks")), {}
    assert data.pixels == store.season_count * sum(h * w for h, w in store.shapes[data.locations])
    for epoch in range(6):
        for index in range(len(data)):
            sample = to_images(collate([data[(epoch, index)]]))
            assert sample["origin"].dtype == torch.int64 and sample["season_masks"].shape[1] == store.season_count
            for number, label in zip(sample["origin"].ravel().tolist(), sample["mask"].ravel().tolist()): assert number == -1 or labels.setdefault(number, label) == label
    assert 0 <= min(labels) and max(labels) < data.pixels and len(set(labels.values())) > 2


def test_beyond_a_patch_there_is_no_pixel(store):
    data = PatchDataset(store, crop=64, lean=True, extras=("origin",))
    sample = data[(0, 0)]
    inside = sample["origin"] >= 0
    assert (sample["origin"][~inside] == -1).all() and int(inside.sum()) == len(set(sample["origin"][inside].tolist())) == store.shapes[data.locations[0]].prod()


def test_free_angles_cannot_be_followed(store):
    with pytest.raises(ConfigError, match="give rotation=False"): PatchDataset(store, crop=16, lean=True, rotation=True, extras=("origin",))
