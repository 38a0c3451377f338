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
