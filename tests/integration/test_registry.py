"""The registry by its commands, and a model's way from an export's bytes to a device over HTTP."""

import contextlib
import datetime
import hashlib
import http.server
import json
import shutil
import threading

import numpy as np
import pytest
from typer.testing import CliRunner

from fedcore.cli import app
from fedcore.errors import Refused
from fedcore.registry.catalogue import artefact, delta, self_test
from fedcore.registry.client import Client
from fedcore.registry.delta import make_delta
from fedcore.registry.fetch import HttpFetcher
from fedcore.registry.files import LocalFiles
from fedcore.registry.install import Store, install
from fedcore.registry.keys import load_signers
from fedcore.registry.repository import publish


def fedcore(*words, code=0):
    result = CliRunner().invoke(app, ["registry", *map(str, words)])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def place(tmp_path):
    fedcore("init", tmp_path / "repository", "--offline", tmp_path / "offline", "--online", tmp_path / "online")
    return tmp_path


def test_a_repository_by_its_commands(place):
    repository, offline, online = place / "repository", place / "offline", place / "online"
    assert fedcore("verify", repository) == "sound\n"
    assert sorted(path.name for path in online.glob("*.key")) == ["snapshot.key", "timestamp.key"]
    assert {path.stat().st_mode & 0o777 for folder in (offline, online) for path in folder.glob("*.key")} == {0o600}
    (place / "cnn.onnx").write_bytes(b"a graph")
    named = fedcore("sign-step", repository, place / "cnn.onnx", "--keys", offline, "--keys", online).strip()
    assert named == f"steps/{hashlib.sha256(b'a graph').hexdigest()}"
    assert "snapshot, timestamp" in fedcore("renew", repository, "--keys", online)
    said = json.loads(fedcore(
        "rotate-keys", repository, "--role", "timestamp", "--keys", offline, "--keys", online, "--out", place / "fresh", "--json"
    ))  # fmt: skip
    assert said["old"] != said["new"]
    assert fedcore("verify", repository) == "sound\n"
    fedcore("renew", repository, "--keys", online, code=2)
    fedcore("renew", repository, "--keys", online, "--keys", place / "fresh")
    (repository / "targets" / named.replace("/", f"/{named.split('/')[1]}.")).write_bytes(b"another graph")
    (repository / "stray").write_text("x")
    lines = [json.loads(line) for line in fedcore("verify", repository, "--json", code=1).splitlines()]
    assert [line["kind"] for line in lines] == ["problem", "problem"]
    assert "not the bytes whose hash is signed" in lines[0]["text"]
    assert lines[1]["text"] == "stray: nothing names this file"


def test_a_wrong_request_is_one_line(place):
    repository = place / "repository"
    for words, text in (
        (["init", repository, "--offline", place / "a", "--online", place / "b"], "there are files already"),
        (["init", place / "new", "--offline", place / "a", "--online", place / "b", "--threshold", 4], "threshold"),
        (
            ["init", place / "new", "--offline", place / "offline", "--online", place / "b"],
            "exists already; keys are never overwritten",
        ),
        (["rotate-keys", repository, "--role", "king", "--keys", place / "offline", "--out", place / "c"], "no role 'king'"),
        (["rotate-keys", repository, "--role", "root", "--keys", place / "offline", "--out", place / "c"], "more than one"),
        (["sign-step", repository, place / "offline" / "targets.pub", "--keys", place / "online"], "the role targets needs"),
        (["renew", place / "nothing", "--keys", place / "online"], "there is no repository"),
    ):
        result = CliRunner().invoke(app, ["registry", *map(str, words)])
        assert result.exit_code == 2, result.output
        assert text in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    assert not (place / "a").exists()
    assert not (place / "c").exists()


@contextlib.contextmanager
def served(directory, asked):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *given):
            super().__init__(*given, directory=str(directory))

        def log_message(self, form, *values):
            asked.append(form % values)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_releases_reach_a_device_over_http_and_are_taken_back(place):
    """Two releases, the second as a delta; a third that is unfit; and the content of the first as the fourth."""
    rng, now = np.random.default_rng(0), datetime.datetime.now(datetime.UTC)
    files, signers = LocalFiles(place / "repository"), load_signers([place / "offline", place / "online"])
    first = rng.integers(-127, 128, 50_000, np.int8)
    second = first + (rng.random(50_000) < 0.02).astype(np.int8)
    contents = {1: first.tobytes(), 2: second.tobytes(), 3: bytes(50_000), 4: first.tobytes()}
    tested, asked = [], []

    def score(paths, batch):
        tested.append(batch.read_bytes())
        if not any(paths["entry/onnx"].read_bytes()):
            raise Refused("agreement 0.10 with the labels of the batch")

    def offer(version, *more):
        item = artefact("digits", version, "entry", "onnx", "model.onnx", contents[version], agreement=0.99)
        publish(files, [item, self_test("digits", version, b"batch %d" % version), *more], signers, now)

    offer(1)
    digests = {version: hashlib.sha256(data).digest() for version, data in contents.items()}
    with served(place / "repository", asked) as url, Store(place / "device") as store:
        client = Client(place / "trust", HttpFetcher(url), (place / "repository" / "metadata" / "1.root.json").read_bytes())

        def update(version):
            catalogue = client.refresh(now, 30.0)
            return install(store, client, catalogue, "digits", version, [("entry", "onnx")], score, lambda: None, 30.0)

        assert update(1).version == 1
        store.commit()
        change = make_delta(contents[1], contents[2])
        offer(2, delta("digits", 2, digests[1], digests[2], change))
        asked.clear()
        update(2)
        assert len(change) < len(contents[2]) / 5
        assert not [line for line in asked if "model.onnx" in line]
        store.commit()
        offer(3)
        with pytest.raises(Refused, match=r"agreement 0\.10"):
            update(3)
        assert store.start().version == 2
        offer(4)
        asked.clear()
        update(4)
        assert store.start().version == 4
        assert store.path(digests[4].hex()).read_bytes() == contents[1]
        assert not [line for line in asked if "model.onnx" in line], "release 1 is still there as the one before"
    assert tested == [b"batch 1", b"batch 2", b"batch 3", b"batch 4"]
    assert fedcore("verify", place / "repository") == "sound\n"
    shutil.rmtree(place / "repository" / "targets" / "releases" / "digits" / "2" / "deltas")
    assert "missing" in fedcore("verify", place / "repository", code=1)
