"""What a member promises once it keeps, through kills at every write; what it must forget is gone."""

import contextlib
import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from secagg_world import END, EPOCH, NOW, TASK, World, randomness

from fedcore.errors import Misbehaviour, Refused
from fedcore.secagg import member as member_module
from fedcore.secagg.coordinator import Coordinator
from fedcore.secagg.journal import FileJournal, MemoryJournal
from fedcore.secagg.member import MOST_ROUNDS, Member, rounds_of_a_member
from fedcore.secagg.messages import Approval, Certification, Offer, OfferRequest, Release


class Killed(BaseException):
    """SIGKILL."""


class MortalJournal(MemoryJournal):
    """Kills its process before or after a write, when ``fuse`` runs out; what was written survives."""

    fuse = sys.maxsize

    def write(self, name, record):
        self._tick()
        super().write(name, record)
        self._tick()

    def erase(self, name):
        self._tick()
        super().erase(name)
        self._tick()

    def _tick(self):
        self.fuse -= 1
        if self.fuse < 0:
            raise Killed


@cache
def temptations() -> tuple[tuple[str, bytes], ...]:
    """Requests to member 1 that contradict each other: two plans, two sets of survivors under each, all with what they need.

    Members 2, 3 and 4, more than may be corrupt, approve and certify everything. The worlds have one seed, so member 1's offer
    is the same in all.
    """
    requests = [("offer", OfferRequest(TASK, 1, EPOCH, END).encode())]
    for minimum in (3, 4):
        world = World()
        header = world.header(world.offers(), (1, 2, 3), minimum_survivors=minimum)
        requests.append(("approve", Coordinator(header, world.check_ins(), world.trust, world.policy, NOW).proposal()))
        for count in (8, 7):
            current = World().begin(signers=(2, 3, 4), minimum_survivors=minimum)
            current.upload(range(count))
            current.screen((2, 3, 4))
            current.certify((2, 3, 4))
            requests.append(("certify", current.coordinator.certify_request()))
            requests.append(("release", current.coordinator.release_request(1)))
    return tuple(requests)


READS = {"offer": Offer, "approve": Approval, "certify": Certification, "release": Release}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10), st.integers(0, 3)), min_size=1, max_size=14))
def test_a_member_never_signs_or_releases_two_things_for_one_round(script):
    """Any order of contradicting requests, with a kill before or after any write, and a restart after each kill."""
    journal = MortalJournal()
    world = World(journal=lambda point: journal if point == 1 else MemoryJournal())
    world.offers(members=[1])
    member, answers = world.members[1], {step: set() for step in READS}
    for choice, fuse in script:
        step, request = temptations()[choice]
        journal.fuse = fuse
        try:
            with contextlib.suppress(Misbehaviour):
                answers[step].add(getattr(member, step)(request, NOW))
        except Killed:
            member = world.start_member(1)
    assert all(len(found) <= 1 for found in answers.values())
    read = [READS[step].decode(answer) for step, found in answers.items() for answer in found]
    assert len({message.plan_hash for message in read if not isinstance(message, Offer)}) <= 1
    assert len({message.survivors_hash for message in read if isinstance(message, (Certification, Release))}) <= 1
    if answers["release"]:  # and to anybody who asks again, the same bytes
        journal.fuse = sys.maxsize
        again = {ask(member, step, request) for step, request in temptations() if step == "release"}
        assert again - {None} == answers["release"]


def ask(member, step, request):
    """The answer, or None for a refusal."""
    try:
        return getattr(member, step)(request, NOW)
    except Misbehaviour:
        return None


def test_each_temptation_alone_is_answered():
    """So that the test above can fail: every single request is one that an honest coordinator could make."""
    for step, request in temptations():
        world = World()
        world.offers(members=[1])
        assert ask(world.members[1], step, request) is not None


def secrets_of(member) -> list[bytes]:
    record = next(iter(member._records.values()))
    return [record.box_secret, record.reveal]


@pytest.mark.parametrize("ending", ["release", "expire"])
def test_keys_are_gone_from_the_file_after_release_or_expiry(ending, tmp_path):
    world = World(journal=lambda point: FileJournal(tmp_path / str(point)))
    current = world.begin()
    secrets = secrets_of(world.members[1])

    def on_disk(secret):
        return any(secret in path.read_bytes() for path in (tmp_path / "1").iterdir())

    assert all(on_disk(secret) for secret in secrets)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "1").iterdir()} == {0o600}
    current.upload(range(6))
    current.screen()
    current.certify()
    if ending == "release":
        current.release()
        assert current.total().tolist() == current.plain(range(6))
    else:
        world.members[1].expire(END)
    assert not any(on_disk(secret) for secret in secrets)
    world.journals[1].close()
    world.journals[1] = FileJournal(tmp_path / "1")
    restarted = world.start_member(1)
    if ending == "release":
        request = current.coordinator.release_request(1)
        assert restarted.release(request, NOW) == world.members[1].release(request, NOW)
        released = restarted.release(request, NOW)
        restarted.expire(END)
        assert not on_disk(released)
    with pytest.raises(Misbehaviour, match=r"not open|released already"):
        restarted.screen(current.coordinator.screen_request(1), NOW)


CHILD = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("secagg_world", sys.argv[1])
world_module = importlib.util.module_from_spec(spec)
sys.modules["secagg_world"] = world_module
spec.loader.exec_module(world_module)
from fedcore.secagg.journal import FileJournal, MemoryJournal
from fedcore.secagg.messages import OfferRequest
def journal(point):
    return FileJournal(Path(sys.argv[2])) if point == 1 else MemoryJournal()
world = world_module.World(clients=0, seed=int(sys.argv[3]), journal=journal)
for number in range(1, 1000):
    request = OfferRequest(world_module.TASK, number, world_module.EPOCH, world_module.END).encode()
    print(number, world.members[1].offer(request, world_module.NOW).hex(), flush=True)
"""


def test_kill_nine_forgets_no_answer(tmp_path):
    """A process that answers as fast as it can is killed; another one, with other randomness, repeats each answer it gave."""
    answers: dict[str, str] = {}
    world_file = Path(__file__).with_name("world.py")
    for attempt in range(3):
        command = [sys.executable, "-c", CHILD, str(world_file), str(tmp_path / "journal"), str(attempt)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for count, line in enumerate(process.stdout):
            number, answer = line.split()
            # Another world's key signs each time, so that only what the journal holds can be repeated.
            assert answers.setdefault(number, answer) == answer
            if count == 8 + 13 * attempt:
                os.kill(process.pid, signal.SIGKILL)
                break
        process.wait()
        process.stdout.close()
        assert process.returncode == -signal.SIGKILL
    assert len(answers) >= 35


def test_a_round_number_is_never_used_again():
    world = World()
    world.offers(5)
    member = world.members[1]
    member.expire(END)
    for number in (4, 5):
        with pytest.raises(Misbehaviour, match="never used again"):
            member.offer(OfferRequest(TASK, number, EPOCH, END + 100).encode(), END)
        with pytest.raises(Misbehaviour, match="never used again"):
            world.start_member(1).offer(OfferRequest(TASK, number, EPOCH, END + 100).encode(), END)
    member.offer(OfferRequest(TASK, 6, EPOCH, END + 100).encode(), END)
    member.offer(OfferRequest("another task", 1, EPOCH, END + 100).encode(), END)


def test_a_crash_between_the_two_writes_of_an_expiry_forgets_nothing():
    journal = MortalJournal()
    world = World(journal=lambda point: journal if point == 1 else MemoryJournal())
    world.offers(5)
    for fuse in range(4):
        journal.fuse = fuse
        with pytest.raises(Killed):
            world.start_member(1).expire(END)
    journal.fuse = sys.maxsize
    member = world.start_member(1)
    member.expire(END)
    with pytest.raises(Misbehaviour, match="never used again"):
        member.offer(OfferRequest(TASK, 5, EPOCH, END + 100).encode(), END)


def test_an_offer_is_made_once_and_only_for_a_time_allowed():
    world = World()
    member = world.members[1]
    first = member.offer(OfferRequest(TASK, 1, EPOCH, END).encode(), NOW)
    assert member.offer(OfferRequest(TASK, 1, EPOCH, END).encode(), NOW + 5) == first
    for request, message in [
        (OfferRequest(TASK, 1, EPOCH + 1, END), "another epoch"),
        (OfferRequest(TASK, 1, EPOCH, END + 1), "another epoch or expiry"),
        (OfferRequest(TASK, 2, EPOCH, NOW), "would end"),
        (OfferRequest(TASK, 2, EPOCH, NOW + 24 * 3600 + 1), "would end"),
    ]:
        with pytest.raises(Misbehaviour, match=message):
            member.offer(request.encode(), NOW)


def test_what_a_coordinator_can_make_a_member_keep_is_bounded(monkeypatch):
    world = World()
    monkeypatch.setattr(member_module, "_MOST_OPEN", 2)
    monkeypatch.setattr(member_module, "_MOST_TASKS", 1)
    member = world.members[1]
    for number in (1, 2):
        member.offer(OfferRequest(TASK, number, EPOCH, END).encode(), NOW)
    with pytest.raises(Misbehaviour, match="2 rounds are open"):
        member.offer(OfferRequest(TASK, 3, EPOCH, END).encode(), NOW)
    with pytest.raises(Misbehaviour, match="served 1 tasks"):
        member.offer(OfferRequest("another task", 3, EPOCH, END + 9).encode(), END)


@pytest.mark.parametrize(
    ("committee", "most"), [((3, 3, 2), 10**6), ((4, 3, 1), 666_666), ((5, 4, 2), 666_666), ((3, 2, 0), 666_666)]
)
def test_a_committee_approves_a_million_rounds_at_most(committee, most):
    """Every plan takes t - c honest approvals of the m - c honest members."""
    m, t, c = committee
    assert rounds_of_a_member(World(*committee, clients=0).trust) == most
    assert (m - c) * most <= MOST_ROUNDS * (t - c)


def test_a_member_refuses_more_rounds_than_its_share(monkeypatch):
    monkeypatch.setattr(member_module, "MOST_ROUNDS", 3)  # (3 - 1) / (4 - 1) of them: 2 for each member
    world = World()
    world.begin(1)
    world.members[1].expire(END)  # those that are over count, and a restart does not start anew
    world.members[1] = world.start_member(1)
    world.begin(2)
    with pytest.raises(Misbehaviour, match="2 rounds"):
        world.begin(3)


def test_a_member_needs_its_own_key():
    world = World()
    with pytest.raises(Refused, match="member 2"):
        Member(2, world.member_keys[0], world.trust, world.policy, MemoryJournal(), randomness("other"))
    with pytest.raises(Refused, match="no member 5"):
        Member(5, world.member_keys[0], world.trust, world.policy, MemoryJournal(), randomness("other"))


def test_secrets_are_in_no_text():
    world = World()
    current = world.begin()
    member = world.members[1]
    record = next(iter(member._records.values()))
    for secret in secrets_of(member):
        assert repr(secret)[2:-1] not in repr(record) + repr(member) + repr(current.coordinator) + repr(vars(member))
