"""What privacy costs over devices: whoever is given a plan is charged before that, also where the coordinator is killed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fedcore.config import load_config
from fedcore.coordinator.fleet import FleetFolder
from fedcore.coordinator.serve import Choice, DeviceRun, check_scenario
from fedcore.errors import BudgetSpent, Refused, RoundFailed
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.fleet import Told
from fedcore.gateway.identity import spell
from fedcore.gateway.plan import to_table
from fedcore.gateway.rounds import PRESENT, REPORT, RoundDocument
from fedcore.gateway.sums import RunningSum, read_upload
from fedcore.privacy.accountant import epsilon
from fedcore.privacy.events import is_amplified
from fedcore.privacy.ledger import Ledger
from fedcore.quantization.wire import Update, encode_update
from fedcore.secagg.sums import sum_from_table
from fedcore.state.gateway import Contribution, Device, Note, RoundState
from fedcore.state.stores import open_gateway_store, open_ledger

COORDINATOR = Path(__file__).with_name("device_coordinator.py")
SCENARIO = """
[run]
name = "watches"
rounds = {rounds}
seed = 3
[data]
dataset = "digits"
clients = 6
[model]
name = "mlp"
params = {{ hidden = [8] }}
[training]
batch_size = 10
[cohort]
size = {size}
timeout = 60
attempts = {attempts}
[[privacy]]
unit = "{unit}"
noise_multiplier = 1.0
delta = 1e-5
{more}
"""
TOLD = Told(capabilities=("accumulate-1", "float32-update", "int8-update", "evaluate-1"))


class Fleet(threading.Thread):
    """Devices 1 to 6, which do to the store what gateways would do for them; ``lazy`` ones say that training failed, and ``seen``
    are the plans that devices were given."""

    def __init__(self, folder, awake=range(1, 7)):
        super().__init__(daemon=True)
        self.folder, self.awake, self.lazy, self.seen, self.problem = folder, set(awake), set(), [], None
        self.ended = threading.Event()

    def run(self):
        try:
            store, done = open_gateway_store(self.folder.store), set()
            for device in range(1, 7):
                store.register(Device(device, 1, bytes([device]) * 32, 2**40, time.time()))
            while not self.ended.is_set():
                for key in store.rounds():
                    one = store.round(key)
                    if one.state is RoundState.FORMING:
                        said = json.dumps({"told": TOLD.encode(), "round_key": ""})
                        store.note(key, PRESENT, [Note(device, said, time.time()) for device in self.awake])
                    elif one.state is RoundState.RUNNING and key not in done:
                        done.add(key)
                        self.work(store, one)
                time.sleep(0.02)
            store.close()
        except Exception as error:  # noqa: BLE001 - told by the test
            self.problem = error

    def work(self, store, one):
        document, total, counted = RoundDocument.decode(one.document), RunningSum(), []
        for device, place in document.cohort.items():
            plan = pb.Plan.FromString(pb.SignedPlan.FromString(document.plans[place.plan]).plan)
            self.seen.append((device, plan))
            if device in self.lazy:
                store.note(one.key, REPORT, [Note(device, json.dumps({"outcome": pb.FAILED, "text": "no"}), time.time())])
                continue
            data = upload_for(plan)
            total.add(read_upload(data, document.uploads))
            counted.append(Contribution(device, bytes([device]) * 32))
        if counted:
            store.accept(one.key, "w", total.encode(), counted)

    def given(self):
        """By round the devices that saw a plan, once for each attempt."""
        return sorted((plan.server_round, device) for device, plan in self.seen)


def upload_for(plan):
    release = sum_from_table(to_table(plan))
    if release is None:
        return encode_update(Update(np.zeros(plan.values, np.float32), 5, 0.0), plan.upload_encoding, np.random.default_rng(0))
    return release.nothing(os.urandom).astype("<f4").tobytes()


@pytest.fixture
def fleet(tmp_path):
    folder = FleetFolder.open(tmp_path / "fleet", "watches")
    one = Fleet(folder)
    one.start()
    yield one
    one.ended.set()
    one.join(30)
    assert one.problem is None


def scenario(tmp_path, **values):
    values = {"rounds": 3, "size": 3, "attempts": 1, "unit": "client", "more": ""} | values
    (tmp_path / "scenario.toml").write_text(SCENARIO.format(**values))
    return load_config(tmp_path / "scenario.toml", ["engine.name=loop"])


def run(config, fleet, directory, *, window=20.0, resume=False):
    return DeviceRun(config, directory, fleet.folder, fleet.folder.store, Choice(1.0, window, 0), resume=resume)


def charges(directory, unit="client"):
    ledger = Ledger(open_ledger(directory, write=False))
    found = [charge for charge in ledger.charges() if charge.unit == unit]
    ledger.close()
    return found


def charged(directory, unit="client"):
    return sorted((charge.round, int(name, 16)) for charge in charges(directory, unit) for name in charge.clients)


@pytest.mark.parametrize("unit", ["client", "example"])
def test_exactly_the_devices_that_were_given_a_plan_are_charged(tmp_path, fleet, unit):
    config = scenario(tmp_path, unit=unit)
    with run(config, fleet, tmp_path / "run") as found:
        rounds = list(found.rounds())
        result = found.finish()
    assert charged(tmp_path / "run", unit) == fleet.given()
    assert Counter(number for number, _ in fleet.given()) == {1: 3, 2: 3, 3: 3}
    (event,) = {charge.event for charge in charges(tmp_path / "run", unit)}
    assert not is_amplified(event)
    most = max(Counter(device for _, device in fleet.given()).values())
    told = rounds[-1]["privacy"][unit]
    assert told["epsilon"] == told["epsilon_coordinator"] == pytest.approx(epsilon({event: most}, 1e-5))
    assert result["privacy"][unit]["participations"] == most
    words = result["privacy"][unit]["statement"]
    assert "no amplification by sampling" in words["charged"]
    assert "Who is charged" in (tmp_path / "run" / "report.html").read_text()
    assert Ledger(open_ledger(tmp_path / "run", write=False)).population.startswith("devices of watches ")


def test_cap_and_separation_hold_at_the_selection_and_the_run_ends_politely(tmp_path, fleet):
    config = scenario(tmp_path, rounds=8, more="max_participations = 2\nmin_separation = 2")
    with run(config, fleet, tmp_path / "run", window=20.0) as found:
        done = []
        for entry in found.rounds():
            done.append(entry["round"])
            if entry["round"] == 2:
                break
    first, second = ({device for number, device in fleet.given() if number == n} for n in (1, 2))
    assert first | second == set(range(1, 7)), "who took part in the first round rests in the second"
    with run(config, fleet, tmp_path / "run", window=4.0, resume=True) as found:
        done += [entry["round"] for entry in found.rounds()]
        assert done == [1, 2, 3, 4]
        assert "may not take part" in found.coordinator.ended
        result = found.finish()
    assert result["ended"]
    assert Counter(device for _, device in charged(tmp_path / "run")) == dict.fromkeys(range(1, 7), 2)
    third = {device for number, device in fleet.given() if number == 3}
    assert third == first


def test_too_few_devices_are_no_matter_of_the_budget_and_cost_nothing(tmp_path, fleet):
    fleet.awake.clear()
    fleet.awake.add(2)
    with run(scenario(tmp_path, attempts=2), fleet, tmp_path / "run", window=1.0) as found, pytest.raises(RoundFailed) as failed:
        list(found.rounds())
    assert "1 devices checked in within 1 s; the round needs 3" in str(failed.value)
    assert not charges(tmp_path / "run")
    assert not fleet.seen


def test_an_attempt_that_failed_is_paid_for_and_so_is_the_next(tmp_path, fleet):
    fleet.lazy |= set(range(1, 7))

    def wake():
        while len(fleet.seen) < 3:
            time.sleep(0.02)
        fleet.lazy.clear()

    threading.Thread(target=wake, daemon=True).start()
    config = scenario(tmp_path, rounds=1, attempts=50, more="max_participations = 9")
    with run(config, fleet, tmp_path / "run") as found:
        (entry,) = found.rounds()
    assert entry["failed_attempts"]
    assert charged(tmp_path / "run") == fleet.given()
    assert [charge.attempt for charge in charges(tmp_path / "run")] == list(range(1 + len(entry["failed_attempts"])))


def test_a_budget_that_is_spent_ends_the_run_before_anybody_sees_a_plan(tmp_path, fleet):
    config = scenario(tmp_path, rounds=9, size=6, more="budget = 9.0")
    with run(config, fleet, tmp_path / "run") as found:
        rounds = list(found.rounds())
        assert "would overspend the privacy budget of unit client" in found.coordinator.ended
    assert 0 < len(rounds) < 9
    assert charged(tmp_path / "run") == fleet.given()
    assert {number for number, _ in fleet.given()} == set(range(1, 1 + len(rounds)))
    small = scenario(tmp_path, size=6, more="budget = 0.1")
    with run(small, fleet, tmp_path / "other") as found, pytest.raises(BudgetSpent):
        list(found.rounds())
    assert not charges(tmp_path / "other")


def test_runs_on_one_ledger_know_a_device_by_its_id(tmp_path, fleet):
    more = 'max_participations = 1\nledger = "shared.sqlite"'
    config = scenario(tmp_path, rounds=1, more=more)
    for name in ("a", "b"):
        with run(config, fleet, tmp_path / name) as found:
            list(found.rounds())
    taken = [device for _, device in fleet.given()]
    assert sorted(taken) == list(range(1, 7)), "one participation of a device, in whatever run"
    with run(config, fleet, tmp_path / "c", window=1.0) as found, pytest.raises(BudgetSpent, match="6 others may not take part"):
        list(found.rounds())
    names = {name for charge in Ledger(open_ledger(tmp_path / "shared.sqlite")).charges() for name in charge.clients}
    assert names == {spell(device) for device in range(1, 7)}


def test_what_would_claim_too_much_is_refused(tmp_path, fleet):
    with pytest.raises(Refused, match="nothing is amplified"):
        check_scenario(scenario(tmp_path, more='sampling = "poisson"'))
    config = scenario(tmp_path, more='sampling = "poisson"')
    with pytest.raises(Refused, match="poisson"):
        run(config, fleet, tmp_path / "run")
    assert not fleet.seen


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["gathered", "charged", "published"])
def test_a_coordinator_that_is_killed_undercharges_nobody_and_devices_keep_their_numbers(tmp_path, fleet, moment):
    config = scenario(tmp_path, rounds=2, more="max_participations = 4")
    command = [sys.executable, COORDINATOR, tmp_path / "scenario.toml", fleet.folder.directory, tmp_path / "run", moment]
    killed = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (killed.returncode, killed.stdout) == (-signal.SIGKILL, "1\n"), killed.stderr
    before = charges(tmp_path / "run")
    assert Counter(charge.round for charge in before) == {1: 1, **({} if moment == "gathered" else {2: 1})}
    with run(config, fleet, tmp_path / "run", resume=True) as found:
        numbers = {device: found.grid.client_of(device) for device in {device for device, _ in fleet.seen}}
        assert [entry["round"] for entry in found.rounds()] == [2]
        assert {device: found.grid.client_of(device) for device in numbers} == numbers
    with run(scenario(tmp_path, rounds=2, more="max_participations = 4"), fleet, tmp_path / "run", resume=True) as found:
        assert {device: found.grid.client_of(device) for device in numbers} == numbers
    after = charges(tmp_path / "run")
    assert after[: len(before)] == before
    assert [charge.attempt for charge in after if charge.round == 2] == list(range(1 if moment == "gathered" else 2))
    paid = Counter(charged(tmp_path / "run"))
    assert not Counter(fleet.given()) - paid, "who saw a plan, has been charged for it"
