"The gallery: what it says of whole, unfinished and damaged runs, names that nobody should trust, and a page that is whole or not there."
import errno
import json
import os
import re
import shutil
from html.parser import HTMLParser
from urllib.parse import unquote

import cv2
import numpy as np
import pytest

from cromss import gallery as module
from cromss import runs as runs_module
from cromss.config import ConfigError, DataError, TransferConfig, preset
from cromss.gallery import SCRIPT, copy_picture, differences, flat_settings, metric_title, read_entry, write_gallery
from cromss.runs import Run


def make_run(root, name, epochs=3, finished=True, started="2026-11-22T10:00:00+0000", kind=None, **changes):
    "A run folder with made-up metrics and one figure."
    run = Run.create(preset("demo", **({"kind": kind} if kind else {}), runs=str(root), name="made", epochs=3, **changes))
    (run.folder / "environment.json").write_text(json.dumps({"started": started}))
    for epoch in range(epochs): run.add_metrics({"epoch": epoch, "seconds": 1.0, "train_loss": 3.0 - epoch, "val_miou_s1": epoch / 10, "val_auroc_entangled_s1": 0.9})
    cv2.imwrite(str(run.folder / "figures" / "curves.png"), np.random.default_rng(len(name)).integers(0, 255, (40, 60, 3), np.uint8))
    if finished: run.save_summary({"seconds": 12.5, "validation": {"miou_s1": 0.2}, "classes": ["a"]})
    return Run(run.folder.rename(root / name), run.config)


class Page(HTMLParser):
    "The tags of a page with their attributes, and the texts of table cells and headings."

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.inside = [], {"td": [], "th": [], "h2": [], "p": []}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in self.texts: self.inside.append(tag), self.texts[tag].append("")

    def handle_endtag(self, tag):
        if tag in self.texts and self.inside: self.inside.pop()

    def handle_data(self, data):
        if self.inside: self.texts[self.inside[-1]][-1] += data

    def all(self, tag): return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture
def root(tmp_path):
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def shown(root, out=None):
    "The page of a gallery of all runs."
    path = write_gallery(root, out or root.parent / "gallery")
    return Page(path.read_text(encoding="utf-8"))


# what an entry says

def test_a_finished_run(root):
    entry = read_entry(make_run(root, "one", seed=5).folder)
    assert (entry.name, entry.kind, entry.started, entry.state, entry.epochs) == ("one", "pretrain", "2026-11-22 10:00", "finished", (3, 3))
    assert entry.settings["seed"] == "5" and entry.settings["selection"] == "on" and entry.settings["selection.keep"] == "0.5" and entry.settings["sensors"] == '["s1", "s2"]'
    assert entry.metrics == {"epoch": 2, "train_loss": 1, "val_miou_s1": 0.2, "val_auroc_entangled_s1": 0.9, "seconds": 12.5} and [p.name for p in entry.figures] == ["curves.png"]


def test_an_unfinished_run_and_one_that_has_just_begun(root):
    assert read_entry(make_run(root, "one", epochs=2, finished=False).folder).state == "unfinished: 2 of 3 epochs"
    begun = read_entry(make_run(root, "two", epochs=0, finished=False).folder)
    assert begun.state == "unfinished: 0 of 3 epochs" and begun.metrics == {} and not begun.problems


def test_a_transfer(root):
    run = make_run(root, "t", finished=False, kind=TransferConfig)
    run.save_summary({"oa": 0.8, "miou": 0.6, "iou": [0.5], "absent": None})
    entry = read_entry(run.folder)
    assert entry.kind == "transfer" and entry.metrics["oa"] == 0.8 and "iou" not in entry.metrics and "absent" not in entry.metrics


@pytest.mark.parametrize("file, content, word", [
    ("metrics.csv", b"\xff\xfe\x00", "metrics.csv"), ("metrics.csv", b"", "metrics.csv"), ("metrics.csv", b'a,b\n1,"2', "metrics.csv"), ("metrics.csv", b"a,b\n1,2\n", "metrics.csv"), ("metrics.csv", b"epoch,train_loss\ninf,1.0\n", "metrics.csv"), ("summary.json", b'{"seconds": 1' + b"0" * 400 + b"}", "summary.json"),
    ("summary.json", b"{", "summary.json"), ("summary.json", b"[1]", "summary.json"), ("summary.json", b"[" * 100_000, "summary.json"), ("config.yaml", b"epoch: [", "config.yaml"), ("config.yaml", b"nonsense: 1\n", "config.yaml"),
    ("environment.json", b"{}", "environment.json"), ("environment.json", b"[]", "environment.json")])
def test_damaged_files_are_problems_and_the_rest_is_shown(root, file, content, word):
    run = make_run(root, "bad")
    (run.folder / file).write_bytes(content)
    entry = read_entry(run.folder)
    assert entry.state == "damaged" and any(line.startswith(word) for line in entry.problems) and not any("\n" in line for line in entry.problems)
    page = shown(root)
    assert page.texts["h2"] == ["bad"] and any(word in text for text in page.texts["p"])


def test_numbers_that_are_none_are_left_out(root):
    run = make_run(root, "one", finished=False)
    run.add_metrics({"epoch": 3, "train_loss": float("nan"), "val_loss": float("inf"), "word": "x", "val_miou_s1": 0.5})
    assert read_entry(run.folder).metrics == {"epoch": 3, "val_miou_s1": 0.5}


def test_a_folder_that_vanishes(root):
    run = make_run(root, "one")
    shutil.rmtree(run.folder)
    assert read_entry(run.folder).state == "damaged"


# what differs

def test_what_most_runs_share_needs_no_mention(root):
    made = [make_run(root, f"r{i}") for i in range(3)] + [make_run(root, "other", selection={"keep": 0.7}), make_run(root, "off", selection=False)]
    found = differences([read_entry(run.folder) for run in made])
    assert found[:3] == [{}] * 3 and found[3] == {"selection.keep": "0.7"} and found[4] == {"selection": "off"}


def test_two_runs_show_both_sides_and_kinds_are_kept_apart(root):
    made = [make_run(root, "a", seed=1), make_run(root, "b", seed=2), make_run(root, "t", seed=3, kind=TransferConfig)]
    assert differences([read_entry(run.folder) for run in made]) == [{"seed": "1"}, {"seed": "2"}, {}]
    assert differences([]) == []


def test_settings_as_text():
    assert flat_settings({"a": "x", "b": None, "robust": None, "c": {"d": {"e": 1}}, "bands": {"s2": 9}}) == {
        "a": "x", "b": "null", "robust": "off", "c": "on", "c.d": "on", "c.d.e": "1", "bands": '{"s2": 9}'}


def test_titles_of_measures():
    assert [metric_title(n) for n in ("val_miou_mean", "val_miou_reference_thermal", "oa", "val_auroc_entangled_s1", "lr", "val_oa_s1")] == ["mIoU mean", "mIoU thermal, reference", "OA", None, None, None]


# pictures

def test_a_wide_picture_is_made_smaller_and_only_once(tmp_path, monkeypatch):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((100, 3000, 3), np.uint8))
    name, width, height = copy_picture(tmp_path / "a.png", tmp_path)
    assert (width, height) == (900, 30) and cv2.imread(str(tmp_path / name)).shape == (30, 900, 3)
    monkeypatch.setattr(module, "write_whole", None)
    assert copy_picture(tmp_path / "a.png", tmp_path)[0] == name


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_picture(tmp_path, root, content):
    run = make_run(root, "one")
    (run.folder / "figures" / "curves.png").write_bytes(content)
    with pytest.raises(DataError): copy_picture(run.folder / "figures" / "curves.png", tmp_path)
    page = shown(root)
    assert page.all("img") == [] and any("curves.png" in text for text in page.texts["p"]) and page.all("article")[0]["class"] == "damaged"


def test_pictures_are_loaded_late_and_lie_beside_the_page(root):
    make_run(root, "one"), make_run(root, "other name")
    page, out = shown(root), root.parent / "gallery"
    images = page.all("img")
    assert len(images) == 2 and all(i["loading"] == "lazy" and i["width"] == "60" and i["height"] == "40" and i["alt"].startswith("curves of ") for i in images)
    assert {i["src"] for i in images} == {f"pictures/{p.name}" for p in (out / "pictures").iterdir()}


# the page

def test_the_table_and_the_cards(root):
    make_run(root, "old", started="2026-01-01T00:00:00"), make_run(root, "new", seed=1), make_run(root, "newest", finished=False, started="2026-12-01T00:00:00", seed=2)
    page = shown(root)
    assert page.texts["h2"] == ["newest", "new", "old"] and page.texts["th"] == ["run", "started", "state", "what differs", "training loss", "mIoU s1", "time, s"]
    assert page.texts["td"][:7] == ["newest", "2026-12-01 00:00", "unfinished: 3 of 3 epochs", "seed 2", "1.000", "0.200", ""] and page.all("td")[4]["data-value"] == "1.0"
    assert [a["class"] for a in page.all("article")] == ["unfinished", "finished", "finished"] and "3 runs: 1 unfinished, 2 finished." in page.texts["p"][0]


@pytest.mark.parametrize("name", ["<script>alert(1)<", 'x" onmouseover="alert(1)', "<img src=q onerror=alert(1)>", "&amp; 'q' <h2>", "javascript:alert(1)", "a%2e%2e#b?c", "line\nbreak", "größe 雪"])
def test_hostile_names_are_text(root, name):
    run = make_run(root, name)
    (run.folder / "figures" / "curves.png").rename(run.folder / "figures" / "'\"><b>.png")
    page = shown(root)
    assert page.texts["h2"] == [name] and page.texts["td"][0] == name and len(page.all("script")) == 1 and not page.all("b")
    assert not any(k.startswith("on") for _, attrs in page.tags for k in attrs)
    links = [a["href"] for a in page.all("a") if not a["href"].startswith(("#", "pictures/"))]
    assert len(links) == 1 and (root.parent / "gallery" / unquote(links[0])).resolve() == run.folder.resolve() and ":" not in links[0]


def test_a_name_that_is_not_utf8(root):
    run = make_run(root, "one")
    os.rename(os.fsencode(run.folder), os.fsencode(root) + b"/bad\xff")
    assert shown(root).texts["h2"] == ["bad\ufffd"]


def test_hostile_settings_and_messages_are_text(root):
    run = make_run(root, "one", data="scenes")
    make_run(root, "two", data="<b>data</b>")
    (run.folder / "config.yaml").write_text("'<b>x</b>': 1\n")
    page = shown(root)
    assert not page.all("b") and any("<b>x</b>" in text for text in page.texts["p"])


def test_the_page_runs_no_script_but_its_own_and_asks_for_nothing(root):
    make_run(root, "one")
    text = write_gallery(root, root.parent / "gallery").read_text(encoding="utf-8")
    policy = next(m["content"] for m in Page(text).all("meta") if m.get("http-equiv"))
    assert policy.startswith("default-src 'none'") and "sha256-" in policy and f"<script>{SCRIPT}</script>" in text and "http" not in text.replace("http-equiv", "")


def test_a_run_has_a_page_a_notebook_or_files(root):
    run = make_run(root, "one")
    def link(): return next(a["href"] for a in shown(root).all("a") if a["href"].startswith("../runs"))
    assert link() == "../runs/one"
    (run.folder / "pretrain.ipynb").write_text("{}")
    assert link() == "../runs/one/pretrain.ipynb"
    (run.folder / "pretrain.html").write_text("")
    assert link() == "../runs/one/pretrain.html"


def test_two_hundred_runs(root):
    first = make_run(root, "r0")
    for i in range(1, 200):
        shutil.copytree(first.folder, root / f"r{i}")
    (root / "r7" / "metrics.csv").write_bytes(b"\xff")
    page = shown(root)
    assert len(page.all("article")) == 200 and len(page.all("img")) == 200 and sum("damaged" == a["class"] for a in page.all("article")) == 1
    assert len(list((root.parent / "gallery" / "pictures").iterdir())) == 1                    # the same picture is copied once


# writing

def test_a_list_of_runs(root, tmp_path):
    made = [make_run(root, name) for name in ("a", "b", "c")]
    page = Page(write_gallery(made[:2], tmp_path / "g").read_text(encoding="utf-8"))
    assert sorted(page.texts["h2"]) == ["a", "b"]


@pytest.mark.parametrize("make", [lambda p: p / "nothing", lambda p: p, lambda p: []])
def test_no_run(tmp_path, make):
    with pytest.raises(ConfigError, match="no run is there"): write_gallery(make(tmp_path), tmp_path / "g")
    assert not (tmp_path / "g").exists()


def test_a_gallery_is_replaced_and_leaves_no_old_pictures(root):
    run, out = make_run(root, "one"), root.parent / "gallery"
    shown(root)
    (out / "pictures" / "mine.webp").write_bytes(b"x")
    old = {p.name for p in (out / "pictures").iterdir()}
    cv2.imwrite(str(run.folder / "figures" / "curves.png"), np.zeros((9, 9, 3), np.uint8))
    shown(root)
    now = {p.name for p in (out / "pictures").iterdir()}
    assert len(now) == 2 and now & old == {"mine.webp"} and not [p for p in out.rglob("*") if p.name.startswith(".")]


def test_another_page_is_not_overwritten(root):
    make_run(root, "one")
    out = root.parent / "site"
    out.mkdir()
    (out / "index.html").write_text("<html>mine</html>")
    with pytest.raises(ConfigError, match="is no gallery"): write_gallery(root, out)
    assert (out / "index.html").read_text() == "<html>mine</html>" and not (out / "pictures").exists()


def test_a_place_where_nothing_can_be_made(root):
    make_run(root, "one")
    (root.parent / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"): write_gallery(root, root.parent / "file" / "g")


def test_a_full_disk_leaves_the_old_page(root, monkeypatch):
    make_run(root, "one")
    out = root.parent / "gallery"
    before = write_gallery(root, out).read_bytes()
    make_run(root, "two")
    def full(fd): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(runs_module.os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left") as e: write_gallery(root, out)
    assert "\n" not in str(e.value) and (out / "index.html").read_bytes() == before and not [p for p in out.rglob("*") if p.name.startswith(".")]


# in a browser

def _browser(playwright):
    "Chromium, wherever it is; skipped where there is none."
    for options in ({}, {"executable_path": shutil.which("chromium") or shutil.which("google-chrome") or "none"}):
        try: return playwright.chromium.launch(args=["--no-sandbox"], **options)
        except Exception: continue
    pytest.skip("no Chromium")


def test_in_a_browser_the_table_sorts_and_nothing_is_run(root):
    sync_api = pytest.importorskip("playwright.sync_api")
    for i, name in enumerate(["a", "<img src=q onerror=alert(1)>", "c"]): make_run(root, name, epochs=i, finished=False, started=f"2026-01-0{i + 1}T00:00:00")
    path, said = write_gallery(root, root.parent / "gallery"), []
    with sync_api.sync_playwright() as playwright:
        browser = _browser(playwright)
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.on("console", lambda m: said.append(m.text)), page.on("dialog", lambda d: said.append(d.message)), page.on("pageerror", lambda e: said.append(str(e)))
        page.goto(path.as_uri())
        def names(): return page.eval_on_selector_all("#runs tbody tr", "rows => rows.map(r => r.cells[0].textContent)")
        def click(text): page.locator("#runs th button", has_text=re.compile(f"^{text}$")).click()
        assert names() == ["c", "<img src=q onerror=alert(1)>", "a"]
        click("mIoU s1")
        assert names() == ["c", "<img src=q onerror=alert(1)>", "a"]                 # a has no figure: it stays at the end
        click("mIoU s1")
        assert names() == ["<img src=q onerror=alert(1)>", "c", "a"]
        click("run"), click("run")
        assert names() == ["<img src=q onerror=alert(1)>", "a", "c"] and page.locator("th[aria-sort=ascending]").count() == 1
        page.locator("article").last.scroll_into_view_if_needed()
        page.wait_for_function("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        browser.close()
    assert said == []
