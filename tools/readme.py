"Makes README.md from nbs/index.ipynb: hidden cells dropped, links to notebooks pointed into nbs/. Run by `make readme`."
import re
import shutil
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
HIDDEN = [r"\A#\|\s*hide"]                                   # nbdev's directive for cells that are no reader's business
NOTEBOOK_LINK = re.compile(r"\]\(((?:[\w-]+/)*[\w-]+\.ipynb|images/[\w-]+\.png)")   # a link beside index.ipynb, seen from the root, lies in nbs/


def readme(notebook=ROOT / "nbs" / "index.ipynb"):
    "README.md's text, and its pictures as {relative path: bytes}, from the index notebook with its stored outputs."
    config = Config({"RegexRemovePreprocessor": {"patterns": HIDDEN, "enabled": True}})
    book = nbformat.read(notebook, as_version=4)
    book.metadata.language_info = {"name": "python"}         # nbdev_clean drops it; without it code is not coloured
    text, resources = MarkdownExporter(config=config).from_notebook_node(
        book, resources={"unique_key": "README", "output_files_dir": "README_files"})
    text = re.sub(r"(?:[ \t]*\n){3,}", "\n\n", text).replace("![png]", "![figure]")
    return NOTEBOOK_LINK.sub(r"](nbs/\1", text).strip() + "\n", dict(resources.get("outputs") or {})


def main():
    text, pictures = readme()
    shutil.rmtree(ROOT / "README_files", ignore_errors=True)
    for path, content in pictures.items():
        (ROOT / path).parent.mkdir(exist_ok=True)
        (ROOT / path).write_bytes(content)
    (ROOT / "README.md").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
