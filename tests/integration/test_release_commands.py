"""Releases from a run to a fleet's store: by the commands, and by a coordinator that publishes by itself."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fedcore.cli import app
from fedcore.config import load_config, parse_config
from fedcore.coordinator import publishing
from fedcore.coordinator.fleet import FleetFolder
from fedcore.coordinator.publishing import unfit
from fedcore.coordinator.release_service import pin_root, place_and_keys
from fedcore.coordinator.release_status import attend
from fedcore.coordinator.releases import Registry
from fedcore.coordinator.rollouts import Deployment
from fedcore.coordinator.run import SimulatedRun
from fedcore.errors import Refused
from fedcore.gateway.deployment import make_fleet
from fedcore.gateway.identity import spell
from fedcore.registry.catalogue import SELF_TEST
from fedcore.registry.files import open_files
from fedcore.registry.journal import check_chain
from fedcore.registry.repository import load
from fedcore.registry.rollout import arm_of
from fedcore.state.releases import Holding, Membership, Visit, Worst
from fedcore.state.stores import open_gateway_store

SCENARIO = """
[run]
name = "digits"
rounds = 2
seed = 3
[data]
clients = 4
partition = "iid"
[model]
name = "mlp"
[training]
lr = 0.2
[tiers.flagship]
targets = ["onnx"]
accuracy_loss = 20.0
{tier}
{release}
"""
FINE = {"disagreement": 0.02, "errors": 0.0, "crash": 0.0, "p95_ms": 10.0, "peak_bytes": 5e6}


def command(*arguments, code=0):
    found = CliRunner().invoke(app, [str(one) for one in arguments])
    assert found.exit_code == code, (arguments, found.output, found.stderr, found.exception)
    return found.stdout if code == 0 else found.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a repository and its keys, a scenario, and a fleet's folder whose repository it is."""
    folder = tmp_path_factory.mktemp("releases")
    command("registry", "init", folder / "repository", "--offline", folder / "offline", "--online", folder / "online", "--roots", 1,
            "--threshold", 1, "--publish-by-itself")  # fmt: skip
    make_fleet(folder / "fleet" / "fleet", "digits")
    (folder / "fleet" / "gateway.json").write_text(json.dumps({"repository": str(folder / "repository")}))
    return folder


def scenario(place, name, tier="", release=""):
    path = place / f"{name}.toml"
    path.write_text(SCENARIO.format(tier=tier, release=release))
    return path


def not_json(word):
    raise AssertionError(f"{word} is no JSON")


def finished(path, out):
    with SimulatedRun(load_config(path), out, resume=False) as run:
        rounds = list(run.rounds())
        return rounds, run.finish()


def repository(place, name="repository"):
    return load(open_files(str(place / name))).catalogue()


def visit(place, rollout, device, version, values=None):
    """A device that joins its arm and reports, as a gateway writes it down."""
    deployment = Deployment.of(place / "fleet")
    with deployment.control() as control:
        state = control.running("digits").state
        known = (control.running("digits").entry.name, control.running("digits").entry.revision)
        held, arm = Holding(device, "digits", version, seen=control._clock()), arm_of(state, spell(device))
        joining = Membership(device, arm, "other", held.seen, held.seen + state.plan.window) if arm else None
        reports = (Worst(rollout, arm, values(arm)),) if arm and values else ()
        store = control._store.releases
        store.visit(Visit(held, known, joining, 10**6))
        store.visit(Visit(held, known, None, 0, reports))


def test_the_commands_from_an_export_to_a_rollback(place, monkeypatch):
    run, fleet, keys = place / "run", ("--fleet", place / "fleet"), ("--keys", place / "online")
    finished(scenario(place, "plain"), run)
    assert "holds no export" in command("release", "create", run, *fleet, *keys, code=2)
    command("export", run)
    made = json.loads(command("release", "create", run, *fleet, *keys, "--json"))
    assert (made["model"], made["version"], list(made["artefacts"])) == ("digits", 1, ["flagship/onnx"])
    entry = repository(place).self_test("digits", 1)
    batch = np.load(place / "repository" / f"targets/releases/digits/1/self-test/{entry.digest.hex()}.batch.npz")
    assert (entry.kind, batch["x"].dtype, batch["x"].shape[1:], batch["y"].shape) == (SELF_TEST, np.float32, (1, 8, 8), (64,))
    assert command("release", "start", *fleet) == "digits-1: the first release of digits goes to all devices\n"
    for device in range(30):
        visit(place, "digits-1", device, 1)
    assert "has no rollout" not in command("release", "status", *fleet)
    assert "is not above 1" in command("release", "start", *fleet, code=2)
    assert "release 2 of digits" in command("release", "create", run, *fleet, *keys)
    assert "is no share" in command("release", "start", *fleet, "--canary", "5 percent", code=2)
    begun = command(
        "release", "start", *fleet, "--canary", "40%", "--stages", "", "--control", "60%", "--corrupt", "0", "--window", 1
    )
    assert begun == "digits-2: 40.0% of 30 devices first; 1 stays with the others\n"
    for device in range(30):
        visit(place, "digits-2", device, 2, lambda arm: {**FINE, "disagreement": 0.9 if arm == "canary" else 0.02})
    held = json.loads(command("release", "status", *fleet, "--json"))
    assert (held["phase"], held["exposed"], held["arms"]["control"]["reported"]) == ("running", 12, 18)
    assert held["versions"] == {"2": 30}
    assert "digits-2 is paused" in command("release", "pause", *fleet)
    assert "digits-2 is running" in command("release", "resume", *fleet)
    assert "--why" in command("release", "abort", *fleet, code=2)
    rows = json.loads(command("release", "compare", 1, 2, *fleet, "--json"), parse_constant=not_json)
    assert [row["difference"] for row in rows["rows"] if row["signal"] == "joules"] == [[0.0, None]]
    assert rows["side_by_side"]
    assert {row["signal"]: row["verdict"] for row in rows["rows"]}["disagreement"] == "A better"
    assert "A better" in command("release", "compare", 1, 2, *fleet)
    assert "no device reported on release 7" in command("release", "compare", 1, 7, *fleet, code=2)
    back = command("release", "rollback", *fleet, *keys, "--why", "it is worse", "--by", "ops")
    assert back == "release 3 of digits has the old content\n"
    catalogue = repository(place)
    assert catalogue.digest("digits", 3) == catalogue.digest("digits", 1)
    held = json.loads(command("release", "status", *fleet, "--json"))
    assert (held["phase"], held["fallback"]) == ("aborted", 3)
    data = (place / "fleet" / "releases.jsonl").read_bytes()
    check_chain(data)
    events = [(json.loads(line)["rollout"], json.loads(line)["event"], json.loads(line)["by"]) for line in data.splitlines()]
    assert [event for _, event, _ in events] == ["start", "start", "pause", "resume", "abort", "roll back"]
    assert events[-1] == ("digits-2", "roll back", "ops")


def test_a_decision_loop_aborts_and_takes_back(place):
    fleet, keys = ("--fleet", place / "fleet"), ("--keys", place / "online")
    command("release", "create", place / "run", *fleet, *keys)
    command("release", "start", *fleet, "--canary", "40%", "--stages", "", "--control", "60%", "--corrupt", "0", "--window", 1)
    deployment = Deployment.of(place / "fleet")
    for device in range(30):
        visit(place, "digits-4", device, 4, lambda arm: {**FINE, "crash": 1.0 if arm == "canary" else 0.0})
    registry = Registry.open(deployment.repository, [place / "online"])
    with deployment.control() as control:
        assert attend(control, "digits", registry) == ""  # windows are open
        now = control._clock() + 2
        control._clock = lambda: now
        done = attend(control, "digits", registry)
        assert done == "digits-4: aborted, by crash; 12 devices were exposed; digits-4: release 5 has the content of 3"
        assert attend(control, "digits", registry) == ""
    catalogue = repository(place)
    assert catalogue.digest("digits", 5) == catalogue.digest("digits", 1)


@pytest.fixture
def in_process(monkeypatch):
    """The publisher's export without a new process, which spends three quarters of its time on imports; the slow test has one."""
    threads = torch.get_num_threads()

    def run(command, **_):
        assert command[:3] == [sys.executable, "-m", "fedcore.coordinator.publishing"]
        monkeypatch.setattr(sys, "argv", command[2:])
        publishing._main()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(publishing.subprocess, "run", run)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_coordinator_publishes_every_round_and_at_the_end_and_starts_rollouts(place, tmp_path, monkeypatch):
    keys = place / "online"
    release = f'[release]\nregistry = "repository"\nkeys = "{keys}"\nevery = 1\nself_test = 16\nmodel = "byitself"'
    path = scenario(place, "publishing", release=release)
    monkeypatch.setattr(SimulatedRun, "_fleet", lambda self: place / "fleet")
    rounds, result = finished(path, tmp_path / "run")
    assert rounds[0]["hint"] == "round 1 is release 1 of byitself; rollout byitself-1 has begun"
    assert "hint" not in rounds[1]
    # The second has a canary of nobody in a fleet of none: published, not rolled out, and the run ends as it should.
    assert result["release"].startswith("round 2 is release 2 of byitself; its rollout has not begun: of ")
    found = [json.loads(line) for line in (tmp_path / "run" / "releases.jsonl").read_text().splitlines()]
    assert [(one["version"], one["rollout"]) for one in found] == [(1, "byitself-1"), (2, "")]
    catalogue = repository(place)
    assert catalogue.latest("byitself") == 2
    assert catalogue.digest("byitself", 1) != catalogue.digest("byitself", 2)


def test_a_model_whose_gates_fail_is_never_released_and_the_run_ends_as_it_should(place, tmp_path, in_process):
    release = f'[release]\nregistry = "repository"\nkeys = "{place / "online"}"\nmodel = "unfit"'
    rounds, result = finished(scenario(place, "unfit", tier="bytes = 10", release=release), tmp_path / "run")
    assert len(rounds) == 2
    assert "round 2 is not released: gates failed: flagship onnx: " in result["release"]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["release"] == result["release"]
    (row,) = json.loads((tmp_path / "run" / "export" / "export.json").read_text())["rows"]
    assert (row["status"], row["gate"]) == ("exported", "fail"), "a real file, that is too large"
    assert repository(place).latest("unfit") == 0


def test_what_is_unfit():
    config = load_config_of('[tiers.flagship]\ntargets = ["onnx"]')
    row = {"tier": "flagship", "target": "onnx", "gate": "pass", "status": "exported", "reason": ""}
    missing = {**row, "status": "missing", "gate": "", "reason": "no onnx"}
    assert unfit([row], config, ("flagship",)) == []
    assert unfit([row, {**row, "gate": "fail", "reason": "slow"}], config, ("flagship",)) == ["flagship onnx: slow"]
    assert unfit([{**row, "tier": "entry", "gate": "fail"}], config, ("flagship",)) == []
    assert unfit([missing], config, ("flagship",)) == ["flagship onnx: no onnx"]
    assert unfit([{**missing, "target": "micro"}], config, ("flagship",)) == []  # nobody asked for it


def load_config_of(text):
    return parse_config(tomllib.loads(text) | {"data": {"clients": 2}}, "test", Path())


def test_a_publisher_without_keys_or_a_repository_ends_the_run_before_it_begins(place, tmp_path):
    for number, (registry, keys, said) in enumerate((
        ("nowhere", place / "online", "no repository"), ("repository", tmp_path / "none", "holds no key"),
    )):  # fmt: skip
        release = f'[release]\nregistry = "{registry}"\nkeys = "{keys}"'
        config = load_config(scenario(place, f"wrong{number}", release=release))
        with pytest.raises(Refused, match=said):
            SimulatedRun(config, tmp_path / f"run{number}", resume=False)
        assert not (tmp_path / f"run{number}").exists()


def test_a_fleet_pins_the_root_before_its_devices_enrol(place, tmp_path):
    fleet, where = make_fleet(tmp_path / "fleet", "digits"), str(place / "repository")
    with pytest.raises(Refused, match="holds no repository"):
        pin_root(fleet, str(tmp_path / "none"))
    pin_root(fleet, where)
    assert fleet.trust().update_root == (place / "repository" / "metadata" / "1.root.json").read_bytes()
    pin_root(fleet, where)
    command("registry", "init", tmp_path / "other", "--offline", tmp_path / "off", "--online", tmp_path / "on")
    with pytest.raises(Refused, match="root of another repository"):
        pin_root(fleet, str(tmp_path / "other"))


def test_a_fleet_that_another_serves_pins_what_it_did(place, tmp_path):
    folder = FleetFolder.open(tmp_path / "fleet", "digits")
    before = folder.fleet.trust_file.read_bytes()
    arguments = ("serve", scenario(place, "second"), "--fleet", folder.directory, "--registry", place / "repository")
    with folder.served():
        said = command(*arguments, "--listen", "127.0.0.1:0", "--out", tmp_path / "run", code=1)
    assert "another fedcore serve works on" in said
    assert folder.fleet.trust_file.read_bytes() == before
    pin_root(folder.fleet, str(place / "repository"))
    assert folder.fleet.trust_file.read_bytes() != before


def test_devices_that_pin_no_root_are_told_what_to_do(place, tmp_path):
    from fedcore.gateway.identity import enrolment_request
    from fedcore.secagg.crypto import Ed25519Key

    fleet = make_fleet(tmp_path / "fleet", "digits")
    signer = fleet.signer()
    signer.enrol(enrolment_request(signer.issue(60), Ed25519Key(b"d" * 32), bytes(16)))
    signer.close()
    with pytest.raises(Refused, match=r"1 devices .* pin no root.*enrol them in a new fleet"):
        pin_root(fleet, str(place / "repository"))
    assert fleet.trust().update_root == b""


def test_a_command_and_a_scenario_name_one_repository(place, tmp_path, monkeypatch):
    release = f'[release]\nregistry = "repository"\nkeys = "{place / "online"}"'
    config = load_config(scenario(place, "both", release=release))
    assert place_and_keys(config, "", []) == (str(place / "repository"), [place / "online"])
    assert place_and_keys(config, str(place / "repository"), [tmp_path]) == (str(place / "repository"), [tmp_path])
    with pytest.raises(Refused, match="devices read from one repository"):
        place_and_keys(config, str(tmp_path), [])
    plain = load_config(scenario(place, "neither"))
    assert place_and_keys(plain, "", []) == ("", [])
    assert place_and_keys(plain, "s3://releases", []) == ("s3://releases", [])


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ('every = 3', "no meaning without release.registry"), ('registry = "r"', "release.keys must be given"),
        ('registry = "r"\nkeys = "k"\ncanary = "5 percent"', "is no share"),
        ('registry = "r"\nkeys = "k"\nstages = ["50%", "20%"]', "must rise"),
        ('registry = "r"\nkeys = "k"\ncontrol = "60%"', "leave the last"),
        ('registry = "r"\nkeys = "k"\nbudgets = {p95_ms = "fast"}', "above 0"),
    ],
)  # fmt: skip
def test_a_scenario_that_makes_no_sense_is_one_line(tmp_path, keys, said):
    path = tmp_path / "wrong.toml"
    path.write_text(SCENARIO.format(tier="", release=f"[release]\n{keys}"))
    with pytest.raises(Refused, match=said):
        load_config(path)


def test_the_store_of_a_fleet_keeps_what_the_commands_did(place):
    store = open_gateway_store(str(place / "fleet" / "store.sqlite"))
    names = [one.name for one in store.releases.rollouts()]
    store.close()
    assert [name for name in names if name.startswith("digits")] == ["digits-1", "digits-2", "digits-4"]


def test_promote_needs_no_words_and_goes_to_the_next_stage_and_keep_withdraws_nothing_that_is_needed(place):
    fleet, keys = ("--fleet", place / "fleet"), ("--keys", place / "online")
    assert "is aborted: promote is possible when it is running or paused" in command("release", "promote", *fleet, code=2)
    begin = ("--canary", "20%", "--stages", "30%,40%", "--control", "60%", "--corrupt", "0", "--window", 1000, "--keep-rollouts", 2)
    command("release", "create", place / "run", *fleet, *keys, "--self-test", 0)
    version = repository(place).latest("digits")
    said = command("release", "start", *fleet, *begin).splitlines()
    assert said[1] == "agreement is not compared: not both releases have a self-test batch"
    for stage in ("stage 2 of 3 (30%)", "stage 3 of 3 (40%)"):
        assert command("release", "promote", *fleet) == f"digits-{version} is running, {stage}\n"
    held = json.loads(command("release", "status", *fleet, "--json"), parse_constant=not_json)
    assert (held["stage"], "disagreement" in {one["signal"] for one in held["tests"]}) == (2, False)
    command("release", "create", place / "run", *fleet, *keys, "--keep", 1)
    assert {one for _, one in repository(place).releases()} == {held["baseline"], version, version + 1}
    elsewhere = ("--fleet", place / "nowhere", "--registry", place / "repository")
    said = command("release", "create", place / "run", *elsewhere, *keys, "--keep", 1, code=2)
    assert "no fleet says which of them its rollouts need" in said
    assert command("release", "promote", *fleet) == f"digits-{version} is full\n"
    last = json.loads((place / "fleet" / "releases.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["why"], bool(last["by"])) == ("promote", "by hand", True)
    assert "evidence" in last
    with Deployment.of(place / "fleet").control() as control:
        assert len(control.all_of("digits")) == 2
