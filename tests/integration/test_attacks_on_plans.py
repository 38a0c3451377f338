"""A coordinator that lies about keys, committees and plans, against the real members and clients."""

import dataclasses

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from secagg_corrupt import listing
from secagg_world import END, EPOCH, MODEL, NOW, POLICY, TASK, World, randomness

from fedcore.errors import Misbehaviour, Refused
from fedcore.secagg.client import Client
from fedcore.secagg.coordinator import Coordinator
from fedcore.secagg.messages import (
    APPROVAL,
    CHECK_IN,
    Approval,
    CertifyRequest,
    CheckIn,
    Entry,
    Invitation,
    Link,
    Plan,
    Proposal,
)


def with_key(world, check_in, key, signer=None):
    """A check-in with another key; signed only if somebody signs it."""
    changed = dataclasses.replace(check_in, key=key)
    return dataclasses.replace(changed, signature=signer.sign(CHECK_IN, changed.content())) if signer else changed


def test_a_swapped_key_is_refused_by_members_and_clients():
    """The coordinator puts a key of its own in the place of client 1's, to compute its masks with the victim."""
    world = World()
    header = world.header(world.offers())
    check_ins = world.check_ins()
    mine = X25519PrivateKey.from_private_bytes(b"c" * 32).public_key().public_bytes_raw()
    swapped = [check_ins[0], with_key(world, check_ins[1], mine), *check_ins[2:]]
    for member in (1, 2, 3):
        with pytest.raises(Misbehaviour, match=r"coordinator: client 1: identity [0-9a-f]+: the signature \(client check-in\)"):
            world.members[member].approve(Proposal(header, tuple(swapped)).encode(), NOW)
    world = World()
    current = world.begin()
    invitation = Invitation.decode(current.coordinator.invitation(0))
    link = invitation.neighbours[0]
    entry = Entry.decode(link.entry)
    forged = Entry(1, with_key(world, entry.check_in, mine)).encode()
    neighbours = (Link(forged, link.path), *invitation.neighbours[1:])
    with pytest.raises(Misbehaviour, match="coordinator: client 1 is not in the cohort"):
        world.clients[0].accept(dataclasses.replace(invitation, neighbours=neighbours).encode(), MODEL, NOW)


@pytest.mark.parametrize("point", [bytes(32), b"\x01" + bytes(31), (2**255 - 20).to_bytes(32, "little")])
def test_keys_of_small_order_are_refused(point):
    """A corrupt client's own, properly signed: its masks with everybody would be known to all."""
    world = World()
    header = world.header(world.offers())
    check_ins = world.check_ins()
    check_ins[2] = with_key(world, check_ins[2], point, world.identities[2])
    for member in (1, 2, 3):
        with pytest.raises(Misbehaviour, match=r"client 2: .*small order"):
            world.members[member].approve(Proposal(header, tuple(check_ins)).encode(), NOW)
    # Were the members to let it pass, each client still refuses the plan.
    world, approved = corrupt_committee_plan(check_ins, header)
    with pytest.raises(Misbehaviour, match="client 2: a key of small order"):
        world.clients[0].accept(approved, MODEL, NOW)


def corrupt_committee_plan(check_ins, header):
    """The invitation of client 0 to a plan that all members sign unchecked; the world's secrets are those of `World`."""
    from fedcore.secagg.merkle import MerkleTree, leaf_hash
    from fedcore.secagg.neighbours import Graph
    from fedcore.secagg.plan import hash_plan

    world = World()
    world.offers()
    world.check_ins()
    check_ins = [world.clients[0]._open[1], *check_ins[1:]]
    entries = [Entry(i, check_in).encode() for i, check_in in enumerate(check_ins)]
    tree = MerkleTree([leaf_hash(entry) for entry in entries])
    plan_hash = hash_plan(header, tree.root)
    approvals = []
    for a in header.signers:
        parts = (a, plan_hash, next(iter(world.members[a]._records.values())).reveal)
        approvals.append(Approval(*parts, world.member_keys[a - 1].sign(APPROVAL, Approval(*parts, bytes(64)).content())))
    links = [Link(entry, tree.path(i)) for i, entry in enumerate(entries)]
    neighbours = Graph(b"", len(entries), len(entries) - 1, 0).neighbours(0)
    invitation = Invitation(Plan(header, tree.root, tuple(approvals)), links[0], tuple(links[j] for j in neighbours))
    return world, invitation.encode()


def test_one_identity_cannot_be_two_clients():
    """Two check-ins of one corrupt identity, with different keys."""
    world = World()
    header = world.header(world.offers())
    check_ins = world.check_ins()
    again = CheckIn.decode(world.start_client(4).check_in(TASK, EPOCH, END))
    check_ins[5] = with_key(world, again, check_ins[5].key, world.identities[4])
    with pytest.raises(Misbehaviour, match="client 5: it has the identity of client 4"):
        world.members[1].approve(Proposal(header, tuple(check_ins)).encode(), NOW)


def test_a_check_in_for_another_epoch_is_refused():
    world = World()
    header = world.header(world.offers())
    check_ins = world.check_ins()
    check_ins[1] = CheckIn.decode(world.start_client(1).check_in(TASK, EPOCH - 1, END))
    with pytest.raises(Misbehaviour, match=r"client 1: .*epoch 2"):
        world.members[1].approve(Proposal(header, tuple(check_ins)).encode(), NOW)


# Plans


def test_clients_and_members_cannot_be_shown_different_plans():
    """The members approve one header, the clients are shown another; and back, the members are shown that of the clients."""
    world = World()
    current = world.begin(minimum_survivors=5)
    invitation = Invitation.decode(current.coordinator.invitation(0))
    weaker = dataclasses.replace(current.header, minimum_survivors=3)
    plan = dataclasses.replace(invitation.plan, header=weaker)
    with pytest.raises(Misbehaviour, match=r"coordinator: the approval of member 1: it is for another plan"):
        world.clients[0].accept(dataclasses.replace(invitation, plan=plan).encode(), MODEL, NOW)
    current.upload(range(8))
    survivors = listing(current, range(4))
    with pytest.raises(Misbehaviour, match="another plan"):
        world.members[1].certify(CertifyRequest(plan, survivors).encode(), NOW)
    check_ins = current.coordinator._check_ins
    with pytest.raises(Misbehaviour, match="another plan for round 1"):
        world.members[1].approve(Proposal(weaker, check_ins).encode(), NOW)


def test_two_sets_of_signers_share_an_honest_one():
    """Plans by {1, 2, 3} and by {2, 3, 4}: with at most one of them corrupt, some honest member is asked for both."""
    world = World()
    offers, check_ins = world.offers(), tuple(world.check_ins())
    first, second = (Proposal(world.header(offers, signers), check_ins) for signers in ((1, 2, 3), (2, 3, 4)))
    for a in (1, 2, 3):
        world.members[a].approve(first.encode(), NOW)
    for a in (2, 3):
        with pytest.raises(Misbehaviour, match="approved already"):
            world.members[a].approve(second.encode(), NOW)
    world.members[4].approve(second.encode(), NOW)


def test_the_seed_cannot_be_ground():
    """Before everything else is fixed no honest reveal is known; afterwards another cohort, order or number is refused, and a
    corrupt signer cannot exchange its own reveal."""
    world = World()
    offers, check_ins = world.offers(), world.check_ins()
    header = world.header(offers)
    shown = b"".join(offer.encode() for offer in offers)
    approval = Approval.decode(world.members[1].approve(Proposal(header, tuple(check_ins)).encode(), NOW))
    assert approval.reveal not in shown
    for other in (
        Proposal(header, tuple(reversed(check_ins))),
        Proposal(dataclasses.replace(header, minimum_survivors=4), tuple(check_ins)),
        Proposal(dataclasses.replace(header, model_hash=b"n" * 32), tuple(check_ins)),
    ):
        with pytest.raises(Misbehaviour, match="approved already"):
            world.members[1].approve(other.encode(), NOW)
    coordinator = Coordinator(header, check_ins, world.trust, world.policy, NOW)
    for a in (1, 2):
        coordinator.receive_approval(a, world.members[a].approve(coordinator.proposal(), NOW))
    parts = (3, coordinator._hash, b"chosen after the others said so" + b"!")
    signature = world.member_keys[2].sign(APPROVAL, Approval(*parts, bytes(64)).content())
    with pytest.raises(Misbehaviour, match="member 3: its reveal is not the one that was offered"):
        coordinator.receive_approval(3, Approval(*parts, signature).encode())
    plan = Plan(header, coordinator._tree.root, (*coordinator._approvals.values(), Approval(*parts, signature)))
    invitation = Invitation(plan, coordinator._link(0), tuple(coordinator._link(j) for j in range(1, 8))).encode()
    with pytest.raises(Misbehaviour, match="approval of member 3: its reveal"):
        world.clients[0].accept(invitation, MODEL, NOW)


def test_another_committee_than_the_pinned_one_is_refused():
    """Committees of the coordinator's own: other keys, other thresholds; for clients and for members."""
    theirs = World(seed=1)
    current = theirs.begin()
    own = World(seed=2)
    victim = Client(own.identities[0], own.certificates[0], own.trust, own.policy, randomness("victim"))
    victim.check_in(TASK, EPOCH, END)
    with pytest.raises(Misbehaviour, match=r"coordinator: .*the offer of member 1: the signature \(offer\) is not valid"):
        victim.accept(current.coordinator.invitation(0), MODEL, NOW)
    for committee in [(3, 2, 0), (5, 4, 2)]:
        other = World(*committee, seed=2).begin()
        victim.check_in(TASK, EPOCH, END)
        with pytest.raises(Misbehaviour, match=r"names a committee of \(m, t, c\)"):
            victim.accept(other.coordinator.invitation(0), MODEL, NOW)
        with pytest.raises(Misbehaviour, match=r"names a committee of \(m, t, c\)"):
            own.members[1].approve(other.coordinator.proposal(), NOW)


@pytest.mark.parametrize(("m", "t", "c"), [(3, 2, 1), (4, 2, 1), (5, 3, 2), (3, 4, 0), (3, 1, 1), (2, 1, 0)])
def test_committees_that_could_split_are_refused(m, t, c):
    with pytest.raises(Refused, match="not safe"):
        World(m, t, c, clients=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corrupt_clients": 0}, "allows for 0 corrupt clients; at least 1"),
        ({"minimum_survivors": 2}, "minimum of 2 survivors is not between 3 and 8"),
        ({"corrupt_clients": 5, "minimum_survivors": 6}, "minimum of 6 survivors is not between 7 and 8"),
        ({"degree": 4, "window_survivors": 0}, "4 neighbours of whom 0 must survive"),
        ({"degree": 4, "window_survivors": 1, "corrupt_clients": 2, "minimum_survivors": 4}, "could let 2 corrupt"),
        ({"degree": 3, "window_survivors": 1}, "3 neighbours"),
        ({"window_survivors": 1}, "no windows"),
        ({"noise_multiplier": 0.5}, "granularity is 0.01"),
        ({"suite": 2}, "suite 2 is not known"),
        ({"bits": 8}, "8 bits"),
        ({"dimension": 2**32 - 1}, "4294967295 values"),
        ({"squared_norm_bound": 3}, "must be 0"),
        ({"granularity": 0.0}, "must be positive"),
        ({"clients": 9, "planned": 9, "degree": 8}, "for 9 clients, the cohort has 8"),
        ({"signers": (1, 2)}, "exactly 3 members"),
        ({"signers": (1, 2, 3, 4)}, "exactly 3 members"),
        ({"signers": (1, 1, 2)}, "exactly 3 members"),
        ({"signers": (1, 3, 2)}, "exactly 3 members"),
        ({"round": 2}, "for another round"),
        ({"expiry": END + 1}, "for another round"),
        ({"expiry": NOW}, "not within"),
    ],
    ids=str,
)
def test_plans_below_a_floor_are_refused_by_members(changes, message):
    world = World()
    header = world.header(world.offers(), **changes)
    with pytest.raises(Misbehaviour, match=message) as caught:
        world.members[1].approve(Proposal(header, tuple(world.check_ins())).encode(), NOW)
    assert caught.value.party == "coordinator"


def test_a_client_has_a_policy_of_its_own():
    """The committee may accept what this client does not."""
    world = World()
    current = world.begin()
    for policy, message in [
        (dataclasses.replace(POLICY, noise_multiplier=0.5), "noise multiplier 0 is below the 0.5"),
        (dataclasses.replace(POLICY, minimum_survivors=5), "minimum of 3 survivors"),
        (dataclasses.replace(POLICY, corrupt_clients=2), "at least 2 are demanded"),
        (dataclasses.replace(POLICY, longest_round=60), "not within 60 s"),
    ]:
        strict = Client(world.identities[0], world.certificates[0], world.trust, policy, randomness("strict"))
        strict._open = world.clients[0]._open
        with pytest.raises(Misbehaviour, match=message):
            strict.accept(current.coordinator.invitation(0), MODEL, NOW)
