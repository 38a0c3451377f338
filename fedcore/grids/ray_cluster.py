"""The Ray cluster that this machine belongs to: found, joined, left."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcore.errors import Refused

__all__ = ["Node", "join_cluster"]

_SETTINGS = {  # of Ray, where the user has made none: says nothing to anybody, and does not try for ten minutes
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_NUM_REDIS_GET_RETRIES": "2",
}  # fmt: skip
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
_START = 'start one with "ray start --head", or set RAY_ADDRESS=HOST:PORT'
_PATIENCE = 5.0  # seconds for a cluster to take a connection


@dataclass(frozen=True)
class Node:
    """A machine of the cluster that offers ``cpus`` workers."""

    id: str
    address: str
    cpus: int


def join_cluster() -> tuple[Any, list[Node], bool]:
    """The module ``ray``, connected; the nodes that offer CPUs; and whether this call connected it: then the caller has to leave.

    The cluster is that of RAY_ADDRESS, or the one that ``ray start`` began here; none is started. A program that is connected
    already stays so.

    Raises:
        Refused: no Ray, no cluster, or one without CPUs; one line.
    """
    host, port = _address()
    os.environ.update({key: os.environ.get(key, value) for key, value in _SETTINGS.items()})
    try:
        import ray
        from ray._private import ray_constants
    except ImportError as error:
        raise Refused('engine.workers = "ray" needs Ray: pip install "fedcore[ray]" -c constraints.txt') from error
    cluster: Any = ray  # most of it has no types
    joining = not cluster.is_initialized()
    if joining:
        if host in _LOOPBACK:
            # Ray would take this for the machine's address in the network, where a cluster that is bound to loopback does not
            # answer, and wait for many minutes.
            ray_constants.ENABLE_RAY_CLUSTER = False
        _connect(cluster, host, port)
    nodes = [
        Node(node["NodeID"], node["NodeManagerAddress"], int(node["Resources"]["CPU"]))
        for node in cluster.nodes()
        if node["Alive"] and node["Resources"].get("CPU", 0) >= 1
    ]
    if not nodes:
        if joining:
            cluster.shutdown()
        raise Refused(f'engine.workers = "ray": no node of the cluster at {host}:{port} offers a CPU')
    return cluster, sorted(nodes, key=lambda node: (node.address, node.id)), joining


def _address() -> tuple[str, int]:
    """Host and port of the cluster."""
    given = os.environ.get("RAY_ADDRESS", "")
    if "://" in given:
        raise Refused(f"RAY_ADDRESS = {given}: the coordinator runs on a node of the cluster; give HOST:PORT, not a ray:// address")
    if given in {"", "auto"}:
        folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # noqa: S108 - where ray start writes it
        try:
            given = (Path(folder) / "ray" / "ray_current_cluster").read_text().strip()
        except OSError as error:
            raise Refused(f'engine.workers = "ray": no Ray cluster is running here; {_START}') from error
    host, _, port = given.rpartition(":")
    if not host or not port.isdecimal():
        raise Refused(f"RAY_ADDRESS = {given}: must be HOST:PORT")
    return host.strip("[]"), int(port)


def _connect(ray: Any, host: str, port: int) -> None:
    try:
        socket.create_connection((host, port), _PATIENCE).close()
    except OSError as error:
        raise Refused(f'engine.workers = "ray": no Ray cluster answers at {host}:{port}; {_START}') from error
    try:
        with _own_signals():
            ray.init(f"{host}:{port}", log_to_driver=False, logging_level="ERROR")
    except Exception as error:
        raise Refused(f'engine.workers = "ray": {host}:{port}: {[*str(error).splitlines(), type(error).__name__][0]}') from error


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray takes SIGTERM for itself; afterwards it means what it meant."""
    usual = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if usual is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, usual)
