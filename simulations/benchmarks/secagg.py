"""One round of secure aggregation, every client with its own keys and masks, beside Flower's SecAgg+ primitives.

The work: clients with uniform integer vectors check in, upload once, a fraction drops before the upload, a committee of five
(t = 4, c = 2) screens, certifies and releases, and the sum is compared with the plain one. ``client_ms`` are medians over the
clients: ``keys`` is everything until the plan is accepted, ``other`` copying, packing, hashing and signing. ``server_seconds``
are the coordinator's; checking the cohort and the members' own work stand beside them. Everything runs on one core.

Flower's code serves the legacy API only, so its primitives are called in the order in which its client and workflow call them,
for one client, and for the server on samples that are scaled to the number of calls (``flower_calls``); it has no check of
signatures or proofs that would be left out. Where it is missing its keys are null.

    python -m simulations.benchmarks.secagg --clients 100 --params 1000000 --drop 0.1 --width 16 --json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np

from fedcore.errors import Refused
from fedcore.secagg import client as client_module
from fedcore.secagg.client import Client, split_upload
from fedcore.secagg.coordinator import Coordinator
from fedcore.secagg.crypto import SUITE, Ed25519Key
from fedcore.secagg.journal import MemoryJournal
from fedcore.secagg.masks import WIDTHS, Words, add_masks, add_packed, reduce, word_type, zeros
from fedcore.secagg.member import Member
from fedcore.secagg.messages import CheckIn, Header, Offer, OfferRequest
from fedcore.secagg.neighbours import check_degree, choose_degree
from fedcore.secagg.plan import Policy
from fedcore.secagg.trust import issue_certificate, sign_trust

NOW, END, MODEL = 1_000_000, 1_003_600, bytes(32)
M, T, C = 5, 4, 2


class Stopwatch:
    """Seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    clock = staticmethod(time.perf_counter)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time until the end of the block to ``name``."""
        start = self.clock()
        try:
            yield
        finally:
            self.seconds[name] += self.clock() - start

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time added to ``name``."""

        def wrapped(*arguments: Any) -> Any:
            with self(name):
                return function(*arguments)

        return wrapped


class Round:
    """A committee, the clients and one approved plan."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        n = arguments.clients
        self.width, self.server, self.member = arguments.width, Stopwatch(), Stopwatch()
        degree, least = degree_of(n, arguments.neighbours, arguments.corrupt, arguments.drop)
        policy = Policy(minimum_survivors=arguments.corrupt + 2, corrupt_clients=arguments.corrupt, noise_multiplier=0.0)
        enrolment, keys = Ed25519Key(os.urandom(32)), [Ed25519Key(os.urandom(32)) for _ in range(M)]
        trust = sign_trust(Ed25519Key(os.urandom(32)), "benchmark", enrolment.public, T, C, [key.public for key in keys])
        self.members = {
            a: Member(a, key, trust, policy, MemoryJournal(), os.urandom) for a, key in enumerate(keys, 1)
        }  # fmt: skip
        self.clients = []
        for _ in range(n):
            identity = Ed25519Key(os.urandom(32))
            certificate = issue_certificate(enrolment, "benchmark", identity.algorithm, identity.public, END)
            self.clients.append(Client(identity, certificate, trust, policy, os.urandom))
        request = OfferRequest("benchmark", 1, 1, END).encode()
        offers = tuple(Offer.decode(member.offer(request, NOW)) for member in self.members.values())
        self.header = Header(
            task="benchmark", round=1, epoch=1, expiry=END, clients=n, planned=n, degree=degree, window_survivors=least, members=M,
            threshold=T, corrupt_members=C, corrupt_clients=arguments.corrupt, minimum_survivors=arguments.corrupt + 2,
            bits=self.width, dimension=arguments.params, clipping_norm=1.0, noise_multiplier=0.0, granularity=1.0,
            squared_norm_bound=0, layout=(), suite=SUITE, model_hash=MODEL, offers=offers, signers=tuple(range(1, T + 1)),
        )  # fmt: skip
        check_ins = [CheckIn.decode(client.check_in("benchmark", 1, END)) for client in self.clients]
        with self.server("cohort"):
            self.coordinator = Coordinator(self.header, check_ins, trust, policy, NOW)
        for a in self.header.signers:
            with self.member("approve"):
                approval = self.members[a].approve(self.coordinator.proposal(), NOW)
            with self.server("cohort"):
                self.coordinator.receive_approval(a, approval)
        with self.server("cohort"):
            self.coordinator.plan(NOW)

    def upload(self, index: int, vector: Words) -> tuple[bytes, dict[str, float]]:
        """One client's upload and its milliseconds by kind of work."""
        watch, client = Stopwatch(), self.clients[index]
        invitation = self.coordinator.invitation(index)
        with watch("keys"):
            client.accept(invitation, MODEL, NOW)
        timed = {"add_masks": "masks", "subtract_masks": "masks", "deal": "shares", "seal_box": "boxes"}
        patches = {name: watch.timed(kind, getattr(client_module, name)) for name, kind in timed.items()}
        with mock.patch.multiple(client_module, **patches), watch("upload"):
            data = client.upload(vector).data
        parts = {kind: 1000 * watch.seconds[kind] for kind in ("keys", "masks", "shares", "boxes")}
        total = 1000 * (watch.seconds["keys"] + watch.seconds["upload"])
        return data, {"total": total} | parts | {"other": total - sum(parts.values())}

    def finish(self, uploads: dict[int, bytes]) -> Words:
        """Screen, certify, release, sum and unmask; the coordinator's and the members' time is kept."""
        for index, data in uploads.items():
            with self.server("verify"):
                self.coordinator.receive_upload(index, *split_upload(data))
        steps = (
            ("screen", self.coordinator.screen_request, "receive_screening"),
            ("certify", lambda _: self.coordinator.certify_request(), "receive_certification"),
            ("release", self.coordinator.release_request, "receive_release"),
        )
        for step, request_of, receive in steps:
            for a, member in list(self.members.items())[:T]:
                with self.server("requests"):
                    request = request_of(a)
                with self.member(step):
                    answer = getattr(member, step)(request, NOW)
                with self.server("verify"):
                    getattr(self.coordinator, receive)(a, answer)
        total = zeros(self.header.length, self.width)
        with self.server("sum"):
            for index in self.coordinator.survivors:
                add_packed(total, split_upload(uploads[index])[1], self.width)
        masks = self.server.timed("reconstruct", self.coordinator._masks)
        with mock.patch.object(self.coordinator, "_masks", masks), self.server("unmask"):
            self.coordinator.unmask(total)
        self.server.seconds["unmask"] -= self.server.seconds["reconstruct"]
        return total


def degree_of(clients: int, neighbours: int, corrupt: int, dropout: float) -> tuple[int, int]:
    """(k, D): chosen, or for a given k the least safe D."""
    if not neighbours:
        return choose_degree(clients, corrupt, dropout)
    if neighbours >= clients - 1:
        return clients - 1, 0
    for least in range(1, neighbours // 2 + 1):
        try:
            check_degree(clients, neighbours, least, corrupt)
        except Refused:
            continue
        return neighbours, least
    raise Refused(f"{neighbours} neighbours are not safe against {corrupt} corrupt of {clients} clients")


def ours(arguments: argparse.Namespace) -> dict[str, Any]:
    """A whole round."""
    current = Round(arguments)
    rng = np.random.default_rng(0)
    dropped = set(rng.choice(arguments.clients, round(arguments.drop * arguments.clients), replace=False).tolist())
    expected, uploads, times = zeros(arguments.params, arguments.width), {}, []
    for index in range(arguments.clients):
        if index not in dropped:
            vector = rng.integers(0, 1 << arguments.width, arguments.params, np.uint32, endpoint=False)
            vector = vector.astype(word_type(arguments.width))
            expected += vector
            uploads[index], milliseconds = current.upload(index, vector)
            times.append(milliseconds)
    total = current.finish(uploads)
    reduce(expected, arguments.width)
    server = dict(current.server.seconds)
    parts = {name: server[name] for name in ("verify", "sum", "reconstruct", "unmask")}
    return {
        "exact": bool((total == expected).all()),
        "clients": arguments.clients, "neighbours": current.header.degree, "window_survivors": current.header.window_survivors,
        "dropped": len(dropped),
        "client_ms": {kind: round(statistics.median(t[kind] for t in times), 2) for kind in times[0]},
        "upload_bytes": max(map(len, uploads.values())),
        "client_messages_after_check_in": 1,
        "server_seconds": {"total": round(sum(parts.values()), 3)} | {name: round(value, 3) for name, value in parts.items()},
        "server_seconds_beside": {name: round(server[name], 3) for name in ("cohort", "requests")},
        "member_seconds": {step: round(value / T, 3) for step, value in current.member.seconds.items()},
    }  # fmt: skip


def per_call(function: Callable[[], Any], times: int) -> float:
    """Median seconds of a call."""
    seconds = []
    for _ in range(times):
        start = Stopwatch.clock()
        function()
        seconds.append(Stopwatch.clock() - start)
    return statistics.median(seconds)


def flower(arguments: argparse.Namespace, degree: int, dropped: int) -> dict[str, Any]:
    """Flower's SecAgg+ primitives on the same number of neighbours, dropouts and parameters; modulus 2^32, threshold one half."""
    try:
        from flwr.common import ndarray_to_bytes
        from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
        from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt, generate_shared_key
        from flwr.common.secure_aggregation.ndarrays_arithmetic import parameters_addition, parameters_mod
        from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen, share_keys_plaintext_concat
        from flwr.supercore.primitives.asymmetric import generate_key_pairs, private_key_to_bytes
    except ImportError:
        return {"flower_client_ms": None, "flower_server_seconds": None}
    shares, modulus, shape = degree + 1, 1 << 32, [(arguments.params,)]
    threshold = max(2, round(0.5 * shares))
    others = [generate_key_pairs() for _ in range(degree)]
    vector = [np.random.default_rng(0).integers(0, 1 << arguments.width, arguments.params)]
    upload: list[bytes] = []

    def client() -> None:
        secret, _ = generate_key_pairs()
        second, _ = generate_key_pairs()
        seed = os.urandom(32)
        dealt = create_shares(seed, threshold, shares), create_shares(private_key_to_bytes(secret), threshold, shares)
        masked = parameters_addition(vector, pseudo_rand_gen(seed, modulus, shape))
        for i, (_, public) in enumerate(others):
            key = generate_shared_key(second, public)
            decrypt(key, encrypt(key, share_keys_plaintext_concat(1, 2, dealt[0][i], dealt[1][i])))  # one sent, one received
            masked = parameters_addition(masked, pseudo_rand_gen(generate_shared_key(secret, public), modulus, shape))
        upload[:] = [ndarray_to_bytes(one) for one in parameters_mod(masked, modulus)]

    client_seconds = per_call(client, 3)
    survivors = arguments.clients - dropped
    alive = max(threshold, round(shares * survivors / arguments.clients))
    collected = create_shares(os.urandom(32), threshold, shares)[:alive]
    private = create_shares(private_key_to_bytes(generate_key_pairs()[0]), threshold, shares)[:alive]
    mask = per_call(lambda: parameters_addition(vector, pseudo_rand_gen(os.urandom(32), modulus, shape)), 3)
    secret = generate_key_pairs()[0]
    calls = {
        "combine_seed": (survivors, per_call(lambda: combine_shares(collected), 2)),
        "combine_key": (dropped, per_call(lambda: combine_shares(private), 2) if dropped else 0.0),
        "mask": (survivors + dropped * degree, mask),
        "agree": (dropped * degree, per_call(lambda: generate_shared_key(secret, others[0][1]), 5)),
        "sum": (survivors, per_call(lambda: parameters_addition(vector, vector), 5)),
    }
    return {
        "flower_client_ms": round(1000 * client_seconds, 1),
        "flower_upload_bytes": sum(map(len, upload)),
        "flower_server_seconds": round(sum(count * seconds for count, seconds in calls.values()), 2),
        "flower_calls": {name: [count, round(seconds, 5)] for name, (count, seconds) in calls.items()},
    }


def mask_speed(params: int, width: int) -> float:
    """Milliseconds to expand and add one mask, the floor under everything else."""
    vector = zeros(params, width)
    seeds = [bytes([i]) * 32 for i in range(20)]
    seconds = per_call(lambda: add_masks(vector, seeds), 9)
    return round(1000 * seconds / 20, 3)


def main() -> None:
    """Run once and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--params", type=int, default=1_000_000)
    parser.add_argument("--drop", type=float, default=0.1, help="fraction of the clients that vanish before their upload")
    parser.add_argument("--width", type=int, default=16, choices=WIDTHS)
    parser.add_argument("--neighbours", type=int, default=0, help="0: chosen by the rule of the protocol")
    parser.add_argument("--corrupt", type=int, default=None, help="declared corrupt clients C; default: one in a hundred")
    parser.add_argument("--no-flower", action="store_true", help="leave Flower's primitives out")
    parser.add_argument("--cpu-time", action="store_true", help="the process's CPU time instead of the wall's: for a busy machine")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.cpu_time:
        Stopwatch.clock = staticmethod(time.process_time)
    arguments.corrupt = arguments.clients // 100 if arguments.corrupt is None else arguments.corrupt
    result = ours(arguments)
    result["mask_ms"] = mask_speed(arguments.params, arguments.width)
    if not arguments.no_flower:
        result |= flower(arguments, result["neighbours"], result["dropped"])
    if arguments.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:32} {value}")


if __name__ == "__main__":
    main()
