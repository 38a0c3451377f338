"""[secagg] end to end in simulation: masked, as plain arithmetic, with noise, over shards, and what is refused."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from fedcore.config import parse_config
from fedcore.coordinator import secure
from fedcore.coordinator.assembly import assemble
from fedcore.coordinator.run import SimulatedRun
from fedcore.errors import Refused, RoundFailed
from fedcore.privacy.randomness import keystream
from fedcore.secagg import participant

SCENARIO = {
    "run": {"name": "secure", "rounds": 2, "seed": 3},
    "data": {"dataset": "digits", "clients": 8, "partition": "dirichlet", "holdout": 0.1},
    "model": {"name": "mlp"},
    "training": {"lr": 0.1},
    "secagg": {"enabled": True},
}


SKELLAM = {"unit": "client", "mechanism": "skellam", "noise_multiplier": 1.0, "delta": 1e-3}


def run(folder: Path, *, resume: bool = False, **sections):
    tables = {**SCENARIO, **sections}
    tables["secagg"] = {**SCENARIO["secagg"], **sections.get("secagg", {})}
    tables["run"] = {**SCENARIO["run"], **sections.get("run", {})}
    config = parse_config(tables, "test", folder.parent)
    with SimulatedRun(config, folder, resume=resume) as found:
        rounds = list(found.rounds())
        return rounds, found.finish()


def master(folder: Path) -> np.ndarray:
    newest = max((folder / "checkpoints").glob("*.safetensors"))
    return safetensors.numpy.load_file(newest)["master"]


def both_ways(tmp_path: Path, **sections):
    """The same scenario masked and as arithmetic; their masters, and the masked run's rounds and result."""
    asked = sections.pop("secagg", {})
    rounds, result = run(tmp_path / "masked", secagg=asked, **sections)
    plainly, _ = run(tmp_path / "arithmetic", secagg={**asked, "simulate": "arithmetic"}, **sections)
    assert [entry["replies"] for entry in rounds] == [entry["replies"] for entry in plainly]
    return master(tmp_path / "masked"), master(tmp_path / "arithmetic"), rounds, result


def test_masks_change_no_bit_and_the_mean_is_that_of_plain_training(tmp_path):
    masked, arithmetic, rounds, result = both_ways(tmp_path, evaluation={"federated_every": 1})
    assert np.array_equal(masked, arithmetic)
    run(tmp_path / "plain", secagg={"enabled": False})
    # rounding is unbiased and at most a step a round; fake-quant may turn it into a step of its own
    assert np.abs(masked - master(tmp_path / "plain")).max() < 1e-3
    for entry in rounds:
        (told,) = entry["secure"]
        assert (told["checked_in"], told["survivors"], told["neighbours"], told["members"]) == (8, 8, 7, [1, 2, 3])
        assert entry["dropped"] == []
        assert entry["failed"] == 0
        assert sum(entry["federated"]["histogram"]) == entry["federated"]["clients"] <= 8
    words = json.dumps(result["secure_aggregation"])
    assert "separate no trust" in words
    assert "What protects clients" in (tmp_path / "masked" / "report.html").read_text()


def test_federated_scores_are_those_of_an_open_evaluation(tmp_path):
    rounds, _ = run(tmp_path / "secure", evaluation={"federated_every": 1}, run={"rounds": 1})
    openly, _ = run(tmp_path / "open", evaluation={"federated_every": 1}, run={"rounds": 1}, secagg={"enabled": False})
    seen, expected = rounds[-1]["federated"], openly[-1]["federated"]
    assert abs(seen["accuracy"] - expected["accuracy"]) < 0.05  # the models differ in rounding
    assert abs(seen["loss"] - expected["loss"]) < 0.01
    assert set(seen["percentiles"]) == set(expected["percentiles"])
    assert "clients.json" not in {path.name for path in (tmp_path / "secure").iterdir()}


def test_clients_vanish_at_any_step_and_the_sum_is_that_of_the_others(tmp_path):
    masked, arithmetic, rounds, _ = both_ways(tmp_path, cohort={"dropout": 0.5}, run={"rounds": 4})
    assert np.array_equal(masked, arithmetic)
    survivors = [entry["secure"][0]["survivors"] for entry in rounds]
    assert survivors == [entry["replies"] for entry in rounds]
    assert min(survivors) < 8
    assert any(entry["secure"][0]["checked_in"] > entry["secure"][0]["survivors"] for entry in rounds)


def test_too_few_survivors_end_the_run_with_the_last_model(tmp_path):
    with pytest.raises(RoundFailed, match=r"are needed|given up"):
        run(tmp_path / "few", cohort={"dropout": 0.9}, secagg={"minimum_survivors": 7}, run={"rounds": 6})


def test_a_failing_client_uploads_zeros_and_is_counted(tmp_path):
    # updates that explode fail on every client, which the coordinator learns as a number
    with pytest.raises(RoundFailed, match="training of all 8 clients failed"):
        run(tmp_path / "all", training={"lr": 1e6})
    masked, arithmetic, rounds, _ = both_ways(tmp_path, training={"lr": 0.1, "max_update_norm": 0.8}, run={"rounds": 1})
    assert np.array_equal(masked, arithmetic)
    assert 0 < rounds[0]["failed"] < 8
    assert rounds[0]["replies"] == 8
    told = [json.loads(line) for line in (tmp_path / "masked" / "operator.jsonl").read_text().splitlines()]
    assert len(told[0]["dropped"]) == rounds[0]["failed"]
    assert all("exploded" in reason for _, reason in told[0]["dropped"])


def test_noise_shares_under_masks(tmp_path):
    privacy = {
        "unit": "client", "mechanism": "skellam", "noise_multiplier": 0.5, "delta": 1e-3, "clipping_norm": 0.5,
        "adaptive_quantile": 0.5, "loss_cap": 4.0, "minimum_survivors": 5, "corrupt_fraction": 0.1,
    }  # fmt: skip
    masked, arithmetic, rounds, result = both_ways(tmp_path, privacy=privacy, cohort={"dropout": 0.2})
    assert np.array_equal(masked, arithmetic)
    assert rounds[-1]["privacy"]["client"]["unclipped"] is not None
    assert result["privacy"]["client"]["epsilon"] > 0
    assert rounds[0]["secure"][0]["bits"] in {16, 20, 24, 32}


def test_a_robust_rule_over_shards(tmp_path):
    masked, arithmetic, rounds, result = both_ways(
        tmp_path, strategy={"name": "fedtrimmedavg", "params": {"beta": 0.25}}, secagg={"shards": 4}
    )
    assert np.array_equal(masked, arithmetic)
    assert [one["survivors"] for one in rounds[0]["secure"]] == [2, 2, 2, 2]
    assert result["strategy_replies"] == "one mean reply for each of 4 shards"


def test_noise_is_sized_for_each_shard(tmp_path):
    privacy = {
        "unit": "client", "mechanism": "skellam", "noise_multiplier": 0.5, "delta": 1e-3, "clipping_norm": 0.5,
        "minimum_survivors": 4, "ledger": str(tmp_path / "ledger.db"),
    }  # fmt: skip
    whole, _ = run(tmp_path / "whole", privacy={**privacy, "minimum_survivors": 8, "ledger": ""}, run={"rounds": 1})
    parts, _ = run(
        tmp_path / "parts", privacy={**privacy, "ledger": ""}, secagg={"shards": 2}, run={"rounds": 1},
        strategy={"name": "fedmedian"},
    )  # fmt: skip
    spent = [entry[0]["privacy"]["client"]["epsilon"] for entry in (whole, parts)]
    assert spent[0] == pytest.approx(spent[1], rel=0.05)  # a client is in one shard, whose own noise covers it
    assert len(parts[0]["secure"]) == 2


def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_interrupted(tmp_path):
    run(tmp_path / "once", run={"rounds": 3}, cohort={"dropout": 0.3})
    run(tmp_path / "twice", run={"rounds": 1}, cohort={"dropout": 0.3})
    run(tmp_path / "twice", resume=True, run={"rounds": 3}, cohort={"dropout": 0.3})
    assert np.array_equal(master(tmp_path / "once"), master(tmp_path / "twice"))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"strategy": {"name": "fedmedian"}}, "set secagg.shards"),
        ({"strategy": {"name": "krum"}}, "looks at clients one by one"),
        ({"wire": {"update": "int8"}}, "a sum has its own encoding"),
        ({"secagg": {"shards": 3}}, "must divide the cohort of 8"),
        ({"secagg": {"shards": 8}}, "parts of at least 2"),
        ({"secagg": {"corrupt_fraction": 0.9}}, "takes 10 to 8 survivors"),
        ({"secagg": {"minimum_survivors": 9}}, "minimum_survivors asks for 9"),
        ({"secagg": {"weight_cap": 2**20}}, "lower the largest weight"),
        ({"secagg": {"bits": 16}}, "16 bits leave 5 for a coordinate"),
        ({"secagg": {"threshold": 2}}, "is not safe"),
        ({"secagg": {"neighbours": 3}}, r"secagg.neighbours, in a sum of 8 clients: 3 neighbours"),
        ({"secagg": {"bits": 17}}, "16, 20, 24, 32"),
        ({"secagg": {"trust": "bundle.json"}}, "no meaning without secagg.operators"),
        ({"secagg": {"operators": ["127.0.0.1:1"]}}, "must be given with secagg.operators"),
        ({"secagg": {"enabled": False, "shards": 2}}, "no meaning without secagg.enabled"),
        (
            {"privacy": {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3}},
            "the clients add it",
        ),
        ({"privacy": {**SKELLAM, "minimum_survivors": 1}}, "the sum of one honest client; it takes 2"),
        ({"privacy": {**SKELLAM, "minimum_survivors": 5, "corrupt_fraction": 0.5}}, "it takes 6"),
        ({"privacy": SKELLAM, "secagg": {"clip": 2.0}}, "secagg.clip has no meaning with privacy of unit client"),
        ({"secagg": {"operators": ["127.0.0.1:1"], "simulate": "arithmetic"}}, "asks no committee"),
        ({"cohort": {"size": 1}}, "a sum takes 2 clients or more"),
        (
            {"cohort": {"evaluate_size": 2}, "evaluation": {"federated_every": 1}, "secagg": {"corrupt_fraction": 0.2}},
            "takes 3 clients",
        ),
        (
            {
                "privacy": {"unit": "client", "mechanism": "skellam", "noise_multiplier": 1.0, "delta": 1e-3},
                "secagg": {"corrupt_fraction": 0.1},
            },
            "privacy.corrupt_fraction says it",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_kept_is_refused(tmp_path, sections, message):
    with pytest.raises(Refused, match=message):
        run(tmp_path / "refused", **sections)


@pytest.mark.slow
def test_fifty_clients_thirty_percent_dropping_for_ten_rounds(tmp_path):
    """The model is that of the arithmetic simulation bit for bit, and as good as the plain run's with the same survivors."""
    sections = {
        "data": {"dataset": "digits", "clients": 50, "partition": "dirichlet", "alpha": 0.5},
        "model": {"name": "cnn"},
        "training": {"epochs": 3, "batch_size": 10, "lr": 0.05, "momentum": 0.9},
        "quantization": {"calibrate_round": 5},
        "cohort": {"dropout": 0.3},
        "run": {"rounds": 10},
    }
    masked, arithmetic, rounds, result = both_ways(tmp_path, **sections)
    assert np.array_equal(masked, arithmetic)
    plain_rounds, plain = run(tmp_path / "plain", **{**sections, "secagg": {"enabled": False}})
    assert [entry["replies"] for entry in plain_rounds] == [entry["replies"] for entry in rounds]
    assert abs(result["accuracy"] - plain["accuracy"]) <= 0.01


def test_a_sum_of_scores_has_a_corrupt_share_of_its_own(tmp_path):
    config = parse_config(
        {**SCENARIO, "data": {**SCENARIO["data"], "clients": 20}, "cohort": {"size": 4}, "evaluation": {"federated_every": 1},
         "secagg": {"enabled": True, "corrupt_fraction": 0.2}}, "test", tmp_path,
    )  # fmt: skip
    secured = assemble(config).secured
    assert (secured.terms.corrupt, secured.terms.among_scores) == (1, 4)
    assert (secured.updates.minimum_survivors, secured.scores.minimum_survivors) == (3, 10)


def test_an_evaluation_that_fails_costs_no_round(tmp_path):
    rounds, _ = run(
        tmp_path / "run", cohort={"dropout": 0.5, "evaluate_size": 2}, evaluation={"federated_every": 1}, run={"rounds": 4},
        secagg={"minimum_survivors": 2},
    )  # fmt: skip
    assert len(rounds) == 4
    assert any("federated_failed" in entry for entry in rounds)
    told = [json.loads(line) for line in (tmp_path / "run" / "operator.jsonl").read_text().splitlines()]
    assert [len(entry["cohort"]) for entry in told] == [8] * 4  # those that trained, not those that evaluated
    assert [entry["replies"] for entry in told] == [entry["replies"] for entry in rounds]


def test_no_secret_reaches_files_or_output(tmp_path, monkeypatch, capfd, caplog):
    """Every 32 secret bytes that committee and clients draw are looked for in all that a run leaves behind and says."""
    drawn: set[bytes] = set()

    def recording(source):
        def draw(size: int) -> bytes:
            found = source(size)
            drawn.add(found)
            return found

        return draw

    monkeypatch.setitem(secure.local_committee.__kwdefaults__, "random", recording(os.urandom))
    monkeypatch.setattr(secure.os, "urandom", recording(os.urandom))
    monkeypatch.setattr(participant, "keystream", lambda key: recording(keystream(key)))
    caplog.set_level("DEBUG")
    rounds, _ = run(tmp_path / "run", engine={"workers": 1}, cohort={"dropout": 0.3}, run={"rounds": 1})
    assert rounds[0]["replies"]
    said = capfd.readouterr()
    left = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    left += [said.out.encode(), said.err.encode(), caplog.text.encode()]
    secrets = {secret for secret in drawn if len(secret) == 32}
    assert len(secrets) > 3 * 2 + 8 * 2  # keys and reveals of members, keys and seeds of clients
    for secret in secrets:
        shown = (secret, secret.hex().encode(), base64.b64encode(secret), repr(secret).encode())
        assert not any(form in text for form in shown for text in left)


def test_a_long_name_of_a_run_is_no_obstacle(tmp_path):
    rounds, _ = run(tmp_path / "run", run={"rounds": 1, "name": "\N{SNOWMAN}" * 60})
    assert rounds[0]["replies"] == 8


def test_a_round_whose_clients_all_fail_says_why_and_tells_the_operator(tmp_path):
    for how in ("protocol", "arithmetic"):
        with pytest.raises(RoundFailed, match=r"all 8 clients failed.*one of the clients: update exploded"):
            run(tmp_path / how, training={"max_update_norm": 1e-9}, secagg={"simulate": how})


@pytest.mark.parametrize("simulate", ["protocol", "arithmetic"])
def test_a_strategy_that_changes_the_sum_of_scores_is_refused(tmp_path, simulate):
    (tmp_path / "mine.py").write_text(
        "from flwr.serverapp.strategy import FedAvg\n"
        "class Changes(FedAvg):\n"
        "    accepts_mean = True\n"
        "    def configure_evaluate(self, *given):\n"
        "        messages = list(super().configure_evaluate(*given))\n"
        "        for message in messages:\n"
        "            next(iter(message.content.config_records.values()))['scores-cohort'] = 7\n"
        "        return messages\n"
    )
    with pytest.raises(Refused, match="the strategy changed scores-cohort from 8 to 7"):
        run(tmp_path / "run", evaluation={"federated_every": 1}, strategy={"name": "mine:Changes"}, secagg={"simulate": simulate})
