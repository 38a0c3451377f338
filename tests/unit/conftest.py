"""Makes `small_zoo.py` importable as ``small_zoo``."""

import importlib.util
import sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("small_zoo", Path(__file__).with_name("small_zoo.py"))
sys.modules["small_zoo"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["small_zoo"])
