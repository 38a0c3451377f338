"""Per-example gradients on every path, against one backward pass per example; and models for which no path is right."""

import copy
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedcore.errors import Refused
from fedcore.models import ZOO
from fedcore.quantization.layers import calibrate, float_arithmetic, make_quantization_aware
from fedcore.training.ghost import GhostGradients, why_not_ghost
from fedcore.training.per_example import GradientChoice, OpacusGradients, check_per_example, choose_gradients
from fedcore.training.rules import Factored, Materialised, PerExample

SHAPES = {"mlp": (1, 8, 8), "cnn": (1, 12, 12), "lenet": (1, 16, 16), "dscnn": (3, 8, 8), "imu_cnn": (3, 20)}
PATHS = ("chain", "ghost-channels-last", "ghost", "opacus")


@pytest.fixture(autouse=True)
def _one_thread():
    """As a worker trains; threads that wait for each other on a busy machine take six times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def examples(shape: tuple[int, ...], n: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(n, *shape, dtype=torch.float64, generator=generator), torch.arange(n) % 3


def with_gradients(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    return model.train()


def loss_by_torch(outputs: torch.Tensor, y: torch.Tensor, loss: str) -> torch.Tensor:
    """The sum over examples."""
    if loss == "squared":
        return F.mse_loss(outputs, F.one_hot(y, outputs.shape[1]).to(outputs.dtype), reduction="sum") / outputs.shape[1]
    return F.cross_entropy(outputs, y, reduction="sum")


def one_by_one(model: nn.Module, x: torch.Tensor, y: torch.Tensor, loss: str = "cross_entropy") -> dict[str, torch.Tensor]:
    names, trainable = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    rows = [torch.autograd.grad(loss_by_torch(model(x[i : i + 1]), y[i : i + 1], loss), trainable) for i in range(len(y))]
    return {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def per_example(model: nn.Module, found: PerExample) -> dict[str, torch.Tensor]:
    """What ``found`` adds for one example at a time."""
    columns: dict[str, list[torch.Tensor]] = {name: [] for name, p in model.named_parameters() if p.requires_grad}
    n = len(found.norms())
    for one in torch.eye(n, dtype=torch.float64):
        for name in columns:
            model.get_parameter(name).grad.zero_()
        found.add(one)
        for name, rows in columns.items():
            rows.append(model.get_parameter(name).grad.clone())
    return {name: torch.stack(rows) for name, rows in columns.items()}


def compare(path: str, model: nn.Module, x: torch.Tensor, y: torch.Tensor, loss: str = "cross_entropy") -> PerExample:
    truth = one_by_one(with_gradients(model), x, y, loss)
    with GradientChoice(path, "").open(model, loss) as gradients:
        found = gradients(x, y)
        taken = per_example(model, found)
    assert taken.keys() == truth.keys()
    for name, rows in truth.items():
        assert rows.abs().sum() > 0, f"{name}: the comparison would show nothing"
        torch.testing.assert_close(taken[name], rows, rtol=0, atol=1e-9)
    squares = sum(rows.reshape(len(y), -1).square().sum(1) for rows in truth.values())
    torch.testing.assert_close(found.norms(), squares.sqrt(), rtol=1e-9, atol=1e-9)
    assert found.loss.item() == pytest.approx(loss_by_torch(model(x), y, loss).item(), abs=1e-9)
    return found


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("state", ["float", "weights", "fake-quant", "switched off"])
@pytest.mark.parametrize("name", ZOO)
def test_every_parameter_of_the_zoo_gets_its_per_example_gradients(name, state, path):
    torch.manual_seed(0)
    model = ZOO[name](SHAPES[name], 4)
    if state != "float":
        make_quantization_aware(model)
    if state in ("fake-quant", "switched off"):
        calibrate(model, [torch.randn(50, *SHAPES[name])])
    model.double()
    if state != "switched off":
        compare(path, model, *examples(SHAPES[name]))
    else:
        with float_arithmetic(model):
            compare(path, model, *examples(SHAPES[name]))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["mlp", "cnn", *(pytest.param(n, marks=pytest.mark.slow) for n in ("lenet", "dscnn", "imu_cnn"))])
def test_every_path_takes_the_gradients_of_the_squared_error(name, path):
    torch.manual_seed(0)
    model = make_quantization_aware(ZOO[name](SHAPES[name], 4))
    calibrate(model, [torch.randn(50, *SHAPES[name])])
    compare(path, model.double(), *examples(SHAPES[name]), "squared")
    x, y = examples(SHAPES[name])
    assert check_per_example(model, x, y, "squared").path == "chain"


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_takes_the_fast_path(name):
    model = ZOO[name](SHAPES[name], 4)
    x, y = examples(SHAPES[name])
    for candidate in (model, make_quantization_aware(copy.deepcopy(model))):
        assert check_per_example(candidate, x.float(), y).path == "chain"
        within = Wrapped(candidate)
        assert check_per_example(within, x.float(), y).path == ("ghost" if len(SHAPES[name]) < 3 or name == "mlp" else PATHS[1])


class Wrapped(nn.Module):
    """A model whose forward pass is its own, as users write them."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x)


LAYERS = {
    "stride, dilation, padding": (nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (2, 9, 8)),
    "one channel": (nn.Conv2d(1, 4, 3, padding=1), (1, 6, 6)),
    "1x1": (nn.Conv2d(3, 5, 1), (3, 4, 4)),
    "1x1, stride": (nn.Conv2d(3, 5, 1, stride=2), (3, 5, 5)),
    "one position": (nn.Conv2d(6, 5, 3), (6, 3, 3)),
    "few positions (Gram matrices)": (nn.Conv2d(16, 12, 3), (16, 4, 4)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 5, 5)),
    "groups, 1x1": (nn.Conv2d(4, 6, 1, groups=2), (4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, stride=2, padding=1), (4, 5, 5)),
    "same": (nn.Conv2d(2, 3, (2, 4), padding="same"), (2, 5, 6)),
    "reflect": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 5, 6)),
    "circular": (nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="circular"), (2, 5, 6)),
    "no bias": (nn.Conv2d(2, 3, 3, bias=False), (2, 5, 5)),
    "1d": (nn.Conv1d(3, 4, 3, stride=2, padding=2, dilation=2), (3, 11)),
    "1d, groups": (nn.Conv1d(4, 6, 3, groups=2), (4, 9)),
    "1d, same": (nn.Conv1d(2, 4, 4, padding="same"), (2, 9)),
    "1d, wide (Gram matrices)": (nn.Conv1d(20, 16, 3), (20, 6)),
    "linear over positions": (nn.Linear(5, 4), (3, 7, 5)),
    "linear over few positions (Gram matrices)": (nn.Linear(20, 16), (2, 20)),
    "group norm": (nn.GroupNorm(2, 6), (6, 4, 4)),
    "group norm, 1d": (nn.GroupNorm(3, 6), (6, 5)),
    "layer norm": (nn.LayerNorm(6), (6,)),
    "layer norm over positions": (nn.LayerNorm((3, 4)), (5, 2, 3, 4)),
}


@pytest.mark.parametrize("path", PATHS[:3])
@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer(name, path):
    layer, shape = LAYERS[name]
    torch.manual_seed(1)
    layer = copy.deepcopy(layer)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    width = layer(torch.randn(1, *shape)).numel()
    # The layer in front makes the gradient go through the one in question.
    model = nn.Sequential(nn.Linear(shape[-1], shape[-1]), layer, nn.Tanh(), nn.Flatten(), nn.Linear(width, 3)).double()
    x, y = examples(shape)
    found = compare(path, model, x, y)
    if "Gram" in name:
        assert isinstance(found.parts[2], Factored)
        assert found.parts[2].inputs.dim() == 3
    assert why_not_ghost(model) == ""
    compare(path, make_quantization_aware(model), x, y)


def test_only_trained_parameters_are_given():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.GroupNorm(1, 2), nn.Flatten(), nn.Linear(2 * 16, 3)).double()
    for name in ("0.weight", "2.bias", "4.bias"):
        model.get_parameter(name).requires_grad_(False)
    for path in PATHS:
        assert len(compare(path, model, *examples((1, 6, 6))).parts) == 3


def test_operators_in_place_behind_a_layer_do_not_move_its_gradient():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(48, 3)).double()
    for path in PATHS[:3]:
        compare(path, model, *examples((1, 6, 6)))


@pytest.mark.parametrize("p", [1, 2, 40])
def test_the_two_forms_of_a_product_are_the_same(p):
    inputs, errors = torch.randn(4, p, 6, dtype=torch.float64), torch.randn(4, p, 5, dtype=torch.float64)
    sums = torch.zeros(2, 30, dtype=torch.float64)
    rows = torch.einsum("npo,npi->noi", errors, inputs).flatten(1)
    squeezed = (inputs[:, 0], errors[:, 0]) if p == 1 else (inputs, errors)
    parts = Materialised(sums[0], rows), Factored(sums[1].view(5, 6), *squeezed)
    torch.testing.assert_close(parts[0].norms(), parts[1].norms(), rtol=1e-12, atol=1e-12)
    for part in parts:
        part.add(torch.tensor([0.5, 2.0, 0.0, -1.0], dtype=torch.float64))
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-12, atol=1e-12)


def test_a_path_leaves_nothing_behind():
    model = with_gradients(nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(48, 3)).double())
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    x, y = examples((1, 6, 6))
    for path in PATHS:
        with GradientChoice(path, "").open(model) as gradients:
            gradients(x, y)
        assert {name: set(vars(module)) for name, module in model.named_modules()} == before
        for module in model.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks and not module._backward_hooks
        for parameter in model.parameters():
            assert not hasattr(parameter, "grad_sample")
            assert parameter.grad.abs().sum() == 0


class Three(nn.Module):
    """Three linear layers; what a subclass does with ``other`` is the case."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.other, self.last = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.between(torch.tanh(self.first(x)))))

    def between(self, h):
        return self.other(h)


class Functional(Three):
    def between(self, h):
        return F.linear(h, self.other.weight, self.other.bias)


class LayerAndFunctional(Three):
    def between(self, h):
        return F.linear(self.other(h), self.other.weight)


class Unused(Three):
    def between(self, h):
        return h


class Detached(Three):
    def between(self, h):
        return F.linear(h, self.other.weight.detach())


class AcrossExamples(Three):
    def between(self, h):
        return self.other(h - h.mean(0, keepdim=True))


class RowsOfItsOwn(Three):
    def between(self, h):
        return self.other(h.repeat_interleave(2, 0)).view(len(h), 2, -1).sum(1)


class HiddenHook(Three):
    def __init__(self) -> None:
        super().__init__()
        self.other.register_forward_hook(lambda module, arguments, output: output * 3)


class Patched(Three):
    def __init__(self) -> None:
        super().__init__()
        self.other.forward = lambda h: F.linear(h * h, self.other.weight, self.other.bias)


class FunctionalDropout(Three):
    def between(self, h):
        return F.dropout(self.other(h))


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        return torch.round(weight * 10) / 10

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class _LinearOfRounded(nn.Linear):
    def forward(self, h):
        return F.linear(h, _Rounded.apply(self.weight), self.bias)


class OldAutogradFunction(Three):
    def __init__(self) -> None:
        super().__init__()
        self.other = _LinearOfRounded(5, 5)


class Buffers(Three):
    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torch.ao.nn.qat import Linear
            from torch.ao.quantization import get_default_qat_qconfig

            self.other = Linear(5, 5, qconfig=get_default_qat_qconfig())


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (Functional, "parameter other.weight gets no per-example gradient"),  # Opacus says nothing
        (Unused, "parameter other.weight gets no per-example gradient"),
        (Detached, "parameter other.weight gets no per-example gradient"),
        (LayerAndFunctional, "parameter other.weight gets a wrong per-example gradient"),  # Opacus says nothing
        (HiddenHook, "parameter other.weight gets a wrong per-example gradient"),  # nor here
        (Patched, "parameter other.weight gets a wrong per-example gradient"),  # nor here
        (AcrossExamples, "parameter first.weight gets a wrong per-example gradient"),
        (RowsOfItsOwn, "parameter other.weight has 8 per-example gradients for 4 examples"),
        (FunctionalDropout, "draws random numbers outside dropout layers"),
        (OldAutogradFunction, r"layer other \(_LinearOfRounded\)"),
        (Buffers, r"layer other \(Linear\)"),
    ],
)
def test_a_model_without_right_per_example_gradients_is_refused(case, why):
    torch.manual_seed(2)
    x, y = examples((6,), 4)
    with pytest.raises(Refused, match=why) as refused:
        check_per_example(case(), x.float(), y)
    assert "\n" not in str(refused.value)


def test_opacus_is_silent_where_it_is_wrong():
    """The reason for the check: no error, and no gradients or other ones than the true ones."""
    x, y = examples((6,), 4)
    model = with_gradients(LayerAndFunctional().double())
    truth = one_by_one(model, x, y)
    with OpacusGradients(model) as gradients:
        taken = per_example(model, gradients(x, y))
    assert (taken["other.weight"] - truth["other.weight"]).abs().max() > 1e-3


def test_opacus_is_silent_about_padding_that_is_not_zeros():
    model = nn.Sequential(nn.Conv1d(1, 3, 3, padding=1, padding_mode="reflect"), nn.Flatten(), nn.Linear(18, 3))
    x, y = examples((1, 6), 4)
    assert check_per_example(model, x.float(), y).path == "chain"
    double = with_gradients(model.double())
    with OpacusGradients(double) as gradients:
        taken = per_example(double, gradients(x, y))
    assert (taken["0.weight"] - one_by_one(double, x, y)["0.weight"]).abs().max() > 1e-3


class Twice(Three):
    def between(self, h):
        return self.other(torch.tanh(self.other(h)))


class Tied(Three):
    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(5, 5)
        self.again.weight = self.other.weight

    def between(self, h):
        return self.again(torch.tanh(self.other(h)))


class OfItsOwn(Three):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(5)), nn.Parameter(torch.tensor(0.5))

    def between(self, h):
        return self.other(h) * self.scale + self.shift


class Parametrised(Three):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.other)


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (Twice, "layer other ran twice"),
        (Tied, "parameter again.weight is other.weight too"),
        (OfItsOwn, r"layer model \(OfItsOwn\) has no rule"),
        (Parametrised, r"layer other \(ParametrizedLinear\) has no rule"),
    ],
)
def test_what_ghost_norms_do_not_know_goes_to_opacus(case, why):
    torch.manual_seed(2)
    x, y = examples((6,), 4)
    choice = check_per_example(case(), x.float(), y)
    assert choice.path == "opacus"
    assert re.search(why, choice.reason)
    compare("opacus", case().double(), x, y)


def test_a_forward_pass_that_calls_view_stays_in_its_memory_format():
    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(1, 3, 3), nn.Linear(48, 3)

        def forward(self, x):
            return self.last(self.conv(x).view(len(x), -1))

    x, y = examples((1, 6, 6))
    assert choose_gradients(Viewing(), x.float(), y).path == "ghost"


def test_a_forward_pass_that_names_its_precision_is_compared_in_it():
    class Single(Three):
        def forward(self, x):
            return super().forward(x.float())

    x, y = examples((6,), 4)
    assert check_per_example(Single(), x, y).path == "ghost"


def test_a_classifier_that_starts_at_zero_hides_nothing():
    model = LayerAndFunctional()
    nn.init.zeros_(model.last.weight)
    x, y = examples((6,), 4)
    with pytest.raises(Refused, match=r"other\.weight gets a wrong"):
        check_per_example(model, x.float(), y)
    good = Three()
    nn.init.zeros_(good.last.weight)
    assert check_per_example(good, x.float(), y).path == "ghost"


def test_the_check_touches_neither_the_model_nor_the_random_state():
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 3))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    x, y = examples((6,), 4)
    check_per_example(model, x.float(), y)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("case", "why"), [(Unused, "layer other did not run"), (RowsOfItsOwn, "ran on 8 rows for 4 examples")])
def test_the_fast_path_itself_fails_closed(case, why):
    """Where a model's forward pass changes after the check."""
    x, y = examples((6,), 4)
    model = with_gradients(case().double())
    with GhostGradients(model, channels_last=False) as gradients, pytest.raises(RuntimeError, match=why):
        gradients(x, y)
