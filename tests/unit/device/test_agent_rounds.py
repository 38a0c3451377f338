"""One round on a device: what it refuses, and what survives interruptions; the child that trains is a real one."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import fedcore_device.rounds
import numpy as np
import onnx
import pytest
from device_worlds import examples, exported, start_of
from fedcore_device.environment import Conditions
from fedcore_device.noise import Randomness
from fedcore_device.plan import TrainingPlan
from fedcore_device.policy import Policy
from fedcore_device.step import Accumulate, read_step
from fedcore_device.trainer import Task, train
from fleet_fake import (
    DEPLOYMENT,
    IDENTITY,
    LOOSE,
    OTHER,
    TASK,
    TIME,
    Gateway,
    World,
    assignment,
    doing,
    fresh_state,
    plan,
    private,
    settings,
    step_blobs,
)
from onnx import TensorProto, helper, numpy_helper
from small_zoo import network

from fedcore.errors import TryAgain
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.identity import server_time
from fedcore.gateway.plan import to_settings, to_table
from fedcore.gateway.refusals import GatewayRefusal
from fedcore.models import layout_of
from fedcore.portable.form import FORM_KEY
from fedcore.quantization.wire import decode_update, encode_model
from fedcore.secagg.participant import hash_work


@pytest.fixture
def device(tmp_path):
    return fresh_state(tmp_path / "state"), World(tmp_path / "examples"), Gateway()


def expected_update(size=23):
    x, y = examples("mlp", size)
    task = Task(read_step(exported("mlp").data), start_of(network("mlp")), TrainingPlan(2, 4, 0.1, 0.5))
    return train(task, x, y, Randomness(np.random.default_rng(7), bytes(16)))


def outcomes(gateway):
    return [report.outcome for report in gateway.reports]


def test_a_round_uploads_what_the_trainer_gives_and_forgets_the_rest(device):
    state, world, gateway = device
    work = doing(state, world, gateway)
    work.go_on(work.accept(assignment(plan(gateway))))
    expected, sent = expected_update(), decode_update(gateway.uploads[0])
    np.testing.assert_array_equal(sent.values, expected.update)
    assert np.abs(sent.values).max() > 1e-3
    assert (sent.examples, sent.loss) == (23, pytest.approx(expected.loss))
    assert outcomes(gateway) == [pb.UPLOADED]
    assert gateway.reports[0].steps == expected.steps
    assert not gateway.reports[0].HasField("examples"), "its owner has not allowed that"
    assert not gateway.reports[0].HasField("loss")
    assert state.work() is None
    assert list(state.round.iterdir()) == []
    assert (state.participation(TASK).times, state.participation(TASK).last_round) == (1, 5)


def test_examples_and_loss_are_told_where_the_owner_allows_it(device):
    state, world, gateway = device
    policy = dataclasses.replace(LOOSE, device=dataclasses.replace(LOOSE.device, tell_examples=True))
    work = doing(state, world, gateway, policy)
    work.go_on(work.accept(assignment(plan(gateway))))
    assert (gateway.reports[0].examples, gateway.reports[0].loss) == (23, pytest.approx(expected_update().loss))


def test_under_dp_the_loss_stays_on_the_device(device):
    state, world, gateway = device
    work = doing(state, world, gateway)
    work.go_on(work.accept(assignment(plan(gateway, unit="example", local=private()))))
    assert outcomes(gateway) == [pb.UPLOADED]
    sent = decode_update(gateway.uploads[0])
    assert (sent.loss, sent.examples) == (0.0, 23)
    assert np.abs(sent.values).max() > 0


class TestDowngrade:
    """Every plan that is weaker than the policy, or not the coordinator's of now, trains nothing."""

    def refused(self, device, given, word, policy=LOOSE):
        state, world, gateway = device
        work = doing(state, world, gateway, policy)
        assert work.accept(given) is None
        assert outcomes(gateway) == [pb.REFUSED_PLAN]
        assert word in state.problem
        assert state.work() is None
        assert not gateway.offsets
        assert not gateway.uploads

    def test_strictest_by_default(self, device):
        self.refused(device, assignment(plan(device[2])), "secure_aggregation = true", Policy())

    @pytest.mark.parametrize(("loosened", "fields", "word"), [
        ({"noise_multiplier": 0.5}, {}, "noise_multiplier = 0.5"),
        ({"minimum_devices": 10}, {"minimum_uploads": 9}, "minimum_devices = 10"),
        ({"participations": 0}, {}, "participations = 0"),
        ({}, {"kind": pb.EVALUATE}, "evaluation = true"),
        ({"evaluation": True}, {"kind": pb.EVALUATE}, "aggregated otherwise"),
        ({}, {"kind": 7}, "something else than training"),
        ({}, {"upload_encoding": "score"}, "aggregated otherwise"),
        ({}, {"upload_encoding": "masked"}, "aggregated otherwise"),
        ({}, {"aggregation": pb.MASKED}, "aggregated otherwise"),
        ({}, {"deployment": "phones"}, "is of 'phones'"),
        ({}, {"expires_ms": 1000}, "has expired"),
        ({}, {"issued_ms": 1000}, "more than a day"),
    ])  # fmt: skip
    def test_weaker_plans(self, device, loosened, fields, word):
        policy = dataclasses.replace(LOOSE, plan=dataclasses.replace(LOOSE.plan, **loosened))
        self.refused(device, assignment(plan(device[2], **fields)), word, policy)

    def test_noise_below_the_policy(self, device):
        policy = dataclasses.replace(LOOSE, plan=dataclasses.replace(LOOSE.plan, noise_multiplier=1.01))
        self.refused(device, assignment(plan(device[2], unit="example", local=private(1.0))), "is 1; [plan] noise", policy)

    def test_noise_that_is_no_number(self, device):
        given = plan(device[2])
        given.settings.append(pb.Setting(name="example-noise-multiplier", value=pb.Value(text="plenty")))
        policy = dataclasses.replace(LOOSE, plan=dataclasses.replace(LOOSE.plan, noise_multiplier=1.0))
        self.refused(device, assignment(given), "is 0; [plan] noise", policy)

    def test_capabilities_that_it_lacks(self, device):
        given = plan(device[2])
        given.capabilities.append("fly-1")
        self.refused(device, assignment(given), "fly-1")

    def test_unsigned_and_strangers_plans(self, device):
        given = assignment(plan(device[2]))
        self.refused(device, pb.Assignment(plan=pb.SignedPlan(plan=given.plan.plan), token=b"t"), "signed by no plan key")

    def test_another_partys_key(self, device):
        self.refused(device, assignment(plan(device[2]), OTHER), "signed by no plan key")

    def test_a_changed_plan(self, device):
        given, other = plan(device[2]), plan(device[2], round=6)
        forged = assignment(given)
        forged.plan.plan = other.SerializeToString(deterministic=True)
        self.refused(device, forged, "signature")

    def test_replayed(self, device):
        state, world, gateway = device
        work, given = doing(state, world, gateway), assignment(plan(gateway))
        work.go_on(work.accept(given))
        gateway.reports.clear()
        sent = list(gateway.uploads)
        assert work.accept(given) is None
        assert not gateway.reports, "it was answered before"
        assert work.accept(assignment(plan(gateway, round=4))) is None
        assert outcomes(gateway) == [pb.REFUSED_PLAN]
        assert "took part in round 5 already" in state.problem
        assert gateway.uploads == sent
        assert work.accept(assignment(plan(gateway, round=6))) is not None

    def test_too_large_a_download(self, device):
        given = plan(device[2])
        given.blobs[0].size = 10**9
        self.refused(device, assignment(given), "blob_bytes")


def leaky_step():
    """A graph of the very form of an honest step whose "gradient" is the examples themselves."""
    honest = exported("mlp")
    form, proto = honest.form, onnx.load_from_string(honest.data)
    size = int(np.prod(form.inputs()["x"]))
    constants = [("flat", np.array([size])), ("pads", np.array([0, form.parameters - size])), ("none", np.zeros(0, np.int64))]
    nodes = [
        helper.make_node("Reshape", ["x", "flat"], ["raw"]), helper.make_node("Pad", ["raw", "pads"], ["gradient"]),
        helper.make_node("ReduceSum", ["mask", "none"], ["count"], keepdims=0),
        helper.make_node("ReduceSum", ["mask"], ["loss"], keepdims=0),
    ]  # fmt: skip
    makes = lambda shapes: [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]
    graph = helper.make_graph(
        nodes, "step", makes(form.inputs()), makes(form.outputs()), [numpy_helper.from_array(v, n) for n, v in constants]
    )  # fmt: skip
    found = helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)
    found.metadata_props.add(key=FORM_KEY, value=form.to_json())
    return found.SerializeToString()


def test_a_step_that_the_publisher_did_not_sign_sees_no_example(device):
    data = leaky_step()
    x, y = examples("mlp", 4)
    gradient, _ = Accumulate(read_step(data))(start_of(network("mlp")), x, y, np.arange(4))
    np.testing.assert_array_equal(gradient[: x.size], x.reshape(-1))  # it would run just as well
    for number, key in enumerate((OTHER, IDENTITY)):
        state, world, gateway = device
        world.examples = "no.such.module:function"  # which nobody may even import
        work = doing(state, world, gateway)
        work.go_on(work.accept(assignment(plan(gateway, blobs=step_blobs(gateway, data, key), round=5 + number))))
        assert outcomes(gateway)[-1] == pb.REFUSED_PLAN
        assert "no publisher of the trust bundle has signed it" in gateway.reports[-1].text
        assert not gateway.uploads


def test_a_step_without_a_signature_and_one_signed_for_another_are_refused(device):
    state, world, gateway = device
    step, signature = step_blobs(gateway, exported("mlp").data)
    other = step_blobs(gateway, exported("mlp", unit="example").data)[1]
    work = doing(state, world, gateway)
    for number, (blobs, word) in enumerate((([step], "names no step-signature"), ([step, other], "no publisher"))):
        work.go_on(work.accept(assignment(plan(gateway, blobs=blobs, round=5 + number))))
        assert word in gateway.reports[-1].text
    assert not gateway.uploads
    work.go_on(work.accept(assignment(plan(gateway, blobs=[step, signature], round=9))))
    assert len(gateway.uploads) == 1


def test_transfers_go_on_where_they_broke_off(device):
    state, world, gateway = device
    gateway.pieces, gateway.fails = 1000, {"fetch": 3}
    work = doing(state, world, gateway)
    found = work.accept(assignment(plan(gateway)))
    for _ in range(3):
        with pytest.raises(TryAgain):
            work.go_on(state.work())
    assert [offset for offset in gateway.offsets if offset] != []
    work.go_on(found)
    assert outcomes(gateway) == [pb.UPLOADED]
    assert max(gateway.offsets) >= 1000


def test_bytes_that_the_plan_does_not_name_are_refused(device):
    state, world, gateway = device
    given = plan(gateway)
    model = next(blob for blob in given.blobs if blob.name == "model")
    gateway.blobs[model.digest] = bytes(len(gateway.blobs[model.digest]))
    work = doing(state, world, gateway)
    work.go_on(work.accept(assignment(given)))
    assert outcomes(gateway) == [pb.REFUSED_PLAN]
    assert "not those that the plan names" in gateway.reports[0].text


def test_uploads_are_repeated_with_the_same_bytes_until_they_are_answered(device):
    state, world, gateway = device
    gateway.fails = {"upload": 2}
    table = plan(gateway, upload_encoding="int8")  # which rounds with fresh coins every time
    doing(state, world, gateway).accept(assignment(table))
    for _ in range(2):
        with pytest.raises(TryAgain):
            doing(fresh_state(state.directory), world, gateway).go_on(state.work())
    assert state.work().phase == "trained"
    doing(fresh_state(state.directory), world, gateway).go_on(state.work())
    assert len(gateway.uploads) == 3
    assert len(set(gateway.uploads)) == 1
    assert outcomes(gateway) == [pb.UPLOADED]
    assert state.participation(TASK).times == 1


@pytest.mark.parametrize(("reason", "outcome"), [(pb.LATE, pb.GAVE_UP), (pb.UNUSABLE, pb.FAILED)])
def test_refused_uploads_end_the_round(device, reason, outcome):
    state, world, gateway = device
    gateway.refusals = {"upload": [GatewayRefusal(reason, "no")]}
    work = doing(state, world, gateway)
    work.go_on(work.accept(assignment(plan(gateway))))
    assert outcomes(gateway) == [outcome]
    assert state.work() is None


def test_an_identity_that_is_revoked_keeps_nothing_from_the_agent(device):
    state, world, gateway = device
    gateway.refusals = {"upload": [GatewayRefusal(pb.REVOKED, "no")]}
    work = doing(state, world, gateway)
    with pytest.raises(GatewayRefusal):
        work.go_on(work.accept(assignment(plan(gateway))))


def long_plan(gateway, **fields):
    """So many steps that a test can interrupt them."""
    return plan(gateway, table=settings() | {"epochs": 100, "lr": 0.001}, **fields)


def interrupted(device, why, monkeypatch):
    """Bytes of the upload of a round that is interrupted by ``why`` after its child has written a checkpoint."""
    state, world, gateway = device
    work = doing(state, world, gateway)
    asked = work._why_stop

    def why_stop(one):
        return why() if (state.round / "progress.bin").exists() else asked(one)

    monkeypatch.setattr(work, "_why_stop", why_stop)
    found = work.accept(assignment(long_plan(gateway)))
    with pytest.raises((TryAgain, KeyboardInterrupt)):
        work.go_on(found)
    assert not gateway.uploads
    assert (state.round / "progress.bin").exists()
    doing(fresh_state(state.directory), world, gateway).go_on(state.work())
    return gateway.uploads[0]


def test_a_round_that_is_killed_or_left_politely_ends_with_the_same_bytes(tmp_path, monkeypatch):
    def a_device(name):
        folder = tmp_path / name
        folder.mkdir()
        return fresh_state(folder / "state"), World(tmp_path / "examples"), Gateway()

    def killed():
        raise KeyboardInterrupt  # the agent's own end: its child is killed with signal 9

    state, _, gateway = whole = a_device("whole")
    work = doing(*whole)
    work.go_on(work.accept(assignment(long_plan(gateway))))
    for name, why in (("killed", killed), ("polite", lambda: "not charging")):
        one = a_device(name)
        assert interrupted(one, why, monkeypatch) == gateway.uploads[0]
        assert outcomes(one[2]) == ([pb.UPLOADED] if name == "killed" else [pb.INELIGIBLE, pb.UPLOADED])
    assert not state.problem


def test_a_device_that_is_not_eligible_any_more_leaves_politely(device, monkeypatch):
    monkeypatch.setattr(fedcore_device.rounds, "_LOOKING", 0.0)
    state, world, gateway = device
    world.now = [Conditions(free_storage=1 << 40, charging=False)]
    work = doing(state, world, gateway)
    with pytest.raises(TryAgain, match="not charging"):
        work.go_on(work.accept(assignment(long_plan(gateway))))
    assert outcomes(gateway) == [pb.INELIGIBLE]
    assert gateway.reports[0].text == "not charging"
    assert state.work().phase == "accepted"


def test_a_device_that_is_not_needed_any_more_stops(device, monkeypatch):
    monkeypatch.setattr(fedcore_device.rounds, "_ASKING", 0.0)
    state, world, gateway = device
    gateway.stop = True
    work = doing(state, world, gateway)
    work.go_on(work.accept(assignment(long_plan(gateway))))
    assert outcomes(gateway)[0] == pb.WORKING
    assert outcomes(gateway)[-1] == pb.GAVE_UP
    assert not gateway.uploads
    assert state.work() is None


def test_a_round_in_progress_that_has_expired_is_given_up(device):
    state, world, gateway = device
    work = doing(state, world, gateway)
    found = work.accept(assignment(plan(gateway)))
    world.offset = 3600.0
    work.go_on(found)
    assert outcomes(gateway) == [pb.WORKING, pb.GAVE_UP], "its own clock may be wrong: the gateway is asked before it gives up"
    assert not gateway.uploads


def test_a_clock_that_is_a_year_ahead_is_set_right_before_a_round_is_given_up(device):
    state, world, gateway = device
    work = doing(state, world, gateway)
    found = work.accept(assignment(plan(gateway)))
    world.offset = 365 * 86_400.0
    report = gateway.report

    def set_right(body):
        sent = work._requests.sign("Report", b"")
        now = int(1000 * (world.clock() - world.offset))
        work._requests.set_clock(sent, server_time(TIME, DEPLOYMENT, sent.request.nonce, now))  # as where a clock is refused
        return report(body)

    gateway.report = set_right
    work.go_on(found)
    assert outcomes(gateway) == [pb.WORKING, pb.UPLOADED]
    assert len(gateway.uploads) == 1


def test_what_is_wrong_with_the_examples_stays_on_the_device(device):
    state, world, gateway = device
    world.examples = "no.such.module:secret"
    work = doing(state, world, gateway)
    work.go_on(work.accept(assignment(plan(gateway))))
    assert "secret" in state.problem
    assert outcomes(gateway) == [pb.REFUSED_PLAN]
    assert "secret" not in gateway.reports[0].text
    assert not gateway.uploads


@pytest.mark.parametrize("limits", [{"memory": 10_000_000}, {"seconds": 0}])
def test_training_over_its_limits_is_ended(device, limits):
    state, world, gateway = device
    policy = dataclasses.replace(LOOSE, limits=dataclasses.replace(LOOSE.limits, **limits))
    work = doing(state, world, gateway, policy)
    work.go_on(work.accept(assignment(long_plan(gateway))))
    assert outcomes(gateway) == [pb.FAILED]
    assert not gateway.uploads


def test_an_agent_at_rest_is_small_and_light(tmp_path):
    """In a process of its own: what it imports and holds between two rounds, with a connection open."""
    program = """
import json, sys
from pathlib import Path
from fedcore_device import agent, cli, environment, policy, rounds, state
from fedcore.gateway.client import channel_to
from fedcore.gateway.messages import FleetTrust
import grpc
channel = channel_to("localhost:1", FleetTrust("x", bytes(32), (), (), (), b"", b"", b""), plain=True)
environment.LinuxEnvironment(Path(sys.argv[1]), "x").conditions(training=False)
state.State(Path(sys.argv[1]) / "s").next_number()
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
heavy = [name for name in ("numpy", "onnxruntime", "torch", "flwr", "tuf", "typer", "rich") if name in sys.modules]
print(json.dumps({"rss": int(status["VmRSS"].split()[0]) / 1024, "heavy": heavy}))
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3] / "clients" / "linux")}
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False, env=environment
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["heavy"] == []
    assert found["rss"] <= 80


def test_a_child_that_trains_the_cnn_stays_within_the_devices_memory(device):
    """The agent at rest and its child together: 150 MB, shared libraries counted twice."""
    state, world, gateway = device
    x, y = examples("cnn", 64)
    np.savez(Path(world.examples) / "examples.npz", x=x, y=y)
    model, step = network("cnn"), exported("cnn", batch=16)
    layout = layout_of(model, trainable=True)
    blobs = [gateway.put("model", encode_model(layout.wire_tensors(start_of(model))))]
    given = plan(gateway, blobs=step_blobs(gateway, step.data), values=layout.size)
    given.blobs[0].CopyFrom(blobs[0])
    work = doing(state, world, gateway)
    work.go_on(work.accept(assignment(given)))
    assert outcomes(gateway) == [pb.UPLOADED]
    assert 0 < gateway.reports[0].peak_memory_bytes <= 90_000_000


def test_the_hash_of_the_work_is_the_coordinators_also_after_its_travel():
    table = settings(local=private()) | {"release-seed": b"\x00\xff", "release-dimension": 7, "activation-scales": [0.1, 1e-30]}
    travelled = to_table(pb.Plan.FromString(pb.Plan(settings=to_settings(table)).SerializeToString()))
    assert hash_work(b"model", travelled) == hash_work(b"model", table)
    assert hash_work(b"model", travelled | {"epochs": 9}) != hash_work(b"model", table)
