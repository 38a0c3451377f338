"""A run over some grid, and the directory it leaves; simulated on this machine, or wherever the grid's clients live."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch

from fedcore import __version__
from fedcore.config import RunConfig
from fedcore.coordinator.assembly import Assembly, assemble, build_clients
from fedcore.coordinator.asynchronous import BufferedCoordinator
from fedcore.coordinator.budget import Budget
from fedcore.coordinator.directory import Claim, begun, claim, continued, write
from fedcore.coordinator.key import read_key
from fedcore.coordinator.publishing import Publisher
from fedcore.coordinator.rounds import Coordinator, DrawnGrid, Metrics
from fedcore.coordinator.secure import simulated_trust
from fedcore.coordinator.strategy import accepts_mean
from fedcore.coordinator.virtual import VirtualArrivals
from fedcore.data.fleet import draw_fleet
from fedcore.errors import FedcoreError, Refused, RoundFailed
from fedcore.grids.cohort import CohortGrid
from fedcore.grids.pool import available_workers
from fedcore.grids.secure import SecureGrid
from fedcore.privacy.ledger import Ledger
from fedcore.privacy.randomness import RootKey
from fedcore.state.sqlite import RunStore
from fedcore.state.stores import open_ledger

__all__ = ["FederatedRun", "RunGrid", "SimulatedRun"]

_OPERATOR = "operator.jsonl"  # who took part in releases: not for publication
_VERSIONS = 16  # models that workers see at once in asynchronous rounds; of more, some wait
_BLAMED = "blamed.json"  # enrolled clients that dealt false shares: a continued run does not ask them either
_SIMULATED = (
    "This run was simulated: noise and coins derive from run.seed, so that it repeats to the bit. Whoever knows the seed, which "
    "stands in the run's files, can take the noise off: the numbers are the mechanism's, not those of a model beside its seed. "
    "With privacy.key they derive from a secret key instead."
)
_KEYED = (
    "This run was simulated: one machine held the data of all clients and drew all noise and coins, and has to be trusted. They "
    "derive from a secret key (privacy.key) that is in none of the run's files, not from run.seed: whoever knows the seed learns "
    "nothing about the noise, whoever has the key too can take it off."
)
_GATHERED = (
    "Devices come by themselves, which no secret coin decides: no amplification by sampling is counted in either number. A device "
    "is charged for each round in which it was given a plan, before it was given it and whether or not it uploaded; one that came "
    "and was given none is not charged."
)


class RunGrid(DrawnGrid, Protocol):
    """The grid of a run: ``mean`` says what it hands the strategy, ``place`` where its clients live, for the user."""

    mean: bool
    place: str

    def close(self) -> None:
        """Let go of the clients."""
        ...


class FederatedRun:
    """A scenario in ``directory``, over the grid that ``connect`` gives for it; use as a context manager.

    Raises:
        Refused: the scenario is wrong, or the directory holds a run already (without ``resume``) or another scenario's run.
        TryAgain: another process is running it.
    """

    def __init__(self, config: RunConfig, directory: Path, connect: Callable[[Assembly], RunGrid], *, resume: bool) -> None:
        torch.set_num_threads(1)  # results must not depend on the number of cores; workers use the others
        config = continued(config, directory) if resume else begun(config, directory)
        file = config.key_file()
        key = read_key(file) if file else None
        self.directory = directory
        self.assembly = assemble(config)
        self.config = self.assembly.config
        self._publisher = Publisher(self.config, directory, self._fleet()) if config.release.registry else None
        self._keep = False
        with contextlib.ExitStack() as opened:
            if not resume:
                opened.callback(self._give_up, claim(directory))
                write(directory / "config.toml", self.config.to_toml())
            self.assembly = dataclasses.replace(self.assembly, keyed=self._root(key))
            self.grid = connect(self.assembly)
            opened.callback(self.grid.close)
            if key and not self.grid.simulated:
                raise Refused("privacy.key is for simulations: over this grid noise and coins come from the operating system")
            self._store = RunStore(directory)
            opened.callback(self._store.close)
            self._ledger = self._open_ledger()
            if self._ledger:
                opened.callback(self._ledger.close)
            protection, fresh = self.assembly.protection, not self.grid.simulated
            budget = Budget(protection, self._ledger, self._store.run_id, fresh_noise=fresh) if self._ledger else None
            self.coordinator = self._coordinate(self._store, budget)
            self._check_continuation()
            if isinstance(self.grid, SecureGrid) and (directory / _BLAMED).exists():
                self.grid.blamed.update(json.loads((directory / _BLAMED).read_text()))
            write(directory / "config.toml", self.config.to_toml())
            write(directory / "partition.json", json.dumps(_partition(self.assembly)))
            self._history = list(self._store.metrics())
            write(directory / "metrics.jsonl", "".join(json.dumps(entry) + "\n" for entry in self._history))
            (directory / "result.json").unlink(missing_ok=True)
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._keep = kind is None or self._hasbegun()
        self._opened.close()

    def _coordinate(self, store: RunStore, budget: Budget | None) -> Coordinator:
        """What runs the rounds."""
        return Coordinator(self.assembly, self.grid, store, budget)

    def _root(self, key: bytes | None) -> RootKey | None:
        """The run's own root key, where it has a secret one or shares a ledger."""
        if key:
            return RootKey.of_key(key, _run_id(self.directory))
        if any(one.ledger for one in self.config.privacy):
            # Releases of several runs of one seed would carry the same noise, which their difference is without.
            return RootKey.of_seed(self.config.run.seed, _run_id(self.directory))
        return None

    def _hasbegun(self) -> bool:
        """Whether a round was finished, or paid for: that is never forgotten."""
        try:
            paid = any(charge.run == self._store.run_id for charge in self._ledger.charges()) if self._ledger else False
            return paid or bool(self._history) or self._store.latest() is not None
        except FedcoreError:  # what cannot be asked may hold a charge
            return True

    def _give_up(self, taken: Claim) -> None:
        """A start that failed leaves nothing, so that the same command can start again."""
        if not self._keep:
            taken.give_up()

    def _open_ledger(self) -> Ledger | None:
        """The ledger of what is protected, for exactly the clients of this run."""
        places = {one.ledger for one in self.config.privacy}
        if not places:
            return None
        if len(places) > 1:
            raise Refused(
                f"[[privacy]]: one run has one ledger, not {' and '.join(sorted(place or 'its own' for place in places))}"
            )
        (place,) = places
        local = place and "://" not in place
        where = self.config.folder / place if local else place or self.directory
        return Ledger(open_ledger(where), self._population())

    def _population(self) -> str:
        """Whom a ledger's names of clients refer to."""
        return f"{self.config.data.dataset} {self.assembly.data.digest()}"

    def _check_continuation(self) -> None:
        """Refuse to go on from a commit that the scenario as it is now cannot have made."""
        done, partition = self.coordinator.progress.round_number, self.directory / "partition.json"
        if done > self.config.run.rounds:
            raise Refused(f"--resume: run.rounds = {self.config.run.rounds}, but {self.directory} has {done} rounds already")
        if done and partition.exists() and json.loads(partition.read_text())["digest"] != self.assembly.data.digest():
            raise Refused(f"--resume: the data behind {self.directory} has changed: its partition is another one now")

    @property
    def first_round(self) -> int:
        """The round that `rounds` begins with."""
        return self.coordinator.progress.round_number + 1

    def rounds(self) -> Iterator[Metrics]:
        """Run the rounds that are left; each is in metrics.jsonl when it is yielded."""
        try:
            yield from self._recorded()
        except RoundFailed:
            self._tell_operator()
            raise
        finally:
            if isinstance(self.grid, SecureGrid) and self.grid.blamed:
                write(self.directory / _BLAMED, json.dumps(self.grid.blamed, indent=2) + "\n")

    def _recorded(self) -> Iterator[Metrics]:
        for metrics in self.coordinator.rounds():
            self._history.append(metrics)
            self._tell_operator()
            with (self.directory / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")
            if self.coordinator.progress.scores and "federated" in metrics:
                write(self.directory / "clients.json", json.dumps(self.coordinator.progress.scores))
            yield metrics | self._released(metrics)

    def _fleet(self) -> Path | None:
        """The folder of the fleet to which releases go out; None where there is none."""
        return None

    def _released(self, metrics: Metrics) -> dict[str, str]:
        """What is told of a release after this round, where one is due before the last."""
        number = metrics["round"]
        if self._publisher is None or not self._publisher.due(number) or number == self.config.run.rounds:
            return {}
        progress = self.coordinator.progress
        scores = metrics if "accuracy" in metrics else self.coordinator.evaluate(progress)
        told = self._publisher.after_round(self.assembly, progress, scores["accuracy"])
        return {"hint": told} if told else {}

    def _tell_operator(self) -> None:
        """Append to a file that only its owner reads what a sum keeps back, without which a failing client is never found."""
        if not (self.assembly.protection.client or self.assembly.secured):
            return
        lines = []
        for one in self.coordinator.observed:
            told = {"round": one.round_number, "cohort": list(one.cohort), "replies": len(one.facts.clients)}
            lines.append(json.dumps({**told, "dropped": one.facts.dropped, **({"failure": one.failure} if one.failure else {})}))
        descriptor = os.open(self.directory / _OPERATOR, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)

    def finish(self) -> dict[str, Any]:
        """Write the model, ``result.json`` and ``report.html``; returns the result."""
        from fedcore.coordinator.model_files import write_model
        from fedcore.report.page import write_report

        last = self._history[-1]
        scores = last if "accuracy" in last else self.coordinator.evaluate(self.coordinator.progress)
        timings = [entry["timing"] for entry in self._history]
        model_bytes, exported = write_model(self.directory / "model", self.assembly, self.coordinator.progress)
        result = {
            "rounds": last["round"],
            "accuracy": scores["accuracy"],
            "loss": scores["loss"],
            **exported,
            "test_examples": len(self.assembly.data.dataset.test),
            "bytes_up": sum(entry["bytes_up"] for entry in self._history),
            "bytes_down": sum(entry["bytes_down"] for entry in self._history),
            "clients_per_second": sum(_worked(entry) for entry in self._history) / sum(t["train"] for t in timings),
            "seconds": sum(timing["seconds"] for timing in timings),
            "dropped": self._dropped(),
            **self._fleet_facts(last),
            **({"ended": self.coordinator.ended} if self.coordinator.ended else {}),
            **({"privacy": self._guarantees(last)} if self._ledger else {}),
            "engine": self.assembly.engine.name,
            "engine_reason": self.assembly.engine.reason,
            "place": self.grid.place,
            **({"secure_aggregation": self.assembly.secured.words(self.config.secagg)} if self.assembly.secured else {}),
            "strategy_replies": self._replies(),
            "parameters": sum(parameter.numel() for parameter in self.assembly.model.parameters()),
            "trainable_parameters": self.assembly.layout.size,
            "model_bytes": model_bytes,
            "version": __version__,
            "seed": self.config.run.seed,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        write(self.directory / "result.json", json.dumps(result, indent=2) + "\n")
        if self._publisher and (told := self._publisher.at_end(last["round"])):
            result["release"] = told
            write(self.directory / "result.json", json.dumps(result, indent=2) + "\n")
        write_report(self.directory)
        return result

    def _replies(self) -> str:
        if self.config.secagg.shards > 1:
            return f"one mean reply for each of {self.config.secagg.shards} shards"
        return "one mean reply" if self.grid.mean else "one reply per client"

    def _fleet_facts(self, last: Metrics) -> dict[str, Any]:
        """What a fleet's speeds came to: time on a virtual clock, and work that was thrown away."""
        thrown = [entry["discarded"] for entry in self._history if "discarded" in entry]
        clock = {"virtual_seconds": last["virtual_seconds"]} if "virtual_seconds" in last else {}
        return clock | ({"discarded": sum(thrown)} if thrown else {})

    def _dropped(self) -> int | None:
        """Clients that were drawn and gave nothing; None where that number is withheld."""
        if self.assembly.protection.client or self.assembly.secured:
            replies = [entry["replies"] for entry in self._history]
            return None if None in replies else sum(entry["cohort"] - entry["replies"] for entry in self._history)
        return sum(len(entry["dropped"]) for entry in self._history)

    def _guarantees(self, last: Metrics) -> dict[str, Any]:
        """By unit what was spent, the noise that was used, and what each of the two numbers assumes."""
        protection, found = self.assembly.protection, {}
        for unit, spent in last["privacy"].items():
            one = protection.example.plan if unit == "example" and protection.example else protection.client
            spending = self._ledger.spending(unit) if self._ledger else None
            found[unit] = spent | {"noise_multiplier": one.noise_multiplier if one else None}
            if not spending:
                continue
            words = asdict(spending.statement)
            if self.grid.simulated:
                words["not_concluded"] = [*words["not_concluded"], _KEYED if self.assembly.root.secret else _SIMULATED]
            if self.grid.gathering:
                words["charged"] = _GATHERED
            sampled = protection.client is not None and 0 < protection.client.rate < 1
            found[unit] |= {"participations": None if sampled else spending.participations, "statement": words}
        return found


class SimulatedRun(FederatedRun):
    """A scenario on this machine's cores."""

    grid: CohortGrid | SecureGrid

    def __init__(self, config: RunConfig, directory: Path, *, resume: bool) -> None:
        if config.asynchronous.buffer and not config.fleet.median_seconds:
            raise Refused("[asynchronous] is simulated on a virtual clock: fleet.median_seconds must be > 0")
        super().__init__(config, directory, _cohort, resume=resume)

    def _coordinate(self, store: RunStore, budget: Budget | None) -> Coordinator:
        config, population = self.assembly.config, len(self.assembly.data.clients)
        fleet = draw_fleet(config.fleet, population, config.run.seed)
        if not config.asynchronous.buffer or fleet is None or isinstance(self.grid, SecureGrid):
            return super()._coordinate(store, budget)
        for key in ("buffer", "concurrency"):
            if getattr(config.asynchronous, key) > population:
                raise Refused(f"asynchronous.{key} is more than the {population} clients of the partition")
        arrivals = VirtualArrivals(self.grid, config.asynchronous, fleet, config.cohort.timeout)
        return BufferedCoordinator(self.assembly, self.grid, store, budget, arrivals)


def _cohort(assembly: Assembly) -> CohortGrid | SecureGrid:
    workers = _workers(assembly)
    clients, layout, secured = build_clients(assembly), assembly.layout, assembly.secured
    released = assembly.protection.released
    if secured is None:
        mean, one = accepts_mean(assembly.strategy), assembly.config.asynchronous
        versions = min(1 + one.max_staleness, one.buffer, _VERSIONS) if one.buffer else 1
        return CohortGrid(clients, layout, mean=mean, workers=workers, released=released, versions=versions)
    trust = simulated_trust(assembly.config, secured)
    inner = CohortGrid(
        clients, layout, mean=True, workers=workers, released=max(released, secured.largest),
        participants=trust.participants if trust else None,
    )  # fmt: skip
    return secured.wrap(inner, layout, trust.committee if trust else None, assembly.config.run.name)


def _workers(assembly: Assembly) -> int | Literal["ray"]:
    """What trains: processes of this machine, one of them where that has an accelerator; or those of a Ray cluster.

    Raises:
        Refused: a Ray cluster cannot do this scenario's work, or must not.
    """
    asked, on_cpu = assembly.config.engine.workers, assembly.engine.device == "cpu"
    if asked != "ray":
        return (asked or available_workers()) if on_cpu else 1
    if not on_cpu:
        raise Refused('engine.workers = "ray" trains on CPUs: set engine.device = "cpu"')
    if assembly.root.secret:
        raise Refused("privacy.key: a secret key does not travel to the nodes of a Ray cluster; set engine.workers to a number")
    if assembly.secured and assembly.config.secagg.simulate == "protocol":
        raise Refused(
            "[secagg]: the keys of clients do not travel to the nodes of a Ray cluster; set engine.workers to a number, or "
            'secagg.simulate = "arithmetic", which has the same bits'
        )
    return "ray"


def _run_id(directory: Path) -> str:
    """The run's id; the store is closed again, since workers that are forked must not inherit it."""
    store = RunStore(directory)
    store.close()
    return store.run_id


def _worked(entry: Metrics) -> int:
    """Clients of a round: those that replied, or those planned where the number of replies is withheld."""
    return int(entry["cohort"] if entry["replies"] is None else entry["replies"])


def _partition(assembly: Assembly) -> Mapping[str, Any]:
    data = assembly.data
    return {
        "labels": list(data.dataset.labels),
        "label_counts": np.asarray(data.label_counts()).tolist(),
        "holdout": [len(part) for part in data.holdout],
        "calibration": len(data.calibration),
        "test": len(data.dataset.test),
        "seed": assembly.config.run.seed,
        "digest": data.digest(),
    }
