"""The registry by its commands, and a model's way from an export's bytes to a device over HTTP."""

import contextlib
import datetime
import functools
import hashlib
import http.server
import json
import shutil
import threading

import numpy as np
import onnx
import pytest
from onnx import helper
from typer.testing import CliRunner

from fedcore.cli import app
from fedcore.errors import Refused
from fedcore.models import ZOO
from fedcore.portable.step import portable_evaluation, portable_step
from fedcore.registry.catalogue import artefact, delta, self_test
from fedcore.registry.client import Client
from fedcore.registry.delta import make_delta
from fedcore.registry.fetch import HttpFetcher
from fedcore.registry.files import LocalFiles
from fedcore.registry.install import Store, install
from fedcore.registry.keys import load_signers
from fedcore.registry.repository import publish


@functools.cache
def exported():
    """A step as the coordinator exports it."""
    return portable_step(ZOO["mlp"]((1, 8, 8), 4), (1, 8, 8), batch=4, unit="example")


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
    graph = exported()
    step = place / f"{graph.sha256}.onnx"  # as it lies in FLEET/steps
    step.write_bytes(graph.data)
    named = fedcore("sign-step", repository, step, "--keys", offline, "--keys", online).strip()
    assert named == f"steps/{graph.sha256}"
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
    repository, keys = place / "repository", ("--keys", place / "offline", "--keys", place / "online")
    (place / "mlp.onnx").write_bytes(exported().data)
    with (place / "large.onnx").open("wb") as file:
        file.truncate(1 << 33)
    hostile = hostile_steps(place)
    for words, text in (
        (["init", repository, "--offline", place / "a", "--online", place / "b"], "there are files already"),
        (["init", place / "new", "--offline", place / "a", "--online", place / "b", "--threshold", 4], "threshold"),
        (
            ["init", place / "new", "--offline", place / "offline", "--online", place / "b"],
            "exists already; keys are never overwritten",
        ),
        (["rotate-keys", repository, "--role", "king", "--keys", place / "offline", "--out", place / "c"], "no role 'king'"),
        (["rotate-keys", repository, "--role", "root", "--keys", place / "offline", "--out", place / "c"], "more than one"),
        (["sign-step", repository, place / "mlp.onnx", "--keys", place / "online"], "the role targets needs"),
        (["sign-step", repository, place / "offline" / "targets.pub", *keys], "targets.pub is not signed: training step"),
        (["sign-step", repository, place / "none.onnx", *keys], "none.onnx cannot be read (No such file"),
        (["sign-step", repository, place, *keys], "cannot be read (Is a directory)"),
        (["sign-step", repository, place / "large.onnx", *keys], "more than the 16777216 bytes that devices accept"),
        *((["sign-step", repository, place / f"{what}.onnx", *keys], text) for what, text in hostile.items()),
        (["renew", place / "nothing", "--keys", place / "online"], "there is no repository"),
    ):
        result = CliRunner().invoke(app, ["registry", *map(str, words)])
        assert result.exit_code == 2, result.output
        assert text in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    assert not (place / "a").exists()
    assert not (place / "c").exists()


def count_of_nothing(proto):
    """The count is no longer that of the mask."""
    node = next(one for one in proto.graph.node if list(one.output) == ["count"])
    node.output[0] = "counted"
    proto.graph.node.append(helper.make_node("Sub", ["counted", "counted"], ["count"]))


def hostile_steps(place):
    """Graphs that devices refuse, as NAME.onnx, and what is said of each."""
    step = exported()
    changes = {
        "a-mail": (lambda p: p.graph.node.append(helper.make_node("Mail", ["x"], ["leak"])), "operator 'Mail' is not one of"),
        "a-domain": (
            lambda p: p.graph.node.append(helper.make_node("Abs", ["x"], ["l"], domain="com.microsoft")), "of another domain"
        ),
        "a-library": (lambda p: p.opset_import.append(helper.make_opsetid("com.example", 1)), "of the standard domain alone"),
        "a-file": (lambda p: p.graph.initializer[0].external_data.add(key="location", value="/etc/passwd"), "external data"),
        "an-input": (lambda p: p.graph.input.pop(), "its inputs are not those that its form states"),
        "an-output": (lambda p: p.graph.output.reverse(), "its outputs are not those that its form states"),
        "a-model": (lambda p: p.ClearField("metadata_props"), "neither the property fedcore.step of a training step"),
        "two-kinds": (lambda p: p.metadata_props.add(key="fedcore.evaluation", value="{}"), "and no other"),
        "another-shape": (lambda p: setattr(p.graph.node[-1], "op_type", "Gather"), "float32 [0, 1], not as its form"),
        "what-no-runtime-loads": (lambda p: setattr(p.graph.node[-1], "op_type", "Split"), "ONNX Runtime cannot load it"),
        "a-liar": (count_of_nothing, "it counts 0 examples where there are 4"),
    }  # fmt: skip
    for name, (change, _) in changes.items():
        proto = onnx.load_from_string(step.data)
        change(proto)
        (place / f"{name}.onnx").write_bytes(proto.SerializeToString())
    return {name: text for name, (_, text) in changes.items()}


def test_evaluation_graphs_are_published_too_and_nothing_is_where_a_file_is_refused(place):
    repository, keys = place / "repository", ("--keys", place / "offline", "--keys", place / "online")
    before = sorted(path.name for path in repository.rglob("*"))
    for name in hostile_steps(place):
        fedcore("sign-step", repository, place / f"{name}.onnx", *keys, code=2)
    assert sorted(path.name for path in repository.rglob("*")) == before
    graph = portable_evaluation(ZOO["mlp"]((1, 8, 8), 4), (1, 8, 8), batch=4)
    (place / "evaluation.onnx").write_bytes(graph.data)
    assert fedcore("sign-step", repository, place / "evaluation.onnx", *keys).strip() == f"steps/{graph.sha256}"


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
