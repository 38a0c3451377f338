"""A device process for tests: client NUMBER of a scenario, with its examples and the data order of the simulation of the same seed.

``python device_process.py STATE NUMBER FOLDER`` trains on the files in FOLDER/client-NUMBER, with a native library if one is
installed in FOLDER/native-NUMBER.
"""

import signal
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "clients" / "linux"))

from fedcore_device.agent import Agent, load_enrolled
from fedcore_device.environment import Conditions
from fedcore_device.policy import PlanPolicy, Policy
from fedcore_device.state import State

SEED = 3


class Calm:
    """A device on a wire that nobody uses."""

    def __init__(self, folder, number):
        self.examples = str(folder / f"client-{number}")

    def conditions(self, *, training):
        return Conditions(battery_percent=None, free_storage=1 << 40)

    def clock(self):
        import time

        return time.time()


def draws_of(number):
    """The order of examples that simulated client ``number`` has; importing numpy is the test's own cost."""

    def draw(plan):
        import numpy as np
        from fedcore_device.checkpoint import state_of

        bits = np.random.Philox(np.random.SeedSequence([SEED, plan.server_round, number, 1]))  # as client_rng
        return {"state": state_of(np.random.Generator(bits)), "noise_key": bytes(16).hex()}

    return draw


def main():
    state, number, folder = State(Path(sys.argv[1])), int(sys.argv[2]), Path(sys.argv[3])
    masked = bool(load_enrolled(state).trust.committee)  # then nothing less is accepted
    policy = Policy(PlanPolicy(masked, noise_multiplier=0.0, minimum_devices=1, corrupt_devices=0, evaluation=True))
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    with state.locked():
        native = [folder / f"native-{number}"]
        Agent(state, Calm(folder, number), policy, draw=draws_of(number), look=0.2, native=native).run(stop)


main()
