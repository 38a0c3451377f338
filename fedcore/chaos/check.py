"""What must hold after anything: no acknowledged upload lost or counted twice, sums exact, the ledger right, the model valid, and
nothing told that is secret.

A gateway's store keeps a round for an hour after its end; what is older is said to be, and not judged.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedcore.chaos.journal import ACKNOWLEDGED, ENDED, Entry, read_journal
from fedcore.errors import FedcoreError, Refused
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.rounds import RoundDocument
from fedcore.gateway.sums import RunningSum, read_upload
from fedcore.state.gateway import Contribution, Round, RoundState
from fedcore.state.stores import open_gateway_store

__all__ = ["Finding", "KnownRound", "check_run", "check_secrets", "known_rounds", "secrets_of", "store_of"]

_DONE = "the round has what it needs"
_EVALUATION = "/evaluate"
_DEFECTS = ("Traceback (most recent call last)", "WARNING failed: ", "error: unexpected ", "the store's thread failed")
_SHOWN = 3  # examples of what is wrong


@dataclass(frozen=True)
class Finding:
    """What was looked at, whether it holds (None: it could not be judged), and in words what was seen."""

    name: str
    holds: bool | None
    text: str


@dataclass(frozen=True)
class KnownRound:
    """A round as the store keeps it: what counts in it, the merged sums, and the numbers of its plans."""

    round: Round
    document: RoundDocument
    contributions: Sequence[Contribution]
    total: RunningSum
    plans: frozenset[int]

    @property
    def done(self) -> bool:
        """Whether it gave the coordinator a sum."""
        return self.round.state is RoundState.CLOSED and self.document.reason == _DONE


def known_rounds(where: str) -> list[KnownRound]:
    """All rounds that a gateway's store keeps, in the order of their ends.

    Raises:
        Refused: it is no such store, or damaged. TryAgain: it cannot be reached.
    """
    store, found = open_gateway_store(where), []
    try:
        for key in store.rounds():
            one = store.round(key)
            if one is None:
                continue
            document, total = RoundDocument.decode(one.document), RunningSum()
            for partial in store.partials(key):
                total.merge(RunningSum.decode(partial))
            plans = frozenset(
                int(pb.Plan.FromString(pb.SignedPlan.FromString(data).plan).round) for data in document.plans
            )  # fmt: skip
            found.append(KnownRound(one, document, store.contributions(key), total, plans))
    finally:
        store.close()
    return sorted(found, key=lambda one: one.document.until)


def check_run(
    run: Path, store: str, *, journals: Sequence[Path] = (), uploads: Sequence[Path] = (), logs: Sequence[Path] = ()
) -> list[Finding]:  # fmt: skip
    """Judge a run that is not going on, and the gateways' ``store``.

    ``journals``: of devices, or logs of their agents; ``uploads``: folders in which uploads lie under their SHA-256.

    Raises:
        Refused: there is no such run or store. TryAgain: the run goes on, or the store cannot be reached.
    """
    rounds = known_rounds(store)
    entries = {path: read_journal(path) for path in journals}
    bodies = {path.name: path for folder in uploads for path in folder.iterdir()}
    facts = _read_run(run)
    mine = [one for one in rounds if facts.run_id[:16] in one.round.task]
    return [
        _acknowledged(rounds, entries), _once(rounds, entries), _sums(rounds, bodies), _model(facts, mine), _ledger(facts, mine),
        _identities(entries), _defects(logs),
    ]  # fmt: skip


def check_secrets(files: Sequence[Path], secrets: Sequence[bytes]) -> Finding:
    """Whether any of ``secrets`` stands in any of the files."""
    told = [str(path) for path in files if path.is_file() and (data := path.read_bytes()) and any(one in data for one in secrets)]
    text = f"{len(secrets)} secrets in {len(files)} files" if not told else f"a secret stands in {', '.join(told[:_SHOWN])}"
    return Finding("no secret in a log", not told, text)


def _acknowledged(rounds: Sequence[KnownRound], entries: Mapping[Path, Sequence[Entry]]) -> Finding:
    """Every acknowledgement that a device has is a contribution in its round."""
    counted = {
        (one.round.task, plan): {contribution.digest.hex() for contribution in one.contributions}
        for one in rounds for plan in one.plans
    }  # fmt: skip
    held = old = 0
    lost = []
    for path, journal in entries.items():
        for entry in journal:
            if entry.event != ACKNOWLEDGED:
                continue
            digests = counted.get((entry.task, entry.round))
            held += digests is not None and entry.digest in digests
            old += digests is None
            if digests is not None and entry.digest not in digests:
                lost.append(f"{path}: round {entry.round}")
    words = f"{held} acknowledged uploads are in the store" + (f", {old} are of rounds that it has forgotten" if old else "")
    if lost:
        words = f"{len(lost)} acknowledged uploads are not in the store, as {'; '.join(lost[:_SHOWN])}"
    return Finding("no acknowledged upload lost", False if lost else True if held else None, words)


def _once(rounds: Sequence[KnownRound], entries: Mapping[Path, Sequence[Entry]]) -> Finding:
    """A sum holds as many uploads as the index, and no device has two uploads acknowledged in a round."""
    wrong = [
        f"round {one.round.number} ({one.round.task}): {one.total.devices} in the sum, {len(one.contributions)} in the index"
        for one in rounds
        if one.document.uploads and not one.document.uploads.kept and one.total.devices != len(one.contributions)
    ]
    for path, journal in entries.items():
        pairs = {(entry.task, entry.round, entry.digest) for entry in journal if entry.event == ACKNOWLEDGED}
        twice = [plan for plan, times in Counter(pair[:2] for pair in pairs).items() if times > 1]
        wrong += [f"{path}: two uploads in round {number}" for _, number in twice]
    text = f"{sum(len(one.contributions) for one in rounds)} uploads in {len(rounds)} rounds, each once"
    return Finding("no upload counted twice", not wrong, "; ".join(wrong[:_SHOWN]) or text)


def _sums(rounds: Sequence[KnownRound], bodies: Mapping[str, Path]) -> Finding:
    """Sums equal those of the uploads that the index names, added up anew."""
    wrong, judged = [], 0
    for one in rounds:
        terms = one.document.uploads
        if terms is None or terms.kept or any(c.digest.hex() not in bodies for c in one.contributions):
            continue
        expected = RunningSum()
        for contribution in one.contributions:
            expected.add(read_upload(bodies[contribution.digest.hex()].read_bytes(), terms))
        judged += bool(one.contributions)
        found = one.total
        scale = float(np.abs(expected.vector).max(initial=0.0))
        same = (found.devices, found.examples, found.correct) == (expected.devices, expected.examples, expected.correct)
        if not same or not _near(found.vector, expected.vector, 1e-12 * scale) or not math.isclose(found.loss, expected.loss):
            wrong.append(f"round {one.round.number} ({one.round.task})")
    name = "sums exact"
    if wrong:
        return Finding(name, False, f"not in {', '.join(wrong[:_SHOWN])}")
    if not judged:
        return Finding(name, None, "the uploads are not at hand")
    return Finding(name, True, f"{judged} sums are those of the devices' uploads")


def _near(one: npt.NDArray[np.floating[Any]], other: npt.NDArray[np.floating[Any]], by: float) -> bool:
    return one.shape == other.shape and bool(np.all(np.abs(one - other) <= by))


@dataclass(frozen=True)
class _Run:
    """What a run's directory holds: metrics of committed rounds, the last model (None before the first commit)."""

    directory: Path
    run_id: str
    metrics: Sequence[Mapping[str, Any]]
    master: npt.NDArray[np.float32] | None


def _read_run(directory: Path) -> _Run:
    from fedcore.state.sqlite import RunStore

    if not (directory / "state.sqlite").exists():
        raise Refused(f"{directory} holds no run")
    store = RunStore(directory)
    try:
        checkpoint = store.latest()
        master = checkpoint.arrays["master"] if checkpoint else None
        return _Run(directory, store.run_id, store.metrics(), master)
    finally:
        store.close()


def _model(facts: _Run, rounds: Sequence[KnownRound]) -> Finding:
    """The last committed model is finite and can be evaluated; for a plain mean it is the first one plus all sums."""
    import torch

    from fedcore.config import load_config
    from fedcore.coordinator.assembly import assemble
    from fedcore.quantization.layers import float_arithmetic
    from fedcore.training.evaluation import evaluate, load_flat

    name = "the model is valid"
    if facts.master is None:
        return Finding(name, None, "no round is committed")
    config = load_config(facts.directory / "config.toml")
    assembly = assemble(config)
    if facts.master.size != assembly.layout.size or not np.isfinite(facts.master).all():
        return Finding(name, False, "the model is of another size than the scenario's, or not finite")
    start = assembly.layout.join(
        {name: p.detach().numpy().copy() for name, p in assembly.model.named_parameters() if p.requires_grad}
    )
    test = assembly.data.dataset.test
    load_flat(assembly.model, torch.from_numpy(facts.master))
    with float_arithmetic(assembly.model):
        score = evaluate(assembly.model, torch.from_numpy(test.x), torch.from_numpy(test.y), config.training.loss)
    if not (math.isfinite(score.loss) and 0 <= score.accuracy <= 1):
        return Finding(name, False, f"the model's loss is {score.loss}")
    words = f"{len(facts.metrics)} rounds, accuracy {score.accuracy:.4f}"
    if config.privacy or config.secagg.enabled or config.strategy.name != "fedavg":
        return Finding(name, True, words)
    expected = _expected(start, facts, rounds)
    if expected is None:
        return Finding(name, True, f"{words}; not all of its sums are in the store any more")
    if not _near(facts.master, expected, 1e-5 * max(1.0, float(np.abs(expected).max()))):
        return Finding(name, False, f"the model is not what the sums of {len(facts.metrics)} rounds add up to")
    return Finding(name, True, f"{words}; it is the first model plus the means of the rounds' sums")


def _expected(
    start: npt.NDArray[np.float32], facts: _Run, rounds: Sequence[KnownRound]
) -> npt.NDArray[np.float32] | None:  # fmt: skip
    """The model by the store's sums; None where one is missing."""
    last = {one.round.number: one for one in rounds if one.done and not one.round.task.endswith(_EVALUATION)}
    model = start
    for entry in facts.metrics:
        one = last.get(entry["round"])
        if one is None or one.document.uploads is None or one.document.uploads.kept or one.total.vector.size != model.size:
            return None
        model = (model + one.total.vector / one.total.examples).astype(np.float32)
    return model


def _ledger(facts: _Run, rounds: Sequence[KnownRound]) -> Finding:
    """Each attempt at a round has a charge of its own, in every unit."""
    from fedcore.config import load_config
    from fedcore.privacy.ledger import Ledger
    from fedcore.state.stores import open_ledger

    name, config = "the ledger is right", load_config(facts.directory / "config.toml")
    if not config.privacy:
        return Finding(name, None, "nothing is charged in this run")
    place = config.privacy[0].ledger
    where = place if "://" in place else config.folder / place if place else facts.directory
    ledger = Ledger(open_ledger(where, write=False))
    try:
        charged = Counter((charge.round, str(charge.unit)) for charge in ledger.charges() if charge.run == facts.run_id)
    finally:
        ledger.close()
    asked = Counter(one.round.number for one in rounds if one.document.cohort and not one.round.task.endswith(_EVALUATION))
    asked |= Counter(int(entry["round"]) for entry in facts.metrics)  # whatever the store has forgotten, once each
    short = [
        f"round {number}: {times} attempts, {charged[number, one.unit]} charges of unit {one.unit}"
        for number, times in sorted(asked.items()) for one in config.privacy if charged[number, one.unit] < times
    ]  # fmt: skip
    text = f"{sum(charged.values())} charges for {sum(asked.values())} attempts in {len(config.privacy)} units"
    return Finding(name, not short, "; ".join(short[:_SHOWN]) or text)


def _identities(entries: Mapping[Path, Sequence[Entry]]) -> Finding:
    """No device was taken for a copy of another, or turned away."""
    gone = [f"{path}: {entry.text}" for path, journal in entries.items() for entry in journal if entry.event == ENDED]
    text = "; ".join(gone[:_SHOWN]) or f"{len(entries)} devices"
    return Finding("no device turned away", False if gone else True if entries else None, text)


def _defects(logs: Sequence[Path]) -> Finding:
    """No log tells of a defect."""
    found = [
        f"{path}: {line.strip()[:120]}" for path in logs
        for line in path.read_text(errors="replace").splitlines() if any(words in line for words in _DEFECTS)
    ]  # fmt: skip
    text = "; ".join(found[:_SHOWN]) or f"{len(logs)} logs"
    return Finding("no defect in a log", False if found else True if logs else None, text)


def store_of(fleet: Path) -> str:
    """Where the gateways of a fleet's folder keep their store.

    Raises:
        Refused: it is no fleet's folder.
    """
    from fedcore.coordinator.fleet import FleetFolder

    return FleetFolder.existing(fleet).store


def secrets_of(folder: Path) -> list[bytes]:
    """What must never be told, of all keys and tokens below a folder: as files and logs would show it."""
    found: list[bytes] = []
    for path in folder.rglob("*.key"):
        found += [line for line in path.read_bytes().splitlines() if line and not line.startswith(b"-----")]
    for path in folder.rglob("device.json"):
        try:
            found.append(json.loads(path.read_text())["token"].encode())
        except (ValueError, KeyError) as error:
            raise FedcoreError(f"{path} cannot be read ({type(error).__name__})") from None
    return sorted(set(found))
