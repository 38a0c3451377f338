"""`make demo-push` in short: twenty devices with the agent's own updater, a real gateway and a real repository.

A wrong and a slow release are stopped by their canaries and taken back; nobody outside of a canary ever ran one. What a device's
self-test would find stands in the file itself.
"""

import asyncio
import contextlib
import hashlib
import itertools
import json
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

pytest.importorskip("fedcore_device", reason="the device's package is not installed: pip install -e clients/linux")

from fedcore_device import updates
from fedcore_device.installed import Trial, model_directory
from fedcore_device.policy import DeviceFacts, Policy, UpdatePolicy
from fedcore_device.state import State
from fedcore_device.updates import Identity, Updater

from fedcore.coordinator.release_status import attend, standing
from fedcore.coordinator.releases import Registry
from fedcore.coordinator.rollouts import Order, RolloutControl, Shape
from fedcore.errors import Refused
from fedcore.gateway.blobs import Blobs
from fedcore.gateway.client import GatewayClient, Requests, enrol
from fedcore.gateway.deployment import make_fleet
from fedcore.gateway.door import GatewaySettings
from fedcore.gateway.identity import spell
from fedcore.gateway.limits import Limits
from fedcore.gateway.process import GatewayServer
from fedcore.registry.catalogue import artefact, self_test
from fedcore.registry.files import LocalFiles
from fedcore.registry.keys import load_signers, make_keys
from fedcore.registry.repository import create, publish
from fedcore.registry.slots import read_pointer
from fedcore.secagg.crypto import Ed25519Key
from fedcore.secagg.keys import read_signing_key
from fedcore.state.stores import open_gateway_store

DEVICES, WINDOW, OPS = 20, 600.0, Order("ops", "in the test")
SHAPE = Shape((0.4,), 0.6, WINDOW, corrupt=0.0, budgets={"p95_ms": 50.0})
ROOT = Path(__file__).parents[2]


class Around:
    """A device's surroundings, by the clock of the test."""

    def __init__(self, world):
        self.world = world

    def clock(self):
        return self.world.now


class World:
    def __init__(self, folder):
        self.folder, self.now = folder, time.time()
        keys = make_keys(folder / "offline", folder / "online", 1, 1, publishes=True)
        files, every = LocalFiles(folder / "repository"), load_signers([folder / "offline", folder / "online"])
        create(files, keys, every, datetime.now(UTC))
        self.registry = Registry(files, load_signers([folder / "online"]))  # the machine that publishes has no offline key
        self.fleet = make_fleet(folder / "fleet", "watches", update_root=files.read("metadata/1.root.json"))
        self.signer = self.fleet.signer()
        where = str(folder / "state.sqlite")
        self.control = RolloutControl(open_gateway_store(where), folder / "releases.jsonl", lambda: self.now)
        settings = GatewaySettings.of(
            self.fleet.trust(), read_signing_key(self.fleet.time_key), b"s" * 32, signer=self.signer, repository=files,
            limits=Limits(rate=1000, burst=1000), release_every=1.0,
        )  # fmt: skip
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

        async def begin():
            server = GatewayServer(
                settings, lambda: open_gateway_store(where), Blobs(folder / "blobs"), "127.0.0.1:0", tls=None,
                clock=lambda: self.now,
            )  # fmt: skip
            await server.start()
            return server

        self.server = self.wait(begin())
        self.devices, self.names = [], []
        self.ran = {}  # by version, the devices that ever ran it
        for number in range(DEVICES):
            self.add(number)

    def wait(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(120)

    def add(self, number):
        key = Ed25519Key(hashlib.sha256(b"%d" % number).digest())
        enrolled = enrol(self.server.address, self.signer.issue(600).encode(), key, plain=True)
        counter = itertools.count(1)
        requests = Requests(enrolled, lambda: next(counter), clock=lambda: self.now)

        @contextlib.contextmanager
        def connected():
            client = GatewayClient(self.server.address, requests, plain=True)
            try:
                yield client
            finally:
                client.close()

        state = State(self.folder / f"device-{number}")
        policy = Policy(device=DeviceFacts(tier="flagship"), updates=UpdatePolicy(models=("digits",)))
        identity = Identity(hashlib.sha256(key.public).digest(), enrolled.trust.time_keys, enrolled.trust.update_root)
        begun = self.now
        self.devices.append(Updater(state, Around(self), policy, identity, connected, elapsed=lambda: self.now - begun))
        self.names.append(spell(enrolled.device))

    def turn(self):
        """Every device asks, and tells at once how an installation went; the versions that they run."""
        for updater in self.devices:
            updater.step(now=True)
            updater.step(now=True)
        found = []
        for number, name in enumerate(self.names):
            pointer = read_pointer(model_directory(self.folder / f"device-{number}", "digits"))
            version = pointer.current.version if pointer.current else 0
            self.ran.setdefault(version, set()).add(name)
            found.append((version, pointer.current.files["flagship/onnx"].digest if pointer.current else ""))
        return found

    def release(self, **trial):
        version = self.registry.catalogue().latest("digits") + 1
        data = json.dumps(trial).encode()
        item = artefact("digits", version, "flagship", "onnx", "model.onnx", data)
        batch = self_test("digits", version, b"what `tried` does not look at")
        publish(self.registry.files, [item, batch], self.registry.signers, datetime.now(UTC))
        self.control.start("digits", version, self.registry.catalogue(), SHAPE, OPS)
        return version, hashlib.sha256(data).hexdigest()

    def canary(self):
        state = self.control.running("digits").state
        return {device for device, member in state.members.items() if member.arm == "canary"}

    def look(self):
        return attend(self.control, "digits", self.registry)

    def close(self):
        self.wait(self.server.stop(0.1))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(30)
        self.loop.close()
        self.control.__exit__()
        self.signer.close()


def tried(files, batch, bounds):
    (path,) = files.values()
    told = json.loads(path.read_bytes())
    if told["disagreement"] > 1 - bounds.agreement:
        raise Refused(f"self-test: agreement {1 - told['disagreement']:.3f} is below {bounds.agreement:g}")
    return Trial(told["disagreement"], told["p95_ms"], 5_000_000, {path.name: 1000})


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setattr(updates, "self_test", tried)
    one = World(tmp_path)
    yield one
    one.close()


def test_bad_releases_are_stopped_by_their_canaries_and_everybody_returns_to_the_old_content(world):
    world.release(disagreement=0.02, p95_ms=1.0)
    assert {version for version, _ in world.turn()} == {1}

    second, content = world.release(disagreement=0.01, p95_ms=1.1)
    held = world.turn()
    assert [version for version, _ in held].count(second) == 8
    world.now += WINDOW + 1
    world.turn()
    assert world.look() == ""  # twenty devices cannot rule harm out: a person decides
    assert not any(one["harmful"] for one in standing(world.control, "digits", world.now)["tests"])
    world.control.order("digits", "promote", OPS)
    assert set(world.turn()) == {(second, content)}

    for trial, verdict in (({"disagreement": 0.9, "p95_ms": 1.0}, "crash, disagreement"), ({"disagreement": 0.02, "p95_ms": 900.0},
                           "p95_ms above 50 or untold on more than 0.25")):  # fmt: skip
        bad, _ = world.release(**trial)
        world.turn()
        world.now += WINDOW - 1
        assert world.look() == ""
        world.now += 2
        said = world.look()  # the first look after the canary's window
        assert said.startswith(f"digits-{bad}: aborted, by {verdict}")
        assert f"8 devices were exposed; digits-{bad}: release {bad + 1} has the content of" in said
        canary = world.canary()
        assert len(canary) == 8
        assert set(world.turn()) == {(bad + 1, content)}
        assert world.ran.get(bad, set()) <= canary
        assert world.look() == ""
    assert world.ran[bad] == canary  # the slow one ran on its whole canary; the wrong one never passed a self-test
    assert bad - 2 not in world.ran


def test_devices_that_are_away_neither_hide_nor_get_a_bad_release(world):
    world.release(disagreement=0.02, p95_ms=1.0)
    world.turn()
    everybody, away = world.devices, world.devices[:5]
    bad, _ = world.release(disagreement=0.02, p95_ms=900.0)
    world.devices = everybody[5:]
    world.turn()
    world.now += WINDOW + 1
    said = world.look()
    if "aborted" not in said:  # fewer than it takes may have been in the canary: those who come late join, and decide
        world.devices = everybody
        world.turn()
        world.now += WINDOW + 1
        said = world.look()
    assert "aborted, by p95_ms above 50" in said
    world.devices = everybody
    assert {version for version, _ in world.turn()} == {bad + 1}
    assert len(away) == 5
    assert world.ran[bad] <= world.canary()


@pytest.mark.slow
def test_the_demonstration_itself(tmp_path):
    command = [sys.executable, "-m", "simulations.push", "--out", str(tmp_path / "push")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    told = json.loads((tmp_path / "push" / "result.json").read_text())
    wrong, slow = told["bad"]
    for one in told["bad"]:
        assert len(one["canary"]) == 8
        assert set(one["ran"]) <= set(one["canary"])
        assert one["aborted_by"]
        assert "silence" not in one["aborted_by"]
    assert not wrong["ran"], "no self-test lets it pass"
    assert sum(wrong["refused"].values()) == 8
    assert set(slow["ran"]) == set(slow["canary"])
    assert any(signal.startswith("p95_ms") for signal in slow["aborted_by"])
    assert len(told["contents"]) == DEVICES
    assert set(told["contents"]) == {told["good"]}
    ends = {name: (one["phase"], one["by"]) for name, one in told["rehearsals"].items()}
    assert ends == {
        "is harmless": ("full", []), "takes 60 % more memory": ("aborted", ["peak_bytes"]),
        "crashes on 1 load in 20": ("aborted", ["crash"]), "silences 1 device in 5": ("aborted", ["silence"]),
    }  # fmt: skip
    assert (tmp_path / "push" / "versions.png").stat().st_size > 10_000
