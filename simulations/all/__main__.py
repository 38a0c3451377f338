"""`make demo-all`: eight watches train a model together, get it back as a signed release, and use it; and what each step costs.

    python -m simulations.all [--rounds 8] [--out DIR] [--json]

Device processes on this machine, TLS, quantization-aware training, DP-SGD on the device, secure aggregation by three operators,
export with gates, two releases of which the second goes to a canary first and arrives as a delta. Simulated runs of the same
scenario with one step more each are what the table compares. All of it stays in DIR (default: a new one below runs/).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fedcore_device.installed import model_directory
from rich.console import Console

from fedcore.config import load_config
from fedcore.coordinator.fleet import FleetFolder
from fedcore.coordinator.release_status import standing
from fedcore.coordinator.rollouts import Deployment
from fedcore.data import federate, load_dataset, normalised_by_test
from fedcore.export.source import load_run
from fedcore.registry.slots import read_pointer
from simulations.all import people
from simulations.all.fleet import Processes, Watch, fedcore, operators, repository, sent_by_fetch, serve
from simulations.all.twins import SIMULATED, Row, equal_bits, of_run, shown, simulate

MODEL = "watches"
SCENARIO = """
[run]
name = "watches"
rounds = {rounds}
[data]
dataset = "people:eight_watches"
partition = "natural"
[model]
name = "imu_cnn"
[quantization]
calibrate_round = {calibrate}
[training]
epochs = 2
batch_size = 16
lr = 0.05
lr_decay = 0.9
momentum = 0.5
[strategy]
name = "fedavg"
[evaluation]
every = 0
"""
ON_DEVICES = """
[cohort]
timeout = 120
[[privacy]]
unit = "example"
noise_multiplier = 1.0
delta = 1e-5
[tiers.flagship]
targets = {targets}
accuracy_loss = 3.0          # against the float master, whose ranges froze halfway: noise moves it on
[release]
registry = "repository"
keys = "online"
every = {every}
canary = "25%"
stages = []
window = {window}
corrupt = "0%"
budgets = {{p95_ms = 50}}
self_test = 16
[secagg]
enabled = true
minimum_survivors = 6
"""
_PATIENCE = 600.0  # seconds for the devices to do what they are to do
_INTERRUPTED, _CANARY = 130, people.PEOPLE // 4
Say = Callable[[str], None]


@dataclass(frozen=True)
class Loop:
    """What came of the devices: the run's result, the release's bytes, and the apps' answers by device."""

    result: dict[str, Any]
    release: dict[str, Any]
    apps: list[dict[str, Any]]


def twins(folder: Path, say: Say) -> tuple[list[Row], bool, float]:
    """The simulated rows, whether masks changed no bit, and the points that int8 loses against the fp32 master it was made of."""
    rows, found, lost = dict[str, Row](), dict[str, Path](), 0.0
    for step in SIMULATED:
        result = simulate(step, folder, "twins.toml")
        note = "simulated"
        if step.name == "+ QAT, int8":
            lost = 100 * (result["accuracy"] - result["int8_accuracy"])
            note += f"; {lost:+.2f} points lost against its fp32 master"
        if "privacy" in result:
            spent = result["privacy"]["example"]
            costs = f"; epsilon {spent['epsilon']:.2f} at delta {spent['delta']:g}"
            note += costs if step.name == "+ DP-SGD" else ", the same noise"
        rows[step.name] = row = of_run(step.name, rows.get(step.against), result, note)
        found[step.name] = Path(result["directory"])
        say(f"{step.name}, simulated: accuracy {row.accuracy:.4f} in {row.seconds:.1f} s")
    return list(rows.values()), equal_bits(found["+ integers of a sum"], found["+ masks"]), lost


def devices(folder: Path, runtimes: list[str], say: Say) -> Loop:
    """The whole loop over device processes."""
    fleet = FleetFolder.open(folder / "fleet", MODEL)
    with Processes(folder) as processes:
        repository(folder)
        lines = operators(folder, fleet, MODEL, processes)
        (folder / "scenario.toml").write_text((folder / "scenario.toml").read_text() + lines)
        config = load_config(folder / "scenario.toml")
        dataset = normalised_by_test(load_dataset(config.data, config.folder, config.run.seed))
        data = federate(config.data, dataset, config.run.seed)
        watches = [Watch(folder, person) for person in range(people.PEOPLE)]
        served, until = serve(processes, lambda event: _told(event, config.run.rounds, say))
        say(f"gateway at {served['address']} with TLS; three operators; {len(watches)} watches enrol")
        tokens = fedcore(folder, "device", "token", "--fleet", "fleet", "--count", len(watches)).split()
        for watch, token in zip(watches, tokens, strict=True):
            watch.hold(data, dataset)
            watch.start(processes, served["address"], token, runtimes[watch.person % len(runtimes)])
        while until("round")["round"] < config.run.rounds:
            pass
        _require_release(folder, 1)
        held = _wait(watches, 1, len(watches), processes)
        before = sent_by_fetch(served["metrics"])  # from now on nothing but the second release is fetched
        say(f"release 1 runs on {held} watches; the last round's model is exported and released")
        result = until("result")
        release = _second(folder, watches, processes, say) | {"first": events_of(folder)[0]}
        release["fetched"] = (sent_by_fetch(served["metrics"]) - before) / len(watches)
        apps = [watch.predict(MODEL) for watch in watches]
    return Loop(result, release, apps)


def _second(folder: Path, watches: list[Watch], processes: Processes, say: Say) -> dict[str, Any]:
    """The canary's release: its evidence, a person's word, and all devices."""
    told = _require_release(folder, 2)
    deployment, end = Deployment.of(folder / "fleet"), time.monotonic() + _PATIENCE
    with deployment.control() as control:
        while True:
            now = standing(control, MODEL)
            canary = now["arms"]["canary"]
            if now["phase"] != "running" or canary["votes"] >= _CANARY:
                break
            _alive(processes, end, "the canary did not report")
    if now["phase"] == "aborted":
        raise SystemExit(f"the canary stopped release 2: {[one for one in now['tests'] if one['harmful']]}")
    held = sum(_version(watch) == 2 for watch in watches)
    harm = ", ".join(sorted({one["signal"] for one in now["tests"] if one["harmful"]})) or "none"
    say(f"release 2 runs on {held} watches; {canary['reported']} of {canary['devices']} canaries reported; harm shown: {harm}")
    if now["phase"] == "running":
        if held > canary["devices"]:
            raise SystemExit("release 2 ran outside of its canary")
        fedcore(folder, "release", "promote", "--fleet", "fleet", "--by", "demo", "--why", "its canary shows no harm")
        say("a person promotes it: two devices cannot rule harm out")
    _wait(watches, 2, len(watches), processes)
    return {"second": told, "canaries": canary["devices"], "held_by": held, "phase": now["phase"]}


def _require_release(folder: Path, version: int) -> dict[str, Any]:
    """What the coordinator noted of a release.

    Raises:
        SystemExit: it made another one or none, or its rollout did not begin.
    """
    told = events_of(folder)[version - 1]
    if told.get("version") != version or told["waiting"]:
        raise SystemExit(f"release {version} did not begin: {told}")
    return told


def events_of(folder: Path) -> list[dict[str, Any]]:
    """What the coordinator released, or could not."""
    return [json.loads(line) for line in (folder / "run" / "releases.jsonl").read_text().splitlines()]


def _version(watch: Watch) -> int:
    place = model_directory(watch.state, MODEL)
    current = read_pointer(place).current if place.exists() else None
    return current.version if current else 0


def _wait(watches: list[Watch], version: int, count: int, processes: Processes) -> int:
    """Until so many devices run a release, or a later one; how many do."""
    end = time.monotonic() + _PATIENCE
    while (held := sum(_version(watch) >= version for watch in watches)) < count:
        _alive(processes, end, f"release {version} is on {held} of {count} watches")
    return held


def _alive(processes: Processes, end: float, what: str) -> None:
    processes.check()
    if time.monotonic() > end:
        raise SystemExit(f"{what} after {_PATIENCE:g} s; the logs say why")
    time.sleep(0.3)


def _told(event: dict[str, Any], rounds: int, say: Say) -> None:
    if event["event"] == "round":
        spent = event["privacy"]["example"]["epsilon"]
        say(f"round {event['round']}/{rounds}  {event['replies']} of {event['cohort']} watches, masked  epsilon {spent:.2f}"
            + (f"  {event['hint']}" if "hint" in event else ""))  # fmt: skip
    elif event["event"] == "release":
        say(f"release: {event['text']}")


def agreement(folder: Path, apps: list[dict[str, Any]]) -> float:
    """Share of held-out windows that the devices' files label as the fake-quantized model of the coordinator does."""
    source, test = load_run(folder / "run"), people.windows(test=True)
    with torch.no_grad():
        expected = source.model(torch.from_numpy(source.dataset.test.x)).argmax(1).numpy()
    same = [np.array(app["answers"]) == expected[test.person == person] for person, app in enumerate(apps)]
    return float(np.concatenate(same).mean())


def table(rows: list[Row], masked: bool, loop: Loop, agreed: float, gates: list[dict[str, Any]]) -> list[Row]:
    """All lines: the simulated ones, the devices', and that of their apps."""
    masks = rows[-1]
    rows = [*rows[:-1], Row(**asdict(masks) | {"note": f"{masks.note}; {'equal' if masked else 'OTHER'} bits of the model"})]
    spent = loop.result["privacy"]["example"]
    ran = of_run("8 watches", masks, loop.result, f"the same with the watches' own noise; epsilon {spent['epsilon']:.2f}")
    right = np.concatenate([np.array(one["answers"]) == np.array(one["labels"]) for one in loop.apps])
    accuracy = float(right.mean())
    files = ", ".join(f"{one['target']} {one['bytes'] / 1000:.1f} kB" for one in gates)
    apps = Row("Runtime.predict", "8 watches", accuracy, 100 * (accuracy - ran.accuracy), None, None, None,
               f"agrees with the model in {agreed:.4f}; {files}")  # fmt: skip
    return [*rows, ran, apps]


def demonstrate(folder: Path, rounds: int, window: float, say: Say) -> dict[str, Any]:
    """Everything; what came of it, as plain values with ``rows``."""
    began = time.monotonic()
    targets = ["onnx", *(["litert"] if importlib.util.find_spec("ai_edge_litert") else [])]
    shutil.copy(people.__file__, folder / "people.py")
    scenario = SCENARIO.format(rounds=rounds, calibrate=max(1, rounds // 2))
    (folder / "twins.toml").write_text(scenario)
    more = ON_DEVICES.format(targets=json.dumps(targets), every=max(1, rounds // 2), window=window)
    (folder / "scenario.toml").write_text(scenario + more)
    simulated, masked, lost = twins(folder, say)
    loop = devices(folder, targets, say)
    gates = json.loads((folder / "run" / "export" / "export.json").read_text())["rows"]
    agreed = agreement(folder, loop.apps)
    rows = table(simulated, masked, loop, agreed, gates)
    return {
        "rows": [asdict(one) for one in rows], "masks_equal_bits": masked, "int8_points_lost": lost, "agreement": agreed,
        "release": loop.release, "gates": gates, "epsilon": loop.result["privacy"]["example"]["epsilon"],
        "apps": [{key: one[key] for key in ("version", "runtime", "digest", "milliseconds")} for one in loop.apps],
        "seconds": time.monotonic() - began,
    }  # fmt: skip


def _summary(told: dict[str, Any]) -> list[str]:
    second = told["release"]["second"]
    full = ", ".join(f"{name} {size}" for name, size in second["artefacts"].items())
    times = [one["milliseconds"] for one in told["apps"]]
    return [
        f"release 2 as deltas: {' and '.join(map(str, second['deltas']))} bytes instead of {full}",
        f"fetched of it, with self-test batch and metadata: {told['release']['fetched']:.0f} bytes a watch",
        f"gates: {', '.join('{target} {gate}, agreement {agreement:.4f}'.format(**one) for one in told['gates'])}",
        f"Runtime.predict: {min(times):.2f} to {max(times):.2f} ms a window on the watches; {told['seconds']:.0f} s in all",
    ]


def main() -> None:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=8, help="of training; 2 or more, since half of them make the first release")
    parser.add_argument("--window", type=float, default=10.0, help="seconds after which what a watch reported is its vote")
    parser.add_argument("--out", type=Path, help="a new or empty directory for everything")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON lines for scripts")
    given = parser.parse_args()
    if given.rounds < 2:
        parser.error("--rounds must be 2 or more")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder, console = _folder(given.out), Console(width=160)

    def say(text: str) -> None:
        if given.as_json:
            print(json.dumps({"event": "progress", "text": text}), flush=True)
        else:
            console.print(text, highlight=False, soft_wrap=True)

    try:
        told = demonstrate(folder, given.rounds, given.window, say)
    except KeyboardInterrupt:
        if given.out is None:
            shutil.rmtree(folder, ignore_errors=True)
        print("interrupted; all processes have ended", file=sys.stderr)
        raise SystemExit(_INTERRUPTED) from None
    (folder / "result.json").write_text(json.dumps(told, indent=2) + "\n")
    _show(told, folder, console, as_json=given.as_json)
    if not told["masks_equal_bits"]:
        raise SystemExit("masks changed the model")


def _show(told: dict[str, Any], folder: Path, console: Console, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"event": "result", "directory": str(folder), **told}), flush=True)
        return
    console.print(shown([Row(**one) for one in told["rows"]]))
    for line in (*_summary(told), f"{folder / 'result.json'}, {folder / 'run' / 'report.html'}"):
        console.print(line, highlight=False, soft_wrap=True)


def _folder(out: Path | None) -> Path:
    if out is None:
        Path("runs").mkdir(exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="all-", dir="runs")).absolute()
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise SystemExit(f"--out {out}: not empty")
    return out.absolute()


if __name__ == "__main__":
    main()
