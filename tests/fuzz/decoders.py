"""Coverage-guided fuzzing of every decoder of secure aggregation: ``python tests/fuzz/decoders.py [libFuzzer options]``.

Whatever bytes arrive, a decoder gives a message that encodes to the same bytes, or refuses. `test_decoders.py` beside the
integration tests runs it for a minute.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fedcore.secagg", "fedcore.privacy.skellam"]):
    from fedcore.errors import Refused
    from fedcore.secagg import committee_wire, member, messages
    from fedcore.secagg.client import split_upload
    from fedcore.secagg.encoding import Message
    from fedcore.secagg.masks import WIDTHS, add_packed, zeros

VECTORS = Path(__file__).parents[1] / "vectors" / "secagg"
KINDS = sorted(
    {kind for module in (messages, committee_wire, member) for kind in vars(module).values()
     if isinstance(kind, type) and issubclass(kind, Message) and kind is not Message},
    key=lambda kind: kind.TAG,
)  # fmt: skip


def once(data: bytes) -> None:
    """One input: the first byte chooses what is decoded."""
    if not data:
        return
    choice, rest = data[0] % (len(KINDS) + 2), data[1:]
    try:
        if choice == len(KINDS):
            split_upload(rest)
        elif choice == len(KINDS) + 1 and len(rest) > 1:
            bits = WIDTHS[rest[0] % len(WIDTHS)]
            add_packed(zeros(rest[1], bits), rest[2:], bits)
        elif choice < len(KINDS):
            message = KINDS[choice].decode(rest)
            assert message.encode() == rest, "a message has one encoding"
    except Refused:
        return


def seeds(folder: Path) -> None:
    """The vectors' messages as a corpus to start from."""

    def texts(value: object) -> list[str]:
        if isinstance(value, str):
            return [value]
        children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return [text for child in children for text in texts(child)]

    tags = {kind.TAG: i for i, kind in enumerate(KINDS)}
    for text in texts(json.loads((VECTORS / "round.json").read_text())):
        try:
            data = bytes.fromhex(text)
        except ValueError:
            continue
        for i in tags.values():
            try:
                KINDS[i].decode(data)
            except Refused:
                continue
            (folder / f"{KINDS[i].__name__}-{hash(data) & 0xFFFFFFFF:08x}").write_bytes(bytes([i]) + data)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--seeds"]:
        seeds(Path(sys.argv[2]))
    else:
        atheris.Setup(sys.argv, once)
        atheris.Fuzz()
