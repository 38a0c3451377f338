"""The portable training step beside the definition: one backward pass of autograd for each example, clipped on its own."""

import copy
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opacus import GradSampleModule
from small_zoo import CLASSES, SHAPES, network
from torch import nn
from torch.nn import functional as F

from fedcore.config import LOSSES
from fedcore.errors import Refused
from fedcore.models import ZOO
from fedcore.portable.form import FORM_KEY, OPERATORS, StepForm, range_values
from fedcore.portable.graph import kinked_layers, step_graph
from fedcore.portable.links import Frame
from fedcore.portable.windows import convolution_table, inverse, pooling_table
from fedcore.quantization.layers import (
    FakeQuantize,
    activation_ranges,
    calibrate,
    make_quantization_aware,
    set_activation_ranges,
)
from fedcore.quantization.wire import ActivationRange

BATCH, RAMP = 6, 1e-8
MASK = np.array([1, 1, 0, 1, 1, 0])


def flat(model: nn.Module, wanted: bool = True) -> torch.Tensor:
    chosen = [p.detach().reshape(-1) for p in model.parameters() if p.requires_grad is wanted]
    return torch.cat(chosen) if chosen else torch.zeros(0)


def examples(shape, dtype, batch=BATCH, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((batch, *shape)).astype(dtype), rng.integers(0, CLASSES, batch)


def run(model, shape, x, y, mask=MASK, clip=np.inf, *, clips=True, classes=CLASSES, ramp=0.0, loss="cross_entropy"):
    """The step's answer, in the model's own precision."""
    dtype = np.float64 if next(model.parameters()).dtype is torch.float64 else np.float32
    data, form = step_graph(model, shape, batch=len(x), clips=clips, loss=loss, dtype=dtype, ramp=ramp)
    assert form == StepForm.from_json(form.to_json())
    given = {"parameters": flat(model), "frozen": flat(model, False), "x": x, "y": np.eye(classes)[y], "mask": mask, "clip": clip}
    if form.quantizers:
        given["ranges"] = range_values(activation_ranges(model), form.quantizers, dtype)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    gradient, count, total = session.run(None, {name: np.asarray(given[name], dtype) for name in form.inputs()})
    assert gradient.shape == (form.parameters,)
    return gradient, float(count), float(total)


def loss_by_torch(outputs, labels, loss):
    """The sum over examples."""
    if loss == "squared":
        return F.mse_loss(outputs, F.one_hot(labels, outputs.shape[1]).to(outputs.dtype)) * len(labels)
    return F.cross_entropy(outputs, labels, reduction="sum")


def by_definition(model, x, y, mask=MASK, clip=np.inf, loss="cross_entropy"):
    chosen = [p for p in model.parameters() if p.requires_grad]
    total, losses = torch.zeros_like(flat(model)), 0.0
    for i in np.flatnonzero(mask):
        own = loss_by_torch(model(torch.from_numpy(x[i : i + 1])), torch.from_numpy(y[i : i + 1]), loss)
        found = torch.autograd.grad(own, chosen, allow_unused=True, materialize_grads=True)
        gradient = torch.cat([part.reshape(-1) for part in found])
        norm = float(gradient.norm())
        total += gradient * (min(1.0, clip / norm) if norm else 1.0)
        losses += float(own.detach())
    return total.numpy(), losses


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("quantized", [False, True], ids=["float", "fake-quant"])
@pytest.mark.parametrize("name", ZOO)
def test_in_double_precision_it_is_the_definition(name, quantized, loss):
    model, shape = network(name, quantized, torch.float64), SHAPES[name]
    x, y = examples(shape, np.float64)
    for clip, clips in ((0.4, True), (np.inf, True), (np.inf, False)):
        gradient, count, total = run(model, shape, x, y, clip=clip, clips=clips, loss=loss)
        expected, losses = by_definition(model, x, y, clip=clip, loss=loss)
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-9)
        assert count == MASK.sum()
        assert total == pytest.approx(losses, abs=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ZOO)
def test_in_single_precision_it_is_the_definition_to_1e_6(name, loss):
    model, shape = network(name, False, torch.float32), SHAPES[name]
    x, y = examples(shape, np.float32)
    for clip, clips in ((0.7, True), (np.inf, False)):
        gradient, _, _ = run(model, shape, x, y, clip=clip, clips=clips, loss=loss)
        expected, _ = by_definition(model, x, y, clip=clip, loss=loss)
        np.testing.assert_allclose(gradient / MASK.sum(), expected / MASK.sum(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("loss", "clip"), [("cross_entropy", 0.7), ("squared", 0.4)])
@pytest.mark.parametrize("name", ZOO)
def test_clipped_sums_are_those_of_opacus(name, loss, clip):
    model, shape = network(name, False, torch.float32), SHAPES[name]
    x, y = examples(shape, np.float32)
    gradient, _, _ = run(model, shape, x, y, mask=np.ones(BATCH), clip=clip, loss=loss)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hooked = GradSampleModule(copy.deepcopy(model))
        (loss_by_torch(hooked(torch.from_numpy(x)), torch.from_numpy(y), loss) / BATCH).backward()
    rows = torch.cat([p.grad_sample.reshape(BATCH, -1) for p in hooked.parameters()], 1)
    expected = ((clip / rows.norm(dim=1)).clamp(max=1)[:, None] * rows).sum(0)
    assert (rows.norm(dim=1) > clip).any()
    np.testing.assert_allclose(gradient, expected.numpy(), rtol=0, atol=2e-6)


@st.composite
def networks(draw):
    """A shape and layers that fit it, most of them seldom seen together."""
    sides = draw(st.sampled_from([1, 2]))
    channels, extent = draw(st.sampled_from([1, 2, 4, 6])), [draw(st.integers(5, 9)) for _ in range(sides)]
    shape, layers = (channels, *extent), []
    convolution, largest, mean = ((nn.Conv1d, nn.MaxPool1d, nn.AvgPool1d), (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d))[sides - 1]
    adaptive = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)[sides - 1]
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["conv", "conv", "depthwise", "groups", "max", "mean", "adaptive", "norm", "point"]))
        kernel, stride, dilation = (tuple(draw(st.integers(1, top)) for _ in range(sides)) for top in (3, 2, 2))
        padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
        if kind == "norm":
            layers.append(nn.GroupNorm(draw(st.sampled_from([g for g in (1, 2, 3) if channels % g == 0])), channels))
        elif kind == "point":
            layers.append(draw(st.sampled_from([nn.ReLU(), nn.ReLU6(), nn.Tanh(), nn.Sigmoid(), nn.Identity(), nn.Dropout(0.0)])))
        elif kind == "adaptive":
            layers.append(adaptive(tuple(draw(st.integers(1, 3)) for _ in range(sides))))
        elif kind == "max":
            layers.append(largest(kernel, stride, padding, dilation, ceil_mode=draw(st.booleans())))
        elif kind == "mean":
            layers.append(mean(kernel, stride, padding, draw(st.booleans()), draw(st.booleans())))
        else:
            groups = {
                "conv": 1,
                "depthwise": channels,
                "groups": draw(st.sampled_from([g for g in (1, 2, 3) if channels % g == 0])),
            }
            out = channels * draw(st.integers(1, 2)) if kind != "conv" else draw(st.sampled_from([1, 2, 3, 6]))
            mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
            layers.append(
                convolution(channels, out, kernel, stride, padding, dilation, groups[kind], draw(st.booleans()), mode)
            )  # fmt: skip
        try:
            with torch.no_grad():
                output = nn.Sequential(*layers)(torch.zeros(1, *shape))  # one: torch refuses to normalise a single value
        except (RuntimeError, ValueError):
            layers.pop()
            continue
        if 0 in output.shape:
            layers.pop()
            continue
        channels = output.shape[1]
    with torch.no_grad():
        features = nn.Sequential(*layers, nn.Flatten())(torch.zeros(2, *shape)).shape[1]
    layers += [nn.Flatten(), *([nn.LayerNorm(features)] if draw(st.booleans()) else []), nn.Linear(features, 5), nn.ReLU()]
    return shape, nn.Sequential(*layers, nn.Linear(5, CLASSES)), draw(st.booleans()), draw(st.integers(0, 2**20))


def numbers(x: torch.Tensor) -> torch.Tensor:
    """One for the first pixel, or the first feature, two for the next."""
    places = x[0, 0] if x.dim() > 2 else x[0]
    return torch.arange(1, places.numel() + 1, dtype=x.dtype).reshape(places.shape)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(networks(), st.sampled_from(LOSSES))
def test_any_layers_in_a_row_equal_autograd(drawn, loss):
    shape, model, quantized, seed = drawn
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.4
    names = [name for name, _ in model.named_parameters()]
    for name, p in model.named_parameters():  # some are frozen, in any place, but not all
        p.requires_grad_(seed % 3 == 0 or hash((seed, len(name), names.index(name))) % 3 > 0 or name == names[-1])
    x, y = examples(shape, np.float64, batch=3, seed=seed)
    if quantized:
        calibrate(make_quantization_aware(model), [torch.from_numpy(x).float()])
    model.double()
    for layer in kinked_layers(model):  # rounded values are often equal: then the last bit of a sum would decide
        layer.register_forward_pre_hook(lambda _, given: given[0] + RAMP * numbers(given[0]))
    for clip, clips in ((0.5, True), (np.inf, False)):
        gradient, _, total = run(model, shape, x, y, np.ones(3), clip, clips=clips, ramp=RAMP, loss=loss)
        expected, losses = by_definition(model, x, y, np.ones(3), clip, loss)
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-9)
        assert total == pytest.approx(losses, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 1), nn.MaxPool2d(2, ceil_mode=True)])
def test_of_equal_pixels_the_first_gets_the_gradient(pool):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, bias=False), pool, nn.Flatten(), nn.LazyLinear(CLASSES))
    model(torch.zeros(1, 1, 7, 7))
    with torch.no_grad():  # the pixel itself comes out, and the gradient is that of its neighbours: it shows who was chosen
        model[0].weight.mul_(torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0]]))
    model.double()
    x, y = examples((1, 7, 7), np.float64)
    x = np.round(x)  # few different values: most windows have several largest ones
    expected, _ = by_definition(model, x, y)
    np.testing.assert_allclose(run(model, (1, 7, 7), x, y)[0], expected, rtol=0, atol=1e-9)
    last, _ = by_definition(nn.Sequential(model[0], _Last(pool), *model[2:]), x, y)
    assert np.abs(last - expected).max() > 0.1


class _Last(nn.Module):
    """Pooling that gives the gradient to the last of equal pixels."""

    def __init__(self, pool):
        super().__init__()
        self.pool = pool

    def forward(self, x):
        ramp = torch.arange(x[0, 0].numel(), dtype=x.dtype).view(x.shape[2:]) * 1e-9
        return self.pool(x + ramp)


def test_no_clipping_norm_no_gradient_and_no_example_give_numbers():
    model = network("mlp", False, torch.float32)
    x, y = examples(SHAPES["mlp"], np.float32)
    gradient, count, loss = run(model, SHAPES["mlp"], x, y, mask=np.zeros(BATCH))
    assert (count, loss, np.abs(gradient).max()) == (0, 0, 0)
    with torch.no_grad():  # certain of the right class: every gradient is exactly zero
        for p in model.parameters():
            p.zero_()
        model[-1].bias[0] = 1e4
    for clip in (np.inf, 0.7):
        gradient, count, loss = run(model, SHAPES["mlp"], x, np.zeros(BATCH, int), clip=clip)
        assert (count, loss, np.abs(gradient).max()) == (MASK.sum(), 0, 0)


def test_masked_rows_change_nothing():
    model = network("cnn", True, torch.float32)
    x, y = examples(SHAPES["cnn"], np.float32)
    one = run(model, SHAPES["cnn"], x, y, clip=0.7)
    x[MASK == 0], y[MASK == 0] = 1e3, 0
    other = run(model, SHAPES["cnn"], x, y, clip=0.7)
    assert np.array_equal(one[0], other[0])
    assert one[1:] == other[1:]


def test_frozen_parts_are_an_input_and_have_no_gradient():
    model = network("cnn", True, torch.float64)
    for part in (*model[0].parameters(), model[3].bias, *model[7].parameters()):
        part.requires_grad_(False)
    x, y = examples(SHAPES["cnn"], np.float64)
    before = run(model, SHAPES["cnn"], x, y, clip=0.7)
    np.testing.assert_allclose(before[0], by_definition(model, x, y, clip=0.7)[0], rtol=0, atol=1e-9)
    with torch.no_grad():
        model[0].weight *= 2
    np.testing.assert_allclose(
        run(model, SHAPES["cnn"], x, y, clip=0.7)[0], by_definition(model, x, y, clip=0.7)[0], rtol=0, atol=1e-9
    )


def test_a_step_is_a_function_of_the_architecture_and_the_loss_alone():
    model = network("dscnn", True, torch.float32)
    data, form = step_graph(model, SHAPES["dscnn"], batch=3, clips=True)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    set_activation_ranges(model, {name: ActivationRange(0.5, 3) for name in activation_ranges(model)})
    assert step_graph(model, SHAPES["dscnn"], batch=3, clips=True) == (data, form)
    others = [
        step_graph(model, SHAPES["dscnn"], batch=4, clips=True),
        step_graph(model, SHAPES["dscnn"], batch=3, clips=False),
        step_graph(network("dscnn", False, torch.float32), SHAPES["dscnn"], batch=3, clips=True),
    ]
    squared = step_graph(model, SHAPES["dscnn"], batch=3, clips=True, loss="squared")
    assert squared[1] == form, "which loss it is, the graph says and not the form"
    assert step_graph(model, SHAPES["dscnn"], batch=3, clips=True, loss="cross_entropy") == (data, form)
    others.append(squared)
    set_activation_ranges(model, {})
    others.append(step_graph(model, SHAPES["dscnn"], batch=3, clips=True))
    assert len({data, *(other for other, _ in others)}) == 6


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "fake-quant"])
@pytest.mark.parametrize("name", ZOO)
def test_the_file_has_known_operators_of_the_standard_domain_and_no_more(name, quantized):
    data, form = step_graph(network(name, quantized, torch.float32), SHAPES[name], batch=BATCH, clips=True)
    proto = onnx.load_from_string(data)
    onnx.checker.check_model(proto, full_check=True)
    assert {node.op_type for node in proto.graph.node} <= OPERATORS
    assert {node.domain for node in proto.graph.node} == {""}
    assert not proto.functions
    assert [(one.key, one.value) for one in proto.metadata_props] == [(FORM_KEY, form.to_json())]
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    assert {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in inferred.graph.output} == form.outputs()


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


LAYER, TIED = nn.Linear(8, 8), nn.Linear(8, 8)
TIED.weight = LAYER.weight
REFUSED = {
    "layer 1 (GELU) has no form": nn.Sequential(nn.Linear(8, 8), nn.GELU()),
    "layer 1.0 (Doubled) has no form": nn.Sequential(nn.Linear(8, 8), nn.Sequential(Doubled())),
    "layer 1 (Dropout) has no form": nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)),
    "layer 1 (Linear) has a parameter of layer 0 too": nn.Sequential(LAYER, LAYER),
    "layer 2 (Linear) has a parameter of layer 0 too": nn.Sequential(LAYER, nn.ReLU(), TIED),
    "layer 0 (BatchNorm1d) has no form": nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8)),
    "layer 0 (Linear) does not fit its input, which has shape [8]": nn.Sequential(nn.Linear(9, 8)),
    "the model is a Linear; only layers in a row": nn.Linear(8, 8),
    "no trainable parameters": nn.Sequential(nn.Flatten()),
    "layer 0 (Conv2d) does not fit its input, which has shape [8]": nn.Sequential(nn.Conv2d(8, 8, 1)),
    "layer 1 (LayerNorm) does not fit": nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(4)),
    "layer 0 (Flatten) has no form": nn.Sequential(nn.Flatten(2), nn.Linear(8, 8)),
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_has_no_form_is_refused_by_name(line):
    with pytest.raises(Refused) as caught:
        step_graph(REFUSED[line], (8,), batch=2, clips=True)
    assert line in str(caught.value)


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (nn.Sequential(nn.Linear(5, 4)), "layer 0 (Linear) does not fit its input, which has shape [2, 5]"),
        (nn.Sequential(nn.Conv1d(2, 4, 6)), "layer 0 (Conv1d) cannot process 2 channels of [5]"),
        (nn.Sequential(nn.Conv1d(3, 4, 2)), "layer 0 (Conv1d) does not fit"),
        (nn.Sequential(nn.MaxPool1d(7), nn.Conv1d(2, 4, 1)), "layer 0 (MaxPool1d) cannot process"),
        (nn.Sequential(nn.Conv1d(2, 4, 2)), "the model must end with logits"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_name(model, line):
    with pytest.raises(Refused) as caught:
        step_graph(model, (2, 5), batch=2, clips=True)
    assert line in str(caught.value)


def test_a_rounding_of_its_own_is_a_quantizer_by_name():
    model = nn.Sequential(nn.Linear(8, 8), FakeQuantize(), nn.Tanh(), nn.Linear(8, CLASSES)).double()
    set_activation_ranges(model, {"1": ActivationRange(0.02, -5)})
    x, y = examples((8,), np.float64)
    assert step_graph(model, (8,), batch=2, clips=True)[1].quantizers == ("1",)
    np.testing.assert_allclose(run(model, (8,), x, y)[0], by_definition(model, x, y)[0], rtol=0, atol=1e-9)


@given(st.integers(3, 7), st.integers(1, 3), st.integers(1, 2), st.integers(0, 1), st.integers(1, 2))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_tables_name_the_pixels_that_windows_see(size, kernel, stride, padding, dilation):
    layer = nn.Conv1d(1, 1, kernel, stride, padding, dilation)
    try:
        table, (positions,) = convolution_table(layer, (size,))
    except ValueError:
        with pytest.raises(RuntimeError):
            layer(torch.zeros(1, 1, size))
        return
    slow = [
        [pixel if 0 <= (pixel := at * stride + tap * dilation - padding) < size else -1 for tap in range(kernel)]
        for at in range(positions)
    ]
    assert table.tolist() == slow
    for pixel, entries in enumerate(inverse(table, size)):
        assert [e for e in entries if e >= 0] == [i for i, p in enumerate(table.reshape(-1)) if p == pixel]


@pytest.mark.parametrize("kernel", [(2, 3), (1, 4), (3, 3)])
def test_padding_to_the_same_size(kernel):
    model = nn.Sequential(nn.Conv2d(2, 3, kernel, padding="same"), nn.Flatten(), nn.Linear(3 * 30, CLASSES)).double()
    x, y = examples((2, 5, 6), np.float64)
    np.testing.assert_allclose(run(model, (2, 5, 6), x, y)[0], by_definition(model, x, y)[0], rtol=0, atol=1e-9)


def test_a_pooling_beyond_the_border_sees_its_first_pixel_again():
    table = pooling_table(nn.MaxPool1d(3, 2, 1), (4,), (2,))
    assert table.tolist() == [[0, 0, 1], [1, 2, 3]]


def test_a_frame_without_pixels_has_one():
    assert Frame(7, None).pixels == 1
