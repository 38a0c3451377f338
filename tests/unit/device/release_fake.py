"""A gateway that assigns releases, a repository that speaks the real format, and a device that asks them."""

import contextlib
import hashlib
import io
import random

import numpy as np
from device_releases import Around
from fedcore_device.installed import model_directory
from fedcore_device.policy import DeviceFacts, Policy, UpdatePolicy
from fedcore_device.state import State
from fedcore_device.updates import Identity, Updater
from registry_world import NOW, Simulator

from fedcore.gateway import gateway_pb2 as pb
from fedcore.registry.assignment import Assignment, sign_assignment
from fedcore.registry.delta import make_delta
from fedcore.registry.slots import Store, read_pointer
from fedcore.secagg.crypto import Ed25519Key

TIME, OTHER = Ed25519Key(b"t" * 32), Ed25519Key(b"o" * 32)
DEVICE = hashlib.sha256(b"identity").digest()


def content(version, tier="flagship"):
    """Files of consecutive versions differ in a few bytes only; they are no models: such tests replace the self-test."""
    data = bytearray(random.Random(tier).randbytes(20_000))
    for number in range(version):
        data[number * 7 : number * 7 + 5] = b"%05d" % number
    return bytes(data)


def batch_of(x, y):
    buffer = io.BytesIO()
    np.savez(buffer, x=x, y=y)
    return buffer.getvalue()


class Gateway:
    """Assigns ``wanted``; whatever a test puts into ``lies`` replaces a field of the assignment. ``asked`` are the bodies."""

    def __init__(self, simulator):
        self.simulator, self.asked, self.wanted, self.sequence = simulator, [], 0, 0
        self.now, self.lies, self.key, self.token = NOW.timestamp(), {}, TIME, b"token"
        self.spoil, self.connections = None, 0
        self.rollout, self.retry = "first", 600_000

    @contextlib.contextmanager
    def connected(self):
        self.connections += 1
        yield self

    def release(self, body):
        self.asked.append(body)
        if self.spoil is not None:
            raise self.spoil
        reply = pb.ReleaseReply(
            token=self.token, retry_after_ms=self.retry, server_time=pb.ServerTime(time_ms=int(1000 * self.now))
        )
        if self.wanted:
            self.sequence += 1
            now = int(self.now)
            fields = {
                "device": DEVICE, "sequence": self.sequence, "rollout": self.rollout, "model": body.model,
                "version": self.wanted, "target": self.simulator.digest(body.model, self.wanted), "issued": now,
                "expiry": now + 900, "signature": bytes(64),
            }  # fmt: skip
            reply.assignment = sign_assignment(Assignment(**(fields | self.lies)), self.key)
        return reply

    def repository(self, token):
        assert token == self.token
        return self.simulator

    def reports(self):
        """Of all that was asked: rollout, version, measures, refusal."""
        return [
            (one.rollout, one.version, {measure.signal: measure.value for measure in one.measures}, one.refused)
            for body in self.asked
            for one in body.health
        ]


class Repository(Simulator):
    """The simulator, with releases of several tiers, deltas from the one before, and a self-test batch."""

    def offer(self, version, files=None, batch=b"", model="digits", deltas=True):
        """Files by (tier, runtime); some content where none are given."""
        files = files or {("flagship", "onnx"): content(version), ("entry", "onnx"): content(version, "entry")}
        for (tier, runtime), data in files.items():
            self.add_artefact(version, data, tier, runtime, model)
            if deltas and version > 1 and len(data) == 20_000:
                base = content(version - 1, tier)
                ends = {"base": hashlib.sha256(base).hexdigest(), "result": hashlib.sha256(data).hexdigest()}
                path = f"releases/{model}/{version}/deltas/{tier}.fcd"
                self.add(path, make_delta(base, data), kind="delta", model=model, version=version, codec="x", **ends)
        self.add(f"releases/{model}/{version}/self-test/batch.npz", batch or b"%d" % version, kind="self-test", model=model,
                 version=version)  # fmt: skip
        self.publish()

    def digest(self, model, version):
        """As `Catalogue.digest` has it."""
        found = sorted(
            (target.custom["tier"], target.custom["runtime"], bytes.fromhex(target.hashes["sha256"]))
            for target in self.releases.targets.values()
            if (target.custom["kind"], target.custom["model"], target.custom["version"]) == ("artefact", model, version)
        )
        hasher = hashlib.sha256(b"" if found else b"no such release")
        for tier, runtime, digest in found:
            for name in (tier.encode(), runtime.encode()):
                hasher.update(len(name).to_bytes(4, "big") + name)
            hasher.update(digest)
        return hasher.digest()


class World(Around):
    """A device's surroundings, with a clock of its own that a test sets."""

    def __init__(self):
        super().__init__(free_storage=1 << 40)
        self.now = NOW.timestamp()

    def clock(self):
        return self.now


class Device:
    """One that wants digits; `step` is a look of its agent, `restarted` another process in the same directory."""

    def __init__(self, directory, gateway=None, world=None, **updates):
        self.gateway, self.world = gateway or Gateway(Repository()), world or World()
        self.directory, self.elapsed = directory, [0.0]
        self.policy = Policy(device=DeviceFacts(tier="flagship"), updates=UpdatePolicy(**({"models": ("digits",)} | updates)))
        self.state = State(directory)
        self.updater = self.restarted()

    @property
    def repository(self):
        return self.gateway.simulator

    @property
    def place(self):
        return model_directory(self.directory, "digits")

    def restarted(self, disk=None):
        root = self.repository.files["metadata/1.root.json"]
        self.updater = Updater(
            self.state, self.world, self.policy, Identity(DEVICE, (OTHER.public, TIME.public), root), self.gateway.connected,
            disk=disk, elapsed=lambda: self.elapsed[0],
        )  # fmt: skip
        return self.updater

    def assign(self, version, **offered):
        """Offer a release and have it assigned."""
        self.repository.offer(version, **offered)
        self.gateway.wanted = version

    def step(self, **options):
        self.updater.step(now=True, **options)
        return self.problem

    @property
    def problem(self):
        from fedcore_device.standing import read_standings

        return read_standings(self.state).get("digits").problem if "digits" in read_standings(self.state) else ""

    def pointer(self):
        return read_pointer(self.place)

    def runs(self):
        """The version that runs now, each of its files compared with what was released."""
        with Store(self.place) as store:
            if store.pointer.current is None:
                return 0
            for name, one in store.pointer.current.files.items():
                assert store.path(one.digest).read_bytes() == content(store.pointer.current.version, name.partition("/")[0])
            return store.pointer.current.version

    def past(self, seconds):
        """Time passes, for the device and the gateway."""
        self.world.now += seconds
        self.gateway.now += seconds
        self.elapsed[0] += seconds


def well(device):
    """Pass the probation."""
    device.past(3601)
    assert not device.step()
    assert device.pointer().starts is None
