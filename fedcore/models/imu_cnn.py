"""One-dimensional convolutions over windows of sensor data."""

from torch import nn

from fedcore.errors import Refused

__all__ = ["imu_cnn"]


def imu_cnn(
    input_shape: tuple[int, ...], classes: int, channels: tuple[int, int] = (32, 64), hidden: int = 64
) -> nn.Sequential:  # fmt: skip
    """Two convolutions of width 5 over time with pooling, two linear layers; input [sensor channels, steps]."""
    if len(input_shape) != 2 or input_shape[1] < 16:
        raise Refused(f"model imu_cnn needs windows [channels, steps] of at least 16 steps, got {list(input_shape)}")
    first, second = channels
    steps = ((input_shape[1] - 4) // 2 - 4) // 2
    return nn.Sequential(
        nn.Conv1d(input_shape[0], first, 5), nn.ReLU(), nn.MaxPool1d(2),
        nn.Conv1d(first, second, 5), nn.ReLU(), nn.MaxPool1d(2),
        nn.Flatten(), nn.Linear(second * steps, hidden), nn.ReLU(), nn.Linear(hidden, classes),
    )  # fmt: skip
