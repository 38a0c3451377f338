"""`make demo-all`: its parts, and the whole of it over device processes (slow)."""

import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

pytest.importorskip("fedcore_device", reason="the device's package is not installed: pip install -e clients/linux")
if importlib.util.find_spec("seglearn") is None:  # importing it would need pandas, which the recordings do not
    pytest.skip("the smartwatch recordings come with seglearn: pip install seglearn", allow_module_level=True)

from fedcore.config import load_config
from fedcore.coordinator.run import SimulatedRun

sys.path.insert(0, str(Path(__file__).parents[2]))
from simulations.all import people
from simulations.all.__main__ import SCENARIO
from simulations.all.fleet import Processes
from simulations.all.twins import SIMULATED, Row, equal_bits, of_run

ROOT = Path(__file__).parents[2]


def twin(folder, name):
    """A short run of one step, in this process."""
    (folder / "people.py").write_bytes(Path(people.__file__).read_bytes())
    scenario = folder / "twins.toml"
    scenario.write_text(SCENARIO.format(rounds=2, calibrate=1))
    (step,) = (one for one in SIMULATED if one.name == name)
    place = folder / name
    with SimulatedRun(load_config(scenario, [*step.settings, "training.epochs=1", "engine.workers=1"]), place, resume=False) as run:
        for _ in run.rounds():
            pass
        run.finish()
    return place


def test_masks_change_no_bit_and_the_integers_under_them_do(tmp_path):
    summed, masked, plain = (twin(tmp_path, name) for name in ("+ integers of a sum", "+ masks", "+ DP-SGD"))
    assert equal_bits(summed, masked)
    assert not equal_bits(plain, summed)
    told = [json.loads((one / "result.json").read_text()) for one in (summed, masked)]
    assert told[0]["int8_accuracy"] == told[1]["int8_accuracy"]
    assert told[1]["bytes_up"] > told[0]["bytes_up"], "shares and proofs travel with masks alone"
    row = of_run("+ masks", of_run("", None, told[0], ""), told[1], "")
    assert row.points == 0.0


def test_held_out_recordings_are_those_of_the_test_and_of_nobody_s_training():
    train, test = people.windows(test=False), people.windows(test=True)
    parts = [people.held_out(person) for person in range(people.PEOPLE)]
    assert sum(len(x) for x, _ in parts) == len(test.x)
    assert min(len(x) for x, _ in parts) > 50
    for person, (x, y) in enumerate(parts):
        np.testing.assert_array_equal(x, test.x[test.person == person])
        np.testing.assert_array_equal(y, test.y[test.person == person])
    # Windows overlap by half: the second half of one is the first of the next one of its recording, and of no other.
    tails = {window[:, 50:].tobytes() for window in test.x} | {window[:, :50].tobytes() for window in test.x}
    assert not any(window[:, :50].tobytes() in tails or window[:, 50:].tobytes() in tails for window in train.x)
    dataset = people.eight_watches()
    raw = dataset.test.x * np.array(dataset.std)[:, None] + np.array(dataset.mean)[:, None]
    np.testing.assert_allclose(raw, test.x, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(np.unique(dataset.groups), np.arange(people.PEOPLE))


def test_a_row_is_per_device_and_round_and_of_the_model_that_travels():
    result = {"accuracy": 0.8, "int8_accuracy": 0.79, "rounds": 2, "bytes_up": 1600, "bytes_down": 3200, "seconds": 1.5}
    against = Row("before", "", 0.8, None, None, None, None, "")
    row = of_run("step", against, result, "a note")
    assert (row.against, row.accuracy, row.up, row.down) == ("before", 0.79, 100.0, 200.0)
    assert row.points == pytest.approx(-1.0)
    assert of_run("fp32", None, result | {"int8_accuracy": None}, "").accuracy == 0.8


def test_ctrl_c_ends_every_process_and_what_those_started(tmp_path):
    nested = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    nested += "print('ready', flush=True); time.sleep(600)"
    family = []

    def interrupted():
        with Processes(tmp_path) as processes:
            process = processes.start("nest", [sys.executable, "-c", nested], piped=True)
            assert process.stdout.readline() == "ready\n"
            family.extend([psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    gone, alive = psutil.wait_procs(family, timeout=60)
    assert len(gone) == 2
    assert not alive


def test_a_process_that_ended_is_told_with_its_last_words(tmp_path):
    with Processes(tmp_path) as processes:
        processes.start("short", [sys.executable, "-c", "import sys; sys.exit('out of luck')"]).wait(60)
        with pytest.raises(SystemExit, match="short ended with code 1: out of luck"):
            processes.check()


def left_in(folder):
    """Processes that work in a folder or were started for it."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = " ".join(process.info["cmdline"] or ())
        if str(folder) in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(words)
    return found


def begun(folder, *options):
    command = [sys.executable, "-m", "simulations.all", "--json", "--out", str(folder), *options]
    with (folder.parent / "errors.log").open("w") as errors:
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)


@pytest.mark.slow
def test_the_demonstration_itself(tmp_path):
    folder = tmp_path / "all"
    process = begun(folder)
    events = [json.loads(line) for line in process.stdout]
    process.stdout.close()
    assert process.wait(60) == 0, (tmp_path / "errors.log").read_text()[-3000:]
    told = events[-1]
    rows = {row["name"]: row for row in told["rows"]}
    assert told["masks_equal_bits"]
    assert rows["+ masks"]["points"] == 0.0
    assert rows["+ QAT, int8"]["points"] >= -1.0
    assert told["int8_points_lost"] <= 1.0
    assert rows["+ QAT, int8"]["down"] < rows["fp32"]["down"] / 3.5
    assert 0 < told["epsilon"] < 20
    assert "epsilon" in rows["+ DP-SGD"]["note"]
    assert rows["8 watches"]["accuracy"] > 0.4
    assert {row["gate"] for row in told["gates"]} == {"pass"}
    assert told["agreement"] >= 0.995
    assert [app["version"] for app in told["apps"]] == [2] * 8
    second = told["release"]["second"]
    assert (told["release"]["canaries"], told["release"]["held_by"]) == (2, 2)
    assert len(second["deltas"]) == len(second["artefacts"])
    assert sum(second["deltas"]) < sum(second["artefacts"].values())
    assert left_in(folder) == []


@pytest.mark.slow
def test_ctrl_c_while_devices_work_leaves_no_process(tmp_path):
    folder = tmp_path / "all"
    process = begun(folder, "--rounds", "2")
    for line in process.stdout:
        if "watches enrol" in line:
            break
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 130, (tmp_path / "errors.log").read_text()[-3000:]
    assert left_in(folder) == []
