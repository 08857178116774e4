"The streamed area under the ROC curve and the class scores, against torchmetrics."
import math

import pytest
import torch
from torchmetrics.classification import BinaryAUROC, MulticlassJaccardIndex
from torchmetrics.functional.classification import multiclass_confusion_matrix

from cromss.metrics import segmentation_metrics
from cromss.pretraining import WrongPixelAUROC


def ours(confidence, wrong, known=None, batches=1):
    "The area, in so many updates."
    metric, known = WrongPixelAUROC(), torch.ones_like(wrong) if known is None else known
    for part in zip(*(x.chunk(batches) for x in (confidence, wrong, known)), strict=True): metric.update(*part)
    return metric.compute().item()


def theirs(confidence, wrong):
    "A wrong pixel is a positive, and doubt its score. Torchmetrics takes scores outside [0, 1] for logits, so in range they stay."
    return BinaryAUROC()((1 - confidence.double()).clamp(0, 1), wrong.long()).item()


def draw(n=20000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(n, generator=generator) < 0.3
    return torch.rand(n, generator=generator).pow(torch.where(wrong, 2., 0.7)), wrong


@pytest.mark.parametrize("make", [
    lambda c: c, lambda c: (c * 8).round() / 8, lambda c: c.round(), lambda c: c * 0, lambda c: c * 0 + 1, lambda c: c ** 12,
    lambda c: torch.where(c < 0.3, 0., torch.where(c > 0.8, 1., c)),
], ids=["spread", "tied", "two values", "all zero", "all one", "mostly tiny", "heaps at both ends"])
@pytest.mark.parametrize("batches", [1, 7])
def test_agrees_with_torchmetrics(make, batches):
    confidence, wrong = draw()
    confidence = make(confidence)
    assert ours(confidence, wrong, batches=batches) == pytest.approx(theirs(confidence, wrong), abs=2e-3)


def test_small_cases_by_hand():
    def area(wrong, right): return ours(torch.tensor([*wrong, *right]), torch.tensor([True] * len(wrong) + [False] * len(right)))
    assert area([.1], [.9]) == 1 and area([.9], [.1]) == 0 and area([.5], [.5]) == 0.5 and area([0.], [1.]) == 1 and area([1e-30], [1e-20]) == 1
    assert area([.1, .9], [.5]) == 0.5 and area([.1, .5], [.5, .9]) == pytest.approx(3.5 / 4)


def test_values_far_below_one_are_told_apart():
    confidence, wrong = draw()
    assert ours(confidence * 1e-20, wrong) == pytest.approx(ours(confidence, wrong), abs=2e-3)


def test_only_known_pixels_count_in_any_shape():
    confidence, wrong = draw(4096)
    known = torch.rand(4096, generator=torch.manual_seed(1)) < 0.5
    expected = ours(confidence[known], wrong[known])
    shaped = [x.view(4, 32, 32) for x in (confidence, wrong, known)]
    assert ours(*shaped) == expected == ours(confidence, wrong, known)


def halves():
    "One metric for each of two processes, and the area of both."
    confidence, wrong = draw()
    parts = [WrongPixelAUROC(), WrongPixelAUROC()]
    for part, chosen in zip(parts, (slice(5000), slice(5000, None)), strict=True):
        part.update(confidence[chosen], wrong[chosen], torch.ones_like(wrong[chosen]))
    return *parts, ours(confidence, wrong)


def test_processes_are_reduced_to_one():
    first, second, expected = halves()
    whole = WrongPixelAUROC()
    for name, reduce in whole._reductions.items(): setattr(whole, name, reduce(torch.stack([getattr(first, name), getattr(second, name)])))
    whole._update_count = 2
    assert whole.compute().item() == expected != first.compute().item()


def test_two_instances_merge():
    first, second, expected = halves()
    first.merge_state(second)
    assert first.compute().item() == expected


def test_reset_forgets():
    confidence, wrong = draw(100)
    metric = WrongPixelAUROC()
    metric.update(confidence, wrong, torch.ones(100, dtype=torch.bool))
    metric.reset()
    assert metric.wrong.sum() == 0 and metric.right.sum() == 0


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_without_one_of_both_there_is_no_area():
    confidence, wrong = draw(100)
    nothing = torch.zeros(100, dtype=torch.bool)
    assert math.isnan(ours(confidence, nothing)) and math.isnan(ours(confidence, ~nothing)) and math.isnan(ours(confidence, wrong, nothing))
    assert math.isnan(WrongPixelAUROC().compute())


@pytest.mark.parametrize("value", [math.nan, -math.nan])
def test_a_nan_does_not_stop_validation(value):
    ours(torch.tensor([value, .2, .8]), torch.tensor([False, True, False]))


# ---- class scores

def table(num_classes=6, absent=(), seed=0, n=5000):
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randint(0, num_classes, (n,), generator=generator)
    for c in absent: reference[reference == c] = (c + 1) % num_classes
    predicted = torch.where(torch.rand(n, generator=generator) < 0.6, reference, torch.randint(0, num_classes, (n,), generator=generator))
    return reference, predicted


@pytest.mark.parametrize("absent", [(), (2,), (0, 3)])
def test_iou_is_torchmetrics(absent):
    reference, predicted = table(absent=absent)
    scores = segmentation_metrics(multiclass_confusion_matrix(predicted, reference, 6))
    expected = MulticlassJaccardIndex(6, average="none")(predicted, reference)
    present = [c for c in range(6) if c not in absent]
    assert [scores["iou"][c] for c in present] == pytest.approx(expected[present].tolist(), abs=1e-6)
    assert all(math.isnan(scores["iou"][c]) for c in absent)                 # predicted or not
    assert scores["miou"] == pytest.approx(expected[present].mean().item(), abs=1e-6)
    assert scores["oa"] == pytest.approx((reference == predicted).double().mean().item())
    if not absent: assert scores["miou"] == pytest.approx(MulticlassJaccardIndex(6)(predicted, reference).item(), abs=1e-6)


def test_scores_by_hand():
    scores = segmentation_metrics([[3, 1, 0], [0, 2, 2], [0, 0, 0]])                 # the third class is predicted, but never true
    assert scores["oa"] == 5 / 8 and scores["miou"] == pytest.approx((3 / 4 + 2 / 5) / 2)
    assert scores["iou"][:2] == [3 / 4, 2 / 5] and math.isnan(scores["iou"][2])
    empty = segmentation_metrics(torch.zeros(3, 3))
    assert math.isnan(empty["oa"]) and math.isnan(empty["miou"]) and all(map(math.isnan, empty["iou"]))
