"""Multi-layer perceptron."""

import math
from itertools import pairwise

from torch import nn

__all__ = ["mlp"]


def mlp(input_shape: tuple[int, ...], classes: int, hidden: tuple[int, ...] = (64,)) -> nn.Sequential:
    """Fully connected layers with ReLU between them; 50,890 parameters for 1x28x28 and ten classes."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise((math.prod(input_shape), *hidden)):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear((math.prod(input_shape), *hidden)[-1], classes))
