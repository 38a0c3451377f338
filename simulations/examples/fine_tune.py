"""Fine-tuning: a body trained beforehand stays frozen, the head is federated.

python simulations/examples/fine_tune.py             # pretrains on a third of the digits, writes body.safetensors
fedcore simulate simulations/examples/fine_tune.toml # the other two thirds belong to the clients; only the head travels
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from fedcore.config import ModelConfig
from fedcore.models import build_model
from fedcore.training.local import LoopTrainer
from fedcore.training.plan import ClientData, LocalPlan, client_rng


def _digits() -> tuple[np.ndarray, np.ndarray]:
    digits = load_digits()
    return (digits.images[:, None] / 16).astype(np.float32), digits.target


def clients() -> tuple[np.ndarray, np.ndarray]:
    """The examples that the clients hold: all but every third. [data] dataset = "fine_tune:clients"."""
    x, y = _digits()
    return x[np.arange(len(y)) % 3 != 0], y[np.arange(len(y)) % 3 != 0]


def pretrain(path: Path) -> float:
    """Train the body and a first head on every third digit, write the parameters; returns the mean training loss."""
    x, y = (torch.from_numpy(part[::3].copy()) for part in _digits())
    model = build_model(ModelConfig(name="cnn"), quantized=False, input_shape=(1, 8, 8), classes=10, seed=0, folder=Path())
    trainer = LoopTrainer(model)
    data = ClientData(0, x, y, client_rng(0, 0, 0, 0))
    (result,) = trainer.train(trainer.flat.values.clone(), [data], LocalPlan(epochs=20, batch_size=32, lr=0.05, momentum=0.9))
    torch.manual_seed(0)
    torch.nn.init.normal_(model[9].weight, std=0.01)  # the clients' own head starts from scratch
    save_file({name: parameter.detach().clone() for name, parameter in model.named_parameters()}, path)
    return result.loss


if __name__ == "__main__":
    target = Path(__file__).with_name("body.safetensors")
    print(f"mean training loss {pretrain(target):.3f}; wrote {target}")
