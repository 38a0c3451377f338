"""How long a round waits for devices, on a clock of the test's own."""

import pytest

from fedcore.errors import RoundFailed
from fedcore.gateway.conduct import Conductor, Present
from fedcore.gateway.fleet import Selection, Told
from fedcore.secagg.crypto import Ed25519Key
from fedcore.state.stores import open_gateway_store

WINDOW = 300.0


class Fleet:
    """Devices by the second at which they check in."""

    def __init__(self, folder, arrivals):
        self.now, self.arrivals = 1000.0, arrivals
        store = open_gateway_store(str(folder / "gateway.sqlite"))
        self.conductor = Conductor(store, "watches", Ed25519Key(b"k" * 32), pause=0.5, clock=lambda: self.now, sleep=self.sleep)
        self.conductor.present = lambda _: [
            Present(device, Told(), b"") for device, second in enumerate(arrivals) if self.now >= 1000 + second
        ]

    def sleep(self, seconds):
        self.now += seconds

    def gather(self, goal, over):
        selection = Selection(goal, max(1, goal - 1), 60.0, WINDOW, over)
        return self.conductor.gather(self.conductor.form("task", 1, selection)), self.now - 1000


def test_enough_devices_end_the_wait_at_once(tmp_path):
    chosen, waited = Fleet(tmp_path, [0] * 13).gather(10, 1.3)
    assert (len(chosen), waited) == (13, 0)


def test_spare_devices_are_waited_for_a_tenth_of_the_window(tmp_path):
    chosen, waited = Fleet(tmp_path, [0, 5, 40]).gather(3, 1.3)
    assert len(chosen) == 3
    assert waited == pytest.approx(40 + WINDOW / 10, abs=1)
    chosen, waited = Fleet(tmp_path / "other", [0, 5, 40, 50]).gather(3, 1.3)
    assert (len(chosen), waited) == (4, 50)


def test_the_goal_is_waited_for_the_whole_window(tmp_path):
    chosen, waited = Fleet(tmp_path, [0, 5]).gather(3, 1.3)
    assert len(chosen) == 2
    assert waited == pytest.approx(WINDOW, abs=1)
    with pytest.raises(RoundFailed, match="1 devices checked in within 300 s; the round needs 2"):
        Fleet(tmp_path / "other", [0]).gather(3, 1.3)


def test_spare_devices_do_not_stretch_the_window(tmp_path):
    chosen, waited = Fleet(tmp_path, [0, 5, 290]).gather(3, 1.3)
    assert len(chosen) == 3
    assert waited == pytest.approx(WINDOW, abs=1)
