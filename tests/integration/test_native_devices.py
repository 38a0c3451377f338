"""Rounds of a real gateway with two devices, one of which trains with a native library: `fedcore native build` made it."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "device"))

from native_installed import TARGET, keep_compiler_cache, needs_compiler
from test_devices import Devices, federated, prepared

from fedcore.cli import app


@pytest.fixture
def devices(tmp_path):
    one = Devices(tmp_path)
    yield one
    one.stop()


@needs_compiler
def test_devices_of_both_engines_give_the_model_of_the_simulation(request, tmp_path, devices):
    keep_compiler_cache(request.config.cache.mkdir("compiled"))
    config, expected, _ = prepared(tmp_path, devices, clients=2, rounds=1)
    built = CliRunner().invoke(
        app, ["native", "build", str(tmp_path / "scenario.toml"), "--target", TARGET, "--out", str(tmp_path / "out")]
    )
    assert built.exit_code == 0, built.output
    installed = tmp_path / "native-1" / "watches"
    installed.mkdir(parents=True)
    for name in ("libtrainer.so", "trainer.json"):
        shutil.copy(tmp_path / "out" / name, installed / name)
        (installed / name).chmod(0o644)
    found, rounds, _ = federated(config, devices, tmp_path)
    assert [one["replies"] for one in rounds] == [2], devices.logs()
    assert min(one["update_norm"] for one in rounds) > 0.1
    last = [json.loads((tmp_path / f"state-{number}" / "engine.json").read_text())["last"] for number in range(2)]
    assert [one["engine"] for one in last] == ["ONNX Runtime", f"native library {installed / 'trainer.json'}"]
    assert last[0]["why"] == f"no native library in {tmp_path / 'native-0'}"
    np.testing.assert_allclose(found.master, expected.master, rtol=0, atol=1e-5)
