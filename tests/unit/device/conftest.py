"""Makes `worlds.py` importable as ``device_worlds``; the device's package comes from its own folder."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "clients" / "linux"))
spec = importlib.util.spec_from_file_location("device_worlds", Path(__file__).with_name("worlds.py"))
sys.modules["device_worlds"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["device_worlds"])


@pytest.fixture(autouse=True)
def _one_thread():
    """As a device trains; threads that wait for each other on a busy machine take six times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
