"The papermill templates, run as users run it: in a process and a kernel of its own, with tiny parameters."
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from cromss.config import preset
from cromss.models import CrossModalSegmenter
from cromss.prepare import prepare
from cromss.runs import Run, list_runs
from cromss.scenes import ScenesSource
from cromss.weights import save_encoder

TINY = dict(epochs=1, min_steps=2, batch_size=4, crop=32, encoder_depth=3, decoder_channels=[16, 8, 8], precision="32-true", devices=1, name="tiny", selection={"ramp_epochs": 1})


def papermill(root, out, book="pretrain", **parameters):
    "The finished process of a papermill call, and the notebook it wrote."
    given = out.with_suffix(".yaml")
    given.write_text(yaml.safe_dump(parameters))
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}", "IPYTHONDIR": str(out.parent / "ipython")}
    done = subprocess.run([sys.executable, "-m", "papermill", str(root / "nbs" / f"{book}.ipynb"), str(out), "-f", str(given), "--no-progress-bar", "--cwd", str(root / "nbs")],
                          capture_output=True, text=True, env=env, timeout=600)
    return done, json.loads(out.read_text(encoding="utf-8"))


def outputs(book): return [o for cell in book["cells"] for o in cell.get("outputs", [])]


def pictures(book): return [o for o in outputs(book) if "image/png" in o.get("data", {})]


def text(book): return "".join("".join(o["text"]) if "text" in o else "".join(o.get("data", {}).get("text/plain", "")) for o in outputs(book))


def test_it_runs_to_the_end(root, tmp_path):
    store = prepare(ScenesSource(count=8, size=32), tmp_path / "store", progress=False)
    done, book = papermill(root, tmp_path / "out.ipynb", data=str(store.folder), runs=str(tmp_path / "runs"), stores=str(tmp_path / "stores"), **TINY)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not [o for o in outputs(book) if o["output_type"] == "error"] and len(pictures(book)) >= 5
    assert not [o["text"] for o in outputs(book) if o.get("name") == "stderr"]
    assert all(c["execution_count"] for c in book["cells"] if c["cell_type"] == "code")
    run, = list_runs(tmp_path / "runs")
    files = run.files()
    assert {"config.yaml", "metrics.csv", "summary.json", "figures/curves.png", "encoders/s1/model.safetensors", "encoders/s2/README.md"} <= set(files)
    assert any("tfevents" in f for f in files) and run.config.epochs == 1 and run.config.selection.keep == 0.5 and not (tmp_path / "stores").exists()
    assert "7 locations to train on, 1 held out" in str(book) and "miou_reference" in text(book)


def test_a_mistyped_parameter_is_refused_before_a_run_folder_is_made(root, tmp_path):
    done, book = papermill(root, tmp_path / "out.ipynb", epocs=2, runs=str(tmp_path / "runs"), stores=str(tmp_path / "stores"))
    assert done.returncode != 0 and "unknown parameter 'epocs'; did you mean 'epochs'?" in done.stderr
    error, = [o for o in outputs(book) if o["output_type"] == "error"]
    assert error["ename"] == "ConfigError" and not (tmp_path / "runs").exists() and not (tmp_path / "stores").exists()


def test_on_real_tiles(root, sample, tmp_path):
    "One place of the SSL4EO-S12 tree, two seasons, no reference: prepared on first use, split into two blocks."
    done, book = papermill(root, tmp_path / "out.ipynb", data=str(sample / "ssl4eo-s12"), runs=str(tmp_path / "runs"), stores=str(tmp_path / "stores"), loggers="",
                           **TINY | {"crop": 64})
    assert done.returncode == 0, done.stderr[-3000:]
    assert not [o for o in outputs(book) if o["output_type"] == "error"] and len(pictures(book)) >= 5
    run, = list_runs(tmp_path / "runs")
    stored, = (tmp_path / "stores").iterdir()
    assert stored.name.startswith("ssl4eo-s12-") and run.summary()["store"] == str(stored) and "one location in two blocks" in run.summary()["split"]
    assert run.metrics()["epoch"].tolist() == [0] and run.metrics().notna().all().all() and 0 < run.metrics()["train_usable_share"].iloc[0] <= 1
    assert set(run.summary()["validation"]) >= {"oa_s1", "miou_s2", "miou_mean"} and not [k for k in run.summary()["validation"] if "reference" in k]


SMALL = dict(epochs=1, batch_size=4, encoder_depth=3, decoder_channels=[16, 8, 8], precision="32-true", name="tiny", test_fraction=0.5)


def pretrained(folder):
    "A run folder with encoders, as pretraining leaves it, untrained."
    model = CrossModalSegmenter({"s1": 2, "s2": 13}, encoder="resnet18", encoder_depth=3, decoder_channels=(16, 8, 8))
    run = Run.create(preset("demo", encoder_depth=3, decoder_channels=(16, 8, 8), name="before", runs=str(folder)))
    for s in ("s1", "s2"): save_encoder(model, s, run.encoders / s)
    return run


def test_starts_are_compared(root, tmp_path):
    store = prepare(ScenesSource(count=6, size=32, seasons=1), tmp_path / "store", progress=False)
    pretrained(tmp_path / "runs")
    given = dict(data=str(store.folder), runs=str(tmp_path / "runs"), stores=str(tmp_path / "stores"), seeds="0,1", inputs="s2,s1+s2", modes="frozen", **SMALL)
    done, book = papermill(root, tmp_path / "out.ipynb", "finetune", **given)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not [o for o in outputs(book) if o["output_type"] == "error" or o.get("name") == "stderr"] and len(pictures(book)) == 4
    assert "3 tiles to train on" in str(book) and "8 runs" in str(book) and "of 2" in text(book) and "cromss predict" in str(book)
    assert len(list((tmp_path / "runs" / "tiny").glob("*/predictor/model.safetensors"))) == 8
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs" / "tiny").rglob("summary.json")}
    again, book = papermill(root, tmp_path / "again.ipynb", "finetune", **given)          # all runs are finished: they are read
    assert again.returncode == 0 and len(pictures(book)) == 4 and times == {p: p.stat().st_mtime_ns for p in times}


def test_a_task_without_a_pretrained_encoder_says_so(root, tmp_path):
    done, book = papermill(root, tmp_path / "out.ipynb", "finetune", runs=str(tmp_path / "runs"), stores=str(tmp_path / "stores"))
    error, = [o for o in outputs(book) if o["output_type"] == "error"]
    assert done.returncode != 0 and "no finished pretraining run with encoders of s2" in error["evalue"] and not (tmp_path / "stores").exists()


def test_a_mistyped_parameter_of_finetune(root, tmp_path):
    done, book = papermill(root, tmp_path / "out.ipynb", "finetune", seed=3)
    assert done.returncode != 0 and "unknown parameter 'seed'; did you mean 'seeds'?" in done.stderr


def test_an_ablation_is_run_and_read(root, tmp_path):
    given = dict(preset="smoke", methods="one-sensor,no-selection,cromss", seeds="0,1", transfer="", workers=2, runs=str(tmp_path / "runs"), stores=str(tmp_path / "stores"))
    done, book = papermill(root, tmp_path / "out.ipynb", "ablation", **given)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not [o for o in outputs(book) if o["output_type"] == "error" or o.get("name") == "stderr"] and len(pictures(book)) == 5
    assert "8 networks" in str(book) and "CromSS, as published" in text(book) and "tables" in str(book)
    assert len(list((tmp_path / "runs" / "ablation").glob("*/network.safetensors"))) == 8 and (tmp_path / "runs" / "ablation" / "tables" / "scores.csv").is_file()


def test_an_ablation_of_unknown_methods_is_refused(root, tmp_path):
    done, book = papermill(root, tmp_path / "out.ipynb", "ablation", methods="cromss,gcc", runs=str(tmp_path / "runs"))
    assert done.returncode != 0 and "unknown method 'gcc'; did you mean 'gce'?" in done.stderr and not (tmp_path / "runs").exists()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to find the kernel")
def test_a_signal_to_the_kernel_ends_it_with_the_command_that_goes_on(root, tmp_path):
    "As SLURM's USR1 to every process of a job: the notebook keeps what it has shown, and says how to go on."
    store, runs = prepare(ScenesSource(count=8, size=32), tmp_path / "store", progress=False), tmp_path / "runs"
    given = dict(data=str(store.folder), runs=str(runs), stores=str(tmp_path / "stores"), **TINY | {"epochs": 400})
    def tell():
        while not (runs / "tiny" / "metrics.csv").exists(): time.sleep(0.1)
        lines = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout.splitlines()
        kernels = [int(line.split()[0]) for line in lines if "ipykernel_launcher" in line and _parent_of(int(line.split()[0])) == os.getpid()]
        for pid in kernels: os.kill(pid, signal.SIGUSR1)
    threading.Thread(target=tell, daemon=True).start()
    done, book = papermill(root, tmp_path / "out.ipynb", **given)
    error, = [o for o in outputs(book) if o["output_type"] == "error"]
    run, = list_runs(runs)
    assert done.returncode != 0 and error["ename"] == "Interrupted" and "stopped by SIGUSR1" in error["evalue"]
    assert f"go on by: papermill nbs/pretrain.ipynb out.ipynb -p resume {run.folder}" in error["evalue"] and f"{run.folder}: 0 of 800 steps are done" in text(book)
    finished = len(run.metrics())
    assert 0 < finished < 400 and list(run.checkpoints.glob("*.ckpt"))


def _parent_of(pid):
    "The process that started the one that started this process: papermill stands between."
    def parent(pid): return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    try: return parent(parent(pid))
    except (OSError, ValueError): return None
