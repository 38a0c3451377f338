"""Rounds of federated training, beside the same work in a plain torch loop on two processes.

The work: 100 clients with 50 synthetic examples of 1x28x28 each (imu_cnn: 6x64), one local epoch, batch 10, SGD 0.1. Ours is the
whole coordinator: strategy, messages, grid, durable commit of every round. The plain loop is what one would write without it: two
forked processes with half of the clients each, torch.optim.SGD, a weighted sum. Both are measured in turn in one run; medians
are printed, and max_abs_diff is the largest difference of a parameter after one round.

    python -m simulations.benchmarks.throughput --model cnn --qat --json

With --workers ray the cluster that this machine belongs to does it, and the process pool beside it in the same run.
With --dp the work is private (DP-SGD, clipping norm 1, noise multiplier 1) and the loop beside it Opacus's; both then run in this
process alone, without a coordinator.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from fedcore.config import RunConfig, parse_config
from fedcore.coordinator.assembly import Assembly, build_clients
from fedcore.coordinator.rounds import Coordinator
from fedcore.coordinator.strategy import accepts_mean, build_strategy
from fedcore.data import Dataset, Examples, FederatedData
from fedcore.grids.cohort import CohortGrid
from fedcore.grids.pool import available_workers
from fedcore.models import ZOO, build_model
from fedcore.quantization.layers import calibrate
from fedcore.state.sqlite import RunStore
from fedcore.training.client import DATA_ORDER
from fedcore.training.engine import choose_engine
from fedcore.training.plan import ClientData, DpSgdPlan, LocalPlan, batch_order, client_rng

HOLDERS, EXAMPLES, CLASSES = 100, 50, 10
IMAGE, WINDOW = (1, 28, 28), (6, 64)
PLAN = LocalPlan(epochs=1, batch_size=10, lr=0.1)
STEP_NOISE = 3  # purpose of a generator, beside DATA_ORDER


def federation(clients: int, shape: tuple[int, ...] = IMAGE) -> FederatedData:
    """``clients`` clients of 50 examples of ``shape``; past 100 they share examples, so that the data's memory does not grow."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((HOLDERS * EXAMPLES + 100, *shape), np.float32)
    y = rng.integers(0, CLASSES, len(x))
    train, test = Examples(x, y), Examples(x[:100], y[:100])
    dataset = Dataset("synthetic", tuple(map(str, range(CLASSES))), train, test, None, 0.0, 1.0)
    parts = [np.arange(EXAMPLES) + EXAMPLES * (client % HOLDERS) for client in range(clients)]
    nothing = np.arange(0)
    return FederatedData(dataset, tuple(parts), (nothing,) * clients, np.arange(100) + HOLDERS * EXAMPLES)


def scenario(model: str, clients: int, *, qat: bool = False, **engine: Any) -> RunConfig:
    """All clients train by `PLAN` in every round, and nothing is evaluated."""
    tables = {
        "run": {"name": "benchmark", "rounds": 1_000_000},
        "data": {"clients": clients},
        "model": {"name": model},
        "quantization": {"enabled": qat},
        "training": {"epochs": PLAN.epochs, "batch_size": PLAN.batch_size, "lr": PLAN.lr},
        "evaluation": {"every": 0},
        "engine": engine,
    }
    return parse_config(tables, "benchmark", Path())


def show(found: Mapping[str, Any], *, as_json: bool) -> None:
    """Print what was measured, on one line or on one each."""
    if as_json:
        print(json.dumps(found))
        return
    for key, value in found.items():
        print(f"{key:24}{value:.4g}" if isinstance(value, float) else f"{key:24}{value}")


def assembly(config: RunConfig, clients: int) -> Assembly:
    """The scenario around the synthetic federation."""
    shape = WINDOW if config.model.name == "imu_cnn" else IMAGE
    data = federation(clients, shape)
    model = build_model(
        config.model, quantized=config.quantization.enabled, input_shape=shape, classes=CLASSES, seed=0, folder=config.folder
    )  # fmt: skip
    return Assembly(config, data, model, choose_engine(config.engine, model, shape), build_strategy(config))


@contextmanager
def ours(config: RunConfig, clients: int) -> Iterator[Coordinator]:
    """The whole coordinator around the synthetic federation."""
    with coordinated(assembly(config, clients)) as coordinator:
        yield coordinator


@contextmanager
def coordinated(built: Assembly) -> Iterator[Coordinator]:
    """The whole coordinator, with a store on disk."""
    workers = built.config.engine.workers or available_workers()
    grid = CohortGrid(build_clients(built), built.layout, mean=accepts_mean(built.strategy), workers=workers)
    with tempfile.TemporaryDirectory() as folder:
        store = RunStore(Path(folder))
        try:
            yield Coordinator(built, grid, store)
        finally:
            grid.close()
            store.close()


class PlainLoop:
    """Two processes, each with half of the clients; `round` gives the mean update [d] of clients that start from ``start``."""

    def __init__(self, built: Assembly) -> None:
        self.built = built
        context = multiprocessing.get_context("fork")
        self.pipes: list[Connection] = []
        halves = np.array_split(np.arange(len(built.data.clients)), 2)
        pairs = [context.Pipe() for _ in halves]
        self.processes = [
            context.Process(target=self._serve, args=(theirs, half.tolist()), daemon=True)
            for (_, theirs), half in zip(pairs, halves, strict=True)
        ]
        for process, (mine, _) in zip(self.processes, pairs, strict=True):
            process.start()
            self.pipes.append(mine)

    def round(self, start: np.ndarray, number: int) -> np.ndarray:
        """One round of all clients."""
        for pipe in self.pipes:
            pipe.send((start, number))
        sums = [pipe.recv() for pipe in self.pipes]
        return np.asarray(sum(vector for vector, _ in sums) / sum(weight for _, weight in sums))

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.terminate()
            process.join()

    def _serve(self, pipe: Connection, clients: list[int]) -> None:
        torch.set_num_threads(1)
        while True:
            start, number = pipe.recv()
            pipe.send(self._train(torch.from_numpy(start), number, clients))

    def _train(self, start: torch.Tensor, number: int, clients: list[int]) -> tuple[np.ndarray, int]:
        model, train = self.built.model.train(), self.built.data.dataset.train
        total, weight = torch.zeros(len(start), dtype=torch.float64), 0
        for client in clients:
            torch.nn.utils.vector_to_parameters(start.clone(), model.parameters())
            optimizer = torch.optim.SGD(model.parameters(), lr=PLAN.lr)
            part = self.built.data.clients[client]
            x, y = torch.from_numpy(train.x[part]), torch.from_numpy(train.y[part])
            for order in batch_order(len(y), PLAN, client_rng(0, number, client, DATA_ORDER)):
                for index in torch.from_numpy(order).split(PLAN.batch_size):
                    optimizer.zero_grad()
                    F.cross_entropy(model(x[index]), y[index]).backward()
                    optimizer.step()
            total += (torch.nn.utils.parameters_to_vector(model.parameters()).detach() - start) * len(y)
            weight += len(y)
        return total.numpy(), weight


def measure(config: RunConfig, clients: int, rounds: int) -> dict[str, Any]:
    """Run ours and the plain loop in turn; and, beside workers of a Ray cluster, those of a process pool."""
    pool = [config.replace("engine", workers=0)] if config.engine.workers == "ray" else []
    with contextlib.ExitStack() as opened:
        processes = [opened.enter_context(ours(one, clients)).rounds() for one in pool]  # forked before Ray has threads
        for one in processes:
            next(one)
        coordinator = opened.enter_context(ours(config, clients))
        progress = coordinator.rounds()
        first = coordinator.progress
        plain_assembly = assembly(config, clients)
        if config.quantization.enabled:
            calibration = plain_assembly.data.dataset.train.take(plain_assembly.data.calibration)
            torch.nn.utils.vector_to_parameters(torch.from_numpy(first.master.copy()), plain_assembly.model.parameters())
            calibrate(plain_assembly.model, [torch.from_numpy(calibration.x)])
        plain = PlainLoop(plain_assembly)
        start = coordinator.received(first)[1]
        mean_update = plain.round(start, 1)
        next(progress)
        difference = float(np.abs(coordinator.progress.master - (first.master + mean_update)).max())
        own, raw, pooled = [], [], []
        for number in range(2, rounds + 2):
            start = coordinator.received(coordinator.progress)[1]  # both train from the same parameters
            began = time.perf_counter()
            next(progress)
            own.append(time.perf_counter() - began)
            began = time.perf_counter()
            plain.round(start, number)
            raw.append(time.perf_counter() - began)
            for one in processes:
                began = time.perf_counter()
                next(one)
                pooled.append(time.perf_counter() - began)
        plain.close()
        engine = coordinator.assembly.engine.name
        for one in (progress, *processes):
            one.close()
    seconds = statistics.median(own)
    usage = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "model": config.model.name,
        "qat": config.quantization.enabled,
        "engine": engine,
        "workers": config.engine.workers or available_workers(),
        "seconds_per_round": seconds,
        **({"pool_seconds_per_round": statistics.median(pooled)} if pooled else {}),
        "clients_per_second": clients / seconds,
        "raw2_seconds_per_round": statistics.median(raw),
        "vs_raw2": statistics.median(r / o for r, o in zip(raw, own, strict=True)),
        "max_abs_diff": difference,
        "peak_mb": round(usage[0]),
        "worker_peak_mb": round(usage[1]),
    }


def measure_dp(config: RunConfig, clients: int, rounds: int) -> dict[str, Any]:
    """Run our engine, client after client, and Opacus's loop in turn."""
    from simulations.benchmarks.dpsgd import measure_private

    built = assembly(config, clients)
    train = built.data.dataset.train
    if config.quantization.enabled:
        calibrate(built.model, [torch.from_numpy(train.take(built.data.calibration).x)])

    def cohort(number: int) -> list[ClientData]:
        return [
            ClientData(
                client, torch.from_numpy(train.x[part]), torch.from_numpy(train.y[part]),
                client_rng(0, number, client, DATA_ORDER), client_rng(0, number, client, STEP_NOISE),
            )
            for client, part in enumerate(built.data.clients)
        ]  # fmt: skip

    plan = replace(PLAN, dp=DpSgdPlan(clipping_norm=1.0, noise_multiplier=1.0))
    engine = choose_engine(config.engine, built.model, train.shape, private=True)
    found = measure_private(built.model, engine, cohort, plan, rounds)
    return {"model": config.model.name, "qat": config.quantization.enabled} | found


def start_up(arguments: list[str]) -> float:
    """Seconds from the start of a fresh process to the end of its imports, data, model and workers: the first round follows."""
    command = [sys.executable, "-m", "simulations.benchmarks.throughput", "--started", *arguments]
    times = []
    for _ in range(3):
        began = time.time()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        times.append(float(done.stdout) - began)
    return statistics.median(times)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="Rounds of federated training beside a plain torch loop on two processes.")
    parser.add_argument("--model", choices=tuple(ZOO), default="cnn")
    parser.add_argument("--qat", action="store_true", help="train quantization-aware and send int8 weights")
    parser.add_argument("--dp", action="store_true", help="DP-SGD in one process, one client after the other, beside Opacus's loop")
    parser.add_argument("--engine", choices=("auto", "native", "loop", "vmap"), default="auto")
    parser.add_argument("--workers", default="0", help="number of processes, 0 = one per core; or ray")
    parser.add_argument("--clients", type=int, default=100, help="clients a round (memory must not grow with it)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds measured of each; medians are printed")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--started", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    workers = int(given.workers) if given.workers.isdecimal() else given.workers
    config = scenario(given.model, given.clients, qat=given.qat, name=given.engine, workers=workers)
    if given.started:
        with ours(config, given.clients):
            print(time.time())
        return
    if given.dp:
        found = measure_dp(config, given.clients, given.rounds)
    else:
        found = measure(config, given.clients, given.rounds)
        options = ["--model", given.model, "--engine", given.engine, "--workers", given.workers]
        found["startup_seconds"] = start_up([*options, *(["--qat"] if given.qat else [])])
    show(found, as_json=given.json)


if __name__ == "__main__":
    main()
