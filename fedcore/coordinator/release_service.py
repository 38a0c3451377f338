"""What ``fedcore serve`` does about releases: the root that devices pin, the repository that gateways read out, who decides."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fedcore import durable
from fedcore.config import RunConfig
from fedcore.coordinator.release_status import Steward
from fedcore.coordinator.releases import Registry
from fedcore.coordinator.rollouts import Deployment
from fedcore.errors import Refused
from fedcore.gateway.deployment import Fleet
from fedcore.registry.files import Files, open_files
from fedcore.registry.roles import ROOT, metadata_name

__all__ = ["attended", "pin_root", "place_and_keys", "placed"]


def place_and_keys(config: RunConfig, place: str, keys: Sequence[Path]) -> tuple[str, list[Path]]:
    """Where the repository is, and the directories of its online keys: as a command says, else as the scenario's [release] does.

    Raises:
        Refused: the command names another repository than the scenario publishes to.
    """
    scenario = placed(config.folder, config.release.registry) if config.release.registry else ""
    given = placed(Path.cwd(), place) if place else ""
    if scenario and given and scenario != given:
        raise Refused(f"--registry {place}: the scenario publishes to {config.release.registry}; devices read from one repository")
    named = [config.folder / config.release.keys] if config.release.keys and config.release.rollback else []
    return given or scenario, list(keys) or named


def placed(folder: Path, place: str) -> str:
    """A repository's place, a path relative to a folder."""
    return place if "://" in place else str((folder / place).absolute())


def pin_root(fleet: Fleet, place: str) -> None:
    """Have devices pin the repository's newest root from their enrolment on.

    Raises:
        Refused: there is no repository, devices pin another one's root, or some are enrolled that pin none.
    """
    files, trust = open_files(place), fleet.trust()
    roots = list(_roots(files))
    if not roots:
        raise Refused(f"{place} holds no repository of releases; fedcore registry init makes one")
    if trust.update_root in roots:
        return
    if trust.update_root:
        raise Refused(f"devices of {fleet.directory} pin the root of another repository than {place}")
    signer = fleet.signer()
    try:
        enrolled = len(signer.devices())
    finally:
        signer.close()
    if enrolled:
        raise Refused(
            f"{enrolled} devices of {fleet.directory} were enrolled before it had releases and pin no root, so they can take none: "
            "serve them without a registry, or enrol them in a new fleet"
        )
    durable.write(fleet.trust_file, dataclasses.replace(trust, update_root=roots[-1]).encode())


@contextlib.contextmanager
def attended(
    fleet: Path, place: str, keys: Sequence[Path], told: Callable[[str], None], pause: float = 30.0
) -> Iterator[None]:  # fmt: skip
    """While rollouts of a fleet's folder are decided by evidence; without ``place`` nothing is.

    Raises:
        Refused: the keys cannot be read, or the audit records were changed.
    """
    if not place:
        yield
        return
    registry = Registry.open(place, keys) if keys else None
    with Steward(Deployment.of(fleet, place), registry, pause, told):
        yield


def _roots(files: Files) -> Iterator[bytes]:
    number = 1
    while (data := files.read(metadata_name(ROOT, number))) is not None:
        yield data
        number += 1
