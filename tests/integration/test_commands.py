"""A command that was forked is as one that was started."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fedcore_commands import COMMAND, Command, fedcore
from run_directories import await_rounds

SCENARIO = """
[run]
rounds = 2
[data]
clients = 4
[model]
name = "mlp"
params = { hidden = [4] }
[engine]
name = "loop"
"""
LIGHT = """
import atexit, sys
heavy = ("sklearn", "scipy", "pandas", "sympy", "onnxruntime", "opacus", "matplotlib")
atexit.register(lambda: print(*[name for name in heavy if name in sys.modules], file=sys.stderr))
from fedcore.cli import main
main()
"""


@pytest.mark.parametrize("arguments", [["--version"], ["simulate", "none.toml"], ["no-such-command"]])
def test_it_says_and_returns_the_same(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "60")
    started = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False)
    forked = fedcore(*arguments)
    assert (forked.returncode, forked.stdout, forked.stderr) == (started.returncode, started.stdout, started.stderr)
    assert forked.stdout + forked.stderr


def test_environment_and_folder_are_those_of_the_moment(tmp_path, monkeypatch):
    """The data set is the user's own code, which looks around it."""
    (tmp_path / "mine.py").write_text("import os\n\ndef data():\n    raise SystemExit(str((os.getcwd(), dict(os.environ))))\n")
    (tmp_path / "own.toml").write_text(SCENARIO.replace("[data]\n", '[data]\ndataset = "mine:data"\n'))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDCORE_TEST", "one")
    assert "'FEDCORE_TEST': 'one'" in fedcore("simulate", "own.toml").stderr
    monkeypatch.setenv("FEDCORE_TEST", "two")
    monkeypatch.delenv("PYTEST_CURRENT_TEST", raising=False)  # which changes while this one goes on
    command = [*COMMAND, "simulate", "own.toml"]
    started = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, check=False)
    forked = fedcore("simulate", "own.toml")
    assert (forked.returncode, started.returncode) == (1, 1)
    found = [eval(one.stderr) for one in (forked, started)]
    assert found[0] == found[1]
    assert (found[0][0], found[0][1]["FEDCORE_TEST"]) == (str(tmp_path), "two")


def test_signals_end_it_and_it_leaves_nothing(tmp_path):
    (tmp_path / "long.toml").write_text(SCENARIO.replace("rounds = 2", "rounds = 100000"))
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, -15), (signal.SIGINT, 130)):
        out = tmp_path / str(number)
        command = Command("simulate", tmp_path / "long.toml", "--out", out, "--set", "engine.workers=2")
        await_rounds(out, 1, command)
        assert command.poll() is None, command.stderr
        workers = [int(one) for one in Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text().split()]
        assert len(workers) == 2
        command.send_signal(number)
        assert command.wait(60) == code
        assert ("continue with: fedcore simulate" in command.stderr) == (number == signal.SIGINT)
        deadline = time.monotonic() + 60
        while any(Path(f"/proc/{one}").exists() for one in workers) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not any(Path(f"/proc/{one}").exists() for one in (command.pid, *workers))


def test_its_server_has_run_nothing_and_a_run_imports_what_it_needs_alone(tmp_path):
    """A fresh process gives the same model, in which str's hashes have another seed."""
    (tmp_path / "small.toml").write_text(SCENARIO)
    done = fedcore("simulate", tmp_path / "small.toml", "--out", tmp_path / "forked")
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-c", LIGHT, "simulate", tmp_path / "small.toml", "--out", tmp_path / "started"]
    started = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONHASHSEED": "7"})
    models = [(tmp_path / name / "model" / "model.fcm").read_bytes() for name in ("forked", "started")]
    assert models[0] == models[1]
    assert started.stderr.split() == ["onnxruntime"]
