"The ablation: its grid, its verdicts on networks whose answers are known, going on, and what it refuses."
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cromss import ablation, figures
from cromss.ablation import (ABLATION_PRESETS, METHODS, AblationConfig, Cell, ablation_config, cells, judge_labels, judge_maps, label_scores, read_ablation, run_ablation, share_out, test_data,
                             train_all, training, transfers)
from cromss.config import ConfigError, SelectionConfig, preset
from cromss.evidence import Calibration
from cromss.pretraining import open_data
from cromss.runs import Run
from cromss.scenes import SCENE_PRESETS, ScenesSource

pytestmark = [pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"), pytest.mark.filterwarnings("ignore:.*srun.*")]
test_data.__test__ = False    # a function of the package, not a test


def refused(*words, **parameters):
    with pytest.raises(ConfigError) as e: ablation_config(parameters)
    assert "\n" not in str(e.value) and all(w in str(e.value) for w in words), str(e.value)


# the grid

def test_settings_are_checked():
    refused("unknown parameter 'method'", "'methods'", method="cromss")
    refused("unknown method 'cross'", "'cromss'", methods="cross")
    refused("unknown preset of scenes", "balanced-40", scenes="balanced-41")
    refused("unknown preset of ablations", preset="care")
    refused("transfer", "'gce'", "methods", methods="cromss", transfer="gce")
    refused("data_seeds", "0 to 999", data_seeds="1,1000")
    refused("give one of each", methods="")
    refused("name=", name="a/b")
    assert ablation_config({}) == AblationConfig() and ablation_config({"seeds": 5, "methods": "cromss, gce", "transfer": ()}).seeds == (5,)


@pytest.mark.parametrize("name", ABLATION_PRESETS)
def test_every_cell_of_every_preset_is_a_configuration(name):
    config = ablation_config({"preset": name})
    grid = cells(config)
    assert len({c.name for c in grid}) == len(grid) == sum(2 if METHODS[m].alone else 1 for m in config.methods) * len(config.data_seeds) * len(config.seeds)
    for cell in grid:
        made = training(config, cell)
        assert made.sensors == cell.sensors and made.seed == cell.seed and made.name == cell.name and made.validation == 0 and made.resume == "auto"


def test_a_method_changes_what_it_says_and_nothing_else():
    config = ablation_config({})
    def of(method, sensors=("s1", "s2")): return training(config, Cell(method, sensors, 1, 0))
    cromss = of("cromss")
    assert cromss.selection == SelectionConfig(ramp_epochs=10) and cromss.smoothing is not None and cromss.data == "scenes:balanced-40:1:256"
    assert of("no-selection") == replace(cromss, selection=None, smoothing=None, name="no-selection-s1+s2-d1-s0")
    assert of("hard").selection == replace(cromss.selection, weights="hard") and of("hard").smoothing == cromss.smoothing
    assert of("co-teaching", ("s2",)).robust.forget == pytest.approx(sum(SCENE_PRESETS["balanced-40"].rates.values()), abs=1e-4) and of("co-teaching", ("s2",)).robust.ramp_epochs == 10


def test_training_test_and_transfer_scenes_never_meet():
    config = ablation_config({})
    trained, tested = {training(config, c).data.split(":")[2] for c in cells(config)}, {test_data(config, d).split(":")[2] for d in config.data_seeds}
    moved = {c.data.split(":")[2] for _, c in transfers(config)}
    assert not trained & tested and not trained & moved and not tested & moved and len(trained) == len(tested) == len(moved) == 3


def test_transfers_name_the_encoders_of_their_cell():
    grid = transfers(ablation_config({"data_seeds": 1, "seeds": 0}))
    assert len(grid) == 4 * 2 * 2
    places = {(start, c.sensors[0], c.mode): c.encoders for start, c in grid}
    assert places["one-sensor", "s1", "frozen"] == "runs/ablation/one-sensor-s1-d1-s0/encoders/s1" and places["cromss", "s2", "finetuned"] == "runs/ablation/cromss-s1+s2-d1-s0/encoders/s2"
    assert places["random", "s2", "frozen"] == "random"


# verdicts

class Oracle(torch.nn.Module):
    "Gives the classes that it was told of, in the order in which windows are looked at."
    def __init__(self, told, sure=20.0):
        super().__init__()
        self.told, self.at, self.sure = told, 0, sure

    def forward(self, images):
        (sensor, image), = images.items()
        maps = self.told[self.at:self.at + len(image)]
        self.at += len(image)
        return {sensor: self.sure * torch.nn.functional.one_hot(torch.as_tensor(np.array(maps)).long(), 9).permute(0, 3, 1, 2).float()}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    "Four scenes: the open store, its source, and truth and labels in the order of the windows."
    folder = tmp_path_factory.mktemp("scenes")
    store = open_data(preset("demo", data="scenes:balanced-40:7:4", stores=str(folder / "stores")))
    source = ScenesSource(4, seed=7, preset="balanced-40")
    found = [source.read(k) for k in store.keys]
    return store, source, [t for f in found for t in f.reference], [t for f in found for t in f.labels]


def test_maps_are_counted_by_location_against_the_truth(scenes):
    store, _, truth, labels = scenes
    counts, calibration = judge_maps({"s1": Oracle(truth), "s2": Oracle(labels)}, store)
    assert counts["s1"].shape == (4, 9, 9) and (counts["s1"].sum((1, 2)) == 4 * 64 * 64).all()
    assert (counts["s1"] * (1 - np.eye(9, dtype=int)) == 0).all(), "the oracle of the truth is always right"
    rate = np.mean([np.mean(t != l) for t, l in zip(truth, labels)])
    wrong = 1 - counts["s2"].diagonal(axis1=1, axis2=2).sum() / counts["s2"].sum()
    assert wrong == pytest.approx(rate) and Calibration(calibration["s1"]).ece() < 1e-3 and Calibration(calibration["s2"]).ece() == pytest.approx(rate, abs=1e-3)
    assert set(counts) == {"s1", "s2", "mean"} and (counts["mean"].sum((1, 2)) == 4 * 64 * 64).all()


def test_who_knows_the_truth_finds_every_wrong_label_and_weighs_it_down(scenes):
    store, source, truth, _ = scenes
    detection, noise = judge_labels({"s1": Oracle(truth), "s2": Oracle(truth)}, store, source, SelectionConfig(ramp_epochs=1, keep=0.01), places=4)
    table = pd.DataFrame(detection).set_index(["score", "kind"])["auroc"]
    for score in ("s1 own", "s2 own", "s1 entangled", "s2 exchanged", "geometric mean"): assert (table[score] == 1).all(), score
    assert 0.4 < table["seasons", "any"] < 1 and {k for _, k in table.index} == {"any", "appearance", "boundary", "blobs", "season", "object"}
    for row in noise:
        assert row["noise_in_weights"] < 0.05 and row["weight_right"] == pytest.approx(1) and 0.2 < row["noise"] < 0.6


def test_without_a_selection_the_noise_in_the_weights_is_that_of_the_labels(scenes):
    store, source, truth, labels = scenes
    _, noise = judge_labels({"s1": Oracle(truth), "s2": Oracle(truth)}, store, source, None, places=4)
    rate = np.mean([np.mean(t != l) for t, l in zip(truth, labels)])
    assert all(row["noise"] == row["noise_in_weights"] == pytest.approx(rate) and row["weight_wrong"] == row["weight_right"] == 1 for row in noise)


def test_networks_that_were_trained_apart_are_weighed_apart(scenes):
    store, source, truth, labels = scenes
    selection = SelectionConfig(ramp_epochs=1, keep=0.01)
    _, apart = judge_labels({"s1": Oracle(truth), "s2": Oracle(labels)}, store, source, selection, places=4)
    assert apart[0]["noise_in_weights"] < 0.05 and apart[1]["noise_in_weights"] == pytest.approx(apart[1]["noise"]), "who believes every label keeps all of the noise, whatever the other knows"


def test_scores_are_shares():
    torch.manual_seed(0)
    log_p = {s: torch.randn(2, 9, 8, 8).log_softmax(1) for s in ("s1", "s2")}
    masks = torch.randint(0, 9, (2, 4, 8, 8), dtype=torch.uint8)
    scores = label_scores(log_p, masks[:, 1].long(), masks)
    assert all(0 <= v.min() and v.max() <= 1 and v.shape == (2, 8, 8) for v in scores.values())
    assert torch.allclose(scores["geometric mean"], (scores["s1 own"] * scores["s2 own"]).sqrt()) and torch.allclose(scores["s1 entangled"], scores["s1 own"] * (1 + scores["s2 own"]) / 2)


# whole ablations

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "Two methods, two training seeds, and a transfer: run by two processes."
    folder = tmp_path_factory.mktemp("ablation")
    config = ablation_config(dict(preset="smoke", methods="one-sensor,cromss", workers=2, runs=str(folder / "runs"), stores=str(folder / "stores"), transfer="cromss", seeds="0,1"))
    return config, run_ablation(config, progress=False)


def test_a_grid_gives_tables(tiny):
    config, results = tiny
    assert len(results.scores) == 2 * 2 * 3 and results.scores[["oa", "miou", "ece"]].notna().all().all() and len(results.seconds) == 6
    assert len(results.transfer) == 2 * 2 * 2 and results.transfer["miou"].between(0, 1).all()
    assert set(results.watch["epoch"]) == {2} and results.watch[["auroc_s1", "noise_s1"]].dropna().gt(0).all().all()
    maps = ablation.map_table(results)
    assert list(maps.index) == ["one sensor", "CromSS, as published"] and list(maps.columns) == ["S1", "S2", "mean of both"] and all("±" in v for v in maps.to_numpy().ravel())
    paired = ablation.paired_table(results, [("cromss", "one-sensor")], draws=50)
    assert list(paired["sensor"]) == ["s1", "s2", "mean"] and (paired["low_fixed"] <= paired["high_fixed"]).all() and (paired["runs"] == 2).all()
    assert len(ablation.entangling_table(results)) and ablation.noise_table(results).shape == (4, 4) and ablation.transfer_table(results).shape == (1, 4)


def test_tables_are_drawn_and_saved(tiny, tmp_path):
    _, results = tiny
    for figure in (figures.plot_detection(ablation.detection_rows(results)), figures.plot_methods(ablation.method_rows(results)), figures.plot_tracking(ablation.tracking_rows(results)),
                   figures.plot_reliability(ablation.reliability_rows(results)), figures.plot_transfer(ablation.transfer_rows(results)),
                   figures.plot_intervals(ablation.paired_table(results, [("cromss", "one-sensor")], draws=50))): assert figure.axes
    folder = ablation.save_tables(results, tmp_path / "tables")
    assert len(pd.read_csv(folder / "scores.csv")) == len(results.scores)
    with np.load(folder / "maps.npz") as maps: assert (maps["cromss|s1|1|0"] == results.maps["cromss", "s1"][1, 0]).all()


def test_what_is_finished_is_left_alone_and_more_methods_are_added(tiny):
    config, _ = tiny
    folder = Path(config.runs) / config.name
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    more = replace(config, methods=(*config.methods, "no-selection"), seeds=(0,), workers=1)
    results = run_ablation(more, progress=False)
    assert "no-selection" in set(results.scores["method"]) and {p: p.stat().st_mtime_ns for p in before} == before


def test_another_setting_is_refused_and_nothing_is_read_from_nowhere(tiny, tmp_path):
    config, _ = tiny
    with pytest.raises(ConfigError, match="was made with another epochs .2, now 3.; choose another `name`"): run_ablation(replace(config, epochs=3), progress=False)
    with pytest.raises(ConfigError, match="nothing is judged here yet"): read_ablation(replace(config, name="other"))


def test_a_cell_that_was_stopped_goes_on(tiny, tmp_path):
    config = replace(tiny[0], runs=str(tmp_path / "runs"), workers=1, methods=("cromss",), transfer=(), seeds=(0,), epochs=3)
    cell = cells(config)[0]
    made = training(config, cell)
    class Stop(Exception): pass
    def stop(run, task, data): raise Stop
    with pytest.raises(Stop): ablation.pretrain(made, finish=stop)                  # trained, but nothing is left of it but its checkpoints
    began = Run.open(tmp_path / "runs" / config.name / cell.name)
    assert any(began.checkpoints.glob("*.ckpt")) and not began.summary()
    train_all(config, progress=False)
    assert (began.folder / "network.safetensors").is_file() and began.summary()["steps"] == 6 and not any(began.checkpoints.glob("*.ckpt"))
    assert len(list(began.folder.glob("environment*.json"))) == 2


def _fail(bar=None): raise ConfigError("this job cannot work")
def _count(number, bar=None): bar.add(number)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_that_fails_says_why(workers, capfd):
    with pytest.raises(ConfigError, match="this job cannot work"): share_out([(_count, (3,)), (_fail, ())], workers, 3, progress=False)


def test_the_quality_of_labels_by_networks_whose_answers_are_known(scenes):
    store, _, truth, labels = scenes
    known = ablation.label_quality({"s1": Oracle(truth), "s2": Oracle(truth)}, store).set_index("what")
    rate = np.mean([np.mean(t == l) for t, l in zip(truth, labels)])
    assert known.loc["label", "oa"] == pytest.approx(rate) and (known.loc[["s1", "s2", "mean", "joint", "corrected", "corrected, seasons"], ["oa", "miou"]] == 1).all().all()
    assert rate < known.loc["seasons", "oa"] < 1, "several seasons are right more often than one"
    split = ablation.label_quality({"s1": Oracle(truth, 2.0), "s2": Oracle(labels, 3.0)}, store, [0, 1]).set_index("what")["oa"]
    assert split["s1"] == 1 and split["s2"] == split["joint"] == split["corrected"] == split["label"] < 1, "the surer of two rules"
