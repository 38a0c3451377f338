"""The cache of compiled code: what is loaded is what was built, by this user, and verified."""

import contextlib
import ctypes
import os
import resource
import stat
import sys

import numpy as np
import pytest
import torch
from small_zoo import network, updates, why_no_compiler
from torch import nn

from fedcore.config import EngineConfig
from fedcore.data import Dataset, Examples, FederatedData
from fedcore.errors import Refused
from fedcore.native import build as builds
from fedcore.native import trainer as trainers
from fedcore.native.build import AVX2, AVX512, NEON, BuildFailed, build, cache_directory, compile_library, host_target
from fedcore.native.emit import engine_source
from fedcore.native.trainer import Program, prepare
from fedcore.training.client import Clients, RoundTask
from fedcore.training.engine import Engine, choose_engine, make_trainer
from fedcore.training.plan import ClientData, DpSgdPlan, LocalPlan, client_rng

needs_compiler = pytest.mark.skipif(bool(why_no_compiler()), reason=why_no_compiler() or "compiles")
SOURCE = '__attribute__((visibility("default"))) int answer(void) { return 42; }\n'


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    trainers._program.cache_clear()
    yield tmp_path / "fedcore" / "native"
    trainers._program.cache_clear()


def test_the_cache_is_the_users_own(cache):
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    assert cache_directory() == cache
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_a_cache_of_another_user_is_not_used(cache, monkeypatch):
    cache_directory()
    monkeypatch.setattr(os, "getuid", lambda: cache.stat().st_uid + 1)
    with pytest.raises(BuildFailed, match="belongs to another user"):
        cache_directory()


@needs_compiler
def test_a_library_is_built_once_and_again_when_it_was_changed(cache, monkeypatch):
    compiled = []
    monkeypatch.setattr(builds, "compile_library", lambda *a: (compiled.append(a), compile_library(*a)))
    library = build(SOURCE, host_target())
    before = library.read_bytes()
    library.with_suffix(".verified").touch()
    assert build(SOURCE, host_target()) == library
    assert len(compiled) == 1
    library.write_bytes(before[:-1] + b"!")
    assert build(SOURCE, host_target()) == library
    assert library.read_bytes()[:4] == b"\x7fELF"
    assert len(compiled) == 2
    assert not library.with_suffix(".verified").exists()
    assert build(SOURCE.replace("42", "43"), host_target()) != library


@needs_compiler
def test_a_source_that_does_not_compile_fails_in_one_line(cache):
    with pytest.raises(BuildFailed, match="the compiler failed") as failed:
        build("int broken(", host_target())
    assert "\n" not in str(failed.value)
    assert not list(cache.glob("*.so"))


@contextlib.contextmanager
def full_disk():
    """Every write to a file fails."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


def test_a_full_disk_means_the_loop(cache):
    with full_disk():
        engine = choose_engine(EngineConfig(device="cpu"), network("mlp", False, torch.float32), (1, 8, 8))
    assert engine.name == "loop"
    assert f"the cache {cache} cannot be written (" in engine.reason


@needs_compiler
def test_a_library_that_cannot_be_marked_as_compared_is_compared_again(cache, monkeypatch):
    compared = []
    difference = trainers._difference
    monkeypatch.setattr(trainers, "_difference", lambda *a: compared.append(a) or difference(*a))
    monkeypatch.setattr(trainers.Path, "touch", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    for _ in range(2):
        assert prepare(network("mlp", False, torch.float32), (1, 8, 8)) == host_target().name
    assert len(compared) == 2


@needs_compiler
def test_a_library_is_built_once_where_users_share_what_they_make_with_a_group(cache, monkeypatch):
    compiled = []
    monkeypatch.setattr(builds, "compile_library", lambda *a: (compiled.append(a), compile_library(*a)))
    before = os.umask(0o002)
    try:
        libraries = {build(SOURCE, host_target()) for _ in range(2)}
    finally:
        os.umask(before)
    assert len(libraries) == len(compiled) == 1
    ctypes.CDLL(str(libraries.pop()))


@needs_compiler
@pytest.mark.parametrize("file", [".so", ".sha256"])
def test_a_library_that_others_may_have_put_there_is_not_used(cache, monkeypatch, file):
    library = build(SOURCE, host_target())
    planted = library.with_suffix(file)
    planted.chmod(0o666)
    compiled = []
    monkeypatch.setattr(builds, "compile_library", lambda *a: (compiled.append(a), compile_library(*a)))
    assert build(SOURCE, host_target()) == library
    assert len(compiled) == 1
    assert build(SOURCE, host_target()) == library
    assert len(compiled) == 1


def test_a_user_without_a_home(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(builds.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory.")))
    with pytest.raises(BuildFailed, match="Could not determine home directory"):
        cache_directory()


def test_no_client_is_blamed_for_a_machine_that_cannot_compile(cache, monkeypatch):
    monkeypatch.setattr(trainers, "build", lambda *a, **k: (_ for _ in ()).throw(BuildFailed("no compiler")))
    rows = np.arange(6)
    data = Dataset("", ("0", "1"), Examples(np.zeros((6, 1, 8, 8), np.float32), rows % 2), None, None, 0.0, 1.0)
    clients = Clients(
        network("mlp", False, torch.float32), FederatedData(data, (rows,), (rows[:0],), rows[:0]), Engine("native", "cpu", ""),
        seed=0, encoding="int8",
    )  # fmt: skip
    start = torch.cat([p.detach().reshape(-1) for p in clients.model.parameters()])
    with pytest.raises(BuildFailed, match="no compiler"):
        list(clients.train(start, [0], RoundTask(1, LocalPlan(1, 4, 0.1), 10.0)))


def test_without_a_compiler_the_rule_is_the_loop(cache, monkeypatch):
    monkeypatch.setattr(builds, "compiler_version", lambda: (_ for _ in ()).throw(BuildFailed("no compiler: ziglang is missing")))
    engine = choose_engine(EngineConfig(device="cpu"), network("mlp", False, torch.float32), (1, 8, 8))
    assert engine.name == "loop"
    assert "no compiler: ziglang is missing" in engine.reason
    with pytest.raises(Refused, match=r'engine\.name = "native": no compiler'):
        choose_engine(EngineConfig("native"), network("mlp", False, torch.float32), (1, 8, 8))


@needs_compiler
def test_a_broken_compiler_means_the_loop(cache, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    engine = choose_engine(EngineConfig(device="cpu"), network("mlp", False, torch.float32), (1, 8, 8))
    assert (engine.name, "the compiler failed" in engine.reason) == ("loop", True)


@needs_compiler
def test_the_rule_takes_the_native_engine_where_every_layer_is_known(cache):
    engine = choose_engine(EngineConfig(device="cpu"), network("mlp", False, torch.float32), (1, 8, 8))
    assert (engine.name, engine.device) == ("native", "cpu")
    assert host_target().name in engine.reason
    assert len(list(cache.glob("*.verified"))) == 1
    unknown = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 4))
    engine = choose_engine(EngineConfig(device="cpu"), unknown, (1, 8, 8))
    assert (engine.name, "layer 2 (Tanh)" in engine.reason) == ("loop", True)
    assert choose_engine(EngineConfig("loop", "cpu"), network("mlp", False, torch.float32), (1, 8, 8)).name == "loop"


@needs_compiler
def test_a_library_whose_results_differ_is_not_used(cache, monkeypatch):
    made = trainers.engine_source
    monkeypatch.setattr(trainers, "engine_source", lambda *a: made(*a).replace("d[y] = d[y] - share;", "d[y] = d[y] - share / 2;"))
    model = network("mlp", False, torch.float32)
    with pytest.raises(BuildFailed, match="differs from the loop by"):
        prepare(model, (1, 8, 8))
    engine = choose_engine(EngineConfig(device="cpu"), model, (1, 8, 8))
    assert (engine.name, "differs from the loop" in engine.reason) == ("loop", True)


@needs_compiler
def test_a_library_that_does_not_load_is_not_used(cache, monkeypatch):
    monkeypatch.setattr(trainers, "build", lambda *a, **k: cache_directory() / "missing.so")
    with pytest.raises(BuildFailed, match="cannot be loaded"):
        prepare(network("mlp", False, torch.float32), (1, 8, 8))


@needs_compiler
def test_the_chosen_engine_trains_with_the_verified_library(cache):
    model = network("mlp", False, torch.float32)
    engine = choose_engine(EngineConfig("native"), model, (1, 8, 8))
    assert engine.reason.startswith("named in the scenario")
    trainer = make_trainer(engine, model)
    assert type(trainer) is trainers.NativeTrainer
    plain, private = (Program.of(model, (1, 8, 8), private=private).library for private in (False, True))
    assert plain.with_suffix(".verified").exists()
    assert not private.with_suffix(".verified").exists()
    x, y = torch.zeros(9, 1, 8, 8), torch.zeros(9, dtype=torch.int64)
    client = ClientData(0, x, y, client_rng(0, 0, 0, 0), client_rng(0, 0, 0, 1))
    updates(trainer, [client], LocalPlan(1, 4, 0.05, dp=DpSgdPlan(1.0, 1.0)))
    assert private.with_suffix(".verified").exists()  # a plan that nobody announced: compared before it is used
    assert plain.stat().st_size < 0.9 * private.stat().st_size
    assert choose_engine(EngineConfig("native"), model, (1, 8, 8), private=True) == engine


@needs_compiler
def test_each_loss_has_a_library_of_its_own_that_is_verified_with_it(cache, monkeypatch):
    model, compared, right = network("mlp", False, torch.float32), [], trainers._difference
    with monkeypatch.context() as wrong:  # what computes the other loss does not pass for this one
        wrong.setattr(trainers, "engine_source", lambda *given: engine_source(*given[:3]))
        with pytest.raises(Refused, match="differs from the loop"):
            choose_engine(EngineConfig("native"), model, (1, 8, 8), loss="squared")
    trainers._program.cache_clear()
    monkeypatch.setattr(trainers, "_difference", lambda *given: compared.append(given[2].loss) or right(*given))
    for _ in range(2):
        assert choose_engine(EngineConfig("native"), model, (1, 8, 8), loss="squared").name == "native"
        assert choose_engine(EngineConfig("native"), model, (1, 8, 8)).name == "native"
    assert compared == ["squared", "cross_entropy"]
    usual, squared = (Program.of(model, (1, 8, 8), private=False, loss=loss).library for loss in ("cross_entropy", "squared"))
    assert usual != squared
    assert squared.with_suffix(".verified").exists()


def test_targets_fit_the_machine(monkeypatch):
    for machine, flags, expected in (
        ("x86_64", "avx512f avx512bw avx512cd avx512dq avx512vl avx2 fma bmi1 bmi2 f16c movbe", AVX512),
        ("x86_64", "avx2 fma bmi1 bmi2 f16c movbe", AVX2),
        ("aarch64", "", NEON),
    ):
        monkeypatch.setattr(builds.platform, "machine", lambda m=machine: m)
        monkeypatch.setattr(builds, "_processor_flags", lambda f=flags: set(f.split()))
        assert host_target() is expected
    for machine, part in (("x86_64", "AVX2 and FMA"), ("riscv64", "not for linux on riscv64")):
        monkeypatch.setattr(builds.platform, "machine", lambda m=machine: m)
        monkeypatch.setattr(builds, "_processor_flags", set)
        with pytest.raises(BuildFailed, match=part):
            host_target()
