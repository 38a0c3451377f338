"""The native engine is the loop, compiled: whole local trainings of both are compared."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from small_zoo import FEW, PLANS, SHAPES, SIZES, SQUARED, federation, network, start_of, updates, why_no_compiler
from torch import nn

from fedcore.errors import Refused
from fedcore.models import ZOO, Residual
from fedcore.native.trainer import NativeTrainer
from fedcore.quantization.layers import FakeQuantize, calibrate, make_quantization_aware, set_activation_ranges
from fedcore.quantization.wire import ActivationRange
from fedcore.training.local import LoopTrainer
from fedcore.training.plan import DpSgdPlan, LocalPlan, client_rng

pytestmark = pytest.mark.skipif(bool(why_no_compiler()), reason=why_no_compiler() or "compiles")


def check(model_of, shape, dtype, plan, atol, **federated):
    """Both engines on the same clients; returns the native updates."""
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(model_of())
    loop, loop_losses = updates(LoopTrainer(models[0]), federation(shape, dtype, **federated), plan)
    native, losses = updates(NativeTrainer(models[1]), federation(shape, dtype, **federated), plan)
    torch.testing.assert_close(native, loop, rtol=atol, atol=atol)
    np.testing.assert_allclose(losses, loop_losses, rtol=atol, atol=atol)
    return native


def zoo(*usual, plans=None, squared=SQUARED):
    """Every model with every plan; with the squared error those that are ``usual``, others only where tests may take long."""
    found = []
    for name in ZOO:
        found += [pytest.param(name, plan, id=f"{name}-{which}") for which, plan in (plans or PLANS).items()]
        found.append(pytest.param(name, squared, id=f"{name}-squared", marks=[] if name in usual else [pytest.mark.slow]))
    return found


@pytest.mark.parametrize(("name", "plan"), zoo("mlp", "cnn"))
def test_the_zoo_in_double_precision(name, plan):
    check(lambda: network(name, False, torch.float64), SHAPES[name], torch.float64, plan, 1e-9)


@pytest.mark.parametrize(("name", "plan"), zoo("imu_cnn"))
def test_the_fake_quantized_zoo_in_double_precision(name, plan):
    def model_of():
        return network(name, True, torch.float64)

    check(model_of, SHAPES[name], torch.float64, plan, 1e-9, sizes=FEW)


@pytest.mark.parametrize("name", ["mlp", "cnn", "dscnn"])
def test_before_calibration_only_weights_are_rounded(name):
    def model_of():
        return network(name, True, torch.float64, calibrated=False)

    check(model_of, SHAPES[name], torch.float64, PLANS["everything"], 1e-9, sizes=FEW)


@pytest.mark.parametrize("name", ["mlp", "cnn", *(pytest.param(n, marks=pytest.mark.slow) for n in ("lenet", "dscnn", "imu_cnn"))])
@pytest.mark.parametrize("plan", [PLANS["everything"], pytest.param(SQUARED, marks=pytest.mark.slow)], ids=["usual", "squared"])
def test_the_zoo_in_single_precision(name, plan):
    check(lambda: network(name, False, torch.float32), SHAPES[name], torch.float32, plan, 1e-5)


@pytest.mark.parametrize("name", ["cnn", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mlp", "lenet", "dscnn", "imu_cnn"))])
def test_fake_quantized_single_precision_predicts_alike(name):
    shape, plan = SHAPES[name], LocalPlan(epochs=3, batch_size=5, lr=0.05)
    start = start_of(network(name, True, torch.float32))
    x = torch.tensor(np.random.default_rng(9).standard_normal((400, *shape)), dtype=torch.float32)
    predicted = []
    for trainer in (LoopTrainer, NativeTrainer):
        found, _ = updates(trainer(network(name, True, torch.float32)), federation(shape, torch.float32), plan)
        model = network(name, True, torch.float32)
        torch.nn.utils.vector_to_parameters(start + found.mean(0), model.parameters())
        predicted.append(model(x).argmax(1))
    assert (predicted[0] == predicted[1]).float().mean() >= 0.99


ODD = {
    "odd channels, strides, paddings": ((3, 11, 9), lambda: nn.Sequential(
        nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 0)), nn.ReLU6(), nn.Conv2d(5, 17, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d((2, 3)), nn.Conv2d(17, 3, 2, stride=2, bias=False), nn.Flatten(), nn.Linear(3, 4))),
    "pool before activation": ((2, 9, 9), lambda: nn.Sequential(
        nn.Conv2d(2, 20, 2), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(20, 6, 1), nn.Flatten(), nn.Linear(96, 4, bias=False))),
    "pools of all kinds": ((3, 12, 12), lambda: nn.Sequential(
        nn.ReLU(), nn.MaxPool2d(3, 2, padding=1), nn.Conv2d(3, 6, 3, padding=2), nn.AvgPool2d(3, 2, padding=1),
        nn.AvgPool2d(2, 1, padding=1, count_include_pad=False), nn.Conv2d(6, 9, 1, stride=2), nn.MaxPool2d(2, 1),
        nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 4))),
    "depthwise": ((5, 10, 10), lambda: nn.Sequential(
        nn.Conv2d(5, 5, 3, 2, padding=1, groups=5), nn.ReLU(), nn.Conv2d(5, 24, 1), nn.ReLU6(),
        nn.Conv2d(24, 24, (3, 2), 1, padding=(0, 1), groups=24, bias=False), nn.Conv2d(24, 4, 1), nn.ReLU(),
        nn.AdaptiveMaxPool2d((1, 1)), nn.Flatten())),
    "windows": ((3, 40), lambda: nn.Sequential(
        nn.Conv1d(3, 19, 5, stride=2, padding=2), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(19, 19, 3, padding=1, groups=19),
        nn.ReLU(), nn.Conv1d(19, 70, 3), nn.ReLU(), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(70 * 4, 4))),
    "a vector, twenty classes": ((7,), lambda: nn.Sequential(
        nn.Linear(7, 33), nn.ReLU(), nn.ReLU(), nn.Sequential(nn.Identity(), nn.Linear(33, 20)))),
    "more channels than a word has bits": ((2, 6, 6), lambda: nn.Sequential(
        nn.Conv2d(2, 70, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(280, 4))),
    "many channels between": ((2, 8, 8), lambda: nn.Sequential(
        nn.Conv2d(2, 40, 3), nn.ReLU(), nn.Conv2d(40, 67, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(268, 4))),
    "residual blocks": ((3, 9, 8), lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(),
        Residual(nn.Conv2d(6, 9, 3, padding=1), nn.ReLU(), nn.Conv2d(9, 6, 3, padding=1)), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(96, 4))),
    "group normalisation": ((3, 9, 8), lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.GroupNorm(3, 6), nn.ReLU(), nn.Conv2d(6, 18, 3, bias=False),
        nn.GroupNorm(1, 18, affine=False), nn.ReLU6(), nn.MaxPool2d(2), nn.GroupNorm(9, 18), nn.Flatten(), nn.Linear(162, 8),
        nn.GroupNorm(4, 8), nn.ReLU(), nn.Linear(8, 4))),
    "residual vectors": ((7,), lambda: nn.Sequential(
        Residual(nn.Linear(7, 7), nn.ReLU(), nn.Linear(7, 7)), nn.GroupNorm(1, 7), nn.ReLU(), nn.ReLU(), nn.Linear(7, 20),
        Residual(Residual(nn.GroupNorm(4, 20), nn.ReLU(), nn.Linear(20, 20))), nn.ReLU(), nn.Linear(20, 4))),
    "residual inputs": ((3, 9, 8), lambda: nn.Sequential(
        Residual(nn.Conv2d(3, 3, 3, padding=1), nn.GroupNorm(1, 3)), nn.ReLU(),
        Residual(nn.ReLU(), nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 3, 1)), nn.GroupNorm(1, 3), nn.Flatten(),
        nn.Linear(216, 4))),
    "residual windows": ((6, 20), lambda: nn.Sequential(
        nn.GroupNorm(2, 6), nn.Conv1d(6, 20, 3, padding=1),
        Residual(nn.GroupNorm(5, 20), nn.ReLU(), nn.Conv1d(20, 20, 3, padding=1)),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(20, 4))),
}  # fmt: skip


@pytest.mark.parametrize(("name", "plan"), [*((name, PLANS["everything"]) for name in ODD), ("a vector, twenty classes", SQUARED)])
def test_odd_networks_in_double_precision(name, plan):
    shape, build = ODD[name]
    check(lambda: build().double(), shape, torch.float64, plan, 1e-9)


@pytest.mark.parametrize("name", [name for name in ODD if "residual" in name or "norm" in name or "vector" in name])
def test_odd_networks_in_private(name):
    shape, build = ODD[name]

    def model_of():
        torch.manual_seed(1)
        return build().double()

    check_private(model_of, shape, torch.float64, PRIVATE["some"], 1e-9)


@pytest.mark.parametrize("private_too", [False, True], ids=["plain", "private"])
def test_what_is_frozen_around_a_residual_block(private_too):
    def model_of():
        torch.manual_seed(1)
        model = nn.Sequential(
            Residual(nn.Conv2d(3, 3, 3, padding=1), nn.GroupNorm(1, 3)), nn.Conv2d(3, 4, 3),
            Residual(nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3, padding=1)), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        ).double()  # fmt: skip
        for parameter in (*model[0].parameters(), model[2][0].bias, *model[2][1].parameters()):
            parameter.requires_grad_(False)
        return model

    if private_too:
        check_private(model_of, (3, 9, 8), torch.float64, PRIVATE["some"], 1e-9)
    else:
        check(model_of, (3, 9, 8), torch.float64, PLANS["everything"], 1e-9)


@pytest.mark.parametrize("where", ["input", "inside"])
def test_a_residual_block_adds_what_was_not_rounded(where):
    """The quantizer in front of a layer rounds for that layer alone, not for the sum that skips it."""

    def model_of():
        torch.manual_seed(1)
        block = Residual(nn.Conv2d(3, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.ReLU(), nn.Conv2d(3, 3, 1))
        before = [] if where == "input" else [FakeQuantize(), nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()]
        model = nn.Sequential(*before, block, nn.ReLU(), FakeQuantize(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(48, 4))
        make_quantization_aware(model)
        calibrate(model, [torch.randn(40, 3, 8, 8)])
        return model.double()

    check(model_of, (3, 8, 8), torch.float64, PLANS["everything"], 1e-9, sizes=FEW)


@pytest.mark.parametrize("loss", ["cross_entropy", pytest.param("squared", marks=pytest.mark.slow)])
def test_a_batch_in_several_parts(loss):
    plan = LocalPlan(epochs=2, batch_size=90, lr=0.05, momentum=0.5, loss=loss)
    check(lambda: network("cnn", False, torch.float64), SHAPES["cnn"], torch.float64, plan, 1e-9, sizes=(200, 3))


def test_quantizers_of_their_own_and_saturation():
    """An explicit quantizer, two in a row, and ranges so narrow that many activations saturate, whose gradient is zero."""

    def model_of():
        model = nn.Sequential(
            FakeQuantize(), nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), FakeQuantize(), nn.AvgPool2d(2), nn.Flatten(),
            nn.Linear(96, 12), nn.ReLU(), nn.Linear(12, 4),
        )  # fmt: skip
        make_quantization_aware(model)
        ranges = calibrate(model, [torch.randn(40, 2, 8, 8)])
        narrow = {name: ActivationRange(span.scale / 3, span.zero_point) for name, span in ranges.items()}
        set_activation_ranges(model, narrow)
        return model.double()

    check(model_of, (2, 8, 8), torch.float64, PLANS["everything"], 1e-9)


@pytest.mark.parametrize("frozen", [(0,), (0, 3), (7, 9), (3, 7, 9)])
def test_frozen_layers_neither_move_nor_travel(frozen):
    def model_of():
        model = network("cnn", False, torch.float64)
        for layer in frozen:
            model[layer].requires_grad_(False)
        return model

    found = check(model_of, SHAPES["cnn"], torch.float64, PLANS["everything"], 1e-9)
    assert found.shape[1] == len(start_of(model_of()))
    assert found.abs().sum() > 0


@pytest.mark.parametrize("plan", [PLANS["everything"], pytest.param(SQUARED, marks=pytest.mark.slow)], ids=["usual", "squared"])
def test_one_clients_nan_does_not_reach_the_others(plan):
    model = network("cnn", False, torch.float32)
    trainer, start = NativeTrainer(model), start_of(model)
    clean = [r.update for r in trainer.train(start, federation(SHAPES["cnn"], torch.float32), plan)]
    clients = federation(SHAPES["cnn"], torch.float32)
    clients[1].x[0, 0, 3, 3] = math.nan
    clients[3].x.fill_(math.inf)
    spoiled = list(trainer.train(start, clients, plan))
    for i in (1, 3):
        assert torch.isnan(spoiled[i].update).any()
        assert math.isnan(spoiled[i].loss)
    for i in (0, 2, 4):
        assert torch.equal(clean[i], spoiled[i].update)


@pytest.mark.parametrize("loss", ["cross_entropy", pytest.param("squared", marks=pytest.mark.slow)])
def test_a_client_that_explodes_says_so_and_leaves_nothing_behind(loss):
    model = network("cnn", False, torch.float32)
    trainer, start, plan = NativeTrainer(model), start_of(model), dataclasses.replace(PLANS["sgd"], loss=loss)
    clean = [r.update for r in trainer.train(start, federation(SHAPES["cnn"], torch.float32), plan)]
    exploding = LocalPlan(epochs=20, batch_size=5, lr=1e20, loss=loss)
    exploded = list(trainer.train(start, federation(SHAPES["cnn"], torch.float32), exploding))
    assert not any(torch.isfinite(torch.linalg.vector_norm(r.update)) and math.isfinite(r.loss) for r in exploded)
    again = [r.update for r in trainer.train(start, federation(SHAPES["cnn"], torch.float32), plan)]
    assert all(torch.equal(one, other) for one, other in zip(clean, again, strict=True))


def test_a_label_that_is_no_class_is_refused():
    model = network("mlp", False, torch.float32)
    clients = federation(SHAPES["mlp"], torch.float32)
    clients[2].y[1] = 4
    with pytest.raises(Refused, match="client 2: a label is not one of the 4 classes"):
        list(NativeTrainer(model).train(start_of(model), clients, PLANS["sgd"]))


def test_a_trainer_is_of_one_loss():
    model = network("mlp", False, torch.float32)
    trainer, (client, *_) = NativeTrainer(model), federation(SHAPES["mlp"], torch.float32)
    worker = trainer.worker(SHAPES["mlp"])
    for asked in (SQUARED, dataclasses.replace(SQUARED, dp=DpSgdPlan(1.0, 1.0))):
        with pytest.raises(Refused, match="the plan asks for the loss squared; this trainer is compiled for cross_entropy"):
            worker.train(start_of(model), dataclasses.replace(client, noise_rng=client_rng(1, 1, 0, 2)), asked)
    with pytest.raises(Refused, match="the loss squared"):
        worker.job(start_of(model), SQUARED)
    assert trainer.worker_for(SHAPES["mlp"], SQUARED).loss == "squared"


def test_a_client_without_examples_returns_nothing():
    model = network("mlp", False, torch.float32)
    (result,) = NativeTrainer(model).train(start_of(model), federation(SHAPES["mlp"], torch.float32, sizes=(0,)), PLANS["sgd"])
    assert math.isnan(result.loss)
    assert not result.update.any()


def test_a_start_that_changes_in_place_is_read_again():
    model = network("mlp", False, torch.float32)
    trainer, start = NativeTrainer(model), start_of(model)
    list(trainer.train(start, federation(SHAPES["mlp"], torch.float32), PLANS["sgd"]))
    start.mul_(2)
    (again, *_) = trainer.train(start, federation(SHAPES["mlp"], torch.float32), PLANS["sgd"])
    (fresh, *_) = NativeTrainer(copy.deepcopy(model)).train(start.clone(), federation(SHAPES["mlp"], torch.float32), PLANS["sgd"])
    assert torch.equal(again.update, fresh.update)


def private(shape, dtype, **federated):
    """Clients with a generator for their noise."""
    clients = federation(shape, dtype, **federated)
    return [dataclasses.replace(c, noise_rng=client_rng(1, 1, c.client, 2)) for c in clients]


def check_private(model_of, shape, dtype, plan, atol, **federated):
    loop, loop_losses = updates(LoopTrainer(model_of()), private(shape, dtype, **federated), plan)
    native, losses = updates(NativeTrainer(model_of()), private(shape, dtype, **federated), plan)
    torch.testing.assert_close(native, loop, rtol=atol, atol=atol)
    np.testing.assert_allclose(losses, loop_losses, rtol=max(atol, 1e-6), atol=atol)
    return native


PRIVATE = {  # some examples clipped, none, all; more than a part of a batch
    "some": LocalPlan(epochs=2, batch_size=5, lr=0.05, momentum=0.9, weight_decay=0.01, proximal_mu=0.1, dp=DpSgdPlan(2.0, 0.7)),
    "none": LocalPlan(epochs=1, batch_size=5, lr=0.05, dp=DpSgdPlan(1e6, 1e-9)),
    "all": LocalPlan(epochs=1, batch_size=90, lr=0.05, dp=DpSgdPlan(1e-2, 1.0)),
}


PRIVATE_SQUARED = dataclasses.replace(PRIVATE["some"], dp=DpSgdPlan(0.4, 0.7), loss="squared")


@pytest.mark.parametrize(("name", "plan"), zoo("mlp", plans=PRIVATE, squared=PRIVATE_SQUARED))
def test_private_training_of_the_zoo_in_double_precision(name, plan):
    sizes = (200, 3) if plan.batch_size == 90 else SIZES
    check_private(lambda: network(name, False, torch.float64), SHAPES[name], torch.float64, plan, 1e-9, sizes=sizes)


@pytest.mark.parametrize("plan", [PRIVATE["some"], pytest.param(PRIVATE_SQUARED, marks=pytest.mark.slow)], ids=["usual", "squared"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "dscnn"])
def test_private_training_with_fake_quantization_in_double_precision(name, plan):
    check_private(lambda: network(name, True, torch.float64), SHAPES[name], torch.float64, plan, 1e-9, sizes=FEW)


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("mlp", PRIVATE["some"]),
        ("cnn", PRIVATE["some"]),
        ("mlp", PRIVATE_SQUARED),
        pytest.param("cnn", PRIVATE_SQUARED, marks=pytest.mark.slow),
    ],
)
def test_private_training_in_single_precision(name, plan):
    check_private(lambda: network(name, False, torch.float32), SHAPES[name], torch.float32, plan, 2e-6)


@pytest.mark.parametrize("frozen", [(0,), (3, 7), (9,)])
def test_private_norms_are_of_trainable_parameters(frozen):
    def model_of():
        model = network("cnn", False, torch.float64)
        for layer in frozen:
            model[layer].weight.requires_grad_(False)
        return model

    check_private(model_of, SHAPES["cnn"], torch.float64, PRIVATE["some"], 1e-9)


def test_an_example_without_a_finite_gradient_adds_nothing():
    def clients():
        found = private(SHAPES["cnn"], torch.float64)
        found[0].x[3] = math.nan
        found[2].x[0, 0, 2, 2] = math.inf
        return found

    plan = PRIVATE["some"]
    native, _ = updates(NativeTrainer(network("cnn", False, torch.float64)), clients(), plan)
    loop, _ = updates(LoopTrainer(network("cnn", False, torch.float64)), clients(), plan)
    assert torch.isfinite(native).all()
    torch.testing.assert_close(native, loop, rtol=1e-9, atol=1e-9)


def test_a_pool_hides_no_number_that_is_not_finite():
    def trained(trainer):
        torch.manual_seed(1)
        model = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(9, 4)).double()
        clients = private((1, 6, 6), torch.float64)
        for client in clients:
            client.x[::2, 0, 3, 3] = math.nan  # the last of its window
        return updates(trainer(model), clients, PRIVATE["some"])[0]

    native, loop = trained(NativeTrainer), trained(LoopTrainer)
    assert torch.isfinite(native).all()
    torch.testing.assert_close(native, loop, rtol=1e-9, atol=1e-9)


def test_private_clients_without_a_generator_of_noise_are_refused():
    model = network("mlp", False, torch.float32)
    with pytest.raises(Refused, match="no generator for its noise"):
        list(NativeTrainer(model).train(start_of(model), federation(SHAPES["mlp"], torch.float32), PRIVATE["some"]))
