"""Runs that are killed, and what tests read in their directories, meanwhile or afterwards."""

import json
import random
import signal
import time
from pathlib import Path

from fedcore_commands import Command, fedcore


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def untimed(out: Path) -> list[dict]:
    """The metrics without what the machine's speed decides."""
    return [{key: value for key, value in entry.items() if key != "timing"} for entry in metrics(out)]


def last_checkpoint(out: Path) -> bytes:
    return max((out / "checkpoints").glob("*.safetensors")).read_bytes()


def rounds(out: Path) -> int:
    """Lines that are whole."""
    file = out / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def await_rounds(out: Path, goal: int, process) -> None:
    """Until the run has done ``goal`` rounds or its ``process`` has ended."""
    deadline = time.monotonic() + 300
    while rounds(out) < goal and process.poll() is None:
        assert time.monotonic() < deadline, f"{rounds(out)} of {goal} rounds"
        time.sleep(0.002)


def killed_and_resumed(scenario: Path, out: Path, seed: object, *options: str) -> tuple[Command, int]:
    """``fedcore simulate``, killed with -9 at three moments and continued to its end: that last command, and how many kills hit.

    One moment is while it starts again, two are soon after a round, wherever the machine's speed puts them in those that follow.
    """
    draw, kills = random.Random(repr(seed)), 0
    for more in (1, 0, 2):
        goal, resume = rounds(out) + more, ["--resume"] if (out / "config.toml").exists() else []
        command = Command("simulate", scenario, "--out", out, *resume, *options)
        await_rounds(out, goal, command)
        time.sleep(draw.uniform(0, 0.05))
        command.kill()
        assert command.returncode in (0, -signal.SIGKILL), command.stderr
        kills += command.returncode == -signal.SIGKILL
    return fedcore("simulate", scenario, "--out", out, "--resume", *options), kills
