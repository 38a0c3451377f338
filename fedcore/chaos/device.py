"""A device that trains nothing: ``python -m fedcore.chaos.device FOLDER``.

It keeps the protocol's promises like any other device, with durable state and requests that are repeated until they are answered,
but its updates are known: small multiples of 1/4096 whose weighted sums are exact in float64 in any order. It journals every upload
before it is sent and every acknowledgement when it comes. FOLDER holds ``device.json`` (`Orders`); ``journal.jsonl`` and
``uploads/SHA256`` appear there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcore import durable
from fedcore.chaos.journal import ACKNOWLEDGED, ENDED, MADE, REFUSED, Entry, append
from fedcore.errors import FedcoreError, Refused, TryAgain
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.client import Enrolled, GatewayClient, Requests, enrol
from fedcore.gateway.messages import Enrolment, FleetTrust
from fedcore.gateway.refusals import GatewayRefusal
from fedcore.secagg.keys import IDENTITY, new_signing_key, read_signing_key

__all__ = ["Orders", "known_update", "main"]

_CAPABILITIES = ("accumulate-1", "float32-update", "int8-update", "evaluate-1")
_BLOCK = 256  # numbers of requests that are reserved with one write
_PATIENCE = 10.0  # seconds for an answer
_OVER = {pb.LATE, pb.NO_SUCH_ROUND, pb.OTHER_UPLOAD, pb.NO_SUCH_BLOB, pb.UNUSABLE}
_ENDS = {pb.REVOKED, pb.QUARANTINED, pb.TOKEN_REFUSED}
_SCORE = struct.Struct("<QQd")


@dataclass(frozen=True)
class Orders:
    """What a device is told: its ``number``, gateways (HOST:PORT, one for each visit), an enrolment token, seconds that its clock
    is ahead, and seconds that its work takes at most."""

    number: int
    gateways: tuple[str, ...]
    token: str
    ahead: float = 0.0
    work: float = 0.5

    @classmethod
    def read(cls, file: Path) -> Orders:
        """From JSON."""
        table = json.loads(file.read_text())
        return cls(**(table | {"gateways": tuple(table["gateways"])}))

    def write(self, file: Path) -> None:
        """As JSON, readable by its owner alone: a token is in it."""
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as out:
            json.dump(dataclasses.asdict(self), out)


def known_update(number: int, attempt: int, values: int) -> Any:
    """The update [values], float32, of device ``number`` in the plan's round ``attempt``: multiples of 1/4096 within 1/128."""
    import numpy as np

    steps = (np.arange(values, dtype=np.int64) * 31 + 17 * number + 7 * (attempt % 1009)) % 65 - 32
    return (steps / 4096).astype(np.float32)


class _Device:
    """One device in its folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._orders = folder, Orders.read(folder / "device.json")
        self._rng = random.Random()  # noqa: S311 - spreads visits
        self._next = self._reserved = 0
        (folder / "uploads").mkdir(exist_ok=True)
        self._requests: Requests | None = None

    def run(self) -> None:
        """Work until killed, which may be at any moment.

        Raises:
            GatewayRefusal: the fleet does not want this identity any more.
        """
        while True:
            wait = 0.05
            try:
                self._visit(self._enrolled())
            except GatewayRefusal as refusal:
                if refusal.reason in _ENDS:
                    append(self._folder / "journal.jsonl", Entry(ENDED, text=str(refusal)))
                    raise
                wait = max(0.2, refusal.retry_after / 1000)
                if refusal.reason in {pb.UNKNOWN_DEVICE, pb.EXPIRED}:
                    self._renew()
            except (FedcoreError, OSError) as error:  # a full disk, a gateway that is away: later, the same again
                with contextlib.suppress(OSError):
                    print(f"device {self._orders.number}: {error}", file=sys.stderr, flush=True)
                wait = 0.2
            time.sleep(min(wait, 5.0) * self._rng.uniform(0.5, 1.5))

    def _enrolled(self) -> Requests:
        """The identity's requests; enrols first, as often as it takes."""
        if self._requests is not None:
            return self._requests
        key_file, kept = self._folder / f"{IDENTITY}.key", self._folder / "enrolled.json"
        if not key_file.exists():
            new_signing_key(self._folder, IDENTITY)
        key = read_signing_key(key_file)
        if not kept.exists():
            one = enrol(self._gateway(), self._orders.token, key, timeout=_PATIENCE)
            durable.write(kept, json.dumps([one.enrolment.encode().hex(), one.trust.encode().hex()]).encode(), 0o600)
        enrolment, trust = (bytes.fromhex(text) for text in json.loads(kept.read_text()))
        identity = Enrolled(key, Enrolment.decode(enrolment), FleetTrust.decode(trust))
        self._requests = Requests(identity, self._number, clock=lambda: time.time() + self._orders.ahead)
        return self._requests

    def _visit(self, requests: Requests) -> None:
        """Go on with what is to be uploaded, or ask for work."""
        with contextlib.closing(GatewayClient(self._gateway(), requests, timeout=_PATIENCE)) as client:
            work = self._kept("work.json")
            if not work:
                reply = client.check_in(pb.CheckInBody(runtime="chaos", agent_version="chaos", capabilities=_CAPABILITIES))
                if not reply.HasField("assignment"):
                    time.sleep(min(0.5, reply.wait.retry_after_ms / 1000))
                    return
                work = self._made(requests, client, reply.assignment)
            self._send(client, work)

    def _made(self, requests: Requests, client: GatewayClient, assignment: pb.Assignment) -> dict[str, Any]:
        """The upload for a plan, journaled and kept before it is sent."""
        from fedcore.quantization.wire import Update, decode_model, encode_update

        plan = requests.check_plan(assignment)
        model = next(blob for blob in plan.blobs if blob.name == "model")
        decode_model(client.fetch_whole(assignment.token, model))
        number = self._orders.number
        if plan.upload_encoding == "score":
            data = _SCORE.pack(10 + number, number % 10, 0.5)
        elif plan.upload_encoding == "contribution":
            data = known_update(number, plan.round, plan.values).astype("<f4").tobytes()
        elif plan.upload_encoding in {"float32", "int8"}:
            import numpy as np

            update = Update(known_update(number, plan.round, plan.values), number % 7 + 1, 0.5)
            data = encode_update(update, plan.upload_encoding, np.random.default_rng([number, plan.round]))
        else:
            raise Refused(f"the plan asks for an upload in {plan.upload_encoding!r}, which takes a device that trains")
        time.sleep(self._rng.uniform(0, self._orders.work))
        digest = hashlib.sha256(data).hexdigest()
        durable.write(self._folder / "uploads" / digest, data, 0o600)
        work = {"task": plan.task, "round": plan.round, "digest": digest, "token": assignment.token.hex()}
        append(self._folder / "journal.jsonl", Entry(MADE, plan.task, plan.round, digest))
        durable.write(self._folder / "work.json", json.dumps(work).encode(), 0o600)
        return work

    def _send(self, client: GatewayClient, work: dict[str, Any]) -> None:
        data, event, text = (self._folder / "uploads" / work["digest"]).read_bytes(), ACKNOWLEDGED, ""
        try:
            client.upload(bytes.fromhex(work["token"]), data)
        except GatewayRefusal as refusal:
            if refusal.reason not in _OVER:
                raise
            event, text = REFUSED, str(refusal)
        append(self._folder / "journal.jsonl", Entry(event, work["task"], work["round"], work["digest"], text))
        (self._folder / "work.json").unlink()
        outcome = pb.UPLOADED if event == ACKNOWLEDGED else pb.GAVE_UP
        with contextlib.suppress(GatewayRefusal, TryAgain):
            client.report(pb.ReportBody(token=bytes.fromhex(work["token"]), outcome=outcome))

    def _renew(self) -> None:
        """Show the enrolment to a gateway that does not know it, as after a loss of its store."""
        with (
            contextlib.suppress(FedcoreError, OSError),
            contextlib.closing(GatewayClient(self._gateway(), self._enrolled(), timeout=_PATIENCE)) as client,
        ):
            client.renew()

    def _gateway(self) -> str:
        return self._rng.choice(self._orders.gateways)

    def _number(self) -> int:
        """A number that no request had before; durable before it is given."""
        if self._next >= self._reserved:
            start = self._kept("numbers.json").get("reserved", 0)
            durable.write(self._folder / "numbers.json", json.dumps({"reserved": start + _BLOCK}).encode(), 0o600)
            self._next, self._reserved = start, start + _BLOCK
        self._next += 1
        return self._next

    def _kept(self, name: str) -> dict[str, Any]:
        try:
            return dict(json.loads((self._folder / name).read_text()))
        except FileNotFoundError:
            return {}


def main() -> None:
    """Entry point of the process."""
    try:
        _Device(Path(sys.argv[1])).run()
    except FedcoreError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
