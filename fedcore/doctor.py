"""What this installation can do: packages, tools and data sets, and how to get what is missing."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from fedcore.config import StrategyConfig

__all__ = ["Finding", "examine"]


@dataclass(frozen=True)
class Finding:
    """One thing looked for; ``remedy`` says how to get it, ``required`` that simulations cannot run without it."""

    what: str
    found: str
    purpose: str
    remedy: str
    required: bool
    ok: bool


# Distribution, purpose, extra of fedcore that brings it, needed by simulations.
_PACKAGES = (
    ("numpy", "everything", "", True),
    ("onnxruntime", "running the exported int8 model", "", True),
    ("rich", "progress and tables", "", True),
    ("torch", "local training", "server", True),
    ("flwr", "strategies and messages", "server", True),
    ("onnx", "exporting the int8 model", "server", True),
    ("safetensors", "checkpoints", "server", True),
    ("jinja2", "reports", "server", True),
    ("scikit-learn", "the digits data set", "server", True),
    ("opacus", "differential privacy of training examples", "server", False),
    ("dp-accounting", "privacy accounting", "server", False),
    ("redis", "state shared by several machines", "server", False),
    ("ray", 'workers on several machines (engine.workers = "ray")', "ray", False),
    ("seglearn", "the smartwatch data set", "data", False),
    ("flwr-datasets", "data sets of the Flower hub (flower:NAME; needs a network)", "", False),
)


def examine() -> list[Finding]:
    """Look at the interpreter, the packages, the accelerator and the data sets of this machine."""
    return [_python(), *_packages(), *_torch(), _fork(), _fashion_mnist(), _strategies()]


def _python() -> Finding:
    ok = sys.version_info >= (3, 11)
    return Finding("python", platform.python_version(), "everything", "install Python 3.11 or newer", True, ok)


def _packages() -> Iterator[Finding]:
    for name, purpose, extra, required in _PACKAGES:
        try:
            found, ok = importlib.metadata.version(name), True
        except importlib.metadata.PackageNotFoundError:
            found, ok = "not installed", False
        remedy = f'pip install "fedcore[{extra}]" -c constraints.txt' if extra else f"pip install {name}"
        yield Finding(name, found, purpose, remedy, required, ok)


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except ImportError:
        return
    ok = torch.cuda.is_available()
    found = torch.cuda.get_device_name() if ok else "none that torch sees"
    yield Finding(
        "accelerator",
        found,
        "training many clients at once (engine vmap)",
        "optional: a CUDA GPU and torch's CUDA build",
        False,
        ok,
    )


def _fork() -> Finding:
    from fedcore.grids.pool import available_workers

    count = available_workers()
    return Finding(
        "worker processes",
        str(count),
        "training clients in parallel",
        "optional: more cores, on a system that forks",
        False,
        count > 1,
    )


def _fashion_mnist() -> Finding:
    from fedcore.data.datasets import FASHION_MNIST

    ok = FASHION_MNIST.is_dir()
    found = str(FASHION_MNIST) if ok else "not found"
    return Finding("fashion-mnist", found, "benchmarks", "apt install dataset-fashion-mnist, or set data.path", False, ok)


def _strategies() -> Finding:
    rule = StrategyConfig.__dataclass_fields__["name"].metadata
    return Finding("strategies", ", ".join(rule["named"]), "[strategy] name, or module:Class of your own", "", True, True)
