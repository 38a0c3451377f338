import pickle

import numpy as np
import pytest
import torch

from fedcore.coordinator.assembly import assemble, build_clients
from fedcore.data import Dataset, Examples, FederatedData
from fedcore.errors import Refused
from fedcore.grids.travel import MappedFile, NotHere, pack
from fedcore.privacy.randomness import RootKey
from fedcore.training.client import Clients, RoundTask
from fedcore.training.engine import Engine
from fedcore.training.plan import LocalPlan

PLAN = LocalPlan(1, 8, 0.1, momentum=0.5)


def updates(clients, start, chosen=(0, 3, 5)):
    return [(r.client, r.examples, r.loss, r.update.tolist()) for r in clients.train(start, chosen, RoundTask(2, PLAN, 100.0))]


def flat(model):
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("values", [["engine.name=loop"], ["engine.name=vmap"], ["cohort.dropout=0.5", "run.seed=3"]])
def test_clients_train_and_evaluate_elsewhere_as_here(scenario, values):
    assembly = assemble(scenario("quantization.enabled=false", *values))
    here, start = build_clients(assembly), flat(assembly.model)
    trained = updates(here, start)  # what they did before does not matter
    there = pickle.loads(pickle.dumps(pack(here, files=True))).unpack()
    assert updates(there, start) == trained == updates(here, start)
    task = RoundTask(2, PLAN, 100.0)
    assert list(there.evaluate(start, range(6), task)) == list(here.evaluate(start, range(6), task))
    assert there.arriving(range(6), task) == here.arriving(range(6), task)
    assert len(there.data.dataset.test) == len(there.data.calibration) == 0  # nobody there looks at them


def test_arrays_in_memory_that_cannot_be_written_to_are_enough(scenario):
    assembly = assemble(scenario("quantization.enabled=false"))
    here, start = build_clients(assembly), flat(assembly.model)
    buffers = []
    packed = pickle.dumps(pack(here, files=True), protocol=5, buffer_callback=buffers.append)
    frozen = [memoryview(bytes(buffer)) for buffer in buffers]
    assert sum(map(len, frozen)) >= here.data.dataset.train.raw.nbytes  # the examples are not inside the pickle
    assert len(packed) < here.data.dataset.train.raw.nbytes / 4
    there = pickle.loads(packed, buffers=frozen).unpack()
    assert not there.data.dataset.train.raw.flags.writeable
    assert updates(there, start) == updates(here, start)


def mapped(tmp_path, count=40):
    array = np.memmap(tmp_path / "examples", np.uint8, "w+", shape=(count + 1, 64))
    array[:] = np.random.default_rng(0).integers(0, 256, array.shape)
    array.flush()
    return np.memmap(tmp_path / "examples", np.uint8, "r", offset=64, shape=(count, 1, 8, 8))


def test_mapped_data_is_named_where_the_file_is_and_copied_elsewhere(scenario, tmp_path):
    raw, y = mapped(tmp_path), np.arange(40) % 10
    values = np.linspace(-1, 1, 256, dtype=np.float32)[None]
    train = Examples(raw, y, values)
    dataset = Dataset("mapped", tuple("0123456789"), train, train.take(y[:4]), None, 0.0, 1.0)
    parts = tuple(np.arange(10) + 10 * k for k in range(4))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    data = FederatedData(dataset, parts, tuple(part[:1] for part in parts), parts[0])
    here, start = Clients(model, data, Engine("loop", "cpu", "test"), seed=0, encoding="float32"), flat(model)
    named, copied = (pickle.dumps(pack(here, files=files)) for files in (True, False))
    assert isinstance(pickle.loads(named).raw, MappedFile)
    assert len(named) < len(copied) - raw.nbytes / 2
    expected = updates(here, start, (1, 2))
    for packed in (named, copied):
        assert updates(pickle.loads(packed).unpack(), start, (1, 2)) == expected
    (tmp_path / "examples").rename(tmp_path / "away")
    with pytest.raises(NotHere, match="No such file"):
        pickle.loads(named).unpack()
    assert updates(pickle.loads(copied).unpack(), start, (1, 2)) == expected
    (tmp_path / "examples").write_bytes(bytes((tmp_path / "away").stat().st_size))
    with pytest.raises(NotHere, match="other content"):
        pickle.loads(named).unpack()


def test_a_view_is_found_where_it_lies_and_what_is_in_no_file_is_not(tmp_path):
    raw = mapped(tmp_path)
    for view in (raw, raw[7:20], raw[3:][2:5], raw.reshape(40, 64), raw[4]):
        place = MappedFile.of(view)
        assert (place.shape, place.dtype) == (view.shape, view.dtype)
        np.testing.assert_array_equal(place.open(), view)
    for other in (raw[::2], raw[:, :, 1:], raw.take([1, 2], axis=0), np.asarray(raw).copy(), np.zeros(3)):
        assert MappedFile.of(other) is None


def test_secrets_stay(scenario):
    assembly = assemble(scenario())
    with pytest.raises(Refused, match="secret"):
        pack(build_clients(assembly, real=True), files=True)
    clients = build_clients(assembly)
    clients.root = RootKey.of_key(bytes(32), "run")
    with pytest.raises(Refused, match="secret"):
        pack(clients, files=True)
