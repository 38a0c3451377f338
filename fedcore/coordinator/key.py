"""The secret key of simulated runs whose model is published: a file with 32 random bytes that only its owner reads.

The key itself stands in no run directory, message or exception; a checkpoint holds a fingerprint of it.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from fedcore.errors import Refused
from fedcore.secagg.keys import read_private_key

__all__ = ["make_key", "read_key"]

_LENGTH = 32


def make_key(path: Path) -> None:
    """Make a new key at ``path``, mode 0600.

    Raises:
        Refused: there is something already, which is left as it is, or the file cannot be written.
    """
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        raise Refused(f"{path} exists already; keys are never overwritten") from None
    except OSError as error:
        raise Refused(f"{path}: the key cannot be made ({error.strerror})") from error
    try:
        with open(handle, "wb") as file:  # noqa: PTH123 - from a descriptor, so that the mode is set from the start
            file.write(secrets.token_bytes(_LENGTH))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise Refused(f"{path}: the key cannot be made ({error.strerror})") from error


def read_key(path: Path) -> bytes:
    """The 32 bytes of the key at ``path``.

    Raises:
        Refused: it cannot be read, others may read it, or it is no such key.
    """
    if path.exists() and not path.is_file():
        raise Refused(f"privacy.key: {path} is no file")
    key = read_private_key(path)
    if len(key) != _LENGTH:
        raise Refused(f"privacy.key: {path} holds {len(key)} bytes, a key has {_LENGTH}; make one with: fedcore privacy key FILE")
    return key
