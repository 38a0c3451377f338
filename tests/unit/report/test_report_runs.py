"""Reading run directories: what is accepted, what is refused and how the refusal reads."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fedcore.errors import Refused
from fedcore.report import list_runs, number, read_run

Make = Callable[..., Path]


def test_a_finished_run_reports_its_result(make_run: Make) -> None:
    directory = make_run(rounds=4)
    result = json.loads((directory / "result.json").read_text())

    run = read_run(directory)

    assert run.finished and run.done == 4
    assert run.accuracy == result["accuracy"] and run.int8_accuracy == result["int8_accuracy"]
    assert run.bytes_up == result["bytes_up"] == 4 * 20 * 80_000
    assert run.config.run.name == "digits-dirichlet"


def test_an_unfinished_run_reports_its_rounds_so_far(make_run: Make) -> None:
    run = read_run(make_run(rounds=4, planned=10))

    assert not run.finished and run.done == 4
    assert run.accuracy == run.rounds[-1]["accuracy"] and run.int8_accuracy == run.rounds[-1]["fake_quant_accuracy"]
    assert run.bytes_down == 4 * 20 * 21_000
    assert run.seconds == pytest.approx(sum(record["timing"]["seconds"] for record in run.rounds))
    rates = [record["timing"]["clients_per_second"] for record in run.rounds]
    assert run.clients_per_second is not None and min(rates) <= run.clients_per_second <= max(rates)


@pytest.mark.parametrize(
    "torn", ['{"round": 5, "coh', '{"round": 5, "name": "\\u00', "\x00\x00\x00", '{"round": 5, "name": "\u00e9']
)
def test_a_torn_last_line_is_left_out(make_run: Make, torn: str) -> None:
    directory = make_run(rounds=4, planned=10)
    with (directory / "metrics.jsonl").open("ab") as file:
        file.write(torn.encode()[:-1] if torn.endswith("\u00e9") else torn.encode())

    assert read_run(directory).done == 4


def test_a_last_line_without_its_line_end_counts_when_it_is_whole(make_run: Make) -> None:
    directory = make_run(rounds=4)
    path = directory / "metrics.jsonl"
    path.write_text(path.read_text().rstrip("\n"))

    assert read_run(directory).done == 4


def test_a_repeated_round_counts_once_as_it_went_the_last_time(make_run: Make) -> None:
    directory = make_run(rounds=3, planned=9)
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"round": 3, "accuracy": 0.5}\n{"round": 4, "accuracy": 0.625}\n')

    run = read_run(directory)

    assert [record["round"] for record in run.rounds] == [1, 2, 3, 4]
    assert run.rounds[2]["accuracy"] == 0.5


@pytest.mark.parametrize(
    "line", ["{torn", "[1]", '{"round": "3"}', '{"round": true}', '{"round": 3, "timing": 7}', '{"round": 3, "dropped": [7]}', ""]
)
def test_a_damaged_line_is_refused_with_its_number(make_run: Make, line: str) -> None:
    directory = make_run(rounds=3)
    path = directory / "metrics.jsonl"
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([first, line, *rest]) + "\n")

    with pytest.raises(Refused, match=r"metrics\.jsonl, line 2: damaged") as error:
        read_run(directory)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("result.json", "{"),
        ("result.json", "[]"),
        ("partition.json", '{"labels": ["a", "b"], "label_counts": [[1, 2], [3]]}'),
        ("partition.json", '{"labels": ["a"], "label_counts": [["1"]]}'),
        ("partition.json", "{}"),
        ("clients.json", '{"accuracy": [0.5], "examples": []}'),
        ("config.toml", "[run]\nrounds = -1"),
    ],
)
def test_a_damaged_file_is_refused_by_name(make_run: Make, name: str, content: str) -> None:
    directory = make_run(rounds=3)
    (directory / name).write_text(content)

    with pytest.raises(Refused, match=name) as error:
        read_run(directory)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("exists", [True, False])
def test_a_directory_without_a_configuration_is_no_run(tmp_path: Path, exists: bool) -> None:
    with pytest.raises(Refused, match="not a run directory"):
        read_run(tmp_path if exists else tmp_path / "absent")


def test_files_of_later_stages_may_be_missing(make_run: Make) -> None:
    directory = make_run(rounds=1, planned=5)
    for name in ("metrics.jsonl", "partition.json", "clients.json"):
        (directory / name).unlink()

    run = read_run(directory)

    assert run.rounds == [] and run.done == 0 and run.partition is None and run.clients is None
    assert run.accuracy is None and run.bytes_up is None and run.seconds is None and run.clients_per_second is None


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "0.9", True, [1]])
def test_what_is_no_finite_number_counts_as_absent(value: object) -> None:
    assert number({"loss": value}, "loss") is None
    assert number({}, "loss") is None
    assert number(None, "loss") is None
    assert number({"loss": 0}, "loss") == 0


def test_runs_are_listed_newest_first_and_damaged_ones_as_such(make_run: Make, tmp_path: Path) -> None:
    old, new, broken = make_run("old", rounds=2), make_run("new", rounds=3, planned=8), make_run("broken", rounds=2)
    (broken / "metrics.jsonl").write_text("nonsense\n")
    (tmp_path / "notes").mkdir()
    (tmp_path / "file.txt").write_text("not a run")
    for moment, directory in enumerate((old, broken, new), 1_800_000_000):
        for path in directory.iterdir():
            os.utime(path, (moment, moment))

    found = list_runs(tmp_path)

    assert [(run.name, run.state, run.done, run.planned) for run in found] == [
        ("new", "unfinished", 3, 8), ("broken", "damaged", 0, 0), ("old", "finished", 2, 2),
    ]  # fmt: skip
    assert "line 1" in found[1].problem and found[1].accuracy is None
    assert found[2].int8_accuracy == read_run(old).int8_accuracy
    assert found[2].size_bytes == sum(path.stat().st_size for path in old.iterdir())
    assert found[0].modified.timestamp() == 1_800_000_002


def test_a_root_that_cannot_be_listed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="cannot be listed"):
        list_runs(tmp_path / "absent")
