"""Assignments: for one device, in order, for an hour at most, and what is activated is what was assigned."""

from dataclasses import replace

import pytest
from registry_world import NOW, FakeClock, Simulator

from fedcore.errors import Refused
from fedcore.registry.assignment import LONGEST, Assignment, check_assignment, sign_assignment, still_good
from fedcore.registry.client import Client
from fedcore.secagg.crypto import Ed25519Key

KEY, DEVICE = Ed25519Key(b"k" * 32), b"d" * 32
KEYS = (Ed25519Key(b"o" * 32).public, KEY.public)
ONE = Assignment(DEVICE, 5, "spring", "digits", 7, b"t" * 32, 1000, 4600, bytes(64))


def checked(data, last=4, now=2000.0, device=DEVICE, keys=KEYS):
    return check_assignment(data, keys, device, last, now)


def test_an_assignment_is_taken_once():
    found = checked(sign_assignment(ONE, KEY))
    assert replace(found, signature=bytes(64)) == ONE
    with pytest.raises(Refused, match="not newer than 5"):
        checked(sign_assignment(ONE, KEY), last=5)


def test_of_anybody_else_for_anybody_else_at_another_time():
    data = sign_assignment(ONE, KEY)
    for changes, words in (
        ({"keys": [Ed25519Key(b"x" * 32).public]}, "signed by none"), ({"keys": []}, "signed by none"),
        ({"device": b"e" * 32}, "another device"), ({"now": 4600.0}, "over"), ({"now": 1000.0 - LONGEST - 1}, "from the future"),
    ):  # fmt: skip
        with pytest.raises(Refused, match=words):
            checked(data, **changes)
    for at in range(0, len(data), 7):
        with pytest.raises(Refused):
            checked(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


def test_nobody_signs_or_takes_one_that_is_good_for_longer_than_an_hour():
    for expiry in (1000 + LONGEST + 1, 1000, 999):
        with pytest.raises(Refused, match="good for"):
            sign_assignment(replace(ONE, expiry=expiry), KEY)
        forged = replace(ONE, expiry=expiry)
        forged = replace(forged, signature=KEY.sign("release assignment", forged.content()))
        with pytest.raises(Refused, match="good for"):
            checked(forged.encode(), now=1000.0)


def test_it_is_looked_at_again_at_activation():
    still_good(ONE, b"t" * 32, 4599.0)
    with pytest.raises(Refused, match="over"):
        still_good(ONE, b"t" * 32, 4600.0)
    with pytest.raises(Refused, match="not the one that was assigned"):
        still_good(ONE, b"u" * 32, 2000.0)


def test_the_digest_of_a_release_names_all_its_files(tmp_path):
    simulator = Simulator()
    simulator.add_artefact(1, b"one")
    simulator.add_artefact(2, b"one")
    simulator.add_artefact(3, b"one")
    simulator.add_artefact(3, b"two", tier="flagship")
    simulator.publish()
    found = Client(tmp_path, simulator, simulator.files["metadata/1.root.json"], FakeClock()).refresh(NOW, 9.0)
    assert found.digest("digits", 1) == found.digest("digits", 2) != found.digest("digits", 3)
    with pytest.raises(Refused, match="no release 9 of digits"):
        found.digest("digits", 9)
