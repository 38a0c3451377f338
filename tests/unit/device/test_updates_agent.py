"""The agent with releases: beside rounds and without them, its commands, and what it holds in memory."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import fedcore_device.agent
import fedcore_device.cli
import fedcore_device.updates
import pytest
from fedcore_device.agent import Agent, forget_device
from fedcore_device.environment import Conditions, LinuxEnvironment, hardware_name
from fedcore_device.installed import Trial, installed
from fedcore_device.policy import UpdatePolicy
from fleet_fake import LOOSE, Gateway, World, assignment, enrolled, fixed_draw, fresh_state, plan
from release_fake import DEVICE, TIME, Repository, content
from release_fake import Gateway as Releases

from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.client import Enrolled
from fedcore.gateway.refusals import GatewayRefusal

WITH_MODELS = dataclasses.replace(LOOSE, updates=UpdatePolicy(models=("digits",)))


class Steps:
    """A `Stop` that ends after so many waits."""

    def __init__(self, count):
        self.waits, self._count = [], count

    def is_set(self):
        return len(self.waits) >= self._count

    def wait(self, timeout=None):
        self.waits.append(timeout)

    def monotonic(self):
        return sum(self.waits)


class Both(Gateway):
    """Rounds and releases."""

    def __init__(self, releases):
        super().__init__()
        self.releases, self.order = releases, []

    def check_in(self, body):
        self.order.append("check in")
        return super().check_in(body)

    def upload(self, token, data):
        self.order.append("upload")
        return super().upload(token, data)

    def release(self, body):
        self.order.append("release")
        self._may("release")
        return self.releases.release(body)

    def repository(self, token):
        return self.releases.repository(token)


@pytest.fixture
def fleet(tmp_path, monkeypatch):
    """An enrolled device, its surroundings, and a gateway that assigns release 1 of digits."""
    monkeypatch.setattr(fedcore_device.updates, "self_test", lambda *_: Trial(0.0, 1.0, 5, {}))
    releases = Releases(Repository())
    releases.simulator.offer(1)
    releases.wanted = 1
    one = enrolled()
    trust = dataclasses.replace(one.trust, update_root=releases.simulator.files["metadata/1.root.json"], time_keys=(TIME.public,))
    one = Enrolled(one.key, one.enrolment, trust)
    state, gateway = fresh_state(tmp_path / "state"), Both(releases)
    releases.lies = {"device": fedcore_device.agent.hashlib.sha256(one.key.public).digest()}
    assert releases.lies["device"] != DEVICE
    state.keep("enrolment.bin", one.enrolment.encode())
    state.keep("trust.bin", trust.encode())
    monkeypatch.setattr(fedcore_device.agent, "load_enrolled", lambda _: one)
    monkeypatch.setattr(fedcore_device.agent, "_connect", lambda *_: gateway)
    return state, World(tmp_path / "examples"), gateway


def agent_of(fleet, steps, policy=WITH_MODELS):
    state, world, _ = fleet
    return Agent(state, world, policy, draw=fixed_draw, look=10.0, monotonic=steps.monotonic)


def version(state):
    return {name: one.current.version for name, one in installed(state.directory).items() if one.current}


def wait(seconds):
    return pb.CheckInReply(wait=pb.Wait(retry_after_ms=int(1000 * seconds)))


def test_beside_rounds_and_never_before_one_that_can_go_on(fleet):
    state, _, gateway = fleet
    gateway.replies = [pb.CheckInReply(assignment=assignment(plan(gateway))), wait(100)]
    gateway.fails = {"upload": 1}
    steps = Steps(3)
    agent_of(fleet, steps).run(steps)
    assert version(state) == {"digits": 1}
    assert gateway.order[:3] == ["check in", "upload", "upload"], "a round whose upload broke off comes first"
    assert len(gateway.uploads) == 2
    assert "release" in gateway.order


def test_a_device_that_may_not_train_updates_all_the_same(fleet):
    state, world, gateway = fleet
    world.now = [Conditions(free_storage=1 << 40, charging=False)]
    steps = Steps(2)
    agent = agent_of(fleet, steps)
    agent.run(steps)
    assert agent.waiting_for == "not charging"
    assert version(state) == {"digits": 1}
    assert set(gateway.order) == {"release"}


def test_without_examples_it_only_keeps_models_up_to_date(fleet):
    state, world, gateway = fleet
    world.examples = ""
    steps = Steps(3)
    agent_of(fleet, steps).run(steps)
    assert version(state) == {"digits": 1}
    assert not gateway.asked
    assert steps.waits == [10.0] * 3, "it does not turn in circles"


@pytest.mark.parametrize("without", ["repository", "models"])
def test_a_deployment_without_releases_costs_nothing(fleet, monkeypatch, without):
    state, _, gateway = fleet
    if without == "repository":
        one = enrolled()
        monkeypatch.setattr(fedcore_device.agent, "load_enrolled", lambda _: one)
    gateway.replies = [wait(1000)]
    steps = Steps(4)
    agent_of(fleet, steps, LOOSE if without == "models" else WITH_MODELS).run(steps)
    assert gateway.order == ["check in"]
    assert not (state.directory / "updates.json").exists()
    assert not (state.directory / "repository").exists()


def test_a_gateway_that_knows_no_releases_disturbs_no_round(fleet):
    """One of an earlier version answers that it does not implement the call, which is a `TryAgain`."""
    state, _, gateway = fleet
    gateway.fails = {"release": 100}
    gateway.replies = [pb.CheckInReply(assignment=assignment(plan(gateway))), wait(100)]
    steps = Steps(4)
    agent_of(fleet, steps).run(steps)
    assert len(gateway.uploads) == 1
    assert gateway.order.count("release") == 1, "it is not asked again at every look"
    assert not version(state)


def test_a_revoked_identity_ends_the_agent(fleet):
    state, world, gateway = fleet
    world.examples = ""
    gateway.refusals = {"release": [GatewayRefusal(pb.REVOKED, "go away")]}
    steps = Steps(5)
    with pytest.raises(GatewayRefusal, match="go away"):
        agent_of(fleet, steps).run(steps)
    assert state.problem == "go away"


def test_an_ended_certificate_is_renewed_for_a_release_too(fleet):
    state, world, gateway = fleet
    world.examples = ""
    gateway.refusals = {"release": [GatewayRefusal(pb.EXPIRED, "renew")]}
    renewed = []
    gateway.renew = lambda: renewed.append(1) or enrolled()
    steps = Steps(1)
    agent = agent_of(fleet, steps)
    agent.run(steps)
    assert renewed
    agent.update(now=True)
    assert version(state) == {"digits": 1}


def test_forget_erases_installed_models_too(fleet):
    state = fleet[0]
    agent_of(fleet, Steps(1)).update()
    assert version(state)
    (state.directory / "policy.toml").write_text("")
    assert not forget_device(state)
    assert [path.name for path in state.directory.iterdir()] == ["policy.toml"]


class TestCommands:
    def run(self, state, *arguments):
        return fedcore_device.cli.main(["--state", str(state.directory), *arguments])

    def test_update_models_and_status(self, fleet, capsys):
        state, _, gateway = fleet
        (state.directory / "policy.toml").write_text('[updates]\nmodels = ["digits"]\n')
        assert self.run(state, "update") == 0
        assert "release 1; on probation" in capsys.readouterr().out
        assert self.run(state, "models", "--json") == 0
        found = json.loads(capsys.readouterr().out)["digits"]
        assert (found["version"], found["probation"], found["previous"], found["problem"]) == (1, True, 0, "")
        gateway.fails = {"release": 1}
        assert self.run(state, "update") == 1
        assert "last update: release broke off" in capsys.readouterr().out
        fedcore_device.cli.main(["--state", str(state.directory), "status", "--json"])
        assert json.loads(capsys.readouterr().out)["models"]["digits"]["problem"] == "release broke off"
        self.run(state, "status")
        assert "model digits" in capsys.readouterr().out

    def test_update_of_an_agent_that_runs(self, fleet, capsys):
        state, _, _ = fleet
        (state.directory / "policy.toml").write_text('[updates]\nmodels = ["digits"]\n')
        with state.locked():
            assert self.run(state, "update") == 0
        assert "looks at its next turn" in capsys.readouterr().out
        assert (state.directory / "update.now").exists()
        steps = Steps(1)
        fleet[1].now = [Conditions(charging=False)]  # not even room on the disk: whoever asks for it gets it
        agent_of(fleet, steps).run(steps)
        assert version(state) == {"digits": 1}

    def test_without_models(self, fleet, capsys):
        state = fleet[0]
        assert self.run(state, "models") == 0
        assert "no models" in capsys.readouterr().out
        assert self.run(state, "update") == 2
        assert "names no model" in capsys.readouterr().err


def test_the_hardware_has_a_name(tmp_path):
    assert hardware_name(tmp_path)
    (tmp_path / "proc" / "device-tree").mkdir(parents=True)
    (tmp_path / "proc" / "device-tree" / "model").write_bytes(b"Raspberry Pi 4 Model B Rev 1.4\x00")
    assert hardware_name(tmp_path) == "Raspberry Pi 4 Model B Rev 1.4"


def test_an_agent_that_has_updated_stays_small(tmp_path, monkeypatch):
    """In a process of its own, with a repository of files: what it imports for an update stays with it afterwards."""
    simulator = Repository()
    for number in (1, 2):
        simulator.offer(number)
    for name, data in simulator.files.items():
        path = tmp_path / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    gateway = Releases(simulator)
    replies = []
    for gateway.wanted in (1, 2):
        reply = gateway.release(pb.ReleaseBody(model="digits"))
        replies.append(reply.SerializeToString().hex())
    program = """
import contextlib, json, sys
from pathlib import Path
from fedcore_device import agent, cli, environment, policy, rounds, state, updates
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.client import channel_to
from fedcore.gateway.messages import FleetTrust
from fedcore_device.installed import Trial
import grpc

def resident():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) / 1024

folder, key, device, *replies = sys.argv[1:]
channel = channel_to("localhost:1", FleetTrust("x", bytes(32), (), (), (), b"", b"", b""), plain=True)
updates.self_test = lambda *_: Trial(0.0, 1.0, 5, {})

class Server:
    def release(self, body):
        return pb.ReleaseReply.FromString(bytes.fromhex(replies.pop(0)))
    def repository(self, token):
        from fedcore.registry.fetch import DirectoryFetcher
        return DirectoryFetcher(Path(folder) / "files")

root = (Path(folder) / "files/metadata/1.root.json").read_bytes()
wanted = policy.Policy(updates=policy.UpdatePolicy(models=("digits",)))
home = state.State(Path(folder) / "state")
identity = updates.Identity(bytes.fromhex(device), (bytes.fromhex(key),), root)
one = updates.Updater(home, environment.LinuxEnvironment(home.directory, ""), wanted, identity,
                      lambda: contextlib.nullcontext(Server()))
found = {"before": resident(), "tuf before": "tuf" in sys.modules, "numpy before": "numpy" in sys.modules}
one.step(now=True)
one.step(now=True)
print(json.dumps(found | {"after": resident(), "problem": updates.read_standings(home)["digits"].problem,
                          "runtime": "onnxruntime" in sys.modules, "left": len(replies)}))
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3] / "clients" / "linux")}
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), TIME.public.hex(), DEVICE.hex(), *replies], capture_output=True, text=True,
        check=False, env=environment,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert (found["problem"], found["left"]) == ("", 0)
    assert not found["tuf before"] and not found["numpy before"] and not found["runtime"]
    assert installed(tmp_path / "state")["digits"].current.version == 2
    assert found["before"] <= 60
    assert found["after"] <= 80
    files = tmp_path / "state" / "models" / "digits" / "files"
    assert content(2) in [path.read_bytes() for path in files.iterdir()]


def test_conditions_of_updates_are_their_own(tmp_path):
    environment = LinuxEnvironment(tmp_path, "", override=tmp_path / "c.json")
    (tmp_path / "c.json").write_text(json.dumps({"charging": False, "idle": False, "free_storage": 1 << 40}))
    found = environment.conditions(training=False)
    assert WITH_MODELS.conditions.why_not(found, 0.0)
    found = dataclasses.replace(found, unmetered=True, battery_percent=None, temperature=None)
    assert not WITH_MODELS.updates.why_not(found, 0.0)
