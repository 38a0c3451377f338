"""What a device accepts as a training step, and what it does with answers that no honest step gives."""

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from device_worlds import examples, exported, start_of
from fedcore_device.step import Accumulate, read_step
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from small_zoo import CLASSES, network

from fedcore.errors import ClientFailure, Refused
from fedcore.models import ZOO
from fedcore.portable.form import FORM_KEY, StepForm
from fedcore.quantization.layers import activation_ranges

DATA = exported("mlp", unit="example").data
FORM = exported("mlp", unit="example").form


def changed(change) -> bytes:
    """The step of the mlp after ``change`` of its proto."""
    proto = onnx.load_from_string(DATA)
    change(proto)
    return proto.SerializeToString()


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "fake-quant"])
@pytest.mark.parametrize("name", ZOO)
def test_every_step_of_the_coordinator_is_accepted(name, quantized):
    step = exported(name, unit="example", quantized=quantized)
    found = read_step(step.data, step.sha256)
    assert (found.sha256, found.form, found.data) == (step.sha256, step.form, step.data)


def a_branch(proto):
    branch = helper.make_graph([helper.make_node("Identity", ["x"], ["b"])], "b", [], [])
    node = helper.make_node("If", ["mask"], ["leak"], then_branch=branch, else_branch=branch)
    proto.graph.node.append(node)


def hidden_branch(proto):
    """Control flow inside an operator that is allowed."""
    graph = helper.make_graph([], "b", [], [])
    proto.graph.node[0].attribute.append(helper.make_attribute("body", graph))


def external(proto):
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def a_function(proto):
    node = helper.make_node("Identity", ["a"], ["b"])
    proto.functions.append(helper.make_function("fedcore", "Abs", ["a"], ["b"], [node], [helper.make_opsetid("", 17)]))


def set_domain(proto):
    proto.graph.node[0].domain = "com.microsoft"


def other_operator(name):
    def change(proto):
        proto.graph.node[0].op_type = name

    return change


def form_with(**values):
    def change(proto):
        found = json.loads(proto.metadata_props[0].value)
        proto.metadata_props[0].value = json.dumps(found | values)

    return change


def shape_of(side, dimensions):
    def change(proto):
        shape = getattr(proto.graph, side)[0].type.tensor_type.shape
        shape.ClearField("dim")
        for size in dimensions:
            shape.dim.add(**({"dim_param": size} if isinstance(size, str) else {"dim_value": size}))

    return change


HOSTILE = {
    "an If node": (a_branch, "attributes has a field"),
    "a graph in an attribute of an allowed operator": (hidden_branch, "attributes has a field"),
    "external data": (external, "constants has a field"),
    "a function that takes the name of an operator": (a_function, "model has a field (functions)"),
    "an operator of another domain": (set_domain, "nodes has a field (an operator of another domain)"),
    "a loop": (other_operator("Loop"), "operator 'Loop' is not one"),
    "an operator that draws": (other_operator("RandomNormalLike"), "operator 'RandomNormalLike' is not one"),
    "a convolution": (other_operator("Conv"), "operator 'Conv' is not one"),
    "two domains": (lambda p: p.opset_import.append(helper.make_opsetid("com.microsoft", 1)), "standard domain alone"),
    "another opset": (lambda p: setattr(p.opset_import[0], "version", 18), "standard domain alone"),
    "another IR version": (lambda p: setattr(p, "ir_version", 10), "standard domain alone"),
    "a sparse constant": (
        lambda p: p.graph.sparse_initializer.add(dims=[1]), "graph has a field (sparse constants)",
    ),
    "a string constant": (
        lambda p: p.graph.initializer.append(helper.make_tensor("s", TensorProto.STRING, [1], [b"x"])), "has a field",
    ),
    "a constant of doubles": (
        lambda p: p.graph.initializer.append(numpy_helper.from_array(np.zeros(2), "d")), "has element type 11",
    ),
    "a constant with fewer bytes than its shape": (
        lambda p: p.graph.initializer[0].dims.append(1000), "not as many bytes",
    ),
    "a constant with a negative side": (lambda p: p.graph.initializer[0].dims.append(-1), "a shape that no step has"),
    "a constant with the name of an input": (
        lambda p: p.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "clip")), "have one name",
    ),
    "an output more": (
        lambda p: p.graph.output.append(helper.make_tensor_value_info("x", 1, [4, 1, 8, 8])), "outputs are not those",
    ),
    "an output less": (lambda p: p.graph.output.pop(), "outputs are not those"),
    "an input more": (
        lambda p: p.graph.input.append(helper.make_tensor_value_info("secret", 1, [1])), "inputs are not those",
    ),
    "one input twice": (lambda p: p.graph.input.append(p.graph.input[0]), "have one name"),
    "an input of integers": (
        lambda p: setattr(p.graph.input[0].type.tensor_type, "elem_type", TensorProto.INT64), "inputs are not those",
    ),
    "an output of another size": (shape_of("output", [FORM.parameters + 1]), "outputs are not those"),
    "an output of any size": (shape_of("output", ["n"]), "has a field"),
    "outputs that nothing writes": (lambda p: p.graph.ClearField("node"), "nothing writes its outputs"),
    "a name that is read before it is written": (lambda p: p.graph.node.insert(0, p.graph.node.pop()), "reads what nothing"),
    "a name written twice": (lambda p: p.graph.node.append(p.graph.node[0]), "writes what is there already"),
    "an optional input left out": (lambda p: p.graph.node[0].input.append(""), "reads what nothing"),
    "a property more": (lambda p: p.metadata_props.add(key="a", value="b"), "and no other"),
    "a property twice": (lambda p: p.metadata_props.append(p.metadata_props[0]), "have one name"),
    "no form": (lambda p: p.ClearField("metadata_props"), "and no other"),
    "a form that is not JSON": (lambda p: setattr(p.metadata_props[0], "value", "{"), "not readable"),
    "a form of the future": (form_with(version=2), "form version 2 is not 1"),
    "a form with a key more": (form_with(extra=1), "not readable"),
    "a form with another size": (form_with(parameters=FORM.parameters + 1), "inputs are not those"),
    "a form with a negative size": (form_with(batch=-4), "batch must be an integer from 1"),
    "a form with a size that is no number": (form_with(classes="4"), "classes must be an integer from 1"),
    "a form with a truth value for a size": (form_with(batch=True), "batch must be an integer from 1"),
    "a form with huge inputs": (form_with(input_shape=[2**14, 2**14]), "one of its inputs has 268435456 values or more"),
    "a form with quantizers that are no names": (form_with(quantizers=[1]), "quantizers a list of names"),
    "a form whose shape is a number": (form_with(input_shape=3), "must be lists"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_file_that_is_no_step_is_refused_before_it_runs(what):
    change, line = HOSTILE[what]
    with pytest.raises(Refused) as caught:
        read_step(changed(change))
    assert line in str(caught.value)


def test_a_step_has_one_name_and_a_bounded_size():
    assert read_step(DATA, hashlib.sha256(DATA).hexdigest()).sha256 == hashlib.sha256(DATA).hexdigest()
    with pytest.raises(Refused, match="the plan names 00"):
        read_step(DATA, "00" * 32)
    huge = changed(lambda p: p.graph.initializer.append(numpy_helper.from_array(np.zeros(2**22, np.float32), "zeros")))
    with pytest.raises(Refused, match="more than 16777216"):
        read_step(huge)
    with pytest.raises(Refused, match="more than 100"):
        read_step(DATA, limit=100)


def test_a_file_that_other_readers_would_merge_is_refused():
    with pytest.raises(Refused, match="stands there twice"):
        read_step(DATA + DATA)
    graph = onnx.ModelProto(graph=helper.make_graph([helper.make_node("Identity", ["x"], ["leak"])], "", [], []))
    with pytest.raises(Refused, match="graph stands there twice"):
        read_step(DATA + graph.SerializeToString())


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_damaged_bytes_are_refused_or_still_a_step(data):
    damaged = bytearray(DATA)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(DATA) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.sampled_from([len(DATA), data.draw(st.integers(0, len(DATA)))]))
    try:
        step = read_step(bytes(damaged[:end]))
    except Refused:
        return
    onnx.load_from_string(step.data)  # what is accepted is a file for other readers too


def test_millions_of_empty_fields_are_not_read():
    """Each is two bytes in the file, and hundreds in memory."""
    with pytest.raises(Refused, match="more than 50000 fields"):
        read_step(DATA + bytes([8 << 3 | 2, 0]) * 8_000_000)
    attributes = bytes([5 << 3 | 2, 0]) * 60_000  # of one operator
    node = bytes([1 << 3 | 2]) + varint(len(attributes)) + attributes
    with pytest.raises(Refused, match="more than 50000 fields"):
        read_step(bytes([7 << 3 | 2]) + varint(len(node)) + node)


def varint(value: int) -> bytes:
    return bytes([value & 0x7F | 0x80]) + varint(value >> 7) if value > 0x7F else bytes([value])


def test_every_beginning_of_a_file_is_refused():
    for end in range(0, len(DATA), 7):
        with pytest.raises(Refused):
            read_step(DATA[:end])


# Steps of the right form that do not do what it says.

D, B, SHAPE = FORM.parameters, FORM.batch, FORM.input_shape


def forged(nodes, constants=(), form=FORM) -> bytes:
    infos = [[helper.make_tensor_value_info(n, 1, s) for n, s in side.items()] for side in (form.inputs(), form.outputs())]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants]
    graph = helper.make_graph(nodes, "accumulate", *infos, tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(proto, {FORM_KEY: form.to_json()})
    return proto.SerializeToString()


def returning(gradient_nodes, constants=(), count="mask") -> bytes:
    """A step whose gradient the nodes give, with an honest count and a loss of zero."""
    tail = [
        helper.make_node("ReduceSum", [count], ["count"], keepdims=0),
        helper.make_node("Mul", ["count", "zero"], ["loss"]),
    ]
    return forged([*gradient_nodes, *tail], [("zero", np.float32(0)), *constants])


RAW_X = [
    helper.make_node("Reshape", ["x", "all"], ["flat"]),
    helper.make_node("Pad", ["flat", "margin"], ["gradient"]),
]
RAW_SIZES = [("all", np.array([-1])), ("margin", np.array([0, D - B * math.prod(SHAPE)]))]


def accumulate(data: bytes) -> Accumulate:
    return Accumulate(read_step(data))


def test_a_graph_that_returns_raw_examples_is_named_and_refused():
    data = returning(RAW_X, RAW_SIZES)
    x, y = examples("mlp", 3)
    liar, honest = accumulate(data), accumulate(DATA)
    parameters = start_of(network("mlp"))
    honest(parameters, x, y, np.arange(3), 1.0)
    with pytest.raises(Refused, match=rf"step {hashlib.sha256(data).hexdigest()[:16]}: the sum of 3 gradients has norm"):
        liar(parameters, x, y, np.arange(3), 1.0)


@pytest.mark.parametrize("dividend", ["parameters", "zeros"], ids=["infinite", "not a number"])
def test_a_graph_that_is_not_finite_is_named_before_it_sees_an_example(dividend):
    nodes = [helper.make_node("Div", [dividend, "zero"], ["gradient"])]
    with pytest.raises(Refused, match="inputs of zeros its answer is not finite"):
        accumulate(returning(nodes, [("zeros", np.zeros(D, np.float32))])).probe(start_of(network("mlp")), 1.0)
    accumulate(DATA).probe(start_of(network("mlp")), 1.0)


def test_a_graph_that_counts_wrongly_is_refused():
    nodes = [helper.make_node("Mul", ["parameters", "zero"], ["gradient"])]
    with pytest.raises(Refused, match="it counts 5 examples where there are 3"):
        accumulate(returning(nodes, [("five", np.full(5, 1, np.float32))], count="five"))(
            start_of(network("mlp")), *examples("mlp", 3), np.arange(3), 1.0
        )


def test_a_graph_that_cannot_run_is_refused():
    nodes = [helper.make_node("MatMul", ["x", "y"], ["gradient"])]
    with pytest.raises(Refused, match="ONNX Runtime cannot"):
        accumulate(returning(nodes)).probe(start_of(network("mlp")), 1.0)


def test_an_answer_of_another_shape_is_refused():
    nodes = [
        helper.make_node("Reshape", ["x", "all"], ["flat"]),
        helper.make_node("Cast", ["mask"], ["sizes"], to=TensorProto.INT64),
        helper.make_node("Split", ["sizes", "ones"], ["a", "b", "c", "d"]),
        helper.make_node("Concat", ["none", "a"], ["margin"], axis=0),
        helper.make_node("Pad", ["flat", "margin"], ["gradient"]),
    ]
    constants = [("all", np.array([-1])), ("ones", np.ones(4, np.int64)), ("none", np.array([0]))]
    with pytest.raises(Refused, match=r"output gradient is float32 \[\d+\]|ONNX Runtime cannot"):
        accumulate(returning(nodes, constants)).probe(start_of(network("mlp")), 1e9)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_any_number_of_rows_is_the_sum_of_each_alone(name):
    x, y = examples(name, 11)
    found = Accumulate(read_step(exported(name, 4, "example").data))
    parameters = start_of(network(name))
    rows = np.array([10, 0, 3, 3, 7, 8, 9, 1, 2])
    total, loss = found(parameters, x, y, rows, 0.7)
    alone = [found(parameters, x, y, rows[i : i + 1], 0.7) for i in range(len(rows))]
    np.testing.assert_allclose(total, sum(gradient for gradient, _ in alone), rtol=0, atol=2e-6)
    assert loss == pytest.approx(sum(one for _, one in alone), rel=1e-6)
    assert max(np.linalg.norm(gradient) for gradient, _ in alone) == pytest.approx(0.7, rel=1e-5)
    nothing, loss = found(parameters, x, y, rows[:0], 0.7)
    assert (nothing.shape, np.abs(nothing).max(), loss) == (parameters.shape, 0, 0)


def test_an_example_without_a_finite_gradient_adds_nothing_where_gradients_are_clipped():
    x, y = examples("cnn", 9)
    parameters, rows = start_of(network("cnn")), np.arange(9)
    x[2], x[7, 0, 0, 0] = np.inf, np.nan
    found = Accumulate(read_step(exported("cnn", 4, "example").data))
    total, _ = found(parameters, x, y, rows, 0.7)
    expected, _ = found(parameters, x, y, np.delete(rows, [2, 7]), 0.7)
    np.testing.assert_allclose(total, expected, rtol=0, atol=1e-6)
    with pytest.raises(ClientFailure, match="not finite"):
        Accumulate(read_step(exported("cnn").data))(parameters, x, y, rows)


def test_ranges_and_frozen_parameters_that_a_step_needs_must_be_given():
    model = network("mlp", True)
    step = read_step(exported("mlp", unit="", quantized=True).data)
    ranges = activation_ranges(model)
    with pytest.raises(Refused, match=r"no activation range is given for quantizer 1\.input"):
        Accumulate(step)
    with pytest.raises(Refused, match=r"no activation range is given for quantizer 3\.input"):
        Accumulate(step, ranges={"1.input": ranges["1.input"]})
    Accumulate(step, ranges=ranges)
    form = StepForm(D, 7, (), SHAPE, CLASSES, B, True)
    tail = [helper.make_node("Identity", ["parameters"], ["gradient"])]
    data = forged([*tail, helper.make_node("ReduceSum", ["frozen"], ["count"], keepdims=0),
                   helper.make_node("ReduceSum", ["mask"], ["loss"], keepdims=0)], form=form)  # fmt: skip
    for frozen in (None, np.zeros(6, np.float32), np.full(7, np.nan, np.float32)):
        with pytest.raises(Refused, match="needs 7 finite frozen parameters"):
            Accumulate(read_step(data), frozen=frozen)
    assert Accumulate(read_step(data), frozen=np.full(7, 3 / 7, np.float32))


FRESH = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
import fedcore_device.trainer
from fedcore_device.noise import Randomness
from fedcore_device.plan import TrainingPlan
from fedcore_device.step import read_step
step = read_step(open(sys.argv[2], "rb").read())
start = np.zeros(step.form.parameters, np.float32)
x, y = np.ones((5, *step.form.input_shape), np.float32), np.arange(5) % step.form.classes
task = fedcore_device.trainer.Task(step, start, TrainingPlan(1, 4, 0.1))
update = fedcore_device.trainer.train(task, x, y, Randomness.from_system()).update
assert np.abs(update).max() > 0
print(sorted({"torch", "flwr", "onnx", "opacus", "scipy"} & set(sys.modules)))
"""


def test_a_device_trains_without_torch(tmp_path):
    path = tmp_path / "step.onnx"
    path.write_bytes(exported("mlp").data)
    folder = Path(__file__).parents[3] / "clients" / "linux"
    found = subprocess.run([sys.executable, "-c", FRESH, folder, path], capture_output=True, text=True, check=False)
    assert (found.stdout.strip(), found.stderr, found.returncode) == ("[]", "", 0)


def test_no_module_of_the_device_can_import_torch_or_flwr():
    folder = Path(__file__).parents[3] / "clients" / "linux"
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
    assert "1 kept, 0 broken" in found.stdout
