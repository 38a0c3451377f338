"""Data sets, and how their examples are dealt to clients."""

from fedcore.data.datasets import Dataset, Examples, load_dataset
from fedcore.data.partition import FederatedData, federate, partition

__all__ = ["Dataset", "Examples", "FederatedData", "federate", "load_dataset", "partition"]
