"The cromss command: layering of settings, one-line errors, exit codes. In process, for an interpreter costs seconds."
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from cromss import cli
from cromss.config import ConfigError, PretrainConfig, SelectionConfig, change, preset, save_config


def run(capsys, *tokens):
    "Exit code, stdout and stderr of a call."
    capsys.readouterr()
    try: code = cli.main([str(t) for t in tokens])
    except SystemExit as e: code = e.code or 0
    out, err = capsys.readouterr()
    return code, out, err


# settings --------------------------------------------------------------------------------------------------------------------------

def test_without_options_the_demo():
    assert cli.read_config([]) == preset("demo")


@pytest.mark.parametrize("tokens, field, value", [
    (["--epochs", "3"], "epochs", 3),
    (["--batch-size=4"], "batch_size", 4),
    (["--batch_size", "4"], "batch_size", 4),
    (["--learning-rate", "5e-3"], "learning_rate", 5e-3),
    (["--sensors", "s2"], "sensors", ("s2",)),
    (["--sensors", "[s2, s1]"], "sensors", ("s2", "s1")),
    (["--sensors=s1,s2,dem"], "sensors", ("s1", "s2", "dem")),
    (["--bands", "{s2: [B4, B3]}"], "bands", {"s2": ["B4", "B3"]}),
    (["--bands", "{s2: 9}"], "bands", {"s2": 9}),
    (["--decoder_channels", "32,16"], "decoder_channels", (32, 16)),
    (["--encoder_depth", "null"], "encoder_depth", None),
    (["--rotation", "true"], "rotation", True),
    (["--devices", "2"], "devices", 2),
    (["--name", "20240101"], "name", "20240101"),
    (["--selection", "false"], "selection", None),
    (["--selection=off"], "selection", None),
    (["--selection", "true"], "selection", preset("demo").selection),
    (["--smoothing.kind", "t"], "smoothing", preset("demo", smoothing={"kind": "t"}).smoothing),
    (["--preset", "paper", "--selection.keep", "0.7"], "selection", SelectionConfig(method="exact", keep=0.7)),
    (["--preset", "paper", "--selection.per-class", "false"], "selection", SelectionConfig(method="exact", per_class=False)),
])
def test_every_kind_of_value(tokens, field, value):
    assert getattr(cli.read_config(tokens), field) == value


def test_options_over_file_over_preset(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("preset: paper\nepochs: 50\nbatch_size: 16\nselection: {keep: 0.4}\nsmoothing: false\n")
    config = cli.read_config(["--config", str(path), "--epochs", "7"])
    assert (config.preset, config.epochs, config.batch_size, config.learning_rate) == ("paper", 7, 16, 5e-3)
    assert config.selection == SelectionConfig(method="exact", keep=0.4) and config.smoothing is None


@pytest.mark.parametrize("config", [
    preset("demo"), preset("paper", epochs=3), preset("demo", selection=False, smoothing=False), PretrainConfig(encoder="resnet50")],
    ids=["demo", "paper", "switched off", "no preset's"])
def test_a_runs_config_gives_the_same_run(config, tmp_path):
    save_config(config, tmp_path / "config.yaml")
    assert cli.read_config(["--config", str(tmp_path / "config.yaml")]) == config


def test_print_config_is_a_config_file(capsys, tmp_path):
    code, out, _ = run(capsys, "pretrain", "--preset", "paper", "--epochs", 9, "--print-config")
    (tmp_path / "again.yaml").write_text(out)
    assert code == 0 and cli.read_config(["--config", str(tmp_path / "again.yaml")]) == preset("paper", epochs=9)


def test_every_field_has_an_option_and_a_help(capsys):
    code, out, _ = run(capsys, "pretrain", "--help")
    assert code == 0
    for name, comment in cli.field_comments(PretrainConfig).items(): assert f"--{name} " in out and comment[:12].split(" ")[0] in out, name
    for name, cls in cli.NESTED.items():
        for field in cli.field_comments(cls): assert f"--{name}.{field}" in out


# mistakes --------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tokens, message", [
    (["pretrain", "--epoch", "3"], "unknown option '--epoch'; did you mean '--epochs'?"),
    (["pretrain", "--selection.kep", "1"], "did you mean '--selection.keep'?"),
    (["pretrain", "--epochs", "x"], "--epochs: expected int, got x"),
    (["pretrain", "--epochs"], "--epochs: expected one argument"),
    (["pretrain", "--epochs", "0"], "epochs=0: must be a whole number"),
    (["pretrain", "--selection.keep", "1.5"], "selection.keep=1.5"),
    (["pretrain", "--bands", "nine"], "--bands: expected"),
    (["pretrain", "--preset", "papr"], "preset='papr': choose one of 'demo', 'paper'"),
    (["pretrain", "--config", "no.yaml"], "no.yaml: cannot be read"),
    (["pretrain", "stray"], "unrecognized arguments: stray"),
    (["pretran"], "unknown command 'pretran'; did you mean 'pretrain'?"),
    (["verify"], "required: folder"),
    (["prepare", "only-one"], "required: folder"),
    (["init"], "required: folder"),
])
def test_a_mistake_is_one_line_and_exit_code_2(capsys, tokens, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *tokens)
    assert code == 2 and not out and err.count("\n") == 1 and err.startswith("cromss: ") and message in err
    assert not list(tmp_path.iterdir())


def test_mistakes_in_a_file_name_it(capsys, tmp_path):
    path = tmp_path / "mine.yaml"
    for text, message in (("epoch: 3\n", "did you mean 'epochs'?"), ("config_version: 99\n", "config_version 99"), ("a: [", "not valid YAML"),
                          ("selection: {kep: 1}\n", "did you mean 'keep'?")):
        path.write_text(text)
        code, _, err = run(capsys, "pretrain", "--config", path)
        assert code == 2 and message in err, err


def test_an_error_may_bring_its_exit_code(capsys, monkeypatch):
    def stop(tokens):
        error = ConfigError("stopped;\n resumable")
        error.exit_code = 75
        raise error
    monkeypatch.setitem(cli.COMMANDS, "verify", (stop, "", ""))
    assert run(capsys, "verify") == (75, "", "cromss: stopped; resumable\n")


def test_interrupted(capsys, monkeypatch):
    def stop(tokens): raise KeyboardInterrupt
    monkeypatch.setitem(cli.COMMANDS, "verify", (stop, "", ""))
    assert run(capsys, "verify")[0] == 130


# commands --------------------------------------------------------------------------------------------------------------------------

def fake(monkeypatch, name, **members):
    module = types.ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def test_dry_run_and_run(capsys, monkeypatch):
    seen = []
    def estimate(config): return {"steps": 12345, "memory_gb": 1.23456, "sensors": ("s1", "s2"), "exact": True}
    def pretrain(config): return seen.append(config) or types.SimpleNamespace(folder=Path("runs/x"), config=config, summary=lambda: {})
    warning = ["selection.keep=0.5, but far more labels are right"]
    fake(monkeypatch, "cromss.pretraining", estimate=estimate, pretrain=pretrain, process_count=lambda config: 1, advice=lambda *_: warning.pop() if warning else None)
    assert run(capsys, "pretrain", "--dry-run")[:2] == (0, "steps      12,345\nmemory_gb  1.235\nsensors    s1, s2\nexact      True\n") and not seen
    assert run(capsys, "pretrain") == (0, f"{Path('runs/x')}\n", "cromss: selection.keep=0.5, but far more labels are right\n") and seen.pop()
    assert run(capsys, "pretrain", "--epochs", 2)[:2] == (0, f"{Path('runs/x')}\n") and seen == [preset("demo", epochs=2)]
    monkeypatch.setenv("RANK", "1")
    assert run(capsys, "pretrain")[:2] == (0, "")


def test_prepare_passes_what_was_given(capsys, monkeypatch, tmp_path):
    seen = {}
    class Store:
        folder, source, season_count, sensors = tmp_path, "plain layout", 4, {"s1": types.SimpleNamespace(num_bands=2)}
        manifest = {"info": {"report": {"dropped": {"missing sensor": ["a", "b", "c", "d"]}, "dropped_seasons": {"no label": ["e 2020"]}, "details": {"no label": ["e/2020: no label.tif"]},
                                        "class_shares": {"water": 0.2, "trees": 0.8}, "clipped": {"s2": {"B1": 0.0951, "B2": 0.01}}, "grid_offsets": {"s1": {"median": [-4, -3], "largest": 4}},
                                        "days_between_sensors": {"median": 2, "largest": 11.3}, "reference": {"agreement": 0.695}}}}
        def __len__(self): return 1234
    def prepare(source, folder, **options):
        seen.update(source=source, folder=folder, **options)
        return Store()
    fake(monkeypatch, "cromss.prepare", prepare=prepare)
    code, out, _ = run(capsys, "prepare", "data", "out dir", "--allow-resample", "--patch", 64, "--sensors", "s1,dem")
    assert code == 0 and seen == dict(source="data", folder="out dir", allow_resample=True, patch=64, sensors=("s1", "dem"))
    assert "1,234 locations, 4 seasons, s1 (2 bands)" in out and "locations left out, missing sensor: 4 (a, b, c, ...)" in out and "seasons left out, no label: 1 (e 2020); e/2020: no label.tif" in out
    assert "read as: plain layout" in out and "classes: trees 80.0%, water 20.0%" in out and "mean ± 2 std: s2 B1 9.5%\n" in out
    assert "grid of s1: 4.00 px west and 3.00 px north of the others" in out and "2.0 (median), 11.3 at most" in out and "agree with the reference: 69.5%" in out


def test_prepare_takes_options_of_any_kind(capsys, monkeypatch):
    seen = {}
    def prepare(source, folder, **options): seen.update(options); raise ConfigError("enough")
    fake(monkeypatch, "cromss.prepare", prepare=prepare)
    code, _, err = run(capsys, "prepare", "data", "out", "--options", "{split: val, labels: dw}", "--bands", "{s2: 9}", "--workers", 0, "--restart", "--scheduler", "tcp://a:1", "--shard-size", 8)
    assert code == 2 and err == "cromss: enough\n"
    assert seen == dict(split="val", labels="dw", bands={"s2": 9}, workers=0, restart=True, scheduler="tcp://a:1", shard_size=8)


def test_prepare_refuses_an_option_that_is_given_twice(capsys):
    assert run(capsys, "prepare", "data", "out", "--options", "{sensors: [s1]}", "--sensors", "s2") == (2, "", "cromss: sensors: given by --sensors and by --options; leave out one\n")


def test_warnings_are_one_line(capsys, monkeypatch):
    import warnings
    def prepare(source, folder, **options):
        warnings.warn("a.tif: seems shifted")
        raise ConfigError("enough")
    fake(monkeypatch, "cromss.prepare", prepare=prepare)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", lambda message, *place, **more: print(warnings.formatwarning(message, *place), end="", file=sys.stderr))
        assert run(capsys, "prepare", "data", "out")[2] == "cromss: a.tif: seems shifted\ncromss: enough\n"


def test_prepare_lists_every_format(capsys):
    from cromss.sources import known_sources
    code, out, _ = run(capsys, "prepare", "--help")
    assert code == 0 and all(f"\n  {kind} " in out and source.layout in out for kind, source in known_sources().items())


def test_prepare_for_real_goes_on_and_refuses_in_one_line(capsys, tmp_path):
    assert run(capsys, "prepare", tmp_path / "nothing", tmp_path / "store")[::2] == (2, f"cromss: {tmp_path / 'nothing'}: no such file or folder\n")
    code, _, err = run(capsys, "prepare", tmp_path, tmp_path / "store", "--options", "{split: val}")
    assert code == 2 and "no data set was recognised" in err and err.count("\n") == 1
    code, out, _ = run(capsys, "prepare", "scenes", tmp_path / "store", "--options", "{count: 3, size: 32}")
    assert code == 0 and "3 locations, 4 seasons" in out
    assert run(capsys, "prepare", "scenes", tmp_path / "store")[0] == 2


def test_download(capsys, monkeypatch):
    from cromss import download as module
    seen = {}
    def download(what, folder, list_only=False, **options):
        seen.update(what=what, folder=folder, list_only=list_only, **options)
        return [module.HubFile("a/labels.zip", 2_000_000, "0" * 64, "missing"), module.HubFile("b.zip", 1_000, "0" * 64, "there")]
    monkeypatch.setattr(module, "download", download)
    code, out, _ = run(capsys, "download", "noldo-s12", "here", "--parts", "labels,dw", "--dry-run")
    assert code == 0 and seen == dict(what="noldo-s12", folder="here", list_only=True, parts=("labels", "dw"))
    assert "missing     a/labels.zip" in out and "here: 2 files" in out and "to fetch or check" in out
    assert run(capsys, "download", "noldo-s12", "here", "--prts", "dw")[2].startswith("cromss: ") and "noldo-s12" in run(capsys, "download", "--help")[1]


def test_verify_a_store(capsys, tmp_path):
    store = pytest.importorskip("cromss.store")
    import numpy as np
    from cromss.classes import SCHEMES
    from cromss.sensors import SENSORS
    image = np.arange(2 * 16 * 16, dtype=np.uint8).reshape(2, 16, 16)
    places = [store.Location(k, ("2020",), {"s1": [image]}, [image[0] % 9]) for k in "ab"]
    store.write_store(tmp_path / "st ore", places, {"s1": SENSORS["s1"]}, SCHEMES["dynamic-world"])
    code, out, err = run(capsys, "verify", tmp_path / "st ore")
    assert code == 0 and "locations  2" in out and "problems   0" in out
    shard = next((tmp_path / "st ore").glob("shard-*.lmdb"))
    content = bytearray(shard.read_bytes())
    at = content.find(bytes(range(64)))                    # inside an image
    content[at] ^= 1
    shard.write_bytes(content)
    code, out, _ = run(capsys, "verify", tmp_path / "st ore")
    assert code == 1 and "- " in out
    os.truncate(shard, 100)
    code, _, err = run(capsys, "verify", tmp_path / "st ore")
    assert code == 1 and err.count("\n") == 1
    code, _, err = run(capsys, "verify", tmp_path / "nothing")
    assert code == 2 and "cromss prepare" in err


def test_init_copies_and_does_not_overwrite(capsys, tmp_path, monkeypatch):
    template = tmp_path / "pretrain.ipynb"
    template.write_text("{}")
    monkeypatch.setattr(cli, "_templates", lambda: [template])
    code, out, _ = run(capsys, "init", tmp_path / "mine")
    assert code == 0 and out == f"{tmp_path / 'mine' / 'pretrain.ipynb'}\n" and (tmp_path / "mine" / "pretrain.ipynb").read_text() == "{}"
    (tmp_path / "mine" / "pretrain.ipynb").write_text("changed")
    code, _, err = run(capsys, "init", tmp_path / "mine")
    assert code == 2 and "not overwritten" in err and (tmp_path / "mine" / "pretrain.ipynb").read_text() == "changed"


def test_version_and_help(capsys):
    from cromss import __version__
    assert run(capsys, "--version")[:2] == (0, f"cromss {__version__}\n")
    for tokens in ((), ("--help",), ("-h",)):
        code, out, _ = run(capsys, *tokens)
        assert code == 0 and all(name in out for name in cli.COMMANDS)
    for name in cli.COMMANDS: assert run(capsys, name, "--help")[0] == 0


def test_help_imports_nothing_heavy():
    "In a process of its own: help is quick because no library is loaded, which can be told on a busy machine too."
    code = ("import sys, contextlib, io\nfrom cromss.cli import main\n"
            "with contextlib.redirect_stdout(io.StringIO()):\n    try: main(['pretrain', '--help'])\n    except SystemExit: pass\n"
            "print([m for m in ('torch', 'numpy', 'lightning', 'rasterio', 'matplotlib', 'pandas') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=Path(cli.__file__).parent.parent)
    assert done.stdout.strip() == "[]", done.stderr


def test_resume_takes_up_the_runs_configuration(tmp_path):
    "The command that the notebook prints: no option of the run has to be said again."
    made = preset("demo", runs=str(tmp_path), name="r", data="elsewhere", epochs=3, learning_rate=1e-3)
    (tmp_path / "r").mkdir()
    save_config(made, tmp_path / "r" / "config.yaml")
    found = cli.read_config(["--resume", str(tmp_path / "r"), "--num_workers", "2"])
    assert found == change(made, resume=str(tmp_path / "r"), num_workers=2)


# transfer

@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    "Six scenes of 32 px, one season, as a store."
    from cromss.prepare import prepare
    from cromss.scenes import ScenesSource
    return prepare(ScenesSource(count=6, size=32, seasons=1), tmp_path_factory.mktemp("tiles") / "store", progress=False)


@pytest.fixture(scope="module")
def trained(tiles, tmp_path_factory):
    "The folder of a run that `cromss finetune` made, and what it printed."
    runs = tmp_path_factory.mktemp("runs")
    options = dict(data=tiles.folder, runs=runs, name="t", epochs=1, test_fraction=0.5, encoder_depth=3, decoder_channels="16,8,8", batch_size=3, precision="32-true")
    done = subprocess.run([sys.executable, "-c", "import sys; from cromss.cli import main; sys.exit(main())", "finetune", *(f"--{k}={v}" for k, v in options.items())], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return runs / "t", done


def test_finetune_says_where_and_how_good(trained):
    folder, done = trained
    assert done.stdout.startswith(f"{folder}: OA 0.") and "mIoU" in done.stdout and "100%" in done.stderr


def test_finetune_dry_run_writes_nothing(tiles, tmp_path, capsys):
    assert cli.main(["finetune", "--dry-run", "--data", str(tiles.folder), "--test-fraction", "0.5", "--runs", str(tmp_path / "runs"), "--sensors", "s1,s2", "--mode", "frozen"]) == 0
    out = capsys.readouterr().out
    assert "3 tiles to train on" in out and "encoder of s1" in out and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("tokens, message", [
    (["finetune", "--mode", "warm"], "mode='warm': choose one of 'frozen', 'finetuned'"), (["finetune", "--selection.keep", "0.5"], "unknown option"),
    (["finetune", "--resume", "nowhere"], "not a run folder"), (["finetune", "--encoders", "nowhere"], "nowhere"), (["finetune", "--preset", "paper"], "preset='paper': choose one of 'demo', 'dfc2020'")])
def test_finetune_refuses_in_one_line(tokens, message, tmp_path, capsys):
    assert cli.main([*tokens, *([] if "--data" in tokens else ["--data", "scenes:balanced-40:1:4"]), "--stores", str(tmp_path)] if "keep" not in tokens[1] else tokens) == 2
    err = capsys.readouterr().err.strip()
    assert message in err and len([line for line in err.splitlines() if line.startswith("cromss:")]) == 1


def test_a_configuration_of_another_kind_is_refused(trained, capsys):
    assert cli.main(["pretrain", "--resume", str(trained[0])]) == 2
    assert "a transfer run, where one of pretrain is needed" in capsys.readouterr().err


def test_evaluate(trained, tiles, capsys):
    assert cli.main(["evaluate", str(trained[0]), str(tiles.folder), "--target", "reference"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].startswith("OA") and out.count("IoU") == 9 + 1 - out.count("not in the reference")
    assert cli.main(["evaluate", str(tiles.folder), str(tiles.folder)]) == 2 and "no predictor there" in capsys.readouterr().err


def test_predict(trained, tmp_path, capsys):
    import rasterio
    from cromss.scenes import ScenesSource
    source = ScenesSource(count=1, size=40, seasons=1)
    with rasterio.open(tmp_path / "scene.tif", "w", driver="GTiff", height=40, width=40, count=13, dtype="float32", crs="EPSG:32632", transform=rasterio.Affine(10, 0, 0, 0, -10, 0)) as f:
        f.write(source.scene("scene-00000").images["s2"][0].astype("float32"))
        for i, band in enumerate(source.sensors["s2"].bands, 1): f.set_band_description(i, band)
    command = ["predict", str(trained[0]), str(tmp_path / "map.tif"), str(tmp_path / "scene.tif")]
    assert cli.main(command) == 0
    with rasterio.open(tmp_path / "map.tif") as f: assert f.shape == (40, 40) and f.colormap(1)[0][:3] == (65, 155, 223)
    assert "1,600 px, 0 of them without a value" in capsys.readouterr().out and (tmp_path / "map-probabilities.tif").exists()
    assert cli.main(command) == 2 and cli.main([*command[:3], f"s1={tmp_path / 'scene.tif'}"]) == 2
    err = capsys.readouterr().err
    assert "map.tif" in err and "unknown sensor 's1'; did you mean 's2'" in err


def test_export(trained, tmp_path, capsys):
    for name in ("p.onnx", "p.pt2"): assert cli.main(["export", str(trained[0]), str(tmp_path / name), "--side", "32"]) == 0 and (tmp_path / name).stat().st_size > 1000
    assert cli.main(["export", str(trained[0]), str(tmp_path / "p.h5")]) == 2 and "ends in none of .onnx, .pt2" in capsys.readouterr().err


def test_push_and_pull_refuse_what_is_no_folder_of_weights(tmp_path, capsys):
    assert cli.main(["push", str(tmp_path), "me/mine"]) == 2 and str(tmp_path) in capsys.readouterr().err
