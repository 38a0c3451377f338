import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedcore.config import DataConfig
from fedcore.data import Dataset, Examples, federate, partition
from fedcore.data.partition import _dirichlet_counts
from fedcore.errors import Refused

DEALT = ("iid", "dirichlet", "labels", "quantity")


def labels_of(n: int, labels: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.arange(n) % labels).astype(np.int64)


def dataset_of(y: np.ndarray, groups: np.ndarray | None = None) -> Dataset:
    x = np.arange(len(y), dtype=np.float32)[:, None]
    labels = tuple(str(label) for label in range(int(y.max()) + 1))
    return Dataset("made up", labels, Examples(x, y), Examples(x[:1], y[:1]), groups, 0.0, 1.0)


@st.composite
def cases(draw):
    y = np.array(draw(st.lists(st.integers(0, 5), min_size=20, max_size=200)), np.int64)
    config = DataConfig(
        partition=draw(st.sampled_from((*DEALT, "natural"))),
        clients=draw(st.integers(1, 12)),
        alpha=draw(st.sampled_from((1e-6, 0.05, 0.5, 5.0, 1e6))),
        labels_per_client=draw(st.integers(1, 4)),
        min_examples=draw(st.integers(1, 4)),
        calibration=draw(st.integers(1, 10)),
        holdout=draw(st.sampled_from((0.0, 0.1, 0.5, 0.9))),
    )
    owners = np.array(draw(st.lists(st.integers(0, 4), min_size=len(y), max_size=len(y))), np.int64)
    if config.partition == "natural":
        config = dataclasses.replace(config, clients=draw(st.sampled_from((0, len(np.unique(owners))))))
    return config, y, owners, draw(st.integers(0, 2**31 - 1))


@given(cases())
@settings(deadline=None, max_examples=200)
def test_a_partition_deals_every_example_once_or_is_refused(case):
    config, y, owners, seed = case
    try:
        parts = partition(config, y, owners, seed)
    except Refused:
        assume(False)
    assert len(parts) == (config.clients or len(np.unique(owners)))
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)
    assert min(len(part) for part in parts) >= config.min_examples
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(y)))
    for part, again in zip(parts, partition(config, y, owners, seed), strict=True):
        np.testing.assert_array_equal(part, again)


@given(cases())
@settings(deadline=None, max_examples=200)
def test_federated_data_holds_every_training_example_once(case):
    config, y, owners, seed = case
    try:
        data = federate(config, dataset_of(y, owners), seed)
    except Refused:
        assume(False)
    assert len(data.calibration) == config.calibration
    everything = np.concatenate([data.calibration, *data.clients, *data.holdout])
    np.testing.assert_array_equal(np.sort(everything), np.arange(len(y)))
    for train, holdout in zip(data.clients, data.holdout, strict=True):
        assert len(train) >= 1
        assert (len(holdout) >= 1) == (config.holdout > 0)
        assert len(train) + len(holdout) >= config.min_examples
    expected = [[(y[part] == label).sum() for label in range(len(data.dataset.labels))] for part in data.clients]
    np.testing.assert_array_equal(data.label_counts(), expected)
    assert data.digest() == federate(config, dataset_of(y, owners), seed).digest()


@pytest.mark.parametrize("kind", DEALT)
def test_another_seed_deals_otherwise(kind):
    config = DataConfig(partition=kind, clients=5, calibration=10)
    digests = {federate(config, dataset_of(labels_of(500, 5)), seed).digest() for seed in range(5)}
    assert len(digests) == 5


def test_the_digest_sees_one_exchanged_example_and_the_order_of_clients():
    data = federate(DataConfig(partition="iid", clients=3, calibration=10, holdout=0.2), dataset_of(labels_of(100, 2)), 0)
    one, two, three = data.clients
    exchanged = (np.sort(np.append(one[1:], two[0])), np.sort(np.append(two[1:], one[0])), three)
    others = [
        dataclasses.replace(data, clients=exchanged),
        dataclasses.replace(data, clients=(two, one, three)),
        dataclasses.replace(data, clients=data.holdout, holdout=data.clients),
        dataclasses.replace(data, calibration=data.calibration[1:]),
    ]
    assert len({data.digest(), *(other.digest() for other in others)}) == 5
    assert len(data.digest()) == 64


def test_the_partition_of_a_seed_stays_what_it_was():
    """Runs are resumed and compared by it; a numpy that changes its generators breaks stored runs as much as we would."""
    config = DataConfig(partition="dirichlet", clients=4, calibration=20, holdout=0.2)
    data = federate(config, dataset_of(labels_of(200, 4)), seed=3)
    assert data.digest() == "2945cbb09045323c3f3fad96c3c8fb6243b71abf12a255a841100f581ac0265b"


def test_iid_sizes_differ_by_one_at_most():
    sizes = [len(part) for part in partition(DataConfig(partition="iid", clients=7), labels_of(100, 3), None, 0)]
    assert max(sizes) - min(sizes) == 1


def counts_by_the_published_loop(y: np.ndarray, clients: int, alpha: float, rng: np.random.Generator) -> np.ndarray:
    """Flower's niid_bench, its partition by Dirichlet distribution, without the shuffling of a label's examples."""
    held = [[] for _ in range(clients)]
    for label in range(int(y.max()) + 1):
        examples = np.where(y == label)[0]
        proportions = rng.dirichlet(np.repeat(alpha, clients))
        proportions = np.array([p * (len(own) < len(y) / clients) for p, own in zip(proportions, held, strict=True)])
        proportions = proportions / proportions.sum()
        ends = (np.cumsum(proportions) * len(examples)).astype(int)[:-1]
        held = [own + more.tolist() for own, more in zip(held, np.split(examples, ends), strict=True)]
    return np.array([[(y[own] == label).sum() for own in held] for label in range(int(y.max()) + 1)])


@pytest.mark.parametrize(("clients", "alpha"), [(10, 0.5), (10, 5.0), (30, 0.3), (100, 0.5)])
def test_dirichlet_equals_the_published_loop(clients, alpha):
    y = labels_of(3000, 10)
    for seed in range(5):
        mine = _dirichlet_counts(np.bincount(y), clients, alpha, np.random.default_rng(seed))
        np.testing.assert_array_equal(mine, counts_by_the_published_loop(y, clients, alpha, np.random.default_rng(seed)))


@pytest.mark.filterwarnings("error")
def test_a_label_whose_draw_falls_on_full_clients_goes_to_one_with_room():
    for seed in range(20):
        counts = _dirichlet_counts(np.array([50, 50]), 2, 1e-6, np.random.default_rng(seed))
        assert sorted(counts.tolist()) == [[0, 50], [50, 0]]


def test_less_alpha_skews_labels_more():
    y = labels_of(6000, 10)

    def skew(alpha: float) -> float:
        parts = partition(DataConfig(partition="dirichlet", clients=10, alpha=alpha), y, None, 0)
        shares = [np.bincount(y[part], minlength=10) / len(part) for part in parts]
        return float(np.mean([np.abs(share - 0.1).sum() / 2 for share in shares]))  # total variation from all examples

    assert skew(0.1) > 0.5 > skew(1.0) > 0.1 > 0.02 > skew(1e5)


def test_dirichlet_is_refused_where_no_draw_keeps_the_minimum():
    config = DataConfig(partition="dirichlet", clients=50, alpha=0.01, min_examples=3)
    with pytest.raises(Refused, match=r"clients = 50 .*min_examples = 3: none of 1000 draws with data.alpha = 0.01"):
        partition(config, labels_of(200, 4), None, 0)


@pytest.mark.parametrize(("clients", "per_client", "labels"), [(10, 2, 10), (5, 2, 10), (7, 3, 10), (100, 1, 10), (40, 10, 10)])
def test_clients_hold_exactly_so_many_labels(clients, per_client, labels):
    y = labels_of(4000, labels)
    config = DataConfig(partition="labels", clients=clients, labels_per_client=per_client)
    held = [np.unique(y[part]) for part in partition(config, y, None, 0)]
    assert {len(own) for own in held} == {per_client}
    holders = np.bincount(np.concatenate(held), minlength=labels)
    assert holders.min() >= 1
    assert holders.max() - holders.min() <= 1
    for part, other in itertools.combinations(partition(config, y, None, 0), 2):
        assert not set(part) & set(other)


@pytest.mark.parametrize(("clients", "per_client"), [(4, 2), (10, 11)])
def test_labels_without_a_client_or_more_than_there_are_is_refused(clients, per_client):
    config = DataConfig(partition="labels", clients=clients, labels_per_client=per_client)
    with pytest.raises(
        Refused, match=f"data.labels_per_client = {per_client} with data.clients = {clients} does not fit 10 labels"
    ):
        partition(config, labels_of(4000, 10), None, 0)


def test_a_label_with_fewer_examples_than_holders_is_refused():
    y = np.array([0] * 97 + [1] * 3, np.int64)
    with pytest.raises(Refused, match="3 examples of label 1 for 10 clients"):
        partition(DataConfig(partition="labels", clients=10, labels_per_client=2), y, None, 0)


def test_natural_clients_are_the_owners():
    groups = np.array([30, 10, 20, 10, 30, 30, 20, 10], np.int64)
    y = labels_of(8, 2)
    for clients in (0, 3):
        parts = partition(DataConfig(partition="natural", clients=clients), y, groups, 0)
        assert [part.tolist() for part in parts] == [[1, 3, 7], [2, 6], [0, 4, 5]]
    with pytest.raises(Refused, match=r"3 owners, not data.clients = 4"):
        partition(DataConfig(partition="natural", clients=4, min_examples=1), y, groups, 0)
    with pytest.raises(Refused, match="does not say who owns"):
        partition(DataConfig(partition="natural"), y, None, 0)
    with pytest.raises(Refused, match="client 1 would hold 2"):
        partition(DataConfig(partition="natural", min_examples=3), y, groups, 0)


def test_quantity_skews_sizes_but_not_labels():
    y = labels_of(10000, 4)
    parts = partition(DataConfig(partition="quantity", clients=10, alpha=0.3, min_examples=5), y, None, 0)
    sizes = sorted(len(part) for part in parts)
    assert sizes[0] < 100 < 2000 < sizes[-1]
    largest = max(parts, key=len)
    assert np.abs(np.bincount(y[largest]) / len(largest) - 0.25).max() < 0.03


@pytest.mark.parametrize("kind", DEALT)
def test_just_enough_examples_or_one_too_few(kind):
    config = DataConfig(partition=kind, clients=20, min_examples=3, alpha=1e6, labels_per_client=1)
    y = np.zeros(60, np.int64)
    assert [len(part) for part in partition(config, y, None, 0)] == [3] * 20
    with pytest.raises(Refused, match="only 59 examples"):
        partition(config, y[1:], None, 0)


@pytest.mark.parametrize("kind", DEALT)
def test_zero_clients_are_refused(kind):
    with pytest.raises(Refused, match=r"data.clients must be >= 1"):
        partition(DataConfig(partition=kind, clients=0), labels_of(100, 4), None, 0)


def test_calibration_has_the_share_of_each_label():
    y = np.array([0] * 600 + [1] * 300 + [2] * 99 + [3], np.int64)
    data = federate(DataConfig(partition="iid", clients=4, calibration=100), dataset_of(y), 0)
    assert np.bincount(y[data.calibration], minlength=4).tolist() == [60, 30, 10, 0]


def test_calibration_of_more_than_half_is_refused():
    config = DataConfig(partition="iid", clients=2, calibration=51)
    with pytest.raises(Refused, match=r"data.calibration = 51 is more than half of the 100"):
        federate(config, dataset_of(labels_of(100, 2)), 0)


def test_calibration_may_not_take_an_owner_away():
    y = labels_of(100, 2)
    groups = np.arange(100) // 2
    with pytest.raises(Refused, match=r"data.calibration = 50 takes every example of owner \d+"):
        federate(DataConfig(partition="natural", calibration=50), dataset_of(y, groups), 0)


def test_a_client_too_small_for_a_holdout_is_named():
    y = labels_of(200, 2)
    groups = np.array([0] * 150 + [1] * 50, np.int64)
    config = DataConfig(partition="natural", calibration=1, holdout=0.1, min_examples=1)
    data = federate(config, dataset_of(y, groups), 0)
    single = dataset_of(y, np.where(np.arange(200) == data.clients[0][0], 7, groups))
    with pytest.raises(Refused, match=r"client 2 holds 1 example: data.holdout = 0.1 needs 2"):
        federate(config, single, 0)
