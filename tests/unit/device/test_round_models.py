"""The round's model as a delta against one that the device still holds; and whatever is wrong with that, the whole file."""

import hashlib

import numpy as np
import pytest
from device_worlds import start_of
from fleet_fake import LOOSE, Gateway, World, assignment, doing, fresh_state, plan
from small_zoo import network

from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.blobs import Blobs
from fedcore.gateway.lineage import Lineage, deltas_of
from fedcore.models import layout_of
from fedcore.quantization.wire import decode_model, encode_model


def models(count, weights="int8"):
    """Models of consecutive rounds, encoded: a few weights differ."""
    model = network("mlp", quantized=True)
    layout, values, rng = layout_of(model, trainable=True, weights=weights), start_of(model), np.random.default_rng(0)
    found = []
    for _ in range(count):
        found.append(encode_model(layout.wire_tensors(values)))
        values = values + 0.0002 * rng.standard_normal(len(values)).astype(np.float32)
    return found


@pytest.fixture
def device(tmp_path):
    return fresh_state(tmp_path / "state"), World(tmp_path / "examples"), Gateway()


def plan_of(gateway, lineage, blobs, model, number):
    """A round's plan as `DeviceGrid` makes it, its blobs where the fake gateway serves them."""
    whole, deltas = lineage.offer(model, ("train", number))
    found = plan(gateway, round=number, server_round=number)
    others = [blob for blob in found.blobs if blob.name != "model"]
    del found.blobs[:]
    found.blobs.extend([whole, *others, *deltas])
    for blob in (whole, *deltas):
        gateway.blobs[blob.digest] = blobs.get(blob.digest)
    return found


def go(device, found):
    """Do a round; which of its blobs were fetched, by name."""
    state, world, gateway = device
    fetched, fetch = [], gateway.fetch
    names = {blob.digest: blob.name for blob in found.blobs}
    gateway.fetch = lambda token, digest, offset=0: fetched.append(names[digest]) or fetch(token, digest, offset)
    work = doing(state, world, gateway, LOOSE)
    work.go_on(work.accept(assignment(found)))
    gateway.fetch = fetch
    assert gateway.reports[-1].outcome == pb.UPLOADED
    return ["delta" if name.startswith("model-from-") else name for name in fetched]


@pytest.mark.parametrize("weights", ["int8", "int8po2"])
def test_a_device_that_holds_the_last_model_fetches_the_difference(device, tmp_path, weights):
    state, _, gateway = device
    blobs = Blobs(tmp_path / "blobs")
    lineage, rounds = Lineage(blobs), models(4, weights)
    plans = [plan_of(gateway, lineage, blobs, model, number) for number, model in enumerate(rounds, 1)]
    assert [len(deltas_of(one)) for one in plans] == [0, 1, 2, 2], "the models of the last two rounds are bases"
    assert "model" in go(device, plans[0])
    assert go(device, plans[1]) == ["delta"], "step and signature are there, and the model comes of the one before"
    assert go(device, plans[3]) == ["delta"], "a round was missed"
    held = {path.name: path.read_bytes() for path in state.blobs.iterdir()}
    assert held[hashlib.sha256(rounds[3]).hexdigest()] == rounds[3]
    assert hashlib.sha256(rounds[0]).hexdigest() not in held, "what no plan can use any more is forgotten"
    assert max(blob.size for blob in deltas_of(plans[1]).values()) < len(rounds[1]) / 2
    assert decode_model(held[hashlib.sha256(rounds[3]).hexdigest()]).tensors.keys() == decode_model(rounds[0]).tensors.keys()


@pytest.mark.parametrize("wrong", ["bytes", "another result", "gone", "base damaged", "longer than the model"])
def test_whatever_is_wrong_with_a_delta_the_whole_file_is_fetched(device, tmp_path, wrong):
    from fedcore.gateway.refusals import GatewayRefusal

    state, _, gateway = device
    blobs = Blobs(tmp_path / "blobs")
    lineage, rounds = Lineage(blobs), models(2)
    first, second = (plan_of(gateway, lineage, blobs, model, number) for number, model in enumerate(rounds, 1))
    go(device, first)
    (base,) = deltas_of(second)
    delta = next(blob for blob in second.blobs if blob.name.endswith(base))
    if wrong == "bytes":
        gateway.blobs[delta.digest] = gateway.blobs[delta.digest][:-1] + b"?"
    elif wrong == "another result":
        lies = gateway.blobs[delta.digest][:40]
        delta.CopyFrom(gateway.put(delta.name, lies))
    elif wrong == "gone":
        fetch = gateway.fetch

        def refusing(token, digest, offset=0):
            if digest == delta.digest:
                raise GatewayRefusal(pb.NO_SUCH_BLOB, "no such blob")
            return fetch(token, digest, offset)

        gateway.fetch = refusing
    elif wrong == "base damaged":
        (state.blobs / base).write_bytes(b"something else")
    else:
        delta.size = 10**7
    assert "model" in go(device, second)
    assert state.blob(hashlib.sha256(rounds[1]).digest()).read_bytes() == rounds[1]


def test_a_delta_whose_transfer_breaks_off_goes_on(device, tmp_path):
    from fedcore.errors import TryAgain

    state, world, gateway = device
    blobs = Blobs(tmp_path / "blobs")
    lineage, rounds = Lineage(blobs), models(2)
    first, second = (plan_of(gateway, lineage, blobs, model, number) for number, model in enumerate(rounds, 1))
    go(device, first)
    gateway.pieces, gateway.fails = 100, {"fetch": 1}
    work = doing(state, world, gateway, LOOSE)
    accepted = work.accept(assignment(second))
    with pytest.raises(TryAgain):
        work.go_on(accepted)
    gateway.offsets.clear()
    work.go_on(state.work())
    assert gateway.offsets == [100]
    assert gateway.reports[-1].outcome == pb.UPLOADED


def test_a_base_that_names_another_file_is_not_looked_at(device, tmp_path):
    state, _, gateway = device
    blobs = Blobs(tmp_path / "blobs")
    found = plan_of(gateway, Lineage(blobs), blobs, models(1)[0], 1)
    found.blobs.append(gateway.put("model-from-../identity.key", b"x"))
    (state.directory / "identity.key").write_bytes(b"secret")
    assert "delta" not in go(device, found)


def test_what_has_no_delta(tmp_path):
    lineage, (one, two, three) = Lineage(Blobs(tmp_path)), models(3)
    assert lineage.offer(one, ("train", 1))[1] == []
    assert lineage.offer(one, ("evaluate", 1))[1] == [], "it is the same"
    other = network("cnn")
    shaped = encode_model(layout_of(other, trainable=True).wire_tensors(start_of(other)))
    assert lineage.offer(shaped, ("train", 2))[1] == []
    whole, deltas = lineage.offer(two, ("evaluate", 2))
    assert whole.name == "model"
    assert [blob.name for blob in deltas] == [f"model-from-{hashlib.sha256(one).hexdigest()}"]
    assert lineage.offer(three, ("evaluate", 2))[1] == [], "another device's own model in the same round"
