"""A repository through its life: publications killed at every write, rotations, a lost key, ends, and an auditor's look at each."""

import hashlib
import shutil
import time
from pathlib import Path

import pytest
from registry_world import DAY, NOW, Crash, CrashingFiles, FakeClock
from tuf.api.metadata import Metadata
from tuf.ngclient import Updater
from tuf.ngclient.fetcher import FetcherInterface

from fedcore.errors import Refused, TryAgain
from fedcore.registry.audit import audit
from fedcore.registry.catalogue import artefact, delta, self_test, step
from fedcore.registry.client import Client
from fedcore.registry.delta import make_delta
from fedcore.registry.fetch import DirectoryFetcher
from fedcore.registry.files import LocalFiles, RemoteFiles, open_files
from fedcore.registry.keys import load_signers, make_keys, new_key
from fedcore.registry.repository import create, full_keyid, load, publish, renew, rotate

ROLES = ("root", "targets", "releases", "snapshot", "timestamp")


class World:
    """A repository in a directory, with all its keys."""

    def __init__(self, place):
        self.place, self.files = place, LocalFiles(place / "repository")
        self.keys = make_keys(place / "offline", place / "online", 3, 2, publishes=False)
        self.signers = load_signers([place / "offline", place / "online"])
        create(self.files, self.keys, self.signers, NOW)
        self.pin = self.files.read("metadata/1.root.json")

    def publish(self, *items, now=NOW, signers=None):
        publish(self.files, items, self.signers if signers is None else signers, now)

    def client(self, name="device"):
        return Client(self.place / name, DirectoryFetcher(self.place / "repository"), self.pin, FakeClock())

    def problems(self, now=NOW):
        return [one.text for one in audit(self.files, now) if one.kind == "problem"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(made, tmp_path):
    """A copy, so that a test can spoil it."""
    shutil.copytree(made.place, tmp_path / "world")
    world = World.__new__(World)
    world.__dict__.update(made.__dict__)
    world.place, world.files = tmp_path / "world", LocalFiles(tmp_path / "world" / "repository")
    return world


def model(version, data=None, **facts):
    return artefact("digits", version, "entry", "onnx", "model.onnx", data or bytes([version]) * 3000, **facts)


def test_an_empty_repository_is_sound_and_can_be_read(world):
    assert audit(world.files, NOW) == []
    assert world.client().refresh(NOW, 9.0).entries == ()


def test_what_is_published_is_read_back_as_it_was(world):
    one, two = bytes(range(250)) * 30, bytes(range(250)) * 29 + b"b" * 250
    change = make_delta(one, two)
    first, second = model(1, one, agreement=0.99), model(2, two)
    world.publish(first, self_test("digits", 1, b"batch"))
    world.publish(second, delta("digits", 2, *(bytes.fromhex(item.target().hashes["sha256"]) for item in (first, second)), change))
    world.publish(step("cnn-sgd", b"graph"))
    client = world.client()
    found = client.refresh(NOW, 9.0)
    assert found.releases() == {("digits", 1), ("digits", 2)}
    assert found.artefact("digits", 1, "entry", "onnx").custom["facts"] == {"agreement": "0.99"}
    assert found.artefact("digits", 1, "entry", "litert") is None
    assert client.download(found.self_test("digits", 1), 9.0).read_bytes() == b"batch"
    ((edge, entry),) = found.edges().items()
    assert (edge.base, edge.result) == (
        found.artefact("digits", 1, "entry", "onnx").digest,
        found.artefact("digits", 2, "entry", "onnx").digest,
    )
    assert client.download(entry, 9.0).read_bytes() == change
    assert entry.custom["codec"] in {"difference", "patch"}
    assert world.problems() == []


class FromDirectory(FetcherInterface):
    """python-tuf's own way of reading, on our files."""

    def __init__(self, directory):
        self.directory = directory

    def _fetch(self, url):
        path = self.directory / url.removeprefix("http://x/")
        if not path.exists():
            from tuf.api.exceptions import DownloadHTTPError

            raise DownloadHTTPError("none", 404)
        return iter([path.read_bytes()])


def test_python_tufs_own_updater_reads_the_same(world, monkeypatch):
    """The slow twin of our client; its clock cannot be given, so the repository is signed at the machine's time."""
    import datetime

    now = datetime.datetime.now(datetime.UTC)
    world.publish(model(1), step("cnn", b"graph"), now=now)
    world.files.write("metadata/timestamp.json", world.files.read("metadata/timestamp.json"))
    renew(world.files, world.signers, now)
    (world.place / "theirs").mkdir()
    theirs = Updater(
        str(world.place / "theirs"), "http://x/metadata/", str(world.place / "theirs"), "http://x/targets/",
        FromDirectory(world.place / "repository"), bootstrap=world.pin,
    )  # fmt: skip
    client = world.client()
    entries = client.refresh(now, 9.0).entries
    assert len(entries) == 2
    for entry in entries:
        info = theirs.get_targetinfo(entry.path)
        assert (info.length, info.hashes, info.custom) == (entry.size, {"sha256": entry.digest.hex()}, entry.custom)
        assert Path(theirs.download_target(info)).read_bytes() == client.download(entry, 9.0).read_bytes()


def test_a_publication_killed_at_every_write_leaves_what_clients_can_read(world):
    """A device that has seen the old state and one that has seen nothing, after every prefix of the writes."""
    world.publish(model(1))
    items = (model(2), self_test("digits", 2, b"batch"), step("cnn", b"graph"))
    for killed, after in (*((at, False) for at in range(7)), (6, True)):  # after one write is before the next
        place = world.place.parent / f"kill-{killed}-{after}"
        shutil.copytree(world.place, place)
        one = World.__new__(World)
        one.__dict__.update(world.__dict__)
        one.place, one.files = place, LocalFiles(place / "repository")
        old = one.client("old")
        assert old.refresh(NOW, 9.0).latest("digits") == 1
        with pytest.raises(Crash):
            publish(CrashingFiles(one.files, killed, after), items, one.signers, NOW)
        for client in (old, one.client("new")):
            found = client.refresh(NOW, 9.0)
            assert found.latest("digits") == (2 if (killed, after) == (6, True) else 1)
            for entry in found.entries:
                client.download(entry, 9.0)
        if (killed, after) != (6, True):
            assert all("nothing names this file" in line for line in one.problems())
            one.publish(*items)
        for client in (old, one.client("newest")):
            found = client.refresh(NOW, 9.0)
            assert found.latest("digits") == 2
            assert {client.download(entry, 9.0).read_bytes() for entry in found.entries} >= {b"batch", b"graph"}
        shutil.rmtree(place)
    counting = CrashingFiles(world.files)
    publish(counting, items, world.signers, NOW)
    assert counting.writes == 7, "the loop above visits every write"


@pytest.mark.parametrize("role", ROLES)
def test_a_rotation_of_keys_killed_at_every_write(world, role, tmp_path):
    """Devices can read at every moment, and the same command finishes what was begun."""
    world.publish(model(1))
    old = full_keyid(load(world.files), role, world.keys[role].keys[0].keyid)
    fresh = new_key(tmp_path / "fresh", role)
    signers = {**world.signers, **load_signers([tmp_path / "fresh"])}
    counting = CrashingFiles(LocalFiles(shutil.copytree(world.place / "repository", tmp_path / "counted")))
    rotate(counting, role, old, fresh, signers, NOW)
    assert counting.writes == {"root": 1, "targets": 5, "releases": 4, "snapshot": 4, "timestamp": 4}[role]
    for killed, after in (*((at, False) for at in range(counting.writes)), (counting.writes - 1, True)):
        one = World.__new__(World)
        one.__dict__.update(world.__dict__)
        one.place = tmp_path / f"kill-{killed}-{after}"
        shutil.copytree(world.place, one.place)
        one.files = LocalFiles(one.place / "repository")
        seen = one.client("old")
        seen.refresh(NOW, 9.0)
        with pytest.raises(Crash):
            rotate(CrashingFiles(one.files, killed, after), role, old, fresh, signers, NOW)
        assert seen.refresh(NOW, 9.0).latest("digits") == one.client("new").refresh(NOW, 9.0).latest("digits") == 1
        done = killed == counting.writes - 1 and after
        if not done:
            rotate(one.files, role, old, fresh, signers, NOW)
        held = load(one.files)
        delegator = held.targets if role == "releases" else held.root
        assert old not in delegator.get_delegated_role(role).keyids
        assert fresh.keyid in delegator.get_delegated_role(role).keyids
        one.publish(model(2), signers={keyid: key for keyid, key in signers.items() if keyid != old})
        assert seen.refresh(NOW, 9.0).latest("digits") == one.client("newest").refresh(NOW, 9.0).latest("digits") == 2
        assert not [line for line in one.problems() if "nothing names" not in line]
        stale = {keyid: key for keyid, key in signers.items() if keyid != fresh.keyid}
        if role != "root":
            with pytest.raises(Refused, match=f"the role {role} needs"):
                one.publish(model(3), step("x", b"x"), signers=stale)
            continue
        stale.pop(world.keys["root"].keys[1].keyid)  # the old key and one that is still good are too few
        with pytest.raises(Refused, match="the role root needs 2"):
            rotate(one.files, "timestamp", None, new_key(one.place / "again", "timestamp"), stale, NOW)


def test_one_root_key_of_a_threshold_is_lost(world, tmp_path):
    """Drill: two of three root keys are left. They put a new one in its place; a second loss at once is too much."""
    lost, other, last = (key.keyid for key in world.keys["root"].keys)
    left = {keyid: signer for keyid, signer in world.signers.items() if keyid != lost}
    fresh = new_key(tmp_path / "fresh", "root")
    with pytest.raises(Refused, match="the role root needs 2 of the keys"):
        rotate(world.files, "root", lost, fresh, {keyid: one for keyid, one in left.items() if keyid != other}, NOW)
    device = world.client()
    rotate(world.files, "root", lost, fresh, {**left, **load_signers([tmp_path / "fresh"])}, NOW)
    assert world.problems() == []
    device.refresh(NOW, 9.0)
    assert load(world.files).root.roles["root"].keyids == [other, last, fresh.keyid]
    after = {**{keyid: one for keyid, one in left.items() if keyid != last}, **load_signers([tmp_path / "fresh"])}
    rotate(
        world.files,
        "timestamp",
        None,
        new_key(tmp_path / "stamp", "timestamp"),
        {**after, **load_signers([tmp_path / "stamp"])},
        NOW,
    )
    assert device.refresh(NOW, 9.0).entries == ()


def test_versions_of_a_release_only_go_up_and_a_rollback_is_a_higher_release_of_old_content(world):
    world.publish(model(1, b"good"))
    world.publish(model(5, b"bad"))
    for version in (1, 4, 5):
        with pytest.raises(
            Refused, match=r"not above 5, the last one; to go back, publish the old content as release 6|other content"
        ):
            world.publish(model(version, b"good"))
    world.publish(model(6, b"good"))
    found = world.client().refresh(NOW, 9.0)
    assert found.latest("digits") == 6
    assert found.artefact("digits", 6, "entry", "onnx").digest == found.artefact("digits", 1, "entry", "onnx").digest


def test_old_releases_can_be_withdrawn_and_their_files_stay_sound(world):
    other = artefact("words", 1, "entry", "onnx", "model.onnx", b"words")
    world.publish(other)
    for version in range(1, 5):
        items = [model(version), self_test("digits", version, b"b%d" % version)]
        if version > 1:
            before, after = model(version - 1).data, model(version).data
            ends = [hashlib.sha256(data).digest() for data in (before, after)]
            items.append(delta("digits", version, *ends, make_delta(before, after)))
        publish(world.files, items, world.signers, NOW, keep=2)
    found = world.client().refresh(NOW, 9.0)
    assert found.releases() == {("digits", 3), ("digits", 4), ("words", 1)}
    assert found.self_test("digits", 2) is None
    assert audit(world.files, NOW) == []
    spoil(world, "releases/digits/1/entry")
    assert any("hash was signed" in line for line in world.problems())
    with pytest.raises(Refused, match="not above 4"):
        world.publish(model(2, b"again"))
    with pytest.raises(Refused, match="at least one"):
        publish(world.files, [model(5)], world.signers, NOW, keep=0)


def test_a_path_keeps_its_content(world):
    world.publish(self_test("digits", 1, b"one"))
    with pytest.raises(Refused, match="keeps its content for ever"):
        world.publish(self_test("digits", 1, b"two"))


def test_steps_need_the_offline_key_and_releases_do_not(world):
    online = {
        key.keyid: world.signers[key.keyid] for role in ("releases", "snapshot", "timestamp") for key in world.keys[role].keys
    }
    world.publish(model(1), signers=online)
    before = world.files.names()
    with pytest.raises(Refused, match=r"the role targets needs 1 of the keys [0-9a-f]{12}; the directories that were given hold 0"):
        world.publish(step("cnn", b"graph"), signers=online)
    assert world.files.names() == before, "what cannot be signed is not begun"


@pytest.mark.parametrize(
    "words", [("..", "entry", "onnx"), ("a/b", "entry", "onnx"), ("digits", "", "onnx"), ("digits", "-x", "onnx")]
)
def test_names_that_cannot_stand_in_a_path(words):
    with pytest.raises(Refused, match=r"cannot name a target|names no model"):
        artefact(words[0], 1, words[1], words[2], "m", b"")
    with pytest.raises(Refused, match="version is 1"):
        artefact("digits", 0, "entry", "onnx", "m", b"")


def test_renewal_keeps_a_repository_alive_and_signs_what_ends_soon(world):
    assert renew(world.files, world.signers, NOW + 5 * DAY) == ["snapshot", "timestamp"]
    assert renew(world.files, world.signers, NOW + 340 * DAY) == ["root", "releases", "targets", "snapshot", "timestamp"]
    assert audit(world.files, NOW + 340 * DAY) == []
    assert world.client().refresh(NOW + 340 * DAY, 9.0).entries == ()
    online = load_signers([world.place / "online"])
    assert renew(world.files, online, NOW + 700 * DAY) == ["snapshot", "timestamp"]
    assert [line.split(":")[0] for line in world.problems(NOW + 700 * DAY)] == ["releases"]


def test_a_timestamp_from_the_future_is_told_of_and_forgotten_by_a_rotation(world, tmp_path):
    renew(world.files, world.signers, NOW + 300 * DAY)  # by a machine whose clock was wrong
    client = world.client()
    client.refresh(NOW, 9.0)
    with pytest.raises(Refused, match=r"signed on .* rotate-keys --role timestamp"):
        renew(world.files, world.signers, NOW)
    fresh = new_key(tmp_path / "fresh", "timestamp")
    signers = {**world.signers, **load_signers([tmp_path / "fresh"])}
    rotate(world.files, "timestamp", None, fresh, signers, NOW)
    assert renew(world.files, signers, NOW) == ["snapshot", "timestamp"]
    client.refresh(NOW, 9.0)


def test_an_end_is_announced_before_it_comes(world):
    def lines(days):
        return [(one.kind, one.text.split(" ")[0]) for one in audit(world.files, NOW + days * DAY)]

    assert lines(0.4) == []
    assert lines(0.6) == [("warning", "timestamp:")]
    assert ("warning", "root:") not in lines(334)
    assert ("warning", "root:") in lines(336)
    assert ("problem", "root:") in lines(366)


SPOILS = {
    "a target's bytes": (lambda world: spoil(world, "targets/"), "not the bytes whose hash is signed"),
    "a target is gone": (lambda world: remove(world, "targets/"), "missing"),
    "the snapshot": (lambda world: spoil(world, "2.snapshot"), "2.snapshot.json"),
    "the releases": (lambda world: remove(world, "2.releases"), "2.releases.json: missing"),
    "the timestamp": (lambda world: spoil(world, "timestamp"), "timestamp.json"),
    "a root": (lambda world: spoil(world, "1.root"), "1.root.json"),
    "no root": (lambda world: remove(world, "1.root"), "there is no repository"),
    "an older snapshot": (lambda world: spoil(world, "1.snapshot"), "1.snapshot.json"),
    "an orphan": (lambda world: world.files.write("targets/x", b"x"), "targets/x: nothing names this file"),
    "an orphan of metadata": (lambda world: world.files.write("metadata/9.targets.json", b"x"), "9.targets.json: nothing names"),
    "what a killed write left": (lambda world: world.files.write("targets/.x.new", b"x"), "nothing names"),
}  # fmt: skip


def spoil(world, part):
    name = next(name for name in world.files.names() if part in name)
    data = bytearray(world.files.read(name))
    data[len(data) // 2] ^= 1
    world.files.write(name, bytes(data))


def remove(world, part):
    name = next(name for name in world.files.names() if part in name)
    (world.place / "repository" / name).unlink()


@pytest.mark.parametrize("what", SPOILS)
def test_an_auditor_sees(world, what):
    world.publish(model(1))
    assert audit(world.files, NOW) == []
    do, text = SPOILS[what]
    do(world)
    assert any(text in line for line in world.problems()), world.problems()


def test_an_auditor_sees_signatures_of_strangers(world):
    from securesystemslib.signer import CryptoSigner

    for name in ("metadata/timestamp.json", "metadata/1.targets.json", "metadata/1.root.json"):
        data = world.files.read(name)
        metadata = Metadata.from_bytes(data)
        metadata.sign(CryptoSigner.generate_ed25519())
        world.files.write(name, metadata.to_bytes())
        assert any("not signed by enough" in line for line in world.problems()), name
        world.files.write(name, data)
    assert world.problems() == []


def test_an_auditor_applies_deltas(world):
    first, second = model(1), model(2)
    ends = [bytes.fromhex(item.target().hashes["sha256"]) for item in (first, second)]
    world.publish(first)
    world.publish(second, delta("digits", 2, *ends, make_delta(first.data, first.data + b"x")))
    assert any("does not give the file that was promised" in line or "at most" in line for line in world.problems())
    world.publish(delta("digits", 2, ends[1], b"\0" * 32, make_delta(first.data, second.data)))
    assert any("a delta to a file that is not offered" in line for line in world.problems())


def test_one_publisher_at_a_time(world):
    with world.files.held(), pytest.raises(TryAgain, match="somebody else publishes"):
        world.publish(model(1))
    world.publish(model(1))


def test_a_place_of_fsspec_holds_the_same_bytes(world, tmp_path):
    memory = open_files(f"memory://registry-{time.time_ns()}")
    assert isinstance(memory, RemoteFiles)
    create(memory, world.keys, world.signers, NOW)
    publish(memory, [model(1)], world.signers, NOW)
    world.publish(model(1))
    assert memory.names() == world.files.names()
    assert {name: memory.read(name) for name in memory.names()} == {name: world.files.read(name) for name in world.files.names()}
    assert audit(memory, NOW) == []
    assert memory.read("metadata/none") is world.files.read("metadata/none") is None
    with pytest.raises(Refused, match="files already"):
        create(memory, world.keys, world.signers, NOW)
    with pytest.raises(Refused, match="nowhere"):
        open_files("nowhere://x")


def test_keys_that_others_may_read_or_that_are_none(world):
    path = world.place / "online" / "timestamp.key"
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    with pytest.raises(Refused, match="others may read this key"):
        load_signers([world.place / "online"])
    path.chmod(0o600)
    path.write_text("x")
    with pytest.raises(Refused, match="no Ed25519 private key"):
        load_signers([world.place / "online"])
    with pytest.raises(Refused, match="holds no key"):
        load_signers([world.place])
    with pytest.raises(Refused, match="threshold"):
        make_keys(world.place / "a", world.place / "b", 2, 3, publishes=True)
    assert not (world.place / "a").exists()
