"""A sample application: windows of a sensor's six channels, which the device has labelled, as a federation's examples.

Run it with: EXAMPLES_CSV=recordings.csv fedcore-device run --examples sample_app:examples
"""

import os

import numpy as np


def examples() -> tuple[np.ndarray, np.ndarray]:
    """x [n, 6, 100] and labels [n] from lines of a label and 600 values; called anew for every round."""
    table = np.loadtxt(os.environ["EXAMPLES_CSV"], np.float32, delimiter=",", ndmin=2)
    return table[:, 1:].reshape(-1, 6, 100), table[:, 0].astype(int)
