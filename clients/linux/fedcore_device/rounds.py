"""One round on a device: from an assignment to an answered upload. Every step may be repeated after a crash."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedcore.errors import ClientFailure, FedcoreError, Refused, TryAgain
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.client import GatewayClient, Requests
from fedcore.gateway.plan import to_table
from fedcore.gateway.refusals import GatewayRefusal
from fedcore.portable.signature import SIGNATURE, check_step_signature
from fedcore.secagg.committee_wire import one_line
from fedcore_device.engines import Engines, graph_of
from fedcore_device.environment import Environment
from fedcore_device.native import onnxruntime_here
from fedcore_device.policy import Policy
from fedcore_device.round_model import fetch_model, named_blobs
from fedcore_device.state import State, Work, write_durably
from fedcore_device.training import train_in_child

__all__ = ["CAPABILITIES", "Draw", "RoundWork", "draw_from_system"]

_LOG = logging.getLogger(__name__)
CAPABILITIES = ("accumulate-1", "float32-update", "int8-update")
Draw = Callable[[pb.Plan], Mapping[str, Any]]
_ENCODINGS = {
    pb.TRAIN: {pb.MEAN: ("float32", "int8", "contribution"), pb.EACH: ("float32", "int8"), pb.MASKED: ("masked",)},
    pb.EVALUATE: {pb.MEAN: ("score",), pb.EACH: ("score",), pb.MASKED: ("masked",)},
}
_OVER = {pb.LATE, pb.NO_SUCH_ROUND, pb.OTHER_UPLOAD, pb.NO_SUCH_BLOB}
_ASKING = 20.0  # seconds between two reports that the device is still at it
_LOOKING = 5.0  # seconds between two looks at the conditions while it trains


def draw_from_system(_: pb.Plan) -> dict[str, Any]:
    """What a round's order of examples and noise come from: the operating system, anew for every round."""
    return {"entropy": os.urandom(32).hex(), "noise_key": os.urandom(16).hex()}


class RoundWork:
    """Does rounds with a ``client``; ``stopped`` says that the agent is to end, and the round goes on when it begins again.

    ``native``: directories of native libraries.
    """

    def __init__(
        self, state: State, environment: Environment, policy: Policy, requests: Requests, client: GatewayClient, draw: Draw,
        stopped: Callable[[], bool], native: Sequence[Path] = (),
    ) -> None:  # fmt: skip
        self._engines = Engines(state, native)
        self._state, self._environment, self._policy = state, environment, policy
        self._requests, self._client, self._draw, self._stopped = requests, client, draw, stopped
        self._trust = requests.enrolled.trust
        self._looked = self._asked = 0.0

    def accept(self, assignment: pb.Assignment, visit: Mapping[str, Any] | None = None) -> Work | None:
        """Note that the device takes part, if its policy allows the plan; None where it does not, which is reported.

        ``visit``: of a secure round, with the key that was drawn for it.
        """
        try:
            if self._over(assignment):
                return None
            work = self._accepted(assignment, visit)
        except Refused as error:
            self._state.problem = f"a plan was refused: {error}"
            self._report(assignment.token, pb.REFUSED_PLAN, str(error))
            return None
        self._state.participate(work.task, work.round)
        self._state.raise_floor(self._requests.floor)
        self._state.keep_work(work)
        return work

    def _over(self, assignment: pb.Assignment) -> bool:
        """Whether it is the round that this device is done with, which a gateway offers as long as nothing was uploaded."""
        plan = self._requests.check_plan(assignment)
        return int(plan.round) == self._state.participation(plan.task).last_round

    def _accepted(self, assignment: pb.Assignment, visit: Mapping[str, Any] | None) -> Work:
        plan = self._requests.check_plan(assignment)
        before = self._state.participation(plan.task)
        self._requests.check_plan(assignment, before.last_round)
        self._policy.plan.check(plan, to_table(plan), before, max(plan.issued_ms, self._requests.floor))
        if plan.kind not in _ENCODINGS:
            raise Refused("the plan asks for something else than training or an evaluation, which this device does not do")
        if plan.upload_encoding not in _ENCODINGS[plan.kind].get(plan.aggregation, ()):
            raise Refused(f"the plan asks for an upload in {plan.upload_encoding!r} where it is to be aggregated otherwise")
        if unknown := set(plan.capabilities) - set(self.capabilities):
            raise Refused(f"the plan needs {', '.join(sorted(unknown))}, which this device cannot do")
        for blob in plan.blobs:
            if blob.size > self._policy.limits.blob_bytes or len(blob.digest) != 32:
                raise Refused(f"blob {one_line(blob.name)[:40]} has {blob.size} bytes; [limits] blob_bytes allows less")
        self._engines.choose(plan)  # who has none declines before anything is noted
        drawn = dict(self._draw(plan)) | ({"visit": dict(visit)} if visit else {})
        return Work(
            plan.task, plan.round, assignment.plan.SerializeToString(), assignment.token, drawn, invitation=assignment.invitation
        )  # fmt: skip

    @property
    def capabilities(self) -> tuple[str, ...]:
        """What the device says that it can do."""
        evaluates = ("evaluate-1",) if self._policy.plan.evaluation and onnxruntime_here() else ()
        return (*CAPABILITIES, *evaluates, *(("secagg-1",) if self._trust.committee else ()))

    def go_on(self, work: Work) -> None:
        """Do what is left of a round, and forget it at its end.

        Raises:
            TryAgain: the gateway is away, or the device is not eligible now: later, the same again.
        """
        outcome, text = pb.UPLOADED, ""
        uploading = 0
        try:
            plan = self._plan(work)
            if work.phase == "accepted":
                work = self._train(work, plan)
            began = time.monotonic()
            upload = (self._state.round / "upload.bin").read_bytes()
            self._client.upload(work.token, upload)
            uploading = int(1000 * (time.monotonic() - began))
            digest = hashlib.sha256(upload).hexdigest()
            _LOG.info("upload acknowledged: round %d of %s, sha256 %s", work.round, one_line(work.task), digest)
        except GatewayRefusal as refusal:
            if refusal.reason == pb.UNUSABLE:
                outcome, text = pb.FAILED, "the upload was not usable"
            elif refusal.reason in _OVER:
                outcome, text = pb.GAVE_UP, "the round was over"
            else:
                raise
            self._state.problem = str(refusal)
        except Refused as error:
            outcome, text = pb.REFUSED_PLAN, _sayable(error)
            self._state.problem = str(error)
        except ClientFailure as error:
            outcome, text = pb.FAILED, _sayable(error)
            self._state.problem = str(error)
        except OSError as error:
            raise TryAgain(f"the round's files cannot be read ({error.strerror})") from error
        told = self._sayable_facts(work) if outcome == pb.UPLOADED else {}
        self._state.end_work()
        self._report(work.token, outcome, text, upload_ms=uploading, fetch_ms=work.fetch_ms, train_ms=work.train_ms, **told)
        if outcome == pb.UPLOADED:
            self._state.problem = ""

    def _plan(self, work: Work) -> pb.Plan:
        """The plan of a round in progress, checked again.

        Raises:
            GatewayRefusal: it has expired. TryAgain: that cannot be told now.
        """
        signed = pb.SignedPlan.FromString(work.plan)
        end = pb.Plan.FromString(signed.plan).expires_ms
        if end <= self._requests.now:  # by this device's clock, which may be a year ahead: a signed request has it set right
            self._client.report(pb.ReportBody(token=work.token, outcome=pb.WORKING))
        if end <= self._requests.now:
            raise GatewayRefusal(pb.LATE, f"round {work.round} of {work.task!r} has expired")
        return self._requests.check_plan(pb.Assignment(plan=signed))

    def _train(self, work: Work, plan: pb.Plan) -> Work:
        """Fetch and train; the round with its upload made.

        Raises:
            TryAgain: it was interrupted, and goes on from its checkpoint.
        """
        began, settings = time.monotonic(), to_table(plan)
        blobs = {blob.name: blob for blob in plan.blobs}
        self._state.keep_blobs(named_blobs(plan))
        graph = graph_of(plan, settings)
        names = [f"{graph}-signature", graph, "model", *(["frozen"] if "frozen" in blobs else [])]
        if missing := [name for name in names if name not in blobs]:
            raise Refused(f"training step: the plan names no {missing[0]}")
        found = {name: self._fetch(work.token, blobs[name]) for name in names if name != "model"}
        found["model"] = fetch_model(self._state, plan, blobs["model"], lambda blob: self._fetch(work.token, blob))
        step = found[graph]
        check_step_signature(step, found[names[0]][:SIGNATURE], self._trust.publisher_keys)
        accepted = None
        if plan.aggregation == pb.MASKED:
            accepted = self._masking(work).accept(work.invitation, found["model"], settings)
        fetching = int(1000 * (time.monotonic() - began))
        limits, where = self._policy.limits, self._state
        job = {
            "examples": self._environment.examples, "model": str(where.blob(blobs["model"].digest)),
            "step": str(where.blob(blobs[names[1]].digest)), "step_sha256": hashlib.sha256(step).hexdigest(),
            "frozen": str(where.blob(blobs["frozen"].digest)) if "frozen" in blobs else "", "settings": settings,
            "encoding": plan.upload_encoding, "values": plan.values, "memory": _address_space(limits.memory),
            "seconds": limits.seconds, "evaluates": plan.kind == pb.EVALUATE,
            "randomness": {name: value for name, value in work.randomness.items() if name != "visit"},
        }  # fmt: skip
        told = self._engines.run(work, plan, job, lambda: self._watched(work, plan))
        if accepted is not None:
            vector = (where.round / "vector.npy").read_bytes()
            write_durably(where.round / "upload.bin", self._masking(work).upload(accepted, vector, where.directory))
            (where.round / "vector.npy").unlink()
        work = dataclasses.replace(
            work, phase="trained", told=told, fetch_ms=fetching, train_ms=int(1000 * told.get("seconds", 0))
        )  # fmt: skip
        where.keep_work(work)
        return work

    def _watched(self, work: Work, plan: pb.Plan) -> dict[str, Any]:
        """What the child says at its end."""
        left = (plan.expires_ms - self._requests.now) / 1000
        self._looked = self._asked = time.monotonic()
        limits = self._policy.limits
        seconds = min(left, limits.seconds)
        outcome = train_in_child(
            self._state.round, memory=limits.memory, seconds=seconds, why_stop=lambda: self._why_stop(work)
        )  # fmt: skip
        if not outcome.paused:
            return dict(outcome.told)
        if outcome.paused.startswith(_NOT_NEEDED):
            raise GatewayRefusal(pb.LATE, outcome.paused)
        if not self._stopped():
            self._report(work.token, pb.INELIGIBLE, outcome.paused)
        raise TryAgain(f"training is paused: {outcome.paused}")

    def _why_stop(self, work: Work) -> str:
        """Why the child is to stop now; empty where it goes on."""
        if self._stopped():
            return "the agent ends"
        now = time.monotonic()
        if now >= self._looked + _LOOKING:
            self._looked = now
            conditions = self._environment.conditions(training=True)
            if reason := self._policy.conditions.why_not(conditions, self._requests.now / 1000):
                return reason
        if now >= self._asked + _ASKING:
            self._asked = now
            reply = self._report(work.token, pb.WORKING, "")
            if reply is not None and reply.stop:
                return f"{_NOT_NEEDED}{one_line(reply.reason)[:200]}"
        return ""

    def _fetch(self, token: bytes, blob: pb.Blob) -> bytes:
        """A blob's bytes, from the disk where they are, or the rest of them from the gateway.

        Raises:
            Refused: the bytes are not those that the plan names.
        """
        path = self._state.blob(blob.digest)
        if path.exists() and hashlib.sha256(data := path.read_bytes()).digest() == blob.digest:
            return data
        part = path.with_name(f"{path.name}.part")
        try:
            with part.open("ab") as file:
                for piece in self._client.fetch(token, blob.digest, file.tell()) if file.tell() < blob.size else ():
                    if file.tell() + len(piece) > blob.size:
                        break
                    file.write(piece)
            data = part.read_bytes()
        except OSError as error:
            raise TryAgain(f"{part} cannot be written ({error.strerror})") from error
        if len(data) < blob.size:
            raise TryAgain(f"blob {one_line(blob.name)[:40]}: the transfer broke off and goes on later")
        part.unlink()
        if len(data) != blob.size or hashlib.sha256(data).digest() != blob.digest:
            raise Refused(f"blob {one_line(blob.name)[:40]}: the bytes are not those that the plan names")
        write_durably(path, data)
        return data

    def _masking(self, work: Work) -> Any:
        from fedcore.secagg.participant import Visit
        from fedcore_device.masking import Masking

        visit = work.randomness.get("visit")
        if not visit:
            raise Refused("the plan asks for secure aggregation, and this device showed no round key")
        place = Visit(visit["task"], visit["epoch"], visit["expiry"])
        return Masking(self._requests.enrolled, self._policy.plan, bytes.fromhex(visit["key"]), place)

    def _sayable_facts(self, work: Work) -> dict[str, Any]:
        told = work.told
        facts: dict[str, Any] = {name: int(told[name]) for name in ("steps", "peak_memory_bytes") if name in told}
        if self._policy.device.tell_examples and told.get("released") is False:
            facts |= {"examples": int(told["examples"]), "loss": float(told["loss"])}
        return facts

    def _report(self, token: bytes, outcome: pb.Outcome, text: str, **facts: Any) -> pb.ReportReply | None:
        """Tell how it goes; a report that does not arrive changes nothing."""
        try:
            return self._client.report(pb.ReportBody(token=token, outcome=outcome, text=one_line(text)[:200], **facts))
        except (FedcoreError, ValueError):
            return None


_NOT_NEEDED = "not needed any more: "
_ABOUT_THE_PLAN = ("training step", "evaluation graph", "training plan", "the plan", "blob ")


def _sayable(error: Exception) -> str:
    """What the coordinator is told of a problem: of the plan and the step, never of the examples or this device's files."""
    text = str(error)
    return text if text.startswith(_ABOUT_THE_PLAN) else "the device's own log says why"


def _address_space(memory: int) -> int:
    """Address space for so much memory: reserved stacks and arenas are most of it, and cost nothing."""
    return memory + (1 << 30)
