"""From a model of layers in a row to its training step, written layer by layer: forward, the loss, and back; and to its evaluation.

Nothing is traced: every operator in the graph is one that this package wrote, of the few that `form` lists, so that a device can
check a step by reading it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
from onnx import helper
from torch import nn

from fedcore.errors import Refused
from fedcore.portable.form import IR_VERSION, OPSET, RANGE_VALUES, EvaluationForm, GraphForm, StepForm
from fedcore.portable.links import (
    Average,
    Flatten,
    Frame,
    Largest,
    Link,
    Normalise,
    Parameters,
    Ramp,
    Relu,
    Relu6,
    Round,
    Sigmoid,
    Tanh,
    refuse,
)  # fmt: skip
from fedcore.portable.nodes import Nodes, Value
from fedcore.portable.parts import Part
from fedcore.portable.weighted import Dense, convolution
from fedcore.quantization.layers import FakeQuantize, QuantConv1d, QuantConv2d, QuantLayer, QuantLinear, quantizers

__all__ = ["evaluation_graph", "kinked_layers", "step_form", "step_graph"]

_KNOWN = (
    "Linear, Conv1d, Conv2d and their quantized forms, ReLU, ReLU6, Tanh, Sigmoid, MaxPool, AvgPool, AdaptiveAvgPool, GroupNorm, "
    "LayerNorm over features, Flatten, FakeQuantize, Identity"
)
_LINEAR, _CONVOLUTIONS = (nn.Linear, QuantLinear), (nn.Conv1d, QuantConv1d, nn.Conv2d, QuantConv2d)
_LARGEST, _AVERAGE = (nn.MaxPool1d, nn.MaxPool2d), (nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
_POINTWISE: dict[type[nn.Module], Any] = {nn.ReLU: Relu, nn.ReLU6: Relu6, nn.Tanh: Tanh, nn.Sigmoid: Sigmoid}


def step_form(model: nn.Module, input_shape: tuple[int, ...], classes: int, batch: int, *, clips: bool) -> StepForm:
    """The sizes of the step of a model, from its parameters and its quantizers that are frozen and enabled."""
    return StepForm(*_sizes(model), input_shape, classes, batch, clips)


def _sizes(model: nn.Module) -> tuple[int, int, tuple[str, ...]]:
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    frozen = [p.numel() for p in model.parameters() if not p.requires_grad]
    rounding = tuple(name for name, q in quantizers(model) if q.frozen is not None and q.enabled)
    return sum(trained), sum(frozen), rounding


def step_graph(
    model: nn.Module, input_shape: tuple[int, ...], *, batch: int, clips: bool, loss: str = "cross_entropy",
    dtype: Any = np.float32, ramp: float = 0.0,
) -> tuple[bytes, StepForm]:  # fmt: skip
    """The training step of ``model`` for ``batch`` inputs of ``input_shape``, as the bytes of an ONNX file, and its form.

    ``loss`` is one of `config.LOSSES`: what the graph computes says which, the form does not. The same model and loss give the
    same bytes; values of parameters and of activation ranges are not part of them. For comparisons alone
    are ``dtype`` float64 and ``ramp``: that times the number of its pixel is added to every input of the `kinked_layers`.

    Raises:
        Refused: a layer that is not known, or layers that do not fit together; the line names it.
    """
    form = step_form(model, input_shape, 1, batch, clips=clips)
    nodes, inputs, links = _read_model(model, form, dtype, ramp)
    form = replace(form, classes=links[-1].frame.channels)
    targets = [name for name, p in model.named_parameters() if p.requires_grad]
    outputs = _accumulate(nodes, links, inputs, targets, loss, clips=clips)
    return _file(nodes, form, outputs, "accumulate"), form


def evaluation_graph(
    model: nn.Module, input_shape: tuple[int, ...], *, batch: int, loss: str = "cross_entropy", dtype: Any = np.float32
) -> tuple[bytes, EvaluationForm]:  # fmt: skip
    """The evaluation of ``model`` for ``batch`` inputs of ``input_shape``, as `step_graph` gives its training step.

    Raises:
        Refused: as `step_graph`.
    """
    form = EvaluationForm(*_sizes(model), input_shape, 1, batch)
    nodes, inputs, links = _read_model(model, form, dtype, 0.0)
    form = replace(form, classes=links[-1].frame.channels)
    return _file(nodes, form, _evaluate(nodes, links, inputs, loss), "evaluate"), form


def _read_model(
    model: nn.Module, form: GraphForm, dtype: Any, ramp: float
) -> tuple[Nodes, dict[str, Value], list[Link]]:  # fmt: skip
    """An empty graph, its inputs, and the model's layers; how many classes there are, the last layer says."""
    if not form.parameters:
        raise Refused(f"{form.WHAT}: the model has no trainable parameters")
    nodes = Nodes(dtype)
    inputs = {name: Value(name, shape) for name, shape in form.inputs().items()}
    parameters = _parameters(nodes, model, inputs)
    links = _links(model, form.input_shape, parameters, _grids(nodes, inputs, form.quantizers), ramp)
    inputs["y"] = Value("y", (form.batch, links[-1].frame.channels))
    return nodes, inputs, links


def _parameters(nodes: Nodes, model: nn.Module, inputs: dict[str, Value]) -> Parameters:
    """The flat inputs cut into the model's parameters, in its order."""
    values: dict[str, Value] = {}
    for source, wanted in (("parameters", True), ("frozen", False)):
        chosen = [(name, p) for name, p in model.named_parameters() if p.requires_grad is wanted]
        if chosen:
            pieces = nodes.split(inputs[source], [p.numel() for _, p in chosen])
            values |= {name: nodes.reshape(v, *p.shape) for (name, p), v in zip(chosen, pieces, strict=True)}
    return Parameters(values, frozenset(name for name, p in model.named_parameters() if p.requires_grad))


def _grids(nodes: Nodes, inputs: dict[str, Value], names: tuple[str, ...]) -> dict[str, list[Value]]:
    if not names:
        return {}
    numbers = nodes.split(inputs["ranges"], [1] * (RANGE_VALUES * len(names)))
    return {name: numbers[i * RANGE_VALUES : (i + 1) * RANGE_VALUES] for i, name in enumerate(names)}


def _links(
    model: nn.Module, input_shape: tuple[int, ...], parameters: Parameters, grids: dict[str, list[Value]], ramp: float
) -> list[Link]:  # fmt: skip
    """The layers in a row, with the frames that they hand on."""
    if type(model) is not nn.Sequential:
        raise Refused(f"training step: the model is a {type(model).__name__}; only layers in a row (Sequential) can be exported")
    links: list[Link] = []
    layers = list(_layers(model))
    owners: dict[int, str] = {}
    ramped = kinked_layers(model) if ramp else []
    frame = Frame(input_shape[0], input_shape[1:] or None)
    if layers and type(layers[0][1]) is nn.Flatten:
        frame = Frame(prod(input_shape), None)
    for name, layer in layers:
        for parameter in layer.parameters():
            if owners.setdefault(id(parameter), name) != name:
                raise refuse(name, layer, f"has a parameter of layer {owners[id(parameter)]} too")
        if layer in ramped:
            links.append(Ramp(frame, ramp))
        for link in _of_layer(name, layer, frame, parameters, grids):
            if isinstance(link, Largest) and links and isinstance(links[-1], Relu):
                links[-1].frame = link.frame
                links.insert(len(links) - 1, link)  # in front of the rectifier: the same, and less to rectify
            else:
                links.append(link)
            frame = link.frame
    if not links or frame.extent is not None:
        raise Refused("training step: the model must end with logits [batch, classes]; put a Flatten in front of its last layer")
    return links


def kinked_layers(model: nn.Module) -> list[nn.Module]:
    """The layers whose gradient hangs on a comparison that rounded values leave open.

    Sums of products of integers are often equal, or zero; in floating point the order of the sum then decides which of two pixels
    is the larger, or on which side of zero one lies. A pooling behind a rectifier is compared by what the rectifier was given.
    """
    found: list[nn.Module] = []
    before: nn.Module | None = None
    for _, layer in _layers(model) if type(model) is nn.Sequential else ():
        if type(layer) in (nn.ReLU, nn.ReLU6) or (type(layer) in _LARGEST and type(before) is not nn.ReLU):
            found.append(layer)
        before = layer
    return found


def _layers(model: nn.Sequential, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, layer in model._modules.items():  # named_children leaves out a layer that comes again
        assert layer is not None
        if type(layer) is nn.Sequential:
            yield from _layers(layer, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", layer


def _of_layer(name: str, layer: Any, frame: Frame, parameters: Parameters, grids: dict[str, list[Value]]) -> Iterator[Link]:
    kind = type(layer)
    if isinstance(layer, QuantLayer) and f"{name}.input" in grids:
        yield Round(frame, grids[f"{name}.input"])
    rounded = isinstance(layer, QuantLayer) and layer.weight_enabled
    if kind is FakeQuantize:
        yield from [Round(frame, grids[name])] if name in grids else []
    elif kind in _POINTWISE:
        yield _POINTWISE[kind](frame)
    elif kind in _LINEAR:
        _fits(name, layer, frame.extent is None and frame.channels == layer.in_features, frame)
        yield Dense(name, layer, parameters, rounded=rounded)
    elif kind is nn.LayerNorm:
        _fits(name, layer, frame.extent is None and layer.normalized_shape == (frame.channels,), frame)
        yield Normalise(name, 1, layer.eps, frame, parameters, weight=layer.weight is not None, bias=layer.bias is not None)
    elif kind is nn.GroupNorm:
        _fits(name, layer, layer.num_channels == frame.channels, frame)
        yield Normalise(name, layer.num_groups, layer.eps, frame, parameters, weight=layer.affine, bias=layer.affine)
    elif kind is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1):
        yield Flatten(frame)
    elif kind in (*_CONVOLUTIONS, *_LARGEST, *_AVERAGE):
        known = frame.channels == getattr(layer, "in_channels", frame.channels)
        _fits(name, layer, known and len(frame.extent or ()) == (1 if kind.__name__.endswith("1d") else 2), frame)
        yield from _spatial(name, layer, frame, parameters, rounded=rounded)
    elif not (kind is nn.Identity or (isinstance(layer, nn.Dropout) and layer.p == 0)):
        raise refuse(name, layer, f"has no form for devices; known layers: {_KNOWN}")


def _spatial(name: str, layer: Any, frame: Frame, parameters: Parameters, *, rounded: bool) -> Iterator[Link]:
    try:
        if type(layer) in _CONVOLUTIONS:
            yield convolution(name, layer, frame, parameters, rounded=rounded)
        else:
            yield (Largest if type(layer) in _LARGEST else Average)(layer, frame)
    except (RuntimeError, ValueError) as error:  # of windows that are larger than their input
        raise refuse(name, layer, f"cannot process {frame.channels} channels of {list(frame.extent or ())}: {error}") from error


def _fits(name: str, layer: nn.Module, fits: bool, frame: Frame) -> None:
    if not fits:
        shape = [frame.channels, *(frame.extent or ())]
        raise refuse(name, layer, f"does not fit its input, which has shape {shape} for each example")


def _accumulate(
    nodes: Nodes, links: list[Link], inputs: dict[str, Value], targets: list[str], kind: str, *, clips: bool
) -> dict[str, Value]:  # fmt: skip
    """The step itself; see `form`."""
    mask = nodes.reshape(inputs["mask"], inputs["mask"].size, 1)
    outputs = _outputs(nodes, _logits(nodes, links, inputs), inputs["y"], kind)
    loss = _loss(nodes, outputs, inputs["y"], mask, kind)
    errors = _errors(nodes, outputs, inputs["y"], kind)
    if not clips:
        errors = nodes.binary("Mul", errors, mask)
    parts: list[Part] = []
    for i in range(len(links) - 1, -1, -1):
        parts += links[i].parts(nodes, errors)
        if len(parts) == len(targets):
            break
        errors = links[i].back(nodes, errors)
    factors = _factors(nodes, parts, mask, inputs["clip"]) if clips else None
    found = {part.target: part.total(nodes, factors) for part in parts}
    gradient = nodes.concat([nodes.reshape(found[name], found[name].size) for name in targets], 0)
    return {"gradient": gradient, "count": nodes.reshape(nodes.reduce("ReduceSum", mask, 0, 1)), "loss": loss}


def _evaluate(nodes: Nodes, links: list[Link], inputs: dict[str, Value], kind: str) -> dict[str, Value]:
    """The evaluation itself; see `form`."""
    mask = nodes.reshape(inputs["mask"], inputs["mask"].size, 1)
    logits = _logits(nodes, links, inputs)
    loss = _loss(nodes, _outputs(nodes, logits, inputs["y"], kind), inputs["y"], mask, kind)
    # Of equal logits the first is the prediction, as torch has it: the largest of the marks that the largest logits bear.
    largest = _truth(nodes, logits, nodes.reduce("ReduceMax", logits, 1))
    marks = nodes.binary("Mul", largest, nodes.constant(np.arange(logits.shape[1], 0, -1)[None]))
    predicted = nodes.binary("Mul", _truth(nodes, marks, nodes.reduce("ReduceMax", marks, 1)), largest)
    right = nodes.binary("Mul", nodes.binary("Mul", predicted, inputs["y"]), mask)
    correct = nodes.reshape(nodes.reduce("ReduceSum", right, 0, 1))
    return {"count": nodes.reshape(nodes.reduce("ReduceSum", mask, 0, 1)), "correct": correct, "loss": loss}


def _truth(nodes: Nodes, a: Value, b: Value) -> Value:
    """1 where the two are equal, else 0."""
    return nodes.unary("Cast", nodes.binary("Equal", a, b), to=nodes.kind)


def _logits(nodes: Nodes, links: list[Link], inputs: dict[str, Value]) -> Value:
    value = _entering(nodes, inputs["x"], links[0])
    for link in links:
        value = link.forward(nodes, value)
    return value


def _outputs(nodes: Nodes, logits: Value, y: Value, kind: str) -> Value:
    """What a loss and its gradient are made of: logarithms of probabilities, or differences to the one-hot target."""
    return nodes.binary("Sub", logits, y) if kind == "squared" else nodes.unary("LogSoftmax", logits, axis=1)


def _errors(nodes: Nodes, outputs: Value, y: Value, kind: str) -> Value:
    """The gradient of each example's loss at the logits."""
    if kind == "squared":
        return nodes.scaled(outputs, 2 / outputs.shape[1])
    return nodes.binary("Sub", nodes.unary("Exp", outputs), y)


def _loss(nodes: Nodes, outputs: Value, y: Value, mask: Value, kind: str) -> Value:
    """The loss (`training.loss`) summed over the examples that count."""
    losses = nodes.binary("Mul", nodes.binary("Mul", outputs, outputs if kind == "squared" else y), mask)
    if kind == "squared":
        return nodes.scaled(nodes.reshape(nodes.reduce("ReduceSum", losses, 0, 1)), 1 / outputs.shape[1])
    return nodes.unary("Neg", nodes.reshape(nodes.reduce("ReduceSum", losses, 0, 1)))


def _factors(nodes: Nodes, parts: list[Part], mask: Value, clip: Value) -> Value:
    """mask * min(1, clip / norm) [n, 1]; a norm of zero makes the quotient infinite and the factor one."""
    squares = [part.squared_norms(nodes) for part in parts]
    norms = nodes.unary("Sqrt", nodes.write("Sum", squares, mask.shape)[0] if len(squares) > 1 else squares[0])
    return nodes.binary("Mul", nodes.binary("Min", nodes.binary("Div", clip, norms), nodes.constant(1)), mask)


def _entering(nodes: Nodes, x: Value, first: Link) -> Value:
    """The inputs with pixels first, unless the first layer flattens them."""
    batch, channels, *extent = (*x.shape, 1) if len(x.shape) == 2 else x.shape
    if not extent or isinstance(first, Flatten) or len(x.shape) == 2:
        return nodes.reshape(x, batch, x.size // batch)
    return nodes.transpose(nodes.reshape(x, batch, channels, prod(extent)), 0, 2, 1)


def _file(nodes: Nodes, form: GraphForm, outputs: dict[str, Value], name: str) -> bytes:
    for output, value in outputs.items():
        last = next(node for node in nodes.nodes if value.name in node.output)
        last.output[list(last.output).index(value.name)] = output
        for node in nodes.nodes:
            node.input[:] = [output if given == value.name else given for given in node.input]
    infos = [
        [helper.make_tensor_value_info(given, nodes.kind, shape) for given, shape in side.items()]
        for side in (form.inputs(), form.outputs())
    ]
    body = helper.make_graph(nodes.nodes, name, infos[0], infos[1], list(nodes.constants.values()))
    proto = helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="fedcore")
    helper.set_model_props(proto, {form.KEY: form.to_json()})
    return bytes(proto.SerializeToString(deterministic=True))
