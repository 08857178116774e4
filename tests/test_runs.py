"The run folder: names, whole files on disks that refuse, and metrics that survive a second try."
import errno
import json
import math
import os
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

from cromss import runs as module
from cromss.config import ConfigError, load_config, preset
from cromss.runs import Run, environment, list_runs, write_whole


def config(folder, name="one", **changes): return preset("demo", runs=str(folder), name=name, **changes)


def refusal(make, *words):
    "The message of the ConfigError that `make` raises: one line, with all of the words."
    with pytest.raises(ConfigError) as e: make()
    message = str(e.value)
    assert "\n" not in message and all(w in message for w in words), message
    return message


@pytest.fixture
def run(tmp_path): return Run.create(config(tmp_path))


# the folder

def test_what_a_new_run_holds(tmp_path):
    run = Run.create(config(tmp_path, epochs=3, selection=False))
    assert run.folder == tmp_path / "one" and set(run.files()) == {"config.yaml", "environment.json"}
    assert {p.name for p in run.folder.iterdir() if p.is_dir()} == {"checkpoints", "figures", "encoders"}
    assert run.checkpoints == run.folder / "checkpoints" and run.encoders == run.folder / "encoders"
    assert load_config(run.folder / "config.yaml") == run.config == Run.open(run.folder).config
    assert run.metrics().empty and run.summary() == {} and repr(run) == f"Run({str(run.folder)!r})"


def test_its_environment(run):
    values = json.loads((run.folder / "environment.json").read_text())
    assert set(values) == {"started", "command", "python", "platform", "cores", "packages", "commit", "devices"}
    assert values["packages"]["numpy"] == np.__version__ and values["packages"]["cromss"] and values["command"] == sys.argv


def test_the_commit_and_changes_to_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert environment()["commit"] is None                              # no checkout here
    def git(*words): subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@y.z", *words], check=True, capture_output=True)
    (tmp_path / "a").write_text("1")
    git("init"), git("add", "a"), git("commit", "-m", "first")
    clean = environment()["commit"]
    (tmp_path / "a").write_text("2")
    assert len(clean) == 40 and environment()["commit"] == f"{clean}+changes"
    monkeypatch.setenv("PATH", "")
    assert environment()["commit"] is None                              # no git


def test_without_a_name_preset_and_time(tmp_path):
    run = Run.create(config(tmp_path, None))
    stem, stamp = run.folder.name.split("-", 1)
    assert stem == "demo" and time.strptime(stamp, "%Y%m%d-%H%M%S")


def test_a_relative_folder_counts_from_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Run.create(config("runs")).folder == tmp_path.resolve() / "runs" / "one" and Run.open("runs/one").config.name == "one"
    assert [r.folder.name for r in list_runs()] == ["one"]


@pytest.mark.parametrize("name", ["one", "20240101", "a b", "a.b-c_d+e=f", "Übung-1", "x" * 200])
def test_names(name, tmp_path): assert Run.create(config(tmp_path, name)).folder == tmp_path / name


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/a", "a\\b", "~", "~x", ".hidden", "-rf", " x", "a\n", "a\nb", "a\0", "a:b", "a*", "a?", "<b>", "$(x)", "a;b", "x'"])
def test_names_that_are_no_folder_name(name, tmp_path):
    refusal(lambda: Run.create(config(tmp_path, name)), "name=", "one folder name")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x" * 300, "ü" * 200])
def test_names_too_long_for_the_disk(name, tmp_path):
    refusal(lambda: Run.create(config(tmp_path, name)), "cannot be made")


def test_an_existing_run_is_refused(run):
    before = run.files()
    refusal(lambda: Run.create(run.config), "a run is here already", "choose another `name`", f"resume={str(run.folder)!r}")
    assert Run.open(run.folder).files() == before


def test_a_folder_that_holds_only_a_notebook_is_taken(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "pretrain.ipynb").write_text("{}")
    run = Run.create(config(tmp_path))
    assert set(run.files()) == {"config.yaml", "environment.json", "pretrain.ipynb"}


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "one").write_text("")
    refusal(lambda: Run.create(config(tmp_path)), "cannot be made", "choose another `runs` folder")


def test_opening_what_is_no_run(tmp_path):
    refusal(lambda: Run.open(tmp_path), "not a run folder")
    refusal(lambda: Run.open(tmp_path / "none"), "not a run folder")
    (tmp_path / "config.yaml").write_text("epocs: 3")
    refusal(lambda: Run.open(tmp_path), "did you mean 'epochs'?", "config.yaml")


def test_list_oldest_first(tmp_path):
    for i, name in enumerate("cab"):
        Run.create(config(tmp_path, name))
        os.utime(tmp_path / name / "config.yaml", (1000 + i, 1000 + i))
    (tmp_path / "no run").mkdir()
    (tmp_path / "file").write_text("")
    assert [r.config.name for r in list_runs(tmp_path)] == ["c", "a", "b"] and list_runs(tmp_path / "none") == []


def test_one_unreadable_run_does_not_hide_the_others(tmp_path):
    Run.create(config(tmp_path, "good"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("config_version: 99\n")
    with pytest.warns(UserWarning, match="other"): assert [r.config.name for r in list_runs(tmp_path)] == ["good"]


def test_blanks_umlauts_and_long_paths(tmp_path):
    deep = tmp_path.joinpath(*("a long name with blanks and ümläuts " + "x" * 60,) * 3)
    run = Run.create(config(deep))
    run.add_metrics({"epoch": 0, "train_loss": 1.0})
    assert len(str(run.folder)) > 200 and Run.open(run.folder).metrics()["train_loss"].tolist() == [1.0]


# metrics

def test_rows_of_a_second_try_replace_the_first(run):
    for epoch, loss in ((0, 3.0), (1, 2.0), (2, 1.0), (1, 2.5)): run.add_metrics({"epoch": epoch, "train_loss": loss})
    assert run.metrics()[["epoch", "train_loss"]].values.tolist() == [[0, 3.0], [1, 2.5]]
    run.add_metrics({"epoch": 0, "train_loss": 9.0})
    assert run.metrics()["train_loss"].tolist() == [9.0]


def test_columns_come_and_go(run):
    run.add_metrics({"epoch": 0, "train_loss": 3.0})
    run.add_metrics({"epoch": 1, "val_loss": 2.0})
    run.add_metrics({"epoch": 2, "train_loss": 1.0, "val_loss": 1.5, "val_miou_s1": 0.25})
    table = run.metrics()
    assert list(table) == ["epoch", "train_loss", "val_loss", "val_miou_s1"] and table["epoch"].tolist() == [0, 1, 2]
    assert table["train_loss"].isna().tolist() == [False, True, False] and table["val_miou_s1"].isna().tolist() == [True, True, False]


def test_numbers_are_kept_to_the_bit(run):
    values = [1 / 3, 1e-300, 12345678.9, -0.0, 5e-324]
    for i, v in enumerate(values): run.add_metrics({"epoch": i, "v": v})
    assert run.metrics()["v"].tolist() == values and run.metrics()["epoch"].dtype == np.int64


def test_many_epochs_of_tensors(run):
    for i in range(30): run.add_metrics({"epoch": i, "a": np.float32(i), "b": np.int64(i)})
    assert run.metrics()["a"].tolist() == list(range(30)) and len((run.folder / "metrics.csv").read_text().splitlines()) == 31


# whole files

def test_text_bytes_and_nothing_beside(tmp_path):
    write_whole(tmp_path / "a", "äöü\n")
    write_whole(tmp_path / "b", b"\x00\xff")
    assert (tmp_path / "a").read_bytes() == "äöü\n".encode() and (tmp_path / "b").read_bytes() == b"\x00\xff"
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}


@pytest.mark.parametrize("call, error", [("fsync", errno.ENOSPC), ("replace", errno.EACCES), ("fsync", errno.EIO)])
def test_the_old_content_stays_if_the_disk_refuses(tmp_path, monkeypatch, call, error):
    path = tmp_path / "a"
    write_whole(path, "old")
    def refuse(*args): raise OSError(error, os.strerror(error))
    monkeypatch.setattr(module.os, call, refuse)
    refusal(lambda: write_whole(path, "new"), "a: cannot be written", os.strerror(error), "free space, or choose another")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_full_disk(tmp_path):
    "A real one: a file system of 64 kB, where mounting is allowed."
    disk = tmp_path / "disk"
    disk.mkdir()
    if sys.platform != "linux" or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        write_whole(disk / "a", "old")
        refusal(lambda: write_whole(disk / "a", b"x" * 200_000), "No space left on device")
        assert (disk / "a").read_text() == "old" and [p.name for p in disk.iterdir()] == ["a"]
        run = Run.create(config(disk))
        run.add_metrics({"epoch": 0, "train_loss": 1.0})
        refusal(lambda: run.save_summary({"much": "x" * 200_000}), "No space left on device")
        assert run.metrics()["train_loss"].tolist() == [1.0] and run.summary() == {}
        (disk / "rest").write_bytes(b"")
        with pytest.raises(OSError), open(disk / "rest", "wb") as f: f.write(b"x" * 200_000)
        refusal(lambda: run.add_metrics({"epoch": 1, "train_loss": 2.0}), "No space left on device")
        assert run.metrics()["train_loss"].tolist() == [1.0]
    finally: subprocess.run(["umount", str(disk)], check=True)


def test_config_is_written_whole(tmp_path, monkeypatch):
    from pathlib import Path
    def refuse(self, *args, **kwargs):
        self.touch()                                                # what a full disk leaves: an empty file
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Path, "write_text", refuse)
    def no_space(*args): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(module.os, "fsync", no_space)
    refusal(lambda: Run.create(config(tmp_path)), "No space left on device")
    assert not (tmp_path / "one" / "config.yaml").exists()


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_folder_that_must_not_be_written(tmp_path):
    "In a process without root's rights, for root may write anywhere."
    code = ("import os, sys\n"
            "from cromss.config import ConfigError, preset\n"
            "from cromss.runs import Run, write_whole\n"
            "folder = sys.argv[1]\n"
            "os.chmod(folder, 0o555)\n"
            "if os.geteuid() == 0: os.setuid(65534)\n"
            "for make in (lambda: write_whole(folder + '/a', 'new'), lambda: Run.create(preset('demo', runs=folder, name='one'))):\n"
            "    try: make()\n"
            "    except ConfigError as e: print(e)\n"
            "print(open(folder + '/a').read())\n")
    folder = tmp_path / "closed"
    folder.mkdir()
    (folder / "a").write_text("old")
    parents = [p for p in (folder, *folder.parents) if p.stat().st_mode & 0o055 != 0o055 and p != folder]
    modes = [p.stat().st_mode for p in parents]
    for p in parents: p.chmod(0o755)                               # the temporary folder's parents are closed to others
    try: done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, cwd=os.getcwd())
    finally:
        for p, mode in zip(parents, modes): p.chmod(mode)
        folder.chmod(0o755)
    if "ModuleNotFoundError" in done.stderr or "PermissionError" in done.stderr and "import" in done.stderr: pytest.skip("the package cannot be read without root's rights")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 3, done.stdout + done.stderr
    assert "a: cannot be written (Permission denied)" in lines[0] and "cannot be made (Permission denied)" in lines[1] and lines[2] == "old"
    assert [p.name for p in folder.iterdir()] == ["a"]


def test_a_reader_never_sees_half_a_file(tmp_path):
    "A killed writer leaves the old file; its own is beside, and the next writer does not mind."
    path = tmp_path / "metrics.csv"
    write_whole(path, "epoch\n0\n")
    code = ("import os, sys\nfrom cromss import runs\nruns.os.fsync = lambda f: os._exit(9)\nruns.write_whole(sys.argv[1], 'half')\n")
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == 9
    assert path.read_text() == "epoch\n0\n" and len(list(tmp_path.iterdir())) == 2
    write_whole(path, "epoch\n1\n")
    assert path.read_text() == "epoch\n1\n" and list(tmp_path.glob("*.csv")) == [path]


# summary

def test_summary_is_json_without_nan(run):
    values = {"a": float("nan"), "b": [1, float("inf"), -math.inf], "c": {"d": np.float32("nan"), "e": np.float64(0.5), 3: (1, 2)}, "n": np.int64(7), "t": "text", "x": None,
              "yes": np.bool_(True)}
    run.save_summary(values)
    text = (run.folder / "summary.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert run.summary() == {"a": None, "b": [1, None, None], "c": {"d": None, "e": 0.5, "3": [1, 2]}, "n": 7, "t": "text", "x": None, "yes": True} == json.loads(text)


def test_figures_are_png(run):
    from matplotlib.figure import Figure
    figure = Figure()
    figure.subplots().plot([1, 2])
    assert run.save_figure(figure, "curve") is figure and (run.folder / "figures" / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert "figures/curve.png" in run.files()


def test_metrics_of_pandas(run):
    run.add_metrics({"epoch": 0, "text": "a,b"})
    assert isinstance(run.metrics(), pd.DataFrame) and run.metrics()["text"].tolist() == ["a,b"]
