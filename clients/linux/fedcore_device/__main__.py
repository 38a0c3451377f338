"""`python -m fedcore_device` is `fedcore-device`."""

import sys

from fedcore_device.cli import main

sys.exit(main())
