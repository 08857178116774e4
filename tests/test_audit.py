"The audit: verdicts, tables, page, resuming, and what is refused."
import base64
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn as nn

from cromss import audit as module
from cromss.audit import FILES, UNREADABLE, Audit, Parts, Tally, audit, class_table, judge, open_windows, season_table, tile_table
from cromss.classes import ClassScheme
from cromss.config import ConfigError, DataError, StoreError
from cromss.models import CrossModalSegmenter
from cromss.selection import LogProbabilities
from cromss.sensors import SENSORS
from cromss.store import Location, Store, write_store
from cromss.views import open_place

SCHEME = ClassScheme("three", ("water", "wood", "town"))
BANDS = {"s1": SENSORS["s1"], "s2": SENSORS["s2"].select(("B4", "B3", "B2"))}


class Colours(nn.Module):
    "Believes what the first three coded values of a pixel say: {sensor: class probabilities} can be written into the images of a test."
    stride = 1

    def __init__(self, bands=None, num_classes=3):
        super().__init__()
        self.options, self.broken = {"bands": bands or {"s2": 3}, "num_classes": num_classes}, False
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, images):
        found = {s: (image[:, :3] + 1 / 255).log() + self.bias[:, None, None] for s, image in images.items()}
        return {s: f * math.nan for s, f in found.items()} if self.broken else found


class Two(Colours):
    "s1 has two bands: the third class gets what is left of 255."
    def __init__(self): super().__init__({"s1": 2, "s2": 3})

    def forward(self, images):
        s1 = images["s1"]
        return super().forward({"s1": torch.cat([s1, (1 - s1.sum(1, keepdim=True)).clamp(min=0)], 1), "s2": images["s2"]})


def place(key, label, s2, s1=None, reference=None, seasons=("may", "july"), size=8, valid=None, **more):
    "A Location whose seasons are all alike, every map of one value or given."
    def full(value, bands): return np.broadcast_to(np.uint8(value).reshape(bands, *(1, 1) if np.ndim(value) < 3 else np.shape(value)[1:]), (bands, size, size)).copy()
    def same(array): return [None if array is None else array.copy() for _ in seasons]
    label = None if label is None else np.broadcast_to(np.uint8(label), (size, size))
    images = {"s1": same(full((0, 0) if s1 is None else s1, 2)), "s2": same(full(s2, 3))}
    return Location(key, seasons, images, same(label), None if reference is None else same(np.broadcast_to(np.uint8(reference), (size, size))),
                    None if valid is None else {"s2": same(valid)}, **more)


def make(folder, places, **options): return write_store(folder, places, BANDS, SCHEME, **options)


@pytest.fixture
def store(tmp_path):
    "Four places: right, doubtful, wrong, and half wrong; the third and fourth have a reference."
    half = np.zeros((8, 8), np.uint8); half[:, 4:] = 1
    grid = dict(crs="EPSG:32632", transform=(10, 0, 5e5, 0, -10, 5e6))
    places = [place("right", 0, (250, 2, 2), **grid), place("doubtful", 0, (90, 85, 80), **grid), place("wrong", 0, (2, 250, 2), reference=1), place("half", half, (250, 2, 2), reference=0, **grid)]
    return make(tmp_path / "store", places, shard_size=2)


def probabilities(*values):
    "LogProbabilities of one pixel or more, from (pixels, classes) for each sensor."
    return LogProbabilities({s: torch.tensor(v, dtype=torch.float32).T.log()[None, :, None] for s, v in zip(("s1", "s2"), values)})


def seen(label, *values, valid=None, reference=None):
    "A stand-in for a Place of one row of pixels."
    label = np.uint8([label])
    return SimpleNamespace(key="here", label=label, valid=np.ones_like(label, bool) if valid is None else np.array([valid]), log_p=probabilities(*values), sensors=BANDS,
                           reference=None if reference is None else np.uint8([reference]))


# -- one place ----------------------------------------------------------------------------------------------------------------------------------------

def test_verdict_by_hand():
    #               believed         both deny it     s2 alone denies   no label      no value
    s1 = [[.9, .05, .05], [.1, .8, .1], [.7, .2, .1], [.3, .3, .4], [.1, .8, .1]]
    s2 = [[.8, .1, .1], [.2, .7, .1], [.05, .9, .05], [.3, .3, .4], [.1, .8, .1]]
    v = judge(seen([0, 0, 0, 255, 0], s1, s2, valid=[True] * 4 + [False], reference=[0, 1, 0, 0, 1]))
    assert v.usable.tolist() == [[True, True, True, False, False]] and v.disagree.tolist() == [[False, False, True, False, False]]
    assert v.score[0] == pytest.approx([math.sqrt(.72), math.sqrt(.02), math.sqrt(.035), 0, 0], abs=1e-6)
    assert v.confidence["s1"][0] == pytest.approx([.9, .1, .7, 0, 0]) and v.confidence["s2"][0, :3] == pytest.approx([.8, .2, .05])
    assert v.suggested[0, :4].tolist() == [0, 1, 1, 255] and v.wrong.tolist() == [[False, True, True, False, False]]
    assert v.belief[0, 1] == pytest.approx(.56 / (.02 + .56 + .01)) and v.belief[0, 2] == pytest.approx(.18 / (.035 + .18 + .005))
    assert v.compared.tolist() == [[True, True, True, False, False]]


def test_label_breaks_ties_and_one_sensor_is_enough():
    v = judge(seen([0, 0], [[.45, .55, 1e-6], [.35, .65, 1e-6]]))
    assert v.wrong.tolist() == [[False, True]] and not v.disagree.any() and v.score[0] == pytest.approx([.45, .35]) and not v.compared.any()


def test_rows_that_do_not_count():
    p = seen([0, 0, 0], [[.1, .8, .1]] * 3)
    assert judge(p, (0, 2)).usable.tolist() == [[False, False, True]] and not judge(p, (1, 0)).usable.any()


def test_nan_is_refused():
    p = seen([0, 255], [[.9, .05, .05], [.9, .05, .05]])
    p.log_p["s1"][..., 1] = math.nan
    judge(p)                                                    # where nothing is labelled nothing is said
    p.log_p["s1"][..., 0] = math.nan
    with pytest.raises(DataError, match="here: the network gives NaN at 1 of its labelled pixels"): judge(p)


@pytest.mark.parametrize("side, windows", [(32, 6), (64, 2), (512, 1)])
def test_windows_count_every_pixel_once(tmp_path, side, windows):
    rng = np.random.default_rng(0)
    label, size = rng.integers(0, 3, (80, 80), np.uint8), 80
    label[:5] = 255
    s = write_store(tmp_path / "s", [Location("big", ("may",), {"s1": [rng.integers(0, 256, (2, size, 50), np.uint8)], "s2": [rng.integers(0, 256, (3, size, 50), np.uint8)]}, [label[:, :50].copy()])], BANDS, SCHEME)
    found = [judge(*w) for w in open_windows(Two().eval(), s, 0, 0, side=side)]
    assert len(found) == windows and sum(v.usable.sum() for v in found) == 75 * 50
    whole = judge(open_place(Two().eval(), s, 0, 0))
    assert sum(v.wrong.sum() for v in found) == whole.wrong.sum() and sum(v.score[v.usable].sum() for v in found) == pytest.approx(whole.score[whole.usable].sum(), rel=1e-5)


# -- the tables -----------------------------------------------------------------------------------------------------------------------------------------

def test_tables(store, tmp_path):
    found = audit(Colours().eval(), store, tmp_path / "audit", part=3, progress=False)
    tiles = found.tiles
    assert tiles["key"].tolist() == ["wrong", "wrong", "half", "half", "doubtful", "doubtful", "right", "right"] and tiles["rank"].tolist() == list(range(1, 9))
    assert tiles["share_wrong"].tolist() == [1, 1, .5, .5, 0, 0, 0, 0] and tiles["pixels"].eq(64).all() and tiles["name"].tolist() == ["may", "july"] * 4
    right, other = 251 / 257, 3 / 257                           # what `Colours` makes of 250 and 2
    assert tiles["confidence"].tolist() == pytest.approx([other, other, (right + other) / 2, (right + other) / 2, 91 / 258, 91 / 258, right, right], abs=1e-6)
    assert (tiles["confidence"] == tiles["confidence_s2"]).all() and tiles["share_disagree"].eq(0).all()
    assert tiles["error_rate"].tolist()[:4] == [1, 1, .5, .5] and tiles["error_rate"].isna().sum() == 4 and tiles["compared"].tolist()[:5] == [64] * 4 + [0]
    assert tiles["lon"].isna().tolist() == [True, True] + [False] * 6 and tiles["lon"][2] == pytest.approx(9, abs=1e-3)
    pairs = found.classes
    assert pairs[["label", "suggested", "pixels"]].values.tolist() == [["water", "wood", 128], ["wood", "water", 64]]
    assert pairs["share_of_label"].tolist() == pytest.approx([128 / 448, 1]) and pairs["belief"].tolist() == pytest.approx([right] * 2) and pairs["expected"].tolist() == pytest.approx([128 * right, 64 * right])
    assert pairs["suggestion_right"].tolist() == [1, 1] and pairs["label_right"].tolist() == [0, 0]
    seasons = found.seasons
    assert seasons["name"].tolist() == ["may", "july"] and seasons["tiles"].tolist() == [4, 4] and seasons["share_wrong"].tolist() == [.375] * 2 and seasons["error_rate"].tolist() == [.75] * 2
    assert sorted(p.name for p in (tmp_path / "audit").iterdir() if p.suffix != ".parquet") == sorted(FILES) and found.left_out.empty


def test_summary(store, tmp_path):
    s = audit(Colours().eval(), store, tmp_path / "audit", progress=False).summary
    assert (s["locations"], s["tiles"], s["pixels"], s["share_wrong"], s["left_out"], s["quarantined"]) == (4, 8, 512, .375, {}, [])
    assert s["reference"] == {"pixels": 256, "error_rate": .75, "auroc": 1.0, "rank_correlation": 1.0} and s["plan"]["store_id"] == store.id
    assert "NaN" not in (tmp_path / "audit/summary.json").read_text() and s["confidence"] == pytest.approx(audit(Colours().eval(), store, tmp_path / "b", progress=False).tiles["confidence"].mean(), abs=1e-5)


def test_parquet_has_the_same_rows(store, tmp_path):
    pytest.importorskip("pyarrow")
    found = audit(Colours().eval(), store, tmp_path / "audit", progress=False)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "audit/tiles.parquet"), found.tiles, check_dtype=False, rtol=1e-6)


def test_seasons_are_named_and_ranked(store, tmp_path):
    rows = pd.DataFrame([{"location": i, "key": str(i), "season": i % 2, "name": f"2020-{i}", "pixels": 10, "wrong": i % 2, "confidence": 5.0, "disagree": 0, "compared": 0, "errors": 0} for i in range(4)])
    table = season_table(rows)
    assert table["season"].tolist() == [1, 0] and table["name"].tolist() == ["2020-1 to 2020-3", "2020-0 to 2020-2"] and "error_rate" not in table and table["share_wrong"].tolist() == [.1, 0]
    assert tile_table(rows, np.full((4, 2), np.nan))["key"].tolist() == ["1", "3", "0", "2"]
    nothing = class_table(Tally(3).pairs, SCHEME)
    assert nothing.empty and nothing.columns[0] == "rank"
    assert audit(Colours().eval(), store, tmp_path / "a", seasons=(1,), limit=3, progress=False).tiles[["key", "name"]].values.tolist() == [["wrong", "july"], ["doubtful", "july"], ["right", "july"]]


def test_two_sensors(tmp_path):
    s = make(tmp_path / "s", [place("a", 0, (250, 2, 2), s1=(2, 250)), place("b", 0, (250, 2, 2), s1=(250, 2))])
    found = audit(Two().eval(), s, tmp_path / "audit", progress=False)
    one, two = 251 / 257, 3 / 257
    tiles = found.tiles.set_index(["key", "name"])
    assert tiles.loc[("a", "may"), "share_disagree"] == 1 and tiles.loc[("b", "may"), "share_disagree"] == 0 and tiles.loc[("a", "may"), "confidence"] == pytest.approx(math.sqrt(one * 3 / 257), abs=2e-3)
    assert tiles.loc[("a", "may"), "confidence_s1"] == pytest.approx(two, abs=2e-3) and "error_rate" not in found.tiles and found.summary["reference"] is None


# -- against cleanlab's definitions (Northcutt et al. 2021) -----------------------------------------------------------------------------------------------

def noisy_pixels(seed=0, images=3, size=24):
    "Probabilities of two sensors, a truth, and a label that is wrong in three of ten pixels."
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 3, (images, size, size))
    label = np.where(rng.random(truth.shape) < .3, (truth + rng.integers(1, 3, truth.shape)) % 3, truth)
    logits = [2.5 * np.eye(3)[truth] + rng.normal(0, 1, (*truth.shape, 3)) for _ in range(2)]
    p = [np.exp(l) / np.exp(l).sum(-1, keepdims=True) for l in logits]       # (N, H, W, C)
    return p, label, truth


def ours(p, label):
    "Our score and our issues of many images."
    log_p = LogProbabilities({s: torch.tensor(q, dtype=torch.float32).log().permute(0, 3, 1, 2) for s, q in zip(("s1", "s2"), p)})
    found = []
    for i, ids in enumerate(label.astype(np.uint8)):
        found.append(judge(SimpleNamespace(key=str(i), label=ids, valid=np.ones(ids.shape, bool), log_p=LogProbabilities({s: l[i:i + 1] for s, l in log_p.items()}), sensors=BANDS, reference=None)))
    return np.stack([v.score for v in found]), np.stack([v.wrong for v in found])


def test_scores_by_definition():
    "One sensor: the score is the self-confidence, the probability of the given label. Two: it ranks as their mean does, and finds wrong labels no worse."
    p, label, truth = noisy_pixels()
    own = [np.take_along_axis(q, label[..., None], -1)[..., 0] for q in p]
    assert ours(p[:1], label)[0] == pytest.approx(own[0], abs=1e-6)
    score, wrong = ours(p, label)
    mean = (own[0] + own[1]) / 2
    assert score == pytest.approx(np.sqrt(own[0] * own[1]), abs=1e-6) and pd.Series(score.ravel()).corr(pd.Series(mean.ravel()), method=lambda a, b: np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1]) > .9
    def auroc(s): return (s[label != truth][:, None] < s[label == truth]).mean()
    assert auroc(score) > .95 and auroc(score) > auroc(mean) - .01
    assert wrong[label != truth].mean() > .9 and wrong[label == truth].mean() < .05


def test_scores_against_cleanlab():
    rank = pytest.importorskip("cleanlab.rank")
    from cleanlab.segmentation.filter import find_label_issues
    p, label, truth = noisy_pixels()
    single = rank.get_self_confidence_for_each_label(label.ravel(), p[0].reshape(-1, 3))
    assert ours(p[:1], label)[0].ravel() == pytest.approx(single, abs=1e-6)
    mean = (p[0] + p[1]) / 2
    score, wrong = ours(p, label)
    theirs = rank.get_self_confidence_for_each_label(label.ravel(), mean.reshape(-1, 3))
    assert np.corrcoef(score.ravel().argsort().argsort(), theirs.argsort().argsort())[0, 1] > .9
    issues = find_label_issues(label, np.moveaxis(mean, -1, 1), n_jobs=1, verbose=False).astype(bool)
    assert (issues & wrong).sum() / (issues | wrong).sum() > .6
    both = [np.mean(found == (label != truth)) for found in (wrong, issues)]
    assert both[0] > both[1] - .02


# -- what is left out -------------------------------------------------------------------------------------------------------------------------------------

def test_left_out(tmp_path):            # fault 12
    lacking = place("lacking", 0, (250, 2, 2))
    lacking.images["s1"][0], lacking.labels[1] = None, None
    empty = place("empty", 0, (250, 2, 2), valid=np.zeros((8, 8), bool))
    s = make(tmp_path / "s", [place("good", 0, (250, 2, 2)), lacking, empty])
    found = audit(Two().eval(), s, tmp_path / "audit", progress=False)
    assert found.tiles["key"].tolist() == ["good", "good"]
    assert found.left_out[["key", "name", "reason"]].values.tolist() == [["lacking", "may", "no s1"], ["lacking", "july", "no label"], ["empty", "may", "no labelled pixel with a value"], ["empty", "july", "no labelled pixel with a value"]]
    assert found.summary["left_out"]["no s1"] == {"seasons": 1, "such_as": ["lacking, may"]} and found.summary["quarantined"] == []
    assert "no s1: 1 seasons, such as lacking, may" in (tmp_path / "audit/index.html").read_text(encoding="utf-8")


def spoil(store, key):
    "Change the checksum of the image of one place, on every page that has it."
    shard = next(store.folder.glob("*.lmdb"))
    data = bytearray(shard.read_bytes())
    for found in re.finditer(key.encode() + b'/0/s2.{,40}crc32":"', bytes(data), re.S): data[found.end()] ^= 1
    shard.write_bytes(data)


def test_damaged_place_is_quarantined_and_read_again(tmp_path):
    s = make(tmp_path / "s", [place(f"p{i}", 0, (250, 2, 2)) for i in range(3)])
    spoil(s, "p1")
    s = Store.open(s.folder)
    found = audit(Colours().eval(), s, tmp_path / "audit", progress=False)
    assert found.summary["quarantined"] == ["p1"] and len(found.tiles) == 5
    assert found.left_out["reason"].tolist() == [UNREADABLE] and "checksum disagrees" in found.left_out["detail"][0]
    parts = Parts(tmp_path / "other")
    with parts.open({"a": 1}):
        bad, good = Tally(3), Tally(3)
        bad.leave("p1", 0, "may", UNREADABLE, "why")
        parts.write(0, bad), parts.write(1, good)
        assert parts.finished() == [1] and [n for n, _ in parts.read()] == [0, 1]


def test_many_damaged_places_end_it(store, tmp_path):
    model = Colours().eval()
    model.broken = True
    with pytest.raises(DataError, match=r"2 locations cannot be read, more than 1 % of 4, such as right \(right: the network gives NaN at 64 .*copy the store again"):
        audit(model, store, tmp_path / "audit", part=2, progress=False)
    assert not (tmp_path / "audit").exists()


def test_nothing_to_audit(tmp_path):
    s = make(tmp_path / "s", [place("a", None, (250, 2, 2))])
    with pytest.raises(DataError, match="no labelled season with all sensors among 1 locations.*no label"): audit(Colours().eval(), s, tmp_path / "audit", progress=False)
    assert not (tmp_path / "audit").exists()


def test_unknown_crs_is_no_reason_to_fail(tmp_path):
    lost, known = (replace(place(key, 0, (250, 2, 2)), crs=crs, transform=(10, 0, 500_000, 0, -10, 5_000_000)) for key, crs in (("lost", "no such CRS"), ("known", "EPSG:32632")))
    found = audit(Colours().eval(), make(tmp_path / "s", [lost, known]), tmp_path / "audit", progress=False).tiles.set_index("key")
    assert found.loc["lost", "lon"].isna().all() and found.loc["known", "lon"].notna().all()
    alone = audit(Colours().eval(), make(tmp_path / "t", [lost]), tmp_path / "alone", progress=False)
    assert alone.tiles["lon"].isna().all() and "longitude, °" not in (tmp_path / "alone/index.html").read_text(encoding="utf-8")


def test_a_handful_of_pixels_does_not_come_first():
    rows = pd.DataFrame({"location": [0, 1, 2], "key": ["few", "many", "fine"], "season": 0, "name": "may", "pixels": [1, 4000, 4000], "wrong": [1, 2000, 0], "disagree": 0, "confidence": [0., 1800., 3900.],
                         "compared": 0, "errors": 0})
    table = tile_table(rows, np.full((3, 2), np.nan))
    assert table["key"].tolist() == ["many", "few", "fine"] and table["share_wrong"].tolist() == [.5, 1, 0] and "sure" not in table


def test_names_with_line_ends_stay_one_row(tmp_path):
    found = audit(Colours().eval(), make(tmp_path / "s", [place("a\rb", 0, (250, 2, 2))]), tmp_path / "audit", progress=False)
    assert set(found.tiles["key"]) == {"a\rb"}


# -- refused ----------------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, words", [
    (dict(limit=0), "limit=0"), (dict(part=0), "part=0"), (dict(side=8), "side=8"), (dict(top=-1), "top=-1"), (dict(workers=1.5), "workers=1.5"),
    (dict(seasons=(2,)), r"seasons=\(2,\): give whole numbers from 0 to 1"), (dict(seasons=()), "seasons"), (dict(seasons=("may",)), "seasons"), (dict(bands={"s2": ("B4",)}), "name its bands")])
def test_options_are_refused(store, tmp_path, options, words):
    with pytest.raises(ConfigError, match=words): audit(Colours().eval(), store, tmp_path / "audit", progress=False, **options)
    assert list(tmp_path.iterdir()) == [store.folder]


@pytest.mark.parametrize("model, words", [(Colours({"sar": 3}), "no sensor 'sar'"), (Colours({"s2": 4}), "the network sees {'s2': 4} bands"), (Colours(num_classes=4), "knows 4 classes"), (Colours().train(), "training mode")])
def test_networks_are_refused(store, tmp_path, model, words):
    with pytest.raises(ConfigError, match=words): audit(model.eval() if "training" not in words else model, store, tmp_path / "audit", progress=False)


def test_folders_are_refused(store, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not overwritten"): audit(Colours().eval(), store, tmp_path / "full", progress=False)
    with pytest.raises(ConfigError, match="no audit .index.html is missing"): Audit(tmp_path / "full")
    with pytest.raises(ConfigError, match="not a run folder"): audit(tmp_path / "full", store, tmp_path / "audit", progress=False)
    with pytest.raises(StoreError, match="full: holds no store .*cromss prepare .*full stores"): audit(Colours().eval(), tmp_path / "full", tmp_path / "audit", progress=False)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_two_at_once_are_refused(store, tmp_path):
    parts = Parts(tmp_path / "audit")
    with parts.open({}), pytest.raises(StoreError, match="audit.lock"): audit(Colours().eval(), store, tmp_path / "audit", progress=False)


# -- stopped and gone on with -----------------------------------------------------------------------------------------------------------------------------

def test_goes_on_after_a_stop(store, tmp_path, monkeypatch):
    whole, calls = audit(Colours().eval(), store, tmp_path / "whole", part=1, progress=False), []
    real = module.judge
    def stop(*window):
        calls.append(window[0].key)
        if len(calls) == 5: raise KeyboardInterrupt
        return real(*window)
    monkeypatch.setattr(module, "judge", stop)
    with pytest.raises(KeyboardInterrupt): audit(Colours().eval(), store, tmp_path / "audit", part=1, progress=False)
    assert not (tmp_path / "audit").exists() and [p.name for p in sorted((tmp_path / "audit.partial/parts").iterdir())] == ["00000.npz", "00001.npz"]
    calls.clear()
    monkeypatch.setattr(module, "judge", lambda *window: calls.append(window[0].key) or real(*window))
    (tmp_path / "audit.partial/parts/00001.npz").write_bytes(b"cut short")      # is done again
    again = audit(Colours().eval(), store, tmp_path / "audit", part=1, top=0, progress=False)
    assert "right" not in calls and calls == ["doubtful"] * 2 + ["wrong"] * 2 + ["half"] * 2 and again.tiles.equals(whole.tiles) and again.summary["reference"] == whole.summary["reference"]
    assert {p.name for p in tmp_path.iterdir()} == {"store", "whole", "audit"} and {p.name for p in (tmp_path / "audit").iterdir()} - {"tiles.parquet"} == set(FILES)


def test_other_settings_are_not_mixed(store, tmp_path, monkeypatch):
    other = Colours().eval()
    other.bias.data += torch.tensor([0., 1, 0])
    def stop(*_): raise KeyboardInterrupt
    monkeypatch.setattr(module, "_write", stop)
    with pytest.raises(KeyboardInterrupt): audit(Colours().eval(), store, tmp_path / "audit", part=1, progress=False)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"begun with another network, side; ask for the same again, or discard its parts by restart=True"): audit(other, store, tmp_path / "audit", part=1, side=64, progress=False)
    assert audit(other, store, tmp_path / "audit", part=1, progress=False, restart=True).summary["plan"]["part"] == 1


KILLED = """
import os, sys
sys.path[:0] = [{tests!r}]
from test_audit import Colours, audit, Store
import cromss.audit as module
real, done = module.judge, []
def kill(*window):
    done.append(1)
    if len(done) == 4: os.kill(os.getpid(), 9)
    return real(*window)
module.judge = kill
audit(Colours().eval(), Store.open({store!r}), {folder!r}, part=1, workers=0, progress=False)
"""


def test_goes_on_after_kill(store, tmp_path, root):
    code = KILLED.format(tests=str(root / "tests"), store=str(store.folder), folder=str(tmp_path / "audit"))
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).returncode == -9
    left = {p.name for p in (tmp_path / "audit.partial/parts").iterdir()}
    assert "00000.npz" in left and any(n.endswith(".begun") for n in left) and Parts(tmp_path / "audit").abandoned() == {1: 1}
    with pytest.warns(UserWarning, match="is gone; its lock is taken over"): found = audit(Colours().eval(), store, tmp_path / "audit", part=1, top=0, progress=False)
    assert found.tiles.equals(audit(Colours().eval(), store, tmp_path / "whole", part=1, top=0, progress=False).tiles)


def test_full_disk(store, tmp_path, monkeypatch):       # fault 5
    real = np.savez_compressed
    def full(*args, **arrays): raise OSError(28, "No space left on device")
    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(ConfigError, match="No space left on device"): audit(Colours().eval(), store, tmp_path / "audit", progress=False)
    monkeypatch.setattr(np, "savez_compressed", real)
    assert not (tmp_path / "audit").exists() and len(audit(Colours().eval(), store, tmp_path / "audit", top=0, progress=False).tiles) == 8


def test_workers_agree(tmp_path):
    "Two processes give what one gives; the network and the store travel to them."
    rng = np.random.default_rng(0)
    s = make(tmp_path / "s", [place(f"p{i}", rng.integers(0, 3, (32, 32)), rng.integers(0, 256, (3, 32, 32)), rng.integers(0, 256, (2, 32, 32)), size=32, seasons=("may",)) for i in range(4)])
    torch.manual_seed(0)
    model = CrossModalSegmenter({"s1": 2, "s2": 3}, 3, "mid", "unet", "resnet18", encoder_depth=3, decoder_channels=(16, 8, 8)).eval()
    one, two = (audit(model, s, tmp_path / str(n), part=2, workers=n, top=1, progress=False) for n in (0, 2))
    pd.testing.assert_frame_equal(one.tiles, two.tiles, rtol=1e-4)
    assert one.classes["pixels"].sum() == pytest.approx(two.classes["pixels"].sum(), abs=2)


# -- a run, and the page -----------------------------------------------------------------------------------------------------------------------------------

def test_run(tmp_path, undrawn):
    from cromss.config import preset
    from cromss.pretraining import open_data, pretrain
    config = preset("demo", data="scenes:balanced-40:1:4", epochs=1, crop=64, batch_size=2, runs=str(tmp_path / "runs"), stores=str(tmp_path / "stores"), name="tiny", num_workers=0, loggers=())
    run = pretrain(config)
    found = audit(run.folder, open_data(config), tmp_path / "audit", top=1, progress=False)
    assert found.summary["plan"]["sensors"] == ["s1", "s2"] and 0 < found.summary["reference"]["error_rate"] < 1 and {"confidence_s1", "confidence_s2"} <= set(found.tiles)
    with pytest.raises(ConfigError, match="a run knows its own"): audit(run, open_data(config), tmp_path / "b", bands={"s1": ("VV",)}, progress=False)


def test_page(tmp_path):                # faults 35 and 37
    hostile = "<script>alert(1)</script>".replace("/", "\\")
    scheme = ClassScheme("bad", ("<b>water</b>", "wood & co", '"town"'))
    s = write_store(tmp_path / "<i>store", [place(hostile, 0, (2, 250, 2), seasons=("<img src=x>",)), place("fine", 1, (250, 2, 2))], BANDS, scheme)
    audit(Two().eval(), s, tmp_path / "audit", progress=False)
    page = (tmp_path / "audit/index.html").read_text(encoding="utf-8")
    assert "<script" not in page and "<img src=x>" not in page and "<b>water" not in page and "<i>store" not in page
    assert "&lt;script&gt;alert(1)" in page and "wood &amp; co" in page and "&lt;b&gt;water" in page and "default-src &#x27;none" not in page
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page) and "url(" not in page and "NaN" not in page and "nan" not in re.sub(r"data:[^\"]*", "", page)
    assert page.count("<figure>") == 3 and page.count("data:image/png") == 1 + 3 * 5 and set(BANDS) <= {"s1", "s2"}
    assert json.loads((tmp_path / "audit/summary.json").read_text(encoding="utf-8"))["plan"]["store"] == "<i>store"


def test_pictures_are_kept_small(tmp_path):
    rng = np.random.default_rng(0)
    picture = module._png(rng.integers(0, 256, (600, 300, 4), np.uint8))
    assert cv2.imdecode(np.frombuffer(base64.b64decode(picture.split(",")[1]), np.uint8), cv2.IMREAD_UNCHANGED).shape == (200, 100, 4)


def test_keys_that_look_like_numbers(tmp_path):
    s = make(tmp_path / "s", [place("0001", 0, (250, 2, 2)), place("NA", 0, (250, 2, 2))])
    assert set(audit(Colours().eval(), s, tmp_path / "audit", top=0, progress=False).tiles["key"]) == {"0001", "NA"}
