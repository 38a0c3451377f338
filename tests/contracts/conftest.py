"""Makes `redis_server.py` and `ledgers.py` importable; one Redis for the tests of a module, each with a population of its own."""

import importlib.util
import sys
import time
from pathlib import Path

import pytest

for name in ("redis_server", "ledgers"):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])


@pytest.fixture(scope="module")
def shared_redis():
    with sys.modules["redis_server"].redis_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "redis"])
def ledger(request, tmp_path) -> str:
    """Where a fresh ledger of one population is, to be opened as often as one likes."""
    if request.param == "sqlite":
        return str(tmp_path / "run" / "ledger.sqlite")
    return request.getfixturevalue("shared_redis").url(f"p{time.monotonic_ns()}")
