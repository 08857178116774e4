"Damage to the files of a data set, and what reading it may then do: refuse in one typed error, or give a right answer."
import os
import shutil
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cromss.config import CromssError
from cromss.sources import SkipLocation, open_source

CASES = int(os.environ.get("CROMSS_FUZZ", 0))      # a format, whatever its test asks for; `make fuzz` takes 2,000


def damages():
    "What is done to one file: a kind of damage, where (a fraction of the file), and bytes."
    kinds = st.sampled_from(["flip", "flip", "flip", "cut", "insert", "zero", "empty", "remove", "swap", "append", "text"])
    return st.tuples(kinds, st.floats(0, 1), st.binary(min_size=1, max_size=16), st.floats(0, 1))


def damage(folder, which):
    "Do it to a file of the folder; its path."
    kind, at, data, pick = which
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    if not files: return None
    path = files[min(int(pick * len(files)), len(files) - 1)]
    old = path.read_bytes()
    i = min(int(at * len(old)), max(len(old) - 1, 0))
    if kind == "remove": path.unlink()
    elif kind == "swap": path.write_bytes(files[(files.index(path) + 1) % len(files)].read_bytes())
    else:
        new = {"flip": old[:i] + bytes([old[i] ^ (data[0] or 1)]) + old[i + 1:] if old else b"", "cut": old[:i], "insert": old[:i] + data + old[i:],
               "zero": old[:i] + bytes(len(data)) + old[i + len(data):], "empty": b"", "append": old + data, "text": data * 8}[kind]
        path.write_bytes(new)
    return path


def everything(path, options):
    "All locations of a data set, {key: Location}, and those left out, {key: reason}."
    source, read, left = open_source(path, **options), {}, {}
    for key in source.keys():
        try: read[key] = source.read(key)
        except SkipLocation as e: left[key] = e.reason
    for key, location in read.items(): location.check(source.sensors, source.scheme, source.coding)
    return read, left


def sensible(read, whole, exact):
    "Locations are those of the undamaged data set, with its shapes; with `exact`, their pixels too."
    for key, location in read.items():
        if key not in whole: assert not exact, f"{key} is no location of the data set"; continue
        for name, images in location.images.items():
            for season, image in zip(location.seasons, images):
                assert np.isfinite(image).any() or image.dtype != np.float32 or location.valid is not None
                if exact and season in whole[key].seasons:
                    assert np.array_equal(image, whole[key].images[name][whole[key].seasons.index(season)]), f"{key}/{season}/{name} was read wrong"


def fuzz(write, folder, exact=False, cases=40):
    "Damage a data set again and again: `write(folder)` gives (path to open, options). `exact`: the format has checksums, so pixels that are read are right."
    path, options = write(folder / "whole")
    relative = Path(path).relative_to(folder / "whole")
    whole, _ = everything(path, options)
    assert whole, "the undamaged data set has no location"
    turn = [0]

    @settings(max_examples=CASES or cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(damages(), min_size=1, max_size=2))
    def case(which):
        turn[0] += 1
        copy = folder / f"case{turn[0]}"
        shutil.copytree(folder / "whole", copy)
        try:
            for one in which: damage(copy, one)
            moved = {k: str(v).replace(str(folder / "whole"), str(copy)) if isinstance(v, (str, Path)) else v for k, v in options.items()}
            try: read, _ = everything(copy / relative, moved)
            except CromssError as e:
                assert str(e).strip() and "\n" not in str(e).strip(), f"not one line: {e!r}"
                return
            sensible(read, whole, exact)
        finally: shutil.rmtree(copy, ignore_errors=True)
    case()
