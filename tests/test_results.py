"The published tables: every number as in the source, the commands of every row as the package takes them, own runs beside them; and the scripts that run rows on clusters."
import inspect
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from cromss import results
from cromss.config import ConfigError, DataError, TransferConfig, preset
from cromss.results import METRICS, MODES, SENSORS, TASKS, beside, command, needs, plan, plot_published, preparation, published, row_name, wide

EVERY_ROW = [(task, sensor, name) for task in TASKS for sensor in SENSORS for name in wide(task, sensor).index]
NUMBER = r"\d+\.\d+±\d+\.\d+"


# the transcription ------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def source(root):
    "{(task, sensor, row, mode, metric): \"mean±std\"} of the document that the tables were transcribed from, read by its own rules."
    path = root.parent / "shared" / "published-results.md"
    if not path.is_file(): pytest.skip("no shared/published-results.md beside the checkout: the transcription cannot be compared with its source")
    chapters = re.split(r"^### 4\.\d ", path.read_text(encoding="utf-8"), flags=re.M)[1:4]
    found = {}
    for task, chapter in zip(TASKS, chapters):
        sensor = None
        for line in chapter.splitlines()[1:]:
            if line.strip() in ("S1", "S2"): sensor = line.strip().lower()
            numbers = re.findall(NUMBER, line)
            if sensor is None or "//" not in line or len(numbers) != 8: continue
            name = " ".join(word for word in line[:re.search(NUMBER, line).start()].split() if word not in ("ViT-L", "R50"))     # the network, which the chapter's title says
            for i, number in enumerate(numbers): found[task, sensor, name, list(MODES)[i // 4], METRICS[i % 4]] = number
    return found


def test_every_number_is_the_sources(source):
    ours = {(r.task, r.sensor, row_name(r.method, r.bands), r.mode, r.metric): f"{r.mean:.2f}±{r.std:.2f}" for r in published().itertuples()}
    assert len(source) == 480 and ours == source


def test_the_files_hold_the_digits_as_text(source, root):
    "No rounding on the way: the CSV files' own text is the source's."
    for task in TASKS:
        for r in pd.read_csv(root / "nbs" / "published" / f"{task}.csv", dtype=str, keep_default_na=False).itertuples():
            assert source[r.task, r.sensor, row_name(r.method, r.bands or None), r.mode, r.metric] == f"{r.mean}±{r.std}" and r.task == task and TASKS[task] in r.source


def test_the_form_of_the_tables():
    table = published()
    assert list(table) == ["task", "sensor", "method", "bands", "mode", "metric", "mean", "std", "source"]
    assert len(table) == 480 and not table.duplicated(["task", "sensor", "method", "bands", "mode", "metric"]).any()
    assert table.groupby(["task", "sensor"]).size().to_dict() == {(t, s): 48 if s == "s1" else 112 for t in TASKS for s in SENSORS}
    assert table["mean"].between(15, 90).all() and table["std"].between(0, 10).all() and set(table["metric"]) == set(METRICS)
    iou, f1 = (table[table.metric == m].set_index(["task", "sensor", "method", "bands", "mode"])["mean"] for m in ("mIoU", "mF1"))
    assert (iou < f1).all()                                                    # of every class F1 is above IoU, so of the means
    assert table[table.sensor == "s2"]["bands"].notna().all()


def test_choosing():
    assert set(published("dw")["task"]) == {"dw"} and set(published(sensor="s1")["sensor"]) == {"s1"} and set(published(mode="finetuned")["mode"]) == {"finetuned"}
    assert len(published("osm", "s1", "frozen")) == 24 and published("osm").index[0] == 0
    changed = published()
    changed.loc[0, "mean"] = -1
    assert published().loc[0, "mean"] == 49.15


@pytest.mark.parametrize("arguments, message", [(("dfc",), "did you mean 'dfc2020'"), (("dw", "S2"), "unknown sensor 'S2'"), (("dw", "s2", "finetune"), "did you mean 'finetuned'")])
def test_unknown_names_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message): published(*arguments)


def test_an_installation_without_the_tables_says_so(monkeypatch, tmp_path):
    results._tables.cache_clear()
    monkeypatch.setattr(results.cromss, "__file__", str(tmp_path / "cromss" / "__init__.py"))
    try:
        with pytest.raises(ConfigError, match="no published tables .* install the package anew"): published()
    finally: results._tables.cache_clear()


def test_tables_in_an_installed_package_come_first(monkeypatch, tmp_path, root):
    results._tables.cache_clear()
    (tmp_path / "cromss" / "published").mkdir(parents=True)
    for task in TASKS: (tmp_path / "cromss" / "published" / f"{task}.csv").write_bytes((root / "nbs" / "published" / f"{task}.csv").read_bytes())
    monkeypatch.setattr(results.cromss, "__file__", str(tmp_path / "cromss" / "__init__.py"))
    try: assert len(published()) == 480 and results._file("dw") == tmp_path / "cromss" / "published" / "dw.csv"
    finally: results._tables.cache_clear()


def test_wide():
    table = wide("dfc2020", "s2")
    assert table.loc["CromSS-midF 13B", ("frozen", "mIoU")] == "42.52±0.11" and table.loc["CromSS-midF 13B", ("fine-tuned", "OA")] == "70.41±0.35"
    assert table.shape == (14, 8) and list(table.index[:2]) == ["scaleMAE 3B", "DOFA 9B"] and not table.isna().any().any()
    assert list(wide("dw", "s1").index) == ["DOFA", "random", "MoCo", "DeCUR", "CromSS-midF 13B", "CromSS-lateF 13B"]


def test_the_figure_has_a_dot_for_every_mean():
    figure = plot_published()
    assert len(figure.axes) == 6
    for axis, (sensor, task) in zip(figure.axes, [(s, t) for s in ("s2", "s1") for t in TASKS]):
        rows = [label.get_text() for label in axis.get_yticklabels()]
        assert sorted(rows) == sorted(wide(task, sensor).index) and axis.get_title() == f"{TASKS[task]}, {SENSORS[sensor]}"
        dots = [(line.get_marker(), *map(float, (line.get_xdata()[0], line.get_ydata()[0]))) for line in axis.lines if line.get_marker() in ("o", "D")]
        for marker, mode in (("o", "frozen"), ("D", "fine-tuned")):
            shown = {rows[round(y)]: x for form, x, y in dots if form == marker}
            assert shown == {name: float(text.partition("±")[0]) for name, text in wide(task, sensor)[mode, "mIoU"].items()}
        means = [x for form, x, _ in dots if form == "o"]
        assert means == sorted(means)
    figure.canvas.draw()


# commands ---------------------------------------------------------------------------------------------------------------------------

def fields_of(line):
    "The options of a command as {field: value}."
    words = shlex.split(line)
    options = words[next(i for i, w in enumerate(words) if w.startswith("--")):]
    assert len(options) % 2 == 0
    return {name[2:]: yaml.safe_load(value) if value.startswith(("{", "[")) else value for name, value in zip(options[::2], options[1::2])}


@pytest.mark.parametrize("task, sensor, name", EVERY_ROW)
def test_a_rows_command_is_a_configuration(task, sensor, name):
    line = command(task, sensor, name, "finetuned", 7)
    if line is None:
        assert name.startswith(("scaleMAE", "satMAE", "DOFA")) and "does not read" in needs(task, sensor, name)
        return
    given = fields_of(line)
    assert given.pop("seed") == "7" and line.startswith("cromss finetune --preset published-")
    config = preset(given.pop("preset"), kind=TransferConfig, seed=7, **given)
    assert config.sensors == (sensor,) and config.mode == "finetuned" and config.absent_class == "one" and config.classes == ("dynamic-world" if task == "dw" else task)
    if "CromSS" in name: assert re.fullmatch(r"weights-cromss-(9|13)B-(mid|late)Fusion-epoch=199\.ckpt", config.encoders) and (name.split()[-1] in config.encoders or sensor == "s1")
    if name == "random 9B": assert config.bands == {"s2": 9}
    assert config.data == f"stores/{task}-train" and config.test == f"stores/{task}-test" and re.fullmatch(r"[a-z0-9-]+", config.name)
    assert config.encoders.partition(":")[0] in needs(task, sensor, name) or config.encoders == "random"


def test_runs_have_names_of_their_own():
    names = [fields_of(line)["name"] for task, sensor, row in EVERY_ROW for mode in MODES for seed in (42, 43) if (line := command(task, sensor, row, mode, seed))]
    assert len(set(names)) == len(names) == 4 * sum(command(*row) is not None for row in EVERY_ROW)


def test_peers_exist_for_their_sensor_and_bands():
    from cromss.peers import PEERS
    for task, sensor, name in EVERY_ROW:
        if not (line := command(task, sensor, name)) or name.startswith(("CromSS", "random")): continue
        peer = PEERS[fields_of(line)["encoders"]]
        assert peer.sensor == sensor and peer.contract.sensor.num_bands == (2 if sensor == "s1" else int(name.split()[-1][:-1])), name


def test_stores_are_made_by_options_that_the_sources_know():
    from cromss.trees import DFC2020Source, NoLDOSource
    for task, source in (("dfc2020", DFC2020Source), ("dw", NoLDOSource), ("osm", NoLDOSource)):
        lines = preparation(task)
        assert [shlex.split(line)[3] for line in lines] == [f"stores/{task}-train", f"stores/{task}-test"]
        for line in lines:
            given = fields_of(line)
            known = inspect.signature(source).parameters
            assert set(given.pop("options")) == {"split"} <= set(known) and set(given) <= set(known) and given["coding"] == "raw"


def test_a_plan_has_every_row():
    for task in TASKS:
        table = plan(task, "finetuned")
        assert len(table) == 20 and (table["command"] == "not run here").sum() == 4 and table["needs"].str.startswith(TASKS[task]).all()
        assert table["command"].str.contains("--mode finetuned").sum() == 16
    assert "sbatch scripts/finetune.slurm dw-s1-moco --preset published-dw" in plan("dw", by="sbatch").loc[("s1", "MoCo"), "command"]


@pytest.mark.parametrize("call, message", [
    (lambda: command("dw", "s2", "CromSS-midF"), "did you mean 'CromSS-midF 9B'|did you mean 'CromSS-midF 13B'"), (lambda: command("dw", "s2", "MoCo 13B", "tuned"), "unknown mode"),
    (lambda: command("dw", "s2", "MoCo 13B", by="slurm"), "way to run"), (lambda: needs("dws", "s2", "MoCo 13B"), "did you mean 'dw'"), (lambda: preparation("osn"), "did you mean 'osm'"),
    (lambda: plan("dfc"), "dfc2020")])
def test_rows_that_are_not_there_are_refused(call, message):
    with pytest.raises(ConfigError, match=message): call()


# own runs ---------------------------------------------------------------------------------------------------------------------------

def run(seed=42, **changes):
    return dict(task="dfc2020", sensor="s2", method="MoCo 13B", mode="frozen", seed=seed, oa=0.63 + seed / 1000, aa=0.45, miou=0.37, mf1=0.49) | changes


def test_beside():
    table = beside(pd.DataFrame([run(0), run(2), run(0, method="ours"), run(0, method="MoCo 13B", mode="finetuned", miou=math.nan)]), "dfc2020", "s2")
    row = table.loc[("dfc2020", "s2", "frozen", "MoCo 13B")]
    assert row["published"].to_dict() == {"OA": "63.19±0.70", "AA, as published": "50.76±0.34", "mIoU": "37.57±0.72", "mF1": "49.83±0.60"}
    assert row["here"].to_dict() == {"OA": "63.10±0.14", "AA, mean recall": "45.00±0.00", "mIoU": "37.00±0.00", "mF1": "49.00±0.00", "runs": "2"}
    assert len(table) == 29 and not table.isna().any().any() and not (table == "").any().any()
    assert table.loc[("dfc2020", "s2", "finetuned", "MoCo 13B"), ("here", "mIoU")] == "-"                      # a figure that is NaN shows
    ours = table.loc[("dfc2020", "s2", "frozen", "ours")]
    assert set(ours["published"]) == {"not published"} and ours["here", "OA"] == "63.00" and ours["here", "runs"] == "1"
    other = table.loc[("dfc2020", "s2", "frozen", "CromSS-midF 9B")]
    assert other["here", "OA"] == "not run" and other["here", "runs"].startswith("not run: needs DFC2020") and "weights-cromss-9B-midFusion-epoch=199.ckpt" in other["here", "runs"]
    assert table.loc[("dfc2020", "s2", "frozen", "scaleMAE 3B"), ("here", "runs")].startswith("cannot be run here: needs")


def test_a_mean_precision_stands_beside_the_published_aa_where_it_is_given():
    table = beside(pd.DataFrame([run(0, mprecision=0.5), run(1, mprecision=0.52)]), "dfc2020", "s2", "frozen")
    assert table.loc[("dfc2020", "s2", "frozen", "MoCo 13B"), ("here", "mean precision")] == "51.00±1.41" and table.loc[("dfc2020", "s2", "frozen", "DINO 13B"), ("here", "mean precision")] == "not run"
    with pytest.raises(DataError, match="mprecision, miou, mf1 are fractions"): beside(pd.DataFrame([run(mprecision=51)]))


def test_beside_chooses_of_both():
    runs = pd.DataFrame([run(), run(task="mine", method="ours")])
    assert len(beside(runs, "dw", "s1", "frozen")) == 6 and len(beside(runs)) == 121 and ("mine", "s2", "frozen", "ours") in beside(runs).index
    assert len(beside(pd.DataFrame(columns=list(run())), "osm", mode="finetuned")) == 20


@pytest.mark.parametrize("rows, message", [
    ([{k: v for k, v in run().items() if k not in ("seed", "aa")}], "runs without seed, aa"), ([run(oa=63.2)], "divide percent by 100"), ([run(miou=-0.1)], "fractions"),
    ([run(), run()], "dfc2020 s2 frozen MoCo 13B 42: there are two runs"), ([run(oa="high")], "must be numbers"), ([run(fraction=0.1)], "fraction below 1")])
def test_rows_of_another_form_are_refused(rows, message):
    with pytest.raises(DataError, match=message) as e: beside(pd.DataFrame(rows))
    assert "\n" not in str(e.value)


def test_beside_refuses_unknown_names():
    with pytest.raises(ConfigError, match="unknown task"): beside(pd.DataFrame([run()]), "dfc")


# scripts ----------------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def machine(tmp_path, root):
    "Runs a script of scripts/ where `cromss`, `srun` and `scontrol` only write down how they were called."
    bin, log = tmp_path / "bin", tmp_path / "log"
    bin.mkdir()
    def program(name, text):
        (bin / name).write_text(f"#!/bin/bash\n{text}\n")
        (bin / name).chmod(0o755)
    program("cromss", f'echo "cromss gpu=$CUDA_VISIBLE_DEVICES world=${{WORLD_SIZE:-none}} $*" >> "{log}"; exit ${{CODE:-0}}')
    program("srun", '"$@"')
    program("scontrol", f'echo "scontrol $*" >> "{log}"')
    def start(script, *arguments, **variables):
        env = {**os.environ, "PATH": os.pathsep.join([str(bin), str(Path(sys.executable).parent), os.environ["PATH"]]), **variables}
        done = subprocess.run(["bash", str(root / "scripts" / script), *arguments], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        return done, sorted(log.read_text().splitlines()) if log.exists() else []
    return start


needs_bash = pytest.mark.skipif(os.name != "posix", reason="needs bash")


@needs_bash
@pytest.mark.parametrize("element, mode, seed", [(0, "frozen", 42), (1, "finetuned", 42), (9, "finetuned", 46)])
def test_an_element_of_the_job_array_is_a_run(machine, element, mode, seed):
    done, calls = machine("finetune.slurm", "row", "--data", "a b", "--bands", "{s2: 9}", SLURM_ARRAY_TASK_ID=str(element), SLURM_JOB_ID="5", CUDA_VISIBLE_DEVICES="3")
    assert done.returncode == 0 and calls == [f"cromss gpu=3 world=none finetune --data a b --bands {{s2: 9}} --mode {mode} --seed {seed} --name row-{mode}-{seed} --resume auto"]


@needs_bash
def test_a_job_that_was_stopped_is_queued_again_and_one_that_failed_is_not(machine):
    done, calls = machine("finetune.slurm", "row", SLURM_ARRAY_TASK_ID="0", SLURM_JOB_ID="5", CODE="75")
    assert done.returncode == 0 and "scontrol requeue 5" in calls
    done, calls = machine("finetune.slurm", "row", SLURM_ARRAY_TASK_ID="0", SLURM_JOB_ID="6", CODE="2")
    assert done.returncode == 2 and "scontrol requeue 6" not in calls


@needs_bash
@pytest.mark.parametrize("arguments, variables, message", [
    ((), {"SLURM_ARRAY_TASK_ID": "0"}, "give the runs a name"), (("row",), {}, "this is a job array"), (("row",), {"SLURM_ARRAY_TASK_ID": "4", "SEEDS": "1 2"}, "so --array=0-3")])
def test_a_job_that_cannot_be_says_why(machine, arguments, variables, message):
    done, calls = machine("finetune.slurm", *arguments, **variables)
    assert done.returncode != 0 and message in done.stderr and not calls


@needs_bash
def test_processes_of_one_machine_share_the_runs(machine):
    done, calls = machine("finetune-torchrun.sh", "row", "--data", "a b", PROCESSES="2", SEEDS="1 2 3", CUDA_VISIBLE_DEVICES="4,6")
    assert done.returncode == 0, done.stderr[-1000:]
    assert calls == sorted(f"cromss gpu={gpu} world=none finetune --data a b --mode {mode} --seed {seed} --name row-{mode}-{seed} --resume auto"
                           for gpu, runs in (("4", [("frozen", 1), ("frozen", 3), ("finetuned", 2)]), ("6", [("frozen", 2), ("finetuned", 1), ("finetuned", 3)])) for mode, seed in runs)


@needs_bash
def test_a_run_that_fails_ends_its_process(machine):
    done, calls = machine("finetune-torchrun.sh", "row", PROCESSES="1", SEEDS="1 2", CODE="2")
    assert done.returncode != 0 and len(calls) == 1


@needs_bash
def test_the_scripts_are_the_ones_that_commands_name(root):
    for by, script in (("sbatch", "finetune.slurm"), ("torchrun", "finetune-torchrun.sh")):
        assert f"scripts/{script} dw-s2-moco-13b --preset" in command("dw", "s2", "MoCo 13B", by=by)
        subprocess.run(["bash", "-n", str(root / "scripts" / script)], check=True)
    assert os.access(root / "scripts" / "finetune-torchrun.sh", os.X_OK)
