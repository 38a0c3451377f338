"""An update that dies before every change of the disk, on a full disk, and under `kill -9`; then the same directory again."""

import itertools
import os
import shutil
import signal
import sys
import time

import fedcore_device.updates
import pytest
from fedcore_device.installed import Trial
from registry_world import Crash, FaultyDisk
from release_fake import Device

CHANGES = {"os.rename", "os.remove", "os.truncate", "os.mkdir", "os.rmdir"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Death:
    """Ends the process, as far as it can be told, before the n-th change below a directory. The hook stays for good, idle."""

    def __init__(self):
        self.folder, self.left, self.seen = None, 0, []
        sys.addaudithook(self._hook)

    def _hook(self, event, arguments):
        if self.folder is None or not self._changes(event, arguments):
            return
        self.seen.append(event)
        self.left -= 1
        if self.left < 0:
            self.left = 10**9  # what is done on the way out is not this test's
            raise Crash

    def _changes(self, event, arguments):
        if event != "open" and event not in CHANGES:
            return False
        path, flags = arguments[0], arguments[2] if event == "open" else WRITING
        where = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
        return where.startswith(self.folder) and bool((flags or 0) & WRITING) and not where.endswith((".lock", "lock"))

    def after(self, count, folder, do):
        """Whether ``do`` died."""
        self.folder, self.left, self.seen = str(folder), count, []
        try:
            do()
        except Crash:
            return True
        finally:
            self.folder = None
        return False


DEATH = Death()


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A device with release 1, to which release 2 is assigned."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fedcore_device.updates, "self_test", lambda *_: Trial(0.0, 1.0, 5, {}))
        one = Device(tmp_path_factory.mktemp("template") / "agent")
        one.assign(1)
        assert not one.step()
        one.past(3601)
        one.step()
        one.assign(2)
        yield one


def clone(template, place):
    """Another device in the same state, which asks the same gateway."""
    shutil.copytree(template.directory, place)
    gateway = template.gateway
    one = Device(place, gateway, template.world)
    one.elapsed[0] = template.elapsed[0]
    return one


def test_death_before_every_change_of_the_disk(template, tmp_path):
    """Through the agent's own path, its notes included: the old or the new release, and the next look completes it."""
    seen, changes = set(), []
    for at in itertools.count():
        one = clone(template, tmp_path / str(at))
        died = DEATH.after(at, one.directory, one.step)
        changes = DEATH.seen
        seen.add(one.runs())
        assert one.runs() in {1, 2}
        one.restarted()
        assert not one.step(), at
        assert one.runs() == 2
        shutil.rmtree(one.directory)
        if not died:
            break
    assert seen == {1, 2}
    assert len(changes) > 30, "notes, metadata, deltas, files, the pointer, and what is removed"


def test_death_at_every_file_operation_of_the_installation(template, tmp_path):
    """With what was not synced lost, as after a loss of power."""
    for at in itertools.count():
        one = clone(template, tmp_path / str(at))
        one.restarted(FaultyDisk(at, "before", "content"))
        try:
            one.step()
        except Crash:
            assert one.runs() in {1, 2}
            one.restarted()
            assert not one.step()
            assert one.runs() == 2
            continue
        break
    assert at >= 15


def test_a_disk_that_fills_up(template, tmp_path):
    refused = 0
    for at in range(16):
        one = clone(template, tmp_path / str(at))
        one.restarted(FaultyDisk(at, "full"))
        problem = one.step()
        if problem:
            refused += 1
            assert "No space left" in problem
            assert one.runs() == 1
            assert not list(one.place.rglob("*.new"))
            one.restarted()
            assert not one.step()
        assert one.runs() == 2
        assert "2" not in one.pointer().unfit, "a full disk is no finding about the release"
    assert refused >= 4


def test_notes_that_cannot_be_written(template, tmp_path, monkeypatch):
    """Without the note that an assignment was accepted nothing is installed, or it could be taken twice."""
    from fedcore.errors import TryAgain

    one = clone(template, tmp_path / "one")

    def full(*_):
        raise TryAgain("updates.json cannot be written (No space left on device)")

    with monkeypatch.context() as patch:
        patch.setattr(one.state, "keep", full)
        one.updater.step(now=True)
    assert one.runs() == 1
    assert not one.step()
    assert one.runs() == 2


def test_kill_minus_nine_at_many_moments(template, tmp_path):
    """A process that the system ends in the middle of whatever it does; each has a little more time than the one before."""
    seen = set()
    for at in range(30):
        one = clone(template, tmp_path / str(at))
        child = os.fork()
        if child == 0:
            try:
                one.step()
            finally:
                os._exit(0)
        time.sleep(0.004 * at)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        seen.add(one.runs())
        one.restarted()
        one.gateway.sequence += 1  # the child's copy of the gateway gave one away
        assert not one.step()
        assert one.runs() == 2
    assert seen <= {1, 2}
    assert 1 in seen
