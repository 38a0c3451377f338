"""The models of the zoo for small inputs, and clients for them."""

import dataclasses
import math

import numpy as np
import torch
from torch import nn

from fedcore.models import ZOO
from fedcore.native.build import BuildFailed, compiler_version, host_target
from fedcore.quantization.layers import calibrate, make_quantization_aware
from fedcore.training.plan import ClientData, LocalPlan, client_rng

SHAPES = {"mlp": (1, 8, 8), "cnn": (1, 8, 8), "lenet": (1, 16, 16), "dscnn": (1, 8, 8), "imu_cnn": (3, 20)}
CLASSES = 4
SIZES = (13, 1, 7, 20, 10)  # unequal, one example, ragged and full last batches
# Rounded inputs and weights lie on grids, so that two positions of a pooling window can tie but for the last bit, and which one
# wins depends on the order of additions. These few clients have no such window; `test_no_window_ties` holds them to it.
FEW = (6, 1, 5)
PLANS = {
    "sgd": LocalPlan(epochs=2, batch_size=5, lr=0.05),
    "everything": LocalPlan(epochs=2, batch_size=5, lr=0.05, momentum=0.9, weight_decay=0.01, proximal_mu=0.1),
}
SQUARED = dataclasses.replace(PLANS["everything"], loss="squared")


def network(
    name: str, quantized: bool = False, dtype: torch.dtype = torch.float32, *, calibrated: bool = True
) -> nn.Module:  # fmt: skip
    torch.manual_seed(0)
    model: nn.Module = ZOO[name](SHAPES[name], CLASSES)
    if quantized:
        make_quantization_aware(model)
    if quantized and calibrated:
        calibrate(model, [torch.randn(50, *SHAPES[name])])
    return model.to(dtype)


def federation(shape: tuple[int, ...], dtype: torch.dtype, sizes=SIZES, seed: int = 5) -> list[ClientData]:
    rng = np.random.default_rng(seed)
    clients = []
    for client, size in enumerate(sizes):
        x = torch.tensor(rng.standard_normal((size, *shape)), dtype=dtype)
        clients.append(ClientData(client, x, torch.tensor(rng.integers(0, CLASSES, size)), client_rng(1, 1, client, 1)))
    return clients


def start_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])


def updates(trainer, clients: list[ClientData], plan: LocalPlan) -> tuple[torch.Tensor, np.ndarray]:
    """The updates [clients, d] and losses of clients that start from the trainer's own model."""
    results = list(trainer.train(start_of(trainer.model).clone(), clients, plan))
    assert [r.client for r in results] == [c.client for c in clients]
    assert [r.examples for r in results] == [len(c.y) for c in clients]
    return torch.stack([r.update for r in results]), np.array([r.loss for r in results])


def watch_windows(model: nn.Module) -> list[float]:
    """By how much the first place of a pooling window that counts is ahead of the second, at least in each batch from now on."""
    found: list[float] = []

    def watch(_module, inputs):
        windows = inputs[0].detach().unfold(-1, 2, 2)
        if windows.dim() == 5:
            windows = windows.unfold(2, 2, 2).flatten(-2)
        best = windows.topk(2, -1).values
        ahead = (best[..., 0] - best[..., 1])[best[..., 0] > 0]
        found.append(float(ahead.min()) if ahead.numel() else math.inf)

    for layer in model:
        if isinstance(layer, (nn.MaxPool1d, nn.MaxPool2d)):
            layer.register_forward_pre_hook(watch)
    return found


def why_no_compiler() -> str:
    """Empty where native code can be compiled for this machine."""
    try:
        compiler_version()
        host_target()
    except BuildFailed as error:
        return str(error)
    return ""
