"""The portable training step: the gradient of a batch as an ONNX graph, for devices that have no torch."""
