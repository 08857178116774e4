"""The published CromSS training steps (arXiv 2405.01217), transcribed plainly from their description: the peer that the benchmark times.

It is what a careful researcher would have written in 2023 with NumPy, SciPy, LMDB and PyTorch: vectorised, nothing slowed down on purpose.
The names s1 and s2 are the sensors, C = 9 the classes, rho the kept fraction.

Known defects of the published code that are transcribed, because they are part of the step:
  * a class with floor(n rho) = 0 pixels gets weight 0 throughout, even at the first epoch;
  * nothing guards the cross-entropy against weights that sum to 0;
  * unlabelled pixels are not supported;
  * the shared decoder's batch norm mixes the running statistics of both sensors.
Left out, so that it runs and is not slower for it: the entropy as p ln(softmax p), which underflows to NaN (log_softmax is used), the NaN debugging
that writes files from within a step, the 'none' ramp that cannot be called. A record's prior is one map (M_t + M_s) / 2, not two.
"""
import math
import pickle
from pathlib import Path

import cv2
import lmdb
import numpy as np
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import nn

CLASSES = 9
KINDS = ("s1", "s2", "label")


# ---- the store: an LMDB for each sensor and one for labels, a pickled record per location, all seasons in it

def write_records(
    folder,      # of the three databases
    locations,   # list of dicts: s1 (4, 2, H, W), s2 (4, 13, H, W), label (4, H, W), all uint8
):
    "Write the three databases; the key is the location's number."
    for kind in KINDS:
        size = sum(location[kind].nbytes for location in locations)
        with lmdb.open(str(Path(folder) / f"{kind}.lmdb"), map_size=2 * size + 2 ** 20) as env, env.begin(write=True) as txn:
            for i, location in enumerate(locations):
                values = location[kind]
                txn.put(str(i).encode(), pickle.dumps((values.tobytes(), values.shape, i)))


class Records:
    "The records of one database, opened at the first read, so that every worker opens its own."

    def __init__(self, path): self.path, self.env = str(path), None

    def __getitem__(self, i):
        if self.env is None: self.env = lmdb.open(self.path, readonly=True, lock=False, readahead=False, meminit=False)
        with self.env.begin(write=False) as txn: data, shape, _ = pickle.loads(txn.get(str(i).encode()))
        return np.frombuffer(data, np.uint8).reshape(shape)


# ---- the prior of label smoothing

def one_hot(labels):
    "(..., H, W) class ids to (..., C, H, W) float32."
    return (labels[..., None, :, :] == np.arange(CLASSES)[:, None, None]).astype(np.float32)


def neighbourhood(votes):
    "Each class's map blurred, the classes of a pixel made to sum to 1; (C, H, W)."
    blurred = gaussian_filter(votes, sigma=(0, 3, 3), truncate=4.0, mode="reflect")      # sigma 0: no blur across classes
    return blurred / blurred.sum(0)


def prior(
    labels,   # (4, H, W) uint8
    season,   # the sampled one
):
    "M = (M_t + M_s) / 2 of the whole patch, (C, H, W) float32."
    z = one_hot(labels)
    return (neighbourhood(z.mean(0)) + neighbourhood(z[season])) / 2


# ---- augmentation as albumentations 1.3 does it, on (H, W, channels)

def rotate(array, angle, interpolation):
    "Rotated about the centre; OpenCV warps four channels at a time."
    height, width = array.shape[:2]
    matrix = cv2.getRotationMatrix2D((width / 2 - 0.5, height / 2 - 0.5), angle, 1.0)
    def warp(a): return cv2.warpAffine(a, matrix, (width, height), flags=interpolation, borderMode=cv2.BORDER_REFLECT_101)
    if array.ndim == 2 or array.shape[2] <= 4: return warp(np.ascontiguousarray(array))
    return np.dstack([warp(np.ascontiguousarray(array[..., i:i + 4])) for i in range(0, array.shape[2], 4)])


def augment(
    arrays,   # {kind: (H, W) or (H, W, channels)}
    rng,      # numpy Generator
    crop,     # side of the crop, px
):
    "RandomCrop, Flip (p 0.5), Rotate (p 0.2, +-90 degrees): the same for every array."
    height, width = arrays["label"].shape
    top, left = rng.integers(height - crop + 1), rng.integers(width - crop + 1)
    arrays = {k: a[top:top + crop, left:left + crop] for k, a in arrays.items()}
    if rng.random() < 0.5:
        axes = ((0,), (1,), (0, 1))[rng.integers(3)]
        arrays = {k: np.flip(a, axes) for k, a in arrays.items()}
    if rng.random() < 0.2:
        angle = rng.uniform(-90, 90)
        arrays = {k: rotate(a, angle, cv2.INTER_NEAREST if k == "label" else cv2.INTER_LINEAR) for k, a in arrays.items()}
    return arrays


def to_tensor(image):
    "(H, W, channels) to a (channels, H, W) float32 tensor; bytes become [0, 1]."
    tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    return tensor.float() / 255 if image.dtype == np.uint8 else tensor


class PublishedDataset(torch.utils.data.Dataset):
    "One random season of a location, augmented: s1, s2, prior float32 (channels, crop, crop), label int64 (crop, crop)."

    def __init__(self, folder, count, crop=256, seed=42):
        self.records = {kind: Records(Path(folder) / f"{kind}.lmdb") for kind in KINDS}
        self.count, self.crop, self.rng = count, crop, np.random.default_rng(seed)

    def __len__(self): return self.count

    def __getitem__(self, i):
        s1, s2, labels = (self.records[kind][i] for kind in KINDS)
        season = self.rng.integers(len(labels))
        images = {"s1": s1[season], "s2": s2[season], "prior": prior(labels, season)}
        arrays = {kind: image.transpose(1, 2, 0) for kind, image in images.items()} | {"label": labels[season]}
        arrays = augment(arrays, self.rng, self.crop)
        sample = {kind: to_tensor(arrays[kind]) for kind in images}
        return sample | {"label": torch.from_numpy(arrays["label"].astype(np.int64))}


# ---- selection

def smoothed_targets(
    labels,   # (B, H, W) int64
    prior,    # (B, C, H, W)
):
    "Z' = 0.8 Z + 0.15 M + 0.05 / C, (B, C, H, W)."
    z = F.one_hot(labels, CLASSES).permute(0, 3, 1, 2).float()
    return 0.8 * z + 0.15 * prior + 0.05 / CLASSES


def ramp(epoch, length=80): return math.exp(-5 * (1 - min(epoch, length) / length) ** 2)


def confidences(logits, labels):
    "Probability of the label, and 1 - entropy / ln C, of one sensor: two (B, H, W)."
    logits = logits.detach()
    p = logits.softmax(1)
    entropy = -(p * logits.log_softmax(1)).sum(1)
    return p.gather(1, labels.unsqueeze(1)).squeeze(1), (1 - entropy / math.log(CLASSES)).clamp(0, 1)


def entangle(first, second):
    "Each confidence, lowered where the other is low."
    both = first * second
    return (first + both) / 2, (second + both) / 2


def class_balanced_weights(
    confidence,   # (B, H, W), entangled label confidence
    labels,       # (B, H, W) int64
    rho,          # fraction of every class that keeps weight 1
    rank="topk",  # "topk" as published; "kthvalue" is the faster way to the same number
):
    "clip(confidence / tau, 0, 1), tau being the floor(n rho)-th largest of the class; (B, H, W)."
    weights = torch.zeros_like(confidence)
    for c in labels.unique():
        inside = labels == c
        values = confidence[inside]
        k = math.floor(len(values) * rho)
        if k == 0: continue                                                  # the known defect: weight 0
        tau = torch.topk(values, k).values[-1] if rank == "topk" else torch.kthvalue(values, len(values) - k + 1).values
        weights[inside] = (values / tau).clamp(max=1) if tau > 0 else 1.0
    return weights


def select(
    logits,       # (s1, s2), each (B, C, H, W)
    labels,       # (B, H, W) int64
    epoch,        # 0-based
    keep=0.5,     # final fraction
    rank="topk",  # as in `class_balanced_weights`
):
    "Label weights and prediction weights of both sensors: two pairs of (B, H, W)."
    r = ramp(epoch)
    label, prediction = zip(*(confidences(l, labels) for l in logits))
    label, prediction = entangle(*label), entangle(*prediction)
    rho = 1 - r * (1 - keep)
    return [class_balanced_weights(c, labels, rho, rank) for c in label], [(1 - r) + r * c for c in prediction]


# ---- losses

def weighted_cross_entropy(logits, targets, weights):
    return (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()


def weighted_dice(logits, targets, weights):
    "Soft Dice over the batch, the mean over all classes."
    p, w = logits.log_softmax(1).exp(), weights.unsqueeze(1)
    overlap = (w * p * targets).sum((0, 2, 3))
    total = (w * p + w * targets).sum((0, 2, 3))
    present = targets.sum((0, 2, 3)) > 0
    return ((1 - 2 * overlap / total.clamp(min=1e-7)) * present).mean()


def consistency(student, teacher, weights):
    "Cross-entropy against the other sensor's detached distribution, weighted by the other sensor's confidence."
    values = F.cross_entropy(student, teacher.detach().softmax(1), reduction="none")
    total = weights.sum()
    return (values * weights).sum() / total if total > 0 else total


def losses(
    logits,               # (s1, s2), each (B, C, H, W)
    targets,              # (B, C, H, W)
    label_weights,        # (s1, s2), each (B, H, W)
    prediction_weights,   # (s1, s2), each (B, H, W)
):
    "The loss of a step, a scalar."
    own = sum(weighted_cross_entropy(l, targets, w) + weighted_dice(l, targets, w) for l, w in zip(logits, label_weights))
    return own + consistency(logits[0], logits[1], prediction_weights[1]) + consistency(logits[1], logits[0], prediction_weights[0])


# ---- network and step

class MiddleFusion(nn.Module):
    "An encoder for each sensor; one U-Net decoder and head, batch norm included, for both."

    def __init__(self, bands=(2, 13), encoder="resnet50"):
        super().__init__()
        nets = [smp.Unet(encoder, encoder_weights=None, in_channels=n, classes=CLASSES) for n in bands]
        self.encoders = nn.ModuleList(net.encoder for net in nets)
        self.decoder, self.head = nets[0].decoder, nets[0].segmentation_head

    def forward(self, images): return [self.head(self.decoder(encoder(x))) for encoder, x in zip(self.encoders, images)]


def make_optimizer(net): return torch.optim.Adam(net.parameters(), lr=5e-3, weight_decay=1e-8)


def training_step(
    net,         # MiddleFusion
    optimizer,   # from `make_optimizer`
    batch,       # s1, s2, prior, label as PublishedDataset gives them, stacked
    epoch,       # 0-based
):
    "One step; the loss, a float."
    logits = net((batch["s1"], batch["s2"]))
    targets = smoothed_targets(batch["label"], batch["prior"])
    loss = losses(logits, targets, *select(logits, batch["label"], epoch))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
