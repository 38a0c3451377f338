"""A device of the federation: trains on its own examples with numpy and ONNX Runtime."""
