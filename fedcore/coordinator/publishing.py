"""[release]: a coordinator that publishes by itself. ``python -m fedcore.coordinator.publishing DIR TIER,..`` exports one model.

After a round the model is written as a finished run's would be, exported in a process of its own, and judged by the gates of its
tiers. What fails a gate is not released; whatever else goes wrong costs this release and never the run.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import logging
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcore.config import RunConfig, load_config, share_of
from fedcore.coordinator.directory import write
from fedcore.coordinator.release_service import placed
from fedcore.coordinator.releases import Created, Registry, create_release, self_test_batch
from fedcore.coordinator.rollouts import Deployment, Order, Shape
from fedcore.errors import FedcoreError, Refused
from fedcore.registry.names import check_model
from fedcore.secagg.committee_wire import one_line

if TYPE_CHECKING:
    from fedcore.coordinator.assembly import Assembly
    from fedcore.coordinator.checkpoint import Progress

__all__ = ["Publisher", "shape_of", "unfit"]

RECORD = "releases.jsonl"
_EXPORT_SECONDS = 3600.0
_BUSY = ("running", "paused")
_LOG = logging.getLogger(__name__)


class Publisher:
    """Publishes for the run in ``directory``; with a ``fleet``'s folder it also starts the rollout.

    Raises:
        Refused: the repository or its keys are not there, a tier is unknown, or the model's name is too long: before the run
            begins, not after an hour.
    """

    def __init__(self, config: RunConfig, directory: Path, fleet: Path | None = None) -> None:
        from fedcore.export.release import choose

        release = config.release
        self._config, self._directory, self._fleet = config, directory, fleet
        self._tiers = tuple(choose(config.tiers, release.tiers, []).tiers)
        self._registry = Registry.open(placed(config.folder, release.registry), [config.folder / release.keys])
        self._registry.catalogue()
        self._model = check_model(release.model or config.run.name)

    def due(self, number: int) -> bool:
        """Whether the model after this round is to be released while the run goes on."""
        return bool(self._config.release.every) and number % self._config.release.every == 0

    def after_round(self, assembly: Assembly, progress: Progress, accuracy: float) -> str:
        """Release the model of a round; what happened, in a line."""
        from fedcore.coordinator.model_files import write_model

        number = progress.round_number
        folder = self._directory / "releases" / f"round-{number:05d}"

        def prepare() -> Path:
            folder.mkdir(parents=True, exist_ok=True)
            apart = dataclasses.replace(assembly, model=copy.deepcopy(assembly.model))  # the run goes on with its own
            write_model(folder / "model", apart, progress)
            write(folder / "config.toml", self._config.to_toml())
            write(folder / "result.json", json.dumps({"rounds": number, "accuracy": accuracy}) + "\n")
            return folder

        return self._attempt(number, prepare)

    def at_end(self, number: int) -> str:
        """Release what the finished run left in its directory."""
        return self._attempt(number, lambda: self._directory)

    def _attempt(self, number: int, prepare: Any) -> str:
        if any(one.get("round") == number and "version" in one for one in self._records()):
            return ""
        try:
            told = self._publish(number, prepare)
        except (FedcoreError, OSError, subprocess.SubprocessError) as error:
            told = {"problem": one_line(str(error))}
        except Exception as error:  # noqa: BLE001 - a defect in publishing costs a release, not the run
            _LOG.exception("publishing failed")
            told = {"problem": f"{type(error).__name__}: {one_line(str(error))}"}
        self._record({"round": number, "time": time.time(), **told})
        if "problem" in told:
            return f"round {number} is not released: {told['problem']}"
        began = f"; rollout {told['rollout']} has begun" if told["rollout"] else ""
        began = f"; its rollout has not begun: {told['waiting']}" if told["waiting"] else began
        return f"round {number} is release {told['version']} of {self._model}{began}"

    def _publish(self, number: int, prepare: Any) -> dict[str, Any]:
        self._refuse_busy()
        folder: Path = prepare()
        rows = self._exported(folder)
        if problems := unfit(rows, self._config, self._tiers):
            raise Refused(f"gates failed: {'; '.join(problems)}")
        batch = self_test_batch(folder, self._config.release.self_test)
        made = create_release(
            folder / "export", self._model, batch, self._registry, tiers=self._tiers, bases=self._config.release.deltas
        )  # fmt: skip
        if folder != self._directory:
            shutil.rmtree(folder / "export", ignore_errors=True)  # the repository holds it now
        try:
            rollout, waiting = self._begin(made, number), ""
        except FedcoreError as error:
            rollout, waiting = "", one_line(str(error))
        facts = {"version": made.version, "artefacts": made.artefacts, "deltas": made.deltas}
        return facts | {"rollout": rollout, "waiting": waiting}

    def _refuse_busy(self) -> None:
        """Nothing is exported that could not go out."""
        if self._fleet is None:
            return
        with Deployment.of(self._fleet).control() as control:
            current = control.newest(self._model)
        if current is None:
            return
        state = current.state
        if state.phase in _BUSY or (state.phase == "aborted" and state.fallback is None and state.plan.baseline):
            raise Refused(f"{state.plan.name} is {state.phase}, and another one begins only after it is over and taken back")

    def _exported(self, folder: Path) -> list[dict[str, Any]]:
        command = [sys.executable, "-m", "fedcore.coordinator.publishing", str(folder), ",".join(self._tiers)]
        done = subprocess.run(  # noqa: S603 - this interpreter, this package
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_EXPORT_SECONDS, check=False
        )  # fmt: skip
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no word"]
            raise Refused(f"the export ended with code {done.returncode}: {one_line(lines[-1])[:300]}")
        return list(json.loads((folder / "export" / "export.json").read_text())["rows"])

    def _begin(self, made: Created, number: int) -> str:
        if self._fleet is None:
            return ""
        why = f"round {number} of {self._config.run.name}"
        with Deployment.of(self._fleet).control() as control:
            shape = shape_of(self._config)
            state = control.start(self._model, made.version, self._registry.catalogue(), shape, Order("[release]", why))
        return state.plan.name

    def _records(self) -> list[dict[str, Any]]:
        try:
            lines = (self._directory / RECORD).read_text(errors="replace").splitlines()
        except OSError:
            return []
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):  # a kill tore it
                found.append(json.loads(line))
        return [one for one in found if isinstance(one, dict)]

    def _record(self, told: dict[str, Any]) -> None:
        path = self._directory / RECORD
        try:
            torn = path.exists() and not path.read_bytes().endswith(b"\n")
            with path.open("a", encoding="utf-8") as file:
                file.write("\n" * torn + json.dumps(told) + "\n")
        except OSError as error:  # a full disk costs this note, not the run
            _LOG.warning("%s cannot be written (%s)", path, error.strerror)


def shape_of(config: RunConfig) -> Shape:
    """How a scenario's releases are rolled out."""
    one = config.release
    return Shape(
        one.shares(), share_of(one.control), one.window, corrupt=share_of(one.corrupt), budgets=dict(one.budgets), kept=one.rollouts
    )  # fmt: skip


def unfit(rows: list[dict[str, Any]], config: RunConfig, tiers: tuple[str, ...]) -> list[str]:
    """Why an export is not to be released: a gate that was missed, or a runtime that a tier names and that could not be tried."""
    found = []
    for row in rows:
        asked = row["tier"] in config.tiers and row["target"] in config.tiers[row["tier"]].targets
        if row["tier"] in tiers and (row["gate"] == "fail" or (row["status"] == "missing" and asked)):
            found.append(f"{row['tier']} {row['target']}: {one_line(str(row['reason']))}")
    return found


def _main() -> None:
    import torch

    from fedcore.export.release import choose, clear, release, to_json
    from fedcore.export.source import load_run

    directory, tiers = Path(sys.argv[1]), sys.argv[2].split(",")
    torch.set_num_threads(1)
    try:
        plan = choose(load_config(directory / "config.toml").tiers, tiers, [])
        source, place = load_run(directory), directory / "export"
        place.mkdir(exist_ok=True)
        model = hashlib.sha256((directory / "model" / "model.fcm").read_bytes()).hexdigest()
        earlier = clear(place, model)
        write(place / "export.json", to_json(release(source, plan, place), earlier, plan, source, model))
    except FedcoreError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    _main()
