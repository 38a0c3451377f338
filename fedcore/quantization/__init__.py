"""Quantization: fake-quant layers for training, calibration, and the int8 wire format of a model."""
