import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def benchmark(*arguments):
    command = [sys.executable, "-m", "simulations.benchmarks.gateway", "--json", *arguments]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(finished.stdout)


def test_real_clients_on_two_gateways_add_up_exactly():
    found = benchmark("--devices", "20", "--gateways", "2", "--seconds", "0.5", "--upload-bytes", "20000")
    keys = ("checkins_per_second", "fresh_checkins_per_second", "uploads_per_second", "p99_ms", "bytes_per_waiting_device")
    assert all(found[key] > 0 for key in keys)
    assert found["sum_is_right"] is True


def test_pace_is_measured_against_the_mean():
    found = benchmark("--pace", "--devices", "20000")
    assert found["unanswered"] > 0
    for key in ("peak_to_mean", "peak_to_mean_with_outage", "peak_to_mean_after_outage", "peak_to_mean_after_switch_on"):
        assert 1 <= found[key] < 1.5
