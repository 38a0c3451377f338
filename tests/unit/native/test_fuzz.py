"""Networks that nobody wrote: whatever the generator takes equals torch, private or not."""

import dataclasses
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_clients import run_elsewhere
from small_zoo import PLANS, federation, updates, why_no_compiler
from torch import nn

from fedcore.config import LOSSES
from fedcore.models import Residual
from fedcore.native.build import FLAGS, host_target
from fedcore.native.trainer import NativeTrainer
from fedcore.training.local import LoopTrainer
from fedcore.training.plan import DpSgdPlan, LocalPlan, client_rng

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_no_compiler()), reason=why_no_compiler() or "compiles")]

PLAN = LocalPlan(epochs=1, batch_size=4, lr=0.05, momentum=0.5, weight_decay=0.01, proximal_mu=0.1)
PRIVATE = dataclasses.replace(PLAN, dp=DpSgdPlan(1.0, 0.5))


def norm(draw, channels):
    """Of groups of more than one channel: alone, a channel makes the gradient of a bias before it zero, one value torch refuses."""
    sizes = [size for size in range(2, channels + 1) if channels % size == 0]
    if not sizes:
        return nn.Identity, (), {}
    return nn.GroupNorm, (channels // draw(st.sampled_from(sizes)), channels), {"affine": draw(st.booleans())}


def residual(draw, channels):
    """Layers that keep an image's shape."""
    layers = [norm(draw, channels)] if draw(st.booleans()) else []
    inside = draw(st.sampled_from([3, 8, 19]))
    first, second = draw(st.sampled_from([(1, 3), (3, 1), (3, 3)]))
    layers += [(nn.Conv2d, (channels, inside, first, 1, first // 2), {}), (nn.ReLU, (), {})]
    return Residual, [*layers, (nn.Conv2d, (inside, channels, second, 1, second // 2), {"bias": draw(st.booleans())})], {}


@st.composite
def networks(draw):
    """A shape and a list of layers that fit it, as (constructor, arguments); those of a residual block are such a list."""
    small = st.integers(1, 3)
    channels, height, width = draw(st.integers(1, 20)), draw(st.integers(5, 11)), draw(st.integers(5, 11))
    shape, layers = (channels, height, width), []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["conv", "conv", "depthwise", "max", "mean", "relu", "relu6", "norm", "residual"]))
        kernel, stride = (draw(small), draw(small)), (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
        if kind in {"relu", "relu6"}:
            layers.append((nn.ReLU if kind == "relu" else nn.ReLU6, (), {}))
            continue
        if kind in {"norm", "residual"}:
            layers.append((norm if kind == "norm" else residual)(draw, channels))
            continue
        pad = tuple(draw(st.integers(0, k // 2)) for k in kernel)
        sizes = [(size + 2 * p - k) // s + 1 for size, p, k, s in zip((height, width), pad, kernel, stride, strict=True)]
        if min(sizes) < 1:
            continue
        if kind in {"max", "mean"}:
            layers.append((nn.MaxPool2d if kind == "max" else nn.AvgPool2d, (kernel, stride, pad), {}))
        else:
            groups = channels if kind == "depthwise" else 1
            out = channels if kind == "depthwise" else draw(st.sampled_from([1, 3, 5, 8, 16, 17, 33]))
            layers.append((nn.Conv2d, (channels, out, kernel, stride, pad), {"groups": groups, "bias": draw(st.booleans())}))
            channels = out
        height, width = sizes
    hidden = draw(st.integers(1, 20))
    layers += [(nn.Flatten, (), {}), (nn.Linear, (channels * height * width, hidden), {})]
    if draw(st.booleans()):
        layers.append((Residual, [norm(draw, hidden), (nn.ReLU, (), {}), (nn.Linear, (hidden, hidden), {})], {}))
    return shape, [*layers, (nn.ReLU, (), {}), (nn.Linear, (hidden, 4), {})]


def built(layers, kind=nn.Sequential):
    """The module of a drawn list."""
    return kind(*(
        built(arguments, maker) if maker is Residual else maker(*arguments, **named) for maker, arguments, named in layers
    ))  # fmt: skip


def seeded(layers):
    torch.manual_seed(2)
    return built(layers)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(networks(), st.sampled_from(LOSSES))
def test_any_network_equals_torch(drawn, loss):
    shape, layers = drawn

    for plan in (dataclasses.replace(PLAN, loss=loss), dataclasses.replace(PRIVATE, loss=loss)):
        found = []
        for trainer in (LoopTrainer, NativeTrainer):
            clients = [
                dataclasses.replace(c, noise_rng=client_rng(1, 1, c.client, 2))
                for c in federation(shape, torch.float64, sizes=(9, 1))
            ]  # fmt: skip
            update, losses = updates(trainer(seeded(layers).double()), clients, plan)
            found.append(update)
            assert plan.dp or all(math.isfinite(loss) for loss in losses)
        torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(networks(), st.sampled_from(LOSSES))
def test_any_network_has_no_undefined_behaviour(tmp_path_factory, drawn, loss):
    """In single precision, built with traps: undefined behaviour ends the process."""
    shape, layers = drawn
    flags = tuple(flag for flag in FLAGS if flag != "-fno-sanitize=all")
    checks = (*flags, "-fsanitize=undefined", "-fsanitize-trap=undefined")
    local = dataclasses.replace(PLANS["everything"], loss=loss)
    checked, _ = run_elsewhere(seeded(layers), shape, host_target(), tmp_path_factory.mktemp("traps"), flags=checks, local=local)
    plain, _ = updates(NativeTrainer(seeded(layers)), federation(shape, torch.float32), local)
    assert torch.equal(checked, plain[0])
