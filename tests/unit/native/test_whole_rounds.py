"""A round of many clients in the native engine, against one client after another."""

import ctypes
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from small_zoo import PLANS, SHAPES, SQUARED, network, start_of, why_no_compiler

from fedcore.data import Examples
from fedcore.errors import Refused
from fedcore.models import ZOO
from fedcore.native.cohort import Board, Cohort, units_of
from fedcore.native.trainer import NativeTrainer
from fedcore.training.local import LoopTrainer
from fedcore.training.plan import ClientData, DpSgdPlan, LocalPlan, client_rng, keyed_rng

pytestmark = pytest.mark.skipif(bool(why_no_compiler()), reason=why_no_compiler() or "compiled")
SEED, ROUND, PURPOSE = 2**40 + 3, 12, 1
KEYS = bytes(range(32)), bytes(32)  # of coins and noise; words that are zero count, too
PRIVATE = {
    "sgd": LocalPlan(epochs=2, batch_size=5, lr=0.05, dp=DpSgdPlan(0.5, 0.8)),
    "everything": LocalPlan(
        epochs=2, batch_size=5, lr=0.05, momentum=0.9, weight_decay=0.01, proximal_mu=0.1, dp=DpSgdPlan(0.5, 0.8)
    ),
    "large batches": LocalPlan(epochs=3, batch_size=200, lr=0.05, dp=DpSgdPlan(0.5, 0.8)),
}


def examples(name, count, dtype, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, *SHAPES[name])).astype(dtype), rng.integers(0, 4, count)


def parts(count, sizes, seed=1):
    rng = np.random.default_rng(seed)
    return [np.sort(rng.choice(count, size, replace=False)).astype(np.int64) for size in sizes]


def generators(client, plan):
    if plan.dp is None:
        return (client_rng(SEED, ROUND, client, PURPOSE),)
    return keyed_rng(KEYS[0], client), keyed_rng(KEYS[1], client), True


def one_by_one(trainer, start, x, y, rows, clients, plan, limit=np.inf):
    """The slow twin: a list of (weighted update, norm, loss), and their sum as units add it."""
    data = [
        ClientData(client, torch.from_numpy(x[part]), torch.from_numpy(y[part]), *generators(client, plan))
        for client, part in zip(clients, rows, strict=True)
    ]
    found = list(trainer.train(start, data, plan))
    norms = np.array([float(torch.linalg.vector_norm(one.update.double())) for one in found])
    losses = np.array([0 if plan.dp else one.loss for one in found])
    total, begin = np.zeros(len(start)), 0
    for end in units_of(len(rows)):
        unit = np.zeros(len(start))
        for one, norm, loss in zip(found[begin:end], norms[begin:end], losses[begin:end], strict=True):
            if norm <= limit and np.isfinite(loss):
                unit += one.examples * one.update.double().numpy()
        total, begin = total + unit, end
    return total, norms, losses


def shared(model, name, clients, workers=1):
    return Board(clients, len(start_of(model)), NativeTrainer(model).blob(SHAPES[name]), workers)


def test_orders_are_those_of_numpy():
    worker = NativeTrainer(network("mlp", False, torch.float32)).worker(SHAPES["mlp"])
    order_rows = worker.library.order_rows
    order_rows.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    order_rows.restype = None
    for seed in (0, 7, 2**31, 2**40 + 3, 2**70):
        words = Cohort([0, 3, 99_999], [], seed, ROUND, PURPOSE, 1.0).words()
        for client, own in zip((0, 3, 99_999), words, strict=True):
            for count in (0, 1, 2, 7, 64, 1000):
                rows, found = 5 + 3 * np.arange(count), np.full(2 * count, -1)
                word = np.ascontiguousarray(own)
                order_rows(word.ctypes.data, len(word), rows.ctypes.data, count, 2, found.ctypes.data)
                rng = client_rng(seed, ROUND, client, PURPOSE)
                assert (found == np.concatenate([rows[rng.permutation(count)] for _ in range(2)])).all()


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", sorted(ZOO))
def test_a_round_is_the_sum_of_its_clients(name, quantized):
    model = network(name, quantized, torch.float64)
    trainer, start = NativeTrainer(model), start_of(model)
    x, y = examples(name, 60, np.float64)
    rows, clients = parts(60, (13, 1, 7, 20, 10)), [4, 2, 9, 7, 1]
    for plan in PLANS.values():
        expected, norms, losses = one_by_one(trainer, start, x, y, rows, clients, plan)
        board = shared(model, name, 5)
        Cohort(clients, rows, SEED, ROUND, PURPOSE, np.inf).train(trainer.worker(SHAPES[name]), start, Examples(x, y), plan, board)
        np.testing.assert_allclose(board.total, expected, rtol=0, atol=1e-12 * max(1, np.abs(expected).max()))
        np.testing.assert_allclose(board.norms, norms, rtol=1e-12)
        np.testing.assert_allclose(board.losses, losses, rtol=1e-12)
        assert board.finished == 5


def test_a_unit_of_more_clients_than_one_call_trains():
    model = network("mlp", False, torch.float64)
    trainer, start, plan = NativeTrainer(model), start_of(model), PLANS["sgd"]
    x, y = examples("mlp", 60, np.float64)
    rows, clients = parts(60, [1 + client % 5 for client in range(50)]), range(50)
    expected, _, _ = one_by_one(trainer, start, x, y, rows, clients, plan)
    board = shared(model, "mlp", 50)
    cohort = Cohort(clients, rows, SEED, ROUND, PURPOSE, np.inf)
    cohort.train(trainer.worker(SHAPES["mlp"]), start, Examples(x, y), plan, board, one_unit=True)
    np.testing.assert_allclose(board.total, expected, rtol=0, atol=1e-12)
    assert board.finished == 50


def test_an_interrupt_does_not_wait_for_the_whole_round():
    model = network("mlp", False, torch.float32)
    x, y = examples("mlp", 2_000, np.float32)
    clients = 500
    rows, plan = [np.arange(2_000)] * clients, LocalPlan(epochs=4, batch_size=10, lr=0.05)
    board = shared(model, "mlp", clients)

    def interrupt():
        while not board.finished:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    cohort, worker = Cohort(range(clients), rows, SEED, ROUND, PURPOSE, np.inf), NativeTrainer(model).worker(SHAPES["mlp"])
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        cohort.train(worker, start_of(model), Examples(x, y), plan, board)
    thread.join()
    assert 0 < board.finished < clients


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", sorted(ZOO))
def test_a_private_round_is_the_sum_of_its_clients(name, quantized):
    """Twice: with the same coins and noise, drawn in C, as the sum of single clients and, unless rounding makes it chaotic, as that
    of the loop, for which numpy draws them."""
    model = network(name, quantized, torch.float64)
    trainer, start = NativeTrainer(model), start_of(model)
    x, y = examples(name, 260, np.float64)
    rows, clients = parts(260, (13, 1, 7, 20, 0, 250)), [4, 2, 9, 7, 1, 30_000]
    for plan in PRIVATE.values():
        board = shared(model, name, 6)
        cohort = Cohort(clients, rows, SEED, ROUND, PURPOSE, np.inf, KEYS)
        cohort.train(trainer.worker(SHAPES[name]), start, Examples(x, y), plan, board)
        for other in (trainer, *([] if quantized else [LoopTrainer(network(name, quantized, torch.float64))])):
            expected, norms, losses = one_by_one(other, start, x, y, rows, clients, plan)
            tolerance = 1e-12 if other is trainer else 1e-9
            np.testing.assert_allclose(board.total, expected, rtol=0, atol=tolerance * max(1, np.abs(expected).max()))
            np.testing.assert_allclose(board.norms, norms, rtol=tolerance)
            np.testing.assert_array_equal(board.losses, losses)


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("frozen", [("0.weight",), ("0.weight", "0.bias", "3.weight"), ("3.bias", "7.weight")])
def test_frozen_parts_are_in_no_sum(frozen, private):
    model = network("cnn", False, torch.float64)
    names = dict(model.named_parameters())
    for name in frozen:
        names[name].requires_grad_(False)
    start, (x, y) = torch.cat([p.detach().reshape(-1) for p in names.values() if p.requires_grad]), examples("cnn", 40, np.float64)
    rows, clients, plan = parts(40, (13, 1, 20)), [4, 2, 9], (PRIVATE if private else PLANS)["everything"]
    trainer = NativeTrainer(model)
    expected, norms, _ = one_by_one(trainer, start, x, y, rows, clients, plan)
    board = Board(3, len(start), trainer.blob(SHAPES["cnn"]), 1)
    cohort = Cohort(clients, rows, SEED, ROUND, PURPOSE, np.inf, KEYS if private else None)
    cohort.train(trainer.worker(SHAPES["cnn"]), start, Examples(x, y), plan, board)
    np.testing.assert_allclose(board.total, expected, rtol=0, atol=1e-12 * max(1, np.abs(expected).max()))
    np.testing.assert_allclose(board.norms, norms, rtol=1e-12)


def test_a_private_round_needs_keys():
    model = network("mlp", False, torch.float32)
    x, y = examples("mlp", 10, np.float32)
    cohort = Cohort([3], [np.arange(10)], SEED, ROUND, PURPOSE, np.inf)
    worker, board = NativeTrainer(model).worker(SHAPES["mlp"]), shared(model, "mlp", 1)
    with pytest.raises(Refused, match="has no noise"):
        cohort.train(worker, start_of(model), Examples(x, y), PRIVATE["sgd"], board)


@pytest.mark.parametrize("plan", [PLANS["sgd"], PRIVATE["everything"], SQUARED], ids=["plain", "private", "squared"])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_processes_share_a_round_and_leave_one_result(workers, plan):
    model = network("mlp", False, torch.float32)
    start = start_of(model)
    x, y = examples("mlp", 500, np.float32)
    sizes = [*np.random.default_rng(3).integers(0, 40, 69).tolist(), 400]  # a last client that takes longer than many others
    rows, clients = parts(500, sizes), list(range(70))
    cohort = Cohort(clients, rows, SEED, ROUND, PURPOSE, 1e6, KEYS)
    expected, _, _ = one_by_one(NativeTrainer(model), start, x, y, rows, clients, plan)
    board = shared(model, "mlp", 70, workers)
    for _ in range(3):  # a board serves one round after another
        board.begin()
        children = []
        for _ in range(workers - 1):
            child = os.fork()
            if child == 0:
                cohort.train(NativeTrainer(model).worker(SHAPES["mlp"], loss=plan.loss), start, Examples(x, y), plan, board)
                os._exit(0)
            children.append(child)
        cohort.train(NativeTrainer(model).worker(SHAPES["mlp"], loss=plan.loss), start, Examples(x, y), plan, board)
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * (workers - 1)
        np.testing.assert_array_equal(board.total, expected)
        assert board.finished == 70


def test_what_must_not_count_does_not():
    model = network("mlp", False, torch.float32)
    start, trainer = start_of(model), NativeTrainer(model)
    x, y = examples("mlp", 100, np.float32)
    rows = [np.arange(10) + 10 * i for i in range(6)]
    rows[4] = rows[4][:0]
    y[25], x[31] = 4, np.inf
    plan = PLANS["sgd"]
    expected, _, _ = one_by_one(trainer, start, x, y, [rows[0], rows[5]], [0, 5], plan)
    _, norms, _ = one_by_one(trainer, start, x, y, [rows[1]], [1], plan)
    x[rows[1]] *= 30
    limit = 10 * float(norms[0])
    board = shared(model, "mlp", 6)
    Cohort(range(6), rows, SEED, ROUND, PURPOSE, limit).train(trainer.worker(SHAPES["mlp"]), start, Examples(x, y), plan, board)
    assert board.norms[1] > limit
    assert board.norms[2] == -1  # a label that is no class
    assert not np.isfinite(board.norms[3])
    assert np.isnan(board.losses[4])  # nothing to train on
    np.testing.assert_allclose(board.total, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("clients", [1, 31, 32, 33, 1000])
def test_units_are_consecutive_and_even(clients):
    ends = units_of(clients)
    sizes = np.diff([0, *ends])
    assert ends[-1] == clients
    assert len(ends) <= 32
    assert sizes.max() - sizes.min() <= 1
    assert sizes.min() >= 1


def test_no_clients_are_no_work():
    model = network("mlp", False, torch.float32)
    board = shared(model, "mlp", 3)
    x, y = examples("mlp", 10, np.float32)
    worker = NativeTrainer(model).worker(SHAPES["mlp"])
    Cohort([], [], SEED, ROUND, PURPOSE, 1.0).train(worker, start_of(model), Examples(x, y), PLANS["sgd"], board)
    assert board.finished == 0
    assert not board.total.any()
    assert units_of(0) == []


@pytest.mark.parametrize(("name", "rows"), [("cnn", 1), ("imu_cnn", 1), ("imu_cnn", 3)])
def test_bytes_train_as_the_numbers_that_they_mean(name, rows, tmp_path):
    model = network(name, False, torch.float32)
    start, rng = start_of(model), np.random.default_rng(0)
    raw = np.memmap(tmp_path / "examples", np.uint8, "w+", shape=(60, *SHAPES[name]))
    raw[:] = rng.integers(0, 256, raw.shape)
    values = rng.standard_normal((rows, 256)).astype(np.float32)
    data = Examples(raw, rng.integers(0, 4, 60), values)
    assert not isinstance(data.x, np.memmap)
    totals = []
    for one in (data, Examples(data.x, data.y)):
        board = shared(model, name, 4)
        cohort = Cohort(range(4), parts(60, (13, 1, 0, 20)), SEED, ROUND, PURPOSE, np.inf)
        cohort.train(NativeTrainer(model).worker(SHAPES[name]), start, one, PLANS["everything"], board)
        totals.append((board.total.copy(), board.losses.copy()))
    np.testing.assert_array_equal(totals[0][0], totals[1][0])
    np.testing.assert_array_equal(totals[0][1], totals[1][1])
