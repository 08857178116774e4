"Priors against scipy's Gaussian, gaps in the labels, small patches, and the targets made of them."
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from cromss.config import ConfigError, DataError
from cromss.smoothing import _blur_matrix, _prior_at_once, blur, gaussian_kernel, kernel_radius, one_hot, prior_maps, smooth_labels, smoothing_prior

C, UNLABELLED = 5, 255


def patches(batch=2, seasons=4, height=40, width=33, seed=0):
    "Labels in blobs, (B, S, H, W), all classes but the last."
    coarse = np.random.default_rng(seed).integers(0, C - 1, (batch, seasons, -(-height // 5), -(-width // 5)))
    return torch.from_numpy(coarse.repeat(5, 2).repeat(5, 3)[:, :, :height, :width].copy())


def scipy_prior(season_labels, season, kind, sigma=3.0, truncate=4.0):
    "The published steps, one location: one-hot, Gaussian per class, divided by the sum over classes, mean of the two."
    hot = np.eye(C)[season_labels]                                                      # (S, H, W, C)
    def smooth(maps):
        blurred = np.stack([gaussian_filter(maps[..., c], sigma, mode="reflect", truncate=truncate) for c in range(C)])
        return blurred / blurred.sum(0)
    priors = {"t": lambda: smooth(hot.mean(0)), "s": lambda: smooth(hot[season])}
    return np.mean([priors[k]() for k in kind], axis=0)


def close(a, b, atol=1e-6): np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=atol, rtol=0)


# ---- the Gaussian

@pytest.mark.parametrize("sigma, truncate", [(3, 4), (1, 4), (0.7, 3), (5, 2.5), (0.1, 4)])
@pytest.mark.parametrize("size", [64, 26, 13, 12, 5, 2, 1])
def test_blur_is_scipys_along_each_axis(sigma, truncate, size):
    line = np.random.default_rng(size).random(size).astype(np.float32)
    expected = gaussian_filter1d(line.astype(float), sigma, mode="reflect", truncate=truncate)
    close(_blur_matrix(size, sigma, truncate) @ torch.from_numpy(line), expected)
    image = np.random.default_rng(size).random((2, size, 30)).astype(np.float32)
    expected = np.stack([gaussian_filter(i.astype(float), sigma, mode="reflect", truncate=truncate) for i in image])
    close(blur(torch.from_numpy(image), sigma, truncate), expected)
    close(blur(torch.from_numpy(image).mT, sigma, truncate).mT, expected)               # strides do not matter


def test_kernel_is_the_published_one():
    taps = gaussian_kernel()
    assert len(taps) == 25 and taps.sum() == pytest.approx(1) and (taps == taps[::-1]).all() and taps[12] / taps[9] == pytest.approx(np.exp(0.5))


@pytest.mark.parametrize("height, width", [(64, 40), (25, 13), (12, 40), (3, 7)])
def test_both_ways_of_blurring_agree(height, width):
    maps = torch.rand(2, 3, height, width, generator=torch.manual_seed(0))
    close(blur(maps), _blur_matrix(height, 3, 4) @ maps @ _blur_matrix(width, 3, 4).T)


def test_blur_keeps_shape_sum_and_input():
    maps = torch.rand(2, 3, 4, 20, 21)
    maps[0, 1] = 0                                                                       # absent classes take a shorter way
    before = maps.clone()
    out = blur(maps)
    assert out.shape == maps.shape and torch.equal(maps, before) and (out[0, 1] == 0).all()
    close(out.sum((-2, -1)), maps.sum((-2, -1)), 1e-3)                                   # nothing leaves by the border
    assert blur(torch.zeros(0, 3, 20, 20)).shape == (0, 3, 20, 20)


# ---- priors from complete labels

@pytest.mark.parametrize("kind", ["t", "s", "ts"])
@pytest.mark.parametrize("height, width", [(40, 33), (9, 30), (4, 4)])
def test_priors_are_scipys(kind, height, width):
    labels, season = patches(height=height, width=width), torch.tensor([1, 3])
    prior = smoothing_prior(labels, season, C, kind)
    for b in range(2): close(prior[b], scipy_prior(labels[b].numpy(), int(season[b]), kind))
    close(prior.sum(1), 1)
    assert prior.dtype == torch.float32 and (prior[:, C - 1] == 0).all() and prior.min() >= 0


@pytest.mark.parametrize("sigma, truncate", [(1, 4), (5, 2)])
def test_other_widths(sigma, truncate):
    labels = patches(1)
    close(smoothing_prior(labels, torch.tensor([2]), C, "ts", sigma, truncate)[0], scipy_prior(labels[0].numpy(), 2, "ts", sigma, truncate))


def test_labels_of_every_integer_dtype_give_one_prior():
    labels = patches()
    labels[0, 0, :4] = UNLABELLED
    expected = smoothing_prior(labels, torch.tensor([0, 2]), C)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(smoothing_prior(labels.to(dtype), torch.tensor([0, 2], dtype=torch.int32), C), expected)


def test_one_season_is_both_priors():
    labels, season = patches(seasons=1), torch.tensor([0, 0])
    priors = [smoothing_prior(labels, season, C, kind) for kind in ("t", "s", "ts")]
    close(priors[0], priors[1]), close(priors[0], priors[2])


# ---- gaps

@pytest.mark.parametrize("kind", ["t", "s", "ts"])
def test_a_missing_season_does_not_vote(kind):
    labels, season = patches(), torch.tensor([0, 2])
    gap = labels.clone()
    gap[:, 3] = UNLABELLED
    close(smoothing_prior(gap, season, C, kind), smoothing_prior(labels[:, :3], season, C, kind))


def test_where_the_chosen_season_is_missing_the_others_stand_alone():
    labels, season = patches(), torch.tensor([1, 1])
    labels[:, 1] = UNLABELLED
    others = smoothing_prior(labels[:, [0, 2, 3]], torch.tensor([0, 0]), C, "t")
    close(smoothing_prior(labels, season, C, "ts"), others)
    assert (smoothing_prior(labels, season, C, "s") == 0).all()


def holes(labels, seed=1):
    "The labels with a share of their pixels and one corner unlabelled, season by season."
    gap = labels.masked_fill(torch.rand(labels.shape, generator=torch.manual_seed(seed)) < 0.3, UNLABELLED)
    gap[:, :, :14, :14] = UNLABELLED
    return gap


@pytest.mark.parametrize("kind", ["t", "s", "ts"])
def test_unlabelled_pixels_take_the_distribution_of_their_neighbours(kind):
    labels, season = holes(patches()), torch.tensor([0, 3])
    prior = smoothing_prior(labels, season, C, kind)
    for b in range(2):
        hot = one_hot(labels[b], C).double().numpy()                                     # (S, C, H, W), rows of zeros in the gaps
        votes = (labels[b] != UNLABELLED).sum(0).clamp(min=1).numpy()
        expected = []
        for maps in [{"t": hot.sum(0) / votes, "s": hot[season[b]]}[k] for k in kind]:
            blurred = np.stack([gaussian_filter(m, 3, mode="reflect", truncate=4) for m in maps])
            total = blurred.sum(0)
            expected.append(np.divide(blurred, total, out=np.zeros_like(blurred), where=total > 1e-6))
        present = sum((p.sum(0) > 0).astype(int) for p in expected)
        close(prior[b], sum(expected) / np.maximum(present, 1), 1e-4)
    total = prior.sum(1)
    close(total[total > 0], 1, 1e-5)
    assert (total[labels[torch.arange(2), season] != UNLABELLED] > 0).all() and prior.isfinite().all()


def test_a_hole_wider_than_the_kernel_has_no_prior():
    labels = patches(1, 2, 40, 60)
    labels[..., :30] = UNLABELLED
    prior = smoothing_prior(labels, torch.tensor([0]), C)
    total = prior.sum(1)[0]
    assert (total[:, :18] == 0).all() and prior.isfinite().all()                         # 12 taps reach from column 30 to 18
    close(total[:, 18:], 1, 1e-5)


@pytest.mark.parametrize("kind", ["t", "s", "ts"])
@pytest.mark.parametrize("size", [40, 5])
def test_nothing_labelled_gives_zeros(kind, size):
    labels = patches(2, 4, size, size)
    labels[1] = UNLABELLED
    prior = smoothing_prior(labels, torch.tensor([0, 0]), C, kind)
    assert (prior[1] == 0).all() and prior.isfinite().all()
    close(prior[0], scipy_prior(labels[0].numpy(), 0, kind))                             # and the other location is not touched


def test_a_location_has_one_prior_in_any_batch():
    labels, season = patches(3), torch.tensor([0, 1, 2])
    labels[2] = holes(labels[2:])[0]
    together = smoothing_prior(labels, season, C)
    for b in range(3): close(smoothing_prior(labels[b:b + 1], season[b:b + 1], C)[0], together[b])


@pytest.mark.parametrize("kind", ["t", "s", "ts"])
@pytest.mark.parametrize("height, width", [(40, 33), (6, 30), (4, 4)])
def test_the_batch_at_once_agrees(kind, height, width):
    "What a GPU computes: complete labels, some with holes, a season missing, the chosen one missing, and nothing labelled at all."
    labels, season = patches(6, height=height, width=width), torch.tensor([3, 0, 1, 2, 2, 0])
    labels[1] = holes(labels[1:2])[0]
    labels[2, 3] = labels[3, 2] = labels[4, 2] = labels[5] = UNLABELLED
    labels[4, 0, :3] = UNLABELLED
    close(_prior_at_once(labels, season, C, kind, 3.0, 4.0), smoothing_prior(labels, season, C, kind))


# ---- one patch

def maps(labels, season, *how): return [None if m is None else m.copy() for m in prior_maps(labels.numpy().astype(np.uint8), season, C, *how)]


def test_maps_are_the_prior_and_none_where_a_class_does_not_occur():
    labels = patches(1)
    prior = smoothing_prior(labels, torch.tensor([2]), C)[0]
    found = maps(labels[0], 2)
    assert len(found) == C and found[C - 1] is None and all(m.dtype == np.float32 for m in found[:-1])
    for m, p in zip(found[:-1], prior): assert np.array_equal(m, p)
    assert [m is None for m in maps(torch.full((3, 20, 20), UNLABELLED), 0)] == [True] * C


@pytest.mark.parametrize("gaps", [False, True])
def test_labels_around_a_window_are_enough(gaps):
    labels, reach = patches(1, 3, 90, 70), kernel_radius()
    if gaps: labels[0] = holes(labels)[0]
    prior = smoothing_prior(labels, torch.tensor([1]), C)[0]
    for row, column, size in [(0, 0, 30), (20, 5, 30), (60, 40, 30), (31, 17, 16)]:
        top, left = max(row - reach, 0), max(column - reach, 0)
        part = labels[:, :, top:row + size + reach, left:column + size + reach]
        found = smoothing_prior(part, torch.tensor([1]), C)[0, :, row - top:, column - left:]
        close(found[:, :size, :size], prior[:, row:row + size, column:column + size])


def test_more_seasons_than_a_byte_counts():
    labels = patches(1, 140, 20, 20)
    close(smoothing_prior(labels, torch.tensor([7]), C)[0], scipy_prior(labels[0].numpy(), 7, "ts"))


def test_a_season_that_is_not_there_is_refused():
    with pytest.raises(IndexError): maps(patches(1)[0], 4)
    assert np.array_equal(maps(patches(1)[0], -1)[0], maps(patches(1)[0], 3)[0])


def test_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match="kind='x'"): maps(patches(1)[0], 0, "x")
    with pytest.raises(ConfigError, match="kind='st': choose one of 'ts', 't', 's'"): smoothing_prior(patches(), torch.tensor([0, 0]), C, "st")


# ---- targets

def test_one_hot():
    labels = torch.tensor([[0, 2, UNLABELLED]])
    assert one_hot(labels, 3)[:, 0].T.tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0]] and one_hot(labels, 3).dtype == torch.float32
    assert one_hot(torch.zeros(2, 4, 6, 7, dtype=torch.uint8), 3).shape == (2, 4, 3, 6, 7)


def test_targets_by_hand():
    labels = torch.tensor([[[1, 0, UNLABELLED]]])
    prior = torch.tensor([[.2, .3, .5], [1, 0, 0], [.3, .3, .4]]).T.reshape(1, 3, 1, 3)
    target = smooth_labels(labels, prior, num_classes=3)[0, :, 0].T
    third = 0.05 / 3
    close(target, [[.15 * .2 + third, .8 + .15 * .3 + third, .15 * .5 + third], [.8 + .15 + third, third, third], [0, 0, 0]], 1e-7)
    close(smooth_labels(labels, None, num_classes=3)[0, :, 0].T, [[third, .95 + third, third], [.95 + third, third, third], [0, 0, 0]], 1e-7)
    close(smooth_labels(labels, None, uniform_weight=0, num_classes=3), one_hot(labels, 3), 0)
    close(smooth_labels(labels, prior, 0.4, 0.6, num_classes=3)[0, :, 0, 1], [.4 + .2, .2, .2], 1e-7)


@pytest.mark.parametrize("kind", ["t", "s", "ts"])
@pytest.mark.parametrize("make", [lambda l: l, holes])
def test_targets_sum_to_one_where_labelled_and_to_zero_elsewhere(kind, make):
    labels, season = make(patches()), torch.tensor([3, 0])
    chosen = labels[torch.arange(2), season]
    target = smooth_labels(chosen, smoothing_prior(labels, season, C, kind), num_classes=C)
    total = target.sum(1)
    close(total[chosen != UNLABELLED], 1, 1e-5)
    assert (target.movedim(1, -1)[chosen == UNLABELLED] == 0).all() and target.dtype == torch.float32
    assert (target.argmax(1) == chosen)[chosen != UNLABELLED].all()                      # the label stays the likeliest


def test_shapes_that_disagree_are_refused():
    labels = torch.zeros(2, 8, 8, dtype=torch.long)
    for shape in ((2, C, 8, 9), (2, C + 1, 8, 8), (1, C, 8, 8), (C, 8, 8)):
        with pytest.raises(DataError, match="prior has shape"): smooth_labels(labels, torch.zeros(shape), num_classes=C)
