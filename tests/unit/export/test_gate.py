import dataclasses
from pathlib import Path

import numpy as np
import pytest

from fedcore.config import TIERS, TierConfig, parse_config
from fedcore.errors import Refused
from fedcore.export.gate import Measured, agreement, judge, quantile
from fedcore.export.release import choose
from fedcore.export.targets import TARGETS, target_of

GOOD = Measured(
    bytes=1000,
    integer_ops=4,
    float_ops=0,
    agreement=0.996,
    accuracy=0.9,
    accuracy_loss=0.5,
    latency_ms=1.0,
    p95_ms=2.0,
    peak_bytes=10_000,
)
TIER = TierConfig(bytes=1000, memory_bytes=10_000, latency_ms=1.0, p95_ms=2.0)


def problems(target: str = "litert", tier: TierConfig = TIER, layers: int = 4, **changed) -> list[str]:
    return list(judge(dataclasses.replace(GOOD, **changed), tier, TARGETS[target], layers))


def test_what_stands_exactly_on_every_limit_passes():
    assert problems() == []
    assert problems(agreement=0.995) == []


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"agreement": 0.9949}, "agreement 0.9949"),
        ({"accuracy_loss": 0.51}, "accuracy loss of 0.51 points"),
        ({"bytes": 1001}, "bytes 1001"),
        ({"latency_ms": 1.01}, "latency_ms 1.01"),
        ({"p95_ms": 2.5}, "p95_ms 2.5"),
        ({"peak_bytes": 10_001}, "peak_bytes 10001"),
        ({"integer_ops": 3}, "only 3 of 4 convolutions and dense layers add up integers"),
    ],
)
def test_each_limit_is_judged(changed, reason):
    (problem,) = problems(**changed)
    assert reason in problem


def test_no_limit_where_the_tier_says_zero_and_no_verdict_on_what_was_not_measured():
    assert problems(tier=TierConfig(memory_bytes=0, latency_ms=0), bytes=10**9, latency_ms=1e6, peak_bytes=10**12) == []
    nothing = dict.fromkeys(("agreement", "accuracy", "accuracy_loss", "latency_ms", "p95_ms", "peak_bytes"))
    assert problems(target="coreml", **nothing) == []


def test_integers_are_demanded_only_where_they_are_promised():
    assert problems(target="mnn", integer_ops=0) == []
    assert problems(target="ncnn", integer_ops=0)


def test_a_layer_that_gives_floats_is_named_with_the_remedy():
    layers = ("0", "7")
    assert list(judge(GOOD, TIER, TARGETS["onnx"], 4, layers)) == []
    _, remedy = judge(dataclasses.replace(GOOD, agreement=0.99), TIER, TARGETS["onnx"], 4, layers)
    assert "layer 0, 7" in remedy and "FakeQuantize" in remedy


def test_an_arena_is_held_against_the_arena_of_the_tier():
    tier = dataclasses.replace(TIER, arena_bytes=9_000, memory_bytes=1)
    (problem,) = problems(target="micro", tier=tier)
    assert "arena bytes 10000 is above the tier's 9000" in problem


def test_agreement_and_quantiles():
    assert agreement(np.array([[0.0, 1], [1, 0], [3, 2]]), np.array([1, 0, 1])) == pytest.approx(2 / 3)
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([], 0.5) is None


def test_a_plan_takes_tiers_of_the_scenario_and_knows_others_by_name():
    own = {"entry": TierConfig(targets=("onnx",)), "kiosk": TierConfig(targets=("mnn", "onnx"))}
    assert choose(own, [], []).targets == {"entry": ("onnx",), "kiosk": ("mnn", "onnx")}
    assert choose({}, [], []).targets == {"flagship": tuple(TARGETS)}
    plan = choose(own, ["wearable", "kiosk"], ["ncnn"])
    assert plan.tiers == {"wearable": TIERS["wearable"], "kiosk": own["kiosk"]}
    assert set(plan.targets.values()) == {("ncnn",)}
    with pytest.raises(Refused, match="--tiers: unknown watch; allowed: flagship"):
        choose({}, ["watch"], [])
    with pytest.raises(Refused, match="--targets: unknown tflite; allowed: onnx"):
        choose({}, [], ["tflite"])
    with pytest.raises(Refused, match=r"tiers\.kiosk\.targets: unknown x"):
        choose({"kiosk": TierConfig(targets=("x",))}, [], [])


def test_tiers_of_a_scenario_begin_with_their_names_defaults():
    config = parse_config(
        {"data": {"clients": 2}, "tiers": {"entry": {"prune": 0.25}, "kiosk": {"latency_ms": 5}}}, "s.toml", Path()
    )
    assert config.tiers == {"entry": dataclasses.replace(TIERS["entry"], prune=0.25), "kiosk": TierConfig(latency_ms=5.0)}
    assert "tiers" not in config.settings() and config.tables()["tiers"]["entry"]["prune"] == 0.25
    assert "[tiers.kiosk]" in config.to_toml()
    for wrong, reason in (({"a b": {}}, r"\[tiers.NAME\]"), ({"entry": {"prun": 1}}, "did you mean prune"), ({"x": 3}, "tables"),
                          ({"x": {"weight_bits": 5}}, "must be 4 or 8"), ({"x": {"prune": 1.0}}, "<= 0.9")):  # fmt: skip
        with pytest.raises(Refused, match=reason):
            parse_config({"tiers": wrong}, "s.toml", Path())


def test_formats_by_suffix():
    assert target_of(Path("a/model.TFLITE")) == "litert"
    with pytest.raises(Refused, match="unknown kind of model file"):
        target_of(Path("model.pt"))
