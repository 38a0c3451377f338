import base64
import dataclasses
import itertools
import os
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import Refused, TryAgain
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.client import Enrolled, Requests, failure_of
from fedcore.gateway.deployment import make_fleet
from fedcore.gateway.enrolment import EnrolmentServer, RemoteSigner
from fedcore.gateway.identity import (
    EnrolmentToken,
    check_enrolment,
    check_request,
    check_server_time,
    enrolment_request,
    issue_token,
    read_token,
    server_time,
    sign_request,
)
from fedcore.gateway.messages import PLAN, FleetTrust, RequestHead
from fedcore.gateway.plan import check_plan, sign_plan, to_settings, to_table
from fedcore.gateway.refusals import FAILURE_KEY, PASSING, STATUS, GatewayRefusal
from fedcore.gateway.tls import is_loopback
from fedcore.secagg.crypto import EcdsaKey, Ed25519Key

NOW = 1_800_000_000_000
KEY, OTHER = Ed25519Key(b"1" * 32), Ed25519Key(b"2" * 32)


def p256():
    from cryptography.hazmat.primitives.asymmetric import ec

    return EcdsaKey(ec.derive_private_key(12345, ec.SECP256R1()))


def trust_of(**changes):
    parts = {"plan_keys": (KEY.public,), "time_keys": (OTHER.public, KEY.public), "tls_authority": b""} | changes
    return FleetTrust(
        "watches", KEY.public, parts["plan_keys"], parts["time_keys"], (), parts["tls_authority"], b"", b""
    )  # fmt: skip


@pytest.fixture
def fleet(tmp_path):
    return make_fleet(tmp_path / "fleet", "watches")


@pytest.fixture
def signer(fleet):
    one = fleet.signer()
    yield one
    one.close()


# Requests


@pytest.mark.parametrize("key", [KEY, p256()], ids=["Ed25519", "P-256"])
def test_a_request_is_good_for_its_device_method_and_body_alone(key):
    request = sign_request(key, "watches", "CheckIn", b"body", device=7, counter=3, time=NOW, nonce=bytes(16))
    check_request(request, "CheckIn", key.algorithm, key.public)
    with pytest.raises(GatewayRefusal, match="device 0000000000000007: the signature"):
        check_request(request, "Upload", key.algorithm, key.public)
    with pytest.raises(GatewayRefusal):
        check_request(request, "CheckIn", OTHER.algorithm, OTHER.public)
    for name, value in {
        "deployment": "phones", "device": 8, "counter": 4, "time_ms": NOW + 1, "nonce": b"1" * 16, "body": b"other",
        "signature": bytes(64),
    }.items():  # fmt: skip
        changed = pb.SignedRequest.FromString(request.SerializeToString())
        setattr(changed, name, value)
        with pytest.raises(GatewayRefusal) as refused:
            check_request(changed, "CheckIn", key.algorithm, key.public)
        assert refused.value.reason == pb.BAD_SIGNATURE


def test_what_is_signed_is_what_the_protocol_file_says():
    """Byte for byte, for clients in other languages."""
    head = RequestHead("watches", "CheckIn", 7, 3, NOW, b"n" * 16, b"h" * 32).encode()
    assert head == (
        bytes([1, 80, 7]) + b"watches" + bytes([7]) + b"CheckIn" + (7).to_bytes(8, "big") + (3).to_bytes(8, "big")
        + NOW.to_bytes(8, "big") + b"n" * 16 + b"h" * 32
    )  # fmt: skip


@given(st.binary(max_size=200), st.integers(0, 63), st.integers(0, 7))
def test_no_bit_of_a_signature_can_change(body, byte, bit):
    request = sign_request(KEY, "watches", "Upload", body, device=1, counter=1, time=NOW, nonce=bytes(16))
    signature = bytearray(request.signature)
    signature[byte] ^= 1 << bit
    request.signature = bytes(signature)
    with pytest.raises(GatewayRefusal):
        check_request(request, "Upload", KEY.algorithm, KEY.public)


# Time


def test_server_time_is_signed_over_the_clients_nonce():
    told = server_time(KEY, "watches", b"n" * 16, NOW)
    assert check_server_time(told, trust_of(), b"n" * 16) == NOW
    for trust, nonce in ((trust_of(), b"m" * 16), (trust_of(time_keys=(OTHER.public,)), b"n" * 16)):
        with pytest.raises(Refused, match="no signature of a time key"):
            check_server_time(told, trust, nonce)
    told.time_ms += 1
    with pytest.raises(Refused):
        check_server_time(told, trust_of(), b"n" * 16)


def test_a_devices_idea_of_time_never_goes_back(signer, fleet):
    request = enrolment_request(signer.issue(60), KEY, bytes(16))
    enrolled = Enrolled(KEY, signer.enrol(request), fleet.trust())
    requests = Requests(enrolled, itertools.count(1).__next__, clock=lambda: NOW / 1000)
    requests.enrolled = dataclasses.replace(enrolled, trust=trust_of())
    sent = requests.sign("CheckIn", b"")
    requests.set_clock(sent, server_time(KEY, "watches", sent.request.nonce, NOW + 10**9))
    assert requests.sign("CheckIn", b"").request.time_ms == NOW + 10**9
    assert requests.floor == NOW + 10**9
    with pytest.raises(Refused, match="gone back"):
        requests.check_time(sent, server_time(KEY, "watches", sent.request.nonce, NOW))


# Round tokens


def test_a_round_token_is_its_devices_until_its_end():
    token = issue_token(b"s" * 32, 5, "round", NOW)
    found = read_token(b"s" * 32, token, NOW)
    assert (found.device, found.round_key, found.expiry) == (5, "round", NOW)
    with pytest.raises(GatewayRefusal, match="over") as late:
        read_token(b"s" * 32, token, NOW + 1)
    assert late.value.reason == pb.LATE
    with pytest.raises(GatewayRefusal, match="not one of this fleet's"):
        read_token(b"t" * 32, token, NOW)


@given(st.integers(0, 10**6), st.integers(1, 255))
def test_no_byte_of_a_round_token_can_change(place, change):
    token = bytearray(issue_token(b"s" * 32, 5, "round", NOW))
    token[place % len(token)] ^= change
    with pytest.raises(GatewayRefusal) as refused:
        read_token(b"s" * 32, bytes(token), 0)
    assert refused.value.reason == pb.NO_SUCH_ROUND


@given(st.binary(max_size=200))
def test_any_bytes_are_no_token(data):
    with pytest.raises(GatewayRefusal):
        read_token(b"s" * 32, data, 0)


# Enrolment


def test_a_token_travels_as_one_word_and_names_its_trust_bundle(fleet, signer):
    token = signer.issue(60)
    assert EnrolmentToken.decode(f" {token.encode()}\n") == token
    assert token.check_trust(fleet.trust().encode()) == fleet.trust()
    assert token.secret.hex() not in repr(token)
    with pytest.raises(Refused, match="another trust bundle"):
        token.check_trust(dataclasses.replace(fleet.trust(), deployment="phones").encode())
    for wrong in (
        "",
        token.encode()[:-1],
        token.encode() + "A",
        "x" + token.encode(),
        token.encode().replace("fedcore1", "fedcore2"),
    ):
        with pytest.raises(Refused, match="an enrolment token is") as refused:
            EnrolmentToken.decode(wrong)
        assert token.encode()[20:60] not in str(refused.value)


@pytest.mark.parametrize("key", [Ed25519Key(b"3" * 32), p256()], ids=["Ed25519", "P-256"])
def test_a_token_enrols_one_key_and_repeats_its_answer(fleet, signer, key):
    token = signer.issue(60)
    first = signer.enrol(enrolment_request(token, key, bytes(16)))
    check_enrolment(first, "watches", fleet.trust().enrolment_key)
    assert first.certificate.public_key == key.public
    assert first.device < 1 << 63
    assert signer.enrol(enrolment_request(token, key, b"1" * 16)) == first
    with pytest.raises(GatewayRefusal, match="used for another key"):
        signer.enrol(enrolment_request(token, OTHER, bytes(16)))
    with pytest.raises(GatewayRefusal, match="enrolled already"):
        signer.enrol(enrolment_request(signer.issue(60), key, bytes(16)))
    again = fleet.signer()
    assert again.enrol(enrolment_request(token, key, bytes(16))) == first
    again.close()


def test_whoever_carries_a_request_cannot_enrol_a_key_of_its_own(signer):
    request = enrolment_request(signer.issue(60), KEY, bytes(16))
    thief = enrolment_request(EnrolmentToken(request.token_id, bytes(32), bytes(32)), OTHER, bytes(16))
    stolen = pb.EnrollRequest.FromString(thief.SerializeToString())
    stolen.proof = request.proof
    for one in (thief, stolen):
        with pytest.raises(GatewayRefusal, match="proof is not the token's") as refused:
            signer.enrol(one)
        assert refused.value.reason == pb.TOKEN_REFUSED
    possessed = pb.EnrollRequest.FromString(request.SerializeToString())
    possessed.possession = thief.possession
    with pytest.raises(GatewayRefusal, match="signature"):
        signer.enrol(possessed)
    assert signer.enrol(request).certificate.public_key == KEY.public


def test_unknown_and_expired_tokens_are_refused(signer, fleet):
    unknown = EnrolmentToken.fresh(fleet.trust(), os.urandom)
    for token, said in ((unknown, "proof|unknown"), (signer.issue(-1), "expired")):
        with pytest.raises(GatewayRefusal, match=said):
            signer.enrol(enrolment_request(token, KEY, bytes(16)))
    request = enrolment_request(signer.issue(60), KEY, bytes(16))
    request.public_key = b"short"
    with pytest.raises(GatewayRefusal, match="none of Ed25519 or P-256"):
        signer.enrol(request)


def renewal(key, enrolment, **changes):
    body = pb.RenewBody(enrolment=enrolment.encode()).SerializeToString()
    parts = {"device": enrolment.device, "counter": 1, "time": NOW, "nonce": bytes(16)} | changes
    return sign_request(key, "watches", "Renew", body, **parts)


def test_renewal_is_for_the_same_key_and_not_after_revocation(signer, fleet):
    first = signer.enrol(enrolment_request(signer.issue(60), KEY, bytes(16)))
    signer._days = 9000
    second = signer.renew(renewal(KEY, first))
    assert (second.device, second.certificate.public_key) == (first.device, KEY.public)
    assert second.certificate.not_after > first.certificate.not_after
    with pytest.raises(GatewayRefusal, match="signature"):
        signer.renew(renewal(OTHER, first))
    with pytest.raises(GatewayRefusal, match="another device's"):
        signer.renew(renewal(KEY, first, device=first.device + 1))
    with pytest.raises(GatewayRefusal, match="cannot be renewed"):
        signer.renew(renewal(KEY, dataclasses.replace(first, device=5)))
    signer.revoke(first.device)
    assert signer.devices() == [(first.device, True)]
    with pytest.raises(GatewayRefusal, match="not enrolled here any more") as refused:
        signer.renew(renewal(KEY, first))
    assert refused.value.reason == pb.REVOKED
    with pytest.raises(Refused, match="no device 0000000000000001"):
        signer.revoke(1)


def test_labels_are_the_operators_from_the_token_on(signer, fleet, tmp_path):
    one = signer.enrol(enrolment_request(signer.issue(60, ["lab", "beta", "lab"]), KEY, bytes(16)))
    other = signer.enrol(enrolment_request(signer.issue(60), OTHER, bytes(16)))
    assert (signer.labels(one.device), signer.labels(other.device), signer.labels(7)) == (("beta", "lab"), (), ())
    server = EnrolmentServer(signer, f"unix:{tmp_path}/signer")
    server.start()
    remote = RemoteSigner(server.address)
    assert remote.labels(one.device) == ("beta", "lab")
    assert remote.labels((1 << 63) - 1) == ()
    assert signer.label(one.device, []) == () == remote.labels(one.device)
    assert signer.label(other.device, ["b", "a"]) == ("a", "b") == remote.labels(other.device)
    for wrong in ([""], ["x" * 65], ["a\n"], [str(n) for n in range(33)]):
        with pytest.raises(Refused, match="at most 32 labels, each of 1 to 64 printable characters"):
            signer.issue(60, wrong)
        with pytest.raises(Refused, match="at most 32 labels"):
            signer.label(one.device, wrong)
    with pytest.raises(Refused, match="no device 0000000000000007"):
        signer.label(7, ["a"])
    remote.close()
    server.stop()
    with pytest.raises(GatewayRefusal, match="cannot be reached"):
        RemoteSigner(server.address, 0.2).labels(one.device)


def test_a_list_of_enrolments_of_before_labels_gains_them(fleet):
    first = fleet.signer()
    token = first.issue(60)
    one = first.enrol(enrolment_request(first.issue(60), KEY, bytes(16)))
    for table in ("tokens", "devices"):
        first._db.execute(f"ALTER TABLE {table} DROP COLUMN labels")
    first.close()
    again = fleet.signer()
    assert again.labels(one.device) == ()
    two = again.enrol(enrolment_request(token, OTHER, bytes(16)))
    assert again.label(two.device, ["lab"]) == again.labels(two.device) == ("lab",)
    again.close()


def test_an_enrolment_is_checked_in_all_its_parts(signer, fleet):
    one, key = signer.enrol(enrolment_request(signer.issue(60), KEY, bytes(16))), fleet.trust().enrolment_key
    for changed in (
        dataclasses.replace(one, device=one.device ^ 1),
        dataclasses.replace(one, certificate=dataclasses.replace(one.certificate, not_after=2**40)),
        dataclasses.replace(one, signature=bytes(64)),
    ):
        with pytest.raises(Refused, match="signature"):
            check_enrolment(changed, "watches", key)
    with pytest.raises(Refused, match="enrolled in 'watches', not in 'phones'"):
        check_enrolment(one, "phones", key)
    with pytest.raises(Refused, match="signature"):
        check_enrolment(one, "watches", OTHER.public)


def test_a_signer_in_another_process_answers_the_same(signer, tmp_path):
    server = EnrolmentServer(signer, f"unix:{tmp_path}/signer")
    server.start()
    remote = RemoteSigner(server.address)
    token = signer.issue(60)
    first = remote.enrol(enrolment_request(token, KEY, bytes(16)))
    assert first == signer.enrol(enrolment_request(token, KEY, bytes(16)))
    assert remote.renew(renewal(KEY, first)).device == first.device
    with pytest.raises(GatewayRefusal, match="used for another key") as refused:
        remote.enrol(enrolment_request(token, OTHER, bytes(16)))
    assert refused.value.reason == pb.TOKEN_REFUSED
    server.stop()
    with pytest.raises(GatewayRefusal, match="cannot be reached") as away:
        remote.enrol(enrolment_request(token, KEY, bytes(16)))
    assert away.value.reason == pb.ENROLMENT_CLOSED
    remote.close()


def test_a_file_that_is_no_list_of_enrolments_is_told(fleet):
    (fleet.directory / "signer" / "enrolments.sqlite").write_bytes(b"junk" * 1000)
    with pytest.raises(TryAgain, match="list of enrolments cannot be used"):
        fleet.signer()


# A fleet's files


def test_a_fleets_keys_are_private_and_never_overwritten(fleet):
    modes = {path.name: path.stat().st_mode & 0o777 for path in fleet.directory.rglob("*.key")}
    assert modes == dict.fromkeys(("signing.key", "plan.key", "authority.key", "time.key", "tls.key"), 0o600)
    assert fleet.plan_key().public == fleet.trust().plan_keys[0]
    with pytest.raises(Refused, match="never overwritten"):
        make_fleet(fleet.directory, "watches")


def test_certificates_begin_two_years_ago_and_last_ten(fleet):
    import datetime

    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC)
    for path in (fleet.gateway / "tls.pem", fleet.directory / "authority" / "authority.pem"):
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        assert (now - certificate.not_valid_before_utc).days in {730, 731}
        assert (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days == 3652


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("10.0.0.1", False),
     ("localhost.example.org", False)],
)  # fmt: skip
def test_loopback_is_what_cannot_leave_the_machine(host, loopback):
    assert is_loopback(host) is loopback


# Plans


def plan(**changes):
    return pb.Plan(**({"deployment": "watches", "task": "run", "round": 5, "expires_ms": NOW + 1} | changes))


def test_a_plan_is_refused_unless_signed_current_and_new():
    trust = trust_of()
    assert check_plan(sign_plan(KEY, plan()), trust, NOW, 4) == plan()
    unsigned = pb.SignedPlan(plan=plan().SerializeToString(), key=KEY.public)
    forged = sign_plan(OTHER, plan())
    claimed = pb.SignedPlan(plan=forged.plan, key=KEY.public, signature=forged.signature)
    changed = pb.SignedPlan(plan=plan(round=6).SerializeToString(), key=KEY.public, signature=sign_plan(KEY, plan()).signature)
    for signed, said in (
        (unsigned, "signature"), (forged, "no plan key"), (claimed, "signature"), (changed, "signature"),
        (sign_plan(KEY, plan(deployment="phones")), "is of 'phones'"), (sign_plan(KEY, plan(expires_ms=NOW)), "expired"),
        (sign_plan(KEY, plan(round=4)), "took part in round 4 already"),
    ):  # fmt: skip
        with pytest.raises(Refused, match=said):
            check_plan(signed, trust, NOW, 4)


def test_what_a_gateway_says_may_be_anything():
    """A failure that cannot be read is a passing one, and a plan that cannot is refused: neither ends an agent."""
    told = SimpleNamespace(trailing_metadata=lambda: ((FAILURE_KEY, b"\xff\xff"),))
    assert isinstance(failure_of(told, "a:1"), TryAgain)
    junk = pb.SignedPlan(plan=b"\xff\xff", key=KEY.public, signature=KEY.sign(PLAN, b"\xff\xff"))
    with pytest.raises(Refused, match="cannot be read"):
        check_plan(junk, trust_of(), NOW)


def test_settings_are_what_the_training_configuration_was():
    table = {
        "epochs": 2, "lr": 0.1, "negative": -(2**40), "flag": True, "names": ["a", "ü"], "empty": [], "seed": b"\0\1",
        "scales": [1.5, 2.0], "nested": [[1], ["x"]],
    }  # fmt: skip
    sent = pb.Plan.FromString(sign_plan(KEY, pb.Plan(settings=to_settings(table))).plan)
    found = to_table(sent)
    assert found == table
    assert [type(value) for value in found.values()] == [type(value) for value in table.values()]
    with pytest.raises(Refused, match="setting x is a dict"):
        to_settings({"x": {}})
    with pytest.raises(Refused, match="setting y has a value that this software does not know"):
        to_table(pb.Plan(settings=[pb.Setting(name="y")]))


# Refusals


def test_every_reason_has_a_status_and_travels():
    assert set(STATUS) == set(pb.Reason.values()) - {0}
    assert set(STATUS) > PASSING
    one = GatewayRefusal(pb.TOO_FAST, "slower\nplease", retry_after=7, lacks=("a",), time=pb.ServerTime(time_ms=3))
    back = GatewayRefusal.received(one.failure(), "the gateway")
    assert str(back) == "the gateway refuses (TOO_FAST): slower please"
    assert (back.reason, back.retry_after, back.lacks, back.time.time_ms) == (pb.TOO_FAST, 7, ("a",), 3)
    strange = GatewayRefusal.received(pb.Failure(reason=99, text="x" * 10_000), "the gateway")
    assert str(strange).startswith("the gateway refuses (99): xxx")
    assert len(str(strange)) < 400


def test_a_token_looks_like_a_token():
    text = EnrolmentToken(b"i" * 16, b"s" * 32, b"t" * 32).encode()
    assert text == "fedcore1." + base64.urlsafe_b64encode(b"i" * 16 + b"s" * 32 + b"t" * 32).decode().rstrip("=")
    assert len(text) == 9 + 107
