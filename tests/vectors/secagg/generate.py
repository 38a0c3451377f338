"""Writes the JSON vectors of secure aggregation beside this file: ``python tests/vectors/secagg/generate.py``.

`build` is a pure function; the test compares what it returns with the files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

HERE = Path(__file__).parent
for name in ("world", "reference"):
    if f"secagg_{name}" not in sys.modules:
        file = HERE.parents[1] / "unit" / "secagg" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"secagg_{name}", file)
        sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[spec.name])

from secagg_reference import hpke_seal  # noqa: E402
from secagg_world import END, EPOCH, MODEL, NOW, TASK, World, randomness  # noqa: E402

from fedcore.secagg import client as client_module  # noqa: E402
from fedcore.secagg.client import split_upload  # noqa: E402
from fedcore.secagg.crypto import EcdsaKey, agree, digest, domain, pair_seed  # noqa: E402
from fedcore.secagg.dealing import commitment_to, share_leaf  # noqa: E402
from fedcore.secagg.encoding import Message  # noqa: E402
from fedcore.secagg.masks import WIDTHS, add_masks, pack, reduce, zeros  # noqa: E402
from fedcore.secagg.merkle import MerkleTree, leaf_hash  # noqa: E402
from fedcore.secagg.messages import (  # noqa: E402
    APPROVAL,
    CERTIFICATE,
    CERTIFICATION,
    CHECK_IN,
    OFFER,
    RELEASE,
    SCREENING,
    STATEMENT,
    TRUST,
    Approval,
    Certification,
    CertifyRequest,
    CheckIn,
    MetricBlock,
    Offer,
    OfferRequest,
    Release,
    Screening,
    UploadHead,
)
from fedcore.secagg.neighbours import Graph, choose_degree, circle_of  # noqa: E402
from fedcore.secagg.shamir import combine, lagrange_at_zero, split  # noqa: E402

Json = dict[str, Any]


def build() -> dict[str, Json]:
    """All vectors by the name of their file."""
    return {
        "primitives": {
            "domain": domain("pair seed").hex(), "pair_seeds": pair_seeds(), "signatures": signatures(), "merkle": merkle(),
        },
        "masks": {"masks": masks(), "packed": packed()},
        "shares": shares(),
        "circle": circle(),
        "round": transcript(),
    }  # fmt: skip


def plain(value: Any) -> Any:
    """A message or value as JSON: bytes in hexadecimal, messages as objects of their fields."""
    if isinstance(value, Message):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, bytes):
        return value.hex()
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def pair_seeds() -> list[Json]:
    found = []
    for i, j, private, other in [(0, 1, b"a" * 32, b"b" * 32), (4464, 3, b"c" * 32, b"d" * 32)]:
        public = X25519PrivateKey.from_private_bytes(other).public_key().public_bytes_raw()
        shared = agree(X25519PrivateKey.from_private_bytes(private), public)
        seed = pair_seed(shared, b"p" * 32, i, j)
        found.append(
            {"i": i, "j": j, "private_i": private.hex(), "public_j": public.hex(), "shared": shared.hex(),
             "plan_hash": (b"p" * 32).hex(), "seed": seed.hex(), "commitment": commitment_to(seed).hex()}
        )  # fmt: skip
    return found


def signatures() -> list[Json]:
    world = World(clients=4)
    ecdsa = world.identities[3]
    assert isinstance(ecdsa, EcdsaKey)
    return [
        {"algorithm": key.algorithm, "public": key.public.hex(), "purpose": "upload", "content": b"content".hex(),
         "signature": key.sign("upload", b"content").hex()}
        for key in (world.identities[0], ecdsa)
    ]  # fmt: skip


def merkle() -> list[Json]:
    found = []
    for size in (1, 2, 3, 6, 7):
        leaves = [bytes([i]) * i for i in range(size)]
        tree = MerkleTree([leaf_hash(leaf) for leaf in leaves])
        paths = [[node.hex() for node in tree.path(i)] for i in range(size)]
        found.append({"leaves": [leaf.hex() for leaf in leaves], "root": tree.root.hex(), "paths": paths})
    return found


def masks() -> list[Json]:
    found = []
    for bits in WIDTHS:
        vector = zeros(40_000, bits)
        add_masks(vector, [bytes(range(32))])
        reduce(vector, bits)
        found.append(
            {"bits": bits, "seed": bytes(range(32)).hex(), "length": 40_000, "first": vector[:9].tolist(),
             "last": vector[-3:].tolist(), "sha256_of_packed": hashlib.sha256(pack(vector, bits)).hexdigest()}
        )  # fmt: skip
    return found


def packed() -> list[Json]:
    values = [0, 1, 65535, 4660, 43981]
    return [{"bits": bits, "values": values, "packed": pack(np.array(values, zeros(1, bits).dtype), bits).hex()} for bits in WIDTHS]


def shares() -> Json:
    draws: list[bytes] = []
    stream = randomness("vectors", "shares")

    def recording(size: int) -> bytes:
        draws.append(stream(size))
        return draws[-1]

    seeds = [b"\x01" * 32, b"\xff" * 32]
    columns = split(seeds, 3, [1, 2, 4, 5], recording)
    coefficients = lagrange_at_zero([1, 4, 5])
    assert combine(coefficients, [columns[c][0] for c in (0, 2, 3)]) == seeds[0]
    return {
        "threshold": 3, "points": [1, 2, 4, 5], "secrets": [seed.hex() for seed in seeds], "random": [draw.hex() for draw in draws],
        "shares_by_point": [[share.hex() for share in column] for column in columns],
        "lagrange_at_zero": {"points": [1, 4, 5], "coefficients": [str(one) for one in coefficients]},
        "leaf": {"plan_hash": (b"p" * 32).hex(), "client": 5, "member": 4, "slot": 1, "share": columns[2][1].hex(),
                 "leaf_hash": share_leaf(b"p" * 32, 5, 4, 1, columns[2][1]).hex()},
    }  # fmt: skip


def circle() -> Json:
    seed = bytes(range(32))
    graph = Graph(seed, 140, 6, 2)
    rules = [(1000, 10, 0.1), (1000, 50, 0.3), (1000, 100, 0.3), (128, 5, 0.3)]
    return {
        "seed": seed.hex(), "clients": 140, "degree": 6, "circle": circle_of(seed, 140),
        "neighbours": {str(i): list(graph.neighbours(i)) for i in (0, 77, 139)},
        "rule": [{"clients": n, "corrupt": c, "dropout": d, "k_and_D": list(choose_degree(n, c, d))} for n, c, d in rules],
    }  # fmt: skip


def transcript() -> Json:
    """One round: four clients, three of four members approve, client 2 drops after the plan; boxes by fixed ephemeral keys."""
    draws: dict[str, list[str]] = {}

    def recorded(world: World) -> None:
        for i, client in enumerate(world.clients):
            client._random = recording(f"client {i}", client._random)
        for a, member in world.members.items():
            member._random = recording(f"member {a}", member._random)

    def recording(who: str, source: Any) -> Any:
        def random(size: int) -> bytes:
            draws.setdefault(who, []).append(source(size).hex())
            return bytes.fromhex(draws[who][-1])

        return random

    def seal(public: bytes, plan_hash: bytes, client: int, member: int, content: bytes) -> bytes:
        ephemeral = digest("vector ephemeral", bytes([client, member]))
        info = domain("box") + plan_hash + client.to_bytes(4, "big") + bytes([member])
        box = hpke_seal(public, info, b"", content, ephemeral)
        boxes.append({"client": client, "member": member, "ephemeral": ephemeral.hex(), "info": info.hex(),
                      "content": content.hex(), "box": box.hex()})  # fmt: skip
        return box

    boxes: list[Json] = []
    world = World(clients=4)
    recorded(world)
    current = world.begin(signers=(1, 2, 4), dimension=7, layout=(MetricBlock("loss", 1),))
    coordinator = current.coordinator
    with mock.patch.object(client_module, "seal_box", seal):
        current.upload([0, 1, 3])
    plan = coordinator.plan(NOW)
    message_of: dict[str, tuple[str, Message]] = {"trust": (TRUST, world.trust)}
    for i, check_in in enumerate(coordinator._check_ins):
        message_of[f"certificate {i}"] = (CERTIFICATE, check_in.certificate)
        message_of[f"check-in {i}"] = (CHECK_IN, CheckIn.decode(check_in.encode()))
    for offer in current.header.offers:
        message_of[f"offer {offer.member}"] = (OFFER, Offer.decode(offer.encode()))
    for a in (1, 2, 4):
        message_of[f"approval {a}"] = (APPROVAL, Approval.decode(world.members[a].approve(coordinator.proposal(), NOW)))
    for i, data in current.sent.items():
        message_of[f"statement {i}"] = (STATEMENT, UploadHead.decode(split_upload(data)[0]).statement)
    requests = {}
    for a in world.members:
        requests[f"screen request {a}"] = coordinator.screen_request(a).hex()
        answer = world.members[a].screen(coordinator.screen_request(a), NOW)
        coordinator.receive_screening(a, answer)
        message_of[f"screening {a}"] = (SCREENING, Screening.decode(answer))
    requests["certify request"] = coordinator.certify_request().hex()
    for a in world.members:
        answer = world.members[a].certify(coordinator.certify_request(), NOW)
        coordinator.receive_certification(a, answer)
        message_of[f"certification {a}"] = (CERTIFICATION, Certification.decode(answer))
    for a in world.members:
        requests[f"release request {a}"] = coordinator.release_request(a).hex()
        answer = world.members[a].release(coordinator.release_request(a), NOW)
        coordinator.receive_release(a, answer)
        message_of[f"release {a}"] = (RELEASE, Release.decode(answer))
    survivors = CertifyRequest.decode(coordinator.certify_request()).survivors
    return {
        "now": NOW, "model_hash": MODEL.hex(), "random": draws,
        "offer_request": OfferRequest(TASK, 1, EPOCH, END).encode().hex(),
        "header": plain(current.header), "header_bytes": current.header.encode().hex(),
        "leaves": [entry.hex() for entry in coordinator._entries], "root": plan.root.hex(),
        "plan_hash": plan.hash.hex(), "seed": plan.seed.hex(), "plan": coordinator._agreed[0].encode().hex(),
        "proposal": coordinator.proposal().hex(), "invitations": {str(i): coordinator.invitation(i).hex() for i in range(4)},
        "vectors": {str(i): current.vectors[i].tolist() for i in current.sent}, "boxes": boxes,
        "uploads": {str(i): data.hex() for i, data in current.sent.items()},
        "signed": {name: {"purpose": purpose, "content": message.content().hex(), "bytes": message.encode().hex()}
                   for name, (purpose, message) in message_of.items()},
        "fields": {name: plain(message_of[name][1])
                   for name in ("trust", "check-in 3", "offer 1", "approval 1", "statement 0", "release 1")},
        "requests": requests,
        "survivors": plain(survivors), "survivors_hash": survivors.hash.hex(),
        "masked_total": current.masked_total().tolist(), "total": current.total().tolist(),
    }  # fmt: skip


def rendered(vectors: Json) -> str:
    """The text of one file."""
    return json.dumps(vectors, indent=1) + "\n"


if __name__ == "__main__":
    for stem, vectors in build().items():
        (HERE / f"{stem}.json").write_text(rendered(vectors))
