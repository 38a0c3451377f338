"""The device's package comes from its own folder, as it does where nothing but clients/linux is installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "clients" / "linux"))
