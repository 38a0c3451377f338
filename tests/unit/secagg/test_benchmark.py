import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def benchmark(*arguments: str) -> dict:
    command = [sys.executable, "-m", "simulations.benchmarks.secagg", "--json", *arguments]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(finished.stdout)


# Six neighbours need a survivor in every window of three, which no two that drop can empty: the circle's order is random.
@pytest.mark.parametrize(("extra", "dropped"), [(("--width", "16"), 4), (("--width", "20", "--neighbours", "6", "--cpu-time"), 2)])
def test_the_benchmarks_round_is_exact(extra, dropped):
    result = benchmark("--clients", "16", "--params", "1001", "--drop", str(dropped / 16), "--no-flower", *extra)
    assert result["exact"] is True
    assert result["dropped"] == dropped
    assert result["neighbours"] == (15 if "--neighbours" not in extra else 6)
    assert 1001 * int(extra[1]) // 8 < result["upload_bytes"] < 1001 * 4 + 10_000
    assert set(result["client_ms"]) == {"total", "keys", "masks", "shares", "boxes", "other"}
    assert set(result["server_seconds"]) == {"total", "verify", "sum", "reconstruct", "unmask"}


@pytest.mark.slow
def test_flowers_primitives_do_the_same_work():
    result = benchmark("--clients", "12", "--params", "1000", "--drop", "0.25")
    assert result["flower_upload_bytes"] > 2 * 1000 * 16 // 8
    assert result["flower_client_ms"] > 0
    assert result["flower_server_seconds"] > 0
