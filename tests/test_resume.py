"Runs that are really killed, by SIGKILL, and told to stop, by SIGTERM and others: they go on to the bits of a run that never stopped."
import hashlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from test_pretraining import last, network, same, tiny, weights

from cromss.checkpoints import Interruption, newest_checkpoint
from cromss.config import ConfigError, dump_config
from cromss.prepare import prepare
from cromss.pretraining import configure, pretrain
from cromss.runs import Run
from cromss.scenes import ScenesSource

pytestmark = [pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL on Windows"), pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")]
STEPS, EPOCHS = 12, 5                                     # 60 steps: 50 follow after any step of the first ten


@pytest.fixture(scope="module")
def place():
    with tempfile.TemporaryDirectory() as name:
        prepare(ScenesSource(count=8, size=32), f"{name}/scenes", progress=False)
        yield Path(name)


def config_of(place, name, **changes):
    return tiny(place, **{"data": str(place / "scenes"), "name": name, "epochs": EPOCHS, "min_steps": STEPS, "batch_size": 2, **changes})


# in the process that is killed

def die(): os.kill(os.getpid(), signal.SIGKILL)


def arm(what, when):
    "Have this process end itself at a certain moment."
    from cromss import checkpoints, pretraining, runs
    task, write, table = pretraining.CromssTask, checkpoints._save, runs.Run.add_metrics
    start = task.on_train_batch_start
    def batch_start(self, batch, i):
        start(self, batch, i)
        if what == "step" and self.global_step == when: die()
    def save(content, path):
        if what == "write" and f"epoch={when:04d}" in str(path):
            Path(path).write_bytes(b"half of a checkpoint")
            die()
        write(content, path)
        if what == "written" and f"epoch={when:04d}" in str(path): die()        # whole, but not yet under its name
    def add_metrics(self, row):
        table(self, row)
        if what == "table" and row["epoch"] == when: die()
    task.on_train_batch_start, checkpoints._save, runs.Run.add_metrics = batch_start, save, add_metrics


def note_batches(path):
    "Write a line with step and hash of every batch that is trained on."
    from cromss import pretraining
    real = pretraining.CromssTask.training_step
    def training_step(self, batch, i):
        whole = hashlib.sha256(b"".join(v.numpy().tobytes() for k, v in sorted(batch.items()) if torch.is_tensor(v))).hexdigest()
        with open(path, "a") as file: file.write(f"{self.global_step} {whole} {' '.join(batch['key'])}\n")
        return real(self, batch, i)
    pretraining.CromssTask.training_step = training_step


def alone():
    "This process as one that a shell started: its data workers are forked, and it computes with one thread."
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)


def train(config, log, kill=None):
    from cromss import pretraining
    alone()
    pretraining._finish = lambda *_: None
    note_batches(log)
    if kill: arm(*kill)
    pretrain(config)


def start(processes, *arguments, target=train):
    process = processes.Process(target=target, args=arguments)
    process.start()
    process.join(240)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


def batches(log): return dict(line.split(" ", 1) for line in log.read_text().splitlines())


@pytest.fixture(scope="module")
def whole(place, processes):
    "A run that nothing stopped, for each number of workers."
    def make(workers):
        name = f"whole{workers}"
        if not (place / "runs" / name).exists(): assert start(processes, config_of(place, name, num_workers=workers), place / f"{name}.log") == 0
        return Run.open(place / "runs" / name), batches(place / f"{name}.log")
    return make


KILLS = [("step", 3, 0), ("step", 7, 1), ("step", 25, 0), ("step", 41, 2), ("step", 59, 0), ("step", 12, 1), ("table", 1, 0), ("write", 2, 0), ("write", 0, 1), ("written", 3, 0)]


@pytest.mark.parametrize("what, when, workers", KILLS)
def test_killed_and_run_again_it_comes_to_the_same_bits(place, processes, whole, what, when, workers):
    run, log = place / "runs" / f"{what}{when}", place / f"{what}{when}.log"
    config = config_of(place, run.name, num_workers=workers)
    assert start(processes, config, log, (what, when)) == -signal.SIGKILL
    assert any(p.name.startswith(".epoch") for p in (run / "checkpoints").iterdir()) == (what in ("write", "written"))
    log.unlink()
    assert start(processes, configure({"resume": str(run)}), log) == 0
    again, (uninterrupted, expected) = Run.open(run), whole(workers)
    assert (run / "metrics.csv").read_bytes() == (uninterrupted.folder / "metrics.csv").read_bytes()
    assert same(last(again), last(uninterrupted)) and newest_checkpoint(again).name == newest_checkpoint(uninterrupted).name
    found = batches(log)
    assert found.items() <= expected.items() and max(map(int, found)) == STEPS * EPOCHS - 1
    if what == "step" and when < 10: assert len(found) >= 50
    assert not [p for p in (run / "checkpoints").iterdir() if p.name.startswith(".")] and not (run / "skipped_steps.log").exists()


def test_workers_change_nothing(whole):
    (none, a), (two, b) = whole(0), whole(2)
    assert a == b and same(last(none), last(two)) and (none.folder / "metrics.csv").read_bytes() == (two.folder / "metrics.csv").read_bytes()


# told to stop

def command(config, log, number, step):
    "The command, which gets a signal within a step."
    from cromss import cli, pretraining
    alone()
    pretraining._finish = lambda *_: None
    note_batches(log)
    noted = pretraining.CromssTask.training_step
    def training_step(self, batch, i):
        if self.global_step == step: os.kill(os.getpid(), number)
        return noted(self, batch, i)
    pretraining.CromssTask.training_step = training_step
    sys.stderr = open(f"{log}.err", "w", buffering=1)
    os._exit(cli.main(["pretrain", "--config", str(config)]))      # as a process of its own would


@pytest.mark.parametrize("name, step, workers, changes", [("SIGTERM", 16, 0, {}), ("SIGUSR1", 28, 1, {"schedule": "plateau"}), ("SIGINT", 5, 0, {}), ("SIGTERM", 23, 0, {}),
                                                          ("SIGUSR1", 7, 0, {"accumulate": 2}), ("SIGTERM", 30, 0, {"architecture": "fpn", "decoder_channels": None, "encoder_depth": 5})])
def test_told_to_stop_it_goes_on_in_mid_epoch(place, processes, whole, name, step, workers, changes):
    title = f"{name}{step}{'-'.join(changes)}"
    log, config = place / f"{title}.log", config_of(place, title, num_workers=workers, **changes)
    path = place / f"{title}.yaml"
    path.write_text(dump_config(config))
    assert start(processes, path, log, getattr(signal, name), step, target=command) == (130 if name == "SIGINT" else 75)
    run, said = Run.open(place / "runs" / title), Path(f"{log}.err").read_text()
    assert f"cromss: stopped by {name} after step" in said and f"cromss pretrain --resume {run.place}" in said and "Traceback" not in said
    newest, steps = newest_checkpoint(run), len(set(batches(log)))
    at_the_end = (step + 1) % STEPS == 0                           # a checkpoint is due anyway
    assert newest.name == (f"epoch={step // STEPS:04d}.ckpt" if at_the_end else f"epoch={step // STEPS:04d}-step={step + 1:08d}.ckpt") and steps == step + 1
    log.unlink()
    assert start(processes, configure({"resume": str(run.folder)}), log) == 0
    if changes: assert start(processes, config_of(place, f"{title}-whole", **changes), place / f"{title}-whole.log") == 0
    uninterrupted = Run.open(place / "runs" / f"{title}-whole") if changes else whole(workers)[0]
    assert (run.folder / "metrics.csv").read_bytes() == (uninterrupted.folder / "metrics.csv").read_bytes() and same(last(run), last(uninterrupted))
    assert min(map(int, batches(log))) == step + 1                 # no step is done twice


def test_the_last_step_of_all_ends_in_order(place, processes):
    "Nothing is left to go on with: the run finishes."
    path, log = place / "end.yaml", place / "end.log"
    path.write_text(dump_config(config_of(place, "end")))
    assert start(processes, path, log, signal.SIGTERM, STEPS * EPOCHS - 1, target=command) == 0


def test_the_whole_group_of_processes_is_told(place, processes):
    "As `scancel` does, and a terminal's Ctrl-C: data workers get the signal, too, and live on."
    log, config = place / "group.log", config_of(place, "group", num_workers=2, epochs=200)
    path = place / "group.yaml"
    path.write_text(dump_config(config))
    process = processes.Process(target=_group, args=(path, log))
    process.start()
    began = time.monotonic()
    while not (log.exists() and len(batches(log)) > 15) and time.monotonic() - began < 120: time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 75 and "Traceback" not in Path(f"{log}.err").read_text()
    assert len(list((place / "runs" / "group" / "checkpoints").glob("*.ckpt"))) > 0


def _group(path, log):
    os.setpgid(0, 0)
    command(path, log, 0, -1)


def test_handlers_are_put_back(place, monkeypatch):
    from cromss import pretraining
    monkeypatch.setattr(pretraining, "_finish", lambda *_: None)
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    pretrain(config_of(place, "handlers").__class__(**{**config_of(place, "handlers").__dict__, "epochs": 1}))
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


def test_a_second_interrupt_does_not_wait():
    told = Interruption(checkpoints=None)
    told.tell(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt): told.tell(signal.SIGINT, None)


# the configuration's part

def test_auto_goes_on_with_the_run_of_that_name(place, monkeypatch):
    from cromss import pretraining
    monkeypatch.setattr(pretraining, "_finish", lambda run, *_: run.save_summary({"done": 1}))
    given = {k: v for k, v in config_of(place, "auto", resume="auto", epochs=1, min_steps=2, schedule="constant").__dict__.items() if k not in ("preset",)}
    first = pretrain(configure(dict(given)))
    assert first.metrics()["epoch"].tolist() == [0] and Run.open(first.folder).config.resume is None
    more = pretrain(configure({"resume": "auto", "name": "auto", "runs": given["runs"], "epochs": 2}))
    assert more.folder == first.folder and more.metrics()["epoch"].tolist() == [0, 1] and Run.open(first.folder).config.epochs == 2
    assert (first.folder / "environment-2.json").exists()
    with pytest.raises(ConfigError, match="resume='auto'.*give `name`"): configure({"resume": "auto"})
    files = more.files()
    assert pretrain(configure({"resume": str(first.folder)})).files() == files                  # it is finished: nothing is touched
    with pytest.raises(ConfigError, match="epochs=1: .* has trained 2 already; give 2 or more"): pretrain(configure({"resume": str(first.folder), "epochs": 1}))


def test_checkpoints_within_an_epoch(place, monkeypatch):
    from cromss import pretraining
    monkeypatch.setattr(pretraining, "_finish", lambda *_: None)
    seen = []
    real = pretraining.Checkpoints.save
    monkeypatch.setattr(pretraining.Checkpoints, "save", lambda self, trainer, name: (real(self, trainer, name), seen.append(name))[0])
    run = pretrain(config_of(place, "steps", checkpoint_steps=5).__class__(**{**config_of(place, "steps", checkpoint_steps=5).__dict__, "epochs": 2}))
    assert seen == [*(f"epoch=0000-step={n:08d}.ckpt" for n in (5, 10)), "epoch=0000.ckpt", *(f"epoch=0001-step={n:08d}.ckpt" for n in (15, 20)), "epoch=0001.ckpt"]
    assert sorted(p.name for p in run.checkpoints.glob("*.ckpt")) == seen[-2:]
    assert network(weights(run.checkpoints / seen[-1])).keys() == network(weights(run.checkpoints / seen[-2])).keys()
