"Losses by hand and against plain formulas with their gradients, and that what has no weight teaches nothing."
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from cromss.config import ConfigError, PretrainConfig, SelectionConfig
from cromss.losses import _Sums, consistency, consistency_terms, cromss_loss, weighted_cross_entropy, weighted_dice
from cromss.selection import LogProbabilities, select, sensor_log_probabilities
from cromss.smoothing import one_hot, smooth_labels

C, UNLABELLED = 4, 255
KINDS = ("ce", "kl", "mse")


def example(sensors=("s1", "s2"), dtype=torch.float32, size=6, seed=0):
    "Logits that ask for gradients, soft targets and weights with zeros, the same for every dtype."
    torch.manual_seed(seed)
    logits = {s: torch.randn(2, C, size, size).mul(2).to(dtype).requires_grad_() for s in sensors}
    targets = torch.softmax(2 * torch.randn(2, C, size, size), 1).to(dtype)
    weights = {s: torch.rand(2, size, size).clamp(min=0.2).sub(0.2).to(dtype) for s in sensors}
    return logits, targets, weights


def at(p):
    "Logits of one pixel with the distribution `p`, (1, C, 1, 1)."
    return torch.tensor(p).log().view(1, -1, 1, 1)


# ---- plain formulas

def naive_cross_entropy(logits, targets, weights):
    per_pixel = -(targets * logits.softmax(1).log()).sum(1)
    return (weights * per_pixel).sum() / weights.sum()


def naive_dice(logits, targets, weights):
    p, loss = logits.softmax(1), 0.
    for c in range(logits.shape[1]):
        pc, zc = p[:, c], targets[:, c]
        if ((weights > 0) * zc).sum() == 0: continue
        loss = loss + 1 - 2 * (weights * pc * zc).sum() / ((weights * pc).sum() + (weights * zc).sum())
    return loss / logits.shape[1]


def naive_consistency(logits, weights, kind):
    total = 0.
    for student in logits:
        teachers = [t for t in logits if t != student]
        for teacher in teachers:
            p, q = logits[teacher].detach().softmax(1), logits[student].softmax(1)
            distance = {"ce": -(p * q.log()), "kl": p * (p / q).log(), "mse": (p - q) ** 2}[kind].sum(1)
            total = total + (weights[teacher] * distance).sum() / weights[teacher].sum() / len(teachers)
    return total


def agrees(ours, naive, sensors=("s1", "s2")):
    "Value and gradients of `ours` in float32 equal those of `naive` in float64; both take (logits, targets, weights)."
    found = []
    for f, dtype in ((ours, torch.float32), (naive, torch.float64)):
        logits, targets, weights = example(sensors, dtype)
        value = f(logits, targets.detach(), weights)
        gradients = torch.autograd.grad(value, list(logits.values()), allow_unused=True)
        found.append([value.detach().double(), *(torch.zeros(()).double() if g is None else g.double() for g in gradients)])
    for a, b in zip(*found, strict=True): torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_cross_entropy_agrees(): agrees(lambda l, t, w: weighted_cross_entropy(l["s1"], t, w["s1"]), lambda l, t, w: naive_cross_entropy(l["s1"], t, w["s1"]))


def test_dice_agrees(): agrees(lambda l, t, w: weighted_dice(l["s1"], t, w["s1"]), lambda l, t, w: naive_dice(l["s1"], t, w["s1"]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sensors", [("s1", "s2"), ("s1", "s2", "dem")])
def test_consistency_agrees(kind, sensors):
    agrees(lambda l, t, w: consistency(l, w, kind), lambda l, t, w: naive_consistency(l, w, kind), sensors)


def plain_step(logits, targets, own, trust, config):
    "The loss of a step by the plain formulas."
    total = sum(naive_cross_entropy(l, targets, own[s]) for s, l in logits.items())
    if "dice" in config.loss: total = total + sum(naive_dice(l, targets, own[s]) for s, l in logits.items())
    return total if config.consistency == "none" else total + naive_consistency(logits, trust, config.consistency)


@dataclass
class Chosen:
    "What the losses take from a Selection."
    label_weights: dict
    prediction_weights: dict


def step(logits, targets, own, trust, config, reduce=None): return cromss_loss(logits, targets, Chosen(own, trust), config, reduce).total


@pytest.mark.parametrize("segmentation", ["ce+dice", "ce"])
@pytest.mark.parametrize("kind", [*KINDS, "none"])
@pytest.mark.parametrize("sensors", [("s1",), ("s1", "s2"), ("s1", "s2", "dem")])
def test_a_step_agrees(sensors, kind, segmentation):
    "The gradient by hand, image by image, is that of the formulas."
    config, (_, _, trust) = PretrainConfig(loss=segmentation, consistency=kind), example(sensors, seed=1)
    def cast(l, weights): return {s: w.to(l[sensors[0]].dtype) for s, w in weights.items()}
    agrees(lambda l, t, w: step(l, t, w, cast(l, trust), config), lambda l, t, w: plain_step(l, t, w, cast(l, trust), config), sensors)


@pytest.mark.parametrize("kind", [*KINDS, "none"])
@pytest.mark.parametrize("sensors", [("s1",), ("s1", "s2"), ("s1", "s2", "dem")])
def test_the_sums_gradient_is_their_slope_in_float64(sensors, kind):
    logits, targets, own = example(sensors, torch.float64, size=2)
    _, _, trust = example(sensors, torch.float64, size=2, seed=1)
    for i, student in enumerate(sensors):
        def sums(l):
            given = [l if s == student else logits[s].detach() for s in sensors]
            return _Sums.apply(kind, targets, list(own.values()), list(trust.values()), [x.detach().log_softmax(1) for x in given], *given)[i::len(sensors)]
        assert torch.autograd.gradcheck(sums, [logits[student]])


@pytest.mark.parametrize("given", ["logits", "marked", "made"])
def test_a_step_agrees_whatever_it_is_given(given):
    "Logits, their log-probabilities with or without them."
    def wrap(logits):
        log_p = sensor_log_probabilities(logits)
        return {"logits": logits, "marked": log_p, "made": LogProbabilities(log_p)}[given]
    agrees(lambda l, t, w: step(wrap(l), t, w, w, PretrainConfig()), lambda l, t, w: plain_step(l, t, w, w, PretrainConfig()))


def test_a_step_is_that_of_the_global_batch():
    "With the other half's sums added, the loss is the whole batch's, and the gradients are its own half's."
    logits, targets, own = example()
    _, _, trust = example(seed=1)
    def half(i, reduce):
        def part(given): return {s: x[i:i + 1] for s, x in given.items()}
        return step(part(logits), targets[i:i + 1], part(own), part(trust), PretrainConfig(), reduce)
    sums = []
    half(1, lambda part: sums.append(part.detach()) or part)
    whole, first = step(logits, targets, own, trust, PretrainConfig()), half(0, lambda part: part + sums[0])
    torch.testing.assert_close(first, whole)
    for a, b in zip(gradients(first, logits), gradients(whole, logits), strict=True):
        torch.testing.assert_close(a[:1], b[:1])
        assert (a[1:] == 0).all()


def test_targets_of_every_layout_and_precision():
    logits, targets, weights = example()
    def found(targets):
        loss = step(logits, targets, weights, weights, PretrainConfig())
        return [loss.detach(), *gradients(loss, logits)]
    for other in (targets.to(memory_format=torch.channels_last), targets.double()):
        assert all(torch.equal(a, b) for a, b in zip(found(other), found(targets), strict=True))


def test_a_step_keeps_no_product():
    "For the backward pass a step keeps what it was given."
    logits, targets, weights = example()
    log_p, kept = sensor_log_probabilities(logits), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x): step(log_p, targets, weights, weights, PretrainConfig())
    given = {x.data_ptr() for x in (*log_p.values(), targets, *weights.values())}
    assert {x.data_ptr() for x in kept if x.numel() > 3 * C} == given


def test_a_second_derivative_is_refused():
    logits, targets, weights = example()
    g, *_ = torch.autograd.grad(step(logits, targets, weights, weights, PretrainConfig()), list(logits.values()), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"): g.sum().backward()


@pytest.mark.parametrize("kind", [*KINDS, "none"])
def test_a_step_runs_where_there_are_no_values_to_ask_for(kind):
    "Meta tensors: an answer that depends on data, for which a GPU would have to be waited for, is an error."
    logits, targets, weights = example()
    logits, weights = {s: l.detach().to("meta").requires_grad_() for s, l in logits.items()}, {s: w.to("meta") for s, w in weights.items()}
    step(logits, targets.to("meta"), weights, weights, PretrainConfig(consistency=kind)).backward()
    assert all(l.grad.shape == l.shape for l in logits.values())


def test_gradients_are_slopes():
    logits, targets, weights = example(size=2)
    for f in (lambda l: weighted_cross_entropy(l, targets, weights["s1"]), lambda l: weighted_dice(l, targets, weights["s1"])):
        gradient, = torch.autograd.grad(f(logits["s1"]), logits["s1"])
        step = 0.1 * torch.randn_like(gradient, requires_grad=False)
        rise = (f(logits["s1"] + step) - f(logits["s1"] - step)) / 2
        assert rise.item() == pytest.approx((gradient * step).sum().item(), rel=0.02, abs=1e-4)


# ---- by hand

def test_cross_entropy_by_hand():
    logits = torch.cat([at([.5, .25, .25]), at([.125, .125, .75])], 3)
    target = torch.tensor([[1., 0, 0], [0, .5, .5]]).T.reshape(1, 3, 1, 2)
    first, second = math.log(2), -.5 * math.log(.125) - .5 * math.log(.75)
    for weights, expected in (([1., 1], (first + second) / 2), ([1., 0], first), ([.5, .25], (2 * first + second) / 3), ([0., 0], 0)):
        assert weighted_cross_entropy(logits, target, torch.tensor([[weights]])).item() == pytest.approx(expected, abs=1e-6)


def test_cross_entropy_of_hard_labels_is_torchs():
    logits, _, _ = example()
    labels = torch.randint(0, C, (2, 6, 6))
    labels[0, :2] = UNLABELLED
    expected = F.cross_entropy(logits["s1"], labels, ignore_index=UNLABELLED)
    torch.testing.assert_close(weighted_cross_entropy(logits["s1"], one_hot(labels, C), (labels != UNLABELLED).float()), expected)
    smooth = smooth_labels(labels.clamp(max=C - 1), None, uniform_weight=0.1, num_classes=C)
    expected = F.cross_entropy(logits["s1"], labels.clamp(max=C - 1), label_smoothing=0.1)
    torch.testing.assert_close(weighted_cross_entropy(logits["s1"], smooth, torch.ones(2, 6, 6)), expected)


def test_dice_by_hand():
    logits = torch.cat([at([.5, .25, .25]), at([.125, .125, .75])], 3)
    hard = torch.tensor([[1., 0, 0], [0, 1, 0]]).T.reshape(1, 3, 1, 2)
    def loss(weights, target=hard): return weighted_dice(logits, target, torch.tensor([[weights]])).item()
    assert loss([1., 1]) == pytest.approx((1 - 1 / 1.625 + 1 - .25 / 1.375) / 3)          # the third class is absent and adds nothing
    assert loss([1., 0]) == pytest.approx((1 - 1 / 1.5) / 3)                             # and so is the second, once its pixel is left out
    assert loss([1., .5]) == pytest.approx((1 - 1 / 1.5625 + 1 - .125 / .8125) / 3)
    smooth = .7 * hard + .1
    expected = [1 - 2 * (.5 * .8 + .125 * .1) / (.625 + .9), 1 - 2 * (.25 * .1 + .125 * .8) / (.375 + .9), 1 - 2 * (.25 * .1 + .75 * .1) / (1 + .2)]
    assert loss([1., 1], smooth) == pytest.approx(sum(expected) / 3)                     # smoothed, every class is present
    assert loss([0., 0]) == 0


def test_dice_is_over_the_batch_not_the_image():
    logits, targets, weights = example()
    joined = [torch.cat(list(x), -1)[None] for x in (logits["s1"], targets, weights["s1"])]
    torch.testing.assert_close(weighted_dice(logits["s1"], targets, weights["s1"]), weighted_dice(*joined))


@pytest.mark.parametrize("kind, taught", [
    ("ce", lambda p, q: -sum(a * math.log(b) for a, b in zip(p, q))),
    ("kl", lambda p, q: sum(a * math.log(a / b) for a, b in zip(p, q))),
    ("mse", lambda p, q: sum((a - b) ** 2 for a, b in zip(p, q))),                        # summed over classes
])
def test_consistency_by_hand(kind, taught):
    p, q, r = (.5, .25, .25), (.125, .125, .75), (.2, .2, .6)
    one = {s: torch.ones(1, 1, 1) for s in ("s1", "s2", "dem")}
    pair = {"s1": at(p), "s2": at(q)}
    assert consistency(pair, one, kind).item() == pytest.approx(taught(p, q) + taught(q, p), abs=1e-6)
    assert consistency_terms(pair, one, kind)["s1"].item() == pytest.approx(taught(q, p), abs=1e-6)   # s1 learns from s2
    three = consistency_terms(pair | {"dem": at(r)}, one, kind)
    assert three["s1"].item() == pytest.approx((taught(q, p) + taught(r, p)) / 2, abs=1e-6)           # from two teachers: their mean
    assert three["dem"].item() == pytest.approx((taught(p, r) + taught(q, r)) / 2, abs=1e-6)


def test_consistency_counts_where_the_teacher_is_sure():
    p, q, r = (.5, .5), (.25, .75), (.9, .1)
    logits = {"s1": torch.cat([at(p), at(p)], 3), "s2": torch.cat([at(q), at(r)], 3)}
    weights = {"s1": torch.tensor([[[1., 1]]]), "s2": torch.tensor([[[1., 0]]])}
    assert consistency_terms(logits, weights)["s1"].item() == pytest.approx(math.log(2))              # the pixel that s2 doubts is no lesson


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_reaches_the_teacher(kind):
    logits, _, weights = example()
    for student, teacher in (("s1", "s2"), ("s2", "s1")):
        gradients = torch.autograd.grad(consistency_terms(logits, weights, kind)[student], [logits[student], logits[teacher]], allow_unused=True)
        assert gradients[0].abs().sum() > 0 and (gradients[1] is None or (gradients[1] == 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_one_sensor_has_no_consistency(kind):
    logits, _, weights = example(("s2",))
    assert consistency(logits, weights, kind) == 0 and consistency_terms(logits, weights, kind) == {}


def test_unknown_consistency_is_refused():
    logits, _, weights = example()
    with pytest.raises(ConfigError, match="consistency='l1': choose one of 'ce', 'kl', 'mse'"): consistency(logits, weights, "l1")


# ---- pixels without weight

def gradients(value, logits): return torch.autograd.grad(value, list(logits.values()), allow_unused=True)


def nothing(g): return g is None or bool((g == 0).all())


@pytest.mark.parametrize("scale", [1, 1e4])
def test_weights_of_zero_give_zero_loss_and_gradient(scale):
    logits, targets, _ = example()
    logits = {s: (l.detach() * scale).requires_grad_() for s, l in logits.items()}
    zeros = {s: torch.zeros(2, 6, 6) for s in logits}
    terms = [weighted_cross_entropy(logits["s1"], targets, zeros["s1"]), weighted_dice(logits["s1"], targets, zeros["s1"]),
             *(consistency(logits, zeros, kind) for kind in KINDS)]
    for term in terms: assert term == 0 and all(nothing(g) for g in gradients(term, logits))


@pytest.mark.parametrize("method", ["exact", "histogram"])
@pytest.mark.parametrize("kind", [*KINDS, "none"])
@pytest.mark.parametrize("sensors", [("s1",), ("s1", "s2"), ("s1", "s2", "dem")])
def test_a_batch_with_nothing_to_learn(sensors, kind, method):
    logits, _, _ = example(sensors)
    labels, invalid = torch.full((2, 6, 6), UNLABELLED), torch.zeros(2, 6, 6, dtype=torch.bool)
    for selection in (SelectionConfig(method=method), None):
        chosen = select(logits, labels, 40, selection, invalid)
        loss = cromss_loss(logits, smooth_labels(labels, None, num_classes=C), chosen, PretrainConfig(consistency=kind))
        assert loss.total == 0 and all(part == 0 for part in loss.parts.values())
        assert all(g is not None and (g == 0).all() for g in gradients(loss.total, logits))


def gaps():
    "Labels and validity with gaps: row 0 is unlabelled, column 0 is invalid."
    labels, valid = torch.randint(0, C, (2, 6, 6), generator=torch.manual_seed(1)), torch.ones(2, 6, 6, dtype=torch.bool)
    labels[:, 0], valid[:, :, 0] = UNLABELLED, False
    return labels, valid


@pytest.mark.parametrize("selection", [None, SelectionConfig(), SelectionConfig(ramp_epochs=0, keep=0.1, method="exact")])
def test_an_unlabelled_pixel_moves_consistency_only_and_an_invalid_one_nothing(selection):
    logits, _, _ = example()
    labels, valid = gaps()
    target, chosen = smooth_labels(labels, None, num_classes=C), select(logits, labels, 40, selection, valid)
    for term in (weighted_cross_entropy, weighted_dice):
        g, = torch.autograd.grad(term(logits["s1"], target, chosen.label_weights["s1"]), logits["s1"])
        assert nothing(g[:, :, 0]) and nothing(g[..., 0]) and (g[:, :, 1:, 1:] != 0).any(1).all()
    for kind in KINDS:
        for g in gradients(consistency(logits, chosen.prediction_weights, kind), logits):
            assert nothing(g[..., 0]) and (g[..., 1:] != 0).any(1).all()
    for g in gradients(cromss_loss(logits, target, chosen, PretrainConfig()).total, logits): assert nothing(g[..., 0])


def test_what_stands_at_an_invalid_pixel_does_not_matter():
    logits, _, _ = example()
    labels, valid = gaps()
    losses = []
    for seed in range(2):
        noise = 50 * torch.randn(2, C, 6, 6, generator=torch.manual_seed(seed))
        changed = {s: torch.where(valid.unsqueeze(1), l.detach(), noise) for s, l in logits.items()}
        other = torch.where(valid, labels, torch.randint(0, C, (2, 6, 6), generator=torch.manual_seed(seed)))
        losses.append(cromss_loss(changed, smooth_labels(other, None, num_classes=C), select(changed, other, 40, SelectionConfig(), valid), PretrainConfig()))
    assert losses[0].total == losses[1].total and losses[0].parts == losses[1].parts


def broken_where_nothing_counts():
    "The example, and the same with a pixel of weight 0 that is NaN or infinite in logits and targets."
    logits, targets, weights = example()
    bad, bad_targets = {s: l.detach().clone() for s, l in logits.items()}, targets.clone()
    for s in bad:
        weights[s][0, 2, 3] = weights[s][1, 0, 0] = 0
        bad[s][0, :, 2, 3], bad[s][1, 1, 0, 0] = math.nan, math.inf
    bad_targets[0, :, 2, 3], bad_targets[1, 0, 0, 0] = math.nan, -math.inf
    return (logits, targets), ({s: l.requires_grad_() for s, l in bad.items()}, bad_targets), weights


def same(ours, logits, expected, expected_logits):
    "Equal values and gradients, all of them finite."
    assert ours == expected and ours.isfinite()
    for a, b in zip(gradients(ours, logits), gradients(expected, expected_logits), strict=True): assert (a is b is None) or torch.equal(a, b)


@pytest.mark.parametrize("term", [weighted_cross_entropy, weighted_dice])
def test_what_stands_where_there_is_no_weight_stays_out_of_a_term(term):
    (logits, targets), (bad, bad_targets), weights = broken_where_nothing_counts()
    same(term(bad["s1"], bad_targets, weights["s1"]), bad, term(logits["s1"], targets, weights["s1"]), logits)


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_where_there_is_no_weight_stays_out_of_consistency(kind):
    (logits, _), (bad, _), weights = broken_where_nothing_counts()
    assert consistency(bad, weights, kind) == consistency(logits, weights, kind)


@pytest.mark.parametrize("kind", [*KINDS, "none"])
@pytest.mark.parametrize("sensors", [("s1",), ("s1", "s2")])
def test_what_stands_where_there_is_no_weight_stays_out_of_a_step(sensors, kind):
    (logits, targets), (bad, bad_targets), weights = broken_where_nothing_counts()
    logits, bad = ({s: l[s] for s in sensors} for l in (logits, bad))
    ones = {s: torch.ones_like(w) for s, w in weights.items()}
    trust = ones if kind == "none" or len(sensors) == 1 else weights              # nobody is taught, so no weight of a teacher counts
    config = PretrainConfig(consistency=kind)
    same(step(bad, bad_targets, weights, trust, config), bad, step(logits, targets, weights, trust, config), logits)


def test_a_nan_that_counts_shows_in_the_loss():
    "A step with a NaN must not pass for a good one."
    logits, targets, _ = example()
    broken = {s: l.detach().clone() for s, l in logits.items()}
    broken["s1"][0, :, 2, 3] = math.nan
    labels = targets.argmax(1)
    for selection in (None, SelectionConfig()):
        assert cromss_loss(broken, targets, select(broken, labels, 40, selection), PretrainConfig()).total.isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_saturated_logits_of_low_precision(dtype):
    labels, valid = gaps()
    logits = {s: (2e4 * one_hot(labels.clamp(max=C - 1).roll(shift, 2), C) - 1e4).to(dtype).requires_grad_() for shift, s in enumerate(("s1", "s2"))}
    for kind in KINDS:
        selection = select(logits, labels, 80, SelectionConfig(), valid)
        loss = cromss_loss(logits, smooth_labels(labels, None, num_classes=C), selection, PretrainConfig(consistency=kind))
        assert loss.total.isfinite() and loss.total.dtype == torch.float32 and all(g.isfinite().all() for g in gradients(loss.total, logits))


# ---- the loss of a step

@pytest.mark.parametrize("sensors", [("s2",), ("s1", "s2"), ("s1", "s2", "dem")])
@pytest.mark.parametrize("segmentation", ["ce+dice", "ce"])
@pytest.mark.parametrize("kind", [*KINDS, "none"])
def test_a_step_is_the_sum_of_its_parts(sensors, segmentation, kind):
    logits, _, _ = example(sensors)
    labels, valid = gaps()
    target, selection = smooth_labels(labels, None, num_classes=C), select(logits, labels, 40, SelectionConfig(), valid)
    loss = cromss_loss(logits, target, selection, PretrainConfig(loss=segmentation, consistency=kind))
    names = {f"{term}_{s}" for s in sensors for term in segmentation.split("+")}
    if kind != "none" and len(sensors) > 1: names |= {f"consistency_{s}" for s in sensors}
    assert set(loss.parts) == names and not any(part.requires_grad for part in loss.parts.values())
    torch.testing.assert_close(loss.total.detach(), sum(loss.parts.values()))
    for s in sensors:
        torch.testing.assert_close(loss.parts[f"ce_{s}"], weighted_cross_entropy(logits[s], target, selection.label_weights[s]).detach())
        if "dice" in segmentation: torch.testing.assert_close(loss.parts[f"dice_{s}"], weighted_dice(logits[s], target, selection.label_weights[s]).detach())
    if f"consistency_{sensors[0]}" in names:
        torch.testing.assert_close(sum(loss.parts[f"consistency_{s}"] for s in sensors), consistency(logits, selection.prediction_weights, kind).detach())


def test_log_probabilities_are_taken_as_they_are():
    logits, targets, _ = example()
    labels, valid = gaps()
    log_p = sensor_log_probabilities(logits)
    assert isinstance(log_p, LogProbabilities)
    found = []
    for given in (logits, log_p):
        loss = cromss_loss(given, targets, select(given, labels, 40, SelectionConfig(), valid), PretrainConfig())
        found.append([loss.total.detach(), *gradients(loss.total, logits)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
