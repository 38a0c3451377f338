"""Core ML: an ML program with int8 weights per channel and int8 activations between quantize and dequantize operators.

It is written here and run nowhere: Core ML exists on Apple's systems only. What can be checked without it is: the package is read
back, and its shapes and weights are compared with the integer model. Operators:
https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedcore.errors import Refused
from fedcore.export.artefact import Contents, Facts, Tensor
from fedcore.quantization.integer import (
    Convolution,
    Dense,
    Flatten,
    GroupNorm,
    IntegerModel,
    Pool,
    Step,
    Weights,
    as_images,
)  # fmt: skip
from fedcore.quantization.wire import ActivationRange

__all__ = ["describe", "stored_weights", "write"]

_FILE = "model.mlpackage"
_WEIGHTED, _FLOAT = ("conv", "linear"), ("avg_pool", "relu", "add", "mul", "sub", "tanh", "sigmoid", "reduce_mean", "rsqrt")
_DEQUANTIZE = "constexpr_affine_dequantize"


def write(model: IntegerModel, folder: Path, facts: Facts) -> Path:
    """Write ``folder/model.mlpackage``, for iOS 17 and later: the first with integer activations.

    Raises:
        Refused: the package, read back, has other shapes or weights than the model.
    """
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb  # noqa: N813 - everyone's name for it

    images = as_images(model)

    @mb.program(  # type: ignore[untyped-decorator]  # of coremltools
        input_specs=[mb.TensorSpec(shape=(1, *model.input_shape))], opset_version=ct.target.iOS17
    )
    def program(input: Any) -> Any:  # noqa: A002 - the name of the model's input
        value = input if images is model else mb.expand_dims(x=input, axes=[2])
        values = [value]
        for step in images.steps:
            value = _step(mb, step, [values[place] for place in step.inputs])
            values.append(_on_grid(mb, value, step.grid) if step.grid else value)
        return mb.identity(x=values[-1], name="logits")

    converted = ct.convert(
        program, convert_to="mlprogram", minimum_deployment_target=ct.target.iOS17, compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    )  # fmt: skip
    converted.short_description = f"{facts.name}: classifier, logits of {', '.join(facts.labels) or 'unnamed labels'}"[:500]
    converted.version = facts.version
    converted.user_defined_metadata.update(facts.texts())
    path = folder / _FILE
    converted.save(str(path))
    _compare(path, model)
    return path


def _compare(path: Path, model: IntegerModel) -> None:
    description = _specification(path).description
    shapes = [_tensor(side).shape for side in (*description.input, *description.output)]
    if shapes != [(1, *model.input_shape), (1, model.classes)]:
        raise Refused(f"export: the Core ML package has the shapes {shapes}")
    wanted = [(weights.values, weights.scale) for weights in model.weights() if weights.scale is not None]
    stored = stored_weights(path)
    if len(wanted) != len(stored):
        raise Refused(f"export: the Core ML package has {len(stored)} layers of integers where the model has {len(wanted)}")
    for number, ((values, scale), (read, read_scale)) in enumerate(zip(wanted, stored, strict=True), 1):
        if not (np.array_equal(read.reshape(-1), values.reshape(-1)) and np.array_equal(read_scale, scale)):
            raise Refused(f"export: layer {number} of the Core ML package does not have the model's weights")


def _step(mb: Any, step: Step, inputs: list[Any]) -> Any:
    operation, x = step.operation, inputs[0]
    if isinstance(operation, Convolution | Dense):
        y = _weighted(mb, operation, x)
        return mb.relu(x=y) if operation.relu else y
    if isinstance(operation, Pool):
        pad = [side for side in operation.padding for _ in range(2)]
        keys = {"x": x, "kernel_sizes": operation.kernel, "strides": operation.stride, "pad_type": "custom", "pad": pad,
                "ceil_mode": operation.ceil}  # fmt: skip
        return (
            mb.max_pool(**keys)
            if operation.kind == "max"
            else mb.avg_pool(**keys, exclude_padding_from_average=not operation.count_padding)
        )
    if isinstance(operation, Flatten):
        return mb.reshape(x=x, shape=[1, int(np.prod(step.shape))])
    if isinstance(operation, GroupNorm):
        return _group_norm(mb, operation, x, step.shape)
    if operation.kind == "add":
        return mb.add(x=x, y=inputs[1])
    return x if operation.kind == "requantize" else {"relu": mb.relu, "tanh": mb.tanh, "sigmoid": mb.sigmoid}[operation.kind](x=x)


def _weighted(mb: Any, operation: Convolution | Dense, x: Any) -> Any:
    weight, bias = _weight(mb, operation.weights), operation.weights.real()[1]
    if isinstance(operation, Dense):
        return mb.linear(x=x, weight=weight, bias=bias)
    return mb.conv(
        x=x, weight=weight, bias=bias, pad_type="custom", pad=[side for side in operation.padding for _ in range(2)],
        strides=operation.stride, dilations=operation.dilation, groups=operation.groups,
    )  # fmt: skip


def _weight(mb: Any, weights: Weights) -> Any:
    if weights.scale is None:
        return weights.values
    zero = np.zeros(len(weights.scale), np.int8)
    return mb.constexpr_affine_dequantize(quantized_data=weights.values, zero_point=zero, scale=weights.scale, axis=np.int32(0))


def _on_grid(mb: Any, x: Any, grid: ActivationRange) -> Any:
    scale, zero = np.float32(grid.scale), np.int8(grid.zero_point)
    return mb.dequantize(
        input=mb.quantize(input=x, scale=scale, zero_point=zero, output_dtype="int8"), scale=scale, zero_point=zero
    )


def _group_norm(mb: Any, operation: GroupNorm, x: Any, shape: tuple[int, ...]) -> Any:
    grouped = mb.reshape(x=x, shape=[1, operation.groups, int(np.prod(shape)) // operation.groups])
    centred = mb.sub(x=grouped, y=mb.reduce_mean(x=grouped, axes=[2], keep_dims=True))
    variance = mb.reduce_mean(x=mb.mul(x=centred, y=centred), axes=[2], keep_dims=True)
    normal = mb.reshape(x=mb.mul(x=centred, y=mb.rsqrt(x=variance, epsilon=operation.epsilon)), shape=[1, *shape])
    weight, bias = (vector.reshape(1, -1, *[1] * (len(shape) - 1)) for vector in (operation.weight, operation.bias))
    return mb.add(x=mb.mul(x=normal, y=weight), y=bias)


def describe(path: Path) -> Contents:
    """What the specification says; integer operators are layers between a dequantize and a quantize operator."""
    spec = _specification(path)
    operations = list(_operations(spec))
    kinds = [operation.type for operation in operations]
    made = {output.name: operation.type for operation in operations for output in operation.outputs}
    layers = [operation for operation in operations if operation.type in _WEIGHTED]
    integer = sum(
        _source(operation, "weight", made) == _DEQUANTIZE and _source(operation, "x", made) == "dequantize" for operation in layers
    )
    floating = len(layers) - integer + sum(kind in _FLOAT for kind in kinds)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    words = "int8 weights per channel, int8 activations between quantize and dequantize" if integer else "none"
    shown = {kind: count for kind, count in sorted(Counter(kinds).items()) if kind != "const"}
    inputs, outputs = (tuple(map(_tensor, side)) for side in (spec.description.input, spec.description.output))
    return Contents("coreml", size, inputs, outputs, shown, integer, floating, words, dict(spec.description.metadata.userDefined))


def stored_weights(path: Path) -> list[tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]]:
    """Weights int8 and scales of the layers, in order, as the package stores them."""
    from coremltools.converters.mil.frontend.milproto.load import load as load_program

    program = load_program(_specification(path), 8, str(path / "Data/com.apple.CoreML/weights"))
    found = program.functions["main"].find_ops(op_type=_DEQUANTIZE)
    return [(operation.quantized_data.val, operation.scale.val) for operation in found]


def _specification(path: Path) -> Any:
    from coremltools.proto import Model_pb2

    spec = Model_pb2.Model()
    try:
        spec.ParseFromString((path / "Data/com.apple.CoreML/model.mlmodel").read_bytes())
    except Exception as error:  # of protobuf's own
        raise Refused(f"{path.name}: not a Core ML package: {type(error).__name__}") from error
    if not spec.HasField("mlProgram"):
        raise Refused(f"{path.name}: not an ML program")
    return spec


def _operations(spec: Any) -> Any:
    function = spec.mlProgram.functions["main"]
    return function.block_specializations[function.opset].operations


def _source(operation: Any, name: str, made: dict[str, str]) -> str:
    arguments = operation.inputs[name].arguments
    return made.get(arguments[0].name, "") if arguments else ""


def _tensor(feature: Any) -> Tensor:
    array = feature.type.multiArrayType
    return Tensor(
        feature.name, tuple(array.shape), {65568: "float", 65552: "float16", 131104: "int32"}.get(array.dataType, "unknown")
    )
