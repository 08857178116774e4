"""Agreement with the published implementation on its own outputs (tests/golden), exact thresholds, gradients too."""
from pathlib import Path

import numpy as np
import pytest
import torch

from cromss.config import PretrainConfig, SelectionConfig
from cromss.losses import consistency, cromss_loss
from cromss.selection import entangle, keep_fraction, label_weights, ramp, select
from cromss.smoothing import smooth_labels, smoothing_prior

GOLDEN = Path(__file__).parent / "golden"
CASES = {"a": ("entropy", "ce", "ce+dice"), "d": ("gini", "kl", "ce+dice"), "g": ("entropy", "ce", "ce")}
SENSORS = ("s1", "s2")


class Case:
    "One reference case, its inputs as tensors."

    def __init__(self, name):
        self.data = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(GOLDEN / f"case_{name}.npz").items()}
        confidence, self.consistency, loss = CASES[name]
        self.selection = SelectionConfig(confidence=confidence, method="exact")
        self.config = PretrainConfig(consistency=self.consistency, loss=loss, selection=self.selection)
        self.epoch = int(self.data["epoch"])
        self.seasons = self.data["labels_seasons"].long()
        self.season = self.data["season"].expand(len(self.seasons))
        self.labels = self.seasons[torch.arange(len(self.seasons)), self.season]

    def logits(self, grad=False): return {s: self.data[f"logits_{s}"].clone().requires_grad_(grad) for s in SENSORS}
    def select(self, method="exact"):
        return select(self.logits(), self.labels, self.epoch, SelectionConfig(confidence=self.selection.confidence, method=method))
    def target(self): return smooth_labels(self.labels, smoothing_prior(self.seasons, self.season, 9))
    def close(self, name, value, atol): torch.testing.assert_close(value, self.data[name].to(value.dtype), atol=atol, rtol=0)


@pytest.fixture(params=sorted(CASES))
def case(request): return Case(request.param)


def test_kept_fraction(case):
    assert abs(keep_fraction(case.epoch, 80) - float(case.data["ratio"])) < 1e-12


def test_confidences(case):
    s = case.select()
    for d in SENSORS:
        case.close(f"pred_conf_{d}", s.prediction_confidence[d], 1e-6)
        case.close(f"label_conf_{d}", s.label_confidence[d], 1e-6)
        case.close(f"ent_pred_{d}", s.entangled_prediction[d], 1e-6)
        case.close(f"ent_label_{d}", s.entangled_label[d], 1e-6)


def test_weights(case):
    s = case.select()
    for d in SENSORS:
        case.close(f"w_label_{d}", s.label_weights[d], 1e-5)
        case.close(f"w_pred_{d}", s.prediction_weights[d], 1e-5)
        everywhere = label_weights(s.entangled_label[d], case.labels, s.keep, 9, per_class=False)
        case.close(f"w_label_global_{d}", everywhere, 1e-5)


def test_histogram_is_close_to_exact(case):
    exact, fast = case.select(), case.select("histogram")
    worst = max((exact.label_weights[d] - fast.label_weights[d]).abs().max().item() for d in SENSORS)
    assert 0 < worst < 2e-2


def test_priors(case):
    for kind in ("t", "s", "ts"): case.close(f"prior_{kind}", smoothing_prior(case.seasons, case.season, 9, kind), 1e-6)


def test_losses_and_gradients(case):
    logits = case.logits(grad=True)
    selection = select(logits, case.labels, case.epoch, case.selection)
    loss = cromss_loss(logits, case.target(), selection, case.config)
    torch.testing.assert_close(loss.total.double(), case.data["loss_total"], rtol=1e-4, atol=0)
    taught = sum(v for k, v in loss.parts.items() if k.startswith("consistency"))
    torch.testing.assert_close(taught.double(), case.data["loss_consistency"], rtol=1e-4, atol=0)
    torch.testing.assert_close(consistency(logits, selection.prediction_weights, case.consistency).double(), case.data["loss_consistency"], rtol=1e-4, atol=0)
    loss.total.backward()
    for d in SENSORS: case.close(f"grad_{d}", logits[d].grad, 1e-7)


def test_without_selection(case):
    logits = case.logits()
    loss = cromss_loss(logits, case.target(), select(logits, case.labels, case.epoch, None), case.config)
    torch.testing.assert_close(loss.total.double(), case.data["loss_no_selection"], rtol=1e-4, atol=0)


def test_ramp_by_hand():
    assert [round(ramp(t, 80), 4) for t in (0, 20, 40, 60, 80, 200)] == [0.0067, 0.0601, 0.2865, 0.7316, 1.0, 1.0]
    assert entangle({"s1": torch.tensor(0.6), "s2": torch.tensor(0.5)})["s1"].item() == pytest.approx(0.6 * 1.5 / 2)
