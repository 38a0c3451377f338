"""What can go wrong, by what the caller should do about it.

Four answers exist and no more: try again, go on without that client, give the round up, or refuse the request.
"""

__all__ = ["BudgetSpent", "ClientFailure", "FedcoreError", "Misbehaviour", "Refused", "RoundFailed", "TryAgain"]


class FedcoreError(Exception):
    """Root of every error that fedcore raises on purpose; its text is one line meant for the user."""


class TryAgain(FedcoreError):
    """A passing fault (disk full, store busy): nothing is lost, the same call may succeed later."""


class ClientFailure(FedcoreError):
    """One client's work is unusable; the round goes on without it."""


class RoundFailed(FedcoreError):
    """A round cannot be completed; the model of the last committed round is intact."""


class Refused(FedcoreError):
    """The request itself is wrong (configuration, data, model); repeating it cannot help."""


class BudgetSpent(Refused):
    """What is asked would cost more privacy than is left; nothing was charged and the last model is intact."""


class Misbehaviour(Refused):
    """A party sent what no honest one sends; ``party`` names it, as the text does. Nothing was taken over from the message."""

    def __init__(self, party: str, text: str) -> None:
        super().__init__(f"{party}: {text}")
        self.party = party
