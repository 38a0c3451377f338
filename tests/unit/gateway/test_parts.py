"""Sums, group commit, limits and blobs."""

import asyncio
import hashlib
import struct
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import Refused, TryAgain
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.blobs import Blobs
from fedcore.gateway.commits import Committer
from fedcore.gateway.limits import Buckets, Limits, ReadingRoom
from fedcore.gateway.refusals import GatewayRefusal
from fedcore.gateway.sums import RunningSum, Summand, UploadTerms, read_upload
from fedcore.quantization.wire import Update, encode_update
from fedcore.state.gateway import Admission, Contribution, Device, Note, Problem, Round, RoundState
from fedcore.state.stores import open_gateway_store

RNG = np.random.default_rng(0)
TERMS = UploadTerms("float32", 8, 1000, 100.0, 1000)
EIGHT = np.arange(8, dtype=np.float32)


def update(values=EIGHT, examples=3, loss=0.5, encoding="float32"):
    return encode_update(Update(values, examples, loss), encoding, RNG)


# Uploads


def test_an_update_weighs_as_much_as_its_examples():
    part = read_upload(update(), TERMS)
    assert (part.weight, part.examples, part.loss) == (3, 3, 1.5)
    np.testing.assert_array_equal(part.vector, EIGHT)
    rounded = read_upload(update(encoding="int8"), UploadTerms("int8", 8, 1000, 100.0, 1000))
    np.testing.assert_allclose(rounded.vector, EIGHT, atol=0.06)


def test_a_contribution_is_clipped_and_not_refused():
    terms = UploadTerms("contribution", 8, 32, 5.0, 1)
    part = read_upload((EIGHT * 100).tobytes(), terms)
    assert np.linalg.norm(part.vector) == pytest.approx(5.0)
    assert (part.weight, part.examples) == (1, 1)
    with pytest.raises(Refused, match="not finite"):
        read_upload(np.full(8, np.inf, np.float32).tobytes(), terms)
    with pytest.raises(Refused, match="has 32 bytes, this one 28"):
        read_upload(EIGHT[:7].tobytes(), terms)


def test_a_score_is_counts_and_a_loss():
    terms = UploadTerms("score", 0, 24, 1.0, 1000)
    part = read_upload(struct.pack("<QQd", 10, 7, 2.5), terms)
    assert (part.examples, part.correct, part.loss, part.weight) == (10, 7, 2.5, 0)
    for strange in ((0, 0, 1.0), (10, 11, 1.0), (10, 7, np.nan), (10, 7, 1e308), (5000, 7, 1.0)):
        with pytest.raises(Refused, match="is no score"):
            read_upload(struct.pack("<QQd", *strange), terms)
    with pytest.raises(Refused, match="a score has 24 bytes"):
        read_upload(b"x", terms)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (update(np.full(8, np.nan, np.float32)), "not finite"),
        (update(loss=np.inf), "not finite"),
        (update(loss=-1.7e308), "not finite"),  # sums of such losses would not be
        (update(EIGHT * 100), "its norm 1.18e[+]03 is over the limit 100"),
        (update(EIGHT[:7]), "has 7 values, the plan asks for 8"),
        (update(examples=1001), "claims 1001 examples; 1 to 1000 count"),
        (update(examples=0), "claims 0 examples"),
        (update(encoding="int8"), "not in the encoding float32"),
        (update() + b"x", "61 bytes do not hold 8 values"),
        (b"", "not in the encoding"),
        (bytes(2000), "has 2000 bytes, the plan allows 1000"),
    ],
)
def test_what_must_not_reach_the_sum_is_refused(data, said):
    with pytest.raises(Refused, match=said):
        read_upload(data, TERMS)


def test_masked_uploads_are_not_read():
    with pytest.raises(Refused, match="masked are not read here"):
        read_upload(update(), UploadTerms("masked", 8, 1000, 1.0, 1))


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(1, 50)), max_size=12), st.integers(0, 12))
def test_a_running_sum_is_the_sum_however_it_is_cut(parts, cut):
    summands = [Summand(np.full(4, value, np.float32), weight, weight, 0, float(value)) for value, weight in parts]
    halves = RunningSum(), RunningSum()
    for i, part in enumerate(summands):
        halves[i >= cut].add(part)
    total = RunningSum()
    for one in halves:
        before = one.copy()
        total.merge(RunningSum.decode(one.encode()))
        np.testing.assert_array_equal(before.vector, one.vector)
    expected = sum((value * weight for value, weight in parts), 0)
    assert (total.devices, total.examples) == (len(parts), sum(weight for _, weight in parts))
    assert total.loss == sum(value for value, _ in parts)
    assert total.vector.tolist() == ([expected] * 4 if parts else [])


@pytest.mark.parametrize("wrong", [b"", b"FCS1", bytes(100), RunningSum().encode() + b"x"])
def test_damaged_sums_are_refused(wrong):
    with pytest.raises(Refused, match="damaged"):
        RunningSum.decode(wrong)


# Group commit


class Slow:
    """A store that takes its time, counts its commits, and fails when told to."""

    def __init__(self, where):
        self.store, self.commits, self.fail = open_gateway_store(where), 0, False

    def __getattr__(self, name):
        return getattr(self.store, name)

    def accept(self, *arguments):
        time.sleep(0.02)
        self.commits += 1
        if self.fail == "before":
            raise TryAgain("away")
        answer = self.store.accept(*arguments)
        if self.fail == "after":
            raise TryAgain("gone after it was done")
        return answer


@pytest.fixture
def slow(tmp_path):
    made = []

    def connect():
        made.append(Slow(str(tmp_path / "s.sqlite")))
        store = made[0].store
        for version, state in ((1, RoundState.FORMING), (2, RoundState.RUNNING)):
            assert store.advance(Round("r", "task", 1, state, version, "{}"))
        for device in range(1, 60):
            store.register(Device(device, 1, bytes([device]) * 32, 2**40, 0.0))
        return made[0]

    committer = Committer(connect)
    yield committer, made[0]
    committer.close()


def part(value):
    return Summand(np.full(4, value, np.float32), 1, 1, 0, 0.0)


def upload(committer, device, digest=b"d"):
    return committer.count("r", Contribution(device, digest * 32), part(device))


def totals(committer):
    async def read():
        partials = await committer.call(lambda store: store.partials("r"))
        total = RunningSum()
        for one in partials:
            total.merge(RunningSum.decode(one))
        counted = await committer.call(lambda store: store.contributions("r"))
        return total, [one.device for one in counted], len(partials)

    return read()


def test_uploads_that_wait_share_a_commit(slow):
    committer, store = slow

    async def work():
        answers = await asyncio.gather(*[upload(committer, device) for device in range(1, 51)])
        return answers, *await totals(committer)

    answers, total, counted, partials = asyncio.run(work())
    assert answers == [False] * 50
    assert (total.devices, counted, partials) == (50, list(range(1, 51)), 1)
    assert total.vector.tolist() == [sum(range(1, 51))] * 4
    assert store.commits <= 5


def test_a_repeated_upload_is_answered_and_a_different_one_is_refused(slow):
    committer, _ = slow

    async def work():
        first = await asyncio.gather(upload(committer, 1), upload(committer, 1), upload(committer, 2), upload(committer, 1))
        again = await upload(committer, 1)
        with pytest.raises(GatewayRefusal, match="another upload") as other:
            await upload(committer, 1, b"e")
        mixed = await asyncio.gather(upload(committer, 1, b"e"), upload(committer, 3), return_exceptions=True)
        return first, again, other.value.reason, mixed, await totals(committer)

    first, again, reason, mixed, (total, counted, _) = asyncio.run(work())
    assert sorted(first) == [False, False, True, True]
    assert (again, reason) == (True, pb.OTHER_UPLOAD)
    assert isinstance(mixed[0], GatewayRefusal)
    assert mixed[1] is False
    assert (total.vector.tolist(), counted) == ([6.0] * 4, [1, 2, 3])


@pytest.mark.parametrize("fail", ["before", "after"])
def test_after_a_failure_nothing_is_lost_and_nothing_counts_twice(slow, fail):
    """Whether the store had done it or not: who is told to try again does, and a new sum is begun."""
    committer, store = slow

    async def work():
        assert await upload(committer, 1) is False
        store.fail = fail
        failed = await asyncio.gather(*[upload(committer, device) for device in (2, 3)], return_exceptions=True)
        store.fail = False
        again = await asyncio.gather(*[upload(committer, device) for device in (2, 3, 4)])
        return failed, again, *await totals(committer)

    failed, again, total, counted, partials = asyncio.run(work())
    assert all(isinstance(one, TryAgain) for one in failed)
    assert again == ([True, True, False] if fail == "after" else [False] * 3)
    assert (total.vector.tolist(), counted) == ([10.0] * 4, [1, 2, 3, 4])
    assert partials == 2


def test_late_uploads_are_refused(slow):
    committer, _ = slow

    async def work():
        await committer.call(lambda one: one.advance(Round("r", "task", 1, RoundState.CLOSED, 3, "{}")))
        with pytest.raises(GatewayRefusal, match="the round is over") as late:
            await upload(committer, 1)
        return late.value.reason

    assert asyncio.run(work()) == pb.LATE


def test_admissions_and_notes_are_kept_and_a_defect_ends_nothing(slow):
    committer, _ = slow

    async def work():
        admit = [committer.admit(Admission(device, 1, bytes(16))) for device in (1, 2, 99, 1)]
        verdicts = await asyncio.gather(*admit)
        await asyncio.gather(*[committer.note("r", "report", Note(device, "x", 1.0)) for device in (1, 2)])
        with pytest.raises(TryAgain, match="the gateway failed"):
            await committer.call(lambda store: 1 / 0)
        return [one.problem for one in verdicts], await committer.call(lambda store: store.notes("r", "report"))

    problems, notes = asyncio.run(work())
    assert problems == [None, None, Problem.UNKNOWN, Problem.REPLAYED]
    assert [one.device for one in notes] == [1, 2]


def test_a_store_that_cannot_be_opened_is_told_where_it_is_made():
    with pytest.raises(Refused, match="no such"):
        Committer(lambda: (_ for _ in ()).throw(Refused("no such store")))
    assert not any(thread.name == "gateway-store" and thread.is_alive() for thread in threading.enumerate())


# Limits


def test_a_bucket_gives_a_burst_and_then_its_rate():
    now = [0.0]
    buckets = Buckets(2.0, 3.0, most=2, clock=lambda: now[0])
    for _ in range(3):
        buckets.take("a")
    with pytest.raises(GatewayRefusal) as fast:
        buckets.take("a")
    assert (fast.value.reason, fast.value.retry_after) == (pb.TOO_FAST, 501)
    buckets.take("b")
    now[0] = 0.5
    buckets.take("a")
    with pytest.raises(GatewayRefusal):
        buckets.take("a")
    buckets.take("c")
    assert len(buckets._left) == 2


def test_a_reading_room_seats_so_many_and_is_patient_for_so_long():
    async def work():
        room = ReadingRoom(Limits(reading=2, from_one=1, patience=0.1))
        most, now, said = 0, 0, []

        async def read(address, seconds):
            nonlocal most, now
            try:
                async with room.seat(address):
                    now += 1
                    most = max(most, now)
                    try:
                        await asyncio.sleep(seconds)
                    finally:
                        now -= 1
            except GatewayRefusal as error:
                said.append(error.reason)

        await asyncio.gather(*[read(address, 0.01) for address in "abcabc"])
        assert (most, said) == (2, [])
        await asyncio.gather(read("a", 0.01), read("b", 5.0))
        assert said == [pb.BUSY]
        most = 0
        await asyncio.gather(*[read("a", 0.01) for _ in range(3)])
        assert most == 1
        assert not room._of

    asyncio.run(work())


# Blobs


def test_a_blob_is_what_its_digest_says(tmp_path):
    blobs = Blobs(tmp_path)
    data = RNG.bytes(700_000)
    digest = blobs.put(data)
    assert digest == hashlib.sha256(data).digest() == blobs.put(data)
    assert (blobs.get(digest), blobs.size(digest)) == (data, 700_000)
    assert b"".join(blobs.read(digest, 100, 300_000)) == data[100:300_100]
    assert b"".join(blobs.read(digest, 699_999)) == data[-1:]
    assert max(map(len, blobs.read(digest))) <= 1 << 18
    (tmp_path / "blobs" / digest.hex()).write_bytes(data[:-1])
    with pytest.raises(Refused, match="damaged"):
        blobs.get(digest)
    blobs.remove(digest)
    for call in (lambda: blobs.get(digest), lambda: blobs.size(digest)):
        with pytest.raises(Refused, match="there is no blob"):
            call()
    assert not list((tmp_path / "blobs").iterdir())


def test_an_upload_is_staged_in_order_and_gives_way_to_another(tmp_path):
    blobs, one, other = Blobs(tmp_path), b"1" * 32, b"2" * 32
    assert blobs.stage("u", one, 0, b"") == 0
    assert blobs.stage("u", one, 0, b"abc") == 3
    assert blobs.stage("u", one, 0, b"abc") == 3
    assert blobs.stage("u", one, 5, b"x") == 3
    assert blobs.stage("u", one, 3, b"de") == 5
    assert (blobs.take_staged("u", one), blobs.take_staged("u", other), blobs.take_staged("v", one)) == (b"abcde", b"", b"")
    assert blobs.stage("u", other, 0, b"z") == 1
    assert (blobs.take_staged("u", one), blobs.take_staged("u", other)) == (b"", b"z")
    blobs.sweep(60)
    assert blobs.take_staged("u", other) == b"z"
    blobs.sweep(-60)
    assert blobs.take_staged("u", other) == b""


def test_a_full_disk_is_a_passing_fault(tmp_path, monkeypatch):
    blobs = Blobs(tmp_path)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(TryAgain, match="No space left"):
        blobs.put(b"x")
    assert not list((tmp_path / "blobs").iterdir())
