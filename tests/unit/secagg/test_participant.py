"""A client whose part comes in two messages: what it noted as used stays used."""

from __future__ import annotations

import os
import time

import pytest

from fedcore.errors import Refused
from fedcore.secagg.participant import Visit, claim_visit

VISIT = Visit("task", 3, 2_000_000_000)


def test_a_visit_is_claimed_once_by_whoever_comes_first(tmp_path):
    used = tmp_path / "used"
    claim_visit(used, VISIT)
    for again in (VISIT, Visit("task", 3, 7)):  # a plan of another end is for the same key
        with pytest.raises(Refused, match="it masks once"):
            claim_visit(used, again)
    claim_visit(used, Visit("task", 4, VISIT.expiry))
    claim_visit(used, Visit("task2", 3, VISIT.expiry))
    assert len(list(used.iterdir())) == 3


def test_notes_of_visits_that_are_long_over_go(tmp_path):
    used = tmp_path / "used"
    claim_visit(used, VISIT)
    (old,) = used.iterdir()
    os.utime(old, (time.time() - 8 * 86400,) * 2)
    claim_visit(used, Visit("task", 4, VISIT.expiry))
    assert old not in list(used.iterdir())


def test_what_cannot_be_noted_is_not_used(tmp_path):
    (tmp_path / "used").write_text("")
    with pytest.raises(Refused, match="cannot be noted there"):
        claim_visit(tmp_path / "used", VISIT)
