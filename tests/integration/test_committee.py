"""Committee members as operators run them: processes of `fedcore committee serve`, driven over TLS through whole rounds."""

import base64
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fedcore_commands import COMMAND
from typer.testing import CliRunner

from fedcore.cli import app
from fedcore.errors import Misbehaviour, TryAgain
from fedcore.quantization.wire import decode_model
from fedcore.secagg.committee import STEPS
from fedcore.secagg.committee_client import RemoteMember
from fedcore.secagg.committee_status import read_records
from fedcore.secagg.coordinator import Coordinator
from fedcore.secagg.keys import read_message, read_signing_key
from fedcore.secagg.messages import OfferRequest, TrustBundle
from fedcore.secagg.records import Record
from fedcore.secagg.trust import issue_certificate

CLIENTS = 6


def shared_world():
    """The world of the unit tests, at today's time: processes have a clock of their own."""
    path = Path(__file__).parents[1] / "unit" / "secagg" / "world.py"
    spec = importlib.util.spec_from_file_location("secagg_world_today", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.NOW = int(time.time())
    module.END = module.NOW + 600
    return module


def fedcore(*arguments) -> dict:
    done = CliRunner().invoke(app, [str(one) for one in arguments])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout) if "--json" in arguments else {}


class Unclocked:
    """A remote member where the shared world expects one that takes the time."""

    def __init__(self, member):
        for step in STEPS:
            setattr(self, step, lambda request, now, step=step: getattr(member, step)(request))


class Committee:
    """m operators: keys made by the commands, one process each, logs kept."""

    def __init__(self, folder, m, t, c, down=()):
        self.folder, self.processes, self.remotes, self.addresses = folder, {}, {}, {}
        self.keys = {a: fedcore("committee", "keygen", "--out", folder / f"m{a}", "--json") for a in range(1, m + 1)}
        fedcore("enrol-ca", "keygen", "--out", folder / "ca")
        fedcore("trust", "keygen", "--out", folder / "root")
        fedcore("committee", "keygen", "--coordinator", "--out", folder / "coordinator")
        members = [part for a in self.keys for part in ("--member", folder / f"m{a}" / "identity.pub")]
        fedcore(
            "trust", "bundle", folder / "root", "--population", "phones", "--threshold", t, "--corrupt", c, *members,
            "--enrol-ca", folder / "ca" / "signing.pub", "--out", folder / "bundle.json",
        )  # fmt: skip
        (folder / "policy.toml").write_text("minimum_survivors = 3\ncorrupt_clients = 1\nnoise_multiplier = 0\n")
        for a in self.keys:
            self.start(a)
        for a in self.keys:
            self.wait(a)
        self.trust = read_message(folder / "bundle.json", TrustBundle)
        for a, key in self.keys.items():
            self.remotes[a] = RemoteMember(
                a, self.addresses[a], key["fingerprint"], self.trust, patience=30.0, credentials=folder / "coordinator"
            )
        self.module = shared_world()
        self.world = self.module.World(m, t, c, CLIENTS)
        enrolment = read_signing_key(folder / "ca" / "signing.key")
        self.world.trust = self.trust
        self.world.certificates = [
            issue_certificate(enrolment, "phones", key.algorithm, key.public, self.module.END + 10**6)
            for key in self.world.identities
        ]
        self.world.clients = [self.world.start_client(i) for i in range(CLIENTS)]
        self.world.members = {a: Unclocked(remote) for a, remote in self.remotes.items()}

    def command(self, a, listen="127.0.0.1:0"):
        trust, root = self.folder / "bundle.json", self.folder / "root" / "signing.pub"
        policy, coordinator = self.folder / "policy.toml", self.folder / "coordinator" / "tls.pem"
        options = {"trust": trust, "root": root, "policy": policy, "coordinator": coordinator, "listen": listen}
        given = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
        return [*COMMAND, "committee", "serve", str(self.folder / f"m{a}"), *given]

    def start(self, a):
        with (self.folder / f"m{a}.log").open("ab") as log:
            command = self.command(a, self.addresses.get(a, "127.0.0.1:0"))
            self.processes[a] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)

    def wait(self, a):
        line = self.processes[a].stdout.readline()
        assert line.startswith(f"member {a} of 'phones' listens on 127.0.0.1:"), self.log(a)
        self.addresses[a] = line.split()[-1]

    def kill(self, a):
        os.kill(self.processes[a].pid, signal.SIGKILL)
        self.reap(a)

    def reap(self, a) -> int:
        process = self.processes.pop(a)
        self.rest = process.stdout.read()
        process.stdout.close()
        return process.wait(60)

    def log(self, a) -> str:
        return (self.folder / f"m{a}.log").read_text()

    def close(self):
        for remote in self.remotes.values():
            remote.close()
        for a, process in list(self.processes.items()):
            process.terminate()
            self.reap(a)

    def disk(self, a) -> bytes:
        """Everything that member a keeps; what vanishes meanwhile is not there."""
        pieces = []
        for path in (self.folder / f"m{a}" / "journal").iterdir():
            try:
                pieces.append(path.read_bytes())
            except FileNotFoundError:
                continue
        return b"".join(pieces)

    def secrets(self, a) -> list[bytes]:
        records = read_records(self.folder / f"m{a}" / "journal")
        return [secret for record in map(Record.decode, records.values()) for secret in (record.box_secret, record.reveal)]


@pytest.fixture
def committee(tmp_path, request):
    one = Committee(tmp_path, *request.param)
    yield one
    one.close()


@pytest.mark.parametrize("committee", [(3, 3, 2)], indirect=True)
def test_a_member_killed_between_certify_and_release_signs_nothing_else(committee):
    """3 of 3. After kill -9 and a restart the round ends exactly; certified is what was certified before, and nothing else."""
    current = committee.world.begin()
    current.upload(range(5))
    current.screen()
    before = committee.remotes[2].certify(current.coordinator.certify_request())
    current.certify()
    secrets = {a: committee.secrets(a) for a in committee.keys}
    committee.kill(2)
    committee.start(2)
    committee.wait(2)
    assert committee.remotes[2].certify(current.coordinator.certify_request()) == before
    other = Coordinator(
        current.header, current.coordinator._check_ins, committee.trust, committee.world.policy, committee.module.NOW
    )
    other._plan, other._approvals = current.coordinator._plan, current.coordinator._approvals
    other._received = {i: one for i, one in current.coordinator._received.items() if i != 4}
    other._screened = current.coordinator._screened
    with pytest.raises(Misbehaviour, match="other survivors of round 1 of 'digits' are certified already"):
        committee.remotes[2].certify(other.certify_request())
    current.release()
    assert current.total().tolist() == current.plain(range(5))
    for a in committee.keys:
        assert not any(secret in committee.disk(a) for secret in secrets[a])
    assert [fedcore("committee", "show", committee.folder / "m2", "--json")["open"][0]["state"]] == ["released"]
    logged_once_and_no_secret(committee, secrets)
    second = subprocess.run(committee.command(2), capture_output=True, text=True, timeout=60, check=False)
    assert (second.returncode, second.stdout) == (1, "")
    assert second.stderr.endswith("another process keeps its journal there\n")
    committee.processes[1].send_signal(signal.SIGTERM)
    committee.processes[3].send_signal(signal.SIGINT)
    for a in (1, 3):
        assert (committee.reap(a), committee.rest) == (0, "stopped\n"), committee.log(a)


def logged_once_and_no_secret(committee, secrets):
    """One line a request; and in no log any key or share, in any of the usual spellings."""
    lines = {a: [line for line in committee.log(a).splitlines() if "'digits' round 1" in line] for a in committee.keys}
    for a, found in lines.items():
        steps = [re.search(r"ipv4:\S+ (\w+) 'digits' round 1: (done|refused)", line).group(1, 2) for line in found]
        expected = [(step, "done") for step in STEPS]
        if a == 2:
            certify = expected.index(("certify", "done"))
            expected[certify:certify] = [("certify", "done")]
            expected[certify + 2 : certify + 2] = [("certify", "done"), ("certify", "refused")]
        assert steps == expected
    private = [path.read_bytes() for path in committee.folder.rglob("*.key")]
    for a in committee.keys:
        assert len(secrets[a]) == 2
        text = committee.log(a)
        spelled = [line for key in private for line in key.decode().splitlines() if "-" not in line]
        for secret in secrets[a]:
            spelled += [
                secret.hex(),
                base64.b64encode(secret).decode(),
                base64.urlsafe_b64encode(secret).decode(),
                repr(secret)[2:-1],
            ]
        assert len(spelled) >= 8 + 8
        assert not any(one in text for one in spelled)
        assert "Traceback" not in text


@pytest.mark.parametrize("committee", [(4, 3, 1)], indirect=True)
def test_three_of_four_members_suffice(committee):
    """One member goes before its release, another round is made without it."""
    current = committee.world.begin()
    current.upload(range(4))
    current.screen()
    current.certify()
    committee.kill(3)
    committee.remotes[3]._patience = 0.5
    with pytest.raises(TryAgain, match=r"member 3 at 127\.0\.0\.1:"):
        current.release([3])
    current.release([1, 2, 4])
    assert current.total().tolist() == current.plain(range(4))
    later = committee.world.begin(2, members=[1, 2, 4])
    later.upload(range(CLIENTS))
    later.screen()
    later.certify()
    later.release()
    assert later.total().tolist() == later.plain(range(CLIENTS))


@pytest.mark.parametrize("committee", [(1, 1, 0)], indirect=True)
def test_a_round_that_is_over_is_erased_without_any_request(committee):
    """By the member's own clock; the round's number stays used."""
    expiry = int(time.time()) + 6  # what follows is to be over by then, on a busy machine too
    request = OfferRequest("digits", 1, 1, expiry).encode()
    committee.remotes[1].offer(request)
    secrets = committee.secrets(1)
    assert all(secret in committee.disk(1) for secret in secrets)
    end = time.monotonic() + 60
    while any(secret in committee.disk(1) for secret in secrets) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(secret in committee.disk(1) for secret in secrets)
    assert time.time() >= expiry
    assert fedcore("committee", "show", committee.folder / "m1", "--json")["closed"] == {"digits": 1}
    with pytest.raises(Misbehaviour, match="never used again"):
        committee.remotes[1].offer(OfferRequest("digits", 1, 1, expiry + 60).encode())


SCENARIO = """
[run]
name = "operated"
rounds = 4
[data]
clients = 8
[model]
name = "mlp"
params = { hidden = [16] }
[secagg]
enabled = true
corrupt_fraction = 0.1
"""


def simulate(folder, out, *more, kill_after=0):
    """The exit code of a simulation, which is killed after some rounds."""
    command = [*COMMAND, "simulate", str(folder), "--out", str(out), *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True) as process:
        for line in process.stdout:
            if kill_after and line.startswith(f"round {kill_after}/"):
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode


@pytest.mark.slow
@pytest.mark.parametrize("committee", [(4, 3, 1)], indirect=True)
def test_a_run_and_an_operator_are_killed_and_the_resumed_run_ends_with_the_same_bits(committee, tmp_path):
    addresses = [committee.addresses[a] for a in sorted(committee.keys)]
    fingerprints = [committee.keys[a]["fingerprint"] for a in sorted(committee.keys)]
    pinned = (
        f"operators = {json.dumps(addresses)}\noperator_fingerprints = {json.dumps(fingerprints)}\n"
        'trust = "bundle.json"\ntrust_key = "root/signing.pub"\ncredentials = "coordinator"\nenrolment = "ca"\n'
    )
    masked, plain = tmp_path / "masked.toml", tmp_path / "plain.toml"
    masked.write_text(SCENARIO + pinned)
    plain.write_text(SCENARIO + 'simulate = "arithmetic"\n')
    assert simulate(masked, tmp_path / "run", kill_after=2) == -signal.SIGKILL
    committee.kill(2)
    committee.start(2)
    committee.wait(2)
    committee.kill(3)  # for good: three of four are enough
    assert simulate(masked, tmp_path / "run", "--resume") == 0
    assert simulate(plain, tmp_path / "expected") == 0
    models = [(tmp_path / run / "model" / "model.fcm").read_bytes() for run in ("run", "expected")]
    tensors = [decode_model(model).tensors for model in models]
    assert all((tensors[0][name] == tensors[1][name]).all() for name in tensors[1])
    silent = [json.loads(line)["secure"][0]["silent"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [list(one) for one in silent[:2]] == [[], []]
    assert list(silent[-1]) == ["3"]
    for a in committee.keys:
        assert not any(secret in (tmp_path / "run" / "metrics.jsonl").read_bytes() for secret in committee.secrets(a) if secret)


def test_a_bundle_that_nobody_can_use_is_refused_in_words(tmp_path):
    fedcore("trust", "keygen", "--out", tmp_path / "root")
    fedcore("enrol-ca", "keygen", "--out", tmp_path / "ca")
    fedcore("committee", "keygen", "--out", tmp_path / "m1")
    settings = {"population": "phones", "threshold": "1", "corrupt": "0"}
    for change, words in (
        ({"corrupt": "-1"}, "is not safe: it takes 0 <= c"),
        ({"threshold": "300"}, "is not safe: it takes 0 <= c"),
        ({"population": ""}, "a population has a name of 1 to 64 bytes"),
    ):
        options = [part for key, value in {**settings, **change}.items() for part in (f"--{key}", value)]
        done = CliRunner().invoke(app, [
            "trust", "bundle", str(tmp_path / "root"), *options, "--member", str(tmp_path / "m1" / "identity.pub"),
            "--enrol-ca", str(tmp_path / "ca" / "signing.pub"), "--out", str(tmp_path / "bundle.json"),
        ])  # fmt: skip
        assert done.exit_code == 2, done.output
        assert words in done.output
        assert len(done.output.strip().splitlines()) == 1
        assert not (tmp_path / "bundle.json").exists()
