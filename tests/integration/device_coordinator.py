"""A coordinator over devices as a process, for tests: it dies by signal 9 at a moment that it is told.

``python device_coordinator.py SCENARIO FLEET RUN MOMENT [--resume]``
"""

import os
import signal
import sys
from pathlib import Path

from fedcore.config import load_config
from fedcore.coordinator.fleet import FleetFolder
from fedcore.coordinator.serve import Choice, DeviceRun
from fedcore.gateway.conduct import Conductor
from fedcore.grids.device import DeviceGrid
from fedcore.privacy.ledger import Ledger

MOMENTS = {"gathered": (DeviceGrid, "gather"), "charged": (Ledger, "charge"), "published": (Conductor, "_advance")}


def dies_after(kind, name):
    """A method that kills its process when it returns, in the second round."""
    right = getattr(kind, name)

    def method(self, *arguments, **named):
        found = right(self, *arguments, **named)
        if method.number == 2 and (name != "_advance" or arguments[1] == "running"):
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    method.number = 1
    setattr(kind, name, method)
    return method


def main():
    scenario, fleet, run, moment, *options = sys.argv[1:]
    method = dies_after(*MOMENTS[moment])
    folder = FleetFolder.existing(Path(fleet))
    config = load_config(Path(scenario), ["engine.name=loop"])
    with DeviceRun(config, Path(run), folder, folder.store, Choice(1.0, 30, 0), resume=bool(options)) as found:
        for entry in found.rounds():
            print(entry["round"], flush=True)
            method.number += 1


main()
