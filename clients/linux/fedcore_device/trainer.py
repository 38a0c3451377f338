"""A device's round of training: the loop around a training step, in numpy.

A step's graph sums gradients; what is done with the sum is here: noise, the denominator, weight decay, FedProx's anchor, momentum
and the learning rate, in the order and with the draws of `fedcore.training.local`, which it equals for equal generators.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedcore.errors import Refused, TryAgain
from fedcore.portable.form import GraphForm, StepForm
from fedcore.quantization.wire import ActivationRange
from fedcore_device.checkpoint import Progress, load_progress, restored_generator, save_progress, state_of
from fedcore_device.noise import GaussianNoise, Randomness
from fedcore_device.plan import TrainingPlan, batches, number_of_steps
from fedcore_device.step import Accumulate, Engine, Step

__all__ = ["Paused", "Resume", "Task", "Trained", "check_examples", "train"]

Floats = npt.NDArray[np.float32]


class Paused(TryAgain):
    """Training stopped after ``step`` of ``steps`` steps because it was told to; the same call goes on from there."""

    def __init__(self, step: int, steps: int) -> None:
        super().__init__(f"training paused after {step} of {steps} steps")
        self.step, self.steps = step, steps


@dataclass(frozen=True)
class Task:
    """What a round starts from: the step, the trainable parameters [d], the frozen ones [f], the activations' ranges, the plan."""

    step: Step[StepForm]
    start: Floats
    plan: TrainingPlan
    frozen: Floats | None = None
    ranges: Mapping[str, ActivationRange] | None = None

    def check(self) -> None:
        """Refuse parts that do not fit together.

        Raises:
            Refused: parameters of another size or not finite, a plan with privacy and a step that does not clip, or the reverse.
        """
        form = self.step.form
        if self.start.shape != (form.parameters,) or self.start.dtype != np.float32 or not np.isfinite(self.start).all():
            raise Refused(f"training: the step takes {form.parameters} finite float32 parameters, got {list(self.start.shape)}")
        if form.clips is not (self.plan.privacy is not None):
            raise Refused("training: the step must clip where the plan protects examples, and only there")


@dataclass(frozen=True)
class Resume:
    """The file that holds the round's progress, and how many steps lie between two writes."""

    path: Path
    every: int = 20


@dataclass(frozen=True)
class Trained:
    """``update`` [d] = local minus received parameters; ``loss`` is the mean over all examples trained on, nan if none.

    With example-level privacy only ``update`` may leave the device: ``loss`` is exact.
    """

    update: Floats
    examples: int
    loss: float
    steps: int


def train(
    task: Task, x: Floats, labels: npt.NDArray[np.int64], randomness: Randomness, *, resume: Resume | None = None,
    keep_going: Callable[[], bool] = lambda: True, threads: int = 1, engine: Engine | None = None,
) -> Trained:  # fmt: skip
    """Train on x [n, ...] with labels [n].

    ``keep_going`` is asked before every step. With ``resume`` the round's progress is written every few steps, when it is told
    to stop and at the end, and a later call with the same task and examples goes on from there, with the generators of the
    first call; it ends with the same bytes as a round that was never interrupted. The caller removes the file.

    ``engine`` computes the task's step in the place of ONNX Runtime; the sums that it gives may be rounded otherwise.

    Raises:
        Paused: ``keep_going`` said no; without ``resume`` the work is lost.
        Refused: a task or examples that do not fit the step, or a step that gives what no honest one gives.
        ClientFailure: without privacy, a gradient that is not finite.
        TryAgain: progress cannot be written.
    """
    task.check()
    check_examples(task.step.form, x, labels)
    x, labels = np.ascontiguousarray(x, np.float32), np.asarray(labels, np.int64)
    fingerprint = _fingerprint(task, x, labels) if resume else ""
    progress = load_progress(resume.path, fingerprint) if resume else None
    if progress is None:
        order = state_of(randomness.order)
        velocity = np.zeros_like(task.start) if task.plan.momentum else None
        progress = Progress(task.start.copy(), velocity, 0, 0.0, 0, order, randomness.noise_key)
    steps = number_of_steps(len(x), task.plan)
    if progress.step < steps:
        loop = _Loop(task, progress, x, labels, threads, engine)
        for rows in itertools.islice(batches(len(x), task.plan, restored_generator(progress.order)), progress.step, None):
            if not keep_going():
                if resume:
                    save_progress(resume.path, fingerprint, progress)
                raise Paused(progress.step, steps)
            loop.take(rows)
            if resume and (progress.step % resume.every == 0 or progress.step == steps):
                save_progress(resume.path, fingerprint, progress)
    loss = progress.loss / progress.trained if progress.trained else math.nan
    return Trained(progress.parameters - task.start, len(x), loss, progress.step)


class _Loop:
    """Takes one step after another, which changes ``progress``."""

    def __init__(
        self, task: Task, progress: Progress, x: Floats, labels: npt.NDArray[np.int64], threads: int, engine: Engine | None
    ) -> None:
        self.task, self.progress, self.x, self.labels = task, progress, x, labels
        self.accumulate = Accumulate(task.step, frozen=task.frozen, ranges=task.ranges, threads=threads, engine=engine)
        privacy = task.plan.privacy
        self.clip = privacy.clipping_norm if privacy else math.inf
        self.accumulate.probe(task.start, self.clip)
        self.noise = GaussianNoise(progress.noise_key, len(task.start), progress.step) if privacy else None
        self.pull = task.plan.weight_decay + task.plan.proximal_mu
        self.anchor = task.start * np.float32(task.plan.proximal_mu) if task.plan.proximal_mu else None
        self.scratch = np.empty_like(task.start)

    def take(self, rows: npt.NDArray[np.int64]) -> None:
        """One step on the examples ``rows``."""
        plan, progress, scratch = self.task.plan, self.progress, self.scratch
        values, velocity = progress.parameters, progress.velocity
        gradient, loss = self.accumulate(values, self.x, self.labels, rows, self.clip)
        if self.noise and plan.privacy:
            self.noise.add(gradient, plan.privacy.noise_multiplier * self.clip)
        gradient *= np.float32(1 / (plan.batch_size if plan.privacy else len(rows)))
        if self.pull:  # weight decay w and the proximal term mu: (w + mu) values - mu start
            gradient += np.multiply(values, np.float32(self.pull), out=scratch)
        if self.anchor is not None:
            gradient -= self.anchor
        if velocity is not None:
            velocity *= np.float32(plan.momentum)
            velocity += gradient
            gradient = velocity
        values -= np.multiply(gradient, np.float32(plan.lr), out=scratch)
        progress.step, progress.loss, progress.trained = progress.step + 1, progress.loss + loss, progress.trained + len(rows)


def check_examples(form: GraphForm, x: Floats, labels: npt.NDArray[np.int64]) -> None:
    """See that x [n, ...] and labels [n] fit a graph.

    Raises:
        Refused: they do not.
    """
    if x.shape != (len(labels), *form.input_shape) or labels.ndim != 1:
        raise Refused(f"training: examples must have shape [n, {', '.join(map(str, form.input_shape))}] and n labels")
    if len(labels) and not 0 <= labels.min() <= labels.max() < form.classes:
        raise Refused(f"training: labels must be integers from 0 to {form.classes - 1}")


def _fingerprint(task: Task, x: Floats, labels: npt.NDArray[np.int64]) -> str:
    """A hash of all that determines the round but its randomness."""
    ranges = {name: (grid.scale.hex(), grid.zero_point) for name, grid in (task.ranges or {}).items()}
    table = json.dumps([task.step.sha256, asdict(task.plan), ranges, x.shape], sort_keys=True)
    digest = hashlib.sha256(table.encode())
    for array in (task.start, np.zeros(0, np.float32) if task.frozen is None else task.frozen, labels, x):
        digest.update(len(array).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
