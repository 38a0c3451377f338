import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedcore.errors import Refused
from fedcore.export.compress import compress, distill, narrow_weights, plain
from fedcore.export.source import quantized_afterwards
from fedcore.models import ZOO
from fedcore.quantization.integer import integer_logits
from fedcore.quantization.layers import QuantLayer, activation_ranges, calibrate, make_quantization_aware
from fedcore.quantization.lower import lower


def blobs(n: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """Images with a bright row whose place is the label."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(4, (n,), generator=generator)
    x = 0.3 * torch.randn(n, 1, 8, 8, generator=generator)
    x[torch.arange(n), 0, 2 * y] += 1.5
    return x, y


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x, y = blobs()
    model = ZOO["cnn"]((1, 8, 8), 4)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, x, y


def test_a_float_model_is_quantized_with_representative_examples(trained):
    model, x, _ = trained
    quantized = quantized_afterwards(model, x[:64].numpy())
    assert type(model[0]) is nn.Conv2d and set(activation_ranges(quantized)) == {"0.input", "3.input", "7.input", "9.input"}
    integers = lower(quantized, (1, 8, 8))
    assert integers.integer_layers == 4
    with torch.no_grad():
        expected = model(x).argmax(1).numpy()
    assert (integer_logits(integers, x.numpy()).argmax(1) == expected).mean() > 0.98
    with pytest.raises(Refused, match="representative examples"):
        quantized_afterwards(model, np.zeros((0, 1, 8, 8), np.float32))


def test_half_of_the_channels_are_taken_out_and_distillation_brings_the_answers_back(trained):
    pytest.importorskip("torch_pruning", reason="of the extra [export]")
    model, x, _ = trained
    teacher = quantized_afterwards(model, x.numpy())
    before = [p.shape for p in teacher.parameters()]
    torch.manual_seed(5)
    bare = compress(teacher, x.numpy(), share=0.5, classes=4, epochs=0, seed=0)
    small = compress(teacher, x.numpy(), share=0.5, classes=4, epochs=30, seed=0)
    count = lambda network: sum(p.numel() for p in network.parameters())
    assert count(small) < 0.35 * count(teacher)
    assert [p.shape for p in teacher.parameters()] == before
    assert small[-1].out_features == 4
    fresh, labels = (part[128:] for part in blobs(400))
    with torch.no_grad():
        wanted = teacher(fresh).softmax(1)
        apart = [float((network(fresh).softmax(1) - wanted).abs().mean()) for network in (bare, small)]
        accuracy = float((small(fresh).argmax(1) == labels).float().mean())
    assert accuracy > 0.95
    assert apart[1] < 0.5 * apart[0]
    assert lower(small, (1, 8, 8)).integer_layers == 4


def test_distillation_repeats_to_the_bit_with_its_seed(trained):
    model, x, _ = trained
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(results))
        student = quantized_afterwards(model, x.numpy())
        distill(student, model, x, epochs=1, seed=seed)
        results.append(torch.cat([p.detach().reshape(-1) for p in student.parameters()]))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", ["cnn", "dscnn", "mlp"])
def test_a_plain_copy_computes_in_float(name):
    torch.manual_seed(0)
    plainly = ZOO[name]((1, 8, 8), 4).eval()
    x = torch.randn(8, 1, 8, 8)
    quantized = make_quantization_aware(ZOO[name]((1, 8, 8), 4))
    quantized.load_state_dict(plainly.state_dict())
    calibrate(quantized.eval(), [x])
    assert torch.equal(plain(quantized)(x), plainly(x))
    assert not torch.equal(quantized(x), plainly(x))


def test_weights_learn_to_be_narrow():
    torch.manual_seed(0)
    x, _ = blobs()
    network = ZOO["cnn"]((1, 8, 8), 4)
    with torch.no_grad():
        network[-1].weight *= 10  # answers that are neither sure nor all alike
    teacher = quantized_afterwards(network, x.numpy())
    before = [parameter.clone() for parameter in teacher.parameters()]
    small = compress(teacher, x.numpy(), share=0, classes=4, epochs=10, seed=0, weight_bits=2)  # as narrow as it gets
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), before, strict=True))
    assert all(layer.weight_enabled for layer in small.modules() if isinstance(layer, QuantLayer))
    fresh, _ = (part[128:] for part in blobs(400))
    with torch.no_grad():
        wanted = teacher(fresh).softmax(1)
    given = [integer_logits(lower(one, (1, 8, 8), weight_bits=2), fresh.numpy()) for one in (teacher, small)]
    apart = [float((torch.from_numpy(logits).softmax(1) - wanted).abs().mean()) for logits in given]
    assert apart[1] < 0.5 * apart[0]


def test_narrow_weights_simulate_what_the_integers_give(trained):
    model, x, _ = trained
    quantized = quantized_afterwards(model, x.numpy())
    names = {name for name, _ in quantized.named_parameters()}
    with torch.no_grad(), narrow_weights(quantized, 4):
        expected = quantized(x).numpy()
    integers = lower(quantized, (1, 8, 8), weight_bits=4)
    # An activation that rounds the other way at a tie moves a logit; weights of eight bits would move them all.
    assert np.abs(integer_logits(integers, x.numpy()) - expected).max() < 0.02 * np.abs(expected).max()
    assert {name for name, _ in quantized.named_parameters()} == names


def test_a_smaller_model_needs_examples(trained):
    model, x, _ = trained
    with pytest.raises(Refused, match=r"data\.calibration"):
        compress(quantized_afterwards(model, x.numpy()), x[:0].numpy(), share=0, classes=4, epochs=1, seed=0, weight_bits=4)


def test_weights_of_four_bits_take_fifteen_values(trained):
    model, x, _ = trained
    quantized = quantized_afterwards(model, x.numpy())
    integers = lower(quantized, (1, 8, 8), weight_bits=4)
    for weights, layer in zip(integers.weights(), (quantized[0], quantized[3], quantized[7], quantized[9]), strict=True):
        assert weights.values.min() >= -7 and weights.values.max() <= 7
        error = np.abs(weights.real()[0] - layer.weight.detach().numpy()).reshape(len(weights.values), -1).max(1)
        assert (error <= 0.501 * weights.scale).all()
    with torch.no_grad():
        expected = model(x).argmax(1).numpy()
    assert (integer_logits(integers, x.numpy()).argmax(1) == expected).mean() > 0.9


def test_a_teacher_of_the_squared_error_hands_on_its_outputs(trained):
    """Softmax hides what is added to all outputs, which for such a teacher are the answer themselves."""
    _, x, y = trained
    torch.manual_seed(0)
    teacher = ZOO["cnn"]((1, 8, 8), 4)
    optimizer = torch.optim.Adam(teacher.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.mse_loss(teacher(x), F.one_hot(y, 4).float()).backward()
        optimizer.step()
    fresh, labels = (part[128:] for part in blobs(400))
    apart, right = {}, {}
    for loss in ("squared", "cross_entropy"):
        torch.manual_seed(3)
        student = ZOO["cnn"]((1, 8, 8), 4)
        distill(student, teacher, x, epochs=6, seed=0, loss=loss)
        with torch.no_grad():
            apart[loss] = float((student(fresh) - teacher(fresh)).square().mean())
            right[loss] = float((student(fresh).argmax(1) == labels).float().mean())
    assert apart["squared"] < min(0.02, 0.3 * apart["cross_entropy"])
    assert right["squared"] > 0.9
    torch.manual_seed(0)
    small = compress(
        quantized_afterwards(teacher, x.numpy()), x.numpy(), share=0.0, classes=4, epochs=2, seed=0, weight_bits=4, loss="squared"
    )
    with torch.no_grad(), narrow_weights(small, 4):
        assert (small(fresh).argmax(1) == labels).float().mean() > 0.9
