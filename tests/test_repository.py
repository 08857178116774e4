"The repository agrees with itself: notebooks and modules, README and index, settings and lock; and it carries nothing of the machine it was made on."
import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
BOOKS = sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
TEMPLATES = [NBS / f"{name}.ipynb" for name in ("pretrain", "finetune", "ablation") if (NBS / f"{name}.ipynb").exists()]


def cells(book, kind=None):
    found = json.loads(book.read_text(encoding="utf-8"))["cells"]
    return [c for c in found if kind in (None, c["cell_type"])]


def source(cell):
    return "".join(cell["source"])


def settings():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def each(books):
    return pytest.mark.parametrize("book", books, ids=[b.stem for b in books])


def tool(name, folder, *arguments):
    "Run one of nbdev's commands in a folder."
    done = subprocess.run([Path(sys.executable).parent / name, *arguments], cwd=folder, capture_output=True, text=True, timeout=300,
                          env={k: v for k, v in os.environ.items() if k != "IN_TEST"})
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def made_anew(tmp_path_factory):
    "A copy of the notebooks, exported and cleaned by nbdev; the checkout itself is left alone."
    folder = tmp_path_factory.mktemp("copy")
    shutil.copy(ROOT / "settings.ini", folder)
    for book in BOOKS:
        target = folder / book.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(book, target)
    (folder / "cromss").mkdir()
    tool("nbdev_export", folder)
    tool("nbdev_clean", folder)
    return folder


# notebooks and modules -------------------------------------------------------------------------------------------------------------

def test_modules_are_what_the_notebooks_export(made_anew):
    def modules(root): return {p.relative_to(root).as_posix(): p.read_bytes() for p in (root / "cromss").rglob("*.py")}
    here, anew = modules(ROOT), modules(made_anew)
    assert sorted(here) == sorted(anew), "a module without a notebook, or one not exported: run nbdev_export, delete what is left over"
    different = [name for name in here if here[name] != anew[name]]
    assert not different, "run nbdev_export (and edit notebooks, not modules)"


def test_every_module_names_an_existing_notebook():
    for module in (ROOT / "cromss").rglob("*.py"):
        if module.name in ("__init__.py", "_modidx.py"): continue
        named = re.search(r"File to edit: (\S+\.ipynb)", module.read_text(encoding="utf-8"))
        assert named and (module.parent / named[1]).resolve().is_file(), module.name


@each(BOOKS)
def test_notebooks_are_clean(made_anew, book):
    assert book.read_bytes() == (made_anew / book.relative_to(ROOT)).read_bytes(), "run nbdev_clean"


@each(TEMPLATES)
def test_cleaning_keeps_the_parameters_tag(made_anew, book):
    tagged = [c for c in cells(made_anew / book.relative_to(ROOT), "code") if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    for line in ast.parse(source(tagged[0])).body: assert isinstance(line, ast.Assign), "the parameters cell holds plain values only"


@each(BOOKS)
def test_cells_import_or_work_but_not_both(book):
    for cell in cells(book, "code"):
        code = "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in source(cell).splitlines())
        kinds = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(code).body}
        assert len(kinds) < 2, f"imports and code in one cell:\n{source(cell)}"
        assert "import *" not in code or "#| hide" in code


@each(BOOKS)
def test_a_notebook_opens_with_title_and_subtitle(book):
    first = next(c for c in cells(book) if c["cell_type"] != "raw")
    assert first["cell_type"] == "markdown" and re.match(r"# \S.*\n\n?> \S", source(first)), source(first)


@each(BOOKS)
def test_exports_have_a_module(book):
    codes = [source(c) for c in cells(book, "code")]
    if any(re.search(r"^#\|\s*exports?i?\b", code, re.M) for code in codes):
        assert sum(bool(re.search(r"^#\|\s*default_exp \w+", code, re.M)) for code in codes) == 1


@each(BOOKS)
def test_stored_outputs_are_fit_to_be_seen(book):
    for cell in cells(book, "code"):
        for output in cell["outputs"]:
            assert output["output_type"] != "error", source(cell)
            assert "Traceback (most recent call last)" not in json.dumps(output), source(cell)
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {}), f"{source(cell)}: run tools/still.py, which leaves the picture"
    assert "widgets" not in json.loads(book.read_text(encoding="utf-8"))["metadata"]
    assert book.stat().st_size < 3e6, "figures at a lower dpi"


def test_no_exported_code_imports_fastcore():
    for module in (ROOT / "cromss").rglob("*.py"):
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.split(".")[0] in ("fastcore", "nbdev", "execnb")], module.name


# README, site, package -------------------------------------------------------------------------------------------------------------

def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_is_what_the_index_yields():
    text, pictures = load(ROOT / "tools" / "readme.py").readme()
    assert (ROOT / "README.md").read_text(encoding="utf-8") == text, "run make readme"
    assert {p.relative_to(ROOT).as_posix(): p.read_bytes() for p in ROOT.glob("README_files/*")} == pictures, "run make readme"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text(encoding="utf-8")):
        if "://" not in link: assert (ROOT / link).exists(), link


@each(BOOKS)
def test_links_between_notebooks_lead_somewhere(book):
    for link in re.findall(r"\]\(([^)#\s]+)", "".join(map(source, cells(book, "markdown")))):
        if "://" not in link: assert (book.parent / link).exists(), link


def test_site_configuration_is_one_file():
    link = NBS / "_quarto.yml"
    assert link.is_symlink() and os.readlink(link) == "../_quarto.yml" and link.read_bytes() == (ROOT / "_quarto.yml").read_bytes()
    for target in re.findall(r"href: (\S+\.ipynb)", link.read_text(encoding="utf-8")): assert (NBS / target).exists(), target


def test_lock_holds_every_requirement():
    def plain(name): return re.sub(r"[-_.]+", "-", name).lower()
    locked = {plain(n): v for n, v in re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "requirements.lock").read_text(encoding="utf-8"), re.M)}
    for requirement in (settings()["requirements"] + " " + settings()["dev_requirements"]).split():
        name, pin = re.match(r"([\w.-]+)(?:\[[^\]]*\])?(?:==(.*))?", requirement).groups()
        assert plain(name) in locked, f"{name}: run make lock"
        if pin: assert locked[plain(name)] == pin, f"{name}: run make lock"


def test_wheel_carries_templates_and_commands(tmp_path):
    for name in ("setup.py", "settings.ini", "LICENSE", "README.md", "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("cromss", "nbs"): shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "setup.py", "-q", "bdist_wheel", "-d", "out"], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    with zipfile.ZipFile(next((tmp_path / "out").glob("*.whl"))) as wheel:
        names = wheel.namelist()
        entry_points = wheel.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
        metadata = wheel.read(next(n for n in names if n.endswith("dist-info/METADATA"))).decode()
        for table in (NBS / "published").glob("*.csv"): assert wheel.read(f"cromss/published/{table.name}") == table.read_bytes()
        for book in TEMPLATES: assert wheel.read(f"cromss/templates/{book.name}") == book.read_bytes()
    assert "cromss = cromss.cli:main" in entry_points and "cromss = cromss._modidx:d" in entry_points
    assert "Apache-2.0" in metadata and any(n.endswith("licenses/LICENSE") for n in names)
    assert all(f"Provides-Extra: {extra}" in metadata for extra in ("dev", "peers", "export", "wandb", "mlflow"))


def test_licence_and_version():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Grant of Patent License" in text and "END OF TERMS AND CONDITIONS" in text
    version = settings()["version"]
    assert f'__version__ = "{version}"' in (ROOT / "cromss" / "__init__.py").read_text(encoding="utf-8")
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_ci_calls_the_readmes_command():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    text = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "set -euo pipefail" in text and text.rstrip().endswith("make test")


# nothing of the machine ------------------------------------------------------------------------------------------------------------

def committed():
    "Files that are, or would be, committed."
    try:
        done = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True, timeout=60)
        files = [ROOT / name for name in done.stdout.decode().split("\0") if name]
    except (OSError, subprocess.SubprocessError):
        pytest.skip("no git, or no git checkout")
    return [f for f in files if f.is_file() and not f.is_symlink()]


def test_no_path_or_host_of_a_machine():
    folders = re.compile(r"(?<![\w.+/=})~-])/(?:work|root|tmp|opt|home)/\w")
    hosts = re.compile("|".join(("py" + r"pi\.org", "python" + "hosted", "index" + "-url [h=]", r"//(?:localhost|127\.0\.0\.1)[:/]")))
    for file in committed():
        try: text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError: continue
        for pattern in (folders, hosts):
            found = pattern.search(text)
            assert not found, f"{file.relative_to(ROOT)}: {text[max(0, found.start() - 60):found.end() + 60]!r}"


def test_no_large_files_and_no_outputs():
    for file in committed():
        assert file.stat().st_size < 3e6, file
        assert file.relative_to(ROOT).parts[0] not in ("runs", "stores", "_docs", "_proc", "build", "dist"), file
