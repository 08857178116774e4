"Losses by hand and against plain formulas with their gradients, and that what has no weight teaches nothing."
import math

import pytest
import torch
import torch.nn.functional as F

from cromss.config import ConfigError, PretrainConfig, SelectionConfig
from cromss.losses import consistency, consistency_terms, cromss_loss, weighted_cross_entropy, weighted_dice
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


def test_a_nan_where_there_is_no_weight_stays_out_of_the_means():
    "Cross-entropy and consistency are means that leave a pixel without weight out, whatever its logits; Dice's sums promise so for finite logits only."
    logits, targets, weights = example()
    broken = {s: l.detach().clone() for s, l in logits.items()}
    for s in broken:
        weights[s][0, 2, 3] = 0
        broken[s][0, :, 2, 3] = math.nan
    assert weighted_cross_entropy(broken["s1"], targets, weights["s1"]) == weighted_cross_entropy(logits["s1"], targets, weights["s1"])
    for kind in KINDS: assert consistency(broken, weights, kind) == consistency(logits, weights, kind)


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
