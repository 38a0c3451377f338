"""FedBuff's decisions: weights, buffers, and the event queue of a virtual fleet."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.config import FleetConfig
from fedcore.coordinator.buffered import Arrived, Buffer, Staleness, fill_buffer
from fedcore.coordinator.flights import Flight, Flights, draw_order
from fedcore.data.fleet import draw_fleet
from fedcore.errors import RoundFailed

SIZE = 3


@given(exponent=st.floats(0, 10), age=st.integers(0, 10_000))
def test_weights_fall_with_age_from_one_and_exponent_zero_is_constant(exponent, age):
    staleness = Staleness(exponent, 10_000)
    assert staleness.weight(0) == 1
    assert staleness.weight(age + 1) <= staleness.weight(age) <= 1
    assert staleness.weight(age) == pytest.approx(1 / (1 + age) ** exponent)
    assert Staleness(0.0, 3).weight(age) == 1


def test_the_limit_is_the_oldest_that_counts():
    assert [Staleness(0.5, 2).admits(age) for age in (-1, 0, 2, 3)] == [False, True, True, False]


updates = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 20), st.integers(1, 50), st.lists(st.floats(-1, 1), min_size=SIZE, max_size=SIZE)),
    min_size=1, max_size=12, unique_by=lambda one: one[:2],
)  # fmt: skip


def arrived(version, client, examples, update):
    return Arrived(version, (client,), examples * np.array(update), examples, loss=examples * 0.5)


@given(found=updates, random=st.randoms(use_true_random=False), exponent=st.floats(0, 2))
def test_a_buffer_is_the_papers_sum_and_does_not_depend_on_the_order_of_arrival(found, random, exponent):
    parts = [arrived(*one) for one in found]
    shuffled = random.sample(parts, len(parts))
    one, other = (fill_buffer(SIZE, some, 5, Staleness(exponent, 5)) for some in (parts, shuffled))
    np.testing.assert_array_equal(one.total, other.total)
    assert (one.examples, one.loss, one.ages) == (other.examples, other.loss, other.ages)
    examples = sum(n for _, _, n, _ in found)
    expected = sum(n * np.array(update) / (6 - version) ** exponent for version, _, n, update in found) / examples
    np.testing.assert_allclose(one.mean, expected, rtol=1e-12, atol=1e-12)
    assert len(one.ages) == len(found), "each update is in it once"


@given(found=updates)
def test_a_buffer_without_stale_updates_is_the_example_weighted_mean_of_fedavg(found):
    fresh = [(0, client, n, update) for client, (_, _, n, update) in enumerate(found)]
    mean = fill_buffer(SIZE, [arrived(*one) for one in fresh], 0, Staleness(0.5, 0)).mean
    expected = np.average([update for *_, update in fresh], axis=0, weights=[n for _, _, n, _ in fresh])
    np.testing.assert_allclose(mean, expected, rtol=1e-12, atol=1e-12)


def test_stale_updates_make_the_step_smaller_not_only_their_share():
    (one,) = (fill_buffer(SIZE, [arrived(0, 1, 4, [1.0] * SIZE)], 3, Staleness(0.5, 3)),)
    np.testing.assert_allclose(one.mean, 0.5)


@pytest.mark.parametrize(
    "parts",
    [
        [arrived(0, 1, 1, [0.0] * SIZE)],  # too old
        [arrived(7, 1, 1, [0.0] * SIZE)],  # from the future
        [arrived(4, 1, 1, [0.0] * SIZE), arrived(4, 1, 2, [1.0] * SIZE)],
        [Arrived(4, (1, 2), np.zeros(SIZE), 2), arrived(4, 2, 1, [0.0] * SIZE)],
        [Arrived(4, (2, 2), np.zeros(SIZE), 2)],
    ],
)
def test_what_is_too_old_or_there_already_does_not_count(parts):
    with pytest.raises(RoundFailed, match="cannot count"):
        fill_buffer(SIZE, parts, 5, Staleness(0.5, 3))


def test_adding_leaves_the_buffer_alone():
    empty = Buffer.empty(SIZE)
    empty.add(arrived(0, 0, 1, [1.0] * SIZE), 0, Staleness(0.5, 0))
    assert not empty.total.any()
    assert empty.ages == ()


def run_queue(seed, population, concurrency, buffer, steps, seconds):
    """Every arrival of some server steps as (flight, version when it arrives), and the state after each step."""
    state, seen, states = Flights(), [], []
    for version in range(steps):
        coming = state.arrivals(draw_order(seed, version, population), concurrency, seconds)
        for flight, state in itertools.islice(coming, buffer):
            seen.append((flight, version))
            assert len(state.going) < concurrency
        state = state.step()
        states.append(state)
    return seen, states


fleets = st.fixed_dictionaries({
    "seed": st.integers(0, 2**31 - 1), "population": st.integers(1, 12), "concurrency": st.integers(1, 12),
    "buffer": st.integers(1, 6), "steps": st.integers(1, 8), "sharp": st.booleans(),
})  # fmt: skip


@settings(max_examples=60)
@given(fleet=fleets)
def test_in_the_queue_time_goes_forward_and_a_client_has_one_work_at_a_time_and_one_of_each_version(fleet):
    population = fleet["population"]
    concurrency, buffer = min(fleet["concurrency"], population), min(fleet["buffer"], population)
    times = draw_fleet(
        FleetConfig(10.0, spread=0.0 if fleet["sharp"] else 1.0, jitter=0.0 if fleet["sharp"] else 0.5), population, 1
    )
    begun = {}

    def seconds(version, client):
        assert (version, client) not in begun, "nobody has the same work twice"
        begun[version, client] = times.seconds(version, client)
        return begun[version, client]

    seen, states = run_queue(fleet["seed"], population, concurrency, buffer, fleet["steps"], seconds)
    arrivals = [flight.arrives for flight, _ in seen]
    assert arrivals == sorted(arrivals)
    assert all(flight.version <= version for flight, version in seen)
    work = [(flight.version, flight.client) for flight, _ in seen]
    assert len(set(work)) == len(work)
    going = [(flight.version, flight.client) for flight in states[-1].going]
    assert sorted(work + going) == sorted(begun), "all that was begun arrived or goes on"
    for state in states:
        assert len({flight.client for flight in state.going}) == len(state.going) <= concurrency
    ends = {}
    for (version, client), length in begun.items():
        (arrives,) = [f.arrives for f, _ in seen if (f.version, f.client) == (version, client)] or [None]
        ends.setdefault(client, []).append((version, arrives, length))
    for works in ends.values():  # each begins after the one before has ended
        done = sorted(w for w in works if w[1] is not None)
        assert all(second[1] - second[2] >= first[1] - 1e-9 for first, second in itertools.pairwise(done))


def test_with_equal_times_and_a_buffer_as_large_as_the_concurrency_nobody_is_stale():
    seen, states = run_queue(7, 20, 5, 5, 10, lambda *_: 60.0)
    assert all(flight.version == version for flight, version in seen)
    assert [state.now for state in states] == [60.0 * step for step in range(1, 11)]


def test_a_state_continues_as_if_it_had_not_been_kept():
    def seconds(version, client):
        return 1.0 + (7 * client + 3 * version) % 5

    whole, states = run_queue(3, 10, 4, 2, 9, seconds)
    kept, later = states[3], []
    for version in range(4, 9):
        coming = kept.arrivals(draw_order(3, version, 10), 4, seconds)
        for flight, state in itertools.islice(coming, 2):
            kept = state
            later.append((flight, version))
        kept = kept.step()
    assert later == whole[8:]
    assert kept == states[-1]


def test_when_everybody_has_had_the_version_the_queue_says_so():
    coming = Flights().arrivals(draw_order(0, 0, 3), 2, lambda *_: 1.0)
    assert len(list(itertools.islice(coming, 3))) == 3
    with pytest.raises(RoundFailed, match="every client was given version 0"):
        next(coming)


def test_of_several_that_arrive_at_once_the_older_version_comes_first():
    state = Flights(5.0, 2, tuple(sorted([Flight(9.0, 2, 0), Flight(9.0, 1, 4), Flight(9.0, 1, 3)])))
    assert [flight.client for flight, _ in itertools.islice(state.arrivals((), 3, lambda *_: 1.0), 3)] == [3, 4, 0]


def test_a_fleets_times_have_the_median_the_spread_and_the_slow_tail_that_are_asked_for():
    plain = draw_fleet(FleetConfig(60.0, spread=0.5, jitter=0.0), 20_000, 1)
    assert np.median(plain.usual) == pytest.approx(60, rel=0.02)
    assert np.log(plain.usual).std() == pytest.approx(0.5, rel=0.02)
    slow = draw_fleet(FleetConfig(60.0, spread=0.5, jitter=0.0, slow_share=0.1, slow_factor=8.0), 20_000, 1)
    ratio = slow.usual / plain.usual
    assert (np.isclose(ratio, 8).sum(), np.isclose(ratio, 1).sum()) == (2000, 18_000)
    assert plain.seconds(1, 5) == plain.seconds(2, 5) == plain.usual[5]
    jittered = draw_fleet(FleetConfig(60.0, spread=0.5, jitter=0.2), 4, 1)
    logs = [np.log(jittered.seconds(n, 2) / jittered.usual[2]) for n in range(2000)]
    assert np.std(logs) == pytest.approx(0.2, rel=0.1)
    assert jittered.seconds(3, 2) == jittered.seconds(3, 2)
    assert draw_fleet(FleetConfig(), 5, 1) is None


def test_a_synchronous_round_waits_for_the_fastest_of_those_it_asked():
    fleet = draw_fleet(FleetConfig(60.0, spread=1.0, jitter=0.3), 40, 2)
    asked = tuple(range(0, 40, 3))
    kept, seconds = fleet.fastest(4, asked, 10)
    times = {client: fleet.seconds(4, client) for client in asked}
    assert len(kept) == 10
    assert max(times[client] for client in kept) == seconds
    assert all(times[client] > seconds for client in set(asked) - set(kept))
    assert fleet.fastest(4, asked, len(asked))[0] == asked
