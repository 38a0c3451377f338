"""What tests write into ledgers, and who writes it."""

import os
from collections.abc import Callable

from fedcore.privacy.events import GaussianRelease
from fedcore.privacy.ledger import Charge


def charge(number: int, run: str = "a") -> Charge:
    now = "2026-11-22T10:00:00+00:00"
    return Charge(run, number, 1, "client", GaussianRelease(1.0), (1, 2, 3), now, 1e-6)


def in_child(work: Callable[[], None]) -> int:
    """Fork; the child does ``work`` and leaves without any of pytest's cleaning up."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child
