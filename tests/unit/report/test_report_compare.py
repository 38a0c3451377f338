"""Comparisons: rows, differing settings, and means over seeds."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from fedcore.errors import Refused
from fedcore.report import read_run
from fedcore.report.compare import Difference, compare_runs, write_comparison

Make = Callable[..., Path]


def set_result(directory: Path, **values: float) -> None:
    path = directory / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_rows_follow_the_order_given(make_run: Make) -> None:
    runs = [make_run("b", name="bee", seed=4, rounds=6), make_run("a", name="ant", strategy="fedadam", rounds=3, planned=6)]

    comparison = compare_runs(runs)

    bee, ant = comparison.rows
    assert (bee.label, bee.strategy, bee.seed, bee.rounds, bee.finished) == ("bee", "fedavg", 4, 6, True)
    assert (ant.label, ant.strategy, ant.seed, ant.rounds, ant.finished) == ("ant", "fedadam", 0, 3, False)
    assert bee.bytes_up == 6 * 20 * 80_000 and ant.bytes_up == 3 * 20 * 80_000
    assert [point[:2] for point in ant.curve] == [(index, index * 20 * 101_000.0) for index in (1, 2, 3)]
    assert [point[2] for point in ant.curve] == [record["accuracy"] for record in read_run(runs[1]).rounds]


def test_differing_settings_are_found_down_to_single_parameters(make_run: Make) -> None:
    runs = [make_run("a", strategy="fedprox"), make_run("b", strategy="fedprox", seed=1)]
    for directory, params in zip(runs, ({"proximal_mu": 0.1, "same": 1}, {"same": 1}), strict=True):
        config = read_run(directory).config.replace("strategy", params=params)
        (directory / "config.toml").write_text(config.to_toml())

    differences = compare_runs(runs).differences

    assert Difference("run.seed", ("0", "1")) in differences
    assert Difference("strategy.params.proximal_mu", ("0.1", "\u2013")) in differences
    assert len(differences) == 2


def test_the_name_and_the_folder_are_no_settings(make_run: Make) -> None:
    assert compare_runs([make_run("a", name="one"), make_run("b", name="two")]).differences == ()


def test_seeds_are_summarised_by_mean_and_sample_deviation(make_run: Make) -> None:
    runs = [make_run(f"a{seed}", name=f"a{seed}", seed=seed) for seed in range(3)] + [make_run("b", strategy="fedadam")]
    for directory, accuracy in zip(runs, (0.90, 0.92, 0.97, 0.5), strict=True):
        set_result(directory, accuracy=accuracy)

    (summary,) = compare_runs(runs).seeds

    assert summary.label == "fedavg" and summary.members == (0, 1, 2) and summary.seeds == (0, 1, 2)
    assert summary.accuracy is not None and summary.accuracy.runs == 3
    assert summary.accuracy.mean == pytest.approx(0.93)
    assert summary.accuracy.std == pytest.approx(statistics.stdev([0.90, 0.92, 0.97]))


def test_unfinished_runs_stay_out_of_the_means(make_run: Make) -> None:
    runs = [make_run("a", seed=0, rounds=6), make_run("b", seed=1, rounds=6), make_run("c", seed=2, rounds=2, planned=6)]

    (summary,) = compare_runs(runs).seeds

    assert summary.members == (0, 1)
    assert compare_runs(runs[1:]).seeds == ()


def test_labels_are_unique(make_run: Make) -> None:
    one, two, other = make_run("one/x", name="same"), make_run("two/x", name="same"), make_run("three", name="other")

    labels = [row.label for row in compare_runs([one, two, other]).rows]

    assert len(set(labels)) == 3 and labels[2] == "other"


def test_one_run_is_no_comparison(make_run: Make) -> None:
    with pytest.raises(Refused, match="at least two"):
        compare_runs([make_run()])


def test_the_page_shows_rows_seeds_and_settings(make_run: Make, tmp_path: Path) -> None:
    runs = [make_run(f"a{seed}", name=f"avg-{seed}", seed=seed) for seed in range(2)]
    runs += [make_run("evil", name="<script>x<br>", strategy="krum", rounds=2, planned=5)]
    set_result(runs[0], accuracy=0.9, int8_accuracy=0.89, bytes_up=123_456_789)
    set_result(runs[1], accuracy=0.92, int8_accuracy=0.91)
    path = tmp_path / "compare.html"

    write_comparison(compare_runs(runs), path)

    page = path.read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;x&lt;br&gt;" in page
    assert not re.search(r"https?:|@import|url\(", page)
    assert "123.5" in page and "91.00% ± 1.41" in page and "90.00% ± 1.41" in page
    assert "(2 seeds)" in page and "unfinished" in page and "strategy.name" in page


def test_runs_without_any_evaluation_are_compared_without_curves(make_run: Make, tmp_path: Path) -> None:
    runs = [make_run("a"), make_run("b", seed=1)]
    for directory in runs:
        (directory / "metrics.jsonl").write_text('{"round": 1}\n')

    write_comparison(compare_runs(runs), tmp_path / "compare.html")

    assert "Accuracy over rounds" not in (tmp_path / "compare.html").read_text()


def test_runs_of_one_round_and_twenty_runs_fit(make_run: Make, tmp_path: Path) -> None:
    runs = [make_run(f"r{index}", name=f"r{index}", rounds=1 + index % 2 * 40, clients=20 + index) for index in range(20)]

    write_comparison(compare_runs(runs), tmp_path / "compare.html")

    assert (tmp_path / "compare.html").stat().st_size < 200_000
