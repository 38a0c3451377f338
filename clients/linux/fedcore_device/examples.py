"""The device's own examples: what a function of the owner's gives, or the .npz files of a directory.

Those that are held out for evaluations are never trained on: they lie in a directory of their own, or the function returns them
behind the others.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedcore.errors import Refused

__all__ = ["HELD_OUT", "load_examples", "load_held_out"]

HELD_OUT = "holdout"
"""Name of the directory of held-out examples inside that of the others."""
Examples = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]


def load_examples(source: str) -> Examples:
    """x [n, ...] and labels [n] to train on: what ``module:function`` returns (the first two of four, see `load_held_out`), or the
    .npz files of a directory, which hold arrays x and y and are put together in the order of their names.

    Raises:
        Refused: there is no such thing, or it gives something else.
    """
    if Path(source).is_dir():
        parts = _read_all(Path(source))
        if not parts:
            raise Refused(f"examples: {source} holds no .npz file")
        return _together(source, parts)
    return _checked(source, *_call(source)[:2])


def load_held_out(source: str) -> Examples:
    """x [n, ...] and labels [n] to evaluate on, empty where there are none: from the directory `HELD_OUT` inside a directory, or
    what ``module:function`` returns behind the first two.

    Raises:
        Refused: as `load_examples`.
    """
    nothing = np.zeros((0, 1), np.float32), np.zeros(0, np.int64)
    if Path(source).is_dir():
        parts = _read_all(Path(source) / HELD_OUT)
        return _together(f"{source}/{HELD_OUT}", parts) if parts else nothing
    found = _call(source)[2:]
    return _checked(source, *found) if found else nothing


def _call(source: str) -> tuple[Any, ...]:
    """The two or four arrays that the owner's function returns."""
    module, _, function = source.partition(":")
    if not (module and function):
        raise Refused(f"examples: {source!r} is neither a directory nor module:function")
    try:
        found = tuple(getattr(importlib.import_module(module), function)())
    except Exception as error:  # the owner's code may raise anything
        raise Refused(f"examples: {source} failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    if len(found) not in {2, 4}:
        raise Refused(
            f"examples: {source} must return x and y, or x, y and the same of what is held out; it returned {len(found)} values"
        )
    return found


def _read_all(directory: Path) -> list[Examples]:
    return [_read(path) for path in sorted(directory.glob("*.npz"))]


def _together(where: str, parts: list[Examples]) -> Examples:
    if len({x.shape[1:] for x, _ in parts}) > 1:
        raise Refused(f"examples: the files of {where} hold examples of different shapes")
    return np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])


def _read(path: Path) -> Examples:
    try:
        with np.load(path, allow_pickle=False) as found:
            x, y = found["x"], found["y"]
    except Exception as error:  # a file that is cut off or something else raises nearly anything: BadZipFile, EOFError, zlib.error
        raise Refused(f"examples: {path} is no .npz file with arrays x and y ({type(error).__name__})") from error
    return _checked(str(path), x, y)


def _checked(source: str, x: Any, y: Any) -> Examples:
    x, y = np.asarray(x), np.asarray(y)
    if x.ndim < 2 or y.shape != x.shape[:1] or x.dtype.kind not in "fiu" or y.dtype.kind not in "iu":
        raise Refused(f"examples: {source} gives x {x.dtype} {list(x.shape)} and y {y.dtype} {list(y.shape)}; needed are numbers "
                      "[n, ...] and integer labels [n]")  # fmt: skip
    with np.errstate(over="ignore"):
        x = x.astype(np.float32)
    if not np.isfinite(x).all():
        raise Refused(f"examples: {source} gives values that are not finite")
    return x, y.astype(np.int64)
