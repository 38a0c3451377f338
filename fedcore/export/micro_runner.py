"""Runs a .tflite file in TensorFlow Lite Micro. Executed by an interpreter of its own environment, with numpy and tflite_micro:

python micro_runner.py MODEL.tflite INPUTS.npy RESULT.npz ARENA_BYTES

INPUTS are on the model's input grid, [n, *tensor shape]; RESULT has ``outputs`` [n, ...], ``milliseconds`` [n], ``arena`` in bytes.
"""

import os
import re
import sys
import tempfile
import time

import numpy as np


def main(model: str, inputs: str, result: str, arena: str) -> None:
    """See the module."""
    from tflite_micro.python.tflite_micro import runtime  # type: ignore[import-not-found]  # of the other environment

    interpreter = runtime.Interpreter.from_file(model, arena_size=int(arena))
    outputs, milliseconds = [], []
    for example in np.load(inputs, allow_pickle=False):
        interpreter.set_input(example[None], 0)
        start = time.perf_counter()
        interpreter.invoke()
        milliseconds.append(1000 * (time.perf_counter() - start))
        outputs.append(interpreter.get_output(0).copy())
    with tempfile.TemporaryFile() as spoken:  # it prints from C
        saved = os.dup(2)
        os.dup2(spoken.fileno(), 2)
        interpreter.print_allocations()
        os.dup2(saved, 2)
        spoken.seek(0)
        found = re.search(rb"allocation total (\d+) bytes", spoken.read())
    np.savez(result, outputs=np.concatenate(outputs), milliseconds=np.array(milliseconds), arena=int(found[1]) if found else -1)


if __name__ == "__main__":
    main(*sys.argv[1:])
