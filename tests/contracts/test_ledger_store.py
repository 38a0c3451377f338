"""What every `LedgerStore` promises: order, compare-and-set, and that an entry outlives whatever happens after `append` returns.

The same tests run against SQLite and against a real Redis on a socket of its own.
"""

import os
import socket
import socketserver
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time

import pytest
import redis
from ledgers import charge, in_child
from redis_server import DURABLE, redis_server

from fedcore.errors import BudgetSpent, FedcoreError, Refused, TryAgain
from fedcore.privacy.accountant import epsilon
from fedcore.privacy.events import GaussianRelease
from fedcore.privacy.ledger import Ledger, PositionTaken
from fedcore.state.ledger_redis import RedisLedger
from fedcore.state.ledger_sqlite import SqliteLedger
from fedcore.state.stores import open_ledger


def test_entries_come_back_in_order(ledger):
    store = open_ledger(ledger)
    written = [{"n": number, "text": "ü\n\0", "real": 0.1, "list": [1, None]} for number in range(5)]
    for number, entry in enumerate(written):
        store.append(number, f"key {number}", entry)
        store.confirm()
    assert store.entries() == open_ledger(ledger).entries() == open_ledger(ledger, write=False).entries() == written
    assert store.entries(3) == written[3:]
    assert store.entries(5) == store.entries(9) == []


@pytest.mark.parametrize("position", [0, 1, 3, 100])
def test_a_position_that_is_not_the_next_is_taken(ledger, position):
    one, other = open_ledger(ledger), open_ledger(ledger)
    one.append(0, "a", {"n": 0})
    other.append(1, "b", {"n": 1})
    with pytest.raises(PositionTaken):
        one.append(position, "c", {"n": 2})
    assert one.entries() == [{"n": 0}, {"n": 1}]
    one.append(2, "c", {"n": 2})  # the refused attempt left nothing behind


def test_a_key_is_there_once(ledger):
    store = open_ledger(ledger)
    store.append(0, "a", {"n": 0})
    with pytest.raises(PositionTaken):
        store.append(1, "a", {"n": 1})
    assert store.entries() == [{"n": 0}]
    store.append(1, "b", {"n": 1})


def test_a_reader_of_no_ledger_is_told_and_creates_none(ledger):
    for _ in range(2):
        with pytest.raises(Refused, match="no privacy ledger"):
            open_ledger(ledger, write=False)


def test_a_coordinator_that_has_not_seen_anothers_charge_reads_it_first(ledger):
    one, other = (Ledger(open_ledger(ledger), "phones") for _ in range(2))
    budget = epsilon({GaussianRelease(1.0): 2}, 1e-6)
    one.charge(charge(1), budget)
    other.charge(charge(1, run="b"), budget)
    with pytest.raises(BudgetSpent):
        one.charge(charge(2), budget)
    assert one.spending("client") == other.spending("client")
    assert one.spending("client").runs == 2


# Two coordinators


def test_only_one_of_two_processes_gets_the_last_round(ledger):
    budget, wins = epsilon({GaussianRelease(1.0): 1}, 1e-6), []
    Ledger(open_ledger(ledger), "phones").close()
    receiving, sending = os.pipe()
    start, go = os.pipe()

    def work(run: str) -> None:
        held = Ledger(open_ledger(ledger), "phones")
        os.write(sending, b"r")
        os.read(start, 1)
        while True:
            try:
                held.charge(charge(1, run), budget)
                os.write(sending, run.encode())
            except BudgetSpent:
                os.write(sending, b"-")
            except TryAgain:
                continue
            break

    children = [in_child(lambda run=run: work(run)) for run in "ab"]
    while len(wins) < 2:
        wins += os.read(receiving, 1)
    os.write(go, b"gg")
    for child in children:
        os.waitpid(child, 0)
    os.close(sending)
    answers = os.read(receiving, 10).decode()
    for end in (receiving, start, go):
        os.close(end)
    (one,) = Ledger(open_ledger(ledger), "phones").charges()
    assert sorted(answers) == ["-", one.run]


def test_many_charges_of_two_processes_all_arrive_in_one_order(ledger):
    Ledger(open_ledger(ledger), "phones").close()

    def work(run: str) -> None:
        held = Ledger(open_ledger(ledger), "phones")
        for number in range(1, 16):
            while True:
                try:
                    held.charge(charge(number, run))
                except TryAgain:
                    continue
                break

    for child in [in_child(lambda run=run: work(run)) for run in "ab"]:
        os.waitpid(child, 0)
    held = Ledger(open_ledger(ledger), "phones")  # reads the chain over all of them
    for run in "ab":
        assert [one.round for one in held.charges() if one.run == run] == list(range(1, 16))


# SQLite


def test_a_busy_file_is_a_passing_fault(tmp_path, monkeypatch):
    path = tmp_path / "ledger.sqlite"
    store = SqliteLedger(path)
    store._db.execute("PRAGMA busy_timeout = 50")
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN EXCLUSIVE")
    with pytest.raises(TryAgain, match="another process is writing to this ledger"):
        store.append(0, "a", {})
    blocker.execute("ROLLBACK")
    store.append(0, "a", {})


def test_a_file_that_is_no_ledger_is_refused_and_left_alone(tmp_path):
    (tmp_path / "text").write_bytes(b"no database, but long enough to be one" * 100)
    (tmp_path / "empty").touch()
    other = sqlite3.connect(tmp_path / "other")
    other.execute("CREATE TABLE rounds (round INTEGER)")
    other.close()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for name, write in (("text", True), ("text", False), ("other", True), ("other", False), ("empty", False)):
        with pytest.raises(Refused, match=r"no ledger|not a privacy ledger"):
            SqliteLedger(tmp_path / name, write=write)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "ledger.sqlite"
    held = Ledger(SqliteLedger(path), "phones")
    for number in range(1, 40):
        held.charge(charge(number))
    held.close()
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = bytes(2000)
    path.write_bytes(data)
    with pytest.raises(Refused, match="damaged"):
        Ledger(SqliteLedger(path), "phones")


def test_a_directory_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FedcoreError, match="file"):
        open_ledger(tmp_path / "file" / "below" / "ledger.sqlite")


FULL = """
import resource, signal, sys
from pathlib import Path
from fedcore.errors import TryAgain
from fedcore.privacy.events import GaussianRelease
from fedcore.privacy.ledger import Charge, Ledger
from fedcore.state.ledger_sqlite import SqliteLedger
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
held = Ledger(SqliteLedger(Path(sys.argv[1])), "phones")
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
try:
    held.charge(Charge("a", 2, 1, "client", GaussianRelease(1.0), tuple(range(50_000)), "2026-11-22T10:00:00+00:00", 1e-6))
except TryAgain as error:
    print(error)
"""


def test_a_full_disk_charges_nothing_and_says_so(tmp_path):
    """A limit on the file's size stands for the disk: the same write fails."""
    path = tmp_path / "ledger.sqlite"
    held = Ledger(SqliteLedger(path), "phones")
    held.charge(charge(1))
    done = subprocess.run([sys.executable, "-c", FULL, path], capture_output=True, text=True, check=True)
    assert "nothing counts as charged" in done.stdout
    assert [one.round for one in held.charges()] == [1]
    assert held.charge(charge(2))


# Redis


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--appendonly", "no", "--appendfsync", "always"), "appendonly is no, it must be yes"),
        (("--appendonly", "yes", "--appendfsync", "everysec"), "appendfsync is everysec, it must be always"),
        ((*DURABLE, "--no-appendfsync-on-rewrite", "yes"), "no-appendfsync-on-rewrite is yes, it must be no"),
        ((*DURABLE, "--maxmemory-policy", "allkeys-lru"), "maxmemory-policy is allkeys-lru, it must be noeviction"),
        ((*DURABLE, "--rename-command", "CONFIG", ""), "does not allow CONFIG GET"),
    ],
)
def test_a_redis_that_may_forget_is_refused(options, said):
    with redis_server(*options) as server:
        with pytest.raises(Refused, match=said):
            open_ledger(server.url())
        assert redis.Redis(unix_socket_path=str(server.socket)).keys() == []


def test_a_redis_that_becomes_forgetful_is_refused_before_the_next_entry():
    with redis_server() as server:
        store = open_ledger(server.url())
        store.append(0, "a", {})
        redis.Redis(unix_socket_path=str(server.socket)).config_set("appendfsync", "everysec")
        for write in (lambda: store.append(1, "b", {}), store.confirm):
            with pytest.raises(Refused, match="appendfsync is everysec"):
                write()
        assert store.entries() == [{}]


def test_replicas_of_an_old_redis_are_refused(shared_redis):
    with redis_server("--port", str(free_port()), *DURABLE) as master:
        port = redis.Redis(unix_socket_path=str(master.socket)).config_get("port")["port"]
        with redis_server("--replicaof", "127.0.0.1", port, *DURABLE) as replica:
            client = redis.Redis(unix_socket_path=str(master.socket))
            version = client.info()["redis_version"]
            if tuple(map(int, version.split(".")[:2])) >= (7, 2):
                pytest.skip(f"Redis {version} has WAITAOF")
            deadline = time.monotonic() + 60
            while client.info()["connected_slaves"] == 0 and time.monotonic() < deadline:
                time.sleep(0.05)
            with pytest.raises(Refused, match=r"takes Redis 7\.2, or no replicas"):
                open_ledger(master.url())
            with pytest.raises(Refused, match="is a replica"):
                open_ledger(replica.url())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class NewerRedis(socketserver.StreamRequestHandler):
    """Stands before a real Redis and speaks for two replicas of a Redis 7.2: INFO and WAITAOF are answered here."""

    def handle(self) -> None:
        with socket.socket(socket.AF_UNIX) as upstream:
            upstream.connect(str(self.server.upstream))
            replies = upstream.makefile("rb")
            while command := self.read(self.rfile):
                words = command.split(b"\r\n")[2::2]
                self.server.seen.append(words[0].upper())
                if words[0].upper() == b"WAITAOF":
                    self.wfile.write(b"*2\r\n:1\r\n:%d\r\n" % self.server.durable)
                    continue
                upstream.sendall(command)
                reply = self.read(replies)
                if words[0].upper() == b"INFO":
                    body = reply.split(b"\r\n", 1)[1][:-2].removeprefix(b"txt:")
                    version = body[body.index(b"redis_version:") :].split(b"\r\n", 1)[0]
                    body = body.replace(version, b"redis_version:7.2.4").replace(b"connected_slaves:0", b"connected_slaves:2")
                    reply = b"$%d\r\n%s\r\n" % (len(body), body)
                self.wfile.write(reply)

    def read(self, stream) -> bytes:
        """One value of the Redis protocol, as bytes."""
        line = stream.readline()
        if line[:1] in (b"$", b"=") and line[1:2] != b"-":
            return line + stream.read(int(line[1:]) + 2)
        if line[:1] in (b"*", b"%") and line[1:2] != b"-":
            return line + b"".join(self.read(stream) for _ in range(int(line[1:]) * (2 if line[:1] == b"%" else 1)))
        return line


def test_an_entry_counts_when_every_replica_has_it_on_disk(shared_redis):
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as folder,
        socketserver.ThreadingUnixStreamServer(f"{folder}/s", NewerRedis) as front,
    ):
        front.daemon_threads = True
        front.upstream, front.seen, front.durable = shared_redis.socket, [], 2
        threading.Thread(target=front.serve_forever, daemon=True).start()
        store = RedisLedger(f"unix://{folder}/s?population=replicated")
        held = Ledger(store, "phones")
        assert held.charge(charge(1))
        assert front.seen[-2:] == [b"EVAL", b"WAITAOF"]
        front.durable = 1
        with pytest.raises(TryAgain, match="1 of 2 replicas have the entry on disk; repeat the charge"):
            held.charge(charge(2))
        with pytest.raises(TryAgain, match="1 of 2 replicas"):
            held.charge(charge(2))  # it is written, and still not safe to learn from
        front.durable = 2
        assert held.charge(charge(2)) is False
        assert front.seen[-2:] == [b"INCRBY", b"WAITAOF"]
        assert [one.round for one in held.charges()] == [1, 2]
        store.close()
        front.shutdown()


def test_a_password_is_never_shown():
    with redis_server(*DURABLE, "--requirepass", "right-secret") as server:
        for wrong in ("someone:wrong-secret@", ":wrong-secret@", ""):
            with pytest.raises(Refused) as caught:
                open_ledger(server.url(user=wrong))
            chain = [caught.value, caught.value.__cause__, caught.value.__context__]
            assert "secret" not in " ".join(map(str, chain))
        Ledger(open_ledger(server.url(user=":right-secret@")), "phones").charge(charge(1))
        server.stop()
        with pytest.raises(TryAgain, match="cannot be reached") as unreachable:
            open_ledger(server.url(user=":right-secret@"))
        assert "secret" not in str(unreachable.value)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis://u:secret@localhost:port/0?population=a", "cannot be read"),
        ("redis://:1?secret@localhost/0?population=a", "cannot be read"),
        ("redis://:1/secret@localhost/0?population=a", "cannot be read"),
        ("redis://:1#secret@localhost/0?population=a", "cannot be read"),
        ("redis://u:secret@localhost/0", "needs .population=NAME"),
        ("redis://u:secret@localhost/0?population=a b", "needs .population=NAME"),
        ("redis://u:secret@localhost/0?population=a&population=b", "needs .population=NAME"),
        ("redis://u:secret@localhost/0?population=a&password=secret", "unknown option password; allowed: population, ssl_ca_certs"),
        ("rediss://u:secret@localhost/0?population=a&ssl_cert_reqs=none", "unknown option ssl_cert_reqs"),
        ("redis://u:secret@localhost/zero?population=a", "is not a Redis URL|cannot be reached"),
        ("mysql://u:secret@localhost/0", "a path or a URL redis://, rediss:// or unix://, not mysql://"),
    ],
)
def test_a_url_that_is_not_understood_is_refused_without_its_password(url, said):
    with pytest.raises(FedcoreError, match=said) as caught:
        open_ledger(url)
    assert "secret" not in str(caught.value)


def test_populations_of_one_redis_do_not_mix(shared_redis):
    one, other = (open_ledger(shared_redis.url(name)) for name in ("here", "there"))
    one.append(0, "a", {"n": 1})
    assert other.entries() == []
    other.append(0, "a", {"n": 2})
    assert one.entries() == [{"n": 1}]
