"""A committee, an enrolment key and clients that the tests of secure aggregation share. No test lives here."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Iterable
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec

from fedcore.privacy.randomness import RandomBytes, derive_key, keystream
from fedcore.secagg.client import Client, split_upload
from fedcore.secagg.coordinator import Coordinator
from fedcore.secagg.crypto import SUITE, EcdsaKey, Ed25519Key
from fedcore.secagg.journal import Journal, MemoryJournal
from fedcore.secagg.masks import Words, add_packed, zeros
from fedcore.secagg.member import Member
from fedcore.secagg.messages import STATEMENT, CheckIn, Header, Offer, OfferRequest, UploadHead
from fedcore.secagg.plan import Policy
from fedcore.secagg.trust import issue_certificate, sign_trust

NOW, END = 1_000_000, 1_003_600
TASK, EPOCH = "digits", 3
MODEL = b"m" * 32
POLICY = Policy(minimum_survivors=3, corrupt_clients=1, noise_multiplier=0.0)


def randomness(*parts: Any) -> RandomBytes:
    return keystream(derive_key("secagg tests", *parts))


class World:
    """m members with in-memory journals and n enrolled clients, every fourth with a P-256 key."""

    def __init__(
        self, m: int = 4, t: int = 3, c: int = 1, clients: int = 8, policy: Policy = POLICY, seed: int = 0,
        member_type: type[Member] = Member, journal: Callable[[int], Journal] = lambda point: MemoryJournal(),
    ) -> None:  # fmt: skip
        random = randomness("world", seed)
        self.root, self.enrolment = Ed25519Key(random(32)), Ed25519Key(random(32))
        self.member_keys = [Ed25519Key(random(32)) for _ in range(m)]
        self.trust = sign_trust(self.root, "phones", self.enrolment.public, t, c, [key.public for key in self.member_keys])
        self.policy, self.seed, self.member_type = policy, seed, member_type
        self.journals = {a: journal(a) for a in range(1, m + 1)}
        self.starts = 0
        self.members = {a: self.start_member(a) for a in self.journals}
        self.identities = [
            EcdsaKey(ec.derive_private_key(1000 + i, ec.SECP256R1())) if i % 4 == 3 else Ed25519Key(random(32))
            for i in range(clients)
        ]  # fmt: skip
        self.certificates = [
            issue_certificate(self.enrolment, "phones", key.algorithm, key.public, END + 10**6) for key in self.identities
        ]
        self.clients = [self.start_client(i) for i in range(clients)]

    def start_member(self, point: int) -> Member:
        """A member on its journal, as after a restart."""
        self.starts += 1
        random = randomness("member", self.seed, point, self.starts)
        return self.member_type(point, self.member_keys[point - 1], self.trust, self.policy, self.journals[point], random)

    def start_client(self, i: int) -> Client:
        return Client(self.identities[i], self.certificates[i], self.trust, self.policy, randomness("client", self.seed, i))

    def offers(self, number: int = 1, members: Iterable[int] | None = None) -> list[Offer]:
        request = OfferRequest(TASK, number, EPOCH, END).encode()
        return [Offer.decode(self.members[a].offer(request, NOW)) for a in (self.members if members is None else members)]

    def check_ins(self) -> list[CheckIn]:
        return [CheckIn.decode(client.check_in(TASK, EPOCH, END)) for client in self.clients]

    def header(self, offers: Collection[Offer], signers: Collection[int] = (), **changes: Any) -> Header:
        """A complete graph without noise, unless ``changes`` say otherwise."""
        points = tuple(offer.member for offer in offers)
        n = len(self.clients)
        header = Header(
            task=TASK, round=next(iter(offers)).round, epoch=EPOCH, expiry=END, clients=n, planned=n, degree=n - 1,
            window_survivors=0,
            members=len(self.trust.member_keys), threshold=self.trust.threshold, corrupt_members=self.trust.corrupt_members,
            corrupt_clients=self.policy.corrupt_clients, minimum_survivors=self.policy.minimum_survivors, bits=16, dimension=10,
            clipping_norm=1.0, noise_multiplier=0.0, granularity=0.01, squared_norm_bound=0, layout=(), suite=SUITE,
            model_hash=MODEL, offers=tuple(offers), signers=tuple(signers) or points[: self.trust.threshold],
        )  # fmt: skip
        return dataclasses.replace(header, **changes)

    def begin(self, number: int = 1, members: Iterable[int] | None = None, **changes: Any) -> Round:
        """Check-in, offers and an approved plan."""
        header = self.header(self.offers(number, members), **changes)
        coordinator = Coordinator(header, self.check_ins(), self.trust, self.policy, NOW)
        for a in header.signers:
            coordinator.receive_approval(a, self.members[a].approve(coordinator.proposal(), NOW))
        coordinator.plan(NOW)
        return Round(self, header, coordinator)


class Round:
    """One round of a world, step by step; each step names who answers."""

    def __init__(self, world: World, header: Header, coordinator: Coordinator) -> None:
        self.world, self.header, self.coordinator = world, header, coordinator
        self.vectors = self.draw_vectors()
        self.sent: dict[int, bytes] = {}

    def draw_vectors(self) -> np.ndarray:
        """Uniform coordinates [n, length]: sums wrap."""
        rng = np.random.default_rng(self.header.round)
        return rng.integers(0, 1 << self.header.bits, (self.header.clients, self.header.length), np.uint32, endpoint=False)

    def upload(self, indices: Iterable[int]) -> None:
        for i in indices:
            self.world.clients[i].accept(self.coordinator.invitation(i), MODEL, NOW)
            self.receive(i, self.world.clients[i].upload(self.vectors[i].copy()).data)

    def receive(self, i: int, data: bytes) -> None:
        self.coordinator.receive_upload(i, *split_upload(data))
        self.sent[i] = data

    def screen(self, members: Iterable[int] | None = None) -> None:
        for a in self.header.points if members is None else members:
            self.coordinator.receive_screening(a, self.world.members[a].screen(self.coordinator.screen_request(a), NOW))

    def certify(self, members: Iterable[int] | None = None) -> None:
        for a in self.header.points if members is None else members:
            self.coordinator.receive_certification(a, self.world.members[a].certify(self.coordinator.certify_request(), NOW))

    def release(self, members: Iterable[int] | None = None) -> None:
        for a in self.header.points if members is None else members:
            self.coordinator.receive_release(a, self.world.members[a].release(self.coordinator.release_request(a), NOW))

    def masked_total(self) -> Words:
        total = zeros(self.header.length, self.header.bits)
        for i in self.coordinator.survivors:
            add_packed(total, split_upload(self.sent[i])[1], self.header.bits)
        return total

    def total(self) -> Words:
        total = self.masked_total()
        self.coordinator.unmask(total)
        return total

    def plain(self, indices: Collection[int]) -> list[int]:
        """The slow twin of the whole protocol: the sum of the survivors' vectors modulo 2^b, in Python integers."""
        columns = zip(*(self.vectors[i].tolist() for i in indices), strict=True)
        return [sum(column) % (1 << self.header.bits) for column in columns]


def resigned(world: World, i: int, data: bytes, **changes: Any) -> bytes:
    """A client's upload with fields of its statement or its boxes exchanged, signed by the client itself."""
    raw, vector = split_upload(data)
    head = UploadHead.decode(raw)
    boxes = changes.pop("boxes", head.boxes)
    changes.setdefault("box_hashes", tuple(hashlib.sha256(box).digest() for box in boxes))
    statement = dataclasses.replace(head.statement, **changes)
    signature = world.identities[i].sign(STATEMENT, statement.content())
    new = UploadHead(dataclasses.replace(statement, signature=signature), boxes).encode()
    return len(new).to_bytes(4, "big") + new + bytes(vector)


def garbled(world: World, i: int, data: bytes, column: int) -> bytes:
    """The same with one box, of the member in this column, that does not open."""
    boxes = list(UploadHead.decode(split_upload(data)[0]).boxes)
    boxes[column] = bytes(len(boxes[column]))
    return resigned(world, i, data, boxes=tuple(boxes))
