"""What a run is made of: how its parameters travel, and a user's model that fails on what the coordinator itself computes."""

import pytest

from fedcore.coordinator.assembly import assemble
from fedcore.coordinator.run import SimulatedRun
from fedcore.errors import Refused

MODEL = """
from torch import nn

class Picky(nn.Module):
    most = 100
    def __init__(self, classes):
        super().__init__()
        self.layer = nn.Linear(64, classes)
    def forward(self, x):
        if len(x) > self.most:
            raise ValueError("too many\\nfor words")
        return self.layer(x.flatten(1))
"""
LINE = "^model mine:Picky failed on the coordinator's own examples: ValueError: too many$"


def test_downloads_have_steps_that_stay_from_round_to_round(scenario):
    assert set(assemble(scenario()).layout.encodings) == {"int8po2", "fp16"}
    assert set(assemble(scenario("quantization.enabled=false")).layout.encodings) == {"fp32"}


@pytest.fixture
def picky(scenario, tmp_path):
    """A scenario whose model takes small batches only, as those of its checks and of clients."""
    (tmp_path / "mine.py").write_text(MODEL)
    return lambda *settings: scenario("model.name=mine:Picky", "model.params={}", "run.rounds=1", "engine.name=loop", *settings)


@pytest.mark.parametrize("settings", [("quantization.enabled=false",), ("quantization.calibrate_round=1", "data.calibration=256")])
def test_a_model_that_fails_on_the_coordinator_s_examples_is_named(picky, tmp_path, settings):
    """When it is scored, and when it is calibrated; the checks at the start see a few examples only."""
    with SimulatedRun(picky(*settings), tmp_path / "run", resume=False) as run, pytest.raises(Refused, match=LINE):
        list(run.rounds())


def test_so_is_one_that_fails_when_its_first_output_is_recorded(picky, monkeypatch):
    assembly = assemble(picky("quantization.enabled=false"))
    assert len(assembly.origin()["model"]) == 4 * 10
    monkeypatch.setattr(type(assembly.model), "most", 3)
    with pytest.raises(Refused, match=LINE):
        assembly.origin()
