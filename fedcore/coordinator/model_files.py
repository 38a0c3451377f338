"""What a finished run leaves in ``model/``: the wire format that devices fetch, and ONNX, checked against the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedcore import __version__
from fedcore.config import LOSSES
from fedcore.coordinator.assembly import Assembly
from fedcore.coordinator.checkpoint import Progress
from fedcore.coordinator.directory import write
from fedcore.data import Examples
from fedcore.errors import FedcoreError, Refused
from fedcore.export.onnx import integer_operators, onnx_logits, to_onnx
from fedcore.models import layout_of
from fedcore.quantization.layers import set_activation_ranges
from fedcore.quantization.wire import decode_model, encode_model
from fedcore.training.evaluation import load_flat

__all__ = ["write_model"]


def write_model(directory: Path, assembly: Assembly, progress: Progress) -> tuple[dict[str, int], dict[str, Any]]:
    """Write the model after ``progress``; bytes by form, and for ONNX the accuracy of ONNX Runtime's integer kernels, the agreement
    with the model and the number of operators, or why there is no such file."""
    config, model, dataset = assembly.config, assembly.model, assembly.data.dataset
    load_flat(model, torch.from_numpy(progress.master))
    layout = layout_of(model, trainable=None)
    everything = layout.join({name: parameter.detach().numpy() for name, parameter in model.named_parameters()})
    metadata = {
        "name": config.run.name, "model": config.model.name, "round": str(progress.round_number), "version": __version__,
        "labels": json.dumps(dataset.labels), "mean": json.dumps(dataset.mean), "std": json.dumps(dataset.std),
    } | ({} if config.training.loss == LOSSES[0] else {"loss": config.training.loss})  # fmt: skip
    blob = encode_model(layout.wire_tensors(everything), progress.ranges, metadata)
    write(directory / "model.fcm", blob)
    sizes = {"fp32": 4 * layout.size, "int8" if config.quantization.enabled else "wire": len(blob)}
    set_activation_ranges(model, progress.ranges)
    received = decode_model(blob).tensors
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(received[name]))
    try:
        onnx_file = to_onnx(model, dataset.train.shape, metadata)
        predicted = onnx_logits(onnx_file, dataset.test.x).argmax(1)
        agreement = _agreement(model, dataset.test, predicted)
    except FedcoreError as error:
        return sizes, {"int8_accuracy": None, "onnx": str(error)}
    except Exception as error:  # noqa: BLE001 - an exporter that fails costs its own artefact, not the run
        return sizes, {"int8_accuracy": None, "onnx": f"ONNX export failed: {type(error).__name__}: {error}"}
    write(directory / "model.onnx", onnx_file)
    return sizes | {"onnx": len(onnx_file)}, {
        "int8_accuracy": float((predicted == dataset.test.y).mean()) if config.quantization.enabled else None,
        "agreement": agreement,
        "operators": integer_operators(onnx_file),
    }


def _agreement(model: torch.nn.Module, test: Examples, predicted: npt.NDArray[np.int64]) -> float:
    """Share of test examples that the exported file labels as the model it was made from.

    Raises:
        Refused: under 99.5 % (and more than one example): the file is not the model.
    """
    with torch.no_grad():
        expected = torch.cat([model.eval()(part).argmax(1) for part in torch.from_numpy(test.x).split(256)]).numpy()
    different = int((predicted != expected).sum())
    if different > max(1, 0.005 * len(expected)):
        raise Refused(
            f"ONNX export: the file labels {different} of {len(expected)} test examples otherwise than the model; not kept"
        )
    return 1 - different / len(expected)
