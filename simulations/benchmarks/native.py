"""Rounds of the native engine by itself: private clients beside plain ones, several processes beside one, and the machine's peak.

The work is that of `throughput` (100 clients, 50 examples, batches of 10), without a coordinator: the units of a round, which
processes that share memory take, train and add up. What is compared takes turns in one run; ratios are medians over the turns.

    python -m simulations.benchmarks.native --model cnn --json

``private_vs_plain`` is processor time in this process with one example as the unit of privacy (clipping norm 1, noise multiplier 1)
over that of plain rounds, per example trained on: Poisson batches draw 50 examples of a client only on average.
``vs_one`` is the time of one process over that of several. ``peak_share``: operations of all layers a second in plain rounds of
one process, over those of this machine's best matrix product of one thread, measured in between.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from fedcore.config import RunConfig
from fedcore.coordinator.assembly import build_clients
from fedcore.errors import Refused
from fedcore.models import ZOO
from fedcore.native.explain import operations, peak_gflops
from fedcore.native.trainer import NativeTrainer
from fedcore.quantization.layers import calibrate
from fedcore.training.client import Clients, RoundTask
from fedcore.training.plan import DpSgdPlan, poisson_batches
from simulations.benchmarks.throughput import EXAMPLES, PLAN, assembly, scenario, show

PRIVATE = replace(PLAN, dp=DpSgdPlan(clipping_norm=1.0, noise_multiplier=1.0))
LIMIT = 1e9  # norm of an update: none is refused


class Processes:
    """So many processes that work on a round together; made once, since a fork takes as long as some rounds."""

    def __init__(self, clients: Clients, start: torch.Tensor, count: int) -> None:
        self.clients, self.start = clients, start
        self.everybody = range(len(clients.data.clients))
        self.board = clients.board(len(self.everybody), count)
        context = multiprocessing.get_context("fork")
        self.pipes: list[Connection] = []
        self.children = []
        for _ in range(count - 1):
            ours, theirs = context.Pipe()
            child = context.Process(target=self._serve, args=(theirs,), daemon=True)
            child.start()
            self.pipes.append(ours)
            self.children.append(child)

    def seconds(self, task: RoundTask) -> tuple[float, float]:
        """A round's time, and the processor's in this process."""
        self.board.begin()
        began, processor = time.perf_counter(), time.process_time()
        for pipe in self.pipes:
            pipe.send(task)
        self.clients.add_up(self.start, self.everybody, task, self.board)
        for pipe in self.pipes:
            pipe.recv()
        found = time.perf_counter() - began, time.process_time() - processor
        if self.clients.added(self.everybody, task, self.board).others:
            raise Refused("benchmark: a client's update is not usable")
        return found

    def close(self) -> None:
        """End the processes."""
        for child in self.children:
            child.terminate()
            child.join()

    def _serve(self, pipe: Connection) -> None:
        torch.set_num_threads(1)
        while True:
            self.clients.add_up(self.start, self.everybody, pipe.recv(), self.board)
            pipe.send(None)


def measure(config: RunConfig, clients: int, rounds: int, threads: Sequence[int]) -> dict[str, Any]:
    """All that is compared, in turn."""
    built = assembly(config, clients)
    train = built.data.dataset.train
    ranges = {}
    if config.quantization.enabled:
        ranges = calibrate(built.model, [torch.from_numpy(train.take(built.data.calibration).x)])
    members = build_clients(built)
    if not isinstance(members.trainer, NativeTrainer):
        raise Refused(f"benchmark: the engine is {built.engine.name}: {built.engine.reason}")
    start = torch.cat([p.detach().reshape(-1) for p in built.model.parameters() if p.requires_grad])
    teams = {count: Processes(members, start, count) for count in (1, *threads)}
    plain, private = [], []
    walls: dict[int, list[float]] = {count: [] for count in teams}
    peaks = []
    for number in range(1, rounds + 2):
        task = RoundTask(number, PLAN, LIMIT, ranges)
        processor = {}
        for count, team in teams.items():
            wall, processor[count] = team.seconds(task)
            walls[count].append(wall)
        plain.append(processor[1] / (EXAMPLES * clients))
        secret = replace(task, plan=PRIVATE)
        private.append(teams[1].seconds(secret)[1] / _drawn(members, secret))
        peaks.append(peak_gflops())
    for team in teams.values():
        team.close()
    worker = members.trainer.worker(train.shape)
    each = statistics.median(plain[1:])  # the first of each warms up
    return {
        "model": config.model.name,
        "qat": config.quantization.enabled,
        "plain_ms_per_client": 1e3 * EXAMPLES * each,
        "private_ms_per_client": 1e3 * EXAMPLES * statistics.median(private[1:]),
        "private_vs_plain": statistics.median(b / a for a, b in zip(plain[1:], private[1:], strict=True)),
        **{f"vs_one_{n}": _ratio(walls[1][1:], walls[n][1:]) for n in threads},
        "peak_gflops": statistics.median(peaks),
        "peak_share": operations(worker.blocks) / each / 1e9 / statistics.median(peaks),
    }


def _ratio(one: Sequence[float], other: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def _drawn(clients: Clients, task: RoundTask) -> int:
    """Examples in the Poisson batches of a round."""
    parts = enumerate(clients.data.clients)
    return sum(len(batch) for n, part in parts for batch in poisson_batches(len(part), task.plan, clients.coins(n, task)))


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="Rounds of the native engine by itself: private beside plain, processes, peak.")
    parser.add_argument("--model", choices=tuple(ZOO), default="cnn")
    parser.add_argument("--qat", action="store_true", help="train quantization-aware")
    parser.add_argument("--threads", type=int, nargs="*", default=[2], help="numbers of processes to compare with one")
    parser.add_argument("--clients", type=int, default=100, help="clients a round")
    parser.add_argument("--rounds", type=int, default=15, help="rounds measured of each")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = scenario(given.model, given.clients, qat=given.qat, name="native")
    show(measure(config, given.clients, given.rounds, given.threads), as_json=given.json)


if __name__ == "__main__":
    main()
