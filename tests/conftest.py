"""Small federations that many tests share."""

import gc
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from fedcore.config import RunConfig, load_config

# A shell that starts the tests in the background has them ignore interrupts, and with them whatever they start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # as in a run: small tensors on several threads are many times slower on a busy machine
# No test asserts a time, of a single example neither.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

SCENARIO = """
[run]
rounds = 3
[data]
clients = 6
calibration = 64
holdout = 0.2
[model]
name = "mlp"
params = { hidden = [8] }
[quantization]
calibrate_round = 2
[engine]
workers = 1
"""


@pytest.fixture(autouse=True, scope="module")
def modules_stay() -> None:
    """Flower's strategies collect garbage after each reply, and looked through all of torch for it; pools thaw what is frozen."""
    if not gc.get_freeze_count():
        gc.collect()
        gc.freeze()


@pytest.fixture
def scenario(tmp_path: Path) -> Callable[..., RunConfig]:
    """A small federation on the digits; arguments are ``section.key=value``."""
    path = tmp_path / "small.toml"
    path.write_text(SCENARIO)
    return lambda *settings: load_config(path, settings)
