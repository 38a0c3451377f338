"""DP-SGD: the loop is compared with a step written out by the definition, the other engine with the loop."""

import copy
import math

import numpy as np
import pytest
import torch
from small_zoo import SHAPES, network, start_of, watch_windows
from torch import nn
from torch.nn import functional as F

from fedcore.errors import Refused
from fedcore.models import ZOO
from fedcore.quantization.layers import activation_ranges, set_activation_ranges
from fedcore.training.dpsgd import GaussianNoise, SimulatedNoise, add_clipped, clipping_factors
from fedcore.training.local import LoopTrainer
from fedcore.training.per_example import GradientChoice
from fedcore.training.plan import ClientData, DpSgdPlan, LocalPlan, client_rng, poisson_batches, poisson_schedule
from fedcore.training.vmap import VmapTrainer

SIZES = (11, 1, 7, 0, 4)
PATHS = ("chain", "ghost-channels-last", "ghost", "opacus")
PRIVATE = LocalPlan(2, 5, 0.05, 0.9, 0.01, 0.1, dp=DpSgdPlan(clipping_norm=0.7, noise_multiplier=0.8))
SQUARED = LocalPlan(2, 5, 0.05, 0.9, 0.01, 0.1, dp=DpSgdPlan(clipping_norm=0.5, noise_multiplier=0.8), loss="squared")


@pytest.fixture(autouse=True)
def _one_thread():
    """As a worker trains; threads that wait for each other on a busy machine take six times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def client(number: int, size: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 1) -> ClientData:
    rng = np.random.default_rng([6, number])
    x = torch.tensor(rng.standard_normal((size, *shape)), dtype=dtype)
    y = torch.tensor(rng.integers(0, 4, size), dtype=torch.int64)
    return ClientData(number, x, y, client_rng(seed, 1, number, 1), client_rng(seed, 1, number, 3))


def federation(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[ClientData]:
    return [client(number, size, shape, dtype) for number, size in enumerate(SIZES)]


def by_definition(model: nn.Module, data: ClientData, plan: LocalPlan) -> tuple[torch.Tensor, float]:
    """One backward pass per example, clip, sum, noise, torch.optim.SGD."""
    start = start_of(model)
    anchor = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), plan.lr, plan.momentum, weight_decay=plan.weight_decay)
    noise, losses = GaussianNoise(data.noise_rng), []
    for batch in poisson_batches(len(data.y), plan, data.rng):
        total = torch.zeros_like(start)
        for i in batch:
            outputs, label = model(data.x[i : i + 1]), data.y[i : i + 1]
            squared = plan.loss == "squared"
            loss = F.mse_loss(outputs, F.one_hot(label, 4).to(outputs.dtype)) if squared else F.cross_entropy(outputs, label)
            gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])
            total += gradient * min(1.0, plan.dp.clipping_norm / float(gradient.norm()))
            losses.append(loss.item())
        drawn = torch.empty_like(start)
        noise.fill(drawn, plan.dp.clipping_norm * plan.dp.noise_multiplier)
        total = (total + drawn) / plan.batch_size
        for p, a, g in zip(model.parameters(), anchor, total.split([p.numel() for p in model.parameters()]), strict=True):
            p.grad = g.view_as(p) + plan.proximal_mu * (p.detach() - a)
        optimizer.step()
    return start_of(model) - start, float(np.mean(losses)) if losses else math.nan


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "fake-quant"])
@pytest.mark.parametrize(
    ("name", "plan"),
    [
        *((name, PRIVATE) for name in ZOO),
        *(pytest.param(name, SQUARED, marks=[pytest.mark.slow] * (name not in {"mlp", "imu_cnn"})) for name in ZOO),
    ],
)
def test_both_engines_do_what_the_definition_says(name, plan, quantized):
    model = network(name, quantized, torch.float64)
    start, shape = start_of(model), SHAPES[name]
    loop = list(LoopTrainer(copy.deepcopy(model)).train(start, federation(shape), plan))
    chunked = VmapTrainer(model, chunk=4, budget=3 * 4 * len(start))  # pieces of three examples
    many = list(chunked.train(start, federation(shape), plan))
    for data, one, other in zip(federation(shape), loop, many, strict=True):
        plain = copy.deepcopy(model)
        closest = watch_windows(plain)
        update, loss = by_definition(plain, data, plan)
        assert min(closest, default=math.inf) > 1e-9, "of two first places in a window either may win: take other examples"
        for result in (one, other):
            assert (result.client, result.examples) == (data.client, len(data.y))
            torch.testing.assert_close(result.update, update, rtol=0, atol=1e-9)
            np.testing.assert_allclose(result.loss, loss, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ZOO)
def test_engines_agree_in_single_precision_without_fake_quant(name):
    model, shape = network(name, False, torch.float32), SHAPES[name]
    loop = list(LoopTrainer(copy.deepcopy(model)).train(start_of(model), federation(shape, torch.float32)[:3], PRIVATE))
    many = list(VmapTrainer(model).train(start_of(model), federation(shape, torch.float32)[:3], PRIVATE))
    for one, other in zip(loop, many, strict=True):
        torch.testing.assert_close(one.update, other.update, rtol=0, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_a_batch_may_be_processed_in_any_pieces(path):
    model = network("cnn", True, torch.float64)
    updates = []
    for microbatch in (64, 3):
        trainer = LoopTrainer(copy.deepcopy(model), microbatch=microbatch)
        trainer.private.choice = GradientChoice(path, "by the test")
        trainer.private._checked = activation_ranges(model), PRIVATE.loss
        (result,) = trainer.train(start_of(model), [client(0, 20, SHAPES["cnn"])], PRIVATE)
        assert trainer.private.choice.path == path
        updates.append(result.update)
    for other in updates[1:]:
        torch.testing.assert_close(other, updates[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("trainer", [LoopTrainer, VmapTrainer])
def test_with_hardly_any_noise_and_no_clipping_it_is_sgd_on_poisson_batches(trainer):
    plan = LocalPlan(3, 4, 0.05, momentum=0.5, dp=DpSgdPlan(clipping_norm=1e6, noise_multiplier=1e-18))
    model = network("mlp", False, torch.float64)
    plain, data = copy.deepcopy(model), client(0, 11, SHAPES["mlp"])
    (result,) = trainer(model).train(start := start_of(plain), [client(0, 11, SHAPES["mlp"])], plan)
    optimizer = torch.optim.SGD(plain.parameters(), plan.lr, plan.momentum)
    for batch in poisson_batches(11, plan, data.rng):
        optimizer.zero_grad()
        loss = F.cross_entropy(plain(data.x[batch]), data.y[batch], reduction="sum") / plan.batch_size
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(result.update, start_of(plain) - start, rtol=0, atol=1e-9)


def noisy_gradient(trainer, data: ClientData, plan: LocalPlan) -> torch.Tensor:
    """The gradient of the single step of a plan without momentum: update = -lr * gradient."""
    model = network("mlp", False, torch.float64)
    (result,) = trainer(model).train(start_of(model), [data], plan)
    return -result.update / plan.lr


@pytest.mark.parametrize("trainer", [LoopTrainer, VmapTrainer])
def test_one_example_moves_a_step_by_at_most_the_clipping_norm(trainer):
    plan = LocalPlan(1, 8, 1.0, dp=DpSgdPlan(clipping_norm=0.3, noise_multiplier=2.0))
    full = client(0, 8, SHAPES["mlp"])
    moved = []
    for left_out in range(8):
        rest = torch.tensor([i for i in range(8) if i != left_out])
        full, fewer = client(0, 8, SHAPES["mlp"]), client(0, 8, SHAPES["mlp"])
        fewer = ClientData(0, fewer.x[rest], fewer.y[rest], fewer.rng, fewer.noise_rng)  # one batch: every example, equal noise
        difference = noisy_gradient(trainer, full, plan) - noisy_gradient(trainer, fewer, plan)
        moved.append(float(difference.norm()) * plan.batch_size)
    assert max(moved) <= 0.3 * (1 + 1e-9)
    assert max(moved) >= 0.3 * (1 - 1e-9)  # these examples' gradients are all longer than that


@pytest.mark.parametrize("trainer", [LoopTrainer, VmapTrainer])
@pytest.mark.parametrize("spoiled", [math.nan, math.inf, 1e200])
def test_an_example_that_is_not_finite_reaches_no_further_than_any_other(trainer, spoiled):
    plan = LocalPlan(1, 8, 1.0, dp=DpSgdPlan(clipping_norm=0.3, noise_multiplier=2.0))
    good, bad = client(0, 8, SHAPES["mlp"]), client(0, 8, SHAPES["mlp"])
    bad.x[3] = spoiled
    difference = noisy_gradient(trainer, good, plan) - noisy_gradient(trainer, bad, plan)
    assert 0 < float(difference.norm()) * plan.batch_size <= 2 * 0.3 * (1 + 1e-9)  # one example is replaced by another


@pytest.mark.parametrize("trainer", [LoopTrainer, VmapTrainer])
def test_the_noise_of_a_step_has_the_variance_that_is_charged_for(trainer):
    plan = LocalPlan(1, 16, 0.5, dp=DpSgdPlan(clipping_norm=1e-9, noise_multiplier=1.5e9))  # nothing but noise
    found = noisy_gradient(trainer, client(0, 16, SHAPES["mlp"], seed=7), plan)
    expected, n = (1.5 / 16) ** 2, len(found)
    assert float(found.square().mean()) == pytest.approx(expected, rel=5 * math.sqrt(2 / n))
    assert abs(float(found.mean())) < 5 * math.sqrt(expected / n)


@pytest.mark.parametrize("trainer", [LoopTrainer, VmapTrainer])
def test_an_empty_batch_makes_a_noisy_step_and_no_examples_make_none(trainer):
    plan = LocalPlan(1, 1, 0.5, dp=DpSgdPlan(clipping_norm=1.0, noise_multiplier=1.0))
    seed = next(s for s in range(1000) if not any(map(len, poisson_batches(2, plan, client_rng(s, 1, 0, 1)))))
    model = network("mlp", False, torch.float64)
    (result,) = trainer(model).train(start := start_of(model), [client(0, 2, SHAPES["mlp"], seed=seed)], plan)
    noise, expected, drawn = GaussianNoise(client_rng(seed, 1, 0, 3)), torch.zeros_like(start), torch.empty_like(start)
    for _ in range(2):
        noise.fill(drawn, 1.0)
        expected -= 0.5 * drawn
    torch.testing.assert_close(result.update, expected, rtol=0, atol=1e-12)
    assert math.isnan(result.loss)
    (nobody,) = trainer(model).train(start, [client(0, 0, SHAPES["mlp"])], plan)
    assert (nobody.examples, float(nobody.update.abs().sum())) == (0, 0.0)
    assert math.isnan(nobody.loss)


def test_the_schedule_of_poisson_batches():
    plan = LocalPlan(3, 10, 0.1)
    assert poisson_schedule(0, plan) == (0.0, 0)
    assert poisson_schedule(1, plan) == (1.0, 3)
    assert poisson_schedule(10, plan) == (1.0, 3)
    assert poisson_schedule(11, plan) == (0.5, 6)
    for batch in poisson_batches(7, plan, np.random.default_rng(0)):
        assert batch.tolist() == list(range(7))  # a batch size of at least n: everyone, every time


def test_poisson_batches_are_independent_coins_and_never_truncated():
    plan = LocalPlan(4000, 10, 0.1)
    batches = poisson_batches(40, plan, np.random.default_rng(1))
    coins = np.zeros((len(batches), 40))
    for row, batch in zip(coins, batches, strict=True):
        row[batch] = 1
    assert len(batches) == 16_000
    spread = math.sqrt(0.25 * 0.75 / len(batches))
    assert abs(coins.mean(0) - 0.25).max() < 5 * spread
    together = coins.T @ coins / len(batches) - 0.0625
    assert abs(together - np.diag(np.diag(together))).max() < 5 * spread
    sizes = coins.sum(1)
    assert sizes.var() == pytest.approx(40 * 0.25 * 0.75, rel=0.06)  # as of a binomial: nothing is cut at ten
    assert sizes.max() > 18


@pytest.mark.parametrize("count", [1, 7, (1 << 17) + 1, 300_001])
def test_noise_is_box_and_mullers_transform_of_the_ciphers_bits(count):
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    out = torch.empty(count, dtype=torch.float64)
    GaussianNoise(np.random.default_rng(3)).fill(out, 2.5)
    stream = Cipher(algorithms.AES128(np.random.default_rng(3).bytes(16)), modes.CTR(bytes(16))).encryptor()
    expected = []
    for first in range(0, count, 1 << 17):
        length = min(1 << 17, count - first)
        pairs = (length + 1) // 2
        bits = stream.update(bytes(12 * pairs))
        radius = 2.5 * np.sqrt(-2 * np.log(np.abs(np.frombuffer(bits, np.int64, pairs).astype(float)) / 2**63))
        angle = np.frombuffer(bits, np.int32, pairs, 8 * pairs) / 2**31 * math.pi
        expected.append(np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:length])
    np.testing.assert_allclose(out.numpy(), np.concatenate(expected), rtol=1e-9, atol=1e-9)


def sfc64(state):
    """Doty-Humphrey's generator, by the letter."""
    a, b, c, count = map(int, state)
    most = 2**64 - 1
    while True:
        found = (a + b + count) & most
        count = (count + 1) & most
        a, b = b ^ b >> 11, (c + (c << 3)) & most
        c = ((c << 24 | c >> 40) + found) & most
        yield found


@pytest.mark.parametrize("count", [1, 32, 33, 1000])
def test_simulated_noise_is_box_and_mullers_transform_of_eight_generators_words(count):
    rng, noise = np.random.default_rng(3), SimulatedNoise(np.random.default_rng(3))
    words = rng.bit_generator.random_raw(24).reshape(3, 8)
    lanes = [sfc64([*words[:, lane], 1]) for lane in range(8)]
    for _ in range(2):
        out, expected = torch.empty(count, dtype=torch.float64), []
        noise.fill(out, 2.5)
        for _ in range(-(-count // 32)):
            radii, angles = (np.array([next(lane) for lane in lanes], np.uint64).view(np.int32) for _ in range(2))
            radius = 2.5 * np.sqrt(-2 * np.log((radii & 0x7FFFFFFF | 1) / 2**31))
            angle = angles / 2**31 * math.pi / 2
            expected += [*(np.where(radii < 0, -1, 1) * radius * np.cos(angle)), *(radius * np.sin(angle))]
        np.testing.assert_allclose(out.numpy(), expected[:count], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("deviation", [1e-30, 1e30])
def test_noise_of_any_size_is_drawn_in_single_precision(deviation):
    drawn = torch.empty(1000)
    GaussianNoise(np.random.default_rng(1)).fill(drawn, deviation)
    assert (drawn.double() / deviation).std().item() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_normal_and_independent(dtype):
    from scipy import stats

    drawn = torch.empty(400_000, dtype=dtype)
    noise = GaussianNoise(np.random.default_rng(11))
    noise.fill(drawn, 3.0)
    values = drawn.double().numpy() / 3
    assert stats.kstest(values, "norm").pvalue > 1e-4
    assert abs(np.mean(values**4) - 3) < 5 * math.sqrt(96 / len(values))
    assert np.isfinite(values).all()
    half = len(values) // 2
    for lag in (1, 2, 1 << 16, half):
        assert abs(np.mean(values[:-lag] * values[lag:])) < 5 / math.sqrt(len(values) - lag)
        assert abs(np.mean(values[:-lag] ** 2 * values[lag:] ** 2) - 1) < 5 * math.sqrt(8 / (len(values) - lag))
    again = torch.empty_like(drawn)
    noise.fill(again, 3.0)
    assert abs(float((drawn * again).double().mean())) < 9 * 5 / math.sqrt(len(values))  # the stream goes on


def test_results_depend_on_the_generators_only():
    def updates(noise_seed: int, batch_seed: int) -> torch.Tensor:
        model = network("mlp", False, torch.float64)
        data = client(0, 12, SHAPES["mlp"])
        seeded = ClientData(0, data.x, data.y, np.random.default_rng(batch_seed), np.random.default_rng(noise_seed))
        (result,) = LoopTrainer(model).train(start_of(model), [seeded], PRIVATE)
        return result.update

    torch.manual_seed(1)
    first = updates(1, 1)
    torch.manual_seed(2)
    assert torch.equal(updates(1, 1), first)
    assert not torch.equal(updates(2, 1), first)
    assert not torch.equal(updates(1, 2), first)


def test_activation_ranges_frozen_between_rounds_reach_the_gradients():
    """Opacus copies a quantized layer when it is attached; a copy from before calibration would give other gradients."""
    plan = LocalPlan(1, 8, 0.5, dp=DpSgdPlan(0.5, 1e-3))
    calibrated, ranges = network("cnn", True, torch.float64), None
    ranges = activation_ranges(calibrated)
    expected, _ = by_definition(copy.deepcopy(calibrated), client(0, 8, SHAPES["cnn"]), plan)
    for path in PATHS:
        model = copy.deepcopy(calibrated)
        set_activation_ranges(model, {})
        trainer, start = LoopTrainer(model), start_of(model)
        list(trainer.train(start, [client(0, 8, SHAPES["cnn"])], plan))
        set_activation_ranges(model, ranges)
        trainer.private.choice, trainer.private._checked = GradientChoice(path, "by the test"), ranges
        (result,) = trainer.train(start, [client(0, 8, SHAPES["cnn"])], plan)
        torch.testing.assert_close(result.update, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("trainer", [LoopTrainer, VmapTrainer])
def test_without_a_generator_for_noise_nothing_is_trained(trainer):
    model, data = network("mlp", False, torch.float64), client(0, 5, SHAPES["mlp"])
    with pytest.raises(Refused, match="client 0 has no generator for its noise"):
        list(trainer(model).train(start_of(model), [ClientData(0, data.x, data.y, data.rng)], PRIVATE))


@pytest.mark.parametrize(
    ("norm", "multiplier"), [(0.0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (math.inf, 1.0), (1.0, 0.0), (1.0, math.nan)]
)
def test_a_plan_that_protects_nobody_is_refused(norm, multiplier):
    with pytest.raises(Refused, match="must be a finite number above 0"):
        DpSgdPlan(norm, multiplier)


def test_clipping_factors():
    norms = torch.tensor([0.0, 0.5, 1.0, 4.0], dtype=torch.float64)
    assert clipping_factors(norms, 1.0).tolist() == [1.0, 1.0, 1.0, 0.25]


def test_frozen_parameters_get_neither_gradient_nor_noise():
    model = network("cnn", True, torch.float64)
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    model[3].bias.requires_grad_(False)
    frozen = model[0].weight.clone()
    start = start_of(model)
    results = [
        next(iter(trainer(m).train(start, [client(0, 9, SHAPES["cnn"])], PRIVATE)))
        for trainer, m in ((LoopTrainer, model), (VmapTrainer, copy.deepcopy(model)))
    ]
    torch.testing.assert_close(results[0].update, results[1].update, rtol=0, atol=1e-9)
    assert torch.equal(model[0].weight, frozen)


def test_dropout_is_a_function_of_the_clients_generator():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Dropout(0.5), nn.Linear(16, 4)).double()
    start = start_of(model)
    alone, after = LoopTrainer(copy.deepcopy(model)), LoopTrainer(copy.deepcopy(model))
    (first,) = alone.train(start, [client(1, 9, (1, 8, 8))], PRIVATE)  # the model is checked in front of it
    _, second = after.train(start, [client(0, 9, (1, 8, 8)), client(1, 9, (1, 8, 8))], PRIVATE)
    assert torch.equal(first.update, second.update)


@pytest.mark.parametrize("path", PATHS)
def test_the_clipped_sum_never_exceeds_the_bound_per_example(path):
    model = network("cnn", False, torch.float64)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    data = client(0, 20, SHAPES["cnn"])
    with GradientChoice(path, "").open(model) as gradients:
        for i in range(20):
            for parameter in model.parameters():
                parameter.grad.zero_()
            add_clipped(gradients, data.x[i : i + 1], data.y[i : i + 1], 0.01, 1.0)
            norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
            assert norm == pytest.approx(0.01, rel=1e-9)
