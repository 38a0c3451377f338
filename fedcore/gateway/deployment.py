"""The keys of a fleet, as files: a folder for each party, so that each folder can go to the machine of its party.

``signer/`` (enrolment key), ``coordinator/`` (plan key), ``authority/`` (TLS authority), ``gateway/`` (time key, TLS key), and
``fleet.trust``, what devices pin. Made on one machine they separate no trust until they are moved.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedcore.errors import Refused
from fedcore.gateway.enrolment import LocalSigner
from fedcore.gateway.messages import FleetTrust
from fedcore.gateway.tls import new_authority, new_gateway_certificate
from fedcore.secagg.crypto import Signer
from fedcore.secagg.keys import SIGNING, new_directory, new_signing_key, read_signing_key

__all__ = ["Fleet", "make_fleet"]

PLAN, TIME = "plan", "time"


@dataclass(frozen=True)
class Fleet:
    """A fleet's folder, as `make_fleet` makes it."""

    directory: Path

    @property
    def trust_file(self) -> Path:
        """The trust bundle's canonical bytes."""
        return self.directory / "fleet.trust"

    @property
    def gateway(self) -> Path:
        """The gateways' folder: time.key, tls.key and tls.pem."""
        return self.directory / "gateway"

    @property
    def time_key(self) -> Path:
        """The gateways' time key."""
        return self.gateway / f"{TIME}.key"

    def trust(self) -> FleetTrust:
        """What devices pin.

        Raises:
            Refused: the file cannot be read.
        """
        try:
            return FleetTrust.decode(self.trust_file.read_bytes())
        except OSError as error:
            raise Refused(f"{self.trust_file} cannot be read ({error.strerror})") from error

    def plan_key(self) -> Signer:
        """The coordinator's key."""
        return read_signing_key(self.directory / "coordinator" / f"{PLAN}.key")

    def signer(self, days: int = 365) -> LocalSigner:
        """The enrolment signer; one process at a time."""
        folder = self.directory / "signer"
        return LocalSigner(read_signing_key(folder / f"{SIGNING}.key"), self.trust(), folder / "enrolments.sqlite", days=days)


def make_fleet(
    directory: Path, deployment: str, *, hosts: Sequence[str] = (), publisher_keys: Sequence[bytes] = (), committee: bytes = b"",
    update_root: bytes = b"",
) -> Fleet:  # fmt: skip
    """Make all keys of a fleet; the folder appears complete or not at all.

    Raises:
        Refused: the folder exists, or cannot be made.
    """
    with new_directory(directory) as fresh:
        for party in ("signer", "coordinator", "authority", "gateway"):
            (fresh / party).mkdir(mode=0o700)
        enrolment = new_signing_key(fresh / "signer", SIGNING)
        plan, time = new_signing_key(fresh / "coordinator", PLAN), new_signing_key(fresh / "gateway", TIME)
        authority = new_authority(fresh / "authority", deployment[:64])
        new_gateway_certificate(fresh / "authority", fresh / "gateway", hosts)
        trust = FleetTrust(
            deployment, enrolment.public, (plan.public,), (time.public,), tuple(publisher_keys), authority, committee, update_root
        )  # fmt: skip
        with (fresh / "fleet.trust").open("wb") as file:
            file.write(trust.encode())
            file.flush()
            os.fsync(file.fileno())
    return Fleet(directory)
