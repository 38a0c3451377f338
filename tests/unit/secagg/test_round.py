"""Whole rounds over the real machines: Must hold 1, 2 and 5's bad box, against the plain modular sum."""

import dataclasses
import itertools
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from secagg_world import END, MODEL, NOW, POLICY, World, garbled

from fedcore.errors import Refused, RoundFailed
from fedcore.secagg.client import split_upload
from fedcore.secagg.masks import WIDTHS, add_packed, zeros
from fedcore.secagg.messages import UploadHead
from fedcore.secagg.neighbours import circle_of

numbers = itertools.count(1)
CLIENTS = 7
COMMITTEES = [(3, 3, 2), (4, 3, 1), (5, 4, 2), (3, 2, 0)]


@cache
def world_of(committee: tuple[int, int, int]) -> World:
    return World(*committee, clients=CLIENTS)


def subsets(items, fewest=0):
    return st.sets(st.sampled_from(sorted(items)), min_size=fewest).map(sorted)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from(COMMITTEES), st.sampled_from(WIDTHS), st.integers(1, 40))
def test_the_sum_is_exact_for_every_dropout_within_the_bound_and_nothing_beyond(data, committee, bits, dimension):
    """Clients drop before their upload or send a bad box, members at every step; the machines know nothing of it beforehand."""
    (m, t, _), world = committee, world_of(committee)
    everybody = range(1, m + 1)
    offering = data.draw(subsets(everybody, fewest=t))
    signers = sorted(data.draw(st.permutations(offering))[:t])
    minimum = data.draw(st.integers(POLICY.minimum_survivors, CLIENTS))
    current = world.begin(next(numbers), offering, signers=signers, bits=bits, dimension=dimension, minimum_survivors=minimum)
    uploading = data.draw(subsets(range(CLIENTS)))
    bad = data.draw(subsets(uploading)) if uploading else []
    current.upload([i for i in uploading if i not in bad])
    for i in bad:
        world.clients[i].accept(current.coordinator.invitation(i), MODEL, NOW)
        upload = world.clients[i].upload(current.vectors[i].copy())
        current.receive(i, garbled(world, i, upload.data, data.draw(st.integers(0, len(offering) - 1))))
    answering = {step: data.draw(subsets(offering)) for step in ("screen", "certify", "release")}
    seen_bad = {i for i in bad if refused_by(current, i) & set(answering["screen"])}
    survivors = sorted(set(uploading) - seen_bad)
    enough = all(len(members) >= t for members in answering.values()) and len(survivors) >= minimum
    usable = all(len(set(answering["release"]) - refused_by(current, i)) >= t for i in survivors)
    try:
        current.screen(answering["screen"])
        current.certify(answering["certify"])
        assert list(current.coordinator.survivors) == survivors
        current.release(answering["release"])
        masked = zeros(dimension, bits)
        for i in survivors:
            add_packed(masked, vector_of(current, i), bits)
        before = masked.copy()
        try:
            current.coordinator.unmask(masked)
        except RoundFailed:
            assert (masked == before).all()
            raise
    except RoundFailed:
        assert not (enough and usable)
    else:
        assert enough
        assert usable
        assert masked.tolist() == current.plain(survivors)


def vector_of(current, i):
    """The packed masked vector that client i sent, whatever else it sent."""
    return split_upload(current.sent[i])[1]


def refused_by(current, i) -> set[int]:
    """The members whose box of client i is garbled."""
    head = UploadHead.decode(split_upload(current.sent[i])[0])
    return {a for a, box in zip(current.header.points, head.boxes, strict=True) if not any(box)}


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_a_circulant_graphs_sum_is_exact_while_every_window_holds(data):
    """Sixteen clients with six neighbours, two survivors in every window of three; the rest may vanish."""
    world = circulant_world()
    current = world.begin(next(numbers), degree=6, window_survivors=2, bits=data.draw(st.sampled_from(WIDTHS)))
    dropped = data.draw(st.sets(st.integers(0, 15), max_size=6))
    alive = sorted(set(range(16)) - dropped)
    current.upload(alive)
    current.screen()
    circle = circle_of(current.coordinator.plan(NOW).seed, 16)
    holds = all(sum(circle[(start + step) % 16] not in dropped for step in range(3)) >= 2 for start in range(16))
    if not holds:
        with pytest.raises(RoundFailed, match="window"):
            current.certify()
        return
    current.certify()
    current.release()
    assert current.total().tolist() == current.plain(alive)


@cache
def circulant_world() -> World:
    return World(clients=16, seed=15, policy=dataclasses.replace(POLICY, corrupt_clients=2, minimum_survivors=4))


def test_survivors_are_never_fewer_than_the_plan_demands():
    world = world_of((4, 3, 1))
    current = world.begin(next(numbers), minimum_survivors=5)
    current.upload([0, 2, 3, 6])
    current.screen()
    with pytest.raises(RoundFailed, match="4 survivors are fewer than the 5"):
        current.certify()


def test_each_step_waits_for_the_threshold():
    world = world_of((4, 3, 1))
    current = world.begin(next(numbers))
    current.upload(range(CLIENTS))
    with pytest.raises(RoundFailed, match="not fixed"):
        _ = current.coordinator.survivors
    current.screen([1, 2])
    with pytest.raises(RoundFailed, match="0 survivors"):
        current.certify()
    current.screen([3])
    current.certify([1, 4])
    with pytest.raises(RoundFailed, match="2 members certified"):
        current.coordinator.release_request(1)
    current.certify([2])
    current.release([3, 4])
    with pytest.raises(RoundFailed, match="2 members released"):
        current.total()
    current.release([1])
    assert current.total().tolist() == current.plain(range(CLIENTS))


def test_an_upload_that_came_after_the_screening_is_not_in_u():
    world = world_of((4, 3, 1))
    current = world.begin(next(numbers))
    current.upload([0, 1, 2, 3])
    current.screen()
    current.upload([4])
    current.certify()
    assert current.coordinator.survivors == (0, 1, 2, 3)
    with pytest.raises(Refused, match=r"client 5 .*too late"):
        current.upload([5])
    current.release()
    assert current.total().tolist() == current.plain([0, 1, 2, 3])


def test_one_masked_vector_is_uniform():
    """Chi-square over 16 classes, bit balance and lag-one correlation of one upload of a constant vector; 5 standard deviations."""
    world = World(seed=11)
    current = world.begin(dimension=40_000)
    current.vectors[:] = 7
    current.upload([0])
    words = zeros(40_000, 16)
    add_packed(words, vector_of(current, 0), 16)
    counts = np.bincount(words >> 12, minlength=16)
    assert abs(((counts - 2500) ** 2 / 2500).sum() - 15) < 5 * np.sqrt(30)
    assert abs(np.unpackbits(words.view(np.uint8)).mean() - 0.5) < 5 * 0.5 / np.sqrt(640_000)
    assert abs(np.corrcoef(words[1:].astype(float), words[:-1].astype(float))[0, 1]) < 5 / np.sqrt(40_000)


def test_two_rounds_share_no_mask():
    """The same client, data and neighbours: the masks of two rounds are uncorrelated, and no seed, key, box or share recurs."""
    world = World(seed=12)
    uploads, words = [], []
    for number in (1, 2):
        current = world.begin(number, dimension=40_000)
        current.vectors[:] = 7
        current.upload([0])
        uploads.append(UploadHead.decode(split_upload(current.sent[0])[0]))
        words.append(zeros(40_000, 16))
        add_packed(words[-1], vector_of(current, 0), 16)
    assert abs(np.corrcoef(words[0].astype(float), words[1].astype(float))[0, 1]) < 5 / np.sqrt(40_000)
    assert (words[0] == words[1]).mean() < 10 / 40_000
    for name in ("box_hashes", "roots", "commitments"):
        one, other = (set(getattr(head.statement, name)) for head in uploads)
        assert not one & other


def test_noise_and_metrics_travel_in_the_vector():
    """With noise the vector has a power of two of coordinates, the public numbers are checked, and the sum decodes."""
    from secagg_world import randomness

    from fedcore.privacy.skellam import decode, encode, plan_skellam
    from fedcore.secagg.messages import MetricBlock
    from fedcore.secagg.plan import skellam_plan

    world = World(clients=6, seed=13)
    numbers_of = plan_skellam(100, 1.0, 0.3, 6, 4, 1, b"", 16)
    current = world.begin(
        bits=16, dimension=100, clipping_norm=1.0, noise_multiplier=0.3, granularity=numbers_of.granularity,
        squared_norm_bound=numbers_of.squared_norm_bound, minimum_survivors=4, layout=(MetricBlock("loss", 1),),
    )  # fmt: skip
    plan = skellam_plan(current.header, current.coordinator.plan(NOW).seed)
    rng = np.random.default_rng(3)
    updates = rng.standard_normal((6, 100)) / 20
    current.vectors = np.stack([encode(plan, update, randomness("noise", i)) for i, update in enumerate(updates)])
    current.upload([0, 1, 3, 4, 5])
    current.screen()
    current.certify()
    current.release()
    total = current.total()
    assert total.tolist() == current.plain([0, 1, 3, 4, 5])
    np.testing.assert_allclose(decode(plan, total, 5), updates[[0, 1, 3, 4, 5]].sum(0), atol=6 * 0.3 * np.sqrt(2))


def test_a_round_ends_with_its_time():
    world = World(seed=14)
    current = world.begin()
    with pytest.raises(Refused, match="the round ends at"):
        world.clients[0].accept(current.coordinator.invitation(0), MODEL, END)
    current.upload(range(8))
    with pytest.raises(Refused, match=r"coordinator: .*(not open|ends at)"):
        world.members[1].screen(current.coordinator.screen_request(1), END)


def test_an_upload_of_nobody_is_refused():
    world = World(seed=16)
    current = world.begin()
    for index in (-1, 8):
        with pytest.raises(Refused, match=f"no client {index}"):
            current.receive(index, b"\0\0\0\0")
