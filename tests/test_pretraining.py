"Whole runs on a few tiny scenes: what they leave, every mode, faults that are really made, and going on after them."
import hashlib
import inspect
import json
import os
import shutil
import tempfile
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
import yaml
from test_sources import label, plain, season  # noqa: F401 (a fixture)

from cromss import pretraining as module
from cromss.classes import IGNORE, SCHEMES
from cromss.config import ConfigError, CromssError, DataError, StoreError, WeightsError, preset, to_dict
from cromss.models import CrossModalSegmenter
from cromss.prepare import prepare
from cromss.pretraining import (CromssTask, PatchDataModule, WrongPixelAUROC, clock, configure, estimate, evaluate, load_task, make_trainer,
                                newest_checkpoint, notebook_parameters, open_data, pretrain)
from cromss.runs import Run
from cromss.scenes import ScenesSource
from cromss.sensors import SENSORS
from cromss.store import Location, write_store
from cromss.weights import load_encoder

pytestmark = [pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"), pytest.mark.filterwarnings("ignore:.*srun.*")]
TWO, DW = {s: SENSORS[s] for s in ("s1", "s2")}, SCHEMES["dynamic-world"]


@pytest.fixture
def folder():
    "A folder that is gone afterwards: runs are large."
    with tempfile.TemporaryDirectory() as name: yield Path(name)


@pytest.fixture(scope="module")
def scenes():
    "Eight scenes of 32 px with three sensors, as a store."
    with tempfile.TemporaryDirectory() as name:
        yield prepare(ScenesSource(count=8, size=32, sensors=("s1", "s2", "dem")), f"{name}/scenes", progress=False)


@pytest.fixture
def unfinished(monkeypatch):
    "Runs that end with the last epoch: no figures, no encoders."
    monkeypatch.setattr(module, "_finish", lambda *_: None)


def tiny(folder, **changes):
    "Two epochs of two steps of a small network: seconds."
    values = dict(encoder="mobilenet_v2", encoder_depth=3, decoder_channels=(8, 8, 8), crop=32, batch_size=3, min_steps=2, epochs=2, selection={"ramp_epochs": 1}, num_workers=0,
                  precision="32-true", devices=1, loggers=(), runs=str(folder / "runs"), stores=str(folder / "stores"), name="run")
    return preset("demo", **values | changes)


def weights(path):
    "The parameters and statistics in a checkpoint, and nothing that runs."
    return torch.load(path, weights_only=True, map_location="cpu")["state_dict"]


def last(run): return weights(newest_checkpoint(run))


def same(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def network(state): return {k: v for k, v in state.items() if k.startswith("model.")}


def learned(state): return {k: v for k, v in network(state).items() if not k.endswith(("running_mean", "running_var", "num_batches_tracked"))}


def parts(run): return {c.removeprefix("train_") for c in run.metrics() if c.startswith(("train_ce", "train_dice", "train_consistency"))}


def refusal(make, kind, *words):
    "The message of the error that `make` raises: of a type of ours, one line, with all of the words."
    with pytest.raises(kind) as e: make()
    message = str(e.value)
    assert "\n" not in message and all(w in message for w in words), message
    return message


# (a) what a run leaves

def test_a_run_leaves_all_that_is_promised(scenes, folder):
    run = pretrain(tiny(folder, encoder="resnet18", seed=3), scenes)
    files = run.files()
    assert {"config.yaml", "environment.json", "metrics.csv", "progress.log", "summary.json", "checkpoints/epoch=0000.ckpt", "checkpoints/epoch=0001.ckpt",
            "checkpoints/epoch=0001.sha256", *(f"figures/{n}.png" for n in ("curves", "confidence", "selection", "predictions")),
            *(f"encoders/{s}/{n}" for s in ("s1", "s2") for n in ("model.safetensors", "config.json", "README.md"))} <= set(files)
    assert not [f for f in files if Path(f).name.startswith(".")] and "skipped_steps.log" not in files
    table = run.metrics()
    assert table["epoch"].tolist() == [0, 1] and not table.isna().any().any() and np.isfinite(table.values).all()
    assert table["train_loss"].iloc[1] < table["train_loss"].iloc[0]
    assert table["keep"].iloc[0] > 0.99 and table["keep"].iloc[1] == 0.5 and (table["train_empty_steps"] == 0).all() and (table["train_usable_share"] == 1).all()
    assert np.allclose(table["train_loss"], table[[f"train_{p}" for p in parts(run)]].sum(axis=1), rtol=1e-4)
    assert {f"val_{w}_{s}" for w in ("oa", "miou", "oa_reference", "miou_reference") for s in ("s1", "s2", "mean")} <= set(table)
    summary = run.summary()
    assert summary["split"] == "7 locations to train on, 1 held out" and summary["epochs"] == 2 and None not in (*summary["train"].values(), *summary["validation"].values())
    assert "left" in (run.folder / "progress.log").read_text()
    # what was exported is what was trained
    state, again = last(run), Run.open(run.folder)
    assert again.config == run.config
    for s in ("s1", "s2"):
        tensors = {f"model.nets.{s}.encoder.{k}": v for k, v in load_encoder(run.encoders / s).state_dict().items()}
        assert all(torch.equal(v, state[k]) for k, v in tensors.items())
    task = load_task(again)
    assert not task.training and evaluate(task, PatchDataModule(again.config, scenes).dataset("validation", augment=False)).compute() == summary["validation"]


def test_tensorboard_curves(scenes, folder, unfinished):
    run = pretrain(tiny(folder, epochs=1, loggers="tensorboard", sensors="s2"), scenes)
    assert any("tfevents" in f for f in run.files())


# (b) modes

FULL = {f"{p}_{s}" for p in ("ce", "dice", "consistency") for s in ("s1", "s2")}
APART = {f"{p}_{s}" for p in ("ce", "dice") for s in ("s1", "s2")}
ONE = {"ce_s2", "dice_s2"}
MODES = {      # name: (what differs, the parts of the loss, whether the run is finished with figures and encoders)
    "full": ({}, FULL, False),
    "S2 alone": (dict(sensors="s2"), ONE, True),
    "S1 alone": (dict(sensors="s1", fusion="late"), {"ce_s1", "dice_s1"}, False),
    "several without selection": (dict(selection=False, smoothing=False), FULL, True),
    "smoothing only": (dict(selection=False), FULL, False),
    "selection only": (dict(smoothing=False), FULL, False),
    "uniform smoothing": (dict(smoothing={"kind": "none"}), FULL, False),
    "late fusion": (dict(fusion="late"), FULL, True),
    "shared norm": (dict(norm="shared"), FULL, False),
    "one threshold": (dict(selection={"per_class": False}), FULL, False),
    "exact": (dict(selection={"method": "exact"}), FULL, False),
    "gini, linear": (dict(selection={"confidence": "gini", "ramp": "linear"}), FULL, False),
    "at once": (dict(selection={"ramp": "none"}), FULL, False),
    "kl": (dict(consistency="kl"), FULL, False),
    "mse": (dict(consistency="mse"), FULL, False),
    "no consistency": (dict(consistency="none"), APART, False),
    "ce": (dict(loss="ce"), {p for p in FULL if "dice" not in p}, False),
    "ce alone": (dict(loss="ce", consistency="none", sensors="s2", smoothing=False, selection=False), {"ce_s2"}, False),
    "plateau": (dict(schedule="plateau"), FULL, False),
    "constant": (dict(schedule="constant"), FULL, False),
    "rotation": (dict(rotation=True), FULL, False),
    "bands": (dict(bands={"s2": ["B4", "B3", "B2"], "s1": ["VH"]}), FULL, True),
    "fpn": (dict(architecture="fpn", decoder_channels=None, encoder_depth=5, norm="per-sensor"), FULL, False),
    "one worker": (dict(num_workers=1), FULL, False),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:norm='per-sensor' splits nothing")
def test_every_mode_trains(mode, scenes, folder, monkeypatch, request):
    changes, expected, finished = MODES[mode]
    if not finished: monkeypatch.setattr(module, "_finish", lambda *_: None)
    if mode != "bands": request.getfixturevalue("undrawn")           # drawn are those of few bands, and above those of all
    if mode == "fpn": changes = {k: v for k, v in changes.items() if v is not None}
    base = tiny(folder, epochs=1)
    config = preset("demo", **{**to_dict(base), "preset": None, **changes}) if mode != "fpn" else replace(base, **MODES[mode][0])
    run = pretrain(config, scenes)
    row = run.metrics().iloc[0]
    assert parts(run) == expected and np.isfinite(run.metrics().values).all() and len(run.metrics()) == 1
    assert row["keep"] == (1.0 if config.selection is None else pytest.approx(0.5 if config.selection.ramp == "none" else 1.0, abs=0.01))
    assert row["lr"] == config.learning_rate
    sensors = {c.split("_")[-1] for c in run.metrics() if c.startswith("val_miou")}
    assert sensors == {*config.sensors} | ({"mean"} if len(config.sensors) > 1 else set())
    if finished:
        for s in config.sensors:
            bands = json.loads((run.encoders / s / "config.json").read_text())["sensor"]["bands"]
            assert bands == list((config.bands or {}).get(s, SENSORS[s].bands))
        assert {f"figures/{n}.png" for n in ("curves", "confidence", "selection", "predictions")} <= set(run.files())


def test_fusion_shares_what_it_says(scenes, folder):
    def keys(**changes):
        state = CromssTask(to_dict(tiny(folder, **changes)), {"s1": 2, "s2": 13}, 9).model.state_dict(keep_vars=True)
        return {k.removeprefix("nets.s2."): v for k, v in state.items() if k.startswith("nets.s2.")}, {k.removeprefix("nets.s1."): v for k, v in state.items() if k.startswith("nets.s1.")}
    def shared(a, b): return {k for k in a if k in b and a[k].data_ptr() == b[k].data_ptr() and a[k].numel()}
    late, middle, published = (shared(*keys(**c)) for c in ({"fusion": "late"}, {}, {"norm": "shared"}))
    assert not late and {k.split(".")[0] for k in middle} == {"decoder", "segmentation_head"} == {k.split(".")[0] for k in published}
    assert not [k for k in middle if "running" in k] and [k for k in published if "running" in k]


def test_the_networks_defaults_are_the_published_ones():
    defaults = {n: p.default for n, p in inspect.signature(smp.Unet).parameters.items()}
    assert defaults["encoder_depth"] == 5 and tuple(defaults["decoder_channels"]) == (256, 128, 64, 32, 16) and defaults["decoder_attention_type"] is None


def test_the_published_optimizer_and_schedule(folder):
    task = CromssTask(to_dict(tiny(folder, schedule="plateau", learning_rate=5e-3, patience=30)), {"s1": 2, "s2": 13}, 9)
    found = task.configure_optimizers()
    scheduler, group = found["lr_scheduler"]["scheduler"], found["optimizer"].param_groups[0]
    assert found["lr_scheduler"]["monitor"] == "val_loss" and (scheduler.factor, scheduler.patience, scheduler.threshold, scheduler.threshold_mode, scheduler.mode) == (0.5, 30, 1e-4, "rel", "min")
    assert (group["lr"], group["weight_decay"], group["betas"]) == (5e-3, 1e-8, (0.9, 0.999)) and type(found["optimizer"]) is torch.optim.Adam


def test_places_too_few_to_hold_any_out(folder, undrawn):
    "One tiny place: padded, nothing held out, the schedule follows the training loss; figures and scores are of training places."
    store = prepare(ScenesSource(count=1, size=20), folder / "one", progress=False)
    run = pretrain(tiny(folder, epochs=1, schedule="plateau"), store)
    assert "nothing is held out" in run.summary()["split"] and "validation" not in run.summary() and run.summary()["train"]["miou_s2"] >= 0
    assert run.metrics()["train_usable_share"].iloc[0] == pytest.approx(400 / 1024, abs=1e-4) and not [c for c in run.metrics() if c.startswith("val_")]
    assert "figures/predictions.png" in run.files()


def test_one_place_in_two_blocks(folder, unfinished):
    store = prepare(ScenesSource(count=1, size=70), folder / "one", progress=False)
    run = pretrain(tiny(folder, epochs=1), store)
    assert np.isfinite(run.metrics()["val_loss"].iloc[0])


# (c) more sensors, other classes

COARSE = {"name": "coarse", "names": ["water", "green", "bare or built"], "colors": ["#419BDF", "#397D49", "#C4281B"],
          "remap": {0: 0, 3: 0, 8: 255, 1: 1, 2: 1, 4: 1, 5: 1, 6: 2, 7: 2}}


@pytest.fixture
def coarse(folder):
    "A class scheme of the user's own: Dynamic World's ids in three classes, snow left out."
    path = folder / "coarse.yaml"
    path.write_text(yaml.safe_dump(COARSE))
    return path


def test_three_sensors_and_other_classes(folder, coarse):
    sensors = ("s1", "s2", "dem")
    store = prepare(ScenesSource(count=6, size=32, sensors=sensors, scheme=str(coarse)), folder / "store", progress=False)
    run = pretrain(tiny(folder, data=str(store.folder), classes=str(coarse), sensors=sensors, epochs=1))
    assert parts(run) == {f"{p}_{s}" for p in ("ce", "dice", "consistency") for s in sensors} and np.isfinite(run.metrics().values).all()
    assert 0 < run.metrics()["train_usable_share"].iloc[0] <= 1
    for s in sensors:
        known = json.loads((run.encoders / s / "config.json").read_text())
        assert known["classes"] == COARSE["names"] and known["class_scheme"] == "coarse" and known["sensor"]["bands"] == list(SENSORS[s].bands)
        assert load_encoder(run.encoders / s) is not None
    assert {f"figures/{n}.png" for n in ("curves", "confidence", "selection", "predictions")} <= set(run.files())
    assert load_task(run).model.options["num_classes"] == 3 and {"miou_dem", "miou_mean", "auroc_dem"} <= set(run.summary()["validation"])


def test_two_of_three_sensors_in_another_order(scenes, folder, unfinished):
    run = pretrain(tiny(folder, sensors="dem,s2", epochs=1), scenes)
    assert parts(run) == {f"{p}_{s}" for p in ("ce", "dice", "consistency") for s in ("dem", "s2")}


# (d) nothing to learn

def random_store(folder, labels, valid=None, count=4, size=32):
    "A store of random images and given labels, function of (place, season)."
    rng = np.random.default_rng(0)
    def images(): return {n: [rng.integers(0, 256, (s.num_bands, size, size), np.uint8)] for n, s in TWO.items()}
    places = [Location(f"p{i}", ("a",), images(), [labels(i)], None, None if valid is None else {"s1": [valid.copy()]}) for i in range(count)]
    return write_store(folder / "random", places, TWO, DW)


def test_no_valid_pixel_anywhere(folder, monkeypatch):
    "Loss and gradients are 0, no weight moves, the steps are counted, and the run stops after the first epoch, for it can learn nothing."
    store = random_store(folder, lambda i: np.full((32, 32), i % 9, np.uint8), np.zeros((32, 32), bool))
    seen, states = [], []
    class Watch(CromssTask):
        def on_before_optimizer_step(self, optimizer):
            seen.append([p.grad.abs().max().item() for p in self.parameters() if p.grad is not None])
            states.append({k: v.clone() for k, v in self.named_parameters()})
            super().on_before_optimizer_step(optimizer)
    monkeypatch.setattr(module, "CromssTask", Watch)
    refusal(lambda: pretrain(tiny(folder, weight_decay=0.0), store), DataError, "no pixel of this epoch could be learned from")
    table = Run.open(folder / "runs" / "run").metrics()
    assert (table["train_loss"] == 0).all() and (table[[f"train_{p}" for p in FULL]] == 0).all().all() and (table["val_loss"] == 0).all()
    assert table["train_empty_steps"].tolist() == [2] and (table["train_usable_share"] == 0).all() and not table.isna().any().any()
    assert len(seen) == 2 and all(g and max(g) == 0 for g in seen) and all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_batches_without_a_label(folder, unfinished):
    "Labels in one corner, which crops miss: no segmentation loss; the sensors still teach each other, which needs no label."
    corner = np.full((96, 96), IGNORE, np.uint8)
    corner[:1, :1] = 2
    store = random_store(folder, lambda i: corner, size=96, count=2)
    for consistency, name in (("none", "apart"), ("ce", "taught")):
        config = tiny(folder, name=name, consistency=consistency, epochs=1, batch_size=1, min_steps=3, validation=0.0, seed=1)
        refusal(lambda: pretrain(config, store), DataError, "no pixel of this epoch could be learned from")
        row = Run.open(folder / "runs" / name).metrics().iloc[0]
        assert row["train_empty_steps"] == max(3, 18) and row["train_usable_share"] == 0
        assert all(row[f"train_{p}"] == 0 for p in APART) and (row["train_loss"] == 0) == (consistency == "none")


def test_a_few_empty_steps_are_counted_among_others(folder, unfinished):
    def labels(i): return np.full((32, 32), 4, np.uint8)
    rng = np.random.default_rng(0)
    places = []
    for i in range(4):
        images = {n: [rng.integers(0, 256, (s.num_bands, 32, 32), np.uint8)] for n, s in TWO.items()}
        places.append(Location(f"p{i}", ("a",), images, [labels(i)], None, {"s1": [np.full((32, 32), i > 0)]}))
    run = pretrain(tiny(folder, epochs=1, batch_size=1, min_steps=4, validation=0.0), write_store(folder / "mixed", places, TWO, DW))
    assert run.metrics()["train_empty_steps"].tolist() == [1] and run.metrics()["train_usable_share"].tolist() == [0.75] and np.isfinite(run.metrics()["train_loss"].iloc[0])


# (e) a loss that is not finite

class Poison:
    "Makes the logits of some training steps NaN, and remembers the parameters before each step."

    def __init__(self, monkeypatch, *steps, always=False, images=False):
        self.steps, self.always, self.images, self.before, self.task = steps, always, images, [], None
        real = CrossModalSegmenter.forward
        def forward(model, images):
            if not model.training or not torch.is_grad_enabled(): return real(model, images)      # no training step
            bad, nan = self.always or len(self.before) in self.steps, float("nan")
            self.before.append({k: v.detach().clone() for k, v in model.named_parameters()})
            if bad and self.images: images = {s: x * nan for s, x in images.items()}
            out = real(model, images)
            return {s: x * nan for s, x in out.items()} if bad else out
        monkeypatch.setattr(CrossModalSegmenter, "forward", forward)


def test_a_step_with_a_nan_loss_changes_nothing(scenes, folder, monkeypatch, undrawn):
    poison, keys = Poison(monkeypatch, 2), []
    real = CromssTask.training_step
    def note(self, batch, i):
        keys.append(batch["key"])
        return real(self, batch, i)
    monkeypatch.setattr(CromssTask, "training_step", note)
    with pytest.warns(UserWarning, match="step 2: the loss is not finite, the step is skipped"): run = pretrain(tiny(folder, min_steps=3), scenes)
    assert same(poison.before[2], poison.before[3]) and not same(poison.before[1], poison.before[2]) and not same(poison.before[3], poison.before[4])
    assert (run.folder / "skipped_steps.log").read_text() == f"2 {', '.join(keys[2])}\n"
    assert np.isfinite(run.metrics().values).all() and len(keys) == 6 and all(v.isfinite().all() for v in last(run).values())


def test_momentum_does_not_move_weights_in_a_skipped_step(scenes, folder, monkeypatch, unfinished):
    poison = Poison(monkeypatch, 4, 5)
    with pytest.warns(UserWarning, match="skipped"): run = pretrain(tiny(folder, epochs=1, min_steps=8, weight_decay=0.5), scenes)
    assert same(poison.before[4], poison.before[5]) and same(poison.before[5], poison.before[6]) and not same(poison.before[6], poison.before[7])
    assert [line.split()[0] for line in (run.folder / "skipped_steps.log").read_text().splitlines()] == ["4", "5"]


def test_running_statistics_survive_a_nan(scenes, folder, monkeypatch, unfinished):
    Poison(monkeypatch, 1, images=True)
    with pytest.warns(UserWarning, match="skipped"): run = pretrain(tiny(folder, min_steps=3), scenes)
    assert all(v.isfinite().all() for v in last(run).values()) and np.isfinite(run.metrics()["val_loss"]).all()


def test_a_loss_that_stays_nan_stops_the_run(scenes, folder, monkeypatch):
    poison = Poison(monkeypatch, always=True)
    with pytest.warns(UserWarning, match="skipped"):
        message = refusal(lambda: pretrain(tiny(folder, epochs=1, min_steps=30), scenes), DataError, "not finite in 10 steps in a row", "scene-0000", "lower learning_rate")
    log = (folder / "runs" / "run" / "skipped_steps.log").read_text().splitlines()
    assert len(log) == CromssTask.MOST_SKIPPED == len(poison.before) == 10 and same(poison.before[0], poison.before[-1])
    assert log[-1].split(" ", 1)[1] in message


def test_skips_must_be_in_a_row_to_stop(scenes, folder, monkeypatch, unfinished):
    Poison(monkeypatch, *range(1, 9), *range(10, 18))
    with pytest.warns(UserWarning, match="skipped"): run = pretrain(tiny(folder, epochs=1, min_steps=20), scenes)
    assert len((run.folder / "skipped_steps.log").read_text().splitlines()) == 16


def test_a_short_run_of_skipped_steps_ends_in_order(scenes, folder, monkeypatch, undrawn):
    Poison(monkeypatch, always=True)
    with pytest.warns(UserWarning, match="skipped"): pretrain(tiny(folder, epochs=1), scenes)


def test_skipped_steps_with_a_gradient_scaler(scenes, folder, monkeypatch, unfinished):
    from lightning.pytorch.plugins.precision import MixedPrecision
    class Scaled(MixedPrecision):
        "float16's scaler, around float32 arithmetic: what a GPU does, on any machine."
        def autocast_context_manager(self): return torch.autocast("cpu", enabled=False)
    def trainer(config, run, *_):
        made = L.Trainer(max_epochs=config.epochs, accelerator="cpu", devices=1, logger=False, plugins=[Scaled("16-mixed", "cpu")], default_root_dir=run.folder, use_distributed_sampler=False,
                         num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
        return made
    monkeypatch.setattr(module, "make_trainer", trainer)
    poison = Poison(monkeypatch, 1)
    with pytest.warns(UserWarning, match="skipped"): pretrain(tiny(folder, epochs=1, min_steps=4), scenes)
    assert same(poison.before[1], poison.before[2]) and not same(poison.before[2], poison.before[3])


# (f) going on

class Stop(Exception): "What ends a process in its midst."


def interrupted(config, store, step):
    "A run that ends just before its `step`-th training step."
    real = CromssTask.training_step
    def training_step(self, batch, i):
        if self.global_step == step: raise Stop
        return real(self, batch, i)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(CromssTask, "training_step", training_step)
        with pytest.raises(Stop): pretrain(config, store)
    return Run.open(Path(config.runs) / config.name)


@pytest.mark.parametrize("step, schedule", [(3, "cosine"), (5, "plateau")])
def test_an_interrupted_run_goes_on_to_the_same_bits(scenes, folder, unfinished, step, schedule):
    config = tiny(folder, epochs=3, schedule=schedule, patience=0)
    run = interrupted(replace(config, name="cut"), scenes, step)
    assert run.metrics()["epoch"].tolist() == list(range(step // 2)) and (run.folder / "checkpoints" / f"epoch={step // 2 - 1:04d}.ckpt").exists()
    again = pretrain(configure({"resume": str(run.folder)}), scenes)
    whole = pretrain(config, scenes)
    assert again.folder == run.folder and again.metrics()["epoch"].tolist() == [0, 1, 2]
    a, b = (r.metrics() for r in (again, whole))
    assert a.equals(b) and same(last(again), last(whole))
    schedules = [torch.load(newest_checkpoint(r), weights_only=True)["lr_schedulers"] for r in (again, whole)]
    assert schedules[0] == schedules[1] and len(schedules[0]) == 1
    assert schedule != "cosine" or a["lr"].is_monotonic_decreasing and a["lr"].nunique() == 3


def test_a_finished_run_takes_more_epochs(scenes, folder, unfinished):
    run = pretrain(tiny(folder, epochs=1, schedule="constant"), scenes)
    again = pretrain(configure({"resume": str(run.folder)}), scenes)
    assert again.metrics().equals(run.metrics())
    more = pretrain(configure({"resume": str(run.folder), "epochs": 3}), scenes)
    assert more.metrics()["epoch"].tolist() == [0, 1, 2] and newest_checkpoint(more).name == "epoch=0002.ckpt"


@pytest.mark.parametrize("field, value", [("learning_rate", 1e-3), ("seed", 1), ("batch_size", 2), ("sensors", "s2"), ("selection", False), ("smoothing", {"sigma": 2.0}), ("crop", 16),
                                          ("encoder", "resnet18"), ("epochs", 9), ("data", "elsewhere")])
def test_what_must_not_differ_on_resume(folder, field, value):
    run = Run.create(tiny(folder))
    before = run.files()
    changed = configure({"resume": str(run.folder), field: value})
    refusal(lambda: pretrain(changed), ConfigError, f"resume={str(run.folder)!r}: {field} is", "leave it as it is, or start a new run")
    assert run.files() == before


def test_what_may_differ_on_resume(folder):
    run = Run.create(tiny(folder, schedule="constant"))
    free = dict(num_workers=2, devices=1, name="other", epochs=7, runs="elsewhere", loggers="tensorboard")
    assert module.continued(configure({"resume": str(run.folder), **free})).folder == run.folder
    refusal(lambda: configure({"resume": str(folder / "none")}), ConfigError, "not a run folder")
    refusal(lambda: configure({"resume": str(run.folder), "epocs": 3}), ConfigError, "did you mean 'epochs'?")


@pytest.mark.parametrize("given", [{"selection": {"ramp_epochs": 1}}, {"selection": True}, {"smoothing": {"kind": "ts"}}])
def test_the_same_parameters_on_resume_are_no_change(folder, given):
    config = tiny(folder, selection={"ramp_epochs": 1, "keep": 0.7}, smoothing={"kind": "ts"})
    run = Run.create(config)
    assert module.continued(configure({"resume": str(run.folder), **given})).config == config


def damage(path, how):
    if how == "short": path.write_bytes(path.read_bytes()[:1000])
    elif how == "flipped": path.write_bytes(bytes([path.read_bytes()[0]]) + bytes([path.read_bytes()[1] ^ 1]) + path.read_bytes()[2:])
    elif how == "no checksum": path.with_suffix(".sha256").unlink()
    else: path.write_bytes(b"")


def test_a_broken_newest_checkpoint_falls_back(scenes, folder, unfinished):
    config = tiny(folder, epochs=3)
    run = interrupted(config, scenes, 5)
    newest, older = run.checkpoints / "epoch=0001.ckpt", run.checkpoints / "epoch=0000.ckpt"
    whole = {p.name: p.read_bytes() for p in run.checkpoints.iterdir()}
    for how in ("short", "flipped", "empty", "no checksum"):
        damage(newest, how)
        with pytest.warns(UserWarning, match=r"epoch=0001.ckpt: damaged or incomplete \(checksum\), skipped"): assert newest_checkpoint(run) == older
        for name, content in whole.items(): (run.checkpoints / name).write_bytes(content)
    damage(newest, "short")
    with pytest.warns(UserWarning, match="damaged"): again = pretrain(configure({"resume": str(run.folder)}), scenes)
    assert again.metrics()["epoch"].tolist() == [0, 1, 2]
    other = pretrain(replace(config, name="whole"), scenes)
    assert same(last(again), last(other)) and newest_checkpoint(again).name == "epoch=0002.ckpt"
    for p in run.checkpoints.glob("*.ckpt"): damage(p, "empty")
    with pytest.warns(UserWarning, match="damaged"): refusal(lambda: newest_checkpoint(run), WeightsError, "no sound checkpoint", "start the run anew")


def test_interrupted_before_the_first_checkpoint(scenes, folder, unfinished):
    run = interrupted(tiny(folder), scenes, 1)
    with pytest.warns(UserWarning, match="stopped before its first checkpoint, it begins anew"): again = pretrain(configure({"resume": str(run.folder)}), scenes)
    assert same(last(again), last(pretrain(tiny(folder, name="whole"), scenes)))
    for path in run.checkpoints.glob("*.ckpt"): path.write_bytes(b"")
    with pytest.warns(UserWarning, match="damaged"):
        refusal(lambda: pretrain(configure({"resume": str(run.folder)}), scenes), WeightsError, "no sound checkpoint (epoch=0001.ckpt, epoch=0000.ckpt)", "start the run anew")


def test_two_checkpoints_are_kept(scenes, folder, unfinished):
    run = pretrain(tiny(folder, epochs=4, min_steps=1), scenes)
    assert sorted(p.name for p in run.checkpoints.iterdir()) == [f"epoch={n:04d}.{e}" for n in (2, 3) for e in ("ckpt", "sha256")]


def test_a_disk_that_refuses_a_checkpoint(scenes, folder, unfinished, monkeypatch):
    "The run stops and says so; the checkpoint before is whole and nothing is left beside."
    real, calls = torch.save, []
    def save(*args, **kwargs):
        calls.append(1)
        if len(calls) > 1:
            args[1].write(b"half")
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)
    monkeypatch.setattr("torch.save", save)
    refusal(lambda: pretrain(tiny(folder), scenes), ConfigError, "epoch=0001.ckpt: the checkpoint cannot be written (No space left on device)", "free space")
    run = Run.open(folder / "runs" / "run")
    assert newest_checkpoint(run).name == "epoch=0000.ckpt" and not [p for p in run.checkpoints.iterdir() if p.name.startswith(".") or "0001.ckpt" in p.name]


def test_leftovers_of_a_killed_writer_are_removed(scenes, folder, unfinished):
    run = interrupted(tiny(folder, epochs=3), scenes, 3)
    left = run.checkpoints / ".epoch=0001.ckpt.999999999"                     # no such process
    left.write_bytes(b"half")
    pretrain(configure({"resume": str(run.folder)}), scenes)
    assert not left.exists()


# (g) data

def test_unknown_data_is_refused(folder, monkeypatch):
    monkeypatch.chdir(folder)
    refusal(lambda: open_data(tiny(folder, data="no/such")), ConfigError, "data='no/such'", "nothing at", "'scenes'")
    refusal(lambda: open_data(tiny(folder, data="scenes:weak-s2")), ConfigError, "did you mean 'weak-s1'?")
    (folder / "empty").mkdir()
    refusal(lambda: open_data(tiny(folder, data="empty")), DataError, "empty")
    assert [p.name for p in folder.iterdir()] == ["empty"]


def test_a_store_without_the_sensor_or_the_classes(scenes, folder, coarse):
    data = str(scenes.folder)
    assert open_data(tiny(folder, data=data)).id == scenes.id and open_data(tiny(folder, data=data, classes="dynamic-world")).id == scenes.id
    refusal(lambda: open_data(tiny(folder, data=data, sensors="s1,s9")), ConfigError, "'s9'", "has s1, s2, dem")
    refusal(lambda: open_data(tiny(folder, data=data, classes=str(coarse))), ConfigError, "was prepared with dynamic-world", "prepare it anew")
    refusal(lambda: open_data(tiny(folder, data=data, classes="dynamic-wrld")), ConfigError, "dynamic-world")
    refusal(lambda: PatchDataModule(tiny(folder, bands={"s2": ["B99"]}), scenes), CromssError, "B99")


def test_a_damaged_store_is_refused(scenes, folder):
    shutil.copytree(scenes.folder, folder / "copy")
    shard = next((folder / "copy").glob("*.lmdb"))
    shard.write_bytes(shard.read_bytes()[:4096])
    refusal(lambda: open_data(tiny(folder, data=str(folder / "copy"))), StoreError, shard.name)


@pytest.fixture
def prepared(monkeypatch):
    "The number of preparations, a list that grows."
    calls, real = [], module.prepare
    def count(*args, **kwargs):
        calls.append(args)
        return real(*args, **kwargs)
    monkeypatch.setattr(module, "prepare", count)
    return calls


def test_a_changed_folder_is_prepared_anew_and_an_unchanged_one_not(plain, folder, prepared):  # noqa: F811
    config = tiny(folder, data=str(plain))
    first = open_data(config)
    assert open_data(config).id == first.id and len(prepared) == 1 and len(first) == 2 and first.folder.parent == folder / "stores" and first.folder.name.startswith("plain-")
    assert open_data(replace(config, learning_rate=1.0, epochs=7, crop=16)).id == first.id and len(prepared) == 1     # settings of training do not count
    season(plain / "c" / "2021-05")                                                            # another place
    second = open_data(config)
    assert len(prepared) == 2 and len(second) == 3 and second.folder != first.folder
    season(plain / "c" / "2021-05", label_=label()[..., ::-1].copy())                          # a label corrected
    third = open_data(config)
    assert len(prepared) == 3 and not np.array_equal(third.read_labels(2), second.read_labels(2)) and len(list((folder / "stores").iterdir())) == 3
    open_data(replace(config, seasons_required=2))
    assert len(prepared) == 4
    (plain / "b" / "2021-04" / "label.tif").unlink()                                         # a file gone
    assert len(open_data(config).seasons(1)) == 1 and len(prepared) == 5


def test_scenes_are_drawn_once(folder, prepared, monkeypatch):
    monkeypatch.setattr(module, "ScenesSource", partial(ScenesSource, count=2))
    first = open_data(tiny(folder, data="scenes:weak-s1"))
    assert open_data(tiny(folder, data="scenes:weak-s1", crop=64)).id == first.id and len(prepared) == 1 and first.shape(0) == (64, 64) and "weak-s1" in first.source
    assert open_data(tiny(folder, data="scenes")).id != first.id and open_data(tiny(folder, data="scenes:weak-s1", crop=96)).shape(0) == (96, 96) and len(prepared) == 3
    assert list(open_data(tiny(folder, sensors="s2,dem")).sensors) == ["s2", "dem"]


def test_changed_classes_are_prepared_anew(folder, coarse, prepared, monkeypatch):
    monkeypatch.setattr(module, "ScenesSource", partial(ScenesSource, count=2))
    first = open_data(tiny(folder, classes=str(coarse)))
    coarse.write_text(yaml.safe_dump(COARSE | {"remap": COARSE["remap"] | {8: 2}}))          # snow is bare ground now
    assert not np.array_equal(open_data(tiny(folder, classes=str(coarse))).read_labels(0), first.read_labels(0)) and len(prepared) == 2


def test_a_folder_named_scenes_is_a_folder(plain, folder, monkeypatch, prepared):  # noqa: F811
    monkeypatch.chdir(folder)
    shutil.copytree(plain, folder / "scenes")
    assert len(open_data(tiny(folder, data="scenes"))) == 2


@pytest.mark.filterwarnings("ignore:norm='per-sensor' splits nothing")
def test_mistakes_leave_no_run_folder(scenes, folder, monkeypatch):
    for changes, kind in ((dict(encoder="resnet19"), ConfigError), (dict(decoder_channels=(8, 8)), ConfigError), (dict(seasons_required=9), DataError),
                          (dict(architecture="unett"), ConfigError), (dict(name="a/b"), ConfigError), (dict(bands={"s2": 5}), CromssError)):
        refusal(lambda: pretrain(tiny(folder, **changes), scenes), kind)
        assert not (folder / "runs").exists(), changes
    fpn = replace(tiny(folder), architecture="fpn", decoder_channels=None, encoder_depth=5, crop=36)     # smp's U-Net takes any size, its FPN does not
    refusal(lambda: pretrain(fpn, scenes), ConfigError, "crop=36", "multiple of 32")
    assert not (folder / "runs").exists()


def test_a_sensor_that_a_given_store_lacks(scenes, folder):
    refusal(lambda: pretrain(tiny(folder, sensors="s1,s9"), scenes), CromssError, "s9")


def test_a_missing_logger_leaves_no_run_folder(scenes, folder, monkeypatch):
    import lightning.pytorch.loggers as loggers
    def missing(*args, **kwargs): raise ModuleNotFoundError("No module named 'mlflow'")
    monkeypatch.setattr(loggers, "MLFlowLogger", missing)
    refusal(lambda: pretrain(tiny(folder, loggers="mlflow"), scenes), ConfigError, "loggers", "mlflow", "install it, or leave it out")
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("changes", [dict(seed=2 ** 33), dict(crop=8, batch_size=1)], ids=str)
def test_mistakes_that_others_find(scenes, folder, changes):
    refusal(lambda: pretrain(tiny(folder, **changes), scenes), ConfigError, next(iter(changes)))
    assert not (folder / "runs").exists()


# (h) estimate

@pytest.mark.filterwarnings("ignore:norm='per-sensor' splits nothing")
def test_estimate_refuses_what_the_run_would(scenes, folder):
    fpn = replace(tiny(folder, data=str(scenes.folder)), architecture="fpn", decoder_channels=None, encoder_depth=5, crop=36)
    refusal(lambda: estimate(fpn), ConfigError, "crop=36", "multiple of 32")


def test_estimate_writes_nothing(scenes, folder, plain, monkeypatch):  # noqa: F811
    monkeypatch.chdir(folder)
    names = {"crops_per_epoch", "steps_per_epoch", "steps", "parameters", "memory_gb", "seconds_per_step", "time", "device"}
    for changes in (dict(data=str(scenes.folder)), dict(data="scenes"), dict(data=str(plain), sensors="s2", selection=False)):
        before = sorted(p for p in folder.rglob("*"))
        found = estimate(tiny(folder, **changes))
        assert set(found) == names and sorted(p for p in folder.rglob("*")) == before and json.dumps(found)
        assert found["parameters"] > 1000 and found["memory_gb"] > 0 and found["seconds_per_step"] > 0 and found["steps"] == 2 * found["steps_per_epoch"]
    config = tiny(folder, data=str(scenes.folder))
    found = estimate(config)
    data = PatchDataModule(config, scenes)
    assert found["crops_per_epoch"] == len(data.train) == 7 and found["steps_per_epoch"] == data.sampler().steps_per_epoch == 2
    task = CromssTask(to_dict(config), {"s1": 2, "s2": 13}, 9)
    assert found["parameters"] == sum(p.numel() for p in task.parameters())
    refusal(lambda: estimate(tiny(folder, data="no/such")), ConfigError, "nothing at")


def test_clock(): assert [clock(s) for s in (0, 59.6, 61, 3600, 36_610)] == ["0:00", "1:00", "1:01", "1:00:00", "10:10:10"]


# (i) the same seed

def test_the_same_seed_gives_the_same_weights_with_any_number_of_workers(scenes, folder, unfinished):
    runs = [pretrain(tiny(folder, name=f"r{i}", **c), scenes) for i, c in enumerate(({}, {}, dict(num_workers=1), dict(num_workers=2), dict(seed=7)))]
    states = [last(r) for r in runs]
    assert all(same(states[0], s) for s in states[1:4]) and not same(learned(states[0]), learned(states[4]))
    tables = [r.metrics() for r in runs]
    assert all(tables[0].equals(t) for t in tables[1:4]) and not tables[0].equals(tables[4])


def test_earlier_randomness_does_not_count(scenes, folder, unfinished):
    first = pretrain(tiny(folder, name="a", epochs=1), scenes)
    torch.rand(7), np.random.rand(3)
    assert same(last(first), last(pretrain(tiny(folder, name="b", epochs=1), scenes)))


# (j) checkpoints that would run code

class Payload:
    "Touches a file when it is unpickled."
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (self.path,)


@pytest.fixture
def malicious(scenes, folder, unfinished):
    "A run whose newest checkpoint, with the right checksum, would make a folder."
    run = interrupted(tiny(folder, epochs=3), scenes, 5)
    path = run.checkpoints / "epoch=0001.ckpt"
    content = torch.load(path, weights_only=True)
    content["callbacks"]["extra"] = Payload(str(folder / "made by the payload"))
    torch.save(content, path)
    path.with_suffix(".sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())
    assert newest_checkpoint(run) == path
    return run


def test_a_payload_is_not_run(malicious, scenes, folder):
    for open_it in (lambda: load_task(malicious), lambda: load_task(malicious, malicious.checkpoints / "epoch=0001.ckpt"),
                    lambda: pretrain(configure({"resume": str(malicious.folder)}), scenes)):
        with pytest.raises(Exception, match="(?i)weights.only|unsupported|not an allowed global"): open_it()
        assert not (folder / "made by the payload").exists()


@pytest.mark.parametrize("content", ["", "no checkpoint", {"state_dict": {}}, Payload])
def test_files_that_are_no_checkpoint(folder, content):
    run, path = Run.create(tiny(folder)), folder / "x.ckpt"
    if isinstance(content, str): path.write_text(content)
    else: torch.save(content if isinstance(content, dict) else {"state_dict": Payload(str(folder / "made by the payload"))}, path)
    refusal(lambda: load_task(run, path), WeightsError, "x.ckpt")


# scores

def test_auroc_counts_pairs():
    rng = np.random.default_rng(0)
    confidence, wrong = rng.choice(rng.random(60).astype(np.float32), 400), rng.random(400) < 0.3
    known = rng.random(400) < 0.8
    metric = WrongPixelAUROC()
    for part in np.array_split(np.arange(400), 3): metric.update(*(torch.from_numpy(a[part]) for a in (confidence, wrong, known)))
    a, b = confidence[wrong & known], confidence[~wrong & known]
    exact = ((a[:, None] < b).sum() + 0.5 * (a[:, None] == b).sum()) / (len(a) * len(b))
    assert metric.compute().item() == pytest.approx(exact, abs=2e-3)
    empty = WrongPixelAUROC()
    empty.update(torch.ones(2), torch.zeros(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool))
    assert empty.compute().isnan()


def test_auroc_outlives_nan():
    metric, yes = WrongPixelAUROC(), torch.ones(3, dtype=torch.bool)
    metric.update(torch.tensor([0.1, 0.2, float("nan")]), torch.tensor([True, False, True]), yes)
    assert 0.5 <= metric.compute() <= 1


# parameters of a notebook

def test_parameters_are_found_in_their_cells():
    space = dict(a=1, epochs=3, crop=64, learning_rate=1e-3, PAPERMILL_INPUT_PATH="x")
    cells = ["import os", "# Parameters\nepochs = 1\ncrop: int = 2  # px", "a = 1", "# Parameters\nepochs = 3\nPAPERMILL_INPUT_PATH = 'x'", "# parameters of another kind\n"]
    assert notebook_parameters(cells, space) == {"epochs": 3, "crop": 64}
    with pytest.raises(ConfigError, match="did you mean 'learning_rate'"): notebook_parameters(["# Parameters\nlearning_rte = 1"], dict(learning_rte=1))
    assert notebook_parameters(["# Parameters\na = 1"], space, ["a"]) == {"a": 1} and notebook_parameters([], {}) == {}


def test_configure_leaves_what_is_none():
    assert configure({"preset": "paper", "epochs": None, "crop": 64}) == preset("paper", crop=64) and configure({}) == preset("demo") and configure({"preset": None}) == preset("demo")
    refusal(lambda: configure({"epocs": 3}), ConfigError, "did you mean 'epochs'?")


def test_warnings_of_ours_are_shown(scenes, folder, unfinished):
    "A clean run warns of nothing."
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        pretrain(tiny(folder, epochs=1), scenes)
    ours = [str(w.message) for w in seen if not issubclass(w.category, (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ResourceWarning))]
    assert ours == [], ours


def test_nothing_held_out_is_no_reason_to_warn(scenes, folder, unfinished):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pretrain(tiny(folder, epochs=1, validation=0.0), scenes)


def test_loggers_are_left_as_they_were(scenes, folder, unfinished):
    import logging
    levels = [logging.getLogger(n).level for n in ("lightning.pytorch", "lightning.fabric")]
    pretrain(tiny(folder, epochs=1), scenes)
    assert [logging.getLogger(n).level for n in ("lightning.pytorch", "lightning.fabric")] == levels


def test_the_trainer_asks_for_what_is_configured(folder):
    run = Run.create(tiny(folder))
    trainer = make_trainer(tiny(folder, epochs=7), run)
    assert trainer.max_epochs == 7 and trainer.precision == "32-true" and trainer.num_devices == 1 and trainer.loggers == []


# what must be the same, and what a machine has

def test_changed_data_are_refused_on_resume(scenes, folder, unfinished):
    run = pretrain(tiny(folder, epochs=1, schedule="constant"), scenes)
    held_out = json.loads((run.folder / "data.json").read_text())["held_out"]
    assert held_out == [scenes.key(int(i)) for i in PatchDataModule(run.config, scenes).split.validation]
    other = random_store(folder, lambda i: np.full((32, 32), i % 9, np.uint8))
    refusal(lambda: pretrain(configure({"resume": str(run.folder), "epochs": 2}), other), ConfigError, "the data are no longer those", "start a new run")


def test_more_devices_than_there_are(scenes, folder):
    refusal(lambda: pretrain(tiny(folder, devices=10_000), scenes), ConfigError, "devices=10000", "lower it")
    refusal(lambda: pretrain(tiny(folder, nodes=2), scenes), ConfigError, "nodes=2", "torchrun or srun")
    assert not (folder / "runs").exists()


def test_a_folder_of_one_sensor(plain, folder):  # noqa: F811
    alone = folder / "alone"
    shutil.copytree(plain, alone)
    for path in alone.rglob("s1.tif"): path.unlink()
    assert list(open_data(tiny(folder, data=str(alone), sensors="s2", selection=False)).sensors) == ["s2"]


def test_another_architecture_has_its_own_decoder():
    assert configure({"architecture": "fpn"}).decoder_channels is None and configure({"encoder_depth": 5}).decoder_channels is None
    assert configure({"encoder": "resnet34"}).decoder_channels == (64, 48, 32, 16)


def test_on_a_gpu_priors_are_formed_from_whole_batches(folder, scenes):
    "The batches of a run on a GPU, here formed on the CPU, are those of a run on the CPU; Lightning can move all that is in them."
    from lightning.fabric.utilities import move_data_to_device
    batches = {}
    for device in ("cpu", "cuda"):
        data = PatchDataModule(tiny(folder, batch_size=4, rotation=False), scenes)
        data.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)), global_step=0, global_rank=0, world_size=1)
        batch = move_data_to_device(next(iter(data.train_dataloader())), torch.device("cpu"))
        assert ("around" in batch) == (device == "cuda")
        batches[device] = data.on_after_batch_transfer(batch, 0)
    assert batches["cpu"].keys() == batches["cuda"].keys() and batches["cpu"]["mask"].dtype == torch.int64
    for name, value in batches["cpu"].items():
        if torch.is_tensor(value): assert torch.allclose(value, batches["cuda"][name], atol=1e-6), name
