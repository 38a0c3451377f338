"""Small models, their steps as a device receives them, and examples."""

import functools

import numpy as np
import torch
from small_zoo import CLASSES, SHAPES, network
from torch import nn

from fedcore.portable.step import PortableStep, portable_step


@functools.cache
def exported(
    name: str, batch: int = 4, unit: str = "", quantized: bool = False, loss: str = "cross_entropy"
) -> PortableStep:  # fmt: skip
    return portable_step(network(name, quantized), SHAPES[name], batch=batch, unit=unit, loss=loss)


def start_of(model: nn.Module) -> np.ndarray:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad]).numpy().copy()


def examples(name: str, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([seed, size])
    return rng.standard_normal((size, *SHAPES[name])).astype(np.float32), rng.integers(0, CLASSES, size)
