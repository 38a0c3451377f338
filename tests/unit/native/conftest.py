"""Makes `clients.py` importable as ``native_clients``; where compiled libraries are kept."""

import importlib.util
import sys
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("native_clients", Path(__file__).with_name("clients.py"))
sys.modules["native_clients"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["native_clients"])


@pytest.fixture(autouse=True, scope="session")
def compiled(request):
    """Libraries stay between runs, beside pytest's own cache: a cold run compiles for a minute, a warm one not at all."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(request.config.cache.mkdir("compiled")))
    yield
    patch.undo()
