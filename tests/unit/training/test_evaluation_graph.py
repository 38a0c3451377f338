"""The portable evaluation beside the one that simulated clients run, and the gate in front of it."""

import hashlib

import numpy as np
import onnxruntime
import pytest
import torch
from small_zoo import CLASSES, SHAPES, network
from torch import nn

from fedcore.config import LOSSES
from fedcore.errors import Refused
from fedcore.models import ZOO
from fedcore.portable import graph, links
from fedcore.portable.form import OPERATORS, EvaluationForm, StepForm, range_values
from fedcore.portable.graph import evaluation_graph
from fedcore.portable.step import portable_evaluation
from fedcore.quantization.layers import activation_ranges
from fedcore.training.evaluation import evaluate

BATCH = 12


def flat(model: nn.Module, wanted: bool) -> np.ndarray:
    chosen = [p.detach().reshape(-1) for p in model.parameters() if p.requires_grad is wanted]
    return torch.cat(chosen).numpy() if chosen else np.zeros(0)


def run(model, shape, x, y, mask, dtype=np.float64, loss="cross_entropy"):
    data, form = evaluation_graph(model, shape, batch=len(x), loss=loss, dtype=dtype)
    assert form == EvaluationForm.from_json(form.to_json())
    given = {"parameters": flat(model, True), "frozen": flat(model, False), "x": x, "y": np.eye(form.classes)[y], "mask": mask}
    if form.quantizers:
        given["ranges"] = range_values(activation_ranges(model), form.quantizers, dtype)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return [float(one) for one in session.run(None, {name: np.asarray(given[name], dtype) for name in form.inputs()})]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("quantized", [False, True], ids=["float", "fake-quant"])
@pytest.mark.parametrize("name", ZOO)
def test_it_scores_as_simulated_clients_do(name, quantized, loss):
    model, rng = network(name, quantized).double(), np.random.default_rng(1)
    x, y = rng.standard_normal((BATCH, *SHAPES[name])), rng.integers(0, CLASSES, BATCH)
    with torch.no_grad():
        y[:5] = model(torch.from_numpy(x[:5])).argmax(1).numpy()
    mask = np.arange(BATCH) < 9
    expected = evaluate(model, torch.from_numpy(x[:9]), torch.from_numpy(y[:9]), loss)
    count, correct, total = run(model, SHAPES[name], x, y, mask, loss=loss)
    assert (count, correct) == (9, expected.correct)
    assert 5 <= expected.correct < 9
    assert total == pytest.approx(expected.loss_sum, abs=1e-9)


def test_of_equal_logits_the_first_is_the_prediction_and_of_none_none():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 3, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(3))
    x = np.array([[2, 2, 1], [2, 2, 1], [1, 2, 2], [0, 0, 0], [0, 0, 0]], np.float32)
    y = np.array([0, 1, 1, 0, 2])
    assert model(torch.from_numpy(x)).argmax(1).tolist() == [0, 0, 1, 0, 0]
    assert run(model, (3,), x, y, np.ones(5), np.float32)[:2] == [5, 3]
    count, correct, loss = run(model, (3,), np.full((2, 3), np.nan, np.float32), y[:2], np.ones(2), np.float32)
    assert (count, correct) == (2, 0)
    assert np.isnan(loss)


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "fake-quant"])
@pytest.mark.parametrize("name", ZOO)
def test_every_model_of_the_zoo_passes_the_gate(name, quantized, tmp_path):
    model = network(name, quantized)
    found = portable_evaluation(model, SHAPES[name], batch=5, cache=tmp_path)
    assert found.sha256 == hashlib.sha256(found.data).hexdigest()
    assert bool(found.form.quantizers) is quantized
    assert [path.stem for path in tmp_path.rglob("*.onnx")] == [found.sha256]
    assert portable_evaluation(model, SHAPES[name], batch=1, loss="squared").form.batch == 1


def test_it_reads_no_more_than_a_training_steps_operators():
    import onnx

    proto = onnx.load_from_string(portable_evaluation(network("cnn", True), SHAPES["cnn"], batch=3).data)
    assert {node.op_type for node in proto.graph.node} <= OPERATORS
    assert [one.key for one in proto.metadata_props] == [EvaluationForm.KEY] != [StepForm.KEY]
    assert [one.name for one in proto.graph.output] == ["count", "correct", "loss"]


@pytest.mark.parametrize("output", ["count", "correct", "loss"])
def test_a_graph_that_misses_the_gate_is_named(output, monkeypatch, tmp_path):
    right = graph._evaluate

    def wrong(nodes, *arguments):
        found = right(nodes, *arguments)
        return found | {output: nodes.scaled(found[output], 1 + (1e-5 if output == "loss" else 1e-2))}

    monkeypatch.setattr(graph, "_evaluate", wrong)
    with pytest.raises(Refused, match=f"evaluation graph of Sequential: {output}"):
        portable_evaluation(network("mlp"), SHAPES["mlp"], batch=6, cache=tmp_path)
    assert not list(tmp_path.rglob("*.onnx"))


def test_a_layer_that_is_slightly_wrong_misses_the_gate(monkeypatch):
    right = links.Average.forward
    monkeypatch.setattr(links.Average, "forward", lambda self, nodes, x: nodes.scaled(right(self, nodes, x), 1 + 1e-5))
    pooled = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, CLASSES))
    with pytest.raises(Refused, match="loss"):
        portable_evaluation(pooled, (1, 8, 8), batch=6)
    with pytest.raises(Refused, match="batch must be >= 1"):
        portable_evaluation(network("mlp"), SHAPES["mlp"], batch=0)
