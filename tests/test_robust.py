"The conventional methods by hand: every loss, the small-loss rule pixel by pixel, what is remembered, and that what is not usable teaches nothing."
import math

import pytest
import torch
import torch.nn.functional as F

from cromss import robust
from cromss.config import ROBUST_METHODS, ConfigError, DataError, RobustConfig
from cromss.losses import weighted_dice
from cromss.robust import (PIXEL_LOSSES, CoTeaching, EarlyLearning, Forward, JoCoR, RobustMethod, SmallLoss, active_passive, bootstrap_hard, bootstrap_soft, confident_joint,
                           cross_entropy, early_learning, forward_cross_entropy, generalised_cross_entropy, kept_share, make_robust, memory_bytes, normalised_cross_entropy,
                           reverse_cross_entropy, small_losses, symmetric_cross_entropy, symmetric_divergence, with_defaults)
from cromss.selection import sensor_log_probabilities
from cromss.smoothing import one_hot

C, UNLABELLED = 4, 255
ln = math.log


def row(*distributions):
    "ln P of a row of pixels, (1, C, 1, W)."
    return torch.tensor(distributions, dtype=torch.float32).log().t().reshape(1, len(distributions[0]), 1, -1)


def labels_of(*ids): return torch.tensor(ids).view(1, 1, -1)


def close(value, expected): assert torch.allclose(torch.as_tensor(value).float().flatten(), torch.tensor(expected, dtype=torch.float32).flatten(), atol=1e-5), (value, expected)


def method(name, sensors=("s2",), classes=C, train=None, **fields): return make_robust(RobustConfig(method=name, **fields), sensors, classes, train)


def example(sensors=("s1", "s2"), seed=0, scale=2.):
    "Logits that ask for gradients, labels with unlabelled pixels, a valid mask with holes, and origins."
    torch.manual_seed(seed)
    logits = {s: torch.randn(2, C, 6, 6).mul(scale).requires_grad_() for s in sensors}
    labels, valid = torch.randint(0, C, (2, 6, 6)), torch.rand(2, 6, 6) > 0.2
    labels[:, :2] = UNLABELLED
    return logits, labels, valid, torch.arange(72).view(2, 6, 6)


def everything(sensors=("s1", "s2"), **fields): return {m: method(m, sensors, train=72, **fields) for m in ROBUST_METHODS}


def loss_of(made, logits, labels, valid, epoch, origin=None, loss="ce+dice", twin=None):
    twins = {s: (l.flip(3) if twin is None else twin[s]).log_softmax(1) for s, l in logits.items()}
    return made.loss({s: l.log_softmax(1) for s, l in logits.items()}, labels, valid, epoch, loss, twins, origin)


# ---- the loss of a pixel, P = (.7, .2, .1)

P, LN = (.7, .2, .1), row((.7, .2, .1))
BY_HAND = {
    "cross entropy": (cross_entropy, lambda p: -ln(p)),
    "gce .7": (generalised_cross_entropy, lambda p: (1 - p ** .7) / .7),
    "gce .5": (lambda l, y: generalised_cross_entropy(l, y, .5), lambda p: 2 * (1 - math.sqrt(p))),
    "rce": (reverse_cross_entropy, lambda p: 4 * (1 - p)),
    "sce": (symmetric_cross_entropy, lambda p: -.1 * ln(p) + 4 * (1 - p)),
    "sce 6 .1": (lambda l, y: symmetric_cross_entropy(l, y, 6, .1), lambda p: -6 * ln(p) + .4 * (1 - p)),
    "nce": (normalised_cross_entropy, lambda p: ln(p) / (ln(.7) + ln(.2) + ln(.1))),
    "apl": (active_passive, lambda p: ln(p) / ln(.014) + 4 * (1 - p)),
    "apl 10 .1": (lambda l, y: active_passive(l, y, 10, .1), lambda p: 10 * ln(p) / ln(.014) + .4 * (1 - p)),
    "soft": (bootstrap_soft, lambda p: -.95 * ln(p) + .05 * 0.801819),          # the entropy of P, in nats
    "hard": (bootstrap_hard, lambda p: -.8 * ln(p) - .2 * ln(.7)),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_pixel_by_hand(name):
    ours, by_hand = BY_HAND[name]
    for y, p in enumerate(P): close(ours(LN, labels_of(y)), by_hand(p))


def test_entropy_of_the_example(): assert abs(-sum(p * ln(p) for p in P) - 0.801819) < 1e-6


def test_numbers_worked_out():
    "The same, as numbers."
    y = labels_of(1)
    close(generalised_cross_entropy(LN, y), 0.965533)
    close(symmetric_cross_entropy(LN, y), 3.360944)
    close(active_passive(LN, y), 3.577014)
    close(bootstrap_soft(LN, y), 1.569057)
    close(bootstrap_hard(LN, y), 1.358886)


def limit_logits():
    torch.manual_seed(1)
    return torch.randn(2, C, 5, 5).log_softmax(1), torch.randint(0, C, (2, 5, 5))


@pytest.mark.parametrize("ours", [
    lambda l, y: generalised_cross_entropy(l, y, 0), lambda l, y: generalised_cross_entropy(l, y, 1e-5), lambda l, y: bootstrap_soft(l, y, 1), lambda l, y: bootstrap_hard(l, y, 1),
    lambda l, y: symmetric_cross_entropy(l, y, 1, 0), lambda l, y: forward_cross_entropy(l, y, torch.eye(C)), lambda l, y: early_learning(l, y, torch.zeros_like(l)),
    lambda l, y: early_learning(l, y, torch.rand_like(l), 0)])
def test_what_becomes_cross_entropy(ours):
    log_p, y = limit_logits()
    assert torch.allclose(ours(log_p, y), F.nll_loss(log_p, y, reduction="none"), atol=1e-4)


def test_gce_at_one_is_half_the_mean_absolute_error():
    log_p, y = limit_logits()
    mae = (log_p.exp() - one_hot(y, C)).abs().sum(1)
    assert torch.allclose(generalised_cross_entropy(log_p, y, 1), mae / 2, atol=1e-6)
    assert torch.allclose(reverse_cross_entropy(log_p, y), 2 * mae, atol=1e-6)


def test_gce_pulls_by_p_to_the_q():
    logits = torch.tensor([.7, .2, .1]).log().view(1, 3, 1, 1).requires_grad_()
    pull = torch.autograd.grad(generalised_cross_entropy(logits.log_softmax(1), labels_of(1)).sum(), logits)[0]
    close(pull, [.2 ** .7 * (p - y) for p, y in zip(P, (0, 1, 0))])


def test_soft_bootstrapping_has_the_gradient_of_the_entropy():
    logits = torch.tensor([.7, .2, .1]).log().view(1, 3, 1, 1).requires_grad_()
    pull = torch.autograd.grad(bootstrap_soft(logits.log_softmax(1), labels_of(1)).sum(), logits)[0]
    entropy = -sum(p * ln(p) for p in P)
    close(pull, [.95 * (p - y) - .05 * p * (ln(p) + entropy) for p, y in zip(P, (0, 1, 0))])


# ---- forward correction

TRANSITION = torch.tensor([[.8, .2, 0.], [.1, .9, 0.], [.5, 0., .5]])


def test_forward_by_hand():
    close(forward_cross_entropy(LN, labels_of(0), TRANSITION), -ln(.7 * .8 + .2 * .1 + .1 * .5))
    close(forward_cross_entropy(LN, labels_of(1), TRANSITION), -ln(.7 * .2 + .2 * .9))
    close(forward_cross_entropy(LN, labels_of(2), TRANSITION), -ln(.1 * .5))


def test_forward_gradient_is_finite_where_a_label_cannot_come_from_what_is_seen():
    logits = torch.tensor([200., 0., 0.]).view(1, 3, 1, 1).requires_grad_()
    loss = forward_cross_entropy(logits.log_softmax(1), labels_of(2), TRANSITION)
    loss.sum().backward()
    close(loss, 200 - ln(.5))
    assert logits.grad.isfinite().all()


def test_confident_joint_by_hand():
    log_p = row((.9, .1, 0), (.6, .4, 0), (.2, .8, 0), (.7, .3, 0), (.3, .7, 0), (.45, .45, .1), (1, 0, 0))
    y, usable = labels_of(0, 0, 1, 1, 1, 1, 0), torch.tensor([[[True] * 6 + [False]]])
    # mean of P0 over label 0: .75; of P1 over label 1: (.8 + .3 + .7 + .45) / 4 = .5625; no label 2
    # above: pixel 0 -> (0, 0); 1 -> none; 2 -> (1, 1); 3 -> none (.7 < .75); 4 -> (1, 1); 5 -> none; 6 is not usable
    assert confident_joint(log_p, y, usable).tolist() == [[1, 0, 0], [0, 2, 0], [0, 0, 0]]
    y = labels_of(0, 0, 0, 1, 1, 1, 0)
    # mean of P0: 1.7 / 3 = .5667; of P1: (.3 + .7 + .45) / 3 = .4833: pixel 3 of label 1 is truly 0, pixel 2 of label 0 truly 1
    assert confident_joint(log_p, y, usable).tolist() == [[2, 1, 0], [1, 1, 0], [0, 0, 0]]


def test_transition_is_estimated_before_the_ramp_ends_and_fixed_after():
    made = method("forward", classes=3, ramp_epochs=2)
    log_p = {"s2": row((.9, .1, 0), (.6, .4, 0), (.2, .8, 0), (.7, .3, 0), (.3, .7, 0), (.45, .45, .1)).clamp(min=-50)}
    y, valid = labels_of(0, 0, 0, 1, 1, 1), torch.ones(1, 1, 6, dtype=torch.bool)
    plain = cross_entropy(log_p["s2"], y).mean().item()
    close(made.loss(log_p, y, valid, 0, "ce").total, plain)
    assert made.joint[0].equal(torch.eye(3, dtype=torch.long))                  # not yet
    close(made.loss(log_p, y, valid, 1, "ce").total, plain)
    assert made.joint[0].tolist() == [[3, 1, 0], [1, 2, 0], [0, 0, 1]]           # the joint above, and a pixel of each class
    close(made.transition("s2"), [[3 / 4, 1 / 4, 0], [1 / 3, 2 / 3, 0], [0, 0, 1]])
    before = made.transition("s2")
    close(made.loss(log_p, y, valid, 2, "ce").total, forward_cross_entropy(log_p["s2"], y, before).mean().item())
    assert made.transition("s2").equal(before)


def test_transition_counts_in_training_only_and_of_each_sensor():
    logits, labels, valid, _ = example()
    made = method("forward", ("s1", "s2"), ramp_epochs=1)
    made.eval()
    loss_of(made, logits, labels, valid, 0)
    assert made.joint.sum() == 2 * C
    made.train()
    loss_of(made, logits, labels, valid, 0)
    assert made.joint.sum() > 2 * C and not made.joint[0].equal(made.joint[1])
    assert torch.allclose(made.transition("s1").sum(1), torch.ones(C))


def test_transition_is_found_from_a_network_that_sees_the_truth():
    torch.manual_seed(0)
    true = torch.randint(0, 3, (4, 64, 64))
    drawn = torch.multinomial(TRANSITION[true].view(-1, 3), 1).view_as(true)
    made = method("forward", classes=3, ramp_epochs=1)
    loss_of(made, {"s2": 8. * F.one_hot(true, 3).movedim(-1, 1) + torch.randn(4, 3, 64, 64)}, drawn, torch.ones_like(drawn, dtype=torch.bool), 0)
    assert (made.transition("s2") - TRANSITION).abs().max() < 0.02


# ---- small losses

@pytest.mark.parametrize("epoch, ramp, forget, share", [(0, 10, .4, 1), (5, 10, .4, .8), (10, 10, .4, .6), (99, 10, .4, .6), (0, 0, .3, .7), (3, 4, 0, 1)])
def test_kept_share(epoch, ramp, forget, share): assert kept_share(epoch, ramp, forget) == pytest.approx(share)


@pytest.mark.parametrize("share, kept", [(1, [0, 1, 3, 4]), (.75, [0, 1, 3]), (.74, [1, 3]), (.5, [1, 3]), (.01, [1])])
def test_small_losses_are_a_share_of_the_usable(share, kept):
    losses, usable = torch.tensor([[[.3, .1, 0., .2, .5]]]), torch.tensor([[[True, True, False, True, True]]])
    assert small_losses(losses, usable, share).flatten().nonzero().flatten().tolist() == kept


def test_floor_is_that_of_the_number_meant():
    "1 - .3 is a little less than .7 in floats: of ten pixels, seven are kept all the same."
    for n in (10, 100, 1000): assert small_losses(torch.rand(1, 1, n), torch.ones(1, 1, n, dtype=torch.bool), kept_share(0, 0, .3)).sum() == .7 * n


def test_ties_are_kept_and_nan_is_seen():
    usable = torch.ones(1, 1, 4, dtype=torch.bool)
    assert small_losses(torch.tensor([[[1., 1., 1., 2.]]]), usable, .5).tolist() == [[[True, True, True, False]]]
    assert small_losses(torch.tensor([[[1., math.nan, 3., 2.]]]), usable, .25).tolist() == [[[True, True, False, False]]]
    assert not small_losses(torch.rand(1, 1, 4), ~usable, .5).any()


A = row((.9, .1), (.6, .4), (.2, .8), (.3, .7), (.5, .5))       # P of the label 0: .9 .6 .2 .3 .5
B = row((.1, .9), (.7, .3), (.8, .2), (.4, .6), (.99, .01))     #                   .1 .7 .8 .4 (invalid)
ZERO, SEEN = labels_of(0, 0, 0, 0, 0), torch.tensor([[[True, True, True, True, False]]])


def test_small_loss_by_hand():
    made = method("small-loss", ("a", "b"), 2, forget=.5, ramp_epochs=0)
    loss = made.loss({"a": A, "b": B}, ZERO, SEEN, 0, "ce")
    close(loss.parts["ce_a"], -(ln(.9) + ln(.6)) / 2)
    close(loss.parts["ce_b"], -(ln(.7) + ln(.8)) / 2)


@pytest.mark.parametrize("sensors, names", [(("a", "b"), ("a", "b")), (("a",), ("a", "a_twin"))])
def test_co_teaching_by_hand(sensors, names):
    made = method("co-teaching", sensors, 2, forget=.5, ramp_epochs=0)
    given = ({"a": A, "b": B},) if len(sensors) == 2 else ({"a": A},)
    loss = made.loss(*given, ZERO, SEEN, 0, "ce", twin={"a": B} if len(sensors) == 1 else None)
    first, second = names                                           # the second has small losses at pixels 1 and 2, the first at 0 and 1
    close(loss.parts[f"ce_{first}"], -(ln(.6) + ln(.2)) / 2)
    close(loss.parts[f"ce_{second}"], -(ln(.1) + ln(.7)) / 2)
    close(loss.total, -(ln(.6) + ln(.2) + ln(.1) + ln(.7)) / 2)


def test_co_teaching_of_three_asks_both_others():
    made = CoTeaching(RobustConfig(method="co-teaching"), "abc", 2)
    losses = {"a": torch.tensor([1., 2.]), "b": torch.tensor([3., 5.]), "c": torch.tensor([5., 1.])}
    assert made.judged_by("a", losses).tolist() == [4, 3] and made.judged_by("c", losses).tolist() == [2, 3.5]


def test_symmetric_divergence_by_hand():
    close(symmetric_divergence(row((.9, .1)), row((.4, .6))), .5 * ln(.9 / .4) - .5 * ln(.1 / .6))
    close(symmetric_divergence(A, A), [0] * 5)


def joint(pa, pb, share=.9):
    "The loss of JoCoR of a pixel of label 0, from the probability of it in both networks."
    divergence = (pa - pb) * (ln(pa / pb) - ln((1 - pa) / (1 - pb)))
    return (1 - share) * -(ln(pa) + ln(pb)) + share * divergence


@pytest.mark.parametrize("share, kept", [(.9, (1, 3)), (0., (1, 2))])
def test_jocor_by_hand(share, kept):
    p = [(.9, .1), (.6, .7), (.2, .8), (.3, .4)]
    joints = [joint(*both, share) for both in p]
    assert tuple(sorted(sorted(range(4), key=joints.__getitem__)[:2])) == kept          # the rule: the two smallest joint losses
    for twin in (False, True):
        made = method("jocor", ("a",) if twin else ("a", "b"), 2, forget=.5, ramp_epochs=0, strength=share)
        loss = made.loss({"a": A} if twin else {"a": A, "b": B}, ZERO, SEEN, 0, "ce", twin={"a": B})
        close(loss.total, sum(joints[i] for i in kept) / 2)


def test_jocor_trains_both_networks_by_the_agreement():
    logits, labels, valid, _ = example()
    made = method("jocor", ("s1", "s2"), strength=1.)                # nothing but the agreement
    loss_of(made, logits, labels, valid, 0, loss="ce").total.backward()
    assert all(l.grad.abs().sum() > 0 for l in logits.values())


def test_small_loss_methods_leave_out_more_with_the_epoch():
    made = method("small-loss", forget=.5, ramp_epochs=4)
    assert [made.keep(t) for t in (0, 2, 4, 9)] == [1, .75, .5, .5]
    assert method("gce").keep(9) == 1
    losses = {"s2": torch.rand(1, 10, 10)}
    usable = torch.ones(1, 10, 10, dtype=torch.bool)
    kept = [made.choose(losses, robust.Pixels(None, usable, t, None))["s2"].sum().item() for t in (0, 1, 2, 3, 4)]
    assert kept == [100, 87, 75, 62, 50]


def test_dice_is_of_the_chosen_pixels():
    logits, labels, valid, _ = example(("s2",))
    made = method("small-loss", forget=.5, ramp_epochs=0)
    log_p, usable = logits["s2"].log_softmax(1), valid & (labels != UNLABELLED)
    y = labels.masked_fill(~usable, 0)
    chosen = small_losses(cross_entropy(log_p, y).detach(), usable, .5)
    loss = loss_of(made, logits, labels, valid, 0)
    assert torch.isclose(loss.parts["dice_s2"], weighted_dice(log_p, one_hot(y, C), chosen.float()))
    assert torch.isclose(loss.parts["ce_s2"], cross_entropy(log_p, y)[chosen].mean())
    gce = loss_of(method("gce"), logits, labels, valid, 0).parts
    assert torch.isclose(gce["dice_s2"], weighted_dice(log_p, one_hot(y, C), usable.float()))
    assert torch.isclose(gce["ce_s2"], generalised_cross_entropy(log_p, y)[usable].mean())


# ---- early-learning regularisation

def test_early_learning_by_hand():
    t = torch.tensor([.1, .6, .2]).view(1, 3, 1, 1)
    close(early_learning(LN, labels_of(0), t), -ln(.7) + 3 * ln(1 - (.07 + .12 + .02)))
    sure, memory = row((1, 0, 0)).clamp(min=-99), torch.tensor([1., 0, 0]).view(1, 3, 1, 1)
    close(early_learning(sure, labels_of(0), memory), 3 * ln(1e-4))


def test_memory_by_hand_over_two_visits_and_a_flip():
    made = method("elr", classes=3, train=4, beta=.7)
    first, then = row((.7, .2, .1), (.1, .1, .8)), row((.3, .3, .4), (.5, .25, .25))
    y, valid = labels_of(0, 2), torch.ones(1, 1, 2, dtype=torch.bool)
    loss = made.loss({"s2": first}, y, valid, 0, "ce", origin=labels_of(3, 1))
    assert torch.allclose(made.memory[0, 3].float(), torch.tensor([.21, .06, .03]), rtol=1e-3)
    assert torch.allclose(made.memory[0, 1].float(), torch.tensor([.03, .03, .24]), rtol=1e-3)
    assert (made.memory[0, [0, 2]] == 0).all()
    expected = [-ln(.7) + 3 * ln(1 - .3 * (.49 + .04 + .01)), -ln(.8) + 3 * ln(1 - .3 * (.01 + .01 + .64))]
    close(loss.total, sum(expected) / 2)
    # flipped: the pixel of origin 1 now lies first, and the network says (.3, .3, .4) of it
    loss = made.loss({"s2": then}, y.flip(2), valid, 1, "ce", origin=labels_of(1, 3))
    t1, t3 = [.7 * a + .3 * b for a, b in zip((.03, .03, .24), (.3, .3, .4))], [.7 * a + .3 * b for a, b in zip((.21, .06, .03), (.5, .25, .25))]
    assert torch.allclose(made.memory[0, 1].float(), torch.tensor(t1), rtol=2e-3) and torch.allclose(made.memory[0, 3].float(), torch.tensor(t3), rtol=2e-3)
    expected = [-ln(.4) + 3 * ln(1 - sum(a * b for a, b in zip(t1, (.3, .3, .4)))), -ln(.5) + 3 * ln(1 - sum(a * b for a, b in zip(t3, (.5, .25, .25))))]
    assert abs(loss.total.item() - sum(expected) / 2) < 1e-3


def test_a_whole_batch_that_is_turned_has_the_same_loss():
    logits, labels, valid, origin = example(("s2",))
    plain, turned = method("elr", train=72), method("elr", train=72)
    for epoch in range(3):
        a = loss_of(plain, logits, labels, valid, epoch, origin)
        b = loss_of(turned, {"s2": logits["s2"].rot90(epoch, (2, 3))}, labels.rot90(epoch, (1, 2)), valid.rot90(epoch, (1, 2)), epoch, origin.rot90(epoch, (1, 2)))
        assert torch.isclose(a.total, b.total, atol=1e-6)
    assert plain.memory[:, :72].equal(turned.memory[:, :72])


def test_what_is_not_usable_or_has_no_origin_is_not_remembered():
    made = method("elr", classes=3, train=4)
    log_p = row(P, P, P, P)
    y, valid = labels_of(0, UNLABELLED, 0, 0), torch.tensor([[[True, True, False, True]]])
    loss = made.loss({"s2": log_p}, y, valid, 0, "ce", origin=labels_of(0, 1, 2, -1))
    assert (made.memory[0, 0] > 0).all() and (made.memory[0, 1:4] == 0).all()
    close(loss.total, (-ln(.7) + 3 * ln(1 - .3 * .54) - ln(.7)) / 2)        # the last has the cross-entropy alone


def test_memory_stays_finite_when_the_network_is_not():
    made = method("elr", classes=3, train=2)
    log_p = torch.cat([torch.full((1, 3, 1, 1), math.nan), LN], 3)
    loss = made.loss({"s2": log_p}, labels_of(0, 0), torch.ones(1, 1, 2, dtype=torch.bool), 0, origin=labels_of(0, 1))
    assert loss.total.isnan() and made.memory.isfinite().all() and (made.memory[0, 0] == 0).all() and (made.memory[0, 1] > 0).all()


def test_memory_is_of_each_sensor_and_grows_in_training_only():
    logits, labels, valid, origin = example()
    made = method("elr", ("s1", "s2"), train=72)
    made.eval()
    loss_of(made, logits, labels, valid, 0, origin)
    assert (made.memory == 0).all()
    made.train()
    loss_of(made, logits, labels, valid, 0, origin)
    usable = (valid & (labels != UNLABELLED)).flatten()
    assert (made.memory[:, :72].sum(2) > 0).equal(usable.expand(2, 72)) and not made.memory[0].equal(made.memory[1])


def test_memory_size(monkeypatch):
    assert memory_bytes(99, 2, 9) == 2 * 2 * 100 * 9
    made = method("elr", ("s1", "s2"), 9, train=99)
    assert made.memory.numel() * made.memory.element_size() == memory_bytes(99, 2, 9)
    monkeypatch.setattr(robust, "MEMORY_LIMIT", 3599)
    with pytest.raises(ConfigError, match="3600 bytes, more than 3599"): method("elr", ("s1", "s2"), 9, train=99)


# ---- all methods

def test_every_method_is_made():
    kinds = {m: type(made) for m, made in everything().items()}
    assert kinds == {m: robust.PixelLoss for m in PIXEL_LOSSES} | {"small-loss": SmallLoss, "co-teaching": CoTeaching, "jocor": JoCoR, "forward": Forward, "elr": EarlyLearning}
    assert all(isinstance(made, RobustMethod) for made in everything().values())


def test_what_each_method_needs():
    assert [m for m, made in everything(("s2",)).items() if made.needs_twin] == ["co-teaching", "jocor"]
    assert not any(made.needs_twin for made in everything().values())
    assert [m for m, made in everything().items() if made.needs_origin] == ["elr"]


@pytest.mark.parametrize("name", ROBUST_METHODS)
@pytest.mark.parametrize("sensors", [("s2",), ("s1", "s2")])
def test_parts_add_up_and_gradients_are_finite(name, sensors):
    logits, labels, valid, origin = example(sensors)
    for loss in ("ce", "ce+dice"):
        for epoch in (0, 6, 7, 30):
            made = method(name, sensors, train=72)
            found = loss_of(made, logits, labels, valid, epoch, origin, loss)
            networks = [*sensors, "s2_twin"] if made.needs_twin else [*sensors]
            assert set(found.parts) == {f"{term}_{n}" for term in loss.split("+") for n in networks}
            assert torch.isclose(found.total, sum(found.parts.values())) and not any(p.requires_grad for p in found.parts.values())
            grads = torch.autograd.grad(found.total, list(logits.values()))
            assert all(g.isfinite().all() and g.abs().sum() > 0 for g in grads)


@pytest.mark.parametrize("name", ROBUST_METHODS)
def test_what_is_not_usable_never_counts(name):
    "Whatever the networks say there, even NaN: the same loss, the same memory, and no gradient."
    logits, labels, valid, origin = example()
    usable = valid & (labels != UNLABELLED)
    junk, results = torch.where(usable.unsqueeze(1), 0, math.nan), []
    for extra, other in ((0, labels), (junk, labels.where(usable, UNLABELLED))):
        made = method(name, ("s1", "s2"), train=72, ramp_epochs=2)
        log_p = {s: (l.log_softmax(1).detach() + extra).requires_grad_() for s, l in logits.items()}
        totals = [made.loss(log_p, other, valid, epoch, origin=origin).total for epoch in range(3)]
        sum(totals).backward()
        results.append((totals, log_p, made.state_dict()))
    (plain, clean, state), (with_junk, dirty, junk_state) = results
    assert all(a == b for a, b in zip(plain, with_junk))
    for s in log_p:
        assert clean[s].grad.equal(dirty[s].grad) and (dirty[s].grad * ~usable.unsqueeze(1) == 0).all()
    for key, values in state.items():
        kept = slice(0, 72) if key == "memory" else slice(None)          # the last row of the memory is never read
        assert values[:, kept].equal(junk_state[key][:, kept])


@pytest.mark.parametrize("name", ROBUST_METHODS)
@pytest.mark.parametrize("sensors", [("s2",), ("s1", "s2")])
def test_an_empty_batch_teaches_nothing(name, sensors):
    logits, labels, valid, origin = example(sensors)
    for empty, mask in ((torch.full_like(labels, UNLABELLED), valid), (labels, torch.zeros_like(valid))):
        for epoch in (0, 6, 20):
            made = method(name, sensors, train=72)
            before = {k: v.clone() for k, v in made.state_dict().items()}
            found = loss_of(made, logits, empty, mask, epoch, origin)
            assert found.total == 0
            assert all((g == 0).all() for g in torch.autograd.grad(found.total, list(logits.values())))
            assert all(v[:, :72].equal(before[k][:, :72]) for k, v in made.state_dict().items())


@pytest.mark.parametrize("name", ROBUST_METHODS)
@pytest.mark.parametrize("scale", [0., 300., 1e5])
def test_probabilities_of_zero_and_one(name, scale):
    "A saturated softmax, right and wrong, as logits and as ln 0 itself."
    logits, labels, valid, origin = example(scale=scale)
    for epoch in (0, 6, 8):
        made = method(name, ("s1", "s2"), train=72)
        found = loss_of(made, logits, labels, valid, epoch, origin)
        assert found.total.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(found.total, list(logits.values())))
    exact = {s: one_hot(torch.randint(0, C, (2, 6, 6)), C).log().requires_grad_() for s in ("s1", "s2")}
    found = made.loss(exact, labels, valid, 8, origin=origin)
    assert not found.total.isnan() and all(not g.isnan().any() for g in torch.autograd.grad(found.total, list(exact.values())))


@pytest.mark.parametrize("name", ROBUST_METHODS)
def test_nan_at_a_usable_pixel_is_seen(name):
    logits, labels, valid, origin = example()
    log_p = {s: l.detach().log_softmax(1) for s, l in logits.items()}
    y, x = (valid & (labels != UNLABELLED))[0].nonzero()[0].tolist()
    log_p["s1"][0, :, y, x] = math.nan
    assert method(name, ("s1", "s2"), train=72).loss(log_p, labels, valid, 20, origin=origin).total.isnan()


@pytest.mark.parametrize("name", sorted(set(ROBUST_METHODS) - {"co-teaching", "jocor"}))
def test_two_sensors_are_the_sum_of_each_alone(name):
    logits, labels, valid, origin = example()
    both = loss_of(method(name, ("s1", "s2"), train=72), logits, labels, valid, 6, origin)
    alone = [loss_of(method(name, (s,), train=72), {s: l}, labels, valid, 6, origin) for s, l in logits.items()]
    assert torch.isclose(both.total, sum(a.total for a in alone)) and both.parts.keys() == alone[0].parts.keys() | alone[1].parts.keys()


@pytest.mark.parametrize("name", ROBUST_METHODS)
def test_half_precision_and_marked_log_probabilities(name):
    logits, labels, valid, origin = example()
    log_p = sensor_log_probabilities({s: l.bfloat16() for s, l in logits.items()})
    found = method(name, ("s1", "s2"), train=72).loss(log_p, labels, valid, 6, origin=origin)
    assert found.total.dtype == torch.float32
    plain = method(name, ("s1", "s2"), train=72).loss({s: l.bfloat16().float().log_softmax(1) for s, l in logits.items()}, labels, valid, 6, origin=origin)
    assert torch.isclose(found.total, plain.total)


@pytest.mark.parametrize("name", ROBUST_METHODS)
def test_state_travels(name):
    logits, labels, valid, origin = example()
    first, second = (method(name, ("s1", "s2"), train=72, ramp_epochs=2) for _ in range(2))
    for epoch in (0, 1): loss_of(first, logits, labels, valid, epoch, origin)
    second.load_state_dict(first.state_dict())
    assert set(first.state_dict()) == {"elr": {"memory"}, "forward": {"joint"}}.get(name, set())
    assert loss_of(first, logits, labels, valid, 2, origin).total == loss_of(second, logits, labels, valid, 2, origin).total
    assert not list(first.parameters())


# ---- values and errors

def test_papers_values_where_none_are_given():
    assert with_defaults(RobustConfig(method="sce")).alpha == .1 and with_defaults(RobustConfig(method="sce")).beta == 1
    assert with_defaults(RobustConfig(method="apl")).alpha == 1 and with_defaults(RobustConfig(method="jocor")).strength == .9
    assert with_defaults(RobustConfig(method="bootstrap-soft")).beta == .95 and with_defaults(RobustConfig(method="bootstrap-hard")).beta == .8
    elr = with_defaults(RobustConfig(method="elr", strength=7))
    assert (elr.beta, elr.strength, elr.alpha) == (.7, 7, None)
    assert with_defaults(RobustConfig(method="sce", alpha=0)).alpha == 0         # zero is a value
    assert with_defaults(RobustConfig()) == RobustConfig()


def test_configured_values_reach_the_loss():
    y, valid = labels_of(1), torch.ones(1, 1, 1, dtype=torch.bool)
    def total(name, **fields): return method(name, classes=3, train=1, **fields).loss({"s2": LN}, y, valid, 9, "ce", origin=labels_of(0)).total
    close(total("gce", q=.5), 2 * (1 - math.sqrt(.2)))
    close(total("sce", alpha=2, beta=.5), -2 * ln(.2) + 1.6)
    close(total("apl", alpha=2, beta=.5), 2 * ln(.2) / ln(.014) + 1.6)
    close(total("bootstrap-soft", beta=.5), -.5 * ln(.2) + .5 * 0.801819)
    close(total("bootstrap-hard", beta=.5), -.5 * ln(.2) - .5 * ln(.7))
    close(total("elr", beta=.5, strength=2), -ln(.2) + 2 * ln(1 - .5 * .54))


@pytest.mark.parametrize("name, fields, message", [
    ("bootstrap-soft", {"beta": 1.1}, "robust.beta=1.1: bootstrap-soft takes a share"), ("bootstrap-hard", {"beta": 2}, "robust.beta=2"), ("elr", {"beta": 1.5}, "robust.beta=1.5"),
    ("jocor", {"strength": 3}, "robust.strength=3: jocor takes a share, from 0 to 1"), ("forward", {"ramp_epochs": 0}, "robust.ramp_epochs=0"), ("elr", {}, "give their number as `train`")])
def test_values_that_cannot_be(name, fields, message):
    with pytest.raises(ConfigError, match=message) as error: method(name, train=9 if fields else None, **fields)
    assert "\n" not in str(error.value)


def test_what_is_missing_is_said():
    y, valid = labels_of(1), torch.ones(1, 1, 1, dtype=torch.bool)
    for name, message in (("co-teaching", "needs a second network.*`twin`"), ("jocor", "needs a second network"), ("elr", "give the batch's `origin`")):
        with pytest.raises(DataError, match=message): method(name, classes=3, train=1).loss({"s2": LN}, y, valid, 0)
    with pytest.raises(DataError, match="origin holds pixel 5 of 5"): method("elr", classes=3, train=5).loss({"s2": LN}, y, valid, 0, origin=labels_of(5))
    with pytest.raises(DataError): method("gce", classes=3).loss({"s2": LN}, labels_of(3), valid, 0)
