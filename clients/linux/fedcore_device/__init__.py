"""A device of the federation: trains on its own examples with numpy and ONNX Runtime, and runs the models that were released.

`Runtime` is imported when it is first asked for: the agent needs none of it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedcore_device.runtime import Runtime

__all__ = ["Runtime"]


def __getattr__(name: str) -> Any:
    if name == "Runtime":
        from fedcore_device.runtime import Runtime

        return Runtime
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
