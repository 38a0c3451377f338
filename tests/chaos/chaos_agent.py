"""A real agent for tests: ``python chaos_agent.py STATE EXAMPLES AHEAD`` works with a clock that is AHEAD seconds ahead."""

import logging
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "clients" / "linux"))

from fedcore_device.agent import Agent
from fedcore_device.environment import Conditions
from fedcore_device.policy import PlanPolicy, Policy
from fedcore_device.state import State


class Elsewhen:
    """A device on a wire that nobody uses, and that has lost the time."""

    def __init__(self, examples, ahead):
        self.examples, self._ahead = examples, ahead

    def conditions(self, *, training):
        return Conditions(battery_percent=None, free_storage=1 << 40)

    def clock(self):
        return time.time() + self._ahead


def main():
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
    state = State(Path(sys.argv[1]))
    policy = Policy(PlanPolicy(secure_aggregation=False, noise_multiplier=0.0, minimum_devices=1, corrupt_devices=0))
    with state.locked():
        Agent(state, Elsewhen(sys.argv[2], float(sys.argv[3])), policy, look=0.2).run(threading.Event())


main()
