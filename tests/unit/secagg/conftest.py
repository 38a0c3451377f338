"""Makes `world.py` and `reference.py` importable, as ``secagg_world`` and ``secagg_reference``."""

import importlib.util
import sys
from pathlib import Path

for name in ("world", "reference"):
    if f"secagg_{name}" not in sys.modules:
        spec = importlib.util.spec_from_file_location(f"secagg_{name}", Path(__file__).with_name(f"{name}.py"))
        sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[spec.name])
