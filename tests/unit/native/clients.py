"""Models, clients and comparisons that the tests of the native trainer share."""

import numpy as np
import torch
from torch import nn

from fedcore.models import ZOO
from fedcore.native.build import BuildFailed, compiler_version, host_target
from fedcore.quantization.layers import calibrate, make_quantization_aware
from fedcore.training.plan import ClientData, LocalPlan, client_rng

SHAPES = {"mlp": (1, 8, 8), "cnn": (1, 8, 8), "lenet": (1, 16, 16), "dscnn": (1, 8, 8), "imu_cnn": (3, 20)}
SIZES = (13, 1, 7, 20, 10)  # unequal, one example, ragged and full last batches
PLANS = {
    "sgd": LocalPlan(epochs=2, batch_size=5, lr=0.05),
    "everything": LocalPlan(epochs=2, batch_size=5, lr=0.05, momentum=0.9, weight_decay=0.01, proximal_mu=0.1),
}


def why_no_compiler() -> str:
    try:
        compiler_version()
        host_target()
    except BuildFailed as error:
        return str(error)
    return ""


def network(name: str, quantized: bool, dtype: torch.dtype, *, calibrated: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = ZOO[name](SHAPES[name], 4)
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
        clients.append(ClientData(client, x, torch.tensor(rng.integers(0, 4, size)), client_rng(1, 1, client, 1)))
    return clients


def start_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])


def updates(trainer, clients, plan) -> tuple[torch.Tensor, np.ndarray]:
    """The updates [clients, d] and losses of clients that start from the trainer's own model."""
    results = list(trainer.train(start_of(trainer.model).clone(), clients, plan))
    assert [r.client for r in results] == [c.client for c in clients]
    assert [r.examples for r in results] == [len(c.y) for c in clients]
    return torch.stack([r.update for r in results]), np.array([r.loss for r in results])
