"""What is particular to a chain; `test_ghost` has it among the other ways of taking per-example gradients."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedcore.quantization.layers import FakeQuantize
from fedcore.quantization.wire import ActivationRange
from fedcore.training.chain import ChainGradients, why_not_chain
from fedcore.training.per_example import check_per_example


def with_gradients(model: nn.Module) -> nn.Module:
    for parameter in model.double().parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


def examples(shape: tuple[int, ...], n: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(n, *shape, dtype=torch.float64, generator=generator), torch.arange(n) % 3


def compare(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """A chain's clipped sum and norms, against one backward pass per example."""
    parameters = list(with_gradients(model).parameters())
    factors = torch.linspace(0.1, 1, len(y), dtype=torch.float64)
    with ChainGradients(model) as gradients:
        found = gradients(x, y)
        found.add(factors)
    sums = [torch.zeros_like(p) for p in parameters]
    for i, factor in enumerate(factors):
        rows = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), parameters)
        assert found.norms()[i].item() == pytest.approx(sum(row.square().sum() for row in rows).sqrt().item(), abs=1e-9)
        for total, row in zip(sums, rows, strict=True):
            total.add_(row * factor)
    for parameter, total in zip(parameters, sums, strict=True):
        assert total.abs().sum() > 0, "the comparison would show nothing"
        torch.testing.assert_close(parameter.grad, total, rtol=0, atol=1e-9)


class Shifted(nn.Module):
    """A layer that nothing here knows."""

    def forward(self, x):
        return x.roll(1, -1) + x.square()


def test_a_chain_goes_through_layers_that_it_does_not_know():
    block = nn.Sequential(nn.Conv2d(4, 4, 3, padding="same"), Shifted(), nn.GroupNorm(2, 4), nn.ReLU())
    model = nn.Sequential(
        nn.Hardtanh(), nn.Conv2d(2, 4, 3), nn.MaxPool2d(2), nn.GELU(), block, nn.MaxPool2d(2, stride=1, padding=1, ceil_mode=True),
        nn.Conv2d(4, 5, 1), nn.ELU(), nn.Flatten(1, 2), nn.Linear(5, 6), nn.LayerNorm(6), nn.Flatten(), nn.Linear(150, 3),
    ).double()  # fmt: skip
    x, y = examples((2, 10, 10))
    assert check_per_example(model, x, y).path == "chain"
    compare(model, x, y)


def test_a_chain_rectifies_behind_the_pooling_and_ties_go_where_they_went():
    """Small integers: arithmetic is exact, and windows full of equal and of negative numbers are common."""
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 3)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1, -1], [2, 1], [-1, 0]]).view(3, 2, 1, 1))
        model[0].bias.copy_(torch.tensor([0.0, -1.0, 1.0]))
    x, y = examples((2, 6, 6), 20)
    compare(model, x.round(), y)


def test_a_chain_rounds_activations_as_their_layer_does():
    """On a coarse grid, with inputs that are saturated, that are just not, and that are within half a step of the end."""
    quantizer = FakeQuantize()
    quantizer.frozen = ActivationRange(0.25, 120)  # from -62 to 1.75
    model = nn.Sequential(nn.Linear(8, 8), quantizer, nn.Linear(8, 3)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(8))
        model[0].bias.zero_()
    x = torch.tensor([[1.7, 1.8, 1.87, 1.88, 2.0, -61.9, -62.1, -62.2]], dtype=torch.float64)
    compare(model, x, torch.tensor([1]))


def test_a_chain_leaves_its_input_alone():
    model = with_gradients(nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True), nn.Linear(36, 3)))
    x, y = examples((1, 6, 6))
    before = x.clone()
    with ChainGradients(model) as gradients:
        gradients(x, y)
    assert torch.equal(x, before)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(x + torch.tanh(self.inner(x)))


def _same_layer_twice() -> nn.Module:
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(6, 3))


def _hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    model[1].register_forward_hook(lambda module, arguments, output: output * 3)
    return model


class _Row(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize(
    ("case", "path", "why"),
    [
        (lambda: nn.Sequential(_Block()), "ghost", "a _Block is not one layer"),
        (_Block, "ghost", "not a Sequential"),
        (lambda: _Row(nn.Linear(6, 3)), "ghost", "not a Sequential"),
        (_same_layer_twice, "opacus", "a layer runs twice"),
        (_hooked, "ghost", ""),  # seen by the comparison alone
    ],
)
def test_what_is_no_chain_goes_elsewhere(case, path, why):
    torch.manual_seed(2)
    x, y = examples((6,), 4)
    model = case()
    assert why in why_not_chain(model)
    assert bool(why) == bool(why_not_chain(model))
    assert check_per_example(model, x.float(), y).path == path


def test_a_chain_itself_fails_closed():
    """Where a layer changes after the check."""

    class Doubled(nn.Module):
        def forward(self, x):
            return x.repeat_interleave(2, 0)

    class Merged(nn.Module):
        def forward(self, x):
            return x[::2] + x[1::2]

    model = with_gradients(nn.Sequential(Doubled(), nn.Linear(6, 3), Merged()))
    x, y = examples((6,), 4)
    with ChainGradients(model) as gradients, pytest.raises(RuntimeError, match="8 rows for 4 examples"):
        gradients(x, y)
