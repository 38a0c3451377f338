"""Two convolutions, two fully connected layers."""

from torch import nn

from fedcore.errors import Refused

__all__ = ["cnn"]


def cnn(
    input_shape: tuple[int, ...], classes: int, channels: tuple[int, int] = (16, 32), hidden: int = 128
) -> nn.Sequential:  # fmt: skip
    """conv3x3, pool, conv3x3, pool, two linear layers; 108,618 parameters for 1x28x28 and ten classes.

    Convolutions are unpadded where the image is large enough for it (at least 10 pixels), else padded to the same size.
    """
    if len(input_shape) != 3 or min(input_shape[1:]) < 4:
        raise Refused(f"model cnn needs images [channels, height, width] of at least 4x4, got {list(input_shape)}")
    first, second = channels
    padding = 0 if min(input_shape[1:]) >= 10 else 1
    height, width = (((side + 2 * padding - 2) // 2 + 2 * padding - 2) // 2 for side in input_shape[1:])
    return nn.Sequential(
        nn.Conv2d(input_shape[0], first, 3, padding=padding), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(first, second, 3, padding=padding), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(second * height * width, hidden), nn.ReLU(), nn.Linear(hidden, classes),
    )  # fmt: skip
