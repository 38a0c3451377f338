"""What computes a round's graph: a native library or ONNX Runtime, which goes on where a library fails.

Kept in ``engine.json`` of the device's directory: what trained last, and which libraries failed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedcore.errors import Refused
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.plan import to_table
from fedcore_device.child import LOADING, write_job
from fedcore_device.native import Choice, Unfit, choose, onnxruntime_here
from fedcore_device.state import State, Work
from fedcore_device.training import Crashed

__all__ = ["Engines", "graph_of"]

_LOG = logging.getLogger(__name__)
_FILE = "engine.json"
_MOST = 16  # failed libraries that are remembered
_GRAPHS = {pb.TRAIN: "step", pb.EVALUATE: "evaluation"}  # blobs that hold what is run


def graph_of(plan: pb.Plan, settings: Mapping[str, Any]) -> str:
    """Name of the blob that is run: before activations are rounded, the one that does not round them."""
    name, early = _GRAPHS[plan.kind], f"early-{_GRAPHS[plan.kind]}"
    return early if any(blob.name == early for blob in plan.blobs) and not settings.get("activation-names") else name


class Engines:
    """Chooses for every round anew: a library may be installed in the directories, replaced or removed at any time."""

    def __init__(self, state: State, directories: Sequence[Path]) -> None:
        self._state, self._directories = state, directories

    def choose(self, plan: pb.Plan) -> Choice:
        """What computes the plan's graph; a library that failed is not loaded again until another one is in its place.

        Raises:
            Refused: nothing on this device does.
        """
        if plan.kind == pb.TRAIN:
            step = next((blob.digest.hex() for blob in plan.blobs if blob.name == graph_of(plan, to_table(plan))), "")
            return choose(self._directories, step, self._held().get("failed", {}))
        if not onnxruntime_here():
            raise Refused("the plan asks for an evaluation, which takes ONNX Runtime; this device trains without it")
        return Choice()

    def run(self, work: Work, plan: pb.Plan, job: Mapping[str, Any], child: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``child`` gives, which does a job in the round's directory; another one where a library cannot do it, or crashes.

        Raises:
            Refused: the library failed, and there is nothing else.
        """
        engine = self.choose(plan)
        if plan.kind == pb.TRAIN:
            _LOG.info("training with %s: %s", engine, engine.why)
        where = self._state.round
        (where / LOADING).unlink(missing_ok=True)
        write_job(where, {**job, "native": engine.description, "native_sha256": engine.sha256})
        try:
            told = child()
        except (Unfit, Crashed) as error:
            if not (where / LOADING).exists():  # the owner's own code, or ONNX Runtime
                raise
            self._note_failure(engine, error.how if isinstance(error, Crashed) else str(error))
            (where / "progress.bin").unlink(missing_ok=True)  # of a process that wrote anywhere
            return self.run(work, plan, job, child)
        if plan.kind == pb.TRAIN:
            last = {"engine": str(engine), "why": engine.why, "task": work.task, "round": work.round}
            self._keep(self._held() | {"last": last})
        return told

    def last(self) -> Mapping[str, Any] | None:
        """``engine`` that trained last, ``why`` it, and ``task`` and ``round``; None where nothing was trained."""
        found = self._held().get("last")
        return dict(found) if isinstance(found, dict) else None

    def _note_failure(self, engine: Choice, why: str) -> None:
        _LOG.warning("%s is not used any more: %s", engine, why)
        held = self._held()
        known = {**held.get("failed", {}), engine.sha256: f"it failed before ({why})"}
        self._keep(held | {"failed": dict(list(known.items())[-_MOST:])})

    def _held(self) -> dict[str, Any]:
        try:
            found = json.loads(self._state.kept(_FILE) or b"{}")
        except ValueError:  # a note for people, and of a fault that would be found anew
            return {}
        return found if isinstance(found, dict) and isinstance(found.get("failed", {}), dict) else {}

    def _keep(self, table: Mapping[str, Any]) -> None:
        if table != self._held():
            self._state.keep(_FILE, json.dumps(table).encode())
