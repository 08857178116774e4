"""A store of 250,000 locations with tiny values: how long it takes to prepare and to open, what memory it needs, and when the first batch is there.

    python bench/index.py                      about 15 minutes and 4 GB of disk
    python bench/index.py --count 10000        less of both
"""
import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from cromss.classes import DYNAMIC_WORLD
from cromss.prepare import prepare
from cromss.sensors import SENSORS
from cromss.store import Location


class Tiny:
    "A source of locations of 8 px, spread over the Earth."
    kind, root, scheme, sensors = "tiny", "memory", DYNAMIC_WORLD, {n: SENSORS[n] for n in ("s1", "s2")}

    def __init__(self, count): self.count = count

    def keys(self): return [f"{i:07d}" for i in range(self.count)]

    def describe(self): return f"{self.count:,} tiny locations"

    def read(self, key):
        rng = np.random.default_rng(int(key))
        images = {n: [rng.integers(0, 256, (s.num_bands, 8, 8), np.uint8) for _ in range(4)] for n, s in self.sensors.items()}
        east, north = rng.uniform(200_000, 800_000), rng.uniform(0, 8e6)
        return Location(key, ("0", "1", "2", "3"), images, [rng.integers(0, 9, (8, 8), np.uint8) for _ in range(4)], crs=f"EPSG:{32601 + int(rng.integers(60))}", transform=(10, 0, east, 0, -10, north))


OPENING = """
import sys, time
def memory(what): return int(next(l.split()[1] for l in open("/proc/self/status") if l.startswith(what))) / 1024
from cromss.config import PretrainConfig
from cromss.dataset import split_locations
from cromss.pretraining import PatchDataModule
from cromss.store import Store
before, start = memory("VmRSS"), time.perf_counter()
store = Store.open(sys.argv[1])
opened, grown = time.perf_counter() - start, memory("VmRSS") - before
start = time.perf_counter()
data = PatchDataModule(PretrainConfig(data=sys.argv[1], crop=8, batch_size=128, num_workers=int(sys.argv[2]), smoothing=None, validation=0.01), store)
batch = next(iter(data.train_dataloader()))
first = time.perf_counter() - start
start = time.perf_counter()
split = split_locations(store, 0.1, 8, block_km=100)
print(f"{len(store):,} locations: opened in {opened:.2f} s with {grown:.0f} MB more; first batch of {len(batch['key'])} after {first:.2f} s more "
      f"({sys.argv[2]} workers); split by blocks of 100 km in {time.perf_counter() - start:.2f} s ({split}); peak memory {memory('VmHWM'):.0f} MB, of which {before:.0f} MB are the imports")
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=250_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, start = Path(name) / "store", time.perf_counter()
        store = prepare(Tiny(given.count), folder, workers=given.workers)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        size = sum(p.stat().st_size for p in folder.iterdir()) / 1e6
        print(f"{len(store):,} locations prepared by {given.workers} processes in {time.perf_counter() - start:.0f} s: {size:.0f} MB, index {(folder / 'index.npz').stat().st_size / 1e6:.0f} MB, "
              f"{len(store.manifest['shards'])} shards; peak memory of this process {peak:.0f} MB")
        for workers in (0, 2): subprocess.run([sys.executable, "-c", OPENING, str(folder), str(workers)], check=True)


if __name__ == "__main__": main()
