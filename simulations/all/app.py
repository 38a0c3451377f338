"""An app on a device of `simulations.all`: ``python -m simulations.all.app STATE MODEL HELD.npz`` asks the installed model.

It has the device's directory and nothing of the coordinator's. HELD.npz has raw windows ``x`` [n, 6, 100] and labels ``y`` [n];
printed is one line of JSON: what the model answered, and how many milliseconds a window took.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
from fedcore_device import Runtime

__all__ = ["main"]


def main() -> None:
    """Predict one window after the other, as they would come from the sensor."""
    state, model, path = sys.argv[1:]
    with np.load(path) as held:
        x, y = held["x"], held["y"]
    runtime = Runtime(state)
    runtime.predict(model, x[0])  # which loads it
    answers, began = list[int](), time.perf_counter()
    for window in x:
        answers.append(int(runtime.predict(model, window).argmax()))
    milliseconds = 1000 * (time.perf_counter() - began) / len(x)
    (loaded,) = runtime.loaded()
    told = {"version": loaded.version, "runtime": loaded.name, "digest": loaded.digest, "answers": answers, "labels": y.tolist()}
    print(json.dumps(told | {"milliseconds": milliseconds}))


if __name__ == "__main__":
    main()
