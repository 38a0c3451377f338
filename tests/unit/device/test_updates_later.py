"""The updater of released models after an installation: the probation, and when it asks again."""

import fedcore_device.updates
import numpy as np
import pytest
from fedcore_device.environment import Conditions
from fedcore_device.installed import Trial, health_path
from fedcore_device.runtime_health import Health, HealthFile
from fedcore_device.standing import judge, read_standings, signals_of
from release_fake import well

from fedcore.errors import Refused, TryAgain


class TestProbation:
    def test_time_without_trouble_is_enough(self, device):
        device.past(3599)
        device.step()
        assert device.pointer().starts == 1 or device.pointer().starts == 0
        assert device.pointer().starts is not None
        device.past(2)
        device.step()
        assert device.pointer().starts is None

    def test_apps_that_use_it_well_are_enough(self, device):
        HealthFile(health_path(device.place, 1)).add(calls=20)
        device.step()
        assert device.pointer().starts is None

    @pytest.mark.parametrize("trouble", ["crashes", "errors"])
    def test_trouble_takes_it_back_and_it_is_told_of(self, device, trouble):
        well(device)
        device.assign(2)
        device.step()
        assert device.runs() == 2
        file = HealthFile(health_path(device.place, 2))
        if trouble == "crashes":
            file.add(loads_begun=5, loads_ended=3, calls=100)
        else:
            file.add(calls=30, errors=2)
        device.gateway.asked.clear()
        device.gateway.wanted = 0
        device.updater.step()
        assert device.runs() == 1
        ((rollout, version, _, why),) = [one for one in device.gateway.reports() if one[3]]
        assert (rollout, version) == ("first", 2)
        assert ("2 times" if trouble == "crashes" else "2 of 30 calls failed") in why
        device.gateway.wanted = 2
        device.step()
        assert device.runs() == 1
        device.assign(3)
        device.step()
        assert device.runs() == 3

    def test_the_first_release_of_all_has_nothing_to_go_back_to(self, device):
        HealthFile(health_path(device.place, 1)).add(calls=30, errors=30)
        assert not device.step()
        assert device.runs() == 1
        assert device.gateway.reports()[-1][2]["errors"] == 1.0

    def test_an_agent_that_never_gets_that_far(self, device):
        well(device)
        device.assign(2)
        device.step()
        seen = []
        for _ in range(5):
            device.gateway.wanted = 0
            device.restarted().step()
            seen.append(device.runs())
        assert seen == [2, 2, 2, 1, 1]

    @pytest.mark.parametrize(
        ("counters", "crashes", "loading", "seconds", "verdict"),
        [
            ({}, 0, False, 0, "wait"), ({}, 0, False, 3600, "well"), ({}, 0, False, -5, "well"),
            ({"calls": 19}, 0, False, 1, "wait"),
            ({"calls": 20}, 0, False, 1, "well"), ({"calls": 20}, 1, False, 1, "wait"), ({"calls": 20}, 1, False, 3600, "well"),
            ({"calls": 500}, 2, False, 3600, "ill"), ({"calls": 20}, 0, True, 9999, "wait"),
            ({"calls": 20, "errors": 1}, 0, False, 1, "well"), ({"calls": 40, "errors": 2}, 0, False, 1, "well"),
            ({"calls": 39, "errors": 2}, 0, False, 1, "ill"),
        ],
    )  # fmt: skip
    def test_the_judgement(self, counters, crashes, loading, seconds, verdict):
        held = Health({**Health().counters, **counters}, crashes=crashes, loading=loading)
        assert judge(held, seconds, 3600)[0] == verdict

    def test_health_of_releases_that_are_gone_is_removed(self, device):
        for version in (2, 3):
            HealthFile(health_path(device.place, version - 1)).add(calls=20)
            device.assign(version)
            device.step()
            device.step()
        HealthFile(health_path(device.place, 3))
        assert sorted(path.name for path in (device.place / "health").glob("*.bin")) == ["2.bin", "3.bin"]


def test_signals_without_a_trial_are_what_apps_saw():
    assert signals_of(None, Health()) == {"errors": 0.0, "crash": 0.0}
    assert "disagreement" not in signals_of(Trial(None, 1.0, 5), Health())


class TestWhen:
    def test_as_often_as_the_gateway_said(self, device):
        device.step()  # after an installation it tells at once, and then waits
        asked = len(device.gateway.asked)
        for _ in range(4):
            device.updater.step()
        assert len(device.gateway.asked) == asked
        device.past(601)
        device.updater.step()
        assert len(device.gateway.asked) == asked + 1
        device.restarted().step()
        assert len(device.gateway.asked) == asked + 1, "a restart asks no earlier"

    def test_after_failures_later_and_later(self, device, monkeypatch):
        monkeypatch.setattr(fedcore_device.updates.random, "uniform", lambda low, high: 1.0)
        device.gateway.spoil = TryAgain("the gateway cannot be reached")
        waits = []
        for _ in range(8):
            device.step()
            waits.append(read_standings(device.state)["digits"].due - device.world.now)
        assert waits == [60, 120, 240, 480, 960, 1920, 3600, 3600]
        device.gateway.spoil = None
        device.step()
        assert read_standings(device.state)["digits"].failures == 0

    def test_an_unfit_release_is_told_of_by_the_next_step_and_once(self, device, tried):
        well(device)
        device.assign(2)
        tried["outcome"] = Refused("self-test: agreement 0.31 is below 0.95")
        device.step()
        device.gateway.asked.clear()
        for _ in range(5):
            device.updater.step()
        assert len(device.gateway.asked) == 1, "no time has passed"
        assert [one[1:] for one in device.gateway.reports() if one[3]] == [(2, {}, "self-test: agreement 0.31 is below 0.95")]
        device.past(601)
        device.updater.step()
        assert len(device.gateway.asked) == 2, "then as often as the gateway said"

    def test_an_unfit_release_that_could_not_be_told_of_is_told_of_later_and_later(self, device, tried, monkeypatch):
        monkeypatch.setattr(fedcore_device.updates.random, "uniform", lambda low, high: 1.0)
        well(device)
        device.assign(2)
        tried["outcome"] = Refused("self-test: agreement 0.31 is below 0.95")
        device.step()
        device.gateway.asked.clear()
        device.gateway.spoil = TryAgain("the gateway is busy")
        for number, wait in enumerate((60, 120, 240), 1):
            for _ in range(5):
                device.updater.step()
            assert len(device.gateway.asked) == number
            assert read_standings(device.state)["digits"].due == device.world.now + wait
            device.past(wait + 1)
        device.gateway.spoil = None
        device.gateway.asked.clear()
        device.updater.step()
        device.updater.step()
        assert [one[1] for one in device.gateway.reports() if one[3]] == [2]

    def test_a_release_that_is_well_is_told_of_at_once_and_once(self, device):
        device.step()
        HealthFile(health_path(device.place, 1)).add(calls=20)
        device.gateway.asked.clear()
        for _ in range(5):
            device.updater.step()
        assert device.pointer().starts is None
        assert [one[1] for one in device.gateway.reports()] == [1]

    def test_that_all_is_well_waits_out_a_failure(self, device):
        device.gateway.spoil = TryAgain("the gateway is busy")
        device.step()
        HealthFile(health_path(device.place, 1)).add(calls=20)
        device.gateway.asked.clear()
        device.updater.step()
        assert device.pointer().starts is None
        assert not device.gateway.asked
        device.gateway.spoil = None
        device.past(91)
        device.updater.step()
        assert [one[1] for one in device.gateway.reports()] == [1]

    def test_a_release_that_a_start_took_back_is_told_of_at_once_and_once(self, device):
        well(device)
        device.assign(2)
        device.step()
        device.step()
        device.gateway.wanted = 0
        for _ in range(3):
            device.restarted().step()
        device.gateway.asked.clear()
        device.restarted()
        for _ in range(5):
            device.updater.step()
        assert device.runs() == 1
        assert len(device.gateway.asked) == 1
        assert [(one[1], one[3]) for one in device.gateway.reports() if one[3]] == [(2, "3 starts, and never well")]

    def test_only_while_the_conditions_hold(self, device, tmp_path):
        device.assign(2)
        device.past(700)
        for found, words in (
            ({"unmetered": False}, "metered"),
            ({"battery_percent": 19}, "battery"),
            ({"temperature": 71.0}, "degrees"),
        ):
            device.world.found = Conditions(free_storage=1 << 40, **found)
            asked = len(device.gateway.asked)
            device.updater.step()
            assert len(device.gateway.asked) == asked
            assert words in device.updater.why_not()
        device.world.found = Conditions(free_storage=1 << 40, charging=False, idle=False, battery_percent=20)
        device.updater.step()
        assert device.runs() == 2

    def test_someone_who_asks_for_it_now(self, device):
        device.step()
        device.assign(2)
        device.world.found = Conditions(free_storage=0)
        device.updater.step()
        assert device.runs() == 1
        (device.directory / "update.now").touch()
        device.updater.step()
        assert device.runs() == 2
        assert not (device.directory / "update.now").exists()

    def test_an_agent_that_ends_stops_the_download_and_goes_on_later(self, device):
        device.assign(2, files={("flagship", "onnx"): np.random.default_rng(0).bytes(70_000)}, deltas=False)
        stops = iter([False] * 8 + [True] * 1000)
        assert "the agent ends" in device.step(stopped=lambda: next(stops))
        (part,) = (device.directory / "repository" / "partial").iterdir()
        have = part.stat().st_size
        assert 0 < have < 70_000
        device.repository.asked.clear()
        assert not device.step()
        assert have in [offset for _, offset in device.repository.asked]
        assert device.pointer().current.version == 2
