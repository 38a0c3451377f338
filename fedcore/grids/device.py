"""DeviceGrid: real devices behind gateways, as a Flower Grid whose nodes are the devices that checked in for a round."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType

from fedcore.errors import BudgetSpent, Refused, RoundFailed
from fedcore.flower import (
    METRICS,
    Answer,
    ClientGrid,
    Facts,
    Gathering,
    answer_all,
    assume_identity,
    check_addressees,
    check_one_content,
    from_record,
    kind_of,
    only_record,
    to_record,
)
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.blobs import Blobs
from fedcore.gateway.conduct import Conductor, Finished, Forming
from fedcore.gateway.fleet import Progress, Selection
from fedcore.gateway.identity import read_device, spell
from fedcore.gateway.lineage import Lineage
from fedcore.gateway.plan import to_settings
from fedcore.gateway.rounds import Place
from fedcore.gateway.sums import RunningSum, Summand, UploadTerms, read_upload
from fedcore.grids.protocol import check_in_reply, invitation_of, upload_reply, visit_of, without_protocol
from fedcore.grids.publish import publish
from fedcore.models import ParameterLayout
from fedcore.privacy.exposure import ClientId
from fedcore.privacy.release import Release
from fedcore.quantization.wire import encode_model, update_length
from fedcore.training.client import SCORE_BYTES, RoundTask

__all__ = ["DeviceGrid", "Offering"]

_MOST_EXAMPLES = 10_000_000  # what one device may claim to have trained on
_SPARE = 1 << 20  # bytes that boxes and statements add to a masked vector
_FULL = float(np.finfo(np.float32).max)
_EVALUATES = "evaluate-1"  # what a device must be able to do for an evaluation
_EVALUATING = "/evaluate"  # a task of its own: its rounds are no participations in the training


@dataclass(frozen=True)
class Offering:
    """What plans name beside the model: blobs by name ("frozen"; "step", "evaluation", their "...-signature", and what is
    "early-..." before activations are rounded), the encoding of updates, what a device must be able to do to train, and the loss
    that step and evaluation compute."""

    blobs: Mapping[str, bytes]
    encoding: str = "float32"
    capabilities: tuple[str, ...] = ()
    loss: str = "cross_entropy"


class DeviceGrid(ClientGrid):
    """The devices of a deployment, collected anew for every round as ``selection`` says; node ids are device ids.

    What it hands the strategy is as from any other grid: one mean reply (``mean``), which gateways add up as uploads arrive, or one
    reply per device. Clients are named by their devices' ids, and numbered in the order in which these were met. ``task`` is the
    run's name towards devices, for whom an evaluation is no participation; ``evaluation`` selects devices for one, and ``done``
    rounds of the run were made before.
    """

    blind = False
    simulated = False

    def __init__(
        self, conductor: Conductor, blobs: Blobs, layout: ParameterLayout, task: str, selection: Selection, offering: Offering, *,
        mean: bool, evaluation: Selection | None = None, done: int = 0,
    ) -> None:  # fmt: skip
        assume_identity()
        self.place, self.observed, self.mean = "devices", Facts(), mean
        self._conductor, self._blobs, self._layout, self._task, self._selection = conductor, blobs, layout, task, selection
        self._offering, self._evaluation = offering, evaluation or selection
        self.numbers: Callable[[Sequence[str]], Sequence[int]] | None = None
        self.pay: Callable[[int, Sequence[str], Release | None], None] | None = None
        self._extra = [pb.Blob(name=name, digest=blobs.put(data), size=len(data)) for name, data in offering.blobs.items()]
        self._lineage = Lineage(blobs)
        self._named = {blob.digest for blob in self._extra}  # that plans name: no upload of the same bytes takes them away
        self._known: dict[int, int] = {}
        self._chosen: list[int] | None = None
        self._forming: Forming | None = None
        self._round = done

    @property
    def nodes(self) -> Sequence[int]:
        """The devices of the round; setting it begins a new one, for nobody can draw devices that are not there."""
        return self._chosen or []

    @nodes.setter
    def nodes(self, _: Sequence[int]) -> None:
        self._abandon("the coordinator went on to another round")

    def close(self) -> None:
        """End a round that is being formed."""
        self._abandon("the coordinator has stopped")

    @property
    def gathering(self) -> Gathering | None:
        """See `flower.ClientGrid`."""
        return self

    def client_of(self, node: int) -> int:
        """The number of the client behind a node."""
        return self._clients([node])[0]

    def _clients(self, nodes: Sequence[int]) -> tuple[int, ...]:
        if new := [node for node in nodes if node not in self._known]:
            counted = range(len(self._known), len(self._known) + len(new))
            numbers = self.numbers([spell(node) for node in new]) if self.numbers else counted
            self._known.update(zip(new, numbers, strict=True))
        return tuple(self._known[node] for node in nodes)

    def gather(self, kind: str, round_number: int, resting: Collection[ClientId]) -> tuple[int, ...]:
        """See `flower.Gathering`: the devices that check in during the selection window, over-selection included."""
        self._abandon("the coordinator went on to another round")
        task, selection = self._task_of(kind), self._evaluation if kind == MessageType.EVALUATE else self._selection
        self._forming = self._conductor.form(task, round_number, selection)
        try:
            self._chosen = self._conductor.gather(self._forming, {read_device(str(name)) for name in resting})
        except (RoundFailed, BudgetSpent):
            self._forming = None
            raise
        return self._clients(self._chosen)

    def _task_of(self, kind: str) -> str:
        return self._task + (_EVALUATING if kind == MessageType.EVALUATE else "")

    def get_node_ids(self) -> Iterable[int]:
        """The devices that were gathered; where nobody has said what for, for training.

        Raises:
            RoundFailed: too few came.
        """
        if self._chosen is None:
            self.gather(MessageType.TRAIN, self._round + 1, ())
        return list(self._chosen or ())

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Give devices their work, and the strategy what became of it. Only good replies come back.

        Raises:
            RoundFailed: too few uploads by the deadline.
            BudgetSpent: the devices cannot be paid for; they were given nothing.
            Refused: messages that a mean cannot be taken over, or to devices that were not collected.
        """
        self.observed, sent = Facts(), list(messages)
        visit = visit_of(sent[0]) if sent else None
        if visit is None or self._forming is not None:
            check_addressees(sent, self._chosen or [])
        if self._forming is None or not sent:
            raise RoundFailed("no devices were collected for this round")
        if visit is not None and sent[0].metadata.message_type == MessageType.QUERY:
            return self._round_keys(sent, (visit.task, visit.epoch, visit.expiry), timeout)
        if self.mean and visit is None:
            check_one_content(sent)
        forming, self._forming, self._chosen = self._forming, None, None
        kind, task = kind_of(sent[0]), RoundTask.from_table(only_record(without_protocol(sent[0]), ConfigRecord))
        self._round = task.round_number
        uploads = self._terms(kind, task, masked=visit is not None)
        plans, cohort = self._plans(sent, kind, uploads)
        selection = forming.document.selection
        deadline = selection.deadline if timeout is None else timeout
        self._settle(forming, task, cohort)
        finished = self._conductor.run(
            forming, plans, cohort, uploads, deadline, task=self._task_of(kind), number=task.round_number
        )  # fmt: skip
        if visit is not None:
            return self._masked(sent, finished)
        absent = tuple(sorted((self.client_of(device), reason) for device, reason in finished.absent.items()))
        if finished.progress is Progress.FAILED:
            raise RoundFailed(
                f"{len(finished.contributions)} of {len(cohort)} devices uploaded within {finished.seconds:.0f} s; the round needs "
                f"{selection.minimum}" + (f"; client {absent[0][0]}: {absent[0][1]}" if absent else "")
            )
        return self._answers(sent, kind, task, uploads, finished, absent)

    def _settle(self, forming: Forming, task: RoundTask, cohort: Collection[int]) -> None:
        """Have the devices that are about to see a plan charged for it; what fails here closes the round, and nobody sees one.

        Raises:
            Refused: there is nobody who charges.
        """
        release = task.release if isinstance(task.release, Release) else None
        if release is None and task.plan.dp is None:
            return
        try:
            if self.pay is None:
                raise Refused("devices are given no private work that nobody charges them for")
            self.pay(task.round_number, [spell(device) for device in sorted(cohort)], release)
        except BaseException:
            self._conductor.close(forming, "the round was not paid for")
            raise

    def _plans(self, sent: Sequence[Message], kind: str, uploads: UploadTerms) -> tuple[list[pb.Plan], dict[int, Place]]:
        """A plan for each different content, and each device's place."""
        plans: list[pb.Plan] = []
        places: dict[tuple[int, ...], int] = {}
        cohort = {}
        for message in sent:
            arrays, config = only_record(message, ArrayRecord), only_record(without_protocol(message), ConfigRecord)
            content = (id(arrays), id(config))
            if content not in places:
                places[content] = len(plans)
                plans.append(self._plan(arrays, config, kind, uploads))
            invited = invitation_of(message)
            invitation = self._blobs.put(invited.invitation) if invited else b""
            cohort[message.metadata.dst_node_id] = Place(places[content], invitation)
        return plans, cohort

    def _plan(self, arrays: ArrayRecord, config: ConfigRecord, kind: str, uploads: UploadTerms) -> pb.Plan:
        ranges = RoundTask.from_table(config).ranges
        return self.plan(encode_model(self._layout.wire_tensors(from_record(self._layout, arrays)), ranges), config, kind, uploads)

    def plan(self, model: bytes, config: ConfigRecord, kind: str, uploads: UploadTerms) -> pb.Plan:
        """What a device is asked to do with an encoded ``model``, to be completed and signed by the conductor.

        Raises:
            Refused: the configuration has another loss than the signed graphs.
        """
        task, trains = RoundTask.from_table(config), kind == MessageType.TRAIN
        if task.plan.loss != (known := self._offering.loss):
            raise Refused(f"the strategy asks devices for the loss {task.plan.loss}; the graphs signed for them compute {known}")
        whole, deltas = self._lineage.offer(model, (kind, task.round_number))
        self._named |= {blob.digest for blob in (whole, *deltas)}
        others = [blob for blob in self._extra if _graph(blob.name) != ("evaluation" if trains else "step")]
        masked = uploads.encoding == "masked"
        return pb.Plan(
            kind=pb.TRAIN if trains else pb.EVALUATE,
            aggregation=pb.MASKED if masked else pb.EACH if uploads.kept else pb.MEAN,
            blobs=[whole, *others, *deltas], settings=to_settings(config), upload_encoding=uploads.encoding,
            most_upload_bytes=uploads.most_bytes,
            capabilities=self._offering.capabilities if trains else (_EVALUATES,), server_round=task.round_number,
            values=uploads.values,
        )  # fmt: skip

    def _terms(self, kind: str, task: RoundTask, *, masked: bool) -> UploadTerms:
        """What an upload must be.

        Raises:
            Refused: shares of noise or sums of scores protect nobody where uploads come in the clear.
        """
        size, encoding = self._layout.size, self._offering.encoding
        if masked and task.release:
            return UploadTerms("masked", task.release.size, 4 * task.release.size + _SPARE, _FULL, 1, kept=True)
        if kind == MessageType.EVALUATE:
            if task.release:
                raise Refused("devices would show the coordinator every device's scores; it takes secure aggregation")
            return UploadTerms("score", 0, SCORE_BYTES, _FULL, _MOST_EXAMPLES, kept=not task.private)
        if task.release:
            if not isinstance(task.release, Release) or task.release.shares:
                raise Refused("devices would show the coordinator every device's part of the sum; it takes secure aggregation")
            return UploadTerms("contribution", task.release.size, task.release.bytes, task.release.joint.norm_bound, 1)
        return UploadTerms(
            encoding, size, update_length(size, encoding), task.max_update_norm, _MOST_EXAMPLES, kept=not self.mean
        )  # fmt: skip

    def _answers(
        self, sent: Sequence[Message], kind: str, task: RoundTask, uploads: UploadTerms, finished: Finished,
        absent: tuple[tuple[int, str], ...],
    ) -> list[Message]:  # fmt: skip
        devices = [one.device for one in finished.contributions]
        down = len(sent) * sum(len(self._blobs.get(digest)) for digest in self._models(sent))
        up = len(devices) * uploads.most_bytes
        clients = tuple(sorted(map(self.client_of, devices)))
        if isinstance(task.release, Release):
            self.observed = Facts(clients, absent)
            answer = publish(sent[0], self._layout, task, finished.total.vector, len(devices), os.urandom)
            return answer_all([answer], Facts(bytes_down=down))
        if not uploads.kept:
            answer = self._answer(sent[0], kind, task, finished.total, Facts(clients, (), up))
            return answer_all([answer], Facts(dropped=absent, bytes_down=down))
        parts = list(self._kept(finished, uploads))
        by_device = {message.metadata.dst_node_id: message for message in sent}
        groups = [parts] if self.mean else [[part] for part in parts]
        answers = []
        for group in groups:
            total = RunningSum()
            for _, part in group:
                total.add(part)
            seen = tuple((self.client_of(d), p.correct / p.examples, p.examples) for d, p in group if kind == MessageType.EVALUATE)
            facts = Facts(tuple(sorted(self.client_of(d) for d, _ in group)), (), len(group) * uploads.most_bytes, 0, seen)
            answers.append(self._answer(by_device[group[0][0]], kind, task, total, facts))
        return answer_all(answers, Facts(dropped=absent, bytes_down=down))

    def _answer(self, message: Message, kind: str, task: RoundTask, total: RunningSum, facts: Facts) -> Answer:
        """One reply for what was added up."""
        loss = total.loss / total.examples
        values = [total.examples, loss] if kind == MessageType.TRAIN else [total.examples, total.correct / total.examples, loss]
        metrics = dict(zip(METRICS[kind], values[: 1 if task.private else None], strict=not task.private))
        arrays = None
        if kind == MessageType.TRAIN:
            master = from_record(self._layout, only_record(message, ArrayRecord))
            arrays = to_record(self._layout, (master + total.vector / total.examples).astype(np.float32))
        return Answer(message, arrays, metrics, facts)

    def _kept(self, finished: Finished, uploads: UploadTerms) -> Iterator[tuple[int, Summand]]:
        """Uploads that were kept whole, which are read and forgotten; two devices may have sent the same bytes."""
        for one in finished.contributions:
            yield one.device, read_upload(self._blobs.get(one.digest), uploads)
        self._forget_uploads(finished)

    def _forget_uploads(self, finished: Finished) -> None:
        for digest in {one.digest for one in finished.contributions} - self._named:
            self._blobs.remove(digest)

    def _round_keys(self, sent: Sequence[Message], visit: tuple[str, int, int], timeout: float | None) -> list[Message]:
        """The check-ins of secure aggregation from the devices that wait."""
        by_device = {message.metadata.dst_node_id: message for message in sent}
        if self._forming is None:
            raise RoundFailed("no devices were collected for this round")
        window = self._forming.document.selection.window
        wait = min(window, timeout or window)
        self._forming, found = self._conductor.invite(self._forming, visit, list(by_device), wait)
        return [check_in_reply(by_device[one.device], one.round_key) for one in found]

    def _masked(self, sent: Sequence[Message], finished: Finished) -> list[Message]:
        """Masked uploads, opaque here; `SecureGrid` decides what becomes of them. Two of them may be the same bytes."""
        by_device = {message.metadata.dst_node_id: message for message in sent}
        self.observed = Facts(dropped=tuple((self.client_of(device), reason) for device, reason in finished.absent.items()))
        replies = [upload_reply(by_device[one.device], self._blobs.get(one.digest), 0.0) for one in finished.contributions]
        self._forget_uploads(finished)
        return replies

    def _models(self, sent: Sequence[Message]) -> list[bytes]:
        arrays, config = only_record(sent[0], ArrayRecord), only_record(without_protocol(sent[0]), ConfigRecord)
        model = encode_model(self._layout.wire_tensors(from_record(self._layout, arrays)), RoundTask.from_table(config).ranges)
        return [self._blobs.put(model)]

    def _abandon(self, reason: str) -> None:
        if self._forming is not None:
            self._conductor.close(self._forming, reason)
        self._forming, self._chosen = None, None


def _graph(name: str) -> str:
    """The graph that a blob is or belongs to: "step", "evaluation", or neither."""
    return name.removeprefix("early-").removesuffix("-signature")
