"Archives: folders and zip archives read alike, and everything that an archive from elsewhere may try is refused without a trace."
import bz2
import gzip
import io
import os
import pickle
import signal
import stat
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import refused

from cromss import archives
from cromss.archives import BadMember, Tree, archive_parts, check_archive, extract
from cromss.config import DataError
from cromss.sources import SkipLocation, read_raster

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
FILES = {"a/one.bin": bytes(range(256)) * 40, "a/b/two.txt": b"two", "a/empty": b"", "c/three.txt": b"3" * 5000}


def zipped(path, files=FILES, method=zipfile.ZIP_DEFLATED):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                   # two of one name
        with zipfile.ZipFile(path, "w", method) as f:
            for name, data in (files.items() if isinstance(files, dict) else files): f.writestr(name, data)
    return path


def tarred(path, files=FILES, mode="w"):
    with tarfile.open(path, mode) as f:
        for name, data in (files.items() if isinstance(files, dict) else files):
            info = tarfile.TarInfo(name)
            if isinstance(data, dict): [setattr(info, k, v) for k, v in data.items()]; f.addfile(info)
            else: info.size = len(data); f.addfile(info, io.BytesIO(data))
    return path


def contents(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def nothing_left(folder, *allowed): assert {p.name for p in folder.iterdir()} == set(allowed), list(folder.iterdir())


# -- a folder or a zip archive ----------------------------------------------------------------------------------------------------------------------

@pytest.fixture(params=["folder", "deflated", "stored", "dot", "inner"])
def tree(request, tmp_path):
    extra = {**FILES, ".hidden/x": b"", "__MACOSX/a/x": b"", "a/.x": b"", "a-b/x": b"1", "a.txt": b"", "a0/y": b""}
    if request.param == "folder":
        for name, data in extra.items():
            path = tmp_path / "t" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return Tree(tmp_path / "t")
    prefix = {"dot": "./", "inner": "deep/er/"}.get(request.param, "")
    path = zipped(tmp_path / "t.zip", {prefix + n: d for n, d in extra.items()}, zipfile.ZIP_STORED if request.param == "stored" else zipfile.ZIP_DEFLATED)
    return Tree(path / "deep/er") if request.param == "inner" else Tree(str(path))


def test_a_folder_and_a_zip_are_alike(tree):
    for t in (tree, pickle.loads(pickle.dumps(tree))):
        assert t.folders() == ["a", "a-b", "a0", "c"] and t.files() == ["a.txt"] and t.folders("a") == ["b"] and t.files("a") == ["empty", "one.bin"]
        assert t.folders("none") == t.files("none") == t.folders("a/one.bin") == [] and t.folders("a/b") == []
        for inner, there in (("a", True), ("a/b", True), ("a/one.bin", True), ("a/b/", True), ("", True), ("a/on", False), ("b", False), ("a/b/c", False)): assert t.has(inner) == there, inner
        assert t.read_bytes("a/one.bin") == FILES["a/one.bin"] and t.read_bytes("a/empty") == b""
        assert t.walk() == ["a-b/x", "a.txt", "a/b/two.txt", "a/empty", "a/one.bin", "a0/y", "c/three.txt"] and t.walk(".txt") == ["a.txt", "a/b/two.txt", "c/three.txt"]
        assert t.at("a").files() == t.files("a") and t.at("a/b").walk() == ["two.txt"] and str(t.at("a")).endswith("/a")
        for inner in ("a/none", "none", "a"):
            with pytest.raises(BadMember) as e: t.read_bytes(inner)
            assert isinstance(e.value, OSError) and isinstance(e.value, DataError) and inner in str(e.value)
        refused(lambda: t.at("none"), "none", "no such folder")
    assert len(pickle.dumps(tree)) < 500


def test_no_such_tree(tmp_path):
    refused(lambda: Tree(tmp_path / "none"), "no such folder or zip archive")
    (tmp_path / "x.zip").write_bytes(b"PK\x03\x04 no archive")
    refused(lambda: Tree(tmp_path / "x.zip"), "x.zip", "fetch it again")
    refused(lambda: Tree(zipped(tmp_path / "y.zip") / "b"), "y.zip/b")
    refused(lambda: Tree(zipped(tmp_path / "z.zip", [("a", b"1"), ("a", b"2")])), "two members are called a")
    assert Tree(zipped(tmp_path / "empty.zip", {})).folders() == []


def test_rasters_in_a_zip(tmp_path):
    values = np.arange(600, dtype=np.uint16).reshape(1, 20, 30)
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", width=30, height=20, count=1, dtype="uint16") as f: f.write(values)
    whole = (tmp_path / "a.tif").read_bytes()
    tree = Tree(zipped(tmp_path / "t.zip", {"x/a.tif": whole, "x/cut.tif": whole[:400], "x/none.tif": b""}))
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(3):
        with rasterio.open(tree.open_path("x/a.tif")) as f: assert np.array_equal(f.read(), values)
        raster = read_raster(tree.open_path("x/a.tif"))
        assert np.array_equal(raster.values, values) and raster.grid.path == f"{tmp_path}/t.zip/x/a.tif"
    for name in ("cut", "none", "elsewhere"):
        with pytest.raises(SkipLocation) as e: read_raster(tree.open_path(f"x/{name}.tif"))
        assert e.value.reason == "bad raster" and f"t.zip/x/{name}.tif" in str(e.value) and "\n" not in str(e.value)
    assert not before or len(os.listdir("/proc/self/fd")) <= before


def test_every_damaged_byte_is_found(tmp_path):           # fault 25
    path = zipped(tmp_path / "t.zip", {"a": zlib.compress(bytes(range(256))) * 3})
    whole, tree = path.read_bytes(), Tree(path)
    right = tree.read_bytes("a")
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0x55]) + whole[i + 1:])
        os.utime(path, ns=(i, i))                         # as another second of the clock does
        try: assert tree.read_bytes("a") == right
        except DataError as e: assert "\n" not in str(e)


def test_an_archive_that_changes(tmp_path):
    tree = Tree(zipped(tmp_path / "t.zip", {"a/x": b"1"}))
    zipped(tmp_path / "t.zip", {"b/x": b"12345"})
    assert tree.folders() == ["b"] and tree.read_bytes("b/x") == b"12345"
    (tmp_path / "t.zip").unlink()
    refused(lambda: tree.folders(), "t.zip")


def test_members_that_are_not_read(tmp_path, monkeypatch):
    path = zipped(tmp_path / "lzma.zip", {"a": b"1"}, zipfile.ZIP_LZMA)
    refused(lambda: Tree(path).read_bytes("a"), "compression method 14")
    monkeypatch.setattr(archives, "LARGEST_MEMBER", 1000)
    refused(lambda: Tree(zipped(tmp_path / "t.zip")).read_bytes("c/three.txt"), "5000 bytes")
    data = bytearray(zipped(tmp_path / "lie.zip", {"a": bytes(900)}).read_bytes())       # says 10 bytes, holds 900
    at = data.rindex(b"PK\x01\x02")
    data[at + 24:at + 28] = (10).to_bytes(4, "little")
    (tmp_path / "lie.zip").write_bytes(data)
    refused(lambda: Tree(tmp_path / "lie.zip").read_bytes("a"), "checksum")
    data[at + 8] |= 1
    (tmp_path / "lock.zip").write_bytes(data)
    refused(lambda: Tree(tmp_path / "lock.zip").read_bytes("a"), "encrypted")


def test_forked_workers_share_no_handle(tmp_path):        # faults 27, 28
    tree = Tree(zipped(tmp_path / "t.zip", {f"{i:03d}/x": bytes([i]) * 1000 for i in range(200)}))
    tree.folders()
    children = []
    for _ in range(2):
        pid = os.fork()
        if not pid: os._exit(0 if all(tree.read_bytes(f"{i:03d}/x") == bytes([i]) * 1000 for i in range(200)) else 1)
        children.append(pid)
    assert all(tree.read_bytes(f"{i:03d}/x") == bytes([i]) * 1000 for i in range(200))
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]


# -- unpacking --------------------------------------------------------------------------------------------------------------------------------------

def split(path, size, digits=False):
    data = path.read_bytes()
    parts = [data[i:i + size] for i in range(0, len(data), size)]
    for i, part in enumerate(parts): path.with_name(f"{path.name}.part" + (f"{i:02d}" if digits else f"{chr(97 + i // 26)}{chr(97 + i % 26)}")).write_bytes(part)
    path.unlink()
    return path.with_name(f"{path.name}.part" + ("00" if digits else "aa"))


ARCHIVES = {"zip": lambda p: zipped(p / "x.zip"), "tar": lambda p: tarred(p / "x.tar"), "gz": lambda p: tarred(p / "x.tar.gz", mode="w:gz"), "bz2": lambda p: tarred(p / "x.tar.bz2", mode="w:bz2"),
            "xz": lambda p: tarred(p / "x.tar.xz", mode="w:xz"), "parts": lambda p: split(tarred(p / "x.tar.gz", mode="w:gz"), 20), "digits": lambda p: split(tarred(p / "x.tar"), 5000, True),
            "zip parts": lambda p: split(zipped(p / "x.zip"), 100)}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_extract(kind, tmp_path):
    (tmp_path / "in").mkdir()
    archive, calls = ARCHIVES[kind](tmp_path / "in"), []
    total = sum(p.stat().st_size for p in (tmp_path / "in").iterdir())
    assert check_archive(archive) == (4, sum(map(len, FILES.values())))
    (tmp_path / "there").mkdir()                          # an empty folder may be there
    assert extract(archive, tmp_path / "there", progress=lambda *done: calls.append(done)) == tmp_path / "there" and contents(tmp_path / "there") == FILES
    assert len(calls) == 4 and all(0 <= a <= b == total for a, b in calls) and calls == sorted(calls)
    extract(str(archive), str(tmp_path / "new/some"), members=["a/b", "c/three.txt"])
    assert contents(tmp_path / "new/some") == {k: FILES[k] for k in ("a/b/two.txt", "c/three.txt")}
    refused(lambda: extract(archive, tmp_path / "there"), "is there already")
    refused(lambda: extract(archive, tmp_path / "no", members=["a", "none"]), "no none in it")
    refused(lambda: extract(archive, tmp_path / "no", limit_bytes=9000), "9000 bytes")
    nothing_left(tmp_path, "in", "there", "new")
    assert all(not stat.S_IMODE(p.stat().st_mode) & 0o7111 for p in (tmp_path / "there").rglob("*") if p.is_file())


HOSTILE = ("../x", "a/../../x", "/etc/x", "C:/x", "c:x", "a\\..\\x", "..", "a\nb", "x/..")


@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_lead_out(name, tmp_path):             # fault 34
    for archive in (tarred(tmp_path / "x.tar", [("good", b"1"), (name, b"2")]), zipped(tmp_path / "x.zip", [("good", b"1"), (name, b"2")])):
        refused(lambda: check_archive(archive), archive.name, "no path inside")
        refused(lambda: extract(archive, tmp_path / "out"), archive.name, "no path inside")
    refused(lambda: extract(zipped(tmp_path / "x.zip"), tmp_path / "out", members=[name]))
    nothing_left(tmp_path, "x.tar", "x.zip")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices(kind, tmp_path):               # fault 34
    archive = tarred(tmp_path / "x.tar", [("good", b"1"), ("bad", {"type": kind, "linkname": "../../etc"}), ("bad/passwd", b"3")])
    for call in (check_archive, lambda a: extract(a, tmp_path / "out")): refused(lambda: call(archive), "'bad'", "link or device")
    info = zipfile.ZipInfo("bad")
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    zipped(tmp_path / "x.zip", [(info, "/etc/passwd")])
    for call in (check_archive, lambda a: extract(a, tmp_path / "out")): refused(lambda: call(tmp_path / "x.zip"), "'bad'", "link or device")
    nothing_left(tmp_path, "x.tar", "x.zip")


def test_two_of_one_name(tmp_path):
    for files in ([("a", b"1"), ("a", b"2")], [("a/b", b"1"), ("a//b", b"2")], [("a/b", b"1"), ("./a/./b", b"2")]):
        for archive in (tarred(tmp_path / "x.tar", files), zipped(tmp_path / "x.zip", files)):
            refused(lambda: check_archive(archive), "two members")
            refused(lambda: extract(archive, tmp_path / "out"), "two members")
    for files in ([("a", b"1"), ("a/b", b"2")], [("a/b", b"1"), ("a", b"2")]): refused(lambda: extract(tarred(tmp_path / "x.tar", files), tmp_path / "out"))
    nothing_left(tmp_path, "x.tar", "x.zip")


def test_bombs(tmp_path, monkeypatch):                    # fault 34
    zeros = bytes(2 ** 20)
    monkeypatch.setattr(archives, "LARGEST_RATIO", 20)
    class Endless(io.RawIOBase):
        def readable(self): return True
        def readinto(self, b): b[:] = bytes(len(b)); return len(b)
    zipped(tmp_path / "x.zip", {"zeros": zeros * 25})
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz", compresslevel=9) as f:
        info = tarfile.TarInfo("zeros"); info.size = 26 * 2 ** 20
        f.addfile(info, Endless())
    (tmp_path / "y.tar.gz").write_bytes(gzip.compress(zeros * 20, 1))               # zeros are a tar without members
    for name in ("x.zip", "x.tar.gz"):
        refused(lambda: check_archive(tmp_path / name), name, "20 times")
        refused(lambda: extract(tmp_path / name, tmp_path / "out"), name, "20 times")
        refused(lambda: extract(tmp_path / name, tmp_path / "out", members=["other"]), name)
    refused(lambda: extract(tmp_path / "y.tar.gz", tmp_path / "out"), "y.tar.gz", "no file")
    many = [(f"{i}", zeros) for i in range(26)]                                      # none alone is too much
    refused(lambda: extract(zipped(tmp_path / "z.zip", many), tmp_path / "out"), "20 times")
    assert check_archive(zipped(tmp_path / "small.zip", {"one class": zeros * 20})) == (1, 20 * 2 ** 20)
    monkeypatch.setattr(archives, "LARGEST_FILE", 100)
    refused(lambda: extract(zipped(tmp_path / "large.zip", {"a": b"x" * 101}), tmp_path / "out"), "101 bytes")
    nothing_left(tmp_path, "x.zip", "x.tar.gz", "y.tar.gz", "z.zip", "small.zip", "large.zip")


def test_sizes_that_lie(tmp_path):
    data = bytearray(zipped(tmp_path / "x.zip", {"a": bytes(900)}).read_bytes())
    at = data.rindex(b"PK\x01\x02")
    for size in (10, 2000):
        data[at + 24:at + 28] = size.to_bytes(4, "little")
        (tmp_path / "x.zip").write_bytes(data)
        refused(lambda: extract(tmp_path / "x.zip", tmp_path / "out"), "x.zip")
    with tarfile.open(tmp_path / "s.tar", "w") as f:      # a name as long as a file
        info = tarfile.TarInfo("x" * (2 ** 20 + 10)); f.addfile(info)
    refused(lambda: extract(tmp_path / "s.tar", tmp_path / "out"), "too large")
    nothing_left(tmp_path, "x.zip", "s.tar")


@pytest.mark.parametrize("kind", ["zip", "tar", "gz", "bz2", "xz", "parts"])
def test_cut_archives(kind, tmp_path):
    (tmp_path / "in").mkdir()
    archive = ARCHIVES[kind](tmp_path / "in")
    last = sorted((tmp_path / "in").iterdir())[-1]
    whole = last.read_bytes()
    cuts = [0, 1, len(whole) // 2, len(whole) - 1] if kind != "tar" else [0, 300, 512, 1024, 5000, 10752, whole.rindex(b"3" * 10) + 100]
    for cut in {min(cut, len(whole) - 1) for cut in cuts}:
        last.write_bytes(whole[:cut])
        for call in (check_archive, lambda a: extract(a, tmp_path / "out")): refused(lambda: call(archive), archive.name)
    nothing_left(tmp_path, "in")


def test_missing_parts(tmp_path):
    first = split(tarred(tmp_path / "x.tar.gz", mode="w:gz"), 20)
    parts = archive_parts(first)
    assert [p.name[-2:] for p in parts[:3]] == ["aa", "ab", "ac"]
    refused(lambda: extract(parts[1], tmp_path / "out"), "partaa")
    parts[1].unlink()
    refused(lambda: extract(first, tmp_path / "out"), "partab", "missing")
    first.unlink()
    refused(lambda: extract(first, tmp_path / "out"), "no such file")
    many = tmp_path / "y.tar.partaa"
    for i in range(28): many.with_name(f"y.tar.part{chr(97 + i // 26)}{chr(97 + i % 26)}").write_bytes(b"")
    assert [p.name[-2:] for p in archive_parts(many)[24:]] == ["ay", "az", "ba", "bb"]


def test_no_archive(tmp_path):
    (tmp_path / "x.txt").write_text("hello")
    for name in ("x.txt", "none.zip", ""): refused(lambda: extract(tmp_path / name, tmp_path / "out"))
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"hello")); (tmp_path / "x.bz2").write_bytes(bz2.compress(b"hello")); (tmp_path / "x.tar").write_bytes(b"hello" * 1000)
    for name in ("x.gz", "x.bz2", "x.tar"): refused(lambda: check_archive(tmp_path / name), name, "damaged")
    nothing_left(tmp_path, "x.txt", "x.gz", "x.bz2", "x.tar")


@settings(max_examples=int(os.environ.get("CROMSS_FUZZ", 60)), deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["zip", "tar", "gz", "bz2", "xz"]), st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=3))
def test_damaged_archives(tmp_path_factory, kind, flips):     # fault 25, 34: right, or one error and nothing left
    base = tmp_path_factory.mktemp("flip")
    archive = ARCHIVES[kind](base)
    data = bytearray(archive.read_bytes())
    for at, mask in flips: data[min(int(at * len(data)), len(data) - 1)] ^= mask
    archive.write_bytes(data)
    try: extract(archive, base / "out")
    except DataError as e:
        assert "\n" not in str(e)
        nothing_left(base, archive.name)
    else: assert kind == "tar" or all(FILES.get(name, data) == data for name, data in contents(base / "out").items())


def test_a_full_disk(tmp_path):
    zipped(tmp_path / "x.zip", {f"{i}": os.urandom(2 ** 18) for i in range(16)}, zipfile.ZIP_STORED)
    small = tmp_path / "small"
    small.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], capture_output=True, text=True)
    if done.returncode: pytest.skip(f"no file system can be mounted here ({done.stderr.strip()})")
    try:
        refused(lambda: extract(tmp_path / "x.zip", small / "out"), "bytes that are free")
        refused(lambda: extract(tmp_path / "x.zip", small / "out", limit_bytes=2 ** 30), "out", "cannot be written")
        nothing_left(small)
    finally: subprocess.run(["umount", "-l", small], check=True)


def test_kill_and_again(tmp_path):
    archive = zipped(tmp_path / "x.zip", {f"d/{i}": os.urandom(5000) for i in range(300)}, zipfile.ZIP_STORED)
    code = f"import time; from cromss.archives import extract; extract({str(archive)!r}, {str(tmp_path / 'out')!r}, progress=lambda *a: (print(flush=True), time.sleep(0.05)))"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent)
    for _ in range(5): child.stdout.readline()
    with pytest.raises(DataError, match=f"{child.pid}"): extract(archive, tmp_path / "out")      # two at a time
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.partial").is_dir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                   # of the lock that is taken over
        extract(archive, tmp_path / "out")
    assert len(contents(tmp_path / "out")) == 300
    nothing_left(tmp_path, "x.zip", "out")


def test_an_interruption_leaves_nothing(tmp_path):
    def stop(*done): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): extract(zipped(tmp_path / "x.zip"), tmp_path / "out", progress=stop)
    nothing_left(tmp_path, "x.zip")


def test_many_members_are_listed_quickly(tmp_path):       # fault 40
    path = zipped(tmp_path / "x.zip", {f"labels/{i:07d}/{s}/label.tif": b"" for i in range(10000) for s in range(2)}, zipfile.ZIP_STORED)
    tree = Tree(path / "labels")
    start = time.process_time()
    names = tree.folders()
    for name in names: assert tree.folders(name) == ["0", "1"]
    assert len(names) == 10000 and time.process_time() - start < 10
