"The figures of a confusion matrix: against torchmetrics, against smp for the published rule, and at the edges."
import math
import warnings

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from torchmetrics.classification import (MulticlassAccuracy, MulticlassCohenKappa, MulticlassConfusionMatrix, MulticlassF1Score, MulticlassJaccardIndex, MulticlassPrecision,
                                         MulticlassRecall)

from cromss.classes import IGNORE
from cromss.config import ConfigError, DataError
from cromss.metrics import Confusion, mean_std, paired_difference, percent, segmentation_metrics

BY_CLASS = ("iou", "f1", "precision", "recall")
MEANS = {"aa": "recall", "miou": "iou", "mf1": "f1", "mprecision": "precision"}


def maps(seed, num_classes=6, absent=(), unpredicted=(), ignored=0.1, n=3000):
    "A reference and a map, random: classes that the one or the other lacks, and unlabelled pixels."
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randint(0, num_classes, (n,), generator=generator)
    other = torch.randint(0, num_classes, (n,), generator=generator)
    for c in absent: reference[reference == c] = next(k for k in range(num_classes) if k not in absent)
    predicted = torch.where(torch.rand(n, generator=generator) < 0.6, reference, other)
    for c in unpredicted: predicted[predicted == c] = next(k for k in range(num_classes) if k not in unpredicted)
    reference[torch.rand(n, generator=generator) < ignored] = IGNORE
    return predicted, reference


def count(predicted, reference, num_classes=6):
    matrix = Confusion(num_classes)
    matrix.update(predicted, reference)
    return matrix.compute()


CASES = [dict(seed=0), dict(seed=1, absent=(2,)), dict(seed=2, unpredicted=(1,)), dict(seed=3, absent=(0, 3), unpredicted=(0,)), dict(seed=4, absent=(5,), unpredicted=(5, 1)),
         dict(seed=5, ignored=0.9), dict(seed=6, num_classes=2), dict(seed=7, num_classes=13, absent=(12, 4), unpredicted=(4,))]


@pytest.mark.parametrize("case", CASES)
def test_figures_of_classes_that_are_there_are_torchmetrics(case):
    predicted, reference = maps(**case)
    c = case.get("num_classes", 6)
    scores = segmentation_metrics(count(predicted, reference, c))
    there = [k for k in range(c) if k not in case.get("absent", ())]
    oracles = {"iou": MulticlassJaccardIndex, "f1": MulticlassF1Score, "precision": MulticlassPrecision, "recall": MulticlassRecall}
    for name, oracle in oracles.items():
        expected = oracle(c, average="none", ignore_index=IGNORE)(predicted, reference)[there]
        assert [scores[name][k] for k in there] == pytest.approx(expected.tolist(), abs=1e-6), name
        assert all(math.isnan(scores[name][k]) for k in range(c) if k not in there), name
    for mean, name in MEANS.items(): assert scores[mean] == pytest.approx(np.mean([scores[name][k] for k in there]), abs=1e-12), mean
    assert scores["oa"] == pytest.approx(MulticlassAccuracy(c, average="micro", ignore_index=IGNORE)(predicted, reference).item(), abs=1e-6)
    assert scores["kappa"] == pytest.approx(MulticlassCohenKappa(c, ignore_index=IGNORE)(predicted, reference).item(), abs=1e-6)
    assert scores["support"] == [int((reference == k).sum()) for k in range(c)]
    assert scores["predicted"] == [int(((predicted == k) & (reference != IGNORE)).sum()) for k in range(c)]


@pytest.mark.parametrize("case", CASES)
def test_the_published_rule_is_smp(case):
    predicted, reference = maps(**case)
    c, known = case.get("num_classes", 6), reference != IGNORE
    scores = segmentation_metrics(count(predicted, reference, c), absent="one")
    stats = smp.metrics.get_stats(predicted[known][None], reference[known][None], mode="multiclass", num_classes=c)
    oracles = {"iou": smp.metrics.iou_score, "f1": smp.metrics.f1_score, "precision": smp.metrics.precision, "recall": smp.metrics.recall}
    for mean, name in MEANS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                  # of the division by zero that is asked for
            expected = oracles[name](*stats, reduction="macro", zero_division=1.0).item()
        assert scores[mean] == pytest.approx(expected, abs=1e-6), mean


@pytest.mark.parametrize("case", CASES)
def test_the_published_rule_as_written(case):
    "OA = hits / pixels; a plain mean over all classes, in which 0 / 0 counts 1."
    predicted, reference = maps(**case)
    c = case.get("num_classes", 6)
    sums = dict.fromkeys(BY_CLASS, 0.0)
    for k in range(c):
        hit = false = missed = 0
        for p, r in zip(predicted.tolist(), reference.tolist()):
            if r == IGNORE: continue
            if p == k and r == k: hit += 1
            elif p == k: false += 1
            elif r == k: missed += 1
        for name, part, whole in (("iou", hit, hit + false + missed), ("f1", 2 * hit, 2 * hit + false + missed), ("precision", hit, hit + false), ("recall", hit, hit + missed)):
            sums[name] += part / whole if whole else 1.0
    scores = segmentation_metrics(count(predicted, reference, c), absent="one")
    for mean, name in MEANS.items(): assert scores[mean] == pytest.approx(sums[name] / c, abs=1e-12), mean
    known = reference != IGNORE
    assert scores["oa"] == pytest.approx((predicted == reference)[known].double().mean().item())


def test_the_rules_differ_in_precision_alone_where_every_class_is_there():
    confusion = count(*maps(seed=2, unpredicted=(1,)))
    ours, published = segmentation_metrics(confusion), segmentation_metrics(confusion, "one")
    for name in ("oa", "aa", "miou", "mf1", "kappa", "iou", "f1", "recall", "support", "predicted"): assert ours[name] == published[name], name
    assert ours["precision"][1] == 0 and published["precision"][1] == 1
    assert published["mprecision"] - ours["mprecision"] == pytest.approx(1 / 6)


def test_by_hand():
    scores = segmentation_metrics([[3, 1, 0], [0, 2, 2], [0, 0, 0]])          # the third class is predicted, but never true
    assert scores["oa"] == 5 / 8 and scores["miou"] == pytest.approx((3 / 4 + 2 / 5) / 2)
    assert scores["iou"][:2] == [3 / 4, 2 / 5] and math.isnan(scores["iou"][2]) and math.isnan(scores["precision"][2])
    assert scores["recall"][:2] == [3 / 4, 1 / 2] and scores["precision"][:2] == [1, 2 / 3] and scores["aa"] == 0.625


def test_pixels_of_a_class_that_is_not_there_cost_recall_and_no_precision():
    right, wrong = segmentation_metrics([[4, 0, 0], [1, 5, 0], [0, 0, 0]]), segmentation_metrics([[2, 0, 2], [1, 5, 0], [0, 0, 0]])
    assert wrong["precision"][1] == right["precision"][1] and wrong["recall"][0] < right["recall"][0] and wrong["iou"][0] < right["iou"][0] and wrong["oa"] < right["oa"]


@pytest.mark.parametrize("absent", ["skip", "one"])
@pytest.mark.parametrize("num_classes", [1, 4])
def test_nothing_is_nan(absent, num_classes):
    scores = segmentation_metrics(np.zeros((num_classes, num_classes), int), absent)
    assert all(math.isnan(scores[name]) for name in ("oa", "kappa", *MEANS)) and all(math.isnan(v) for name in BY_CLASS for v in scores[name])
    assert scores["support"] == [0] * num_classes


def test_a_single_class():
    scores = segmentation_metrics([[7]])
    assert all(scores[name] == 1 for name in ("oa", *MEANS)) and math.isnan(scores["kappa"])
    scores = segmentation_metrics([[7, 3], [0, 0]])
    assert scores["oa"] == scores["miou"] == scores["aa"] == 0.7 and scores["kappa"] == 0


def test_large_counts_are_exact():
    many = 3 * 10 ** 9
    scores = segmentation_metrics(torch.tensor([[many, many], [0, 2 * many]]))
    assert scores["oa"] == 0.75 and scores["support"] == [2 * many] * 2 and scores["kappa"] == pytest.approx(0.5)


def test_any_container_of_counts():
    expected = segmentation_metrics([[3, 1], [2, 4]])
    for given in (np.array([[3, 1], [2, 4]], np.uint8), torch.tensor([[3, 1], [2, 4]]), torch.tensor([[3.0, 1.0], [2.0, 4.0]], requires_grad=True)):
        assert segmentation_metrics(given) == expected


@pytest.mark.parametrize("wrong, message", [
    ([[1, 2, 3]], r"shape \(1, 3\)"), ([1, 2], "shape"), ([[1, 2], [3]], "square"), ([], "shape"), ([["a"]], "square matrix"), (np.zeros((0, 0)), "shape"),
    ([[1, -1], [0, 1]], "0 or more"), ([[1, math.nan], [0, 1]], "whole numbers"), ([[math.inf]], "whole numbers"), ([[0.5, 0.5], [0, 1]], "not shares"), (None, "square|shape")])
def test_what_is_no_matrix_is_refused(wrong, message):
    with pytest.raises(DataError, match=message) as e: segmentation_metrics(wrong)
    assert "\n" not in str(e.value)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'skip'"): segmentation_metrics([[1]], absent="skipp")


# counting -----------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("case", CASES)
def test_counts_are_torchmetrics(case):
    predicted, reference = maps(**case)
    c = case.get("num_classes", 6)
    expected = MulticlassConfusionMatrix(c, ignore_index=IGNORE)(predicted, reference)
    assert torch.equal(count(predicted, reference, c), expected)
    grown = Confusion(c)
    for part in torch.arange(3000).split(700): grown.update(predicted[part].view(1, -1), reference[part].view(1, -1))
    assert torch.equal(grown.compute(), expected)


def test_logits_and_dtypes():
    logits = torch.randn(2, 5, 8, 9, generator=torch.Generator().manual_seed(0))
    reference = torch.randint(0, 5, (2, 8, 9), generator=torch.Generator().manual_seed(1))
    expected = count(logits.argmax(1), reference, 5)
    for dtype in (torch.float16, torch.bfloat16): assert count(logits.to(dtype), reference, 5).sum() == expected.sum()
    assert torch.equal(count(logits, reference.to(torch.uint8), 5), expected)
    assert torch.equal(count(logits.argmax(1).to(torch.uint8), reference.to(torch.int32), 5), expected)


def test_all_unlabelled_counts_nothing():
    matrix = count(torch.full((2, 3), 1), torch.full((2, 3), IGNORE), 3)
    assert matrix.sum() == 0 and math.isnan(segmentation_metrics(matrix)["miou"])


@pytest.mark.parametrize("predicted, reference", [([0, 3], [0, 1]), ([0, -1], [0, 1]), ([0, 1], [0, 3]), ([0, 1], [0, -1]), ([0, 1], [0, 254])])
def test_impossible_pixels_are_refused(predicted, reference):
    with pytest.raises(DataError, match="1 pixels have a label or a prediction that is none of the 3 classes"): count(torch.tensor(predicted), torch.tensor(reference), 3)


def test_logits_that_are_nan_are_refused_where_they_count():
    logits = torch.zeros(1, 3, 2, 2)
    logits[0, 1, 0, 0] = torch.nan
    reference = torch.zeros(1, 2, 2, dtype=torch.long)
    with pytest.raises(DataError, match="1 pixels .* NaN"): count(logits, reference, 3)
    reference[0, 0, 0] = IGNORE
    assert count(logits, reference, 3).sum() == 3


@pytest.mark.parametrize("shape", [(2, 4, 5), (2, 4, 8, 8), (2, 3, 8, 9), (3, 8, 8)])
def test_shapes_that_do_not_fit_are_refused(shape):
    with pytest.raises(DataError, match="must be equal"): Confusion(3).update(torch.zeros(shape), torch.zeros(2, 8, 8, dtype=torch.long))


def test_it_is_a_metric():
    "Reset, merged, moved and counted on as torchmetrics' own; `compute` gives a copy."
    a, b = Confusion(2), Confusion(2, sync_on_compute=False)
    a.update(torch.tensor([0, 1]), torch.tensor([0, 0]))
    b.update(torch.tensor([1, 1]), torch.tensor([1, 0]))
    b.compute().zero_()
    a.merge_state(b)
    assert a.compute().tolist() == [[1, 2], [0, 1]]
    a.reset()
    assert a.counts.sum() == 0 and a.counts.dtype == torch.long
    assert Confusion(2).half().counts.dtype == torch.long


def test_no_value_is_asked_of_the_device():
    "On the meta device there are no values: an update that needs one fails there."
    matrix = Confusion(4).to("meta")
    matrix.update(torch.zeros(2, 4, 8, 8, device="meta"), torch.zeros(2, 8, 8, dtype=torch.long, device="meta"))
    matrix.update(torch.zeros(2, 8, 8, dtype=torch.long, device="meta"), torch.zeros(2, 8, 8, dtype=torch.uint8, device="meta"))
    theirs = MulticlassConfusionMatrix(4, ignore_index=IGNORE, validate_args=False).to("meta")
    with pytest.raises((NotImplementedError, RuntimeError)): theirs.update(torch.zeros(2, 8, 8, dtype=torch.long, device="meta"), torch.zeros(2, 8, 8, dtype=torch.long, device="meta"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_does_not_wait():
    predicted, reference = (t.cuda() for t in maps(seed=0))
    matrix = Confusion(6).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try: matrix.update(predicted, reference)
    finally: torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(matrix.compute().cpu(), count(predicted.cpu(), reference.cpu()))


# seeds --------------------------------------------------------------------------------------------------------------------------------

def test_mean_and_std():
    assert mean_std([0.2, 0.4, 0.6]) == pytest.approx((0.4, 0.2)) and mean_std(v for v in (0.2, 0.4)) == pytest.approx((0.3, 0.02 ** 0.5))
    mean, std = mean_std([0.5])
    assert mean == 0.5 and math.isnan(std)
    assert all(map(math.isnan, mean_std([]))) and all(map(math.isnan, mean_std([0.5, math.nan])))


def test_percent():
    assert percent(0.6013, 0.0042) == "60.1±0.4" and percent(0.6013, 0.0042, 2) == "60.13±0.42" and percent(0.6013) == "60.1" and percent(math.nan) == "-"


def test_paired_difference():
    gain = paired_difference({1: 0.6, 0: 0.5, 2: 0.4}, {0: 0.4, 1: 0.4, 2: 0.5})     # by seed, whatever the order
    assert gain == {"mean": pytest.approx(0.2 / 3), "std": pytest.approx(np.std([0.1, 0.2, -0.1], ddof=1)), "seeds": 3, "better": 2}
    assert paired_difference([0.5, 0.6], [0.5, 0.4])["better"] == 1
    assert math.isnan(paired_difference([0.5], [0.4])["std"])


@pytest.mark.parametrize("a, b, message", [({0: 0.5, 1: 0.5}, {0: 0.5}, "seeds 1 are there for one"), ([0.5, 0.6], [0.5], "seeds 1"), ([0.5, math.nan], [0.5, 0.5], "NaN"), ([], [], "none at all")])
def test_what_is_no_pair_is_refused(a, b, message):
    with pytest.raises(DataError, match=message): paired_difference(a, b)


def test_a_seed_given_twice_is_refused():
    import pandas as pd
    with pytest.raises(DataError, match="twice"): paired_difference(pd.Series([0.5, 0.6], index=[0, 0]), pd.Series([0.5, 0.6], index=[0, 0]))
