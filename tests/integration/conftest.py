"""Makes what several of these tests share importable, under names of its own."""

import importlib.util
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SHARED = {
    "fedcore_commands": HERE / "commands.py",
    "run_directories": HERE / "run_directories.py",
    "secagg_world": HERE.parent / "unit" / "secagg" / "world.py",
    "secagg_reference": HERE.parent / "unit" / "secagg" / "reference.py",
    "secagg_corrupt": HERE / "corrupt_parties.py",
    "redis_server": HERE.parent / "contracts" / "redis_server.py",
    "gateway_deployment": HERE / "gateway_deployment.py",
}

for name, file in SHARED.items():
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])


@pytest.fixture
def deployment(tmp_path):
    one = sys.modules["gateway_deployment"].Deployment(tmp_path)
    yield one
    one.close()
