"""The attacks that read a victim's update from honest members' answers.

Each is refused. The two that would succeed are first shown to, where the one check that stops them is missing, so that these tests
can fail.
"""

import dataclasses

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from secagg_corrupt import certification, listing, release_request
from secagg_world import MODEL, NOW, POLICY, World

from fedcore.errors import Misbehaviour, Refused
from fedcore.secagg.client import split_upload
from fedcore.secagg.crypto import agree, pair_seed
from fedcore.secagg.masks import add_masks, add_packed, subtract_masks, zeros
from fedcore.secagg.member import Member
from fedcore.secagg.messages import (
    Certification,
    CertifyRequest,
    Release,
    Survivors,
)
from fedcore.secagg.shamir import combine, lagrange_at_zero


def recovered(current, victim, releases, views, known=()):
    """The victim's vector, if the members' answers open every mask on it that is not ``known`` already; else None."""
    plan = current.coordinator.plan(NOW)
    words = zeros(plan.header.length, plan.header.bits)
    add_packed(words, split_upload(current.sent[victim])[1], plan.header.bits)
    shares: dict[int, dict[int, bytes]] = {}
    for member, release in releases.items():
        dealer = next(dealer for dealer in release.dealers if dealer.index == victim)
        slots = [victim, *(j for j in plan.graph.neighbours(victim) if j not in views[member])]
        for other, share in zip(slots, dealer.shares, strict=True):
            shares.setdefault(other, {})[member] = share
    seeds = dict(known)
    for other, by_member in shares.items():
        if len(by_member) >= plan.header.threshold:
            members = sorted(by_member)[: plan.header.threshold]
            seeds[other] = combine(lagrange_at_zero(members), [by_member[member] for member in members])
    if set(seeds) != {victim, *plan.graph.neighbours(victim)}:
        return None
    for other, seed in seeds.items():
        (add_masks if other < victim else subtract_masks)(words, [seed])
    return (words & ((1 << plan.header.bits) - 1)).tolist()


# Mixed survivor views: keep the victim in every view, drop each of its neighbours in a different few


class UncertifiedMember(Member):
    """Releases for whatever set of survivors it is shown: there is no certify phase."""

    def _check_certified(self, plan, request):
        pass


def mixed_views(n):
    """For members 1..4: client 0 is in every view, every other client is missing from three."""
    return {a: {0} | {j for j in range(1, n) if j % 4 == a - 1} for a in (1, 2, 3, 4)}


def test_mixed_views_open_the_victim_where_nothing_is_certified():
    world = World(clients=10, member_type=UncertifiedMember)
    current = world.begin()
    current.upload(range(10))
    views = mixed_views(10)
    assert all(len(view) >= POLICY.minimum_survivors for view in views.values())
    releases = {
        a: Release.decode(world.members[a].release(release_request(current, listing(current, view), [], a), NOW))
        for a, view in views.items()
    }
    assert recovered(current, 0, releases, views) == current.vectors[0].tolist()


def test_mixed_views_are_refused():
    """Member 4 is corrupt and certifies everything; no view gets a third signature, so nobody releases for any."""
    world = World(clients=10)
    current = world.begin()
    current.upload(range(10))
    lists = {a: listing(current, view) for a, view in mixed_views(10).items()}
    plan = current.coordinator._agreed[0]
    signed = {a: [certification(world, current, 4, survivors)] for a, survivors in lists.items()}
    for member in (1, 2, 3):
        for a in sorted(lists, key=lambda view, member=member: view != member):  # its own view first
            try:
                answer = world.members[member].certify(CertifyRequest(plan, lists[a]).encode(), NOW)
                signed[a].append(Certification.decode(answer))
            except Misbehaviour as error:
                assert "certified already" in str(error)  # noqa: PT017
    assert sorted(map(len, signed.values())) == [1, 2, 2, 2]
    for member in (1, 2, 3):
        for a, survivors in lists.items():
            for certifications in (signed[a], signed[a] * 3, [one for each in signed.values() for one in each]):
                with pytest.raises(Misbehaviour, match=r"coordinator: .*(3 are needed|another round, plan or set)"):
                    world.members[member].release(release_request(current, survivors, certifications, member), NOW)


# The bridge: declare all honest neighbours of the victim dropped, but one corrupt client keeps the graph connected


class ConnectivityMember(Member):
    """Asks only that the survivors are connected in the mask graph."""

    def _check_survivors(self, plan, survivors):
        alive = {survivor.index for survivor in survivors.clients}
        reached, frontier = set(), {min(alive)}
        while frontier:
            reached |= frontier
            frontier = {j for i in frontier for j in plan.graph.neighbours(i) if j in alive} - reached
        if reached != alive or len(alive) < plan.header.minimum_survivors:
            raise Refused("the survivors are not connected")


BRIDGE_POLICY = dataclasses.replace(POLICY, corrupt_clients=2, minimum_survivors=4)


def bridge(world):
    """A circulant round, its victim, the corrupt neighbour with what it knows, and the survivors declared."""
    current = world.begin(degree=6, window_survivors=2)
    graph = current.coordinator.plan(NOW).graph
    victim = 0
    spy = graph.neighbours(victim)[2]
    world.clients[spy].accept(current.coordinator.invitation(spy), MODEL, NOW)
    known = {spy: world.clients[spy]._accepted.seeds[victim]}
    current.receive(spy, world.clients[spy].upload(current.vectors[spy].copy()).data)
    current.upload(set(range(24)) - {spy})
    alive = set(range(24)) - (set(graph.neighbours(victim)) - {spy})
    return current, victim, known, alive


def test_a_bridge_opens_the_victim_where_connectivity_is_asked_for():
    world = World(clients=24, policy=BRIDGE_POLICY, member_type=ConnectivityMember)
    current, victim, known, alive = bridge(world)
    survivors = listing(current, alive)
    plan = current.coordinator._agreed[0]
    certifications = [
        Certification.decode(world.members[a].certify(CertifyRequest(plan, survivors).encode(), NOW)) for a in (1, 2, 3)
    ]
    releases = {
        a: Release.decode(world.members[a].release(release_request(current, survivors, certifications, a), NOW)) for a in (1, 2, 3)
    }
    views = dict.fromkeys(releases, alive)
    assert recovered(current, victim, releases, views) is None  # the bridge's own seed is missing
    assert recovered(current, victim, releases, views, known) == current.vectors[victim].tolist()


def test_a_bridge_is_refused():
    world = World(clients=24, policy=BRIDGE_POLICY)
    current, _, _, alive = bridge(world)
    survivors = listing(current, alive)
    plan = current.coordinator._agreed[0]
    forged = [certification(world, current, a, survivors) for a in (1, 2, 3, 4)]
    for member in world.members.values():
        with pytest.raises(Misbehaviour, match="coordinator: a window of 3 clients has 0 survivors; at least 2 are needed"):
            member.certify(CertifyRequest(plan, survivors).encode(), NOW)
    with pytest.raises(Misbehaviour, match="a window of 3 clients"):  # nor against certifications, whoever signed them
        world.members[1].release(release_request(current, survivors, forged, 1), NOW)
    current.screen()
    current.certify()  # the true survivors pass
    current.release()
    assert current.total().tolist() == current.plain(range(24))


# What Flower's SecAgg+ falls to


def test_a_victim_cannot_be_active_and_dropped():
    """Its own mask from one list, its pair masks from another: of two lists, whoever certified them, a member answers one."""
    world = World()
    current = world.begin()
    current.upload(range(8))
    active, dropped = listing(current, range(8)), listing(current, range(1, 8))
    for member in (1, 2):
        first, second = (active, dropped) if member == 1 else (dropped, active)
        signed = {hash(s): [certification(world, current, a, s) for a in (2, 3, 4)] for s in (first, second)}
        released = world.members[member].release(release_request(current, first, signed[hash(first)], member), NOW)
        with pytest.raises(Misbehaviour, match="certified already"):
            world.members[member].release(release_request(current, second, signed[hash(second)], member), NOW)
        restarted = world.start_member(member)
        with pytest.raises(Misbehaviour, match="certified already"):
            restarted.release(release_request(current, second, signed[hash(second)], member), NOW)
        assert restarted.release(release_request(current, first, signed[hash(first)], member), NOW) == released
        alive = {survivor.index for survivor in first.clients}
        for dealer in Release.decode(released).dealers:  # of each survivor: its own mask, and those with the dropped only
            assert len(dealer.shares) == 1 + 8 - len(alive)


@pytest.mark.parametrize("indices", [(0, 0, 1, 2, 3), (1, 0, 2, 3), (0, 1, 2, 3, 8), (0, 1, 2, 3, 2**32 - 1), (0, 1), ()], ids=str)
def test_a_list_names_each_client_of_the_cohort_once(indices):
    world = World()
    current = world.begin()
    current.upload(range(8))
    one = listing(current, [0]).clients[0]
    survivors = Survivors(tuple(dataclasses.replace(one, index=index) for index in indices))
    with pytest.raises(Misbehaviour, match=r"coordinator: .*survivors"):
        world.members[1].certify(CertifyRequest(current.coordinator._agreed[0], survivors).encode(), NOW)


def test_a_search_over_32_bit_seeds_is_over_256_bits_here():
    """With seeds of 12 bits the search that broke Flower's opens a mask; over whole seeds it finds none, and every bit matters."""
    target = zeros(32, 16)
    add_masks(target, [(3210).to_bytes(32, "big")])

    def search(masked, template):
        for guess in range(2**12):
            candidate = zeros(32, 16)
            add_masks(candidate, [bytes(a ^ b for a, b in zip(guess.to_bytes(32, "big"), template, strict=True))])
            if (candidate == masked).all():
                return guess
        return None

    assert search(target, bytes(32)) == 3210
    seed = pair_seed(agree(X25519PrivateKey.from_private_bytes(b"e" * 32), b"\x09" + bytes(31)), b"p" * 32, 0, 1)
    real = zeros(32, 16)
    add_masks(real, [seed])
    assert search(real, bytes(32)) is None
    # folded to 32 bits by exclusive or, as Flower does, two seeds that differ can agree; here no single bit may be left out
    for bit in range(256):
        other = zeros(32, 16)
        add_masks(other, [(int.from_bytes(seed, "big") ^ 1 << bit).to_bytes(32, "big")])
        assert (other == real).mean() < 0.2


def test_seeds_of_a_round_are_256_bits_and_uncorrelated():
    world = World(clients=24)
    current = world.begin()
    seeds = []
    for i, client in enumerate(world.clients):
        client.accept(current.coordinator.invitation(i), MODEL, NOW)
        seeds += [seed for j, seed in client._accepted.seeds.items() if j > i]
    assert len(set(seeds)) == len(seeds) == 276
    table = np.unpackbits(np.frombuffer(b"".join(seeds), np.uint8)).reshape(276, 256).astype(float)
    assert np.abs(table.mean(0) - 0.5).max() < 5 * 0.5 / np.sqrt(276)  # each bit is as often 0 as 1
    correlation = np.corrcoef(table.T) - np.eye(256)
    assert np.abs(correlation).max() < 6 / np.sqrt(276)  # and no two go together


def test_a_drop_before_the_upload_costs_nothing_and_committees_may_be_even():
    for committee in [(4, 3, 1), (6, 5, 2), (2, 2, 1)]:
        world = World(*committee)
        current = world.begin()
        current.upload([1, 4, 6, 7])  # the others vanished after check-in
        current.screen()
        current.certify()
        current.release()
        assert current.total().tolist() == current.plain([1, 4, 6, 7])
