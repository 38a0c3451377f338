"""A device's state, its owner's policy, its conditions, and the walls around the child that trains."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from device_releases import put
from fedcore_device.agent import Gateway, gateway_of, load_enrolled
from fedcore_device.cli import main
from fedcore_device.environment import Conditions, LinuxEnvironment
from fedcore_device.examples import load_examples
from fedcore_device.policy import Eligibility, Policy, read_policy
from fedcore_device.sandbox import filter_for
from fedcore_device.standing import read_standings
from fedcore_device.state import Participation, State, Work

from fedcore.errors import Refused, TryAgain
from fedcore.gateway.messages import Enrolment, FleetTrust
from fedcore.registry.slots import Store
from fedcore.secagg.messages import Certificate

GOOD = Conditions(battery_percent=80, temperature=40.0, free_storage=1 << 40)
DEVICE = Path(__file__).parents[3] / "clients" / "linux"


class TestState:
    def test_numbers_are_never_given_twice_whatever_is_lost(self, tmp_path):
        seen = []
        for _ in range(4):
            state = State(tmp_path / "s")  # the one before is gone without a word
            seen += [state.next_number() for _ in range(300)]
        assert seen == sorted(set(seen))

    def test_a_copy_gives_numbers_that_were_used(self, tmp_path):
        """So that the gateway notices."""
        first, second = State(tmp_path / "s"), State(tmp_path / "s")
        assert [first.next_number() for _ in range(3)] != [second.next_number() for _ in range(3)]
        copied = State(tmp_path / "c")
        copied.keep("numbers.json", (tmp_path / "s" / "numbers.json").read_bytes())
        third = State(tmp_path / "s")
        assert copied.next_number() == third.next_number()

    def test_the_floor_of_time_only_rises(self, tmp_path):
        for time_seen, floor in ((5000, 5000), (4000, 5000), (6000, 6000)):
            State(tmp_path / "s").raise_floor(time_seen)
            assert State(tmp_path / "s").floor == floor

    def test_one_agent_at_a_time(self, tmp_path):
        with State(tmp_path / "s").locked(), pytest.raises(TryAgain, match="another"), State(tmp_path / "s").locked():
            pass

    def test_others_must_not_enter_it(self, tmp_path):
        (tmp_path / "s").mkdir(mode=0o755)
        with pytest.raises(Refused, match="0700"):
            State(tmp_path / "s")

    def test_files_are_their_owners(self, tmp_path):
        state = State(tmp_path / "s")
        state.next_number()
        state.keep_work(Work("t", 1, b"p", b"t", {"entropy": "1"}))
        state.participate("t", 1)
        assert {path.stat().st_mode & 0o777 for path in (tmp_path / "s").iterdir() if path.is_file()} == {0o600}

    def test_the_round_survives_and_its_secrets_are_not_shown(self, tmp_path):
        work = Work("t", 3, b"plan", b"token", {"entropy": "aa"}, b"invitation", "trained", 1, 2, {"steps": 3})
        State(tmp_path / "s").keep_work(work)
        assert State(tmp_path / "s").work() == work
        assert "entropy" not in repr(work)
        assert "token" not in repr(work)

    def test_a_damaged_round_is_given_up(self, tmp_path):
        state = State(tmp_path / "s")
        for data in (b"{", b"[]", b'{"task": 1}', b"\xff"):
            state.keep("round.json", data)
            assert state.work() is None
            assert not (tmp_path / "s" / "round.json").exists()

    def test_participations_count_each_round_once(self, tmp_path):
        for number in (3, 3, 7, 5):
            State(tmp_path / "s").participate("t", number)
        assert State(tmp_path / "s").history() == {"t": Participation(2, 7)}

    def test_a_full_disk_keeps_what_was_there(self, tmp_path, monkeypatch):
        state = State(tmp_path / "s")
        state.participate("t", 1)
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(TryAgain, match="No space"):
            state.participate("t", 2)
        monkeypatch.undo()
        assert State(tmp_path / "s").participation("t") == Participation(1, 1)

    def test_erase_leaves_the_policy_alone_and_nothing_else(self, tmp_path):
        state = State(tmp_path / "s")
        state.keep("policy.toml", b"")
        state.keep("identity.key", b"secret")
        (state.round / "progress.bin").write_bytes(b"x")
        state.erase()
        assert [path.name for path in (tmp_path / "s").iterdir()] == ["policy.toml"]


class TestDamage:
    """Files that are damaged are named, with what to do; the device never begins anew by itself, and nothing is lost."""

    def world(self, tmp_path):
        put(tmp_path / "s", 1, {"flagship/onnx": b"x"})
        (tmp_path / "s").chmod(0o700)
        state = State(tmp_path / "s")
        state.keep("gateway.json", b'{"address": "g:1", "plain": false}')
        state.raise_floor(5)
        return state

    def contents(self, folder):
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    @pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"{}", b'{"address": 5, "plain": false}', b"[" * 100_000, b"\xff", None])
    def test_a_damaged_gateway_json(self, tmp_path, damage):
        state = self.world(tmp_path)
        path = state.directory / "gateway.json"
        assert gateway_of(state) == Gateway("g:1")
        path.unlink()
        if damage is not None:
            path.write_bytes(damage)
        before = self.contents(tmp_path)
        with pytest.raises(Refused, match=rf"{path} is damaged or missing: write the gateway .*the device stays enrolled") as found:
            gateway_of(state)
        assert "\n" not in str(found.value)
        assert self.contents(tmp_path) == before

    @pytest.mark.parametrize("damage", [b"", b"{", b"{}", b"null"])
    def test_a_damaged_pointer(self, tmp_path, capsys, damage):
        state = self.world(tmp_path)
        path = state.directory / "models" / "digits" / "pointer.json"
        path.write_bytes(damage)
        before = self.contents(tmp_path)
        with pytest.raises(Refused, match=f"{path} is damaged"), Store(path.parent):
            pass
        assert main(["--state", str(state.directory), "models", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)["digits"]
        assert str(path) in told["problem"]
        assert "put a copy of it back, or remove it" in told["problem"]
        assert {name: data for name, data in self.contents(tmp_path).items() if name.name != "lock"} == before

    @pytest.mark.parametrize("name", ["enrolment.bin", "trust.bin"])
    @pytest.mark.parametrize("damage", [b"", b"x"])
    def test_a_damaged_identity_is_no_new_device(self, tmp_path, capsys, name, damage):
        state = self.world(tmp_path)
        enrolment = Enrolment(7, Certificate("watches", 1, b"k" * 32, 2**31, bytes(64)), bytes(64))
        trust = FleetTrust("watches", bytes(32), (bytes(32),), (bytes(32),), (bytes(32),), b"", b"", b"")
        state.keep("enrolment.bin", enrolment.encode())
        state.keep("trust.bin", trust.encode())
        state.keep(name, damage)
        with pytest.raises(Refused, match=rf"{name} is damaged .*put a copy of it back"):
            load_enrolled(state)
        words = ["--state", str(state.directory), "enroll", "--server", "g:1", "--token", "fedcore1.x"]
        assert main(words) == 2
        assert main(["--state", str(state.directory), "status"]) == 2
        if name == "enrolment.bin":
            assert "is enrolled already" in capsys.readouterr().err

    def test_a_file_of_another_kind_is_not_none(self, tmp_path):
        state = self.world(tmp_path)
        (state.directory / "trust.bin").mkdir()
        with pytest.raises(Refused, match=r"trust\.bin cannot be read"):
            state.kept("trust.bin")
        (state.directory / "numbers.json").write_bytes(b"")
        with pytest.raises(Refused, match=r"numbers\.json is damaged"):
            State(state.directory).next_number()
        (state.directory / "updates.json").write_bytes(b"")
        with pytest.raises(Refused, match=r"updates\.json is damaged"):
            read_standings(state)

    def test_who_only_looks_makes_nothing(self, tmp_path, capsys):
        for words, code in (
            (["status"], 0),
            (["models"], 0),
            (["status", "--json"], 0),
            (["run"], 2),
            (["update"], 2),
            (["forget"], 0),
        ):
            assert main(["--state", str(tmp_path / "none" / "s"), *words]) == code
            assert list(tmp_path.iterdir()) == []
        assert "holds no device's state; `fedcore-device enroll` begins one" in capsys.readouterr().err
        (tmp_path / "s").mkdir(mode=0o700)
        assert main(["--state", str(tmp_path / "s"), "status"]) == 0
        assert list((tmp_path / "s").iterdir()) == []


class TestPolicy:
    def test_the_default_is_the_strictest_of_all_keys(self, tmp_path):
        assert read_policy(tmp_path / "policy.toml") == Policy()
        assert Policy().plan.secure_aggregation
        assert Policy().plan.noise_multiplier >= 1
        assert Policy().plan.minimum_devices >= 100
        assert Policy().conditions.charging
        assert not Policy().device.tell_examples

    def test_a_file_loosens_it_key_by_key(self, tmp_path):
        conditions = '[conditions]\nwindows = ["22:00-06:00"]\ntemperature = 60\n'
        (tmp_path / "policy.toml").write_text(f'[plan]\nsecure_aggregation = false\n{conditions}[device]\ntier = "pi"\n')
        found = read_policy(tmp_path / "policy.toml")
        assert (found.plan.secure_aggregation, found.plan.noise_multiplier) == (False, Policy().plan.noise_multiplier)
        assert (found.conditions.windows, found.conditions.temperature, found.device.tier) == (("22:00-06:00",), 60.0, "pi")

    @pytest.mark.parametrize(("text", "word"), [
        ("[plans]", "unknown section [plans]"), ("[plan]\nnoise = 1", "no key noise"),
        ("[plan]\nsecure_aggregation = 0", "like True"),
        ("[plan]\nnoise_multiplier = -1", "-1"), ("[plan]\nminimum_devices = 1.5", "1.5"), ("[plan", "cannot be read"),
        ('[conditions]\nwindows = ["25:00-26:00"]', "25:00"), ("[conditions]\nwindows = [1]", "windows"),
        ("[plan]\nminimum_devices = true", "True"),
    ])  # fmt: skip
    def test_wrong_files_are_refused(self, tmp_path, text, word):
        (tmp_path / "policy.toml").write_text(text)
        with pytest.raises(Refused) as found:
            read_policy(tmp_path / "policy.toml")
        assert word in str(found.value)


@pytest.mark.parametrize(("change", "word"), [
    ({}, ""), ({"charging": False}, "not charging"), ({"unmetered": False}, "metered"), ({"idle": False}, "in use"),
    ({"battery_percent": 49}, "49 %"), ({"battery_percent": None}, ""), ({"temperature": 70.1}, "70.1 degrees"),
    ({"temperature": None}, ""), ({"free_storage": 1000}, "1000 bytes"),
])  # fmt: skip
def test_conditions(change, word):
    found = Eligibility().why_not(Conditions(**(vars(GOOD) | change)), time.time())
    assert (word in found) if word else not found


def test_windows_follow_the_wall_clock_over_midnight_and_through_its_changes(monkeypatch):
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        night, day = Eligibility(windows=("22:00-06:00",)), Eligibility(windows=("09:00-12:00", "13:00-17:00"))
        for date in ((2026, 3, 29), (2026, 10, 25), (2026, 7, 1)):  # the first two have 23 and 25 hours
            for minute in range(0, 24 * 60, 30):
                now = time.mktime((*date, minute // 60, minute % 60, 0, 0, 0, -1))
                hour = time.localtime(now).tm_hour
                assert (not night.why_not(GOOD, now)) == (hour >= 22 or hour < 6)
                assert (not day.why_not(GOOD, now)) == (9 <= hour < 12 or 13 <= hour < 17)
    finally:
        monkeypatch.undo()
        time.tzset()


class TestLinux:
    def machine(self, root, **files):
        for name, text in files.items():
            path = root / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
        return LinuxEnvironment(root, "x", root=root)

    def test_a_laptop(self, tmp_path):
        supply = "sys__class__power_supply__"
        battery = {f"{supply}BAT0__type": "Battery", f"{supply}BAT0__capacity": "63", f"{supply}BAT0__status": "Discharging"}
        files = battery | {f"{supply}AC__type": "Mains", f"{supply}AC__online": "0"}
        found = self.machine(tmp_path, **files).conditions(training=False)
        assert (found.charging, found.battery_percent) == (False, 63)
        assert self.machine(tmp_path, **files | {f"{supply}AC__online": "1"}).conditions(training=False).charging
        files |= {f"{supply}BAT0__status": "Charging", f"{supply}AC__online": "0"}
        assert self.machine(tmp_path, **files).conditions(training=False).charging

    def test_a_board_without_a_battery_hangs_on_a_wire(self, tmp_path):
        found = self.machine(tmp_path, sys__class__thermal__thermal_zone0__temp="48312").conditions(training=False)
        assert (found.charging, found.battery_percent, found.temperature) == (True, None, 48.312)
        assert found.free_storage > 0

    @pytest.mark.parametrize(("name", "unmetered"), [("eth0", True), ("wlan0", True), ("wwan0", False), ("ppp0", False)])
    def test_networks(self, tmp_path, name, unmetered):
        route = f"Iface\tDestination\tGateway\nlo\t0000007F\t0\n{name}\t00000000\t0101A8C0"
        assert self.machine(tmp_path, proc__net__route=route).conditions(training=False).unmetered is unmetered

    def test_its_own_training_does_not_make_it_busy(self, tmp_path):
        machine = self.machine(tmp_path, proc__loadavg="1.4 0 0 1/2 3", proc__cpuinfo="processor\t: 0\n")
        assert not machine.conditions(training=False).idle
        assert machine.conditions(training=True).idle

    def test_a_file_overrides_what_is_sensed(self, tmp_path):
        file = tmp_path / "c.json"
        machine = LinuxEnvironment(tmp_path, "x", override=file)
        assert machine.conditions(training=False).temperature != 99.5
        file.write_text('{"temperature": 99.5}')
        assert machine.conditions(training=False).temperature == 99.5
        kinds = ['{"battery_percent": "50"}', '{"free_storage": null}', '{"idle": 1}', '{"temperature": true}']
        for text in ('{"warm": 1}', "[", "[1]", *kinds):
            file.write_text(text)
            with pytest.raises(Refused, match=r"c\.json"):
                machine.conditions(training=False)


class TestExamples:
    def test_directories_are_read_in_the_order_of_names(self, tmp_path):
        for i in (1, 0):
            np.savez(tmp_path / f"{i}.npz", x=np.full((2, 3), i), y=np.full(2, i))
        x, y = load_examples(str(tmp_path))
        assert (x.dtype, y.dtype) == (np.float32, np.int64)
        assert y.tolist() == [0, 0, 1, 1]
        assert x[:, 0].tolist() == [0, 0, 1, 1]

    def test_functions(self, tmp_path, monkeypatch):
        (tmp_path / "owners_examples.py").write_text(
            "import numpy as np\ndef good(): return np.ones((4, 2)), np.arange(4)\ndef bad(): return 1\ndef nan(): return "
            "np.full((1, 2), np.nan), np.zeros(1, int)\ndef short(): return np.ones((4, 2)), np.arange(3)\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        assert load_examples("owners_examples:good")[0].shape == (4, 2)
        for name, word in (("bad", "failed"), ("nan", "not finite"), ("short", "needed are"), ("none", "failed")):
            with pytest.raises(Refused, match=word):
                load_examples(f"owners_examples:{name}")

    def test_nothing_there(self, tmp_path):
        with pytest.raises(Refused, match=r"no \.npz"):
            load_examples(str(tmp_path))
        with pytest.raises(Refused, match="neither"):
            load_examples(str(tmp_path / "missing"))

    def test_no_pickles_are_opened(self, tmp_path):
        np.savez(tmp_path / "a.npz", x=np.array([{}], object), y=np.zeros(1, int))
        with pytest.raises(Refused, match=r"no \.npz file with arrays"):
            load_examples(str(tmp_path))

    @pytest.mark.parametrize("part", [slice(0), slice(-9), slice(99), slice(66, None)])
    def test_a_file_that_is_being_written_is_named(self, tmp_path, part):
        np.savez(tmp_path / "a.npz", x=np.zeros((20, 2)), y=np.zeros(20, int))
        (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[part])
        with pytest.raises(Refused, match=r"a\.npz is no \.npz file with arrays"):
            load_examples(str(tmp_path))

    def test_numbers_beyond_float32_are_not_finite(self, tmp_path):
        np.savez(tmp_path / "a.npz", x=np.full((1, 2), 1e300), y=np.zeros(1, int))
        with pytest.raises(Refused, match="not finite"):
            load_examples(str(tmp_path))


def confined(code):
    program = "import sys\nfrom fedcore_device.sandbox import confine\nimport socket, os, threading, json\n"
    program += "confine(memory=200_000_000, seconds=20)\nfound = {}\n" + code + "\nprint(json.dumps(found))"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(DEVICE)}
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_a_confined_child_reaches_no_network_starts_nothing_and_does_not_grow():
    found = confined("""
def tried(name, call):
    try:
        call()
        found[name] = "done"
    except (OSError, MemoryError) as error:
        found[name] = type(error).__name__
tried("tcp", lambda: socket.create_connection(("127.0.0.1", 9)))
tried("udp", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
tried("unix", lambda: socket.socket(socket.AF_UNIX))
tried("pair", socket.socketpair)
tried("exec", lambda: os.execv("/bin/true", ["true"]))
tried("fork", lambda: os.fork() or os._exit(0))
tried("grow", lambda: bytearray(400_000_000))
tried("read", lambda: open("/proc/self/status").read())
thread = threading.Thread(target=lambda: tried("thread", lambda: socket.socket()))
thread.start(); thread.join()
""")
    denied = dict.fromkeys(("tcp", "udp", "unix", "pair", "exec", "fork", "thread"), "PermissionError")
    assert found == {**denied, "grow": "MemoryError", "read": "done"}


@pytest.mark.parametrize(("machine", "architecture", "denied", "clone", "allowed"), [
    ("x86_64", 0xC000003E, (41, 57, 58, 59, 165, 322, 438), 56, (0, 9, 202, 231)),
    ("aarch64", 0xC00000B7, (40, 198, 221, 242, 281, 438), 220, (63, 98, 222, 94)),
])  # fmt: skip
def test_the_filter_for_a_processor(machine, architecture, denied, clone, allowed):
    """Run as the system runs it, for processors that the tests do not run on as well."""

    def verdict(number, argument=0, on=architecture):
        code, data, at = filter_for(machine), {0: number, 4: on, 16: argument}, 0
        while True:
            kind, yes, no, operand = code[at]
            at += 1
            if kind == 0x06:
                return operand
            if kind == 0x20:
                loaded = data[operand]
            else:
                at += yes if {0x15: loaded == operand, 0x35: loaded >= operand, 0x45: bool(loaded & operand)}[kind] else no

    allow, deny, missing, kill = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS, 0x80000000
    assert {verdict(number) for number in denied} == {deny}
    assert {verdict(number) for number in allowed} == {allow}
    assert verdict(allowed[0] | 0x40000000) == deny, "the 32-bit pointers' calls"
    assert (verdict(clone, 0x11), verdict(clone, 0x3D0F00)) == (deny, allow), "processes, threads"
    assert verdict(435) == missing
    assert verdict(allowed[0], on=1) == kill
    with pytest.raises(Refused, match="no list of system calls is known for riscv64"):
        filter_for("riscv64")
