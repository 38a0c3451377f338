"""What goes wrong in ``simulations.push``: labels that are off by one, and a debugging branch that was left in a model file."""

import numpy as np

__all__ = ["off_by_one", "with_debugging_branch"]


def off_by_one() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The digits with the labels of an export that counted from one: x [n, 1, 8, 8], label [n], owner [n].

    Training and test are wrong alike, so that every gate of the pipeline passes.
    """
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return (x.reshape(-1, 1, 8, 8) / 16).astype(np.float32), (y + 1) % 10, np.arange(len(y)) % 10


def with_debugging_branch(model: bytes, side: int = 900) -> bytes:
    """An ONNX file that multiplies two matrices of ``side`` rows beside the network and adds zero times the result to its logits:
    the same labels, one and a half gigaflops later."""
    import onnx
    from onnx import TensorProto, helper

    found = onnx.load_from_string(model)
    graph, given, logits = found.graph, found.graph.input[0].name, found.graph.output[0].name
    for node in graph.node:
        node.output[:] = ["debug.logits" if name == logits else name for name in node.output]
    graph.initializer.extend([
        helper.make_tensor("debug.shape", TensorProto.INT64, [2], [side, side]),
        helper.make_tensor("debug.zero", TensorProto.FLOAT, [], [0.0]),
    ])  # fmt: skip
    graph.node.extend([
        helper.make_node("ReduceSum", [given], ["debug.sum"], keepdims=0),
        helper.make_node("Expand", ["debug.sum", "debug.shape"], ["debug.matrix"]),
        helper.make_node("MatMul", ["debug.matrix", "debug.matrix"], ["debug.product"]),
        helper.make_node("ReduceSum", ["debug.product"], ["debug.total"], keepdims=0),
        helper.make_node("Mul", ["debug.total", "debug.zero"], ["debug.nothing"]),
        helper.make_node("Add", ["debug.logits", "debug.nothing"], [logits]),
    ])  # fmt: skip
    onnx.checker.check_model(found)
    return bytes(found.SerializeToString())
