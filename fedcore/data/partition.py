"""Who holds which example: partitions of a training set among clients, as pure functions of the labels and a seed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedcore.config import DataConfig
from fedcore.data.datasets import Dataset, stratified
from fedcore.errors import Refused

__all__ = ["FederatedData", "federate", "partition"]

Ints = npt.NDArray[np.int64]

DIRICHLET_DRAWS = 1000  # then a partition that keeps data.min_examples is taken to be out of reach
_CALIBRATION_STREAM, _PARTITION_STREAM, _HOLDOUT_STREAM = 0xCA11B, 0xDEA1, 0x401D  # one random stream for each purpose


@dataclass(frozen=True, eq=False)
class FederatedData:
    """A data set and who holds what of its training part: every example lies in exactly one of the arrays below.

    ``clients[c]`` and ``holdout[c]`` are the sorted int64 indices that client c trains and evaluates on, ``calibration`` those
    that the coordinator keeps.
    """

    dataset: Dataset
    clients: tuple[Ints, ...]
    holdout: tuple[Ints, ...]
    calibration: Ints

    def label_counts(self) -> Ints:
        """Training examples of each label at each client, [clients, labels]; the holdout does not count."""
        labels = len(self.dataset.labels)
        return np.stack([np.bincount(self.dataset.train.y[indices], minlength=labels) for indices in self.clients]).astype(np.int64)

    def digest(self) -> str:
        """SHA-256 in hex of who holds what: equal for equal partitions, on every machine."""
        digest = hashlib.sha256()
        for indices in (self.calibration, *self.clients, *self.holdout):
            digest.update(np.concatenate([[len(indices)], indices]).astype("<i8").tobytes())
        return digest.hexdigest()


def federate(config: DataConfig, dataset: Dataset, seed: int) -> FederatedData:
    """Set the calibration examples apart (the same share of each label), deal the rest to clients, split off their holdouts.

    A holdout is ``config.holdout`` of a client's examples, at least one where that is above 0.

    Raises:
        Refused: calibration wants more than half of the examples, or the last ones of an owner; a client has too few for a
            holdout; or the partition is impossible (see `partition`).
    """
    y, groups = dataset.train.y, dataset.groups
    if config.calibration > len(y) // 2:
        raise Refused(
            f"data.calibration = {config.calibration} is more than half of the {len(y)} training examples of {dataset.name}"
        )
    calibration = stratified(y, config.calibration, _rng(seed, _CALIBRATION_STREAM))
    rest = np.setdiff1d(np.arange(len(y)), calibration)
    left = None if groups is None else groups[rest]
    if config.partition == "natural" and groups is not None and left is not None and len(lost := np.setdiff1d(groups, left)):
        raise Refused(f"data.calibration = {config.calibration} takes every example of owner {lost[0]}; ask for fewer")
    held = [rest[positions] for positions in partition(config, y[rest], left, seed)]
    rng = _rng(seed, _HOLDOUT_STREAM)
    holdout = tuple(_holdout(config.holdout, client, indices, rng) for client, indices in enumerate(held))
    clients = tuple(np.setdiff1d(indices, own) for indices, own in zip(held, holdout, strict=True))
    return FederatedData(dataset, clients, holdout, calibration)


def partition(config: DataConfig, y: Ints, groups: Ints | None, seed: int) -> tuple[Ints, ...]:
    """Deal every example to exactly one client: sorted positions in ``y``, int64, for each client.

    ``y`` [n] are labels, ``groups`` [n] natural owners if there are any. ``config.partition`` says how:

    - iid: at random, sizes differ by one at most.
    - dirichlet: each label's examples in proportions drawn from Dir(alpha), see `_dirichlet`.
    - labels: each client holds ``labels_per_client`` distinct labels, see `_labels`.
    - natural: one client for each owner, in the order of their numbers.
    - quantity: labels iid; sizes are ``min_examples`` plus shares of the others drawn from Dir(alpha). Quantity skew of Li et al.,
      "Federated Learning on Non-IID Data Silos: An Experimental Study", ICDE 2022 (arXiv:2102.02079), who redraw instead.

    Raises:
        Refused: the clients cannot all have ``config.min_examples``, or the partition does not fit the labels or owners.
    """
    if config.clients < 1 and config.partition != "natural":
        raise Refused(f'data.clients must be >= 1 with data.partition = "{config.partition}"')
    if len(y) < max(1, config.clients) * config.min_examples:
        raise Refused(_short(config, f"there are only {len(y)} examples to deal"))
    rng = _rng(seed, _PARTITION_STREAM)
    if config.partition == "natural":
        holder = _natural(config, groups)
    else:
        deal = {"iid": _iid, "dirichlet": _dirichlet, "labels": _labels, "quantity": _quantity}[config.partition]
        holder = deal(config, y, rng)
    sizes = np.bincount(holder, minlength=config.clients)
    if sizes.min() < config.min_examples:
        raise Refused(_short(config, f"client {sizes.argmin()} would hold {sizes.min()}"))
    return tuple(np.split(np.argsort(holder, kind="stable").astype(np.int64), np.cumsum(sizes)[:-1]))


def _iid(config: DataConfig, y: Ints, rng: np.random.Generator) -> Ints:
    return rng.permutation(np.arange(len(y)) % config.clients)


def _dirichlet(config: DataConfig, y: Ints, rng: np.random.Generator) -> Ints:
    """Label skew by a Dirichlet distribution, as Flower's niid_bench and NIID-Bench (Li et al., ICDE 2022) draw it.

    Label after label is split among the clients in proportions p ~ Dir(alpha) (Yurochkin et al., ICML 2019; Hsu et al., 2019,
    arXiv:1909.06335, draw the proportions of labels within a client instead); a client that already holds its even share of all
    examples gets none of the label. The whole is drawn again until every client has ``min_examples``.
    """
    _, label, of_label = np.unique(y, return_inverse=True, return_counts=True)
    for _ in range(DIRICHLET_DRAWS):
        counts = _dirichlet_counts(of_label, config.clients, config.alpha, rng)
        if counts.sum(axis=0).min() >= config.min_examples:
            holder = np.empty(len(y), np.int64)
            for k, dealt in enumerate(counts):
                holder[rng.permutation(np.flatnonzero(label == k))] = np.repeat(np.arange(config.clients), dealt)
            return holder
    raise Refused(
        _short(
            config, f"none of {DIRICHLET_DRAWS} draws with data.alpha = {config.alpha:g} gave that; more alpha or fewer clients do"
        )
    )


def _dirichlet_counts(of_label: Ints, clients: int, alpha: float, rng: np.random.Generator) -> Ints:
    """How many of each label's examples each client gets, [labels, clients]."""
    counts = np.zeros((len(of_label), clients), np.int64)
    for k, available in enumerate(of_label):
        below = counts.sum(axis=0) < of_label.sum() / clients
        weights = rng.dirichlet(np.full(clients, alpha)) * below
        total = weights.sum()
        if not total > 0:  # a tiny alpha gave all to clients that are full (or underflowed): its limit is one client, by lot
            weights, total = np.eye(clients)[rng.choice(np.flatnonzero(below))], 1.0
        ends = (np.cumsum(weights / total) * available).astype(np.int64)
        ends[-1] = available
        counts[k] = np.diff(ends, prepend=0)
    return counts


def _labels(config: DataConfig, y: Ints, rng: np.random.Generator) -> Ints:
    """Label skew by number of labels (#C = k of Li et al., ICDE 2022; McMahan et al., AISTATS 2017, deal shards to the same end).

    Each client in turn takes the labels that the fewest hold so far, ties by lot; a label's examples are shared evenly among its
    holders. So every example is dealt, and holders of two labels differ by one at most. Refused where some label would have no
    holder, or fewer examples than holders.
    """
    names, label, of_label = np.unique(y, return_inverse=True, return_counts=True)
    wanted = config.labels_per_client
    if not wanted <= len(names) <= wanted * config.clients:
        raise Refused(
            f"data.labels_per_client = {wanted} with data.clients = {config.clients} does not fit {len(names)} labels: "
            "each must have a client, and a client cannot hold more than there are"
        )
    holders = np.zeros(len(names), np.int64)
    holds = np.zeros((config.clients, len(names)), np.bool_)
    for client in range(config.clients):
        by_lot = rng.permutation(len(names))
        chosen = by_lot[np.argsort(holders[by_lot], kind="stable")[:wanted]]
        holds[client, chosen] = True
        holders[chosen] += 1
    if (holders > of_label).any():
        k = int(np.argmax(holders - of_label))
        raise Refused(
            f'data.partition = "labels": {of_label[k]} examples of label {names[k]} for {holders[k]} clients; take fewer clients'
        )
    holder = np.empty(len(y), np.int64)
    for k in range(len(names)):
        mine = np.flatnonzero(label == k)
        holder[mine] = rng.permutation(rng.permutation(np.flatnonzero(holds[:, k]))[np.arange(len(mine)) % holders[k]])
    return holder


def _natural(config: DataConfig, groups: Ints | None) -> Ints:
    if groups is None:
        raise Refused('data.partition = "natural": the data set does not say who owns its examples')
    owners, holder = np.unique(groups, return_inverse=True)
    if config.clients not in (0, len(owners)):
        raise Refused(
            f'data.partition = "natural" gives one client for each of {len(owners)} owners, not data.clients = {config.clients}'
        )
    return holder.astype(np.int64)


def _quantity(config: DataConfig, y: Ints, rng: np.random.Generator) -> Ints:
    free = len(y) - config.clients * config.min_examples
    sizes = np.full(config.clients, config.min_examples)
    if free:
        sizes += _dirichlet_counts(np.array([free]), config.clients, config.alpha, rng)[0]
    return rng.permutation(np.repeat(np.arange(config.clients), sizes))


def _holdout(fraction: float, client: int, indices: Ints, rng: np.random.Generator) -> Ints:
    if fraction == 0:
        return np.empty(0, np.int64)
    if len(indices) < 2:
        raise Refused(
            f"client {client} holds {len(indices)} example: data.holdout = {fraction:g} needs 2; set data.min_examples = 2"
        )
    count = min(max(1, round(fraction * len(indices))), len(indices) - 1)
    return np.sort(rng.permutation(indices)[:count])


def _short(config: DataConfig, reason: str) -> str:
    return (
        f'data.partition = "{config.partition}" with data.clients = {config.clients} cannot keep '
        f"data.min_examples = {config.min_examples}: {reason}"
    )


def _rng(seed: int, stream: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence([seed, stream]))
