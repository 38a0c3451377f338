"""Native libraries as an app developer installs them on a device, for tests."""

import functools
import hashlib
import json
import platform
from pathlib import Path

import pytest

from fedcore.native.build import BuildFailed, compile_library, compiler_version, host_target
from fedcore.native.deliver import DEVICES, deliver

TARGET = {"x86_64": "x86_64", "aarch64": "aarch64-linux"}.get(platform.machine(), "")


def why_not_here() -> str:  # as small_zoo has it, which integration tests do not see
    try:
        compiler_version()
        host_target()
    except BuildFailed as error:
        return str(error)
    return "" if TARGET else f"libraries are not built for {platform.machine()}"


needs_compiler = pytest.mark.skipif(bool(why_not_here()), reason=why_not_here() or "-")


@functools.cache
def keep_compiler_cache(folder: Path) -> None:
    """The compiler's own parts are compiled once, beside pytest's cache; a cold run takes a minute."""
    pytest.MonkeyPatch().setenv("XDG_CACHE_HOME", str(folder))


def install(model, shape, directory: Path, **more) -> Path:
    """The description of the library of ``model`` in ``directory``."""
    found = deliver(model, shape, TARGET, directory, **more)
    assert not found.no_description
    return Path(found.description)


def edited(description: Path, **fields) -> Path:
    """The description with other fields."""
    table = json.loads(description.read_text())
    description.write_text(json.dumps(table | fields))
    return description


def replaced(description: Path, code: str) -> Path:
    """The description of another library of the same name: C that has the functions' names."""
    library = description.parent / json.loads(description.read_text())["file"]
    device = DEVICES[TARGET]
    compile_library(code, (*device.processor.flags, "-O1", *device.flags), library)
    return edited(description, sha256=hashlib.sha256(library.read_bytes()).hexdigest())


def does(statement: str) -> str:
    """C of a library that does nothing but a statement, where it is to train."""
    return f"""
void import_start(float *b, const float *p) {{}}
int train(void *job) {{ {statement} return 0; }}
void private_begin(void *job) {{}}
int private_step(void *job) {{ {statement} return 0; }}
void private_end(void *job) {{}}
"""


CRASHES = does("__builtin_trap();")
