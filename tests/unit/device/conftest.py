"""Makes modules of this folder importable, and the registry's simulator; the device's package comes from its own folder."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "clients" / "linux"))
FILES = {
    "device_worlds": "worlds.py", "fleet_fake": "fleet_fake.py", "device_releases": "releases.py",
    "registry_world": "../registry/world.py", "release_fake": "release_fake.py", "native_installed": "native_installed.py",
}  # fmt: skip
for name, file in ((name, file) for name, file in FILES.items() if name not in sys.modules):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / file)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


@pytest.fixture(autouse=True)
def _one_thread():
    """As a device trains; threads that wait for each other on a busy machine take six times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def built(request, tmp_path_factory):
    """The description of the MLP's library."""
    from native_installed import install, keep_compiler_cache
    from small_zoo import SHAPES, network

    keep_compiler_cache(request.config.cache.mkdir("compiled"))
    return install(network("mlp"), SHAPES["mlp"], tmp_path_factory.mktemp("built"), batches=[4])


@pytest.fixture
def library(built, tmp_path):
    """The description of a library that a test may spoil."""
    folder = tmp_path / "native"
    folder.mkdir()
    for name in ("trainer.json", "libtrainer.so"):
        (folder / name).write_bytes((built.parent / name).read_bytes())
    return folder / "trainer.json"


@pytest.fixture
def tried(monkeypatch):
    """In the place of self-tests in a child: what was tried, and what comes of it."""
    import fedcore_device.updates
    from fedcore_device.installed import Trial

    found = {"files": [], "outcome": Trial(0.01, 2.0, 1000, {})}

    def self_test(files, batch, bounds):
        found["files"].append({name: path.read_bytes() for name, path in files.items()})
        found["batch"], found["bounds"] = batch and batch.read_bytes(), bounds
        if isinstance(found["outcome"], Exception):
            raise found["outcome"]
        if callable(found["outcome"]):
            found["outcome"]()
            return Trial(0.01, 2.0, 1000, {})
        return found["outcome"]

    monkeypatch.setattr(fedcore_device.updates, "self_test", self_test)
    return found


@pytest.fixture
def device(tmp_path, tried):
    """One that has installed its first release."""
    from release_fake import Device

    one = Device(tmp_path / "agent")
    one.assign(1)
    assert not one.step()
    return one
