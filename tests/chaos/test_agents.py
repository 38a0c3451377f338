"""Real agents, which train, with clocks a year off, behind a harmful network, and killed while they train."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from fedcore.chaos.check import check_run
from fedcore.chaos.faults import Faults
from fedcore.chaos.journal import ACKNOWLEDGED, read_journal
from fedcore.chaos.network import RunningProxy
from fedcore.config import load_config
from fedcore.coordinator.assembly import assemble
from fedcore.coordinator.fleet import FleetFolder, ServedGateway
from fedcore.coordinator.serve import Choice, DeviceRun

sys.path.insert(0, str(Path(__file__).parents[2] / "clients" / "linux"))

from fedcore_device.agent import enrol_device
from fedcore_device.state import State

YEAR = 365 * 86_400
SCENARIO = """
[run]
name = "agents"
rounds = 2
[data]
dataset = "digits"
clients = 3
[model]
name = "mlp"
params = { hidden = [8] }
[quantization]
enabled = false
[training]
epochs = 4
lr = 0.02
[cohort]
timeout = 120
[engine]
name = "loop"
"""


class Agents:
    """Agent processes; ends them and nothing else."""

    def __init__(self, folder):
        self.folder, self.processes = folder, {}

    def start(self, number, ahead):
        with (self.folder / f"agent-{number}.log").open("ab") as log:
            command = [sys.executable, Path(__file__).with_name("chaos_agent.py"), self.folder / f"state-{number}"]
            self.processes[number] = subprocess.Popen(
                [*command, self.folder / f"client-{number}", str(ahead)], stdout=log, stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1", "GRPC_VERBOSITY": "NONE"},
            )  # fmt: skip

    def kill_while_it_trains(self, number, ahead):
        """With signal 9, in the middle of a round; then it begins again, and its clock has not become any better."""
        work = self.folder / f"state-{number}" / "round.json"
        deadline = time.monotonic() + 200
        while not work.exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        self.processes[number].kill()
        self.processes[number].wait()
        self.start(number, ahead)

    def stop(self):
        for process in self.processes.values():
            process.kill()
            process.wait()

    def logs(self):
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("agent-*.log")))


@pytest.fixture
def agents(tmp_path):
    one = Agents(tmp_path)
    yield one
    one.stop()


@pytest.mark.slow
def test_agents_that_have_lost_the_time_take_part_and_what_they_were_told_holds(tmp_path, agents):
    (tmp_path / "scenario.toml").write_text(SCENARIO)
    config = load_config(tmp_path / "scenario.toml")
    data = assemble(config).data
    for number, rows in enumerate(data.clients):
        (tmp_path / f"client-{number}").mkdir()
        part = data.dataset.train.take(rows)
        np.savez(tmp_path / f"client-{number}" / "examples.npz", x=part.x, y=part.y)
    fleet = FleetFolder.open(tmp_path / "fleet", "agents")
    harm = Faults(delay=0.05, truncate=0.01, corrupt=0.01, seconds=0.2)
    with (
        ServedGateway(fleet, "", "127.0.0.1:0", hold=1.0, least=0.2) as gateway,
        RunningProxy("127.0.0.1:0", [gateway.address], harm, 5) as network,
    ):
        signer = fleet.signer()
        for number in range(3):
            state = State(tmp_path / f"state-{number}")
            enrol_device(state, gateway.address, signer.issue(600).encode())
            state.keep("gateway.json", state.kept("gateway.json").replace(gateway.address.encode(), network.proxy.address.encode()))
        signer.close()
        for number, ahead in enumerate((0, YEAR, -YEAR)):
            agents.start(number, ahead)
        killer = threading.Thread(target=agents.kill_while_it_trains, args=(1, YEAR))
        killer.start()
        with DeviceRun(config, tmp_path / "run", fleet, fleet.store, Choice(1.0, 200, 3), resume=False) as run:
            rounds = list(run.rounds())
        killer.join()
    deadline = time.monotonic() + 15
    while agents.logs().count("upload acknowledged: round") < 6 and time.monotonic() < deadline:  # which they note afterwards
        time.sleep(0.1)
    agents.stop()
    assert [one["replies"] for one in rounds] == [3, 3], agents.logs()
    assert network.proxy.happened["connections"] > 6
    logs = sorted(tmp_path.glob("agent-*.log"))
    acknowledged = [len([one for one in read_journal(log) if one.event == ACKNOWLEDGED]) for log in logs]
    assert acknowledged[0] == acknowledged[2] == 2, agents.logs()
    assert acknowledged[1] >= 1, "the one that was killed may have died between the answer and its note of it"
    verdicts = {one.name: one for one in check_run(tmp_path / "run", fleet.store, journals=logs, logs=logs)}
    broken = {name: one.text for name, one in verdicts.items() if one.holds is False}
    assert not broken
    assert verdicts["no acknowledged upload lost"].holds is True
    assert "first model plus the means" in verdicts["the model is valid"].text
