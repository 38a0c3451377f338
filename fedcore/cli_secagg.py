"""``fedcore committee``, ``enrol-ca`` and ``trust``: the parties of secure aggregation that are neither coordinator nor client."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from fedcore.errors import Refused
from fedcore.terminal import clear_errors

__all__ = ["committee", "enrol_ca", "trust"]

committee = typer.Typer(no_args_is_help=True, add_completion=False, help="Run one member of a secure aggregation committee.")
enrol_ca = typer.Typer(no_args_is_help=True, add_completion=False, help="Enrol clients, with a key apart from the coordinator.")
trust = typer.Typer(no_args_is_help=True, add_completion=False, help="Make trust bundles, which clients and members pin.")
_TICK = 1.0  # seconds between looks for rounds that are over

Out = Annotated[Path, typer.Option(help="A new directory for the keys; an existing one is never touched.", metavar="DIR")]
Directory = Annotated[Path, typer.Argument(help="The directory that keygen made.", metavar="DIR")]
Root = Annotated[Path | None, typer.Option(help="Public key that signs trust bundles, had from elsewhere.", metavar="FILE")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
FleetTrustFile = Annotated[Path, typer.Option("--trust", help="The fleet's trust bundle (fleet.trust).", metavar="FILE")]


@committee.command(name="keygen")
def committee_keygen(
    out: Out,
    name: Annotated[str, typer.Option(help="The certificate's name, for people.")] = "committee member",
    days: Annotated[int, typer.Option(help="Days until the TLS certificate ends.")] = 3650,
    coordinator: Annotated[bool, typer.Option("--coordinator", help="A TLS key for a coordinator: no identity.")] = False,
    as_json: Json = False,
) -> None:
    """Make a member's identity key and TLS certificate, and print what the trust bundle and the coordinator's scenario need."""
    with clear_errors():
        from fedcore.secagg.keys import IDENTITY, fingerprint_of, new_directory, new_signing_key, new_tls_certificate

        found = {}
        with new_directory(out) as fresh:
            if not coordinator:
                found["public_key"] = new_signing_key(fresh, IDENTITY).public.hex()
            found["fingerprint"] = fingerprint_of(new_tls_certificate(fresh, name, days))
        if as_json:
            print(json.dumps(found))
        elif coordinator:
            print(
                f"made {out}; members demand it with: fedcore committee serve ... --coordinator tls.pem (a copy of {out}/tls.pem)"
            )
        else:
            print(f"public key       {found['public_key']}  (for the trust bundle: {out}/{IDENTITY}.pub)")
            print(f"TLS fingerprint  {found['fingerprint']}  (for the coordinator's scenario)")


@committee.command(name="show")
def committee_show(directory: Directory, as_json: Json = False) -> None:
    """Show a member's public key, its TLS fingerprint, and how many rounds it has approved, certified and released."""
    with clear_errors():
        from fedcore.secagg.committee_service import JOURNAL
        from fedcore.secagg.committee_status import read_records, status_of
        from fedcore.secagg.crypto import ED25519
        from fedcore.secagg.keys import IDENTITY, expiry_of, fingerprint_of, read_certificate, read_public_key

        algorithm, public = read_public_key(directory / f"{IDENTITY}.pub")
        if algorithm != ED25519:
            raise Refused(f"{directory}: the identity of a member is an Ed25519 key")
        certificate = read_certificate(directory / "tls.pem")
        status = status_of(read_records(directory / JOURNAL))
        ends = f"{expiry_of(certificate):%Y-%m-%d}"
        found = {"public_key": public.hex(), "fingerprint": fingerprint_of(certificate), "certificate_ends": ends, **asdict(status)}
        if as_json:
            print(json.dumps(found))
            return
        print(f"public key       {found['public_key']}")
        print(f"TLS fingerprint  {found['fingerprint']}  (until {ends})")
        print(f"plans approved   {status.approved}")
        for one in status.open:
            print(f"open             {one.task!r} round {one.round}: {one.state}, until {_moment(one.expiry)}")
        for task, number in status.closed.items():
            print(f"over             {task!r} up to round {number}")


@committee.command()
def serve(
    directory: Directory,
    bundle: Annotated[Path, typer.Option("--trust", help="The trust bundle.", metavar="FILE")],
    root: Annotated[Path, typer.Option(help="Public key that signs trust bundles, had from elsewhere.", metavar="FILE")],
    listen: Annotated[str, typer.Option(help="Where to listen; port 0 takes a free one.", metavar="HOST:PORT")] = "127.0.0.1:0",
    policy: Annotated[
        Path | None, typer.Option(help="The least that a plan must offer (TOML); strict if not given.", metavar="FILE")
    ] = None,
    coordinator: Annotated[
        Path | None, typer.Option(help="The one TLS certificate that may ask; anybody if not given.", metavar="FILE")
    ] = None,
) -> None:
    """Serve one member over gRPC and TLS until SIGTERM or Ctrl-C. One line per request goes to stderr."""
    with clear_errors(), _log_on_stderr():
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # failed handshakes of passers-by are no news
        from fedcore.secagg.committee_service import CommitteeServer, open_operator, read_floor
        from fedcore.secagg.keys import read_certificate

        floor = read_floor(policy)
        operator = open_operator(directory, _read_trust(bundle, root), floor)
        try:
            server = CommitteeServer(operator, listen, read_certificate(coordinator) if coordinator else None)
            address = server.start()
        except Exception:
            operator.member.close()
            raise
        stopped = threading.Event()
        for one in (signal.SIGTERM, signal.SIGINT):
            signal.signal(one, lambda *_: stopped.set())
        logging.getLogger(__name__).info("demands of a plan: %s", ", ".join(f"{key} {value:g}" for key, value in floor.items()))
        if coordinator is None:
            logging.getLogger(__name__).warning("anybody who reaches this port is answered; --coordinator restricts it")
        print(f"member {operator.member.point} of {operator.trust.population!r} listens on {address}", flush=True)
        while not stopped.wait(_TICK):
            server.expire()
        server.stop()
        print("stopped", flush=True)


@enrol_ca.command(name="keygen")
def enrol_ca_keygen(out: Out, as_json: Json = False) -> None:
    """Make the key that enrols clients. Neither coordinator nor gateway may hold it."""
    _signing_keygen(out, "enrolment key", as_json=as_json)


@enrol_ca.command(name="request")
def enrol_ca_request(out: Out) -> None:
    """On a client: make its identity key. DIR/identity.pub goes to whoever enrols; the certificate comes back into DIR."""
    with clear_errors():
        from fedcore.secagg.keys import IDENTITY, new_directory, new_signing_key

        with new_directory(out) as fresh:
            new_signing_key(fresh, IDENTITY)
        print(f"{out / 'identity.pub'}: to be signed by enrol-ca sign; certificate.json, trust.json and trust.pub go into {out}")


@enrol_ca.command(name="sign")
def enrol_ca_sign(
    directory: Directory,
    key: Annotated[Path, typer.Option(help="The client's public key (PEM; Ed25519 or P-256).", metavar="FILE")],
    population: Annotated[str, typer.Option(help="What the client is enrolled in.", metavar="NAME")],
    out: Annotated[Path, typer.Option(help="The certificate to write (JSON).", metavar="FILE")],
    days: Annotated[int, typer.Option(help="Days until the certificate ends.", min=1, max=36500)] = 365,
) -> None:
    """Sign a client's certificate."""
    with clear_errors():
        from fedcore.secagg.keys import SIGNING, read_public_key, read_signing_key, write_message
        from fedcore.secagg.trust import issue_certificate

        enrolment = read_signing_key(directory / f"{SIGNING}.key")
        certificate = issue_certificate(enrolment, population, *read_public_key(key), int(time.time()) + days * 24 * 3600)
        write_message(out, certificate)
        print(f"{out}: identity {certificate.name} of {population!r}, until {_moment(certificate.not_after)}")


@enrol_ca.command(name="token")
def enrol_ca_token(
    directory: Directory,
    fleet: FleetTrustFile,
    count: Annotated[int, typer.Option(help="How many.", min=1, max=100_000)] = 1,
    hours: Annotated[float, typer.Option(help="Hours until they end.", min=0.01, max=24 * 366)] = 24.0,
) -> None:
    """Print enrolment tokens, a line each: every one enrols one device, once. Whoever sees one can enrol with it."""
    with clear_errors():
        signer = _open_signer(directory, fleet)
        try:
            for _ in range(count):
                print(signer.issue(hours * 3600).encode())
        finally:
            signer.close()


@enrol_ca.command(name="devices")
def enrol_ca_devices(directory: Directory, fleet: FleetTrustFile, as_json: Json = False) -> None:
    """List the devices that were enrolled here."""
    with clear_errors():
        from fedcore.gateway.identity import spell

        signer = _open_signer(directory, fleet)
        found = [{"device": spell(device), "revoked": revoked} for device, revoked in signer.devices()]
        signer.close()
        for one in [] if as_json else found:
            print(f"{one['device']}  {'revoked' if one['revoked'] else 'enrolled'}")
        if as_json:
            print(json.dumps(found))


@enrol_ca.command(name="revoke")
def enrol_ca_revoke(
    directory: Directory,
    device: Annotated[str, typer.Argument(help="A device's id: 16 hexadecimal digits.", metavar="DEVICE")],
    fleet: FleetTrustFile,
) -> None:
    """Never renew a device's certificate again. Gateways refuse it at once only when it is revoked in their store too."""
    with clear_errors():
        from fedcore.gateway.identity import read_device

        number = read_device(device)
        signer = _open_signer(directory, fleet)
        try:
            signer.revoke(number)
        finally:
            signer.close()
        print(f"device {device.lower()} is revoked")


@enrol_ca.command(name="serve")
def enrol_ca_serve(
    directory: Directory,
    fleet: FleetTrustFile,
    listen: Annotated[str, typer.Option(help="Where gateways ask: unix:PATH, or a loopback HOST:PORT.", metavar="ADDRESS")],
    days: Annotated[int, typer.Option(help="Days until a device's certificate ends.", min=1, max=36500)] = 365,
) -> None:
    """Enrol and renew devices for the gateways until SIGTERM or Ctrl-C. The address must be one that only gateways reach."""
    with clear_errors(), _log_on_stderr():
        from fedcore.gateway.enrolment import EnrolmentServer
        from fedcore.gateway.tls import is_loopback

        if not listen.startswith("unix:") and not is_loopback(listen.rpartition(":")[0].strip("[]")):
            raise Refused(f"{listen}: the signer speaks without TLS, so it takes unix:PATH or an address of this machine alone")
        signer = _open_signer(directory, fleet, days)
        try:
            server = EnrolmentServer(signer, listen)
            server.start()
            stopped = threading.Event()
            for one in (signal.SIGTERM, signal.SIGINT):
                signal.signal(one, lambda *_: stopped.set())
            print(f"enrolment signer listens on {server.address}", flush=True)
            stopped.wait()
            server.stop()
        finally:
            signer.close()
        print("stopped", flush=True)


@trust.command(name="keygen")
def trust_keygen(out: Out, as_json: Json = False) -> None:
    """Make the key that signs trust bundles. It belongs offline; devices and members are given its public half beforehand."""
    _signing_keygen(out, "key of trust bundles", as_json=as_json)


@trust.command(name="bundle")
def trust_bundle(
    directory: Directory,
    population: Annotated[str, typer.Option(help="The clients whom it is for.", metavar="NAME")],
    members: Annotated[list[Path], typer.Option("--member", help="A member's identity.pub, in order.", metavar="FILE")],
    threshold: Annotated[int, typer.Option(help="Members whose shares make a sum: t.")],
    corrupt: Annotated[int, typer.Option(help="Members that may be corrupt: c below t, with 2 t > m + c.")],
    enrolment: Annotated[Path, typer.Option("--enrol-ca", help="Public key that enrols clients.", metavar="FILE")],
    out: Annotated[Path, typer.Option(help="The bundle to write (JSON).", metavar="FILE")],
) -> None:
    """Sign a trust bundle: the committee's keys, its threshold, how many may be corrupt, and who enrols clients."""
    with clear_errors():
        from fedcore.secagg.keys import SIGNING, read_signing_key, write_message
        from fedcore.secagg.trust import sign_trust

        keys = [_ed25519_in(path) for path in members]
        root = read_signing_key(directory / f"{SIGNING}.key")
        signed = sign_trust(root, population, _ed25519_in(enrolment), threshold, corrupt, keys)
        write_message(out, signed)
        print(f"{out}: {len(keys)} members, threshold {threshold}, {corrupt} may be corrupt, for {population!r}")


@trust.command(name="show")
def trust_show(
    bundle: Annotated[Path, typer.Argument(help="A trust bundle.", metavar="FILE")], root: Root = None, as_json: Json = False
) -> None:
    """Show a trust bundle and, with --root, check who signed it."""
    with clear_errors():
        from fedcore.secagg.keys import read_message
        from fedcore.secagg.messages import TrustBundle

        found = _read_trust(bundle, root) if root else read_message(bundle, TrustBundle)
        if as_json:
            members = [key.hex() for key in found.member_keys]
            print(json.dumps({
                "population": found.population, "members": members, "threshold": found.threshold,
                "corrupt_members": found.corrupt_members, "enrolment_key": found.enrolment_key.hex(), "checked": root is not None,
            }))  # fmt: skip
            return
        print(f"population     {found.population}")
        print(
            f"committee      {len(found.member_keys)} members, threshold {found.threshold}, {found.corrupt_members} may be corrupt"
        )
        for point, key in enumerate(found.member_keys, 1):
            print(f"member {point:<7} {key.hex()}")
        print(f"enrolment key  {found.enrolment_key.hex()}")
        print(f"signature      {'checked' if root else 'not checked: give --root'}")


def _open_signer(directory: Path, fleet: Path, days: int = 365) -> Any:
    from fedcore.gateway.enrolment import LocalSigner
    from fedcore.gateway.messages import FleetTrust
    from fedcore.secagg.keys import SIGNING, read_signing_key

    try:
        pinned = FleetTrust.decode(fleet.read_bytes())
    except OSError as error:
        raise Refused(f"{fleet} cannot be read ({error.strerror})") from error
    return LocalSigner(read_signing_key(directory / f"{SIGNING}.key"), pinned, directory / "enrolments.sqlite", days=days)


def _read_trust(bundle: Path, root: Path) -> Any:
    from fedcore.secagg.keys import read_message
    from fedcore.secagg.messages import TrustBundle
    from fedcore.secagg.trust import about, check_trust

    found = read_message(bundle, TrustBundle)
    with about(str(bundle)):
        check_trust(found, _ed25519_in(root))
    return found


def _ed25519_in(path: Path) -> bytes:
    from fedcore.secagg.crypto import ED25519
    from fedcore.secagg.keys import read_public_key

    algorithm, public = read_public_key(path)
    if algorithm != ED25519:
        raise Refused(f"{path}: an Ed25519 key is needed here")
    return public


def _signing_keygen(out: Path, what: str, *, as_json: bool) -> None:
    with clear_errors():
        from fedcore.secagg.keys import SIGNING, new_directory, new_signing_key

        with new_directory(out) as fresh:
            public = new_signing_key(fresh, SIGNING).public.hex()
        print(json.dumps({"public_key": public}) if as_json else f"{what}  {public}  ({out}/{SIGNING}.pub)")


def _moment(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


@contextlib.contextmanager
def _log_on_stderr() -> Iterator[None]:
    handler = logging.StreamHandler()
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    log = logging.getLogger("fedcore")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
