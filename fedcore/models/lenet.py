"""LeNet as federated benchmarks use it."""

from torch import nn

from fedcore.errors import Refused

__all__ = ["lenet"]


def lenet(input_shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """5x5 convolutions of 6 and 16 channels, linear layers of 120 and 84 (LeCun et al. 1998, with ReLU and max pooling)."""
    if len(input_shape) != 3 or min(input_shape[1:]) < 16:
        raise Refused(f"model lenet needs images [channels, height, width] of at least 16x16, got {list(input_shape)}")
    height, width = (((side - 4) // 2 - 4) // 2 for side in input_shape[1:])
    return nn.Sequential(
        nn.Conv2d(input_shape[0], 6, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * height * width, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, classes),
    )  # fmt: skip
