"""The agent's loop: when it asks, what it does with answers, and the clocks it survives."""

import json

import fedcore_device.agent
import fedcore_device.cli
import pytest
from fedcore_device.agent import Agent, enrol_device, forget_device, load_enrolled
from fedcore_device.environment import Conditions
from fleet_fake import LOOSE, TASK, Gateway, World, assignment, enrolled, fixed_draw, fresh_state, plan, told

from fedcore.errors import Refused, TryAgain
from fedcore.gateway import gateway_pb2 as pb
from fedcore.gateway.refusals import GatewayRefusal


class Steps:
    """A `Stop` that ends after so many waits, and keeps how long each was; the clock moves as long."""

    def __init__(self, count):
        self.waits, self._count = [], count

    def is_set(self):
        return len(self.waits) >= self._count

    def wait(self, timeout=None):
        self.waits.append(timeout)

    def monotonic(self):
        return sum(self.waits)


@pytest.fixture
def fleet(tmp_path, monkeypatch):
    """An enrolled device whose connections reach a fake."""
    state, world, gateway = fresh_state(tmp_path / "state"), World(tmp_path / "examples"), Gateway()
    one = enrolled()
    state.keep("enrolment.bin", one.enrolment.encode())
    state.keep("trust.bin", one.trust.encode())
    monkeypatch.setattr(fedcore_device.agent, "load_enrolled", lambda _: one)
    monkeypatch.setattr(fedcore_device.agent, "_connect", lambda *_: gateway)
    monkeypatch.setattr(fedcore_device.agent.random, "uniform", lambda low, high: (low + high) / 2)
    return state, world, gateway


def agent_of(fleet, steps, **options):
    state, world, _ = fleet
    return Agent(state, world, LOOSE, draw=fixed_draw, look=10.0, monotonic=steps.monotonic, **options)


def wait(seconds):
    return pb.CheckInReply(wait=pb.Wait(retry_after_ms=int(1000 * seconds)))


def test_it_asks_as_often_as_it_was_told_to(fleet):
    gateway, steps = fleet[2], Steps(12)
    gateway.replies = [wait(35), wait(5), wait(1000)]
    agent_of(fleet, steps).run(steps)
    assert len(gateway.asked) == 3
    assert steps.waits[:6] == [10, 10, 10, 5, 5, 10]
    assert gateway.asked[0].runtime == "onnxruntime"
    assert "accumulate-1" in gateway.asked[0].capabilities
    assert "secagg-1" not in gateway.asked[0].capabilities, "no committee is pinned"


def test_waits_are_counted_only_while_it_is_eligible(fleet, monkeypatch):
    _, world, gateway = fleet
    steps = Steps(30)
    good, bad = Conditions(free_storage=1 << 40), Conditions(free_storage=1 << 40, charging=False)
    world.now = [good, good, *[bad] * 20, good, good, good]
    gateway.replies = [wait(15), wait(1000)]
    asked, when = gateway.check_in, []
    monkeypatch.setattr(gateway, "check_in", lambda body: when.append(steps.monotonic()) or asked(body))
    agent_of(fleet, steps).run(steps)
    assert len(when) == 2
    assert when[0] == 0
    assert 20 * 10 + 15 <= when[1] <= 20 * 10 + 25, "twenty looks at which nothing counted, and the wait of fifteen seconds"


def test_an_ineligible_device_does_not_even_ask(fleet):
    _, world, gateway = fleet
    world.now = [Conditions(free_storage=1 << 40, temperature=90.0)]
    steps = Steps(5)
    agent = agent_of(fleet, steps)
    agent.run(steps)
    assert not gateway.asked
    assert "90 degrees" in agent.waiting_for


def test_work_is_done_and_the_next_question_follows(fleet):
    state, _, gateway = fleet
    gateway.replies = [pb.CheckInReply(assignment=assignment(plan(gateway))), wait(100)]
    steps = Steps(3)
    agent_of(fleet, steps).run(steps)
    assert len(gateway.uploads) == 1
    assert len(gateway.asked) == 2
    assert state.participation(TASK).times == 1


def test_a_refused_plan_is_not_asked_for_again_at_once(fleet):
    gateway, steps = fleet[2], Steps(2)
    gateway.replies = [pb.CheckInReply(assignment=assignment(plan(gateway, deployment="phones")))]
    agent_of(fleet, steps).run(steps)
    assert [report.outcome for report in gateway.reports] == [pb.REFUSED_PLAN]
    assert len(gateway.asked) == 1


def test_a_round_in_progress_goes_before_new_questions(fleet):
    gateway = fleet[2]
    gateway.replies = [pb.CheckInReply(assignment=assignment(plan(gateway))), wait(100)]
    gateway.fails = {"upload": 2}
    steps = Steps(5)
    agent_of(fleet, steps).run(steps)
    assert len(gateway.uploads) == 3
    assert len(gateway.asked) == 2
    assert steps.waits[:2] == [1.0, 2.0], "each failure doubles the pause"


def test_a_check_in_that_fails_is_followed_by_the_same_wait_again(fleet):
    gateway, steps = fleet[2], Steps(9)
    gateway.replies = [wait(40), wait(40)]
    agent = agent_of(fleet, steps)
    agent._visit(steps.is_set)
    gateway.fails = {"check_in": 1}
    assert agent._visit(steps.is_set) == 40
    assert "broke off" in fleet[0].problem


@pytest.mark.parametrize("reason", [pb.REVOKED, pb.QUARANTINED, pb.PROTOCOL])
def test_an_identity_that_is_not_wanted_ends_the_agent(fleet, reason):
    state, _, gateway = fleet
    gateway.refusals = {"check_in": [GatewayRefusal(reason, "go away")]}
    with pytest.raises(GatewayRefusal, match="go away"):
        agent_of(fleet, Steps(5)).run(Steps(5))
    assert state.problem == "go away"


@pytest.mark.parametrize("reason", [pb.EXPIRED, pb.UNKNOWN_DEVICE])
def test_a_certificate_that_has_ended_or_is_unknown_is_renewed(fleet, reason):
    state, _, gateway = fleet
    gateway.refusals = {"check_in": [GatewayRefusal(reason, "renew")]}
    gateway.replies = [wait(100)]
    before = state.kept("enrolment.bin")
    steps = Steps(3)
    agent_of(fleet, steps).run(steps)
    assert len(gateway.asked) == 2
    assert state.kept("enrolment.bin") != b""
    assert len(before) == len(state.kept("enrolment.bin"))


def test_a_certificate_that_ends_soon_is_renewed_beforehand(fleet, monkeypatch):
    _, world, gateway = fleet
    renewed = []
    monkeypatch.setattr(gateway, "renew", lambda: renewed.append(1) or enrolled())
    gateway.replies = [wait(1), wait(100)]
    steps = Steps(1)
    agent_of(fleet, steps).run(steps)
    assert not renewed
    world.offset = 340 * 86_400.0
    agent_of(fleet, steps)._visit(steps.is_set)
    assert renewed


def test_too_fast_is_waited_for(fleet):
    gateway, steps = fleet[2], Steps(1)
    gateway.refusals = {"check_in": [GatewayRefusal(pb.TOO_FAST, "slowly", retry_after=77_000)]}
    assert agent_of(fleet, steps)._visit(steps.is_set) == 77


def test_wrong_clocks_are_reported_and_survived(fleet):
    state, world, gateway = fleet
    steps = Steps(1)
    world.offset = -365 * 86_400.0
    state.raise_floor(int(1000 * (world.clock() + 365 * 86_400)))
    gateway.fails = {"check_in": 1}
    agent = agent_of(fleet, steps)
    agent._visit(steps.is_set)
    assert state.problem.startswith("clock: this device's clock is 31")
    gateway.replies = [wait(5)]
    assert agent._visit(steps.is_set) == 5


def test_tls_that_fails_is_reported_as_the_clock(fleet, monkeypatch):
    state, _, gateway = fleet
    monkeypatch.setattr(gateway, "check_in", lambda _: (_ for _ in ()).throw(TryAgain("certificate is not yet valid")))
    agent_of(fleet, Steps(1))._visit(lambda: False)
    assert state.problem.startswith("clock: TLS fails")


def test_the_servers_time_is_kept_and_a_lie_about_the_past_is_not_believed(fleet):
    state, world, _ = fleet
    agent = agent_of(fleet, Steps(1))
    sent = agent._requests.sign("CheckIn", b"")
    agent._requests.check_time(sent, told(sent))
    state.raise_floor(agent._requests.floor)
    again = Agent(state, world, LOOSE)
    sent = again._requests.sign("CheckIn", b"")
    with pytest.raises(Refused, match="gone back"):
        again._requests.check_time(sent, told(sent, now=1_000_000))


def test_lies_about_the_time_freeze_the_agent_and_do_not_end_it(fleet, monkeypatch):
    state, _, gateway = fleet
    monkeypatch.setattr(gateway, "check_in", lambda _: (_ for _ in ()).throw(Refused("the gateway's clock has gone back")))
    steps = Steps(4)
    agent_of(fleet, steps).run(steps)
    assert state.problem == "the gateway's clock has gone back"
    assert steps.waits == [1.0, 2.0, 4.0, 8.0]


def test_forget_erases_and_says_what_the_gateway_did_not_hear(fleet):
    state, _, gateway = fleet
    gateway.fails = {"forget": 1}
    assert "broke off" in forget_device(state)
    assert not list(state.directory.iterdir())


def test_a_device_that_is_not_enrolled_says_so(tmp_path):
    state = fresh_state(tmp_path / "s")
    with pytest.raises(Refused, match="not enrolled"):
        load_enrolled(state)
    state.keep("enrolment.bin", b"x")
    with pytest.raises(Refused, match="enrolled already"):
        enrol_device(state, "127.0.0.1:1", "token")


class TestCommands:
    def test_status_of_a_fresh_device(self, tmp_path, capsys):
        assert fedcore_device.cli.main(["--state", str(tmp_path / "s"), "status", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["device"], found["round"], found["problem"]) == (None, None, None)

    def test_errors_are_one_line(self, tmp_path, capsys):
        assert fedcore_device.cli.main(["--state", str(tmp_path / "s"), "run", "--examples", "x:y"]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        assert fedcore_device.cli.main(["--state", str(tmp_path / "s"), "enroll", "--server", "a:1", "--token", "nonsense"]) == 2
        assert "nonsense" not in capsys.readouterr().err, "a token is a secret"
        for look in ("0", "-1", "nan", "inf", "x"):
            with pytest.raises(SystemExit):
                fedcore_device.cli.main(["--state", str(tmp_path / "s"), "run", "--look", look])
            assert "takes seconds above 0" in capsys.readouterr().err

    def test_forget_without_an_enrolment(self, tmp_path):
        assert fedcore_device.cli.main(["--state", str(tmp_path / "s"), "forget"]) == 0
