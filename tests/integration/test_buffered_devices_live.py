"""Asynchronous rounds over device processes with TLS: one is slow, one is killed, and so are gateway and coordinator."""

import json
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from test_devices import Devices, Served, fedcore, scenario

from fedcore.config import load_config
from fedcore.coordinator.assembly import assemble
from fedcore.coordinator.fleet import FleetFolder, ServedGateway
from fedcore.coordinator.serve import Choice, DeviceRun, check_scenario
from fedcore.errors import Refused
from fedcore.state.gateway import RoundState
from fedcore.state.stores import open_gateway_store

ASYNCHRONOUS = ["engine.name=loop", "asynchronous.buffer=2", "asynchronous.concurrency=4", "asynchronous.max_staleness=2"]


@pytest.fixture
def devices(tmp_path):
    one = Devices(tmp_path)
    yield one
    for process in one.processes.values():
        process.send_signal(signal.SIGCONT)
    one.stop()


def prepared(tmp_path, devices, **values):
    scenario(tmp_path, clients=4, epochs=4, **values)
    config = load_config(tmp_path / "scenario.toml", ASYNCHRONOUS)
    devices.hold(assemble(config).data)
    return config


def accounted(folder, replies, pending):
    """Every upload that was acknowledged is in one step, or waits for the next; the devices that sent them."""
    store = open_gateway_store(str(folder / "store.sqlite"))
    try:
        rounds = [store.round(key) for key in store.rounds()]
        versions = {one.number - 1: one for one in rounds if not one.task.endswith("/waiting")}
        sent = {version: {found.device for found in store.contributions(one.key)} for version, one in versions.items()}
        taken = {int(version): set(found) for version, found in pending.facts["taken"].items()}
        waiting = sum(len(sent[version] - found) for version, found in taken.items())
        closed = {version for version, one in versions.items() if one.state is RoundState.CLOSED}
        assert not closed & set(taken)
        assert sum(map(len, sent.values())) == replies + waiting
        times = {one.id: sum(times for times, _ in one.participations.values()) for one in store.devices()}
        assert times == {device: sum(device in found for found in sent.values()) for device in times}
        return times
    finally:
        store.close()


def stop_while_it_trains(devices, number, going_on):
    """A device that stands still in the middle of its work, until ``going_on`` is set."""
    while not (devices.folder / f"state-{number}" / "round" / "progress.bin").exists():
        time.sleep(0.002)
    devices.processes[number].send_signal(signal.SIGSTOP)
    going_on.wait(120)
    devices.processes[number].send_signal(signal.SIGCONT)


@pytest.mark.slow
def test_no_upload_is_lost_or_counted_twice_while_devices_gateway_and_coordinator_come_and_go(tmp_path, devices):
    config, fleet = prepared(tmp_path, devices, rounds=9), FleetFolder.open(tmp_path / "fleet", "watches")
    replies, metrics, going_on = 0, [], threading.Event()
    with ServedGateway(fleet, "", "127.0.0.1:0", hold=1.0, least=0.2) as gateway:
        signer = fleet.signer()
        for number in range(4):
            devices.enrol(number, gateway.address, signer.issue(600).encode())
            devices.start(number)
        signer.close()
        watchers = [
            threading.Thread(target=devices.kill_while_it_trains, args=(1,)),
            threading.Thread(target=stop_while_it_trains, args=(devices, 3, going_on)),
        ]
        for one in watchers:
            one.start()
        for resume in (False, True):
            with DeviceRun(config, tmp_path / "run", fleet, fleet.store, Choice(window=60), resume=resume) as run:
                for entry in run.rounds():
                    metrics.append(entry)
                    if len(metrics) == 2:
                        gateway._process.kill()  # it is started again
                    if len(metrics) == 4:
                        going_on.set()
                        break  # the rounds that are left are another coordinator's
                progress = run.coordinator.progress
        going_on.set()
        for one in watchers:
            one.join(120)
        replies = sum(entry["replies"] for entry in metrics)
        times = accounted(tmp_path / "fleet", replies, progress.pending)
    assert [entry["round"] for entry in metrics] == list(range(1, 10)), devices.logs()
    assert devices.killed[1] == "accepted"
    assert all(entry["replies"] >= 2 for entry in metrics)
    assert max(entry["staleness_max"] for entry in metrics) <= 2
    assert sum(times.values()) >= 18
    assert sum(count > 0 for count in times.values()) >= 3
    assert np.isfinite(progress.master).all()
    assert metrics[-1]["accuracy"] > metrics[0]["accuracy"]


@pytest.mark.slow
def test_serve_is_killed_and_resumed_and_shows_how_old_updates_are(tmp_path, devices):
    config = prepared(tmp_path, devices, rounds=8)
    (tmp_path / "scenario.toml").write_text(
        (tmp_path / "scenario.toml").read_text() + "[asynchronous]\nbuffer = 2\nconcurrency = 4\nmax_staleness = 2\n"
    )
    assert config.asynchronous.buffer == 2
    served = Served(tmp_path, "--listen", "127.0.0.1:0")
    try:
        address = served.until("serving")["address"]
        tokens = fedcore("device", "token", "--fleet", tmp_path / "fleet", "--count", 4).stdout.split()
        for number, token in enumerate(tokens):
            devices.enrol(number, address, token)
            devices.start(number)
        found = [served.until("round") for _ in range(3)]
        served.end(signal.SIGKILL)
        served = Served(tmp_path, "--listen", address, "--resume")
        assert served.until("round")["round"] == found[-1]["round"] + 1
        result = served.until("result")
        assert (result["rounds"], served.process.wait(60)) == (8, 0)
    finally:
        if served.process.poll() is None:
            served.end(signal.SIGTERM)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [one["round"] for one in lines] == list(range(1, 9))
    assert all("staleness_mean" in one and "virtual_seconds" not in one for one in lines)


def test_what_asynchronous_rounds_over_devices_do_not_have_is_refused(tmp_path):
    scenario(tmp_path, clients=4)
    private = ["privacy.unit=example", "privacy.noise_multiplier=1.0", "privacy.delta=1e-5"]
    for extra in (private, ["data.holdout=0.2", "evaluation.federated_every=1"]):
        with pytest.raises(Refused, match=r"\[asynchronous\] over devices has neither \[privacy\]"):
            check_scenario(load_config(tmp_path / "scenario.toml", [*ASYNCHRONOUS, *extra]))
    check_scenario(load_config(tmp_path / "scenario.toml", ASYNCHRONOUS))
