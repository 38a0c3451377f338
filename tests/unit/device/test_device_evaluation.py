"""A device that evaluates: what it scores, what it says, and when it does not."""

import dataclasses
import io
import struct
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from device_worlds import examples, exported, start_of
from fedcore_device.child import read_job, write_job
from fedcore_device.evaluation import Scored, score_examples
from fedcore_device.examples import load_examples, load_held_out
from fedcore_device.masking import Masking
from fedcore_device.policy import PlanPolicy
from fedcore_device.step import read_evaluation, read_step
from fedcore_device.training import train_in_child
from fleet_fake import LOOSE, OTHER, PUBLISHER, Gateway, World, assignment, doing, enrolled, fresh_state, plan, settings
from onnx import helper
from small_zoo import CLASSES, SHAPES, network

from fedcore.config import LOSSES
from fedcore.errors import ClientFailure, Refused
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.sums import UploadTerms, encode_score, read_upload
from fedcore.models import layout_of
from fedcore.portable.signature import sign_step
from fedcore.portable.step import portable_evaluation
from fedcore.quantization.layers import activation_ranges
from fedcore.quantization.wire import encode_model
from fedcore.secagg.messages import TrustBundle
from fedcore.secagg.participant import Visit
from fedcore.secagg.sums import ScoreSum, plan_update_sum
from fedcore.training.evaluation import evaluate

WILLING = dataclasses.replace(LOOSE, plan=dataclasses.replace(LOOSE.plan, evaluation=True))
GRAPH = portable_evaluation(network("mlp"), SHAPES["mlp"], batch=8)


class Holding(World):
    """An environment with examples that are held out, too."""

    def __init__(self, directory, size=13):
        super().__init__(directory)
        self.held = examples("mlp", size, seed=9)
        (directory / "holdout").mkdir()
        np.savez(directory / "holdout" / "a.npz", x=self.held[0][:5], y=self.held[1][:5])
        np.savez(directory / "holdout" / "b.npz", x=self.held[0][5:], y=self.held[1][5:])


@pytest.fixture
def device(tmp_path):
    return fresh_state(tmp_path / "state"), Holding(tmp_path / "examples"), Gateway()


def evaluation_plan(gateway, data=GRAPH.data, name="evaluation", **fields):
    kept = {"kind": pb.EVALUATE, "aggregation": pb.EACH, "upload_encoding": "score", "values": 0}
    found = plan(gateway, blobs=graph_blobs(gateway, data, name), **(kept | fields))
    found.capabilities[:] = ["evaluate-1"]
    return found


def graph_blobs(gateway, data, name="evaluation"):
    return [gateway.put(name, data), gateway.put(f"{name}-signature", sign_step(PUBLISHER, data))]


def expected(x, y, name="mlp"):
    return evaluate(network(name), torch.from_numpy(x), torch.from_numpy(y))


def outcomes(gateway):
    return [report.outcome for report in gateway.reports]


def test_a_device_uploads_the_score_of_its_held_out_examples(device):
    state, world, gateway = device
    work = doing(state, world, gateway, WILLING)
    work.go_on(work.accept(assignment(evaluation_plan(gateway))))
    score = expected(*world.held)
    examples_, correct, loss = struct.unpack("<QQd", gateway.uploads[0])
    assert (examples_, correct) == (13, score.correct)
    assert 0 < correct < 13
    assert loss == pytest.approx(score.loss_sum, rel=1e-6)
    assert outcomes(gateway) == [pb.UPLOADED]
    assert not gateway.reports[0].HasField("examples")
    assert state.work() is None
    terms = UploadTerms("score", 0, 24, 1.0, 100, kept=True)
    assert read_upload(gateway.uploads[0], terms).correct == correct
    assert encode_score(examples_, correct, loss) == gateway.uploads[0]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("quantized", [False, True], ids=["float", "fake-quant"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "imu_cnn"])
def test_scores_are_those_of_a_simulated_client(name, quantized, loss):
    model = network(name, quantized)
    x, y = examples(name, 30, seed=4)
    graph = read_evaluation(portable_evaluation(model, SHAPES[name], batch=8, loss=loss).data)
    found = score_examples(graph, start_of(model), x, y, ranges=activation_ranges(model))
    score = evaluate(model, torch.from_numpy(x), torch.from_numpy(y), loss)
    if not quantized:  # else values in the middle between two steps of a grid may round either way
        assert found.correct == score.correct
    assert abs(found.correct - score.correct) <= 1
    assert found.examples == 30
    assert found.loss == pytest.approx(score.loss_sum, rel=1e-2 if quantized else 1e-6)
    assert score_examples(graph, start_of(model), x[:0], y[:0]) == Scored(0, 0, 0.0)


def test_examples_that_do_not_fit_the_graph_are_refused():
    graph, start = read_evaluation(GRAPH.data), start_of(network("mlp"))
    x, y = examples("mlp", 4)
    for wrong_x, wrong_y in ((x[:, :, :4], y), (x, y + CLASSES)):
        with pytest.raises(Refused, match="training: "):
            score_examples(graph, start, wrong_x, wrong_y)


def test_only_an_evaluation_graph_of_the_publisher_sees_examples(device):
    state, world, gateway = device
    with pytest.raises(Refused, match=r"evaluation graph: it must have the property fedcore\.evaluation"):
        read_evaluation(exported("mlp").data)
    with pytest.raises(Refused, match=r"training step: it must have the property fedcore\.step"):
        read_step(GRAPH.data)
    number = 5
    wrong = [
        (evaluation_plan(gateway), "no publisher"),
        (evaluation_plan(gateway, exported("mlp").data), "fedcore.evaluation"),
        (evaluation_plan(gateway, name="step"), "names no evaluation-signature"),
    ]
    foreign = sign_step(OTHER, GRAPH.data)
    del wrong[0][0].blobs[:]
    wrong[0][0].blobs.extend([gateway.put("evaluation", GRAPH.data), gateway.put("evaluation-signature", foreign)])
    wrong[0][0].blobs.append(gateway.put("model", b"m"))
    for given, word in wrong:
        number, given.round = number + 1, number + 1
        work = doing(state, world, gateway, WILLING)
        work.go_on(work.accept(assignment(given)))
        assert word in state.problem
    assert outcomes(gateway) == [pb.REFUSED_PLAN] * 3
    assert not gateway.uploads


def lying(**scales):
    """The graph of the mlp whose outputs are changed."""
    proto = onnx.load_from_string(GRAPH.data)
    for name, factor in scales.items():
        for node in proto.graph.node:
            node.output[:] = [f"honest-{name}" if one == name else one for one in node.output]
            node.input[:] = [f"honest-{name}" if one == name else one for one in node.input]
        constant = helper.make_tensor(f"f-{name}", onnx.TensorProto.FLOAT, [], np.float32(factor).tobytes(), raw=True)
        proto.graph.initializer.append(constant)
        proto.graph.node.append(helper.make_node("Mul", [f"honest-{name}", f"f-{name}"], [name]))
    return proto.SerializeToString()


@pytest.mark.parametrize(
    "scales", [{"count": 2.0}, {"correct": 0.3}, {"correct": 100.0}, {"correct": float("nan")}, {"loss": -1.0}]
)
def test_answers_that_are_no_score_are_refused(scales):
    x, y = examples("mlp", 8)
    y[:3] = network("mlp")(torch.from_numpy(x[:3])).argmax(1).numpy()
    graph = read_evaluation(lying(**scales))
    with pytest.raises(Refused, match=r"evaluation graph \w+: it says that"):
        score_examples(graph, start_of(network("mlp")), x, y)
    assert score_examples(read_evaluation(lying(loss=1.0)), start_of(network("mlp")), x, y).correct >= 3


class TestPolicy:
    """Whether a device evaluates is its owner's choice, and never in the clear where secure aggregation or noise is demanded."""

    @pytest.mark.parametrize(("policy", "word"), [
        ({}, "evaluation = true"),
        ({"evaluation": True, "secure_aggregation": True}, "demands secure aggregation"),
        ({"evaluation": True, "noise_multiplier": 0.5}, "on the device is 0"),
        ({"evaluation": True, "minimum_devices": 5}, "minimum_devices = 5"),
    ])  # fmt: skip
    def test_a_weaker_plan_is_refused(self, device, policy, word):
        state, world, gateway = device
        strict = dataclasses.replace(LOOSE, plan=dataclasses.replace(LOOSE.plan, **policy))
        given = evaluation_plan(gateway)
        given.settings.extend(plan(gateway, table=settings() | {"example-noise-multiplier": 9.0}).settings[-1:])
        assert given.settings[-1].name == "example-noise-multiplier", "noise that a score does not get counts for nothing"
        assert doing(state, world, gateway, strict).accept(assignment(given)) is None
        assert word in state.problem
        assert outcomes(gateway) == [pb.REFUSED_PLAN]

    def test_only_a_willing_device_says_that_it_evaluates(self, device):
        assert "evaluate-1" in doing(*device, WILLING).capabilities
        assert "evaluate-1" not in doing(*device).capabilities
        assert PlanPolicy().evaluation is False

    def test_a_sum_of_scores_has_no_noise_and_takes_the_owners_word(self):
        bundle = TrustBundle("watches", bytes(32), 1, 0, (bytes(32),), bytes(64))
        identity = enrolled()
        identity = dataclasses.replace(identity, trust=dataclasses.replace(identity.trust, committee=bundle.encode()))
        for evaluation, own, noise in ((True, 0.0, 0.0), (False, 0.0, 1.0), (False, 9.0, 1.0)):
            masking = Masking(identity, PlanPolicy(evaluation=evaluation), bytes(32), Visit("t", 1, 2))
            demands = masking._participant(own)._demands
            assert demands.of(ScoreSum(100, 100, 10)).noise_multiplier == noise
            assert demands.of(ScoreSum(100, 100, 10)).minimum_survivors == 100
            assert demands.of(plan_update_sum(4, 4, minimum_survivors=2, clip=1.0, weight_cap=2)).noise_multiplier == (
                0.0 if own else 1.0
            )


def in_child(folder, source, table, encoding="masked", **changed):
    """What a child leaves and tells."""
    model = network("mlp")
    folder.mkdir()
    layout = layout_of(model, trainable=True)
    (folder / "model").write_bytes(encode_model(layout.wire_tensors(start_of(model))))
    (folder / "graph").write_bytes(GRAPH.data)
    write_job(folder, {
        "examples": str(source), "model": str(folder / "model"), "step": str(folder / "graph"), "step_sha256": GRAPH.sha256,
        "frozen": "", "settings": table, "encoding": encoding, "values": 23, "memory": 1 << 31, "seconds": 60, "evaluates": True,
        "randomness": {}, **changed,
    })  # fmt: skip
    assert read_job(folder)["evaluates"]
    return dict(train_in_child(folder, memory=1 << 30, seconds=60, why_stop=lambda: "").told)


def vector_in(folder):
    return np.load(io.BytesIO((folder / "vector.npy").read_bytes()), allow_pickle=False)


def test_under_secure_aggregation_it_gives_the_contribution_of_a_simulated_client(device, tmp_path):
    _, world, _ = device
    summation = ScoreSum(4, 2, 10)
    told = in_child(tmp_path / "masked", world.examples, settings() | summation.to_table())
    score = expected(*world.held)
    np.testing.assert_array_equal(
        vector_in(tmp_path / "masked")[[0, 1, *range(3, 23)]],
        summation.contribution(score.examples, score.correct, score.loss_sum)[[0, 1, *range(3, 23)]],
    )
    loss = vector_in(tmp_path / "masked")[2] * summation.granularity * score.examples / 10
    assert loss == pytest.approx(score.loss_sum, rel=1e-5)
    assert told["released"] is True, "neither examples nor loss are told"
    assert not (tmp_path / "masked" / "upload.bin").exists()


def test_a_device_that_holds_nothing_out_adds_zeros_or_fails(tmp_path):
    bare = World(tmp_path / "bare")
    in_child(tmp_path / "masked", bare.examples, settings() | ScoreSum(4, 2, 10).to_table())
    assert not vector_in(tmp_path / "masked").any()
    with pytest.raises(ClientFailure, match="holds out no examples"):
        in_child(tmp_path / "clear", bare.examples, settings(), "score")


@pytest.mark.parametrize("encoding", ["masked", "score"])
def test_an_evaluation_adds_to_no_other_sum(device, tmp_path, encoding):
    update = plan_update_sum(1000, 4, minimum_survivors=2, clip=1.0, weight_cap=2).to_table()
    tables = [settings() | update, settings() if encoding == "masked" else settings() | ScoreSum(4, 2, 10).to_table()]
    for number, table in enumerate(tables):
        with pytest.raises(Refused, match="another sum than one of scores"):
            in_child(tmp_path / f"{encoding}-{number}", device[1].examples, table, encoding)


def test_held_out_examples_are_never_trained_on(device, tmp_path, monkeypatch):
    _, world, _ = device
    assert len(load_examples(world.examples)[1]) == 23
    np.testing.assert_array_equal(load_held_out(world.examples)[0], world.held[0])
    (tmp_path / "owners_app.py").write_text(
        "import numpy as np\n"
        "def two(): return np.zeros((3, 2)), np.arange(3)\n"
        "def four(): return np.zeros((3, 2)), np.arange(3), np.ones((1, 2)), np.array([7])\n"
        "def three(): return 1, 2, 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_examples("owners_app:two")[1].tolist() == load_examples("owners_app:four")[1].tolist() == [0, 1, 2]
    assert load_held_out("owners_app:two")[1].tolist() == []
    assert load_held_out("owners_app:four")[1].tolist() == [7]
    with pytest.raises(Refused, match="returned 3 values"):
        load_held_out("owners_app:three")
    assert "owners_app" in sys.modules
    np.savez(Path(world.examples) / "holdout" / "c.npz", x=np.zeros((2, 5), np.float32), y=np.zeros(2, np.int64))
    with pytest.raises(Refused, match="different shapes"):
        load_held_out(world.examples)
