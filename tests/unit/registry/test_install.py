"""Installations that die at every file operation, run out of disk, meet another agent, or are handed something unfit."""

import copy
import hashlib
import itertools
import random
import shutil
import subprocess
import sys

import pytest
from registry_world import DAY, NOW, Crash, FakeClock, FaultyDisk, Simulator

from fedcore.errors import Refused, TryAgain
from fedcore.registry.client import Client
from fedcore.registry.delta import make_delta
from fedcore.registry.install import POINTER, Store, install, read_pointer

WANTED = [("entry", "onnx"), ("flagship", "onnx")]


def content(version, tier):
    """Files of consecutive versions differ in a few bytes only; versions beyond 100 have the content of version - 100."""
    version %= 100
    data = bytearray(random.Random(tier).randbytes(20_000))
    for number in range(version):
        data[number * 7 : number * 7 + 5] = b"%05d" % number
    return bytes(data)


class Device:
    """A repository, a client and a directory; `run` installs what is asked for."""

    def __init__(self, place, versions=(1,), deltas=True):
        self.place, self.simulator = place, Simulator()
        self.deltas = deltas
        for version in versions:
            self.offer(version)
        self.client = Client(place / "trust", self.simulator, self.simulator.files["metadata/1.root.json"], FakeClock())
        (place / "digits").mkdir()

    def offer(self, version):
        for tier, _ in WANTED:
            data = content(version, tier)
            self.simulator.add_artefact(version, data, tier)
            if self.deltas and version > 1:
                base = content(version - 1, tier)
                ends = {"base": hashlib.sha256(base).hexdigest(), "result": hashlib.sha256(data).hexdigest()}
                path = f"releases/digits/{version}/deltas/{tier}.fcd"
                self.simulator.add(path, make_delta(base, data), kind="delta", model="digits", version=version, codec="x", **ends)
        self.simulator.add(
            f"releases/digits/{version}/self-test/batch.npz", b"%d" % version, kind="self-test", model="digits", version=version
        )
        self.simulator.publish()

    def run(self, version, disk=None, self_test=None, recheck=lambda: None, wanted=WANTED, now=NOW):
        catalogue = self.client.refresh(now, 60.0)
        with Store(self.place / "digits", disk) as store:
            return install(store, self.client, catalogue, "digits", version, wanted, self_test or self.scores, recheck, 60.0)

    def scores(self, paths, batch):
        for name, path in paths.items():
            assert path.read_bytes() == content(int(batch.read_bytes()), name.split("/")[0])

    def runs(self):
        """The version that a device which starts now would run, every file of it compared."""
        with Store(self.place / "digits") as store:
            release = store.start()
            for name, one in release.files.items():
                assert store.path(one.digest).read_bytes() == content(release.version, name.split("/")[0])
            return release.version


@pytest.fixture
def device(template, tmp_path):
    """One whose repository a test may change."""
    device = clone(template, tmp_path / "device")
    device.simulator = device.client._fetcher = template.simulator.copy()
    return device


def test_nothing_is_installed_at_first(tmp_path):
    assert read_pointer(tmp_path).current is None
    with Store(tmp_path) as store:
        assert store.start() is None
        store.commit()


def test_two_releases_are_kept_and_nothing_else(device):
    assert device.runs() == 1
    device.run(2)
    assert device.runs() == 2
    pointer = read_pointer(device.place / "digits")
    assert (pointer.current.version, pointer.previous.version) == (2, 1)
    assert len(list((device.place / "digits" / "files").iterdir())) == 4
    assert not list((device.place / "trust" / "partial").iterdir())


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A device with release 1, to which release 2 is offered."""
    device = Device(tmp_path_factory.mktemp("template"))
    device.run(1)
    with Store(device.place / "digits") as store:
        store.commit()
    device.offer(2)
    return device


def clone(template, place):
    """Another device with the same files, that reads the same repository."""
    shutil.copytree(template.place, place)
    device = copy.copy(template)
    device.place = place
    device.client = Client(place / "trust", device.simulator, device.simulator.files["metadata/1.root.json"], FakeClock())
    return device


def operations(device):
    disk = FaultyDisk(10**9, "before")
    device.run(2, disk)
    return disk.count + 1


@pytest.mark.parametrize(
    ("how", "lose"),
    [("before", "names"), ("before", "content"), ("torn", ""), ("torn", "names"), ("after", ""), ("after", "content")],
)
def test_death_at_every_file_operation(template, tmp_path, how, lose):
    total = operations(clone(template, tmp_path / "whole"))
    assert total == 2 * 4 + 2 + 4 + 1, "two models from deltas, a downloaded batch, the pointer, and the batch's removal"
    seen = set()
    for at in range(total):
        device = clone(template, tmp_path / str(at))
        with pytest.raises(Crash):
            device.run(2, FaultyDisk(at, how, lose))
        version = device.runs()
        seen.add(version)
        assert version in {1, 2}
        if version == 1:
            device.run(2)
            assert device.runs() == 2
    assert seen == {1, 2}


def test_a_disk_that_fills_up_at_every_write(template, tmp_path):
    total, refused = operations(clone(template, tmp_path / "whole")), 0
    for at in range(total):
        device = clone(template, tmp_path / str(at))
        try:
            device.run(2, FaultyDisk(at, "full"))
        except TryAgain:
            refused += 1
            assert device.runs() == 1
            assert not list((device.place / "digits").rglob("*.new"))
            device.run(2)
        assert device.runs() == 2
    assert refused >= 4


def test_two_agents_in_one_directory(device):
    with Store(device.place / "digits") as store:
        assert store.start().version == 1
        with pytest.raises(TryAgain, match="another agent works"):
            device.run(2)
        code = "import sys; from pathlib import Path; from fedcore.registry.install import Store; Store(Path(sys.argv[1]))"
        other = subprocess.run(
            [sys.executable, "-c", code, str(device.place / "digits")], capture_output=True, text=True, check=False
        )
        assert other.returncode == 1
        assert "another agent works" in other.stderr
    device.run(2)


def test_an_unfit_release_is_not_switched_to_and_not_tried_again(device):
    def unfit(paths, _):
        raise Refused(f"agreement 0.31 on {len(paths)} files")

    with pytest.raises(Refused, match="agreement"):
        device.run(2, self_test=unfit)
    assert device.runs() == 1
    with pytest.raises(Refused, match="not above 2"):
        device.run(2)
    assert read_pointer(device.place / "digits").unfit == {"2": "agreement 0.31 on 2 files"}
    device.offer(3)
    device.run(3)
    assert device.runs() == 3


def test_a_test_that_could_not_be_made_is_made_again(device):
    def busy(*_):
        raise TryAgain("no memory")

    with pytest.raises(TryAgain):
        device.run(2, self_test=busy)
    device.run(2)
    assert device.runs() == 2


def test_an_assignment_that_is_over_at_the_moment_of_the_switch(device):
    def over():
        raise Refused("the assignment is over")

    with pytest.raises(Refused, match="over"):
        device.run(2, recheck=over)
    assert device.runs() == 1
    device.run(2)
    assert device.runs() == 2


def test_a_release_that_never_gets_well_gives_way_to_the_one_before(device):
    device.run(2)
    assert [device.runs() for _ in range(5)] == [2, 2, 2, 1, 1]
    with pytest.raises(Refused, match="not above 2"):
        device.run(2)
    device.offer(101)
    assert device.run(101).version == 101  # the way back: a higher release of the content of release 1


def test_a_committed_release_may_start_as_often_as_it_likes(device):
    device.run(2)
    with Store(device.place / "digits") as store:
        store.start()
        store.commit()
    assert {device.runs() for _ in range(6)} == {2}


def test_a_release_on_probation_is_no_place_to_go_back_to(device):
    device.run(2)
    device.offer(3)
    device.run(3)
    pointer = read_pointer(device.place / "digits")
    assert (pointer.current.version, pointer.previous.version) == (3, 1)


def test_the_first_release_of_all_is_a_place_to_go_back_to_even_on_probation(tmp_path):
    device = Device(tmp_path, versions=(1, 2))
    device.run(1)
    device.run(2)
    with Store(tmp_path / "digits") as store:
        assert store.fall_back("it crashes").version == 1
    assert device.runs() == 1


def test_old_content_as_a_higher_release_costs_no_download(device):
    device.run(2)
    device.offer(101)
    device.simulator.asked.clear()
    device.run(101)
    assert not [name for name, _ in device.simulator.asked if name.startswith("targets/") and "batch" not in name]
    assert device.runs() == 101


def test_versions_only_go_up(device):
    device.run(2)
    for version in (0, 1, 2):
        with pytest.raises(Refused, match="versions only go up"):
            device.run(version)
    with pytest.raises(Refused, match="has nothing for entry and litert"):
        device.run(3, wanted=[("entry", "litert")])


def test_a_damaged_file_of_the_current_release(device):
    device.run(2)
    with Store(device.place / "digits") as store:
        store.commit()
    path = device.place / "digits" / "files" / read_pointer(device.place / "digits").current.files["entry/onnx"].digest
    path.write_bytes(path.read_bytes()[:-1])
    assert device.runs() == 1
    (device.place / "digits" / POINTER).write_bytes(b"{}")
    with pytest.raises(Refused, match="damaged"):
        device.runs()


def test_five_versions_behind_and_a_month_offline(tmp_path):
    """One connection: the chain of deltas, no whole file; and the same with none of the old metadata good any more."""
    device = Device(tmp_path)
    device.run(1)
    for version in range(2, 7):
        device.offer(version)
    late = NOW + 30 * DAY
    for name, days in (("timestamp", 1), ("snapshot", 7), ("releases", 90), ("targets", 365)):
        getattr(device.simulator, name).expires = late + days * DAY
    device.simulator.now = late
    device.simulator.publish()
    device.simulator.asked.clear()
    device.run(6, now=late)
    assert device.runs() == 6
    fetched = [name for name, _ in device.simulator.asked if name.startswith("targets/")]
    assert len([name for name in fetched if name.endswith(".fcd")]) == 10
    assert not [name for name in fetched if name.endswith(".onnx")]


@pytest.mark.parametrize("spoil", ["tampered", "signed but wrong", "for another base", "gone", "lost"])
def test_a_bad_delta_falls_back_to_the_whole_file(device, spoil):
    files = device.simulator.files
    for name in [name for name in files if name.endswith(".fcd")]:
        if spoil == "tampered":
            files[name] = files[name][:-3] + b"xyz"
        elif spoil == "lost":  # named, and not there
            del files[name]
    if spoil in {"signed but wrong", "for another base"}:
        for path, target in list(device.simulator.releases.targets.items()):
            if path.endswith(".fcd"):
                wrong = b"FCD1" + b"\x02" * 40 if spoil == "signed but wrong" else make_delta(b"other", b"thing")
                device.simulator.add(path, wrong, **target.custom)
        device.simulator.publish()
    if spoil == "gone":
        for path in [path for path in device.simulator.releases.targets if path.endswith(".fcd")]:
            del device.simulator.releases.targets[path]
        device.simulator.publish()
    device.run(2)
    assert device.runs() == 2
    assert [name for name, _ in device.simulator.asked if name.endswith(".onnx")]


def test_expired_metadata_blocks_updates_and_not_the_installed_model(device):
    for wrong in (NOW + 365 * DAY, NOW + 2 * DAY):
        with pytest.raises(Refused, match="expired"):
            device.run(2, now=wrong)
        assert device.runs() == 1


def test_what_is_left_of_downloads_is_removed_when_it_is_offered_no_more(device):
    catalogue = device.client.refresh(NOW, 60.0)
    partial = device.place / "trust" / "partial"
    kept = catalogue.artefact("digits", 2, "entry", "onnx").digest.hex()
    for name in (kept, "0" * 64):
        (partial / name).write_bytes(b"half")
    device.client.collect(catalogue)
    assert [path.name for path in partial.iterdir()] == [kept]


def test_every_fault_is_a_real_one(template, tmp_path):
    """The faulty disk forgets what was not synced: without the syncs, the same crashes leave neither model."""

    class Careless(FaultyDisk):
        def sync(self, path):
            self._step(lambda: None)

    lost = 0
    for at in itertools.count():
        device = clone(template, tmp_path / str(at))
        try:
            device.run(2, Careless(at, "before", lose="content"))
        except Crash:
            try:
                device.runs()
            except (Refused, AttributeError):
                lost += 1
            continue
        break
    assert lost > 0
