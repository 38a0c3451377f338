"""The rule of a key: what it allows, what it means, and how a value is held against it."""

from __future__ import annotations

import difflib
import math
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field, fields
from typing import Any

import tomli_w

from fedcore.errors import Refused

__all__ = ["allowed", "hint", "key", "parse_section", "show", "toml_value"]


def key(
    default: Any, text: str, *, low: float | None = None, above: float | None = None, high: float | None = None,
    choices: Sequence[str] = (), named: Sequence[str] = (), reference: str = "", word: str = "",
) -> Any:  # fmt: skip
    """A field with its rule: ``low <= value <= high``, ``value > above``, one of ``choices``; or one of ``named`` or a
    ``module:attribute`` where ``reference`` says what it should be; or ``word`` instead of a number."""
    rule = {
        "help": text, "low": low, "above": above, "high": high, "choices": choices, "named": named, "reference": reference,
        "word": word,
    }  # fmt: skip
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=rule)
    return field(default=default, metadata=rule)


def parse_section(kind: type, name: str, table: Mapping[str, Any], source: str) -> Any:
    """The section ``name`` of class ``kind`` from a table; ``source`` names it in errors.

    Raises:
        Refused: an unknown key, or a value that its rule does not allow.
    """
    keys = {key.name: key for key in fields(kind)}
    kinds = typing.get_type_hints(kind)
    values = {}
    for key, value in table.items():
        if key not in keys:
            raise Refused(f"{source}: unknown key {name}.{key}{hint(key, keys)}; [{name}] allows: {', '.join(keys)}")
        rule = keys[key].metadata
        parsed = value if rule["word"] and value == rule["word"] else _coerce(value, _number_kind(kinds[key]))
        if parsed is None or not _permitted(parsed, rule):
            raise Refused(
                f"{source}: {name}.{key} must be {allowed(kinds[key], rule)}, got {show(value)}"
                f"{hint(str(value), (*rule['choices'], *rule['named']))}"
            )
        values[key] = parsed
    return kind(**values)


def _number_kind(kind: Any) -> Any:
    """The type of a key's values, where a word may stand for a number too."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Union else kind


def _coerce(value: Any, kind: Any) -> Any:
    """``value`` as ``kind``, or None where it is of another type (an integer is accepted for a float)."""
    if typing.get_origin(kind) is tuple:
        return tuple(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else None
    if typing.get_origin(kind) is dict:
        return value if isinstance(value, dict) else None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 2**63 else None
    if isinstance(value, bool) and kind is not bool:
        return None
    return value if isinstance(value, kind) else None


def _permitted(value: Any, rule: Mapping[str, Any]) -> bool:
    if isinstance(value, float) and not math.isfinite(value):
        return False
    if rule["choices"] and value not in rule["choices"]:
        return False
    if rule["word"] and value == rule["word"]:
        return True
    if rule["named"] and value not in rule["named"]:
        module, colon, attribute = value.partition(":")
        return bool(colon and module and attribute)
    if isinstance(value, tuple):
        return len(value) >= (rule["low"] or 0)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return True
    low, above, high = rule["low"], rule["above"], rule["high"]
    return (low is None or value >= low) and (above is None or value > above) and (high is None or value <= high)


def allowed(kind: Any, rule: Mapping[str, Any]) -> str:
    """In words what a key of type ``kind`` may be."""
    if rule["choices"]:
        return "one of " + ", ".join(rule["choices"])
    if rule["named"]:
        return "one of " + ", ".join(rule["named"]) + f" or module:{rule['reference']}"
    kind = _number_kind(kind)
    origin = typing.get_origin(kind)
    name = {
        int: "an integer",
        float: "a number",
        str: "a string",
        bool: "true or false",
        tuple: "a list of strings" + (" of length" if rule["low"] else ""),
        dict: "a table",
    }[origin or kind]
    limits = [f">= {rule['low']}"] if rule["low"] is not None else []
    limits += [f"> {rule['above']}"] if rule["above"] is not None else []
    limits += [f"<= {rule['high']}"] if rule["high"] is not None else []
    either = f", or {rule['word']}" if rule["word"] else ""
    return " ".join([name, " and ".join(limits)]).strip() + either


def hint(name: str, known: Iterable[str]) -> str:
    """The known name that is meant, if one is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def show(value: Any) -> str:
    """A value as an error quotes it, at most 60 characters."""
    text = toml_value(value) if isinstance(value, (str, int, float, bool, list, dict)) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def toml_value(value: Any) -> str:
    """A value as TOML writes it in one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return tomli_w.dumps({"v": value}).removeprefix("v = ").strip()
