"""How long the explorer takes to draw anew after a control has moved, and whether its memory grows: 264 px, two sensors, four seasons.

    python bench/explorer.py     about a minute; writes bench/explorer.md

A redraw is all that the kernel does: selection, pictures, their PNG, panels. The aim is less than 0.2 s. What the browser takes on top is not in it.
"""
import argparse
import gc
import statistics
import tempfile
import time
from pathlib import Path

import psutil
import torch
from bench import machine, table

from cromss.exploration import Exploration
from cromss.explorer import SelectionExplorer
from cromss.models import CrossModalSegmenter
from cromss.prepare import prepare
from cromss.scenes import ScenesSource

MOVES = {"kept fraction": ("keep", (.2, .4, .6, .8)), "ramp epoch": ("epoch", (0, 20, 40, 79)), "entangling": ("entangle", ("own", "geometric", "exchange", "published")),
         "confidence by": ("confidence", ("gini", "entropy")), "layer": ("above", ("label confidence s1", "disagreement", "suggested label", "label weight s2")), "opacity": ("opacity", (.1, .3, .5, .7)),
         "compare": ("compare", ("swipe", "side by side", "blend")), "swipe at": ("position", (.2, .4, .6)), "sensor": ("sensor", ("s1", "s2")), "pixel": ("row", (10, 20, 30)),
         "season (the network looks anew)": ("season", (1, 2, 0)), "location (the network looks anew)": ("location", (1, 0))}


def make_explorer(folder, size=264):
    "The explorer of a ResNet-18 U-Net with random weights."
    store = prepare(ScenesSource(2, seed=3, size=size), f"{folder}/store", progress=False)
    torch.manual_seed(0)
    return SelectionExplorer(Exploration(CrossModalSegmenter({"s1": 2, "s2": 13}, 9, "mid", "unet", "resnet18").eval(), store))


def redraws(explorer, name, values, rounds):
    "Seconds of every move of a control to another value."
    times = []
    for value in values * rounds:
        start = time.perf_counter()
        explorer.control[name].value = value
        times.append(time.perf_counter() - start)
    return times


def growth(explorer, moves=200):
    "Bytes that the process grows by over so many moves of a slider, after as many to warm up."
    sizes = []
    for _ in range(2):
        for n in range(moves): explorer.control["keep"].value = .1 + n % 17 * .05
        gc.collect()
        sizes.append(psutil.Process().memory_info().rss)
    return sizes[1] - sizes[0]


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--threads", type=int, default=2)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        explorer = make_explorer(folder)
        for name, values in MOVES.values(): redraws(explorer, name, values, 1)
        rows = [(what, redraws(explorer, name, values, 5)) for what, (name, values) in MOVES.items()]
        grown = growth(explorer)
    text = f"# Redrawing the explorer\n\n{machine(args.threads).replace(' (the input: 1)', '')}\n\n264 px, two sensors, a U-Net with ResNet-18, in the kernel alone; the aim is less than 200 ms.\n\n"
    text += table(("control", "median, ms", "slowest, ms"), [(what, f"{1e3 * statistics.median(t):.0f}", f"{1e3 * max(t):.0f}") for what, t in rows])
    text += f"\nMemory over 200 moves of a slider, after 200 others: {grown / 1e6:+.1f} MB.\n"
    (Path(__file__).parent / "explorer.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
