"Selection against a sort per class, its edges, its refusals, and that no step waits for a device."
import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.utils._python_dispatch import TorchDispatchMode

from cromss.config import ConfigError, DataError, SelectionConfig
from cromss.selection import (LogProbabilities, class_thresholds, entangle, image_by_image, keep_fraction, label_confidence, label_weights,
                              log_probabilities, prediction_confidence, prediction_weights, probabilities, ramp, select, sensor_log_probabilities)

METHODS = ("exact", "histogram")
KEEPS = (0, 1e-9, 0.5, 0.999, 1)
UNLABELLED = 255


# ---- a sort per class

def naive_thresholds(confidence, labels, keep, num_classes, per_class, usable):
    "The max(1, floor(n keep))-th largest confidence of every class, by sorting."
    tau = np.zeros(num_classes, np.float32)
    for c in range(num_classes):
        values = np.sort(confidence[usable & (labels == c)] if per_class else confidence[usable])[::-1]
        if len(values): tau[c] = values[max(1, math.floor(len(values) * keep)) - 1]
    return tau


def naive_weights(confidence, labels, keep, tau, usable):
    "clip(confidence / tau, 0, 1), pixel by pixel."
    weights = np.zeros_like(confidence)
    for x in np.argwhere(usable):
        x, c = tuple(x), labels[tuple(x)]
        if keep == 0: weights[x] = confidence[x]
        else: weights[x] = 1 if confidence[x] >= tau[c] else confidence[x] / tau[c]
    return weights


@st.composite
def cases(draw):
    "Confidences with ties and zeros, labels with absent classes, lone pixels and gaps, and what is asked of them."
    num_classes = draw(st.integers(1, 5))
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)))
    value = st.sampled_from([0., 0.25, 0.5, 1.]) | st.floats(0, 1, width=32, allow_subnormal=False) | st.floats(0, 2.0 ** -60, width=32, allow_subnormal=False)
    present = draw(st.lists(st.integers(0, num_classes - 1), min_size=1, unique=True))
    confidence = draw(hnp.arrays(np.float32, shape, elements=draw(st.sampled_from([value, st.just(0.), st.sampled_from([0.25, 0.5])]))))
    labels = draw(hnp.arrays(np.int64, shape, elements=st.sampled_from([*present, UNLABELLED])))
    valid = draw(st.none() | hnp.arrays(bool, shape))
    return num_classes, confidence, labels, valid, draw(st.sampled_from(KEEPS)), draw(st.booleans())


@hypothesis_settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(cases())
def test_agrees_with_a_sort_per_class(case):
    num_classes, confidence, labels, valid, keep, per_class = case
    usable = (labels != UNLABELLED) & (True if valid is None else valid)
    tensors = torch.from_numpy(confidence), torch.from_numpy(labels), keep, num_classes
    options = dict(per_class=per_class, valid=None if valid is None else torch.from_numpy(valid))
    tau = naive_thresholds(confidence, labels, keep, num_classes, per_class, usable)
    expected = naive_weights(confidence, labels, keep, tau, usable)

    exact = class_thresholds(*tensors, method="exact", **options).numpy()
    weights = label_weights(*tensors, method="exact", **options).numpy()
    assert (exact.view(np.int32) == tau.view(np.int32)).all() and (weights.view(np.int32) == expected.view(np.int32)).all()   # to the last bit

    fast = class_thresholds(*tensors, method="histogram", **options).numpy()
    near = label_weights(*tensors, method="histogram", **options).numpy()
    assert (fast <= tau).all() and (tau - fast <= 2.0 ** -8 * tau).all()
    assert (near >= expected).all() and (near - expected <= 2.0 ** -8).all()


@pytest.mark.parametrize("scale", [1, 1e-3, 1e-20, 1e-30])
def test_many_pixels(scale):
    rng = np.random.default_rng(0)
    confidence = (rng.random((4, 32, 32)) ** 3 * scale).astype(np.float32)
    labels = rng.choice([0, 1, 2, 5, 8, UNLABELLED], (4, 32, 32), p=[.5, .2, .2, .05, .0002, .0498])
    usable = labels != UNLABELLED
    for keep in (0.5, 0.857, 0.9966):
        tau = naive_thresholds(confidence, labels, keep, 9, True, usable)
        arguments = torch.from_numpy(confidence), torch.from_numpy(labels), keep, 9
        np.testing.assert_array_equal(class_thresholds(*arguments, method="exact").numpy(), tau)
        np.testing.assert_array_equal(label_weights(*arguments).numpy(), naive_weights(confidence, labels, keep, tau, usable))
        fast = class_thresholds(*arguments).numpy()
        assert (fast <= tau).all() and (tau - fast <= 2.0 ** -8 * tau).all()


def test_values_below_the_normal_floats_are_ranked_exactly():
    confidence = torch.tensor([[[1e-45, 4e-45, 1e-41, 1e-39]]])
    labels = torch.zeros(1, 1, 4, dtype=torch.long)
    assert class_thresholds(confidence, labels, 0.5, 2, "exact")[0] == confidence[0, 0, 2]
    assert class_thresholds(confidence, labels, 1.0, 2, "exact")[0] == confidence[0, 0, 0]
    assert torch.isfinite(label_weights(confidence, labels, 0.5, 2, "histogram")).all()       # there its resolution is absolute, 2**-134


@pytest.mark.parametrize("method", METHODS)
def test_labels_of_every_integer_dtype_weigh_alike(method):
    confidence = torch.rand(2, 8, 8, generator=torch.manual_seed(0))
    labels = torch.randint(0, 3, (2, 8, 8), generator=torch.manual_seed(1)).masked_fill(confidence < 0.1, UNLABELLED)
    expected = label_weights(confidence, labels, 0.5, 3, method)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(label_weights(confidence, labels.to(dtype), 0.5, 3, method), expected)
        assert torch.equal(label_weights(confidence.mT.contiguous().mT, labels.to(dtype), 0.5, 3, method), expected)      # strides do not matter


# ---- edges

@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", [1e-9, 0.5, 0.9966, 1])
def test_a_lone_pixel_keeps_its_weight(method, keep):
    confidence = torch.tensor([[[.9, .8, 1e-6, .3]]])
    labels = torch.tensor([[[0, 0, 1, 2]]])
    assert label_weights(confidence, labels, keep, 4, method)[0, 0, 2:].tolist() == [1, 1]


@pytest.mark.parametrize("method", METHODS)
def test_a_class_without_confidence_keeps_weight_one(method):
    confidence = torch.tensor([[[.8, .4, .2, .1, 0, 0, 0]]])
    labels = torch.tensor([[[0, 0, 0, 0, 1, 1, 1]]])
    weights = label_weights(confidence, labels, 0.5, 2, method)
    assert weights[0, 0, 4:].tolist() == [1, 1, 1] and weights[0, 0, 3] < 0.3
    assert all(torch.equal(weights, label_weights(confidence, labels, 0.5, 2, method)) for _ in range(3))
    assert (label_weights(torch.zeros(1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long), 0.5, 2, method) == 1).all()


@pytest.mark.parametrize("method", METHODS)
def test_ties_at_the_threshold_all_keep_weight_one(method):
    weights = label_weights(torch.tensor([[[.5, .5, .5, .5, .25]]]), torch.zeros(1, 1, 5, dtype=torch.long), 0.4, 1, method)
    assert weights.tolist() == [[[1, 1, 1, 1, 0.5]]]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("per_class", [True, False])
def test_absent_classes_and_empty_batches_have_threshold_zero(method, per_class):
    confidence, none = torch.rand(2, 5, 5), torch.full((2, 5, 5), UNLABELLED)
    labelled, invalid = torch.ones(2, 5, 5, dtype=torch.long), torch.zeros(2, 5, 5, dtype=torch.bool)
    for labels, valid in ((none, None), (none, ~invalid), (labelled, invalid)):
        for keep in KEEPS:
            assert class_thresholds(confidence, labels, keep, 4, method, per_class, valid).tolist() == [0] * 4
            assert (label_weights(confidence, labels, keep, 4, method, per_class, valid) == 0).all()
    tau = class_thresholds(confidence, labelled, 0.5, 4, method)
    assert tau[1] > 0 and tau[[0, 2, 3]].tolist() == [0] * 3


def test_one_threshold_for_all_classes():
    confidence = torch.tensor([[[.9, .8, .7, .2, .1, .05]]])
    labels = torch.tensor([[[0, 0, 0, 1, 1, UNLABELLED]]])
    assert class_thresholds(confidence, labels, 0.6, 3, "exact", per_class=False).tolist() == [confidence[0, 0, 2].item()] * 3
    expected = torch.tensor([1, 1, 1, .2 / .7, .1 / .7, 0])
    assert torch.allclose(label_weights(confidence, labels, 0.6, 3, per_class=False)[0, 0], expected)


@pytest.mark.parametrize("method", METHODS)
def test_all_or_nothing_kept(method):
    confidence = torch.rand(1, 8, 8)
    labels = torch.randint(0, 3, (1, 8, 8)).index_fill(1, torch.tensor([0]), UNLABELLED)
    usable = labels != UNLABELLED
    assert torch.equal(label_weights(confidence, labels, 1, 3, method), usable.float())
    assert torch.equal(label_weights(confidence, labels, 0, 3, method), confidence * usable)


# ---- confidences

@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["entropy", "gini"])
def test_saturated_logits_are_sure_and_finite(dtype, kind):
    logits = torch.full((1, 9, 1, 3), -1e4, dtype=dtype)
    logits[0, 4] = 1e4
    labels = torch.tensor([[[4, 0, UNLABELLED]]])
    assert prediction_confidence(logits, kind).tolist() == [[[1, 1, 1]]]
    assert label_confidence(logits, labels).tolist() == [[[1, 0, 0]]]
    for method in METHODS:
        selection = select({"s1": logits, "s2": -logits}, labels, 80, SelectionConfig(confidence=kind, method=method))
        for field in fields(selection)[:-1]:
            for values in getattr(selection, field.name).values(): assert torch.isfinite(values).all() and values.min() >= 0 and values.max() <= 1


def test_confidences_by_hand():
    p = torch.tensor([0.5, 0.25, 0.25])
    logits = p.log().view(1, 3, 1, 1) + 7                                 # any offset
    assert prediction_confidence(logits).item() == pytest.approx(1 - 1.5 * math.log(2) / math.log(3), abs=1e-6)
    assert prediction_confidence(logits, "gini").item() == pytest.approx(0.375)
    assert [label_confidence(logits, torch.tensor([[[c]]])).item() for c in range(3)] == pytest.approx([0.5, 0.25, 0.25])
    even = torch.zeros(1, 7, 1, 1)
    assert prediction_confidence(even).item() == pytest.approx(0, abs=1e-6) and prediction_confidence(even, "gini").item() == pytest.approx(1 / 7)


def test_probabilities_by_the_power_of_two():
    log_p = torch.cat([-torch.rand(1000, generator=torch.manual_seed(0)) * 80, torch.tensor([0., -1e4, -math.inf])]).view(1, -1, 1, 1)
    torch.testing.assert_close(probabilities(log_p), log_p.double().exp().float(), rtol=8e-6, atol=1e-45)
    assert probabilities(log_p)[0, -3:].flatten().tolist() == [1, 0, 0] and probabilities(torch.full((1, 1, 1, 1), math.nan)).isnan()


def test_invalid_and_unlabelled_pixels_have_no_confidence():
    logits = torch.randn(1, 3, 1, 4)
    labels, valid = torch.tensor([[[0, UNLABELLED, 1, 2]]]), torch.tensor([[[True, True, False, True]]])
    assert (label_confidence(logits, labels, valid) > 0).tolist() == [[[True, False, False, True]]]
    assert (prediction_confidence(logits, valid=valid) > 0).tolist() == [[[True, True, False, True]]]     # it needs no label
    assert (prediction_weights(torch.rand(1, 1, 4) + 0.1, 0.3, valid) > 0).tolist() == [[[True, True, False, True]]]


def test_labels_that_are_no_class_are_refused_with_their_count():
    logits = torch.zeros(1, 9, 2, 2)
    with pytest.raises(DataError, match=r"labels hold \[9\], 3 pixels; classes are 0\.\.8, unlabelled is 255"):
        label_confidence(logits, torch.tensor([[[9, 9], [9, 0]]]))
    with pytest.raises(DataError, match=r"labels hold \[-1, 254\], 2 pixels"): label_confidence(logits, torch.tensor([[[-1, 254], [255, 8]]]))
    with pytest.raises(DataError, match="float32; give integer class ids"): label_confidence(logits, torch.zeros(1, 2, 2))


def test_unknown_choices_are_refused():
    logits, labels = torch.zeros(1, 3, 1, 1), torch.zeros(1, 1, 1, dtype=torch.long)
    with pytest.raises(ConfigError, match="'entropy', 'gini'"): prediction_confidence(logits, "ce")
    with pytest.raises(ConfigError, match="'exp', 'linear' or 'none'|'exp', 'linear', 'none'"): ramp(0, 80, "cosine")
    with pytest.raises(ConfigError, match="'histogram', 'exact'"): label_weights(logits[:, 0], labels, 0.5, 3, "sort")


# ---- entangling and the ramp

def test_three_sensors_entangle_by_the_mean_of_the_others():
    a, b, c = (torch.rand(2, 4, 4) for _ in range(3))
    together = entangle({"s1": a, "s2": b, "dem": c})
    assert torch.allclose(together["s1"], a * (1 + (b + c) / 2) / 2) and torch.allclose(together["dem"], c * (1 + (a + b) / 2) / 2)
    assert list(together) == ["s1", "s2", "dem"]


def test_entangling_lies_between_a_half_and_the_whole():
    a, one, zero = torch.rand(2, 4, 4), torch.ones(2, 4, 4), torch.zeros(2, 4, 4)
    assert torch.equal(entangle({"s1": a, "s2": one})["s1"], a) and torch.equal(entangle({"s1": a, "s2": zero})["s1"], a / 2)
    assert torch.equal(entangle({"s1": a})["s1"], a)


def test_ramps():
    assert [ramp(t, 80, "linear") for t in (0, 20, 80, 81)] == [0, 0.25, 1, 1]
    assert ramp(40, 80) == pytest.approx(math.exp(-1.25)) and ramp(0, 80) == pytest.approx(math.exp(-5))
    assert {ramp(t, length, kind) for t in (0, 5) for length, kind in ((0, "exp"), (0, "linear"), (80, "none"), (0, "none"))} == {1.0}
    assert [keep_fraction(t, 80, 0.5, "linear") for t in (0, 40, 80, 500)] == [1, 0.75, 0.5, 0.5]
    assert keep_fraction(0, 80, 0.3, "none") == pytest.approx(0.3) and keep_fraction(3, 80, 1.0) == 1
    assert all(0 <= keep_fraction(t, 7, 0, kind) <= 1 for t in range(9) for kind in ("exp", "linear", "none"))


def test_consistency_weights_go_from_uniform_to_confidence():
    confidence = torch.rand(1, 4, 4)
    assert (prediction_weights(confidence, 0.) == 1).all() and torch.equal(prediction_weights(confidence, 1.), confidence)
    assert torch.allclose(prediction_weights(confidence, 0.25), 0.75 + 0.25 * confidence)


# ---- all of it

def batch(sensors=("s1", "s2"), num_classes=4, size=12):
    torch.manual_seed(0)
    logits = {s: (3 * torch.randn(2, num_classes, size, size)).requires_grad_() for s in sensors}
    labels = torch.randint(0, num_classes, (2, size, size))
    labels[:, 0] = UNLABELLED
    valid = torch.ones(2, size, size, dtype=torch.bool)
    valid[:, :, 0] = False
    return logits, labels, valid


@pytest.mark.parametrize("sensors", [("s1",), ("s1", "s2"), ("s1", "s2", "dem")])
@pytest.mark.parametrize("config", [None, SelectionConfig(), SelectionConfig(confidence="gini", ramp="linear", method="exact", per_class=False),
                                    SelectionConfig(ramp="none", keep=0), SelectionConfig(ramp_epochs=0, keep=1)])
def test_everything_selected_is_detached_float32_in_unit_range(sensors, config):
    logits, labels, valid = batch(sensors)
    for epoch in (0, 40, 300):
        selection = select(logits, labels, epoch, config, valid)
        assert isinstance(selection.keep, float) or selection.keep in (0, 1)
        for field in fields(selection)[:-1]:
            found = getattr(selection, field.name)
            assert tuple(found) == sensors
            for values in found.values():
                assert values.dtype == torch.float32 and not values.requires_grad and values.isfinite().all()
                assert values.min() >= 0 and values.max() <= 1 and values.shape == ((4,) if field.name == "thresholds" else labels.shape)
        for s in sensors:
            assert (selection.label_weights[s][~valid | (labels == UNLABELLED)] == 0).all() and (selection.prediction_weights[s][~valid] == 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_select_is_its_parts(method):
    logits, labels, valid = batch()
    config = SelectionConfig(method=method, keep=0.6)
    selection = select(logits, labels, 30, config, valid)
    own = {s: label_confidence(l, labels, valid) for s, l in logits.items()}
    sure = {s: prediction_confidence(l, valid=valid) for s, l in logits.items()}
    for s in logits:
        assert torch.equal(selection.label_confidence[s], own[s]) and torch.equal(selection.prediction_confidence[s], sure[s])
        assert torch.equal(selection.entangled_label[s], entangle(own)[s]) and torch.equal(selection.entangled_prediction[s], entangle(sure)[s])
        assert torch.equal(selection.label_weights[s], label_weights(entangle(own)[s], labels, selection.keep, 4, method, valid=valid))
        assert torch.equal(selection.prediction_weights[s], prediction_weights(entangle(sure)[s], ramp(30, 80), valid))
    assert selection.keep == keep_fraction(30, 80, 0.6)


def test_one_sensor_is_its_own_judge():
    logits, labels, valid = batch(("s2",))
    selection = select(logits, labels, 80, SelectionConfig(), valid)
    assert torch.equal(selection.entangled_label["s2"], selection.label_confidence["s2"])
    assert torch.equal(selection.entangled_prediction["s2"], selection.prediction_confidence["s2"])


def test_without_a_configuration_every_usable_pixel_counts_fully():
    logits, labels, valid = batch()
    selection = select(logits, labels, 0, None, valid)
    assert selection.keep == 1 and all((tau == 0).all() for tau in selection.thresholds.values())
    for s in logits:
        assert torch.equal(selection.label_weights[s], ((labels != UNLABELLED) & valid).float())
        assert torch.equal(selection.prediction_weights[s], valid.float())
    assert (select(logits, labels, 0, None).prediction_weights["s1"] == 1).all()


@pytest.mark.parametrize("config", [None, SelectionConfig(), SelectionConfig(method="exact", per_class=False)])
def test_nothing_labelled_or_nothing_valid(config):
    logits, labels, _ = batch()
    none, invalid = torch.full_like(labels, UNLABELLED), torch.zeros_like(labels, dtype=torch.bool)
    for given_labels, valid in ((none, None), (labels, invalid), (none, invalid)):
        selection = select(logits, given_labels, 80, config, valid)
        assert all((w == 0).all() for w in selection.label_weights.values()) and all((t == 0).all() for t in selection.thresholds.values())
        assert all((w == 0).all() == (valid is not None) for w in selection.prediction_weights.values())


def test_log_probabilities_are_computed_once():
    logits, labels, valid = batch()
    log_p = sensor_log_probabilities(logits)
    assert isinstance(log_p, LogProbabilities) and sensor_log_probabilities(log_p) is log_p and log_p["s1"].requires_grad
    assert torch.equal(log_p["s2"], log_probabilities(logits["s2"]))
    a, b = select(logits, labels, 40, SelectionConfig(), valid), select(log_p, labels, 40, SelectionConfig(), valid)
    assert all(torch.equal(a.label_weights[s], b.label_weights[s]) for s in logits)


def test_images_come_one_by_one_on_the_cpu_and_together_elsewhere():
    tensors = torch.rand(3, 4, 5, 5), torch.rand(3, 5, 5)
    images = list(image_by_image(*tensors))
    assert len(images) == 3 and all(torch.equal(torch.cat(whole), t) for whole, t in zip(zip(*images), tensors, strict=True))
    together, = image_by_image(*(t.to("meta") for t in tensors))
    assert [t.shape for t in together] == [t.shape for t in tensors]
    with pytest.raises(ValueError): list(image_by_image(tensors[0], tensors[1][:1]))


@pytest.mark.parametrize("kind", ["entropy", "gini"])
def test_an_image_has_the_confidences_that_it_has_alone(kind):
    logits, labels, valid = batch()
    whole = select(logits, labels, 40, SelectionConfig(confidence=kind), valid)
    for i in range(2):
        alone = select({s: l[i:i + 1] for s, l in logits.items()}, labels[i:i + 1], 40, SelectionConfig(confidence=kind), valid[i:i + 1])
        for name in ("label_confidence", "prediction_confidence", "entangled_label", "entangled_prediction", "prediction_weights"):
            for s in logits: assert torch.equal(getattr(whole, name)[s][i:i + 1], getattr(alone, name)[s])


# ---- no step waits for a device

class Called(TorchDispatchMode):
    "Notes the name of every operator that runs."

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


WAITS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "_unique2", "unique_dim", "equal", "is_nonzero"}


@pytest.mark.parametrize("config", [None, *(SelectionConfig(method=m, per_class=p) for m in METHODS for p in (True, False))])
def test_select_asks_for_no_value(config, monkeypatch):
    monkeypatch.setattr("cromss.selection.check_labels", lambda *given: None)      # looks at values on the CPU only
    logits, labels, valid = batch()
    with Called() as called: select(logits, labels, 40, config, valid)
    assert "_log_softmax" in called.names and not called.names & WAITS       # bincount is the CPU's alone


@pytest.mark.parametrize("config", [None, *(SelectionConfig(method=m, per_class=p) for m in METHODS for p in (True, False))])
def test_select_runs_where_there_are_no_values_to_ask_for(config):
    logits, labels, valid = batch()
    with Called() as called:                                                 # meta tensors: an answer that depends on data is an error
        selection = select({s: l.to("meta") for s, l in logits.items()}, labels.to("meta"), 40, config, valid.to("meta"))
    assert selection.label_weights["s1"].shape == labels.shape and selection.thresholds["s2"].shape == (4,)
    assert "bincount" not in called.names


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_cuda_agrees_and_does_not_wait(method):
    logits, labels, valid = batch()
    config = SelectionConfig(method=method)
    expected = select(logits, labels, 40, config, valid)
    logits, labels, valid = {s: l.detach().cuda() for s, l in logits.items()}, labels.cuda(), valid.cuda()
    select(logits, labels, 40, config, valid)                                # the first call may set things up
    torch.cuda.set_sync_debug_mode("error")
    try: found = select(logits, labels, 40, config, valid)
    finally: torch.cuda.set_sync_debug_mode("default")
    for s in logits: torch.testing.assert_close(found.label_weights[s].cpu(), expected.label_weights[s], atol=1e-2, rtol=0)


# ---- values that are no confidence

@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [-math.nan, math.inf])
def test_a_logit_that_is_not_finite_shows_in_the_weights(method, value):
    "Training skips a step whose loss is NaN; for that selection has to come through, with NaN where it belongs."
    logits, labels, _ = batch()
    logits = {s: l.detach().clone() for s, l in logits.items()}
    labels[0, 3, 3], logits["s1"][0, 0, 3, 3] = 0, value
    weights = select(logits, labels, 80, SelectionConfig(method=method)).label_weights
    assert weights["s1"][0, 3, 3].isnan()


@pytest.mark.parametrize("method", METHODS)
def test_a_nan_of_one_class_leaves_the_others_alone(method):
    confidence, labels = torch.tensor([[[math.nan, .5, .4, .3]]]), torch.tensor([[[0, 0, 1, 1]]])
    assert class_thresholds(confidence, labels, 0.5, 3, method)[2] == 0
    assert label_weights(confidence, labels, 0.5, 3, method)[0, 0, 2:].tolist() == pytest.approx([1, 0.75], abs=4e-3)


@pytest.mark.parametrize("method", METHODS)
def test_what_stands_at_pixels_that_do_not_count_does_not_matter(method):
    confidence, labels = torch.tensor([[[.5, .4, math.nan, 7.]]]), torch.tensor([[[0, 0, UNLABELLED, 1]]])
    valid = torch.tensor([[[True, True, True, False]]])
    assert label_weights(confidence, labels, 0.5, 2, method, valid=valid)[0, 0].tolist() == pytest.approx([1, 0.8, 0, 0], abs=4e-3)


@pytest.mark.parametrize("method", METHODS)
def test_minus_zero_is_zero(method):
    confidence = torch.tensor([[[-0.0, .5, .4]]])
    assert label_weights(confidence, torch.zeros(1, 1, 3, dtype=torch.long), 0.5, 1, method)[0, 0].tolist() == pytest.approx([0, 1, .8], abs=4e-3)
