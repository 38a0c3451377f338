"""Rounds of DP-SGD in one process: our loop beside Opacus's own, in two forms.

``opacus``: what its documentation, and Flower's example, have one write: each client calls PrivacyEngine.make_private on model,
optimizer and data loader, and iterates over the loader that it gets back, which draws Poisson batches.
``opacus_lean``: what can be left out of that: the model is hooked once for all clients, batches are indexed out of a tensor, and
only the DPOptimizer is each client's own. It draws the same Poisson batches as ours.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from opacus import GradSampleModule, PrivacyEngine
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fedcore.training.dpsgd import GaussianNoise
from fedcore.training.engine import Engine, make_trainer
from fedcore.training.local import LoopTrainer
from fedcore.training.plan import ClientData, LocalPlan, poisson_batches

__all__ = ["measure_private"]

# The clients of a round, given its number.
Clients = Callable[[int], list[ClientData]]
_TURN = 10  # clients of each loop at a time, so that a machine whose speed varies slows all of them alike


class EqualNoise(DPOptimizer):
    """Opacus's optimizer with noise that is drawn as ours is, for the comparison."""

    def __init__(self, stream: GaussianNoise, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.stream = stream

    def add_noise(self) -> None:
        """Put sum and noise into ``grad``, as the parent does."""
        noise = torch.empty(sum(p.numel() for p in self.params), dtype=self.params[0].dtype)
        self.stream.fill(noise, self.noise_multiplier * self.max_grad_norm)
        for p, part in zip(self.params, noise.split([p.numel() for p in self.params]), strict=True):
            p.grad = (p.summed_grad + part.view_as(p)).view_as(p)


class DocumentedLoop:
    """One client after another, each with a privacy engine of its own."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.train()

    def train(self, start: Tensor, data: ClientData, plan: LocalPlan) -> Tensor:
        """The update [d] of a client, from Opacus's own batches and noise."""
        assert plan.dp is not None
        torch.nn.utils.vector_to_parameters(start.clone(), self.model.parameters())
        model, optimizer, loader = PrivacyEngine().make_private(
            module=self.model,
            optimizer=torch.optim.SGD(self.model.parameters(), lr=plan.lr),
            data_loader=DataLoader(TensorDataset(data.x, data.y), batch_size=plan.batch_size),
            noise_multiplier=plan.dp.noise_multiplier,
            max_grad_norm=plan.dp.clipping_norm,
        )
        for _ in range(plan.epochs):
            for x, y in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        model.to_standard_module()
        return torch.nn.utils.parameters_to_vector(self.model.parameters()).detach() - start


class LeanLoop:
    """One client after another, with nothing of Opacus but hooks and optimizer."""

    def __init__(self, model: nn.Module) -> None:
        self.model = GradSampleModule(model.train())

    def train(self, start: Tensor, data: ClientData, plan: LocalPlan, stream: GaussianNoise | None = None) -> Tensor:
        """The update [d] of a client; with the noise of ``stream`` where one is given."""
        assert plan.dp is not None
        torch.nn.utils.vector_to_parameters(start.clone(), self.model.parameters())
        sgd = torch.optim.SGD(self.model.parameters(), lr=plan.lr)
        private = {
            "noise_multiplier": plan.dp.noise_multiplier,
            "max_grad_norm": plan.dp.clipping_norm,
            "expected_batch_size": plan.batch_size,
        }
        optimizer = EqualNoise(stream, sgd, **private) if stream else DPOptimizer(sgd, **private)
        for batch in poisson_batches(len(data.y), plan, data.rng):
            index = torch.from_numpy(batch)
            optimizer.zero_grad()
            F.cross_entropy(self.model(data.x[index]), data.y[index]).backward()
            optimizer.step()
        return torch.nn.utils.parameters_to_vector(self.model.parameters()).detach() - start


def measure_private(model: nn.Module, engine: Engine, clients: Clients, plan: LocalPlan, rounds: int) -> dict[str, Any]:
    """Run an engine and both loops in turn; ``max_abs_diff`` compares a client's update in float64, with equal noise."""
    warnings.filterwarnings("ignore", message="(Full backward hook is firing|Secure RNG turned off|Optimal order is the)")
    difference = _difference(copy.deepcopy(model).double(), engine, clients, plan)
    trainer = make_trainer(engine, copy.deepcopy(model))
    documented, lean = DocumentedLoop(copy.deepcopy(model)), LeanLoop(copy.deepcopy(model))
    start = _start(model)
    loops: dict[str, Callable[[ClientData], object]] = {
        "ours": lambda data: list(trainer.train(start, [data], plan)),
        "opacus": lambda data: documented.train(start, data, plan),
        "opacus_lean": lambda data: lean.train(start, data, plan),
    }
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(rounds + 1):
        cohorts = {name: clients(number) for name in loops}
        spent = dict.fromkeys(loops, 0.0)
        for first in range(0, len(cohorts["ours"]), _TURN):
            for name, train in loops.items():
                began = time.perf_counter()
                for data in cohorts[name][first : first + _TURN]:
                    train(data)
                spent[name] += time.perf_counter() - began
        for name, times in seconds.items():
            times.append(spent[name])
    own, *others = (times[1:] for times in seconds.values())  # the first of each warms up
    found: dict[str, Any] = {
        "engine": engine.name,
        "gradients": trainer.private.choice.path if isinstance(trainer, LoopTrainer) and trainer.private.choice else "",
        "seconds_per_round": statistics.median(own),
        "clients_per_second": len(cohorts["ours"]) / statistics.median(own),
    }
    for name, times in zip(("opacus", "opacus_lean"), others, strict=True):
        found[f"{name}_seconds_per_round"] = statistics.median(times)
        found[f"vs_{name}"] = statistics.median(t / o for t, o in zip(times, own, strict=True))
    return found | {"max_abs_diff": difference}


def _start(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])


def _difference(model: nn.Module, engine: Engine, clients: Clients, plan: LocalPlan) -> float:
    ours, theirs = (clients(0)[0] for _ in range(2))
    assert theirs.noise_rng is not None
    trainer, opacus, start = make_trainer(engine, copy.deepcopy(model)), LeanLoop(model), _start(model)
    double = [ClientData(c.client, c.x.double(), c.y, c.rng, c.noise_rng) for c in (ours, theirs)]
    (result,) = trainer.train(start, double[:1], plan)
    return float((result.update - opacus.train(start, double[1], plan, GaussianNoise(theirs.noise_rng))).abs().max())
