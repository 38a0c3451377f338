"""What must hold of a file before it may be signed or run as a training step or an evaluation graph. One judgement for all:
whoever signs (`fedcore registry sign-step`, `fedcore device sign-step`), the coordinator that exports, the device that receives.

The file is read before ONNX Runtime sees it. That it computes what its author says cannot be read from it: a graph of the same
shape that returned raw examples would run just as well. Whose graphs are run is decided by signatures, and what any of them can
carry out is bounded where it runs.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from fedcore.errors import Refused
from fedcore.portable.form import IR_VERSION, OPERATORS, OPSET, SIZE_LIMIT, EvaluationForm, GraphForm, StepForm
from fedcore.portable.onnx_file import FLOAT, StepFile, read_step_file

__all__ = ["Step", "judge_file", "judge_graph", "open_session", "read_evaluation", "read_step"]

Form = TypeVar("Form", bound=GraphForm)
_KINDS: tuple[type[GraphForm], ...] = (StepForm, EvaluationForm)


@dataclass(frozen=True)
class Step(Generic[Form]):
    """A file that may be run: its bytes, their SHA-256 in hexadecimal digits, and the sizes of its inputs."""

    data: bytes
    sha256: str
    form: Form


def read_step(data: bytes, sha256: str = "", limit: int = SIZE_LIMIT) -> Step[StepForm]:
    """Check a received training step; ``sha256`` is the name that the plan gives it, ``limit`` the most bytes.

    Raises:
        Refused: too large, another hash, or anything in it that `fedcore.portable.form` does not describe.
    """
    return _read(data, sha256, limit, StepForm)


def read_evaluation(data: bytes, sha256: str = "", limit: int = SIZE_LIMIT) -> Step[EvaluationForm]:
    """Check a received evaluation graph, as `read_step` checks a step.

    Raises:
        Refused: as `read_step`.
    """
    return _read(data, sha256, limit, EvaluationForm)


def judge_graph(data: bytes, limit: int = SIZE_LIMIT) -> Step[GraphForm]:
    """Check a training step or an evaluation graph, whichever it says it is, as devices will, and that ONNX Runtime runs it.

    Raises:
        Refused: as `read_step`, or it is neither.
    """
    if len(data) > limit:
        raise Refused(f"it has {len(data)} bytes, more than the {limit} that devices accept")
    properties = read_step_file(data).properties
    kind = next((one for one in _KINDS if one.KEY in properties), None)
    if kind is None:
        raise Refused(
            f"it has neither the property {StepForm.KEY} of a training step nor {EvaluationForm.KEY} of an evaluation graph"
        )
    step: Step[GraphForm] = _read(data, "", limit, kind)
    _try(step)
    return step


def judge_file(path: Path) -> Step[GraphForm]:
    """As `judge_graph`, of a file that somebody is about to sign.

    Raises:
        Refused: the line names the file, what is wrong with it and what is allowed.
    """
    try:
        with path.open("rb") as file:
            data = file.read(SIZE_LIMIT + 1)  # of a larger one enough to see that it is
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror})") from error
    if len(data) > SIZE_LIMIT:
        raise Refused(f"{path} is not signed: it has more than the {SIZE_LIMIT} bytes that devices accept")
    try:
        return judge_graph(data)
    except Refused as error:
        raise Refused(
            f"{path} is not signed: {error}. Allowed are the ONNX files that fedcore serve leaves in FLEET/steps"
        ) from None


def _read(data: bytes, sha256: str, limit: int, kind: type[Form]) -> Step[Form]:
    what = kind.WHAT
    if len(data) > limit:
        raise Refused(f"{what}: it has {len(data)} bytes, more than {limit}")
    found = hashlib.sha256(data).hexdigest()
    if sha256 and found != sha256:
        raise Refused(f"{what}: its SHA-256 is {found}, the plan names {sha256}")
    file = read_step_file(data)
    if file.ir_version != IR_VERSION or file.opsets != (("", OPSET),):
        raise Refused(f"{what}: it must have IR version {IR_VERSION} and opset {OPSET} of the standard domain alone")
    if set(file.properties) != {kind.KEY}:
        raise Refused(f"{what}: it must have the property {kind.KEY} and no other")
    form = kind.from_json(file.properties[kind.KEY])
    for side, stated, given in (("inputs", form.inputs(), file.inputs), ("outputs", form.outputs(), file.outputs)):
        if list(given.items()) != [(name, (FLOAT, shape)) for name, shape in stated.items()]:
            raise Refused(f"{what}: its {side} are not those that its form states")
    _check_nodes(file)
    return Step(data, found, form)


def _check_nodes(file: StepFile) -> None:
    """Known operators alone, each name written once, and before it is read."""
    known = {*file.inputs, *file.constants}
    if len(known) < len(file.inputs) + len(file.constants) or "" in known:
        raise Refused("training step: two of its inputs and constants have one name")
    for node in file.nodes:
        if node.operator not in OPERATORS:
            raise Refused(f"training step: operator {node.operator[:40]!r} is not one of a training step's")
        if not known.issuperset(node.inputs):
            raise Refused(f"training step: a {node.operator} reads what nothing before it has written")
        if known.intersection(node.outputs) or len(set(node.outputs)) < len(node.outputs) or "" in node.outputs:
            raise Refused(f"training step: a {node.operator} writes what is there already")
        known.update(node.outputs)
    if not known.issuperset(file.outputs):
        raise Refused("training step: nothing writes its outputs")


def _try(step: Step[GraphForm]) -> None:
    """Run a full batch of zeros: what the outputs are, the file alone does not say."""
    form, session = step.form, open_session(step, 1)
    given = {name: np.full(shape, name in {"mask", "ranges", "clip"}, np.float32) for name, shape in form.inputs().items()}
    try:
        answer = dict(zip(form.outputs(), session.run(list(form.outputs()), given), strict=True))
    except Exception as error:  # ONNX Runtime has a tree of errors of its own
        raise Refused(f"{form.WHAT}: ONNX Runtime cannot run it ({type(error).__name__})") from error
    for name, shape in form.outputs().items():
        if answer[name].shape != shape or answer[name].dtype != np.float32:
            raise Refused(f"{form.WHAT}: output {name} is {answer[name].dtype} {list(answer[name].shape)}, not as its form states")
    if answer["count"] != form.batch:
        raise Refused(f"{form.WHAT}: it counts {float(answer['count']):g} examples where there are {form.batch}")


def open_session(step: Step[Any], threads: int) -> Any:
    """ONNX Runtime's session for a graph.

    Raises:
        Refused: it cannot load the file.
    """
    import onnxruntime  # an agent at rest does without it

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(step.data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has a tree of errors of its own
        raise Refused(f"{step.form.WHAT} {step.sha256[:16]}: ONNX Runtime cannot load it ({type(error).__name__})") from error
