"""The one rule for a model's name, from publication to devices: it stands in paths, rollouts' names and assignments."""

from __future__ import annotations

import re

from fedcore.errors import Refused

__all__ = ["LONGEST_MODEL", "check_model"]

LONGEST_MODEL = 40
"""Characters. A rollout is called NAME-VERSION, and stores and gateways take texts of 64."""
_MODEL = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{LONGEST_MODEL - 1}}}", re.ASCII)


def check_model(name: str) -> str:
    """The same name.

    Raises:
        Refused: no model can be called so.
    """
    if not _MODEL.fullmatch(name):
        raise Refused(
            f"{name!r} names no model: 1 to {LONGEST_MODEL} letters, digits, dots, dashes and underscores, no dash or dot first"
        )
    return name
