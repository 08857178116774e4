"Every variant of the selection against hand-worked numbers; estimates of the kept fraction against known rates; refusals."
import math

import numpy as np
import pytest
import torch

from cromss.config import ConfigError, DataError, SelectionConfig
from cromss.selection import (ENTANGLING, fit_mixture, entangle, estimate_keep, keep_fraction, label_weights, prediction_weights, ramp, select, selection_advice,
                              surest, temporal_agreement)

NAN, UNLABELLED = math.nan, 255
KINDS = ("published", "geometric", "exchange", "other", "own")


def pixels(*values): return torch.tensor(values).view(1, 1, -1)
def listed(maps): return {s: m.flatten().tolist() for s, m in maps.items()}
def near(**values): return {s: pytest.approx(v, abs=1e-6) for s, v in values.items()}


# ---- entangling

@pytest.mark.parametrize("kind, s1, s2", [
    ("published", [.8 * .6, 1 * .5], [.2 * .9, 0]),        # c (1 + other) / 2
    ("geometric", [.4, 0], [.4, 0]),                       # sqrt(.8 .2)
    ("exchange", [.2 * .9, 0], [.8 * .6, .5]),
    ("other", [.2, 0], [.8, 1]),
    ("own", [.8, 1], [.2, 0]),
])
def test_two_sensors(kind, s1, s2):
    assert listed(entangle({"s1": pixels(.8, 1.), "s2": pixels(.2, 0.)}, kind)) == near(s1=s1, s2=s2)


@pytest.mark.parametrize("kind, expected", [
    ("published", dict(a=[.9 * (1 + .3) / 2], b=[.4 * (1 + .55) / 2], c=[.2 * (1 + .65) / 2])),
    ("geometric", dict.fromkeys("abc", [.072 ** (1 / 3)])),
    ("exchange", dict(a=[.3 * 1.9 / 2], b=[.55 * 1.4 / 2], c=[.65 * 1.2 / 2])),
    ("other", dict(a=[.3], b=[.55], c=[.65])),
    ("own", dict(a=[.9], b=[.4], c=[.2])),
])
def test_three_sensors(kind, expected):
    assert listed(entangle({"a": pixels(.9), "b": pixels(.4), "c": pixels(.2)}, kind)) == near(**expected)


@pytest.mark.parametrize("kind, expected", [
    ("published", dict(s1=[.8 * (1 + .6) / 2], s2=[.2 * (1 + .9) / 2])),      # the others of s1 are s2 and the voice: (.2 + 1) / 2
    ("geometric", dict.fromkeys(("s1", "s2"), [.16 ** (1 / 3)])),
    ("exchange", dict(s1=[.6 * .9], s2=[.9 * .6])),
    ("other", dict(s1=[.6], s2=[.9])),
    ("own", dict(s1=[.8], s2=[.2])),
])
def test_a_voice_is_one_more_of_the_others(kind, expected):
    assert listed(entangle({"s1": pixels(.8), "s2": pixels(.2)}, kind, pixels(1.))) == near(**expected)


@pytest.mark.parametrize("kind, expected", [("published", .8 * .75), ("geometric", .4 ** .5), ("exchange", .5 * .9), ("other", .5), ("own", .8)])
def test_one_sensor_and_a_voice(kind, expected):
    assert listed(entangle({"s1": pixels(.8)}, kind, pixels(.5))) == near(s1=[expected])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_alone_stays_as_it_is(kind):
    a = torch.rand(2, 4, 4)
    assert torch.equal(entangle({"s1": a}, kind)["s1"], a) and torch.equal(entangle({"s1": a}, kind, torch.full_like(a, NAN))["s1"], a)


@pytest.mark.parametrize("sensors", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_silent_voice_changes_nothing_where_it_is_silent(kind, sensors):
    torch.manual_seed(0)
    own = {f"s{i}": torch.rand(2, 5, 5) for i in range(sensors)}
    voice = torch.rand(2, 5, 5)
    silent = torch.rand(2, 5, 5) < 0.5
    without, half, spoken = entangle(own, kind), entangle(own, kind, voice.masked_fill(silent, NAN)), entangle(own, kind, voice)
    for s in own:
        assert torch.equal(half[s][silent], without[s][silent]) and torch.equal(half[s][~silent], spoken[s][~silent])
        assert spoken[s].min() >= 0 and spoken[s].max() <= 1


def test_the_smallest_confidences_survive():
    tiny = pixels(1e-30)
    assert entangle({"s1": tiny, "s2": tiny}, "geometric")["s1"].item() == pytest.approx(1e-30, rel=1e-5)     # their product is 0 in float32
    for kind in ("exchange", "other"): assert entangle({"s1": pixels(1.), "s2": tiny}, kind)["s1"].item() > 0    # (1 + 1e-30) - 1 would be none


def test_the_kinds_are_those_of_the_configuration():
    assert tuple(ENTANGLING) == KINDS and all(SelectionConfig(entangle=kind) for kind in ENTANGLING)
    with pytest.raises(ConfigError, match="entangle='product': choose one of 'published', 'geometric'"): entangle({"s1": pixels(.5)}, "product")


# ---- the seasons

def test_temporal_agreement():
    seasons = torch.tensor([[[1, 1, 1, 255, 1, 1]], [[1, 2, 255, 1, 2, 255]], [[1, 2, 1, 1, 1, 255]], [[1, 1, 2, 1, 2, 255]]], dtype=torch.uint8).unsqueeze(0)
    found = temporal_agreement(seasons, seasons[:, 0].long())
    assert found.dtype == torch.float32 and found.shape == (1, 1, 6)
    assert found[0, 0, [0, 1, 2, 4]].tolist() == pytest.approx([1, 1 / 3, 1 / 2, 1 / 3])     # of three others, of two labelled ones
    assert found[0, 0, [3, 5]].isnan().all()                                # the label is missing, or all the others are
    assert temporal_agreement(seasons[:, :1], seasons[:, 0]).isnan().all()  # a single season


@pytest.mark.parametrize("shape", [(2, 4, 8), (1, 4, 8, 8), (2, 4, 8, 9)])
def test_season_masks_of_another_shape_are_refused(shape):
    with pytest.raises(DataError, match=r"season_masks are .*, labels \(2, 8, 8\); give the labels of all seasons as \(B, S, H, W\)"):
        temporal_agreement(torch.zeros(shape), torch.zeros(2, 8, 8))


# ---- weights, and who teaches

def test_hard_weights():
    confidence, labels = pixels(.9, .8, .7, .6, .5, .1), torch.tensor([[[0, 0, 0, 0, 1, UNLABELLED]]])
    assert label_weights(confidence, labels, 0.5, 3, weights="hard").flatten().tolist() == [1, 1, 0, 0, 1, 0]
    assert label_weights(confidence, labels, 1, 3, weights="hard").flatten().tolist() == [1, 1, 1, 1, 1, 0]
    assert label_weights(confidence, labels, 0, 3, weights="hard").flatten().tolist() == [0] * 6
    assert label_weights(torch.zeros(1, 1, 6), labels, 0.5, 3, weights="hard").flatten().tolist() == [1, 1, 1, 1, 1, 0]    # nothing ranks them
    assert label_weights(pixels(NAN, .8), torch.tensor([[[0, 1]]]), 0.5, 2, weights="hard")[0, 0, 0].isnan()           # and does not pass for a zero


@pytest.mark.parametrize("method", ["exact", "histogram"])
def test_hard_weights_are_one_exactly_where_soft_ones_are(method):
    confidence, labels = torch.rand(4, 32, 32, generator=torch.manual_seed(0)), torch.randint(0, 5, (4, 32, 32))
    soft, hard = (label_weights(confidence, labels, 0.6, 5, method, weights=w) for w in ("soft", "hard"))
    assert torch.equal(hard, (soft == 1).float()) and abs(hard.mean() - 0.6) < 0.01


def test_only_the_surest_teach():
    found = surest({"s1": pixels(.2, .5, .9), "s2": pixels(.3, .5, .1), "dem": pixels(.3, .1, .2)})
    assert listed(found) == {"s1": [False, True, True], "s2": [True, True, False], "dem": [True, False, False]}
    assert surest({"s1": pixels(0., .5)})["s1"].all()


# ---- all of it

def batch(sensors=("s1", "s2"), num_classes=4, size=12):
    torch.manual_seed(0)
    logits = {s: (3 * torch.randn(2, num_classes, size, size)).requires_grad_() for s in sensors}
    seasons = torch.randint(0, num_classes, (2, 3, size, size))
    seasons[:, :, 0], seasons[:, 1:, 1] = UNLABELLED, UNLABELLED
    valid = torch.ones(2, size, size, dtype=torch.bool)
    valid[:, :, 0] = False
    return logits, seasons[:, 0].clone(), valid, seasons


VARIANTS = [*(dict(entangle=k) for k in KINDS), *(dict(entangle=k, temporal=True) for k in KINDS if k != "own"), dict(weights="hard"), dict(teach="surer"), dict(keep="mixture"),
            dict(keep="joint"), dict(entangle="exchange", temporal=True, weights="hard", teach="surer", keep="mixture", method="exact", per_class=False)]


@pytest.mark.parametrize("sensors", [("s1",), ("s1", "s2"), ("s1", "s2", "dem")])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_variant_is_detached_in_unit_range_and_zero_where_nothing_counts(variant, sensors):
    logits, labels, valid, seasons = batch(sensors)
    for epoch in (0, 40, 80):
        found = select(logits, labels, epoch, SelectionConfig(**variant), valid, season_masks=seasons)
        assert 0 < float(found.keep) <= 1
        for name in ("entangled_label", "entangled_prediction", "label_weights", "prediction_weights", "thresholds"):
            maps = getattr(found, name)
            assert tuple(maps) == sensors
            for values in maps.values():
                assert values.dtype == torch.float32 and not values.requires_grad and values.isfinite().all() and values.min() >= 0 and values.max() <= 1
        for s in sensors:
            unusable = ~valid | (labels == UNLABELLED)
            assert (found.label_weights[s][unusable] == 0).all() and (found.entangled_label[s][unusable] == 0).all()
            assert (found.prediction_weights[s][~valid] == 0).all() and found.label_weights[s].sum() > 0


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_variant_with_nothing_labelled_or_nothing_valid(variant):
    logits, labels, valid, seasons = batch()
    for given, usable in ((torch.full_like(labels, UNLABELLED), valid), (labels, torch.zeros_like(valid))):
        found = select(logits, given, 80, SelectionConfig(**variant), usable, season_masks=seasons)
        assert all((w == 0).all() for w in found.label_weights.values()) and math.isfinite(found.keep)
        if isinstance(variant.get("keep"), str): assert found.keep == 1


def test_select_with_variants_is_its_parts():
    logits, labels, valid, seasons = batch()
    config = SelectionConfig(entangle="exchange", temporal=True, weights="hard", teach="surer", keep=0.6, method="exact")
    found = select(logits, labels, 30, config, valid, season_masks=seasons)
    unusable = ~valid | (labels == UNLABELLED)
    label = entangle(found.label_confidence, "exchange", temporal_agreement(seasons, labels).masked_fill(unusable, 0))
    prediction, first = entangle(found.prediction_confidence, "exchange"), surest(found.prediction_confidence)
    for s in logits:
        assert torch.equal(found.entangled_label[s], label[s]) and torch.equal(found.entangled_prediction[s], prediction[s])
        assert torch.equal(found.label_weights[s], label_weights(label[s], labels, found.keep, 4, valid=valid, weights="hard"))
        assert torch.equal(found.prediction_weights[s], prediction_weights(prediction[s], ramp(30, 80), valid) * first[s])
    assert (found.prediction_weights["s1"] * found.prediction_weights["s2"] == 0).all()          # one of two teaches
    assert found.keep == keep_fraction(30, 80, 0.6)


def test_without_other_seasons_the_voice_changes_nothing():
    logits, labels, valid, seasons = batch()
    for masks in (seasons[:, :1], torch.cat([seasons[:, :1], torch.full_like(seasons, UNLABELLED)], 1)):
        with_voice = select(logits, labels, 80, SelectionConfig(temporal=True), valid, season_masks=masks)
        without = select(logits, labels, 80, SelectionConfig(), valid)
        for s in logits: assert torch.equal(with_voice.label_weights[s], without.label_weights[s])


def test_seasons_are_needed_for_their_voice_and_for_nothing_else():
    logits, labels, valid, seasons = batch()
    with pytest.raises(DataError, match="selection.temporal=True needs the labels of all seasons: give season_masks"):
        select(logits, labels, 0, SelectionConfig(temporal=True), valid)
    a, b = (select(logits, labels, 40, SelectionConfig(), valid, season_masks=m) for m in (None, seasons))
    assert all(torch.equal(a.label_weights[s], b.label_weights[s]) for s in logits)
    assert select(logits, labels, 0, None, valid, season_masks=seasons).keep == 1


# ---- how many labels are right

def confidences(right, seed=0, classes=4, size=96, surer=(6, 1.5), doubtful=(.3, 8)):
    "Logits whose probability of the label is drawn from a beta distribution each for right and wrong labels, and labels."
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(rng.integers(0, classes, (4, size, size)))
    is_right = rng.random(labels.shape) < right
    p = np.where(is_right, rng.beta(*surer, labels.shape), rng.beta(*doubtful, labels.shape)).clip(1e-4, 1 - 1e-4)
    other = (labels + torch.from_numpy(rng.integers(1, classes, labels.shape))) % classes      # what a wrong label's pixel is in truth
    scores = torch.full((*labels.shape, classes), 1e-6)
    scores.scatter_(3, other.unsqueeze(3), torch.from_numpy(1 - p).float().unsqueeze(3))
    scores.scatter_(3, labels.unsqueeze(3), torch.from_numpy(p).float().unsqueeze(3))
    return scores.log().permute(0, 3, 1, 2), labels


@pytest.mark.parametrize("kind", ["mixture", "joint"])
@pytest.mark.parametrize("right", [.4, .6, .8, .9])
def test_the_estimate_is_near_the_known_rate(kind, right):
    logits, labels = confidences(right)
    assert estimate_keep({"s1": logits}, labels, kind)["s1"].item() == pytest.approx(right, abs={"mixture": 0.08, "joint": 0.04}[kind])


def test_the_joint_by_hand():
    "Thresholds (.9 + .7 + .2) / 3 = .6 of class 0 and (.8 + .3) / 2 = .55 of class 1: three on the diagonal, two off it; one more is unlabelled."
    p = torch.tensor([.9, .7, .2, .2, .7, .5])                              # of class 0
    logits, labels = torch.stack([p, 1 - p]).log().view(1, 2, 1, 6), torch.tensor([[[0, 0, 0, 1, 1, UNLABELLED]]])
    assert estimate_keep({"s1": logits}, labels, "joint")["s1"].item() == pytest.approx(3 / 5)
    p[1] = .5                                                               # thresholds .5333 and .55: it reaches neither, and is not counted
    logits = torch.stack([p, 1 - p]).log().view(1, 2, 1, 6)
    assert estimate_keep({"s1": logits}, labels, "joint")["s1"].item() == pytest.approx(2 / 4)


def test_the_mixture_of_two_known_distributions():
    x = (np.arange(100) + .5) / 100
    counts = torch.from_numpy(np.round(1e6 * (.7 * np.exp(-((x - .2) / .1) ** 2 / 2) + .3 * np.exp(-((x - .7) / .1) ** 2 / 2)))).long()
    share, mean, width = fit_mixture(torch.stack([counts, counts.flip(0)]))
    assert share.flatten().tolist() == pytest.approx([.7, .3, .3, .7], abs=.02) and mean.flatten().tolist() == pytest.approx([.2, .7, .3, .8], abs=.01)
    assert width.flatten().tolist() == pytest.approx([.1, .1], abs=.01)
    assert all(torch.equal(a, b) for a, b in zip(fit_mixture(counts), fit_mixture(counts)))


@pytest.mark.parametrize("at, expected", [(0, 1), (99, 0)])
def test_a_mixture_of_one_mode_is_all_of_one_kind(at, expected):
    counts = torch.zeros(100, dtype=torch.long)
    counts[at] = 1000
    share, mean, width = fit_mixture(counts)
    assert share[0].item() == pytest.approx(expected, abs=.01) and mean.isfinite().all() and width > 0


@pytest.mark.parametrize("kind", ["mixture", "joint"])
def test_the_estimate_ends_the_ramp(kind):
    logits, labels = confidences(.7, size=32)
    both, config = {"s1": logits, "s2": logits + 1}, SelectionConfig(keep=kind, ramp="linear", ramp_epochs=10)
    right = estimate_keep(both, labels, kind)
    for epoch, progress in ((0, 0), (5, .5), (10, 1), (50, 1)):
        assert float(select(both, labels, epoch, config).keep) == pytest.approx(1 - progress * (1 - right["s1"].item()))
    found = select(both, labels, 10, config)
    fixed = select(both, labels, 10, SelectionConfig(keep=right["s1"].item(), ramp="linear", ramp_epochs=10))
    assert all(torch.equal(found.label_weights[s], fixed.label_weights[s]) for s in both)


@pytest.mark.parametrize("kind", ["mixture", "joint"])
def test_several_processes_estimate_as_one(kind):
    logits, labels = confidences(.7, size=32)
    expected = estimate_keep({"s1": logits}, labels, kind)["s1"]
    halves = [(logits[:2], labels[:2]), (logits[2:], labels[2:])]
    sums = []
    for _ in range(3):                                                      # the n-th sum needs those before: ask again with one more known
        parts = []
        for half in halves:
            asked = iter(sums)
            def reduce(part):
                whole = next(asked, None)
                if whole is None: parts.append(part)
                return part if whole is None else whole
            found = estimate_keep({"s1": half[0]}, half[1], kind, reduce=reduce)["s1"]
        if parts: sums.append(parts[0] + parts[len(parts) // 2])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["mixture", "joint"])
def test_estimating_needs_no_value_and_runs_on_any_device(kind):
    logits, labels, valid, _ = batch()
    found = select({s: l.to("meta") for s, l in logits.items()}, labels.to("meta"), 40, SelectionConfig(keep=kind), valid.to("meta"))
    assert found.keep.shape == () and found.label_weights["s1"].shape == labels.shape


@pytest.mark.parametrize("kind", ["mixture", "joint"])
def test_the_estimate_of_values_that_are_not_finite_is_finite(kind):
    logits, labels, valid, _ = batch()
    logits = {s: l.detach().clone() for s, l in logits.items()}
    logits["s1"][0, 0, 3, 3] = NAN
    found = select(logits, labels, 80, SelectionConfig(keep=kind), valid)
    assert math.isfinite(found.keep) and found.label_weights["s1"][0, 3, 3].isnan() == (labels[0, 3, 3] != UNLABELLED)


def test_refusals():
    logits, labels, _, _ = batch()
    with pytest.raises(ConfigError, match="keep='median': choose a number from 0 to 1, 'mixture', 'joint' or 'per-class'"): estimate_keep(logits, labels, "median")
    with pytest.raises(DataError, match="labels hold"): estimate_keep(logits, labels + 4, "joint")
    with pytest.raises(ConfigError, match="entangle='all'"): estimate_keep(logits, labels, entangling="all")
    with pytest.raises(ConfigError, match="weights='firm': choose one of 'soft', 'hard'"): label_weights(logits["s1"][:, 0].detach().abs(), labels, .5, 4, weights="firm")


# ---- advice

def test_advice():
    assert selection_advice(.5, {"s1": .66, "s2": .70}) is None and selection_advice(.8, {"s1": .6}) is None
    assert selection_advice(.5, {"s1": .76, "s2": .84}) == ("selection.keep=0.5, but the sensors take 80% of the labels for right: right ones are weighed down; "
                                                           "choose keep=0.8, or keep='mixture'")
    assert selection_advice("mixture", {"s1": .8}) is None
    for keep in (.5, "joint"): assert "take 98% of the labels for right: either they are, or their mistakes look right" in selection_advice(keep, {"s1": torch.tensor(.98)})


# a kept fraction of each class

def test_every_class_keeps_the_share_that_the_confident_joint_takes_for_right():
    "Class 0: 3 of 4 labels are believed; class 1: 1 of 4."
    p = torch.tensor([.9, .9, .9, .1, .1, .1, .1, .9])                                   # of class 0; the last four are labelled 1
    logits = torch.stack([p, 1 - p]).log().view(1, 2, 2, 4)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]).view(1, 2, 4)
    labels[0, 1] = torch.tensor([1, 1, 1, 1])
    shares = estimate_keep({"s2": logits}, labels, "per-class")["s2"]
    assert shares.tolist() == pytest.approx([3 / 4, 3 / 4])
    few = torch.stack([torch.tensor([.9, .9, .9, .1, .9, .9, .9, .1]), torch.tensor([.1, .1, .1, .9, .1, .1, .1, .9])]).log().view(1, 2, 2, 4)
    assert estimate_keep({"s2": few}, labels, "per-class")["s2"].tolist() == pytest.approx([3 / 4, 1 / 4])
    chosen = select({"s2": few}, labels, 9, SelectionConfig(ramp_epochs=1, keep="per-class", method="exact", weights="hard"))
    assert chosen.label_weights["s2"].flatten().tolist() == [1, 1, 1, 0, 0, 0, 0, 1] and float(chosen.keep) == pytest.approx(1 / 2)


def test_a_class_without_pixels_keeps_all_and_one_threshold_for_all_classes_is_refused():
    logits, labels = torch.randn(1, 4, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long)
    assert estimate_keep({"s2": logits}, labels, "per-class")["s2"][1:].tolist() == [1, 1, 1]
    with pytest.raises(ConfigError, match="per_class=True"): SelectionConfig(keep="per-class", per_class=False)
