"""Writes deltas.json: one pair of files for each codec, with the delta that gives the second from the first."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from pathlib import Path

import numpy as np

from fedcore.quantization.wire import ModelTensor, encode_model
from fedcore.registry.delta import CODECS, make_delta


def main() -> None:
    """Write the file beside this one."""
    rng = np.random.default_rng(7)
    before = rng.normal(0, 1, (4, 3, 3)).astype(np.float32)
    after = before * np.array([0.5, 1, 1.1, 3], np.float32)[:, None, None] + rng.normal(0, 0.02, before.shape).astype(np.float32)
    bias, gain = before[:, 0, 0], before[0, 0]
    base, result = (
        encode_model(
            [ModelTensor("weight", v, "int8"), ModelTensor("bias", bias + v[0, 0, 0], "fp16"), ModelTensor("gain", gain, "fp32")]
        )
        for v in (before, after)
    )  # fmt: skip
    cases = []
    for codec in CODECS:
        delta = make_delta(base, result, [codec])
        cases.append({
            "codec": codec, "base": base64.b64encode(base).decode(), "delta": base64.b64encode(delta).decode(),
            "sha256": hashlib.sha256(result).hexdigest(), "length": len(result), "crc32": zlib.crc32(result),
        })  # fmt: skip
    Path(__file__).with_name("deltas.json").write_text(json.dumps(cases, indent=2) + "\n")


if __name__ == "__main__":
    main()
