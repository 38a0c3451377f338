"""What a user is told who has no Ray, or no cluster; with one, tests/integration/test_ray.py."""

import sys

import pytest

from fedcore.coordinator.run import SimulatedRun
from fedcore.errors import Refused
from fedcore.grids.ray_cluster import join_cluster


@pytest.fixture(autouse=True)
def nowhere(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.parametrize(("address", "parts"), [
    ("", ["no Ray cluster is running here", "ray start --head", "RAY_ADDRESS"]),
    ("auto", ["no Ray cluster is running here"]),
    ("127.0.0.1:1", ["no Ray cluster answers at 127.0.0.1:1", "ray start"]),
    ("ray://127.0.0.1:10001", ["HOST:PORT, not a ray:// address"]),
    ("somewhere", ["must be HOST:PORT"]),
])  # fmt: skip
def test_where_no_cluster_is_one_line_says_how_to_start_one(monkeypatch, address, parts):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(Refused) as refusal:
        join_cluster()
    assert "\n" not in str(refusal.value)
    for part in parts:
        assert part in str(refusal.value)


def test_a_cluster_that_ended_is_not_waited_for(tmp_path):
    pytest.importorskip("ray")
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    with pytest.raises(Refused, match=r"no Ray cluster answers at 127\.0\.0\.1:1"):
        join_cluster()


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(Refused, match=r'pip install "fedcore\[ray\]"'):
        join_cluster()


MASKED = ["secagg.enabled=true", "engine.workers=ray"]
PRIVATE = [
    "quantization.enabled=false", "privacy.unit=example", "privacy.noise_multiplier=1", "privacy.delta=1e-4",
    "engine.workers=ray", "privacy.key=secret.key",
]  # fmt: skip


@pytest.mark.parametrize(("values", "part"), [(MASKED, "keys of clients do not travel"), (PRIVATE, "key does not travel")])
def test_secrets_do_not_go_to_a_cluster(scenario, tmp_path, values, part):
    (tmp_path / "secret.key").write_bytes(bytes(range(32)))
    (tmp_path / "secret.key").chmod(0o600)
    with pytest.raises(Refused, match=part):
        SimulatedRun(scenario(*values), tmp_path / "run", resume=False)
    assert not (tmp_path / "run").exists()
