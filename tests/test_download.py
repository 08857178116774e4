"Downloads against a hub on this machine: what is fetched, gone on with, tried again, refused, and never left under a final name."
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from email.utils import format_datetime
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pytest
from disks import disk, remount
from huggingface_hub import constants
from huggingface_hub.utils import close_session

import cromss.download as module
from cromss.config import ConfigError, DataError
from cromss.download import DOWNLOADS, HubFile, choose_files, download, size_text

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CKPT = "weights-cromss-13B-midFusion-epoch=199.ckpt"
NOLDO, V11 = "vikki23/NoLDO-S12", "embed2scale/SSL4EO-S12-v1.1-Zarr"
HERE, ALSO_HERE, NOBODY = "127.0.0.1", "localhost", "http://{}:9".format("127.0.0.1")     # two names of this machine, and a port where nobody answers
Request = namedtuple("Request", "path range authorization")


# a hub

class Hub(ThreadingHTTPServer):
    "The paths of the hub that a download asks for. `faults[path]` is a list of what goes wrong with the next requests for it: (kind, number)."
    daemon_threads, block_on_close = True, False

    def __init__(self):
        super().__init__((HERE, 0), Handler)
        self.repos, self.faults, self.asked, self.served = {}, {}, [], {}
        self.page, self.cdn, self.next_host, self.ranges, self.hold = 1000, "", None, True, threading.Event()
        self.address, self.cdn_address = f"http://{HERE}:{self.server_port}", f"http://{ALSO_HERE}:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, *_): pass       # clients go away: that is what is tested

    def add(self, repo, files):
        self.repos.setdefault(repo, {}).update(files)

    def entry(self, repo, path):
        "What the hub lists about a file: large ones by sha256, small ones as git blobs."
        data = self.repos[repo][path]
        entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
        return entry if len(data) < 500 else {**entry, "lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}

    def files_asked(self): return [(r.path.rpartition("/")[2], r.range) for r in self.asked if "/resolve/" in r.path]


class Handler(BaseHTTPRequestHandler):
    protocol_version, wbufsize = "HTTP/1.1", -1

    def log_message(self, *_): pass

    def do_GET(self):
        url = urlsplit(self.path)
        path, self.hub = unquote(url.path), self.server
        self.hub.asked.append(Request(path, self.headers.get("range"), self.headers.get("authorization")))
        if path.startswith("/cdn/"): return self.file(path, *path.split("/", 4)[2:])
        fault = self.fault(path, "status", "retry", "date", "html", "code")
        if fault: return self.refuse(*fault)
        parts = path.strip("/").split("/")
        if parts[0] == "api":
            repo, what, revision = "/".join(parts[2:4]), parts[4], "/".join(parts[5:])
            if repo not in self.hub.repos: return self.refuse("code", (404, "RepoNotFound"))
            if what == "revision": return self.json({"id": repo, "sha": COMMIT}) if revision in ("main", COMMIT) else self.refuse("code", (404, "RevisionNotFound"))
            return self.tree(repo, url)
        repo, path = "/".join(parts[1:3]), "/".join(parts[5:])
        assert parts[0] == "datasets" and parts[3] == "resolve" and parts[4] == COMMIT
        if self.hub.cdn and "lfs" in self.hub.entry(repo, path): return self.answer(302, location=f"{self.hub.cdn}/cdn/{repo}/{path.replace('=', '%3D')}")
        self.file(unquote(url.path), *repo.split("/"), path)

    def fault(self, path, *kinds):
        waiting = self.hub.faults.get(path.rpartition("/")[2], [])
        return waiting.pop(0) if waiting and waiting[0][0] in kinds else None

    def refuse(self, kind, number):
        if kind == "retry": return self.answer(429, b"slow down", **{"retry-after": str(number)})
        if kind == "date": return self.answer(503, **{"retry-after": format_datetime(datetime.now(timezone.utc) + timedelta(seconds=number), usegmt=True)})
        if kind == "html": return self.answer(200, b"<html>Please accept our terms of use</html>")
        if kind == "code": return self.answer(number[0], b"{}", **{"x-error-code": number[1]})
        self.answer(number)

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"content-length": len(body), **headers}.items(): self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def json(self, value, **headers): self.answer(200, json.dumps(value).encode(), **headers)

    def tree(self, repo, url):
        entries = [{"type": "directory", "path": "train", "oid": "0" * 40, "size": 0}, *(self.hub.entry(repo, p) for p in self.hub.repos[repo])]
        at = int(parse_qs(url.query).get("cursor", ["0"])[0])
        assert "recursive=true" in url.query
        more = f"{self.hub.next_host or self.hub.address}{url.path}?recursive=true&cursor={at + self.hub.page}"
        self.json(entries[at:at + self.hub.page], **({"link": f'<{more}>; rel="next"'} if at + self.hub.page < len(entries) else {}))

    def file(self, path, owner, name, inside):
        data, entry = self.hub.repos[f"{owner}/{name}"][inside], self.hub.entry(f"{owner}/{name}", inside)
        kind, number = self.fault(path, "drop", "cut", "wrong", "long", "other", "hold", "flood") or ("", 0)
        asked, start = self.headers.get("range"), 0
        if asked and self.hub.ranges: start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if kind == "wrong": data = data[:number] + bytes([data[number] ^ 1]) + data[number + 1:]
        if kind == "cut": data = data[:number]                                  # a server that has an older, shorter file
        if kind == "long": data += b"x" * number
        if kind == "other": start = number                                      # goes on elsewhere than asked
        if start > len(data): return self.answer(416, **{"content-range": f"bytes */{len(data)}"})
        body = data[start:]
        self.send_response(206 if start else 200)
        self.send_header("etag", f'"{entry.get("lfs", entry)["oid"]}"')
        self.send_header("x-repo-commit", COMMIT)
        self.send_header("accept-ranges", "bytes")
        if kind == "flood": self.send_header("transfer-encoding", "chunked")
        else: self.send_header("content-length", str(len(body)))
        if start: self.send_header("content-range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if kind == "flood": body = b"".join(b"%x\r\n%s\r\n" % (len(b), b) for b in (body, b"x" * number)) + b"0\r\n\r\n"
        if kind in ("drop", "hold"): body = body[:number]
        self.wfile.write(body)
        self.wfile.flush()
        self.hub.served[inside] = self.hub.served.get(inside, 0) + len(body)
        if kind == "hold": self.hub.hold.wait(60)
        if kind in ("drop", "hold"): self.close_connection = True


def content(seed, size): return np.random.default_rng(seed).bytes(size)


FILES = {"README.md": b"# NoLDO-S12\n", ".gitattributes": b"*.zip filter=lfs\n", "ssl4eo_s12_nol.zip": content(1, 300_000), "ssl4eo_s12_dw.zip": content(2, 50_000),
         "ssl4eo_s12_osm.zip": content(3, 40_000), CKPT: content(4, 30_000), CKPT.replace("13B", "9B"): content(5, 20_000)}
ZIP = "ssl4eo_s12_nol.zip"


@pytest.fixture
def hub():
    hub = Hub()
    hub.add(NOLDO, FILES)
    yield hub
    hub.hold.set()
    hub.shutdown()
    hub.server_close()


@pytest.fixture(autouse=True, scope="module")
def session():
    close_session()
    yield
    close_session()


@pytest.fixture(autouse=True)
def apart(monkeypatch, tmp_path):
    "No test reaches the real hub, or uses anybody's token, cache or proxy; and none waits long."
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_TOKEN"): monkeypatch.delenv(name, raising=False)
    for name, value in dict(HF_HOME=tmp_path / "home", HF_ENDPOINT=NOBODY, HF_HUB_DISABLE_TELEMETRY=1, HF_HUB_DISABLE_XET=1, HF_HUB_DISABLE_IMPLICIT_TOKEN=1).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(constants, "ENDPOINT", NOBODY)
    monkeypatch.setattr(module, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(module, "CHUNK", 1000)


def fetch(hub, folder, parts="labels", what="noldo-s12", **options):
    return download(what, folder, parts, **{"endpoint": hub.address, "progress": False, "timeout": 5, **options})


def names(folder): return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file() and not p.name.startswith(".cromss-download"))


def whole(folder, *paths):
    "The folder holds these files, right to the last byte, and nothing else."
    assert names(folder) == sorted(paths)
    for path in paths: assert (folder / path).read_bytes() == FILES[path]


def partial(folder):
    "The one file that is on its way."
    [path] = [p for p in Path(folder).rglob("*.partial")]
    return path


# what is fetched

def test_parts_are_fetched_under_their_names(hub, tmp_path):
    done = fetch(hub, tmp_path / "a/b", ("labels", "checkpoints"))
    whole(tmp_path / "a/b", ZIP, CKPT, CKPT.replace("13B", "9B"))
    assert [f.state for f in done] == ["fetched"] * 3 and sum(f.size for f in done) == 350_000
    assert all(f.checksum == "sha256:" + hashlib.sha256(FILES[f.path]).hexdigest() for f in done)
    assert not any(r.authorization for r in hub.asked)


def test_what_is_there_is_not_fetched_again(hub, tmp_path, monkeypatch):
    fetch(hub, tmp_path)
    hub.asked.clear()
    monkeypatch.setattr(module, "_reads_right", lambda *_: pytest.fail("it was read again"))
    [again] = fetch(hub, tmp_path)
    assert again.state == "there" and not hub.files_asked()
    assert [f.state for f in fetch(hub, tmp_path, None)].count("there") == 1
    whole(tmp_path, *(p for p in FILES if p not in ("README.md", ".gitattributes")))


def test_a_dry_run_writes_nothing(hub, tmp_path):
    listed = fetch(hub, tmp_path / "new", "labels,osm", list_only=True)
    assert [(f.path, f.size, f.state) for f in listed] == [(ZIP, 300_000, "missing"), ("ssl4eo_s12_osm.zip", 40_000, "missing")]
    assert not (tmp_path / "new").exists() and not hub.files_asked()


def test_a_dry_run_says_what_is_there(hub, tmp_path):
    fetch(hub, tmp_path, "osm")
    (tmp_path / "ssl4eo_s12_dw.zip").write_bytes(FILES["ssl4eo_s12_dw.zip"])
    (tmp_path / CKPT).write_bytes(b"short")
    states = {f.path: f.state for f in fetch(hub, tmp_path, None, list_only=True)}
    assert states == {ZIP: "missing", "ssl4eo_s12_dw.zip": "unverified", "ssl4eo_s12_osm.zip": "there", CKPT: "damaged", CKPT.replace("13B", "9B"): "missing"}


def test_small_files_are_checked_as_git_does(hub, tmp_path):
    lists = {"splits/ssl4eos12_val.txt": b"a\nb\n", "splits/ssl4eos12_train.txt": b""}
    hub.add(V11, lists)
    done = fetch(hub, tmp_path, "splits", "ssl4eo-s12-v1.1")
    assert names(tmp_path) == sorted(lists) and all((tmp_path / p).read_bytes() == d for p, d in lists.items())
    assert all(f.checksum.startswith("git:") for f in done)
    (tmp_path / "splits/ssl4eos12_val.txt").write_bytes(b"a\nc\n")
    fetch(hub, tmp_path, "splits", "ssl4eo-s12-v1.1")
    assert (tmp_path / "splits/ssl4eos12_val.txt").read_bytes() == b"a\nb\n"


def test_shards_of_several_parts(hub, tmp_path):
    files = {f"{s}/{p}/ssl4eos12_{s}_seasonal_data_{n:06}.zarr.zip": content(n, 600) for s in ("train", "val") for p in ("S1GRD", "S2L1C") for n in range(1, 6)}
    hub.add(V11, {**files, "README.md": b"hello"})
    hub.page, hub.next_host = 3, "http://another-host.invalid"
    done = fetch(hub, tmp_path, "S1GRD S2L1C", "ssl4eo-s12-v1.1", split="val", shards="1:3", workers=3)
    assert [f.path for f in done] == [f"val/{p}/ssl4eos12_val_seasonal_data_{n:06}.zarr.zip" for p in ("S1GRD", "S2L1C") for n in (2, 3)]
    assert names(tmp_path) == [f.path for f in done] and all((tmp_path / f.path).read_bytes() == files[f.path] for f in done)


def test_another_repository_with_the_same_files(hub, tmp_path):
    hub.add("me/copy", {ZIP: b"x" * 600})
    [done] = fetch(hub, tmp_path, repo="me/copy")
    assert done.size == 600 and "me/copy@" + COMMIT in (tmp_path / ".cromss-download.jsonl").read_text()


def test_a_file_behind_another_host_gets_no_token(hub, tmp_path):
    hub.cdn = hub.cdn_address
    fetch(hub, tmp_path, "labels checkpoints", token="hf_secret")
    whole(tmp_path, ZIP, CKPT, CKPT.replace("13B", "9B"))
    assert {r.authorization for r in hub.asked if not r.path.startswith("/cdn/")} == {"Bearer hf_secret"}
    assert [r.authorization for r in hub.asked if r.path.startswith("/cdn/")] == [None] * 3


def test_a_login_is_not_sent_to_another_endpoint(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    fetch(hub, tmp_path, "osm")
    assert not any(r.authorization for r in hub.asked)
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    fetch(hub, tmp_path, "dw", endpoint=None)
    assert hub.asked[-1].authorization == "Bearer hf_mine"


def test_a_proxy_is_used(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", hub.address)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    close_session()                        # the environment is read when a session begins
    fetch(hub, tmp_path, endpoint="http://hub.invalid")
    close_session()
    whole(tmp_path, ZIP)


def test_importing_it_is_cheap():
    code = "import sys, cromss.download; assert not {'huggingface_hub', 'httpx2', 'httpx', 'torch'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# interruptions

def test_after_a_drop_only_the_rest_is_asked_for(hub, tmp_path):
    hub.faults[ZIP] = [("drop", 120_500), ("drop", 0), ("drop", 50_000)]
    fetch(hub, tmp_path)
    whole(tmp_path, ZIP)
    assert hub.files_asked() == [(ZIP, None), (ZIP, "bytes=120000-"), (ZIP, "bytes=120000-"), (ZIP, "bytes=170000-")]
    assert hub.served[ZIP] == 300_000 + 500


def test_a_drop_behind_another_host(hub, tmp_path):
    hub.cdn, hub.faults[ZIP] = hub.cdn_address, [("drop", 100_000)]
    fetch(hub, tmp_path)
    whole(tmp_path, ZIP)
    assert [r.range for r in hub.asked if r.path.startswith("/cdn/")] == [None, "bytes=100000-"]


def test_a_server_that_cannot_go_on_begins_anew(hub, tmp_path):
    hub.ranges, hub.faults[ZIP] = False, [("drop", 100_000), ("drop", 150_000)]
    fetch(hub, tmp_path)
    whole(tmp_path, ZIP)


def test_a_server_that_never_gets_further_is_given_up(hub, tmp_path):
    hub.ranges, hub.faults[ZIP] = False, [("drop", 100_000)] * 20
    with pytest.raises(DataError, match=rf"{ZIP}: .* \(6 times in a row\).*it goes on where it stopped"): fetch(hub, tmp_path)
    assert len(hub.files_asked()) == 6 and names(tmp_path) == [partial(tmp_path).name]


def test_a_silent_server(hub, tmp_path):
    hub.faults[ZIP] = [("hold", 10_000)]
    started = time.monotonic()
    fetch(hub, tmp_path, timeout=0.2)
    whole(tmp_path, ZIP)
    assert time.monotonic() - started < 30 and hub.files_asked()[1] == (ZIP, "bytes=10000-")


@pytest.mark.parametrize("fault", [("other", 7), ("cut", 1000), ("cut", 200_000), ("long", 5), ("html", 0)])
def test_an_answer_that_is_not_the_rest_loses_nothing(hub, tmp_path, fault):
    hub.faults[ZIP] = [("drop", 150_000), fault]
    fetch(hub, tmp_path)
    whole(tmp_path, ZIP)
    assert hub.served[ZIP] <= 300_000 + 350_000 and hub.files_asked()[-1] == (ZIP, "bytes=150000-")


def test_a_stream_that_does_not_end_is_cut(hub, tmp_path):
    hub.faults[ZIP] = [("flood", 3_000_000)]
    fetch(hub, tmp_path)
    whole(tmp_path, ZIP)


def child(hub, folder):
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\nimport cromss.download as d; d.CHUNK = 1000; d.download('noldo-s12', {str(folder)!r}, 'labels', endpoint={hub.address!r}, timeout=60)"
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition(): time.sleep(0.02); assert time.monotonic() < end


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_download_is_gone_on_with(hub, tmp_path, how):
    hub.faults[ZIP] = [("hold", 200_000)]
    process = child(hub, tmp_path)
    wait_for(lambda: hub.served.get(ZIP) and names(tmp_path) and partial(tmp_path).stat().st_size > 150_000)
    process.send_signal(how)
    if how == signal.SIGINT: hub.hold.set()
    process.communicate(timeout=60)
    left = partial(tmp_path).stat().st_size
    assert process.returncode != 0 and names(tmp_path) == [partial(tmp_path).name] and 150_000 < left <= 200_000
    [state] = [f.state for f in fetch(hub, tmp_path, list_only=True)]
    fetch(hub, tmp_path)
    whole(tmp_path, ZIP)
    assert state == "partial" and hub.files_asked()[-1] == (ZIP, f"bytes={left}-")


def test_two_processes_do_not_write_to_one_folder(hub, tmp_path):
    hub.faults[ZIP] = [("hold", 100_000)]
    process = child(hub, tmp_path)
    wait_for(lambda: hub.served.get(ZIP))
    with pytest.raises(DataError, match="another process is downloading into it"): fetch(hub, tmp_path)
    process.kill()
    process.communicate()
    fetch(hub, tmp_path)
    whole(tmp_path, ZIP)


def test_ctrl_c_stops_all_threads(hub, tmp_path, monkeypatch):
    hub.faults[ZIP] = [("status", 503)] * 5
    monkeypatch.setattr(module, "FIRST_WAIT", 30)
    def interrupted(jobs):
        wait_for(lambda: hub.files_asked())
        raise KeyboardInterrupt
    monkeypatch.setattr(module, "as_completed", interrupted)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt): fetch(hub, tmp_path)
    assert time.monotonic() - started < 20


def test_the_first_error_stops_the_others(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FIRST_WAIT", 30)
    hub.faults = {ZIP: [("status", 503)] * 9, "ssl4eo_s12_dw.zip": [("status", 404)]}
    with pytest.raises(ConfigError, match="ssl4eo_s12_dw.zip: not there"): fetch(hub, tmp_path, "labels dw", workers=2)


# a busy hub

def test_a_busy_hub_is_waited_for(hub, tmp_path, capfd):
    hub.faults = {ZIP: [("retry", 1), ("status", 503), ("date", 0), ("status", 500)], "main": [("status", 502), ("retry", 0)], COMMIT: [("status", 504)]}
    started = time.monotonic()
    fetch(hub, tmp_path, progress=True)
    whole(tmp_path, ZIP)
    said = capfd.readouterr().err
    assert time.monotonic() - started > 1 and f"{ZIP}: the server answers 429; again in 1 s" in said and f"{NOLDO}: the server answers 502" in said


def test_a_hub_that_stays_busy_is_given_up(hub, tmp_path):
    hub.faults[ZIP] = [("status", 503)] * 20
    with pytest.raises(DataError, match=r"the server answers 503 \(6 times in a row\)"): fetch(hub, tmp_path)
    assert len(hub.files_asked()) == 6
    hub.faults = {"main": [("status", 500)] * 20}
    with pytest.raises(DataError, match=rf"{NOLDO}: the server answers 500 \(6 times"): fetch(hub, tmp_path)


def test_a_hub_that_asks_for_an_hour_is_not_waited_for(hub, tmp_path):
    hub.faults[ZIP] = [("retry", 3600)]
    with pytest.raises(DataError, match="answers 429, and asks to wait 60 minutes; run it again then"): fetch(hub, tmp_path)


def test_what_a_server_asks_to_wait():
    def asked(**headers): return module._asked_wait({k.replace("_", "-"): v for k, v in headers.items()})
    assert asked(retry_after="7") == 7 and asked() is None and asked(retry_after="soon") is None
    assert 50 < asked(retry_after=format_datetime(datetime.now(timezone.utc) + timedelta(seconds=60), usegmt=True)) <= 60
    assert asked(retry_after="Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert asked(ratelimit='"api";r=0;t=55') == 55 and asked(ratelimit='"api";r=100;t=55') is None


# damage

def test_a_wrong_byte_is_found_and_mended(hub, tmp_path, capfd):
    hub.faults[ZIP] = [("wrong", 77_777)]
    fetch(hub, tmp_path, progress=True)
    whole(tmp_path, ZIP)
    assert f"{ZIP}: the checksum disagrees; fetched anew" in capfd.readouterr().err and [r for _, r in hub.files_asked()] == [None, None]


def test_wrong_twice_is_an_error_and_leaves_nothing(hub, tmp_path):
    hub.faults[ZIP] = [("wrong", 5)] * 2
    with pytest.raises(DataError, match=rf"{ZIP}: fetched twice, and its checksum is not the one that {NOLDO} lists; .*try another network"): fetch(hub, tmp_path)
    assert names(tmp_path) == []
    fetch(hub, tmp_path)
    whole(tmp_path, ZIP)


def test_a_damaged_file_is_fetched_anew(hub, tmp_path, capfd):
    fetch(hub, tmp_path)
    data = bytearray(FILES[ZIP])
    data[1000] ^= 4
    (tmp_path / ZIP).write_bytes(data)
    [done] = fetch(hub, tmp_path, progress=True)
    whole(tmp_path, ZIP)
    assert done.state == "fetched" and f"{ZIP}: damaged, incomplete or of another revision; fetched anew" in capfd.readouterr().err


def test_a_damaged_file_goes_even_if_the_hub_then_fails(hub, tmp_path):
    (tmp_path / ZIP).write_bytes(bytes(300_000))
    hub.faults[ZIP] = [("status", 503)] * 6
    with pytest.raises(DataError): fetch(hub, tmp_path)
    assert ZIP not in names(tmp_path)


def test_a_right_file_is_read_once_and_remembered(hub, tmp_path, monkeypatch):
    (tmp_path / ZIP).write_bytes(FILES[ZIP])
    [done] = fetch(hub, tmp_path)
    assert done.state == "there" and not hub.files_asked()
    monkeypatch.setattr(module, "_reads_right", lambda *_: pytest.fail("it was read again"))
    assert fetch(hub, tmp_path)[0].state == "there"
    (tmp_path / ".cromss-download.jsonl").write_bytes(b'[1]\n{"path": "x"\n\xff\xfe{"path": ["a"], "size": 1, "mtime_ns": 2, "checksum": 3}')
    monkeypatch.undo()
    fetch(hub, tmp_path)
    assert module._Memory(tmp_path).known[ZIP][0] == 300_000


def test_a_shorter_file_is_gone_on_with(hub, tmp_path):
    (tmp_path / ZIP).write_bytes(FILES[ZIP][:250_000])
    fetch(hub, tmp_path)
    whole(tmp_path, ZIP)
    assert hub.files_asked() == [(ZIP, "bytes=250000-")]


def test_a_shorter_file_that_is_another_one(hub, tmp_path):
    (tmp_path / ZIP).write_bytes(bytes(1000))
    fetch(hub, tmp_path)
    whole(tmp_path, ZIP)
    assert [r for _, r in hub.files_asked()] == ["bytes=1000-", None]


@pytest.mark.parametrize("left", [b"", b"wrong", FILES[ZIP], FILES[ZIP] + b"more", bytes(300_000)])
def test_whatever_a_partial_file_holds(hub, tmp_path, left):
    path = module._partial_path(tmp_path, HubFile(ZIP, 300_000, hub.entry(NOLDO, ZIP)["lfs"]["oid"].join(("sha256:", ""))))
    path.write_bytes(left)
    fetch(hub, tmp_path)
    whole(tmp_path, ZIP)
    if left == FILES[ZIP]: assert not hub.files_asked()


def test_a_partial_file_of_another_revision_is_not_used(hub, tmp_path):
    (tmp_path / f"{ZIP}.00000000.partial").write_bytes(bytes(100_000))
    fetch(hub, tmp_path)
    whole(tmp_path, ZIP)
    assert hub.files_asked() == [(ZIP, None)]


def test_whatever_goes_wrong_no_wrong_file_gets_the_name(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FIRST_WAIT", 0)
    rng, given_up = random.Random(0), 0
    kinds = ["drop", "drop", "drop", "cut", "wrong", "long", "other", "flood", "status", "html", "retry"]
    for case in range(int(os.environ.get("CROMSS_FUZZ", "40"))):
        hub.ranges, folder = rng.random() < 0.8, tmp_path / str(case)
        hub.faults[ZIP] = [(k, {"status": 503, "html": 0, "retry": 0}.get(k, rng.randrange(300_000))) for k in rng.choices(kinds, k=rng.randrange(9))]
        for _ in range(3):
            try: fetch(hub, folder)
            except DataError as e:
                given_up += 1
                assert "\n" not in str(e) and ZIP in str(e)
            assert not (folder / ZIP).exists() or (folder / ZIP).read_bytes() == FILES[ZIP]
        whole(folder, ZIP)
    assert given_up


# the disk

def test_too_little_room_is_said_before_anything_is_fetched(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: namedtuple("Usage", "total used free")(10 ** 6, 0, 349_999))
    with pytest.raises(DataError, match=r"new/data: 350 kB are needed and 350 kB are free on its disk; make room, choose another folder, or fewer parts"):
        fetch(hub, tmp_path / "new/data", "labels checkpoints")
    assert not (tmp_path / "new").exists() and not hub.files_asked()
    fetch(hub, tmp_path / "new/data", "labels")
    fetch(hub, tmp_path / "new/data", "labels checkpoints")                 # what is there needs no room


def test_a_disk_that_fills_up_and_is_gone_on_with(hub, tmp_path, monkeypatch):
    with disk(tmp_path / "disk", "200k") as small:
        usage = module.shutil.disk_usage
        monkeypatch.setattr(module.shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(10 ** 9))          # others fill it meanwhile
        with pytest.raises(DataError, match=rf"{ZIP}\.\w+\.partial: No space left on device; make room .* it goes on where it stopped"): fetch(hub, small)
        left = partial(small).stat().st_size
        assert names(small) == [partial(small).name] and left > 100_000
        monkeypatch.setattr(module.shutil, "disk_usage", usage)
        with pytest.raises(DataError, match="are needed and"): fetch(hub, small)
        remount(small, "size=400k")
        fetch(hub, small)
        whole(small, ZIP)
        assert hub.files_asked()[-1] == (ZIP, f"bytes={left}-")


def test_a_read_only_disk(hub, tmp_path):
    with disk(tmp_path / "disk", "1m") as small:
        fetch(hub, small, "osm")
        remount(small, "ro")
        assert fetch(hub, small, "osm")[0].state == "there"
        with pytest.raises(DataError, match="Read-only file system; .*choose another folder"): fetch(hub, small)
        with pytest.raises(DataError, match="Read-only file system"): fetch(hub, small / "new")
        assert names(small) == ["ssl4eo_s12_osm.zip"]


def test_a_shared_copy_that_is_read_only_is_verified(hub, tmp_path):
    with disk(tmp_path / "disk", "1m") as small:
        (small / ZIP).write_bytes(FILES[ZIP])
        remount(small, "ro")
        for _ in range(2): assert fetch(hub, small)[0].state == "there"
        remount(small, "rw")
        (small / ZIP).write_bytes(bytes(300_000))
        remount(small, "ro")
        with pytest.raises(DataError, match="Read-only"): fetch(hub, small)


def test_a_folder_that_is_a_file(hub, tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(DataError, match="(File exists|Not a directory)"): fetch(hub, folder)


def test_a_folder_where_the_file_should_be(hub, tmp_path):
    (tmp_path / ZIP / "inside").mkdir(parents=True)
    with pytest.raises(DataError, match=f"{ZIP}: is no file; move it away"): fetch(hub, tmp_path)
    assert (tmp_path / ZIP / "inside").is_dir()


def test_names_that_are_long_or_strange(hub, tmp_path):
    folder = tmp_path / "a b" / "ünï\udcff" / ("x" * 200) / "[1]*?"
    (folder).mkdir(parents=True)
    (folder / f"{ZIP}.00000000.partial").write_bytes(b"old")
    fetch(hub, folder)
    assert (folder / ZIP).read_bytes() == FILES[ZIP] and len(names(folder)) == 1


# refusals

@pytest.mark.parametrize("status, code, error, text", [
    (401, "RepoNotFound", ConfigError, "the hub wants a login .HTTP 401"), (401, "GatedRepo", ConfigError, "access is refused .HTTP 401.; accept its conditions"),
    (403, "", ConfigError, "accept its conditions there, log in by `hf auth login`, or set HF_TOKEN"), (404, "", ConfigError, "not there .HTTP 404"),
    (407, "", DataError, "answers 407; check endpoint and proxy"), (418, "", DataError, "answers 418")])
def test_an_answer_that_will_not_change_is_an_error_at_once(hub, tmp_path, status, code, error, text):
    for name in ("main", COMMIT, ZIP):
        hub.asked.clear()
        hub.faults = {name: [("code", (status, code))]}
        with pytest.raises(error, match=text) as caught: fetch(hub, tmp_path / "new")
        assert len(hub.asked) == ["main", COMMIT, ZIP].index(name) + 1 and "\n" not in str(caught.value) and not [n for n in names(tmp_path) if n.endswith("zip")]


def test_a_host_of_the_files_that_refuses(hub, tmp_path, monkeypatch):
    hub.cdn, original = hub.cdn_address, Handler.do_GET
    monkeypatch.setattr(Handler, "do_GET", lambda self: original(self) if self.headers["host"].startswith("127") else self.answer(403))
    with pytest.raises(DataError, match=r"its files lie on localhost:\d+, which answers 403; does a proxy or firewall keep it away"): fetch(hub, tmp_path)


def test_revisions(hub, tmp_path):
    assert fetch(hub, tmp_path, revision=COMMIT)[0].state == "fetched"
    with pytest.raises(ConfigError, match=r"revision='v/9 x': .*NoLDO-S12 has no such branch, tag or commit"): fetch(hub, tmp_path, revision="v/9 x")
    with pytest.raises(ConfigError, match="HTTP 404"): fetch(hub, tmp_path, repo="no/body")


def test_no_network(tmp_path):
    with pytest.raises(DataError, match=rf"{NOLDO}: ConnectError .*\(6 times in a row\); check network, proxy and endpoint"):
        download("noldo-s12", tmp_path / "new", endpoint=NOBODY, progress=False)
    assert not (tmp_path / "new").exists()


def test_offline_mode(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set, so nothing is fetched; unset it"): fetch(hub, tmp_path)


def test_a_login_page_instead_of_a_hub(hub, tmp_path):
    hub.faults = {"main": [("html", 0)]}
    with pytest.raises(DataError, match="the answer is not a hub's; is a login page or a proxy in between"): fetch(hub, tmp_path)
    hub.faults = {COMMIT: [("html", 0)]}
    with pytest.raises(DataError, match="not a hub's"): fetch(hub, tmp_path)


@pytest.mark.parametrize("entry, text", [
    ({"path": "../ssl4eo_s12_nol.zip"}, "a file of this name, which is refused"), ({"path": "/etc/passwd"}, "refused"), ({"path": "a/../../b"}, "refused"), ({"path": "C:\\x"}, "refused"),
    ({"path": "a\nb"}, "refused"), ({"path": ""}, "refused"), ({"path": "a//b"}, "refused"), ({"path": 5}, "cannot be understood"), ({"size": -1}, "cannot be understood"),
    ({"size": "9"}, "cannot be understood"), ({"oid": "../../../../tmp/x"}, "cannot be understood"), ({"oid": None}, "cannot be understood"), ({"lfs": {"oid": "x"}}, "cannot be understood")])
def test_a_hostile_list_is_refused(hub, tmp_path, monkeypatch, entry, text):
    honest = hub.entry
    monkeypatch.setattr(hub, "entry", lambda repo, path: {**honest(repo, path), **(entry if path == "README.md" else {})})
    with pytest.raises(DataError, match=text): fetch(hub, tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("options, text", [
    (dict(what="noldo"), "unknown data set 'noldo'; did you mean 'noldo-s12'"), (dict(parts="lables"), "unknown part 'lables'; did you mean 'labels'"), (dict(parts=()), "parts is empty"),
    (dict(split="val"), "has no splits"), (dict(shards="0:1"), "has no numbered files"), (dict(endpoint="hub"), "endpoint='hub'"), (dict(endpoint="http://x:99999"), "endpoint="),
    (dict(endpoint="http://"), "endpoint="), (dict(repo="nolo"), "give OWNER/NAME"), (dict(repo="../.."), "OWNER/NAME"), (dict(workers=0), "workers=0"), (dict(timeout=0), "timeout=0"),
    (dict(token="a b"), "token"), (dict(token=True), "token"), (dict(what="ssl4eo-s12-v1.1", parts="S1GRD", shards="10"), "shards='10': give START:STOP"),
    (dict(what="ssl4eo-s12-v1.1", parts="S1GRD", split="test"), "unknown split 'test'")])
def test_wrong_options(hub, tmp_path, options, text):
    with pytest.raises(ConfigError, match=text): fetch(hub, tmp_path, **options)
    assert names(tmp_path) == []


def test_a_part_that_is_not_there_shows_what_is(hub, tmp_path):
    hub.repos[NOLDO] = {"README.md": b"", "labels_v2.zip": b""}
    with pytest.raises(DataError, match=rf"{NOLDO}: part 'labels' should be {ZIP}, and no file there is called so; there are: README.md, labels_v2.zip"): fetch(hub, tmp_path, None)
    hub.repos[NOLDO] = {}
    with pytest.raises(DataError, match="there are: no files"): fetch(hub, tmp_path)


# which files

def listing(count=6, parts=("S1GRD", "S2L1C"), splits=("train", "val")):
    return [f"{s}/{p}/ssl4eos12_{s}_seasonal_data_{n:06}.zarr.zip" for s in splits for p in parts for n in range(1, count + 1)]


def test_files_are_chosen_by_part_split_and_shard():
    data, there = DOWNLOADS["ssl4eo-s12-v1.1"], listing() + ["README.md", "train/S1GRD/notes.txt", "train/S1GRD/ssl4eos12_val_seasonal_data_000001.zarr.zip", "splits/a.txt", "splits/x/b.txt"]
    assert len(choose_files(data, there, ("S1GRD", "s2l1c"))) == 24
    assert choose_files(data, there, "S1GRD", "val", "-1:") == ["val/S1GRD/ssl4eos12_val_seasonal_data_000006.zarr.zip"]
    assert [n[-15:-9] for n in choose_files(data, there, "S2L1C", "train", "::3")] == ["000001", "000004"]
    assert choose_files(data, there, "splits", shards="0:2") == ["splits/a.txt"]
    assert len(choose_files(data, there, "S1GRD splits", None, "0:2")) == 5


def test_shards_are_the_same_places_in_every_part():
    data, there = DOWNLOADS["ssl4eo-s12-v1.1"], listing()
    there.remove("val/S2L1C/ssl4eos12_val_seasonal_data_000002.zarr.zip")
    with pytest.raises(DataError, match="S2L1C has no val file of number 000002, which another part has"): choose_files(data, there, "S1GRD S2L1C")
    assert [n[-15:-9] for n in choose_files(data, there, "S1GRD S2L1C", "val", "2:4")] == ["000003", "000004"] * 2
    with pytest.raises(DataError, match="no val file is among those shards; there are 6"): choose_files(data, there, "S1GRD", "val", "6:9")
    with pytest.raises(DataError, match="part 'S2RGB' should be train/S2RGB/"): choose_files(data, there, "S2RGB")


def test_every_data_set_is_described():
    for data in DOWNLOADS.values():
        assert data.title and data.licence and "arXiv:" in data.citation and data.repo.count("/") == 1 and all(module._regex(p, data.splits) for p in data.parts.values())


# progress

def test_progress_in_a_log_file(hub, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(module._Progress, "every", 0)
    fetch(hub, tmp_path, None, progress=True)
    said = capfd.readouterr().err.splitlines()
    assert said[0] == f"noldo-s12: 5 files, 440 kB from {NOLDO} at 01234567; 5 to fetch or check" and said[-1].startswith("440 kB of 440 kB, ") and "left" in said[-1]
    fetch(hub, tmp_path, None, progress=True)
    assert capfd.readouterr().err.splitlines() == [f"noldo-s12: 5 files, 440 kB from {NOLDO} at 01234567; all there"]
    fetch(hub, tmp_path, None)
    assert capfd.readouterr().err == ""


def test_progress_on_a_terminal(hub, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    hub.faults[ZIP] = [("drop", 1000), ("wrong", 5), ("status", 503)]
    counted, original = [], module._Progress.close
    monkeypatch.setattr(module._Progress, "close", lambda self: (counted.append((self.bar.n, self.bar.total)), original(self)))
    fetch(hub, tmp_path, progress=True)
    assert counted == [(300_000, 300_000)] and "300k/300k" in capfd.readouterr().err


def test_sizes_for_people():
    assert [size_text(n) for n in (0, 1, 999, 1234, 999_949, 10 ** 6, 98_760_000, 1.5e9, 999.6e9, 5e15)] == ["0 B", "1 B", "999 B", "1.2 kB", "1.0 MB", "1.0 MB", "98.8 MB", "1.5 GB", "1.0 TB", "5000 TB"]
