"""What the generator takes, and how it says what it does not."""

import pytest
import torch
from torch import nn

from fedcore.models import ZOO, Residual
from fedcore.native.blocks import plan
from fedcore.native.layers import Unsupported, lower
from fedcore.quantization.layers import make_quantization_aware


class Unknown(nn.Module):
    def forward(self, x):
        return x


def hooked() -> nn.Linear:
    layer = nn.Linear(4, 2)
    layer.register_forward_hook(lambda *_: None)
    return layer


def twice() -> nn.Sequential:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.ReLU(), layer)


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


IMAGE, VECTOR = (2, 8, 8), (4,)
REFUSED = {
    "unknown": (VECTOR, lambda: nn.Sequential(nn.Linear(4, 4), Unknown(), nn.Linear(4, 2)), "layer 1 (Unknown)"),
    "dropout": (VECTOR, lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.Linear(4, 2)), "layer 1 (Dropout)"),
    "nested": (VECTOR, lambda: nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh())), "layer 1.0 (Tanh)"),
    "hooks": (VECTOR, hooked, "has forward hooks"),
    "used twice": (VECTOR, twice, "share a parameter"),
    "tied": (VECTOR, tied, "share a parameter"),
    "dilation": (IMAGE, lambda: nn.Sequential(nn.Conv2d(2, 2, 3, dilation=2)), "layer 0 (Conv2d) has dilation"),
    "groups": ((4, 8, 8), lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), "layer 0 (Conv2d) has 2 groups"),
    "padding mode": (IMAGE, lambda: nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")), "circular"),
    "same": (IMAGE, lambda: nn.Sequential(nn.Conv2d(2, 2, 3, padding="same")), "padding 'same'"),
    "too small": (IMAGE, lambda: nn.Sequential(nn.Conv2d(2, 2, 9)), "has no output"),
    "ceil": (IMAGE, lambda: nn.Sequential(nn.MaxPool2d(3, ceil_mode=True)), "ceil_mode"),
    "adaptive": (IMAGE, lambda: nn.Sequential(nn.AdaptiveAvgPool2d(2)), "pools to 2"),
    "huge window": ((1, 20, 20), lambda: nn.Sequential(nn.MaxPool2d(16)), "at most 255"),
    "unflattened": (IMAGE, lambda: nn.Sequential(nn.Linear(8, 2)), "does not get a flat vector"),
    "wrong size": (VECTOR, lambda: nn.Sequential(nn.Linear(5, 2)), "wants 5 inputs and gets 4"),
    "part flattened": (IMAGE, lambda: nn.Sequential(nn.Flatten(2), nn.Linear(64, 2)), "layer 0 (Flatten)"),
    "no logits": (IMAGE, lambda: nn.Sequential(nn.Conv2d(2, 2, 3)), "not a vector of logits"),
    "parameterless": (IMAGE, lambda: nn.Sequential(nn.Flatten()), "not a vector of logits"),
    "channels": (IMAGE, lambda: nn.Sequential(nn.Conv2d(3, 2, 3)), "does not fit an input of shape [2, 8, 8]"),
    "empty residual": (IMAGE, lambda: nn.Sequential(Residual(nn.Identity()), nn.Flatten()), "layer 0 (Residual) has no layers"),
    "residual of shapes": (
        IMAGE, lambda: nn.Sequential(Residual(nn.Conv2d(2, 2, 3)), nn.Flatten()), "differ, [2, 8, 8] and [2, 6, 6]"),
    "residual that flattens": (
        (4, 1, 1), lambda: nn.Sequential(Residual(nn.Flatten(), nn.Linear(4, 4)), nn.Flatten()), "layer 0 (Residual) adds shapes"),
    "residual of something": (VECTOR, lambda: nn.Sequential(Residual(nn.Tanh()), nn.Linear(4, 2)), "layer 0.0 (Tanh)"),
    "residual in place": (
        VECTOR, lambda: nn.Sequential(nn.Linear(4, 4), Residual(nn.ReLU(inplace=True), nn.Linear(4, 4))), "layer 1.0 (ReLU)"),
    "norm of channels": (IMAGE, lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.Flatten()), "wants 4 channels and gets 2"),
    "norm of a flattened image": (
        IMAGE, lambda: nn.Sequential(nn.Flatten(), nn.GroupNorm(2, 128), nn.Linear(128, 2)), "layer 1 (GroupNorm)"),
    "norm of one value": (VECTOR, lambda: nn.Sequential(nn.Linear(4, 3), nn.GroupNorm(3, 3)), "has groups of one value"),
    "batch norm": (IMAGE, lambda: nn.Sequential(nn.BatchNorm2d(2), nn.Flatten()), "layer 0 (BatchNorm2d)"),
    "volumes": ((1, 2, 3, 4), lambda: nn.Sequential(nn.Flatten(), nn.Linear(24, 2)), "neither vectors, windows nor images"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_named_in_one_line(name):
    shape, build, part = REFUSED[name]
    with pytest.raises(Unsupported) as refused:
        lower(build(), shape)
    assert part in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "fake-quant"])
@pytest.mark.parametrize("name", ZOO)
def test_every_parameter_of_the_zoo_has_places_of_its_own(name, quantized):
    shape = (3, 20) if name == "imu_cnn" else (1, 16, 16)
    model = ZOO[name](shape, 7)
    if quantized:
        make_quantization_aware(model)
    blocks = plan(lower(model, shape), model)
    assert [p.name for p in blocks.parameters] == [name for name, _ in model.named_parameters()]
    places = torch.cat([torch.from_numpy(p.positions()) for p in blocks.parameters])
    assert len(places) == sum(p.numel() for p in model.parameters()) == blocks.trainable
    assert len(places.unique()) == len(places)
    assert 0 <= int(places.min()) <= int(places.max()) < blocks.blob


def test_frozen_parameters_do_not_travel():
    model = ZOO["cnn"]((1, 8, 8), 4)
    for parameter in model[:7].parameters():
        parameter.requires_grad_(False)
    blocks = plan(lower(model, (1, 8, 8)), model)
    assert blocks.trainable == sum(p.numel() for p in model[7:].parameters())
    assert blocks.first == 2
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(Unsupported, match="no parameter is trainable"):
        plan(lower(model, (1, 8, 8)), model)
