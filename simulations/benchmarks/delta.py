"""Deltas between the models of consecutive rounds of a real run, beside zstd --patch-from (level 19) and bsdiff on the same pairs.

Every delta is applied before it is counted. `five_back` is the delta from the model five rounds before; accuracy is that of the
int8 model that the run ends with.

    python -m simulations.benchmarks.delta [--rounds 12] [--json]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import bsdiff4
import zstandard

from fedcore.config import RunConfig, load_config
from fedcore.coordinator.run import SimulatedRun
from fedcore.registry.delta import CODECS, apply_delta, make_delta

SCENARIOS = Path(__file__).parents[1] / "scenarios"
_FASHION = "niid_fashion_dirichlet.toml"
RUNS = {
    "digits": ("digits.toml", []),
    "fashion-mnist": (_FASHION, ["training.epochs=2"]),
    "fashion-mnist, the head only": (_FASHION, ["training.epochs=2", "model.trainable=['7.*', '9.*', '11.*']"]),
}
_QUIET = ("evaluation.every=0", "evaluation.federated_every=0")


def train(config: RunConfig) -> tuple[list[bytes], float]:
    """The model that devices fetch after each round, and the test accuracy of the int8 model at the end."""
    with tempfile.TemporaryDirectory() as folder, SimulatedRun(config, Path(folder), resume=False) as run:
        models = [run.coordinator.received(run.coordinator.progress)[0] for _ in run.rounds()]
        return models, run.finish()["int8_accuracy"]


def zstd_patch(base: bytes, result: bytes) -> int:
    """Bytes of ``zstd -19 --patch-from``: the base as raw dictionary, a window over both, long distance matching, no checksum."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        19, source_size=len(result), window_log=max((len(base) + len(result)).bit_length(), 10), enable_ldm=True
    )
    dictionary = zstandard.ZstdCompressionDict(base, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    return len(zstandard.ZstdCompressor(dict_data=dictionary, compression_params=parameters).compress(result))


def compare(base: bytes, result: bytes) -> dict[str, Any]:
    """One pair."""
    delta = make_delta(base, result)
    assert apply_delta(base, delta, hashlib.sha256(result).digest(), len(result)) == result
    return {
        "full_bytes": len(result), "delta_bytes": len(delta), "codec": CODECS[delta[4] - 1],
        "zstd_patch_bytes": zstd_patch(base, result), "bsdiff_bytes": len(bsdiff4.diff(base, result)),
    }  # fmt: skip


def measure(name: str, seed: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each round from the second on."""
    scenario, settings = RUNS[name]
    more = [f"run.rounds={rounds}"] if rounds else []
    config = load_config(SCENARIOS / scenario, [*settings, *_QUIET, f"run.seed={seed}", *more])
    models, accuracy = train(config)
    rows = []
    for number in range(1, len(models)):
        row = {"data": name, "seed": seed, "round": number + 1, **compare(models[number - 1], models[number])}
        if number >= 5:
            row["five_back_bytes"] = len(make_delta(models[number - 5], models[number]))
        rows.append(row)
    rows[-1]["int8_accuracy"] = accuracy
    return rows


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=0, help="instead of the scenario's")
    parser.add_argument("--json", action="store_true", help="print one JSON object a row")
    given = parser.parse_args()
    if not given.json:
        print("| data | rounds | full | delta | largest | full / delta | zstd | bsdiff | five back | accuracy |")
        print("|---|---|---|---|---|---|---|---|---|---|")
    for name in given.data:
        rows = measure(name, given.seed, given.rounds)
        print("\n".join(json.dumps(row) for row in rows) if given.json else summary(rows), flush=True)
        worse = [row["round"] for row in rows if row["delta_bytes"] > min(row["zstd_patch_bytes"], row["bsdiff_bytes"])]
        if worse:
            print(f"{name}: larger than zstd or bsdiff in rounds {worse}", file=sys.stderr, flush=True)


def summary(rows: list[dict[str, Any]]) -> str:
    """A row of the table: medians over rounds."""
    middle = {key: statistics.median(row[key] for row in rows) for key in rows[0] if key.endswith("_bytes")}
    far = [row["five_back_bytes"] for row in rows if "five_back_bytes" in row]
    largest = max(row["delta_bytes"] for row in rows)
    return (
        f"| {rows[0]['data']} | {len(rows) + 1} | {middle['full_bytes']:.0f} | {middle['delta_bytes']:.0f} "
        f"| {largest} | {middle['full_bytes'] / middle['delta_bytes']:.1f} | {middle['zstd_patch_bytes']:.0f} "
        f"| {middle['bsdiff_bytes']:.0f} | {statistics.median(far) if far else '-'} | {rows[-1]['int8_accuracy']:.4f} |"
    )


if __name__ == "__main__":
    main()
