"""The model zoo, one small model per file, and what turns a scenario's [model] into a checked, quantization-aware module."""

from fedcore.models.build import ZOO, ParameterLayout, build_model, check_model, layout_of
from fedcore.models.residual import Residual

__all__ = ["ZOO", "ParameterLayout", "Residual", "build_model", "check_model", "layout_of"]
