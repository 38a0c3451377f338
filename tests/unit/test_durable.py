"""Files that are replaced are whole at every moment."""

import os
import stat

import pytest

from fedcore import durable


@pytest.mark.parametrize("call", ["fdopen", "fsync", "replace"])
def test_the_old_file_stays_until_the_new_one_is_on_the_disk(tmp_path, monkeypatch, call):
    path = tmp_path / "kept"
    durable.write(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        with pytest.raises(OSError, match="No space"):
            durable.write(path, b"the new one")
    assert path.read_bytes() == b"old"
    durable.write(path, b"shorter than what was left behind"[:3])
    assert path.read_bytes() == b"sho"
    assert [one.name for one in tmp_path.iterdir()] == ["kept"]


def test_content_comes_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    log, sync, replace = [], os.fsync, os.replace

    def kind(handle):
        return "folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file"

    monkeypatch.setattr(os, "fsync", lambda handle: (log.append(kind(handle)), sync(handle))[1])
    monkeypatch.setattr(os, "replace", lambda *paths: (log.append("rename"), replace(*paths))[1])
    durable.write(tmp_path / "kept", b"data", 0o600)
    assert log == ["file", "rename", "folder"]
    assert stat.S_IMODE((tmp_path / "kept").stat().st_mode) == 0o600
