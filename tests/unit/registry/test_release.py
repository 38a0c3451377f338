"""From an export's folder to targets: what passed its gate, whole folders as one reproducible file, deltas, and the way back."""

import io
import json
import tarfile

import numpy as np
import pytest
from registry_world import NOW, FakeClock

from fedcore.errors import Refused
from fedcore.registry.audit import audit
from fedcore.registry.client import Client
from fedcore.registry.delta import apply_delta
from fedcore.registry.fetch import DirectoryFetcher
from fedcore.registry.files import LocalFiles
from fedcore.registry.keys import load_signers, make_keys
from fedcore.registry.release import release_items, rollback_items
from fedcore.registry.repository import create, load, publish


@pytest.fixture
def world(tmp_path):
    keys = make_keys(tmp_path / "offline", tmp_path / "online", 1, 1, publishes=True)
    files, signers = LocalFiles(tmp_path / "repository"), load_signers([tmp_path / "offline", tmp_path / "online"])
    create(files, keys, signers, NOW)
    return tmp_path, files, signers


def export(place, seed, **gates):
    """A folder as `fedcore export` leaves it."""
    rng = np.random.default_rng(7)
    weights = rng.integers(-127, 128, 30_000, np.int8)
    weights[:: 50 + seed] += 1
    rows = []
    for tier, target, names in (
        ("entry", "onnx", ["model.onnx"]),
        ("entry", "ncnn", ["model.param", "deep/model.bin"]),
        ("wearable", "onnx", ["model.onnx"]),
    ):
        folder = place / tier / target
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(name.encode() + tier.encode() + weights.tobytes())
        row = {
            "tier": tier,
            "target": target,
            "status": "exported",
            "gate": gates.get(f"{tier}_{target}", "pass"),
            "agreement": 0.995,
        }
        rows.append({**row, "accuracy": 0.9, "accuracy_loss": None})
    (place / "export.json").write_text(json.dumps({"rows": rows}))
    return place


def test_a_release_holds_what_passed_and_deltas_from_the_one_before(world):
    place, files, signers = world
    publish(files, release_items(export(place / "1", 1), "digits", 1, b"batch", files, load(files)), signers, NOW)
    items = release_items(export(place / "2", 2, wearable_onnx="fail"), "digits", 2, b"batch", files, load(files))
    publish(files, items, signers, NOW)
    assert audit(files, NOW) == []
    pin = files.read("metadata/1.root.json")
    client = Client(place / "device", DirectoryFetcher(place / "repository"), pin, FakeClock())
    found = client.refresh(NOW, 9.0)
    assert found.artefact("digits", 1, "wearable", "onnx") is not None
    assert found.artefact("digits", 2, "wearable", "onnx") is None
    one, two = (found.artefact("digits", version, "entry", "onnx") for version in (1, 2))
    assert two.custom["facts"] == {"agreement": "0.995", "accuracy": "0.9"}
    edge = next(edge for edge in found.edges() if edge.result == two.digest)
    change = client.download(found.edges()[edge], 9.0).read_bytes()
    assert len(change) < two.size / 5
    assert (
        apply_delta(client.download(one, 9.0).read_bytes(), change, two.digest, two.size) == client.download(two, 9.0).read_bytes()
    )
    ncnn = found.artefact("digits", 2, "entry", "ncnn")
    assert ncnn.custom["form"] == "tar"
    with tarfile.open(fileobj=io.BytesIO(client.download(ncnn, 9.0).read_bytes())) as archive:
        assert archive.getnames() == ["deep/model.bin", "model.param"]
        assert archive.extractfile("model.param").read() == (place / "2" / "entry" / "ncnn" / "model.param").read_bytes()


def test_the_same_export_gives_the_same_bytes(world):
    place, files, _ = world
    first = release_items(export(place / "1", 1), "digits", 1, None, files, load(files))
    again = release_items(export(place / "2", 1), "digits", 1, None, files, load(files))
    assert first == again


def test_a_rollback_is_old_content_under_a_higher_version(world):
    place, files, signers = world
    for version in (1, 2):
        publish(
            files,
            release_items(export(place / str(version), version), "digits", version, b"b%d" % version, files, load(files)),
            signers,
            NOW,
        )
    publish(files, rollback_items(files, load(files), "digits", 1, 3), signers, NOW)
    found = load(files).catalogue()
    assert found.digest("digits", 3) == found.digest("digits", 1) != found.digest("digits", 2)
    assert found.self_test("digits", 3).digest == found.self_test("digits", 1).digest
    assert audit(files, NOW) == []
    with pytest.raises(Refused, match="no release 9"):
        rollback_items(files, load(files), "digits", 9, 10)


def test_only_some_tiers_and_nothing_that_failed(world):
    place, files, _ = world
    folder = export(place / "1", 1, entry_onnx="fail", entry_ncnn="fail")
    items = release_items(folder, "digits", 1, None, files, load(files), tiers=("wearable",))
    assert [item.path for item in items] == ["releases/digits/1/wearable/onnx-model.onnx"]
    with pytest.raises(Refused, match="no artefact of entry passed"):
        release_items(folder, "digits", 1, None, files, load(files), tiers=("entry",))
    (folder / "wearable" / "onnx" / "model.onnx").unlink()
    with pytest.raises(Refused, match="is not there"):
        release_items(folder, "digits", 1, None, files, load(files))
    for table in ("[]", '{"rows": "abc"}', '{"rows": [{}]}', '{"rows": [{"gate": "pass", "status": "exported"}]}'):
        (folder / "export.json").write_text(table)
        with pytest.raises(Refused, match="no export's table"):
            release_items(folder, "digits", 1, None, files, load(files))
    with pytest.raises(Refused, match="fedcore export makes it"):
        release_items(place, "digits", 1, None, files, load(files))
