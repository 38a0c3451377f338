"""Released models on a device: asks which release it should have, installs it beside the one that runs, and keeps it if it is well.

`Updater.step` does what is due and is called by the agent between rounds. Everything that must not be forgotten is on the disk
before it counts: ``updates.json`` (the last assignment, rollouts, what was told), ``repository/`` (what protects from old
metadata) and the slots of every model. What reads a repository is imported when there is something to install, not before.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from fedcore.errors import Refused, TryAgain
from fedcore.gateway import gateway_pb2 as pb
from fedcore.registry.disk import Disk, alone
from fedcore.registry.slots import Pointer, Store, read_pointer
from fedcore_device.environment import Environment, hardware_name
from fedcore_device.installed import TIERS, health_path, keep_trial, model_directory, read_trials
from fedcore_device.policy import Policy
from fedcore_device.runtime_health import read_health
from fedcore_device.self_test import Bounds, self_test
from fedcore_device.standing import STANDINGS, Standing, judge, read_standings, signals_of
from fedcore_device.state import State

__all__ = ["ASKED", "Identity", "Server", "Updater"]

_LOG = logging.getLogger(__name__)
ASKED = "update.now"
"""A file that asks a running agent to look now."""
_REFRESH, _DOWNLOAD = 60.0, 900.0  # seconds for metadata, and for each file; a download goes on where it stopped
_SHORTEST, _LONGEST = 1.0, 86_400.0  # seconds between two questions
_FIRST_PAUSE, _LONGEST_PAUSE = 60.0, 3600.0  # after one that failed, doubled each time
_ROLLOUTS = 8  # that are remembered


class _Unfit(Refused):
    """A release that this device tried and found unfit: a finding to be told, not a failure to be waited out."""


class Server(Protocol):
    """What is asked of a gateway: `fedcore.gateway.client.GatewayClient`."""

    def release(self, body: pb.ReleaseBody) -> pb.ReleaseReply:
        """Tell how releases did, and ask which one the device should have."""
        ...

    def repository(self, token: bytes) -> Any:
        """The repository's files, as a `fedcore.registry.fetch.Fetcher`."""
        ...


@dataclass(frozen=True)
class Identity:
    """Who asks, and what it pinned at enrolment: SHA-256 of its identity key, keys that assign, the repository's root."""

    device: bytes
    keys: tuple[bytes, ...]
    root: bytes


class Updater:
    """Keeps the models that the owner's policy names up to date.

    Args:
        connected: a connection to a gateway, for a while. disk: a test's, that fails where it wants.
        elapsed: seconds that pass, also while the device sleeps.
    """

    def __init__(
        self, state: State, environment: Environment, policy: Policy, identity: Identity,
        connected: Callable[[], AbstractContextManager[Server]], *, disk: Disk | None = None,
        elapsed: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
    ) -> None:  # fmt: skip
        self._state, self._environment, self._policy = state, environment, policy
        self._identity, self._connected, self._disk, self._elapsed = identity, connected, disk, elapsed
        self._standings = read_standings(state)
        self._started: set[str] = set()

    def why_not(self) -> str:
        """Why nothing is installed now; empty where it is."""
        return self._policy.updates.why_not(self._environment.conditions(training=False), self._environment.clock())

    def step(self, stopped: Callable[[], bool] = lambda: False, *, now: bool = False) -> None:
        """Look after every model: count the start, judge the one on probation, and ask for the next one where that is due.

        ``now``: whatever the gateway said of the next time, and whatever the conditions are. What goes wrong is kept as the
        model's problem.

        Raises:
            GatewayRefusal: the gateway refuses, and not for the model's sake.
        """
        asked = self._state.directory / ASKED
        if asked.exists():
            asked.unlink(missing_ok=True)
            now = True
        for model in self._policy.updates.models:
            try:
                self._look_after(model, stopped, now)
            except _Unfit as error:
                self._found_unfit(model, str(error))
            except (Refused, TryAgain) as error:
                from fedcore.gateway.refusals import GatewayRefusal

                self._failed(model, str(error))
                if isinstance(error, GatewayRefusal):
                    raise
            except OSError as error:
                self._failed(model, f"{error.filename or 'a file'}: {error.strerror}")

    def _found_unfit(self, model: str, problem: str) -> None:
        """The gateway and the repository did their part, so nothing is waited out: the next step tells."""
        _LOG.warning("%s: %s", model, problem)
        with contextlib.suppress(TryAgain):  # a full disk: it is told when the gateway wants to be asked again
            self._keep(model, problem=problem, failures=0, due=0.0)

    def _look_after(self, model: str, stopped: Callable[[], bool], now: bool) -> None:
        place = model_directory(self._state.directory, model)
        self._begin(model, place)
        self._judge(model, place)
        if stopped() or not (now or self._due(model)) or not (now or not self.why_not()):
            return
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.ExitStack() as held:
            store = held.enter_context(Store(place, self._disk))
            server = held.enter_context(self._connected())
            self._update(model, place, store, server, stopped)
        self._keep(model, problem="", failures=0)

    def _due(self, model: str) -> bool:
        """Whether to ask; a clock that was set back does not put it off for longer than a day."""
        left = self._standing(model).due - self._environment.clock()
        return not 0 < left <= _LONGEST

    def _begin(self, model: str, place: Path) -> None:
        """Once for each start of the agent: a release that never gets well gives way to the one before."""
        if model not in self._started and place.exists():
            with Store(place, self._disk) as store:
                before = store.pointer
                with contextlib.suppress(Refused):  # nothing to go back to: fetched anew, see `_update`
                    store.start()
                fell_back = store.pointer.unfit != before.unfit
            self._started.add(model)
            if fell_back:
                self._keep(model, due=0.0)

    def _judge(self, model: str, place: Path) -> None:
        """Keep the release that is on probation, or take it back; the gateway hears of it in the same step.

        Harm is told whatever was waited for, once; that all is well waits out a failure.
        """
        pointer = read_pointer(place) if place.exists() else Pointer()
        if pointer.current is None or pointer.starts is None:
            return
        seconds = self._environment.clock() - self._standing(model).switched
        verdict, why = judge(read_health(health_path(place, pointer.current.version)), seconds, self._policy.updates.probation)
        if verdict == "wait":
            return
        if verdict == "ill" and pointer.previous is None:
            return  # the first release there ever was: there is nothing to go back to, and the gateway is told
        with Store(place, self._disk) as store:
            if verdict == "well":
                store.commit()
            else:
                good = store.fall_back(why)
        if verdict == "well":
            _LOG.info("release %d of %s is well", pointer.current.version, model)
            if not self._standing(model).failures:
                self._keep(model, due=0.0)
            return
        _LOG.warning("release %d of %s was taken back (%s); release %d runs", pointer.current.version, model, why, good.version)
        self._keep(model, due=0.0)

    def _update(self, model: str, place: Path, store: Store, server: Server, stopped: Callable[[], bool]) -> None:
        """Report, ask, and install what is assigned."""
        failed = self._untold(model, store.pointer)
        reply = server.release(self._body(model, place, store.pointer, failed))
        clock = self._server_clock(reply)
        told = (*self._standing(model).told, *failed)[-_ROLLOUTS:]
        wait = min(max(reply.retry_after_ms / 1000, _SHORTEST), _LONGEST)
        self._keep(model, told=told, due=self._environment.clock() + wait)
        if not reply.assignment:
            return
        from fedcore.registry.assignment import check_assignment

        known = self._standing(model)
        assigned = check_assignment(reply.assignment, self._identity.keys, self._identity.device, known.sequence, clock())
        if assigned.model != model:
            raise Refused(f"the assignment is for {assigned.model!r}, asked was for {model!r}")
        rollouts = {**known.rollouts, str(assigned.version): assigned.rollout}
        newest = sorted(rollouts, key=int)[-_ROLLOUTS:]
        self._keep(model, sequence=assigned.sequence, rollouts={version: rollouts[version] for version in newest})
        current = store.pointer.current
        damaged = current is not None and not all(store.holds(one.digest) for one in current.files.values())
        if assigned.version <= store.pointer.highest and not (damaged and current and assigned.version == current.version):
            return  # what it has, or what it will not go back to
        if assigned.version < self._policy.updates.minimum_version:
            raise Refused(f"release {assigned.version} is below [updates] minimum_version = {self._policy.updates.minimum_version}")
        self._install(model, place, store, assigned, self._fetcher(server, reply, stopped), clock)

    def _install(self, model: str, place: Path, store: Store, assigned: Any, fetcher: Any, clock: Callable[[], float]) -> None:
        """Fetch, try and switch.

        Raises:
            _Unfit: the self-test found it so. Refused: not what is signed or assigned. TryAgain: not now.
        """
        from datetime import UTC, datetime

        from fedcore.registry.assignment import still_good
        from fedcore.registry.client import Client
        from fedcore.registry.install import install

        before = store.pointer.current
        directory = self._state.directory / "repository"
        directory.mkdir(mode=0o700, exist_ok=True)
        with alone(directory):
            client = Client(directory, fetcher, self._identity.root)
            catalogue = client.refresh(datetime.fromtimestamp(clock(), UTC), _REFRESH)
            client.collect(catalogue)

            def recheck() -> None:
                still_good(assigned, catalogue.digest(model, assigned.version), clock())

            recheck()
            if store.pointer.current is not None and store.pointer.current.version == assigned.version:
                self._repair(store, client, catalogue)
                return
            wanted = self._wanted(catalogue, model, assigned.version)
            largest = self._policy.updates.largest_bytes  # also of what a delta on the way gives: the agent itself unpacks it
            within = replace(catalogue, entries=tuple(one for one in catalogue.entries if one.size <= largest))
            try:
                install(
                    store, client, within, model, assigned.version, wanted,
                    lambda files, batch: self._try(place, assigned.version, files, batch), recheck, _DOWNLOAD,
                )  # fmt: skip
            except Refused as error:
                if str(assigned.version) in store.pointer.unfit:
                    raise _Unfit(str(error)) from error
                raise
        self._drop_health(place, store.pointer)
        _LOG.info("release %d of %s is installed, after %s", assigned.version, model, before.version if before else "none")
        self._keep(model, switched=self._environment.clock(), due=0.0)  # how it was is told at once

    def _repair(self, store: Store, client: Any, catalogue: Any) -> None:
        """Fetch what is damaged of the current release anew.

        Raises:
            Refused: the repository does not have it any more. TryAgain: not now.
        """
        from fedcore.registry.install import obtain

        offered = {entry.digest.hex(): entry for entry in catalogue.entries}
        for name, one in (store.pointer.current.files if store.pointer.current else {}).items():
            if one.digest not in offered:
                raise Refused(f"{name} is damaged, and the repository does not offer it any more")
            obtain(store, client, catalogue, offered[one.digest], _DOWNLOAD)

    def _wanted(self, catalogue: Any, model: str, version: int) -> list[tuple[str, str]]:
        """The device's own tier and the lower ones, which run when it is hot; all where the owner names no tier.

        Raises:
            Refused: the release has nothing for this device, or a file is larger than allowed.
        """
        from fedcore.registry.catalogue import ARTEFACT, SELF_TEST

        limits, tier = self._policy.updates, self._policy.device.tier
        entries = [one for one in catalogue.entries if one.kind in {ARTEFACT, SELF_TEST} and one.release == (model, version)]
        if too_large := [one for one in entries if one.size > limits.largest_bytes]:
            raise Refused(f"{too_large[0].path} has {too_large[0].size} bytes; [updates] largest_bytes = {limits.largest_bytes}")
        offered = [str(one.custom["tier"]) for one in entries if one.custom.get("runtime") == limits.runtime]
        lower = TIERS[TIERS.index(tier) :] if tier in TIERS else (tier,)
        fitting = [one for one in offered if not tier or one in lower]
        if not fitting:
            shown = ", ".join(sorted(set(offered))) or "no tier"
            raise Refused(f"release {version} of {model} has nothing for tier {tier or 'any'} and {limits.runtime}; it has {shown}")
        return [(one, limits.runtime) for one in fitting]

    def _try(self, place: Path, version: int, files: Mapping[str, Path], batch: Path | None) -> None:
        limits = self._policy.updates
        bounds = Bounds(limits.memory, float(limits.seconds), limits.p95_ms, limits.agreement)
        keep_trial(place, version, self_test(files, batch, bounds))

    def _body(self, model: str, place: Path, pointer: Pointer, failed: Iterable[int]) -> pb.ReleaseBody:
        facts, rollouts = self._policy.device, self._standing(model).rollouts
        trials, health = read_trials(place), []
        if pointer.current is not None and str(pointer.current.version) in rollouts:
            version = pointer.current.version
            values = signals_of(trials.get(version), read_health(health_path(place, version)))
            measures = [pb.Measure(signal=name, value=value) for name, value in sorted(values.items())]
            health.append(pb.Health(rollout=rollouts[str(version)], version=version, measures=measures))
        for version in failed:
            why = pointer.unfit.get(str(version), "")
            health.append(pb.Health(rollout=rollouts[str(version)], version=version, refused=why[:200] or "unfit"))
        return pb.ReleaseBody(
            model=model, tier=facts.tier, runtime=self._policy.updates.runtime, hardware=hardware_name(), labels=facts.labels,
            version=pointer.current.version if pointer.current else 0, health=health,
        )  # fmt: skip

    def _untold(self, model: str, pointer: Pointer) -> list[int]:
        """Versions that were found unfit, and that the gateway has not heard of."""
        known = self._standing(model)
        return [int(one) for one in pointer.unfit if one in known.rollouts and int(one) not in known.told]

    def _server_clock(self, reply: pb.ReleaseReply) -> Callable[[], float]:
        """Unix seconds by the gateway's clock, which it signed over this question: the device's own may be a year off."""
        then, began = reply.server_time.time_ms / 1000, self._elapsed()
        return lambda: then + self._elapsed() - began

    def _fetcher(self, server: Server, reply: pb.ReleaseReply, stopped: Callable[[], bool]) -> Any:
        if self._policy.updates.repository:
            from fedcore.registry.fetch import HttpFetcher

            return _Stoppable(HttpFetcher(self._policy.updates.repository), stopped)
        if not reply.token:
            raise Refused("the gateway serves no repository; [updates] repository names another place")
        return _Stoppable(server.repository(reply.token), stopped)

    def _drop_health(self, place: Path, pointer: Pointer) -> None:
        kept = {str(one.version) for one in (pointer.current, pointer.previous) if one}
        for path in (place / "health").glob("*"):
            if path.stem not in kept:
                path.unlink(missing_ok=True)

    def _standing(self, model: str) -> Standing:
        return self._standings.get(model, Standing())

    def _keep(self, model: str, **changes: Any) -> None:
        """Change a standing, durably.

        Raises:
            TryAgain: the disk is full.
        """
        found = replace(self._standing(model), **changes)
        if found != self._standing(model):
            table = {name: asdict(one) for name, one in ({**self._standings, model: found}).items()}
            self._state.keep(STANDINGS, json.dumps(table).encode())
            self._standings[model] = found

    def _failed(self, model: str, problem: str) -> None:
        """Note what went wrong, and ask again later: the more often it did, the later, and not all devices at once."""
        failures = self._standing(model).failures + 1
        pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(failures - 1, 8)) * random.uniform(0.5, 1.5)  # noqa: S311 - no secret
        _LOG.warning("%s: %s", model, problem)
        with contextlib.suppress(TryAgain):  # a full disk is a problem itself
            self._keep(model, problem=problem, failures=failures, due=self._environment.clock() + pause)


class _Stoppable:
    """A fetcher that ends when the agent does; what was fetched stays."""

    def __init__(self, inner: Any, stopped: Callable[[], bool]) -> None:
        self._inner, self._stopped = inner, stopped

    @contextlib.contextmanager
    def open(self, name: str, offset: int, seconds: float) -> Iterator[Any]:
        """See `fedcore.registry.fetch.Fetcher`."""
        with self._inner.open(name, offset, seconds) as reply:
            yield reply and replace(reply, pieces=self._pieces(reply.pieces))

    def _pieces(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            if self._stopped():
                raise TryAgain("the agent ends; the download goes on when it runs again")
            yield piece
