"""fedcore: a federated learning coordinator with on-device, quantization-aware fine-tuning."""

import os

__version__ = "0.1.0"

# ONNX Runtime reports its use to its maker, since 1.30 also on Linux, under an identifier that it leaves in the user's cache. It
# reads this when it is loaded, and child processes inherit it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
