"""The device's own examples: what a function of the owner's gives, or the .npz files of a directory."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedcore.errors import Refused

__all__ = ["load_examples"]


def load_examples(source: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """x [n, ...] and labels [n] from ``module:function``, which returns the two, or from a directory of .npz files that hold arrays
    x and y, which are put together in the order of their names.

    Raises:
        Refused: there is no such thing, or it gives something else.
    """
    if Path(source).is_dir():
        parts = [_read(path) for path in sorted(Path(source).glob("*.npz"))]
        if not parts:
            raise Refused(f"examples: {source} holds no .npz file")
        shapes = {x.shape[1:] for x, _ in parts}
        if len(shapes) > 1:
            raise Refused(f"examples: the files of {source} hold examples of different shapes")
        return np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])
    module, _, function = source.partition(":")
    if not (module and function):
        raise Refused(f"examples: {source!r} is neither a directory nor module:function")
    try:
        found = getattr(importlib.import_module(module), function)()
        x, y = found
    except Exception as error:  # the owner's code may raise anything
        raise Refused(f"examples: {source} failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    return _checked(source, x, y)


def _read(path: Path) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    try:
        with np.load(path, allow_pickle=False) as found:
            x, y = found["x"], found["y"]
    except (OSError, ValueError, KeyError) as error:
        raise Refused(f"examples: {path} is no .npz file with arrays x and y ({type(error).__name__})") from error
    return _checked(str(path), x, y)


def _checked(source: str, x: Any, y: Any) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    x, y = np.asarray(x), np.asarray(y)
    if x.ndim < 2 or y.shape != x.shape[:1] or x.dtype.kind not in "fiu" or y.dtype.kind not in "iu":
        raise Refused(f"examples: {source} gives x {x.dtype} {list(x.shape)} and y {y.dtype} {list(y.shape)}; needed are numbers "
                      "[n, ...] and integer labels [n]")  # fmt: skip
    if not np.isfinite(x).all():
        raise Refused(f"examples: {source} gives values that are not finite")
    return x.astype(np.float32), y.astype(np.int64)
