"""What every `GatewayStore` promises: each request once, each upload once, and that an acknowledgement outlives whatever follows.

The same tests run against SQLite and against a real Redis on a socket of its own.
"""

import contextlib
import os
import signal
import sqlite3
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from redis_server import DURABLE, RedisServer

from fedcore.errors import Refused, TryAgain
from fedcore.state.gateway import (
    REQUEST_WINDOW,
    Acceptance,
    Admission,
    Contribution,
    Device,
    Note,
    Problem,
    Round,
    RoundState,
    Standing,
)
from fedcore.state.stores import open_gateway_store

NOW = 1_800_000_000.25


@pytest.fixture(params=["sqlite", "redis"])
def where(request, tmp_path):
    """A fresh store, to be opened as often as one likes."""
    if request.param == "sqlite":
        return str(tmp_path / "gateway" / "state.sqlite")
    return request.getfixturevalue("shared_redis").url(f"p{time.monotonic_ns()}")


@pytest.fixture
def store(where):
    one = open_gateway_store(where)
    yield one
    one.close()


def device(number, **changes):
    return replace(Device(number, 1, bytes([number % 251]) * 32, 2_000_000_000, NOW), **changes)


def running(store, key="r1", task="digits", number=7):
    assert store.advance(Round(key, task, number, RoundState.FORMING, 1, "{}"))
    assert store.advance(Round(key, task, number, RoundState.RUNNING, 2, "{}"))


def close(store, key="r1", task="digits", number=7):
    assert store.advance(Round(key, task, number, RoundState.CLOSED, 3, "{}"))


def nonce(number):
    return number.to_bytes(16, "big")


# Devices


def test_a_device_is_kept_as_it_was_registered(store, where):
    largest = device((1 << 63) - 1, public_key=bytes(range(33)), algorithm=2, enrolled=0.1 + 0.2, told='{"tier":"ü\\n"}')
    assert store.device(largest.id) is None
    assert store.register(largest) == store.device(largest.id) == largest
    store.register(device(3))
    other = open_gateway_store(where)
    assert other.devices() == [device(3), largest]
    other.close()


def test_an_id_belongs_to_one_key_and_its_certificate_only_gets_longer(store):
    store.register(device(1))
    with pytest.raises(Refused, match="device 0000000000000001 is another key's id"):
        store.register(device(1, public_key=bytes(32)))
    with pytest.raises(Refused, match="another key's"):
        store.register(device(1, algorithm=2))
    store.admit([Admission(1, 5, nonce(5), "facts")], NOW)
    for until, kept in ((2_100_000_000, 2_100_000_000), (1_900_000_000, 2_100_000_000)):
        known = store.register(device(1, not_after=until, told="", enrolled=NOW + 9))
        assert known == store.device(1) == device(1, not_after=kept, counter=5, counted=NOW, last_seen=NOW, told="facts")


def test_labels_are_what_was_registered_or_given_last(store, where):
    store.register(device(1, labels=("beta", "ü lab")))
    store.register(device(2))
    assert [one.labels for one in store.devices()] == [("beta", "ü lab"), ()]
    store.label(2, ("lab",))
    store.label(3, ("lab",))
    assert (store.device(2).labels, store.device(3)) == (("lab",), None)
    assert store.admit([Admission(2, 1, nonce(1), "facts")], NOW)[0].device.labels == ("lab",)
    assert store.register(device(1)).labels == store.device(1).labels == ()  # the signer's word of now
    other = open_gateway_store(where)
    assert other.device(2).labels == ("lab",)
    other.close()
    store.judge(2, Standing.FORGOTTEN, "")
    assert store.device(2).labels == ()


def test_standing_changes_and_revocation_stays(store):
    store.register(device(1))
    store.judge(1, Standing.QUARANTINED, "copied")
    assert (store.device(1).standing, store.device(1).reason) == (Standing.QUARANTINED, "copied")
    store.judge(1, Standing.ACTIVE, "")
    store.judge(1, Standing.REVOKED, "stolen")
    store.judge(1, Standing.ACTIVE, "")
    assert (store.device(1).standing, store.device(1).reason) == (Standing.REVOKED, "stolen")
    store.judge(2, Standing.REVOKED, "nobody")
    assert store.device(2) is None


def test_what_is_forgotten_is_erased(store):
    store.register(device(1))
    running(store)
    store.admit([Admission(1, 5, nonce(5), "facts")], NOW)
    store.note("r1", "report", [Note(1, "text", NOW), Note(2, "other", NOW)])
    store.accept("r1", "w", b"sum", [Contribution(1, b"d" * 32)])
    assert store.device(1).participations == {"digits": (1, 7)}
    store.judge(1, Standing.REVOKED, "")
    store.judge(1, Standing.FORGOTTEN, "by its owner")
    kept = store.device(1)
    assert kept == device(1, standing=Standing.FORGOTTEN, reason="by its owner", counter=5, counted=NOW, enrolled=0.0)
    assert store.notes("r1", "report") == [Note(2, "other", NOW)]
    store.judge(1, Standing.ACTIVE, "")
    assert store.admit([Admission(1, 6, nonce(6))], NOW)[0].problem is Problem.FORGOTTEN


# Requests


def test_a_request_is_admitted_once_by_every_replica(store, where):
    other = open_gateway_store(where)
    store.register(device(1))
    first = store.admit([Admission(1, 1, nonce(1), "told")], NOW)[0]
    assert (first.problem, first.device) == (None, device(1))
    assert other.admit([Admission(1, 1, nonce(1))], NOW + 1)[0].problem is Problem.REPLAYED
    second = other.admit([Admission(1, 2, nonce(2))], NOW + 2)[0]
    assert second.device == device(1, counter=1, counted=NOW, last_seen=NOW, told="told")
    assert store.device(1) == device(1, counter=2, counted=NOW + 2, last_seen=NOW + 2, told="told")
    other.close()


def test_unknown_revoked_and_quarantined_devices_are_told_so_at_their_next_call(store):
    store.register(device(1))
    store.register(device(2))
    store.judge(1, Standing.REVOKED, "x")
    store.judge(2, Standing.QUARANTINED, "y")
    verdicts = store.admit([Admission(n, 1, nonce(n)) for n in (1, 2, 3)], NOW)
    assert [one.problem for one in verdicts] == [Problem.REVOKED, Problem.QUARANTINED, Problem.UNKNOWN]
    assert [one.device and one.device.id for one in verdicts] == [1, 2, None]


def test_a_number_used_for_two_requests_is_a_copy(store):
    """The original and its copy count on from the same number: whoever is second to use one shows that there are two."""
    store.register(device(1))
    store.admit([Admission(1, number, nonce(number)) for number in (11, 12, 13)], NOW)
    assert store.admit([Admission(1, 11, nonce(99))], NOW + 1)[0].problem is Problem.QUARANTINED
    assert store.device(1).standing is Standing.QUARANTINED
    assert "request number 11 was used twice" in store.device(1).reason
    assert store.admit([Admission(1, 14, nonce(14))], NOW + 2)[0].problem is Problem.QUARANTINED


def test_a_delayed_request_is_no_copy_but_a_late_lower_number_is(store):
    store.register(device(1))
    assert store.admit([Admission(1, 12, nonce(12))], NOW)[0].problem is None
    delayed = Admission(1, 11, nonce(11))
    assert store.admit([delayed], NOW + REQUEST_WINDOW - 1)[0].problem is Problem.REPLAYED
    assert store.device(1).standing is Standing.ACTIVE
    assert store.admit([delayed], NOW + REQUEST_WINDOW + 1)[0].problem is Problem.QUARANTINED


def test_a_replay_never_puts_a_device_in_quarantine(store):
    store.register(device(1))
    request = Admission(1, 1, nonce(1))
    assert store.admit([request, request], NOW)[1].problem is Problem.REPLAYED
    store.admit([Admission(1, 2, nonce(2))], NOW + 1)
    assert store.admit([request], NOW + 2)[0].problem is Problem.REPLAYED
    assert store.device(1).standing is Standing.ACTIVE


def test_numbers_are_compared_as_whole_numbers(store):
    store.register(device(1))
    for number in (9, 10, 100, (1 << 53) - 2, (1 << 53) - 1):
        assert store.admit([Admission(1, number, nonce(number))], NOW)[0].problem is None
    assert store.device(1).counter == (1 << 53) - 1


def test_of_two_replicas_that_get_one_request_one_admits_it(store, where):
    store.register(device(1))
    admitted = []

    def replica(seed):
        mine = open_gateway_store(where)
        for number in range(1, 60):
            with contextlib.suppress(TryAgain):
                if mine.admit([Admission(1, number, nonce(number))], NOW)[0].problem is None:
                    admitted.append(number)
        mine.close()

    threads = [threading.Thread(target=replica, args=(seed,)) for seed in range(3)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(admitted) == len(set(admitted))
    assert store.device(1).standing is Standing.ACTIVE
    assert store.device(1).counter == 59


# Rounds


def test_a_round_changes_one_version_at_a_time_and_ends(store, where):
    other = open_gateway_store(where)
    forming = Round("r1", "digits", 3, RoundState.FORMING, 1, '{"a": "ü"}')
    assert store.round("r1") is None
    assert store.advance(forming)
    assert not other.advance(forming)
    assert other.round("r1") == forming
    run = replace(forming, state=RoundState.RUNNING, version=2, document="{}")
    assert other.advance(run)
    assert not store.advance(replace(run, document="different"))
    assert not store.advance(replace(run, version=4))
    assert store.rounds() == {"r1": 2}
    closed = replace(run, state=RoundState.CLOSED, version=3)
    assert store.advance(closed)
    assert not store.advance(replace(closed, version=4, state=RoundState.RUNNING))
    assert store.round("r1") == closed
    assert not store.advance(replace(forming, key="r2", version=2))
    assert store.rounds() == {"r1": 3}
    other.close()


def test_notes_are_kept_per_device_and_kind(store):
    store.note("nowhere", "here", [Note(1, "lost", NOW)])
    assert store.notes("nowhere", "here") == []
    running(store)
    store.note("r1", "here", [Note(2, "two", NOW), Note(1, "one", NOW + 0.1)])
    store.note("r1", "here", [Note(2, "two again", NOW + 1)])
    store.note("r1", "report", [Note(2, "done", NOW + 2)])
    assert store.notes("r1", "here") == [Note(1, "one", NOW + 0.1), Note(2, "two again", NOW + 1)]
    assert store.notes("r1", "report") == [Note(2, "done", NOW + 2)]


# Uploads


def test_uploads_count_once_and_together(store):
    running(store)
    store.register(device(1))
    first, second = Contribution(1, b"a" * 32), Contribution(2, b"b" * 32)
    assert store.accept("r1", "w1", b"sum of 1", [first]) == Acceptance(counted=True)
    refused = store.accept("r1", "w1", b"sum of 1, 1, 2", [first, second])
    assert refused == Acceptance(counted=False, repeated={1: b"a" * 32})
    assert store.contributions("r1") == [first]
    assert store.partials("r1") == [b"sum of 1"]
    assert store.accept("r1", "w1", b"sum of 1, 2", [second]).counted
    assert store.accept("r1", "w2", b"sum of 3\0", [Contribution(3, b"c" * 32)]).counted
    assert store.partials("r1") == [b"sum of 1, 2", b"sum of 3\0"]
    assert store.device(1).participations == {"digits": (1, 7)}
    running(store, "r2", number=9)
    store.accept("r2", "w1", b"", [first])
    running(store, "r3", number=8)
    store.accept("r3", "w1", b"", [first])
    assert store.device(1).participations == {"digits": (3, 9)}
    assert store.admit([Admission(1, 1, nonce(1))], NOW)[0].device.participations == {"digits": (3, 9)}
    assert store.devices()[0].participations == {"digits": (3, 9)}


def test_nothing_counts_before_a_round_runs_or_after_it_is_closed(store):
    upload = [Contribution(1, b"a" * 32)]
    assert store.accept("r1", "w", b"s", upload) == Acceptance(counted=False)
    assert store.advance(Round("r1", "digits", 7, RoundState.FORMING, 1, "{}"))
    assert store.accept("r1", "w", b"s", upload) == Acceptance(counted=False)
    running(store, "r2")
    close(store, "r2")
    assert store.accept("r2", "w", b"s", upload) == Acceptance(counted=False)
    assert store.partials("r1") == store.partials("r2") == store.contributions("r2") == []


def test_prune_forgets_rounds_that_are_over_and_nothing_else(store):
    running(store)
    running(store, "r2")
    store.note("r1", "report", [Note(2, "done", NOW)])
    store.accept("r1", "w", b"s", [Contribution(1, b"a" * 32)])
    store.prune(time.time(), time.time() + 60)
    assert set(store.rounds()) == {"r1", "r2"}
    close(store)
    store.prune(time.time(), time.time() - 60)
    assert store.partials("r1") == [b"s"]
    store.prune(time.time(), time.time() + 60)
    assert (set(store.rounds()), store.round("r1")) == ({"r2"}, None)
    assert store.notes("r1", "report") == store.contributions("r1") == store.partials("r1") == []


def test_prune_keeps_requests_that_could_be_replayed(store):
    store.register(device(1))
    now = time.time()
    store.admit([Admission(1, 1, nonce(1))], now - REQUEST_WINDOW + 60)
    store.prune(now, 0)
    assert store.admit([Admission(1, 1, nonce(1))], now)[0].problem is Problem.REPLAYED
    assert store.admit([Admission(1, 1, nonce(2))], now)[0].problem is Problem.QUARANTINED


def add_up(where, me, devices, acknowledged):
    """A gateway that adds the vector e_d for each device d, one commit for up to three of them."""
    store, total, waiting = open_gateway_store(where), np.zeros(64), list(devices)
    while waiting:
        group, waiting = waiting[:3], waiting[3:]
        fresh = total.copy()
        for one in group:
            fresh[one] += 1
        answer = store.accept("r1", me, fresh.tobytes(), [Contribution(one, bytes([one]) * 32) for one in group])
        if answer.counted:
            total = fresh
            acknowledged(group)
        else:
            acknowledged([one for one in group if one in answer.repeated])
            waiting += [one for one in group if one not in answer.repeated]
    store.close()


def total_of(store):
    return sum((np.frombuffer(one) for one in store.partials("r1")), np.zeros(64))


@pytest.mark.parametrize("kill_after", [0.004, 0.01, 0.02, 0.04])
def test_a_killed_gateway_loses_nothing_it_acknowledged_and_counts_nothing_twice(store, where, kill_after, tmp_path):
    """Another one, with a sum of its own, takes over from it; both were sent the same devices."""
    running(store)
    told = tmp_path / "told"
    child = os.fork()
    if child == 0:
        with told.open("ab", buffering=0) as file:
            add_up(where, "first", range(60), lambda group: file.write(bytes(group)))
        os._exit(0)
    time.sleep(kill_after)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    acknowledged = set(told.read_bytes()) if told.exists() else set()
    assert acknowledged <= {one.device for one in store.contributions("r1")}
    before = total_of(store)
    assert sorted(np.flatnonzero(before)) == [one.device for one in store.contributions("r1")]
    add_up(where, "second", reversed(range(60)), lambda group: None)
    assert [one.device for one in store.contributions("r1")] == list(range(60))
    assert total_of(store)[:60].tolist() == [1.0] * 60


def test_replicas_that_add_at_once_count_every_device_once(store, where):
    running(store)
    failures = []

    def replica(me):
        try:
            add_up(where, me, np.random.default_rng(len(me)).permutation(60).tolist(), lambda group: None)
        except Exception as error:  # noqa: BLE001 - told by the main thread
            failures.append(error)

    threads = [threading.Thread(target=replica, args=("w" * n,)) for n in (1, 2, 3)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not failures
    assert total_of(store)[:60].tolist() == [1.0] * 60


# Stores that fail


def test_a_redis_that_is_killed_keeps_what_it_acknowledged():
    server = RedisServer()
    try:
        store = open_gateway_store(server.url("a"))
        running(store)
        store.register(device(1))
        assert store.accept("r1", "w", b"sum", [Contribution(1, b"a" * 32)]).counted
        server.kill()
        with pytest.raises(TryAgain, match="cannot be used now"):
            store.accept("r1", "w", b"sum2", [Contribution(2, b"b" * 32)])
        server.start()
        again = open_gateway_store(server.url("a"))
        assert again.partials("r1") == [b"sum"]
        assert again.device(1).participations == {"digits": (1, 7)}
        assert store.contributions("r1") == [Contribution(1, b"a" * 32)]  # the same store finds its way back
        again.close()
        store.close()
    finally:
        server.remove()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "appendonly is no, it must be yes"),
        (("--appendonly", "yes"), "appendfsync is everysec, it must be always"),
        ((*DURABLE, "--no-appendfsync-on-rewrite", "yes"), "no-appendfsync-on-rewrite is yes, it must be no"),
        ((*DURABLE, "--maxmemory-policy", "allkeys-lru"), "maxmemory-policy is allkeys-lru, it must be noeviction"),
    ],
)
def test_a_redis_that_would_lose_uploads_is_refused(options, said):
    server = RedisServer(*(options or ("--appendonly", "no")))
    try:
        with pytest.raises(Refused, match=f"would lose uploads that were acknowledged: {said}"):
            open_gateway_store(server.url("a"))
    finally:
        server.remove()


def test_a_redis_that_loses_its_settings_counts_nothing_until_it_has_them_again():
    import redis

    server = RedisServer()
    try:
        store = open_gateway_store(server.url("a"))
        store.register(device(1))
        running(store)
        settings = redis.Redis(unix_socket_path=str(server.socket))
        settings.config_set("appendfsync", "everysec")
        with pytest.raises(TryAgain, match="appendfsync is everysec, it must be always; nothing is counted"):
            store.accept("r1", "w", b"sum", [Contribution(1, bytes(32))])
        assert store.contributions("r1") == []
        settings.config_set("appendfsync", "always")
        assert store.accept("r1", "w", b"sum", [Contribution(1, bytes(32))]).counted
        settings.replicaof("127.0.0.1", "1")
        with pytest.raises(TryAgain, match="is a replica"):
            store.accept("r1", "w", b"sum", [Contribution(2, bytes(32))])
        store.close()
    finally:
        server.remove()


def test_populations_of_one_redis_do_not_mix(shared_redis):
    one, other = (open_gateway_store(shared_redis.url(name)) for name in ("here", "there"))
    one.register(device(1))
    running(one)
    assert other.devices() == []
    assert other.rounds() == {}
    one.close()
    other.close()


def test_a_store_of_before_labels_gains_them(tmp_path):
    path = tmp_path / "state.sqlite"
    one = open_gateway_store(str(path))
    one.register(device(1))
    one.close()
    db = sqlite3.connect(path)
    db.execute("ALTER TABLE devices DROP COLUMN labels")
    db.close()
    for _ in range(2):
        one = open_gateway_store(str(path))
        assert one.device(1) == device(1)
        one.close()


def test_a_file_that_is_no_store_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("this is no database " * 100)
    with pytest.raises(Refused, match=r"notes\.txt: is damaged or no gateway's store"):
        open_gateway_store(str(tmp_path / "notes.txt"))
    from fedcore.state.ledger_sqlite import SqliteLedger

    SqliteLedger(tmp_path / "ledger.sqlite").close()
    with pytest.raises(Refused, match=r"ledger\.sqlite: is not a gateway's store"):
        open_gateway_store(str(tmp_path / "ledger.sqlite"))


def test_a_busy_file_is_a_passing_fault(tmp_path, monkeypatch):
    import sqlite3

    path = tmp_path / "state.sqlite"
    store = open_gateway_store(str(path))
    store._db.execute("PRAGMA busy_timeout = 50")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(TryAgain, match="cannot be used now"):
        store.register(device(1))
    other.execute("ROLLBACK")
    assert store.register(device(1)) == device(1)
    store.close()
