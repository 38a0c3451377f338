"""Deltas between the models of consecutive rounds of a real run, beside zstd --patch-from (level 19) and bsdiff on the same pairs.

Every delta is applied before it is counted. `five_back` is the delta from the model five rounds before.

    python -m simulations.benchmarks.delta [--rounds 12] [--json]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import tempfile
from collections.abc import Iterator
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
    "digits": ("digits.toml", ["run.rounds=40"]),
    "fashion-mnist": (_FASHION, ["training.epochs=2"]),
    "fashion-mnist, the head only": (_FASHION, ["training.epochs=2", "model.trainable=['7.*', '9.*', '11.*']"]),
}


def models_of(config: RunConfig) -> Iterator[bytes]:
    """The model that devices fetch after each round."""
    with tempfile.TemporaryDirectory() as folder, SimulatedRun(config, Path(folder), resume=False) as run:
        for _ in run.rounds():
            yield run.coordinator.received(run.coordinator.progress)[0]


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


def measure(name: str, rounds: int) -> list[dict[str, Any]]:
    """One row for each round from the second on."""
    scenario, settings = RUNS[name]
    more = [f"run.rounds={rounds}"] if rounds else []
    config = load_config(SCENARIOS / scenario, [*settings, "evaluation.every=0", "evaluation.federated_every=0", *more])
    models = list(models_of(config))
    rows = []
    for number in range(1, len(models)):
        row = {"data": name, "round": number + 1, **compare(models[number - 1], models[number])}
        if number >= 5:
            row["five_back_bytes"] = len(make_delta(models[number - 5], models[number]))
        rows.append(row)
    return rows


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--rounds", type=int, default=0, help="instead of the scenario's")
    parser.add_argument("--json", action="store_true", help="print one JSON object a row")
    given = parser.parse_args()
    if not given.json:
        print("| data | rounds | full | delta, median | largest | full / delta | zstd --patch-from | bsdiff | five rounds back |")
        print("|---|---|---|---|---|---|---|---|---|")
    for name in given.data:
        rows = measure(name, given.rounds)
        if given.json:
            print("\n".join(json.dumps(row) for row in rows), flush=True)
            continue
        middle = {key: statistics.median(row[key] for row in rows) for key in rows[0] if key.endswith("_bytes")}
        far = [row["five_back_bytes"] for row in rows if "five_back_bytes" in row]
        print(
            f"| {name} | {len(rows) + 1} | {middle['full_bytes']:.0f} | {middle['delta_bytes']:.0f} "
            f"| {max(row['delta_bytes'] for row in rows)} | {middle['full_bytes'] / middle['delta_bytes']:.1f} "
            f"| {middle['zstd_patch_bytes']:.0f} | {middle['bsdiff_bytes']:.0f} | {statistics.median(far) if far else '-'} |",
            flush=True,
        )
        worse = [row["round"] for row in rows if row["delta_bytes"] > min(row["zstd_patch_bytes"], row["bsdiff_bytes"])]
        if worse:
            print(f"{name}: larger than zstd or bsdiff in rounds {worse}", flush=True)


if __name__ == "__main__":
    main()
