"""What a repository offers: artefacts of releases, deltas between them, public batches for the self-test, training steps.

A target's ``custom`` field (signed) says what it is; its path is unique for ever, and content under a path never changes.
Artefacts, deltas and batches are releases/MODEL/VERSION/GROUP/FILE, which the role `releases` signs; steps are steps/SHA-256, which
only the offline targets key signs: code that computes gradients on private data is worth more than a model.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tuf.api.metadata import TargetFile

from fedcore.errors import Refused
from fedcore.registry.delta import CODECS, Edge
from fedcore.registry.names import check_model

__all__ = [
    "ARTEFACT", "DELTA", "RELEASE_PATTERN", "SELF_TEST", "STEP", "Catalogue", "Entry", "Item", "artefact", "delta", "entries_of",
    "self_test", "step",
]  # fmt: skip

ARTEFACT, DELTA, SELF_TEST, STEP = "artefact", "delta", "self-test", "step"
RELEASE_PATTERN = "releases/*/*/*/*"
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_FORMS = ("file", "tar")
_LARGEST_VERSION = 2**53 - 1  # integers that every JSON reader keeps


@dataclass(frozen=True)
class Item:
    """A target to publish. ``custom`` is JSON."""

    path: str
    data: bytes
    custom: Mapping[str, Any]

    def target(self) -> TargetFile:
        """Its entry in the metadata."""
        digest = hashlib.sha256(self.data).hexdigest()
        return TargetFile(len(self.data), {"sha256": digest}, self.path, {"custom": dict(self.custom)})


@dataclass(frozen=True)
class Entry:
    """A target as its signed entry has it; ``digest`` is its SHA-256."""

    path: str
    digest: bytes
    size: int
    custom: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, target: TargetFile) -> Entry:
        """Raises Refused where the entry has no SHA-256, or says wrongly what it is."""
        custom = target.custom
        try:
            digest = bytes.fromhex(target.hashes["sha256"])
        except (KeyError, ValueError):
            digest = b""
        if len(digest) != hashlib.sha256().digest_size or not isinstance(custom, dict) or not _sound(custom):
            raise Refused(f"target {target.path!r}: its entry does not say what it is")
        return cls(target.path, digest, target.length, custom)

    @property
    def kind(self) -> str:
        """`ARTEFACT`, `DELTA`, `SELF_TEST` or `STEP`."""
        return str(self.custom["kind"])

    @property
    def release(self) -> tuple[str, int]:
        """Model and version."""
        return str(self.custom["model"]), int(self.custom["version"])


@dataclass(frozen=True)
class Catalogue:
    """All that is offered, in one consistent state of the repository."""

    entries: tuple[Entry, ...]

    def latest(self, model: str) -> int:
        """The highest release of a model; 0 if there is none."""
        return max((version for name, version in self.releases() if name == model), default=0)

    def releases(self) -> set[tuple[str, int]]:
        """Model and version of every release."""
        return {entry.release for entry in self.entries if entry.kind == ARTEFACT}

    def artefact(self, model: str, version: int, tier: str, runtime: str) -> Entry | None:
        """The file of a release for a tier and a runtime."""
        wanted = {"kind": ARTEFACT, "model": model, "version": version, "tier": tier, "runtime": runtime}
        return self._first(wanted)

    def self_test(self, model: str, version: int) -> Entry | None:
        """The public batch of a release."""
        return self._first({"kind": SELF_TEST, "model": model, "version": version})

    def step(self, digest: bytes) -> Entry | None:
        """A training step by content."""
        return next((entry for entry in self.entries if entry.kind == STEP and entry.digest == digest), None)

    def digest(self, model: str, version: int) -> bytes:
        """SHA-256 over a release's artefacts in order: tier and runtime, each after its length (4 bytes, big-endian), and hash.

        Raises:
            Refused: there is no such release.
        """
        found = sorted(
            (str(one.custom["tier"]), str(one.custom["runtime"]), one.digest)
            for one in self.entries
            if one.kind == ARTEFACT and one.release == (model, version)
        )
        if not found:
            raise Refused(f"the repository has no release {version} of {model}")
        hasher = hashlib.sha256()
        for tier, runtime, content in found:
            for name in (tier.encode(), runtime.encode()):
                hasher.update(len(name).to_bytes(4, "big") + name)
            hasher.update(content)
        return hasher.digest()

    def edges(self) -> dict[Edge, Entry]:
        """The deltas, for `fedcore.registry.delta.route`."""
        return {
            Edge(bytes.fromhex(entry.custom["base"]), bytes.fromhex(entry.custom["result"]), entry.size): entry
            for entry in self.entries
            if entry.kind == DELTA
        }

    def _first(self, wanted: Mapping[str, Any]) -> Entry | None:
        return next((entry for entry in self.entries if wanted.items() <= entry.custom.items()), None)


def artefact(model: str, version: int, tier: str, runtime: str, name: str, data: bytes, form: str = "file", **facts: Any) -> Item:
    """An artefact. ``form`` is tar where the runtime wants a folder; ``facts`` (the gate's numbers) travel along, signed, fractions
    as text: canonical JSON, over which signatures are made, has integers only.

    Raises:
        Refused: a name that cannot stand in a path.
    """
    path = _path(model, version, tier, f"{runtime}-{name}")
    custom = {"kind": ARTEFACT, "model": model, "version": version, "tier": _word(tier), "runtime": _word(runtime), "form": form}
    shown = {name: repr(value) if isinstance(value, float) else value for name, value in facts.items()}
    return Item(path, data, {**custom, **({"facts": shown} if shown else {})})


def delta(model: str, version: int, base: bytes, result: bytes, data: bytes) -> Item:
    """A delta that `fedcore.registry.delta.make_delta` made, of files whose SHA-256 are ``base`` and ``result``."""
    path = _path(model, version, "deltas", f"{base.hex()[:16]}-{result.hex()[:16]}.fcd")
    codec = CODECS[data[4] - 1]
    custom = {"kind": DELTA, "model": model, "version": version, "base": base.hex(), "result": result.hex(), "codec": codec}
    return Item(path, data, custom)


def self_test(model: str, version: int, data: bytes) -> Item:
    """The public batch with which a device tries a model before it switches to it: the bytes of an .npz with ``x`` float32
    [n, *shape], normalised, channels first, and ``y`` integers [n], the labels that the release is to give."""
    return Item(_path(model, version, "self-test", "batch.npz"), data, {"kind": SELF_TEST, "model": model, "version": version})


def step(name: str, data: bytes) -> Item:
    """A training step, named by its content."""
    return Item(f"steps/{hashlib.sha256(data).hexdigest()}", data, {"kind": STEP, "name": _word(name)})


def _path(model: str, version: int, group: str, name: str) -> str:
    if not 1 <= version <= _LARGEST_VERSION:
        raise Refused(f"a release's version is 1 to {_LARGEST_VERSION}, got {version}")
    return "/".join(("releases", check_model(model), str(version), _word(group), _word(name)))


def _word(text: str) -> str:
    if not _WORD.fullmatch(text):
        raise Refused(f"{text!r} cannot name a target: 1 to 64 letters, digits, dots, dashes and underscores, no dash or dot first")
    return text


def _sound(custom: Mapping[str, Any]) -> bool:
    kind = custom.get("kind")
    if kind == STEP:
        return True
    version = custom.get("version")
    if not (isinstance(custom.get("model"), str) and type(version) is int and 1 <= version <= _LARGEST_VERSION):
        return False
    if kind == ARTEFACT:
        return all(isinstance(custom.get(key), str) for key in ("tier", "runtime")) and custom.get("form") in _FORMS
    if kind == DELTA:
        return _are_digests(custom.get("base"), custom.get("result"))
    return kind == SELF_TEST


def _are_digests(*texts: object) -> bool:
    return all(isinstance(text, str) and re.fullmatch(r"[0-9a-f]{64}", text, re.ASCII) for text in texts)


def entries_of(targets: Iterable[TargetFile]) -> tuple[Entry, ...]:
    """Entries of the targets that this version of fedcore knows; others' kinds are passed over."""
    known = {ARTEFACT, DELTA, SELF_TEST, STEP}
    return tuple(Entry.of(one) for one in targets if isinstance(one.custom, dict) and one.custom.get("kind") in known)
