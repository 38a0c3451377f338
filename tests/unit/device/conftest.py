"""Makes modules of this folder importable: `worlds.py` as ``device_worlds``, `releases.py` as ``device_releases``, and
`fleet_fake.py`; the device's package comes from its own folder."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "clients" / "linux"))
for name, file in (("device_worlds", "worlds.py"), ("fleet_fake", "fleet_fake.py"), ("device_releases", "releases.py")):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(file))
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


@pytest.fixture(autouse=True)
def _one_thread():
    """As a device trains; threads that wait for each other on a busy machine take six times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
