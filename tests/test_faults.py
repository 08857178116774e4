"Faults that are really made: full and read-only disks, damaged and shrinking files, hardware that is not there. The run says so, and nothing is lost."
import json
import os
import random
import subprocess
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from disks import disk, remount
from test_pretraining import last, same, tiny

from cromss import pretraining as module
from cromss.checkpoints import Interrupted, newest_checkpoint
from cromss.config import ConfigError, DataError, SmoothingConfig, StoreError
from cromss.dataset import PatchDataset, StepSampler, collate
from cromss.models import CrossModalSegmenter
from cromss.prepare import prepare
from cromss.pretraining import configure, native_precision, pretrain
from cromss.runs import Run
from cromss.scenes import ScenesSource
from cromss.store import Store, _image_key

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")


@pytest.fixture
def unfinished(monkeypatch): monkeypatch.setattr(module, "_finish", lambda *_: None)


@pytest.fixture
def scenes():
    with tempfile.TemporaryDirectory() as name: yield prepare(ScenesSource(count=8, size=32), f"{name}/scenes", progress=False)


def sizes(folder): return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


# disks

def test_a_full_disk_stops_the_run_and_leaves_the_checkpoint_before(scenes, tmp_path, unfinished):
    whole = pretrain(tiny(tmp_path, epochs=1, name="size", schedule="constant"), scenes)
    one = sizes(whole.checkpoints)
    with disk(tmp_path / "disk", int(1.6 * one) + 200_000):
        config = tiny(tmp_path / "disk", epochs=3, schedule="constant")
        with pytest.raises(ConfigError, match=r"epoch=0001.ckpt: the checkpoint cannot be written \(No space left on device\); free space"): pretrain(config, scenes)
        run = Run.open(Path(config.runs) / "run")
        assert newest_checkpoint(run).name == "epoch=0000.ckpt" and not [p for p in run.checkpoints.iterdir() if p.name.startswith(".")]
        assert run.metrics()["epoch"].tolist() == [0, 1]
        remount(tmp_path / "disk", f"size={8 * one}")                    # somebody made room
        again = pretrain(configure({"resume": str(run.folder)}), scenes)
        assert again.metrics()["epoch"].tolist() == [0, 1, 2]
        assert same(last(again), last(pretrain(tiny(tmp_path, epochs=3, name="other", schedule="constant"), scenes)))


def test_a_disk_that_fills_while_metrics_are_written(scenes, tmp_path, unfinished):
    with disk(tmp_path / "disk", "20m") as small:
        run = pretrain(tiny(small, epochs=1, schedule="constant"), scenes)
        before = (run.folder / "metrics.csv").read_bytes()
        free = os.statvfs(small).f_bavail * os.statvfs(small).f_frsize
        (small / "filler").write_bytes(b"\0" * free)
        with pytest.raises(ConfigError, match=r"metrics.csv: cannot be written \(No space left on device\)"): run.add_metrics({"epoch": 1, "train_loss": 1.0})
        assert (run.folder / "metrics.csv").read_bytes() == before and not [p for p in run.folder.iterdir() if p.name.startswith(".")]


def test_a_full_disk_while_a_store_is_written(tmp_path):
    with disk(tmp_path / "disk", "1m") as small:
        with pytest.raises(StoreError, match="cannot be written.*make room or choose another folder"): prepare(ScenesSource(count=60, size=64), small / "store", progress=False)
        assert not (small / "store").exists() and not list(small.glob("*.partial")) and not list(small.glob("*.lock"))


def test_a_run_folder_that_is_read_only_is_refused_before_training(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "fit", lambda *_: pytest.fail("it trained"))
    with disk(tmp_path / "disk", "20m"):
        remount(tmp_path / "disk", "ro")
        with pytest.raises(ConfigError, match=r"cannot be made \(Read-only file system\); choose another `runs` folder"): pretrain(tiny(tmp_path / "disk"), scenes)


def test_a_run_that_became_read_only_is_refused_before_training(scenes, tmp_path, unfinished, monkeypatch):
    with disk(tmp_path / "disk", "20m"):
        run = pretrain(tiny(tmp_path / "disk", epochs=1, schedule="constant"), scenes)
        monkeypatch.setattr(module, "fit", lambda *_: pytest.fail("it trained"))
        remount(tmp_path / "disk", "ro")
        with pytest.raises(ConfigError, match="Read-only file system"): pretrain(configure({"resume": str(run.folder), "epochs": 2}), scenes)
        remount(tmp_path / "disk", "rw")


# damaged data

def damage(store, location, season=0, sensor="s2"):
    "Flip bytes in the stored image of a location."
    shard = store.folder / store.manifest["shards"][store._index["shard"][location]]["file"]
    image, content = store.read(location, season, [sensor])["images"][sensor].tobytes(), bytearray(shard.read_bytes())
    at = content.find(image[:2000])
    assert at > 0
    content[at + 700] ^= 255
    shard.write_bytes(content)
    return _image_key(store.key(location), season, sensor).decode()


@pytest.fixture
def broken(scenes):
    "A store of which every season of one location is damaged, and that location's key."
    names = [damage(scenes, 3, s) for s in range(scenes.season_count)]
    return Store.open(scenes.folder), scenes.key(3), names


def test_a_damaged_place_is_replaced_by_another(broken):
    store, key, names = broken
    data = PatchDataset(store, crop=32, smoothing=SmoothingConfig())
    at = next(i for i in range(len(data)) if data._decide(0, i)[0] == 3)
    sample, again = data[(0, at)], PatchDataset(store, crop=32, smoothing=SmoothingConfig())[(0, at)]
    assert sample["key"] != key and sample["quarantined"].startswith(f"{key}\t") and any(n in sample["quarantined"] for n in names) and "checksum" in sample["quarantined"]
    assert all(torch.equal(v, again[k]) if torch.is_tensor(v) else v == again[k] for k, v in sample.items())       # the same every time
    assert data[(1, at)]["key"] != key and (sample["mask"] != 255).any()
    still = PatchDataset(store, crop=32, augment=False)
    found = [still[i] for i in range(len(still))]
    gone = [s for s in found if s["quarantined"]]
    assert len(gone) == 4 and all(s["key"] == key and (s["mask"] == 255).all() and not s["valid"].any() for s in gone) and len(collate(found)["quarantined"]) == len(found)


@pytest.mark.parametrize("workers", [0, 1])
def test_training_goes_on_and_names_the_damage_once(broken, tmp_path, unfinished, workers):
    store, key, _ = broken
    with pytest.warns(UserWarning, match=f"location {key} cannot be read, another is trained on in its place") as said:
        run = pretrain(tiny(tmp_path, epochs=3, min_steps=4, validation=0.0, num_workers=workers, schedule="constant"), store)
    assert len([w for w in said if key in str(w.message)]) == 1
    lines = (run.folder / "quarantine.log").read_text().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{key}\t") and "checksum" in lines[0] and np.isfinite(run.metrics()["train_loss"]).all()
    again = pretrain(configure({"resume": str(run.folder), "epochs": 4}), store)
    assert (again.folder / "quarantine.log").read_text().splitlines() == lines


def test_too_much_damage_stops_the_run(scenes, tmp_path, unfinished):
    for location in range(5):
        for season in range(scenes.season_count): damage(scenes, location, season)
    with pytest.warns(UserWarning, match="cannot be read"), pytest.raises(DataError, match=r"2 locations cannot be read.*copy the store again.*quarantine.log"):
        pretrain(tiny(tmp_path, epochs=5, min_steps=8, validation=0.0), Store.open(scenes.folder))


def test_a_shard_that_shrinks_meanwhile_does_not_end_the_process(scenes, tmp_path):
    "By its size it is known before it is mapped: a short file would end the process by SIGBUS."
    store = Store.open(scenes.folder)
    shard = store.folder / store.manifest["shards"][0]["file"]
    os.truncate(shard, shard.stat().st_size // 2)
    code = f"from cromss.store import Store; s = Store({str(store.folder)!r}, check_shards=False)\ntry: s.read(0, 0)\nexcept Exception as e: print(type(e).__name__, e)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("StoreError") and "bytes instead of" in done.stdout
    with pytest.raises(StoreError, match="bytes instead of.*copy it again"): Store.open(scenes.folder)
    os.truncate(shard, 2 * shard.stat().st_size + 4096)
    with pytest.raises(StoreError, match="bytes instead of"): Store.open(scenes.folder)


# the same order, whatever shares it out

def test_processes_and_workers_change_no_order():
    rng = random.Random(0)
    for _ in range(50):
        samples, whole, seed, step = rng.randrange(8, 400), rng.choice([4, 8, 12, 24]), rng.randrange(9), rng.randrange(40)
        steps = [b for b in StepSampler(samples, whole, seed, step=lambda: step)]
        for world in (w for w in (2, 3, 4) if whole % w == 0):
            shares = [list(StepSampler(samples, whole // world, seed, step=lambda: step, rank=r, world=world)) for r in range(world)]
            assert [sorted(sum(parts, [])) for parts in zip(*shares)] == [sorted(b) for b in steps]
        halves = list(StepSampler(samples, whole // 2, seed, step=lambda: step, accumulate=2))
        assert [a + b for a, b in zip(halves[::2], halves[1::2])] == steps


def test_a_step_that_cannot_be_shared_evenly_is_refused(scenes, tmp_path, unfinished):
    run = pretrain(tiny(tmp_path, epochs=1, schedule="constant"), scenes)                # batches of 3
    facts = json.loads((run.folder / "data.json").read_text())
    assert facts["global_batch"] == 3
    (run.folder / "data.json").write_text(json.dumps(facts | {"global_batch": 7}))
    from cromss.parallel import Ranks
    with pytest.raises(ConfigError, match=r"a step of this run has 7 crops, which 2 process\(es\) cannot share evenly"): module._same_global_batch(run, run.config, Ranks(0, 2, 2))


# numbers that overflow, hardware that is not there

def scaled(config, run, ranks=None, callbacks=(), bar=None):
    "A trainer with float16's scaler around float32 arithmetic: what a GPU does, on any machine."
    from lightning.pytorch.plugins.precision import MixedPrecision
    class Scaled(MixedPrecision):
        def autocast_context_manager(self): return torch.autocast("cpu", enabled=False)
    return L.Trainer(max_epochs=config.epochs, accelerator="cpu", devices=1, logger=False, plugins=[Scaled("16-mixed", "cpu")], default_root_dir=run.folder, use_distributed_sampler=False,
                     num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=bool(callbacks), callbacks=list(callbacks))


def test_gradients_that_overflow_for_ever_stop_the_run(scenes, tmp_path, unfinished, monkeypatch):
    monkeypatch.setattr(module, "make_trainer", scaled)
    real = CrossModalSegmenter.forward
    class Overflow(torch.autograd.Function):
        "Its value is fine, its gradient is not."
        @staticmethod
        def forward(ctx, x): return x.clone()
        @staticmethod
        def backward(ctx, g): return g * float("inf")
    monkeypatch.setattr(CrossModalSegmenter, "forward", lambda self, images: {s: Overflow.apply(x) for s, x in real(self, images).items()})
    with pytest.raises(DataError, match=r"gradients overflow float16 again and again \(scale .* at step (\d+)\).*bf16-mixed") as e: pretrain(tiny(tmp_path, epochs=1, min_steps=200), scenes)
    assert int(str(e.value).split("at step ")[1].split(")")[0]) < 40


def test_a_few_overflows_are_no_reason_to_stop(scenes, tmp_path, unfinished, monkeypatch):
    monkeypatch.setattr(module, "make_trainer", scaled)
    run = pretrain(tiny(tmp_path, epochs=1, min_steps=40), scenes)
    assert run.folder.exists()


@pytest.mark.parametrize("asked, cuda, bf16, given, warned", [
    ("auto", False, True, "bf16-mixed", False), ("auto", False, False, "32-true", False), ("auto", True, False, "32-true", False), ("32-true", False, False, "32-true", False),
    ("16-mixed", False, True, "bf16-mixed", True), ("16-mixed", False, False, "32-true", True), ("16-mixed", True, False, "16-mixed", False),
    ("bf16-mixed", False, False, "32-true", True), ("bf16-mixed", True, False, "32-true", True), ("bf16-mixed", True, True, "bf16-mixed", False)])
def test_precision_falls_back_with_one_warning(monkeypatch, asked, cuda, bf16, given, warned):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert native_precision(asked) == given
    assert len(said) == warned and all(asked in str(w.message) and given in str(w.message) for w in said)


def test_without_a_gpu_half_precision_trains_to_about_the_same(scenes, tmp_path, unfinished):
    losses = {}
    for precision in ("32-true", "16-mixed"):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            losses[precision] = pretrain(tiny(tmp_path, precision=precision, name=precision), scenes).metrics()["train_loss"].iloc[-1]
        assert len([w for w in said if "precision=" in str(w.message)]) == (precision == "16-mixed")
    if not torch.cuda.is_available(): assert losses["16-mixed"] == pytest.approx(losses["32-true"], rel=0.02)


def test_a_network_that_cannot_be_compiled_runs_as_it_is(scenes, tmp_path, unfinished, monkeypatch):
    def backend(graph, inputs): raise RuntimeError("no compiler here")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run = pretrain(tiny(tmp_path, epochs=1, compile=True, name="compiled"), scenes)
    assert len([w for w in said if "compile=True: this machine cannot compile" in str(w.message)]) == 1
    assert same(last(run), last(pretrain(tiny(tmp_path, epochs=1, name="plain"), scenes)))


# -- data workers -----------------------------------------------------------------------------------------------------------------------------------

def test_a_data_worker_that_is_killed_ends_the_run_in_one_line(tmp_path, scenes, monkeypatch, unfinished):      # fault 29
    real = PatchDataset.sample
    def sample(self, location, chosen):
        if torch.utils.data.get_worker_info() and any(tmp_path.rglob("epoch=0000.ckpt")): os.kill(os.getpid(), 9)
        return real(self, location, chosen)
    monkeypatch.setattr(PatchDataset, "sample", sample)
    with pytest.raises(Interrupted, match=r"a data worker ended without a word .*(Killed|unexpectedly).* with fewer num_workers go on by: .*--resume") as e:
        pretrain(tiny(tmp_path, epochs=3, num_workers=1), scenes)
    assert e.value.exit_code == 75
    monkeypatch.undo()
    monkeypatch.setattr(module, "_finish", lambda *_: None)
    assert pretrain(configure({"resume": str(next(tmp_path.rglob("checkpoints")).parent), "num_workers": 0, "epochs": 3}), scenes).metrics()["epoch"].tolist() == [0, 1, 2]


def test_too_little_shared_memory_is_said_at_the_start(tmp_path, scenes, monkeypatch):                          # fault 29
    with disk(tmp_path / "shm", "1m") as small:
        real = module.check_shared_memory
        monkeypatch.setattr(module, "check_shared_memory", lambda data, config, **more: real(data, config, folder=small, **more))
        with pytest.raises(ConfigError, match=r"num_workers=2: the batches that they hold ready need [\d,]+ MB of .*, which has 1 MB free"):
            pretrain(tiny(tmp_path, num_workers=2, batch_size=16), scenes)
    assert not (tmp_path / "runs").exists()
