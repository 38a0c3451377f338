"""Workers of a Ray cluster: the units of a process pool as calls of actors, one actor for each CPU of the cluster.

The handler, with all data, lies in the object store of a node once, where its workers share it; the parameters of a round likewise.
A Ray cluster trusts everybody who reaches it, who can run code on all of its nodes: it belongs into a network of its own.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedcore import __version__
from fedcore.errors import Refused, RoundFailed
from fedcore.grids.pool import Doubles, Handler, check_deadline
from fedcore.grids.ray_cluster import Node, join_cluster
from fedcore.grids.schedule import Schedule
from fedcore.grids.travel import NotHere
from fedcore.native.build import BuildFailed

__all__ = ["Portable", "RayPool"]

_LOG = logging.getLogger(__name__)
_TRIES = 3  # of a unit, before the round fails
_LONGEST_START = 300.0  # seconds until the first worker is there
_TELLING = 30.0  # seconds until the user is told what takes so long
_PARTS = 4  # in which a worker gets its units: fewer cost fewer messages, more let workers end at the same time
_MOST = 1 << 25  # bytes of vectors in a message, if it is more than one
_SLICE = 1.0  # seconds between looks at the deadline


class Portable(Handler, Protocol):
    """A handler that can be made anew on another machine."""

    def packed(self, *, files: bool) -> Callable[[], Handler]:
        """What pickles and makes the handler; with ``files`` it may name files, and raise `NotHere` where one is missing."""
        ...


class Host:
    """What an actor is: it makes its handler once, and then does one unit after another."""

    def begin(self, wanted: Mapping[str, str], packed: Callable[[], Handler], out_size: int) -> None:
        """Make ready; raises where results would differ from the coordinator's, or could not be had."""
        if (found := _versions()) != wanted:
            told = ", ".join(f"{name} {found[name]}, not {wanted[name]}" for name in wanted if found[name] != wanted[name])
            raise Refused(f"it has {told}, with which results may differ")
        self._handler, self._out, self._call = packed(), np.zeros(out_size), -1

    def see(self, call: int, shared: Doubles) -> None:
        """The numbers that the units of a call of `RayPool.map` share; before the first of them."""
        self._call, self._shared = call, shared.copy()  # what arrives cannot be written to

    def work(self, call: int, jobs: Sequence[Any]) -> list[tuple[Any, Doubles | None]]:
        """The result and vector of each unit; None for a vector of zeros."""
        if call != self._call:
            raise RuntimeError(f"call {call} has shared no numbers with it")
        found = []
        for job in jobs:
            result = self._handler(job, self._shared, self._out)
            found.append((result, self._out.copy() if self._out.any() else None))
        return found


@dataclass(frozen=True)
class _Member:
    """A worker; ``ready`` is what its beginning was promised as. A ``spare`` takes the place of a lost one, if its node lives."""

    actor: Any
    node: Node
    ready: Any
    spare: bool


class _Call:
    """A call of `RayPool.map`: its ``parcels`` of units, which worker is ``running`` which of them by promise, the results of those
    that are done ``early``, and which workers were sent what it shares."""

    def __init__(self, number: int, shared: Any, parcels: list[Sequence[Any]]) -> None:
        self.number, self.shared, self.parcels = number, shared, parcels
        self.schedule = Schedule(len(parcels))
        self.early: dict[int, list[tuple[Any, Doubles | None]]] = {}
        self.running: dict[Any, tuple[int, int]] = {}
        self.seeing: set[int] = set()

    def forget(self, worker: int) -> None:
        """A worker is gone, and keeps no promise."""
        self.running = {promise: given for promise, given in self.running.items() if given[0] != worker}


class RayPool:
    """The workers of the Ray cluster that this machine belongs to, around one handler; results are those of `pool.WorkerPool`.

    ``shared`` [shared_size] is written between calls of `map`, and travels once for each. Code of the user's own modules travels
    with the handler.

    Raises:
        Refused: no Ray, no cluster, or no worker in it that can begin.
    """

    def __init__(self, handler: Portable, shared_size: int, out_size: int) -> None:
        packed = handler.packed(files=True)
        self._handler: Portable | None = handler
        self._ray, self.nodes, self._joined = join_cluster()
        self.shared, self._nothing = np.zeros(shared_size), np.zeros(out_size)
        self._nothing.setflags(write=False)
        self._members: dict[int, _Member] = {}
        self._begun: set[int] = set()
        self._told: set[str] = set()
        self._reason, self._next, self._calls = "", 0, 0
        try:
            self._actor = self._ray.remote(num_cpus=1, max_restarts=0)(Host)
            self._packed = self._put(packed)
            self._whole: Any = None  # the same without files, once a node asks for it
            for node in self.nodes:
                for _ in range(node.cpus):
                    self._start(node, self._packed)
            self.workers = len(self._members)
            self._await_one()
        except BaseException:
            self.close()
            raise

    @property
    def place(self) -> str:
        """Where the work is done, for the user."""
        nodes, workers = len(self.nodes), self.workers
        return f"ray, {nodes} node{'s' if nodes > 1 else ''}, {workers} worker{'s' if workers > 1 else ''}"

    def map(self, jobs: Sequence[Any], timeout: float | None = None) -> Iterator[tuple[Any, Doubles]]:
        """Results in the order of ``jobs``, each with its vector, which is read-only. What a lost worker had goes to the others.

        Raises:
            RoundFailed: a unit failed three times, no worker is left, or ``timeout`` seconds passed.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        self._calls += 1
        call = _Call(self._calls, self._ray.put(self.shared), self._parcels(jobs))
        self._told.clear()
        for worker in self._begun:
            call.schedule.join(worker)
        while call.schedule.taken < len(call.parcels):
            self._hand_out(call)
            if call.schedule.taken in call.early:
                for result, vector in call.early.pop(call.schedule.taken):
                    yield result, self._nothing if vector is None else vector
                call.schedule.taken += 1
                continue
            if not self._members:
                raise RoundFailed(f"all workers of the Ray cluster were lost; the last one: {self._reason}")
            for promise in self._wait([*call.running, *self._starting()], deadline):
                if promise in call.running:
                    self._collect(promise, call)
                elif promise in (starting := self._starting()):  # a worker that died meanwhile promises nothing
                    self._greet(starting[promise], call)

    def _parcels(self, jobs: Sequence[Any]) -> list[Sequence[Any]]:
        """Units that travel together, and their vectors back: a quarter of what a worker does in a call, if that is not too much
        memory."""
        size = max(1, min(len(jobs) // (_PARTS * max(1, len(self._members))), _MOST // max(1, self._nothing.nbytes)))
        return [jobs[first : first + size] for first in range(0, len(jobs), size)]

    def _hand_out(self, call: _Call) -> None:
        for worker, number in call.schedule.hand_out():
            actor = self._members[worker].actor
            if worker not in call.seeing:
                actor.see.remote(call.number, call.shared)
                call.seeing.add(worker)
            call.running[actor.work.remote(call.number, call.parcels[number])] = worker, number

    def close(self) -> None:
        """End the workers, and leave the cluster if this pool joined it."""
        for member in self._members.values():
            with contextlib.suppress(Exception):  # it may be gone
                self._ray.kill(member.actor)
        self._members, self._begun, self._handler = {}, set(), None
        self._packed = self._whole = None
        if self._joined:
            self._ray.shutdown()

    def _put(self, packed: Callable[[], Handler]) -> Any:
        with _users_modules_by_value(self._ray):
            return self._ray.put(packed)

    def _start(self, node: Node, packed: Any, *, spare: bool = False) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        actor = self._actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote()
        self._begin(self._next, actor, node, packed, spare=spare)
        self._next += 1

    def _begin(self, worker: int, actor: Any, node: Node, packed: Any, *, spare: bool) -> None:
        self._members[worker] = _Member(actor, node, actor.begin.remote(_versions(), packed, len(self._nothing)), spare)

    def _starting(self) -> dict[Any, int]:
        return {member.ready: worker for worker, member in self._members.items() if worker not in self._begun}

    def _await_one(self) -> None:
        """Wait for the first worker."""
        deadline, telling = time.monotonic() + _LONGEST_START, time.monotonic() + _TELLING
        while not self._begun:
            if not self._members:
                raise Refused(f'engine.workers = "ray": no worker of the cluster can begin; the last one: {self._reason}')
            if time.monotonic() > deadline:
                raise Refused(f'engine.workers = "ray": no CPU of the cluster came free in {_LONGEST_START:.0f} s')
            if time.monotonic() > telling:
                self._tell("waiting for a free CPU of the Ray cluster")
            starting = self._starting()
            ready, _ = self._ray.wait(list(starting), timeout=_SLICE)
            for promise in ready:
                self._greet(starting[promise], None)

    def _wait(self, promises: list[Any], deadline: float | None) -> list[Any]:
        left = _SLICE if deadline is None else deadline - time.monotonic()
        ready, _ = self._ray.wait(promises, timeout=min(_SLICE, max(0.0, left)))
        check_deadline(deadline)
        return list(ready)

    def _greet(self, worker: int, call: _Call | None) -> None:
        """A worker has begun, or cannot."""
        member = self._members[worker]
        try:
            self._ray.get(member.ready)
        except Exception as error:  # noqa: BLE001 - whatever a node lacks; the others go on
            if isinstance(getattr(error, "cause", None), NotHere) and self._handler is not None:
                self._whole = self._whole or self._put(self._handler.packed(files=False))
                self._begin(worker, member.actor, member.node, self._whole, spare=member.spare)
                return
            self._leave_out(worker, "" if member.spare else "cannot begin and is left out", error)
            return
        self._begun.add(worker)
        if call is not None:
            call.schedule.join(worker)

    def _collect(self, promise: Any, call: _Call) -> None:
        """Take the results of units; where there are none, the units go to another worker."""
        worker, number = call.running.pop(promise)
        try:
            call.early[number] = self._ray.get(promise)
        except Exception as error:
            if isinstance(getattr(error, "cause", None), BuildFailed):  # the node's fault, and no unit's
                call.schedule.leave(worker)
                call.forget(worker)
                self._leave_out(worker, "cannot train and is left out; its clients go to others", error)
                return
            if isinstance(error, self._ray.exceptions.RayTaskError):
                self._reason = _reason(error)
                tries = call.schedule.fail(worker, number)
            else:
                tries = call.schedule.lose(worker)
                call.forget(worker)
                node = self._leave_out(worker, "was lost; its clients go to others", error)
                self._start(node, self._whole or self._packed, spare=True)
            if tries >= _TRIES:
                raise RoundFailed(f"a work unit failed on {_TRIES} workers of the Ray cluster: {self._reason}") from error
            return
        call.schedule.done(worker, number)

    def _leave_out(self, worker: int, what: str, error: Exception) -> Node:
        member = self._members.pop(worker)
        with contextlib.suppress(Exception):  # it may be gone
            self._ray.kill(member.actor)
        self._begun.discard(worker)
        self._reason = f"{member.node.address}: {_reason(error)}"
        if what:
            self._tell(f"a Ray worker on {member.node.address} {what} ({_reason(error)})")
        return member.node

    def _tell(self, line: str) -> None:
        """Once a round."""
        if line not in self._told:
            self._told.add(line)
            _LOG.warning("%s", line)


def _versions() -> dict[str, str]:
    return {"fedcore": __version__, **{name: version(name) for name in ("numpy", "torch")}}


def _reason(error: Exception) -> str:
    """Why, in one line; of what a worker raised, its own words."""
    cause = getattr(error, "cause", None)
    told = cause if isinstance(cause, Exception) else error
    line = next((line.strip() for line in str(told).splitlines() if line.strip()), "")
    return f"{type(told).__name__}: {line}" if line else type(told).__name__


@contextlib.contextmanager
def _users_modules_by_value(ray: Any) -> Iterator[None]:
    """Inside, classes of modules that no package installed, as a model beside the scenario, are pickled with their code."""
    registered = [module for name, module in list(sys.modules.items()) if _is_users(name, getattr(module, "__file__", None))]
    for module in registered:
        ray.cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in registered:
            ray.cloudpickle.unregister_pickle_by_value(module)


def _is_users(name: str, file: str | None) -> bool:
    top = name.partition(".")[0]
    if file is None or top in {"__main__", "fedcore"} or top in sys.stdlib_module_names:
        return False
    return not {"site-packages", "dist-packages"} & set(Path(file).parts)
