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


def left_behind(tmp_path, first: str) -> list[str]:
    """Files that a process leaves in its user's directories which first runs this and then a model."""
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", first + SESSION], env=environment, check=True, timeout=120)
    return [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if "icrosoft" in str(path)]


@pytest.mark.parametrize("module", ["fedcore.portable.judge", "fedcore_device.runtime", "fedcore_device.child"])
def test_no_identifier_is_left_and_nothing_waits_to_be_sent(tmp_path, module):
    assert left_behind(tmp_path, f"import {module}\n") == []


def test_who_wants_to_tell_may(tmp_path):
    """What was set before stays; this is also how the test above can fail."""
    pytest.importorskip("onnxruntime", "1.30", reason="older ones tell nobody on Linux")
    assert left_behind(tmp_path, "import os\nos.environ['ORT_DISABLE_TELEMETRY'] = '0'\nimport fedcore\n") != []
