"""What a coordinator that publishes by itself notes of it, and what a kill or a full disk does to the notes."""

import pytest

from fedcore.coordinator.publishing import RECORD, Publisher


@pytest.fixture
def publisher(tmp_path):
    one = object.__new__(Publisher)  # without a repository: only its notes are looked at
    one._directory = tmp_path
    return one


def test_a_torn_note_hides_no_other(publisher, tmp_path):
    publisher._record({"round": 1, "version": 1})
    with (tmp_path / RECORD).open("a") as file:
        file.write('{"round": 2, "vers')
    assert [one["round"] for one in publisher._records()] == [1]
    publisher._record({"round": 3, "version": 2})
    assert [one["round"] for one in publisher._records()] == [1, 3]


def test_a_note_that_cannot_be_written_ends_no_run(publisher, tmp_path):
    (tmp_path / RECORD).mkdir()
    publisher._record({"round": 1, "version": 1})
    assert publisher._records() == []
