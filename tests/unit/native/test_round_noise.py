"""The noise of whole private rounds: normal, of the deviation that the plan says, and nobody's twice."""

import itertools
import os

import numpy as np
import pytest
import torch
from scipy import stats
from small_zoo import start_of, why_no_compiler
from torch import nn

from fedcore.data import Dataset, Examples, FederatedData
from fedcore.native.trainer import Worker
from fedcore.privacy.randomness import RootKey
from fedcore.training import dpsgd
from fedcore.training.client import Clients, RoundTask
from fedcore.training.engine import Engine
from fedcore.training.plan import DpSgdPlan, LocalPlan

pytestmark = pytest.mark.skipif(bool(why_no_compiler()), reason=why_no_compiler() or "compiled")
NOISE = DpSgdPlan(1e-6, 1e6)  # gradients are a millionth of the noise, whose deviation is one in a step of lr = batch size
SIZES, CLIENTS = (9, 9, 9, 9, 9, 1), 6


def federation(seed=5, root=None, engine="native"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 257), nn.ReLU(), nn.Linear(257, 11))
    count = sum(SIZES)
    data = Dataset(
        "", tuple("abcdefghijk"), Examples(np.zeros((count, 1, 8, 8), np.float32), np.arange(count) % 11), None, None, 0.0, 1.0
    )
    parts, nothing = np.split(np.arange(count), np.cumsum(SIZES)[:-1]), np.zeros(0, np.int64)
    federated = FederatedData(data, tuple(parts), (nothing,) * len(SIZES), nothing)
    return Clients(model, federated, Engine(engine, "cpu", ""), seed=seed, encoding="float32", root=root)


def noise(clients, who, round_number=1, batch=9, workers=1):
    """The sum of the clients' updates, each times its examples; ``workers`` processes make it."""
    board, start = clients.board(len(who), workers), start_of(clients.model)
    board.begin()
    task = RoundTask(round_number, LocalPlan(1, batch, float(batch), dp=NOISE), 1e9)
    assert clients.adds_up(task)
    children = []
    for _ in range(workers - 1):
        child = os.fork()
        if child == 0:
            clients.add_up(start, who, task, board)
            os._exit(0)
        children.append(child)
    clients.add_up(start, who, task, board)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * len(children)
    return board.total.copy()


@pytest.fixture(scope="module")
def drawn():
    """By round and client, in rows [18, d]; of another seed, the last."""
    rounds = [noise(federation(), [client], number) / SIZES[client] for number in (1, 2, 2**31 - 1) for client in range(CLIENTS)]
    return np.stack([*rounds, noise(federation(6), [0]) / SIZES[0]])


def test_it_is_normal_and_of_the_plans_deviation(drawn):
    found = drawn.reshape(-1)
    count = len(found)
    assert abs(found.mean()) < 5 / np.sqrt(count)
    assert abs(found.var() - 1) < 5 * np.sqrt(2 / count)
    assert abs(stats.skew(found)) < 5 * np.sqrt(6 / count)
    assert abs(stats.kurtosis(found)) < 5 * np.sqrt(24 / count)
    assert stats.kstest(found, "norm").pvalue > 1e-4
    for limit in (2, 3, 4):
        expected = 2 * stats.norm.sf(limit) * count
        assert abs((np.abs(found) > limit).sum() - expected) < 5 * np.sqrt(expected)
    for row in drawn:
        assert stats.kstest(row, "norm").pvalue > 1e-5


def test_clients_rounds_and_seeds_share_none(drawn):
    """Also not some places apart: a block of the generator is 32 numbers."""
    length = drawn.shape[1]
    for one, other in itertools.combinations(drawn, 2):
        for lag in (0, 1, 8, 16, 32, 64, 257):
            both = one[lag:], other[: length - lag]
            assert abs(np.corrcoef(*both)[0, 1]) < 5 / np.sqrt(length - lag)
            assert np.isclose(*both, rtol=1e-3, atol=1e-4).mean() < 0.01


def test_steps_of_a_client_share_none():
    one = noise(federation(), [0], batch=9) / 9
    three = noise(federation(), [0], batch=3) / 9
    assert three.std() == pytest.approx(np.sqrt(3), rel=0.03)
    rest = three - one  # the first step of both draws the same
    assert rest.std() == pytest.approx(np.sqrt(2), rel=0.03)
    assert abs(np.corrcoef(rest, one)[0, 1]) < 5 / np.sqrt(len(one))


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_workers_neither_share_nor_lose_any(workers):
    alone = [noise(federation(), [client]) for client in range(CLIENTS)]
    np.testing.assert_allclose(noise(federation(), range(CLIENTS), workers=workers), sum(alone), rtol=0, atol=1e-9)


def test_a_round_that_is_done_again_has_the_same(drawn):
    np.testing.assert_array_equal(noise(federation(), [3], 2) / SIZES[3], drawn[CLIENTS + 3])


@pytest.mark.parametrize("engine", ["native", "loop"])
def test_a_secret_key_leads_to_the_cipher(engine, monkeypatch):
    """Neither whole rounds nor single clients draw from the generator that is no secret."""

    def no(*_):
        raise AssertionError("not a cipher's noise")

    ciphers = []
    cipher = dpsgd.GaussianNoise.__init__
    monkeypatch.setattr(dpsgd.SimulatedNoise, "__init__", no)
    monkeypatch.setattr(dpsgd.GaussianNoise, "__init__", lambda self, rng: (ciphers.append(rng), cipher(self, rng))[1])
    task = RoundTask(1, LocalPlan(1, 9, 9.0, dp=NOISE), 1e9)
    secret, other = (federation(root=RootKey.of_key(bytes([n]) * 32, "run"), engine=engine) for n in (1, 2))
    assert not secret.adds_up(task)
    updates = [reply.update for clients in (secret, other) for reply in clients.train(start_of(clients.model), [0, 1], task)]
    assert len(ciphers) == 4
    for one, both in itertools.combinations(updates, 2):
        assert abs(np.corrcoef(one, both)[0, 1]) < 5 / np.sqrt(len(one))
        assert one.std() == pytest.approx(1, rel=0.03)
    open_ones = federation(engine=engine).train(start_of(secret.model), [0], task)
    assert [reply.reason for reply in open_ones] == ["training failed"]
    if engine == "native":
        monkeypatch.setattr(Worker, "job", no)
        with pytest.raises(AssertionError):
            noise(federation(), [0])
