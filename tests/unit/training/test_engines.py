"""Every engine is the same function: each is compared with the plain loop, and the plain loop with torch.optim.SGD."""

import copy
import functools

import numpy as np
import pytest
import torch
from small_zoo import FEW, PLANS, SHAPES, SIZES, SQUARED, federation, network, start_of, updates, watch_windows
from torch import nn
from torch.nn import functional as F

from fedcore.config import EngineConfig
from fedcore.errors import Refused
from fedcore.models import ZOO
from fedcore.training.engine import choose_engine
from fedcore.training.local import LoopTrainer
from fedcore.training.plan import ClientData, batch_order, client_rng
from fedcore.training.vmap import VmapTrainer

ALL = PLANS | {"squared": SQUARED}
SAMPLED = [
    pytest.param(name, plan, id=f"{name}-{which}", marks=[pytest.mark.slow] * (which == "squared" and name not in {"mlp", "dscnn"}))
    for name in ZOO for which, plan in ALL.items()
]  # fmt: skip


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "fake-quant"])
@pytest.mark.parametrize(("name", "plan"), SAMPLED)
def test_vmap_equals_the_loop_in_double_precision(name, plan, quantized):
    def trained(trainer):
        clients = federation(SHAPES[name], torch.float64, sizes=FEW if quantized else SIZES)
        return updates(trainer(network(name, quantized, torch.float64)), clients, plan)

    loop, loop_losses = trained(LoopTrainer)
    for chunk in (64, 2):
        many, losses = trained(functools.partial(VmapTrainer, chunk=chunk))
        torch.testing.assert_close(many, loop, rtol=0, atol=1e-9)
        np.testing.assert_allclose(losses, loop_losses, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ZOO)
def test_vmap_equals_the_loop_in_single_precision_without_fake_quant(name):
    loop, many = (
        updates(trainer(network(name)), federation(SHAPES[name], torch.float32), PLANS["everything"])[0]
        for trainer in (LoopTrainer, VmapTrainer)
    )
    torch.testing.assert_close(many, loop, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["cnn", "lenet", "imu_cnn"])
def test_no_window_ties(name):
    """In training, no pooling window of the reference has two first places."""
    model = network(name, True, torch.float64)
    start, closest = start_of(model).clone(), watch_windows(model)
    for plan in ALL.values():
        torch.nn.utils.vector_to_parameters(start.clone(), model.parameters())
        updates(LoopTrainer(model), federation(SHAPES[name], torch.float64, sizes=FEW), plan)
    assert min(closest) > 1e-9


@pytest.mark.parametrize("plan", ALL.values(), ids=ALL)
def test_the_loop_is_torch_sgd(plan):
    model = network("cnn", True, torch.float64)
    plain = copy.deepcopy(model)
    start = start_of(model)
    loop = LoopTrainer(model)
    for data in federation(SHAPES["cnn"], torch.float64, sizes=FEW):
        twin = ClientData(data.client, data.x, data.y, client_rng(1, 1, data.client, 1))
        (result,) = loop.train(start, [data], plan)
        torch.nn.utils.vector_to_parameters(start.clone(), plain.parameters())
        anchor = [p.detach().clone() for p in plain.parameters()]
        optimizer = torch.optim.SGD(plain.parameters(), plan.lr, plan.momentum, weight_decay=plan.weight_decay)
        losses = []
        for order in batch_order(len(twin.y), plan, twin.rng):
            for index in torch.from_numpy(order).split(plan.batch_size):
                optimizer.zero_grad()
                outputs, labels = plain(twin.x[index]), twin.y[index]
                squared = plan.loss == "squared"
                loss = F.mse_loss(outputs, F.one_hot(labels, 4).double()) if squared else F.cross_entropy(outputs, labels)
                losses += [loss.item()] * len(index)
                proximal = sum(((p - a) ** 2).sum() for p, a in zip(plain.parameters(), anchor, strict=True))
                (loss + plan.proximal_mu / 2 * proximal).backward()
                optimizer.step()
        torch.testing.assert_close(result.update, start_of(plain) - start, rtol=0, atol=1e-9)
        assert result.loss == pytest.approx(np.mean(losses), abs=1e-9)


@pytest.mark.parametrize("trainer", [LoopTrainer, VmapTrainer])
def test_frozen_parameters_neither_move_nor_travel(trainer):
    model = network("cnn", True)
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    frozen = model[0].weight.clone()
    start = start_of(model)
    (result, *_) = trainer(model).train(start, federation(SHAPES["cnn"], torch.float32), PLANS["sgd"])
    assert result.update.shape == start.shape
    assert result.update.abs().sum() > 0
    assert torch.equal(model[0].weight, frozen)


@pytest.mark.parametrize("trainer", [LoopTrainer, VmapTrainer])
def test_one_clients_nan_does_not_reach_the_others(trainer):
    model = network("mlp")
    clients = federation(SHAPES["mlp"], torch.float32)
    clean = [
        r.update
        for r in trainer(copy.deepcopy(model)).train(start_of(model), federation(SHAPES["mlp"], torch.float32), PLANS["sgd"])
    ]
    clients[3].x.fill_(float("nan"))
    spoiled = [r.update for r in trainer(model).train(start_of(model), clients, PLANS["sgd"])]
    assert torch.isnan(spoiled[3]).any()
    for i in (0, 1, 2, 4):
        assert torch.equal(clean[i], spoiled[i])


def test_dropout_is_a_function_of_the_clients_generator():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Dropout(0.5), nn.Linear(16, 4))
    start = start_of(model)
    runs = []
    for noise in (1, 2):
        torch.manual_seed(noise)  # whatever happened before in this process
        runs.append(
            [r.update for r in LoopTrainer(copy.deepcopy(model)).train(start, federation((1, 8, 8), torch.float32), PLANS["sgd"])]
        )
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


def test_the_engine_is_chosen_by_rule():
    dropout = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    assert choose_engine(EngineConfig(device="cpu"), nn.Linear(2, 2)).name == "loop"
    assert choose_engine(EngineConfig(device="cpu"), nn.Linear(2, 2)) == choose_engine(EngineConfig("loop", "cpu"), nn.Linear(2, 2))
    assert choose_engine(EngineConfig("vmap", "cpu"), nn.Linear(2, 2)).reason == "named in the scenario"
    with pytest.raises(Refused, match="layer 1 draws random numbers"):
        choose_engine(EngineConfig("vmap", "cpu"), dropout)
    if not torch.cuda.is_available():
        with pytest.raises(Refused, match="no CUDA device"):
            choose_engine(EngineConfig(device="cuda"), dropout)
