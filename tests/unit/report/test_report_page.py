"""The report of one run: the right numbers, safe with any name, and always one self-contained file."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedcore.errors import Refused, TryAgain
from fedcore.report import read_run
from fedcore.report.page import write_report

Make = Callable[..., Path]

VOID = {"meta", "link"}
EVIL = "<script>alert('x')\"&<b>"


class Outline(HTMLParser):
    """Checks that elements nest; collects the text, the element names and the attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes += attrs
        self.open += [tag] if tag not in VOID else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(word for word in self.words if word)


def outline(directory: Path) -> Outline:
    """The written report, after the checks that hold for each one."""
    page = write_report(directory).read_text(encoding="utf-8")
    seen = Outline()
    seen.feed(page)
    assert seen.open == []
    assert not seen.names & {"script", "img", "iframe", "object", "embed", "base", "form"}
    assert not re.search(r"https?:|@import|url\(", page)
    loads = [value for name, value in seen.attributes if name in ("src", "href", "srcset")]
    assert loads == ["data:,"]
    shapes = " ".join(value or "" for name, value in seen.attributes if name in ("d", "x", "width", "style"))
    assert not re.search(r"\b(nan|inf)\b", shapes)
    return seen


def edit(path: Path, **values: Any) -> None:
    """Change some keys of a JSON object on disk."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_rounds(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        change(record)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_the_headline_shows_the_result(make_run: Make) -> None:
    directory = make_run(rounds=12)
    result = directory / "result.json"
    edit(result, accuracy=348 / 360, int8_accuracy=345 / 360, seconds=3725.0, clients_per_second=812.4)
    edit(result, bytes_up=1_234_000_000, bytes_down=5_600_000)

    text = outline(directory).text

    assert "int8 accuracy 95.83%" in text and "fp32 accuracy 96.67%" in text
    assert "int8 minus fp32 \u22123 of 360 test examples (\u22120.83 points)" in text
    assert "standard error 1.05 points" in text
    assert "traffic up 1.23 GB 103 MB a round" in text and "traffic down 5.6 MB" in text
    assert "clients a second 812" in text and "time 1 h 02 min" in text
    assert "engine loop cpu: one torch thread per process" in text
    assert "int8 model 21 kB fp32 80 kB, onnx 25 kB, 20,000 parameters" in text
    assert "finished" in text and "unfinished" not in text
    assert "seed 0" in text and "partition " + "9f2c" * 16 in text and "fedcore 0.1.0" in text


def test_no_sign_before_a_gap_of_zero(make_run: Make) -> None:
    directory = make_run()
    edit(directory / "result.json", accuracy=0.9, int8_accuracy=0.9)

    assert "int8 minus fp32 0 of 360 test examples (0.00 points)" in outline(directory).text


def test_curves_show_every_evaluation_at_its_place(make_run: Make) -> None:
    directory = make_run(rounds=5, federated_every=1, freeze=2)
    edit_rounds(directory, lambda record: record.update(accuracy=record["round"] / 10))
    write_report(directory)

    page = (directory / "report.html").read_text()

    assert "<title>round 3\nquantized, as clients receive it: " in page
    for index in range(1, 6):
        assert f"fp32 master: {index * 10}%" in page
    assert "activation ranges frozen" in page and "5th to 95th percentile" in page


def test_the_freeze_is_marked_at_its_round(make_run: Make) -> None:
    page = write_report(make_run(rounds=10, freeze=6)).read_text()

    assert re.search(r'class="note left" style="--x:55\.00%">activation ranges frozen', page)


def test_a_name_from_a_user_cannot_become_markup(make_run: Make) -> None:
    directory = make_run(name=EVIL)
    edit_rounds(directory, lambda record: record.update(dropped=[{"client": EVIL, "reason": EVIL}]))
    edit(directory / "partition.json", labels=[EVIL + str(label) for label in range(10)], digest=EVIL)
    edit(directory / "result.json", engine=EVIL, engine_reason=EVIL)

    seen = outline(directory)

    assert seen.text.count(EVIL) >= 30
    assert "<script" not in (directory / "report.html").read_text()


def test_an_unfinished_run_says_so_and_never_claims_int8(make_run: Make) -> None:
    text = outline(make_run(rounds=7, planned=40)).text

    assert "unfinished: round 7 of 40" in text and "rounds 7 of 40" in text
    assert "quantized accuracy" in text and "simulated in float" in text
    assert "int8 accuracy" not in text and "the shipped model" not in text


def test_a_run_before_its_first_round(make_run: Make) -> None:
    directory = make_run(rounds=1, planned=5)
    for name in ("metrics.jsonl", "partition.json", "clients.json"):
        (directory / name).unlink()

    text = outline(directory).text

    assert "No round is on record yet" in text and "unfinished: round 0 of 5" in text


def test_a_run_of_one_round(make_run: Make) -> None:
    seen = outline(make_run(rounds=1, federated_every=1, freeze=1))

    assert "Traffic per round" in seen.text and "Labels on the clients" in seen.text


@pytest.mark.parametrize(
    "missing", ["accuracy", "train_loss", "update_norm", "timing", "bytes_up", "federated", "dropped", "quantized"]
)
def test_any_optional_number_may_be_missing(make_run: Make, missing: str) -> None:
    directory = make_run(rounds=6, federated_every=1)
    edit_rounds(directory, lambda record: record.pop(missing, None))

    assert "Configuration" in outline(directory).text


def test_bare_rounds_and_a_bare_result_still_make_a_report(make_run: Make) -> None:
    directory = make_run(rounds=3)
    (directory / "metrics.jsonl").write_text('{"round": 1}\n{"round": 2, "loss": NaN, "timing": {}, "federated": {}}\n')
    (directory / "result.json").write_text("{}")

    assert "int8 accuracy \u2013" in outline(directory).text


def test_fp32_runs_do_not_speak_of_quantization(make_run: Make) -> None:
    directory = make_run(rounds=4, freeze=99, planned=4)
    config = read_run(directory).config.replace("quantization", enabled=False)
    (directory / "config.toml").write_text(config.to_toml())

    text = outline(directory).text

    assert "int8 minus fp32" not in text and "activation ranges frozen" not in text


def test_two_thousand_clients_and_a_thousand_rounds_stay_small(make_run: Make) -> None:
    directory = make_run(rounds=1000, clients=2000, cohort=100)

    seen = outline(directory)

    assert (directory / "report.html").stat().st_size < 1_000_000
    assert "120 of 2,000 clients, evenly sampled" in seen.text
    assert "are drawn, evenly by size" in seen.text and "mean of each 5 neighbouring rounds" in seen.text


def test_many_labels_are_grouped(make_run: Make) -> None:
    directory = make_run(clients=30)
    labels = [f"class {index}" for index in range(350)]
    counts = [[int((client + label) % 30 == 0) for label in range(350)] for client in range(30)]
    edit(directory / "partition.json", labels=labels, label_counts=counts)

    assert "a row 4 neighbouring labels" in outline(directory).text


def test_clients_that_did_not_evaluate_are_left_out(make_run: Make) -> None:
    directory = make_run(clients=4)
    edit(directory / "clients.json", round=9, accuracy=[None, 0.25, 1.0, 0.5], examples=[8, 8, 4, 0])

    text = outline(directory).text

    assert "2 clients after round 9." in text and "Lowest: client 1 (25% of 8), client 2 (100% of 4)." in text


def test_without_client_results_the_examples_are_shown(make_run: Make) -> None:
    directory = make_run(clients=3, per_client=False)
    edit(directory / "partition.json", labels=["a", "b"], label_counts=[[10, 0], [0, 30], [5, 15]])

    text = outline(directory).text

    assert "60 examples; 10 to 30 a client, median 20. The coordinator keeps 360 for test and 128 for calibration." in text
    assert "Clients by accuracy" not in text


def test_dropped_clients_are_counted_and_listed_up_to_a_limit(make_run: Make) -> None:
    directory = make_run(rounds=30)
    some = [{"client": client, "reason": "too slow" if client else "not finite"} for client in range(10)]
    edit_rounds(directory, lambda record: record.update(dropped=some))

    text = outline(directory).text

    assert "300 replies of 10 clients" in text and "too slow 270 not finite 30" in text
    assert "One by one, the first 200" in text and "300 clients dropped" in text


def test_settings_show_what_was_changed(make_run: Make) -> None:
    page = write_report(make_run(clients=37)).read_text()

    assert re.search(r'class="set"><td>clients</td><td>37</td>', page)
    assert re.search(r'<tr title="[^"]+"><td>momentum</td><td>0.0</td>', page)


def test_the_same_run_gives_the_same_bytes_and_no_rest(make_run: Make) -> None:
    directory = make_run()
    before = set(directory.iterdir())

    first = write_report(directory).read_bytes()

    assert write_report(directory).read_bytes() == first
    assert set(directory.iterdir()) - before == {directory / "report.html"}


def test_a_failed_write_leaves_the_old_report(make_run: Make) -> None:
    directory = make_run()
    (directory / "report.html").mkdir()

    with pytest.raises(Refused, match=r"report\.html: cannot be written"):
        write_report(directory)
    assert not list(directory.glob(".report*"))


def test_a_full_disk_is_worth_another_try(make_run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_run()
    old = write_report(directory).read_bytes()

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)

    with pytest.raises(TryAgain, match="No space left"):
        write_report(directory)
    assert (directory / "report.html").read_bytes() == old
