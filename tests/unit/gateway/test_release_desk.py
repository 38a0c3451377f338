"""Which release a gateway tells a device to have: signed, in order, of the newest state, and what the pure function says."""

import asyncio
import hashlib
import itertools
import json
import time
from dataclasses import replace

import pytest

from fedcore.errors import Refused
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.commits import Committer
from fedcore.gateway.identity import spell
from fedcore.gateway.refusals import GatewayRefusal
from fedcore.gateway.releases import Desk, as_arm, holding_of, votes_of
from fedcore.gateway.repository import check_name, read_out
from fedcore.registry.assignment import LONGEST, check_assignment
from fedcore.registry.files import LocalFiles, RemoteFiles
from fedcore.registry.rollout import Plan, assign, command, new_rollout
from fedcore.registry.rollout_record import encode_rollout
from fedcore.secagg.crypto import Ed25519Key
from fedcore.state.gateway import Device
from fedcore.state.releases import Membership, RolloutEntry
from fedcore.state.stores import open_gateway_store

KEY, NOW = Ed25519Key(b"t" * 32), 1_800_000_000.0
PLAN = Plan("digits-2", "digits", 2, 1, 40, stages=(0.25, 0.5), control=0.25, window=100.0, hardware=("Pi 5",))
TARGETS = {version: bytes([version]).hex() * 32 for version in (1, 2, 3)}


def device(number, labels=()):
    return Device(number, 1, number.to_bytes(32, "big"), 2_000_000_000, NOW, labels=labels)


class World:
    """Two gateways over one store, and who decides."""

    def __init__(self, path, every=1800.0):
        self.now = NOW
        self.decider = open_gateway_store(str(path))
        self.committers = [Committer(lambda: open_gateway_store(str(path))) for _ in range(2)]
        self.desks = [Desk(one, KEY, every, lambda: self.now) for one in self.committers]
        self.highest = {}

    def publish(self, state, revision, number=1):
        document = encode_rollout(state).decode()
        entry = RolloutEntry(state.plan.name, "digits", number, revision, document)
        assert self.decider.releases.advance_rollout(entry)

    def ask(self, number, desk=0, version=1, given=(), **body):
        """``given``: the labels of its enrolment; those in ``body`` are its own words."""
        request = pb.ReleaseBody(model="digits", version=version, **body)
        data, reason = asyncio.run(self.desks[desk].answer(device(number, given), request))
        if not data:
            return reason
        owner = hashlib.sha256(device(number).public_key).digest()
        found = check_assignment(data, [KEY.public], owner, self.highest.get(number, 0), self.now)
        self.highest[number] = found.sequence
        assert found.target == bytes.fromhex(TARGETS[found.version])
        return found

    def close(self):
        for one in self.committers:
            one.close()
        self.decider.close()


@pytest.fixture
def world(tmp_path):
    one = World(tmp_path / "state.sqlite")
    yield one
    one.close()


def running(**changes):
    state = replace(new_rollout(replace(PLAN, **changes), bytes(range(32))), targets=TARGETS)
    return command(state, "start")


def test_gateways_give_what_the_pure_function_gives_and_members_are_rows(world):
    state = running()
    world.publish(state, 1)
    for number, desk in zip(range(60), itertools.cycle([0, 1]), strict=False):
        hardware = "Pi 5" if number % 3 else "Pi 4"
        state, version = assign(state, spell(number), hardware, NOW)
        assert world.ask(number, desk, hardware=hardware).version == version
    rows = world.decider.releases.members("digits-2")
    held = {spell(row.device): (as_arm(row), row.hardware, row.joined) for row in rows}
    assert held == {name: (one.arm, one.hardware, one.joined) for name, one in state.members.items()}
    assert {row.closes for row in rows} == {NOW + 100}
    assert sum(row.arm == "canary" for row in rows) == 10


def test_after_an_abort_no_gateway_assigns_the_release_whatever_it_knew(world):
    state = running()
    world.publish(state, 1)
    canary = [number for number in range(60) if world.ask(number, desk=number % 2).version == 2]
    assert len(canary) == 10
    world.publish(command(state, "abort"), 2)
    for number in range(60):
        for desk in (0, 1):
            assert world.ask(number, desk).version == 1
    assert "taken back" in world.ask(canary[0], version=2)
    world.publish(command(command(state, "abort"), "roll back", fallback=3), 3)
    assert {world.ask(number, version=2 if number in canary else 1).version for number in range(60)} == {3}


def test_an_assignment_is_good_for_two_calls_and_never_for_longer_than_an_hour(tmp_path):
    for number, (every, life) in enumerate(((1.0, 300), (600.0, 1200), (86400.0, LONGEST))):
        world = World(tmp_path / f"{number}.sqlite", every)
        world.publish(running(), 1)
        found = world.ask(1)
        world.close()
        assert (found.issued, found.expiry) == (NOW, NOW + life)


def test_nothing_is_assigned_or_kept_where_there_is_nothing(world):
    assert world.ask(1) == "there is no release of this model yet"
    assert world.decider.releases.holdings("digits") == []
    first = command(
        replace(new_rollout(replace(PLAN, name="digits-1", version=1, baseline=0), bytes(32)), targets=TARGETS), "start"
    )
    world.publish(first, 1)
    until = time.monotonic() + 60
    while isinstance(found := world.ask(1, version=0), str):  # it looks for models of which it knows nothing once a second
        assert time.monotonic() < until
        time.sleep(0.05)
    assert found.version == 1


def test_what_devices_report_reaches_their_row_once_it_is_of_their_arm(world):
    state = running()
    world.publish(state, 1)
    canary = next(number for number, found in [(number, world.ask(number)) for number in range(60)] if found.version == 2)
    control = next(row.device for row in world.decider.releases.members("digits-2") if row.arm == "control")

    def measured(version, refused="", **values):
        parts = [pb.Measure(signal=name, value=value) for name, value in values.items()]
        return [pb.Health(rollout="digits-2", version=version, measures=parts, refused=refused)]

    world.ask(canary, health=measured(1, crash=1.0))
    world.ask(canary, health=[pb.Health(rollout="digits-77", version=2)])
    world.ask(control, health=measured(1, p95_ms=4.5, silence=0.0, joules=float("nan"), invented=1.0, errors=-1.0))
    world.ask(canary, health=measured(2, "self-test: 1 of 64 labels\nand more", disagreement=0.9))
    values = {row.device: row.values for row in world.decider.releases.members("digits-2")}
    assert values[control] == {"p95_ms": 4.5}
    assert values[canary] == {"crash": 1.0, "disagreement": 0.9}
    notes = {one.device: one.note for one in world.decider.releases.holdings("digits")}
    assert notes[canary] == "release 2: self-test: 1 of 64 labels and more"


def test_who_claims_a_label_is_not_in_the_group_that_comes_first(world):
    """Liars who could say themselves into a canary of two would be half of its votes."""
    world.publish(running(group="lab"), 1)
    liars = [world.ask(number, labels=["lab"]).version for number in range(30)]
    assert set(liars) == {1}
    assert world.decider.releases.members("digits-2") == []
    honest = [world.ask(100 + number, given=("lab", "beta")).version for number in range(30)]
    members = world.decider.releases.members("digits-2")
    assert members
    assert all(row.device >= 100 for row in members)
    assert {row.arm for row in members} == {"canary", "control"}
    assert honest.count(2) == sum(row.arm == "canary" for row in members) > 0
    kept = {one.device: one.labels for one in world.decider.releases.holdings("digits")}
    assert {labels for number, labels in kept.items() if number < 30} == {()}
    assert {labels for number, labels in kept.items() if number >= 100} == {("lab", "beta")}


def test_a_report_is_of_the_arm_whose_release_it_names():
    state = running()
    health = [pb.Health(rollout="digits-2", version=version) for version in (1, 2, 3)]
    assert [one.arm for one in votes_of(health, {"digits-2": state})] == ["control", "canary"]
    assert votes_of(health, {}) == ()


@pytest.mark.parametrize(
    "body",
    [
        {"model": ""}, {"model": "d" * 65}, {"model": "d", "tier": "t" * 65}, {"model": "d", "labels": ["x"] * 33},
        {"model": "d", "version": 1 << 53}, {"model": "d", "health": [pb.Health()] * 17},
        {"model": "d", "health": [pb.Health(measures=[pb.Measure()] * 33)]}, {"model": "d", "labels": ["y" * 65]},
    ],
)  # fmt: skip
def test_what_a_device_says_is_bounded(body):
    with pytest.raises(GatewayRefusal, match="at most"):
        holding_of(device(7), pb.ReleaseBody(**body), NOW)


def test_an_arm_of_another_kind_is_refused():
    with pytest.raises(Refused, match="no arm 'x'"):
        as_arm(Membership(1, "x", "", 0.0, 0.0))


# Files of the repository


async def collected(*arguments):
    return [reply async for reply in read_out(*arguments)]


@pytest.mark.parametrize("kind", [LocalFiles, lambda path: RemoteFiles(f"file://{path}")])
def test_a_file_is_read_out_in_pieces_from_anywhere(tmp_path, kind):
    data = bytes(range(256)) * 3000
    (tmp_path / "targets" / "releases").mkdir(parents=True)
    (tmp_path / "targets" / "releases" / "a.bin").write_bytes(data)
    files, name = kind(tmp_path), "targets/releases/a.bin"
    for offset, length in ((0, 0), (5, 0), (7, 100), (len(data), 0), (1, 300_000), (len(data) - 1, 50)):
        total, *rest = asyncio.run(collected(files, name, offset, length))
        assert total.total == len(data)
        assert all(0 < len(one.data) <= 1 << 18 for one in rest)
        end = offset + length if length else len(data)
        assert b"".join(one.data for one in rest) == data[offset:end]
    for wrong, offset in ((name, len(data) + 1), ("targets/releases/b.bin", 0), ("targets/releases", 0)):
        with pytest.raises(GatewayRefusal) as refusal:
            asyncio.run(collected(files, wrong, offset, 0))
        assert refusal.value.reason == pb.NO_SUCH_BLOB


@pytest.mark.parametrize(
    "name",
    ["", "metadata", "/etc/passwd", "metadata/../../x", "metadata/./x", "targets/.lock", "targets/.new/x", ".lock", "keys/a.key",
     "metadata//x", "metadata/x\n", "metadata/ü", "targets/" + "a" * 300, "targets" + "/a" * 9, "metadata\\x"],
)  # fmt: skip
def test_no_name_leads_out_of_the_repository(name):
    with pytest.raises(GatewayRefusal, match="no file of such a name"):
        check_name(name)
    check_name("metadata/timestamp.json")
    check_name("targets/releases/digits/12/flagship/ab01.onnx-model.onnx")


def test_documents_are_json_that_a_store_keeps():
    assert json.loads(encode_rollout(running()))["targets"] == {str(version): digest for version, digest in TARGETS.items()}
