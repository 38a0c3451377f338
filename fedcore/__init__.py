"""fedcore: a federated learning coordinator with on-device, quantization-aware fine-tuning."""

__version__ = "0.1.0"
