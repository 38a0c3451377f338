import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fedcore.config import ModelConfig
from fedcore.errors import Refused
from fedcore.models import ZOO, build_model, check_model, layout_of

SHAPES = {"mlp": (1, 8, 8), "cnn": (1, 8, 8), "lenet": (1, 16, 16), "dscnn": (1, 8, 8), "imu_cnn": (6, 20)}
COUNTS = {"mlp": 50_890, "cnn": 108_618, "lenet": 44_426}  # for 1x28x28 and ten classes, as published


def build(tmp_path, *, shape=(1, 8, 8), seed=0, quantized=True, **config):
    return build_model(ModelConfig(**config), quantized=quantized, input_shape=shape, classes=4, seed=seed, folder=tmp_path)


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_is_sound(tmp_path, name):
    model = build(tmp_path, name=name, shape=SHAPES[name])
    check_model(model, torch.randn(3, *SHAPES[name]), 4)
    layout, steady = layout_of(model, trainable=True), layout_of(model, trainable=True, weights="int8po2")
    encodings = dict(zip(layout.names, layout.encodings, strict=True))
    assert steady.encodings == tuple({"int8": "int8po2"}.get(one, one) for one in layout.encodings)
    assert all(encoding == ("int8" if name.endswith("weight") else "fp16") for name, encoding in encodings.items())


@pytest.mark.parametrize("name", COUNTS)
def test_sizes_are_the_published_ones(name):
    assert sum(p.numel() for p in ZOO[name]((1, 28, 28), 10).parameters()) == COUNTS[name]


@pytest.mark.parametrize("name", ["cnn", "lenet", "dscnn", "imu_cnn"])
def test_inputs_that_do_not_fit_are_refused(name):
    for shape in ((3,), (1, 3, 3), (2, 8)):
        with pytest.raises(Refused, match=f"model {name} needs"):
            ZOO[name](shape, 10)


@pytest.mark.parametrize("side", range(4, 33))
def test_convolutional_models_take_every_size_of_image(side):
    for name in ("cnn", "dscnn"):
        assert ZOO[name]((3, side, side + 1), 4)(torch.randn(2, 3, side, side + 1)).shape == (2, 4)


def test_parameters_are_seeded(tmp_path):
    torch.manual_seed(1)
    one = build(tmp_path, name="cnn")
    torch.manual_seed(2)
    same, other = build(tmp_path, name="cnn"), build(tmp_path, name="cnn", seed=1)
    assert torch.equal(one[0].weight, same[0].weight)
    assert not torch.equal(one[0].weight, other[0].weight)


def test_fine_tuning_loads_a_file_and_trains_a_part(tmp_path):
    trained = build(tmp_path, name="cnn", seed=9, quantized=False)
    save_file(dict(trained.named_parameters()), tmp_path / "body.safetensors")
    model = build(tmp_path, name="cnn", init="body.safetensors", trainable=("9.*",))
    assert torch.equal(model[0].weight, trained[0].weight)
    assert layout_of(model, trainable=True).names == ("9.weight", "9.bias")
    assert len(layout_of(model, trainable=False).names) == 6
    assert len(layout_of(model, trainable=None).names) == 8


def test_files_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(Refused, match="does not exist"):
        build(tmp_path, init="none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(Refused, match="is not a readable safetensors file"):
        build(tmp_path, init="bad.safetensors")
    other = build(tmp_path, name="cnn", quantized=False)
    save_file(dict(other.named_parameters()), tmp_path / "cnn.safetensors")
    with pytest.raises(Refused, match=r"parameter 1\.weight: model has \[64, 64\], file has not in the file"):
        build(tmp_path, name="mlp", init="cnn.safetensors")


def test_patterns_that_match_nothing_are_refused(tmp_path):
    with pytest.raises(Refused, match=r"no parameter matches 'head\.\*'; parameters are: 1\.weight"):
        build(tmp_path, name="mlp", trainable=("head.*",))


MODULE = """
import torch
from torch import nn

class BatchNorm(nn.Sequential):
    def __init__(self, classes):
        super().__init__(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, classes))

class Counting(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.linear = nn.Linear(64, classes)
        self.register_buffer("calls", torch.zeros(1))
    def forward(self, x):
        self.calls += 1
        return self.linear(x.flatten(1))

class Mixing(Counting):
    def forward(self, x):
        x = x.flatten(1)
        return self.linear(x - x.mean(0) * 100)

class Wrong(Counting):
    def forward(self, x):
        return x.flatten(1)

class Tuple(Counting):
    def forward(self, x):
        return self.linear(x.flatten(1)), None

class Raises(Counting):
    def forward(self, x):
        raise ValueError("no\\nway")

class Infinite(Counting):
    def forward(self, x):
        return self.linear(x.flatten(1)) / 0

class Half(nn.Linear):
    def __init__(self, classes):
        super().__init__(64, classes, dtype=torch.float16)

class Good(nn.Module):
    def __init__(self, width, classes, input_shape):
        super().__init__()
        self.a = nn.Linear(input_shape[1] * input_shape[2], width)
        self.norm = nn.GroupNorm(2, width)
        self.b = nn.Linear(width, classes)
    def forward(self, x):
        return self.b(torch.relu(self.norm(self.a(x.flatten(1)))))

class Fails:
    def __init__(self):
        raise RuntimeError("boom")

def nothing():
    return 3
"""


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("BatchNorm", r"layer 1 \(BatchNorm2d\) keeps running statistics.*use GroupNorm"),
        ("Counting", "buffer calls changes during training"),
        ("Mixing", "depends on the other examples"),
        ("Wrong", r"output has shape \[3, 64\], expected logits \[3, 4\]"),
        ("Tuple", "must be one tensor of logits, got tuple"),
        ("Raises", r"cannot process inputs of shape \[3, 1, 8, 8\]: ValueError: no$"),
        ("Infinite", "is not finite"),
        ("Half", "only float32 parameters"),
    ],
)
def test_what_a_users_model_cannot_have(tmp_path, name, reason):
    (tmp_path / "mine.py").write_text(MODULE)
    model = build(tmp_path, name=f"mine:{name}")
    with pytest.raises(Refused, match=reason):
        check_model(model, torch.randn(3, 1, 8, 8), 4)


@pytest.mark.parametrize(
    ("name", "params", "reason"),
    [
        ("Fails", {}, "its constructor failed: RuntimeError: boom"),
        ("nothing", {}, "must give a torch.nn.Module, got int"),
        ("Good", {"depth": 2}, r"model\.params\.depth: mine:Good has no such parameter; it takes: width"),
        ("Good", {}, "missing 1 required positional argument: 'width'"),
    ],
)
def test_constructors_that_fail_are_refused(tmp_path, name, params, reason):
    (tmp_path / "mine.py").write_text(MODULE)
    with pytest.raises(Refused, match=reason):
        build(tmp_path, name=f"mine:{name}", params=params)


def test_a_users_own_model_becomes_quantization_aware(tmp_path):
    (tmp_path / "mine.py").write_text(MODULE)
    model = build(tmp_path, name="mine:Good", params={"width": 8})
    check_model(model, torch.randn(3, 1, 8, 8), 4)
    layout = layout_of(model, trainable=True)
    assert dict(zip(layout.names, layout.encodings, strict=True))["a.weight"] == "int8"
    assert dict(zip(layout.names, layout.encodings, strict=True))["norm.weight"] == "fp16"


def test_a_float_model_travels_as_fp32(tmp_path):
    assert set(layout_of(build(tmp_path, quantized=False), trainable=True).encodings) == {"fp32"}


def test_split_and_join_are_inverse(tmp_path):
    layout = layout_of(build(tmp_path, name="cnn"), trainable=True)
    flat = np.arange(layout.size, dtype=np.float32)
    assert (layout.join(layout.split(flat)) == flat).all()
    parts = layout.split(flat)
    parts["0.bias"] = parts["0.bias"][:-1]
    with pytest.raises(Refused, match=r"parameter 0\.bias: expected shape \(16,\), got \(15,\)"):
        layout.join(parts)
