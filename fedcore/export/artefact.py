"""What exporters share: the facts that travel with a model, and what an artefact says about itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Contents", "Facts", "Logits", "Tensor"]

Floats = npt.NDArray[np.float32]
Logits = Callable[[Floats], Floats]
"""An artefact that was opened: logits float32 [n, classes] of x float32 [n, *input_shape], normalised, channels first."""


@dataclass(frozen=True)
class Facts:
    """What a user of the artefact has to know. ``mean`` and ``std`` turn raw values into ``(raw - mean) / std``: one number, or one
    a channel; raw is in [0, 1] for images. ``labels[k]`` names logit k."""

    name: str = ""
    version: str = ""
    run: str = ""
    tier: str = ""
    labels: tuple[str, ...] = ()
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    more: Mapping[str, str] = field(default_factory=dict)

    @property
    def loss(self) -> str:
        """What the model was trained on; logits mean something else for each."""
        return self.more.get("loss", "cross_entropy")

    def texts(self) -> dict[str, str]:
        """The facts as strings by key, lists as JSON; what is unknown is left out."""
        own = {
            "name": self.name, "version": self.version, "run": self.run, "tier": self.tier, "labels": json.dumps(self.labels),
            "mean": json.dumps(self.mean), "std": json.dumps(self.std),
        }  # fmt: skip
        return {key: value for key, value in ({**self.more, **own}).items() if value}

    @classmethod
    def of_texts(cls, texts: Mapping[str, str], **own: str) -> Facts:
        """The facts that a run's metadata holds (`coordinator.run` writes them into the wire format)."""
        known = {key: value for key, value in texts.items() if key in ("name", "version")}
        labels, mean, std = (json.loads(texts.get(key, usual)) for key, usual in (("labels", "[]"), ("mean", "0"), ("std", "1")))
        more = {key: value for key, value in texts.items() if key in ("model", "round", "loss")}
        return cls(labels=tuple(labels), mean=_numbers(mean), std=_numbers(std), more=more, **(known | own))


def _numbers(value: Any) -> tuple[float, ...]:
    return tuple(map(float, value)) if isinstance(value, list) else (float(value),)


@dataclass(frozen=True)
class Tensor:
    """An input or output of an artefact: name, shape (None or a name where free), element type, and its int8 grid if it has one."""

    name: str
    shape: tuple[int | str | None, ...]
    kind: str
    scale: float | None = None
    zero_point: int | None = None


@dataclass(frozen=True)
class Contents:
    """What an artefact holds. ``operators`` counts those that are executed; ``integer`` are convolutions and dense layers on
    integers, ``floating`` operators on floats of any kind; the others average, move or convert. ``quantization`` says in words how
    numbers are stored."""

    kind: str
    size: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    operators: Mapping[str, int]
    integer: int
    floating: int
    quantization: str
    metadata: Mapping[str, str] = field(default_factory=dict)
