"Preparing in many processes, killed and gone on with: the store is the same, whatever happened on the way."
import contextlib
import hashlib
import os
import signal
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from functools import partialmethod
from pathlib import Path

import numpy as np
import psutil
import pytest
from disks import disk, remount
from test_prepare import Memory, report

from cromss import prepare as module
from cromss.config import ConfigError, DataError, StoreError
from cromss.prepare import prepare
from cromss.sources import SkipLocation

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL on Windows")


def contents(folder):
    "The checksum of every file of a folder."
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


class Slow(Memory):
    "A source whose locations take a while; some are left out."
    def __init__(self, count=40, pause=0.005): super().__init__(count, size=32, missing=[("m3", "s1", 0)], skip=("m5", "m17")); self.pause = pause

    def read(self, key):
        time.sleep(self.pause)
        return super().read(key)


class Deadly(Memory):
    "A source one of whose locations ends the process that reads it, once or always."
    def __init__(self, marker=None): super().__init__(12, size=16); self.marker = marker

    def read(self, key):
        if key == "m7" and not (self.marker and Path(self.marker).exists()):
            if self.marker: Path(self.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(key)


class Useless(Memory):
    "A source without a usable location."
    def read(self, key): raise SkipLocation("bad raster", f"{key}: the server does not answer")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The store of an uninterrupted preparation, and what is in it."
    store = prepare(Slow(), tmp_path_factory.mktemp("whole") / "store", shard_size=4, progress=False, workers=0)
    return store, contents(store.folder)


def prepared(folder, source, workers):
    "What a process does that is going to be killed."
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)      # a job in the background may have been told to ignore it
    prepare(source, folder, shard_size=4, progress=False, workers=workers)


@pytest.fixture
def preparing(processes):
    "Starts processes that prepare, each in a session of its own."
    def start(folder, workers, source=None):
        process = processes.Process(target=prepared, args=(folder, source or Slow(), workers))
        process.start()
        return process
    return start


def finished(folder): return len(list((folder.with_name(folder.name + ".partial") / "parts").glob("*.npz")))


def family(pid):
    with contextlib.suppress(psutil.NoSuchProcess): return psutil.Process(pid).children(recursive=True)
    return []


def gone(processes, within=20):
    "Whether all of them end by themselves."
    return not psutil.wait_procs(processes, timeout=within)[1]


def test_processes_make_the_same_store(whole, tmp_path):
    store = prepare(Slow(), tmp_path / "store", shard_size=4, progress=False, workers=2)
    assert contents(store.folder) == whole[1] and store.verify().ok and store.id == whole[0].id
    assert len(store) == 38 and report(store)["dropped"] == {"id mismatch": ["m5", "m17"]} and len(store.seasons(store.keys.index("m3"))) == 2


def attempts(preparing, folder, workers, kills, source):
    "Attempts that are killed by SIGKILL at random moments, each after its first new shard; checks that no worker outlives them and that finished shards stay as they are."
    moments, shas = np.random.default_rng(workers), {}
    for _ in range(kills):
        for part in sorted(folder.with_name("store.partial").glob("parts/*.npz"))[5:]: part.unlink()           # so that none comes to the end
        before, process = finished(folder), preparing(folder, workers, source)
        while finished(folder) == before and process.is_alive(): time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.1))
        children = family(process.pid)
        process.kill()
        process.join()
        assert gone(children) and not folder.exists()
        now = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.with_name("store.partial").glob("shard-*.lmdb")}
        assert all(now[name] == sha for name, sha in shas.items())
        shas |= now


@pytest.mark.parametrize("workers, kills", [(0, 10), (2, 3)])
def test_killed_at_random_moments_it_is_the_same_store(whole, tmp_path, preparing, workers, kills):         # fault 3
    folder, source = tmp_path / "store", Slow(pause=0.02)
    attempts(preparing, folder, workers, kills, source)
    with pytest.warns(UserWarning, match="its lock is taken over"): store = prepare(source, folder, shard_size=4, progress=False, workers=0)
    assert contents(folder) == whole[1] and store.verify().ok and not folder.with_name("store.partial").exists() and not folder.with_name("store.lock").exists()


def test_sigterm_and_ctrl_c_keep_what_is_finished(whole, tmp_path, preparing):
    for stop, workers in ((signal.SIGTERM, 0), (signal.SIGINT, 2)):
        folder = tmp_path / stop.name
        process = preparing(folder, workers, source=Slow(pause=0.05))
        while not finished(folder) and process.is_alive(): time.sleep(0.01)
        children = family(process.pid)
        os.kill(process.pid, stop)
        process.join(30)
        assert process.exitcode and gone(children) and not folder.exists() and finished(folder) >= 1
        prepare(Slow(pause=0.05), folder, shard_size=4, progress=False, workers=0)
        assert contents(folder) == whole[1]


def test_a_second_preparation_is_refused(tmp_path, preparing):                                     # fault 30
    process = preparing(tmp_path / "store", 0, source=Slow(pause=0.2))
    while not (tmp_path / "store.lock").exists(): time.sleep(0.01)
    time.sleep(0.1)
    with pytest.raises(StoreError, match=f"process {process.pid} on .* is preparing it; wait for it"): prepare(Memory(), tmp_path / "store", progress=False)
    process.kill()
    process.join()
    with pytest.warns(UserWarning, match="taken over"): assert len(prepare(Memory(), tmp_path / "store", progress=False)) == 3


def test_other_settings_are_not_mixed(tmp_path):
    class Failing(Memory):
        def read(self, key):
            if key == "m9": raise DataError("m9: not in dB")
            return super().read(key)
    with pytest.raises(DataError, match="not in dB"): prepare(Failing(10), tmp_path / "store", shard_size=4, progress=False)
    assert finished(tmp_path / "store") == 2
    with pytest.raises(StoreError, match=r"2 shards were finished with other settings \(patch: None -> 8\); ask for the same again, or discard them by restart=True"):
        prepare(Memory(10), tmp_path / "store", shard_size=4, patch=8, progress=False)
    assert len(prepare(Memory(10), tmp_path / "store", shard_size=4, patch=8, progress=False, restart=True)) == 90
    with pytest.raises(DataError, match="not in dB"): prepare(Failing(10), tmp_path / "one", progress=False)
    assert not finished(tmp_path / "one") and not (tmp_path / "one.partial").exists()   # without a finished shard nothing stays


def test_damaged_parts_are_written_again(whole, tmp_path, preparing):
    process = preparing(tmp_path / "store", 0, source=Slow(pause=0.05))
    while finished(tmp_path / "store") < 4 and process.is_alive(): time.sleep(0.01)
    process.kill()
    process.join()
    partial = tmp_path / "store.partial"
    (partial / "parts/00000.npz").write_bytes(b"no archive")
    (partial / "shard-00001.lmdb").write_bytes((partial / "shard-00001.lmdb").read_bytes()[:5000])
    (partial / "shard-00002.lmdb").unlink()
    with pytest.warns(UserWarning, match="taken over"): prepare(Slow(pause=0.05), tmp_path / "store", shard_size=4, progress=False)
    assert contents(tmp_path / "store") == whole[1]


# -- workers ----------------------------------------------------------------------------------------------------------------------------------------

def test_a_killed_worker_is_replaced(tmp_path):                                         # fault 29
    marker = tmp_path / "died"
    store = prepare(Deadly(str(marker)), tmp_path / "store", shard_size=2, progress=False, workers=2)
    assert marker.exists() and len(store) == 12 and store.verify().ok


def test_a_location_that_kills_every_worker_is_named(tmp_path):                         # fault 29
    with pytest.raises(StoreError, match="the process that prepared m6 to m7 ended without a word, several times; is it short of memory"):
        prepare(Deadly(), tmp_path / "store", shard_size=2, progress=False, workers=2)
    assert finished(tmp_path / "store") >= 1


def test_errors_of_workers_are_those_of_the_source(tmp_path):
    with pytest.raises(DataError, match="none of 2048 locations can be used: 2048 bad raster, such as m0: the server does not answer"):
        prepare(Useless(4000), tmp_path / "store", shard_size=128, progress=False, workers=0)
    with pytest.raises(DataError, match="none of 20[0-9]* locations can be used"): prepare(Useless(3000), tmp_path / "store", shard_size=100, progress=False, workers=2)
    assert not (tmp_path / "store").exists()


def test_scheduler_by_its_address(whole, tmp_path):
    from distributed import LocalCluster
    with LocalCluster(1, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster:
        store = prepare(Slow(), tmp_path / "store", shard_size=4, progress=False, scheduler=cluster.scheduler_address)
    assert contents(store.folder) == whole[1]


def test_scheduler_that_is_not_there(tmp_path, monkeypatch):
    from distributed import Client
    monkeypatch.setattr("distributed.Client", lambda address, timeout: Client(address, timeout=1))
    nowhere = "tcp://{}:9".format("127.0.0.1")
    with pytest.raises(ConfigError, match=f"scheduler='{nowhere}': cannot be reached"): prepare(Memory(), tmp_path / "store", progress=False, scheduler=nowhere)
    assert not (tmp_path / "store.partial").exists() and not (tmp_path / "store.lock").exists()


def test_small_sets_are_prepared_here(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_on_dask", lambda *_: pytest.fail("a handful of locations needs no other process"))
    assert len(prepare(Memory(5), tmp_path / "store", shard_size=2, progress=False)) == 5


# -- the disk ---------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("workers", [0, 2])
def test_full_disk_keeps_what_is_finished(tmp_path, workers):                           # fault 5
    with disk(tmp_path / "disk", "3m") as small:
        with pytest.raises(StoreError, match="cannot be written .*; make room or choose another folder") as e:
            prepare(Slow(120, pause=0), small / "store", shard_size=4, progress=False, workers=workers)
        assert "\n" not in str(e.value) and finished(small / "store") >= 1 and not (small / "store").exists()
        kept = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (small / "store.partial").glob("shard-*.lmdb")}
        remount(small, "size=64m")                                                      # somebody made room
        store = prepare(Slow(120, pause=0), small / "store", shard_size=4, progress=False)
        assert store.verify().ok and len(store) == 118 and all(contents(store.folder)[name] == sha for name, sha in kept.items())


def test_read_only_target(tmp_path):                                                    # fault 6
    with disk(tmp_path / "disk", "3m") as small:
        remount(small, "ro")
        with pytest.raises(StoreError, match="cannot be written"): prepare(Memory(), small / "store", progress=False)


def test_progress_counts_what_was_finished_before(tmp_path, monkeypatch, capsys, preparing):       # fault 40
    clock = iter(np.arange(0, 1e4, 6.0))
    process = preparing(tmp_path / "store", 0, source=Slow(pause=0.05))
    while finished(tmp_path / "store") < 3 and process.is_alive(): time.sleep(0.01)
    process.kill()
    process.join()
    done = 4 * finished(tmp_path / "store")
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: float(next(clock))))
    with pytest.warns(UserWarning, match="taken over"): prepare(Slow(), tmp_path / "store", shard_size=4)
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == f"in memory: 40 locations in 10 shards, in this process; {done // 4} shards are finished and kept as they were read (restart=True, --restart, reads all again)"
    left = 40 - done - 1                                            # locations a clock tick of 6 s each, from what was read since
    assert lines[0] == f"{done + 1} of 40 locations, {6 * left // 60:02}:{6 * left % 60:02} left" and lines[-1] == "40 of 40 locations, 00:00 left"


def test_workers_tell_of_each_location(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module.Progress, "__init__", partialmethod(module.Progress.__init__, every=0.0))
    prepare(Slow(24, pause=0.1), tmp_path / "store", shard_size=12, workers=2)
    first, *lines = capsys.readouterr().err.splitlines()
    done = [int(line.split()[0]) for line in lines]
    assert first.endswith("24 locations in 2 shards, by 2 processes") and done == sorted(done) and done[-1] == 24 and len(done) > 12, lines


def test_two_preparations_share_a_scheduler(whole, tmp_path):
    from distributed import LocalCluster
    with LocalCluster(2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster, ThreadPoolExecutor(2) as pool:
        both = [pool.submit(prepare, Slow(pause=0.03), tmp_path / name, shard_size=4, progress=False, scheduler=cluster.scheduler_address) for name in ("one", "two")]
        for job in both: assert contents(job.result().folder) == whole[1]


def test_what_is_kept_is_said(tmp_path, capsys):
    class Stopped(Memory):
        def read(self, key):
            if key == "m9": raise KeyboardInterrupt
            return super().read(key)
    with pytest.raises(KeyboardInterrupt): prepare(Stopped(10), tmp_path / "store", shard_size=4)
    assert capsys.readouterr().err.splitlines()[-1] == f"2 of 3 shards are finished and kept in {tmp_path / 'store.partial'}; the same call goes on with the others"
