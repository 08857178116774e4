"""That both sides compute the same: run before anything is timed, and by the tests on small shapes. Each raises AssertionError otherwise."""
import published
import torch

from cromss.config import PretrainConfig, SelectionConfig, SmoothingConfig
from cromss.dataset import PatchDataset
from cromss.losses import cromss_loss
from cromss.models import CrossModalSegmenter
from cromss.selection import select
from cromss.smoothing import smooth_labels

SENSORS = ("s1", "s2")
EXACT = SelectionConfig(method="exact")


def example(
    batch=8,     # B
    size=256,    # side, px
    patch=16,    # side of a block of one class, px
    seed=0,      # of all numbers
    grad=False,  # whether the logits ask for gradients
):
    "Logits of both sensors that know the labels somewhat, labels in blocks, and soft targets: (s1, s2), (B, H, W), (B, C, H, W)."
    g, classes = torch.Generator().manual_seed(seed), published.CLASSES
    blocks = torch.randint(classes, (batch, -(-size // patch), -(-size // patch)), generator=g)
    labels = blocks.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, :size, :size].contiguous()
    hint = torch.nn.functional.one_hot(labels, classes).permute(0, 3, 1, 2)
    logits = [(2 * torch.randn(batch, classes, size, size, generator=g) + 2 * hint).contiguous().requires_grad_(grad) for _ in SENSORS]
    prior = torch.rand(batch, classes, size, size, generator=g).softmax(1)
    return logits, labels, published.smoothed_targets(labels, prior)


def close(ours, theirs, what, atol=0.0, rtol=0.0):
    "Raise AssertionError, saying what and by how much, unless they agree."
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=rtol, msg=lambda m: f"{what} differ: {m}")


def check_priors(
    store,          # of the package
    records,        # PublishedDataset of the same locations
    locations=2,    # how many to compare
):
    "Priors within 1e-5, for every season of some locations; images, labels and soft targets too."
    side = store.shape(0)[0]
    ours = PatchDataset(store, locations=range(locations), crop=side, augment=False, smoothing=SmoothingConfig())
    seasons = store.season_count
    for n in range(len(ours)):
        location, season = divmod(n, seasons)
        sample, labels = ours[n], records.records["label"][location]
        prior = torch.from_numpy(published.prior(labels, season))
        close(sample["mask"], torch.from_numpy(labels[season].astype("int64")), "labels")
        for s in SENSORS: close(sample[f"image_{s}"], torch.from_numpy(records.records[s][location][season] / 255).float(), f"images of {s}", atol=1e-6)
        close(sample["prior"].float(), prior, "priors", atol=1e-5)
        targets = smooth_labels(sample["mask"][None], sample["prior"][None])
        close(targets, published.smoothed_targets(sample["mask"][None], prior[None]), "soft targets", atol=1e-5)


def check_selection(
    logits,   # (s1, s2)
    labels,   # (B, H, W); a class that is there has at least 2 pixels
    epoch,    # 0-based
):
    "Label weights, thus thresholds, and prediction weights within 1e-5 by the exact method; by the histogram within its 2^-8."
    theirs = published.select(logits, labels, epoch)
    ours, fast = (select(dict(zip(SENSORS, logits)), labels, epoch, c) for c in (EXACT, SelectionConfig()))
    for s, label, prediction in zip(SENSORS, *theirs):
        close(ours.label_weights[s], label, f"label weights of {s}", atol=1e-5)
        close(ours.prediction_weights[s], prediction, f"prediction weights of {s}", atol=1e-5)
        close(fast.label_weights[s], label, f"label weights of {s} by histogram", atol=2 ** -8 + 1e-5)


def check_losses(
    logits,    # (s1, s2) that ask for gradients
    labels,    # (B, H, W)
    targets,   # (B, C, H, W)
    epoch,     # 0-based
):
    "The loss within 1e-4 relative, selection included, and its gradients within 1e-3 of their norm."
    theirs = published.losses(logits, targets, *published.select(logits, labels, epoch))
    named = dict(zip(SENSORS, logits))
    ours = cromss_loss(named, targets, select(named, labels, epoch, EXACT), PretrainConfig(selection=EXACT)).total
    close(ours, theirs, "losses", rtol=1e-4)
    for a, b in zip(torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits)):
        assert (a - b).norm() <= 1e-3 * b.norm(), f"gradients differ by {((a - b).norm() / b.norm()).item():.1e} of their norm"


def twin(
    net,       # MiddleFusion
    encoder,   # smp's name of its encoder
):
    "The package's model with the same weights."
    bands = {s: e._in_channels for s, e in zip(SENSORS, net.encoders)}
    model = CrossModalSegmenter(bands, published.CLASSES, encoder=encoder, norm="shared")
    for s, theirs in zip(SENSORS, net.encoders): model.encoder(s).load_state_dict(theirs.state_dict())
    model.nets["s1"].decoder.load_state_dict(net.decoder.state_dict())
    model.nets["s1"].segmentation_head.load_state_dict(net.head.state_dict())
    return model


def check_network(
    net,     # MiddleFusion
    model,   # its `twin`
    batch,   # with s1 and s2, (B, bands, H, W)
):
    "Logits within 1e-4 of each other, in training mode."
    with torch.no_grad(): theirs, ours = net([batch[s] for s in SENSORS]), model({s: batch[s] for s in SENSORS})
    for s, logits in zip(SENSORS, theirs): close(ours[s], logits, f"logits of {s}", atol=1e-4, rtol=1e-4)
