"""From a release that the repository offers to the device's current model: fetch, by deltas where that is shorter, try, switch.

What is on the disk, and what survives there, is `fedcore.registry.slots`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedcore.errors import Refused, TryAgain
from fedcore.registry.catalogue import Catalogue, Entry
from fedcore.registry.client import Client
from fedcore.registry.delta import apply_delta, route
from fedcore.registry.fetch import Missing
from fedcore.registry.slots import POINTER, Artefact, Pointer, Release, Store, read_pointer

__all__ = ["POINTER", "Artefact", "Pointer", "Release", "SelfTest", "Store", "install", "obtain", "read_pointer"]

SelfTest = Callable[[Mapping[str, Path], Path | None], None]
"""Loads the files (by `TIER/RUNTIME`), scores the batch (None if the release has none), and raises `Refused` if they are unfit."""


def install(
    store: Store, client: Client, catalogue: Catalogue, model: str, version: int, wanted: Sequence[tuple[str, str]],
    self_test: SelfTest, recheck: Callable[[], None], seconds: float,
) -> Release:  # fmt: skip
    """Fetch a release's files for some tiers and runtimes, try them, and make them current.

    Args:
        wanted: tier and runtime of each file. seconds: for each download.
        recheck: called last before the switch; raises `Refused` where the device's assignment is over or for something else.

    Raises:
        Refused: the version is not above all before it, a file is missing or not what is signed, or the self-test found it unfit.
        TryAgain: a download is not complete yet, or the disk is full. What is installed stays.
    """
    if version <= store.pointer.highest:
        raise Refused(f"release {version} is not above {store.pointer.highest}; versions only go up")
    entries = {}
    for tier, runtime in wanted:
        entry = catalogue.artefact(model, version, tier, runtime)
        if entry is None:
            raise Refused(f"release {version} of {model} has nothing for {tier} and {runtime}")
        entries[f"{tier}/{runtime}"] = entry
    if not entries:
        raise Refused("an installation is of at least one file")
    batch = catalogue.self_test(model, version)
    for entry in [*entries.values(), *([batch] if batch else [])]:
        obtain(store, client, catalogue, entry, seconds)
    paths = {name: store.path(entry.digest.hex()) for name, entry in entries.items()}
    try:
        self_test(paths, store.path(batch.digest.hex()) if batch else None)
    except Refused as error:
        store.refuse(version, str(error))
        with contextlib.suppress(TryAgain):  # the next installation removes what could not be removed
            store.collect()
        raise
    recheck()
    release = Release(version, {
        name: Artefact(entry.digest.hex(), entry.size, str(entry.custom["form"])) for name, entry in entries.items()
    })  # fmt: skip
    store.switch(release)
    store.collect()
    return release


def obtain(store: Store, client: Client, catalogue: Catalogue, entry: Entry, seconds: float) -> None:
    """Have a target's file in the store, by deltas from what is there if that is shorter, else whole."""
    if store.holds(entry.digest.hex()):
        return
    with contextlib.suppress(Refused, Missing):  # whatever is wrong with a delta, the whole file is there too
        if _by_deltas(store, client, catalogue, entry, seconds):
            return
    store.adopt(client.download(entry, seconds), entry.digest.hex())


def _by_deltas(store: Store, client: Client, catalogue: Catalogue, entry: Entry, seconds: float) -> bool:
    edges = catalogue.edges()
    hops = route(store.held(), entry.digest, edges, entry.size)
    if hops is None:
        return False
    sizes = {one.digest: one.size for one in catalogue.entries}
    for hop in hops:
        if hop.result not in sizes:
            raise Refused("a delta to a file that the repository does not offer")
        fetched = client.download(edges[hop], seconds)
        try:
            result = apply_delta(store.path(hop.base.hex()).read_bytes(), fetched.read_bytes(), hop.result, sizes[hop.result])
        finally:
            fetched.unlink(missing_ok=True)
        store.add(result, hop.result.hex())
    return True
