"""A scenario over real devices: the run that also simulations are, with a grid behind gateways."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

from fedcore.config import RunConfig
from fedcore.coordinator.assembly import Assembly
from fedcore.coordinator.asynchronous import BufferedCoordinator
from fedcore.coordinator.budget import Budget
from fedcore.coordinator.buffered_devices import BufferedDevices
from fedcore.coordinator.fleet import FleetFolder, least_uploads, offering
from fedcore.coordinator.rounds import Coordinator
from fedcore.coordinator.run import FederatedRun, RunGrid
from fedcore.coordinator.secure import trusted_committee
from fedcore.coordinator.strategy import accepts_mean
from fedcore.errors import Refused
from fedcore.gateway.blobs import Blobs
from fedcore.gateway.conduct import Conductor
from fedcore.gateway.fleet import Selection
from fedcore.gateway.versions import VersionConductor
from fedcore.grids.device import DeviceGrid, Offering
from fedcore.secagg.keys import read_message, read_public_key
from fedcore.secagg.messages import TrustBundle
from fedcore.secagg.trust import check_trust
from fedcore.state.sqlite import RunStore
from fedcore.state.stores import open_gateway_store

__all__ = ["Choice", "DeviceRun", "check_scenario", "pin_committee", "shown"]


@dataclass(frozen=True)
class Choice:
    """Which devices, and how long: ``devices`` (0: the cohort) uploads end a round, ``over_selection`` times as many are asked;
    ``window`` seconds are waited for them to check in; ``minimum`` uploads (0: three quarters) suffice at the deadline, [cohort]
    timeout."""

    over_selection: float = 1.3
    window: float = 300.0
    minimum: int = 0
    devices: int = 0
    tiers: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()


def check_scenario(config: RunConfig) -> None:
    """Refuse what a scenario asks for and devices cannot do.

    Raises:
        Refused: it does; the line says what to change.
    """
    if any(one.sampling == "poisson" for one in config.privacy):
        raise Refused(
            'privacy.sampling = "poisson": which devices come is not drawn by secret coins, so nothing is amplified; leave it out'
        )
    if config.secagg.shards > 1:
        raise Refused(f"secagg.shards = {config.secagg.shards}: the devices of a round are gathered for one sum; leave it out")
    if config.asynchronous.buffer and (config.privacy or config.evaluation.federated_every):
        raise Refused(
            "[asynchronous] over devices has neither [privacy], which would charge them version by version, nor "
            "evaluation.federated_every yet: leave them out, or simulate"
        )
    if config.cohort.dropout:
        raise Refused("cohort.dropout is of simulated clients; real ones vanish by themselves")


def pin_committee(config: RunConfig, folder: FleetFolder) -> None:
    """Have the fleet's devices pin the committee that the scenario names, before any of them enrols.

    Raises:
        Refused: see `FleetFolder.pin_committee`; or the trust bundle's signature is wrong.
    """
    if not config.secagg.enabled:
        return
    bundle = read_message(config.folder / config.secagg.trust, TrustBundle)
    check_trust(bundle, read_public_key(config.folder / config.secagg.trust_key)[1])
    folder.pin_committee(bundle)


class DeviceRun(FederatedRun):
    """A scenario over the devices of a fleet, whose gateways share ``store``.

    Raises:
        Refused: as `FederatedRun`; or `check_scenario` does.
    """

    def __init__(
        self, config: RunConfig, directory: Path, folder: FleetFolder, store: str, choice: Choice, *, resume: bool
    ) -> None:  # fmt: skip
        check_scenario(config)
        self._folder, self._where, self._choice = folder, store, choice
        super().__init__(config, directory, self._connect, resume=resume)

    def _connect(self, assembly: Assembly) -> RunGrid:
        config, choice = assembly.config, self._choice
        planned = config.cohort.size or len(assembly.data.clients)
        goal, over = min(choice.devices or planned, planned), choice.over_selection
        if config.privacy or assembly.secured:  # noise and sums are made for no more than that
            over = min(over, planned / goal)
        blobs = offering(assembly, self._folder)
        secured, client = ("secagg-1",) if assembly.secured else (), config.unit_privacy("client")
        # The ledger says who rests; where the gateways know it too, a device that does is told at once.
        separation = client.min_separation if client and client.min_separation > 1 else 0
        selection = Selection(
            goal, choice.minimum or least_uploads(goal), config.cohort.timeout, choice.window, over,
            tiers=choice.tiers, labels=choice.labels, capabilities=(*blobs.capabilities, *secured),
            most_participations=client.max_participations if client else 0, separation=separation,
        )  # fmt: skip
        asked = config.cohort.evaluate_size or len(assembly.data.clients)
        scored = min(choice.devices or asked, asked)
        evaluation = dataclasses.replace(
            selection, goal=scored, minimum=min(choice.minimum or least_uploads(scored), scored),
            over_selection=min(choice.over_selection, asked / scored) if assembly.secured else choice.over_selection,
            capabilities=("evaluate-1", *secured), most_participations=0, separation=0,
        )  # fmt: skip
        if config.asynchronous.buffer:
            return self._asynchronous(assembly, selection, blobs)
        conductor = Conductor(open_gateway_store(self._where), self._folder.fleet.trust().deployment, self._folder.fleet.plan_key())
        task, mean = self._task(config), assembly.secured is not None or accepts_mean(assembly.strategy)
        devices = DeviceGrid(
            conductor, Blobs(self._folder.blobs), assembly.layout, task, selection, blobs, mean=mean, evaluation=evaluation,
            done=self._done(),
        )  # fmt: skip
        if assembly.secured is None:
            return devices
        # The committee counts the attempts of a task from one, and this process does so anew after a restart.
        committee = trusted_committee(config, assembly.secured)
        return assembly.secured.wrap(devices, assembly.layout, committee, f"{task}-{int(time.time())}")

    def _asynchronous(self, assembly: Assembly, selection: Selection, offered: Offering) -> BufferedDevices:
        config, trust = assembly.config, self._folder.fleet.trust()
        conductor = VersionConductor(open_gateway_store(self._where), trust.deployment, self._folder.fleet.plan_key())
        one = config.asynchronous
        selection = dataclasses.replace(selection, goal=one.buffer, minimum=one.buffer, over_selection=1.0)
        return BufferedDevices(
            conductor, Blobs(self._folder.blobs), assembly.layout, self._task(config), selection, offered, config,
            one.at_once(len(assembly.data.clients)),
        )  # fmt: skip

    def _coordinate(self, store: RunStore, budget: Budget | None) -> Coordinator:
        if not isinstance(self.grid, BufferedDevices):
            return super()._coordinate(store, budget)
        self.grid.numbers = store.numbers
        return BufferedCoordinator(self.assembly, self.grid, store, budget, self.grid)

    def _population(self) -> str:
        """A ledger names devices by their ids, which are the fleet's."""
        trust = self._folder.fleet.trust()
        return f"devices of {trust.deployment} {hashlib.sha256(trust.enrolment_key).hexdigest()[:16]}"

    def _fleet(self) -> Path | None:
        return self._folder.directory

    def _task(self, config: RunConfig) -> str:
        """The run's name towards devices: the same after a restart, and never another run's."""
        store = RunStore(self.directory)
        store.close()
        return f"{config.run.name[:32]}-{store.run_id[:16]}"

    def _done(self) -> int:
        """Rounds that are committed: gateways compare a new round's number with those in which devices took part."""
        store = RunStore(self.directory)
        try:
            last = store.latest()
        finally:
            store.close()
        return last.round_number if last else 0


def shown(address: str, directory: Path, *, as_json: bool) -> str:
    """The line that tells where devices enrol and where the run lies."""
    if as_json:
        return json.dumps({"event": "serving", "address": address, "directory": str(directory)})
    return f"devices enrol and check in at {address}; run directory {directory}"
