import json
import re
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import FedAvg, Strategy
from flwr.supercore.task_identity import TaskIdentity

from fedcore.coordinator.assembly import assemble, build_clients
from fedcore.coordinator.strategy import STRATEGIES, accepts_mean, build_strategy
from fedcore.errors import Refused
from fedcore.flower import assume_identity, decode_state, encode_state, from_record, seed_strategies, to_record
from fedcore.grids.cohort import CohortGrid
from fedcore.training.client import RoundTask
from fedcore.training.plan import LocalPlan

PARAMETERS = {
    "fedprox": {"proximal_mu": 0.1},
    "fedavgm": {"server_momentum": 0.9, "server_learning_rate": 0.7},
    "fedtrimmedavg": {"beta": 0.2},
    "qfedavg": {"client_learning_rate": 0.1},
    "krum": {"num_malicious_nodes": 1},
    "multikrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 2},
}
MEAN = {"fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad"}


def settings(name: str) -> list[str]:
    values = [f"strategy.params.{key}={value}" for key, value in PARAMETERS.get(name, {}).items()]
    return [f"strategy.name={name}", *values]


def run(config, *, mean: bool, rounds: int = 3, restart_after: int | None = None) -> np.ndarray:
    """A bare round loop over the strategy's public methods; ``restart_after`` rounds its state goes through the codec."""
    assembly = assemble(config)
    strategy, layout = assembly.strategy, assembly.layout
    grid = CohortGrid(build_clients(assembly), layout, mean=mean, workers=1)
    master = layout.join({name: p.detach().numpy() for name, p in assembly.model.named_parameters()})
    for number in range(1, rounds + 1):
        seed_strategies(0, number)
        task = RoundTask(number, LocalPlan(1, 8, 0.1), 100.0)
        messages = strategy.configure_train(number, to_record(layout, master), ConfigRecord(task.to_table()), grid)
        arrays, metrics = strategy.aggregate_train(number, grid.send_and_receive(messages))
        assert isinstance(arrays, ArrayRecord)
        assert isinstance(metrics, MetricRecord)
        master = from_record(layout, arrays)
        if number == restart_after:
            text, held = encode_state(strategy)
            strategy = build_strategy(config)
            decode_state(strategy, json.loads(json.dumps(text)), {key: value.copy() for key, value in held.items()})
    return master


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_trains_and_is_given_what_it_needs(scenario, name):
    """One mean reply and one reply per client give the same model for those of the table, and only for those."""
    # Without fake-quant: it turns the last bit of a float into visible differences within a few steps.
    config = scenario(*settings(name), "quantization.enabled=false")
    assert accepts_mean(build_strategy(config)) == (name in MEAN)
    each = run(config, mean=False)
    assert np.isfinite(each).all()
    if name == "bulyan":
        return  # with one reply it gives no model at all
    mean = run(config, mean=True)
    difference = np.abs(mean - each).max()
    if name in MEAN:
        assert difference < 1e-5
    else:
        assert difference > 1e-4, "given a mean this strategy silently returns another model"


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_restored_strategy_continues_with_the_same_bits(scenario, name):
    config = scenario(*settings(name))
    mean = accepts_mean(build_strategy(config))
    assert (run(config, mean=mean) == run(config, mean=mean, restart_after=2)).all()


def test_a_subclass_is_not_trusted_with_a_mean_unless_it_says_so():
    class Mine(FedAvg):
        pass

    class Declared(FedAvg):
        accepts_mean = True

    class Inherited(Declared):
        pass

    assert not accepts_mean(Mine())
    assert accepts_mean(Declared())
    assert not accepts_mean(Inherited())
    assert not accepts_mean(FedAvg(train_metrics_aggr_fn=lambda records, key: MetricRecord()))


MODULE = """
import collections
from flwr.serverapp.strategy import FedAvg, DifferentialPrivacyServerSideFixedClipping

class OwnLoop(FedAvg):
    def start(self, *args, **kwargs):
        pass

class Private(DifferentialPrivacyServerSideFixedClipping):
    pass

class Stateful(FedAvg):
    def __init__(self):
        super().__init__()
        self.history = collections.deque([1])

class Saved(Stateful):
    def state_dict(self):
        return {"history": list(self.history)}
    def load_state_dict(self, state):
        self.history = collections.deque(state["history"])

class Picky(FedAvg):
    def __init__(self, *, depth):
        super().__init__()
        if depth > 3:
            raise ValueError("depth must be at most 3")

def function():
    pass
"""


@pytest.mark.parametrize(
    ("name", "params", "reason"),
    [
        ("mine:OwnLoop", {}, r"overrides start\(\)"),
        ("mine:Private", {}, "DP wrappers are not supported"),
        ("mine:Stateful", {}, "history is a deque, which a checkpoint cannot hold"),
        ("mine:Picky", {}, "missing 1 required keyword-only argument: 'depth'; it takes: depth"),
        ("mine:Picky", {"depth": 4}, "depth must be at most 3"),
        ("mine:function", {}, "must be a class derived from"),
        ("mine:Missing", {}, "Missing"),
        ("absent:Class", {}, "absent"),
        ("fedavg", {"momentum": 1}, "unexpected keyword argument 'momentum'; it takes: weighted_by_key"),
        ("fedtrimmedavg", {"beta": 0.7}, "must be in the range"),
    ],
)
def test_a_strategy_that_cannot_be_run_is_refused(scenario, tmp_path, name, params, reason):
    (tmp_path / "mine.py").write_text(MODULE)
    config = scenario().replace("strategy", name=name, params=params)
    with pytest.raises(Refused, match=reason) as refusal:
        build_strategy(config)
    assert "\n" not in str(refusal.value)


def test_own_state_goes_through_state_dict(scenario, tmp_path):
    (tmp_path / "mine.py").write_text(MODULE)
    config = scenario("strategy.name=mine:Saved")
    strategy = build_strategy(config)
    strategy.history.append(7)
    text, arrays = encode_state(strategy)
    fresh = build_strategy(config)
    decode_state(fresh, text, arrays)
    assert list(fresh.history) == [1, 7]


def test_state_of_every_kind_comes_back():
    class Bag:
        pass

    bag, fresh = Bag(), Bag()
    bag.a, bag.b = np.arange(6, dtype=np.float64).reshape(2, 3), [1, 2.5, None, "x", True]
    bag.c, bag.d, bag.f = (1, (2,)), {"e": np.float32(1.5)}, float("inf")
    bag.g, bag.h = ArrayRecord({"w": Array(np.ones(2, np.float16))}), np.zeros((0, 3))
    text, arrays = encode_state(bag)
    decode_state(fresh, text, arrays)
    assert (fresh.a == bag.a).all()
    assert fresh.a.dtype == np.float64
    assert (fresh.b, fresh.c, fresh.d, fresh.f) == (bag.b, bag.c, bag.d, bag.f)
    assert type(fresh.d["e"]) is np.float32
    assert fresh.g["w"].numpy().dtype == np.float16
    assert fresh.h.shape == (0, 3)


def test_flowers_private_identity_is_as_we_know_it():
    """Fails loudly on a flwr in which the one private part that we touch has changed."""
    assert {"_task_id", "_run_id", "_node_id"} <= set(vars(TaskIdentity))
    assume_identity()
    assert (TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id) == (0, 0, 0)


def test_only_one_module_touches_flowers_private_parts():
    allowed = {"flwr.app", "flwr.serverapp", "flwr.clientapp"}
    root = Path(__file__).parents[3] / "fedcore"
    for path in root.rglob("*.py"):
        for module in re.findall(r"^\s*(?:from|import) (flwr(?:\.\w+)*)\s", path.read_text(), re.MULTILINE):
            public = ".".join(module.split(".")[:2]) in allowed
            assert public or path.name == "flower.py", f"{path.relative_to(root)} imports {module}"


def test_strategies_are_flowers_own():
    assert all(issubclass(kind, Strategy) for kind in STRATEGIES.values())
    assert len(STRATEGIES) == 12
