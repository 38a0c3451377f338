"""Scenarios from files, tables and the command line."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedcore.config.conflicts import impossible
from fedcore.config.rules import hint, parse_section, show
from fedcore.config.run import RunConfig, sections
from fedcore.config.sections import TIERS, TierConfig
from fedcore.errors import Refused

__all__ = ["load_config", "parse_config"]


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and validate a scenario; ``overrides`` are ``section.key=value`` with a TOML value.

    Raises:
        Refused: unreadable file, wrong TOML, or a value that the rules do not allow; one line with file, key and rule.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise Refused(f"{path}: cannot be read: {reason}") from error
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # wrong TOML, or numbers and nesting that no reader takes
        raise Refused(f"{path}: not valid TOML: {error}") from error
    folder = tables.pop("folder", None)
    if folder is not None and not isinstance(folder, str):
        raise Refused(f"{path}: folder must be a string, got {show(folder)}")
    source = str(path)
    for override in overrides:
        _apply_override(tables, override)
        source = f"{path} with --set"
    config = parse_config(tables, source, Path(folder) if folder is not None else path.resolve().parent)
    return config if config.run.name else config.replace("run", name=path.stem)


def parse_config(tables: Mapping[str, Any], source: str, folder: Path) -> RunConfig:
    """Validate plain tables (see `load_config`); ``source`` names them in errors."""
    kinds = sections()
    values: dict[str, Any] = {}
    for name, table in tables.items():
        if name not in kinds:
            raise Refused(f"{source}: unknown section [{name}]{hint(name, kinds)}; allowed: {', '.join(kinds)}")
        if name == "tiers":
            values[name] = _parse_tiers(table, source)
            continue
        listed = name == "privacy" and isinstance(table, list)
        for one in table if listed else [table]:
            if not isinstance(one, Mapping):
                raise Refused(f"{source}: [{name}] must be a table of keys, got {show(one)}")
        parsed = [parse_section(kinds[name], name, one, source) for one in (table if listed else [table])]
        values[name] = tuple(parsed) if name == "privacy" else parsed[0]
    config = RunConfig(folder=folder, **values)
    for problem in impossible(config):
        raise Refused(f"{source}: {problem}")
    return config


def _parse_tiers(table: Any, source: str) -> dict[str, TierConfig]:
    """[tiers.NAME] by name: what is given, over the defaults of that name."""
    tiers = {}
    for name, given in table.items() if isinstance(table, Mapping) else [("", None)]:
        if not isinstance(given, Mapping) or not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", name):
            raise Refused(
                f"{source}: [tiers] must hold tables [tiers.NAME], the name of letters, digits, - and _; got {show(name)}"
            )
        parsed = parse_section(TierConfig, f"tiers.{name}", given, source)
        tiers[name] = dataclasses.replace(TIERS.get(name, TierConfig()), **{key: getattr(parsed, key) for key in given})
        if tiers[name].weight_bits not in (4, 8):
            raise Refused(f"{source}: tiers.{name}.weight_bits must be 4 or 8, got {tiers[name].weight_bits}")
    return tiers


def _apply_override(tables: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    parts = path.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise Refused(f"--set {override}: must look like section.key=value, e.g. --set training.lr=0.1")
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except (ValueError, RecursionError):
        value = text.strip()
    table = tables
    for part in parts[:-1]:
        if parts[0] == "privacy" and table.get("unit") == part:
            continue
        found = table.setdefault(part, {})
        table = _unit_table(found, parts[1], override) if isinstance(found, list) else found
        if not isinstance(table, dict):
            raise Refused(f"--set {override}: {part} is a value, not a table")
    table[parts[-1]] = value


def _unit_table(tables: list[Any], unit: str, override: str) -> Any:
    """The table of [[privacy]] that an override means: that of the unit it names, or the only one."""
    units = {one.get("unit"): one for one in tables if isinstance(one, dict)}
    if unit not in units and len(tables) != 1:
        named = ", ".join(str(name) for name in units) or "none yet"
        raise Refused(f"--set {override}: write privacy.UNIT.key with a unit of the scenario: {named}")
    return units.get(unit, tables[0])
