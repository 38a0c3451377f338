"""Data sets, and how their examples are dealt to clients."""

from fedcore.data.datasets import Dataset, Examples, load_dataset, normalised_by_test
from fedcore.data.partition import FederatedData, federate, partition

__all__ = ["Dataset", "Examples", "FederatedData", "federate", "load_dataset", "normalised_by_test", "partition"]
