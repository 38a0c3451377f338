"""Orders and evidence: in the journal before they are done, of the revision that was looked at, one rollout a model at a time."""

import io
import json
import math
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from fedcore.coordinator import release_status
from fedcore.coordinator.fleet import FleetFolder
from fedcore.coordinator.release_status import Steward, attend
from fedcore.coordinator.releases import Registry, create_release, roll_back
from fedcore.coordinator.rollouts import Deployment, Order, RolloutControl, Shape, plan_for
from fedcore.errors import Refused, TryAgain
from fedcore.gateway.identity import spell
from fedcore.registry.catalogue import Catalogue, Entry, artefact
from fedcore.registry.files import LocalFiles
from fedcore.registry.journal import Journal, check_chain
from fedcore.registry.keys import load_signers, make_keys
from fedcore.registry.repository import create, publish
from fedcore.registry.rollout import Test, arm_of, decide, new_rollout, place_of, room
from fedcore.registry.rollout_record import decision_record
from fedcore.state.gateway import Device
from fedcore.state.releases import Holding, Membership, Visit, Worst
from fedcore.state.stores import open_gateway_store

NOW, OPS = 1_800_000_000.0, Order("ops", "because")
FINE = {"disagreement": 0.02, "errors": 0.0, "crash": 0.0, "p95_ms": 10.0, "peak_bytes": 5e6}


def offered(*versions, untested=()):
    custom = {"kind": "artefact", "model": "digits", "tier": "flagship", "runtime": "onnx", "form": "file"}
    batch = {"kind": "self-test", "model": "digits"}
    return Catalogue(tuple(
        Entry(f"{kind['kind']}{v}", bytes([v]) * 32, 5, kind | {"version": v})
        for v in versions
        for kind in (custom, *([batch] if v not in untested else []))
    ))  # fmt: skip


class World:
    def __init__(self, folder, fleet=40):
        self.now, self.path = NOW, folder
        self.store = open_gateway_store(str(folder / "state.sqlite"))
        self.control = RolloutControl(self.store, folder / "releases.jsonl", lambda: self.now)
        self.control.start("digits", 1, offered(1), Shape(), OPS)
        for device in range(fleet):
            labels = ("lab",) if device % 2 else ()
            self.store.register(Device(device, 1, bytes([device]) * 32, 2_000_000_000, NOW, labels=labels))
            held = Holding(device, "digits", 1, labels=("lab", "none"), seen=NOW)  # as if a store of before held their own words
            self.store.releases.visit(Visit(held, ("digits-1", 1)))

    def records(self):
        data = (self.path / "releases.jsonl").read_bytes()
        check_chain(data)
        return [json.loads(line) for line in data.splitlines()]

    def join(self, values):
        """Every device joins its arm now and reports what ``values`` says of its arm."""
        current = self.control.running("digits")
        known = (current.entry.name, current.entry.revision)
        for device in range(current.state.plan.fleet):
            arm = arm_of(current.state, spell(device), ("lab",) if device % 2 else ())
            held = Holding(device, "digits", 1, seen=self.now)
            if arm is None:
                continue
            member = Membership(device, arm, "other", self.now, self.now + current.state.plan.window)
            self.store.releases.visit(Visit(held, known, member, 10**6))
            said = values(arm, device)
            if said is not None:
                self.store.releases.visit(Visit(held, known, None, 0, (Worst(known[0], arm, said),)))


@pytest.fixture
def world(tmp_path):
    one = World(tmp_path)
    yield one
    one.store.close()


HALVES = Shape(stages=(0.4,), control=0.6, window=100.0, corrupt=0.0)


def bad(arm, device):
    return {**FINE, "disagreement": 0.9} if arm == "canary" else {**FINE, "p95_ms": 10 + 0.01 * device}


def test_a_first_release_is_for_everybody_at_once(world):
    state = world.control.running("digits").state
    assert (state.phase, state.plan.baseline) == ("full", 0)
    assert [(one["event"], one["by"], one["why"]) for one in world.records()] == [("start", "ops", "because")]


def test_a_bad_release_is_aborted_by_evidence_taken_back_and_followed_by_the_next(world):
    control = world.control
    control.start("digits", 2, offered(1, 2), HALVES, OPS)
    world.join(bad)
    state, decision, _ = control.decide("digits")
    assert (state.phase, decision) == ("running", "inconclusive")  # no window is over
    world.now += 101
    state, decision, tests = control.decide("digits")
    assert (state.phase, decision) == ("aborted", "abort")
    assert {test.signal for test in tests if test.harmful} == {"disagreement"}
    last = world.records()[-1]
    assert (last["event"], last["by"], last["exposed"]) == ("abort", "evidence", 16)
    assert any(row["harmful"] and row["signal"] == "disagreement" for row in last["evidence"])
    with pytest.raises(Refused, match=r"digits-2 was aborted.*release rollback digits"):
        control.start("digits", 3, offered(1, 2, 3), HALVES, OPS)
    control.order("digits", "roll back", OPS, (3, "ab" * 32))
    assert control.running("digits").state.targets[3] == "ab" * 32
    after = control.start("digits", 4, offered(1, 2, 3, 4), HALVES, OPS)
    assert (after.plan.baseline, sorted(after.targets)) == (3, [3, 4])
    assert after.secret != state.secret


def test_what_the_store_holds_decides_as_the_state_in_one_piece(world):
    control = world.control
    control.start("digits", 2, offered(1, 2), replace(HALVES, corrupt=0.05), OPS)
    world.join(lambda arm, device: None if device % 7 == 0 else {**FINE, "p95_ms": 10.0 + device})
    world.now += 101
    whole = control.running("digits").state
    assert len(whole.members) == 40
    expected = decide(whole, (), world.now)
    assert control.decide("digits") == expected
    assert expected[1] == "inconclusive"


def test_orders_carry_a_reason_and_are_refused_where_they_make_no_sense(world):
    control = world.control
    with pytest.raises(Refused, match="the rollout is full"):
        control.order("digits", "pause", OPS)
    control.start("digits", 2, offered(1, 2), HALVES, OPS)
    assert control.order("digits", "pause", OPS).phase == "paused"
    assert control.decide("digits")[1] == "hold"
    assert control.order("digits", "resume", OPS).phase == "running"
    before = len(world.records())
    with pytest.raises(Refused, match="with who gave it and why"):
        control.order("digits", "promote", Order("ops", " "))
    assert len(world.records()) == before
    assert control.running("digits").state.phase == "running"
    assert control.order("digits", "promote", OPS).phase == "full"
    for wrong, version, said in ((offered(1), 3, "no release 3"), (offered(1, 2), 2, "not above 2")):
        with pytest.raises(Refused, match=said):
            control.start("digits", version, wrong, HALVES, OPS)
    with pytest.raises(Refused, match="no rollout"):
        control.order("letters", "pause", OPS)


def test_two_deciders_never_both_decide(world):
    control = world.control
    control.start("digits", 2, offered(1, 2), HALVES, OPS)
    elsewhere = RolloutControl(world.store, world.path / "other.jsonl", lambda: world.now)  # of another machine: no common lock
    whole, asked = control.running("digits"), []

    def running(model):
        if not asked:
            asked.append(model)
            elsewhere.order("digits", "pause", OPS)
        return whole

    control.running = running
    with pytest.raises(TryAgain, match="somebody else decided"):
        control.order("digits", "abort", OPS)
    del control.running
    assert control.running("digits").state.phase == "paused"
    assert [one["event"] for one in world.records()][-2:] == ["abort", "void"]


def test_a_journal_that_somebody_changed_stops_everything(world):
    path = world.path / "releases.jsonl"
    path.write_text(path.read_text().replace("because", "for fun"))
    with pytest.raises(Refused, match="line 1 was changed"):
        world.control.order("digits", "abort", OPS)
    assert world.control.running("digits").state.phase == "full"


def test_a_canary_of_a_small_fleet_is_as_large_as_it_was_planned(world):
    state = world.control.start("digits", 2, offered(1, 2), HALVES, OPS)
    arms = [arm_of(state, spell(device)) for device in range(40)]
    assert (arms.count("canary"), arms.count("control")) == (16, 24)


def test_a_group_goes_first_half_of_it_as_control(world):
    state = world.control.start("digits", 2, offered(1, 2), replace(HALVES, group="lab", stages=(0.05, 0.6), control=0.4), OPS)
    assert state.plan.stages == (0.25, 0.6)
    arms = {device: arm_of(state, spell(device), ("lab",) if device % 2 else ()) for device in range(40)}
    assert all(arm is None for device, arm in arms.items() if device % 2 == 0)
    assert sorted(arms.values(), key=str).count("canary") == sorted(arms.values(), key=str).count("control") == 10
    world.control.order("digits", "abort", OPS)
    world.control.order("digits", "roll back", OPS, (3, "ab" * 32))
    with pytest.raises(Refused, match="0 devices with the label 'none'"):
        world.control.start("digits", 4, offered(1, 2, 3, 4), replace(HALVES, group="none"), OPS)


def test_two_releases_side_by_side_leave_the_rest_alone_and_wait_for_a_person(world):
    shape = replace(HALVES, stages=(0.3,), control=0.3)
    state = world.control.start("digits", 3, offered(1, 2, 3), shape, OPS, against=2)
    assert (state.plan.version, state.plan.baseline, state.plan.rest, sorted(state.targets)) == (3, 2, 1, [1, 2, 3])
    for against in (1, 3, 9):
        with pytest.raises(Refused, match="A/B: "):
            plan_for("digits", 3, replace(state, phase="full", plan=replace(state.plan, version=1, baseline=0, rest=None)), shape,
                     40, 0, against)  # fmt: skip
    world.join(lambda arm, device: FINE)
    world.now += 101
    assert world.control.decide("digits")[1] == "inconclusive"


def repository(folder, *versions):
    keys, now = make_keys(folder / "offline", folder / "online", 1, 1, publishes=True), datetime.now(UTC)
    registry = Registry(LocalFiles(folder / "repository"), load_signers([folder / "offline", folder / "online"]))
    create(registry.files, keys, registry.signers, now)
    for version in versions:
        publish(registry.files, [artefact("digits", version, "flagship", "onnx", "m", bytes([version]))], registry.signers, now)
    return registry


def test_what_was_compared_side_by_side_and_stopped_goes_to_nobody(world):
    registry = repository(world.path, 1, 2, 3)
    world.control.start("digits", 3, registry.catalogue(), replace(HALVES, stages=(0.3,), control=0.3), OPS, against=2)
    with pytest.raises(Refused, match="release 3 of digits is not before 3"):
        roll_back(world.control, registry, "digits", OPS, 3)
    assert world.control.running("digits").state.phase == "running"
    world.control.order("digits", "abort", OPS)
    assert attend(world.control, "digits", registry) == "digits-3: release 4 has the content of 1"
    catalogue = registry.catalogue()
    assert catalogue.digest("digits", 4) == catalogue.digest("digits", 1) != catalogue.digest("digits", 2)


def test_one_model_that_cannot_be_taken_back_keeps_nothing_else_waiting(world, monkeypatch):
    done, told = [], []

    def attended(control, model, registry):
        if model == "a":
            raise Refused("a key is missing")
        done.append(model)
        return ""

    monkeypatch.setattr(release_status, "attend", attended)
    monkeypatch.setattr(release_status, "renew", lambda *_: done.append("timestamp"))
    steward = Steward(Deployment("", world.path / "x", ""), repository(world.path), told=told.append)
    steward._problem, steward._renewed = "", 0.0
    world.control.models = lambda: ["a", "b"]
    with pytest.raises(Refused, match="a key is missing"):
        steward._look(world.control)
    assert done == ["b", "timestamp"]


@pytest.mark.parametrize("fleet", [49, 98, 100])
def test_a_group_of_two_is_a_canary_of_one_in_any_fleet(fleet):
    before = plan_for("digits", 1, None, Shape(), fleet, 0)
    full = replace(new_rollout(before, bytes(32)), phase="full")
    assert room(replace(full, plan=plan_for("digits", 2, full, replace(HALVES, group="lab"), fleet, 2)), "canary") == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {}, {"x": np.zeros((3, 1, 8, 8)), "y": np.zeros(2, int)}, {"x": np.full((1, 4), np.nan), "y": np.zeros(1, int)},
        {"x": np.zeros((3, 4)), "y": np.zeros(3)}, {"x": np.zeros((0, 4)), "y": np.zeros(0, int)}, {"x": np.zeros((3, 4))},
    ],
)  # fmt: skip
def test_a_self_test_batch_that_devices_cannot_use_is_not_published(tmp_path, wrong):
    registry, batch = repository(tmp_path), io.BytesIO()
    np.savez(batch, **wrong)
    for data in (batch.getvalue(), b"hello", b""):
        with pytest.raises(Refused, match="self-test batch"):
            create_release(tmp_path, "digits", data, registry)


def test_a_budget_shows_on_a_few_devices_what_medians_cannot(world):
    slow = replace(HALVES, budgets={"p95_ms": 50.0})
    world.control.start("digits", 2, offered(1, 2), slow, OPS)
    left = {"canary": 8, "control": 8}

    def slow_canary(arm, device):
        left[arm] -= 1
        return {**FINE, "p95_ms": 200.0 if arm == "canary" else 10.0} if left[arm] >= 0 else None

    world.join(slow_canary)
    world.now += 101
    _, decision, tests = world.control.decide("digits")
    assert decision == "abort"
    assert {test.signal for test in tests if test.harmful} == {"p95_ms above 50 or untold on more than 0.25"}
    with pytest.raises(Refused, match="no amount 'errors'"):
        plan_for("digits", 9, None, replace(HALVES, budgets={"errors": 1.0}), 40, 0)


def test_agreement_is_compared_only_where_both_releases_have_a_self_test_batch(world):
    """A device of a release without a batch cannot report agreement, and must not be taken for one that hides it."""
    state = world.control.start("digits", 2, offered(1, 2, untested=(2,)), HALVES, OPS)
    bare = {name: value for name, value in FINE.items() if name != "disagreement"}
    world.join(lambda arm, device: (bare if arm == "canary" else FINE) | {"p95_ms": 10 + 0.01 * device})
    world.now += 101
    state, decision, tests = world.control.decide("digits")
    assert (state.phase, decision, [test for test in tests if test.harmful]) == ("running", "inconclusive", [])
    assert {test.signal for test in tests} == {"errors", "crash", "p95_ms", "peak_bytes", "joules", "celsius", "silence"}


@pytest.mark.parametrize("untested", [(), (1,), (2,), (1, 2)])
def test_which_signals_two_releases_share(world, untested):
    plan = world.control.start("digits", 2, offered(1, 2, untested=untested), HALVES, OPS).plan
    assert ("disagreement" in {one.name for one in plan.signals}) == (not untested)


def test_promote_goes_one_stage_on_and_is_recorded_with_the_evidence(world):
    world.control.start("digits", 2, offered(1, 2), replace(HALVES, stages=(0.2, 0.3, 0.4)), OPS)
    world.join(bad)
    world.now += 101
    for stage in (1, 2):
        state = world.control.order("digits", "promote", OPS)
        assert (state.phase, state.stage) == ("running", stage)
        last = world.records()[-1]
        assert (last["event"], last["by"], last["why"], last["stage"]) == ("promote", "ops", "because", stage)
        assert {row["signal"] for row in last["evidence"] if row["harmful"]} == {"disagreement"}, "what was overridden is told"
    assert world.control.order("digits", "promote", OPS).phase == "full"
    with pytest.raises(Refused, match="the rollout is full: promote is possible when it is running or paused"):
        world.control.order("digits", "promote", OPS)


def test_evidence_that_is_beyond_all_bounds_is_recorded(world):
    """Infinity is no JSON: a journal that cannot write it would keep the rollout from its abort."""
    test = Test("all", "crash", 9, 9, (0, 0), math.inf, 3.0, -math.inf, 3.0)
    state = world.control.running("digits").state
    record = decision_record(state, "abort", [test], NOW)
    Journal(world.path / "other.jsonl").append(record)
    written = json.loads((world.path / "other.jsonl").read_text())["evidence"][0]
    assert (written["harm"], written["fine"], written["harmful"]) == (None, None, True)


def test_only_the_last_rollouts_are_kept_and_all_audit_records(world):
    shape = replace(HALVES, kept=3)
    for version in range(2, 9):
        world.control.start("digits", version, offered(*range(1, 9)), shape, OPS)
        world.join(lambda arm, device: FINE)
        world.control.order("digits", "promote", OPS)
        assert world.control.running("digits").state.phase == "full"
    assert [one.entry.name for one in world.control.all_of("digits")] == ["digits-6", "digits-7", "digits-8"]
    assert world.store.releases.members("digits-5") == []
    assert len(world.store.releases.members("digits-6")) == 40
    started = [one["rollout"] for one in world.records() if one["event"] == "start"]
    assert started == [f"digits-{version}" for version in range(1, 9)]
    with pytest.raises(Refused, match="at least 1, got 0"):
        world.control.start("digits", 9, offered(8, 9), replace(HALVES, kept=0), OPS)


def test_what_a_rollout_needs_is_never_withdrawn(world):
    registry = repository(world.path, 1, 2, 3)
    world.control.start("digits", 3, registry.catalogue(), HALVES, OPS)
    assert world.control.needed() == {"digits": {1, 3}}
    export = exported(world.path)
    for version in (4, 5, 6):
        made = create_release(export, "digits", None, registry, keep=1, needed=world.control.needed())
        assert made.version == version
        assert registry.catalogue().releases() == {("digits", one) for one in (1, 3, version)}
    world.control.order("digits", "abort", OPS)
    with pytest.raises(Refused, match="no fleet says which of them its rollouts need"):
        create_release(export, "digits", None, registry, keep=1)
    assert roll_back(world.control, registry, "digits", OPS) == 7
    assert world.control.needed() == {"digits": {1, 3, 7}}
    create_release(export, "digits", None, registry, keep=1, needed=world.control.needed())
    assert {version for _, version in registry.catalogue().releases()} == {1, 3, 7, 8}


def test_side_by_side_what_the_rest_has_is_needed_too(world):
    world.control.start("digits", 3, offered(1, 2, 3), replace(HALVES, stages=(0.3,), control=0.3), OPS, against=2)
    assert world.control.needed() == {"digits": {1, 2, 3}}


def exported(folder):
    """What an export leaves, as far as a release looks at it."""
    (folder / "export" / "flagship" / "onnx").mkdir(parents=True)
    (folder / "export" / "flagship" / "onnx" / "model.onnx").write_bytes(b"weights")
    row = {"tier": "flagship", "target": "onnx", "status": "exported", "gate": "pass"}
    (folder / "export" / "export.json").write_text(json.dumps({"rows": [row]}))
    return folder / "export"


@pytest.mark.parametrize("length", [40, 41])
def test_a_models_name_is_bounded_by_one_rule_before_anything_is_published(world, length):
    name, registry = "m" * length, repository(world.path)
    if length == 40:
        made = create_release(exported(world.path), name, None, registry)
        state = world.control.start(name, made.version, registry.catalogue(), Shape(), OPS)
        assert state.plan.name == f"{name}-1"
        return
    calls = (
        lambda: create_release(exported(world.path), name, None, registry),
        lambda: world.control.start(name, 1, registry.catalogue(), Shape(), OPS),
        lambda: artefact(name, 1, "flagship", "onnx", "m", b"x"),
    )
    for call in calls:
        with pytest.raises(Refused, match="names no model: 1 to 40 letters"):
            call()
    assert registry.catalogue().releases() == set()


def test_reasons_of_devices_that_refused_are_counted_and_stay(world):
    def told(device, note, version=1):
        world.store.releases.visit(Visit(Holding(device, "digits", version, seen=world.now, note=note), ("digits-1", 1)))

    for device in range(8):
        told(device, f"release 2: self-test: agreement 0.1{device} is below 0.8")
    told(8, "release 2: self-test: the process that loaded it was ended by SIGSEGV")
    for device in range(9):
        told(device, "")  # the next visit has nothing new to say
    told(7, "", version=3)  # and this one runs another release meanwhile
    found = release_status.standing(world.control, "digits", NOW)["refused"]
    assert found == {
        "1 runs, release 2: self-test: agreement 0.10 is below 0.8": 7,
        "1 runs, release 2: self-test: the process that loaded it was ended by SIGSEGV": 1,
    }
    for device in range(20, 28):
        told(device, f"release 2: reason {'abcdefgh'[device - 20]}")
    found = release_status.standing(world.control, "digits", NOW)["refused"]
    assert (len(found), found["other reasons"], sum(found.values())) == (6, 5, 16)


def test_a_damaged_gateway_json_is_no_fleet_with_other_places(tmp_path):
    (tmp_path / "fleet").mkdir()
    for damage in ("", "{", "[]", "7"):
        (tmp_path / "gateway.json").write_text(damage)
        with pytest.raises(Refused, match=r"gateway\.json is damaged"):
            Deployment.of(tmp_path)
        with pytest.raises(Refused, match=r"gateway\.json is damaged"):
            open_gateway_store(FleetFolder(tmp_path).store)


def test_places_are_secret_and_new_for_every_rollout(world):
    first = world.control.start("digits", 2, offered(1, 2), HALVES, OPS)
    assert "secret" not in repr(first)
    assert place_of(first.secret, spell(1)) != place_of(bytes(32), spell(1))


def test_a_fleets_folder_says_where_everything_is(tmp_path):
    with pytest.raises(Refused, match="no fleet's folder"):
        Deployment.of(tmp_path)
    (tmp_path / "fleet").mkdir()
    assert Deployment.of(tmp_path) == Deployment(str(tmp_path / "store.sqlite"), tmp_path / "releases.jsonl", "")
    (tmp_path / "gateway.json").write_text(json.dumps({"store": "redis://x", "repository": "s3://releases"}))
    assert Deployment.of(tmp_path) == Deployment("redis://x", tmp_path / "releases.jsonl", "s3://releases")
    assert Deployment.of(tmp_path, "other").repository == "other"
