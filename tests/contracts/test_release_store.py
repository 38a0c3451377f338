"""What every store of releases promises: one current rollout a model, arms that never overfill, votes that only get worse, and
sequences that only rise. The same tests run against SQLite and against a real Redis."""

import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from fedcore.state.gateway import Device, Standing
from fedcore.state.releases import Holding, Membership, RolloutEntry, Visit, Worst
from fedcore.state.stores import open_gateway_store

NOW = 1_800_000_000.123456
ONE = RolloutEntry("digits-2", "digits", 1, 1, '{"phase":"running","ü":1}')


@pytest.fixture(params=["sqlite", "redis"])
def where(request, tmp_path):
    if request.param == "sqlite":
        return str(tmp_path / "state.sqlite")
    return request.getfixturevalue("shared_redis").url(f"r{time.monotonic_ns()}")


@pytest.fixture
def store(where):
    one = open_gateway_store(where)
    yield one.releases
    one.close()


def visit(device, **changes):
    clock = changes.pop("clock", NOW)
    holding = Holding(device, "digits", 1, "flagship", "onnx", "Board ü", ("lab", "beta"), clock)
    return Visit(**{"holding": holding, "known": ("digits-2", 1), **changes})


def joining(device, arm="canary", clock=NOW, **changes):
    member = Membership(device, arm, "Board ü", clock, clock + 100)
    return visit(device, joining=member, clock=clock, **{"most": 2, **changes})


def test_rollouts_of_a_model_follow_one_another_and_change_by_revision(store):
    assert store.rollouts() == []
    assert store.advance_rollout(ONE)
    assert not store.advance_rollout(ONE)
    assert not store.advance_rollout(replace(ONE, name="digits-9", number=3))
    assert not store.advance_rollout(replace(ONE, number=2))  # the name is taken
    assert store.advance_rollout(replace(ONE, name="letters-1", model="letters"))
    changed = replace(ONE, revision=2, document="{}")
    assert store.advance_rollout(changed)
    assert not store.advance_rollout(changed)
    for wrong in ({"revision": 4}, {"number": 2, "revision": 3}, {"model": "letters", "revision": 3}, {"name": "x", "revision": 3}):
        assert not store.advance_rollout(replace(changed, **wrong))
    second = replace(ONE, name="digits-3", number=2)
    assert store.advance_rollout(second)
    assert store.rollouts() == [changed, second, replace(ONE, name="letters-1", model="letters")]


def test_a_device_joins_once_and_an_arm_holds_no_more_than_it_may(store):
    store.advance_rollout(ONE)
    found = store.visit(joining(7))
    assert (found.current, found.member) == (True, Membership(7, "canary", "Board ü", NOW, NOW + 100))
    again = store.visit(joining(7, arm="control", clock=NOW + 5))
    assert again.member == found.member
    assert store.visit(joining(8)).member is not None
    assert store.visit(joining(9)).member is None  # two are in it
    assert store.visit(joining(10, arm="control")).member is not None
    assert store.visit(visit(11)).member is None
    assert [one.device for one in store.members("digits-2")] == [7, 8, 10]
    assert store.members("digits-9") == []


def test_nobody_joins_by_what_a_gateway_knew_before(store):
    assert store.visit(visit(5, known=None)).current  # no rollout, and known to be none
    assert not store.visit(joining(5)).current
    store.advance_rollout(ONE)
    assert not store.visit(visit(5, known=None)).current
    store.advance_rollout(replace(ONE, revision=2))
    for known in (("digits-2", 1), ("digits-2", 3), ("digits-1", 2), None):
        found = store.visit(joining(5, known=known))
        assert (found.current, found.member) == (False, None)
    assert store.members("digits-2") == []
    assert store.visit(joining(5, known=("digits-2", 2))).member is not None
    store.advance_rollout(replace(ONE, name="digits-3", number=2))
    assert not store.visit(visit(5, known=("digits-2", 2))).current
    assert store.visit(visit(5, known=("digits-3", 1))).member is None  # a part in one rollout is none in the next


def test_of_each_value_the_worst_counts_until_the_window_closes_and_only_of_the_own_arm(store):
    store.advance_rollout(ONE)
    store.visit(joining(7))
    third = 1 / 3

    def said(clock=NOW, arm="canary", rollout="digits-2", device=7, **values):
        store.visit(visit(device, clock=clock, reports=(Worst(rollout, arm, values),)))
        return store.members("digits-2")[0].values

    assert store.members("digits-2")[0].values is None
    assert said(arm="control", crash=1.0) is None
    assert said(rollout="digits-1", crash=1.0) is None
    assert said(device=8, crash=1.0) is None
    assert said() == {}  # it spoke
    assert said(p95_ms=third, crash=0.0) == {"p95_ms": third, "crash": 0.0}
    assert said(p95_ms=1e300) == {"p95_ms": 1e300, "crash": 0.0}
    assert said(p95_ms=5.0, crash=1.0, clock=NOW + 99.9) == {"p95_ms": 1e300, "crash": 1.0}
    assert said(errors=1.0, clock=NOW + 100) == {"p95_ms": 1e300, "crash": 1.0}
    store.advance_rollout(replace(ONE, name="digits-3", number=2))
    late = visit(7, known=("digits-3", 1), reports=(Worst("digits-2", "canary", {"errors": 0.5}),))
    assert store.visit(late).current  # a report on a rollout that is not the current one still counts
    assert store.members("digits-2")[0].values == {"p95_ms": 1e300, "crash": 1.0, "errors": 0.5}


def test_what_devices_run_is_kept_a_row_each(store, where):
    second = Holding(9, "digits", 2, "entry", "litert", "", (), NOW + 1, "self-test: 0.2")
    for one in (Holding(7, "digits", 1, "flagship", "onnx", "Board ü", ("lab",), NOW), second, Holding(7, "letters", 4)):
        store.visit(Visit(one))
    newer = Holding(7, "digits", 2, "flagship", "onnx", "Board ü", (), NOW + 9)
    store.visit(Visit(newer))
    other = open_gateway_store(where)
    assert other.releases.holdings("digits") == [newer, second]
    assert other.releases.holdings("letters") == [Holding(7, "letters", 4)]
    other.close()


def test_why_a_device_refused_a_release_stays_until_it_runs_another(store):
    def told(note, version=1, device=7):
        store.visit(Visit(Holding(device, "digits", version, labels=(), seen=NOW, note=note)))
        return [(one.device, one.version, one.note) for one in store.holdings("digits")]

    assert told("") == [(7, 1, "")]
    assert told("self-test: 0.2") == [(7, 1, "self-test: 0.2")]
    assert told("") == [(7, 1, "self-test: 0.2")]
    assert told("too slow") == [(7, 1, "too slow")]
    assert told("", device=8) == [(7, 1, "too slow"), (8, 1, "")]
    assert told("", version=2**53 - 2) == [(7, 2**53 - 2, ""), (8, 1, "")]
    assert told("again", version=2**53 - 2)[0] == (7, 2**53 - 2, "again")
    assert told("", version=2**53 - 1)[0] == (7, 2**53 - 1, "")
    assert told("", version=2**53 - 1)[0] == (7, 2**53 - 1, "")


def test_old_rollouts_are_forgotten_with_their_members_and_the_rest_goes_on(store):
    for number in range(1, 6):
        store.advance_rollout(replace(ONE, name=f"digits-{number}", number=number))
        store.visit(joining(7, known=(f"digits-{number}", 1)))
        store.visit(joining(8, known=(f"digits-{number}", 1), most=2))
    store.advance_rollout(replace(ONE, name="letters-1", model="letters"))
    store.prune_rollouts("digits", 9)
    store.prune_rollouts("nothing", 1)
    assert len(store.rollouts()) == 6
    store.prune_rollouts("digits", 2)
    assert [one.name for one in store.rollouts()] == ["digits-4", "digits-5", "letters-1"]
    assert [len(store.members(f"digits-{number}")) for number in range(1, 6)] == [0, 0, 0, 2, 2]
    late = visit(7, known=("digits-5", 1), reports=(Worst("digits-1", "canary", {"crash": 1.0}),))
    assert store.visit(late).current
    store.prune_rollouts("digits", 0)  # the current one always stays
    assert [one.name for one in store.rollouts()] == ["digits-5", "letters-1"]
    assert not store.advance_rollout(replace(ONE, name="digits-9", number=1))
    assert store.advance_rollout(replace(ONE, name="digits-6", number=6))
    assert store.visit(joining(7, known=("digits-6", 1))).member is not None


def test_sequences_rise_for_a_device_whatever_it_asks_for(store):
    found = [store.visit(visit(7, known=None)).sequence for _ in range(3)]
    assert found == [int(1000 * NOW) + step for step in range(3)]  # a store that was lost and made anew is above it too
    assert store.visit(Visit(Holding(7, "letters", 1, seen=NOW - 500))).sequence == found[-1] + 1
    assert store.visit(visit(7, known=None, clock=NOW + 10)).sequence == int(1000 * (NOW + 10))
    assert store.visit(visit(8, known=None)).sequence == found[0]


def test_a_device_that_is_forgotten_leaves_no_row_and_its_place_stays_taken(where):
    one = open_gateway_store(where)
    one.register(Device(7, 1, b"k" * 32, 2_000_000_000, NOW))
    one.releases.advance_rollout(ONE)
    one.releases.visit(joining(7, most=1))
    one.judge(7, Standing.REVOKED, "")
    assert len(one.releases.members("digits-2")) == 1
    one.judge(7, Standing.FORGOTTEN, "")
    assert (one.releases.members("digits-2"), one.releases.holdings("digits")) == ([], [])
    assert one.releases.visit(joining(8, most=1)).member is None
    one.close()


def test_gateways_at_once_never_overfill_an_arm_nor_repeat_a_sequence(where, store):
    store.advance_rollout(ONE)
    sequences = []

    def work(number):
        mine = open_gateway_store(where)
        for step in range(12):
            mine.releases.visit(joining(100 * number + step, most=10))
            sequences.append(mine.releases.visit(visit(5, known=None)).sequence)
        mine.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(store.members("digits-2")) == 10
    assert len(set(sequences)) == 36


_WRITER = """
import sys
from fedcore.state.stores import open_gateway_store
from fedcore.state.releases import Holding, Membership, Visit, Worst
store = open_gateway_store(sys.argv[1]).releases
number = 0
while True:
    member = Membership(number, "canary", "", 1e9, 2e9)
    reports = (Worst("digits-2", "canary", {"crash": float(number)}),)
    first = store.visit(Visit(Holding(number, "digits", 1, seen=1e9), ("digits-2", 1), member, 10**6))
    last = store.visit(Visit(Holding(number, "digits", 1, seen=1e9), ("digits-2", 1), None, 0, reports))
    print(number, last.sequence, flush=True)
    number += 1
"""


def test_what_was_answered_outlives_a_killed_gateway(where, store):
    store.advance_rollout(ONE)
    writer = subprocess.Popen([sys.executable, "-c", _WRITER, where], stdout=subprocess.PIPE, text=True)
    answered = [writer.stdout.readline().split() for _ in range(25)]
    writer.kill()
    answered += [line.split() for line in writer.stdout.read().splitlines() if len(line.split()) == 2]
    writer.stdout.close()
    writer.wait()
    members = {one.device: one for one in store.members("digits-2")}
    for device, sequence in ((int(a), int(b)) for a, b in answered):
        assert members[device].values == {"crash": float(device)}
        later = store.visit(Visit(Holding(device, "digits", 1, seen=1.0), ("digits-2", 1)))
        assert later.sequence > sequence


def test_a_store_of_before_releases_gains_their_part(tmp_path):
    import sqlite3

    path = tmp_path / "state.sqlite"
    open_gateway_store(str(path)).close()
    db = sqlite3.connect(path)
    for table in ("rollouts", "members", "arms", "holdings", "sequences"):
        db.execute(f"DROP TABLE {table}")
    db.commit()
    db.close()
    one = open_gateway_store(str(path))
    assert one.releases.advance_rollout(ONE)
    one.close()
