"""What people mistype for a rehearsal and its judgement: one line, exit code 2, and nothing is begun."""

import pytest
from typer.testing import CliRunner

from fedcore.cli import app
from fedcore.coordinator.fleet import FleetFolder


def refused(*words):
    found = CliRunner().invoke(app, ["chaos", *map(str, words)])
    assert found.exit_code == 2, (found.output, found.exception)
    assert len(found.stderr.strip().splitlines()) == 1
    return found.stderr


@pytest.mark.parametrize("name", ["every", "seconds"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_span_of_time_is_a_number(tmp_path, name, value):
    (tmp_path / "scenario.toml").write_text("")
    said = refused("run", tmp_path / "scenario.toml", "--out", tmp_path / "out", f"--{name}", value)
    assert f"--{name}: takes a number of seconds, got {value}" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("option", "what"), [("log", "file"), ("acknowledged", "file"), ("uploads", "folder")])
def test_what_is_to_be_searched_has_to_be_there(tmp_path, option, what):
    FleetFolder.open(tmp_path / "fleet", "watches")
    said = refused("check", tmp_path, "--fleet", tmp_path / "fleet", f"--{option}", tmp_path / "missing")
    assert f"--{option} {tmp_path / 'missing'}: there is no such {what}" in " ".join(said.split())
