"""No step that computes something else is handed out, and what passed the gate once is known by its content."""

import functools
import hashlib

import numpy as np
import onnxruntime
import pytest
import torch
from small_zoo import SHAPES, network
from torch import nn

import fedcore.portable.step as step_module
from fedcore.errors import Refused, TryAgain
from fedcore.models import ZOO
from fedcore.portable import gate, graph, links, parts, weighted
from fedcore.portable.step import portable_step
from fedcore.quantization.layers import activation_ranges, calibrate, make_quantization_aware, quantizers


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "fake-quant"])
@pytest.mark.parametrize("name", ZOO)
def test_every_model_of_the_zoo_passes(name, quantized):
    model = network(name, quantized)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    step = portable_step(model, SHAPES[name], batch=5, unit="example")
    assert step.sha256 == hashlib.sha256(step.data).hexdigest()
    assert step.form.clips
    assert step.form.quantizers == (tuple(name for name, _ in quantizers(model)) if quantized else ())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.dtype is torch.float32 for p in model.parameters())
    assert not portable_step(model, SHAPES[name], batch=1, unit="client").form.clips


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "fake-quant"])
@pytest.mark.parametrize("name", ["mlp", "cnn", *(pytest.param(n, marks=pytest.mark.slow) for n in ("lenet", "dscnn", "imu_cnn"))])
def test_every_model_of_the_zoo_passes_with_the_squared_error(name, quantized):
    for unit in ("example", ""):
        assert portable_step(network(name, quantized), SHAPES[name], batch=5, unit=unit, loss="squared").form.batch == 5


@pytest.mark.parametrize(("kind", "check"), [("step", gate.check_parity), ("evaluation", gate.check_evaluation)])
def test_a_graph_of_another_loss_misses_the_gate(kind, check):
    model, shape = network("mlp", False), SHAPES["mlp"]
    for written, wanted in (("cross_entropy", "squared"), ("squared", "cross_entropy")):
        data, form = (
            graph.step_graph(model, shape, batch=3, clips=True, loss=written) if kind == "step"
            else graph.evaluation_graph(model, shape, batch=3, loss=written)
        )  # fmt: skip
        check(model, data, form, written)
        with pytest.raises(Refused, match="it is not handed out"):
            check(model, data, form, wanted)


def test_pixels_that_are_equal_but_for_rounding_errors_miss_no_gate():
    """Sums of products of integers: with so many windows some of the largest two are equal, and any order of adding is right."""
    torch.manual_seed(1)
    model = ZOO["imu_cnn"]((6, 200), 10)
    calibrate(make_quantization_aware(model), [torch.randn(20, 6, 200)])
    step = portable_step(model, (6, 200), batch=16, unit="example")
    assert step.data == graph.step_graph(model, (6, 200), batch=16, clips=True)[0]
    assert {type(layer) for layer in graph.kinked_layers(model)} == {nn.ReLU}
    pools = nn.Sequential(nn.MaxPool1d(2), nn.ReLU(), nn.MaxPool1d(2))
    assert graph.kinked_layers(pools) == [pools[0], pools[1]]


def test_single_precision_may_miss_on_some_examples_but_not_on_all(monkeypatch):
    right, missed = gate._judge, []

    def misses(model, step, trial, allowed, times):
        if step.single and len(missed) < times:
            missed.append(trial.x)
            raise Refused("two pixels that differ by one unit in the last place")
        right(model, step, trial, allowed)

    model = network("mlp", False)
    monkeypatch.setattr(gate, "_judge", functools.partial(misses, times=2))
    portable_step(model, SHAPES["mlp"], batch=3, unit="")
    assert len({x.tobytes() for x in missed}) == 2
    missed.clear()
    monkeypatch.setattr(gate, "_judge", functools.partial(misses, times=3))
    with pytest.raises(Refused, match="one unit in the last place"):
        portable_step(model, SHAPES["mlp"], batch=3, unit="")


def test_before_the_ranges_are_frozen_weights_alone_are_rounded():
    model = make_quantization_aware(ZOO["cnn"](SHAPES["cnn"], 4))
    first = portable_step(model, SHAPES["cnn"], batch=4, unit="")
    calibrate(model, [torch.randn(20, *SHAPES["cnn"])])
    second = portable_step(model, SHAPES["cnn"], batch=4, unit="")
    assert first.form.quantizers == ()
    assert second.form.quantizers == tuple(activation_ranges(model))
    assert first.sha256 != second.sha256


def broken(kind, name, wrong):
    """One method of the writer that is subtly wrong."""
    right = getattr(kind, name)
    return kind, name, lambda *arguments, **named: wrong(right, *arguments, **named)


def _unrounded(right, link, nodes):
    rounded, link._rounded = link._rounded, False
    try:
        return right(link, nodes)
    finally:
        link._rounded = rounded


BROKEN = {
    "a rectifier that lets every gradient through": (
        broken(links.Relu, "back", lambda right, self, nodes, errors: errors),
        "layer 7 (Linear)",
    ),
    "a pooling that gives a thousandth too much": (
        broken(links.Largest, "back", lambda right, self, nodes, errors: nodes.scaled(right(self, nodes, errors), 1.001)),
        "layer 3 (Conv2d)",
    ),
    "a weight's gradient in another order": (
        broken(weighted.Convolution, "_ordered", lambda right, self, nodes, total: nodes.reshape(total, total.size)),
        "layer 3 (Conv2d), weight",
    ),
    "a bias's gradient a millionth too large": (
        broken(
            weighted.Dense, "_bias_part",
            lambda right, self, nodes, errors: right(self, nodes, nodes.scaled(errors, 1 + 1e-6)),
        ),
        "layer 9 (Linear), bias",
    ),
    "norms without the biases": (
        broken(parts.Rows, "squared_norms", lambda right, self, nodes: nodes.scaled(right(self, nodes), 0.0)),
        "clipping",
    ),
    "rounding whose gradient saturates nowhere": (
        broken(links.Round, "back", lambda right, self, nodes, errors: nodes.scaled(errors, 1.0)),
        "layer 7 (QuantLinear)",
    ),
    "weights that are not rounded": (
        broken(weighted._Weighted, "_weight", _unrounded),
        "layer 9 (QuantLinear)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_a_step_that_misses_the_gate_is_named_by_model_and_layer(fault, monkeypatch, tmp_path):
    patch, place = BROKEN[fault]
    quantized = "Quant" in place
    model = network("cnn", quantized)
    if quantized:  # narrow ranges, so that some activations saturate
        calibrate(model, [torch.randn(50, *SHAPES["cnn"]) * 0.3])
    portable_step(model, SHAPES["cnn"], batch=6, unit="example")
    monkeypatch.setattr(*patch)
    with pytest.raises(Refused) as caught:
        portable_step(model, SHAPES["cnn"], batch=6, unit="example", cache=tmp_path)
    assert "training step of Sequential" in str(caught.value)
    assert place in str(caught.value)
    assert not list(tmp_path.rglob("*.onnx"))


def test_a_wrong_count_and_a_wrong_loss_miss_the_gate(monkeypatch):
    right = graph._accumulate
    for output in ("count", "loss"):

        def wrong(nodes, *arguments, output=output, **named):
            found = right(nodes, *arguments, **named)
            return found | {output: nodes.scaled(found[output], 1.01)}

        monkeypatch.setattr(graph, "_accumulate", wrong)
        with pytest.raises(Refused, match=f"Sequential: {output}"):
            portable_step(network("mlp", False), SHAPES["mlp"], batch=6, unit="")


def test_what_passed_once_is_not_judged_again(tmp_path, monkeypatch):
    judged = []
    right = step_module.check_parity
    monkeypatch.setattr(step_module, "check_parity", lambda *arguments: judged.append(1) or right(*arguments))
    model = network("mlp", True)
    step = portable_step(model, SHAPES["mlp"], batch=4, unit="example", cache=tmp_path)
    (file,) = tmp_path.rglob("*.onnx")
    assert file.read_bytes() == step.data
    assert file.relative_to(tmp_path).parts == (f"onnxruntime-{onnxruntime.__version__}", f"{step.sha256}.onnx")
    with torch.no_grad():  # another round: other values, the same step
        model[1].weight.add_(0.1)
    assert portable_step(model, SHAPES["mlp"], batch=4, unit="example", cache=tmp_path).data == step.data
    assert len(judged) == 1
    portable_step(model, SHAPES["mlp"], batch=5, unit="example", cache=tmp_path)
    portable_step(model, SHAPES["mlp"], batch=4, unit="client", cache=tmp_path)
    assert len(judged) == len(list(tmp_path.rglob("*"))) - 1 == 3


def test_a_damaged_file_in_the_cache_vouches_for_nothing(tmp_path, monkeypatch):
    model = network("mlp", False)
    step = portable_step(model, SHAPES["mlp"], batch=4, unit="", cache=tmp_path)
    (file,) = tmp_path.rglob("*.onnx")
    file.write_bytes(step.data[:-1] + b"?")
    judged = []
    right = step_module.check_parity
    monkeypatch.setattr(step_module, "check_parity", lambda *arguments: judged.append(1) or right(*arguments))
    assert portable_step(model, SHAPES["mlp"], batch=4, unit="", cache=tmp_path).data == step.data
    assert judged
    assert file.read_bytes() == step.data


def test_a_cache_that_cannot_be_written_is_a_passing_fault(tmp_path):
    (tmp_path / "cache").write_text("a file where the directory should be")
    with pytest.raises(TryAgain, match="cannot be written"):
        portable_step(network("mlp", False), SHAPES["mlp"], batch=4, unit="", cache=tmp_path / "cache")


def test_what_cannot_be_a_step_is_refused(monkeypatch):
    model = network("mlp", False)
    with pytest.raises(Refused, match='unit must be "example", "client" or empty'):
        portable_step(model, SHAPES["mlp"], batch=4, unit="examples")
    with pytest.raises(Refused, match="batch must be >= 1"):
        portable_step(model, SHAPES["mlp"], batch=0, unit="")
    monkeypatch.setattr(step_module, "SIZE_LIMIT", 1000)
    with pytest.raises(Refused, match="more than the 1000 that devices accept"):
        portable_step(model, SHAPES["mlp"], batch=4, unit="")


def test_weights_that_are_not_finite_have_no_step():
    model = network("mlp", False)
    with torch.no_grad():
        model[1].weight[0, 0] = np.nan
    with pytest.raises(Refused, match="not handed out"):
        portable_step(model, SHAPES["mlp"], batch=4, unit="")
