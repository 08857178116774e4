"Settings: the presets field by field, what may be written in their place, and one line for each mistake."
from dataclasses import asdict, fields, replace

import pytest
import yaml

from cromss.config import (CONFIG_VERSION, PRESETS, ConfigError, PretrainConfig, SelectionConfig, SmoothingConfig, check_names, field_names, from_dict, load_config,
                           preset, project_root, resolve, run_config, save_config, to_dict)

# The published recipe; what it leaves to the network (depth 5, decoder 256..16) is smp's default, so None here.
PAPER = dict(
    preset="paper", sensors=("s1", "s2"), bands=None, classes=None, fusion="mid", architecture="unet", encoder="resnet50", encoder_depth=None, decoder_channels=None,
    norm="shared", epochs=200, batch_size=128, min_steps=1, learning_rate=5e-3, weight_decay=1e-8, schedule="plateau", patience=30, crop=256, rotation=True,
    seasons_required=4, validation=0.01, validation_block_km=0, loss="ce+dice", consistency="ce",
    selection=SelectionConfig(confidence="entropy", ramp="exp", ramp_epochs=80, keep=0.5, method="exact", per_class=True),
    smoothing=SmoothingConfig(kind="ts", prior_weight=0.15, uniform_weight=0.05, sigma=3.0, truncate=4.0),
    robust=None, teachers=(), label_share=0.2, season_share=0.0, seed=42, precision="16-mixed", accumulate=1, grid="array", resume=None)
LOCAL = {"data", "name", "num_workers", "devices", "nodes", "stores", "runs", "loggers", "compile", "deterministic", "checkpoint_steps", "snapshots", "snapshot_places"}     # decided by the machine, not by the method


def refusal(make, *words):
    "The message of the ConfigError that `make` raises: one line, with all of the words."
    with pytest.raises(ConfigError) as e: make()
    message = str(e.value)
    assert "\n" not in message and all(w in message for w in words), message
    return message


# presets

@pytest.mark.parametrize("field", sorted(set(field_names()) - LOCAL))
def test_paper_is_what_was_published(field):
    assert getattr(preset("paper"), field) == PAPER[field]


def test_the_defaults_of_selection_and_smoothing_are_published():
    assert replace(SelectionConfig(), method="exact") == PAPER["selection"] and SmoothingConfig() == PAPER["smoothing"]


def test_demo_is_the_default_and_small():
    demo = preset()
    assert demo == preset("demo") and demo.preset == "demo" and (demo.encoder, demo.encoder_depth, demo.norm) == ("resnet18", 4, "per-sensor")
    assert demo.selection.ramp_epochs < demo.epochs and demo.seasons_required == 1 and demo.data == "scenes"
    assert len(demo.decoder_channels) == demo.encoder_depth


def test_presets_name_only_fields():
    for values in PRESETS.values(): check_names(values, field_names())


# selection and smoothing in their short forms

@pytest.mark.parametrize("name, cls", [("selection", SelectionConfig), ("smoothing", SmoothingConfig)])
def test_true_false_and_dict(name, cls):
    for base in PRESETS:
        own = getattr(preset(base), name)
        assert getattr(preset(base, **{name: True}), name) == (own or cls()) and getattr(preset(base, **{name: None}), name) == own
        assert getattr(preset(base, **{name: False}), name) is None and getattr(preset(base, **{name: {}}), name) == (own or cls())
        if own: assert getattr(preset(base, **{name: asdict(own)}), name) == own
    assert getattr(PretrainConfig(**{name: True}), name) == cls() and getattr(PretrainConfig(**{name: None}), name) is None
    changed = cls(**{"keep": 0.7} if name == "selection" else {"sigma": 5.0})
    assert getattr(preset("demo", **{name: changed}), name) == changed


def test_a_dict_keeps_the_presets_other_fields():
    assert preset("paper", selection={"keep": 0.7}).selection == SelectionConfig(method="exact", keep=0.7)
    assert preset("demo", selection={"keep": 0.7}).selection == SelectionConfig(ramp_epochs=7, keep=0.7)
    assert preset("demo", smoothing={"kind": "t"}).smoothing == SmoothingConfig(kind="t")


def test_none_leaves_the_presets_value():
    assert preset("paper", **dict.fromkeys(set(field_names()) - {"preset"})) == preset("paper")


@pytest.mark.parametrize("value", [("s2", "s1"), ["s2", "s1"], "s2,s1", "s2, s1", " s2 s1 "])
def test_sensors_as_text_or_list(value):
    assert preset(sensors=value).sensors == ("s2", "s1")


def test_one_sensor_as_text(): assert preset(sensors="s2").sensors == ("s2",)


def test_lists_become_tuples_and_empty_bands_none():
    config = preset(decoder_channels=[32, 16], loggers="tensorboard,wandb", bands={"s2": ("B4", "B3"), "s1": 2})
    assert (config.decoder_channels, config.loggers) == ((32, 16), ("tensorboard", "wandb")) and config.bands == {"s2": ["B4", "B3"], "s1": 2}
    assert preset(bands={}).bands is None and preset(loggers=()).loggers == ()


@pytest.mark.parametrize("text, value", [("5e-3", 5e-3), ("1e-3", 1e-3), ("0.01", 0.01)])
def test_numbers_with_an_exponent_as_text(text, value, tmp_path):
    assert preset(learning_rate=text, weight_decay=text).learning_rate == value
    (tmp_path / "c.yaml").write_text(f"learning_rate: {text}\n")     # YAML 1.1 reads 5e-3 as text
    assert load_config(tmp_path / "c.yaml").learning_rate == value


def test_it_cannot_be_changed():
    with pytest.raises(AttributeError): preset().epochs = 3


# unknown names

@pytest.mark.parametrize("make, words", [
    (lambda: preset(epocs=3), ("parameter 'epocs'", "did you mean 'epochs'?")),
    (lambda: preset("demo", learning_rte=1), ("did you mean 'learning_rate'?",)),
    (lambda: preset(qqqq=1), ("'qqqq'", "known: data, preset")),
    (lambda: preset("papr"), ("preset='papr'", "'demo', 'paper'")),
    (lambda: preset(selection={"kep": 0.5}), ("field of selection 'kep'", "did you mean 'keep'?")),
    (lambda: PretrainConfig(smoothing={"sigm": 2}), ("field of smoothing 'sigm'", "did you mean 'sigma'?")),
    (lambda: from_dict({"epocs": 3}), ("did you mean 'epochs'?",)),
    (lambda: from_dict({"preset": "papr"}), ("preset in configuration='papr'", "'demo', 'paper'")),
    (lambda: preset(bands={"s3": 3}), ("sensor in bands 's3'",)),
    (lambda: preset(sensors="s1", bands={"s2": 3}), ("sensor in bands 's2'",)),
])
def test_unknown_names(make, words): refusal(make, *words)


def test_names_that_are_no_text_are_unknown_too():
    refusal(lambda: check_names([3], ["a"]), "3")
    refusal(lambda: from_dict({3: 1}), "3")


# impossible values

WRONG = [
    ("fusion", "early"), ("norm", "batch"), ("schedule", "step"), ("loss", "dice"), ("consistency", "js"), ("precision", "fp16"), ("precision", 32), ("grid", "xy"),
    *((n, v) for n in ("epochs", "batch_size", "min_steps", "crop", "seasons_required", "nodes") for v in (0, -1, 2.5, "3", True)),
    *((n, v) for n in ("num_workers", "patience", "seed") for v in (-1, 0.5, "3", True)),
    *(("learning_rate", v) for v in (-1e-3, 11, float("nan"), float("inf"), "fast", True)), ("weight_decay", 2), ("weight_decay", "none"),
    ("validation", 0.95), ("validation", -0.1), ("validation_block_km", -1), ("validation_block_km", 1e4), ("validation", "much"), ("loggers", "csv"), ("sensors", ()), ("sensors", " , "), ("sensors", "s1,s1"),
    ("selection", "yes"), ("selection", 3), ("smoothing", [1]),
]


@pytest.mark.parametrize("field, value", WRONG, ids=str)
def test_impossible_values(field, value): refusal(lambda: preset(**{field: value}), field)


@pytest.mark.parametrize("cls, field, value", [
    (SelectionConfig, "keep", 1.5), (SelectionConfig, "keep", "0.5"), (SelectionConfig, "ramp_epochs", -1), (SelectionConfig, "ramp_epochs", 7.0),
    (SelectionConfig, "confidence", "ce"), (SelectionConfig, "ramp", "cosine"), (SelectionConfig, "method", "topk"), (SmoothingConfig, "kind", "st"),
    (SmoothingConfig, "sigma", 0), (SmoothingConfig, "truncate", -1), (SmoothingConfig, "prior_weight", 1.1), (SmoothingConfig, "uniform_weight", True)], ids=str)
def test_impossible_values_of_the_parts(cls, field, value): refusal(lambda: cls(**{field: value}), field)


def test_the_weights_of_smoothing_together():
    refusal(lambda: SmoothingConfig(prior_weight=0.9, uniform_weight=0.2), "prior_weight", "uniform_weight", "1.1")
    SmoothingConfig(prior_weight=0.8, uniform_weight=0.2)


OTHER_TYPES = [      # of a type that the field cannot have
    ("sensors", 5), ("sensors", [1, 2]), ("loggers", 3), ("decoder_channels", 5), ("decoder_channels", "64,x"), ("decoder_channels", [64.5]), ("bands", "nine"), ("bands", 9),
    ("bands", {"s2": None}), ("rotation", "false"), ("selection", {"per_class": "no"}), ("devices", "two"), ("devices", 2.5), ("devices", 0), ("encoder_depth", "x"),
    ("encoder_depth", -1), ("name", 5), ("data", 5), ("encoder", 5), ("classes", 5), ("resume", 5), ("runs", 5)]


@pytest.mark.parametrize("field, value", OTHER_TYPES, ids=str)
def test_values_of_another_type(field, value):
    "Refused by name; a number given for a text (papermill makes one of `-p name 5`) may become that text."
    try: config = preset(**{field: value})
    except ConfigError as e: assert field in str(e) and "\n" not in str(e)
    else: assert type(value) is int and getattr(config, field) == str(value)


@pytest.mark.parametrize("field, value, made", [("bands", {"s2": "B4"}, {"s2": ["B4"]}), ("bands", {"s2": "B4,B3 B2"}, {"s2": ["B4", "B3", "B2"]}),
                                                ("decoder_channels", "64,48", (64, 48))])
def test_lists_as_text(field, value, made):
    assert getattr(preset(**{field: value}), field) == made


@pytest.mark.parametrize("field", ["sensors", "loggers"])
def test_empty_lists_in_a_file(field, tmp_path):
    (tmp_path / "c.yaml").write_text(f"{field}:\n")
    refusal(lambda: load_config(tmp_path / "c.yaml"), field)


# on disk

@pytest.mark.parametrize("config", [
    preset("demo"), preset("paper"), preset("demo", selection=False, smoothing=False, bands={"s2": ["B4", "B3"], "s1": 2}, loggers=(), name="Übung 1", decoder_channels=[32, 16, 8]),
    preset("paper", sensors="s2", epochs=3, selection={"keep": 0.25, "ramp": "linear"}, learning_rate="1e-4", resume="runs/x")], ids=["demo", "paper", "off", "changed"])
def test_yaml_gives_it_back(config, tmp_path):
    path = tmp_path / "config.yaml"
    save_config(config, path)
    assert load_config(path) == config == from_dict(to_dict(config))
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert values.pop("config_version") == CONFIG_VERSION and values.pop("kind") == "pretrain" and list(values) == field_names()


def test_to_dict_is_plain():
    def plain(v): return v is None or type(v) in (str, int, float, bool) or (type(v) in (list, dict) and all(map(plain, v.values() if isinstance(v, dict) else v)))
    assert plain(to_dict(preset("paper", bands={"s2": ("B4",)}, decoder_channels=(3, 2))))


def test_what_a_file_leaves_out_is_the_presets(tmp_path):
    (tmp_path / "c.yaml").write_text("preset: paper\nepochs: 3\n")
    assert load_config(tmp_path / "c.yaml") == preset("paper", epochs=3)


@pytest.mark.parametrize("text, words", [
    ("config_version: 99\nepochs: 3\n", ("config_version 99 is not 1", "make it anew")),
    ("config_version: '1'\n", ("config_version 1",)),
    ("a: [", ("not valid YAML",)), ("a:\n\tb: 1\n", ("not valid YAML",)), ("&a [*a, *b]", ("not valid YAML",)),
    ("- 1\n- 2\n", ("expected fields and values",)), ("", ("expected fields and values",)), ("text", ("expected fields and values",)),
    ("epocs: 3\n", ("did you mean 'epochs'?",)), ("selection: {kep: 1}\n", ("did you mean 'keep'?",)), ("preset: papr\n", ("'demo', 'paper'",)),
    ("!!python/object/apply:os.system ['exit 1']", ("not valid YAML",)),
])
def test_files_that_are_refused(text, words, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    refusal(lambda: load_config(tmp_path / "c.yaml"), *words)


def test_mistakes_name_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    for text in ("config_version: 99\n", "a: [", "", "epocs: 3\n", "preset: papr\n"):
        path.write_text(text)
        refusal(lambda: load_config(path), "c.yaml")


def test_impossible_values_name_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text("epochs: 0\n")
    refusal(lambda: load_config(tmp_path / "c.yaml"), "c.yaml", "epochs=0")


def test_files_that_cannot_be_read(tmp_path):
    refusal(lambda: load_config(tmp_path / "no.yaml"), "no.yaml", "No such file")
    refusal(lambda: load_config(tmp_path), "Is a directory")


def test_files_in_another_encoding(tmp_path):
    (tmp_path / "c.yaml").write_bytes("name: Übung\n".encode("latin-1"))
    refusal(lambda: load_config(tmp_path / "c.yaml"), "c.yaml")


# where paths count from

def test_paths_count_from_the_checkout(tmp_path, monkeypatch, root):
    monkeypatch.chdir(root / "nbs")
    assert project_root() == root and resolve("runs") == root / "runs"
    monkeypatch.chdir(tmp_path)
    assert project_root() == tmp_path.resolve() and resolve("runs") == tmp_path.resolve() / "runs" and resolve("/a/b").as_posix() == "/a/b"
    assert "~" not in str(resolve("~/runs"))
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = other\n")
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    assert project_root() == (tmp_path / "deep").resolve()      # another project's checkout is none of ours


def test_every_field_has_a_value_and_a_comment():
    from pathlib import Path

    import cromss.config
    source = Path(cromss.config.__file__).read_text(encoding="utf-8")
    for cls in (SelectionConfig, SmoothingConfig, PretrainConfig):
        body = source.split(f"class {cls.__name__}:")[1].split("def __post_init__")[0]
        for f in fields(cls): assert any(line.strip().startswith(f"{f.name}: ") and "  # " in line for line in body.splitlines()), f.name


def test_a_path_may_start_from_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    assert resolve("../runs/x") == tmp_path / "a" / "runs" / "x" and resolve("./x") == tmp_path / "a" / "b" / "x" and resolve("..") == tmp_path / "a" and resolve("runs") != tmp_path / "a" / "b" / "runs" or project_root() == tmp_path / "a" / "b"


def test_a_folder_that_is_no_run_says_what_may_be_meant(tmp_path):
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "config.yaml").write_text("x: 1")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").write_text("{}")
    for folder, words in (("runs/firsst", "did you mean first?"), ("store", "it is a store"), ("nowhere/first", "there is no"), ("other", "such as")):
        refusal(lambda: run_config(tmp_path / folder), words)
