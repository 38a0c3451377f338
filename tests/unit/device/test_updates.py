"""The updater of released models: what it installs, what it refuses, and what it tells."""

import hashlib
import http.server
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from device_releases import Around, expected, written
from fedcore_device import Runtime
from fedcore_device.installed import Trial, health_path, read_trials
from fedcore_device.policy import DeviceFacts, UpdatePolicy, read_policy
from fedcore_device.runtime_health import HealthFile
from fedcore_device.standing import read_standings
from registry_world import DAY, NOW
from release_fake import OTHER, Device, Gateway, batch_of, content, well

import fedcore.registry.install
from fedcore.errors import Refused, TryAgain
from fedcore.registry.delta import make_delta
from fedcore.registry.disk import alone


def test_the_whole_way_with_a_real_model(tmp_path):
    """Assigned, fetched, tried in a child, switched to, told of, used by an app; then the next one, by a delta."""
    device = Device(tmp_path / "agent")
    for version, seed in ((1, 0), (2, 1)):
        large, x = written(seed=seed)
        small, _ = written(seed=seed + 10)
        batch = batch_of(x, expected("onnx", large, x).argmax(1))
        device.policy = read_policy(_policy(tmp_path, "agreement = 0.0"))
        device.restarted()
        device.assign(version, files={("flagship", "onnx"): large, ("entry", "onnx"): small}, batch=batch)
        assert not device.step()
        assert device.pointer().current.version == version
        np.testing.assert_array_equal(
            Runtime(device.directory, environment=Around()).predict("digits", x), expected("onnx", large, x)
        )
        device.restarted()
        assert not device.step()
        rollout, told, measures, refused = device.gateway.reports()[-1]
        assert (rollout, told, refused) == ("first", version, "")
        assert set(measures) == {"disagreement", "errors", "crash", "p95_ms", "peak_bytes"}, "what is left out counts as the worst"
        trial = read_trials(device.place)[version]
        wrong = np.mean(expected("onnx", small, x).argmax(1) != expected("onnx", large, x).argmax(1))
        assert measures["disagreement"] == trial.disagreement == wrong > 0, "of the worst of its files"
        assert set(trial.loaded_bytes) == {hashlib.sha256(one).hexdigest() for one in (large, small)}
        assert 10_000_000 < trial.peak_bytes < 300_000_000
        assert measures["errors"] == measures["crash"] == 0


def _policy(folder, more):
    path = folder / "policy.toml"
    path.write_text(f'[updates]\nmodels = ["digits"]\n{more}\n')
    return path


def test_what_is_asked_and_installed(device, tried):
    body = device.gateway.asked[0]
    assert (body.model, body.tier, body.runtime, body.version) == ("digits", "flagship", "onnx", 0)
    assert body.hardware
    assert not body.health, "there is nothing to tell yet"
    assert device.runs() == 1
    assert tried["files"] == [{"flagship/onnx": content(1), "entry/onnx": content(1, "entry")}]
    assert tried["batch"] == b"1"
    assert device.pointer().starts == 0, "it is on probation"


def test_the_last_release_is_reported_with_every_question(device):
    device.gateway.asked.clear()
    device.step()
    assert device.gateway.reports() == [
        ("first", 1, {"disagreement": 0.01, "p95_ms": 2.0, "peak_bytes": 1000.0, "errors": 0.0, "crash": 0.0}, "")
    ]
    file = HealthFile(health_path(device.place, 1))
    file.add(64_000.0, calls=4, errors=1, highest={"peak_bytes": 5000, "decicelsius": 500})
    device.gateway.asked.clear()
    device.step()
    (_, _, measures, _), *_ = device.gateway.reports()
    assert measures == {
        "disagreement": 0.01, "p95_ms": pytest.approx(64, rel=0.1), "peak_bytes": 5000.0, "errors": 0.25, "crash": 0.0,
        "celsius": 50.0,
    }  # fmt: skip


def test_the_control_reports_what_it_keeps(device):
    """A device of the other arm is assigned the release that it has, in the name of the rollout that it is compared in."""
    device.gateway.rollout = "second"
    device.step()
    device.gateway.asked.clear()
    device.step()
    assert [one[:2] for one in device.gateway.reports()] == [("second", 1)]


@pytest.mark.parametrize(("tier", "files"), [("flagship", 2), ("entry", 1), ("", 2)])
def test_the_own_tier_and_lower_ones(tmp_path, tried, tier, files):
    one = Device(tmp_path)
    one.policy = type(one.policy)(device=DeviceFacts(tier=tier), updates=one.policy.updates)
    one.restarted()
    one.assign(1)
    one.step()
    assert len(one.pointer().current.files) == files


def test_a_release_without_anything_for_the_device(tmp_path, tried):
    one = Device(tmp_path)
    one.policy = type(one.policy)(device=DeviceFacts(tier="wearable"), updates=one.policy.updates)
    one.restarted()
    one.assign(1)
    assert "has nothing for tier wearable and onnx; it has entry, flagship" in one.step()
    assert not tried["files"]


def test_limits_of_the_owner(tmp_path, tried):
    one = Device(tmp_path, minimum_version=3, largest_bytes=20_000)
    one.assign(2)
    assert "release 2 is below [updates] minimum_version = 3" in one.step()
    one.assign(3)
    assert not one.step()
    one.assign(4, files={("flagship", "onnx"): bytes(20_001)})
    assert "20001 bytes; [updates] largest_bytes = 20000" in one.step()
    assert one.pointer().current.version == 3


def test_no_delta_on_the_way_gives_more_than_the_owner_allows(tmp_path, tried, monkeypatch):
    one, unpacked = Device(tmp_path / "agent", largest_bytes=30_000), []
    original = fedcore.registry.install.apply_delta
    monkeypatch.setattr(fedcore.registry.install, "apply_delta", lambda *given: unpacked.append(given[3]) or original(*given))
    one.assign(1)
    assert not one.step()
    old, new = content(1), content(2)
    large = 50 * new
    one.repository.offer(2, {("flagship", "onnx"): new}, deltas=False)
    one.repository.add_artefact(7, large, "flagship", "onnx", "other")
    for base, result in ((old, large), (large, new)):
        ends = {"base": hashlib.sha256(base).hexdigest(), "result": hashlib.sha256(result).hexdigest()}
        path, change = f"releases/digits/2/deltas/{len(result)}.fcd", make_delta(base, result)
        one.repository.add(path, change, kind="delta", model="digits", version=2, codec="x", **ends)
    one.repository.publish()
    one.gateway.wanted = 2
    assert not one.step()
    assert one.runs() == 2
    assert unpacked == []


def test_five_versions_behind_and_a_month_offline(device):
    """One connection, and deltas all the way; the same device has only metadata that expired long ago."""
    well(device)
    for version in range(2, 7):
        device.repository.offer(version)
    device.past(30 * 86_400)
    late = NOW + 31 * DAY
    for name, days in (("timestamp", 1), ("snapshot", 7), ("releases", 90), ("targets", 365)):
        getattr(device.repository, name).expires = late + days * DAY
    device.repository.now = late
    device.repository.publish()
    device.repository.asked.clear()
    device.gateway.wanted, device.gateway.connections = 6, 0
    device.restarted()
    assert not device.step()
    assert (device.runs(), device.gateway.connections) == (6, 1)
    fetched = [name for name, _ in device.repository.asked if name.startswith("targets/")]
    assert len([name for name in fetched if name.endswith(".fcd")]) == 10
    assert not [name for name in fetched if name.endswith(".onnx")]


def test_versions_only_go_up(device):
    device.assign(2)
    device.step()
    asked = len(device.repository.asked)
    device.gateway.wanted = 1
    assert not device.step()
    assert device.runs() == 2
    assert len(device.repository.asked) == asked, "nothing is even fetched"


class TestLies:
    @pytest.mark.parametrize(
        ("lies", "words"),
        [
            ({"device": bytes(32)}, "for another device"),
            ({"sequence": 2}, "is not newer than 2"),
            ({"model": "letters"}, "asked was for 'digits'"),
            ({"target": bytes(32)}, "not the one that was assigned"),
            ({"version": 9}, "no release 9"),
            ({"issued": 0, "expiry": 1}, "is over"),
            ({"issued": int(NOW.timestamp()) + 3601 + 9000, "expiry": int(NOW.timestamp()) + 3601 + 9900}, "from the future"),
        ],
    )
    def test_an_assignment_that_is_not_what_it_should_be(self, device, lies, words):
        well(device)
        device.assign(2)
        device.gateway.lies = lies
        assert words in device.step()
        assert device.runs() == 1
        device.gateway.lies = {}
        assert not device.step()
        assert device.runs() == 2

    def test_a_key_that_was_not_pinned(self, device):
        device.assign(2)
        device.gateway.key = type(OTHER)(b"x" * 32)
        assert "signed by none of the keys" in device.step()
        assert device.runs() == 1
        device.gateway.key = OTHER
        device.gateway.sequence += 10
        assert not device.step()

    def test_an_assignment_that_was_accepted_once_is_not_taken_again(self, device):
        device.assign(2)
        device.repository.spoil = {name: lambda _: [] for name in device.repository.files if "targets/" in name}
        assert device.step()
        device.restarted()
        device.gateway.lies = {"sequence": device.gateway.sequence}
        assert "is not newer" in device.step()

    def test_files_that_are_not_what_is_signed(self, device):
        device.assign(2)
        files = device.repository.files
        for name in [name for name in files if "targets/releases/digits/2/" in name]:
            files[name] = files[name][:-1] + bytes([files[name][-1] ^ 1])
        assert "not the bytes whose hash is signed" in device.step()
        assert device.runs() == 1
        assert not list(device.place.glob("files/*.onnx"))

    def test_endless_data(self, device):
        device.assign(2)

        def endless(_):
            while True:
                yield b"x" * 1000

        device.repository.spoil = {"metadata/timestamp.json": endless}
        assert "more than the" in device.step()
        device.repository.spoil = {name: endless for name in device.repository.files if "targets/releases/digits/2/" in name}
        assert "more than the" in device.step()
        assert device.runs() == 1

    def test_a_repository_that_goes_back(self, device):
        old = dict(device.repository.files)
        device.assign(2)
        device.step()
        device.assign(3)
        kept = device.repository.files["metadata/timestamp.json"]
        device.repository.files["metadata/timestamp.json"] = old["metadata/timestamp.json"]
        assert "refused as a rollback" in device.step()
        assert device.runs() == 2
        device.repository.files["metadata/timestamp.json"] = kept
        assert not device.step()

    def test_metadata_that_is_frozen(self, device):
        device.past(40 * 86_400)
        device.assign(2)
        assert "expired" in device.step()
        assert device.runs() == 1

    def test_a_gateway_without_a_repository(self, device):
        device.assign(2)
        device.gateway.token = b""
        assert "serves no repository" in device.step()

    def test_words_that_are_no_assignment(self, device):
        device.assign(2)
        release = device.gateway.release

        def broken(body):
            reply = release(body)
            reply.assignment = reply.assignment[:-5] + b"\xff" * 5
            return reply

        device.gateway.release = broken
        assert device.step()
        assert device.runs() == 1


@pytest.mark.parametrize("off", [-365 * 86_400, 365 * 86_400])
def test_a_clock_that_is_wrong_by_a_year(device, off):
    """The gateway's clock, which it signs over the question, is what assignments and metadata are judged by."""
    device.world.now += off
    device.restarted()
    device.assign(2)
    assert not device.step()
    assert device.runs() == 2


@pytest.mark.parametrize("off", [-365 * 86_400, 365 * 86_400])
def test_the_next_question_after_the_clock_was_put_right(device, off):
    """Whatever the clock said when it was asked last, it is asked again within a day."""
    device.world.now += off
    device.step()
    device.world.now -= off
    asked = len(device.gateway.asked)
    device.past(86_401)
    device.updater.step()
    assert len(device.gateway.asked) == asked + 1


def test_an_assignment_that_is_over_when_the_release_was_tried(device, tried):
    well(device)
    device.assign(2)
    tried["outcome"] = lambda: device.past(901)
    assert "the assignment is over" in device.step()
    assert device.runs() == 1
    tried["outcome"] = Trial()
    assert not device.step()
    assert device.runs() == 2
    assert "2" not in device.pointer().unfit


def test_an_unfit_release_is_told_of_once_and_not_tried_again(device, tried):
    well(device)
    device.assign(2)
    tried["outcome"] = Refused("self-test: agreement 0.31 is below 0.95")
    assert "agreement 0.31" in device.step()
    assert device.runs() == 1
    assert len(list((device.place / "files").iterdir())) == 2, "what was refused takes no room"
    device.gateway.asked.clear()
    device.restarted()
    for _ in range(3):
        device.step()
    assert [one[1:] for one in device.gateway.reports() if one[3]] == [(2, {}, "self-test: agreement 0.31 is below 0.95")]
    assert len(tried["files"]) == 2
    tried["outcome"] = Trial()
    device.assign(3)
    assert not device.step()
    assert device.runs() == 3


def test_a_self_test_that_could_not_be_made_is_made_again_and_says_nothing_about_the_release(device, tried):
    device.assign(2)
    tried["outcome"] = TryAgain("self-test: no process could be started")
    assert "no process" in device.step()
    device.step()
    assert not [one for one in device.gateway.reports() if one[3]]
    tried["outcome"] = Trial()
    assert not device.step()
    assert device.runs() == 2


def test_two_agents_in_one_directory(device):
    device.assign(2)
    with alone(device.place):
        assert "another agent works in this directory" in device.step()
    with alone(device.directory / "repository"):
        assert "another agent works in this directory" in device.step()
    assert device.runs() == 1
    assert not device.step()


def test_a_damaged_file_of_the_only_release_is_fetched_anew(device, tried):
    files = sorted((device.place / "files").iterdir())
    files[0].write_bytes(b"rotten")
    device.restarted()
    asked = len(device.repository.asked)
    assert not device.step()
    assert device.runs() == 1
    assert len([name for name, _ in device.repository.asked[asked:] if name.startswith("targets/")]) == 1
    assert len(tried["files"]) == 1, "it was tried when it was installed"
    assert not device.step()
    files[0].write_bytes(b"rotten")
    device.repository.releases.targets.clear()
    device.repository.offer(2)
    assert "no release 1 of digits" in device.step(), "and nothing is broken further"
    device.gateway.wanted = 2
    assert not device.step()
    assert device.runs() == 2


def test_several_models_and_one_that_fails(tmp_path, tried):
    one = Device(tmp_path, models=("digits", "letters"))
    one.repository.offer(1, model="letters")
    one.gateway.wanted = 1
    one.step()
    standings = read_standings(one.state)
    assert "no release 1 of digits" in standings["digits"].problem
    assert not standings["letters"].problem
    with pytest.raises(Refused, match="names no model"):
        Device(tmp_path / "other", models=("../up",)).updater._look_after("../up", lambda: False, True)


def test_standings_that_are_damaged(device):
    (device.directory / "updates.json").write_text("[]")
    with pytest.raises(Refused, match=r"updates.json is damaged"):
        device.restarted()


def test_a_repository_behind_http(tmp_path, tried):
    device = Device(tmp_path / "agent")
    device.assign(1)
    for name, data in device.repository.files.items():
        path = tmp_path / "www" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "www"))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        device.policy = type(device.policy)(
            device=device.policy.device,
            updates=UpdatePolicy(models=("digits",), repository=f"http://127.0.0.1:{server.server_port}"),
        )
        device.restarted()
        device.gateway.token = b""
        assert not device.step()
        server.shutdown()
    assert device.runs() == 1
    assert not device.repository.asked


def test_policy_of_updates(tmp_path):
    path = _policy(tmp_path, 'windows = ["01:00-05:00"]\nprobation = 60\nminimum_version = 4')
    found = read_policy(path).updates
    assert (found.models, found.probation, found.minimum_version, found.charging) == (("digits",), 60, 4, False)
    with pytest.raises(Refused, match=r"\[updates\] has no key version"):
        read_policy(_policy(tmp_path, "version = 4"))
    assert UpdatePolicy().models == (), "nothing is installed that the owner did not name"


def test_gateways_that_refuse_are_the_agents_to_handle(device):
    from fedcore.gateway import gateway_pb2 as pb
    from fedcore.gateway.refusals import GatewayRefusal

    device.gateway.spoil = GatewayRefusal(pb.REVOKED, "go away")
    with pytest.raises(GatewayRefusal):
        device.step()
    assert device.problem == "go away"
    assert isinstance(Gateway(device.repository).reports(), list)
    assert Path(device.place).exists()
