"Encoders on a hub on this machine: up in one commit, down whole and checked, and one line for whatever fails."
import base64
import hashlib
import json
import os
import threading
from http.server import ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from test_download import HERE, NOBODY, Handler

from cromss.config import ConfigError, WeightsError
from cromss.folders import FILES
from cromss.hub import check_folder, parse_address, pull, push
from cromss.models import CrossModalSegmenter
from cromss.sensors import SENSORS
from cromss.weights import load_encoder, read_weights, save_encoder

REPO, TOKEN = "lab/encoder-s2", "hf_secret"


class Hub(ThreadingHTTPServer):
    "What a hub does for push and pull: `repos` holds each one's privacy and commits, `faults` what is answered where, as {part of a path: (status, the hub's code)}."
    daemon_threads, block_on_close = True, False

    def __init__(self):
        super().__init__((HERE, 0), Answers)
        self.repos, self.faults, self.stored, self.asked, self.spoil = {}, {}, {}, [], {}
        self.address = f"http://{HERE}:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, *_): pass

    def files(self, repo): return self.repos[repo]["commits"][-1][2]


class Answers(Handler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0)) if "chunked" not in self.headers.get("transfer-encoding", "") else self.chunks()
        self.route("POST", body)

    def do_PUT(self):
        self.server.stored[urlsplit(self.path).path.rpartition("/")[2]] = self.rfile.read(int(self.headers["content-length"]))
        self.answer(200)

    def do_GET(self): self.route("GET", b"")
    def do_HEAD(self): self.route("HEAD", b"")

    def chunks(self):
        parts = []
        while size := int(self.rfile.readline(), 16): parts.append(self.rfile.read(size)), self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"content-length": len(body), **headers}.items(): self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(body)

    def route(self, method, body):
        hub, path = self.server, unquote(urlsplit(self.path).path)
        hub.asked.append((method, path, self.headers.get("authorization")))
        for part, (status, code) in hub.faults.items():
            if part in path: return self.answer(status, b"{}", **({"x_error_code": code} if code else {}))
        if path == "/api/repos/create": return self.create(json.loads(body))
        if path == "/api/validate-yaml": return self.json({"errors": [], "warnings": []})
        if path.startswith("/api/models/"): return self.model(*path.split("/")[3:5], path.split("/")[5:], body)
        if path.endswith(".git/info/lfs/objects/batch"): return self.batch(json.loads(body))
        self.resolve(*path.strip("/").split("/", 4))

    def create(self, wanted):
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.server.repos: return self.answer(409, json.dumps({"error": "You already created this repo", "url": f"{self.server.address}/{name}"}).encode())
        self.server.repos[name] = {"private": wanted.get("private", wanted.get("visibility") == "private"), "commits": [("0" * 40, "initial", {})]}
        self.json({"url": f"{self.server.address}/{name}", "name": name, "id": "1"})

    def model(self, owner, name, rest, body):
        repo = self.server.repos.get(f"{owner}/{name}")
        hidden = repo and repo["private"] and self.headers.get("authorization") != f"Bearer {TOKEN}"
        if not repo or hidden: return self.answer(404, b'{"error": "Repository not found"}', x_error_code="RepoNotFound")
        if rest[:1] == ["preupload"]: return self.json({"files": [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith("safetensors") else "regular", "shouldIgnore": False}
                                                                   for f in json.loads(body)["files"]]})
        if rest[:1] == ["commit"]: return self.commit(f"{owner}/{name}", repo, body)
        commit = repo["commits"][-1] if len(rest) < 2 or rest[1] == "main" else next((c for c in repo["commits"] if c[0] == rest[1]), None)
        if commit is None: return self.answer(404, b"{}", x_error_code="RevisionNotFound")
        if rest[:1] == ["tree"]: return self.json([self.entry(p, d) for p, d in commit[2].items()])
        self.json({"id": f"{owner}/{name}", "sha": commit[0], "private": repo["private"], "siblings": [{"rfilename": p} for p in commit[2]], "tags": [], "downloads": 0, "likes": 0})

    def entry(self, path, data):
        entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
        return {**entry, "lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}} if path.endswith("safetensors") else entry

    def batch(self, wanted):
        self.json({"transfer": "basic", "objects": [{**o, "actions": {"upload": {"href": f"{self.server.address}/lfs/{o['oid']}"}}} for o in wanted["objects"]]})

    def commit(self, name, repo, body):
        lines, files = [json.loads(line) for line in body.splitlines() if line], dict(repo["commits"][-1][2])
        for line in lines[1:]:
            value = line["value"]
            files[value["path"]] = self.server.stored[value["oid"]] if line["key"] == "lfsFile" else base64.b64decode(value["content"])
        commit = hashlib.sha1(body).hexdigest()
        repo["commits"].append((commit, lines[0]["value"]["summary"], files))
        self.json({"success": True, "commitOid": commit, "commitUrl": f"{self.server.address}/{name}/commit/{commit}", "hookOutput": ""})

    def resolve(self, owner, name, _, commit, path):
        data = next(c for c in self.server.repos[f"{owner}/{name}"]["commits"] if c[0] == commit)[2][path]
        entry = self.entry(path, data)
        data = self.server.spoil.get(path, lambda d: d)(data)
        self.answer(200, data, etag=f'"{entry.get("lfs", entry)["oid"]}"', x_repo_commit=commit)


def home(monkeypatch, address):
    "Let this be the address of huggingface_hub's own hub, as HF_ENDPOINT does."
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def hub(apart, monkeypatch):
    hub = Hub()
    home(monkeypatch, hub.address)
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture(autouse=True)
def apart(monkeypatch, tmp_path):
    "No test reaches the real hub, or uses anybody's token, cache or proxy."
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name, value in dict(HF_HUB_DISABLE_XET=True, HF_HUB_CACHE=str(tmp_path / "cache"), HF_TOKEN_PATH=str(tmp_path / "token"), HF_HUB_DISABLE_TELEMETRY=True).items():
        monkeypatch.setattr(constants, name, value)
    home(monkeypatch, NOBODY)
    close_session()
    yield
    close_session()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    model = CrossModalSegmenter({"s2": 13}, encoder="resnet18", encoder_depth=2, decoder_channels=(8, 8))
    return save_encoder(model, "s2", tmp_path_factory.mktemp("saved") / "s2", run="r1")


@pytest.fixture
def token(monkeypatch): monkeypatch.setenv("HF_TOKEN", TOKEN)


def refused(kind, message, call, *args, **kwargs):
    with pytest.raises(kind, match=message) as error: call(*args, **kwargs)
    assert "\n" not in str(error.value) and "secret" not in str(error.value)


# up and down

def test_up_in_one_commit_and_down_again(hub, saved, token, tmp_path):
    address = push(saved, REPO)
    [_, (commit, message, files)] = hub.repos[REPO]["commits"]
    assert address == f"hf://{REPO}@{commit}" and message == "Upload s2" and hub.repos[REPO]["private"]
    assert files == {name: (saved / name).read_bytes() for name in FILES}
    assert any(a == f"Bearer {TOKEN}" for _, _, a in hub.asked)
    got = pull(REPO, tmp_path / "new" / "folder")
    assert sorted(f.name for f in got.iterdir()) == sorted(FILES) and all((got / n).read_bytes() == files[n] for n in FILES)
    want = load_encoder(saved).state_dict()
    for place in (address, f"hf://{REPO}"):
        encoder = load_encoder(place, bands=SENSORS["s2"])
        assert all(torch.equal(v, want[k]) for k, v in encoder.state_dict().items())
    refused(WeightsError, "expected s1", read_weights, address, "s1")


def test_only_the_three_files_go_up_and_come_down(hub, saved, token, tmp_path):
    import shutil
    folder = shutil.copytree(saved, tmp_path / "more")
    (folder / "notes.txt").write_text("mine")
    push(folder, REPO, message="First\n", private=False)
    assert hub.files(REPO).keys() == set(FILES) and not hub.repos[REPO]["private"]
    hub.files(REPO)["train.py"] = b"import os"
    assert sorted(p.name for p in pull(REPO).iterdir()) == sorted(FILES)


def test_a_commit_stays_what_it_was(hub, saved, token, tmp_path):
    first = push(saved, REPO)
    model = CrossModalSegmenter({"s2": 13}, encoder="resnet18", encoder_depth=2, decoder_channels=(8, 8))
    second = push(save_encoder(model, "s2", tmp_path / "s2", run="r2"), REPO)
    assert first != second and [json.loads((pull(a) / "config.json").read_text())["run"] for a in (first, second, REPO)] == ["r1", "r2", "r2"]
    assert json.loads((pull(REPO, revision=first.rpartition("@")[2]) / "config.json").read_text())["run"] == "r1"
    assert push(tmp_path / "s2", REPO).partition("@")[0] == f"hf://{REPO}"


def test_another_endpoint_gets_a_given_token_only(hub, saved, token, monkeypatch):
    home(monkeypatch, NOBODY)
    refused(ConfigError, "no access token", push, saved, REPO, endpoint=hub.address)
    assert not hub.asked
    push(saved, REPO, private=False, endpoint=hub.address, token=TOKEN)
    hub.asked.clear()
    check_folder(pull(REPO, endpoint=hub.address))
    assert hub.asked and not any(authorization for _, _, authorization in hub.asked)


def test_what_is_cached_serves_without_a_network(hub, saved, token, monkeypatch):
    push(saved, REPO)
    want = pull(REPO)
    home(monkeypatch, NOBODY)
    assert pull(REPO) == want


# what fails

def test_no_token(hub, saved):
    refused(ConfigError, "no access token: log in by `hf auth login`", push, saved, REPO)
    refused(ConfigError, "no access token", push, saved, REPO, token=False)
    assert not hub.asked


def test_a_token_that_may_not(hub, saved):
    hub.faults["/api/repos/create"] = (403, None)
    refused(ConfigError, "your token may not do this .HTTP 403.", push, saved, REPO, token="hf_secret_other")
    hub.faults["/api/repos/create"] = (401, None)
    refused(ConfigError, "log in by `hf auth login`", push, saved, REPO, token="hf_secret_other")


def test_no_such_repository_or_revision(hub, saved, token):
    refused(ConfigError, "nobody/nothing: no such repository", pull, "nobody/nothing")
    push(saved, REPO)
    refused(ConfigError, "no such revision", pull, f"hf://{REPO}@v9")
    refused(ConfigError, "no such repository, or it is private", pull, REPO, token=False)
    hub.faults["/api/models/"] = (403, "GatedRepo")
    refused(ConfigError, "access must be asked for", pull, REPO)


def test_a_public_repository_is_not_taken_for_a_private_one(hub, saved, token):
    push(saved, REPO, private=False)
    refused(ConfigError, "is public already; give private=False", push, saved, REPO)
    assert len(hub.repos[REPO]["commits"]) == 2


@pytest.mark.parametrize("address", ["encoder", "a/b/c", "", "https://huggingface.co/a/b", "a/b@", "a b/c", "hf://"])
def test_addresses(address, saved):
    refused(ConfigError, "is no repository: give OWNER/REPO", pull, address)


def test_names_that_the_hub_has_not(hub):
    refused(ConfigError, "HFValidationError", pull, "a/..b")
    assert parse_address("hf://a/b.c@refs/pr/1") == ("a/b.c", "refs/pr/1")


def test_no_network(saved, token):
    refused(WeightsError, "the hub cannot be reached", push, saved, REPO)
    refused(WeightsError, "cannot be reached .ConnectError.*and the cache does not hold it", pull, REPO)
    refused(WeightsError, "cannot be reached", read_weights, f"hf://{REPO}")


def test_offline(saved, token, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    refused(WeightsError, "OfflineModeIsEnabled.*cache does not hold it", pull, REPO)
    refused(ConfigError, "HF_HUB_OFFLINE is set", push, saved, REPO)


def test_a_failing_hub(hub, saved, token):
    hub.faults["/commit/main"] = (400, None)
    refused(WeightsError, "the hub answers 400", push, saved, REPO)
    assert len(hub.repos[REPO]["commits"]) == 1
    hub.faults = {"/api/": (404, None)}
    refused(WeightsError, "404", pull, REPO)


def test_an_answer_of_no_hub(hub, saved, token):
    hub.faults["/api/"] = (200, None)                  # {} to everything
    refused(WeightsError, "hub's answer cannot be used", push, saved, REPO)
    refused(WeightsError, "hub's answer cannot be used|cannot be reached", pull, REPO)


def test_spoilt_on_the_way_or_on_the_hub(hub, saved, token, tmp_path):
    push(saved, REPO)
    files = hub.files(REPO)
    files["model.safetensors"] = files["model.safetensors"][:-1] + b"?"
    refused(WeightsError, "checksum differs", pull, REPO, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    del files["config.json"]
    hub.repos[REPO]["commits"].append(("1" * 40, "", dict(files)))
    refused(WeightsError, "config.json not there", pull, REPO, tmp_path / "x")


def test_a_folder_that_is_there_or_cannot_be_written(hub, saved, token, tmp_path, monkeypatch):
    push(saved, REPO)
    (tmp_path / "there").mkdir()
    refused(WeightsError, "there: other weights are there", pull, REPO, tmp_path / "there")
    assert pull(REPO, pull(REPO, tmp_path / "same")) == tmp_path / "same"
    def full(fd): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    refused(WeightsError, "cannot be written .No space left", pull, REPO, tmp_path / "x")
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.partial").exists()


@pytest.mark.parametrize("change, message", [
    (lambda f: (f / "README.md").unlink(), "README.md not there"), (lambda f: (f / "config.json").write_text("{}"), "states no format"),
    (lambda f: (f / "config.json").write_text("{"), "not valid JSON"), (lambda f: (f / "model.safetensors").write_bytes(b"x"), "checksum differs")])
def test_what_is_not_whole_does_not_go_up(change, message, hub, saved, token, tmp_path):
    import shutil
    folder = shutil.copytree(saved, tmp_path / "s2")
    change(folder)
    refused(WeightsError, message, push, folder, REPO)
    assert not hub.asked
