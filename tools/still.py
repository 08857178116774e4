"Leave the still picture of a dashboard in the stored notebooks, and not the widget, which no kernel stands behind any more."
import sys
from pathlib import Path

import nbformat

WIDGET = "application/vnd.jupyter.widget-view+json"


def still(path):
    "Remove the widgets of one notebook that have a picture beside them; whether there were any."
    book, found = nbformat.read(path, 4), False
    for cell in book.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}) and output["data"].pop(WIDGET, None): found = True
    if found: nbformat.write(book, path)
    return found


if __name__ == "__main__":
    books = [Path(p) for p in sys.argv[1:]] or sorted(Path(__file__).resolve().parent.parent.glob("nbs/**/*.ipynb"))
    for path in books: still(path)
