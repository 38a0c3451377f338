"""What a device refuses of a repository that lies, and what it survives, against a simulator that speaks the real format."""

import datetime
import hashlib
import itertools
import json

import pytest
from registry_world import DAY, NOW, FakeClock, Simulator
from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import ExpiredMetadataError
from tuf.api.metadata import Metadata

from fedcore.errors import Refused, TryAgain
from fedcore.registry.client import Client, trusted_set

MODEL = bytes(range(256)) * 200


@pytest.fixture
def simulator():
    simulator = Simulator()
    simulator.add_artefact(1, MODEL)
    simulator.publish()
    return simulator


@pytest.fixture
def client(simulator, tmp_path):
    return device(simulator, tmp_path)


def device(simulator, tmp_path, clock=None, pin=1):
    return Client(tmp_path / "trust", simulator, simulator.files[f"metadata/{pin}.root.json"], clock or FakeClock())


def look(client, now=NOW):
    return client.refresh(now, 60.0)


def test_a_target_is_found_downloaded_and_what_is_seen_is_kept(simulator, client, tmp_path):
    entry = look(client).artefact("digits", 1, "entry", "onnx")
    assert client.download(entry, 60.0).read_bytes() == MODEL
    held = json.loads((tmp_path / "trust" / "trust.json").read_text())
    assert held["floors"] == {"timestamp": 2, "snapshot": 2, "targets": 2, "releases": 2}
    assert look(device(simulator, tmp_path)).latest("digits") == 1


def test_metadata_that_did_not_change_is_not_fetched_again(simulator, client):
    look(client)
    simulator.asked.clear()
    simulator.publish(roles=())
    look(client)
    assert not [name for name, _ in simulator.asked if "targets" in name or "releases" in name]


def test_cached_metadata_that_is_damaged_is_fetched_again(simulator, client, tmp_path):
    look(client)
    path = tmp_path / "trust" / "metadata" / "releases.json"
    path.write_bytes(path.read_bytes().replace(b"digits", b"sigits"))
    assert look(device(simulator, tmp_path)).latest("digits") == 1


def test_rollback_of_the_timestamp(simulator, client):
    old = simulator.files["metadata/timestamp.json"]
    simulator.publish()
    look(client)
    simulator.files["metadata/timestamp.json"] = old
    with pytest.raises(Refused, match="version 2 of timestamp is older than 3"):
        look(client)


def test_rollback_of_the_snapshot_under_a_new_timestamp(simulator, client):
    old = simulator.timestamp.snapshot_meta
    simulator.publish()
    look(client)
    simulator.timestamp.snapshot_meta = old
    simulator.publish_timestamp()
    with pytest.raises(Refused, match="of snapshot is older"):
        look(client)


@pytest.mark.parametrize("role", ["targets", "releases"])
def test_rollback_of_targets_under_a_new_snapshot(simulator, client, role):
    old = simulator.snapshot.meta[f"{role}.json"]
    simulator.publish()
    look(client)
    simulator.snapshot.meta[f"{role}.json"] = old
    simulator.publish(roles=())
    with pytest.raises(Refused, match=f"of {role} is older"):
        look(client)


def test_rollback_is_refused_after_a_restart(simulator, client, tmp_path):
    old = simulator.files["metadata/timestamp.json"]
    simulator.publish()
    look(client)
    simulator.files["metadata/timestamp.json"] = old
    with pytest.raises(Refused, match="rollback"):
        look(device(simulator, tmp_path))


def test_a_role_that_vanishes_from_the_snapshot(simulator, client):
    look(client)
    del simulator.snapshot.meta["releases.json"]
    simulator.publish(roles=())
    with pytest.raises(Refused, match="does not name releases"):
        look(client)


def test_freeze_the_timestamp_is_served_beyond_its_end(simulator, client):
    look(client)
    with pytest.raises(Refused, match=r"timestamp.json is expired .* the installed model stays"):
        look(client, NOW + 2 * DAY)


@pytest.mark.parametrize("role", ["root", "snapshot", "targets", "releases"])
def test_expired(simulator, client, role):
    getattr(simulator, role).expires = NOW - DAY
    simulator.publish_root()
    simulator.publish()
    with pytest.raises(Refused, match="expired"):
        look(client)


def test_mix_and_match_a_snapshot_of_one_moment_with_targets_of_another(simulator, client):
    other = simulator.copy()
    other.add_artefact(2, MODEL[::-1])
    other.publish()
    simulator.publish()
    simulator.files["metadata/3.releases.json"] = other.files["metadata/3.releases.json"]
    with pytest.raises(Refused, match=r"not what is signed|more than the [0-9]+ bytes"):
        look(client)
    simulator.files["metadata/3.snapshot.json"] = other.files["metadata/3.snapshot.json"]
    with pytest.raises(Refused, match=r"not what is signed|more than the [0-9]+ bytes"):
        look(client)


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", "releases"])
def test_wrong_key(simulator, client, role):
    simulator.keys[role] = [CryptoSigner.generate_ed25519()]
    simulator.publish()
    with pytest.raises(Refused, match="not signed by the keys"):
        look(client)


def test_wrong_keys_of_a_root_and_too_few_of_them(simulator, client):
    right = simulator.keys["root"]
    for wrong in ([CryptoSigner.generate_ed25519() for _ in range(3)], right[:1]):
        simulator.publish_root(wrong)
        with pytest.raises(Refused, match="not signed by the keys"):
            look(client)
        simulator.root.version -= 1
    simulator.publish_root(right[:2])
    assert look(client).latest("digits") == 1


def test_a_signature_over_other_bytes(simulator, client):
    data = simulator.files["metadata/timestamp.json"]
    simulator.files["metadata/timestamp.json"] = data.replace(b'"version":2', b'"version":9')
    assert data != simulator.files["metadata/timestamp.json"]
    with pytest.raises(Refused, match="not signed by the keys"):
        look(client)


def test_roots_are_followed_one_by_one_and_a_skipped_one_is_refused(simulator, client, tmp_path):
    for _ in range(3):
        simulator.publish_root()
    late = device(simulator, tmp_path / "late", pin=3)
    assert look(client).latest("digits") == look(late).latest("digits") == 1
    simulator.publish_root()
    simulator.files["metadata/5.root.json"] = simulator.files["metadata/3.root.json"]
    with pytest.raises(Refused, match="Expected root version 5"):
        look(client)


def test_another_root_in_the_same_directory(simulator, client, tmp_path):
    look(client)
    with pytest.raises(Refused, match="another root"):
        Client(tmp_path / "trust", simulator, Simulator().files["metadata/1.root.json"])


@pytest.mark.parametrize("data", [b"", b"{", b'{"pin": 3}', b"\xff" * 40])
def test_floors_that_are_damaged_are_not_taken_as_absent(simulator, client, tmp_path, data):
    look(client)
    (tmp_path / "trust" / "trust.json").write_bytes(data)
    with pytest.raises(Refused, match=r"trust\.json: damaged"):
        device(simulator, tmp_path)


@pytest.mark.parametrize(
    "name", ["metadata/timestamp.json", "metadata/2.snapshot.json", "metadata/2.targets.json", "metadata/2.root.json"]
)
def test_endless_metadata(simulator, client, name):
    simulator.files.setdefault(name, b"")
    given = []
    simulator.spoil[name] = lambda _: (given.append(1) or b" " * 50_000 for _ in itertools.count())
    with pytest.raises(Refused, match="more than the"):
        look(client)
    assert len(given) < 50


def test_a_length_that_a_stolen_online_key_signs_is_bounded_too(simulator, client):
    simulator.timestamp.snapshot_meta.length = 1 << 60
    simulator.publish_timestamp()
    given = []
    simulator.spoil["metadata/2.snapshot.json"] = lambda _: (given.append(1) or b" " * 50_000 for _ in itertools.count())
    with pytest.raises(Refused, match="more than the 2000000 bytes"):
        look(client)
    assert len(given) < 50


def test_an_endless_target(simulator, client, tmp_path):
    entry = look(client).artefact("digits", 1, "entry", "onnx")
    name = next(name for name in simulator.files if name.startswith("targets/"))
    simulator.spoil[name] = lambda _: (b"x" * 50_000 for _ in itertools.count())
    with pytest.raises(Refused, match=f"more than the {len(MODEL)} bytes"):
        client.download(entry, 60.0)
    assert sum(path.stat().st_size for path in (tmp_path / "trust" / "partial").iterdir()) <= len(MODEL)
    del simulator.spoil[name]
    assert client.download(entry, 60.0).read_bytes() == MODEL


def drip(clock, seconds):
    def pieces(data):
        for at in range(len(data)):
            clock.time += seconds
            yield data[at : at + 1]

    return pieces


@pytest.mark.parametrize("name", ["metadata/timestamp.json", "metadata/2.snapshot.json", "metadata/2.releases.json"])
def test_metadata_that_drips_is_given_up_at_the_deadline_of_the_whole(simulator, tmp_path, name):
    clock = FakeClock()
    client = device(simulator, tmp_path, clock)
    simulator.spoil[name] = drip(clock, 1.0)
    with pytest.raises(TryAgain, match="longer than the 60 s"):
        look(client)
    assert clock.time < 65


def test_a_target_that_drips_makes_progress_over_several_attempts(simulator, tmp_path):
    clock = FakeClock()
    client = device(simulator, tmp_path, clock)
    entry = look(client).artefact("digits", 1, "entry", "onnx")
    name = next(name for name in simulator.files if name.startswith("targets/"))
    simulator.spoil[name] = drip(clock, 0.01)
    attempts, simulator.asked = 0, []
    while True:
        attempts += 1
        try:
            path = client.download(entry, 100.0)
        except TryAgain:
            continue
        break
    assert path.read_bytes() == MODEL
    assert attempts == -(-len(MODEL) // 10_000)
    assert [offset for _, offset in simulator.asked][1] > 9_000


def test_a_truncated_target_is_continued_also_where_the_server_knows_no_ranges(simulator, client):
    entry = look(client).artefact("digits", 1, "entry", "onnx")
    name = next(name for name in simulator.files if name.startswith("targets/"))
    for ranges in (True, False):
        simulator.ranges = ranges
        simulator.spoil[name] = lambda data: [data[:20_000]]
        with pytest.raises(TryAgain, match="ended after 20000 of 51200 bytes"):
            client.download(entry, 60.0)
        del simulator.spoil[name]
        simulator.asked = []
        path = client.download(entry, 60.0)
        assert path.read_bytes() == MODEL
        assert simulator.asked == [(name, 20_000)]
        path.unlink()


@pytest.mark.parametrize("name", ["metadata/timestamp.json", "metadata/2.snapshot.json", "metadata/2.targets.json"])
def test_truncated_metadata(simulator, client, name):
    simulator.files[name] = simulator.files[name][:-30]
    with pytest.raises(Refused):
        look(client)


def test_a_tampered_target_is_refused_and_removed(simulator, client, tmp_path):
    entry = look(client).artefact("digits", 1, "entry", "onnx")
    name = next(name for name in simulator.files if name.startswith("targets/"))
    simulator.files[name] = MODEL[:-1] + b"x"
    with pytest.raises(Refused, match="not the bytes whose hash is signed"):
        client.download(entry, 60.0)
    assert not list((tmp_path / "trust" / "partial").iterdir())


def test_bytes_that_an_attacker_put_before_a_resumed_download_cost_one_attempt(simulator, client, tmp_path):
    entry = look(client).artefact("digits", 1, "entry", "onnx")
    partial = tmp_path / "trust" / "partial" / hashlib.sha256(MODEL).hexdigest()
    partial.write_bytes(b"evil" * 100)
    with pytest.raises(Refused, match="hash"):
        client.download(entry, 60.0)
    assert client.download(entry, 60.0).read_bytes() == MODEL


def test_the_releases_role_speaks_only_where_it_may(simulator, client):
    simulator.add("steps/abc", b"evil step", kind="step", name="evil")
    simulator.publish()
    assert look(client).step(hashlib.sha256(b"evil step").digest()) is None
    simulator.add("steps/abc", b"good step", role="targets", kind="step", name="good")
    simulator.publish()
    assert look(client).step(hashlib.sha256(b"good step").digest()).custom["name"] == "good"


def test_a_clock_a_year_ahead_refuses_and_says_so_and_recovers(client):
    look(client)
    with pytest.raises(Refused, match="2032-04-30 12:00 by this device's clock; the newest news it has seen is of 2031-05-01"):
        look(client, NOW + 365 * DAY)
    assert look(client).latest("digits") == 1


def test_a_clock_a_year_behind_still_sees_that_a_repository_stands_still(simulator, client):
    behind = NOW - 365 * DAY
    assert look(client, behind).latest("digits") == 1
    old = dict(simulator.files)
    simulator.now += 3 * DAY
    simulator.timestamp.expires += 3 * DAY
    simulator.publish_timestamp()
    assert look(client, behind).latest("digits") == 1
    simulator.files = old
    with pytest.raises(Refused):
        look(client, behind)
    simulator.snapshot.expires = NOW + DAY  # what the last timestamp proves to have passed
    simulator.publish(roles=())
    with pytest.raises(Refused, match=r"snapshot\.json is expired"):
        look(client, behind)


def test_versions_out_of_reach_of_a_stolen_key_are_forgotten_with_it(simulator, client):
    simulator.timestamp.version = 2**31
    simulator.publish_timestamp(issued=NOW + 20 * 365 * DAY)
    with pytest.raises(Refused, match="expired"):
        look(client)  # the thief also claims a time far ahead
    simulator.timestamp.version = 2**31
    simulator.publish_timestamp()
    look(client)
    stolen, fresh = simulator.keys["timestamp"][0], CryptoSigner.generate_ed25519()
    simulator.root.revoke_key(stolen.public_key.keyid, "timestamp")
    simulator.root.add_key(fresh.public_key, "timestamp")
    simulator.keys["timestamp"] = [fresh]
    simulator.publish_root()
    simulator.timestamp.version = 7
    simulator.publish_timestamp()
    assert look(client).latest("digits") == 1


def test_the_time_of_the_private_class_is_what_it_judges_by(simulator):
    root, timestamp = simulator.files["metadata/1.root.json"], simulator.files["metadata/timestamp.json"]
    for now, expired in ((NOW, False), (NOW + 2 * DAY, True), (NOW - 3650 * DAY, False)):
        trusted = trusted_set(root, now)
        assert trusted.reference_time == now
        if expired:
            with pytest.raises(ExpiredMetadataError):
                trusted.update_timestamp(timestamp)
        else:
            assert trusted.update_timestamp(timestamp).version == 2
    assert trusted_set(root, datetime.datetime(1999, 1, 1, tzinfo=datetime.UTC)).root == Metadata.from_bytes(root).signed


def test_an_entry_that_says_wrongly_what_it_is(simulator, client):
    simulator.add(
        "releases/digits/3/entry/x", b"x", kind="artefact", model="digits", version="3", tier="entry", runtime="onnx", form="file"
    )
    simulator.publish()
    with pytest.raises(Refused, match="does not say what it is"):
        look(client)
