"""Depthwise separable convolutions."""

from itertools import pairwise

from torch import nn

from fedcore.errors import Refused
from fedcore.quantization.layers import FakeQuantize

__all__ = ["dscnn"]


def dscnn(input_shape: tuple[int, ...], classes: int, channels: tuple[int, ...] = (16, 32, 64, 64)) -> nn.Sequential:
    """A strided convolution, then depthwise separable blocks (Howard et al. 2017, arXiv:1704.04861), without normalisation.

    The second block halves the resolution; global average pooling in front of the classifier.
    """
    if len(input_shape) != 3 or min(input_shape[1:]) < 4:
        raise Refused(f"model dscnn needs images [channels, height, width] of at least 4x4, got {list(input_shape)}")
    layers: list[nn.Module] = [nn.Conv2d(input_shape[0], channels[0], 3, stride=2, padding=1), nn.ReLU()]
    height, width = ((side + 1) // 2 for side in input_shape[1:])
    for block, (inputs, outputs) in enumerate(pairwise(channels)):
        stride = 2 if block == 1 else 1
        height, width = (height + stride - 1) // stride, (width + stride - 1) // stride
        layers += [
            nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs),
            nn.ReLU(),
            nn.Conv2d(inputs, outputs, 1),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, FakeQuantize(), nn.AvgPool2d((height, width)), nn.Flatten(), nn.Linear(channels[-1], classes))
