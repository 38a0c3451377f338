"""Inference for an app with the models that the agent installed: `Runtime(DIR).predict("digits", x)`.

The app and the agent share nothing but files. Which release is installed is one small file that changes by a rename; every call
looks whether it changed (one stat), so that a new release is taken up without a restart, while calls that run end on the model they
began with. Models are loaded when they are first asked for, and the least recently used ones go when memory is short.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedcore.errors import FedcoreError, Refused, TryAgain
from fedcore.registry.slots import POINTER, Artefact, Release, read_pointer
from fedcore_device.environment import Environment, LinuxEnvironment
from fedcore_device.installed import TIERS, health_path, model_directory, read_trials
from fedcore_device.runtime_arguments import check_options, checked_examples, not_installed
from fedcore_device.runtime_artefact import CPU, Opened, default_delegates, usable_runtimes
from fedcore_device.runtime_delegates import finite, give_up_delegate, one_line, open_through
from fedcore_device.runtime_health import HealthFile
from fedcore_device.runtime_server import Ask, SecondOpinion, ask_url, probabilities_of
from fedcore_device.runtime_tier import Strain, StrainWatch

__all__ = ["Loaded", "Runtime"]

_LOG = logging.getLogger(__name__)
_TRIES = 5  # looks at a pointer that changes while its files are opened

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model in memory; ``bytes`` are what it takes, as measured."""

    model: str
    version: int
    name: str
    digest: str
    bytes: int
    opened: Opened
    health: HealthFile


@dataclass(frozen=True)
class _Seen:
    """A pointer file as it was last seen, and the release that it named."""

    signature: tuple[int, ...]
    release: Release


class Runtime:
    """Models for one process; any number of threads may use it, and any number of processes the same directory.

    Args:
        directory: the agent's (`fedcore-device --state`).
        memory: bytes that loaded models may take together. threads: of one prediction.
        tiers: the largest first, others follow by size; the second of those installed runs while the device is strained.
        delegates: by runtime, what is tried in turn before the CPU; all that ONNX Runtime was built with if not given.
        strain: when the lower tier runs. environment: where conditions come from; this machine if None.
        server: asked about examples whose most probable class is below ``confidence``: a function, or an https URL. **These
            examples leave the device.** None, the default: nothing ever does. ``server_seconds``: how long it is waited for.

    Raises:
        Refused: an argument that cannot be.
    """

    def __init__(
        self, directory: Path | str, *, memory: int = 256 << 20, threads: int = 1, tiers: Sequence[str] = TIERS,
        delegates: Mapping[str, Sequence[str]] | None = None, strain: Strain | None = None, environment: Environment | None = None,
        server: Ask | str | None = None, confidence: float = 0.5, server_seconds: float = 1.0,
    ) -> None:  # fmt: skip
        check_options(memory, threads, tiers, delegates, strain, server, confidence, server_seconds)
        try:
            self._directory, self._memory, self._threads_each = Path(directory), memory, threads
        except TypeError:
            raise Refused(f"Runtime: takes the directory of an agent, got {directory!r}") from None
        self._tiers, self._delegates = tuple(tiers), dict(delegates or {})
        around = environment or LinuxEnvironment(self._directory, "")
        self._watch = StrainWatch(lambda: around.conditions(training=False), strain or Strain())
        ask = ask_url(server) if isinstance(server, str) else server
        self._server = SecondOpinion(ask, confidence, server_seconds) if ask else None
        self._loading, self._lock = threading.Lock(), threading.Lock()
        self._loaded: OrderedDict[tuple[str, str], Loaded] = OrderedDict()  # by model and digest, the last one used at the end
        self._seen: dict[str, _Seen] = {}
        self._pointers: dict[str, str] = {}  # paths by model
        self._serving: dict[str, tuple[int, str]] = {}  # version and digest by model, as of the last call
        self._unusable: dict[tuple[str, str], str] = {}  # files that could not be opened, and why
        self._process = os.getpid()

    def predict(
        self, model: str, x: npt.NDArray[Any], *, probabilities: bool = False, normalised: bool = False
    ) -> Floats:  # fmt: skip
        """Logits of one example [channels, *space] as [classes], or of a batch [n, channels, *space] as [n, classes]; float32.

        Args:
            x: floating point, as it was before the training data were normalised (images: in [0, 1]); the release says how it is
                normalised. normalised: it is already. probabilities: the softmax of the logits; of a model that was trained on the
                squared error its outputs, those above zero divided by their sum.

        Raises:
            TryAgain: no release of the model is installed, or its file is damaged.
            Refused: ``x`` has another shape or type, or the model cannot be run; the line says which.
        """
        loaded = self._take(model)
        batch, single = checked_examples(model, x, loaded.opened.shape)
        logits, loaded = self._run(loaded, batch if normalised else _normal(batch, loaded.opened))
        loss = loaded.opened.facts.loss
        if self._server is not None:
            logits, asked, answered = self._server.over(model, batch, logits, loss)
            if asked:
                loaded.health.add(server_asked=asked, server_answered=answered)
        found = probabilities_of(logits, loss) if probabilities else logits
        return found[0] if single else found

    def labels(self, model: str) -> tuple[str, ...]:
        """What the classes are called, in order; empty where the release does not say. Raises as `predict`."""
        return self._take(model).opened.facts.labels

    def loaded(self) -> tuple[Loaded, ...]:
        """The models in memory, the least recently used first."""
        with self._lock:
            return tuple(self._loaded.values())

    def close(self) -> None:
        """Let go of all models; calls that run end well, and a later one loads again."""
        with self._lock:
            self._loaded.clear()

    def _take(self, model: str) -> Loaded:
        """The model to run now, loaded."""
        if os.getpid() != self._process:
            raise Refused("this Runtime was made before the process was forked; every process makes its own")
        if not isinstance(model, str):
            raise Refused(f"{model!r} names no model: it takes the name of one that is installed")
        for _ in range(_TRIES):
            release = self._release(model)
            name, artefact = self._choose(model, release)
            if (loaded := self._held(model, artefact.digest)) is not None:
                return loaded
            with self._loading:
                if (loaded := self._held(model, artefact.digest)) is not None:
                    return loaded
                try:
                    return self._load(model, release, name, artefact)
                except FileNotFoundError:  # the agent removed it after a switch: look again
                    self._seen.pop(model, None)
                except Refused as error:
                    self._unusable[model, artefact.digest] = str(error)
                    return self._instead(model, error)
                except TryAgain as error:
                    return self._instead(model, error)
        raise TryAgain(f"{model}: its installation changes all the time; try again")

    def _held(self, model: str, digest: str) -> Loaded | None:
        if (model, digest) in self._unusable:
            return self._instead(model, Refused(self._unusable[model, digest]))
        with self._lock:
            loaded = self._loaded.get((model, digest))
            if loaded is None:
                return None
            self._loaded.move_to_end((model, digest))
            self._serve(loaded)
            return loaded

    def _instead(self, model: str, error: FedcoreError) -> Loaded:
        """The model that ran before one that cannot be opened, as long as it is in memory."""
        with self._lock:
            for (name, digest), loaded in self._loaded.items():
                if name == model and (name, digest) not in self._unusable:
                    _LOG.warning("%s; release %d goes on", error, loaded.version)
                    return loaded
        raise error

    def _release(self, model: str) -> Release:
        """The installed release, read again where its file changed."""
        path = self._pointers.get(model)
        if path is None:
            path = self._pointers[model] = str(model_directory(self._directory, model) / POINTER)
        try:
            found = os.stat(path)  # noqa: PTH116 - at every call: a path object takes as long as the question
        except OSError:
            raise TryAgain(not_installed(self._directory, model)) from None
        signature = (found.st_mtime_ns, found.st_ino, found.st_size)
        seen = self._seen.get(model)
        if seen is None or seen.signature != signature:
            try:
                release = read_pointer(Path(path).parent).current
            except Refused as error:
                if seen is None:
                    raise
                _LOG.warning("%s; release %d goes on", error, seen.release.version)
                release = seen.release
            if release is None:
                raise TryAgain(not_installed(self._directory, model))
            seen = self._seen[model] = _Seen(signature, release)
            self._unusable = {key: why for key, why in list(self._unusable.items()) if key[0] != model}  # others may add to it
        return seen.release

    def _choose(self, model: str, release: Release) -> tuple[str, Artefact]:
        """The file to run: of the largest tier, or of the next one while the device is strained."""
        usable, by_tier = usable_runtimes(), dict[str, tuple[str, Artefact]]()
        for runtime in usable:
            for name, artefact in release.files.items():
                tier, _, made_for = name.partition("/")
                if made_for == runtime and artefact.form == "file":
                    by_tier.setdefault(tier, (name, artefact))
        if not by_tier:
            raise Refused(f"release {release.version} of {model} has no file for {' or '.join(usable) or 'any runtime here'}")
        order = {tier: place for place, tier in enumerate(self._tiers)}
        tiers = sorted(by_tier, key=lambda tier: (order.get(tier, len(order)), -by_tier[tier][1].size))
        strained = self._watch.strained()
        return by_tier[tiers[1 if strained and len(tiers) > 1 else 0]]

    def _load(self, model: str, release: Release, name: str, artefact: Artefact) -> Loaded:
        """Open a file, and make room for it.

        Raises:
            FileNotFoundError: it is not there any more.
            TryAgain: it is damaged. Refused: it cannot be opened, or is larger than the limit.
        """
        place = model_directory(self._directory, model)
        path = place / "files" / artefact.digest
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != artefact.digest:
                raise TryAgain(f"{model}: {name} of release {release.version} is damaged; the agent fetches it anew")
        trial = read_trials(place).get(release.version)
        tried = trial.loaded_bytes.get(artefact.digest) if trial else None
        expected = max(artefact.size, tried or 0)
        self._make_room(model, expected)
        health = HealthFile(health_path(place, release.version))
        runtime = name.partition("/")[2]
        usual = default_delegates(runtime)  # imports the runtime, which is not the model's memory
        delegates = self._delegates.get(runtime, usual)
        before = _resident()
        with health.loading():
            opened = open_through(place, path, runtime, delegates, self._threads_each, health)
        # Other threads of the app take memory meanwhile, too: what a process of its own has measured is the better word.
        size = expected if tried is not None else max(expected, _resident() - before)
        self._make_room(model, size)
        health.add(highest={"peak_bytes": size})
        loaded = Loaded(model, release.version, name, artefact.digest, size, opened, health)
        with self._lock:
            self._serve(loaded)
            for key in [key for key, one in self._loaded.items() if one.model == model and one.version != release.version]:
                del self._loaded[key]
            self._loaded[model, artefact.digest] = loaded
        return loaded

    def _serve(self, loaded: Loaded) -> None:
        """Note what runs, and count a change of the tier."""
        version, digest = self._serving.get(loaded.model, (0, ""))
        if version == loaded.version and digest != loaded.digest:
            loaded.health.add(tier_switches=1)
        self._serving[loaded.model] = loaded.version, loaded.digest

    def _make_room(self, model: str, size: int) -> None:
        """Let the least recently used models go until ``size`` more bytes are within the limit.

        Raises:
            Refused: they never are.
        """
        if size > self._memory:
            raise Refused(f"{model} takes {size} bytes of memory; the limit of this Runtime is {self._memory}")
        with self._lock:
            while self._loaded and sum(one.bytes for one in self._loaded.values()) + size > self._memory:
                self._loaded.popitem(last=False)

    def _run(self, loaded: Loaded, batch: Floats) -> tuple[Floats, Loaded]:
        """Logits, and what gave them: a delegate that fails gives way to the next one for good."""
        while True:
            began = time.perf_counter()
            try:
                logits = finite(loaded.opened.logits(batch))
            except Exception as error:  # whatever a runtime or a driver says
                place, delegate = model_directory(self._directory, loaded.model), loaded.opened.delegate
                if delegate == CPU:
                    loaded.health.add(calls=1, errors=1)
                    raise Refused(f"{loaded.model}: release {loaded.version} cannot be run: {one_line(error)}") from error
                why = f"{delegate} failed at a run: {one_line(error)}"
                give_up_delegate(place, loaded.digest, delegate, why, loaded.health)
                with self._lock:
                    if self._loaded.get((loaded.model, loaded.digest)) is loaded:
                        del self._loaded[loaded.model, loaded.digest]
                loaded = self._take(loaded.model)
                continue
            warm = {"decicelsius": max(0, round(10 * (self._watch.celsius or 0)))}
            loaded.health.add(1e6 * (time.perf_counter() - began) / len(batch), warm, calls=1)
            return logits, loaded


def _normal(x: Floats, opened: Opened) -> Floats:
    columns = [1, -1, *[1] * (x.ndim - 2)]
    mean, std = (np.array(values, np.float32).reshape(columns) for values in (opened.facts.mean, opened.facts.std))
    return np.asarray((x - mean) / std)


def _resident() -> int:
    """Bytes of this process that are in memory."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0
