"""Releases in a repository, from what an export wrote and back to what was there before."""

from __future__ import annotations

import io
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from fedcore.coordinator.rollouts import Order, RolloutControl
from fedcore.errors import Refused, TryAgain
from fedcore.registry.catalogue import ARTEFACT, DELTA, Catalogue
from fedcore.registry.compare import Row, compare_releases
from fedcore.registry.files import Files, open_files
from fedcore.registry.keys import Signers, load_signers
from fedcore.registry.names import check_model
from fedcore.registry.release import release_items, rollback_items
from fedcore.registry.repository import load, publish
from fedcore.registry.rollout import Rollout, votes

__all__ = ["Created", "Registry", "compared", "create_release", "export_folder", "model_of", "roll_back", "self_test_batch"]

_PATIENCE, _TURN = 30.0, 0.2  # seconds to wait for another publisher, and between two tries


@dataclass(frozen=True)
class Registry:
    """A repository and the keys at hand for it."""

    files: Files
    signers: Signers

    @classmethod
    def open(cls, place: str, keys: Iterable[Path]) -> Registry:
        """That at a path or URL.

        Raises:
            Refused: none is named, or a directory holds no keys.
        """
        if not place:
            raise Refused("which repository? --registry names it; fedcore registry init makes one")
        return cls(open_files(place), load_signers(keys))

    def catalogue(self) -> Catalogue:
        """What is offered. Raises Refused where there is no repository, or a damaged one."""
        return load(self.files).catalogue()


@dataclass(frozen=True)
class Created:
    """A release that was published: bytes of artefacts by tier and runtime, and of deltas to it."""

    model: str
    version: int
    artefacts: dict[str, int]
    deltas: list[int]


def export_folder(directory: Path) -> Path:
    """Where the artefacts and export.json are: the folder itself, or export/ in that of a run.

    Raises:
        Refused: neither.
    """
    for folder in (directory, directory / "export"):
        if (folder / "export.json").is_file():
            return folder
    raise Refused(f"{directory} holds no export: fedcore export {directory} makes one")


def create_release(
    export: Path, model: str, batch: bytes | None, registry: Registry, *, tiers: Sequence[str] = (), bases: int = 1,
    keep: int | None = None, needed: Mapping[str, set[int]] | None = None,
) -> Created:  # fmt: skip
    """Publish what passed its gates as the next release of a model.

    With ``keep``, older releases of all models are withdrawn, but for those that are ``needed`` (`RolloutControl.needed`; None:
    nobody knows).

    Raises:
        Refused: releases would be withdrawn of which nobody knows whether they are needed, nothing passed, a key is missing, a name
            cannot stand in a path, or the batch is none. TryAgain: somebody else publishes.
    """
    check_model(model)
    if batch is not None:
        _check_batch(batch)
    state = load(registry.files)
    version = state.catalogue().latest(model) + 1
    offered = Counter(one for one, _ in state.catalogue().releases())
    if keep and needed is None and any(count >= keep for count in offered.values()):
        raise Refused(
            f"keeping {keep} releases withdraws older ones, and no fleet says which of them its rollouts need: --fleet names one"
        )
    items = release_items(export, model, version, batch, registry.files, state, bases, tuple(tiers))
    _patiently(lambda: publish(registry.files, items, registry.signers, datetime.now(UTC), keep, needed or {}))
    artefacts = {f"{i.custom['tier']}/{i.custom['runtime']}": len(i.data) for i in items if i.custom["kind"] == ARTEFACT}
    return Created(model, version, artefacts, [len(item.data) for item in items if item.custom["kind"] == DELTA])


def roll_back(control: RolloutControl, registry: Registry, model: str, order: Order, back_to: int | None = None) -> int:
    """Take a model's release back: nobody else gets it, and everybody gets the old content as a new, higher release; its version.

    A call that was killed is finished by the next one.

    Raises:
        Refused: there is nothing before it, or a key is missing. TryAgain: somebody else publishes or decides.
    """
    state = control.running(model).state
    old = back_to or state.plan.outside
    if old >= state.plan.version:
        raise Refused(f"release {old} of {model} is not before {state.plan.version}, which is taken back")
    if not old:
        raise Refused(f"release {state.plan.version} is the first of {model}: there is none to go back to; abort, and release anew")
    if state.phase in {"running", "paused"}:
        control.order(model, "abort", order)
    version = _old_content(registry, model, state, old)
    digest = registry.catalogue().digest(model, version).hex()
    control.order(model, "roll back", order, (version, digest))
    return version


def _old_content(registry: Registry, model: str, state: Rollout, old: int) -> int:
    """The release above the one that is taken back, with the old one's content; published, unless it is there."""
    held = load(registry.files)
    catalogue = held.catalogue()
    latest = catalogue.latest(model)
    there = latest > state.plan.version and (model, old) in catalogue.releases()
    if there and catalogue.digest(model, latest) == catalogue.digest(model, old):
        return latest
    items = rollback_items(registry.files, held, model, old, latest + 1)
    _patiently(lambda: publish(registry.files, items, registry.signers, datetime.now(UTC)))
    return latest + 1


def _patiently(work: Callable[[], None]) -> None:
    """Do it once nobody else publishes, as a coordinator does that signs the timestamp anew."""
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            work()
        except TryAgain:
            if time.monotonic() > end:
                raise
            time.sleep(_TURN)
        else:
            return


def compared(control: RolloutControl, model: str, a: int, b: int) -> tuple[list[Row], bool]:
    """Releases A and B by what devices reported, and whether that was side by side: of other comparisons times and devices differ.

    Raises:
        Refused: of one of them nothing was reported.
    """
    rollouts = [one.state for one in control.all_of(model)]
    together = [one for one in rollouts if {one.plan.version, one.plan.baseline} == {a, b}]
    if a == b:
        raise Refused("a release is compared with another one")
    if not rollouts:
        raise Refused(f"{model} has no rollout: nothing was reported")
    signals, held = (together or rollouts)[-1].plan.signals, {}
    for version in (a, b):
        arms = [
            member
            for state in together or rollouts
            for member in state.members.values()
            if version == (state.plan.version if member.arm == "canary" else state.plan.baseline)
        ]
        if not any(member.values is not None for member in arms):
            raise Refused(f"no device reported on release {version} of {model}")
        held[version] = {one.name: votes(arms, one) for one in signals}
    return compare_releases(held[a], held[b], signals), bool(together)


def self_test_batch(run: Path, count: int) -> bytes | None:
    """A public batch for devices to try a release with, as .npz: ``x`` [n, *shape] float32, normalised, and their labels ``y`` [n].

    The first ``count`` test examples that the run's ONNX file labels right, so that a device's file has no excuse for another
    label. None for 0.

    Raises:
        Refused: the run has no such file, or it labels too few of them right.
    """
    if not count:
        return None
    from fedcore.config import load_config
    from fedcore.data import load_dataset, normalised_by_test
    from fedcore.export.onnx import onnx_logits

    path = run / "model" / "model.onnx"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror}); --batch FILE.npz names another self-test batch") from error
    config = load_config(run / "config.toml")
    dataset = load_dataset(config.data, config.folder, config.run.seed)
    test = (normalised_by_test(dataset) if config.privacy else dataset).test
    right = np.flatnonzero(onnx_logits(data, test.x).argmax(1) == test.y)[:count]
    if len(right) < min(count, len(test) // 2):
        raise Refused(
            f"the model labels only {len(right)} of {len(test)} test examples right, too few for a self-test of {count}; "
            "--batch names another one"
        )
    buffer = io.BytesIO()
    np.savez(buffer, x=test.x[right].astype(np.float32), y=test.y[right].astype(np.int64))
    return buffer.getvalue()


def _check_batch(data: bytes) -> None:
    """See that devices can read a self-test batch; one that they cannot would make every release unfit.

    Raises:
        Refused: they cannot.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as held:
            x, y = np.asarray(held["x"], np.float32), np.asarray(held["y"])
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise Refused(f"the self-test batch is no .npz with x and y ({type(error).__name__})") from None
    if not (x.ndim >= 2 and len(x) and y.shape == x.shape[:1] and y.dtype.kind in "iu" and np.isfinite(x).all()):
        raise Refused(
            f"a self-test batch has x [n, *shape], finite, and n integers y; got {list(x.shape)} and {list(y.shape)} {y.dtype}"
        )


def model_of(export: Path) -> str:
    """The name of the run that an export is of; empty where its folder does not say."""
    from fedcore.config import load_config

    try:
        return load_config(export.parent / "config.toml").run.name
    except Refused:
        return ""
