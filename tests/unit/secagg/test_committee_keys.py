"""Key files: who may read them, that nothing is overwritten, and that what is read is what was signed."""

import json
import os
import stat

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st
from secagg_world import END, randomness

from fedcore.errors import Refused
from fedcore.secagg.crypto import ED25519, P256, EcdsaKey, Ed25519Key, verify
from fedcore.secagg.keys import (
    SIGNING,
    TLS_NAME,
    expiry_of,
    fingerprint_of,
    new_directory,
    new_signing_key,
    new_tls_certificate,
    read_certificate,
    read_message,
    read_private_key,
    read_public_key,
    read_signing_key,
    write_message,
)
from fedcore.secagg.messages import Certificate, TrustBundle
from fedcore.secagg.trust import issue_certificate, sign_trust


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_only_the_owner_reads_private_keys(tmp_path):
    old = os.umask(0)
    try:
        with new_directory(tmp_path / "keys") as fresh:
            new_signing_key(fresh, SIGNING)
            new_tls_certificate(fresh, "member", 10)
    finally:
        os.umask(old)
    assert mode(tmp_path / "keys") == 0o700
    assert {path.name: mode(path) for path in (tmp_path / "keys").iterdir()} == {
        "signing.key": 0o600, "signing.pub": 0o644, "tls.key": 0o600, "tls.pem": 0o644,
    }  # fmt: skip
    for bits in (0o640, 0o604, 0o620):
        (tmp_path / "keys" / "signing.key").chmod(bits)
        with pytest.raises(Refused, match="others may read") as caught:
            read_signing_key(tmp_path / "keys" / "signing.key")
        assert f"{bits:o}" in str(caught.value)


def test_a_key_signs_what_its_public_file_verifies(tmp_path):
    key = new_signing_key(tmp_path, SIGNING)
    algorithm, public = read_public_key(tmp_path / "signing.pub")
    assert (algorithm, public) == (ED25519, key.public)
    signature = read_signing_key(tmp_path / "signing.key").sign("offer", b"content")
    verify(algorithm, public, signature, "offer", b"content")
    assert signature == key.sign("offer", b"content")


def test_public_keys_of_phones_are_read(tmp_path):
    key = ec.derive_private_key(77, ec.SECP256R1())
    (tmp_path / "phone.pub").write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    assert read_public_key(tmp_path / "phone.pub") == (P256, EcdsaKey(key).public)


@pytest.mark.parametrize("kind", ["rsa", "p384", "private", "text", "binary", "none", "directory"])
def test_what_is_no_key_is_refused_in_one_line_without_its_content(kind, tmp_path):
    path = tmp_path / "file"
    if kind == "directory":
        path.mkdir()
    elif kind != "none":
        p384 = ec.derive_private_key(77, ec.SECP384R1())
        content = {
            "rsa": rsa.generate_private_key(65537, 1024).public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
            "p384": p384.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
            "private": p384.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
            "text": b"-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n",
            "binary": b"\xff\xfe secret",
        }[kind]
        path.write_bytes(content)
        path.chmod(0o600)
    for read in (read_public_key, read_signing_key, read_certificate):
        with pytest.raises(Refused) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert "c2VjcmV0" not in str(caught.value) + repr(caught.value.__context__)


def test_a_directory_that_exists_is_left_as_it_is(tmp_path):
    def make():
        with new_directory(tmp_path / "deep" / "keys") as fresh:
            new_signing_key(fresh, SIGNING)

    make()
    first = (tmp_path / "deep" / "keys" / "signing.key").read_bytes()
    with pytest.raises(Refused, match="never overwritten"):
        make()
    assert (tmp_path / "deep" / "keys" / "signing.key").read_bytes() == first
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["keys"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(Refused, match="never overwritten"), new_directory(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(Refused, match="cannot be made"), new_directory(tmp_path / "file" / "keys"):
        pass


def test_a_failure_on_the_way_leaves_no_key_behind(tmp_path):
    with pytest.raises(Refused, match="cannot be made"), new_directory(tmp_path / "keys") as fresh:
        [new_signing_key(fresh, SIGNING) for _ in range(2)]
    assert list(tmp_path.iterdir()) == []


def test_a_certificate_is_self_signed_for_the_one_name_and_told_by_its_fingerprint(tmp_path):
    pem = new_tls_certificate(tmp_path, "operator Ä", 10)
    assert read_certificate(tmp_path / "tls.pem") == pem
    certificate = x509.load_pem_x509_certificate(pem)
    certificate.verify_directly_issued_by(certificate)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [TLS_NAME]
    assert len(bytes.fromhex(fingerprint_of(pem))) == 32
    (tmp_path / "other").mkdir()
    assert fingerprint_of(new_tls_certificate(tmp_path / "other", "operator Ä", 10)) != fingerprint_of(pem)
    assert expiry_of(pem) == certificate.not_valid_after_utc
    assert read_private_key(tmp_path / "tls.key").startswith(b"-----BEGIN PRIVATE KEY-----")
    for name, days in (("", 10), ("a\nb", 10), ("x" * 65, 10), ("fine", 0), ("fine", 10**6)):
        with pytest.raises(Refused, match="printable name"):
            new_tls_certificate(tmp_path / "never", name, days)


def bundle() -> TrustBundle:
    random = randomness("bundle")
    keys = [Ed25519Key(random(32)).public for _ in range(4)]
    return sign_trust(Ed25519Key(random(32)), "phones ü", keys[0], 3, 2, keys[1:])


def test_messages_in_json_are_read_back_and_show_their_fields(tmp_path):
    certificate = issue_certificate(Ed25519Key(bytes(32)), "phones", ED25519, bytes(32), END)
    for name, message in (("bundle", bundle()), ("certificate", certificate)):
        write_message(tmp_path / name, message)
        assert read_message(tmp_path / name, type(message)) == message
        with pytest.raises(Refused, match="cannot be written"):
            write_message(tmp_path / name, message)
    assert json.loads((tmp_path / "bundle").read_text())["member_keys"] == [key.hex() for key in bundle().member_keys]
    with pytest.raises(Refused, match="type TrustBundle"):
        read_message(tmp_path / "certificate", TrustBundle)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_message_file_that_was_changed_is_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("bundle") / "bundle.json"
    write_message(path, bundle())
    document = json.loads(path.read_text())
    key = data.draw(st.sampled_from(sorted(document)))
    value = st.none() | st.integers() | st.text(max_size=5) | st.lists(st.integers(), max_size=2)
    change = data.draw(st.sampled_from(["drop", "add", "set"]))
    if change == "drop":
        del document[key]
    elif change == "add":
        document["another"] = data.draw(value)
    else:
        before = document[key]
        document[key] = data.draw(value.filter(lambda one: one != before))
    path.write_text(json.dumps(document))
    with pytest.raises(Refused, match=r"bundle\.json"):
        read_message(path, TrustBundle)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60) | st.just(b"[" * 100_000) | st.just(b'{"bytes": "zz"}') | st.just(b"[1]"))
def test_what_is_no_message_is_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("bundle") / "file"
    path.write_bytes(content)
    with pytest.raises(Refused):
        read_message(path, Certificate)
