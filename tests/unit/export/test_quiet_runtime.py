"""ONNX Runtime tells nobody that it runs, on devices as little as on servers."""

import os
import subprocess
import sys

import pytest

SESSION = """
from pathlib import Path
from onnx import TensorProto, helper
import onnxruntime

value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value],
                          [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
"""


def left_behind(directory, first: str) -> list[str]:
    """Files that a process leaves with its user which first runs this and then a model.

    Its environment holds nothing else: ONNX Runtime is quiet by itself where variables say that a build server runs it.
    """
    directory.mkdir()
    environment = {"PATH": os.defpath, "HOME": str(directory), "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", first + SESSION], env=environment, check=True, timeout=120)
    return [str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def _telling(tmp_path_factory):
    """Skips where ONNX Runtime leaves nothing even unasked, so that a test of its silence would say nothing."""
    if not left_behind(tmp_path_factory.mktemp("telling") / "home", ""):
        pytest.skip("this build of ONNX Runtime tells nobody by itself")


@pytest.mark.usefixtures("_telling")
@pytest.mark.parametrize("module", ["fedcore.portable.judge", "fedcore_device.runtime", "fedcore_device.child"])
def test_no_identifier_is_left_and_nothing_waits_to_be_sent(tmp_path, module):
    assert left_behind(tmp_path / "home", f"import {module}\n") == []


@pytest.mark.parametrize("module", ["fedcore", "fedcore_device.runtime"])
def test_who_wants_to_tell_may(module):
    asked = f"import os, {module}; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "0"}
    done = subprocess.run([sys.executable, "-c", asked], env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "0\n"
