import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.errors import Refused
from fedcore.secagg.neighbours import Graph, check_degree, choose_degree, circle_of, survival_risk

TABLE = {  # of the specification: n = 1000, C = gamma n; k(D) at 10 % and 30 % dropouts
    (10, 0.1): (28, 6), (10, 0.3): (48, 6), (50, 0.1): (50, 14), (50, 0.3): (94, 18), (100, 0.1): (66, 20), (100, 0.3): (126, 27),
}  # fmt: skip


@pytest.mark.parametrize(("corrupt", "dropout"), TABLE)
def test_degrees_of_a_thousand_clients(corrupt, dropout):
    degree, least = TABLE[corrupt, dropout]
    assert choose_degree(1000, corrupt, dropout) == (degree, least)
    check_degree(1000, degree, least, corrupt)
    with pytest.raises(Refused, match="separate"):
        check_degree(1000, degree, least - 1, corrupt)


@pytest.mark.parametrize("clients", [2, 3, 50, 128])
def test_up_to_128_clients_the_graph_is_complete(clients):
    assert choose_degree(clients, clients // 10, 0.3) == (clients - 1, 0)


def test_where_no_smaller_degree_is_safe_the_graph_is_complete():
    assert choose_degree(130, 120, 0.3) == (129, 0)
    degree, least = choose_degree(129, 2, 0.1)
    assert 2 * least > 2
    assert degree < 128


@settings(max_examples=60, deadline=None)
@given(st.integers(129, 400), st.integers(0, 40), st.sampled_from([0.05, 0.1, 0.3]))
def test_a_chosen_degree_is_the_smallest_that_is_safe_and_seldom_aborts(clients, corrupt, dropout):
    degree, least = choose_degree(clients, corrupt, dropout)
    check_degree(clients, degree, least, corrupt)
    if degree < clients - 1:
        assert survival_risk(clients, degree // 2, least, dropout) <= Fraction(1, 1000)
        smaller = degree // 2 - 1
        safe = [d for d in range(1, smaller + 1) if is_safe(clients, 2 * smaller, d, corrupt)]
        assert not safe or survival_risk(clients, smaller, safe[0], dropout) > Fraction(1, 1000)


def is_safe(clients, degree, least, corrupt) -> bool:
    """Slow twin of the rule, in floating point through logarithms of factorials."""

    def choose(a, b):
        return math.lgamma(a + 1) - math.lgamma(b + 1) - math.lgamma(a - b + 1) if 0 <= b <= a else -math.inf

    width = degree // 2
    tail = sum(
        math.exp(choose(corrupt, x) + choose(clients - corrupt, width - x) - choose(clients, width))
        for x in range(least, min(corrupt, width) + 1)
    )
    return 2 * least > corrupt or (clients * tail) ** 2 / 2 <= 2**-60


@settings(max_examples=100, deadline=None)
@given(st.integers(5, 300), st.data())
def test_only_safe_degrees_are_accepted(clients, data):
    degree = 2 * data.draw(st.integers(1, max(1, (clients - 2) // 2)))
    least = data.draw(st.integers(1, degree // 2))
    corrupt = data.draw(st.integers(0, clients))
    if degree < clients - 1 and is_safe(clients, degree, least, corrupt):
        check_degree(clients, degree, least, corrupt)
    else:
        with pytest.raises(Refused):
            check_degree(clients, degree, least, corrupt)


@pytest.mark.parametrize(("degree", "least"), [(19, 3), (0, 0), (20, 0), (20, 11), (200, 5), (199, 1), (300, 5), (201, 5)])
def test_what_is_no_graph_is_refused(degree, least):
    with pytest.raises(Refused):
        check_degree(200, degree, least, 1)


def test_the_risk_is_that_of_random_dropouts():
    """Monte Carlo with a fixed seed: the union bound lies above, and not far above, the frequency of aborted rounds."""
    clients, width, least, dropout = 200, 12, 3, 0.3
    rng = np.random.default_rng(5)
    aborts = 0
    for _ in range(4000):
        present = np.ones(clients)
        present[rng.choice(clients, round(clients * dropout), replace=False)] = 0
        wrapped = np.concatenate([present, present[: width - 1]])
        aborts += np.convolve(wrapped, np.ones(width), "valid").min() < least
    risk = float(survival_risk(clients, width, least, dropout))
    assert aborts / 4000 <= risk
    assert 0 < risk < 5 * aborts / 4000


@settings(max_examples=40, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.integers(4, 60), st.data())
def test_neighbours_are_the_nearest_on_the_circle(seed, clients, data):
    degree = data.draw(st.one_of(st.just(clients - 1), st.integers(1, (clients - 2) // 2).map(lambda half: 2 * half)))
    if degree % 2 and degree < clients - 1:
        degree += 1
    graph = Graph(seed, clients, degree, 1)
    circle = circle_of(seed, clients)
    assert sorted(circle) == list(range(clients))
    for index in range(clients):
        found = graph.neighbours(index)
        at = circle.index(index)

        def distance(other, at=at):
            gap = abs(circle.index(other) - at)
            return min(gap, clients - gap)

        expected = sorted(j for j in range(clients) if j != index and (degree == clients - 1 or distance(j) <= degree // 2))
        assert list(found) == expected
        assert len(found) == degree
        assert all(index in graph.neighbours(j) for j in found)


def test_the_circle_depends_on_the_whole_seed():
    assert circle_of(bytes(32), 50) != circle_of(bytes(31) + b"\x01", 50)


@settings(max_examples=100, deadline=None)
@given(st.integers(6, 40), st.data())
def test_windows_are_counted_all_around_the_circle(clients, data):
    width = data.draw(st.integers(1, (clients - 2) // 2))
    least = data.draw(st.integers(1, width))
    survivors = data.draw(st.sets(st.integers(0, clients - 1)))
    graph = Graph(b"s" * 32, clients, 2 * width, least)
    circle = circle_of(b"s" * 32, clients)
    windows = [[circle[(start + step) % clients] for step in range(width)] for start in range(clients)]
    if graph.complete or all(len(survivors & set(window)) >= least for window in windows):
        graph.check_survivors(survivors)
    else:
        with pytest.raises(Refused, match="window"):
            graph.check_survivors(survivors)


def test_a_complete_graph_has_no_windows():
    Graph(b"s" * 32, 10, 9, 0).check_survivors([])


def test_windows_keep_honest_survivors_together():
    """All ways to drop clients of a small circle: if every window holds D, and the corrupt fill no two disjoint windows, then
    the honest survivors are connected through honest ones. Without the windows they are not."""
    clients, degree, least = 9, 4, 2
    corrupt = {0, 4}
    assert 2 * least > len(corrupt)
    graph = Graph(b"s" * 32, clients, degree, least)
    circle = circle_of(b"s" * 32, clients)
    bad = {circle[position] for position in corrupt}
    separated = 0
    for size in range(clients + 1):
        for survivors in map(set, itertools.combinations(range(clients), size)):
            honest = survivors - bad
            together = connected(graph, honest)
            try:
                graph.check_survivors(survivors)
            except Refused:
                separated += not together
            else:
                assert together
    assert separated > 0


def connected(graph, nodes) -> bool:
    """Whether the nodes reach one another over edges among themselves."""
    if not nodes:
        return True
    reached, frontier = set(), {next(iter(nodes))}
    while frontier:
        reached |= frontier
        frontier = {j for i in frontier for j in graph.neighbours(i) if j in nodes} - reached
    return reached == nodes
