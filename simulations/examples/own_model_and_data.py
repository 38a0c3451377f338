"""A model and a data set of one's own.

fedcore simulate simulations/examples/own_model_and_data.toml
"""

import numpy as np
import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """Any torch.nn.Module: its Linear and Conv layers become quantization-aware by themselves.

    Arguments named input_shape and classes are filled in from the data, the others come from [model.params].
    """

    def __init__(self, input_shape: tuple[int, ...], classes: int, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(input_shape[0], width, 3, padding=1)
        self.norm = nn.GroupNorm(4, width)
        self.inner = nn.Conv2d(width, width, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(width * (input_shape[1] // 2) * (input_shape[2] // 2), classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, classes] of x [batch, channels, height, width]."""
        x = torch.relu(self.norm(self.stem(x)))
        x = self.pool(torch.relu(x + self.inner(x)))
        return self.head(torch.flatten(x, 1))


def shapes(people: int = 20, per_person: int = 60, side: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Drawn rectangles, discs and crosses: x [n, 1, side, side], label [n], and who drew each: [n], the natural partition.

    Every person has a size and a contrast of their own, so that clients differ as they do in the field.
    """
    rng = np.random.default_rng(1)
    count = people * per_person
    owner = np.repeat(np.arange(people), per_person)
    kind = rng.integers(0, 3, count)
    radius = (rng.uniform(2.0, 4.5, people)[owner] + rng.normal(0, 0.3, count))[:, None, None]
    contrast = rng.uniform(0.5, 1.0, people)[owner][:, None, None]
    rows, columns = np.mgrid[:side, :side]
    centre = rng.uniform(4, side - 5, (2, count, 1, 1))
    dy, dx = np.abs(rows - centre[0]), np.abs(columns - centre[1])
    drawn = np.choose(
        kind[:, None, None],
        [np.maximum(dy, dx) < radius * 0.85, dy**2 + dx**2 < radius**2, (np.minimum(dy, dx) < 1) & (np.maximum(dy, dx) < radius)],
    )
    x = contrast * drawn + rng.normal(0, 0.08, drawn.shape)
    return x[:, None].astype(np.float32), kind, owner
