"""A federation that is beaten keeps its promises, and the check of them sees when one is broken."""

import contextlib
import dataclasses
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import pytest
import safetensors.numpy
from typer.testing import CliRunner

from fedcore.chaos.check import _ledger, _read_run, check_run, check_secrets, known_rounds, secrets_of
from fedcore.chaos.deployment import MARK, Deployment, Layout, free_address, left_behind
from fedcore.chaos.device import known_update
from fedcore.chaos.faults import Faults
from fedcore.chaos.journal import ACKNOWLEDGED, Entry, append, read_journal
from fedcore.chaos.rehearsal import KINDS, MESSAGES, Plan, least, rehearse
from fedcore.cli import app
from fedcore.errors import Refused
from fedcore.quantization.wire import decode_update
from fedcore.state.stores import open_gateway_store

SEED, YEAR = 35, 365 * 86_400.0
SCENARIO = """
[run]
name = "rehearsal"
rounds = {rounds}
seed = 3
[data]
dataset = "digits"
clients = 4
[model]
name = "mlp"
params = {{ hidden = [8] }}
[quantization]
enabled = false
[strategy]
name = "fedavg"
[cohort]
timeout = 20
[engine]
name = "loop"
"""


class Watched(threading.Thread):
    """Asks for the metrics again and again, as Prometheus does; the highest value of each series."""

    def __init__(self):
        super().__init__(daemon=True)
        self.address, self.highest, self.over = free_address(), {}, threading.Event()

    def run(self):
        while not self.over.wait(0.1):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{self.address}/metrics", timeout=5) as reply:
                for line in reply.read().decode().splitlines():
                    if not line.startswith("#"):
                        name, _, value = line.rpartition(" ")
                        self.highest[name] = max(float(value), self.highest.get(name, 0.0))

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.join(30)


def layout(folder, rounds, devices=3, more=(), **values):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scenario.toml").write_text(SCENARIO.format(rounds=rounds))
    serve = ("--devices", str(devices), "--minimum", str(least(devices)), "--over-selection", "1", "--window", "60", *more)
    return Layout(folder / "scenario.toml", devices=devices, serve=serve, **values)


def beaten(folder, plan, rounds, **values):
    told = []
    deployment = Deployment(folder / "all", layout(folder, rounds, **values))
    judged = rehearse(deployment, plan, told.append)
    story = "\n".join([f"seed {plan.seed}", *told, *(f"{one.name}: {one.holds}: {one.text}" for one in judged.findings)])
    assert judged.holds, story
    assert judged.rounds == rounds, story
    return deployment, judged


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """The short form: gateway, coordinator and a device are killed, messages and connections harmed, two clocks a year off."""
    quick = dataclasses.replace(MESSAGES, seconds=0.2)
    targets = ("gateway", "coordinator", "device-0")
    plan = Plan(SEED, ("kill", "network"), 0.3, 300.0, 3, targets=targets, work=1.0, messages=quick)
    with Watched() as watched:
        deployment, judged = beaten(tmp_path_factory.mktemp("short"), plan, 6, ahead=YEAR, more=("--metrics", watched.address))
    return deployment, judged, watched.highest


def found(folder, **changes):
    devices = sorted((folder / "devices").iterdir())
    given = {
        "journals": [one / "journal.jsonl" for one in devices],
        "uploads": [one / "uploads" for one in devices],
        "logs": sorted((folder / "logs").glob("*.log")),
    } | changes
    return {one.name: one for one in check_run(folder / "run", str(folder / "fleet" / "store.sqlite"), **given)}


def test_a_federation_that_is_beaten_keeps_its_promises(rehearsed):
    deployment, judged, _ = rehearsed
    assert {"kill gateway", "kill coordinator", "kill device"} <= set(judged.happened), judged.happened
    assert sum(times for name, times in judged.happened.items() if name.startswith(("wire", "message"))) > 3
    verdicts = {one.name: one.holds for one in judged.findings}
    unjudged = [name for name, holds in verdicts.items() if holds is None]
    assert unjudged == ["the ledger is right"], "nothing is charged here, all else was judged"
    assert not left_behind(deployment.name)


def test_prometheus_sees_it_all(rehearsed):
    _, _, seen = rehearsed
    assert seen["fedcore_run_rounds_planned"] == 6
    assert 1 <= seen["fedcore_run_rounds_committed"] <= 6
    assert seen['fedcore_gateway_uploads_total{result="counted"}'] >= 3, "since the last time that the gateway began"
    assert seen['fedcore_gateway_check_ins_total{answer="assignment"}'] >= 3
    assert seen['fedcore_fleet_devices{standing="active"}'] == 3
    assert seen['fedcore_fleet_agent_versions{version="chaos"}'] == 3
    assert seen['fedcore_gateway_refusals_total{method="CheckIn",reason="clock"}'] >= 1, "two clocks are a year off"
    assert seen["fedcore_round_cohort_devices"] == 3


def test_the_sums_are_those_of_known_updates(rehearsed):
    """Once more without the gateway's own code: formula, weights and mean by hand."""
    deployment, _, _ = rehearsed
    folders = {json.loads((one / "device.json").read_text())["number"]: one for one in (deployment.folder / "devices").iterdir()}
    made = {}
    for number, folder in folders.items():
        for entry in read_journal(folder / "journal.jsonl"):
            made[entry.digest, entry.round] = number
    judged = 0
    for one in known_rounds(str(deployment.fleet / "store.sqlite")):
        if not one.contributions:
            continue
        (plan,) = one.plans
        numbers = [made[c.digest.hex(), plan] for c in one.contributions]
        assert len(set(numbers)) == len(numbers)
        values = one.document.uploads.values
        total = sum((n % 7 + 1) * known_update(n, plan, values).astype(np.float64) for n in numbers)
        np.testing.assert_array_equal(one.total.vector, total)
        assert one.total.examples == sum(n % 7 + 1 for n in numbers)
        judged += 1
    assert judged >= 6
    folder = folders[0] / "uploads"
    sent = decode_update(next(folder.iterdir()).read_bytes())
    assert sent.examples == 1
    np.testing.assert_array_equal(sent.values * 4096, np.round(sent.values * 4096))


@pytest.fixture
def copy(rehearsed, tmp_path):
    """What is left of the rehearsal, to be broken."""
    for part in ("run", "devices", "logs"):
        shutil.copytree(rehearsed[0].folder / part, tmp_path / part)
    (tmp_path / "fleet").mkdir()
    for path in rehearsed[0].fleet.glob("store.sqlite*"):
        shutil.copy(path, tmp_path / "fleet")
    assert all(one.holds is not False for one in found(tmp_path).values())
    return tmp_path


def change(file, *statements):
    db = sqlite3.connect(file)
    for one in statements:
        assert db.execute(*one).rowcount == 1
    db.commit()
    db.close()


def test_a_lost_upload_is_found(copy):
    entry = next(one for one in read_journal(copy / "devices" / "1" / "journal.jsonl") if one.event == ACKNOWLEDGED)
    plan = entry.round
    (key,) = [one.round.key for one in known_rounds(str(copy / "fleet" / "store.sqlite")) if plan in one.plans]
    change(
        copy / "fleet" / "store.sqlite",
        ("DELETE FROM contributions WHERE round = ? AND digest = ?", (key, bytes.fromhex(entry.digest))),
    )
    verdicts = found(copy)
    assert verdicts["no acknowledged upload lost"].holds is False
    assert "1 acknowledged uploads are not in the store" in verdicts["no acknowledged upload lost"].text
    assert verdicts["no upload counted twice"].holds is False, "the sum holds more than the index"


def test_a_sum_that_was_added_to_twice_is_found(copy):
    store = copy / "fleet" / "store.sqlite"
    one = next(one for one in known_rounds(str(store)) if one.done)
    db = sqlite3.connect(store)
    ((writer, data),) = db.execute("SELECT writer, sum FROM partials WHERE round = ? LIMIT 1", (one.round.key,)).fetchall()
    wrong = bytearray(data)
    wrong[-8:] = np.float64(np.frombuffer(data[-8:], "<f8")[0] + 1 / 4096).tobytes()
    db.execute("UPDATE partials SET sum = ? WHERE round = ? AND writer = ?", (bytes(wrong), one.round.key, writer))
    db.commit()
    db.close()
    verdicts = found(copy)
    assert verdicts["sums exact"].holds is False
    assert verdicts["no upload counted twice"].holds is True, "by number alone nothing is wrong"


def test_two_acknowledged_uploads_of_a_device_in_a_round_are_found(copy):
    journal = copy / "devices" / "1" / "journal.jsonl"
    entry = next(one for one in read_journal(journal) if one.event == ACKNOWLEDGED)
    append(journal, dataclasses.replace(entry, digest="00" * 32))
    assert found(copy)["no upload counted twice"].holds is False


def test_a_model_that_is_not_what_was_summed_or_not_finite_is_found(copy):
    import hashlib

    file = max((copy / "run" / "checkpoints").glob("*.safetensors"))
    arrays = safetensors.numpy.load_file(file)
    for value, said in ((1.0, "add up to"), (np.nan, "not finite")):
        arrays["master"][3] += np.float32(value)
        file.write_bytes(safetensors.numpy.save(arrays))
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        change(copy / "run" / "state.sqlite", ("UPDATE checkpoints SET sha256 = ? WHERE file = ?", (digest, file.name)))
        verdict = found(copy)["the model is valid"]
        assert verdict.holds is False
        assert said in verdict.text


def test_a_defect_a_lost_identity_and_a_secret_are_found(copy, rehearsed):
    log = copy / "logs" / "device-0.log"
    log.write_text("Traceback (most recent call last):\n")
    append(copy / "devices" / "2" / "journal.jsonl", Entry("ended", text="the device's state was copied"))
    verdicts = found(copy)
    assert verdicts["no defect in a log"].holds is False
    assert verdicts["no device turned away"].holds is False
    secrets = secrets_of(rehearsed[0].folder)
    assert len(secrets) >= 10, "tokens, device keys and the fleet's"
    assert check_secrets([log], secrets).holds is True
    log.write_bytes(b"key: " + secrets[0])
    assert check_secrets([log], secrets).holds is False


def test_the_check_is_a_command(copy, rehearsed):
    journal = copy / "devices" / "1" / "journal.jsonl"
    arguments = ["chaos", "check", str(copy / "run"), "--fleet", str(rehearsed[0].fleet), "--acknowledged", str(journal)]
    store = ["--store", str(copy / "fleet" / "store.sqlite")]
    done = CliRunner().invoke(app, [*arguments, *store, "--json"])
    assert done.exit_code == 0, done.output
    verdicts = {one["name"]: one["holds"] for one in map(json.loads, done.output.splitlines())}
    assert verdicts["no acknowledged upload lost"] is True
    assert verdicts["sums exact"] is None, "nobody gave it the uploads"
    entry = next(one for one in read_journal(journal) if one.event == ACKNOWLEDGED)
    append(journal, dataclasses.replace(entry, digest="11" * 32))
    broken = CliRunner().invoke(app, [*arguments, *store])
    assert broken.exit_code == 3
    assert "BROKEN" in broken.output
    nothing = CliRunner().invoke(app, ["chaos", "check", str(copy), "--fleet", str(rehearsed[0].fleet)])
    assert nothing.exit_code == 2
    assert "holds no run" in nothing.output


def test_processes_that_are_left_behind_are_seen():
    mark = f"test{os.getpid()}"
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=os.environ | {MARK: mark})
    try:
        end = time.monotonic() + 60  # a program that has just begun shows its environment a moment later
        while not left_behind(mark) and time.monotonic() < end:
            time.sleep(0.01)
        (line,) = left_behind(mark)
        assert line.startswith(f"{process.pid} ")
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
    assert left_behind(mark) == []


def test_what_cannot_be_rehearsed_is_refused(tmp_path):
    (tmp_path / "scenario.toml").write_text(SCENARIO.format(rounds=1))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    command = ["chaos", "run", str(tmp_path / "scenario.toml"), "--out"]
    for more, said in (
        ([str(tmp_path / "full")], "is not empty"),
        ([str(tmp_path / "new"), "--faults", "kill,flood"], "unknown 'flood'"),
        ([str(tmp_path / "new"), "--set", "data.clients=0"], "clients"),
    ):
        done = CliRunner().invoke(app, [*command, *more])
        assert done.exit_code == 2, done.output
        assert said in done.output
    assert not (tmp_path / "new").exists()
    with pytest.raises(Refused, match="holds no run"):
        check_run(tmp_path, str(tmp_path / "store.sqlite"))
    done = CliRunner().invoke(app, ["chaos", "proxy", "--listen", "127.0.0.1:0", "--to", "127.0.0.1:1", "--fault", "drop=2"])
    assert done.exit_code == 2


# The long form


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["example", "client"])
def test_everything_fails_over_sqlite_and_each_attempt_is_charged(tmp_path, unit):
    more = {"example": (), "client": ("privacy.clipping_norm=0.05",)}[unit]
    overrides = (f"privacy.unit={unit}", "privacy.noise_multiplier=1.0", "privacy.delta=1e-5", *more)
    plan = Plan(21, KINDS, 1.5, 300.0, 14)  # each of six processes is killed, and each one's disk is full
    deployment, judged = beaten(tmp_path, plan, 32, devices=4, ahead=YEAR, overrides=overrides)
    assert {"kill coordinator", "disk coordinator", "disk gateway"} <= set(judged.happened)
    facts = _read_run(deployment.run)
    mine = [one for one in known_rounds(str(deployment.fleet / "store.sqlite")) if one.document.cohort]
    assert _ledger(facts, mine).holds is True
    assert _ledger(facts, [*mine, *mine]).holds is False, "a charge is missing, then"


@pytest.mark.slow
def test_everything_fails_over_redis_with_two_gateways(tmp_path):
    """One store for the coordinator's gateway and a replica; each of them, Redis, coordinator and devices are killed."""
    plan = Plan(22, KINDS, 1.5, 300.0, 16)
    deployment, judged = beaten(tmp_path, plan, 36, devices=4, replicas=1, redis=True, ahead=YEAR)
    assert {"kill redis", "kill replica", "kill gateway", "kill coordinator", "kill device"} <= set(judged.happened)
    assert not deployment.fleet.joinpath("store.sqlite").exists(), "nothing was kept beside Redis"


@pytest.mark.slow
def test_one_of_two_gateways_is_killed_again_and_again_and_no_round_is_the_worse(tmp_path):
    plan = Plan(23, ("kill",), 0.7, 300.0, 6, targets=("replica-0",), wire=Faults(), messages=Faults())
    _, judged = beaten(tmp_path, plan, 20, devices=4, replicas=1, redis=True)
    assert judged.happened["kill replica"] >= 5
    assert not judged.aborts


@pytest.mark.slow
def test_the_command_rehearses_and_a_store_that_forgot_an_old_round_says_so(tmp_path):
    (tmp_path / "scenario.toml").write_text(SCENARIO.format(rounds=2))
    command = ["chaos", "run", str(tmp_path / "scenario.toml"), "--out", str(tmp_path / "all"), "--devices", "2", "--json"]
    done = CliRunner().invoke(app, [*command, "--faults", "network", "--seconds", "1", "--seed", "24"])
    assert done.exit_code == 0, done.output
    said = [json.loads(line) for line in done.output.splitlines()]
    assert said[0] == {"event": "seed", "seed": 24}
    assert {one["holds"] for one in said if one["event"] == "finding"} == {True, None}
    store = open_gateway_store(str(tmp_path / "all" / "fleet" / "store.sqlite"))
    store.prune(4e9, 4e9)
    store.close()
    verdicts = found(tmp_path / "all")
    assert verdicts["no acknowledged upload lost"].holds is None
    assert "4 are of rounds that it has forgotten" in verdicts["no acknowledged upload lost"].text
    assert verdicts["the model is valid"].holds is True
