"""Members in this process, and what an operator's directory says about them."""

import dataclasses
import json
import threading

import pytest
from secagg_world import END, EPOCH, MODEL, NOW, POLICY, TASK, World, randomness
from typer.testing import CliRunner

from fedcore.cli import app
from fedcore.errors import Refused, TryAgain
from fedcore.secagg.client import Client
from fedcore.secagg.committee import STEPS, LocalMember, local_committee
from fedcore.secagg.committee_status import OpenRound, read_records, status_of
from fedcore.secagg.journal import FileJournal
from fedcore.secagg.messages import OfferRequest
from fedcore.secagg.trust import issue_certificate


class Unclocked:
    """A member of the committee under test, where the shared world expects one that takes the time."""

    def __init__(self, member):
        for step in STEPS:
            setattr(self, step, lambda request, now, step=step: getattr(member, step)(request))


def world_around(committee, clients=6) -> World:
    """The shared world with this committee and its enrolment key."""
    trust = committee.trust
    world = World(len(trust.member_keys), trust.threshold, trust.corrupt_members, clients)
    world.trust, world.members = trust, {a: Unclocked(member) for a, member in committee.members.items()}
    world.certificates = [
        issue_certificate(committee.enrolment, trust.population, key.algorithm, key.public, END + 10**6) for key in world.identities
    ]
    world.clients = [world.start_client(i) for i in range(clients)]
    return world


def whole_round(world, number=1, alive=range(5)):
    current = world.begin(number)
    current.upload(alive)
    current.screen()
    current.certify()
    current.release()
    assert current.total().tolist() == current.plain(alive)
    return current


def test_a_committee_of_this_process_runs_a_round():
    committee = local_committee(4, 3, 1, "phones", POLICY, clock=lambda: NOW)
    assert [member.point for member in committee.members.values()] == [1, 2, 3, 4]
    whole_round(world_around(committee))
    other = local_committee(4, 3, 1, "phones", POLICY)
    assert not set(other.trust.member_keys) & set(committee.trust.member_keys)
    committee.close()


def test_an_unsafe_committee_is_not_made(tmp_path):
    for directory in (None, tmp_path / "committee"):
        with pytest.raises(Refused, match="not safe"):
            local_committee(4, 2, 1, "phones", POLICY, directory=directory)
    assert list(tmp_path.iterdir()) == []


def test_keys_and_promises_outlive_the_process(tmp_path):
    def start():
        return local_committee(3, 3, 2, "phones", POLICY, directory=tmp_path / "committee", clock=lambda: NOW)

    first = start()
    current = whole_round(world_around(first))
    request = current.coordinator.release_request(2)
    with pytest.raises(TryAgain, match="another process"):
        start()
    first.close()
    second = start()
    assert second.trust == first.trust
    assert second.members[2].release(request) == first.members[2]._member.release(request, NOW)
    second.close()
    for m, t, c, population in ((4, 3, 1, "phones"), (3, 3, 1, "phones"), (3, 3, 2, "tablets")):
        with pytest.raises(Refused, match="holds the committee"):
            local_committee(m, t, c, population, POLICY, directory=tmp_path / "committee")
    for path in tmp_path.rglob("*"):
        expected = 0o700 if path.is_dir() else 0o644 if path.suffix in {".pub", ".json"} else 0o600
        assert path.stat().st_mode & 0o777 == expected, path


def test_a_local_member_forgets_by_its_own_clock():
    now = [NOW]
    committee = local_committee(3, 3, 2, "phones", POLICY, clock=lambda: now[0])
    member: LocalMember = committee.members[1]
    member.offer(OfferRequest(TASK, 1, EPOCH, END).encode())
    assert [one.state for one in status_of(member._journal.read()).open] == ["offered"]
    now[0] = END
    member.expire()
    assert status_of(member._journal.read()) == dataclasses.replace(status_of({}), closed={TASK: 1})


def test_status_counts_what_the_journal_holds(tmp_path):
    world = World(journal=lambda point: FileJournal(tmp_path / str(point) / "journal"))
    seen = lambda point=1: status_of(read_records(tmp_path / str(point) / "journal"))
    assert seen() == status_of({})
    states = []
    current = world.begin(1, signers=(2, 3, 4))
    states.append(seen())
    current.upload(range(7))
    current.screen()
    current.certify()
    states += [seen(), seen(2)]
    current.release()
    world.offers(2)
    states += [seen(), seen(2)]
    assert [(one.approved, tuple((r.round, r.state) for r in one.open)) for one in states] == [
        (0, ((1, "offered"),)),
        (1, ((1, "certified"),)),  # member 1 was not asked to approve; what it certified counts as approved
        (1, ((1, "certified"),)),
        (1, ((1, "released"), (2, "offered"))),
        (1, ((1, "released"), (2, "offered"))),
    ]
    assert states[-1].open[0] == OpenRound(TASK, 1, END, "released")
    world.members[1].expire(END)
    assert (seen().approved, seen().closed, seen().open) == (1, {TASK: 2}, ())


def test_records_are_read_while_they_change(tmp_path):
    """What a writer replaces and overwrites meanwhile is read again: always a whole record, old or new."""
    journal, stop = FileJournal(tmp_path), threading.Event()
    values = [bytes([i]) * 5000 for i in range(8)]
    journal.write("a", values[0])

    def write():
        while not stop.is_set():
            for value in values:
                journal.write("a", value)
                journal.write("b", value)
                journal.erase("b")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        found = [read_records(tmp_path) for _ in range(100)]
    finally:
        stop.set()
        writer.join()
    assert all(one["a"] in values and one.get("b", values[0]) in values for one in found)


def test_a_damaged_record_is_named(tmp_path):
    FileJournal(tmp_path).write("a", b"content")
    (tmp_path / "a.record").write_bytes(b"x" * 60)
    with pytest.raises(Refused, match=r"a\.record.*damaged"):
        read_records(tmp_path)


def fedcore(*arguments):
    return CliRunner().invoke(app, [str(one) for one in arguments])


def made(*arguments) -> dict:
    done = fedcore(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_the_commands_make_what_a_round_needs(tmp_path):
    """Keys, bundle and a client's certificate by the commands alone; the round then runs on the bundle."""
    from fedcore.secagg.keys import read_message
    from fedcore.secagg.messages import Certificate, TrustBundle

    keys = [made("committee", "keygen", "--out", tmp_path / f"m{a}")["public_key"] for a in (1, 2, 3)]
    enrolment = made("enrol-ca", "keygen", "--out", tmp_path / "ca")["public_key"]
    made("trust", "keygen", "--out", tmp_path / "root")
    members = [part for a in (1, 2, 3) for part in ("--member", tmp_path / f"m{a}" / "identity.pub")]
    common = ("--population", "phones", "--enrol-ca", tmp_path / "ca" / "signing.pub")
    done = fedcore(
        "trust", "bundle", tmp_path / "root", *common, *members, "--threshold", 3, "--corrupt", 2, "--out", tmp_path / "b.json"
    )
    assert done.exit_code == 0, done.output
    shown = made("trust", "show", tmp_path / "b.json", "--root", tmp_path / "root" / "signing.pub")
    assert shown == {
        "population": "phones", "members": keys, "threshold": 3, "corrupt_members": 2, "enrolment_key": enrolment, "checked": True,
    }  # fmt: skip
    assert not made("trust", "show", tmp_path / "b.json")["checked"]
    device = World().identities[0]
    key = tmp_path / "m1" / "identity.pub"  # any Ed25519 key will do for the file; the device's own signs below
    done = fedcore("enrol-ca", "sign", tmp_path / "ca", "--key", key, "--population", "phones", "--out", tmp_path / "c.json")
    assert done.exit_code == 0, done.output
    certificate = read_message(tmp_path / "c.json", Certificate)
    trust = read_message(tmp_path / "b.json", TrustBundle)
    assert certificate.public_key.hex() == keys[0]
    assert Client(device, certificate, trust, POLICY, randomness("c")).check_in(TASK, EPOCH, END)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("committee keygen --out {d}/m1", "never overwritten"),
        ("enrol-ca keygen --out {d}/ca", "never overwritten"),
        ("trust bundle {d}/ca {bundle} --member {d}/m1/identity.pub --threshold 1 --corrupt 1", "not safe"),
        ("trust bundle {d}/ca {bundle} --member {d}/m1/tls.pem --threshold 1 --corrupt 0", "no public key"),
        ("enrol-ca sign {d}/m1 --key {d}/m1/identity.pub --population p --out {d}/c", "cannot be read"),
        ("trust show {d}/good --root {d}/m1/identity.pub", "signature (trust bundle) is not valid"),
        ("committee show {d}/ca", "cannot be read"),
        ("committee serve {d}/m1 --trust {d}/good --root {d}/m1/identity.pub", "not valid"),
        ("trust bundle {d}/ca {bundle} --member {d}/m1/identity.pub --threshold 1 --corrupt 0", "must not enrol clients"),
        ("trust bundle {d}/root {bundle} --member {d}/ca/signing.pub --threshold 1 --corrupt 0", "every role has a key"),
        ("enrol-ca sign {d}/ca --key {d}/ca/signing.pub --population p --out {d}/c", "not the key that enrols"),
        ("committee serve {d}/m2 --trust {d}/good --root {d}/root/signing.pub", "names no member with the key"),
        ("committee serve {d}/m1 --trust {d}/good --root {d}/root/signing.pub --policy {d}/policy.toml", "survivors; keys are"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(line, text, tmp_path):
    for a in (1, 2):
        made("committee", "keygen", "--out", tmp_path / f"m{a}")
    made("enrol-ca", "keygen", "--out", tmp_path / "ca")
    made("trust", "keygen", "--out", tmp_path / "root")
    (tmp_path / "policy.toml").write_text("survivors = 3\n")
    bundle = ("--population", "p", "--member", tmp_path / "m1" / "identity.pub", "--threshold", 1, "--corrupt", 0)
    done = fedcore("trust", "bundle", tmp_path / "root", *bundle, "--enrol-ca", tmp_path / "ca" / "signing.pub", "--out",
                   tmp_path / "good")  # fmt: skip
    assert done.exit_code == 0, done.output
    more = f"--population p --enrol-ca {tmp_path}/ca/signing.pub --out {tmp_path}/b"
    done = fedcore(*line.format(d=tmp_path, bundle=more).split())
    assert done.exit_code == 2
    assert text in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_key_for_a_coordinator_has_no_identity(tmp_path):
    assert made("committee", "keygen", "--coordinator", "--out", tmp_path / "c").keys() == {"fingerprint"}
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"tls.key", "tls.pem"}


def test_show_says_what_was_promised_and_nothing_secret(tmp_path):
    found = made("committee", "keygen", "--out", tmp_path / "m")
    committee = local_committee(3, 3, 2, "phones", POLICY, directory=tmp_path / "local", clock=lambda: NOW)
    world = world_around(committee)
    whole_round(world)
    world.offers(2)
    assert made("committee", "show", tmp_path / "m") == {
        **found, "certificate_ends": made("committee", "show", tmp_path / "m")["certificate_ends"],
        "approved": 0, "closed": {}, "open": [],
    }  # fmt: skip
    (tmp_path / "local" / "member-1" / "journal").rename(tmp_path / "m" / "journal")
    shown = made("committee", "show", tmp_path / "m")
    assert (shown["approved"], [(one["round"], one["state"]) for one in shown["open"]]) == (1, [(1, "released"), (2, "offered")])
    text = fedcore("committee", "show", tmp_path / "m").stdout
    assert "'digits' round 1: released" in text
    for record in (tmp_path / "m" / "journal").glob("*.record"):
        pieces = [record.read_bytes()[at : at + 16] for at in range(100, record.stat().st_size - 16, 16)]
        assert not any(piece.hex() in text + json.dumps(shown) for piece in pieces if piece != bytes(16))
    assert MODEL.hex() not in text
