"""A second opinion from a server, for examples of which the device's model is not sure. Off unless the app asks for it.

The input leaves the device then, and only then. The server's answer is waited for a limited time; whatever goes wrong, the device's
own answer stands.
"""

from __future__ import annotations

import io
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from fedcore.errors import Refused

__all__ = ["Ask", "SecondOpinion", "ask_url", "probabilities_of"]

Floats = npt.NDArray[np.float32]
Ask = Callable[[str, npt.NDArray[Any]], npt.NDArray[Any]]
"""Logits [n, classes] of a model, by name, for raw examples [n, *shape]."""
_AT_ONCE = 4  # questions without an answer yet: threads that wait for a server that hangs
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
_LARGEST_ANSWER = 16 << 20


def _softmax(logits: Floats) -> Floats:
    """Probabilities [n, classes]."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True), np.float32)


def probabilities_of(outputs: Floats, loss: str) -> Floats:
    """Probabilities [n, classes] by a model that was trained on ``loss``.

    The outputs of one of the squared error estimate them (the least squared error is the conditional mean of the one-hot target):
    what is below zero counts as zero, the rest is divided by its sum; all classes are alike where nothing is above.
    """
    if loss != "squared":
        return _softmax(outputs)
    above = np.maximum(outputs, 0)
    total = above.sum(axis=-1, keepdims=True)
    return np.asarray(np.where(total > 0, above / np.where(total > 0, total, 1), 1 / outputs.shape[-1]), np.float32)


class SecondOpinion:
    """Asks for the examples whose most probable class has a probability below ``confidence``, for ``seconds`` at most.

    Raises:
        Refused: a confidence outside of (0, 1], or no positive time.
    """

    def __init__(self, ask: Ask, confidence: float, seconds: float) -> None:
        if not (0 < confidence <= 1 and seconds > 0):
            raise Refused(f"a server is asked below a confidence in (0, 1] for a positive time, got {confidence!r} and {seconds!r}")
        self._ask, self._confidence, self._seconds = ask, confidence, seconds
        self._free = threading.BoundedSemaphore(_AT_ONCE)

    def over(
        self, model: str, x: npt.NDArray[Any], logits: Floats, loss: str = "cross_entropy"
    ) -> tuple[Floats, int, int]:  # fmt: skip
        """Logits with the server's where it answered in time; for how many examples it was asked, and answered."""
        unsure = np.flatnonzero(probabilities_of(logits, loss).max(axis=1) < self._confidence)
        if not len(unsure):
            return logits, 0, 0
        answer = self._answer(model, x[unsure])
        if answer is None or answer.shape != logits[unsure].shape or not np.isfinite(answer).all():
            return logits, len(unsure), 0
        joined = logits.copy()
        joined[unsure] = answer
        return joined, len(unsure), len(unsure)

    def _answer(self, model: str, x: npt.NDArray[Any]) -> Floats | None:
        if not self._free.acquire(blocking=False):
            return None
        found: list[Floats] = []

        def ask() -> None:
            try:
                found.append(np.asarray(self._ask(model, x), np.float32))
            except Exception:  # noqa: BLE001 - the app's own code, or a network: the local answer stands
                found.clear()
            finally:
                self._free.release()

        thread = threading.Thread(target=ask, daemon=True, name="fedcore-second-opinion")
        thread.start()
        thread.join(self._seconds)
        return found[0] if found else None


def ask_url(url: str) -> Ask:
    """A POST of the examples as .npy to ``url`` with ``?model=NAME``, which is answered by logits as .npy.

    Raises:
        Refused: not https, and not this machine.
    """
    parts = urllib.parse.urlsplit(url)
    if not (parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _LOOPBACK)) or not parts.hostname:
        raise Refused("a server that is asked is at https://...; http:// is for this machine only")
    opener = urllib.request.build_opener(_NoRedirects)

    def ask(model: str, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        body = io.BytesIO()
        np.save(body, x)
        query = "&".join(filter(None, (parts.query, urllib.parse.urlencode({"model": model}))))
        request = urllib.request.Request(  # noqa: S310 - the scheme was looked at
            urllib.parse.urlunsplit(parts._replace(query=query)), body.getvalue(), {"Content-Type": "application/octet-stream"}
        )
        with opener.open(request, timeout=60) as reply:
            return np.asarray(np.load(io.BytesIO(reply.read(_LARGEST_ANSWER)), allow_pickle=False))

    return ask


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Examples go where the app sent them, and nowhere else."""

    def redirect_request(self, *_: Any) -> None:
        """None: the redirect ends as an error."""
