"""Must hold 4 and the attribution of 5: whatever is damaged is rejected with its sender's name, and liars are named."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from secagg_world import END, MODEL, NOW, World

from fedcore.errors import Misbehaviour, Refused
from fedcore.secagg.coordinator import Coordinator
from fedcore.secagg.crypto import Ed25519Key
from fedcore.secagg.messages import CheckIn, Offer, Screening
from fedcore.secagg.trust import check_check_in, check_offer, check_trust, issue_certificate, sign_trust


def complete(seed=0):
    """A round up to the certifications, with one client dropped."""
    world = World(seed=seed)
    current = world.begin()
    current.upload(range(7))
    current.screen()
    current.certify()
    return world, current


def flip(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8 % len(data)] ^= 1 << bit % 8
    return bytes(changed)


bits = st.integers(0, 2**20)
WORLD, ROUND = complete()
APPROVED = WORLD.members[1].approve(ROUND.coordinator.proposal(), NOW)
SCREENED = WORLD.members[1].screen(ROUND.coordinator.screen_request(1), NOW)
CERTIFIED = WORLD.members[1].certify(ROUND.coordinator.certify_request(), NOW)
RELEASED = WORLD.members[1].release(ROUND.coordinator.release_request(1), NOW)
# The same keys, and for client 0 the same check-in, before a plan is accepted.
FRESH = World(seed=0)
FRESH.check_ins()
# A round in which clients 3 and 6 (one with a P-256 key) have made uploads that have not arrived.
WAITING = World(seed=20, clients=8)
WAITING_ROUND = WAITING.begin()
UPLOADS = {}
for i in (3, 6):
    WAITING.clients[i].accept(WAITING_ROUND.coordinator.invitation(i), MODEL, NOW)
    UPLOADS[i] = WAITING.clients[i].upload(np.zeros(10, np.uint32)).data


@settings(max_examples=150, deadline=None)
@given(bits)
def test_every_flipped_bit_of_an_invitation_is_the_coordinators(bit):
    """Header and round number, root, approvals, entries with certificates and check-ins, paths."""
    with pytest.raises(Misbehaviour) as caught:
        FRESH.clients[0].accept(flip(ROUND.coordinator.invitation(0), bit), MODEL, NOW)
    assert caught.value.party == "coordinator"


@settings(max_examples=100, deadline=None)
@given(bits, st.sampled_from([0, 3]))
def test_every_flipped_bit_of_a_check_in_names_the_identity_or_is_unreadable(bit, i):
    data = ROUND.coordinator._check_ins[i].encode()
    with pytest.raises(Refused, match=r"identity [0-9a-f]{16}|CheckIn"):
        check_check_in(CheckIn.decode(flip(data, bit)), WORLD.trust, "digits", 3, END)


@settings(max_examples=60, deadline=None)
@given(bits)
def test_every_flipped_bit_of_an_offer_names_the_member_or_is_unreadable(bit):
    data = ROUND.header.offers[1].encode()
    with pytest.raises(Refused, match=r"member \d|Offer"):
        check_offer(Offer.decode(flip(data, bit)), WORLD.trust, 2)


@settings(max_examples=150, deadline=None)
@given(bits, st.sampled_from(sorted(UPLOADS)))
def test_every_flipped_bit_of_an_upload_names_its_client(bit, i):
    """Statement, signature, boxes and vector."""
    data = UPLOADS[i]
    with pytest.raises(Misbehaviour) as caught:
        WAITING_ROUND.receive(i, data[:4] + flip(data[4:], bit))
    assert caught.value.party == f"client {i} ({WAITING.certificates[i].name})"


@settings(max_examples=100, deadline=None)
@given(bits, st.sampled_from(["approval", "screening", "certification", "release"]))
def test_every_flipped_bit_of_a_members_answer_names_it(bit, step):
    answer = {"approval": APPROVED, "screening": SCREENED, "certification": CERTIFIED, "release": RELEASED}[step]
    with pytest.raises(Misbehaviour) as caught:
        getattr(ROUND.coordinator, f"receive_{step}")(1, flip(answer, bit))
    assert caught.value.party == "member 1"


@settings(max_examples=100, deadline=None)
@given(bits)
def test_every_flipped_bit_of_a_release_request_is_the_coordinators(bit):
    """Plan, survivors, certifications, deposits with statements, paths and boxes."""
    with pytest.raises(Misbehaviour) as caught:
        WORLD.members[2].release(flip(ROUND.coordinator.release_request(2), bit), NOW)
    assert caught.value.party == "coordinator"


@settings(max_examples=100, deadline=None)
@given(bits)
def test_a_flipped_bit_of_a_screen_request_is_the_coordinators_or_refuses_the_client(bit):
    """A damaged statement looks like a client's bad one; the answer then is not over what the coordinator has."""
    request = ROUND.coordinator.screen_request(2)
    try:
        answer = WORLD.members[2].screen(flip(request, bit), NOW)
    except Misbehaviour as error:
        party = error.party
    else:
        party = "coordinator" if len(Screening.decode(answer).refused) == 1 else ""
        with pytest.raises(Misbehaviour, match="not over the uploads"):
            ROUND.coordinator.receive_screening(2, answer)
    assert party == "coordinator"


def test_what_is_not_damaged_is_accepted():
    """So that each of the tests above can fail."""
    FRESH.clients[0].accept(ROUND.coordinator.invitation(0), MODEL, NOW)
    for i, data in UPLOADS.items():
        WAITING_ROUND.receive(i, data)
    ROUND.coordinator.receive_approval(1, APPROVED)
    ROUND.coordinator.receive_screening(1, SCREENED)
    ROUND.coordinator.receive_certification(1, CERTIFIED)
    ROUND.coordinator.receive_release(1, RELEASED)
    WORLD.members[2].release(ROUND.coordinator.release_request(2), NOW)


def test_a_stranger_is_not_enrolled():
    world = World(seed=25)
    other = Ed25519Key(b"o" * 32)
    world.certificates[2] = issue_certificate(other, "phones", 1, world.identities[2].public, END + 10)
    world.clients[2] = world.start_client(2)
    with pytest.raises(Refused, match=r"client 2: identity [0-9a-f]{16}: the signature \(certificate\) is not valid"):
        world.begin()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"population": "watches"}, "enrolled in 'watches'"),
        ({"not_after": END - 1}, "expires before"),
        ({"algorithm": 3}, "algorithm 3"),
        ({"algorithm": 2}, "key of 32 bytes"),
    ],
)
def test_certificates_are_for_one_population_time_and_algorithm(changes, message):
    world = World(seed=26)
    parts = {"population": "phones", "algorithm": 1, "public_key": world.identities[2].public, "not_after": END + 10} | changes
    world.certificates[2] = issue_certificate(world.enrolment, **parts)
    world.clients[2] = world.start_client(2)
    with pytest.raises(Refused, match=message):
        world.begin()


def test_the_coordinator_checks_its_own_plan():
    world = World(seed=27)
    header = world.header(world.offers(), minimum_survivors=2)
    with pytest.raises(Refused, match="2 survivors"):
        Coordinator(header, world.check_ins(), world.trust, world.policy, NOW)


def test_answers_from_nobody_are_refused():
    """Member numbers that do not exist, and messages of one member under another's name."""
    world, current = complete(seed=28)
    certification = world.members[1].certify(current.coordinator.certify_request(), NOW)
    for member in (0, 2, 5):
        with pytest.raises(Misbehaviour, match=f"member {member}"):
            current.coordinator.receive_certification(member, certification)


def test_a_trust_bundle_is_signed_by_the_key_that_devices_know():
    world = World(clients=0)
    check_trust(world.trust, world.root.public)
    other = Ed25519Key(b"r" * 32)
    with pytest.raises(Refused, match="trust bundle"):
        check_trust(world.trust, other.public)
    for changes in ({"threshold": 4}, {"population": "watches"}, {"enrolment_key": other.public}):
        with pytest.raises(Refused, match="trust bundle"):
            check_trust(dataclasses.replace(world.trust, **changes), world.root.public)
    with pytest.raises(Refused, match="one key"):
        sign_trust(world.root, "phones", other.public, 3, 1, [other.public, other.public, world.root.public, other.public])
