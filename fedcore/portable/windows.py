"""Convolutions and poolings as tables of pixel numbers: which pixels a window sees, and which windows a pixel is seen by.

A table has one row per output position and one column per element of the kernel; -1 stands for a zero that padding adds.
Stride, dilation, padding and its mode are all in the numbers, and nothing else of a convolution needs to know them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["Table", "convolution_table", "extent_of", "inverse", "pooling_matrix", "pooling_table"]

Table = npt.NDArray[np.int64]


def extent_of(layer: nn.Module, extent: tuple[int, ...]) -> tuple[int, ...]:
    """The spatial extent of a pooling's output."""
    with torch.no_grad():
        return tuple(layer(torch.zeros(1, 1, *extent)).shape[2:])


def convolution_table(layer: nn.Conv1d | nn.Conv2d, extent: tuple[int, ...]) -> tuple[Table, tuple[int, ...]]:
    """Table [positions, kernel elements] of a convolution over pixels numbered row by row, and the extent of the positions.

    Raises:
        ValueError: the kernel is larger than the image.
    """
    numbers = torch.arange(1.0, 1.0 + int(np.prod(extent)), dtype=torch.float64).view(1, 1, *extent)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    image = F.pad(numbers, layer._reversed_padding_repeated_twice, mode=mode)[0, 0].numpy().astype(np.int64) - 1
    windows = _taps(image, layer.kernel_size, layer.stride, layer.dilation)
    return _flat(windows), windows.shape[: len(extent)]


def pooling_table(layer: nn.MaxPool1d | nn.MaxPool2d, extent: tuple[int, ...], positions: tuple[int, ...]) -> Table:
    """Table [positions, kernel elements] of a pooling by maximum that gives the extent ``positions``.

    Where a window reaches beyond the image it sees its own first pixel once more, which changes neither the maximum nor which
    pixel is the first to have it.
    """
    kernel, stride, padding, dilation = (
        _sides(side, len(extent)) for side in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    )
    reach = [(p - 1) * s + d * (k - 1) + 1 for p, s, d, k in zip(positions, stride, dilation, kernel, strict=True)]
    margins = [(pad, max(0, span - size - pad)) for pad, span, size in zip(padding, reach, extent, strict=True)]
    image = np.pad(np.arange(int(np.prod(extent))).reshape(extent), margins, constant_values=-1)
    table = _flat(_taps(image[tuple(slice(span) for span in reach)], kernel, stride, dilation))
    first = table[np.arange(len(table)), (table >= 0).argmax(1)]
    return np.where(table >= 0, table, first[:, None])


def pooling_matrix(layer: nn.Module, extent: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """The matrix [positions, pixels] of a layer that is linear in the pixels of each channel: what it makes of unit images."""
    pixels = int(np.prod(extent))
    with torch.no_grad():
        unit = layer(torch.eye(pixels, dtype=torch.float64).view(pixels, 1, *extent))
    return np.ascontiguousarray(unit.reshape(pixels, -1).numpy().T)


def inverse(table: Table, pixels: int) -> Table:
    """Which entries of the flattened ``table`` name each pixel: [pixels, most], filled up with -1."""
    entries = np.flatnonzero(table.reshape(-1) >= 0)
    named = table.reshape(-1)[entries]
    order = np.argsort(named, kind="stable")
    named, entries = named[order], entries[order]
    counts = np.bincount(named, minlength=pixels)
    found = np.full((pixels, max(1, int(counts.max(initial=0)))), -1, np.int64)
    starts = np.cumsum(counts) - counts
    found[named, np.arange(len(named)) - starts[named]] = entries
    return found


def _taps(image: Table, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Table:
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(image, spans)
    steps = tuple(slice(None, None, step) for step in (*stride, *dilation))
    return windows[steps]


def _flat(windows: Table) -> Table:
    sides = windows.ndim // 2
    return np.ascontiguousarray(windows).reshape(int(np.prod(windows.shape[:sides])), -1)


def _sides(value: Any, dimensions: int) -> tuple[int, ...]:
    return (value,) * dimensions if isinstance(value, int) else tuple(value)
