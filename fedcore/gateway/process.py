"""A gateway as a process: ``python -m fedcore.gateway.process FILE`` serves what a JSON file describes until SIGTERM or Ctrl-C.

The keys of the file: ``store`` (path or URL), ``blobs``, ``trust`` (FleetTrust, canonical bytes), ``time_key`` (PEM) and ``tls``
(directory with tls.key and tls.pem; may be missing on loopback), all of them paths; ``listen`` (HOST:PORT), ``signer`` (address of
the enrolment signer, may be missing), ``share_port`` (several processes on one port), ``limits`` and ``pace`` (their fields);
``repository`` (directory or URL of releases, may be missing) and ``release_every`` (seconds in which devices ask for them).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedcore.errors import FedcoreError, Refused, TryAgain
from fedcore.gateway.blobs import Blobs
from fedcore.gateway.commits import Committer
from fedcore.gateway.door import GatewaySettings
from fedcore.gateway.limits import Limits
from fedcore.gateway.messages import FleetTrust
from fedcore.gateway.metrics import Family, MetricsServer, exposition, run_families
from fedcore.gateway.pace import Pace
from fedcore.gateway.service import Gateway
from fedcore.gateway.tls import is_loopback, read_tls
from fedcore.registry.files import open_files
from fedcore.secagg.committee_wire import endpoint_of
from fedcore.secagg.crypto import digest
from fedcore.secagg.keys import read_private_key, read_signing_key
from fedcore.state.gateway import GatewayStore
from fedcore.state.stores import open_gateway_store

__all__ = ["GatewayServer", "ProcessSettings", "open_settings", "serve"]

_FILES = 65_536  # connections that the system is asked to allow


@dataclass(frozen=True)
class ProcessSettings:
    """The file of a gateway process; paths are as the module's text says."""

    store: str
    blobs: Path
    trust: Path
    time_key: Path
    listen: str = "127.0.0.1:0"
    tls: Path | None = None
    signer: str = ""
    share_port: bool = False
    hold: float = 30.0
    metrics: str = ""
    run: Path | None = None
    repository: str = ""
    release_every: float = 1800.0
    limits: Limits = field(default_factory=Limits)
    pace: Pace = field(default_factory=Pace)

    @classmethod
    def read(cls, table: Mapping[str, Any]) -> ProcessSettings:
        """From a table of plain values.

        Raises:
            Refused: a key is unknown or missing.
        """
        try:
            paths = {name: Path(table[name]) for name in ("blobs", "trust", "time_key", "tls", "run") if table.get(name)}
            parts = {"limits": Limits(**table.get("limits", {})), "pace": Pace(**table.get("pace", {}))}
            return cls(**(dict(table) | paths | parts))
        except TypeError as error:
            raise Refused(f"the gateway's settings: {error}") from None


def open_settings(settings: ProcessSettings) -> GatewaySettings:
    """Read the files that the settings name.

    Raises:
        Refused: one is missing, damaged, or not what the trust bundle names.
    """
    from fedcore.gateway.enrolment import RemoteSigner

    try:
        trust = FleetTrust.decode(settings.trust.read_bytes())
    except OSError as error:
        raise Refused(f"{settings.trust} cannot be read ({error.strerror})") from error
    key = read_signing_key(settings.time_key)
    secret = digest("gateway tokens", read_private_key(settings.time_key))
    signer = RemoteSigner(settings.signer) if settings.signer else None
    return GatewaySettings.of(
        trust, key, secret, signer=signer, limits=settings.limits, pace=settings.pace, hold=settings.hold,
        repository=open_files(settings.repository) if settings.repository else None, release_every=settings.release_every,
    )  # fmt: skip


class GatewayServer:
    """A gateway at an address, within a running event loop.

    Raises:
        Refused: TLS is missing where the address is not loopback.
    """

    def __init__(
        self, settings: GatewaySettings, store: Callable[[], GatewayStore], blobs: Blobs, listen: str, *,
        tls: tuple[bytes, bytes] | None, share_port: bool = False, clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        import grpc

        host, _ = endpoint_of(listen, least=0)
        if tls is None and not is_loopback(host):
            raise Refused(f"{listen} can be reached from elsewhere, so it takes TLS; only loopback goes without")
        self._committer = Committer(store, clock)
        self.gateway = Gateway(settings, self._committer, blobs, clock)
        limits = settings.limits
        self._server = grpc.aio.server(options=_options(limits, share_port), maximum_concurrent_rpcs=limits.calls)
        self._server.add_generic_rpc_handlers((self.gateway.handler(),))
        try:
            if tls is None:
                port = self._server.add_insecure_port(listen)
            else:
                port = self._server.add_secure_port(listen, grpc.ssl_server_credentials([tls]))
        except RuntimeError:
            port = 0
        if not port:
            self._committer.close()
            raise Refused(f"{listen} cannot be listened at: it takes an address of this machine and a free port, or 0")
        self.address = f"{listen.rpartition(':')[0]}:{port}"

    async def start(self) -> None:
        """Take calls from now on."""
        await self.gateway.board.look()
        self._following = asyncio.create_task(self.gateway.follow())
        await self._server.start()

    async def stop(self, grace: float = 5.0) -> None:
        """Take no new call, give those at work ``grace`` seconds, and let go of the store."""
        await self._server.stop(grace)
        self._following.cancel()
        await asyncio.gather(self._following, return_exceptions=True)
        await asyncio.to_thread(self._committer.close)


def _options(limits: Limits, share_port: bool) -> tuple[tuple[str, int], ...]:
    return (
        ("grpc.max_receive_message_length", limits.message),
        ("grpc.max_concurrent_streams", limits.streams),
        ("grpc.per_message_decompression", 0),  # a small message could become a large one
        ("grpc.http2.bdp_probe", 0),  # what is sent and not yet read stays within the first windows of streams
        ("grpc.server_handshake_timeout_ms", int(1000 * limits.handshake)),
        ("grpc.max_connection_idle_ms", int(1000 * limits.idle)),
        ("grpc.max_connection_age_ms", int(1000 * limits.age)),
        ("grpc.max_connection_age_grace_ms", 60_000),
        ("grpc.so_reuseport", int(share_port)),
    )


async def serve(settings: ProcessSettings, ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; ``ready`` is told the address."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for one in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(one, stopped.set)
    tls = read_tls(settings.tls) if settings.tls else None
    opened = open_settings(settings)
    server = GatewayServer(
        opened, lambda: open_gateway_store(settings.store), Blobs(settings.blobs), settings.listen, tls=tls,
        share_port=settings.share_port,
    )  # fmt: skip
    watched = MetricsServer(settings.metrics, lambda: _exposed(server.gateway, settings.run)) if settings.metrics else None
    await server.start()
    try:
        if watched:
            await watched.start()
        ready(server.address)
        await stopped.wait()
    finally:
        if watched:
            watched.stop()
        await server.stop()


async def _exposed(gateway: Gateway, run: Path | None) -> str:
    """All metrics; what the store has to tell is missing while it is away."""
    away = 0
    try:
        families = await gateway.metrics()
    except TryAgain:
        away, families = 1, gateway.meter.families()
    families.append(Family("fedcore_gateway_store_up", "gauge", "Whether the store answers.", {(): 1 - away}))
    return exposition([*families, *(await asyncio.to_thread(run_families, run) if run else ())])


def _main() -> None:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # failed handshakes of passers-by are no news
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(_FILES, hard)), hard))
    try:
        settings = ProcessSettings.read(json.loads(Path(sys.argv[1]).read_text()))
        asyncio.run(serve(settings, lambda address: print(f"gateway listens on {address}", flush=True)))
    except FedcoreError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    _main()
