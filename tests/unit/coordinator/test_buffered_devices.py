"""Asynchronous rounds over devices, against the store that gateways share; what gateways do to it is done here by hand."""

import hashlib
import json

import numpy as np
import pytest

from fedcore.config import load_config
from fedcore.coordinator.asynchronous import Given
from fedcore.coordinator.buffered_devices import BufferedDevices
from fedcore.errors import Refused, RoundFailed
from fedcore.flower import assume_identity
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.blobs import Blobs
from fedcore.gateway.fleet import Selection, Told
from fedcore.gateway.rounds import PRESENT, REPORT, RoundDocument
from fedcore.gateway.sums import RunningSum, read_upload
from fedcore.gateway.versions import VersionConductor
from fedcore.grids.device import Offering
from fedcore.models import ParameterLayout
from fedcore.quantization.wire import Update, encode_update
from fedcore.secagg.crypto import Ed25519Key
from fedcore.state.gateway import Contribution, Device, Note, RoundState
from fedcore.state.gateway_sqlite import SqliteGatewayStore
from fedcore.training.client import RoundTask
from fedcore.training.plan import LocalPlan

SIZE = 6
SCENARIO = """
[data]
clients = 8
[quantization]
enabled = false
[asynchronous]
buffer = 2
concurrency = 3
max_staleness = 1
"""


class Killed(BaseException):
    """The coordinator is killed."""


class World:
    """Store, clock and devices. ``script`` says what happens each time the coordinator looks away."""

    def __init__(self, folder):
        self.folder, self.now, self.script, self.sent = folder, 1_000_000.0, [], {}
        (folder / "scenario.toml").write_text(SCENARIO)
        self.config = load_config(folder / "scenario.toml")
        self.store = SqliteGatewayStore(folder / "store.sqlite")
        self.blobs, self.key = Blobs(folder / "blobs"), Ed25519Key(bytes(range(32)))
        for device in range(1, 9):
            self.store.register(Device(device, 1, bytes([device]) * 32, 2**40, 0.0))

    def sleep(self, seconds):
        self.now += seconds
        if not self.script:
            raise Killed
        self.script.pop(0)()

    def coordinator(self):
        """A new one, as after a start."""
        conductor = VersionConductor(
            SqliteGatewayStore(self.folder / "store.sqlite"), "test", self.key, pause=0.5, clock=lambda: self.now, sleep=self.sleep
        )  # fmt: skip
        layout = ParameterLayout(("w",), ((SIZE,),), ("float32",))
        one = BufferedDevices(
            conductor, self.blobs, layout, "run-1", Selection(2, 2, 60.0, 30.0, 1.0), Offering({}),
            self.config, 3,
        )  # fmt: skip
        one.numbers = lambda names: [int(name, 16) for name in names]
        return one

    def rounds(self):
        found = [self.store.round(key) for key in self.store.rounds()]
        return [one for one in found if one is not None]

    def round(self, version):
        (found,) = [one for one in self.rounds() if one.task == "run-1" and one.number == version + 1]
        return found

    def waits(self, *devices):
        (room,) = [one for one in self.rounds() if one.task == "run-1/waiting" and one.state is RoundState.FORMING]
        text = json.dumps({"told": Told().encode(), "round_key": ""})
        self.store.note(room.key, PRESENT, [Note(device, text, self.now) for device in devices])

    def working(self, version):
        return set(RoundDocument.decode(self.round(version).document).cohort)

    def uploads(self, device, version):
        """As a gateway does: keep it, count it; whether it was counted."""
        one = self.round(version)
        terms = RoundDocument.decode(one.document).uploads
        values = np.full(SIZE, device + 10.0 * version, np.float32)
        data = encode_update(Update(values, device, 0.5), "float32", np.random.default_rng(0))
        assert read_upload(data, terms).examples == device
        digest = self.blobs.put(data)
        assert digest == hashlib.sha256(data).digest()
        counted = self.store.accept(one.key, "gateway", RunningSum().encode(), [Contribution(device, digest)]).counted
        if counted:
            self.sent[version, device] = values
        return counted


def given(version):
    task = RoundTask(version + 1, LocalPlan(1, 10, 0.1), 1e6)
    from flwr.app import ConfigRecord

    return Given(version, b"model %d" % version, np.zeros(SIZE, np.float32), ConfigRecord(task.to_table()))


@pytest.fixture
def world(tmp_path):
    assume_identity()
    return World(tmp_path)


def collect(world, coordinator, version, pending, *script):
    world.script = list(script)
    return coordinator.collect(given(version), pending, lambda _: pytest.fail("nothing is charged"))


def begin(world):
    """The first step, of devices 1 and 2, while 3 goes on."""
    script = (lambda: world.waits(1, 2, 3), lambda: None, lambda: [world.uploads(device, 0) for device in (1, 2)])
    return collect(world, world.coordinator(), 0, None, *script)


def expected(world, step):
    """The mean of a step made of these (version, device)."""
    version = max(v for v, _ in step)
    total = sum(device * world.sent[v, device] / np.sqrt(1 + version - v) for v, device in step)
    return total / sum(device for _, device in step)


def test_devices_get_versions_as_they_come_and_every_upload_counts_once_with_its_age(world):
    one = world.coordinator()
    first = collect(
        world, one, 0, None,
        lambda: world.waits(1, 2, 3, 4, 5),
        lambda: None,
        lambda: [world.uploads(1, 0), world.waits(1)],  # it has had this version, and waits for the next one
        lambda: None,
        lambda: world.uploads(2, 0),
    )  # fmt: skip
    assert world.working(0) == {1, 2, 3, 4}, "three at once, and a fourth once one was done"
    np.testing.assert_allclose(first.buffer.mean, expected(world, [(0, 1), (0, 2)]))
    assert (first.buffer.ages, first.facts.clients) == ((0, 0), (1, 2))
    second = collect(
        world, one, 1, first.pending,
        lambda: world.waits(1),
        lambda: [world.uploads(1, 1), world.uploads(3, 0)],
    )  # fmt: skip
    np.testing.assert_allclose(second.buffer.mean, expected(world, [(1, 1), (0, 3)]))
    assert sorted(second.buffer.ages) == [0, 1]
    assert second.discarded == 1, "device 4 began two versions ago"
    assert world.round(0).state is RoundState.CLOSED
    assert not world.uploads(4, 0), "late"
    assert "more than 1 steps old" in RoundDocument.decode(world.round(0).document).reason
    assert second.pending.facts == {"taken": {"1": [1]}}
    third = collect(world, one, 2, second.pending, lambda: world.waits(6, 7), lambda: [world.uploads(d, 2) for d in (6, 7)])
    np.testing.assert_allclose(third.buffer.mean, expected(world, [(2, 6), (2, 7)]))
    for version, device in ((0, 1), (0, 2), (0, 3)):
        (found,) = [c for c in world.store.contributions(world.round(version).key) if c.device == device]
        with pytest.raises(Refused):
            world.blobs.get(found.digest)


def test_what_is_acknowledged_while_a_version_is_closed_counts_in_that_step(world):
    one = world.coordinator()
    first = collect(
        world, one, 0, None, lambda: world.waits(1, 2, 3), lambda: None, lambda: [world.uploads(d, 0) for d in (1, 2)]
    )  # fmt: skip
    finish = one._versions.finish

    def late(forming, reason):
        assert world.uploads(3, 0), "between the last look and the end"
        return finish(forming, reason)

    one._versions.finish = late
    second = collect(world, one, 1, first.pending, lambda: world.waits(4, 5), lambda: [world.uploads(d, 1) for d in (4, 5)])
    np.testing.assert_allclose(second.buffer.mean, expected(world, [(1, 4), (1, 5), (0, 3)]))
    assert (second.discarded, len(second.buffer.ages)) == (0, 3)


@pytest.mark.parametrize("moment", range(4))
def test_a_coordinator_that_is_killed_finds_everything_again_and_counts_it_once(world, moment):
    first = begin(world)
    steps = [lambda: world.waits(4, 5), lambda: world.uploads(4, 1), lambda: None][:moment]
    torn = world.coordinator()
    with pytest.raises(Killed):
        collect(world, torn, 1, first.pending, *steps)
    assert world.uploads(3, 0), "gateways go on without a coordinator"
    assert [one.task for one in world.rounds()].count("run-1/waiting") == 2, "nobody has closed what it left"
    again = world.coordinator()
    todo = [lambda: world.waits(4, 5), lambda: [world.uploads(d, 1) for d in (4, 5) if (1, d) not in world.sent]]
    second = collect(world, again, 1, first.pending, *todo)
    states = [one.state for one in world.rounds() if one.task == "run-1/waiting"]
    assert states.count(RoundState.FORMING) == 1, "what was left open is closed"
    counted = {(0, 3), *((1, d) for d in second.pending.facts["taken"]["1"])}
    assert len(second.buffer.ages) == len(counted) >= 2
    np.testing.assert_allclose(second.buffer.mean, expected(world, sorted(counted)))
    rest = collect(world, world.coordinator(), 2, second.pending, *[
        lambda: world.waits(6, 7, 8), lambda: [world.uploads(d, 2) for d in (6, 7)],
    ])  # fmt: skip
    assert len(rest.buffer.ages) + len(counted) == len(world.sent) - 2, "the first step had two"


def test_a_kill_after_a_version_was_closed_and_before_the_commit_loses_nothing(world):
    first = begin(world)
    script = (lambda: world.waits(4, 5), lambda: [world.uploads(4, 1), world.uploads(3, 0)])
    lost = collect(world, world.coordinator(), 1, first.pending, *script)
    assert world.round(0).state is RoundState.CLOSED
    again = collect(world, world.coordinator(), 1, first.pending)  # nothing needs to come any more
    np.testing.assert_array_equal(again.buffer.total, lost.buffer.total)
    assert again.pending.facts == lost.pending.facts


def test_who_fails_or_is_silent_makes_room_and_plans_do_not_expire_in_anybodys_hand(world):
    one = world.coordinator()

    def fails():
        note = Note(1, json.dumps({"outcome": pb.FAILED, "text": "no"}), world.now)
        world.store.note(world.round(0).key, REPORT, [note])
        world.waits(4)

    def silence():
        world.now += 61
        world.waits(5)

    found = collect(
        world, one, 0, None, lambda: world.waits(1, 2, 3), lambda: None, fails, lambda: None, silence, lambda: None,
        lambda: [world.uploads(5, 0), world.uploads(2, 0)],
    )  # fmt: skip
    assert world.working(0) == {1, 5}, "the silent ones may be given another version; who failed is told nothing"
    assert found.facts.clients == (2, 5), "what comes in spite of that counts"
    document = RoundDocument.decode(world.round(0).document)
    plan = pb.Plan.FromString(pb.SignedPlan.FromString(document.plans[document.cohort[5].plan]).plan)
    assert plan.expires_ms >= 1000 * (world.now + 55)
    assert (plan.aggregation, plan.minimum_uploads, plan.server_round) == (pb.EACH, 2, 1)


def test_when_nobody_comes_the_run_ends_with_a_reason(world):
    with pytest.raises(RoundFailed, match=r"0 of 2 updates came, and nobody takes work any more$"):
        collect(world, world.coordinator(), 0, None, *[lambda: None] * 400)


def test_when_everybody_refuses_the_reason_is_a_devices(world):
    def refuses():
        note = Note(1, json.dumps({"outcome": pb.REFUSED_PLAN, "text": "the plan is content with 2 devices"}), world.now)
        world.store.note(world.round(0).key, REPORT, [note])

    with pytest.raises(RoundFailed, match="a device said: refused_plan: the plan is content with 2 devices"):
        collect(world, world.coordinator(), 0, None, lambda: world.waits(1), lambda: None, refuses, *[lambda: None] * 400)
