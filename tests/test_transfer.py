"Downstream runs: tiles, starting points, what frozen means, going on, the published quirks, and comparisons."
import json
import math
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from layouts_trees import dfc2020, noldo

from cromss import transfer as module
from cromss.classes import DYNAMIC_WORLD, IGNORE
from cromss.config import ConfigError, DataError, TransferConfig, WeightsError, preset
from cromss.models import CrossModalSegmenter
from cromss.prepare import prepare
from cromss.pretraining import open_data
from cromss.runs import Run
from cromss.scenes import ScenesSource
from cromss.segmenter import load_predictor
from cromss.sensors import BAND_SUBSETS, SENSORS, decode
from cromss.store import write_store
from cromss.transfer import TransferData, choose_tiles, compare, evaluate, finetune, gains, grid, newest_pretraining, rate_factor, segmentation_loss, starting_weights, summary_table
from cromss.weights import load_encoder, save_encoder

pytestmark = [pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"), pytest.mark.filterwarnings("ignore:.*srun.*")]


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory() as name: yield Path(name)


@pytest.fixture(autouse=True)
def _figures(request):
    "They are drawn where a test looks at them."
    if request.function is not test_a_run_leaves_what_is_needed: request.getfixturevalue("undrawn")


@pytest.fixture(scope="module")
def scenes():
    "Ten scenes of 32 px, two seasons, as a store."
    with tempfile.TemporaryDirectory() as name: yield prepare(ScenesSource(count=10, size=32, seasons=2), f"{name}/scenes", progress=False)


@pytest.fixture(scope="module")
def encoders():
    "Folders of pretrained encoders of both sensors, with statistics that are no default."
    torch.manual_seed(1)
    model = CrossModalSegmenter({"s1": 2, "s2": 13}, encoder="resnet18", encoder_depth=3, decoder_channels=(16, 8, 8)).train()
    model({s: torch.rand(4, n, 32, 32) for s, n in model.options["bands"].items()})
    with tempfile.TemporaryDirectory() as name:
        yield {s: str(save_encoder(model, s, f"{name}/{s}")) for s in ("s1", "s2")}


def tiny(folder, store=None, **changes):
    own = dict(encoder="resnet18", encoder_depth=3, decoder_channels=(16, 8, 8), epochs=2, batch_size=4, test_fraction=0.5, precision="32-true", name="run",
               runs=str(folder / "runs"), stores=str(folder / "stores"))
    return preset("demo", kind=TransferConfig, **{**own, **({"data": str(store.folder)} if store else {}), **changes})


def written(folder, locations, sensors, **options):
    "A store of Locations of built-in classes."
    return write_store(folder, locations, sensors, DYNAMIC_WORLD, **options)


def tensors(run): return load_predictor(run.folder).state_dict()


# tiles

def test_the_same_places_are_tested_whatever_the_seed(scenes, folder):
    chosen = [choose_tiles(tiny(folder, scenes, seed=seed, train_fraction=0.4), scenes) for seed in range(4)]
    assert len({tuple(t.test) for t in chosen}) == 1 and len({tuple(t.train) for t in chosen}) > 1
    assert all(len(t.train) == 2 and not set(t.train) & set(t.test) for t in chosen)
    assert tuple(choose_tiles(tiny(folder, scenes, split_seed=1), scenes).test) != tuple(chosen[0].test)


def test_few_labels_are_part_of_more(scenes, folder):
    parts = [set(choose_tiles(tiny(folder, scenes, train_fraction=f), scenes).train) for f in (1e-6, 0.4, 0.8, 1.0)]
    assert [len(p) for p in parts] == [1, 2, 4, 5] and all(a < b for a, b in zip(parts, parts[1:]))


def test_places_by_name(scenes, folder):
    tiles = choose_tiles(tiny(folder, scenes, test_places="scene-00003,scene-00004"), scenes)
    assert [scenes.key(int(i)) for i in tiles.test] == ["scene-00003", "scene-00004"] and len(tiles.train) == 8
    with pytest.raises(ConfigError, match="test_places: nowhere is no place with labels"): choose_tiles(tiny(folder, scenes, test_places="nowhere"), scenes)


def test_patches_of_a_place_stay_together(folder):
    store = prepare(ScenesSource(count=6, size=64, seasons=1), folder / "s", patch=32, progress=False)
    tiles = choose_tiles(tiny(folder, store, validation=0.4), store)
    sides = [{store.key(int(i)).partition("@")[0] for i in part} for part in (tiles.train, tiles.validation, tiles.test)]
    assert [len(s) for s in sides] == [2, 1, 3] and len(set().union(*sides)) == 6 and len(tiles.test) == 12


def test_what_cannot_be_split(scenes, folder):
    one = prepare(ScenesSource(count=1, size=64), folder / "one", progress=False)
    with pytest.raises(ConfigError, match="one place cannot be both trained and tested on"): choose_tiles(tiny(folder, one), one)
    with pytest.raises(ConfigError, match="tiles of it are trained on as well"): choose_tiles(tiny(folder, scenes, test=str(scenes.folder)), scenes, scenes)
    with pytest.raises(DataError, match="0 labelled tiles to train on"): choose_tiles(tiny(folder, scenes, test_places=",".join(map(str, scenes.keys))), scenes)


def test_patches_that_overlap_test_patches_are_left_out(folder):
    store = prepare(ScenesSource(count=1, size=80, seasons=1), folder / "s", patch=32, progress=False)      # the last of a row is moved inward
    tiles = choose_tiles(tiny(folder, store, test_fraction=0.3), store)
    def pixels(part):
        corners = [map(int, store.key(int(i)).partition("@")[2].split(",")) for i in part]
        return {(r + i, c + j) for r, c in corners for i in range(32) for j in range(32)}
    assert len(tiles.train) and not pixels(tiles.train) & pixels(tiles.test) and tiles.left_out == len(store) - len(tiles.train) - len(tiles.test) > 0 and "left out" in str(tiles)
    assert len(choose_tiles(tiny(folder, store, test_fraction=0.2, train_fraction=0.5), store).train) < len(choose_tiles(tiny(folder, store, test_fraction=0.2), store).train)


def test_tiles_of_another_store_must_be_others(scenes, folder):
    part = prepare(ScenesSource(count=3, size=32, seasons=2), folder / "part", progress=False)
    with pytest.raises(ConfigError, match="tiles of it are trained on as well"): choose_tiles(tiny(folder, scenes, test=str(part.folder)), scenes, part)
    with pytest.raises(ConfigError, match="test_places=.* are places of `data`, and `test` names other tiles"): tiny(folder, scenes, test="x", test_places="y")


# starting points

def test_random_and_pretrained(scenes, folder, encoders):
    assert starting_weights(tiny(folder, scenes), scenes) == {"s2": None}
    weights = starting_weights(tiny(folder, scenes, sensors="s1,s2", encoders={"s1": "random", "s2": encoders["s2"]}), scenes)
    assert weights["s1"] is None and weights["s2"].contract.sensor == SENSORS["s2"]
    with pytest.raises(ConfigError, match="encoders: nothing is said of s1"): starting_weights(tiny(folder, scenes, sensors="s1,s2", encoders={"s2": "random"}), scenes)
    with pytest.raises(ConfigError, match="sensors=\\('dem',\\)"): starting_weights(tiny(folder, scenes, sensors="dem"), scenes)
    with pytest.raises(WeightsError): starting_weights(tiny(folder, scenes, encoders=encoders["s1"]), scenes)                # of another sensor


def test_bands_that_do_not_fit_are_refused_or_mapped_by_name(scenes, folder, encoders):
    nine = tiny(folder, scenes, bands={"s2": 9}, encoders=encoders["s2"])
    with pytest.raises(WeightsError, match="expected bands B2, B3.*got s2 B1, B2"): starting_weights(nine, scenes)
    mapped = starting_weights(replace(nine, match="name"), scenes)["s2"]
    whole = load_encoder(encoders["s2"])
    at = SENSORS["s2"].indices(mapped.contract.sensor.bands)
    assert mapped.contract.sensor.num_bands == 9 and torch.equal(mapped.tensors["conv1.weight"], whole.conv1.weight[:, at])


def test_a_store_without_a_band(folder, encoders, tmp_path):
    store = prepare(ScenesSource(count=4, size=32, seasons=1), tmp_path / "all", progress=False)
    sensor = store.sensors["s2"].select([b for b in store.sensors["s2"].bands if b != "B10"])
    source = ScenesSource(count=4, size=32, seasons=1)
    def without(location): return replace(location, images={"s2": [image[[j for j in range(13) if j != 10]] for image in location.images["s2"]]})
    less = written(tmp_path / "less", map(without, map(source.read, source.keys())), {"s2": sensor})
    config = tiny(folder, less, encoders=encoders["s2"])
    with pytest.raises(WeightsError, match="B10"): starting_weights(config, less)
    assert "B10" not in starting_weights(replace(config, match="name"), less)["s2"].contract.sensor.bands


# the loss

def test_the_loss_is_that_of_the_libraries():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 8, 8), torch.randint(0, 4, (2, 8, 8))
    labels[0, :3] = IGNORE
    known = labels != IGNORE
    ce = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE)
    p, one = logits.softmax(1).permute(1, 0, 2, 3)[:, known], torch.nn.functional.one_hot(labels[known], 5).T
    dice = ((1 - (2 * (p * one).sum(1)) / (p.sum(1) + one.sum(1))) * (one.sum(1) > 0)).mean()
    assert torch.isclose(segmentation_loss(logits, labels, "ce"), ce) and torch.isclose(segmentation_loss(logits, labels), ce + dice, atol=1e-5)


def test_the_published_schedule():
    c = preset("published-dfc2020", kind=TransferConfig)
    for epoch in (0, 1, 17, 39, 40, 49):
        published = 1e-5 + (5e-4 - 1e-5) * (1 + math.cos(math.pi * epoch / 40)) / 2 if epoch < 40 else 1e-5
        assert math.isclose(c.learning_rate * rate_factor(epoch / c.epochs, c), published)
    assert rate_factor(0.9, replace(c, decay=0.0)) == 1


def test_steps_of_an_epoch(scenes, folder):
    bands = {"s2": SENSORS["s2"].bands}
    full, dropped = (TransferData(tiny(folder, scenes, batch_size=4, drop_last=drop), scenes, bands).sampler() for drop in (False, True))
    assert len(full) == 2 and len(dropped) == 1                 # five tiles, four a step
    assert {i % 5 for batch in full for _, i in batch} == set(range(5))


# runs

def test_a_run_leaves_what_is_needed(scenes, folder, encoders):
    run = finetune(tiny(folder, scenes, encoders=encoders["s2"], validation=0.2))
    files, summary = run.files(), run.summary()
    assert {"config.yaml", "confusion.csv", "data.json", "figures/confusion.png", "figures/maps.png", "metrics.csv", "predictor/model.safetensors", "progress.log", "summary.json"} <= set(files)
    assert not [f for f in files if f.endswith(".ckpt")] and "s2 from" in (run.folder / "predictor" / "README.md").read_text()
    counts = pd.read_csv(run.folder / "confusion.csv", index_col=0).to_numpy()
    assert counts.sum() == 5 * 2 * 32 * 32 and summary["oa"] == counts.trace() / counts.sum() and len(summary["iou"]) == 9
    assert {"val_miou", "val_oa", "train_loss"} <= set(run.metrics().columns) and len(run.metrics()) == 2
    assert Run.open(run.folder).config == run.config and json.loads((run.folder / "data.json").read_text())["trained"] == 4


def test_the_matrix_is_that_of_a_plain_loop(scenes, folder):
    run = finetune(tiny(folder, scenes))
    model, plain = load_predictor(run.folder), np.zeros((9, 9), int)
    spec = SENSORS["s2"]
    for i in choose_tiles(run.config, scenes).test.tolist():
        for season in range(2):
            record, truth = scenes.read(i, season, ("s2",)), scenes.read_reference(i)[season]
            mean, std = (np.asarray(v).reshape(-1, 1, 1) for v in (spec.mean, spec.std))
            values = torch.from_numpy((mean + std * (record["images"]["s2"] / 255 * 4 - 2)).astype(np.float32))[None]
            with torch.no_grad(): said = model({"s2": values}).argmax(1)[0].numpy()
            np.add.at(plain, (truth.ravel(), said.ravel()), 1)
    counts = pd.read_csv(run.folder / "confusion.csv", index_col=0).to_numpy()
    assert np.abs(counts - plain).sum() <= 4 and counts.sum() == plain.sum()         # values differ in the last bit


def test_frozen_is_frozen_and_finetuned_is_not(scenes, folder, encoders):
    before = load_encoder(encoders["s2"]).state_dict()
    runs = {mode: finetune(tiny(folder, scenes, encoders=encoders["s2"], name="-".join(mode), mode=mode[0], frozen_norm=mode[1]))
            for mode in (("frozen", "fixed"), ("frozen", "drifting"), ("finetuned", "fixed"))}
    after = {mode: {k.removeprefix("encoders.s2."): v for k, v in tensors(run).items() if k.startswith("encoders.s2.")} for mode, run in runs.items()}
    changed = {mode: {k.rpartition(".")[2] for k in before if not torch.equal(before[k], a[k])} for mode, a in after.items()}
    assert changed["frozen", "fixed"] == set()
    assert {"running_mean", "running_var"} <= changed["frozen", "drifting"] <= {"running_mean", "running_var", "num_batches_tracked"}
    assert {"weight", "running_mean"} <= changed["finetuned", "fixed"]


def test_both_sensors(scenes, folder, encoders):
    run = finetune(tiny(folder, scenes, sensors="s1,s2", encoders=encoders, architecture="fpn", decoder_channels=None, encoder_depth=3))
    assert list(load_predictor(run.folder).sensors) == ["s1", "s2"] and run.summary()["miou"] > 0
    at = "join.mixers.1.weight"
    assert at in tensors(run)


def test_a_stopped_run_goes_on_to_the_same_bits(scenes, folder, monkeypatch):
    config = tiny(folder, scenes, epochs=3, batch_size=2, checkpoint_steps=1, mode="finetuned")
    whole = finetune(replace(config, name="whole"))
    step = module.TransferTask.training_step
    def broken(task, batch, i):
        if task.global_step == 5: raise RuntimeError("the machine went away")
        return step(task, batch, i)
    monkeypatch.setattr(module.TransferTask, "training_step", broken)
    with pytest.raises(RuntimeError, match="the machine went away"): finetune(replace(config, name="stopped"))
    monkeypatch.setattr(module.TransferTask, "training_step", step)
    assert not (folder / "runs" / "stopped" / "summary.json").exists()
    again = finetune(replace(config, name="stopped", resume="auto"))
    a, b = tensors(whole), tensors(again)
    assert all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys()
    assert whole.metrics().equals(again.metrics()) and {**whole.summary(), "seconds": 0} == {**again.summary(), "seconds": 0}


def test_a_finished_run_is_read_and_another_setting_refused(scenes, folder, monkeypatch):
    config = tiny(folder, scenes, epochs=1)
    run = finetune(config)
    monkeypatch.setattr(module, "fit", lambda *_: pytest.fail("it trained again"))
    assert finetune(replace(config, resume=str(run.folder))).summary() == run.summary()
    with pytest.raises(ConfigError, match="mode is 'frozen' there and 'finetuned' here"): finetune(replace(config, mode="finetuned", resume=str(run.folder)))
    with pytest.raises(ConfigError, match="a run is here already"): finetune(config)


def test_a_loss_that_is_no_number_ends_the_run(scenes, folder, monkeypatch):
    monkeypatch.setattr(module, "segmentation_loss", lambda logits, *_: logits.mean() * math.nan)
    with pytest.raises(DataError, match="the loss is not finite after epoch 1; lower learning_rate"): finetune(tiny(folder, scenes))
    assert not (folder / "runs" / "run" / "summary.json").exists()


@pytest.mark.parametrize("changes, message", [
    (dict(target="reference", data="{none}"), "has labels and no reference; choose target='labels'"),
    (dict(architecture="deeplabv3plus", encoder_depth=None, decoder_channels=None, batch_size=1), "the network cannot take such a batch"),
    (dict(encoder="resnet1"), "encoder='resnet1'"),
    (dict(sensors="s1", bands={"s1": ["HH"]}), "no band HH")])
def test_what_cannot_work_is_said_before_anything_is_made(scenes, folder, changes, message):
    if "{none}" in changes.get("data", ""):
        changes = {**changes, "data": str(_without_reference(folder).folder)}
    with pytest.raises((ConfigError, DataError), match=message): finetune(tiny(folder, scenes, **changes))
    assert not (folder / "runs").exists()


def _without_reference(folder):
    source = ScenesSource(count=4, size=32, seasons=1)
    return written(folder / "none", (replace(source.read(k), reference=None) for k in source.keys()), source.sensors)


def test_depth_that_was_not_trained_is_refused(scenes, folder, encoders):
    with pytest.raises(WeightsError, match="3 stages of resnet18 were trained, 4 are asked for; choose encoder_depth=3"):
        finetune(tiny(folder, scenes, encoders=encoders["s2"], encoder_depth=4, decoder_channels=(16, 8, 8, 8)))


def test_unlabelled_tiles_are_not_counted(folder):
    source = ScenesSource(count=4, size=32, seasons=1)
    def holed(location):
        reference = [r.copy() for r in location.reference]
        for r in reference: r[:16] = IGNORE
        return replace(location, reference=reference)
    store = written(folder / "s", map(holed, map(source.read, source.keys())), source.sensors)
    run = finetune(tiny(folder, store, epochs=1))
    assert sum(run.summary()["support"]) == 2 * 16 * 32


def test_a_raw_store_gives_values_that_are_not_cut(folder):
    source = ScenesSource(count=4, size=32, seasons=1)
    def raw(location): return replace(location, images={"s2": [np.full((13, 32, 32), 9000.0, np.float32)]})
    store = written(folder / "raw", map(raw, map(source.read, source.keys())), {"s2": SENSORS["s2"]}, coding="raw")
    config = tiny(folder, store)
    data = TransferData(config, store, {"s2": SENSORS["s2"].bands})
    batch = next(iter(data.loader()))
    task = module.TransferTask(config, module.make_segmenter(config, {"s2": None}, store), store)
    seen = {}
    task.segmenter.register_forward_pre_hook(lambda _, given: seen.update(given[0]))
    task(batch)
    assert (seen["s2"] == 9000).all()


def test_a_test_store_of_another_coding(scenes, folder):
    source = ScenesSource(count=4, size=32, seasons=1, seed=9)
    coded = prepare(source, folder / "coded", progress=False)
    def raw(location): return replace(location, images={"s2": [decode(image, SENSORS["s2"]) - 4 * np.float32(np.reshape(SENSORS["s2"].std, (-1, 1, 1))) * 0.5 / 255 for image in location.images["s2"]]})
    plain = written(folder / "raw", map(raw, map(source.read, source.keys())), {"s2": SENSORS["s2"]}, coding="raw")
    runs = [finetune(tiny(folder, scenes, test=str(store.folder), name=name)).summary() for name, store in (("coded", coded), ("raw", plain))]
    assert runs[0]["support"] == runs[1]["support"] and abs(runs[0]["oa"] - runs[1]["oa"]) < 0.002


def damage(store):
    shard = next(p for p in store.folder.rglob("*") if p.is_file() and p.stat().st_size > 100_000)
    whole = shard.read_bytes()
    blob = bytearray(whole)
    for at in range(20_000, len(blob) - 4096, 9973): blob[at] ^= 255
    shard.write_bytes(blob)
    return lambda: shard.write_bytes(whole)


def test_a_damaged_test_tile_is_no_silent_gap(scenes, folder):
    other = prepare(ScenesSource(count=3, size=32, seasons=1, seed=5), folder / "other", progress=False)
    mend = damage(other)
    config = tiny(folder, scenes, test=str(other.folder), epochs=1)
    with pytest.raises(DataError, match="a test tile cannot be read, scene-0000"): finetune(config)
    assert not (folder / "runs" / "run" / "summary.json").exists()
    mend()
    assert finetune(replace(config, resume="auto")).summary()["tiles"] == 10                        # trained already: it is only tested


def test_a_finished_run_is_of_its_own_data_and_encoders(scenes, folder, encoders):
    other = prepare(ScenesSource(count=2, size=32, seasons=1, seed=5), folder / "other", progress=False)
    shutil.copytree(encoders["s2"], folder / "encoder")
    config = tiny(folder, scenes, test=str(other.folder), epochs=1, encoders=str(folder / "encoder"))
    run = finetune(config)
    shutil.rmtree(folder / "encoder")
    assert finetune(replace(config, resume="auto")).summary() == run.summary()                        # finished: it needs them no more
    torch.manual_seed(5)
    save_encoder(CrossModalSegmenter({"s2": 13}, encoder="resnet18", encoder_depth=3, decoder_channels=(16, 8, 8)), "s2", folder / "encoder")
    with pytest.raises(ConfigError, match="began with another encoder of s2"): finetune(replace(config, resume="auto"))
    shutil.rmtree(folder / "encoder")
    shutil.rmtree(other.folder)
    prepare(ScenesSource(count=2, size=32, seasons=1, seed=6), folder / "other", progress=False)
    with pytest.raises(ConfigError, match="the data are no longer those that the run began with"): finetune(replace(config, resume="auto"))


def test_a_tile_is_tested_as_if_it_were_alone(folder):
    "Tiles of another size in the store do not change what the network sees of it."
    large, small = (ScenesSource(count=2, size=size, seasons=1, seed=size) for size in (96, 32))
    def named(location): return replace(location, key=f"{location.key}-{location.images['s2'][0].shape[-1]}")
    both = written(folder / "both", map(named, [*map(large.read, large.keys()), *map(small.read, small.keys())]), large.sensors)
    model = module.make_segmenter(tiny(folder, both), {"s2": None}, both).eval()
    sizes = np.array([both.shape(i)[0] for i in range(4)])
    alone = [evaluate(model, both, tiny(folder, both), np.flatnonzero(sizes == size))["confusion"] for size in (32, 96)]
    assert evaluate(model, both, tiny(folder, both))["confusion"] == (np.array(alone[0]) + alone[1]).tolist()


# tests of what was trained

def test_evaluate_is_the_runs_own_figure(scenes, folder):
    run = finetune(tiny(folder, scenes))
    scores = evaluate(run.folder, scenes, run.config, choose_tiles(run.config, scenes).test)
    assert scores["miou"] == run.summary()["miou"] and scores["confusion"] == pd.read_csv(run.folder / "confusion.csv", index_col=0).to_numpy().tolist()
    labels = evaluate(run.folder, scenes)                        # against the noisy labels, all places
    assert sum(labels["support"]) == 10 * 2 * 32 * 32 and labels["oa"] != scores["oa"]


def test_evaluate_refuses_what_does_not_fit(scenes, folder):
    run = finetune(tiny(folder, scenes, epochs=1))
    radar = prepare(ScenesSource(count=2, size=32, seasons=1, sensors=("s1",)), folder / "radar", progress=False)
    with pytest.raises(ConfigError, match="the predictor needs s2 B1.*not there"): evaluate(run.folder, radar)
    with pytest.raises(WeightsError, match="no predictor there"): evaluate(folder / "nothing", scenes)
    (folder / "two.yaml").write_text("names: [a, b]\nremap: {0: 0, 1: 0, 2: 0, 3: 0, 4: 0, 5: 1, 6: 1, 7: 1, 8: 1}\n")
    two = prepare(ScenesSource(count=2, size=32, seasons=1, scheme=str(folder / "two.yaml")), folder / "two", progress=False)
    with pytest.raises(ConfigError, match="its classes \\(a, b\\) are not the predictor's"): evaluate(run.folder, two)


def test_a_test_store_of_its_own(scenes, folder):
    other = prepare(ScenesSource(count=3, size=32, seasons=1, seed=5), folder / "other", progress=False)
    run = finetune(tiny(folder, scenes, test=str(other.folder), epochs=1))
    assert sum(run.summary()["support"]) == 3 * 32 * 32 and "10 tiles to train on" in run.summary()["split"]


# comparisons

def test_a_grid_is_run_once(scenes, folder, encoders, monkeypatch):
    cells = grid(tiny(folder, scenes, epochs=1, name="all"), {"random": "random", "ours": encoders}, seeds="0,1", inputs="s2,s1+s2")
    assert len(cells) == 16 and len({c.name for _, c in cells}) == 16
    table = compare(cells[:4], progress=False)
    calls, real = [], module.fit
    monkeypatch.setattr(module, "fit", lambda *given: calls.append(given[0].folder.name) or real(*given))
    whole = compare(cells[:6], progress=False)
    assert len(calls) == 2 and whole[:4].equals(table) and whole.columns.tolist() == ["sensors", "start", "mode", "fraction", "seed", "tiles", "oa", "aa", "miou", "mf1", "run"]
    figures = summary_table(whole)
    assert figures.shape == (3, 4) and "±" in figures.loc[("s2", "random", "frozen"), "mIoU"]
    gained = gains(whole)
    assert gained.loc[("s2", "ours", "frozen", 1.0), "better in"].endswith("of 2")


def test_random_weights_are_those_of_the_same_network(scenes, folder, tmp_path):
    torch.manual_seed(0)
    nine = save_encoder(CrossModalSegmenter({"s2": 9}, encoder="resnet34", encoder_depth=3, decoder_channels=(16, 8, 8)), "s2", tmp_path / "nine", spec=SENSORS["s2"].select(BAND_SUBSETS[9]))
    cells = {row["start"]: c for row, c in grid(tiny(folder, scenes), {"random": "random", "ours": str(nine)}, "frozen", 0)}
    assert cells["random"].encoder == "resnet34" and cells["random"].bands == {"s2": list(BAND_SUBSETS[9])}


def test_starts_of_other_bands_share_a_store(folder, encoders, tmp_path):
    torch.manual_seed(0)
    nine = save_encoder(CrossModalSegmenter({"s2": 9}, encoder="resnet18", encoder_depth=3, decoder_channels=(16, 8, 8)), "s2", tmp_path / "nine", spec=SENSORS["s2"].select(BAND_SUBSETS[9]))
    cells = grid(tiny(folder, data="scenes:balanced-40:1:6", epochs=1), {"random": "random", "nine": str(nine), "all": encoders}, "frozen", 0)
    assert compare(cells, progress=False)["start"].tolist() == ["random", "nine", "all"] and len(list((folder / "stores").iterdir())) == 1


def test_names_of_starts_become_folders(scenes, folder):
    cells = grid(tiny(folder, scenes), {"MoCo (S2)": "random"}, "frozen", 0, places="scene-00001,scene-00002")
    assert [c.name for _, c in cells] == ["s2-MoCo__S2_-frozen-1.0-0-scene-00001", "s2-MoCo__S2_-frozen-1.0-0-scene-00002"]
    with pytest.raises(ConfigError, match="two runs would have this name"): grid(tiny(folder, scenes), {"a b": "random", "a_b": "random"}, "frozen", 0)


def test_another_setting_under_the_same_name(scenes, folder):
    config = tiny(folder, scenes, epochs=1)
    compare(grid(config, {"random": "random"}, "frozen", 0), progress=False)
    with pytest.raises(ConfigError, match="batch_size is 4 there and 2 here; leave it as it is, or choose another `name`"):
        compare(grid(replace(config, batch_size=2), {"random": "random"}, "frozen", 0), progress=False)


def test_every_place_in_turn(scenes, folder):
    cells = grid(tiny(folder, scenes, epochs=1), {"random": "random"}, "frozen", 0, places=["scene-00001", "scene-00002"])
    table = compare(cells, progress=False)
    assert table["tested"].tolist() == ["scene-00001", "scene-00002"] and len(summary_table(table)) == 2


def test_bad_lists_are_refused(scenes, folder):
    with pytest.raises(ConfigError, match="seeds='a,b': give a list of whole numbers"): grid(tiny(folder, scenes), {"random": "random"}, seeds="a,b")
    with pytest.raises(ConfigError, match="mode='warm': choose one of"): grid(tiny(folder, scenes), {"random": "random"}, modes="warm")


def test_the_newest_pretraining(folder):
    with pytest.raises(ConfigError, match="no finished pretraining run with encoders of s2"): newest_pretraining(str(folder), ("s2",))


def test_scenes_by_name(folder):
    store = open_data(tiny(folder, data="scenes:balanced-20:7:3"))
    assert len(store) == 3 and "seed 7" in store.source and "balanced-20" in store.source
    with pytest.raises(ConfigError, match="give scenes"): open_data(tiny(folder, data="scenes:balanced-20:x"))
    with pytest.raises(ConfigError, match="did you mean 'balanced-20'"): open_data(tiny(folder, data="scenes:balanced-2"))


# the paper's tasks

@pytest.mark.parametrize("task, size, classes", [("dfc2020", 64, 8), ("dw", 70, 9), ("osm", 62, 13)])
def test_the_papers_tasks_from_their_published_layout(task, size, classes, folder):
    "Tiles of 70 and 62 px, which no network divides: they are padded, and counted as they are."
    data, splits = folder / "data", ("validation", "test") if task == "dfc2020" else ("train", "test")
    for split in splits:
        for i in range(3):
            if task == "dfc2020": dfc2020(data, split, i + 10 * splits.index(split), size, seed=i)
            else: noldo(data, f"{task}_{split}", f"{12.5 + i}_{-3.25 - splits.index(split)}-20200107", size, seed=i)
    labels = {} if task == "dfc2020" else {"labels": task}
    train, test = (prepare(data, folder / split, split=split, progress=False, **labels) for split in splits)
    config = preset(f"published-{task}", kind=TransferConfig, data=str(train.folder), test=str(test.folder), encoder="resnet18", crop=None if task == "dfc2020" else 32, epochs=1, batch_size=2,
                    test_batch_size=2, num_workers=0, precision="32-true", name="run", runs=str(folder / "runs"))
    summary = finetune(config).summary()
    assert len(summary["classes"]) == classes and 0 < sum(summary["support"]) <= 2 * size * size            # the third tile is an incomplete batch
    assert summary["mprecision"] is not None and not any(math.isnan(v) for v in summary["iou"])               # by the published rule an absent class counts 1
    whole = finetune(replace(config, name="ours", drop_last=False, absent_class="skip")).summary()
    assert sum(whole["support"]) > sum(summary["support"])
    with pytest.raises(ConfigError, match="3 tiles are less than one test batch; lower test_batch_size=100"): finetune(replace(config, name="large", test_batch_size=100))
    assert not (folder / "runs" / "large").exists()
