"""The ``fedcore-device`` command: enroll, run, status, models, update, forget."""

from __future__ import annotations

import argparse
import contextlib
import getpass
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedcore.errors import FedcoreError, Refused, TryAgain
from fedcore_device.state import State

__all__ = ["main"]

_WRONG, _FAILED, _LEAVE_IT = 2, 1, 78  # the last one tells systemd not to start it again


def main(arguments: list[str] | None = None) -> int:
    """Entry point; the exit code."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    given = _parser().parse_args(arguments)
    try:
        return int(given.call(given))
    except FedcoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return _WRONG if isinstance(error, Refused) else _FAILED


def _parser() -> argparse.ArgumentParser:
    # argparse, not typer: it costs 15 MB less, and is there.
    words = "A device of a federation: trains on its own examples, and runs the models that were released."
    parser = argparse.ArgumentParser("fedcore-device", description=words)
    parser.add_argument("--state", type=Path, metavar="DIR", help="directory of keys and state (default: of systemd or the user)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    enroll = commands.add_parser("enroll", help="enrol this device with a token of the fleet")
    enroll.add_argument("--server", required=True, metavar="HOST:PORT")
    enroll.add_argument("--token", metavar="TOKEN", help="if not given: $FEDCORE_TOKEN, or it is asked for")
    enroll.add_argument("--plain", action="store_true", help="without TLS; loopback only")
    enroll.set_defaults(call=_enroll)
    run = commands.add_parser("run", help="take part in rounds and keep models up to date until SIGTERM or Ctrl-C")
    run.add_argument(
        "--examples", default="", metavar="SOURCE",
        help="module:function, or a directory of .npz files with x and y; without, it only keeps models up to date",
    )  # fmt: skip
    run.add_argument("--conditions", type=Path, metavar="FILE", help="JSON file whose keys take the place of sensed conditions")
    run.add_argument(
        "--native", type=Path, action="append", metavar="DIR",
        help="directory of native libraries to train with (default: fedcore/native in /usr/local/lib, /usr/lib, ~/.local/lib)",
    )  # fmt: skip
    run.add_argument("--look", type=_seconds, default=30.0, metavar="SECONDS", help="between two looks at the conditions")
    run.set_defaults(call=_run)
    status = commands.add_parser("status", help="what this device is and does")
    status.add_argument("--json", action="store_true", dest="as_json")
    status.set_defaults(call=_status)
    models = commands.add_parser("models", help="the released models that are installed, and how they do")
    models.add_argument("--json", action="store_true", dest="as_json")
    models.set_defaults(call=_models)
    update = commands.add_parser("update", help="look for releases now, whatever the conditions are")
    update.set_defaults(call=_update)
    forget = commands.add_parser("forget", help="leave the fleet for good: erases keys, models, checkpoints, the server's record")
    forget.set_defaults(call=_forget)
    return parser


def _seconds(text: str) -> float:
    """A span of time; 0 or less would be a loop without a pause."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < threading.TIMEOUT_MAX:
            return float(text)
    raise argparse.ArgumentTypeError(f"takes seconds above 0, got {text!r}")


def _state(given: argparse.Namespace, *, make: bool = False) -> State:
    from fedcore_device.agent import default_directory

    return State(given.state or default_directory(), make=make)


def _existing(given: argparse.Namespace) -> State:
    """For commands that do something with a device that is there.

    Raises:
        Refused: it is not.
    """
    state = _state(given)
    if not state.directory.is_dir():
        raise Refused(f"{state.directory} holds no device's state; `fedcore-device enroll` begins one, --state names another place")
    return State(state.directory)


def _enroll(given: argparse.Namespace) -> int:
    from fedcore.gateway.identity import spell
    from fedcore_device.agent import enrol_device

    state = _state(given, make=True)
    token = given.token or os.environ.get("FEDCORE_TOKEN") or (
        getpass.getpass("enrolment token: ") if sys.stdin.isatty() else sys.stdin.readline()
    )  # fmt: skip
    with state.locked():
        enrolled = enrol_device(state, given.server, token, plain=given.plain)
    print(f"enrolled in {enrolled.trust.deployment!r} as device {spell(enrolled.device)}")
    return 0


def _run(given: argparse.Namespace) -> int:
    from fedcore.gateway.refusals import GatewayRefusal
    from fedcore_device.agent import Agent, gateway_of
    from fedcore_device.environment import LinuxEnvironment
    from fedcore_device.native import default_directories
    from fedcore_device.policy import read_policy

    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
    state, stop = _existing(given), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with state.locked():
        environment = LinuxEnvironment(state.directory, given.examples, override=given.conditions)
        policy, native = read_policy(state.directory / "policy.toml"), given.native or default_directories()
        agent = Agent(state, environment, policy, look=given.look, native=native)
        gateway_of(state)  # what only a person can mend is told of at once
        print(f"running; state in {state.directory}", flush=True)
        try:
            agent.run(stop)
        except GatewayRefusal as refusal:
            print(f"error: {refusal}", file=sys.stderr)
            return _LEAVE_IT
    return 0


def _status(given: argparse.Namespace) -> int:
    from fedcore.gateway.identity import spell
    from fedcore_device.agent import gateway_of, load_enrolled
    from fedcore_device.engines import Engines
    from fedcore_device.environment import LinuxEnvironment
    from fedcore_device.policy import read_policy
    from fedcore_device.standing import model_table

    state = _state(given)
    policy, environment = read_policy(state.directory / "policy.toml"), LinuxEnvironment(state.directory, "")
    why = policy.conditions.why_not(environment.conditions(training=False), environment.clock())
    enrolled = load_enrolled(state) if (state.directory / "enrolment.bin").exists() else None
    work, gateway, problem = state.work(), None, state.problem
    try:
        gateway = gateway_of(state).address if enrolled else None
    except Refused as error:
        problem = str(error)
    found: dict[str, Any] = {
        "state": str(state.directory),
        "device": spell(enrolled.device) if enrolled else None,
        "fleet": enrolled.trust.deployment if enrolled else None,
        "gateway": gateway,
        "certificate_until": enrolled.enrolment.certificate.not_after if enrolled else None,
        "eligible": why or True,
        "round": {"task": work.task, "round": work.round, "phase": work.phase} if work else None,
        "engine": Engines(state, ()).last(),
        "participations": {task: one.times for task, one in state.history().items()},
        "models": model_table(state),
        "problem": problem or None,
    }
    if given.as_json:
        print(json.dumps(found))
        return 0
    for name, value in found.items():
        if name == "engine" and value:
            print(f"{name:18} {value['engine']} trained round {value['round']} of {value['task']}: {value['why']}")
        elif name != "models" and value not in (None, {}):
            print(f"{name:18} {'yes' if value is True else value}")
    _print_models(found["models"])
    return 0


def _models(given: argparse.Namespace) -> int:
    from fedcore_device.standing import model_table

    found = model_table(_state(given))
    if given.as_json:
        print(json.dumps(found))
    elif found:
        _print_models(found)
    else:
        print("no models; [updates] models of policy.toml names those that the agent installs")
    return 0


def _print_models(models: Mapping[str, Mapping[str, Any]]) -> None:
    for name, one in models.items():
        words = [f"release {one['version']}" if one["version"] else "nothing installed"]
        words += ["on probation"] if one["probation"] else []
        words += [f"before it {one['previous']}"] if one["previous"] else []
        words += [f"{key} {value:g}" for key, value in one["signals"].items()]
        print(f"model {name:12} {'; '.join(words)}")
        for version, why in one["unfit"].items():
            print(f"{'':18} release {version} was unfit: {why}")
        if one["problem"]:
            print(f"{'':18} last update: {one['problem']}")


def _update(given: argparse.Namespace) -> int:
    from fedcore_device.agent import Agent
    from fedcore_device.environment import LinuxEnvironment
    from fedcore_device.policy import read_policy
    from fedcore_device.standing import model_table
    from fedcore_device.updates import ASKED

    state = _existing(given)
    policy = read_policy(state.directory / "policy.toml")
    if not policy.updates.models:
        raise Refused(f"[updates] models of {state.directory / 'policy.toml'} names no model")
    try:
        with state.locked():
            Agent(state, LinuxEnvironment(state.directory, ""), policy).update(now=True)
    except TryAgain:
        state.keep(ASKED, b"")
        print("the agent that runs here looks at its next turn; `fedcore-device models` shows what came of it")
        return 0
    found = model_table(state)
    _print_models(found)
    return _FAILED if any(one["problem"] for one in found.values()) else 0


def _forget(given: argparse.Namespace) -> int:
    from fedcore_device.agent import forget_device

    state = _state(given)
    if not state.directory.is_dir():
        print(f"{state.directory} is not there: nothing is kept of this device")
        return 0
    with state.locked():
        problem = forget_device(state)
    print("keys, checkpoints, history and installed models are erased")
    if problem:
        print(f"error: the gateway was not told: {problem}; its operator can revoke the device", file=sys.stderr)
        return _FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
