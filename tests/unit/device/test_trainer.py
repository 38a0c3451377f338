"""A device's round of training equals the reference loop's, and one that was interrupted equals one that was not."""

import dataclasses
import json
import math
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from device_worlds import examples, exported, start_of
from fedcore_device.checkpoint import load_progress, restored_generator, state_of
from fedcore_device.noise import GaussianNoise, Randomness
from fedcore_device.plan import ExamplePrivacy, TrainingPlan, batches, number_of_steps
from fedcore_device.step import read_step
from fedcore_device.trainer import Paused, Resume, Task, train
from small_zoo import CLASSES, network

from fedcore.config import DataConfig
from fedcore.data.datasets import load_dataset
from fedcore.errors import ClientFailure, Refused, TryAgain
from fedcore.models import ZOO
from fedcore.portable.step import portable_step
from fedcore.quantization.layers import activation_ranges, calibrate, make_quantization_aware
from fedcore.training import dpsgd, plan
from fedcore.training.local import LoopTrainer

PLAN = TrainingPlan(epochs=2, batch_size=5, lr=0.05, momentum=0.9, weight_decay=0.01, proximal_mu=0.1)
PRIVATE = dataclasses.replace(PLAN, privacy=ExamplePrivacy(0.7, 0.8))
PLANS = {"everything": PLAN, "plain": TrainingPlan(2, 5, 0.05), "private": PRIVATE}


def reference_plan(own: TrainingPlan, loss: str = "cross_entropy") -> plan.LocalPlan:
    dp = own.privacy and plan.DpSgdPlan(own.privacy.clipping_norm, own.privacy.noise_multiplier, own.privacy.batches)
    return plan.LocalPlan(own.epochs, own.batch_size, own.lr, own.momentum, own.weight_decay, own.proximal_mu, dp, loss)


def randomness(client: int = 0, round_number: int = 1) -> Randomness:
    order, noise = (plan.client_rng(1, round_number, client, purpose) for purpose in (1, 3))
    return Randomness.seeded(order, noise)


def reference(
    model, start, x, y, own: TrainingPlan, client: int = 0, round_number: int = 1, loss: str = "cross_entropy"
) -> plan.LocalResult:  # fmt: skip
    order, noise = (plan.client_rng(1, round_number, client, purpose) for purpose in (1, 3))
    data = plan.ClientData(client, torch.from_numpy(x), torch.from_numpy(y), order, noise)
    (result,) = LoopTrainer(model).train(torch.from_numpy(start), [data], reference_plan(own, loss))
    return result


def task_of(
    name: str, own: TrainingPlan, *, quantized: bool = False, batch: int = 4, loss: str = "cross_entropy"
) -> Task:  # fmt: skip
    model = network(name, quantized)
    step = exported(name, batch, "example" if own.privacy else "", quantized, loss)
    return Task(read_step(step.data, step.sha256), start_of(model), own, ranges=activation_ranges(model))


@pytest.mark.parametrize("own", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize(
    ("name", "loss"),
    [*((name, "cross_entropy") for name in ZOO), ("mlp", "squared"), pytest.param("cnn", "squared", marks=pytest.mark.slow)],
)
def test_it_equals_the_reference_loop(name, loss, own):
    x, y = examples(name, 23)
    task = task_of(name, own, loss=loss)
    found = train(task, x, y, randomness())
    expected = reference(network(name), task.start, x, y, own, loss=loss)
    np.testing.assert_allclose(found.update, expected.update.numpy(), rtol=0, atol=1e-6)
    assert np.abs(found.update).max() > 1e-3
    assert found.loss == pytest.approx(expected.loss, abs=1e-5)
    assert (found.examples, found.steps) == (23, number_of_steps(23, own))


@pytest.mark.parametrize("size", [0, 1, 5])
@pytest.mark.parametrize("own", [PLAN, PRIVATE], ids=["plain", "private"])
def test_few_examples(own, size):
    x, y = examples("mlp", size)
    task = task_of("mlp", own)
    found, expected = train(task, x, y, randomness()), reference(network("mlp"), task.start, x, y, own)
    np.testing.assert_allclose(found.update, expected.update.numpy(), rtol=0, atol=1e-6)
    assert found.loss == pytest.approx(expected.loss, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_the_batch_of_the_step_changes_nothing(batch):
    x, y = examples("mlp", 23)
    for own in (PLAN, PRIVATE):
        found = train(task_of("mlp", own, batch=batch), x, y, randomness())
        expected = train(task_of("mlp", own), x, y, randomness())
        np.testing.assert_allclose(found.update, expected.update, rtol=0, atol=1e-6)


def federated(quantized: bool, rounds: int = 5, clients: int = 8):
    """Masters after some rounds of FedAvg on the digits, by the reference loop and by the device's, and the test images.

    The model has learnt a little before, and its ranges are measured then: from random weights the answers to many images hang
    on single roundings, and two loops of torch that differ in one unit in the last place agree no better.
    """
    data = load_dataset(DataConfig(), Path(), 0)
    shape, labels = data.train.x.shape[1:], data.train.y.astype(np.int64)
    torch.manual_seed(0)
    model = ZOO["cnn"](shape, 10)
    own = TrainingPlan(epochs=1, batch_size=16, lr=0.05, momentum=0.5)
    start = start_of(model)
    start += reference(model, start, data.train.x, labels, dataclasses.replace(own, epochs=3)).update.numpy()
    torch.nn.utils.vector_to_parameters(torch.from_numpy(start.copy()), model.parameters())
    if quantized:
        calibrate(make_quantization_aware(model), [torch.from_numpy(data.train.x[:128])])
    step = read_step(portable_step(model, shape, batch=16, unit="").data)
    masters = [start.copy(), start.copy()]
    parts = np.array_split(np.random.default_rng(0).permutation(600), clients)
    for number in range(1, rounds + 1):
        updates: list[list[np.ndarray]] = [[], []]
        for client, part in enumerate(parts):
            x, y = data.train.x[part], labels[part]
            updates[0].append(reference(model, masters[0], x, y, own, client, number).update.numpy())
            task = Task(step, masters[1], own, ranges=activation_ranges(model))
            updates[1].append(train(task, x, y, randomness(client, number)).update)
        masters = [master + np.mean(one, axis=0) for master, one in zip(masters, updates, strict=True)]
    assert np.abs(masters[0] - start).max() > 1e-2
    return model, masters, torch.from_numpy(data.test.x)


def test_five_rounds_over_eight_clients_equal_the_reference_without_fake_quant():
    _, (expected, found), _ = federated(quantized=False)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_five_rounds_with_fake_quant_agree_on_the_first_class():
    model, masters, x = federated(quantized=True)
    answers = []
    for master in masters:
        torch.nn.utils.vector_to_parameters(torch.from_numpy(master), model.parameters())
        with torch.no_grad():
            answers.append(model(x).argmax(1))
    assert (answers[0] == answers[1]).float().mean() >= 0.99
    assert len(answers[0].unique()) == 10


def stops_after(steps: int):
    """A condition that no longer holds after so many steps."""
    asked = iter(range(steps + 1))
    return lambda: next(asked) < steps


@pytest.mark.parametrize("own", PLANS.values(), ids=PLANS)
def test_a_pause_after_any_step_changes_no_byte(own, tmp_path):
    x, y = examples("mlp", 23)
    task = task_of("mlp", own)
    whole = train(task, x, y, randomness())
    for stop in range(whole.steps):
        resume = Resume(tmp_path / f"{stop}", every=3)
        with pytest.raises(Paused, match=f"paused after {stop} of 10 steps") as caught:
            train(task, x, y, randomness(), resume=resume, keep_going=stops_after(stop))
        assert caught.value.step == stop
        found = train(task, x, y, Randomness.from_system(), resume=resume)  # the first call's draws go on
        assert found.update.tobytes() == whole.update.tobytes()
        assert dataclasses.replace(found, update=None) == dataclasses.replace(whole, update=None)


class Crash(Exception):
    pass


def crashes_after(steps: int):
    asked = iter(range(steps))

    def keep_going() -> bool:
        if next(asked, None) is None:
            raise Crash
        return True

    return keep_going


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("own", [PLAN, PRIVATE], ids=["plain", "private"])
def test_a_crash_at_any_step_loses_the_steps_since_the_last_write(own, every, tmp_path):
    x, y = examples("mlp", 23)
    task = task_of("mlp", own)
    whole = train(task, x, y, randomness())
    for crash in range(whole.steps):
        resume = Resume(tmp_path / f"{every}-{crash}", every)
        with pytest.raises(Crash):
            train(task, x, y, randomness(), resume=resume, keep_going=crashes_after(crash))
        calls = []
        found = train(task, x, y, randomness(), resume=resume, keep_going=lambda calls=calls: not calls.append(1))
        assert len(calls) == whole.steps - crash // every * every
        assert found.update.tobytes() == whole.update.tobytes()


def test_crash_after_crash_still_ends_with_the_same_bytes(tmp_path):
    x, y = examples("cnn", 23)
    task = task_of("cnn", PRIVATE, quantized=True)
    whole = train(task, x, y, randomness())
    resume = Resume(tmp_path / "progress", every=1)
    for _ in range(whole.steps - 1):
        with pytest.raises(Crash):
            train(task, x, y, randomness(), resume=resume, keep_going=crashes_after(1))
    assert train(task, x, y, randomness(), resume=resume).update.tobytes() == whole.update.tobytes()


def test_what_ended_is_not_trained_again(tmp_path):
    x, y = examples("mlp", 23)
    task, resume = task_of("mlp", PRIVATE), Resume(tmp_path / "progress")
    whole = train(task, x, y, Randomness.from_system(), resume=resume)
    again = train(task, x, y, Randomness.from_system(), resume=resume, keep_going=lambda: False)
    assert again.update.tobytes() == whole.update.tobytes()


def test_progress_of_other_work_is_not_taken_over(tmp_path):
    x, y = examples("mlp", 23)
    task, resume = task_of("mlp", PLAN), Resume(tmp_path / "progress", every=1)

    def interrupted():
        with pytest.raises(Paused):
            train(task, x, y, randomness(), resume=resume, keep_going=stops_after(4))

    others = [
        (dataclasses.replace(task, plan=dataclasses.replace(PLAN, lr=0.06)), x, y),
        (dataclasses.replace(task, start=task.start + np.float32(1e-3)), x, y),
        (task_of("mlp", PLAN, batch=3), x, y),
        (task, x + np.float32(1), y),
        (task, x, (y + 1) % CLASSES),
        (task, x[:22], y[:22]),
    ]
    for other, inputs, labels in others:
        interrupted()
        found = train(other, inputs, labels, randomness(), resume=resume)
        assert found.update.tobytes() == train(other, inputs, labels, randomness()).update.tobytes()


def test_a_damaged_file_is_no_progress(tmp_path):
    x, y = examples("mlp", 23)
    task, resume = task_of("mlp", PRIVATE), Resume(tmp_path / "progress", every=1)
    whole = train(task, x, y, randomness())
    with pytest.raises(Paused):
        train(task, x, y, randomness(), resume=resume, keep_going=stops_after(4))
    content = resume.path.read_bytes()
    for damaged in (b"", content[:-1], content[:40], content[:100] + b"?" + content[101:], b"FCT1", content + b"?"):
        resume.path.write_bytes(damaged)
        assert train(task, x, y, randomness(), resume=resume).update.tobytes() == whole.update.tobytes()


def test_a_crash_while_progress_is_written_leaves_the_last_one(tmp_path, monkeypatch):
    x, y = examples("mlp", 23)
    task, resume = task_of("mlp", PLAN), Resume(tmp_path / "progress", every=1)
    whole = train(task, x, y, randomness())
    for name in ("fsync", "open"):
        right, asked = getattr(os, name), iter(range(8))

        def fails(*arguments, right=right, asked=asked, **named):
            if next(asked, None) is None:
                raise OSError(28, "No space left on device")
            return right(*arguments, **named)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, fails)
            with pytest.raises(TryAgain, match=r"progress cannot be written \(No space left on device\)"):
                train(task, x, y, randomness(), resume=resume)
        assert stat.S_IMODE(resume.path.stat().st_mode) == 0o600
        assert train(task, x, y, randomness(), resume=resume).update.tobytes() == whole.update.tobytes()
        resume.path.unlink()


def test_the_state_of_every_generator_goes_through_json():
    for kind in ("PCG64", "PCG64DXSM", "Philox", "SFC64", "MT19937"):
        rng = np.random.Generator(getattr(np.random, kind)(3))
        rng.standard_normal(7)
        other = restored_generator(json.loads(json.dumps(state_of(rng))))
        assert np.array_equal(other.random(50), rng.random(50))
        assert np.array_equal(other.permutation(50), rng.permutation(50))
    with pytest.raises(ValueError, match="cannot hold the state"):
        restored_generator({"bit_generator": "seed"})
    assert load_progress(Path("/nowhere"), "") is None


@pytest.mark.parametrize("size", [1, 2, 7, 1000, 2 * 65536 + 3])
def test_noise_is_the_stream_of_the_coordinator(size):
    reference_noise = dpsgd.GaussianNoise(np.random.default_rng(1))
    key = Randomness.seeded(np.random.default_rng(0), np.random.default_rng(1)).noise_key
    own = GaussianNoise(key, size)
    for number in range(4):
        drawn = torch.empty(size)
        reference_noise.fill(drawn, 2.5)
        found, later = (np.ones(size, np.float32) for _ in range(2))
        own.add(found, 2.5)
        np.testing.assert_allclose(found - 1, drawn.numpy(), rtol=0, atol=1e-5)
        GaussianNoise(key, size, number).add(later, 2.5)
        assert found.tobytes() == later.tobytes()


@pytest.mark.parametrize("own", [PLAN, PRIVATE], ids=["shuffled", "Poisson"])
def test_batches_are_those_of_the_coordinator(own):
    local = reference_plan(own)
    for size in (0, 1, 4, 5, 23):
        found = list(batches(size, own, np.random.default_rng(size)))
        drawn = (plan.poisson_batches if own.privacy else plan.batch_order)(size, local, np.random.default_rng(size))
        expected = drawn if own.privacy else [one for order in drawn for one in np.split(order, range(5, size, 5)) if len(one)]
        assert [one.tolist() for one in found] == [one.tolist() for one in expected]
        assert len(found) == number_of_steps(size, own)


def test_the_noise_of_the_system_is_fresh_and_has_the_deviation_of_the_plan():
    own = TrainingPlan(1, 64, 1.0, privacy=ExamplePrivacy(1e-3, 2.0))
    x, y = examples("mlp", 64)
    task = task_of("mlp", own, batch=32)
    first, second = (train(task, x, y, Randomness.from_system()).update for _ in range(2))
    noise = (first - second) / math.sqrt(2)  # sums are below 64 clipping norms over all coordinates, and alike in both
    expected = own.lr * own.privacy.clipping_norm * own.privacy.noise_multiplier / own.batch_size
    assert noise.std() == pytest.approx(expected, rel=0.1)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.9
    assert "noise_key" not in repr(Randomness.from_system())


def test_what_does_not_fit_is_refused():
    x, y = examples("mlp", 7)
    task = task_of("mlp", PLAN)
    refused = [
        (dataclasses.replace(task, start=task.start[1:]), x, y, "finite float32 parameters"),
        (dataclasses.replace(task, start=task.start * np.float32(np.nan)), x, y, "finite float32 parameters"),
        (dataclasses.replace(task, start=task.start.astype(np.float64)), x, y, "finite float32 parameters"),
        (dataclasses.replace(task, plan=PRIVATE), x, y, "must clip where the plan protects examples"),
        (dataclasses.replace(task_of("mlp", PRIVATE), plan=PLAN), x, y, "must clip where the plan protects examples"),
        (task, x[:, :, 1:], y, "examples must have shape"),
        (task, x[1:], y, "examples must have shape"),
        (task, x, y + 1, "labels must be integers from 0 to 3"),
        (task, x, y - 1, "labels must be integers from 0 to 3"),
    ]
    for wrong, inputs, labels, line in refused:
        with pytest.raises(Refused, match=line):
            train(wrong, inputs, labels, randomness())
    few = dataclasses.replace(PRIVATE, privacy=ExamplePrivacy(1.0, 1.0, batches=3))
    with pytest.raises(Refused, match="7 examples are 2 batches an epoch, and it is charged for 3 or more"):
        train(task_of("mlp", few), x, y, randomness())


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"epochs": 0}, "epochs must be an integer >= 1"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"lr": math.nan}, "lr must be a finite number"),
        ({"momentum": -0.1}, "momentum must be"),
        ({"weight_decay": math.inf}, "weight_decay must be"),
    ],
)
def test_a_plan_out_of_range_is_refused(values, line):
    with pytest.raises(Refused, match=line):
        dataclasses.replace(PLAN, **values)


@pytest.mark.parametrize("values", [(0, 1, 1), (1, 0, 1), (math.inf, 1, 1), (1, math.nan, 1), (1, 1, 0)])
def test_privacy_out_of_range_is_refused(values):
    with pytest.raises(Refused, match="training plan"):
        ExamplePrivacy(*values)


def test_a_loss_that_explodes_is_the_clients_failure():
    x, y = examples("cnn", 23)
    with pytest.raises(ClientFailure, match="not finite"):
        train(task_of("cnn", dataclasses.replace(PLAN, lr=1e20)), x, y, randomness())


def test_examples_are_left_as_they_are():
    x, y = examples("mlp", 23)
    before = x.copy(), y.copy()
    task = task_of("mlp", PRIVATE)
    start = task.start.copy()
    train(task, x, y, randomness())
    assert np.array_equal(x, before[0]) and np.array_equal(y, before[1]) and np.array_equal(task.start, start)
