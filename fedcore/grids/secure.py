"""SecureGrid: any grid of ours under secure aggregation. What it hands the strategy is a sum; nobody here sees a part of it."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType

from fedcore.errors import ClientFailure, Refused, RoundFailed
from fedcore.flower import ClientGrid, Facts, Gathering, answer_all, check_one_content, from_record, kind_of, only_record
from fedcore.grids.protocol import ask_check_in, check_in_of, invite, upload_of
from fedcore.grids.publish import publish
from fedcore.models import ParameterLayout
from fedcore.privacy.release import Release
from fedcore.quantization.wire import encode_model
from fedcore.secagg.coordinator import Coordinator
from fedcore.secagg.crypto import SUITE
from fedcore.secagg.driver import Committee, MemberLost, SecureRound
from fedcore.secagg.messages import CheckIn, Header, Offer
from fedcore.secagg.neighbours import choose_degree, least_survivors
from fedcore.secagg.participant import Visit, hash_work
from fedcore.secagg.sums import Summation, header_numbers
from fedcore.training.client import RoundTask

__all__ = ["SecureGrid", "Terms"]

_SHARDS = 0x73686172  # purpose of the draw of shards
_MARGIN, _SKEW = 600, 30  # seconds that a round's keys live beyond the wait for its clients, and that clocks may differ
_FOR_CHECK_INS, _FOR_COMMITTEE = 0.2, 0.15  # shares of a round's time: for who answers at all, and to open what came


class InnerGrid(Protocol):
    """What a grid offers to be put under secure aggregation: messages of `grids.protocol` reach its clients."""

    nodes: Sequence[int]
    place: str
    simulated: bool
    observed: Facts

    def get_node_ids(self) -> Iterable[int]: ...

    def client_of(self, node: int) -> int: ...

    @property
    def gathering(self) -> Gathering | None: ...

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Terms:
    """How sums are made. ``corrupt`` clients of a sum of updates may be the coordinator's, ``among_scores`` of a sum of scores;
    ``neighbours`` 0 is chosen for a share
    ``expected_dropout`` of clients that vanish; a cohort is dealt to ``shards`` of equal size by ``seed`` and round."""

    corrupt: int
    among_scores: int
    neighbours: int
    expected_dropout: float
    shards: int
    seed: int


class SecureGrid(ClientGrid):
    """``inner`` under secure aggregation: one reply per shard, made of nothing but the exact sum of its clients.

    With a ``committee`` clients mask what they send and the coordinator sees the sum only. Without one, the same integers are
    added in the clear, for large simulations: same bits. ``task`` names the run towards committee and clients, and is never used
    again. A client that dealt false shares is not asked again (``blamed``, by the start of its identity's hash).
    """

    def __init__(self, inner: InnerGrid, layout: ParameterLayout, terms: Terms, committee: Committee | None, task: str) -> None:
        if committee is None and not inner.simulated:
            raise Refused('secagg.simulate = "arithmetic" would show the coordinator what real clients send; it is for simulations')
        self.mean, self.simulated = terms.shards == 1, inner.simulated
        self.place = f"{inner.place}; {_describe(committee)}"
        self.blind = committee is not None
        self.observed = Facts()
        self.blamed: dict[str, str] = {}
        self._inner, self._layout, self._terms, self._committee, self._task = inner, layout, terms, committee, task
        self._attempts = 0
        # Real clients must not foresee their company: those in league would gather in one shard.
        self._shard_seed = terms.seed if inner.simulated else secrets.randbits(62)

    @property
    def nodes(self) -> Sequence[int]:
        """The clients drawn for a round."""
        return self._inner.nodes

    @nodes.setter
    def nodes(self, clients: Sequence[int]) -> None:
        self._inner.nodes = clients

    @property
    def gathering(self) -> Gathering | None:
        """What gathers the clients of the grid inside."""
        return self._inner.gathering

    @property
    def clients_done(self) -> int:
        """Clients of the current sum whose work is finished."""
        return int(getattr(self._inner, "clients_done", 0))

    def close(self) -> None:
        """Close the clients' grid and the connections to the committee."""
        self._inner.close()
        if self._committee:
            self._committee.close()

    def get_node_ids(self) -> Iterable[int]:
        """The nodes of the clients that take part."""
        return self._inner.get_node_ids()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """One reply per shard whose sum was made; a shard that lost too many clients has none.

        Raises:
            RoundFailed: no shard's sum was made.
            Refused: messages of different content, or whose training configuration asks for no sum of integers.
        """
        self.observed, sent = Facts(), list(messages)
        check_one_content(sent)
        task = RoundTask.from_table(only_record(sent[0], ConfigRecord))
        if not (task.release and task.release.bits):
            raise Refused("secure aggregation adds up integers; the training configuration asks for none")
        replies: list[Message] = []
        failures = []
        for part in self._shards(sent, task):
            try:
                replies += self._masked(part, task, timeout) if self._committee else self._plain(part, timeout)
            except RoundFailed as failure:
                failures.append(failure)
        if not replies:
            raise failures[0]
        return replies

    def _shards(self, sent: Sequence[Message], task: RoundTask) -> list[list[Message]]:
        """The messages by shard: drawn anew every round, so that nobody can choose its company; evaluations are one sum."""
        ordered = sorted(sent, key=self._client)
        if kind_of(sent[0]) == MessageType.EVALUATE or self._terms.shards == 1:
            return [ordered]
        order = np.random.default_rng([self._shard_seed, task.round_number, _SHARDS]).permutation(len(ordered))
        return [[ordered[i] for i in sorted(part)] for part in np.array_split(order, self._terms.shards)]

    def _plain(self, part: Sequence[Message], timeout: float | None) -> list[Message]:
        try:
            return list(self._inner.send_and_receive(part, timeout=timeout))
        finally:
            self.observed = Facts.merge([self.observed, self._inner.observed])

    def _masked(self, part: Sequence[Message], task: RoundTask, timeout: float | None) -> list[Message]:
        """The reply of one shard. A member that stands in the way of an attempt is done without in the next; so is a client that
        dealt false shares, unless another attempt draws new noise, which has to be paid for first."""
        committee = self._made_by
        lost: set[int] = set()
        while True:
            blamed = len(self.blamed)
            try:
                return self._attempt(part, task, timeout, lost)
            except RoundFailed:
                if len(self.blamed) == blamed or (isinstance(task.release, Release) and not self.simulated):
                    raise
            except MemberLost as failure:
                lost.add(failure.member)
                if len(committee.members) - len(lost) < committee.trust.threshold:
                    raise RoundFailed(f"too few members of the committee are left: {failure}") from failure

    def _attempt(self, part: Sequence[Message], task: RoundTask, timeout: float | None, lost: set[int]) -> list[Message]:
        self._attempts += 1
        timeout = 3600.0 if timeout is None else timeout
        whole = min(int(timeout) + _MARGIN, self._made_by.policy.longest_round - _SKEW)
        one = SecureRound(self._made_by, Visit(self._task, self._attempts, int(time.time()) + whole))
        offers = tuple(offer for offer in one.offers() if offer.member not in lost)
        dropped: dict[int, str] = {}
        numbers = header_numbers(_integers(task))
        present = self._check_in(one, part, min(timeout, _FOR_CHECK_INS * whole), dropped)
        corrupt = self._terms.among_scores if kind_of(part[0]) == MessageType.EVALUATE else self._terms.corrupt
        least = max(corrupt + 2, numbers["minimum_survivors"])
        if len(present) < least:
            reason = f"; one of the others: {next(iter(dropped.values()))}" if dropped else ""
            self._observe(dropped)
            raise RoundFailed(f"{len(present)} of {len(part)} clients checked in, {least} are needed{reason}")
        if time.time() > one.visit.expiry - _SKEW:
            raise RoundFailed(f"the check-ins took so long that nothing is left of the {whole} s of the round")
        model = encode_model(self._layout.wire_tensors(from_record(self._layout, only_record(part[0], ArrayRecord))), task.ranges)
        work_hash = hash_work(model, only_record(part[0], ConfigRecord))
        header = self._header({**numbers, "corrupt_clients": corrupt}, offers, one.visit, len(present), work_hash)
        coordinator = one.plan(header, [check_in for _, check_in in present])
        works = [invite(message, one.visit, coordinator.invitation(i)) for i, (message, _) in enumerate(present)]
        vectors, sizes, taken = self._collect(one, coordinator, works, timeout, dropped)
        try:
            total = one.total(coordinator, header, vectors)
        finally:
            self.blamed.update(coordinator.blamed)
            for i, by_member in coordinator.refusals.items():
                if i in vectors and not (coordinator.fixed and i in coordinator.survivors):
                    said = "; ".join(f"member {member}: {reason}" for member, reason in by_member.items())
                    dropped[self._client(works[i])] = f"its upload was refused ({said})"
            self._observe(dropped, [client for i in vectors if (client := self._client(works[i])) not in dropped])
        answer = publish(part[0], self._layout, task, total.astype(np.float64), len(coordinator.survivors), _no_noise)
        facts = dataclasses.replace(answer.facts, bytes_up=sum(sizes), secure=(self._told(one, coordinator, header, sizes, taken),))
        down = sum(len(model) + len(coordinator.invitation(i)) for i in range(len(works)))
        return answer_all([dataclasses.replace(answer, facts=facts)], Facts(bytes_down=down))

    def _observe(self, dropped: Mapping[int, str], survivors: Sequence[int] = ()) -> None:
        """Keep for the operator what no reply tells."""
        told = Facts(tuple(survivors), tuple(sorted(dropped.items())))
        self.observed = Facts.merge([self.observed, told, Facts(dropped=tuple(self._inner.observed.dropped))])

    def _check_in(
        self, one: SecureRound, part: Sequence[Message], timeout: float, dropped: dict[int, str]
    ) -> list[tuple[Message, CheckIn]]:  # fmt: skip
        """The clients that checked in, one identity and one key each; the others are ``dropped`` with the reason."""
        replies = {
            reply.metadata.src_node_id: reply
            for reply in self._inner.send_and_receive([ask_check_in(message, one.visit) for message in part], timeout=timeout)
        }
        present, seen = [], set[bytes]()
        for message in part:
            try:
                check_in = one.check(check_in_of(self._usable(replies.get(message.metadata.dst_node_id))))
                name, marks = check_in.certificate.name, {check_in.certificate.public_key, check_in.key}
                if any(name in blamed for blamed in self.blamed):
                    raise ClientFailure(f"its identity {name} dealt false shares before")
                if marks & seen:
                    raise ClientFailure(f"its identity {name} or its key has checked in already")
                seen |= marks
                present.append((message, check_in))
            except (ClientFailure, Refused) as failure:
                dropped[self._client(message)] = str(failure)
        return present

    def _collect(
        self, one: SecureRound, coordinator: Coordinator, works: Sequence[Message], timeout: float, dropped: dict[int, str]
    ) -> tuple[dict[int, memoryview], list[int], list[float]]:  # fmt: skip
        """By index the packed vectors of all good uploads, the uploads' lengths, and what the clients say it took them."""
        index = {message.metadata.dst_node_id: i for i, message in enumerate(works)}
        vectors: dict[int, memoryview] = {}
        sizes, taken = [], []
        left = one.visit.expiry - time.time() - _SKEW  # what comes later, nobody opens
        left -= _FOR_COMMITTEE * left
        for reply in self._inner.send_and_receive(works, timeout=min(timeout, left)):
            i = index[reply.metadata.src_node_id]
            try:
                upload, milliseconds = upload_of(self._usable(reply))
                vectors[i] = one.receive(coordinator, i, upload)
                sizes.append(len(upload))
                taken.append(milliseconds)
            except (ClientFailure, Refused) as failure:
                dropped[self._client(works[i])] = str(failure)
        for i in index.values() - vectors.keys():
            dropped.setdefault(self._client(works[i]), self._absence)
        return vectors, sizes, taken

    def _header(
        self, numbers: Mapping[str, Any], offers: tuple[Offer, ...], visit: Visit, clients: int, work_hash: bytes
    ) -> Header:  # fmt: skip
        trust = self._made_by.trust
        degree, least = self._degree(clients, numbers["corrupt_clients"])
        signers = [offer.member for offer in offers][: trust.threshold]
        return Header(
            task=visit.task, round=visit.epoch, epoch=visit.epoch, expiry=visit.expiry, clients=clients, degree=degree,
            window_survivors=least, members=len(trust.member_keys), threshold=trust.threshold,
            corrupt_members=trust.corrupt_members, suite=SUITE, model_hash=work_hash,
            offers=offers, signers=tuple(signers), **numbers,
        )  # fmt: skip

    def _degree(self, clients: int, corrupt: int) -> tuple[int, int]:
        """Neighbours of a client, and the survivors that a window of the circle needs."""
        terms = self._terms
        if not terms.neighbours:
            return choose_degree(clients, corrupt, terms.expected_dropout)
        try:
            return min(terms.neighbours, clients - 1), least_survivors(clients, terms.neighbours, corrupt)
        except Refused as error:  # the scenario's number is safe for all clients, not for the few that checked in
            raise RoundFailed(f"{clients} clients checked in: {error}") from error

    def _told(
        self, one: SecureRound, coordinator: Coordinator, header: Header, sizes: Sequence[int], taken: Sequence[float]
    ) -> Mapping[str, Any]:  # fmt: skip
        """What a round's metrics say of one sum; times in milliseconds, bytes per client."""
        return {
            "checked_in": header.clients, "survivors": len(coordinator.survivors), "neighbours": header.degree,
            "bits": header.bits, "upload_bytes": max(sizes), "client_ms": float(np.median(taken)),
            "server_ms": 1000 * sum(one.seconds.values()), "members": list(header.points),
            "silent": {str(point): reason for point, reason in one.silent.items()}, "blamed": dict(coordinator.blamed),
            "refused": dict(Counter(str(member) for found in coordinator.refusals.values() for member in found)),
        }  # fmt: skip

    def _client(self, message: Message) -> int:
        return self._inner.client_of(message.metadata.dst_node_id)

    def _usable(self, reply: Message | None) -> Message:
        if reply is None:
            raise ClientFailure(self._absence)
        if reply.has_error():
            raise ClientFailure(f"its node failed: {reply.error.reason}")
        return reply

    @property
    def _absence(self) -> str:
        return "vanished (cohort.dropout)" if self.simulated else "no reply within cohort.timeout"

    @property
    def _made_by(self) -> Committee:
        if self._committee is None:
            raise RoundFailed("there is no committee")
        return self._committee


def _describe(committee: Committee | None) -> str:
    if committee is None:
        return "the sums of secure aggregation, unmasked"
    where = "operators" if committee.separate else "members in this process, which separates no trust"
    return f"secure aggregation, a committee of {len(committee.members)} {where}"


def _integers(task: RoundTask) -> Summation:
    if task.release is None:
        raise Refused("the training configuration asks for no sum")
    return task.release


def _no_noise(size: int) -> bytes:
    raise RoundFailed(f"a sum of masked contributions has its noise already; {size} random bytes were asked for")
