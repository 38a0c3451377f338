"""privacy.key: noise and coins of a simulation that its seed does not tell."""

import base64
import dataclasses
import io
import json
import os
import shutil
import stat
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from fedcore.config import PrivacyConfig, load_config
from fedcore.coordinator.assembly import assemble, build_clients
from fedcore.coordinator.key import make_key, read_key
from fedcore.coordinator.run import FederatedRun, SimulatedRun
from fedcore.display import follow
from fedcore.errors import Refused
from fedcore.privacy.randomness import RootKey, derive_key
from fedcore.training.client import RoundTask
from fedcore.training.plan import LocalPlan

CLIENT = {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3, "sampling": "poisson"}
EXAMPLE = {"unit": "example", "noise_multiplier": 1.0, "delta": 1e-4}
FEW = ("quantization.enabled=false", "evaluation.every=0", "cohort.size=3")


def test_a_key_is_32_bytes_that_only_its_owner_reads(tmp_path):
    before = os.umask(0)
    try:
        make_key(tmp_path / "secret.key")
        make_key(tmp_path / "other.key")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "secret.key").stat().st_mode) == 0o600
    key = read_key(tmp_path / "secret.key")
    assert len(key) == 32
    assert key != read_key(tmp_path / "other.key")
    with pytest.raises(Refused, match="exists already; keys are never overwritten"):
        make_key(tmp_path / "secret.key")
    assert read_key(tmp_path / "secret.key") == key


def test_a_file_that_is_no_secret_key_is_refused(tmp_path):
    path = tmp_path / "secret.key"
    with pytest.raises(Refused, match="No such file"):
        read_key(path)
    with pytest.raises(Refused, match="is no file"):
        read_key(tmp_path)
    with pytest.raises(Refused, match="cannot be made"):
        make_key(tmp_path / "nowhere" / "secret.key")
    make_key(path)
    for mode in (0o640, 0o604, 0o660):
        path.chmod(mode)
        with pytest.raises(Refused, match=f"others may read this key .mode {mode:o}."):
            read_key(path)
    path.chmod(0o600)
    path.write_bytes(b"x" * 31)
    with pytest.raises(Refused, match="holds 31 bytes, a key has 32"):
        read_key(path)


def test_what_derives_from_a_root_key():
    seeded, keyed = RootKey.of_seed(7), RootKey.of_key(b"k" * 32, "run")
    assert seeded.derive("steps", 3, 5) == derive_key("steps", 7, "", 3, 5)
    assert keyed.derive("steps", 3, 5) == derive_key("steps", b"k" * 32, "run", 3, 5)
    places = [keyed.derive(*place) for place in (("steps", 3, 5), ("batches", 3, 5), ("steps", 5, 3), ("coins", 3))]
    places += [RootKey.of_key(b"k" * 32, "other").derive("steps", 3, 5), RootKey.of_key(b"j" * 32, "run").derive("steps", 3, 5)]
    assert len(set(places)) == 6
    assert seeded.fingerprint == ""
    assert len({keyed.fingerprint, RootKey.of_key(b"k" * 32, "other").fingerprint}) == 2, "salted with the run"
    assert "k" * 32 not in repr(keyed), "it may stand in a traceback"


@pytest.fixture
def keyed(scenario, tmp_path):
    """A private scenario with a key beside it."""
    make_key(tmp_path / "secret.key")

    def make(*units, settings=()):
        config = scenario(*FEW, *settings)
        return dataclasses.replace(config, privacy=tuple(PrivacyConfig(**{"key": "secret.key", **unit}) for unit in units))

    return make


def finished(config, directory, *, resume=False):
    """Master, cohorts and metrics of a run."""
    with SimulatedRun(config, directory, resume=resume) as run:
        list(run.rounds())
        rows = [{key: value for key, value in row.items() if key != "timing"} for row in run._history]
        return run.coordinator.progress.master, rows


def cohorts(directory):
    return [json.loads(line)["cohort"] for line in (directory / "operator.jsonl").read_text().splitlines()]


def test_a_resumed_run_repeats_with_its_key_and_is_refused_with_another(keyed, tmp_path):
    config = keyed(CLIENT, EXAMPLE)
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    with SimulatedRun(config, whole, resume=False) as run:
        rounds = run.rounds()
        next(rounds)
        rounds.close()
    shutil.copytree(whole, torn)
    expected, rows = finished(config, whole, resume=True)
    again, same = finished(config, torn, resume=True)
    assert (again == expected).all()
    assert same == rows
    assert cohorts(torn) == cohorts(whole)
    secret = tmp_path / "secret.key"
    secret.unlink()
    with pytest.raises(Refused, match=r"secret.key: the key cannot be read"):
        SimulatedRun(config, torn, resume=True)
    make_key(secret)
    with pytest.raises(Refused, match=r"--resume: privacy.key holds another key than the one that the run began with"):
        SimulatedRun(config, torn, resume=True)
    with pytest.raises(Refused, match=r"privacy.client.key is '', the run in"):
        SimulatedRun(keyed({**CLIENT, "key": ""}, {**EXAMPLE, "key": ""}), torn, resume=True)


@pytest.mark.parametrize("units", [(CLIENT,), (EXAMPLE,), (CLIENT, {**EXAMPLE, "key": ""})], ids=["client", "example", "both"])
def test_the_seed_tells_neither_noise_nor_coins_of_a_run_with_a_key(keyed, tmp_path, units):
    settings = ["run.rounds=1", "cohort.size=0"] if len(units) == 1 and units[0]["unit"] == "example" else ["run.rounds=2"]
    open_ones = [{**unit, "key": ""} for unit in units]
    seeded = [finished(keyed(*open_ones, settings=settings), tmp_path / f"seeded-{n}")[0] for n in range(2)]
    own = [finished(keyed(*units, settings=settings), tmp_path / f"keyed-{n}")[0] for n in range(2)]
    assert (seeded[0] == seeded[1]).all()
    for one in (seeded[0], own[1]):
        assert (own[0] != one).mean() > 0.9, "noise on every coordinate is another, also from run to run under one key"
    if units[0]["unit"] == "client":
        assert cohorts(tmp_path / "seeded-0") == cohorts(tmp_path / "seeded-1")
        drawn = {str(cohorts(tmp_path / name)) for name in ("seeded-0", "keyed-0", "keyed-1")}
        assert len(drawn) == 3, "the coins are others"


def test_whoever_knows_the_seed_takes_the_noise_off_only_without_a_key(keyed, tmp_path):
    """The attack that the words of a run without a key warn of: noise computed from the seed, subtracted from the release."""
    whole = {"unit": "client", "noise_multiplier": 5.0, "delta": 1e-3}
    left = {}
    for key in ("", "secret.key"):
        config = keyed({**whole, "key": key}, settings=["run.rounds=1", "cohort.size=0", "training.lr=1e-9"])
        start = assemble(config)
        named = {name: p.detach().numpy() for name, p in start.model.named_parameters()}
        moved = finished(config, tmp_path / f"run-{key}")[0] - start.layout.join(named)
        release = start.protection.client.release(1, 1.0)
        task = RoundTask(1, LocalPlan(1, 16, 1e-9), 10.0, release=release)
        guess = release.publish(np.zeros(release.size), 6, build_clients(start).noise(task)).update
        left[key] = np.linalg.norm(moved - guess) / np.linalg.norm(moved)
    assert left[""] < 1e-3, "nothing but the rounding of float32 is left"
    assert left["secret.key"] > 1.2


def test_the_key_is_in_no_file_of_a_run_and_the_words_say_what_protects(keyed, tmp_path, capfd):
    config, out = keyed(CLIENT, EXAMPLE, settings=["run.rounds=1"]), tmp_path / "run"
    with SimulatedRun(config, out, resume=False) as run:
        follow(run, Console(file=io.StringIO()), as_json=True)
        result = run.finish()
        shown = repr(vars(run)) + repr(run.assembly) + repr(vars(run.grid._clients))
    key = (tmp_path / "secret.key").read_bytes()
    forms = [key, key.hex().encode(), base64.b64encode(key)[:-1], repr(key).encode()]
    told = capfd.readouterr()
    contents = [path.read_bytes() for path in out.rglob("*") if path.is_file()]
    assert len(contents) > 8
    for content in (*contents, told.out.encode(), told.err.encode(), shown.encode()):
        assert not any(form in content for form in forms)
    assert load_config(out / "config.toml").privacy[0].key == "secret.key", "where it lies is no secret"
    for unit in ("client", "example"):
        words = result["privacy"][unit]["statement"]["not_concluded"]
        assert "derive from a secret key (privacy.key)" in words[-1]
        assert not any("Whoever knows the seed, which" in text for text in words)
    page = " ".join((out / "report.html").read_text().split())
    assert "derive from a secret key (privacy.key)" in page
    assert "has to be trusted" in page


def test_without_a_key_the_words_name_the_seed(keyed, tmp_path):
    with SimulatedRun(keyed({**CLIENT, "key": ""}, settings=["run.rounds=1"]), tmp_path / "run", resume=False) as run:
        list(run.rounds())
        (words,) = (one["statement"]["not_concluded"] for one in run.finish()["privacy"].values())
    assert "Whoever knows the seed, which stands in the run's files, can take the noise off" in words[-1]


def test_a_key_that_cannot_be_used_is_refused_before_anything_is_begun(keyed, tmp_path):
    out = tmp_path / "run"
    (tmp_path / "secret.key").chmod(0o644)
    with pytest.raises(Refused, match="others may read this key"):
        SimulatedRun(keyed(CLIENT), out, resume=False)
    assert not out.exists()
    (tmp_path / "secret.key").chmod(0o600)
    elsewhere = SimpleNamespace(simulated=False, close=lambda: None)
    with pytest.raises(Refused, match=r"privacy.key is for simulations"):
        FederatedRun(keyed(CLIENT), out, lambda _: elsewhere, resume=False)
    assert not out.exists()


def test_both_units_share_one_key(scenario, tmp_path):
    path = tmp_path / "two.toml"
    tables = "".join(
        f'[[privacy]]\nunit = "{unit}"\nnoise_multiplier = 1.0\ndelta = 1e-4\nkey = "{key}"\n'
        for unit, key in (("client", "a.key"), ("example", "{}"))
    )
    base = "[data]\nclients = 6\n"
    path.write_text(base + tables.replace("{}", "./a.key"))
    assert load_config(path).key_file() == tmp_path / "a.key"
    path.write_text(base + tables.replace("{}", "b.key"))
    with pytest.raises(Refused, match=r"both units share one key, privacy.key names .*a.key and .*b.key"):
        load_config(path)
    path.write_text(base + tables.replace("{}", ""))
    assert load_config(path).key_file() == tmp_path / "a.key"
    assert scenario().key_file() is None
