"""SecureGrid around simulated clients: committees that fail, clients and transports that lie."""

from __future__ import annotations

import dataclasses
import json
import time

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

from fedcore.config import parse_config
from fedcore.coordinator.assembly import assemble, build_clients
from fedcore.coordinator.secure import simulated_trust
from fedcore.errors import Refused, RoundFailed, TryAgain
from fedcore.flower import facts_of, from_record, to_record
from fedcore.grids.cohort import CohortGrid
from fedcore.grids.protocol import check_in_of, visit_of
from fedcore.secagg.crypto import Ed25519Key
from fedcore.secagg.member import Member
from fedcore.secagg.messages import SCREENING, CheckIn, Refusal, Screening
from fedcore.secagg.participant import hash_work
from fedcore.secagg.sums import ScoreSum
from fedcore.training.client import RoundTask
from fedcore.training.plan import LocalPlan

COMMITTEE = {"members": 4, "threshold": 3, "corrupt_members": 1}
SCENARIO = {
    "run": {"name": "grid"},
    "data": {"dataset": "digits", "clients": 6, "partition": "iid", "holdout": 0.2},
    "model": {"name": "mlp"},
    "secagg": {"enabled": True, "minimum_survivors": 3, **COMMITTEE},
    "evaluation": {"federated_every": 1},
}


class Transport:
    """Hands messages to simulated clients; ``spoil`` may change each reply, or lose it with None."""

    def __init__(self, inner, spoil):
        self.inner, self.spoil, self.sent = inner, spoil, []
        self.place, self.simulated = inner.place, inner.simulated

    def __getattr__(self, name):
        return getattr(self.inner, name)

    @property
    def nodes(self):
        return self.inner.nodes

    @nodes.setter
    def nodes(self, value):
        self.inner.nodes = value

    def send_and_receive(self, messages, *, timeout=None):
        sent = list(messages)
        self.sent += sent
        replies = [self.spoil(reply) for reply in self.inner.send_and_receive(sent, timeout=timeout)]
        return [reply for reply in replies if reply is not None]


class Bench:
    def __init__(self, spoil=lambda reply: reply, scenario=None, **secagg):
        config = parse_config({**SCENARIO, **(scenario or {}), "secagg": {**SCENARIO["secagg"], **secagg}}, "test", None)
        assembly = assemble(config)
        self.secured, self.layout = assembly.secured, assembly.layout
        trust = simulated_trust(config, assembly.secured)
        self.members = trust.committee.members if trust else {}
        inner = CohortGrid(
            build_clients(assembly), self.layout, mean=True, workers=1, released=self.secured.largest,
            participants=trust.participants if trust else None,
        )  # fmt: skip
        self.transport = Transport(inner, spoil)
        self.grid = self.secured.wrap(self.transport, self.layout, trust.committee if trust else None, "grid")
        self.master = self.layout.join({name: p.detach().numpy() for name, p in assembly.model.named_parameters()})

    def messages(self, kind=MessageType.TRAIN, **changes):
        release = self.secured.updates if kind == MessageType.TRAIN else self.secured.scores
        task = dataclasses.replace(RoundTask(1, LocalPlan(1, 8, 0.1), 100.0, release=release), **changes)
        content = RecordDict({"arrays": to_record(self.layout, self.master), "config": ConfigRecord(task.to_table())})
        return [Message(content, client, kind) for client in range(release.cohort)]

    def run(self, kind=MessageType.TRAIN, **changes):
        """The one reply's facts, and the model in it where it has one."""
        (reply,) = self.grid.send_and_receive(self.messages(kind, **changes))
        arrays = [from_record(self.layout, record) for record in reply.content.array_records.values()]
        return facts_of(reply), arrays[0] if arrays else reply.content


def failing(member, step, error):
    """Let a member fail at one step, as an operator's whose machine is down."""

    def fail(request):
        raise error

    setattr(member, step, fail)


@pytest.fixture(scope="module")
def expected():
    """The model of a round that nothing disturbs."""
    return Bench().run()[1]


@pytest.mark.parametrize("step", ["offer", "approve", "screen", "certify", "release"])
@pytest.mark.parametrize("error", [TryAgain("it is down"), Refused("it thinks otherwise")], ids=["down", "refuses"])
def test_a_member_that_fails_costs_nothing_while_enough_others_answer(expected, step, error):
    bench = Bench()
    failing(bench.members[2], step, error)
    facts, model = bench.run()
    assert np.array_equal(model, expected)
    (told,) = facts.secure
    assert told["members"] == ([1, 3, 4] if step in {"offer", "approve"} else [1, 2, 3, 4])
    assert told["survivors"] == 6
    if step != "approve":  # whose attempt is forgotten with its number
        assert list(told["silent"]) == ["2"]
    numbers = {visit_of(message).epoch for message in bench.transport.sent}
    assert numbers == ({1, 2} if step == "approve" else {1})


def test_too_few_members_lose_the_round_and_nothing_else(expected):
    bench = Bench()
    saved = [bench.members[a].certify for a in (1, 2)]
    for a in (1, 2):
        failing(bench.members[a], "certify", TryAgain("it is down"))
    with pytest.raises(RoundFailed, match="2 members certified the survivors; 3 are needed"):
        bench.run()
    for a, back in zip((1, 2), saved, strict=True):
        bench.members[a].certify = back
    assert np.array_equal(bench.run()[1], expected)
    for a in (1, 2):
        failing(bench.members[a], "offer", TryAgain("it is down"))
    with pytest.raises(RoundFailed, match="2 of 4 committee members answer, 3 are needed: member 1: it is down"):
        bench.run()


def swapped(reply, content):
    return Message(content, reply_to=reply_source(reply))


def reply_source(reply):
    """A message to which ``reply`` could be the answer."""
    return Message(RecordDict(), reply.metadata.src_node_id, MessageType.TRAIN)


def of_client(client, change):
    """Change what one client replies to its work, and leave the rest."""

    def spoil(reply):
        if reply.metadata.src_node_id != client or "upload" not in reply.content.array_records:
            return reply
        return change(reply)

    return spoil


def other_bytes(change):
    def spoil(reply):
        data = bytearray(reply.content.array_records["upload"]["upload"].numpy().tobytes())
        data = change(data)
        record = ArrayRecord({"upload": Array(np.frombuffer(bytes(data), np.uint8))})
        return swapped(reply, RecordDict({**reply.content, "upload": record}))

    return spoil


def flipped(place):
    def change(data):
        data[place] ^= 1
        return data

    return other_bytes(change)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda reply: None, "vanished"),
        (flipped(-1), "vector is not the one that it signed"),
        (flipped(200), ""),
        (other_bytes(lambda data: data[:-2]), "bytes"),
        (other_bytes(lambda data: b""), ""),
        (lambda reply: swapped(reply, RecordDict()), "holds no upload"),
        (
            lambda reply: swapped(
                reply, RecordDict({**reply.content, "upload": ArrayRecord({"upload": Array(np.zeros(9, np.float32))})})
            ),
            "holds no upload",
        ),
    ],
    ids=["lost", "vector", "head", "short", "empty", "nothing", "floats"],
)
def test_a_client_that_sends_something_else_is_left_out_by_name(change, reason):
    bench = Bench(of_client(4, change))
    facts, model = bench.run()
    assert facts.survivors == 5
    ((client, told),) = bench.grid.observed.dropped
    assert client == 4
    assert reason in told
    assert np.isfinite(model).all()
    without = Bench(of_client(4, lambda reply: None)).run()[1]
    assert np.array_equal(model, without)


def test_a_check_in_that_another_sent_already_is_no_second_client():
    seen = {}

    def spoil(reply):
        record = reply.content.config_records.get("secagg")
        if record is None or "check-in" not in record:
            return reply
        seen[reply.metadata.src_node_id] = record
        if reply.metadata.src_node_id == 3:
            return swapped(reply, RecordDict({"secagg": seen[0]}))
        return reply

    bench = Bench(spoil)
    facts, _ = bench.run()
    assert facts.survivors == 5
    assert [client for client, _ in bench.grid.observed.dropped] == [3]
    assert "has checked in already" in bench.grid.observed.dropped[0][1]


def test_a_client_that_dealt_false_shares_is_not_asked_again():
    bench = Bench()
    bench.run()
    (reply,) = bench.transport.inner.send_and_receive(bench.transport.sent[:1])
    name = CheckIn.decode(check_in_of(reply)).certificate.name
    bench.grid.blamed[f"client 0 ({name})"] = "it dealt shares of something else than it committed to"
    facts, _ = bench.run()
    assert facts.survivors == 5
    assert "dealt false shares before" in bench.grid.observed.dropped[0][1]


def test_work_that_differs_from_the_plan_is_refused_by_the_clients():
    """A transport that shows a client another model than the committee approved gets nothing from it."""
    bench = Bench()
    original = bench.transport.inner.send_and_receive

    def tampering(messages, *, timeout=None):
        changed = []
        for message in messages:
            content = dict(message.content)
            if "arrays" in content:
                content["arrays"] = to_record(bench.layout, (bench.master + np.float32(0.125)).astype(np.float32))
            changed.append(Message(RecordDict(content), message.metadata.dst_node_id, message.metadata.message_type))
        return original(changed, timeout=timeout)

    bench.transport.inner.send_and_receive = tampering
    with pytest.raises(RoundFailed, match="given up"):
        bench.run()
    assert all("another model" in reason or reason == "vanished (cohort.dropout)" for _, reason in bench.grid.observed.dropped)
    assert any("another model" in reason for _, reason in bench.grid.observed.dropped)


def test_nothing_is_trained_before_the_plan_is_accepted():
    """What training ends with tells of the data: a coordinator without a plan must not get that far."""
    bench = Bench()
    inner, trained = bench.transport.inner, []
    train, original = inner._clients.train, inner.send_and_receive

    def recording(start, clients, task):
        trained.extend(clients)
        return train(start, clients, task)

    def tampering(messages, *, timeout=None):
        sent = list(messages)
        for message in sent:
            if "invitation" in message.content.config_records["secagg"]:
                message.content.config_records["secagg"]["invitation"] = b"garbage"
        return original(sent, timeout=timeout)

    inner._clients.train, inner.send_and_receive = recording, tampering
    with pytest.raises(RoundFailed):
        bench.run()
    assert not trained


def test_a_node_scores_for_no_sum_but_its_own():
    secured = dataclasses.replace(Bench().secured, scores=None)
    task = RoundTask(1, LocalPlan(1, 8, 0.1), 100.0, release=ScoreSum(4, 2, 100))
    with pytest.raises(Refused, match="another sum"):
        secured.check_task(task, trains=False, invited=True)
    with pytest.raises(Refused, match="without an invitation"):
        secured.check_task(task, trains=False, invited=False)


def test_scores_are_summed_too():
    facts, content = Bench().run(MessageType.EVALUATE)
    plain, openly = Bench(simulate="arithmetic", members=3, threshold=3, corrupt_members=2).run(MessageType.EVALUATE)
    assert facts.histogram == plain.histogram
    assert dict(content["metrics"]) == dict(openly["metrics"])
    assert sum(facts.histogram) == facts.survivors == 6
    assert facts.accuracies == ()


def test_replies_name_nobody():
    (reply,) = Bench().grid.send_and_receive(Bench().messages())
    facts = json.loads(str(reply.content.config_records["fedcore-facts"]["json"]))
    assert (facts["clients"], facts["dropped"], facts["accuracies"]) == ([], [], [])


def test_work_without_a_sum_is_refused():
    with pytest.raises(Refused, match="adds up integers"):
        Bench().run(release=None)
    bench = Bench()
    bench.transport.simulated = False
    with pytest.raises(Refused, match="it is for simulations"):
        bench.secured.wrap(bench.transport, bench.layout, None, "real")


def test_two_rounds_share_no_mask():
    """The same work twice: what clients send differs in every word that matters, the sum in none."""
    uploads = []

    def keep(reply):
        if "upload" in reply.content.array_records and reply.metadata.src_node_id == 0:
            uploads.append(reply.content.array_records["upload"]["upload"].numpy()[-4000:].view("<u4").copy())
        return reply

    bench = Bench(keep)
    first, second = bench.run()[1], bench.run()[1]
    assert np.array_equal(first, second)
    assert (uploads[0] == uploads[1]).mean() < 0.01


def refusing(member, clients):
    """Let a member of this process refuse uploads that nothing is wrong with, and sign that."""
    (inner,) = (value for value in vars(member).values() if isinstance(value, Member))
    (key,) = (value for value in vars(inner).values() if isinstance(value, Ed25519Key))
    honest = member.screen

    def screen(request):
        refused = tuple(Refusal(client, "its box does not open") for client in clients)
        answer = dataclasses.replace(Screening.decode(honest(request)), refused=refused)
        return dataclasses.replace(answer, signature=key.sign(SCREENING, answer.content())).encode()

    member.screen = screen


def test_a_refused_upload_is_told_to_the_operator_with_the_member_that_refused_it():
    bench = Bench()
    refusing(bench.members[1], [4])
    facts, _ = bench.run()
    (told,) = facts.secure
    assert (told["survivors"], told["refused"]) == (5, {"1": 1})
    assert bench.grid.observed.dropped == ((4, "its upload was refused (member 1: its box does not open)"),)
    assert 4 not in bench.grid.observed.clients


def test_a_member_that_refuses_too_many_is_done_without(expected):
    bench = Bench()
    refusing(bench.members[1], [0, 1, 2, 3])
    facts, model = bench.run()
    assert np.array_equal(model, expected)
    assert facts.secure[0]["members"] == [2, 3, 4]
    assert "member 1: its box does not open" in dict(bench.grid.observed.dropped)[0]
    refusing(bench.members[2], [0, 1, 2, 3])  # a second one, and too few are left
    with pytest.raises(RoundFailed, match="too few members of the committee are left: member 2 refused 4 uploads"):
        bench.run()


def test_a_client_that_never_answers_takes_the_others_no_time(monkeypatch):
    """It is waited for, but not until nothing is left of the round."""
    bench, clock = Bench(), [time.time()]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    inner, waited = bench.transport.inner.send_and_receive, []

    def waiting(messages, *, timeout=None):
        replies = inner([message for message in messages if message.metadata.dst_node_id != 5], timeout=timeout)
        clock[0] += timeout
        waited.append(timeout)
        return replies

    bench.transport.inner.send_and_receive = waiting
    for timeout in (3600, 600, 24 * 3600.0, None):
        waited.clear()
        (reply,) = bench.grid.send_and_receive(bench.messages(), timeout=timeout)
        assert facts_of(reply).survivors == 5
        assert waited[1] > 2.5 * waited[0] or waited[1] == timeout


def test_clients_hold_a_training_plan_to_their_own_number_of_corrupt_clients(monkeypatch):
    """Few clients evaluate, so few of them may be corrupt; that must not be enough for a sum of updates."""
    many = {"data": {**SCENARIO["data"], "clients": 12}, "cohort": {"evaluate_size": 4}}
    bench = Bench(scenario=many, corrupt_fraction=0.3, minimum_survivors=6)
    assert (bench.secured.demands.updates.corrupt_clients, bench.secured.demands.scores.corrupt_clients) == (4, 2)
    bench.run()
    weak = dataclasses.replace(bench.secured.terms, corrupt=2)
    bench.grid._terms = weak
    with pytest.raises(RoundFailed, match="given up"):
        bench.run()
    reasons = {reason for _, reason in bench.grid.observed.dropped}
    assert any("allows for 2 corrupt clients; at least 4 are demanded" in reason for reason in reasons)


def test_a_node_accepts_numbers_that_follow_from_data_it_does_not_know():
    """Widths and largest weights that nobody set; not another cohort, nor what the scenario says."""
    own, others = Bench().secured, Bench(weight_cap=3)
    asked = RoundTask(1, LocalPlan(1, 8, 0.1), 100.0, release=dataclasses.replace(own.updates, weight_cap=5, bits=20))
    own.check_task(asked, trains=True, invited=True)
    scored = dataclasses.replace(asked, release=dataclasses.replace(own.scores, weight_cap=9))
    own.check_task(scored, trains=False, invited=True)
    for wrong in (dataclasses.replace(own.updates, cohort=5), dataclasses.replace(own.updates, clip=2.0)):
        with pytest.raises(Refused, match="another sum"):
            own.check_task(dataclasses.replace(asked, release=wrong), trains=True, invited=True)
    with pytest.raises(Refused, match="another sum"):
        others.secured.check_task(asked, trains=True, invited=True)
    with pytest.raises(Refused, match="another sum"):
        own.check_task(scored, trains=True, invited=True)


def test_a_client_whose_evaluation_fails_scores_nothing_and_says_nothing():
    bench = Bench()
    clients, seen = bench.transport.inner._clients, []
    forward = clients.model.forward

    def failing_once(x):
        if len(x) == len(clients.data.holdout[2]) and not seen:
            seen.append(len(x))
            raise ValueError("blood pressure 181")
        return forward(x)

    clients.model.forward = failing_once
    facts, content = bench.run(MessageType.EVALUATE)
    assert seen
    assert sum(facts.histogram) == 5
    assert facts.survivors == 6
    assert "blood pressure" not in json.dumps([str(facts), str(content)])
    assert "blood pressure" in str(bench.grid.observed.dropped)  # a simulation's operator holds the data anyway


def test_the_work_s_hash_tells_bytes_from_text():
    hashes = {hash_work(b"model", {"mine": value}) for value in (b"ab", "6162", [b"ab"], ["6162"], [b"a", b"b"])}
    assert len(hashes) == 5
