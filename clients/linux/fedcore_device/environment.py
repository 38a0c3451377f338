"""What surrounds an agent: examples, conditions and clock.

`Environment` is what an agent needs of a machine; `LinuxEnvironment` reads it from /sys and /proc.
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from fedcore.errors import Refused

__all__ = ["Conditions", "Environment", "LinuxEnvironment", "energy_used", "hardware_name"]

_BUSY = 0.5  # load of a core, in the last minute, above which somebody uses the device
_OTHERS = ("wwan", "ppp", "wwp", "usb", "rmnet")  # beginnings of names of interfaces that are paid by the byte


@dataclass(frozen=True)
class Conditions:
    """How things are. ``battery_percent`` is None without a battery; ``temperature`` the hottest sensor in degrees Celsius, None
    without one; ``free_storage`` in bytes where the agent keeps its files."""

    charging: bool = True
    unmetered: bool = True
    idle: bool = True
    battery_percent: int | None = None
    temperature: float | None = None
    free_storage: int = 0


_KINDS: Mapping[str, Any] = {
    "charging": bool, "unmetered": bool, "idle": bool, "battery_percent": int | None, "temperature": float | int | None,
    "free_storage": int,
}  # fmt: skip


class Environment(Protocol):
    """What an agent is given by the machine it runs on, or by a test."""

    @property
    def examples(self) -> str:
        """Where the child that trains finds the examples: ``module:function``, or a directory of .npz files."""
        ...

    def conditions(self, *, training: bool) -> Conditions:
        """How things are now; ``training``: one core is busy with the agent's own work."""
        ...

    def clock(self) -> float:
        """Unix seconds by the device's clock, which may be wrong."""
        ...


class LinuxEnvironment:
    """The conditions of a Linux machine; ``directory`` is where the agent keeps its files.

    Without a power supply of any kind in /sys it hangs on a wire. ``override``: a JSON file whose keys, those of `Conditions`,
    take the place of what is sensed, as a host application knows better, or a test.
    """

    def __init__(
        self, directory: Path, examples: str, *, override: Path | None = None, root: Path = Path("/"),
        clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self.examples = examples
        self._directory, self._override, self._root, self._clock = directory, override, root, clock

    def clock(self) -> float:
        """See `Environment`."""
        return self._clock()

    def conditions(self, *, training: bool) -> Conditions:
        """See `Environment`.

        Raises:
            Refused: the file with overrides holds something else.
        """
        charging, battery = self._power()
        found = Conditions(
            charging, self._unmetered(), self._idle(training=training), battery, self._temperature(),
            shutil.disk_usage(next(one for one in (self._directory, *self._directory.absolute().parents) if one.exists())).free,
        )  # fmt: skip
        return _overridden(found, self._override) if self._override else found

    def _power(self) -> tuple[bool, int | None]:
        """Whether it is on external power, and the battery's charge."""
        supplies = [path for path in self._glob("sys/class/power_supply/*") if _text(path / "scope") != "Device"]
        wires = [path for path in supplies if _text(path / "type") != "Battery"]
        batteries = [path for path in supplies if _text(path / "type") == "Battery"]
        charges = [int(text) for path in batteries if (text := _text(path / "capacity")).isdigit()]
        plugged = any(_text(path / "online") == "1" for path in wires)
        filled = any(_text(path / "status") in {"Charging", "Full"} for path in batteries)
        return plugged or filled or not batteries, min(charges, default=None)

    def _unmetered(self) -> bool:
        """Whether no default route leads over a modem."""
        lines = _text(self._root / "proc/net/route").splitlines()[1:]
        names = {fields[0] for line in lines if len(fields := line.split()) > 1 and fields[1] == "00000000"}
        return not any(
            name.startswith(_OTHERS) or "DEVTYPE=wwan" in _text(self._root / "sys/class/net" / name / "uevent") for name in names
        )

    def _idle(self, *, training: bool) -> bool:
        load = _text(self._root / "proc/loadavg").split()
        cores = _text(self._root / "proc/cpuinfo").count("processor\t") or 1
        return not load or float(load[0]) - training <= _BUSY * cores

    def _temperature(self) -> float | None:
        texts = [_text(path) for path in self._glob("sys/class/thermal/thermal_zone*/temp")]
        return max((int(text) / 1000 for text in texts if text.lstrip("-").isdigit()), default=None)

    def _glob(self, pattern: str) -> list[Path]:
        return sorted(self._root.glob(pattern))


def hardware_name(root: Path = Path("/")) -> str:
    """What the machine is called, as "Raspberry Pi 4 Model B Rev 1.4"; its architecture where it has no name."""
    return (_text(root / "proc/device-tree/model").strip("\x00") or platform.machine())[:64]


def energy_used(root: Path = Path("/")) -> float | None:
    """Joules that the machine has used since some moment, by its processors' counters or its board's meters; None where it has none
    that may be read. Counters begin anew now and then: a difference below 0 says nothing."""
    for pattern in ("sys/class/powercap/*:[0-9]/energy_uj", "sys/class/hwmon/hwmon*/energy*_input"):
        if found := [int(text) for path in sorted(root.glob(pattern)) if (text := _text(path)).isdigit()]:
            return sum(found) / 1e6
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _overridden(found: Conditions, file: Path) -> Conditions:
    try:
        table: Mapping[str, Any] = json.loads(file.read_text())
        changed = replace(found, **table)
        for name, value in table.items():
            if not isinstance(value, _KINDS[name]) or isinstance(value, bool) != (_KINDS[name] is bool):
                raise TypeError(f"{name} is {value!r}")
        return changed
    except FileNotFoundError:
        return found
    except (OSError, ValueError, TypeError) as error:
        raise Refused(f"{file}: it must hold a JSON object with keys of the conditions ({error})") from error
