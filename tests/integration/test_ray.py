"""Workers of a Ray cluster: two nodes on this machine, as processes of their own, bound to loopback."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from fedcore_commands import COMMAND, settings
from run_directories import await_rounds, rounds, untimed

from fedcore.config import load_config
from fedcore.coordinator.assembly import assemble, build_clients
from fedcore.coordinator.run import SimulatedRun
from fedcore.errors import Refused, RoundFailed
from fedcore.grids.pool import WorkerPool
from fedcore.grids.ray_pool import RayPool
from fedcore.grids.travel import NotHere
from fedcore.grids.work import Added, Job, Work
from fedcore.native.build import BuildFailed
from fedcore.training.client import RoundTask
from fedcore.training.plan import DpSgdPlan, LocalPlan

pytest.importorskip("ray", reason="needs the extra ray")
NODES = """
import sys
from ray.cluster_utils import Cluster
small = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=small)
other = cluster.add_node(**small)
print(cluster.address, flush=True)
for command in sys.stdin:
    if command == "lose\\n":
        cluster.remove_node(other, allow_graceful=False)
    else:
        other = cluster.add_node(**small)
    print("done", flush=True)
cluster.shutdown()
"""
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}


class Nodes:
    """The cluster, and what can be done to it."""

    def __init__(self, folder: str) -> None:
        environment = os.environ | LOOPBACK | {"RAY_TMPDIR": folder}
        self.process = subprocess.Popen(
            [sys.executable, "-c", NODES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.address = self.process.stdout.readline().strip()

    def ask(self, command: str) -> None:
        """``lose`` the node that is not the head, or have it ``join`` again."""
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def actors(self) -> list[psutil.Process]:
        """Processes that are workers of ours."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::Host"):
                    found.append(process)
            except psutil.Error:
                continue
        return found


@pytest.fixture(scope="module")
def nodes():
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # the paths of sockets below it may have 107 bytes
    cluster = Nodes(folder)
    before = {key: os.environ.get(key) for key in (*LOOPBACK, "RAY_ADDRESS", "RAY_TMPDIR")}
    os.environ.update(LOOPBACK | {"RAY_ADDRESS": cluster.address, "RAY_TMPDIR": folder})
    yield cluster
    for key, value in before.items():
        os.environ.pop(key) if value is None else os.environ.__setitem__(key, value)
    cluster.process.stdin.close()
    try:
        cluster.process.wait(timeout=60)
    finally:
        cluster.process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def eventually(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


class Doing:
    """A handler whose jobs say what happens; ``missing`` names a file that only the coordinator has."""

    def __init__(self, missing: bool = False) -> None:
        self.missing, self.named = missing, False

    def packed(self, *, files):
        made = Doing()
        made.named = files and self.missing
        return Making(made)

    def __call__(self, job, shared, out):
        kind, number, place = job
        time.sleep(0.002 * ((7 * number) % 5))  # results arrive in another order than the jobs
        tried = Path(place) / f"{number}"
        if kind != "work":
            with tried.open("a") as file:
                file.write("x")
        if kind == "raise" or (kind == "raise once" and tried.stat().st_size == 1):
            raise ValueError(f"no {number}")
        if kind == "unable" or (kind == "unable once" and tried.stat().st_size == 1):
            raise BuildFailed("no compiler")
        if kind == "die" or (kind == "die once" and tried.stat().st_size == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "sleep":
            time.sleep(600)
        out[:] = shared * number
        return 2 * number


class Making:
    def __init__(self, handler) -> None:
        self.handler = handler

    def __call__(self):
        if self.handler.named:
            raise NotHere("the file is missing")
        return self.handler


@pytest.fixture
def pool(nodes):
    made = RayPool(Doing(missing=True), 3, 3)  # what a node has no file for, it is sent
    yield made
    made.close()
    eventually(lambda: not nodes.actors())


def test_units_come_back_in_order_whatever_happens_to_workers(pool, tmp_path, caplog):
    assert pool.place == "ray, 2 nodes, 2 workers"
    for scale in (1.0, 10.0):
        pool.shared[:] = [scale, 2 * scale, 0]
        kinds = dict.fromkeys(range(40), "work") | ({} if scale == 1 else {9: "raise once", 23: "die once"})
        jobs = [(kind, number, str(tmp_path)) for number, kind in kinds.items()]
        found = [(result, vector.tolist()) for result, vector in pool.map(jobs)]
        assert found == [(2 * number, [number * scale, 2 * number * scale, 0]) for number in range(40)]
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("fedcore")]
    assert len(lines) == 1
    assert "a Ray worker on 127.0.0.1 was lost; its clients go to others" in lines[0]
    assert "\n" not in lines[0]
    with pytest.raises(RoundFailed, match=r"failed on 3 workers of the Ray cluster: ValueError: no 5$"):
        list(pool.map([("work", 1, str(tmp_path)), ("raise", 5, str(tmp_path))]))
    assert (tmp_path / "5").stat().st_size == 3
    with pytest.raises(RoundFailed, match="failed on 3 workers of the Ray cluster"):
        list(pool.map([("die", 6, str(tmp_path)), ("work", 1, str(tmp_path))]))
    with pytest.raises(RoundFailed, match=r"cohort\.timeout"):
        list(pool.map([("sleep", 7, str(tmp_path))], timeout=1))


def test_a_worker_without_a_compiler_is_left_out(pool, tmp_path, caplog):
    kinds = dict.fromkeys(range(9), "work") | {4: "unable once"}
    assert [result for result, _ in pool.map([(kind, number, str(tmp_path)) for number, kind in kinds.items()])] == [
        *range(0, 18, 2)
    ]
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("fedcore")]
    assert line == "a Ray worker on 127.0.0.1 cannot train and is left out; its clients go to others (BuildFailed: no compiler)"
    with pytest.raises(RoundFailed, match=r"all workers of the Ray cluster were lost; .*: BuildFailed: no compiler$"):
        list(pool.map([("unable", 20, str(tmp_path))]))


class Several:
    """Work of several engines in one pool: a job is (which, job)."""

    def __init__(self, works) -> None:
        self.works = works

    def packed(self, *, files):
        return Unpacking([work.packed(files=files) for work in self.works])

    def __call__(self, job, shared, out):
        return self.works[job[0]](job[1], shared, out)


class Unpacking:
    def __init__(self, packed) -> None:
        self.packed = packed

    def __call__(self):
        return Several([packed() for packed in self.packed])


NETWORK = """
import torch
from parts import Body

class Net(torch.nn.Sequential):
    def __init__(self, input_shape, classes):
        super().__init__(Body(), torch.nn.Linear(64, classes))
"""
SCENARIO = """
[run]
rounds = 6
[data]
clients = 9
calibration = 64
holdout = 0.2
[model]
name = "mlp"
params = { hidden = [16] }
[quantization]
calibrate_round = 2
[cohort]
size = 7
[evaluation]
federated_every = 2
"""
PRIVATE = [
    "quantization.enabled=false", "privacy.unit=example", "privacy.noise_multiplier=1", "privacy.delta=1e-4",
    "evaluation.federated_every=0",
]  # fmt: skip


@pytest.fixture
def path(tmp_path) -> Path:
    (tmp_path / "mine.py").write_text(NETWORK)
    (tmp_path / "parts.py").write_text("import torch\n\nclass Body(torch.nn.Flatten):\n    pass\n")
    (tmp_path / "small.toml").write_text(SCENARIO)
    return tmp_path / "small.toml"


def test_every_engine_does_there_what_it_does_here_to_the_bit(nodes, path):
    compiles = assemble(load_config(path)).engine.name == "native"
    engines = ["loop", "vmap", *(["native"] if compiles else [])]
    scenarios = [[f"engine.name={engine}", *more] for engine in engines for more in ([], PRIVATE)]
    scenarios = [one for one in scenarios if one[0] != "engine.name=vmap" or one[1:]]
    scenarios += [["engine.name=loop", "model.name=mine:Net", "model.params={}", "quantization.enabled=false", "wire.update=int8"]]
    jobs, works, values = [], [], []
    for number, own in enumerate(scenarios):
        assembly = assemble(load_config(path, ["cohort.dropout=0.2", *own]))
        works.append(Work(build_clients(assembly), assembly.layout))
        start = torch.cat([p.detach().reshape(-1) for p in assembly.model.parameters() if p.requires_grad]).numpy()
        values.append(start)
        dp = assembly.protection.example
        plan = LocalPlan(1, 8, 0.1, dp=DpSgdPlan(1.0, 1.0, 1) if dp else None)
        task = RoundTask(3, plan, 10.0)
        jobs += [(number, Job(kind, unit, task)) for kind in ("train", "evaluate") for unit in ((0, 1, 2), (3,), (4, 5, 6, 7, 8))]
        if works[-1].clients.adds_up(task):
            arriving = works[-1].clients.arriving(range(9), task)
            jobs += [(number, Job("train", tuple(arriving[part]), task, whole=True)) for part in (slice(0, 2), slice(2, 9))]
    size = max(map(len, values))
    assert sum(job.whole for _, job in jobs) == (4 if compiles else 0)
    here, there = WorkerPool(1, Several(works), size, size), RayPool(Several(works), size, size)
    try:
        for pool in (here, there):
            pool.shared[:] = np.resize(values[0], size)
        expected = [(flattened(result), vector.copy()) for result, vector in here.map(jobs)]
        found = [(flattened(result), vector) for result, vector in there.map(jobs)]
    finally:
        there.close()
    for (told, vector), (other, numbers), job in zip(expected, found, jobs, strict=True):
        assert repr(told) == repr(other), job
        np.testing.assert_array_equal(vector, numbers)
    assert sum(bool(vector.any()) for vector, _ in [(v, None) for _, v in expected]) > len(jobs) // 3


def flattened(result):
    return (result.norms.tolist(), result.losses.tolist()) if isinstance(result, Added) else result


def start(path, out, *values, resume=False) -> subprocess.Popen:
    command = [*COMMAND, "simulate", path, "--out", out, *(["--resume"] if resume else [])]
    command += settings("engine.workers=ray", *values)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def complaints(errors: str) -> list[str]:
    """What a run wrote beside its progress; a cluster may take a while to find out that a killed run's CPUs are free."""
    return [line for line in errors.splitlines() if line not in {"", "waiting for a free CPU of the Ray cluster"}]


def finish(process: subprocess.Popen) -> str:
    told, errors = process.communicate(timeout=300)
    assert (process.returncode, complaints(errors)) == (0, []), errors  # nothing of Ray's own reaches the terminal
    return told


def same_as_with_two_processes(path, out, *values) -> None:
    other = out.with_name("processes")
    with SimulatedRun(load_config(path, ["engine.workers=2", *values]), other, resume=False) as run:
        list(run.rounds())
        run.finish()
    for name in ("model/model.fcm", "model/model.safetensors"):
        if (other / name).exists():
            assert (out / name).read_bytes() == (other / name).read_bytes()
    assert untimed(out) == untimed(other)
    last = max((other / "checkpoints").iterdir())
    assert (out / "checkpoints" / last.name).read_bytes() == last.read_bytes()


@pytest.mark.slow
def test_a_run_that_is_killed_and_continued_ends_as_on_this_machine_alone(nodes, path, tmp_path):
    out, values = tmp_path / "run", ["run.rounds=25"]
    process = start(path, out, *values)
    await_rounds(out, 3, process)
    process.kill()
    process.communicate()
    assert 3 <= rounds(out) < 25
    eventually(lambda: not nodes.actors())
    told = finish(start(path, out, *values, resume=True))
    assert "ray, 2 nodes, 2 workers" in told.splitlines()[0]
    assert json.loads((out / "result.json").read_text())["place"] == "ray, 2 nodes, 2 workers"
    assert "ray, 2 nodes, 2 workers" in (out / "report.html").read_text()
    same_as_with_two_processes(path, out, *values)


@pytest.mark.slow
@pytest.mark.parametrize("values", [
    ["engine.name=loop", "training.epochs=5"], [*PRIVATE, "engine.name=loop"], [*PRIVATE], ["strategy.name=fedmedian"],
    ["secagg.enabled=true", "secagg.simulate=arithmetic"], ["asynchronous.buffer=3", "fleet.median_seconds=10", "cohort.size=0"],
])  # fmt: skip
def test_an_interrupt_ends_at_once_and_the_run_goes_on_to_the_same_bits(nodes, path, tmp_path, values):
    out, values = tmp_path / "run", ["run.rounds=30", *values]
    process = start(path, out, *values)
    await_rounds(out, 3, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert ["continue with:" in line for line in complaints(errors)] == [True]
    eventually(lambda: not nodes.actors())
    assert 3 <= rounds(out) < 30
    finish(start(path, out, *values, resume=True))
    same_as_with_two_processes(path, out, *values)


@pytest.mark.slow
def test_a_node_that_is_lost_in_a_round_costs_nothing_but_time(nodes, path, tmp_path):
    out, values = tmp_path / "run", ["run.rounds=12", "engine.name=loop", "training.epochs=20"]
    process = start(path, out, *values)
    await_rounds(out, 3, process)
    try:
        nodes.ask("lose")
        before = rounds(out)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert before < 12
        assert len(errors.splitlines()) == 1, errors
        line = errors
        assert "a Ray worker on 127.0.0.1 was lost; its clients go to others" in line
        same_as_with_two_processes(path, out, *values)
    finally:
        nodes.ask("join")


@pytest.mark.slow
def test_a_node_that_lacks_something_is_left_out_with_a_line(nodes, caplog, monkeypatch):
    monkeypatch.setattr("fedcore.grids.ray_pool.__version__", "0.0.other")
    with pytest.raises(
        Refused, match=r"no worker of the cluster can begin; the last one: 127\.0\.0\.1: Refused: it has fedcore .*"
    ):
        RayPool(Doing(), 1, 1)
    eventually(lambda: not nodes.actors())
