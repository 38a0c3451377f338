"""The protocol is frozen: what devices in the field rely on can only be added to."""

import json
from pathlib import Path

import pytest

from fedcore.errors import Refused
from fedcore.gateway import gateway_pb2
from fedcore.gateway.freeze import FROZEN, broken_promises, describe, generate

HERE = Path(gateway_pb2.__file__).parent


def test_the_generated_code_is_that_of_the_file(tmp_path):
    generate(tmp_path)
    for name in ("gateway_pb2.py", "gateway_pb2.pyi"):
        assert (tmp_path / "fedcore" / "gateway" / name).read_text() == (HERE / name).read_text(), "run fedcore.gateway.freeze"


def test_nothing_that_was_frozen_has_changed():
    frozen, now = json.loads(FROZEN.read_text()), describe()
    assert not broken_promises(frozen, now)
    assert frozen == now, "new fields are frozen with python -m fedcore.gateway.freeze"


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("fixed64 device = 3;", "fixed64 device = 30;", "SignedRequest.device"),
        ("fixed64 device = 3;", "uint64 device = 3;", "SignedRequest.device"),
        ("fixed64 device = 3;", "fixed64 unit = 3;", "SignedRequest.device"),
        ("repeated Blob blobs = 8;", "Blob blobs = 8;", "Plan.blobs"),
        ("optional double loss = 10;", "double loss = 10;", "ReportBody.loss"),
        ("at most five minutes", "at most an hour", "SignedRequest.time_ms"),
        ("REVOKED = 7;", "REVOKED = 77;", "Reason.REVOKED"),
        ("message Value {\n  oneof kind {\n", "message Value {\n  oneof sort {\n", "Value.data"),
        ("returns (stream FetchReply)", "returns (FetchReply)", "Gateway.Fetch"),
        ("string runtime = 4;", "", "CheckInBody.runtime"),
    ],
)
def test_a_field_that_changes_number_type_or_meaning_is_found(tmp_path, old, new, named):
    text = (HERE / "gateway.proto").read_text()
    assert text.count(old) == 1
    changed = tmp_path / "gateway.proto"
    changed.write_text(text.replace(old, new))
    assert any(line.startswith(f"{named}:") for line in broken_promises(json.loads(FROZEN.read_text()), describe(changed)))


def test_a_new_field_breaks_nothing(tmp_path):
    text = (HERE / "gateway.proto").read_text()
    changed = tmp_path / "gateway.proto"
    changed.write_text(text.replace("message ReportReply {", "message ReportReply {\n  // New.\n  string advice = 3;"))
    now = describe(changed)
    assert now["ReportReply.advice"] == "3: string; New."
    assert not broken_promises(json.loads(FROZEN.read_text()), now)


def test_a_file_that_protoc_refuses_is_named(tmp_path):
    (tmp_path / "gateway.proto").write_text("message")
    with pytest.raises(Refused, match=r"gateway\.proto: protoc refuses it"):
        describe(tmp_path / "gateway.proto")


def test_every_field_is_documented():
    assert {name for name, text in describe().items() if "; " not in text} == {
        "Reason.REASON_UNSPECIFIED", "Kind.KIND_UNSPECIFIED", "Aggregation.AGGREGATION_UNSPECIFIED", "Outcome.OUTCOME_UNSPECIFIED",
    }  # fmt: skip
