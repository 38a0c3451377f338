"""A federation of device processes on loopback with TLS: what `fedcore serve` runs, and what it must equal."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from fedcore_commands import COMMAND, fedcore
from typer.testing import CliRunner

from fedcore.cli import app
from fedcore.cli_gateway import _show_result
from fedcore.config import load_config
from fedcore.coordinator.assembly import assemble, build_clients
from fedcore.coordinator.fleet import FleetFolder, ServedGateway, offering
from fedcore.coordinator.run import SimulatedRun
from fedcore.coordinator.serve import Choice, DeviceRun, check_scenario, pin_committee
from fedcore.errors import Refused, TryAgain
from fedcore.gateway.fleet import Told
from fedcore.gateway.identity import EnrolmentToken, enrolment_request, spell
from fedcore.portable.signature import check_step_signature
from fedcore.quantization.layers import set_activation_ranges
from fedcore.secagg.crypto import Ed25519Key
from fedcore.secagg.keys import read_message
from fedcore.secagg.messages import TrustBundle
from fedcore.state.gateway import Admission, Device
from fedcore.state.sqlite import RunStore
from fedcore.state.stores import open_gateway_store
from fedcore.training.client import RoundTask
from fedcore.training.evaluation import load_flat
from fedcore.training.plan import LocalPlan

sys.path.insert(0, str(Path(__file__).parents[2] / "clients" / "linux"))

from fedcore_device.agent import enrol_device
from fedcore_device.state import State

PROCESS = Path(__file__).with_name("device_process.py")
SCENARIO = """
[run]
name = "watches"
rounds = {rounds}
seed = 3
[data]
dataset = "digits"
clients = {clients}
partition = "dirichlet"
alpha = 1.0
[model]
name = "{model}"
[quantization]
enabled = {quantized}
calibrate_round = {calibrate}
[training]
epochs = {epochs}
batch_size = 10
lr = {lr}
momentum = {momentum}
[strategy]
name = "fedavg"
[cohort]
timeout = 120
"""


class Devices:
    """Device processes, with their examples and states in ``folder``; ends them and nothing else."""

    def __init__(self, folder):
        self.folder, self.processes, self.killed = folder, {}, {}

    def hold(self, data):
        for number, rows in enumerate(data.clients):
            directory = self.folder / f"client-{number}"
            (directory / "holdout").mkdir(parents=True)
            for folder, indices in ((directory, rows), (directory / "holdout", data.holdout[number])):
                part = data.dataset.train.take(indices)
                if len(indices):
                    np.savez(folder / "examples.npz", x=part.x, y=part.y)

    def enrol(self, number, address, token):
        return enrol_device(State(self.folder / f"state-{number}"), address, token)

    def start(self, number):
        with (self.folder / f"device-{number}.log").open("ab") as log:
            self.processes[number] = subprocess.Popen(
                [sys.executable, PROCESS, self.folder / f"state-{number}", str(number), self.folder], stdout=log, stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def kill_while_it_trains(self, number):
        """With signal 9, once its child has written a checkpoint; then it begins again."""
        state = self.folder / f"state-{number}"
        while not (state / "round" / "progress.bin").exists():
            time.sleep(0.002)
        process = self.processes.pop(number)
        process.kill()
        process.wait()
        self.killed[number] = json.loads((state / "round.json").read_text())["phase"]
        self.start(number)

    def logs(self):
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("device-*.log")))

    def stop(self):
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
            if process.poll() is None:
                process.kill()
                process.wait()


@pytest.fixture
def devices(tmp_path):
    one = Devices(tmp_path)
    yield one
    one.stop()


def scenario(folder, **values):
    file = folder / "scenario.toml"
    values = {
        "rounds": 2,
        "clients": 3,
        "model": "mlp",
        "quantized": "false",
        "epochs": 1,
        "lr": 0.02,
        "momentum": 0.5,
        "calibrate": 1,
    } | values
    file.write_text(SCENARIO.format(**values))
    return load_config(file, ["engine.name=loop"])


def final_of(directory):
    store = RunStore(directory)
    try:
        return store.latest().arrays["master"]
    finally:
        store.close()


def simulated(config, folder):
    with SimulatedRun(config, folder / "simulated", resume=False) as run:
        (folder / "simulated.json").write_text(json.dumps(list(run.rounds())))
        return run.coordinator.progress, run.assembly


def federated(config, devices, folder, *, killed=()):
    """The run over devices: its progress, and the rounds' metrics. Devices that are ``killed`` are started again."""
    fleet = FleetFolder.open(folder / "fleet", "watches")
    clients = config.data.clients
    with ServedGateway(fleet, "", "127.0.0.1:0", hold=1.0, least=0.2) as gateway:
        signer = fleet.signer()
        for number in range(clients):
            devices.enrol(number, gateway.address, signer.issue(600).encode())
            devices.start(number)
        signer.close()
        killers = [threading.Thread(target=devices.kill_while_it_trains, args=(number,)) for number in killed]
        for one in killers:
            one.start()
        with DeviceRun(config, folder / "run", fleet, fleet.store, Choice(1.0, 60, clients), resume=False) as run:
            rounds = list(run.rounds())
            for one in killers:
                one.join()
            return run.coordinator.progress, rounds, run


def prepared(tmp_path, devices, **values):
    config = scenario(tmp_path, **values)
    expected, assembly = simulated(config, tmp_path)
    devices.hold(assembly.data)
    return config, expected, assembly


def test_device_processes_give_the_model_of_the_simulation_though_one_is_killed_while_it_trains(tmp_path, devices):
    config, expected, _ = prepared(tmp_path, devices, epochs=6)
    found, rounds, _ = federated(config, devices, tmp_path, killed=(1,))
    assert devices.killed == {1: "accepted"}, "it was killed between two checkpoints"
    assert [one["replies"] for one in rounds] == [3, 3], devices.logs()
    assert not any("failed_attempts" in one for one in rounds)
    assert min(one["update_norm"] for one in rounds) > 0.3
    np.testing.assert_allclose(found.master, expected.master, rtol=0, atol=1e-5)
    store = open_gateway_store(str(tmp_path / "fleet" / "store.sqlite"))
    taken = [times for one in store.devices() for times, _ in one.participations.values()]
    store.close()
    assert taken == [2, 2, 2], "each upload counts once"


@pytest.mark.slow
def test_eight_devices_and_five_rounds_are_the_simulation(tmp_path, devices):
    config, expected, _ = prepared(tmp_path, devices, clients=8, rounds=5, model="cnn", epochs=1)
    found, rounds, _ = federated(config, devices, tmp_path, killed=(2, 5))
    assert [one["replies"] for one in rounds] == [8] * 5, devices.logs()
    np.testing.assert_allclose(found.master, expected.master, rtol=0, atol=1e-5)


HOLDING = """
[evaluation]
federated_every = 1
"""


def holding_out(tmp_path, devices, loss="cross_entropy", **values):
    """A scenario whose devices evaluate, its simulation's metrics, and its data."""
    scenario(tmp_path, **values)
    file = tmp_path / "scenario.toml"
    text = file.read_text().replace('partition = "dirichlet"', 'partition = "dirichlet"\nholdout = 0.25')
    file.write_text(text + HOLDING)
    config = load_config(file, ["engine.name=loop", f"training.loss={loss}"])
    _, assembly = simulated(config, tmp_path)
    devices.hold(assembly.data)
    return config, json.loads((tmp_path / "simulated.json").read_text()), assembly


def check_scores(found, expected, loss=1e-5):
    assert (found["clients"], found["accuracy"]) == (expected["clients"], expected["accuracy"])
    assert found["loss"] == pytest.approx(expected["loss"], abs=loss)
    assert found["percentiles"] == pytest.approx(expected["percentiles"])


@pytest.mark.parametrize("loss", ["cross_entropy", pytest.param("squared", marks=pytest.mark.slow)])
def test_devices_train_and_evaluate_as_simulated_clients_do(tmp_path, devices, loss):
    config, expected, assembly = holding_out(tmp_path, devices, loss)
    _, rounds, run = federated(config, devices, tmp_path)
    assert not any("federated_failed" in one or "failed_attempts" in one for one in rounds), devices.logs()
    for found, simulation in zip(rounds, expected, strict=True):
        check_scores(found["federated"], simulation["federated"])
        assert found["train_loss"] == pytest.approx(simulation["train_loss"], abs=1e-5)
        assert found["bytes_up"] == simulation["bytes_up"]
    assert rounds[-1]["federated"]["loss"] != rounds[0]["federated"]["loss"]
    scores = run.coordinator.progress.scores
    assert sorted(scores["examples"]) == sorted(len(one) for one in assembly.data.holdout)
    store = open_gateway_store(str(tmp_path / "fleet" / "store.sqlite"))
    taken = [sorted(times for times, _ in one.participations.values()) for one in store.devices()]
    store.close()
    assert taken == [[2, 2]] * 3, "evaluations are a task of their own"


@pytest.mark.slow
def test_with_fake_quant_eight_devices_predict_what_the_simulation_predicts(tmp_path, devices):
    config, expected, assembly = prepared(
        tmp_path, devices, clients=8, rounds=5, model="cnn", quantized="true", epochs=3, calibrate=2
    )
    found, rounds, run = federated(config, devices, tmp_path)
    assert [one["replies"] for one in rounds] == [8] * 5, devices.logs()
    x = torch.from_numpy(assembly.data.dataset.test.x)
    answers = []
    for progress in (expected, found):
        model = assembly.model.eval()
        set_activation_ranges(model, progress.ranges)
        load_flat(model, torch.from_numpy(run.coordinator.received(progress)[1]))
        with torch.no_grad():
            answers.append(model(x).argmax(1))
    assert (answers[0] == answers[1]).float().mean() >= 0.99


class Served:
    """`fedcore serve` as a process; what it says, line by line."""

    def __init__(self, folder, *options):
        options = (*options, "--json", "--over-selection", "1", "--window", "60")
        self.log = folder / "serve.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*COMMAND, "serve", folder / "scenario.toml", "--fleet", folder / "fleet", "--out", folder / "run", *options],
                stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip

    def until(self, event):
        for line in self.process.stdout:
            found = json.loads(line)
            if found["event"] == event:
                return found
        raise AssertionError(self.log.read_text())

    def end(self, number):
        self.process.send_signal(number)
        code = self.process.wait(30)
        self.process.stdout.close()
        return code


def listed_devices(folder):
    return [json.loads(line) for line in fedcore("device", "list", "--fleet", folder / "fleet", "--json").stdout.splitlines()]


def fedcore_device(folder, *arguments):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "clients" / "linux")}
    return [sys.executable, "-m", "fedcore_device", "--state", str(folder), *map(str, arguments)], environment


@pytest.mark.slow
def test_the_commands_from_token_to_forget_with_a_coordinator_and_a_gateway_that_are_killed(tmp_path, devices):
    prepared(tmp_path, devices, clients=2, rounds=4)
    served = Served(tmp_path, "--listen", "127.0.0.1:0")
    address = served.until("serving")["address"]
    tokens = fedcore("device", "token", "--fleet", tmp_path / "fleet", "--count", 2).stdout.split()
    try:
        for number, token in enumerate(tokens):
            state = tmp_path / f"state-{number}"
            command, environment = fedcore_device(state, "enroll", "--server", address)
            done = subprocess.run(command, env=environment, input=token, capture_output=True, text=True, check=False)
            assert "enrolled in 'watches'" in done.stdout, done.stderr
            (state / "policy.toml").write_text(
                "[plan]\nsecure_aggregation = false\nnoise_multiplier = 0\nminimum_devices = 1\ncorrupt_devices = 0\n"
            )
            good = {"charging": True, "unmetered": True, "idle": True, "temperature": 20.0, "free_storage": 1 << 40}
            (tmp_path / "good.json").write_text(json.dumps(good))
            command, environment = fedcore_device(
                state, "run", "--examples", tmp_path / f"client-{number}", "--conditions", tmp_path / "good.json", "--look", 0.5
            )  # fmt: skip
            with (tmp_path / f"device-{number}.log").open("ab") as log:
                devices.processes[number] = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        assert served.until("round")["round"] == 1
        served.end(signal.SIGKILL)
        served = Served(tmp_path, "--listen", address, "--resume")
        assert served.until("serving")["address"] == address, "its gateway has died with it and left the port"
        assert served.until("round")["round"] >= 2
        for process in psutil.Process(served.process.pid).children(recursive=True):
            if "fedcore.gateway.process" in process.cmdline():
                process.kill()
        result = served.until("result")
        assert (result["rounds"], served.process.wait(30)) == (4, 0)
        listed = [
            json.loads(line) for line in fedcore("device", "list", "--fleet", tmp_path / "fleet", "--json").stdout.splitlines()
        ]
        assert [one["standing"] for one in listed] == ["active", "active"]
        assert all(one["rounds"] >= 4 for one in listed)
        assert fedcore("device", "revoke", listed[0]["device"], "--fleet", tmp_path / "fleet").returncode == 0
        assert sorted(one["standing"] for one in listed_devices(tmp_path)) == ["active", "revoked"]
    finally:
        devices.stop()
        if served.process.poll() is None:
            served.end(signal.SIGTERM)
    command, environment = fedcore_device(tmp_path / "state-0", "status", "--json")
    found = json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert next(iter(found["participations"].values())) >= 4
    command, environment = fedcore_device(tmp_path / "state-0", "forget")
    gone = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert gone.returncode == 1
    assert "the gateway was not told" in gone.stderr
    assert {path.name for path in (tmp_path / "state-0").iterdir()} == {"lock", "policy.toml"}


def test_steps_are_signed_here_or_elsewhere_and_there_is_one_for_the_time_before_calibration(tmp_path):
    config = scenario(tmp_path, quantized="true", calibrate=2)
    assembly, folder = assemble(config), FleetFolder.open(tmp_path / "fleet", "watches")
    assert stat.S_IMODE((tmp_path / "fleet").stat().st_mode) == 0o700
    found = offering(assembly, folder)
    assert set(found.blobs) == {"step", "step-signature", "early-step", "early-step-signature"}
    trusted = folder.fleet.trust().publisher_keys
    for name in ("step", "early-step"):
        check_step_signature(found.blobs[name], found.blobs[f"{name}-signature"], trusted)
    assert found.blobs["step"] != found.blobs["early-step"]
    with pytest.raises(Refused, match="no publisher"):
        check_step_signature(found.blobs["step"], found.blobs["early-step-signature"], trusted)

    (tmp_path / "away").mkdir()
    key = (tmp_path / "fleet" / "publisher" / "publisher.key").rename(tmp_path / "away" / "publisher.key")
    assert offering(assembly, folder).blobs == found.blobs, "what was signed stays signed"
    other = assemble(scenario(tmp_path, model="cnn"))
    with pytest.raises(Refused, match="is not signed") as refusal:
        offering(other, folder)
    (step,) = [path for path in (tmp_path / "fleet" / "steps").glob("*.onnx") if not path.with_suffix(".sig").exists()]
    assert str(step) in str(refusal.value)
    assert fedcore("device", "sign-step", step, "--key", key).returncode == 0
    assert offering(other, folder).blobs["step"] == step.read_bytes()
    step.with_suffix(".sig").write_bytes(bytes(64))
    with pytest.raises(Refused, match="no publisher"):
        offering(other, folder)


def test_evaluation_graphs_are_signed_like_steps(tmp_path):
    settings = ["engine.name=loop", "data.holdout=0.2", "evaluation.federated_every=1"]
    scenario(tmp_path, quantized="true", calibrate=2)
    assembly, folder = assemble(load_config(tmp_path / "scenario.toml", settings)), FleetFolder.open(tmp_path / "fleet", "watches")
    publisher, away = tmp_path / "fleet" / "publisher" / "publisher.key", tmp_path / "publisher.key"
    publisher.rename(away)
    signed = set()
    for _ in range(4):
        with pytest.raises(Refused, match="is not signed"):
            offering(assembly, folder)
        (graph,) = [path for path in (tmp_path / "fleet" / "steps").glob("*.onnx") if not path.with_suffix(".sig").exists()]
        assert fedcore("device", "sign-step", graph, "--key", away).returncode == 0
        signed.add(graph.read_bytes())
    names = [
        f"{early}{graph}{signature}"
        for early in ("", "early-")
        for graph in ("step", "evaluation")
        for signature in ("", "-signature")
    ]
    found = offering(assembly, folder).blobs
    assert set(found) == set(names)
    assert {found[name] for name in names if not name.endswith("-signature")} == signed
    assert found["evaluation"] != found["early-evaluation"]
    check_step_signature(found["evaluation"], found["evaluation-signature"], folder.fleet.trust().publisher_keys)


def test_a_committee_is_pinned_before_devices_are(tmp_path):
    folder = FleetFolder.open(tmp_path / "fleet", "watches")
    fleet = folder.fleet.trust()
    bundle = TrustBundle("watches", fleet.enrolment_key, 1, 0, (bytes(32),), bytes(64))
    for wrong in ({"population": "phones"}, {"enrolment_key": bytes(32)}):
        with pytest.raises(Refused, match="--enrol-ca"):
            folder.pin_committee(dataclasses.replace(bundle, **wrong))
    for _ in range(2):
        folder.pin_committee(bundle)
    assert TrustBundle.decode(folder.fleet.trust().committee) == bundle
    assert dataclasses.replace(folder.fleet.trust(), committee=b"") == fleet


def test_a_serve_that_does_not_begin_moves_no_store_and_a_fleet_has_one_at_a_time(tmp_path):
    """Commands look for devices in the store that gateway.json names: revoking one in another store would revoke nothing."""
    folder, other = FleetFolder.open(tmp_path / "fleet", "watches"), str(tmp_path / "other.sqlite")
    with ServedGateway(folder, "", "127.0.0.1:0") as gateway:
        for listen, said in (("127.0.0.1:0", "one at a time"), (gateway.address, "one at a time")):
            with pytest.raises(TryAgain, match=said), ServedGateway(folder, other, listen):
                pass
        assert folder.store == str(tmp_path / "fleet" / "store.sqlite")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(TryAgain, match="cannot be listened at"), ServedGateway(folder, other, listen):
            pass
    assert folder.store == str(tmp_path / "fleet" / "store.sqlite")


def test_what_a_device_says_of_itself_commands_no_terminal(tmp_path):
    folder = FleetFolder.open(tmp_path / "fleet", "watches")
    store = open_gateway_store(folder.store)
    store.register(Device(1, 1, bytes(32), 2**33, 1.0))
    store.admit([Admission(1, 1, bytes(16), Told(agent_version="\x1b]0;1.0\x07", tier="[bold]pi").encode())], 2.0)
    store.close()
    said = CliRunner().invoke(app, ["device", "list", "--fleet", str(folder.directory)]).output
    assert "?]0;1.0?" in said
    assert "[bold]pi" in said
    assert "\x1b" not in said


def test_labels_are_given_with_the_token_or_later_by_the_operator(tmp_path):
    folder = FleetFolder.open(tmp_path / "fleet", "watches")
    where = ["--fleet", str(folder.directory)]
    token = CliRunner().invoke(app, ["device", "token", *where, "--label", "lab", "--label", "beta"]).output.strip()
    signer, store = folder.signer(), open_gateway_store(folder.store)
    key = Ed25519Key(bytes(32))
    one = signer.enrol(enrolment_request(EnrolmentToken.decode(token), key, bytes(16)))
    assert signer.labels(one.device) == ("beta", "lab")
    store.register(Device(one.device, 1, key.public, 2**33, 1.0, labels=signer.labels(one.device)))
    done = CliRunner().invoke(app, ["device", "label", spell(one.device), "gold", *where])
    assert done.output == f"{spell(one.device)}: gold\n"
    assert signer.labels(one.device) == store.device(one.device).labels == ("gold",)
    row = json.loads(CliRunner().invoke(app, ["device", "list", "--json", *where]).output)
    assert row["labels"] == ["gold"]
    assert CliRunner().invoke(app, ["device", "label", spell(one.device), *where]).output == f"{spell(one.device)}: no label\n"
    for words in (["label", "7" * 16, "x"], ["label", "seven", "x"], ["token", "--label", "x" * 65]):
        assert CliRunner().invoke(app, ["device", *words, *where]).exit_code == 2
    signer.close()
    store.close()


def test_a_token_lasts_a_number_of_hours(tmp_path):
    FleetFolder.open(tmp_path / "fleet", "watches")
    for hours in ("nan", "inf"):
        done = CliRunner().invoke(app, ["device", "token", "--fleet", str(tmp_path / "fleet"), "--hours", hours])
        assert done.exit_code == 2, done.output
        assert "takes a number of hours" in done.output


def test_a_run_that_ended_early_says_why(capsys):
    _show_result({"accuracy": 0.5, "model_bytes": {}, "ended": "round 3: the budget is spent"}, Path("run"), as_json=False)
    assert "ended early: round 3: the budget is spent\n" in capsys.readouterr().out


def test_serve_refuses_what_devices_cannot_do(tmp_path):
    (tmp_path / "scenario.toml").write_text('[run]\nname = "x"\n[data]\ndataset = "digits"\nclients = 3\n[cohort]\ndropout = 0.2\n')
    done = CliRunner().invoke(app, ["serve", str(tmp_path / "scenario.toml"), "--fleet", str(tmp_path / "fleet")])
    assert done.exit_code == 2
    assert "real ones vanish by themselves" in done.output
    assert not (tmp_path / "fleet").exists()
    scenario(tmp_path)
    private = ["privacy.unit=example", "privacy.noise_multiplier=1.0", "privacy.delta=1e-5"]
    with pytest.raises(Refused, match="nothing is amplified"):
        check_scenario(load_config(tmp_path / "scenario.toml", [*private, "privacy.unit=client", "privacy.sampling=poisson"]))
    with pytest.raises(Refused, match="gathered for one sum"):
        check_scenario(
            load_config(tmp_path / "scenario.toml", ["secagg.enabled=true", "secagg.shards=2", "strategy.name=fedmedian"])
        )
    check_scenario(load_config(tmp_path / "scenario.toml", [*private, "cohort.size=2"]))
    missing = CliRunner().invoke(app, ["device", "token", "--fleet", str(tmp_path / "fleet")])
    assert missing.exit_code == 2
    assert "is no fleet's folder" in missing.output


class Operators:
    """Three members of a committee as processes, and the bundle that they and the fleet's devices pin."""

    def __init__(self, folder):
        self.folder, self.processes = folder, []
        assert fedcore("trust", "keygen", "--out", folder / "root").returncode == 0
        made = [json.loads(fedcore("committee", "keygen", "--out", folder / f"m{a}", "--json").stdout) for a in (1, 2, 3)]
        self.fingerprints = [one["fingerprint"] for one in made]

    def bundle(self, fleet):
        members = [part for a in (1, 2, 3) for part in ("--member", self.folder / f"m{a}" / "identity.pub")]
        done = fedcore(
            "trust", "bundle", self.folder / "root", "--population", "watches", "--threshold", 3, "--corrupt", 2,
            *members, "--enrol-ca", fleet.fleet.directory / "signer" / "signing.pub", "--out", self.folder / "bundle.json",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    def serve(self):
        floor = self.folder / "floor.toml"
        floor.write_text("minimum_survivors = 2\ncorrupt_clients = 0\nnoise_multiplier = 0\n")
        for a in (1, 2, 3):
            with (self.folder / f"member-{a}.log").open("ab") as log:
                self.processes.append(subprocess.Popen(
                    [*COMMAND, "committee", "serve", self.folder / f"m{a}", "--trust", self.folder / "bundle.json", "--root",
                     self.folder / "root" / "signing.pub", "--policy", floor],
                    stdout=subprocess.PIPE, stderr=log, text=True,
                ))  # fmt: skip
        return [process.stdout.readline().split()[-1] for process in self.processes]

    def stop(self):
        for process in self.processes:
            process.terminate()
            process.wait(30)
            process.stdout.close()


@pytest.fixture
def operators(tmp_path):
    one = Operators(tmp_path)
    yield one
    one.stop()


@pytest.mark.slow
def test_under_secure_aggregation_devices_give_the_sum_and_their_policy_holds(tmp_path, devices, operators):
    config, _, _ = holding_out(tmp_path, devices)
    expected = final_of(tmp_path / "simulated")
    fleet = FleetFolder.open(tmp_path / "fleet", "watches")
    operators.bundle(fleet)
    (tmp_path / "scenario.toml").write_text(
        (tmp_path / "scenario.toml").read_text()
        + f"""
[secagg]
enabled = true
minimum_survivors = 3
operators = {json.dumps(operators.serve())}
operator_fingerprints = {json.dumps(operators.fingerprints)}
trust = "bundle.json"
trust_key = "root/signing.pub"
"""
    )
    config = load_config(tmp_path / "scenario.toml", ["engine.name=loop", "secagg.corrupt_fraction=0.0"])
    pin_committee(config, fleet)
    assert fleet.fleet.trust().committee
    found, rounds, run = federated(config, devices, tmp_path)
    assert [one["round"] for one in rounds] == [1, 2], devices.logs()
    assert all(one["secure"] for one in rounds)
    np.testing.assert_allclose(found.master, expected, rtol=0, atol=2e-3)  # coordinates are rounded in the sum
    values = torch.from_numpy(run.coordinator.received(found)[1])
    task = RoundTask(2, LocalPlan(1, 10, 0.1), 1e6, found.ranges)
    scores = [score for _, score, _ in build_clients(run.assembly).evaluate(values, range(3), task)]
    told = rounds[-1]["federated"]
    assert told["accuracy"] == sum(one.correct for one in scores) / sum(one.examples for one in scores), devices.logs()
    assert told["loss"] == pytest.approx(sum(one.loss_sum for one in scores) / sum(one.examples for one in scores), abs=1e-5)
    assert sum(told["histogram"]) == told["clients"] == 3
    assert told["histogram"] == np.histogram([one.accuracy for one in scores], 20, (0, 1))[0].tolist()
    assert told["secure"][0]["survivors"] == 3
    with pytest.raises(Refused, match="pin another committee"):
        fleet.pin_committee(dataclasses.replace(read_message(tmp_path / "bundle.json", TrustBundle), threshold=2))


@pytest.mark.slow
def test_the_demonstration(tmp_path):
    """Ten rounds with masks and DP-SGD over the smartwatch recordings, two devices killed and one added."""
    pytest.importorskip("seglearn")
    linux = Path(__file__).parents[2] / "clients" / "linux"
    environment = os.environ | {"PYTHONPATH": str(linux)}
    done = subprocess.run(
        [sys.executable, linux / "demo.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "round 10/10" in done.stdout
    assert "device 1 is killed" in done.stdout
    assert "device 8 is added" in done.stdout
    (run,) = (tmp_path / "runs").iterdir()
    result = json.loads((run / "run" / "result.json").read_text())
    assert result["accuracy"] > 0.3
    assert result["privacy"]["example"]["epsilon"] < 10
    assert "3 operators" in result["secure_aggregation"]["committee"]
    assert done.stdout.count("active") == 9
