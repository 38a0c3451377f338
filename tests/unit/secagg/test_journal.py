import os
import stat
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.errors import Refused, TryAgain
from fedcore.secagg.journal import FileJournal, MemoryJournal

OLD, NEW = b"old secret" * 9, b"new secret" * 30


class Crash(BaseException):
    """The process is gone: nothing after this runs."""


def contents(directory) -> bytes:
    return b"".join(path.read_bytes() for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("make", [lambda path: MemoryJournal(), FileJournal])
def test_records_are_kept_replaced_and_erased(make, tmp_path):
    journal = make(tmp_path / "journal")
    journal.erase("none")
    journal.write("a", OLD)
    journal.write("b", b"")
    journal.write("a", NEW)
    assert journal.read() == {"a": NEW, "b": b""}
    journal.erase("a")
    assert journal.read() == {"b": b""}


def test_what_is_replaced_or_erased_is_gone_and_only_the_owner_reads_the_rest(tmp_path):
    journal = FileJournal(tmp_path / "journal")
    journal.write("a", OLD)
    with (tmp_path / "journal" / "a.record").open("rb") as before:
        journal.write("a", NEW)
        assert OLD not in before.read()  # the very blocks are overwritten
    assert OLD not in contents(tmp_path)
    assert NEW in contents(tmp_path)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "journal").iterdir()}
    assert modes == {0o600}
    assert stat.S_IMODE((tmp_path / "journal").stat().st_mode) == 0o700
    with (tmp_path / "journal" / "a.record").open("rb") as before:
        journal.erase("a")
        assert NEW not in before.read()
    assert NEW not in contents(tmp_path)


@pytest.mark.parametrize("operation", ["first", "replace", "erase"])
def test_a_crash_at_any_call_leaves_the_old_or_the_new_record(operation, tmp_path, monkeypatch):
    """The process dies before the k-th call to the system, for every k; after a restart there is one whole record or none."""
    expected = {"first": ({}, {"a": NEW}), "replace": ({"a": OLD}, {"a": NEW}), "erase": ({"a": OLD}, {})}[operation]
    outcomes = []
    for k in range(100):
        directory = tmp_path / str(k)
        journal = FileJournal(directory)
        if operation != "first":
            journal.write("a", OLD)
        change = partial(journal.erase, "a") if operation == "erase" else partial(journal.write, "a", NEW)
        crashed = crash_at(k, monkeypatch, change)
        journal.close()
        after = FileJournal(directory)
        outcomes.append(after.read())
        assert outcomes[-1] in expected
        assert not list(directory.glob("*.tmp"))
        if outcomes[-1] == expected[1] and not crashed:
            assert OLD not in contents(directory)
            break
        after.close()
    assert outcomes[0] == expected[0]
    assert outcomes[-1] == expected[1]
    assert len(outcomes) > 4


def crash_at(k, monkeypatch, operation) -> bool:
    """Whether the process died before the operation was over."""
    count = 0

    def dying(call):
        def wrapped(*arguments, **keywords):
            nonlocal count
            count += 1
            if count > k:
                raise Crash
            return call(*arguments, **keywords)

        return wrapped

    with monkeypatch.context() as patch:
        for name in ("open", "fsync", "pwrite", "replace", "rename", "unlink"):
            patch.setattr(os, name, dying(getattr(os, name)))
        try:
            operation()
        except Crash:
            return True
    return False


def test_every_write_is_synced_before_it_counts(tmp_path, monkeypatch):
    """The order: content synced, renamed, directory synced."""
    journal = FileJournal(tmp_path)
    log = []
    real_sync, real_replace = os.fsync, os.rename
    kind = lambda handle: "directory" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file"
    monkeypatch.setattr(os, "fsync", lambda handle: (log.append(kind(handle)), real_sync(handle))[1])
    monkeypatch.setattr(os, "replace", lambda *paths: (log.append("rename"), real_replace(*paths))[1])
    journal.write("a", NEW)
    assert log == ["file", "rename", "directory"]


def test_one_process_holds_a_journal(tmp_path):
    journal = FileJournal(tmp_path)
    with pytest.raises(TryAgain, match="another process"):
        FileJournal(tmp_path)
    journal.close()
    FileJournal(tmp_path).close()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 31 + len(NEW)), st.integers(0, 7))
def test_a_damaged_record_stops_the_member(tmp_path_factory, at, bit):
    directory = tmp_path_factory.mktemp("journal")
    journal = FileJournal(directory)
    journal.write("a", NEW)
    path = directory / "a.record"
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(Refused, match="damaged"):
        journal.read()
    journal.close()


def test_a_full_disk_keeps_the_old_record(tmp_path, monkeypatch):
    journal = FileJournal(tmp_path)
    journal.write("a", OLD)

    def full(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(TryAgain, match="No space left"):
            journal.write("a", NEW)
    assert journal.read() == {"a": OLD}
    assert NEW not in contents(tmp_path)
    journal.write("a", NEW)
    assert journal.read() == {"a": NEW}


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Refused, match="cannot be opened"):
        FileJournal(tmp_path / "file" / "journal")
