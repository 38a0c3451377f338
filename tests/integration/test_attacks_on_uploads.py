"""Uploads that are replayed, forged or exchanged, members and dealers that lie: refused, and attributed where a proof exists."""

import dataclasses

import numpy as np
import pytest
from secagg_corrupt import certification, listing, release_request
from secagg_world import MODEL, NOW, World, garbled, randomness, resigned

from fedcore.errors import Misbehaviour, RoundFailed
from fedcore.secagg.client import Client
from fedcore.secagg.crypto import Ed25519Key, seal_box
from fedcore.secagg.messages import (
    RELEASE,
    STATEMENT,
    DealerShares,
    Release,
    ReleaseRequest,
    UploadHead,
)
from fedcore.secagg.shamir import PRIME


def test_the_last_rounds_upload_cannot_be_replayed():
    world = World()
    first = world.begin(1)
    first.upload(range(8))
    second = world.begin(2)
    with pytest.raises(Misbehaviour, match=r"client 0 \([0-9a-f]+\): the upload is for another plan"):
        second.receive(0, first.sent[0])
    second.coordinator._received[0] = first.coordinator._received[0]  # a coordinator that does not mind
    second.upload(range(1, 8))
    second.screen()
    assert set(second.coordinator.refusals) == {0}
    del second.coordinator._received[1]
    with pytest.raises(Misbehaviour, match=r"client 1 .*the upload is that of client 2"):  # nor stand for another client
        second.receive(1, second.sent[2])


def test_forged_and_exchanged_boxes_are_refused():
    """Boxes that the coordinator seals itself, takes from another client, or hands to another member."""
    world = World()
    current = world.begin()
    current.upload(range(8))
    plan = current.coordinator.plan(NOW)
    honest = current.coordinator._deposit(0, 1)
    own = seal_box(plan.header.offers[0].box_key, plan.hash, 0, 1, bytes(33 * 8))
    for box in (own, current.coordinator._deposit(1, 1).box, current.coordinator._deposit(0, 2).box, honest.box[:-1], b""):
        deposit = dataclasses.replace(honest, box=box)
        with pytest.raises(Misbehaviour, match="coordinator: the box of client 0 is not the one that it signed"):
            world.members[1].screen(screen_request(current, [deposit]), NOW)
    # A corrupt client may sign another's box as its own: it is bound to that client and to the member.
    other = current.coordinator._received[1].boxes
    del current.coordinator._received[7]
    current.receive(7, resigned(world, 7, current.sent[7], boxes=other))
    current.screen()
    assert current.coordinator.refusals == {7: dict.fromkeys((1, 2, 3, 4), "its box does not open to as many shares as slots")}


def screen_request(current, deposits) -> bytes:
    from fedcore.secagg.messages import ScreenRequest

    return ScreenRequest(current.coordinator._agreed[0], tuple(deposits)).encode()


def test_a_client_cannot_be_spoken_for():
    """An upload that the coordinator makes up, signed with a key that is not the client's."""
    world = World()
    current = world.begin()
    current.upload(range(7))
    world.identities[7] = Ed25519Key(b"f" * 32)
    forged = world.clients[7].accept(current.coordinator.invitation(7), MODEL, NOW)
    assert forged.hash == current.coordinator.plan(NOW).hash
    data = resigned(world, 7, world.clients[7].upload(np.zeros(10, np.uint32)).data)
    with pytest.raises(Misbehaviour, match=r"client 7 \([0-9a-f]+\): the signature \(upload\) is not valid"):
        current.receive(7, data)


def test_survivors_that_were_not_certified_are_not_released():
    world = World()
    current = world.begin()
    current.upload(range(8))
    survivors = listing(current, range(8))
    good = [certification(world, current, a, survivors) for a in (2, 3, 4)]
    for certifications in (
        [],
        good[:2],
        [good[0], good[0], good[0]],
        [*good[:2], dataclasses.replace(good[2], member=1)],
        [*good[:2], dataclasses.replace(good[2], member=0)],
        [*good[:2], dataclasses.replace(good[2], round=2)],
        [*good[:2], dataclasses.replace(good[2], signature=bytes(64))],
    ):
        with pytest.raises(Misbehaviour, match=r"coordinator: .*(needed|member)"):
            world.members[1].release(release_request(current, survivors, certifications, 1), NOW)
    request = ReleaseRequest.decode(release_request(current, survivors, good, 1))
    for deposits in (request.deposits[:-1], request.deposits[::-1], (*request.deposits, request.deposits[0])):
        with pytest.raises(Misbehaviour, match="deposit"):
            world.members[1].release(dataclasses.replace(request, deposits=deposits).encode(), NOW)
    assert world.members[1].release(request.encode(), NOW)


# Liars


def complete(seed):
    """A round up to the certifications, with one client dropped."""
    world = World(seed=seed)
    current = world.begin()
    current.upload(range(7))
    current.screen()
    current.certify()
    return world, current


def lying(world, release: bytes, change) -> bytes:
    """Member 1's release with ``change`` applied to its first dealer, signed by member 1."""
    message = Release.decode(release)
    dealers = (change(message.dealers[0]), *message.dealers[1:])
    message = dataclasses.replace(message, dealers=dealers)
    return dataclasses.replace(message, signature=world.member_keys[0].sign(RELEASE, message.content())).encode()


def other_share(dealer: DealerShares) -> DealerShares:
    value = (int.from_bytes(dealer.shares[0], "big") + 1) % PRIME
    return dataclasses.replace(dealer, shares=(value.to_bytes(33, "big"), *dealer.shares[1:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_share, "share of slot 0 of client 0"),
        (lambda dealer: dataclasses.replace(dealer, leaves=(bytes(32), *dealer.leaves[1:])), "leaves of client 0"),
        (lambda dealer: dataclasses.replace(dealer, shares=dealer.shares[:-1]), "number of shares of client 0"),
        (lambda dealer: dataclasses.replace(dealer, shares=(*dealer.shares, dealer.shares[0])), "number of shares of client 0"),
        (lambda dealer: dataclasses.replace(dealer, index=1), "once each"),
        (lambda dealer: dataclasses.replace(dealer, index=7), "once each"),
    ],
)
def test_a_lying_member_is_named_and_the_round_goes_on_without_it(change, message):
    world, current = complete(seed=21)
    honest = world.members[1].release(current.coordinator.release_request(1), NOW)
    with pytest.raises(Misbehaviour, match=message) as caught:
        current.coordinator.receive_release(1, lying(world, honest, change))
    assert caught.value.party == "member 1"
    assert set(current.coordinator.blamed) == {"member 1"}
    current.release([2, 3, 4])
    assert current.total().tolist() == current.plain(range(7))


class LyingDealer(Client):
    """Deals shares of other seeds than it masks with and commits to; boxes, roots and signature are in order."""

    def __init__(self, *arguments, lie) -> None:
        super().__init__(*arguments)
        self.lie = lie

    def _head(self, packed, seeds, accepted):
        honest = super()._head(packed, seeds, accepted)
        lied = super()._head(packed, self.lie(seeds), accepted)
        statement = dataclasses.replace(lied.statement, commitments=honest.statement.commitments)
        signature = self._identity.sign(STATEMENT, statement.content())
        return UploadHead(dataclasses.replace(statement, signature=signature), lied.boxes)


FALSE = b"lie" + bytes(29)


def round_with_liar(seed, lie):
    """Clients 6 and 7 drop, client 5 lies."""
    world = World(seed=seed)
    world.clients[5] = LyingDealer(
        world.identities[5], world.certificates[5], world.trust, world.policy, randomness("liar"), lie=lie
    )  # fmt: skip
    current = world.begin()
    current.upload(range(6))
    current.screen()
    assert not current.coordinator.refusals  # nothing of it shows before the release
    current.certify()
    current.release()
    return world, current


@pytest.mark.parametrize(
    "lie",
    [
        lambda seeds: [FALSE, *seeds[1:]],
        lambda seeds: [*seeds[:-1], FALSE],
        lambda seeds: [(2**256).to_bytes(33, "big"), *seeds[1:]],  # a field element that is no secret of 32 bytes
    ],
)
def test_a_lying_dealer_is_named_and_the_round_is_lost(lie):
    world, current = round_with_liar(22, lie)
    masked = current.masked_total()
    before = masked.copy()
    name = world.certificates[5].name
    with pytest.raises(RoundFailed, match=rf"the round is lost.*client 5 \({name}\)"):
        current.coordinator.unmask(masked)
    assert (masked == before).all()
    assert list(current.coordinator.blamed) == [f"client 5 ({name})"]


def test_a_lie_about_a_seed_that_is_not_needed_does_no_harm():
    _, current = round_with_liar(23, lambda seeds: [seeds[0], FALSE, *seeds[2:]])
    assert current.total().tolist() == current.plain(range(6))


def test_one_bad_box_is_screened_out_counted_and_the_round_goes_on():
    world = World(seed=24)
    current = world.begin()
    current.upload(range(7))
    plan = current.coordinator.plan(NOW)
    box = seal_box(plan.header.offers[2].box_key, plan.hash, 6, 3, bytes(33 * 8))  # opens, but is not under its root
    head_boxes = [box if a == 3 else None for a in plan.header.points]
    received = current.coordinator._received.pop(6)
    boxes = tuple(new or old for new, old in zip(head_boxes, received.boxes, strict=True))
    current.receive(6, resigned(world, 6, current.sent[6], boxes=boxes))
    current.screen()
    assert current.coordinator.refusals == {6: {3: "its shares are not those under its signed root"}}
    current.certify()
    assert current.coordinator.survivors == tuple(range(6))
    current.release()
    assert current.total().tolist() == current.plain(range(6))


def test_a_box_that_does_not_open_is_screened_out_too():
    world = World(seed=29)
    current = world.begin()
    current.upload(range(7))
    del current.coordinator._received[2]
    current.receive(2, garbled(world, 2, current.sent[2], 0))
    current.screen()
    assert current.coordinator.refusals == {2: {1: "its box does not open to as many shares as slots"}}
    current.certify()
    current.release()
    assert current.total().tolist() == current.plain([0, 1, 3, 4, 5, 6])
