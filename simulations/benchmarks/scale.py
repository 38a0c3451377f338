"""A large federation on one machine: by default 100,000 clients with 50 images of 28x28 bytes each, all different.

Every round trains every client for one epoch of batches of 10 and ends with a durable commit. Memory is the proportional share
(PSS) of this process and its workers, with the data; its peak is taken while rounds run.

    python -m simulations.benchmarks.scale --clients 100000 --rounds 10 --json
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from pathlib import Path

import numpy as np
import torch

from fedcore.coordinator.assembly import Assembly
from fedcore.coordinator.strategy import build_strategy
from fedcore.data import Dataset, Examples, FederatedData
from fedcore.models import ZOO, build_model
from fedcore.training.engine import choose_engine
from simulations.benchmarks.throughput import CLASSES, EXAMPLES, IMAGE, coordinated, scenario, show

_LOOK = 0.5  # seconds between two looks at memory


def federation(clients: int) -> FederatedData:
    """``clients`` clients of 50 random images each, kept as bytes."""
    rng, count = np.random.default_rng(0), clients * EXAMPLES
    raw = np.empty((count + 100, *IMAGE), np.uint8)
    for first in range(0, len(raw), 1 << 16):
        piece = raw[first : first + (1 << 16)]
        piece[:] = np.frombuffer(rng.bytes(piece.size), np.uint8).reshape(piece.shape)
    y, values = rng.integers(0, CLASSES, len(raw)), ((np.arange(256) - 127.5) / 74).astype(np.float32)[None]
    train, test = Examples(raw, y, values), Examples(raw[count:], y[count:], values)
    dataset = Dataset("synthetic", tuple(map(str, range(CLASSES))), train, test, None, 0.0, 1.0)
    parts = tuple(np.arange(EXAMPLES) + EXAMPLES * client for client in range(clients))
    return FederatedData(dataset, parts, (np.arange(0),) * clients, np.arange(100) + count)


class Memory:
    """The largest proportional share of memory of some processes while the block runs, bytes."""

    def __init__(self) -> None:
        self.peak = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(_LOOK):
            mine = Path("/proc/self/task")
            children = {pid for task in mine.iterdir() for pid in (task / "children").read_text().split()}
            self.peak = max(self.peak, sum(map(_share, ["self", *children])))


def _share(pid: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def main() -> None:
    """Run, print a line a round, and the result."""
    parser = argparse.ArgumentParser(description="Rounds of a large federation on one machine.")
    parser.add_argument("--clients", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--model", choices=[name for name in ZOO if name != "imu_cnn"], default="cnn")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = scenario(given.model, given.clients, name="native")
    data = federation(given.clients)
    model = build_model(config.model, quantized=False, input_shape=IMAGE, classes=CLASSES, seed=0, folder=config.folder)
    built = Assembly(config, data, model, choose_engine(config.engine, model, IMAGE), build_strategy(config))
    seconds = []
    with Memory() as memory, coordinated(built) as coordinator:
        rounds = coordinator.rounds()
        for number in range(1, given.rounds + 1):
            began = time.perf_counter()
            next(rounds)
            seconds.append(time.perf_counter() - began)
            if not given.json:
                print(f"round {number}: {seconds[-1]:.1f} s, {given.clients / seconds[-1]:.0f} clients/s", flush=True)
        rounds.close()
    found = {
        "model": given.model,
        "clients": given.clients,
        "rounds": given.rounds,
        "seconds": sum(seconds),
        "seconds_per_round": statistics.median(seconds),
        "clients_per_second": given.clients / statistics.median(seconds),
        "data_bytes": data.dataset.train.raw.nbytes,
        "peak_bytes": memory.peak,
    }
    show(found, as_json=given.json)


if __name__ == "__main__":
    main()
