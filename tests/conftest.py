"Shared fixtures: where the real sample tiles and the reference vectors lie, and a thread limit for small machines."
import multiprocessing
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _folder(variable, *candidates):
    "The folder that the environment variable names, else the first candidate that exists; else the test is skipped, saying so."
    if named := os.environ.get(variable): candidates = (Path(named),)
    for folder in candidates:
        if folder.is_dir(): return folder
    pytest.skip(f"no folder {' or '.join(str(c) for c in candidates)}: set {variable} to where it lies")


@pytest.fixture(scope="session")
def root():
    "The root of the checkout."
    return ROOT


@pytest.fixture(scope="session")
def sample():
    "The folder of real sample tiles, shared/sample beside the checkout or the one that CROMSS_SAMPLE names."
    return _folder("CROMSS_SAMPLE", ROOT.parent / "shared" / "sample")


@pytest.fixture(scope="session")
def golden():
    "The folder of reference vectors: tests/golden, shared/golden beside the checkout, or the one that CROMSS_GOLDEN names."
    return _folder("CROMSS_GOLDEN", ROOT / "tests" / "golden", ROOT.parent / "shared" / "golden")


@pytest.fixture(scope="session", autouse=True)
def _threads():
    "Two threads for torch, if a collected test file has imported it: small tensors gain nothing from more."
    if torch := sys.modules.get("torch"): torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture
def undrawn(monkeypatch):
    "Figures of a run are made and their files are there, but nothing is drawn: that takes most of a tiny run's time."
    from cromss.runs import Run
    monkeypatch.setattr(Run, "save_figure", lambda run, figure, name: (run.folder / "figures" / f"{name}.png").touch())


@pytest.fixture(scope="session")
def processes():
    "Starts processes that have everything imported, from a server that never computed anything."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cromss.pretraining", "cromss.cli"])
    return context
