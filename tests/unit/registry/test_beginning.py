"""The beginning of a repository, cut off at every write: the same call ends it, and nothing that is in use is ever replaced."""

import shutil
from datetime import UTC, datetime

import pytest

import fedcore.registry.beginning as beginning
from fedcore.errors import Refused, TryAgain
from fedcore.registry.audit import audit
from fedcore.registry.beginning import begin
from fedcore.registry.files import LocalFiles
from fedcore.registry.keys import UNFINISHED, load_signers
from fedcore.registry.repository import load

NOW = datetime(2027, 1, 1, tzinfo=UTC)


class Cut(Exception):
    """A kill."""


class Failing(LocalFiles):
    """Files whose n-th write is cut off; ``torn``: after some bytes of a new file are there."""

    def __init__(self, directory, left, error, torn):
        super().__init__(directory)
        self.place, self.left, self.error, self.torn = directory, left, error, torn

    def write(self, name, data):
        self.left -= 1
        if self.left < 0:
            if self.torn:
                path = self.place / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.with_name(f".{path.name}.new").write_bytes(data[: len(data) // 2])
            raise self.error
        super().write(name, data)


def begun(folder, files=None):
    files = files or LocalFiles(folder / "repository")
    return begin(files, folder / "offline", folder / "online", 3, 2, NOW, publishes=True)


def check(folder, keys):
    files = LocalFiles(folder / "repository")
    assert audit(files, NOW) == []
    signers = load_signers([folder / "offline", folder / "online"])
    assert {key.keyid for held in keys.values() for key in held.keys} == set(signers)
    assert set(load(files).root.roles["root"].keyids) == {key.keyid for key in keys["root"].keys}
    assert not list(folder.rglob(UNFINISHED))
    assert {path.name for path in folder.iterdir()} == {"repository", "offline", "online"}
    with pytest.raises(Refused, match="there are files already"):
        begun(folder)
    assert audit(files, NOW) == []


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("error", [TryAgain("the disk is full"), Cut()])
@pytest.mark.parametrize("writes", range(5))
def test_cut_off_at_every_file_of_the_repository(tmp_path, writes, error, torn):
    with pytest.raises(type(error)):
        begun(tmp_path, Failing(tmp_path / "repository", writes, error, torn))
    check(tmp_path, begun(tmp_path))


def test_an_uninterrupted_beginning_has_five_files_and_needs_one_call(tmp_path):
    keys = begun(tmp_path, Failing(tmp_path / "repository", 5, Cut(), torn=False))
    check(tmp_path, keys)


def test_cut_off_between_the_last_file_and_the_end(tmp_path, monkeypatch):
    first = []

    def created(*arguments):
        right(*arguments)
        first.append(LocalFiles(tmp_path / "repository").read("metadata/1.root.json"))
        raise Cut

    right = beginning.create
    monkeypatch.setattr(beginning, "create", created)
    with pytest.raises(Cut):
        begun(tmp_path)
    monkeypatch.setattr(beginning, "create", right)
    keys = begun(tmp_path)
    assert [LocalFiles(tmp_path / "repository").read("metadata/1.root.json")] == first, "a reader may have pinned it"
    check(tmp_path, keys)


def test_one_directory_of_keys_was_made_and_the_other_was_not(tmp_path):
    begun(tmp_path)
    (tmp_path / "offline" / UNFINISHED).touch()
    shutil.rmtree(tmp_path / "online")
    shutil.rmtree(tmp_path / "repository")
    check(tmp_path, begun(tmp_path))


def test_keys_in_use_and_files_of_others_are_left_alone(tmp_path):
    begun(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(Refused, match="exists already; keys are never overwritten"):
        begin(LocalFiles(tmp_path / "new"), tmp_path / "offline", tmp_path / "online", 3, 2, NOW, publishes=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / UNFINISHED).touch()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(Refused, match="exists already"):
        begin(LocalFiles(tmp_path / "new"), tmp_path / "mine", tmp_path / "b", 3, 2, NOW, publishes=True)
    assert (tmp_path / "mine" / "thesis.tex").exists()
    for name in ("metadata/2.root.json", "metadata/timestamp.json", "targets/x", "notes.txt"):
        place = tmp_path / "taken" / name.replace("/", "-")
        LocalFiles(place).write(name, b"x")
        with pytest.raises(Refused, match="there are files already"):
            begin(LocalFiles(place), tmp_path / "c", tmp_path / "d", 3, 2, NOW, publishes=True)
        assert not (tmp_path / "c").exists()
    assert {path: path.read_bytes() for path in before} == before
