"The explorer through its own model: what the map shows, what the controls change, what is refused, and what is left where no widgets are."
import base64
import copy
import gc
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import cv2
import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
import torch

from cromss.app import serve, write_app
from cromss.audit import audit
from cromss.checkpoints import newest_checkpoint
from cromss.classes import ClassScheme, safe_colors
from cromss.cli import main
from cromss.config import ConfigError, CromssError, SelectionConfig, SmoothingConfig, preset
from cromss.exploration import UNSMOOTHED, Exploration, class_rows, compose, draw_histograms, draw_legend, draw_pixel, explore, histograms, pixel, target
from cromss.explorer import ENTANGLING, RunBrowser, SelectionExplorer, TrainingExplorer, run_table
from cromss.maps import overlay
from cromss.models import CrossModalSegmenter
from cromss.prepare import prepare
from cromss.pretraining import open_data, pretrain
from cromss.runs import Run
from cromss.scenes import ScenesSource
from cromss.selection import select
from cromss.snapshots import Story
from cromss.store import Location, write_store
from cromss.views import MARK, layer_names, layer_title, make_layer, paint_layer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explorer")
    store = prepare(ScenesSource(8, seed=1, size=48), folder / "store", progress=False)
    config = preset("demo", data=str(store.folder), epochs=3, min_steps=3, crop=48, encoder_depth=3, decoder_channels=[16, 8, 8], runs=str(folder / "runs"), name="one", loggers=(), selection={"ramp_epochs": 3})
    return pretrain(config, store)


def scenes(count):
    "Locations as the run's store has them."
    source = ScenesSource(8, seed=1, size=48)
    return [source.read(f"scene-{i:05d}") for i in range(count)]


@pytest.fixture
def shown(run): return SelectionExplorer(run)


def picture_of(map_):
    "The RGBA picture that lies on a map."
    code = np.frombuffer(base64.b64decode(map_.over.url.partition(",")[2]), np.uint8)
    return cv2.cvtColor(cv2.imdecode(code, cv2.IMREAD_UNCHANGED), cv2.COLOR_BGRA2RGBA)


def expected(explorer, name): return overlay(explorer.exploration.place, explorer.exploration.picture(name))[0]


def show_alone(explorer, name):
    explorer.control["opacity"].value = 1.0
    explorer.control["above"].value = name


def test_layers_on_the_map_are_what_select_says(shown):
    e = shown.exploration
    found = select(e.place.log_p, torch.from_numpy(e.place.label).long()[None], e.epoch, e.config, torch.from_numpy(e.place.valid)[None], season_masks=torch.from_numpy(e.place.season_labels)[None])
    fields = {"label confidence": found.label_confidence, "entangled label confidence": found.entangled_label, "prediction confidence": found.prediction_confidence,
              "entangled prediction confidence": found.entangled_prediction, "label weight": found.label_weights}
    for title, maps in fields.items():
        for s in ("s1", "s2"):
            assert (e.layer(f"{title} {s}").values == maps[s][0].numpy()).all(), (title, s)
            show_alone(shown, f"{title} {s}")
            assert (picture_of(shown.map) == expected(shown, f"{title} {s}")).all(), (title, s)
    assert (e.layer("selected s1").values == (found.label_weights["s1"][0].numpy() >= 1)).all()


def test_every_layer_can_be_shown(shown):
    seen = set()
    for name in layer_names(shown.exploration.place):
        show_alone(shown, name)
        seen.add(shown.map.over.url)
        assert not shown.panel["message"].value
    assert len(seen) >= len(layer_names(shown.exploration.place)) - 4          # early networks may agree


def test_class_colours_are_the_schemes(shown):
    show_alone(shown, "label")
    e, scheme = shown.exploration, shown.exploration.place.scheme
    wanted = {tuple(int(scheme.colors[c][i:i + 2], 16) for i in (1, 3, 5)) for c in np.unique(e.place.label)}
    picture = picture_of(shown.map)
    assert {tuple(p) for p in picture[picture[..., 3] > 0][:, :3].tolist()} == wanted


def test_safe_colours_and_back(shown):
    show_alone(shown, "label")
    before, plain = shown.map.over.url, shown.exploration.place.scheme
    shown.control["colors"].value = "safe"
    safe = safe_colors(plain)
    used = {tuple(c) for c in safe.rgb()[np.unique(shown.exploration.place.label)].tolist()}
    assert {tuple(p) for p in picture_of(shown.map)[..., :3].reshape(-1, 3).tolist()} - {(0, 0, 0)} == used and safe.colors[0] in shown.panel["legend"].value and safe.colors[0] in shown.panel["histogram"].value
    shown.control["location"].value = 3
    assert shown.exploration.place.scheme == safe, "another place is painted alike"
    shown.control["location"].value = 0
    shown.control["colors"].value = "scheme"
    assert shown.map.over.url == before and shown.exploration.place.scheme == plain


def test_too_many_classes_keep_their_colours(shown, monkeypatch):
    monkeypatch.setattr("cromss.classes.MUTED", ("#332288",) * 8)
    shown.control["colors"].value = "safe"
    assert "only 8 colours" in shown.panel["message"].value and shown.control["colors"].value == "scheme" == shown.exploration.colors


@pytest.mark.parametrize("name, value", [("opacity", .2), ("keep", .2), ("epoch", 0), ("confidence", "gini"), ("entangle", "own"), ("entangle", "geometric"), ("compare", "swipe"), ("season", 1), ("location", 3),
                                         ("above", "label"), ("below", "image s1"), ("classes", ("water",)), ("colors", "safe")])
def test_every_control_changes_the_map(shown, name, value):
    if name == "colors": show_alone(shown, "label")
    if name in ("confidence", "entangle"): show_alone(shown, "entangled prediction confidence s2" if name == "confidence" else "label weight s2")
    before = shown.map.over.url
    shown.control[name].value = value
    assert shown.map.over.url != before and not shown.panel["message"].value


def test_the_panels_follow(shown):
    before = {n: p.value for n, p in shown.panel.items()}
    shown.control["keep"].value = .1
    assert shown.panel["histogram"].value != before["histogram"] and shown.panel["classes"].value != before["classes"]
    before = shown.panel["histogram"].value
    shown.control["sensor"].value = "s1"
    assert shown.panel["histogram"].value != before and "S1" in shown.panel["histogram"].value


def test_where_one_has_panned_the_map_stays(shown):
    shown.map.zoom, shown.map.center = 9.0, (1.0, 2.0)
    for name, value in (("opacity", .3), ("keep", .2), ("above", "label")): shown.control[name].value = value
    assert shown.map.zoom == 9 and tuple(shown.map.center) == (1, 2)
    shown.control["location"].value = 3
    assert shown.map.zoom != 9, "another place is gone to"


def test_controls_say_what_is_in_force(run):
    shown = SelectionExplorer(run)
    shown.exploration.set(temporal=True)
    shown.control["entangle"].value = "own"
    assert "hears no other voice" in shown.panel["message"].value and shown.control["entangle"].value == shown.exploration.config.entangle == "published"
    shown.exploration.set(keep="mixture")
    shown.update()
    assert shown.control["keep"].description == "kept (mixture)" and shown.control["keep"].value == pytest.approx(float(shown.exploration.selection.keep), abs=1e-6)
    shown.control["keep"].value = .35
    assert shown.exploration.config.keep == .35 and shown.control["keep"].description == "kept fraction"


def test_side_by_side_moves_both_maps(shown):
    assert len(shown.maps.children) == 1
    shown.control["compare"].value = "side by side"
    assert shown.maps.children == (shown.map, shown.second)
    assert (picture_of(shown.map) == expected(shown, "label weight s2")).all() and (picture_of(shown.second) == expected(shown, "image s2")).all()
    shown.control["compare"].value = "blend"
    assert len(shown.maps.children) == 1


def test_a_click_reads_the_pixel(shown):
    (south, west), (north, east) = shown.map.over.bounds
    shown._click((south + north) / 2, (west + east) / 2)
    row, column = shown.clicked
    assert abs(row - 24) <= 1 and abs(column - 24) <= 1 and (shown.control["row"].value, shown.control["column"].value) == shown.clicked
    found = pixel(shown.exploration, row, column)
    assert shown.panel["pixel"].value == draw_pixel(shown.exploration, found) and len(shown.map.ring.locations) == 4
    for s, p in found["probabilities"].items(): assert abs(p.sum() - 1) < 1e-5 and found["label confidence"][s] == pytest.approx(p[found["label"]], abs=1e-6)
    shown._click(north + 1, east)                       # beside the place: nothing
    assert shown.clicked == (row, column)


def test_a_pixel_by_the_keyboard(shown):
    shown.control["row"].value = 7
    shown.control["column"].value = 9
    assert shown.clicked == (7, 9) and "row 7, column 9" in shown.panel["pixel"].value


def test_going_to_another_place_by_its_name_and_by_the_map_of_all(shown):
    shown.control["key"].value = "scene-00005"
    assert shown.exploration.place.location == shown.control["location"].value == 5
    lon, lat = shown.overview.centers[2]
    shown._jump(shown.overview.nearest(lat, lon))
    assert shown.control["key"].value == shown.exploration.place.key == "scene-00002" and tuple(shown.overview.here.location) == (lat, lon)


def test_an_unknown_name_is_refused_in_one_line_and_nothing_changes(shown):
    before = shown.map.over.url
    shown.control["key"].value = "<b>elsewhere</b>"
    assert "&lt;b&gt;elsewhere" in shown.panel["message"].value and "<b>" not in shown.panel["message"].value
    assert shown.control["key"].value == "scene-00000" and shown.map.over.url == before
    shown.control["keep"].value = .2
    assert not shown.panel["message"].value


def test_settings_that_contradict_each_other_are_refused(run):
    e = SelectionExplorer(Exploration(explore(run).model, explore(run).store, config=SelectionConfig(temporal=True, ramp_epochs=3)))
    e.control["entangle"].value = "own"
    assert "temporal" in e.panel["message"].value


def test_the_ramp_sets_in(shown):
    show_alone(shown, "label weight s2")
    kept = []
    for epoch in range(4):
        shown.control["epoch"].value = epoch
        kept.append(float((shown.exploration.layer("label weight s2").values >= 1).mean()))
    assert kept == sorted(kept, reverse=True) and kept[0] > kept[-1]


def test_a_checkpoint_can_be_looked_at(run):
    newest, finished = explore(newest_checkpoint(run)).place, explore(run).place
    assert all(torch.equal(newest.log_p[s], finished.log_p[s]) for s in ("s1", "s2")) and (newest.season_title, newest.season) == ("spring", 0)
    with pytest.raises(CromssError, match="no.ckpt"): explore(run.checkpoints / "no.ckpt")


def test_a_checkpoint_can_be_audited(run, tmp_path):
    found = [audit(model, open_data(run.config), tmp_path / name, limit=2, top=0, progress=False) for name, model in (("run", run), ("checkpoint", str(newest_checkpoint(run))))]
    assert found[0].tiles.equals(found[1].tiles) and len(found[0].tiles)


def test_a_checkpoint_is_not_shown_on_data_of_other_classes_or_bands(run, tmp_path):
    "Finished, the run knows its classes and bands; before, its own store alone."
    own = open_data(run.config)
    def other(name, scheme): return write_store(tmp_path / name, scenes(2), own.sensors, scheme)
    eight = other("eight", ClassScheme("others", tuple(f"other {i}" for i in range(9))))
    for opened in (run, newest_checkpoint(run)):
        with pytest.raises(ConfigError, match="other classes of s1"): explore(opened, eight)
    begun = Run(shutil.copytree(run.folder, tmp_path / "begun"), run.config)
    (begun.folder / "summary.json").unlink()
    assert explore(newest_checkpoint(begun)).place.key == own.key(0)
    with pytest.raises(ConfigError, match="has not finished, and does not yet say which bands"): explore(newest_checkpoint(begun), eight)
    ten = other("ten", ClassScheme("ten", tuple(f"other {i}" for i in range(10))))
    with pytest.raises(ConfigError, match="knows 9 classes, ten has 10"): Exploration(explore(run).model, ten)
    with pytest.raises(ConfigError, match="training mode"): Exploration(copy.deepcopy(explore(run).model).train(), own)


def test_what_is_unlabelled_or_unseen_has_no_value(run, tmp_path):
    own = open_data(run.config)
    first = scenes(1)[0]
    for label in first.labels: label[:6] = 255
    store = write_store(tmp_path / "store", [first], own.sensors, own.scheme)
    place = replace(explore(run, store).place, valid=np.arange(48)[None].repeat(48, 0) > 9)
    labelled = place.valid & (place.label != 255)
    selection = place.select()
    for name in layer_names(place):
        layer = make_layer(place, selection, name)
        if layer.kind == "share": assert (np.isfinite(layer.values) == (place.valid if "prediction" in name else labelled)).all(), name
        if name == "suggested label": assert ((layer.values != 255) == labelled).all()
        if name.startswith("prediction ") and layer.kind == "classes": assert ((layer.values != 255) == place.valid).all()
        if layer.kind == "yesno" and name != "differs from reference": assert not layer.values[~place.valid].any(), name
        if layer.kind == "share": assert (paint_layer(layer, place.scheme)[..., 3] > 0).tolist() == np.isfinite(layer.values).tolist()


def test_targets_are_those_of_the_training(run, tmp_path):
    hard = Exploration(explore(run).model, open_data(run.config), smoothing=UNSMOOTHED)
    assert (target(hard) == np.eye(9, dtype=np.float32)[hard.place.label].transpose(2, 0, 1)).all()
    own = open_data(run.config)
    first, rng = scenes(1)[0], np.random.default_rng(0)
    told = [rng.integers(0, 256, (9, 48, 48)).astype(np.uint8) for _ in first.labels]
    store = write_store(tmp_path / "told", [replace(first, probabilities=told)], own.sensors, own.scheme)
    smoothing = SmoothingConfig(kind="p", prior_weight=.6, uniform_weight=.1)
    e = Exploration(explore(run).model, store, smoothing=smoothing)
    prior = told[0].astype(np.float32) / told[0].sum(0)
    assert np.allclose(target(e), .3 * np.eye(9)[e.place.label].transpose(2, 0, 1) + .6 * prior + .1 / 9, atol=.02)


def test_figures_of_the_selection(run):
    e = explore(run)
    e.set(keep=.3)
    for s in ("s1", "s2"):
        for c, (counts, threshold, kept) in histograms(e, s).items():
            assert counts.sum() == (e.place.label == c).sum() and 0 <= threshold <= 1
            if counts.sum() >= 100: assert kept == pytest.approx(.3, abs=.06), (s, c)
    rows = class_rows(e)
    assert rows["pixels"].sum() == e.place.label.size and (rows["most likely other"] != rows["class"]).all()
    assert target(e).sum(0) == pytest.approx(1, abs=1e-5)


def test_compose():
    a, b = np.full((4, 8, 4), 200, np.uint8), np.full((4, 8, 4), 100, np.uint8)
    a[..., 3] = b[..., 3] = 255
    assert (compose(a, b, opacity=.5)[..., :3] == 150).all() and (compose(a, b, "side by side") == a).all()
    swiped = compose(a, b, "swipe", position=.5)
    assert (swiped[:, :4] == a[:, :4]).all() and (swiped[:, 4:] == b[:, 4:]).all()
    b[..., 3] = 0
    assert (compose(a, b, opacity=.5)[..., 3] == 128).all() and (compose(a, b, opacity=.5)[..., :3] == 200).all()
    with pytest.raises(ConfigError, match="compare='fade'"): compose(a, b, "fade")


@pytest.mark.parametrize("call, words", [(lambda run: explore(run.folder / "no"), "no"), (lambda run: explore(explore(run).model), "store=None"), (lambda run: explore(run, location=99), "location 99"),
                                         (lambda run: explore(run, season=9), "season 9"), (lambda run: pixel(explore(run), 99, 0), r"pixel \(99, 0\)"), (lambda run: explore(run).layer("nonsense"), "nonsense"),
                                         (lambda run: RunBrowser(run.folder / "no"), "no run"), (lambda run: explore(run).set(keep=7), "keep"), (lambda run: SelectionExplorer(run, run.folder / "no"), "no")])
def test_refusals(run, call, words):
    with pytest.raises(CromssError, match=words) as e: call(run)
    assert "\n" not in str(e.value)


def test_hostile_names_are_text(tmp_path):
    bad = '<img src=x onerror=alert(1)>'
    source = ScenesSource(2, seed=1, size=32)
    first = source.read("scene-00000")
    location = Location("scene<b>", (bad, *first.seasons[1:]), first.images, [np.minimum(l, 8) for l in first.labels], first.reference, crs=first.crs, transform=first.transform)
    scheme = ClassScheme("hostile", tuple(f"{bad}{i}" for i in range(9)))
    from cromss.sensors import SENSORS
    store = write_store(tmp_path / "store", [location], {"s1": SENSORS["s1"], "s2": SENSORS["s2"]}, scheme)
    torch.manual_seed(0)
    model = CrossModalSegmenter({"s1": 2, "s2": 13}, 9, "mid", "unet", "resnet18", encoder_depth=3, decoder_channels=(16, 8, 8)).eval()
    e = SelectionExplorer(model, store)
    e.control["row"].value = 3
    e.control["key"].value = bad
    for name, panel in e.panel.items(): assert "<img" not in panel.value, name
    assert "<img" not in draw_legend(e.exploration, ["label"]) + draw_histograms(e.exploration, "s1") and "&lt;img" in e.panel["pixel"].value


def test_memory_over_two_hundred_moves(shown):
    def move(n):
        shown.control["keep"].value = .1 + (n % 17) * .05
        shown.control["opacity"].value = (n % 10) / 10
        if n % 20 == 0: shown.control["location"].value = n // 20 % 8
    for n in range(40): move(n)
    gc.collect()
    before = psutil.Process().memory_info().rss
    for n in range(200): move(n)
    gc.collect()
    assert psutil.Process().memory_info().rss - before < 15e6


def test_a_still_picture_where_no_widgets_are(shown, run, tmp_path):
    "Fault 36: the output holds a PNG beside the widget, and nbconvert shows it."
    for dashboard in (shown, TrainingExplorer(run), RunBrowser([run])):
        bundle = dashboard._repr_mimebundle_()
        image = cv2.imdecode(np.frombuffer(base64.b64decode(bundle["image/png"]), np.uint8), 1)
        assert image is not None and image.std() > 5 and "application/vnd.jupyter.widget-view+json" in bundle
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("explorer", outputs=[nbformat.v4.new_output("display_data", dict(shown._repr_mimebundle_()))])])
    nbformat.write(book, tmp_path / "book.ipynb")
    subprocess.run([sys.executable, "-m", "nbconvert", "--to", "html", str(tmp_path / "book.ipynb")], check=True, capture_output=True)
    page = (tmp_path / "book.html").read_text(encoding="utf-8")
    assert shown._repr_mimebundle_()["image/png"][:64] in page.replace("\n", "")


def test_a_run_without_curves_still_shows_its_dashboard(run, tmp_path):
    begun = Run(shutil.copytree(run.folder, tmp_path / "begun"), run.config)
    (begun.folder / "metrics.csv").unlink()
    bundle = RunBrowser((begun,))._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle and "image/png" not in bundle
    browser = RunBrowser([run])
    browser.chosen.value = ()
    assert "image/png" in browser._repr_mimebundle_() and "Choose one run" in browser.page.value


def test_a_crs_that_is_not_known_takes_no_other_place_away(run, tmp_path):
    own = open_data(run.config)
    locations = [replace(l, crs="my own crs") if i == 0 else l for i, l in enumerate(scenes(3))]
    store = write_store(tmp_path / "store", locations, own.sensors, own.scheme)
    assert np.isfinite(store.centers()).all(1).tolist() == [False, True, True]
    shown = SelectionExplorer(run, store)
    assert "Its position is not known" in shown.panel["legend"].value
    shown.control["location"].value = 2
    assert "Its position is not known" not in shown.panel["legend"].value


def test_a_place_without_a_position_says_so(tmp_path):
    source = ScenesSource(2, seed=1, size=32)
    first = source.read("scene-00000")
    location = Location("adrift", first.seasons, first.images, first.labels, first.reference)
    from cromss.sensors import SENSORS
    from cromss.classes import SCHEMES
    store = write_store(tmp_path / "store", [location], {"s1": SENSORS["s1"], "s2": SENSORS["s2"]}, SCHEMES["dynamic-world"])
    torch.manual_seed(0)
    model = CrossModalSegmenter({"s1": 2, "s2": 13}, 9, "mid", "unet", "resnet18", encoder_depth=3, decoder_channels=(16, 8, 8)).eval()
    e = SelectionExplorer(model, store)
    assert "position is not known" in e.panel["legend"].value and e.overview.layout.display == "none"
    e._click(*e.map.center)
    assert e.clicked is not None


def test_the_training_explorer(run):
    story, e = Story(run), TrainingExplorer(run)
    assert story.epochs == [0, 1, 2] and len(story) == 2
    seen = {e.picture.value}
    for name, value in (("epoch", 1), ("what", "weight"), ("place", 1)):
        e.control[name].value = value
        assert e.picture.value not in seen
        seen.add(e.picture.value)
    labelled = story.places["label"][0] != 255
    assert story.curve("confidence_s1", 0)[1] == pytest.approx(np.nanmean(story.maps(1)["confidence_s1"][0][labelled]))
    with pytest.raises(ConfigError, match="epoch 7"): story.maps(7)


def test_places_can_be_named_whose_story_is_kept(run, tmp_path):
    store = open_data(run.config)
    def start(name, **changes): return pretrain(replace(run.config, name=name, runs=str(tmp_path), epochs=1, **changes), store, finish=lambda *_: None)
    one = Story(start("named", snapshots=0, snapshot_places=(store.keys[5], store.keys[2])))
    assert one.places["key"].tolist() == [store.keys[5], store.keys[2]] and (one.places["label"][0] == store.read_labels(5)[one.places["season"][0]]).all()
    with pytest.raises(ConfigError, match="'nowhere': not in store"): start("other", snapshot_places=("nowhere",))
    assert not (tmp_path / "other").exists() and not (start("none", snapshots=0).folder / "snapshots").exists()


def test_a_run_without_snapshots_is_refused(run, tmp_path):
    (tmp_path / "bare").mkdir()
    with pytest.raises(ConfigError, match="no snapshots"): Story(Run(tmp_path / "bare", run.config))


def test_the_run_browser(run):
    e = RunBrowser([run])
    assert "train_loss" in e.page.value and "data:image/png" in e.page.value
    assert "train_loss" in run_table([run]).index
    e.chosen.value = ()
    assert "Choose" in e.page.value


def test_the_app_is_a_notebook_of_two_lines(tmp_path):
    book = nbformat.read(write_app(tmp_path, "runs/it's", None, 3), 4)
    compile(book.cells[0].source, "app", "exec")
    assert repr("runs/it's") in book.cells[0].source and json.loads((tmp_path / "voila" / "templates" / "cromss" / "conf.json").read_text()) == {"base_template": "lab"}


def test_a_port_that_is_taken_is_said():
    import socket
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="cannot listen there"): serve("runs/x", port=taken.getsockname()[1], browser=False, said=lambda *_: None)
    with pytest.raises(ConfigError, match="cannot listen there"): serve("runs/x", port=99999, browser=False, said=lambda *_: None)


def test_layer_titles(run):
    place = explore(run).place
    assert layer_title(place, "label weight s1") == "Label weight S1" and layer_title(place, "suggested label") == "Suggested label"
    assert len(MARK) == 3 and set(ENTANGLING.values()) == {"published", "geometric", "exchange", "other", "own"}


def test_from_a_run_to_a_list_of_suspicious_labels_and_a_map(run, tmp_path, capsys):
    "What the README promises, by its commands: audit, map, gallery."
    assert main(["audit", "--run", str(run.folder), "--out", str(tmp_path / "audit"), "--top", "2"]) == 0
    worst = pd.read_csv(tmp_path / "audit" / "tiles.csv").iloc[0]
    assert "probably wrong" in capsys.readouterr().out and (tmp_path / "audit" / "tiles.parquet").is_file()
    assert main(["map", "--run", str(run.folder), "--location", worst["key"], "--season", str(worst["season"]), "--out", str(tmp_path / "map"), "--colors", "safe"]) == 0
    assert safe_colors(explore(run).place.scheme).colors[0].lower() in (tmp_path / "map" / "label.qml").read_text(encoding="utf-8")
    assert {"map.html", "label.tif", "label.qml", "item.json"} <= {p.name for p in (tmp_path / "map").iterdir()} and worst["key"] in (tmp_path / "map" / "map.html").read_text(encoding="utf-8")
    assert main(["gallery", "--runs", str(run.folder.parent), "--out", str(tmp_path / "gallery")]) == 0
    assert (tmp_path / "gallery" / "index.html").is_file()


@pytest.mark.parametrize("tokens, words", [(["map", "--out", "m"], "--run"), (["audit", "--out", "m"], "--run"), (["app"], "--run"), (["map", "--run", "RUN", "--out", "m", "--colors", "grey"], "way to colour"), (["gallery"], "--out"), (["map", "--run", "RUN", "--out", "RUN"], "not overwritten"), (["map", "RUN", "--out", "RUN"], "not overwritten"),
                                           (["map", "--run", "RUN", "--out", "m", "--location", "nowhere"], "nowhere"), (["app", "--run", "RUN", "--location", "99"], "location 99"), (["app", "--run", "none"], "none")])
def test_commands_refuse_in_one_line(run, tokens, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([str(run.folder) if t == "RUN" else t for t in tokens]) != 0
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("cromss: ") and words in said[0] and not list(tmp_path.iterdir())
