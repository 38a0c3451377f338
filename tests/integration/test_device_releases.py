"""A device's agent and a real gateway on loopback: assigned, fetched by name, tried in a child, used by an app, told of."""

import asyncio
import contextlib
import hashlib
import io
import json
import sys
import threading
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch

from fedcore.export import onnx as onnx_export
from fedcore.gateway.blobs import Blobs
from fedcore.gateway.deployment import make_fleet
from fedcore.gateway.door import GatewaySettings
from fedcore.gateway.limits import Limits
from fedcore.gateway.process import GatewayServer
from fedcore.models import ZOO
from fedcore.quantization.layers import calibrate, make_quantization_aware
from fedcore.registry.catalogue import artefact, delta, self_test
from fedcore.registry.delta import make_delta
from fedcore.registry.files import LocalFiles
from fedcore.registry.keys import load_signers, make_keys
from fedcore.registry.repository import create, load, publish
from fedcore.registry.rollout import Plan, command, new_rollout
from fedcore.registry.rollout_record import encode_rollout
from fedcore.secagg.keys import read_signing_key
from fedcore.state.releases import RolloutEntry
from fedcore.state.stores import open_gateway_store

sys.path.insert(0, str(Path(__file__).parents[2] / "clients" / "linux"))

from fedcore_device import Runtime, cli
from fedcore_device.installed import installed

SHAPE, FACTS = (1, 8, 8), {"labels": json.dumps([str(k) for k in range(10)]), "mean": "[0.5]", "std": "[0.25]"}


def exported():
    """Two releases that differ a little, as after a round, and examples [50, ...]."""
    torch.manual_seed(0)
    model, x = ZOO["mlp"](SHAPE, 10), torch.randn(50, *SHAPE)
    calibrate(make_quantization_aware(model).eval(), [x])
    first = onnx_export.to_onnx(model, SHAPE, FACTS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * parameter.abs().mean() * torch.randn_like(parameter))
    return first, onnx_export.to_onnx(model, SHAPE, FACTS), x.numpy()


def batch_of(data, x):
    buffer = io.BytesIO()
    np.savez(buffer, x=x, y=onnx_export.onnx_logits(data, x).argmax(1))
    return buffer.getvalue()


class Fleet:
    """A repository, and a gateway in this process that reads it out."""

    def __init__(self, folder):
        self.files = LocalFiles(folder / "repository")
        keys = make_keys(folder / "offline", folder / "online", 1, 1, publishes=True)
        self.signers = load_signers([folder / "offline", folder / "online"])
        create(self.files, keys, self.signers, datetime.now(UTC))
        fleet = make_fleet(folder / "fleet", "watches", update_root=self.files.read("metadata/1.root.json"))
        self.signer = fleet.signer()
        self.store = open_gateway_store(str(folder / "state.sqlite"))
        settings = GatewaySettings.of(
            fleet.trust(), read_signing_key(fleet.time_key), b"s" * 32, signer=self.signer, limits=Limits(rate=100, burst=400),
            repository=self.files, release_every=60.0,
        )  # fmt: skip
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.server = self.run(self.begin(settings, folder))

    async def begin(self, settings, folder):
        where = str(folder / "state.sqlite")
        blobs = Blobs(folder / "blobs")
        server = GatewayServer(settings, lambda: open_gateway_store(where), blobs, "127.0.0.1:0", tls=None)
        await server.start()
        return server

    def run(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(120)

    def release(self, version, items):
        """Publish, and give it to all devices."""
        publish(self.files, items, self.signers, datetime.now(UTC))
        catalogue = load(self.files).catalogue()
        targets = {one: catalogue.digest("digits", one).hex() for one in range(1, version + 1)}
        state = replace(new_rollout(Plan(f"digits-{version}", "digits", version, version - 1, 100), bytes(32)), targets=targets)
        for order in ("start", "promote", "promote", "promote"):
            state = command(state, order) if state.phase != "full" else state
        document = encode_rollout(state).decode()
        assert self.store.releases.advance_rollout(RolloutEntry(f"digits-{version}", "digits", version, 1, document))

    def close(self):
        self.run(self.server.stop(0.1))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(30)
        self.loop.close()
        self.store.close()
        self.signer.close()


@pytest.fixture
def fleet(tmp_path):
    with contextlib.closing(Fleet(tmp_path)) as one:
        yield one


def test_from_a_release_to_an_apps_prediction_and_on_to_the_next_one(fleet, tmp_path, capsys):
    first, second, x = exported()
    home = tmp_path / "device"

    def device(*arguments):
        code = cli.main(["--state", str(home), *arguments])
        said = capsys.readouterr()
        assert code == 0, said
        return said.out

    fleet.release(1, [artefact("digits", 1, "flagship", "onnx", "model.onnx", first), self_test("digits", 1, batch_of(first, x))])
    device("enroll", "--server", fleet.server.address, "--token", fleet.signer.issue(600).encode(), "--plain")
    (home / "policy.toml").write_text('[updates]\nmodels = ["digits"]\n[device]\ntier = "flagship"\n')
    assert "release 1; on probation" in device("update")
    app = Runtime(home)
    np.testing.assert_array_equal(
        app.predict("digits", x * 0.25 + 0.5), onnx_export.onnx_logits(first, (x * 0.25 + 0.5 - 0.5) / 0.25)
    )
    change = make_delta(first, second)
    assert len(change) < len(second) / 2
    ends = (hashlib.sha256(first).digest(), hashlib.sha256(second).digest())
    fleet.release(2, [
        artefact("digits", 2, "flagship", "onnx", "model.onnx", second), self_test("digits", 2, batch_of(second, x)),
        delta("digits", 2, *ends, change),
    ])  # fmt: skip
    assert "release 2; on probation; before it 1" in device("update")
    np.testing.assert_array_equal(app.predict("digits", x, normalised=True), onnx_export.onnx_logits(second, x))
    assert app.labels("digits")[3] == "3"
    device("update")
    (holding,) = fleet.store.releases.holdings("digits")
    assert (holding.version, holding.tier, holding.runtime, holding.note) == (2, "flagship", "onnx", "")
    assert installed(home)["digits"].previous.version == 1
    found = json.loads(device("models", "--json"))["digits"]
    assert found["signals"]["disagreement"] == 0
    assert found["signals"]["errors"] == 0
    assert not found["problem"]
    device("forget")
    assert sorted(path.name for path in home.iterdir()) == ["lock", "policy.toml"]
