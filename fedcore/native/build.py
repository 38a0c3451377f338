"""Compile generated C with ``python -m ziglang cc``, once per source, compiler and processor, into a cache of the user's own.

What is loaded is code: the cache must be a directory that only the user can write, and a library is loaded only while its
SHA-256 is the one recorded when it was built.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from fedcore.errors import Refused
from fedcore.native.tiles import Target

__all__ = [
    "AVX2", "AVX512", "COMMON", "NEON", "SHARED", "BuildFailed", "build", "cache_directory", "compile_library", "host_target",
]  # fmt: skip

_X86 = ("-target", "x86_64-linux-musl")
AVX512 = Target("avx512", (*_X86, "-mcpu=x86_64_v4", "-mprefer-vector-width=512"), 28)
AVX2 = Target("avx2", (*_X86, "-mcpu=x86_64_v3"), 6)
NEON = Target("neon", ("-target", "aarch64-linux-musl", "-mcpu=generic"), 6)
# Contraction within an expression only, so that all processors with fused multiply-add round alike; math-errno and traps are
# libc's and the debugger's concern. Tiles are unrolled by the generator; to unroll more loops makes libraries larger, not quicker.
COMMON = (
    "-std=gnu11", "-O3", "-fno-unroll-loops", "-g0", "-s", "-ffp-contract=on", "-fno-math-errno", "-fno-trapping-math",
    "-fno-sanitize=all", "-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-fno-unwind-tables",
    "-fvisibility=hidden", "-Wno-psabi",
)  # fmt: skip
SHARED = ("-fPIC", "-shared", "-nostdlib")
FLAGS = (*COMMON, *SHARED)
_SECONDS = 300  # the first build of a target may compile the compiler's runtime


class BuildFailed(Refused):
    """No usable compiler, or one that failed; one line."""


def host_target() -> Target:
    """The target that fits this machine.

    Raises:
        BuildFailed: a system or processor that the generator does not build for.
    """
    machine = platform.machine()
    if sys.platform != "linux" or machine not in {"x86_64", "aarch64"}:
        raise BuildFailed(f"native code is built for Linux on x86_64 and aarch64, not for {sys.platform} on {machine}")
    if machine == "aarch64":
        return NEON
    flags = _processor_flags()
    if {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= flags:
        return AVX512
    if {"avx2", "fma", "bmi1", "bmi2", "f16c", "movbe"} <= flags:
        return AVX2
    raise BuildFailed("native code needs a processor with AVX2 and FMA")


def _processor_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError as error:
        raise BuildFailed(f"/proc/cpuinfo cannot be read: {error.strerror}") from error
    return set(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def cache_directory() -> Path:
    """Where built libraries are kept: ``$XDG_CACHE_HOME/fedcore/native``, created for the user alone.

    Raises:
        BuildFailed: it cannot be created, or others may write to it.
    """
    root = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(root) / "fedcore" / "native"
    try:
        folder = (Path(root) if root and Path(root).is_absolute() else Path.home() / ".cache") / "fedcore" / "native"
        folder.mkdir(parents=True, exist_ok=True)
        found = folder.stat()
        if found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) != 0o700:
            folder.chmod(0o700)
    except (OSError, RuntimeError) as error:
        raise BuildFailed(f"the cache {folder} cannot be used: {getattr(error, 'strerror', None) or error}") from error
    if found.st_uid != os.getuid():
        raise BuildFailed(f"the cache {folder} belongs to another user; what is in it is not loaded")
    return folder


def build(source: str, target: Target, *, double: bool = False, private: bool = True) -> Path:
    """The library of a source: from the cache if its checksum holds, else compiled; without ``private`` DP-SGD is left out.

    Raises:
        BuildFailed: no compiler, or it failed, or there is no place for what it makes.
    """
    flags = (*target.flags, *FLAGS, *(("-DDOUBLE",) if double else ()), *(() if private else ("-DPLAIN",)))
    key = hashlib.sha256("\0".join([source, compiler_version(), *flags]).encode()).hexdigest()[:32]
    folder = cache_directory()
    library, recorded = folder / f"{key}.so", folder / f"{key}.sha256"
    if library.exists() and _holds(library, recorded):
        return library
    try:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            made = Path(place) / "library.so"
            compile_library(source, flags, made)
            digest = Path(place) / "digest"
            digest.write_text(hashlib.sha256(made.read_bytes()).hexdigest(), encoding="ascii")
            (folder / f"{key}.verified").unlink(missing_ok=True)
            for file in (made, digest):  # whatever the umask: a file that a group may write to is not loaded
                file.chmod(0o600)
            digest.replace(recorded)
            made.replace(library)
    except OSError as error:
        raise BuildFailed(f"the cache {folder} cannot be written ({error.strerror})") from error
    return library


def _holds(library: Path, recorded: Path) -> bool:
    """Whether a library is the recorded one, and both are the user's: the cache may have been open to others once."""
    try:
        own = all(file.lstat().st_uid == os.getuid() and file.lstat().st_mode & 0o022 == 0 for file in (library, recorded))
        return own and hashlib.sha256(library.read_bytes()).hexdigest() == recorded.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return False


def compiler_version() -> str:
    """The version of the compiler's wheel.

    Raises:
        BuildFailed: it is not installed.
    """
    try:
        return importlib.metadata.version("ziglang")
    except importlib.metadata.PackageNotFoundError as error:
        raise BuildFailed('no compiler: ziglang is not installed (pip install "fedcore[native]")') from error


def compile_library(source: str, flags: tuple[str, ...], output: Path) -> None:
    """Compile ``source`` with ``flags`` to ``output``.

    Raises:
        BuildFailed: the compiler cannot be started, takes too long or fails; with its first line.
    """
    text = output.with_suffix(".c")
    text.write_text(source, encoding="ascii")
    zig = cache_directory() / "zig"
    environment = {**os.environ, "ZIG_LOCAL_CACHE_DIR": str(zig), "ZIG_GLOBAL_CACHE_DIR": str(zig)}
    command = [sys.executable, "-m", "ziglang", "cc", *flags, "-o", str(output), str(text)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, env=environment, check=False)  # noqa: S603 - our own arguments
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildFailed(f"the compiler did not run: {error}") from error
    if done.returncode or not output.exists():
        line = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200].strip())
        raise BuildFailed(f"the compiler failed ({done.returncode}): {line.strip()}")
