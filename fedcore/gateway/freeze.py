"""Regenerates the protocol's code, and writes down what of it is frozen: ``python -m fedcore.gateway.freeze`` (development only).

``gateway.frozen.json`` holds every field with its number, type and documentation. What stands there never changes; what
is new is added to it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2

from fedcore.errors import Refused

__all__ = ["FROZEN", "broken_promises", "describe", "generate"]

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[1]
_PROTO = "fedcore/gateway/gateway.proto"
FROZEN = _HERE / "gateway.frozen.json"
_File = descriptor_pb2.FileDescriptorProto
_Field = descriptor_pb2.FieldDescriptorProto
_MESSAGES, _ENUMS, _SERVICES, _WITHIN = 4, 5, 6, 2  # numbers in FileDescriptorProto; fields, values and methods are number 2


def generate(out: Path) -> None:
    """Write gateway_pb2.py and gateway_pb2.pyi below ``out``, where their package's folders are."""
    _protoc(f"--python_out={out}", f"--pyi_out={out}")


def describe(proto: Path | None = None) -> dict[str, str]:
    """By full name, as ``Plan.round``: number, type and documentation of every field, enum value and call.

    Raises:
        Refused: protoc cannot read the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set"
        _protoc(f"--descriptor_set_out={out}", "--include_source_info", proto=proto)
        (file,) = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file
    words = {tuple(one.path): _words(one) for one in file.source_code_info.location}
    found = {}
    for i, message in enumerate(file.message_type):
        for j, field in enumerate(message.field):
            found[f"{message.name}.{field.name}"] = _line(_type(message, field), words.get((_MESSAGES, i, _WITHIN, j), ""))
    for i, enum in enumerate(file.enum_type):
        for j, value in enumerate(enum.value):
            found[f"{enum.name}.{value.name}"] = _line(str(value.number), words.get((_ENUMS, i, _WITHIN, j), ""))
    for i, service in enumerate(file.service):
        for j, call in enumerate(service.method):
            types = f"{call.input_type} -> {'stream ' if call.server_streaming else ''}{call.output_type}"
            found[f"{service.name}.{call.name}"] = _line(types, words.get((_SERVICES, i, _WITHIN, j), ""))
    return found


def broken_promises(frozen: dict[str, str], now: dict[str, str]) -> list[str]:
    """What was frozen and is gone or different, a line each; what is new breaks nothing."""
    return [f"{name}: was {text!r}, is {now.get(name, 'gone')!r}" for name, text in frozen.items() if now.get(name) != text]


def _line(what: str, documentation: str) -> str:
    return f"{what}; {documentation}" if documentation else what


def _type(message: Any, field: Any) -> str:
    kind = field.type_name or _Field.Type.Name(field.type).removeprefix("TYPE_").lower()
    label = "repeated " if field.label == _Field.LABEL_REPEATED else "optional " if field.proto3_optional else ""
    choice = f" of {message.oneof_decl[field.oneof_index].name}" if field.HasField("oneof_index") else ""
    return f"{field.number}: {label}{kind}{choice}"


def _words(location: Any) -> str:
    return " ".join(f"{location.leading_comments} {location.trailing_comments}".split())


def _protoc(*arguments: str, proto: Path | None = None) -> None:
    from grpc_tools import protoc

    file, root = (proto, proto.parent) if proto else (_ROOT / _PROTO, _ROOT)
    if protoc.main(["protoc", f"-I{root}", *arguments, str(file)]):
        raise Refused(f"{file}: protoc refuses it")


def _main() -> None:
    now, frozen = describe(), json.loads(FROZEN.read_text()) if FROZEN.exists() else {}
    broken = broken_promises(frozen, now)
    if broken:
        sys.exit("what devices rely on never changes:\n" + "\n".join(broken))
    generate(_ROOT)
    FROZEN.write_text(json.dumps(now, indent=1) + "\n")
    print(f"{len(now) - len(frozen)} new, {len(frozen)} as they were")


if __name__ == "__main__":
    _main()
