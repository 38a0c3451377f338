"""A run trains and evaluates with the loss that its scenario names, wherever a number of it is told."""

import numpy as np
import pytest
import torch
from small_zoo import why_no_compiler
from torch.nn import functional as F

from fedcore.coordinator.assembly import assemble
from fedcore.coordinator.fleet import FleetFolder, offering
from fedcore.coordinator.run import SimulatedRun
from fedcore.display import _headline
from fedcore.errors import Refused
from fedcore.export.source import load_run
from fedcore.portable.judge import read_evaluation
from fedcore.portable.step import portable_evaluation, portable_step
from fedcore.quantization.layers import float_arithmetic, set_activation_ranges
from fedcore.training.evaluation import load_flat

SQUARED = ("training.loss=squared", "training.lr=0.3", "run.rounds=2", "evaluation.federated_every=1")
PLAIN = "quantization.enabled=false"


needs_compiler = pytest.mark.skipif(bool(why_no_compiler()), reason=why_no_compiler() or "-")


def finished(config, directory):
    with SimulatedRun(config, directory, resume=False) as run:
        rounds = list(run.rounds())
        return rounds, run.finish(), run


def mean_squared_error(model, examples):
    """The sum over examples of what torch calls so."""
    with torch.no_grad():
        outputs = model.eval()(torch.from_numpy(examples.x)).double()
    target = F.one_hot(torch.from_numpy(examples.y), outputs.shape[1]).double()
    return float(F.mse_loss(outputs, target)) * len(examples)


def check_losses(rounds, run, tolerance=1e-12):
    """Central losses in float and as clients receive the model, and the clients' own, by torch from the last model."""
    progress, assembly, model = run.coordinator.progress, run.assembly, run.assembly.model
    test, last = assembly.data.dataset.test, rounds[-1]
    load_flat(model, torch.from_numpy(progress.master))
    with float_arithmetic(model):
        assert last["loss"] == pytest.approx(mean_squared_error(model, test) / len(test), rel=1e-6)
    set_activation_ranges(model, progress.ranges)
    load_flat(model, torch.from_numpy(run.coordinator.received(progress)[1]))
    if "fake_quant_loss" in last:
        assert last["fake_quant_loss"] == pytest.approx(mean_squared_error(model, test) / len(test), rel=1e-6)
    held = [assembly.data.dataset.train.take(part) for part in assembly.data.holdout]
    expected = sum(mean_squared_error(model, one) for one in held) / sum(map(len, held))
    assert last["federated"]["loss"] == pytest.approx(expected, rel=1e-6, abs=tolerance)


@pytest.mark.parametrize("engine", ["loop", "vmap", pytest.param("native", marks=needs_compiler)])
def test_a_run_evaluates_with_the_loss_it_trains_with(scenario, tmp_path, engine):
    rounds, result, run = finished(scenario(*SQUARED, f"engine.name={engine}"), tmp_path / "run")
    check_losses(rounds, run)
    assert result["loss"] == rounds[-1]["loss"] < 0.11, "of ten classes, an answer of nothing but zeros has 0.1"
    assert result["accuracy"] > 0.2
    assert load_run(tmp_path / "run").facts.loss == "squared", "what its releases tell devices"
    assert rounds[1]["train_loss"] < rounds[0]["train_loss"] < 0.3


@needs_compiler
def test_engines_tell_one_training_loss(scenario, tmp_path):
    """Without fake quantization, and all clients in one round of DP-SGD with the same coins and noise."""
    for number, settings in enumerate(((), ("privacy.unit=example", "privacy.noise_multiplier=0.1", "privacy.delta=1e-4"))):
        found = []
        for engine in ("loop", "vmap", "native"):
            config = scenario(*SQUARED[:2], "run.rounds=1", PLAIN, f"engine.name={engine}", *settings)
            rounds, result, _ = finished(config, tmp_path / f"{engine}-{number}")
            found.append([value for one in rounds for value in (one["train_loss"], one["loss"])] + [result["accuracy"]])
        assert (found[0][0] is None) == bool(settings), "it is withheld from a run with privacy"
        for other in found[1:]:
            np.testing.assert_allclose(np.array(other, float), np.array(found[0], float), rtol=1e-4)


def test_masked_scores_are_of_the_loss(scenario, tmp_path):
    rounds, _, run = finished(
        scenario(*SQUARED, "engine.name=loop", "secagg.enabled=true", "secagg.simulate=arithmetic"), tmp_path / "run"
    )
    scores = run.assembly.secured.scores
    check_losses(rounds, run, tolerance=scores.cohort * scores.granularity)
    assert 0 < rounds[-1]["train_loss"] < 0.3


def test_a_run_says_its_loss_where_it_is_not_the_usual_one(scenario, tmp_path):
    for settings, said in ((SQUARED[:3], True), (("run.rounds=1", "quantization.calibrate_round=1"), False)):
        config = scenario(*settings, "engine.name=loop")
        _, _, run = finished(config, tmp_path / str(said))
        page = (tmp_path / str(said) / "report.html").read_text(encoding="utf-8")
        assert load_run(tmp_path / str(said)).facts.loss == config.training.loss
        assert (b"loss" in (tmp_path / str(said) / "model" / "model.fcm").read_bytes()) is said
        assert ("squared loss" in _headline(run)) is said
        assert ("squared loss" in page) is said
        assert ("The squared error to one-hot targets" in page) is said


def test_a_continued_run_keeps_its_loss_and_runs_from_before_have_cross_entropy(scenario, tmp_path):
    usual, squared = scenario("run.rounds=2", PLAIN, "engine.name=loop"), scenario(*SQUARED[:3], PLAIN, "engine.name=loop")
    for config, other in ((usual, "squared"), (squared, "cross_entropy")):
        directory = tmp_path / config.training.loss
        with SimulatedRun(config, directory, resume=False) as run:
            next(run.rounds())
        with pytest.raises(Refused, match=f"--resume: training.loss is '{other}', the run in .* has '{config.training.loss}'"):
            SimulatedRun(config.replace("training", loss=other), directory, resume=True)
    file = tmp_path / "cross_entropy" / "config.toml"
    text = file.read_text()
    assert text.count('loss = "cross_entropy"\n') == 1
    file.write_text(text.replace('loss = "cross_entropy"\n', ""))
    with SimulatedRun(usual, tmp_path / "cross_entropy", resume=True) as run:
        assert [one["round"] for one in run.rounds()] == [2]


def test_another_loss_is_one_line(scenario):
    with pytest.raises(
        Refused, match=r'training\.loss must be one of cross_entropy, squared, got "square" \(did you mean squared\?\)'
    ):
        scenario("training.loss=square")


def test_devices_are_offered_the_graphs_of_the_loss(scenario, tmp_path):
    found = {}
    for loss in ("cross_entropy", "squared"):
        config = scenario(f"training.loss={loss}", PLAIN, "engine.name=loop", "evaluation.federated_every=1")
        assembly = assemble(config)
        found[loss] = offering(assembly, FleetFolder.open(tmp_path / "fleet", "watches"))
        shape, batch = assembly.data.dataset.train.shape, config.training.batch_size
        assert found[loss].loss == loss
        assert found[loss].blobs["step"] == portable_step(assembly.model, shape, batch=batch, unit="", loss=loss).data
        together = read_evaluation(found[loss].blobs["evaluation"]).form.batch
        evaluation = portable_evaluation(assembly.model, shape, batch=together, loss=loss)
        assert found[loss].blobs["evaluation"] == evaluation.data
    assert not {*found["squared"].blobs.values()} & {*found["cross_entropy"].blobs.values()}


FORGETFUL = """
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import FedAvg

class InTraining(FedAvg):
    def configure_train(self, server_round, arrays, config, grid):
        own = ConfigRecord({key: value for key, value in config.items() if key != "loss"})
        return super().configure_train(server_round, arrays, own, grid)

class InEvaluation(FedAvg):
    def configure_evaluate(self, server_round, arrays, config, grid):
        own = ConfigRecord({key: value for key, value in config.items() if key != "loss"})
        return super().configure_evaluate(server_round, arrays, own, grid)
"""


@pytest.mark.parametrize("name", ["InTraining", "InEvaluation"])
def test_a_strategy_that_drops_the_loss_does_not_change_it_unseen(scenario, tmp_path, name):
    (tmp_path / "mine.py").write_text(FORGETFUL)
    with (
        SimulatedRun(scenario(*SQUARED, "engine.name=loop", f"strategy.name=mine:{name}"), tmp_path / "run", resume=False) as run,
        pytest.raises(Refused, match="key 'loss' is missing; the strategy must pass on the one it was given"),
    ):
        list(run.rounds())
    usual = scenario(*SQUARED[2:], "engine.name=loop", f"strategy.name=mine:{name}")
    assert len(finished(usual, tmp_path / "usual")[0]) == 2
