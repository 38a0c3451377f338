"""The example files for Prometheus: they can be read, and what they watch is what gateways tell."""

import re
from pathlib import Path

import pytest

from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.metrics import SEEN_WITHIN, Meter, exposition, run_families, view_of
from fedcore.gateway.refusals import STATUS
from fedcore.state.gateway import Standing

yaml = pytest.importorskip("yaml", reason="no PyYAML: pip install pyyaml")
FOLDER = Path(__file__).parents[2] / "deploy" / "prometheus"
SERVICE = (Path(__file__).parents[2] / "fedcore" / "gateway" / "service.py").read_text()
PROCESS = (Path(__file__).parents[2] / "fedcore" / "gateway" / "process.py").read_text()


def told(tmp_path):
    """Names of all metrics: those of meter, fleet and run as they are given, the others as the source names them."""
    (tmp_path / "config.toml").write_text("[run]\nrounds = 1\n")
    (tmp_path / "metrics.jsonl").write_text('{"round": 1, "privacy": {"client": {"epsilon": 1.0, "budget": 2.0}}}\n')
    text = exposition([*Meter().families(), *view_of([], 0.0).families(), *run_families(tmp_path)])
    return set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)) | set(re.findall(r'Family\("(fedcore_\w+)"', SERVICE + PROCESS))


def test_alerts_watch_what_is_told(tmp_path):
    names, seen = told(tmp_path), set()
    (group,) = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    assert len({rule["alert"] for rule in group["rules"]}) == len(group["rules"]) >= 6
    for rule in group["rules"]:
        assert set(rule) <= {"alert", "expr", "for", "annotations"}
        assert re.fullmatch(r"Fedcore[A-Za-z]+", rule["alert"])
        assert re.fullmatch(r"\d+[mh]", rule.get("for", "1m"))
        assert rule["annotations"]["summary"].endswith(".")
        expression = rule["expr"]
        assert expression.count("(") == expression.count(")")
        assert expression.count("{") == expression.count("}")
        used = set(re.findall(r"fedcore_\w+", expression))
        assert used <= names, used - names
        seen |= used
        for reasons in re.findall(r'reason=~?"([^"]+)"', expression):
            assert set(reasons.split("|")) <= {pb.Reason.Name(one).lower() for one in STATUS}
        for bound in re.findall(r'within_seconds="(\d+)"', expression):
            assert int(bound) in SEEN_WITHIN
        for standing in re.findall(r'standing="(\w+)"', expression):
            assert standing in set(Standing)
    assert len(seen) >= 6


def test_the_scrape_example_names_the_rules_and_an_address_that_serve_takes():
    found = yaml.safe_load((FOLDER / "scrape.yml").read_text())
    assert all((FOLDER / one).exists() for one in found["rule_files"])
    (job,) = found["scrape_configs"]
    assert job["job_name"] == "fedcore", "the alerts name it"
    (target,) = job["static_configs"][0]["targets"]
    assert re.fullmatch(r"127\.0\.0\.1:\d+", target)
    assert re.fullmatch(r"\d+s", job["scrape_interval"])
