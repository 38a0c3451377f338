"""Makes `world.py` importable as ``registry_world``."""

import importlib.util
import sys
from pathlib import Path

if "registry_world" not in sys.modules:
    spec = importlib.util.spec_from_file_location("registry_world", Path(__file__).with_name("world.py"))
    sys.modules["registry_world"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["registry_world"])
