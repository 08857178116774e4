"Figures of the benchmark, against brute force over all pairs, and cases worked by hand."
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from cromss.classes import IGNORE
from cromss.config import ConfigError, DataError
from cromss.evidence import Calibration, NoiseShare, ScoreHistogram, noise_share, paired_bootstrap, paired_interval, rank_against_reference
from cromss.evidence import _miou, _student
from cromss.metrics import segmentation_metrics
from cromss.scenes import NOISE_KINDS


def histogram(score, kind, known=None):
    found = ScoreHistogram()
    found.update(score, kind, np.ones(np.shape(kind), bool) if known is None else known)
    return found


def pairs_auroc(wrong, right):
    "Over all pairs of a wrong and a right pixel."
    wrong, right = np.asarray(wrong)[:, None], np.asarray(right)[None]
    return ((wrong < right) + .5 * (wrong == right)).mean()


def steps_ap(wrong, right):
    "Over all thresholds, from the lowest: precision times the recall that is gained."
    total, ap, before = len(wrong), 0.0, 0
    for at in np.unique(np.concatenate([wrong, right])):
        hit, all_below = (wrong <= at).sum(), (wrong <= at).sum() + (right <= at).sum()
        ap, before = ap + (hit - before) / total * hit / all_below, hit
    return ap


@pytest.fixture
def drawn():
    "Scores on the grid of the bins (eighths), with ties; kinds; what is known."
    rng = np.random.default_rng(0)
    kind = rng.choice(6, 600, p=[.6, .1, .1, .1, .05, .05])
    return (rng.binomial(8, np.where(kind, .4, .7)) / 8).astype(np.float32), kind, rng.random(600) < .9


def test_histogram_is_exact_on_scores_that_the_bins_hold(drawn):
    score, kind, known = drawn
    found = histogram(*drawn)
    right = score[known & (kind == 0)]
    for name, chosen in [(None, kind > 0)] + [(k, kind == i) for i, k in enumerate(NOISE_KINDS[1:], 1)]:
        wrong = score[known & chosen]
        assert found.auroc(name) == pytest.approx(pairs_auroc(wrong, right))
        ap, base = found.average_precision(name)
        assert ap == pytest.approx(steps_ap(wrong, right)) and base == len(wrong) / (len(wrong) + len(right))
    assert found.counts.sum() == known.sum()


def test_histogram_is_close_on_any_score():
    rng = np.random.default_rng(1)
    kind = rng.integers(0, 2, 2000)
    score = rng.beta(np.where(kind, 1, 3), 2).astype(np.float32)
    for scale in (1, 1e-6):
        found = histogram(score * np.float32(scale), kind)
        assert found.auroc() == pytest.approx(pairs_auroc(score[kind == 1], score[kind == 0]), abs=1e-3)
        assert found.average_precision()[0] == pytest.approx(steps_ap(score[kind == 1], score[kind == 0]), abs=3e-3)


def test_average_precision_by_hand():
    assert histogram(np.float32([.1, .2, .3, .4]), np.array([1, 0, 2, 0])).average_precision() == (pytest.approx((1 + 2 / 3) / 2), .5)
    assert histogram(np.float32([.5, .5, .5, .5]), np.array([1, 0, 0, 0])).average_precision() == (.25, .25)       # ties: chance


def test_histograms_add_up_and_are_stored(drawn):
    score, kind, known = drawn
    first, second = histogram(score[:200], kind[:200], known[:200]), histogram(score[200:], kind[200:], known[200:])
    both = first + second
    assert (both.counts == histogram(*drawn).counts).all() and both.counts.dtype == np.int64 and both.counts.shape == (6, 2 ** 15)
    assert ScoreHistogram(both.counts).auroc() == both.auroc()
    first.update(score[200:], kind[200:], known[200:])
    assert (first.counts == both.counts).all()


def test_histogram_takes_tensors_of_any_shape(drawn):
    score, kind, known = (torch.as_tensor(v).view(2, 15, 20) for v in drawn)
    assert (histogram(score.requires_grad_(), kind.to(torch.uint8), known).counts == histogram(*drawn).counts).all()
    assert (histogram(score.transpose(1, 2), kind.transpose(1, 2), known.transpose(1, 2)).counts == histogram(*drawn).counts).all()
    assert histogram(torch.tensor([.25, .5], dtype=torch.bfloat16), torch.tensor([True, False])).auroc() == 1


def test_histogram_at_the_ends():
    found = histogram(np.float32([0, 0, 1, 1]), np.array([1, 1, 0, 0]))
    assert found.auroc() == 1 and histogram(np.float32([-0.0, 0.0]), np.array([1, 0])).auroc() == .5


def test_nothing_to_find_is_nan():
    only_right = histogram(np.float32([.5]), np.array([0]))
    assert np.isnan(only_right.auroc()) and np.isnan(only_right.average_precision()).all() and np.isnan(ScoreHistogram().auroc())
    only_wrong = histogram(np.float32([.5]), np.array([1]))
    assert np.isnan(only_wrong.auroc()) and np.isnan(only_wrong.average_precision()).all()
    assert np.isnan(histogram(np.float32([.5, .6]), np.array([1, 0])).auroc("blobs"))


def test_histogram_table():
    table = histogram(np.float32([.125, .25, .5, .75]), np.array([1, 3, 0, 0])).table()
    assert table["kind"].tolist() == ["any", "appearance", "blobs"] and table["share"].tolist() == [.5, .25, .25] and table["auroc"].eq(1).all()
    assert table["base"].tolist() == [.5, 1 / 3, 1 / 3]


@pytest.mark.parametrize("score, kind, known, message", [
    ([.5, np.nan], [0, 1], [True, True], "score: numbers from 0 to 1"), ([.5, -.1], [0, 1], [True, True], "score"), ([.5, 1.2], [0, 1], [True, True], "score"),
    ([.5, .5], [0, 6], [True, True], "kind: 0..5"), ([.5, .5], [0, -1], [True, True], "kind: 0..5"), ([.5], [0, 1], [True, True], "shapes"), ([.5, .5], [0, 1], [True], "shapes"),
])
def test_histogram_refuses(score, kind, known, message):
    with pytest.raises(DataError, match=message): histogram(np.float32(score), np.array(kind), np.array(known))


def test_histogram_looks_at_known_pixels_only():
    assert histogram(np.float32([.25, .5, np.nan]), np.array([1, 0, 99]), np.array([True, True, False])).auroc() == 1


def test_histogram_refuses_other_names_and_counts():
    with pytest.raises(ConfigError, match="did you mean 'blobs'"): ScoreHistogram().auroc("blob")
    with pytest.raises(ConfigError, match="kind of noise"): ScoreHistogram().average_precision("right")
    with pytest.raises(DataError, match=r"counts of shape \(2, 3\)"): ScoreHistogram(np.zeros((2, 3)))


def test_noise_share_by_hand():
    weights, wrong = np.array([[1, .5], [.5, 2]]), np.array([[False, True], [True, False]])
    assert noise_share(weights, wrong, np.ones((2, 2), bool)) == {"noise": .5, "noise_in_weights": .25, "weight_wrong": .5, "weight_right": 1.5}
    assert noise_share(torch.tensor(weights), wrong, np.array([[True, True], [False, False]])) == {"noise": .5, "noise_in_weights": pytest.approx(1 / 3), "weight_wrong": .5, "weight_right": 1}


def test_noise_shares_of_batches_add_up():
    rng = np.random.default_rng(0)
    weights, wrong, known = rng.random((4, 8, 8)), rng.random((4, 8, 8)) < .4, rng.random((4, 8, 8)) < .9
    share = NoiseShare()
    for i in range(4): share.update(weights[i], wrong[i], known[i])
    assert share.figures() == pytest.approx(noise_share(weights, wrong, known)) and share.figures()["noise"] == pytest.approx(wrong[known].mean())


def test_noise_share_of_nothing_is_nan_and_bad_weights_are_refused():
    none = noise_share(np.zeros(2), np.array([True, False]), np.ones(2, bool))
    assert np.isnan(none["noise_in_weights"]) and none["weight_wrong"] == none["weight_right"] == 0
    assert np.isnan(noise_share(np.ones(2), np.zeros(2, bool), np.ones(2, bool))["weight_wrong"]) and np.isnan(NoiseShare().figures()["noise"])
    for bad in (np.nan, -1, np.inf):
        with pytest.raises(DataError, match="weights: finite"): noise_share(np.array([1, bad]), np.zeros(2, bool), np.ones(2, bool))
    with pytest.raises(DataError, match="shapes"): noise_share(np.ones(3), np.zeros(2, bool), np.ones(2, bool))


def test_calibration_by_hand():
    found = Calibration(bins=5)
    found.update(np.array([.1, .3, .35, .9, 1.0, .9]), np.array([0, 1, 0, 1, 1, 0], bool), np.array([1, 1, 1, 1, 1, 0], bool))
    table = found.table()
    assert table["pixels"].tolist() == [1, 2, 0, 0, 2] and table["confidence"].dropna().tolist() == pytest.approx([.1, .325, .95])
    assert table["accuracy"].dropna().tolist() == [0, .5, 1] and found.ece() == pytest.approx((.1 + 2 * .175 + 2 * .05) / 5)


def test_calibration_bins_are_closed_at_the_right():
    found = Calibration(bins=4)
    found.update(torch.tensor([0, .25, .26, .5, 1.0000001]), torch.ones(5), torch.ones(5, dtype=torch.bool))
    assert found.table()["pixels"].tolist() == [2, 2, 0, 1]


def test_calibrations_add_up_and_are_stored():
    rng = np.random.default_rng(0)
    probability, right, known = rng.random((3, 500)), rng.random((3, 500)) < .5, rng.random((3, 500)) < .8
    whole, parts = Calibration(), []
    whole.update(probability, right, known)
    for row in range(3):
        parts.append(Calibration())
        parts[-1].update(probability[row], right[row], known[row])
    assert (parts[0] + parts[1] + parts[2]).sums == pytest.approx(whole.sums) and Calibration(whole.sums).ece() == whole.ece() and len(whole.table()) == 15


def test_calibration_of_nothing_and_of_what_is_no_probability():
    assert np.isnan(Calibration().ece()) and Calibration().table()["accuracy"].isna().all()
    for bad in (np.nan, 1.5, -.2):
        with pytest.raises(DataError, match="probability: numbers from 0 to 1"): Calibration().update(np.array([bad]), np.ones(1), np.ones(1, bool))
    with pytest.raises(DataError, match="sums of shape"): Calibration(np.zeros((2, 15)))


def runs(seed=0, scenes=3, seeds=2, places=12, classes=3, gain=0.0):
    "Two methods on the same reference, as confusion matrices per location."
    rng, methods = np.random.default_rng(seed), ({}, {})
    for data in range(scenes):
        truth = rng.integers(1, 60, (places, classes))
        for train in range(seeds):
            for method, more in zip(methods, (gain, 0)):
                hit = rng.binomial(truth, .6 + more)
                counts = rng.multinomial(truth - hit, np.full(classes, 1 / classes))
                counts[:, range(classes), range(classes)] += hit
                method[data, train] = counts
    return methods


def miou(counts): return segmentation_metrics(counts)["miou"]


def test_miou_is_that_of_the_tables():
    counts = np.random.default_rng(0).integers(0, 9, (40, 4, 4))
    counts[:10, 1] = 0                                    # a class that the reference lacks
    counts[0] = 0
    assert _miou(counts.astype(float))[1:] == pytest.approx([miou(c) for c in counts[1:]]) and np.isnan(_miou(counts.astype(float))[0])


def test_bootstrap_means_and_counts():
    a, b = runs(gain=.05)
    found = paired_bootstrap(a, b, draws=200)
    single = [miou(a[k].sum(0)) - miou(b[k].sum(0)) for k in a]
    assert found["mean"] == pytest.approx(np.mean(single)) and found["runs"] == 6 and found["better"] == sum(d > 0 for d in single)
    assert found["low"] < found["mean"] < found["high"] and found["low_fixed"] < found["mean"] < found["high_fixed"]


def test_bootstrap_repeats_and_turns_round():
    a, b = runs(gain=.05)
    found, back = paired_bootstrap(a, b, draws=100, seed=3), paired_bootstrap(b, a, draws=100, seed=3)
    assert found == paired_bootstrap(a, b, draws=100, seed=3) != paired_bootstrap(a, b, draws=100, seed=4)
    assert back["mean"] == -found["mean"] and back["low"] == pytest.approx(-found["high"]) and back["high_fixed"] == pytest.approx(-found["low_fixed"])


def test_bootstrap_of_a_method_with_itself_is_zero():
    a, _ = runs()
    assert set(paired_bootstrap(a, a, draws=50).values()) == {0.0, 6}


def test_bootstrap_over_locations_is_that_of_the_difference():
    "For a share of right pixels with equal locations the spread is that of a mean over locations."
    rng, places = np.random.default_rng(0), 40
    hit = rng.integers(40, 90, (2, places))
    a, b = ({(0, 0): np.array([[h, 100 - h], [0 * h, 0 * h]]).transpose(2, 0, 1)} for h in hit)
    difference = (hit[0] - hit[1]) / 100
    expected = difference.mean() + np.array([-1.96, 1.96]) * difference.std() / np.sqrt(places)
    found = paired_bootstrap(a, b, "oa", over=["locations"], draws=20000)
    assert [found["low"], found["high"]] == pytest.approx(expected, abs=.004) and found["low"] == found["low_fixed"]


def test_training_seeds_share_the_draw_of_locations():
    "Two runs that are alike are no more evidence than one."
    a, b = runs(scenes=1, seeds=1)
    twice = [{(0, 0): m[0, 0], (0, 1): m[0, 0]} for m in (a, b)]
    one, two = (paired_bootstrap(*methods, over=["train", "locations"], draws=4000) for methods in ((a, b), twice))
    assert two["high"] - two["low"] == pytest.approx(one["high"] - one["low"], rel=.08)


def test_one_seed_less_is_drawn():
    "Two training seeds: one of them is drawn, so the interval is that of the two. Three data seeds: two are drawn."
    def method(shares): return {k: np.array([[[100 * s, 100 - 100 * s], [0, 0]]]) for k, s in shares.items()}
    base = method(dict.fromkeys([(0, 0), (0, 1)], .5))
    found = paired_bootstrap(method({(0, 0): .6, (0, 1): .8}), base, "oa", over=["train"], draws=500)
    assert [found["low"], found["high"]] == pytest.approx([.1, .3]) and found["mean"] == pytest.approx(.2)
    base = method({(d, 0): .5 for d in range(3)})
    found = paired_bootstrap(method({(0, 0): .6, (1, 0): .7, (2, 0): .8}), base, "oa", over=["data"], draws=500)
    assert [found["low"], found["high"]] == pytest.approx([.1, .3]) and np.isnan(found["low_fixed"])


def test_bootstrap_takes_other_figures_and_uneven_runs():
    a, b = runs(gain=.1)
    del a[2, 1], b[2, 1]
    def recall(counts): return counts[..., 0, 0] / counts[..., 0, :].sum(-1)
    found = paired_bootstrap(a, b, recall, draws=100)
    by_scene = [np.mean([recall(a[k].sum(0)) - recall(b[k].sum(0)) for k in a if k[0] == d]) for d in range(3)]
    assert found["mean"] == pytest.approx(np.mean(by_scene)) and found["runs"] == 5


def test_bootstrap_refuses_what_is_not_paired():
    a, b = runs()
    with pytest.raises(DataError, match=r"runs \(2, 1\) are there for one"): paired_bootstrap(a, {k: v for k, v in b.items() if k != (2, 1)})
    with pytest.raises(DataError, match="no run"): paired_bootstrap({}, {})
    with pytest.raises(DataError, match="data seed 0: counts of shape"): paired_bootstrap(a, {**b, (0, 0): b[0, 0][:-1]})
    with pytest.raises(DataError, match="same locations, in one order"): paired_bootstrap(a, {**b, (0, 0): b[0, 0][::-1]})
    with pytest.raises(DataError, match="same locations, in one order"): paired_bootstrap(*({**m, (1, 1): m[1, 1][::-1]} for m in (a, b)))
    with pytest.raises(DataError, match="negative counts"): paired_bootstrap(*({**m, (1, 1): -m[1, 1]} for m in (a, b)))
    with pytest.raises(DataError, match="no labelled pixel"): paired_bootstrap(*({(0, 0): 0 * m[0, 0]} for m in (a, b)))
    few = {(0, 0): np.array([[[5, 0], [0, 0]], [[0, 0], [0, 0]]])}
    with pytest.raises(DataError, match="more labelled locations"): paired_bootstrap(few, few, draws=100)
    with pytest.raises(ConfigError, match="level of resampling"): paired_bootstrap(a, b, over=["location"])
    with pytest.raises(ConfigError, match="unknown figure"): paired_bootstrap(a, b, "iou")


@pytest.mark.parametrize("freedom", [1, 2, 3, 5, 11, 30, 200])
@pytest.mark.parametrize("level", [.5, .9, .95, .99])
def test_students_factor(level, freedom):
    assert _student(level, freedom) == pytest.approx(stats.t.ppf(.5 + level / 2, freedom), rel=1e-5)


def test_paired_interval_is_students():
    a, b = {(0, 0): .6, (0, 1): .64, (1, 0): .58, (1, 1): .6}, {(1, 1): .59, (1, 0): .59, (0, 0): .55, (0, 1): .6}
    difference = [.05, .04, -.01, .01]
    found = paired_interval(a, b)
    low, high = stats.t.interval(.95, 3, np.mean(difference), stats.sem(difference))
    assert (found["low"], found["high"]) == pytest.approx((low, high), rel=1e-4) and found["runs"] == 4 and found["better"] == 3
    found = paired_interval(a, b, by="data")
    low, high = stats.t.interval(.95, 1, .0225, stats.sem([.045, 0]))
    assert (found["low"], found["high"]) == pytest.approx((low, high), rel=1e-4) and found["runs"] == 2


def test_paired_interval_of_one_run_and_of_other_runs():
    alone = paired_interval({0: .6}, {0: .5})
    assert alone["mean"] == pytest.approx(.1) and np.isnan(alone["low"]) and alone["better"] == 1
    with pytest.raises(DataError, match="for one of the two only"): paired_interval({0: .6}, {1: .5})
    with pytest.raises(DataError, match="NaN"): paired_interval({0: np.nan}, {0: .5})
    with pytest.raises(ConfigError, match="unit of a paired interval"): paired_interval({0: .6}, {0: .5}, by="seed")


def test_rank_against_reference():
    rng = np.random.default_rng(0)
    labels, reference = rng.integers(0, 2, (2, 12, 12))
    labels[0], reference[1], score = IGNORE, IGNORE, rng.integers(0, 9, (12, 12)).astype(float)
    score[2] = np.nan
    found = rank_against_reference({"one": score, "other": torch.ones(12, 12)}, labels, reference)
    wrong, part = (labels != reference)[3:], score[3:]
    assert found["auroc"].tolist() == pytest.approx([pairs_auroc(part[wrong], part[~wrong]), .5])
    assert found["pixels"].eq(9 * 12).all() and found["disagree"].eq(wrong.mean()).all() and found["score"].tolist() == ["one", "other"]


def test_rank_where_there_is_nothing_to_rank():
    same, score = np.zeros((4, 4), int), {"one": np.ones((4, 4))}
    agree, differ, empty = (rank_against_reference(score, labels, same) for labels in (same, same + 1, same + IGNORE))
    assert np.isnan(agree.loc[0, "auroc"]) and agree.loc[0, "disagree"] == 0 and np.isnan(differ.loc[0, "auroc"]) and differ.loc[0, "disagree"] == 1
    assert np.isnan(empty.loc[0, "disagree"]) and empty.loc[0, "pixels"] == 0 and isinstance(empty, pd.DataFrame)
    with pytest.raises(DataError, match="scores is empty"): rank_against_reference({}, same, same)
    with pytest.raises(DataError, match="shapes"): rank_against_reference(score, same[1:], same)
