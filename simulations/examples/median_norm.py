"""A strategy of one's own, in one file: updates longer than the cohort's median are shortened to it before averaging.

One client that shouts then weighs no more than the others (norm bounding as in Sun et al. 2019, arXiv:1911.07963, with the
bound taken from the cohort). It is a plain Flower strategy and knows nothing of fedcore. Run it by naming it:

    fedcore simulate simulations/examples/median_norm.toml
"""

from collections.abc import Iterable

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg


class MedianNorm(FedAvg):
    """FedAvg over updates whose L2 norm is limited to ``factor`` times the median norm of the round's updates."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """As FedAvg; remembers the model that the clients start from."""
        self.start = {name: array.numpy() for name, array in arrays.items()}
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """As FedAvg, over shortened updates."""
        replies = list(replies)
        records = [next(iter(reply.content.array_records.values())) for reply in replies]
        updates = [{name: array.numpy() - self.start[name] for name, array in record.items()} for record in records]
        norms = [float(np.sqrt(sum((part**2).sum() for part in update.values()))) for update in updates]
        limit = self.factor * float(np.median(norms))
        for reply, update, norm in zip(replies, updates, norms, strict=True):
            shorter = min(1.0, limit / norm) if norm else 1.0
            local = {name: Array(self.start[name] + shorter * part) for name, part in update.items()}
            reply.content["arrays"] = ArrayRecord(local)
        return super().aggregate_train(server_round, replies)
