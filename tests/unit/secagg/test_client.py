import gc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from secagg_world import END, EPOCH, MODEL, NOW, TASK, World, randomness

from fedcore.errors import Misbehaviour, Refused
from fedcore.secagg import client as client_module
from fedcore.secagg.client import Client


def reachable(root) -> set[int]:
    """Ids of everything that can be reached from an object, classes and modules apart."""
    seen, frontier = set(), [root]
    while frontier:
        one = frontier.pop()
        if id(one) in seen or isinstance(one, (type, type(gc))) or callable(one):
            continue
        seen.add(id(one))
        frontier += gc.get_referents(one)
    return seen


def test_after_the_upload_no_secret_is_left_in_the_machine(monkeypatch):
    """Random strings, pair seeds and shares are recorded as they are made; none can be reached from the client afterwards."""
    world = World()
    current = world.begin()
    secrets, real = [], world.clients[0]._random

    def recording(size):
        secrets.append(real(size))
        return secrets[-1]

    monkeypatch.setattr(world.clients[0], "_random", recording)
    real_seed, real_deal = client_module.pair_seed, client_module.deal
    monkeypatch.setattr(client_module, "pair_seed", lambda *a: (secrets.append(real_seed(*a)), secrets[-1])[1])
    dealt = []
    monkeypatch.setattr(client_module, "deal", lambda *a: (dealt.append(real_deal(*a)), dealt[-1])[1])
    key = world.clients[0]._open[0]
    world.clients[0].accept(current.coordinator.invitation(0), MODEL, NOW)
    assert any(id(secret) in reachable(world.clients[0].__dict__) for secret in secrets)
    assert id(key) not in reachable(world.clients[0].__dict__)  # e_i is gone as soon as the seeds are derived
    vector = np.full(10, 777, np.uint32)
    upload = world.clients[0].upload(vector)
    assert not vector.any()
    left = reachable(world.clients[0].__dict__)
    secrets += [content for one in dealt for content in one.contents]
    assert len(secrets) > 10
    assert not any(id(secret) in left for secret in secrets)
    assert not any(secret in upload.data for secret in secrets)
    assert "data" not in repr(upload)


def test_an_upload_is_made_once_and_a_key_serves_one_plan():
    world = World()
    current = world.begin()
    client = world.clients[0]
    with pytest.raises(Refused, match="no plan is accepted"):
        client.upload(np.zeros(10, np.uint32))
    client.accept(current.coordinator.invitation(0), MODEL, NOW)
    with pytest.raises(Refused, match="a key serves one plan"):
        client.accept(current.coordinator.invitation(0), MODEL, NOW)
    upload = client.upload(np.zeros(10, np.uint32))
    assert (upload.task, upload.round, upload.plan_hash) == (TASK, 1, current.coordinator.plan(NOW).hash)
    with pytest.raises(Refused, match="resent as it is"):
        client.upload(np.zeros(10, np.uint32))


def test_a_new_check_in_forgets_the_plan_before():
    world = World()
    current = world.begin()
    client = world.clients[0]
    client.accept(current.coordinator.invitation(0), MODEL, NOW)
    client.check_in(TASK, EPOCH, END)
    with pytest.raises(Refused, match="no plan is accepted"):
        client.upload(np.zeros(10, np.uint32))
    with pytest.raises(Misbehaviour, match="not this client's open check-in"):
        client.accept(current.coordinator.invitation(0), MODEL, NOW)


@pytest.mark.parametrize(
    "vector",
    [
        np.zeros(9, np.uint32), np.zeros((10, 1), np.uint32), np.zeros(10), np.full(10, 65536, np.uint32), np.full(10, -1),
        np.full(10, 2**40, np.int64), np.broadcast_to(np.uint32(1), 10),
    ],
)  # fmt: skip
def test_vectors_that_are_not_the_plans_are_refused_unchanged(vector):
    world = World()
    current = world.begin()
    world.clients[0].accept(current.coordinator.invitation(0), MODEL, NOW)
    before = vector.copy()
    with pytest.raises(Refused, match="the plan is for"):
        world.clients[0].upload(vector)
    assert (vector == before).all()
    world.clients[0].upload(np.zeros(10, np.uint16))  # the plan is still open


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(["uint16", "uint32", "int64", "uint64"]), st.integers(0, 2**32 - 1))
def test_the_type_of_the_integers_does_not_matter(dtype, seed):
    world = World(clients=3, seed=1)
    current = world.begin()
    current.vectors = np.random.default_rng(seed).integers(0, 1 << 16, (3, 10)).astype(dtype)
    current.upload(range(3))
    current.screen()
    current.certify()
    current.release()
    assert current.total().tolist() == current.plain(range(3))


def test_another_model_is_refused():
    world = World()
    current = world.begin()
    with pytest.raises(Misbehaviour, match="another model"):
        world.clients[0].accept(current.coordinator.invitation(0), b"x" * 32, NOW)
    world.clients[0].accept(current.coordinator.invitation(0), MODEL, NOW)


def test_clients_with_the_same_randomness_would_be_noticed():
    """Two clients that draw the same check-in key are refused as a cohort: their masks would be equal."""
    world = World()
    twin = Client(world.identities[1], world.certificates[1], world.trust, world.policy, randomness("client", 0, 0))
    world.clients[1] = twin
    with pytest.raises(Refused, match="client 1: it has the key of client 0"):
        world.begin()
