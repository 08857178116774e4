"The explorer in a real browser: JupyterLab and the page of `cromss app`, without the web."
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

from cromss.config import preset
from cromss.prepare import prepare
from cromss.pretraining import pretrain
from cromss.scenes import ScenesSource

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next((p for p in (os.environ.get("CROMSS_CHROMIUM"), shutil.which("chromium"), shutil.which("chromium-browser"), shutil.which("google-chrome")) if p), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install it (Debian: apt-get install chromium), or name one by CROMSS_CHROMIUM")
HOST = "localhost"
KNOWN = ("satisfy", "favicon", "Unsatisfied", "is already registered", "WebGL", "autoplay", "no such plugin")     # what JupyterLab and Voilà say of themselves


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    store = prepare(ScenesSource(6, seed=1, size=64), folder / "store", progress=False)
    config = preset("demo", data=str(store.folder), epochs=4, min_steps=4, encoder_depth=3, decoder_channels=[16, 8, 8], runs=str(folder / "runs"), name="one", loggers=(), selection={"ramp_epochs": 3})
    return pretrain(config, store)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Watched:
    "A page with what it asked for and complained of."
    def __init__(self, browser):
        self.page = browser.new_page(viewport={"width": 1500, "height": 1250})
        self.foreign, self.errors = [], []
        self.page.on("request", lambda r: None if re.match(rf"(https?|wss?)://{HOST}[:/]|data:|blob:", r.url) else self.foreign.append(r.url))
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))

    def _note(self, message):
        "An error on the console, and where it comes from; a call of JupyterLab to its own server that a busy machine refuses is none of ours."
        place = message.location.get("url", "")
        own = any(k in message.text for k in KNOWN) or message.text.startswith("Failed to load resource") and re.search(r"/(lab/)?api/", place)
        if message.type == "error" and not own: self.errors.append(f"{message.text} ({place})")


def free_port():
    with socket.socket() as s:
        s.bind((HOST, 0))
        return s.getsockname()[1]


def start(command, folder, port):
    "A server that answers, or its complaint."
    log = (folder / "server.log").open("w")
    process = subprocess.Popen([sys.executable, *command], cwd=folder, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1", "JUPYTER_TOKEN": "secret", "PYTHONPATH": str(Path(__file__).resolve().parent.parent)})
    for _ in range(600):
        try:
            with socket.create_connection((HOST, port), timeout=5): return process
        except OSError:
            if process.poll() is not None: break
            time.sleep(.2)
    process.kill()
    raise AssertionError((folder / "server.log").read_text(encoding="utf-8")[-3000:])


def stop(process):
    process.terminate()
    try: process.wait(15)
    except subprocess.TimeoutExpired: process.kill()


@pytest.fixture(scope="module")
def voila(run, tmp_path_factory):
    port, folder = free_port(), tmp_path_factory.mktemp("voila")
    process = start(["-c", "import sys; from cromss.cli import main; sys.exit(main(sys.argv[1:]))", "app", "--run", str(run.folder), "--no_browser", "--port", str(port)], folder, port)
    yield f"http://{HOST}:{port}/?token=secret"
    stop(process)


@pytest.fixture(scope="module")
def lab(run, tmp_path_factory):
    port, folder = free_port(), tmp_path_factory.mktemp("lab")
    code = f"from cromss.explorer import SelectionExplorer\nSelectionExplorer({str(run.folder)!r})"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)], metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}), folder / "explore.ipynb")
    process = start(["-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder}", f"--LabApp.app_settings_dir={Path(__file__).resolve().parent.parent / 'tools' / 'lab'}"], folder, port)
    yield f"http://{HOST}:{port}/lab/tree/explore.ipynb?token=secret"
    stop(process)


MAP = ".jupyter-widgets.leaflet-widgets"


def control(page, label): return page.locator(".widget-inline-hbox", has=page.get_by_text(label, exact=True)).first


def pixels(page):
    "What the map shows, once it has come to rest."
    page.wait_for_timeout(250)
    before = page.locator(MAP).nth(1).screenshot()
    for _ in range(40):
        page.wait_for_timeout(150)
        now = page.locator(MAP).nth(1).screenshot()
        if now == before: return now
        before = now
    return before


def changes(page, act, what):
    "Do something, and wait for the map to look otherwise."
    before = pixels(page)
    act()
    for _ in range(40):
        if pixels(page) != before: return
    raise AssertionError(f"{what}: the map does not change")


def press(locator, key, times=1):
    locator.focus()
    for _ in range(times): locator.press(key)


def exercise(watched, folder, name):
    "Use every control as a person would, by mouse and by keyboard."
    page = watched.page
    try: page.locator(f"{MAP} .leaflet-image-layer").nth(1).wait_for(timeout=120_000)
    finally: page.screenshot(path=folder / f"{name}.png")
    pixels(page)
    page.screenshot(path=folder / f"{name}.png")
    handle = lambda label: control(page, label).locator(".noUi-handle")
    select = lambda label: control(page, label).locator("select")
    changes(page, lambda: press(handle("opacity"), "ArrowLeft", 6), "opacity")
    changes(page, lambda: press(handle("kept fraction"), "ArrowLeft", 4), "kept fraction")
    changes(page, lambda: select("layer").select_option(label="Label"), "layer")
    changes(page, lambda: select("class colours").select_option(label="told apart by all"), "class colours")
    changes(page, lambda: select("over").select_option(label="Image S1"), "over")
    changes(page, lambda: select("compare").select_option(label="swipe"), "compare")
    changes(page, lambda: press(handle("swipe at"), "ArrowRight", 20), "swipe at")
    changes(page, lambda: select("compare").select_option(label="blend"), "blend")
    changes(page, lambda: select("only labels").select_option(index=[4]), "only labels")
    control(page, "only labels").locator("option").nth(4).click(modifiers=["Control"])
    changes(page, lambda: select("season").select_option(index=1), "season")
    changes(page, lambda: select("layer").select_option(label="Entangled label confidence S2"), "layer")
    changes(page, lambda: select("entangling").select_option(label="off: its own alone"), "entangling")
    changes(page, lambda: select("layer").select_option(label="Entangled prediction confidence S2"), "layer")
    changes(page, lambda: select("confidence by").select_option(label="gini"), "confidence by")
    changes(page, lambda: select("layer").select_option(label="Selected S2"), "layer")
    changes(page, lambda: press(handle("ramp epoch"), "Home"), "ramp epoch")
    changes(page, lambda: (page.locator(".widget-play button, .jupyter-widget-play button").first.click(), page.wait_for_timeout(2500)), "play the ramp")
    before = page.get_by_text("entangled label confidence, S2", exact=False).count()
    select("sensor").select_option(label="S1")
    page.get_by_text("entangled label confidence, S1", exact=False).first.wait_for()
    assert before
    box = page.locator(MAP).nth(1).bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.get_by_text("; * its label", exact=False).first.wait_for()
    read = page.locator("svg text", has_text="label weight").all_text_contents()
    assert len(read) == 2 and read[0].startswith("S1: label confidence"), read
    field = control(page, "location").locator("input")
    changes(page, lambda: (field.fill("3"), field.press("Enter")), "location")
    assert control(page, "its name").locator("input").input_value() == "scene-00003"
    changes(page, lambda: select("compare").select_option(label="side by side"), "side by side")
    assert page.locator(MAP).count() == 3
    page.screenshot(path=folder / f"{name}-after.png")
    assert not watched.foreign and not watched.errors, (watched.foreign, watched.errors)


def test_the_page_of_the_app(voila, browser, tmp_path):
    watched = Watched(browser)
    watched.page.goto(voila, wait_until="domcontentloaded", timeout=120_000)
    exercise(watched, tmp_path, "voila")


def test_the_page_needs_its_token(voila):
    "Without it there is the page that asks for it, and no kernel."
    address = voila.partition("?")[0]
    for path in ("", "api/kernels", "voila/files/explorer.ipynb"):
        try: answer = urllib.request.urlopen(address + path, timeout=60)
        except urllib.error.HTTPError as e: assert e.code in (401, 403, 404), path
        else: assert "/login" in answer.geturl(), path


def run_cell(page, cell):
    "Run a cell; before its kernel is there, JupyterLab forgets that it was told to."
    page.get_by_text("| Idle").first.wait_for(timeout=120_000)
    for _ in range(12):
        page.keyboard.press("Escape")                # a dialog that says so
        cell.click()
        page.keyboard.press("Shift+Enter")
        try: return page.locator(".jp-InputPrompt", has_text=re.compile(r"\[(\*|\d+)\]")).first.wait_for(timeout=10_000)
        except playwright.TimeoutError: continue
    raise AssertionError("the kernel does not start")


def test_jupyterlab(lab, browser, tmp_path):
    watched = Watched(browser)
    watched.page.goto(lab, wait_until="domcontentloaded", timeout=120_000)
    cell = watched.page.locator(".jp-CodeCell .cm-content").first
    cell.wait_for(timeout=120_000)
    run_cell(watched.page, cell)
    exercise(watched, tmp_path, "lab")
    assert not watched.page.get_by_text("Jupyter news").count()            # asks for no news, nor for leave to fetch them
