"""`fedcore enrol-ca` for fleets: tokens, a signer of its own, revocation."""

import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from fedcore.cli import app
from fedcore.gateway.deployment import make_fleet
from fedcore.gateway.enrolment import RemoteSigner
from fedcore.gateway.identity import EnrolmentToken, enrolment_request, spell
from fedcore.gateway.refusals import GatewayRefusal
from fedcore.secagg.crypto import Ed25519Key


@pytest.fixture
def fleet(tmp_path):
    return make_fleet(tmp_path / "fleet", "watches")


def command(name, fleet, *arguments):
    return ["enrol-ca", name, str(fleet.directory / "signer"), "--trust", str(fleet.trust_file), *map(str, arguments)]


def run(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_tokens_enrol_through_a_signer_that_is_a_process_of_its_own(fleet, tmp_path):
    tokens = run(*command("token", fleet, "--count", 2, "--hours", 1)).stdout.split()
    assert len(set(tokens)) == 2
    call = [sys.executable, "-c", "from fedcore.cli import main; main()"]
    listen = f"unix:{tmp_path}/signer"
    process = subprocess.Popen([*call, *command("serve", fleet, "--listen", listen)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == f"enrolment signer listens on {listen}\n"
        remote, key = RemoteSigner(listen), Ed25519Key(b"1" * 32)
        enrolment = remote.enrol(enrolment_request(EnrolmentToken.decode(tokens[0]), key, bytes(16)))
        device = spell(enrolment.device)
        assert run(*command("devices", fleet)).stdout == f"{device}  enrolled\n"
        assert run(*command("revoke", fleet), device).stdout == f"device {device} is revoked\n"
        assert run(*command("devices", fleet, "--json")).stdout == f'[{{"device": "{device}", "revoked": true}}]\n'
        with pytest.raises(GatewayRefusal, match="used for another key"):
            remote.enrol(enrolment_request(EnrolmentToken.decode(tokens[0]), Ed25519Key(b"2" * 32), bytes(16)))
        remote.close()
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        process.stdout.close()


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("serve", ("--listen", "0.0.0.0:7000"), "without TLS, so it takes unix:PATH or an address of this machine alone"),
        ("revoke", ("xyz",), "a device's id has 16 hexadecimal digits, got 'xyz'"),
        ("revoke", ("0" * 16,), "no device 0000000000000000 was enrolled here"),
    ],
)
def test_what_makes_no_sense_is_one_line(fleet, name, arguments, said):
    found = run(*command(name, fleet, *arguments))
    assert found.exit_code == 2
    assert said in " ".join(found.output.split())


def test_another_fleets_trust_bundle_is_refused(fleet, tmp_path):
    other = make_fleet(tmp_path / "other", "watches")
    found = run("enrol-ca", "token", str(fleet.directory / "signer"), "--trust", str(other.trust_file))
    assert found.exit_code == 2
    assert "not the enrolment key that the trust bundle names" in " ".join(found.output.split())
