"""What a terminal shows while a run goes on."""

import dataclasses
import io
import os
import re
import signal

import pytest
from rich.console import Console

from fedcore.config import PrivacyConfig
from fedcore.coordinator.run import SimulatedRun
from fedcore.display import _heeding, follow

FEW = ("run.rounds=4", "quantization.enabled=false", "evaluation.every=0", "cohort.size=3")
CLIENT = {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3}


@pytest.fixture
def watched(scenario, tmp_path, monkeypatch):
    """Everything that a terminal was shown of a run, and the sizes of its cohorts."""

    def watch(**changed):
        config = scenario(*FEW)
        config = dataclasses.replace(config, privacy=(PrivacyConfig(**{**CLIENT, **changed}),))
        screen, drawn = io.StringIO(), []
        console = Console(file=screen, force_terminal=True, width=120, color_system=None)
        with SimulatedRun(config, tmp_path / str(changed), resume=False) as run:
            rounds = run.rounds

            def seen():
                for metrics in rounds():
                    drawn.append(len(run.grid.nodes))
                    monkeypatch.setattr(type(run.grid), "clients_done", len(run.grid.nodes))
                    yield metrics

            run.rounds = seen
            follow(run, console, as_json=False)
        return screen.getvalue(), drawn

    return watch


def test_with_coins_only_the_planned_size_is_shown(watched):
    screen, drawn = watched(sampling="poisson")
    assert len(set(drawn)) > 1, "the coins gave cohorts of several sizes"
    shown = set(re.findall(r"clients +\S+ (.*?) +in this round", screen))
    assert shown == {"3 planned"}
    assert "4/4" in screen, "of rounds it shows how far they are"
    assert "cohort 3" in screen


def test_a_cohort_of_fixed_size_is_shown_with_its_progress(watched):
    screen, drawn = watched()
    assert set(drawn) == {3}
    shown = set(re.findall(r"clients +\S+ (.*?) +in this round", screen))
    assert "3/3" in shown
    assert not any("planned" in text for text in shown)


class Finalized:
    """An object that is hit by Ctrl-C while it is finalized, where Python ignores the exception."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_is_heeded_also_where_python_swallows_it():
    seen, usual = [], signal.getsignal(signal.SIGINT)

    def rounds():
        for number in range(10):
            if number == 3:
                Finalized()
            yield {"round": number}

    with pytest.raises(KeyboardInterrupt):
        seen.extend(one["round"] for one in _heeding(rounds()))
    assert seen == [0, 1, 2]
    assert signal.getsignal(signal.SIGINT) is usual
    assert [one["round"] for one in _heeding(iter([{"round": 1}]))] == [1]
