"Conventional methods and variants of the selection in whole runs: what they learn from, what they remember, and going on after a stop."
from pathlib import Path

import pytest
import torch
from test_pretraining import folder, last, learned, same, scenes, tiny, unfinished, weights  # noqa: F401 (fixtures)

from cromss.config import ROBUST_METHODS, ConfigError
from cromss.pretraining import advice, load_task, pretrain

pytestmark = [pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"), pytest.mark.filterwarnings("ignore:.*srun.*")]


def conventional(folder, method, **changes):
    "A tiny run of a conventional method on Sentinel-2 alone."
    values = dict(sensors=("s2",), selection=False, smoothing={"prior_weight": 0.0, "uniform_weight": 0.0}, robust={"method": method, "ramp_epochs": 1}, name=method, validation=0.25)
    return tiny(folder, **values | changes)


@pytest.fixture(scope="module")
def plain_loss(scenes, tmp_path_factory):
    "The first loss of cross-entropy and Dice, with the same weights and batch."
    run = pretrain(tiny(tmp_path_factory.mktemp("plain"), sensors=("s2",), selection=False, smoothing={"prior_weight": 0.0, "uniform_weight": 0.0}, validation=0.25, epochs=1, min_steps=1), scenes, finish=lambda *_: None)
    return run.metrics()["train_ce_s2"].iloc[0]


@pytest.mark.parametrize("method", ROBUST_METHODS)
def test_every_method_trains(folder, scenes, unfinished, method, plain_loss):
    run = pretrain(conventional(folder, method, epochs=2, min_steps=1), scenes)
    table = run.metrics()
    assert table["train_loss"].notna().all() and table["train_ce_s2"].notna().all() and "train_consistency_s2" not in table
    changed = table["train_ce_s2"].iloc[0] != pytest.approx(plain_loss, rel=1e-6)
    assert changed == (method not in ("forward", "small-loss", "co-teaching")), "these three begin as plain cross-entropy"
    assert load_task(run).config.robust.method == method


@pytest.mark.parametrize("method", ["co-teaching", "jocor"])
def test_one_sensor_has_a_twin_with_weights_of_its_own_and_two_sensors_have_none(folder, scenes, unfinished, method):
    state = last(pretrain(conventional(folder, method), scenes))
    of = {net: {k.removeprefix(net): v for k, v in state.items() if k.startswith(net)} for net in ("model.", "twin.")}
    assert of["model."].keys() == of["twin."].keys() and not torch.equal(*(of[n]["nets.s2.segmentation_head.0.weight"] for n in ("model.", "twin.")))
    run = pretrain(conventional(folder, method, sensors=("s1", "s2"), name="both", epochs=1), scenes)
    assert not any(k.startswith("twin.") for k in last(run)) and {"train_ce_s1", "train_ce_s2", "train_consistency_s1"} <= set(run.metrics())


@pytest.mark.parametrize("method", ["co-teaching", "forward", "elr"])
def test_a_run_that_goes_on_is_the_run_that_was_never_stopped(folder, scenes, unfinished, method):
    common = dict(schedule="constant", robust={"method": method, "ramp_epochs": 2})
    whole = pretrain(conventional(folder, method, name="whole", epochs=3, **common), scenes)
    pretrain(conventional(folder, method, name="part", epochs=2, **common), scenes)
    rest = pretrain(conventional(folder, method, name="part", epochs=3, resume=str(folder / "runs" / "part"), **common), scenes)
    assert same(last(whole), last(rest)), "weights, statistics, and what the method remembers"
    assert whole.metrics().equals(rest.metrics())


def test_elr_remembers_every_pixel_of_every_season(folder, scenes, unfinished):
    run = pretrain(conventional(folder, "elr", epochs=2, min_steps=4), scenes)
    memory = next(v for k, v in last(run).items() if "memory" in k)
    assert memory.dtype == torch.float16 and memory.numel() >= 6 * 4 * 32 * 32 * 9 and memory.abs().sum() > 0


def test_what_cannot_be_followed_is_refused_before_a_run_folder_is_made(folder, scenes):
    with pytest.raises(ConfigError, match="rotation=True: a method that remembers every pixel"): pretrain(conventional(folder, "elr", rotation=True), scenes)
    with pytest.raises(ConfigError, match="takes the place of the selection"): conventional(folder, "gce", selection=True)
    assert not (folder / "runs").exists() or not any(Path(folder / "runs").iterdir())


@pytest.mark.parametrize("fields", [dict(entangle="exchange", weights="hard"), dict(temporal=True), dict(teach="surer"), dict(entangle="geometric", keep="mixture"), dict(keep="joint"), dict(keep="per-class")], ids=str)
def test_every_variant_of_the_selection_trains(folder, scenes, unfinished, fields):
    run = pretrain(tiny(folder, selection={"ramp_epochs": 0, **fields}, epochs=2), scenes)
    table = run.metrics()
    assert table["train_loss"].notna().all() and table["keep"].between(0.01, 1).all()
    if "keep" not in fields: assert (table["keep"] == 0.5).all()
    assert not same(learned(last(run)), learned(last(pretrain(tiny(folder, name="published", selection={"ramp_epochs": 0}, epochs=2), scenes)))), "the variant changes what is learned"


def test_a_finished_run_says_what_its_sensors_take_for_right(folder, scenes, undrawn):
    run = pretrain(tiny(folder), scenes)
    right = run.summary()["right_labels"]
    assert set(right) == {"s1", "s2"} and all(0 < share <= 1 for share in right.values())
    config = tiny(folder)
    assert advice(config, {"right_labels": {"s1": .9, "s2": .8}}).startswith("selection.keep=0.5, but the sensors take 85% of the labels for right")
    assert advice(config, {"right_labels": {"s1": .6, "s2": .6}}) is None and advice(config, {}) is None
    assert advice(tiny(folder, selection=False), {"right_labels": {"s1": .9, "s2": .8}}) is None
