"""Both losses are what torch calls them, and a plan, a table and an evaluation are of the one they name."""

import dataclasses

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from torch import nn
from torch.nn import functional as F

from fedcore.config import LOSSES
from fedcore.errors import Refused
from fedcore.training.client import RoundTask
from fedcore.training.evaluation import evaluate
from fedcore.training.loss import loss_of, summed_with_errors
from fedcore.training.plan import DpSgdPlan, LocalPlan

TASK = RoundTask(3, LocalPlan(1, 8, 0.1, momentum=0.5), 10.0)
SQUARED = dataclasses.replace(TASK, plan=dataclasses.replace(TASK.plan, loss="squared"))


def by_torch(outputs: torch.Tensor, labels: torch.Tensor, loss: str) -> torch.Tensor:
    """The mean over examples."""
    if loss == "squared":
        return F.mse_loss(outputs, F.one_hot(labels, outputs.shape[1]).to(outputs.dtype))
    return F.cross_entropy(outputs, labels)


def outputs_and_labels(n: int = 7, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return 3 * torch.randn(n, classes, dtype=torch.float64, generator=generator), torch.arange(n) % classes


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_is_that_of_torch(loss):
    outputs, labels = outputs_and_labels()
    expected = by_torch(outputs, labels, loss)
    torch.testing.assert_close(loss_of(outputs, labels, loss), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss_of(outputs, labels, loss, "sum"), 7 * expected, rtol=1e-12, atol=0)
    each = torch.stack([by_torch(outputs[i : i + 1], labels[i : i + 1], loss) for i in range(7)])
    torch.testing.assert_close(loss_of(outputs, labels, loss, "none"), each, rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_errors_are_the_gradient_of_the_sum(loss):
    outputs, labels = outputs_and_labels()
    total, errors = summed_with_errors(outputs, labels, loss)
    outputs.requires_grad_(True)
    expected = loss_of(outputs, labels, loss, "sum")
    torch.testing.assert_close(total, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(errors, torch.autograd.grad(expected, outputs)[0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_label_that_is_no_class_raises(loss):
    outputs, labels = outputs_and_labels()
    labels[3] = 5
    for take in (loss_of, summed_with_errors):
        with pytest.raises((IndexError, RuntimeError)):
            take(outputs, labels, loss)


@pytest.mark.parametrize("loss", LOSSES)
def test_an_evaluation_is_of_the_loss_it_is_told(loss):
    torch.manual_seed(0)
    model, (x, y) = nn.Linear(5, 5), outputs_and_labels(600)  # more than a batch
    found = evaluate(model, x.float(), y, loss)
    with torch.no_grad():
        expected = by_torch(model(x.float()).double(), y, loss)
    assert found.loss == pytest.approx(float(expected), rel=1e-12)
    assert found.examples == 600
    usual = evaluate(model, x.float(), y)
    assert found.correct == usual.correct
    assert (found == usual) is (loss == "cross_entropy")


def test_a_plan_of_another_loss_is_none():
    with pytest.raises(Refused, match="loss must be one of cross_entropy, squared, got 'hinge'"):
        LocalPlan(1, 8, 0.1, loss="hinge")


def test_a_table_names_the_loss_only_where_it_is_not_cross_entropy():
    """Tables, and what is signed with them, stay what they were before there was a choice."""
    assert "loss" not in TASK.to_table()
    assert SQUARED.to_table() == TASK.to_table() | {"loss": "squared"}
    for task in (TASK, SQUARED):
        assert RoundTask.from_table(ConfigRecord(task.to_table())) == task
    assert RoundTask.from_table(TASK.to_table() | {"loss": "cross_entropy"}) == TASK
    for wrong in ("hinge", "", 3, ["squared"]):
        with pytest.raises(Refused, match="loss must be one of cross_entropy, squared"):
            RoundTask.from_table(TASK.to_table() | {"loss": wrong})


def test_what_a_guarantee_rests_on_is_the_same_for_both():
    """Clipping bounds what an example adds, whatever its gradient is one of."""
    private = [dataclasses.replace(task, plan=dataclasses.replace(task.plan, dp=DpSgdPlan(1.0, 1.0))) for task in (TASK, SQUARED)]
    assert private[0].guarded() == private[1].guarded()
    assert np.isfinite(list(private[0].guarded().values())).all()
