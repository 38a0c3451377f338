"""A release from what an export wrote: every artefact that passed its gate, a self-test batch, deltas from earlier releases."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from fedcore.errors import Refused
from fedcore.registry.catalogue import ARTEFACT, Entry, Item, artefact, delta, self_test
from fedcore.registry.delta import make_delta
from fedcore.registry.files import Files
from fedcore.registry.repository import State
from fedcore.registry.roles import target_name

__all__ = ["release_items", "rollback_items"]

_FACTS = ("agreement", "accuracy", "accuracy_loss")


def release_items(
    export: Path,
    model: str,
    version: int,
    batch: bytes | None,
    files: Files,
    state: State,
    bases: int = 1,
    tiers: tuple[str, ...] = (),
) -> list[Item]:
    """What to publish of a run's export.

    Args:
        export: the folder that holds export.json. batch: the self-test batch, if there is one.
        tiers: only these, all if none are named. bases: how many earlier releases get deltas to this one.

    Raises:
        Refused: there is no export, none of it passed its gate, or something that did is missing.
    """
    rows = [
        row
        for row in _rows(export)
        if row["gate"] == "pass" and row["status"] == "exported" and (not tiers or row["tier"] in tiers)
    ]
    if not rows:
        raise Refused(f"{export}: no artefact of {', '.join(tiers) or 'any tier'} passed its gate; nothing is released")
    items = [] if batch is None else [self_test(model, version, batch)]
    for row in rows:
        name, data, form = _packed(export / row["tier"] / row["target"])
        facts = {key: row[key] for key in _FACTS if row.get(key) is not None}
        item = artefact(model, version, row["tier"], row["target"], name, data, form, **facts)
        items += [item, *_deltas(item, model, version, files, state, bases)]
    unique = {item.path: item for item in items}  # tiers can share a file, and then its deltas
    return list(unique.values())


def rollback_items(files: Files, state: State, model: str, back_to: int, version: int) -> list[Item]:
    """The content of an earlier release as a new, higher one: devices that still hold it fetch nothing.

    Raises:
        Refused: there is no such release, or a file of it is missing.
    """
    old = [one for one in state.catalogue().entries if one.custom.get("model") == model and one.custom.get("version") == back_to]
    if not any(one.kind == ARTEFACT for one in old):
        raise Refused(f"the repository has no release {back_to} of {model} to go back to")
    items = []
    for one in old:
        prefix = f"releases/{model}/{back_to}/"
        if "base" not in one.custom and one.path.startswith(prefix):
            path = f"releases/{model}/{version}/{one.path.removeprefix(prefix)}"
            items.append(Item(path, _content(files, one), {**one.custom, "version": version}))
    return items


def _rows(export: Path) -> list[dict[str, Any]]:
    try:
        rows = list(json.loads((export / "export.json").read_text())["rows"])
        return [row | {name: str(row[name]) for name in ("tier", "target", "status", "gate")} for row in rows]
    except OSError as error:
        raise Refused(f"{export / 'export.json'}: {error.strerror}; fedcore export makes it") from error
    except (ValueError, KeyError, TypeError):
        raise Refused(f"{export / 'export.json'}: this is no export's table") from None


def _packed(folder: Path) -> tuple[str, bytes, str]:
    """Name, content and form of an artefact: its one file, or a tar of all of them that is the same whenever it is made."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    if not paths:
        raise Refused(f"{folder}: the artefact that passed its gate is not there")
    if len(paths) == 1 and paths[0].parent == folder:
        return paths[0].name, paths[0].read_bytes(), "file"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path in paths:
            entry = tarfile.TarInfo(path.relative_to(folder).as_posix())
            entry.size, entry.mode = path.stat().st_size, 0o644
            with path.open("rb") as file:
                archive.addfile(entry, file)
    return f"{folder.name}.tar", buffer.getvalue(), "tar"


def _deltas(item: Item, model: str, version: int, files: Files, state: State, bases: int) -> list[Item]:
    """From the last ``bases`` releases' artefacts of the same tier and runtime, where a delta is shorter than the whole."""
    wanted = {"kind": ARTEFACT, "model": model, "tier": item.custom["tier"], "runtime": item.custom["runtime"]}
    earlier = [one for one in state.catalogue().entries if wanted.items() <= one.custom.items() and one.custom["version"] < version]
    result, found = bytes.fromhex(item.target().hashes["sha256"]), []
    for one in sorted(earlier, key=lambda entry: -entry.release[1])[:bases]:
        if one.digest == result:
            continue
        change = make_delta(_content(files, one), item.data)
        if len(change) < len(item.data):
            found.append(delta(model, version, one.digest, result, change))
    return found


def _content(files: Files, entry: Entry) -> bytes:
    name = target_name(entry.path, entry.digest.hex())
    data = files.read(name)
    if data is None:
        raise Refused(f"{name}: missing; fedcore registry verify says more")
    return data
