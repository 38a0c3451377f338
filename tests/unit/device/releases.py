"""Released models, small and real, and an agent's directory that holds them."""

import functools
import hashlib
import tempfile
from pathlib import Path

import numpy as np
import torch
from fedcore_device.environment import Conditions
from fedcore_device.installed import model_directory
from small_zoo import CLASSES, SHAPES

from fedcore.export import onnx as onnx_export
from fedcore.export.artefact import Facts
from fedcore.models import ZOO
from fedcore.quantization.integer import with_logit_peak
from fedcore.quantization.layers import calibrate, make_quantization_aware
from fedcore.quantization.lower import lower
from fedcore.registry.slots import Artefact, Release, Store

LABELS = ("up", "down", "left", "right")


@functools.cache
def written(runtime="onnx", name="mlp", seed=0, mean=(0.0,), std=(1.0,), loss=""):
    """The bytes of an exported model, its exporter's module and the examples [60, ...] that it was calibrated with."""
    torch.manual_seed(seed)
    network, x = ZOO[name](SHAPES[name], CLASSES), torch.randn(60, *SHAPES[name])
    calibrate(make_quantization_aware(network).eval(), [x])
    model = with_logit_peak(lower(network, SHAPES[name]), x.numpy())
    facts = Facts(name=name, version="1", tier="flagship", labels=LABELS, mean=mean, std=std, more={"loss": loss} if loss else {})
    with tempfile.TemporaryDirectory() as folder:
        return exporter(runtime).write(model, Path(folder), facts).read_bytes(), x.numpy()


def exporter(runtime):
    """The module whose `load` the gates run an artefact with."""
    if runtime == "onnx":
        return onnx_export
    import pytest

    pytest.importorskip("ai_edge_litert", reason="the extra [export] is not installed")
    from fedcore.export import litert

    return litert


def expected(runtime, data, x):
    """What the gate's runner says."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / {"onnx": "model.onnx", "litert": "model.tflite"}[runtime]
        path.write_bytes(data)
        return exporter(runtime).load(path, 1)(x)


def put(directory, version, files, model="digits", *, commit=True):
    """Install files, by TIER/RUNTIME, as the agent does."""
    place = model_directory(directory, model)
    place.mkdir(parents=True, exist_ok=True)
    with Store(place) as store:
        held = {}
        for name, data in files.items():
            digest = hashlib.sha256(data).hexdigest()
            store.add(data, digest)
            held[name] = Artefact(digest, len(data), "file")
        store.switch(Release(version, held))
        store.collect()
        if commit:
            store.commit()
    return place


class Around:
    """An environment whose conditions a test sets."""

    examples = ""

    def __init__(self, **found):
        self.found = Conditions(**found)

    def conditions(self, *, training):
        return self.found

    def clock(self):
        return 0.0


def rows(x, *, mean=0.0, std=1.0):
    """Examples as they were before they were normalised."""
    return (np.asarray(x) * np.float32(std) + np.float32(mean)).astype(np.float32)
