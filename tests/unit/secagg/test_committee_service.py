"""A member behind gRPC and TLS, in this process with the tests' clock: the same bytes as in memory, and what is refused and how."""

import contextlib
import dataclasses
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from secagg_world import END, EPOCH, NOW, TASK, Round, World

from fedcore.errors import Misbehaviour, Refused, RoundFailed, TryAgain
from fedcore.secagg.committee import STEPS, LocalMember
from fedcore.secagg.committee_client import RemoteMember
from fedcore.secagg.committee_service import STRICT, CommitteeServer, Operator, point_of, read_floor
from fedcore.secagg.committee_wire import (
    FAILURE_KEY,
    GREET,
    SERVICE,
    Failure,
    Greeting,
    Limits,
    Welcome,
    check_welcome,
    longest_message,
    one_line,
    welcome,
)
from fedcore.secagg.crypto import Ed25519Key
from fedcore.secagg.keys import TLS_NAME, fingerprint_of, new_tls_certificate
from fedcore.secagg.messages import Offer, OfferRequest, Proposal, ReleaseRequest, Screening
from fedcore.secagg.trust import sign_trust

LIMITS = Limits(16, 16)
OFFER = OfferRequest(TASK, 1, EPOCH, END).encode()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """Directories with a TLS key and certificate each."""
    found = {}
    for name in ("member", "other", "coordinator", "stranger"):
        found[name] = tmp_path_factory.mktemp(name)
        new_tls_certificate(found[name], name, 10)
    return found


class Serving:
    """Members of a world behind servers, and how to reach them."""

    def __init__(self, world, certificates):
        self.world, self.certificates = world, certificates
        self.stack = contextlib.ExitStack()
        self.addresses: dict[int, str] = {}
        self.servers: dict[int, CommitteeServer] = {}

    def serve(
        self, point, *, member=None, key=None, trust=None, tls="member", limits=LIMITS, coordinator=None, listen="127.0.0.1:0"
    ):
        world = self.world
        local = LocalMember(point, member or world.members[point], world.journals[point], lambda: NOW)
        folder = self.certificates[tls]
        pair = (folder / "tls.key").read_bytes(), (folder / "tls.pem").read_bytes()
        longest = longest_message(limits, len(world.trust.member_keys))
        operator = Operator(local, key or world.member_keys[point - 1], trust or world.trust, pair, longest)
        demanded = (self.certificates[coordinator] / "tls.pem").read_bytes() if coordinator else None
        server = CommitteeServer(operator, listen, demanded)
        self.stack.callback(server.stop, 0)
        self.addresses[point], self.servers[point] = server.start(), server
        return server

    def remote(self, point, *, tls="member", patience=20.0, at=None, **more) -> RemoteMember:
        fingerprint = fingerprint_of((self.certificates[tls] / "tls.pem").read_bytes())
        more.setdefault("limits", LIMITS)
        member = RemoteMember(point, at or self.addresses[point], fingerprint, self.world.trust, patience=patience, **more)
        self.stack.callback(member.close)
        return member

    def raw(self, point):
        """A channel without the checks of a `RemoteMember`."""
        certificate = (self.certificates["member"] / "tls.pem").read_bytes()
        options = (("grpc.ssl_target_name_override", TLS_NAME),)
        channel = grpc.secure_channel(self.addresses[point], grpc.ssl_channel_credentials(certificate), options)
        self.stack.callback(channel.close)
        return channel


@pytest.fixture
def serving(certificates):
    one = Serving(World(), certificates)
    with one.stack:
        yield one


class Compared:
    """Asks the remote member and its twin in memory; the answers have the same bytes."""

    def __init__(self, remote, twin):
        self.asked = []
        for step in STEPS:
            setattr(self, step, lambda request, now, step=step: self._compare(remote, twin, step, request))

    def _compare(self, remote, twin, step, request):
        answer = getattr(remote, step)(request)
        assert answer == getattr(twin, step)(request, NOW)
        assert answer == getattr(remote, step)(request) or step == "screen"
        self.asked.append(step)
        return answer


def test_a_round_through_servers_has_the_same_bytes_as_one_in_memory(serving):
    """Twin members with the same keys and randomness answer every request; 3 of 8 clients drop."""
    twins = World().members
    for point in serving.world.members:
        serving.serve(point)
    compared = {a: Compared(serving.remote(a), twins[a]) for a in twins}
    serving.world.members = compared
    current = serving.world.begin()
    current.upload(range(5))
    current.screen()
    current.certify()
    current.release()
    assert current.total().tolist() == current.plain(range(5))
    assert compared[1].asked == list(STEPS)


def test_a_refusal_is_the_same_exception_on_the_other_side(serving):
    serving.serve(1)
    remote, local = serving.remote(1), World().members[1]
    remote.offer(OFFER)
    local.offer(OFFER, NOW)
    for request in (b"", b"garbage", OfferRequest(TASK, 1, EPOCH, END + 1).encode(), OfferRequest(TASK, 2, EPOCH, NOW).encode()):
        with pytest.raises(Misbehaviour) as there:
            remote.offer(request)
        with pytest.raises(Misbehaviour) as here:
            local.offer(request, NOW)
        assert there.value.party == here.value.party == "coordinator"
        assert str(there.value) == f"{here.value} (says member 1)"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"members": 5}, "names a committee of"),
        ({"threshold": 2, "signers": (1, 2)}, "names a committee of"),
        ({"minimum_survivors": 2}, "minimum of 2 survivors"),
    ],
)
def test_a_plan_with_another_committee_or_below_the_floor_is_refused(serving, changes, text):
    serving.serve(1)
    world = serving.world
    proposal = Proposal(world.header(world.offers(), **changes), tuple(world.check_ins())).encode()
    with pytest.raises(Misbehaviour, match=text):
        serving.remote(1).approve(proposal)


def test_another_committees_offer_is_refused(serving):
    """A plan with an offer that a key outside the bundle signed, and the right numbers."""
    serving.serve(1)
    world, strangers = serving.world, World(seed=7)
    offers = world.offers(members=[1, 2]) + strangers.offers(members=[3])
    proposal = Proposal(world.header(offers), tuple(world.check_ins())).encode()
    with pytest.raises(Misbehaviour, match=r"offer of member 3: the signature \(offer\) is not valid"):
        serving.remote(1).approve(proposal)


def test_another_certificate_than_the_pinned_is_refused_at_once(serving):
    serving.serve(1, tls="other")
    with pytest.raises(Refused, match="shows a certificate with fingerprint") as caught:
        serving.remote(1).offer(OFFER)
    assert "\n" not in str(caught.value)
    assert serving.world.journals[1].read() == {}


def test_a_certificate_that_changes_later_is_refused(serving):
    server = serving.serve(1)
    remote = serving.remote(1)
    remote.offer(OFFER)
    server.stop(0)
    serving.serve(1, tls="other", listen=serving.addresses[1])
    with pytest.raises(Refused, match="pinned is"):
        remote.offer(OFFER)


def test_another_key_behind_the_right_certificate_is_refused(serving):
    serving.serve(1, key=Ed25519Key(b"k" * 32))
    with pytest.raises(Misbehaviour, match="does not hold the key") as caught:
        serving.remote(1).offer(OFFER)
    assert caught.value.party.startswith("member 1 at 127.0.0.1:")


def test_swapped_addresses_are_told(serving):
    serving.serve(2)
    with pytest.raises(Misbehaviour, match="member 2 answers in the place of member 1"):
        serving.remote(1, at=serving.addresses[2]).offer(OFFER)


def test_another_trust_bundle_is_told(serving):
    world = serving.world
    keys = [key.public for key in world.member_keys]
    other = sign_trust(world.root, "tablets", world.enrolment.public, 3, 1, keys)
    serving.serve(1, trust=other)
    with pytest.raises(Misbehaviour, match="another trust bundle"):
        serving.remote(1).offer(OFFER)


def test_only_the_coordinator_with_the_demanded_certificate_is_heard(serving):
    serving.serve(1, coordinator="coordinator")
    for credentials in (None, serving.certificates["stranger"]):
        with pytest.raises(TryAgain, match=r"member 1 at .* gave up after 0.3 s"):
            serving.remote(1, credentials=credentials, patience=0.3).offer(OFFER)
    assert serving.world.journals[1].read() == {}
    assert serving.remote(1, credentials=serving.certificates["coordinator"]).offer(OFFER)


def test_messages_beyond_the_limit_are_refused_on_both_sides(serving):
    serving.serve(1, limits=Limits(2, 2))
    longest = longest_message(Limits(2, 2), 4)
    with pytest.raises(Refused, match=f"takes messages of at most {longest} bytes, this screen request has {longest + 1}"):
        serving.remote(1).screen(bytes(longest + 1))
    with pytest.raises(grpc.RpcError) as caught:
        serving.raw(1).unary_unary(f"/{SERVICE}/screen")(bytes(longest + 1), timeout=20)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(Misbehaviour):  # of this length it is read, and the member still answers
        serving.remote(1).screen(bytes(longest))


def test_an_answer_beyond_the_limit_is_the_members_fault(serving):
    class Talkative:
        def offer(self, request, now):
            return bytes(longest_message(LIMITS, 4))

        approve = screen = certify = release = expire = None

    serving.serve(1, member=Talkative())
    with pytest.raises(Misbehaviour, match="longer than the") as caught:
        serving.remote(1, limits=Limits(2, 2)).offer(OFFER)
    assert caught.value.party.startswith("member 1")


def test_what_passes_is_asked_again(serving):
    """A full disk for two requests; then the answer comes, and the caller sees nothing of it."""
    world, left = serving.world, [2]
    real = world.journals[1].write

    def write(name, record):
        left[0] -= 1
        if left[0] >= 0:
            raise TryAgain("the journal cannot be written (No space left on device)")
        real(name, record)

    world.journals[1].write = write
    serving.serve(1)
    remote = serving.remote(1)
    answer = remote.offer(OFFER)
    assert left[0] == -1
    assert Offer.decode(answer).round == 1
    assert remote.offer(OFFER) == answer
    left[0] = 10**6
    with pytest.raises(TryAgain, match="No space left on device"):
        serving.remote(1, patience=2).offer(OfferRequest(TASK, 2, EPOCH, END).encode())


def test_a_member_that_is_gone_or_speaks_otherwise(serving):
    server = serving.serve(1)
    remote = serving.remote(1, patience=2)
    remote.offer(OFFER)
    server.stop(0)
    with pytest.raises(TryAgain, match=r"member 1 at .*gave up after"):
        remote.offer(OFFER)
    with pytest.raises(TryAgain, match=r"member 1 at .*refused\)$"):  # one attempt, without another wait
        remote.offer(OFFER)
    serving.serve(1, listen=serving.addresses[1])
    assert remote.offer(OFFER)  # the same object, a new connection
    with pytest.raises(Refused, match="does not speak"):
        remote._ask("another", b"")


def test_a_defect_tells_nothing_but_its_place(serving, caplog):
    class Broken:
        def offer(self, request, now):
            raise ValueError("the secret is 1234")

        approve = screen = certify = release = expire = None

    serving.serve(1, member=Broken())
    with caplog.at_level(logging.INFO, "fedcore"), pytest.raises(TryAgain, match="its log says where") as caught:
        serving.remote(1, patience=2).offer(OFFER)
    assert "offer 'digits' round 1: failed: ValueError at test_committee_service.py:" in caplog.text
    assert "1234" not in caplog.text + str(caught.value)


def test_every_request_leaves_one_line_without_a_secret(serving, caplog):
    world = serving.world
    for point in world.members:
        serving.serve(point)
    remotes = {a: serving.remote(a) for a in world.members}
    unclocked = type(
        "Unclocked", (), {step: lambda self, request, now, step=step: getattr(self.one, step)(request) for step in STEPS}
    )
    with caplog.at_level(logging.INFO, "fedcore"):
        inner = dict(world.members)
        for a, remote in remotes.items():
            world.members[a] = unclocked()
            world.members[a].one = remote
        current = world.begin()
        records = {a: next(iter(member._records.values())) for a, member in inner.items()}
        current.upload(range(6))
        current.screen()
        current.certify()
        current.release()
        for request in (OfferRequest("two\nlines\x1b[2J\u2028", 1, EPOCH, END).encode(), b"\xff"):
            with contextlib.suppress(Misbehaviour):
                remotes[1].offer(request)
    assert current.total().tolist() == current.plain(range(6))
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("fedcore.secagg")]
    assert all(line.isprintable() for line in lines)
    told = [line.split(" ", 1)[1] for line in lines]
    for step, count in {"greet": 4, "offer": 4 + 2, "approve": 3, "screen": 4, "certify": 4, "release": 4}.items():
        assert sum(line.startswith(step) for line in told) == count
    assert sum("'digits' round 1: done" in line for line in told) == 4 + 3 + 4 + 4 + 4
    assert any(line.startswith("offer unreadable: refused: coordinator") for line in told)
    released = [member._records[TASK, 1].release for member in inner.values()]
    secrets = [record.box_secret for record in records.values()] + [record.reveal for record in records.values()]
    secrets += [release[at : at + 33] for release in released for at in range(0, len(release), 33)]
    text = caplog.text
    assert not any(secret.hex() in text or repr(secret)[2:-1] in text for secret in secrets if len(secret) >= 32)


def test_requests_at_once_get_one_answer(serving):
    serving.serve(1)
    remotes = [serving.remote(1) for _ in range(4)]
    with ThreadPoolExecutor(12) as pool:
        answers = set(pool.map(lambda i: remotes[i % 4].offer(OFFER), range(40)))
    assert len(answers) == 1


def test_a_request_that_waits_too_long_gives_up_its_place(serving):
    entered, leave = threading.Event(), threading.Event()

    class Slow:
        def offer(self, request, now):
            entered.set()
            leave.wait(20)
            return b"late"

        approve = screen = certify = release = expire = None

    serving.serve(1, member=Slow())
    remote, other = serving.remote(1), serving.remote(1, patience=0.5)
    other._connection = other._connect(time.monotonic() + 20)  # greeted while the member is free
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(remote.offer, OFFER)
        entered.wait(20)
        with pytest.raises(TryAgain):
            other.offer(OFFER)
        leave.set()
        assert first.result(20) == b"late"


def test_expiry_erases_between_requests(serving):
    world, now = serving.world, [NOW]
    local = LocalMember(1, world.members[1], world.journals[1], lambda: now[0])
    server = serving.serve(1)
    server._operator = dataclasses.replace(server._operator, member=local)
    serving.remote(1).offer(OFFER)
    secret = world.members[1]._records[TASK, 1].box_secret
    assert secret in b"".join(world.journals[1].read().values())
    server.expire()
    assert secret in b"".join(world.journals[1].read().values())
    now[0] = END
    server.expire()
    assert secret not in b"".join(world.journals[1].read().values())


@pytest.fixture(scope="module")
def open_round(certificates):
    """A member in the middle of a round, and a request of each step to it."""
    serving = Serving(World(), certificates)
    with serving.stack:
        current: Round = serving.world.begin()
        current.upload(range(6))
        current.screen()
        requests = {"offer": OFFER, "approve": current.coordinator.proposal(), "screen": current.coordinator.screen_request(1)}
        current.certify()
        requests |= {"certify": current.coordinator.certify_request(), "release": current.coordinator.release_request(1)}
        requests[GREET] = Greeting(bytes(32)).encode()
        serving.serve(1)
        yield serving, requests, serving.raw(1)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from([*STEPS, GREET]), st.sampled_from([*STEPS, GREET, None]), st.data())
def test_garbage_is_refused_with_one_line(open_round, method, content, data):
    """Random bytes, bytes of another step, and requests that were cut or had one byte changed."""
    serving, requests, channel = open_round
    if content is None:
        request = data.draw(st.binary(max_size=300))
    else:
        request = bytearray(requests[content])
        if content == method or data.draw(st.booleans()):
            at = data.draw(st.integers(0, len(request) - 1))
            request[at] ^= data.draw(st.integers(1, 255))
            request = request[: data.draw(st.one_of(st.just(len(request)), st.integers(0, len(request))))]
    before = serving.world.journals[1].read()
    call = channel.unary_unary(f"/{SERVICE}/{method}").future(bytes(request), timeout=20)
    error = call.exception()
    if error is None:  # another nonce, another round, or an upload that is screened out
        assert method in {GREET, "offer"} or (method == "screen" and Screening.decode(call.result()).refused)
        return
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION, error.details()
    assert error.details().isprintable()
    failure = Failure.decode(dict(error.trailing_metadata())[FAILURE_KEY])
    assert failure.party == b"coordinator"
    assert failure.text
    assert serving.world.journals[1].read() == before


def test_a_longest_message_is_an_upper_bound_and_not_far_off():
    """Against whole rounds with the longest names: complete graph, every member, all clients alive or as few as may be."""
    for n, m, t, c in ((12, 4, 3, 1), (30, 5, 4, 2)):
        world = World(m, t, c, clients=n)
        current = world.begin()
        lengths = [len(current.coordinator.proposal())]
        current.upload(range(n))
        current.screen()
        lengths += [len(current.coordinator.screen_request(a)) for a in current.header.points]
        current.certify()
        lengths.append(len(current.coordinator.certify_request()))
        lengths += [len(current.coordinator.release_request(a)) for a in current.header.points]
        current.release()
        lengths += [len(world.members[a].release(current.coordinator.release_request(a), NOW)) for a in current.header.points]
        bound = longest_message(Limits(n, n - 1), m)
        metric_blocks = longest_message(Limits(2, 1), 1)  # the header's share, of which these rounds have little
        assert max(lengths) <= bound
        assert bound - metric_blocks <= 1.35 * max(lengths)
    assert ReleaseRequest.least() < longest_message(Limits(2, 1), 1)
    with pytest.raises(Refused, match="65536 clients with 65535 neighbours make messages of"):
        longest_message(Limits(65536, 65535), 5)


def test_a_welcome_proves_the_key_here_and_now():
    world = World(clients=0)
    answer = welcome(Greeting(b"n" * 32).encode(), world.member_keys[0], 1, world.trust, 1000)
    assert check_welcome(answer, b"n" * 32, 1, world.trust) == 1000
    with pytest.raises(Refused, match="another greeting"):
        check_welcome(answer, b"o" * 32, 1, world.trust)
    forged = dataclasses.replace(Welcome.decode(answer), longest=2000).encode()
    with pytest.raises(Refused, match="does not hold the key"):
        check_welcome(forged, b"n" * 32, 1, world.trust)


@given(st.text(max_size=1500), st.text(max_size=300), st.integers(0, 255))
def test_a_failure_is_one_bounded_line_whatever_it_says(text, party, kind):
    for error in (Misbehaviour(party, text), Refused(text), TryAgain(text), RoundFailed(text)):
        again = Failure.decode(Failure.of(error).encode()).error("member 1")
        assert isinstance(again, TryAgain if isinstance(error, RoundFailed) else type(error))
        assert str(again).isprintable()
        assert one_line(text)[:200] in str(again)
    lie = Failure(kind, party.encode()[:256], text.encode()[:1000]).error("member 1")
    assert isinstance(lie, (Refused, TryAgain))
    assert "member 1" in str(lie)


@pytest.mark.parametrize(
    ("address", "fingerprint", "point", "text"),
    [
        ("nowhere", "a" * 64, 1, "HOST:PORT"),
        ("host:0", "a" * 64, 1, "HOST:PORT"),
        ("host:x", "a" * 64, 1, "HOST:PORT"),
        (":1", "a" * 64, 1, "HOST:PORT"),
        ("host:1", "a" * 63, 1, "64 hexadecimal digits"),
        ("host:1", "g" * 64, 1, "64 hexadecimal digits"),
        ("host:1", "a" * 64, 5, "no member 5"),
    ],
)
def test_what_does_not_name_a_member_is_refused(address, fingerprint, point, text):
    with pytest.raises(Refused, match=text):
        RemoteMember(point, address, fingerprint, World(clients=0).trust)


def test_an_address_in_use_is_refused(serving):
    serving.serve(1)
    with pytest.raises(Refused, match="cannot be listened at"):
        serving.serve(2, listen=serving.addresses[1])
    for listen in ("", "127.0.0.1", ":0", "no host:0", "127.0.0.1:99999", "127.0.0.1:-1"):
        with pytest.raises(Refused, match=r"cannot be listened at|HOST:PORT"):
            serving.serve(2, listen=listen)


def test_the_floor_is_strict_unless_the_operator_says_otherwise(tmp_path):
    assert read_floor(None) == STRICT
    assert STRICT.policy.noise_multiplier > 0
    path = tmp_path / "policy.toml"
    path.write_text("minimum_survivors = 3\nnoise_multiplier = 0\nneighbours = 9\n")
    floor = read_floor(path)
    assert (floor.policy.minimum_survivors, floor.policy.noise_multiplier, floor.limits.neighbours) == (3, 0, 9)
    assert (floor.policy.corrupt_clients, floor.policy.longest_round, floor.limits.clients) == (4, 3600, 1000)
    assert dict(floor.items())["minimum_survivors"] == 3


@pytest.mark.parametrize(
    "text",
    ["survivors = 3", "minimum_survivors = 1", "minimum_survivors = 3.5", "minimum_survivors = true", "noise_multiplier = nan",
     "noise_multiplier = -1.0", "noise_multiplier = 'x'", "longest_round = 0", "clients = 1e3", "neighbours = 70000", "a = [",
     "\0"],
)  # fmt: skip
def test_a_policy_that_says_something_else_is_refused(text, tmp_path):
    (tmp_path / "policy.toml").write_text(text)
    with pytest.raises(Refused, match=r"policy\.toml") as caught:
        read_floor(tmp_path / "policy.toml")
    assert str(caught.value).isprintable()


def test_a_policy_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(Refused, match="cannot be read"):
        read_floor(tmp_path / "none")


def test_a_key_that_the_bundle_does_not_name_serves_nobody():
    world = World(clients=0)
    assert [point_of(world.trust, key.public) for key in world.member_keys] == [1, 2, 3, 4]
    with pytest.raises(Refused, match="names no member with the key"):
        point_of(world.trust, bytes(32))


def test_the_twins_of_the_comparison_above_are_none_with_other_randomness():
    assert World(seed=1).members[1].offer(OFFER, NOW) != World(seed=2).members[1].offer(OFFER, NOW)
