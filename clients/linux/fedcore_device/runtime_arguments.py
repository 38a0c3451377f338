"""What an app hands to the runtime, checked before anything is done with it: one line says what is wrong and what is taken."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedcore.errors import Refused
from fedcore_device.installed import names
from fedcore_device.runtime_artefact import RUNTIMES
from fedcore_device.runtime_tier import Strain

__all__ = ["check_options", "checked_examples", "not_installed"]

_MOST_THREADS = 1024

Floats = npt.NDArray[np.float32]


def check_options(
    memory: Any, threads: Any, tiers: Any, delegates: Any, strain: Any, server: Any, confidence: Any, server_seconds: Any
) -> None:  # fmt: skip
    """See that the options of a `Runtime` can be.

    Raises:
        Refused: one cannot.
    """
    if not _is_whole(memory) or memory < 1:
        raise Refused(f"Runtime: memory takes a whole number of bytes above 0, got {memory!r}")
    if not _is_whole(threads) or not 1 <= threads <= _MOST_THREADS:
        raise Refused(f"Runtime: threads takes a whole number from 1 to {_MOST_THREADS}, got {threads!r}")
    if not _are_names(tiers):
        raise Refused(f"Runtime: tiers takes a list of names, as ['flagship', 'entry'], got {tiers!r}")
    if delegates is not None and not isinstance(delegates, Mapping):
        raise Refused(f"Runtime: delegates takes lists of names by runtime, as {{'onnx': ['cpu']}}, got {delegates!r}")
    for runtime, chosen in (delegates or {}).items():
        if runtime not in RUNTIMES:
            raise Refused(f"Runtime: delegates are of {' or '.join(RUNTIMES)}, got {runtime!r}")
        if not _are_names(chosen):
            raise Refused(f"Runtime: delegates[{runtime!r}] takes a list of names, as ['cpu'], got {chosen!r}")
    if strain is not None and not isinstance(strain, Strain):
        raise Refused(f"Runtime: strain takes a Strain(hot=..., low=...), got {strain!r}")
    if not (server is None or callable(server) or isinstance(server, str)):
        raise Refused(f"Runtime: server takes a function, an https URL or None, got {server!r}")
    for name, value in (("confidence", confidence), ("server_seconds", server_seconds)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not (0 < value < math.inf):
            raise Refused(f"Runtime: {name} takes a number above 0, got {value!r}")


def not_installed(directory: Path, model: Any) -> str:
    """What is said of a model of which no release is installed."""
    known = ", ".join(names(directory)) or "no model"
    return f"no release of {model} is installed in {directory}, which has {known}; fedcore-device status says more"


def checked_examples(model: str, x: Any, shape: tuple[int, ...]) -> tuple[Floats, bool]:
    """The examples as float32 [n, *shape], and whether ``x`` was one of them, [*shape].

    Raises:
        Refused: another shape or type, or values that are not finite.
    """
    wanted = ", ".join(map(str, shape))
    takes = f"it takes floating point [{wanted}], or a batch [n, {wanted}]"
    try:
        held = np.asarray(x)
    except Exception as error:  # noqa: BLE001 - lists of unlike lengths, or whatever another library's array says
        raise Refused(f"predict({model!r}): x is no array ({type(error).__name__}); {takes}") from None
    if held.dtype.kind == "O":
        raise Refused(f"predict({model!r}): x is a {type(x).__name__} that holds no numbers; {takes}")
    if held.dtype.kind != "f":
        raise Refused(f"predict({model!r}): x has type {held.dtype}; {takes}, and bytes of images divided by 255")
    single = held.shape == shape
    if not single and (held.shape[1:] != shape or not len(held)):
        raise Refused(f"predict({model!r}): x has shape {list(held.shape)}; {takes}")
    with np.errstate(over="ignore"):
        found = np.asarray(held[None] if single else held, np.float32)
    if not np.isfinite(found).all():
        raise Refused(f"predict({model!r}): x holds values that are not finite in single precision")
    return found, single


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _are_names(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and all(isinstance(one, str) for one in value)
