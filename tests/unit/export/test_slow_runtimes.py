"""Exporters whose packages take long to import, and the runtime with an environment of its own, each as an export runs them."""

import dataclasses
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedcore.errors import Refused
from fedcore.export.artefact import Facts
from fedcore.export.child import Limits, run_job
from fedcore.export.targets import TARGETS, missing_package
from fedcore.models import ZOO
from fedcore.quantization.integer import IntegerModel, integer_logits, with_float_head, with_logit_peak
from fedcore.quantization.layers import calibrate, make_quantization_aware
from fedcore.quantization.lower import lower

SHAPES = {"cnn": (1, 28, 28), "dscnn": (1, 28, 28), "imu_cnn": (6, 100)}
FACTS = {
    "name": "digits",
    "version": "1",
    "run": "abc",
    "tier": "x",
    "labels": ["zero", "one"],
    "mean": [0.25],
    "std": [0.5],
    "more": {},
}
MICRO = os.environ.get("FEDCORE_MICRO_PYTHON", "")
LIMITS = Limits(300)
TOLERANCE = 0.02  # a rounding that falls the other way at a tie is a step of 1/255 in one activation


def integers(name: str, bits: int = 8) -> tuple[IntegerModel, np.ndarray]:
    torch.manual_seed(0)
    network = make_quantization_aware(ZOO[name](SHAPES[name], 10)).eval()
    x = torch.randn(60, *SHAPES[name])
    calibrate(network, [x])
    return with_logit_peak(lower(network, SHAPES[name], weight_bits=bits), x.numpy()), x.numpy()


def exported(target: str, name: str, folder: Path, bits: int = 8) -> tuple[Path, IntegerModel, np.ndarray]:
    missing = missing_package(TARGETS[target])
    if missing:
        pytest.skip(f"{missing} is of the extra [export], which is not installed")
    model, x = integers(name, bits)
    (folder / "model.pickle").write_bytes(pickle.dumps(with_float_head(model) if TARGETS[target].float_head else model))
    np.save(folder / "x.npy", x)
    job = {"task": "convert", "target": target, "model": str(folder / "model.pickle"), "folder": str(folder), "facts": FACTS}
    return Path(run_job(job, LIMITS)["path"]), model, x


def measured(target: str, path: Path, folder: Path) -> tuple[np.ndarray, dict]:
    job = {"task": "measure", "target": target, "path": str(path), "x": str(folder / "x.npy"), "threads": 1, "repeats": 20,
           "logits": str(folder / "logits.npy"), "python": MICRO}  # fmt: skip
    answer = run_job(job, LIMITS)
    return np.load(folder / "logits.npy"), answer


def test_importing_one_private_module_registers_the_operators_of_the_graph():
    from fedcore.export.graph import QuantizedGraph

    model, x = integers("imu_cnn")
    with torch.no_grad():
        found = QuantizedGraph(model)(torch.from_numpy(x)).numpy()
    assert np.abs(found - integer_logits(model, x)).max() <= TOLERANCE * model.logit_peak
    names = {"quantize_per_tensor", "dequantize_per_tensor", "dequantize_per_channel"}
    assert all(hasattr(torch.ops.quantized_decomposed, name) for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_executorch_runs_integers_in_xnnpack(name, tmp_path):
    path, model, x = exported("executorch", name, tmp_path)
    found, answer = measured("executorch", path, tmp_path)
    assert np.abs(found - integer_logits(model, x)).max() <= TOLERANCE * model.logit_peak
    held = answer["contents"]
    assert held["integer"] == model.integer_layers - 1 and held["floating"] <= 2  # the layer of logits, and global pooling
    assert held["metadata"]["labels"] == '["zero", "one"]'


@pytest.mark.slow
def test_executorchs_portable_program_says_that_it_calculates_in_float(tmp_path):
    path, model, x = exported("executorch-portable", "dscnn", tmp_path)
    found, answer = measured("executorch-portable", path, tmp_path)
    assert np.abs(found - integer_logits(model, x)).max() <= TOLERANCE * model.logit_peak
    assert answer["contents"]["integer"] == 0 and answer["contents"]["floating"] >= model.integer_layers


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cnn", "imu_cnn"])
def test_core_ml_stores_the_integers_of_the_model(name, tmp_path):
    path, model, _ = exported("coreml", name, tmp_path)
    held = run_job({"task": "describe", "kind": "coreml", "path": str(path)}, LIMITS)
    assert held["integer"] == model.integer_layers
    assert [tuple(tensor["shape"]) for tensor in held["inputs"]] == [(1, *SHAPES[name])]
    assert held["metadata"]["run"] == "abc"
    from fedcore.export.coreml import stored_weights

    stored = stored_weights(path)
    assert len(stored) == model.integer_layers
    for (values, scale), weights in zip(stored, model.weights(), strict=True):
        np.testing.assert_array_equal(values.reshape(weights.values.shape), weights.values)
        np.testing.assert_array_equal(scale, weights.scale)


@pytest.mark.slow
def test_a_core_ml_package_that_holds_something_else_is_refused(tmp_path):
    path, model, _ = exported("coreml", "cnn", tmp_path)
    from fedcore.export.coreml import _compare

    _compare(path, model)
    dense = next(step for step in model.steps if step.name == "7")
    dense.operation.weights.values[3, 5] ^= 1
    with pytest.raises(Refused, match="layer 3 of the Core ML package"):
        _compare(path, model)
    dense.operation.weights.values[3, 5] ^= 1
    with pytest.raises(Refused, match=r"has the shapes \[\(1, 1, 28, 28\)"):
        _compare(path, dataclasses.replace(model, input_shape=(1, 28, 29)))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["executorch", "coreml"])
def test_a_damaged_file_is_one_clear_line(target, tmp_path):
    path, _, _ = exported(target, "cnn", tmp_path)
    file = path if path.is_file() else path / "Data/com.apple.CoreML/model.mlmodel"
    data = file.read_bytes()
    noise = bytes((i * 167 + 13) % 256 for i in range(5000))
    for damaged in (data[: len(data) // 2], noise, b"\x0f\xff\xff\x7f" + data[4:]):  # far outside, or no kind of field
        file.write_bytes(damaged)
        with pytest.raises(Refused) as caught:
            run_job({"task": "describe", "kind": target, "path": str(path)}, LIMITS)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.skipif(not MICRO, reason="FEDCORE_MICRO_PYTHON names no Python with tflite-micro")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_tensorflow_lite_micro_gives_the_interpreters_integers(name, bits, tmp_path):
    path, model, x = exported("micro", name, tmp_path, bits)
    found, answer = measured("micro", path, tmp_path)
    assert np.abs(found - integer_logits(model, x)).max() <= TOLERANCE * model.logit_peak
    assert 0 < answer["peak"] < 100_000
    source = (tmp_path / "model.cc").read_text()
    assert f"fedcore_model_bytes = {path.stat().st_size};" in source
    assert answer["contents"]["integer"] >= model.integer_layers


@pytest.mark.skipif(not MICRO, reason="FEDCORE_MICRO_PYTHON names no Python with tflite-micro")
def test_tensorflow_lite_micro_calculates_float_layers_with_the_scale_of_each_channel(tmp_path):
    from fedcore.export import micro

    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 36, 16), nn.Sigmoid(), nn.Linear(16, 10))
    with torch.no_grad():
        network[0].weight *= torch.logspace(-1, 1, 8).reshape(8, 1, 1, 1)
    x = torch.randn(60, 1, 8, 8)
    calibrate(make_quantization_aware(network).eval(), [x])
    model = with_logit_peak(lower(network, (1, 8, 8)), x.numpy())
    path = micro.write(model, tmp_path, Facts())
    found = micro.run(path, x.numpy(), Path(MICRO)).logits
    assert np.abs(found - integer_logits(model, x.numpy())).max() <= TOLERANCE * model.logit_peak
