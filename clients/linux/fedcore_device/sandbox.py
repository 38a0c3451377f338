"""What a child that runs a received training step may not do: reach a network, start processes, or outgrow its limits.

A seccomp filter (https://docs.kernel.org/userspace-api/seccomp_filter.html) takes the system calls away for good, needs no
privilege and no container, and holds for all threads that begin afterwards. Limits are those of setrlimit(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import platform
import resource
import signal
import struct
from pathlib import Path

from fedcore.errors import Refused

__all__ = ["confine", "filter_for"]

# Numbers: x86-64 from arch/x86/entry/syscalls/syscall_64.tbl, aarch64 from include/uapi/asm-generic/unistd.h. In this order:
# socket, socketpair, connect, accept, accept4, bind, listen, execve, execveat, ptrace, process_vm_readv, process_vm_writev,
# io_uring_setup, io_uring_enter, io_uring_register, pidfd_getfd, bpf, unshare, setns, mount; fork, vfork, which only x86-64 has.
# Then clone, which makes threads too and says so in its first argument.
_FORBIDDEN = {
    "x86_64": (
        0xC000003E, (41, 53, 42, 43, 288, 49, 50, 59, 322, 101, 310, 311, 425, 426, 427, 438, 321, 272, 308, 165, 57, 58), 56,
    ),
    "aarch64": (
        0xC00000B7, (198, 199, 203, 202, 242, 200, 201, 221, 281, 117, 270, 271, 425, 426, 427, 438, 280, 97, 268, 40), 220,
    ),
}  # fmt: skip
_CLONE3 = 435  # says it in memory, where no filter looks: a C library that is told that there is none takes clone
_CLONE_THREAD = 0x00010000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # classes of BPF instructions
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # of struct seccomp_data, little-endian
_ALLOW, _DENY, _KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
_MISSING = 0x00050000 | errno.ENOSYS
_X32 = 0x40000000  # system calls of x86-64's 32-bit pointers carry this bit
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _MODE_FILTER = 1, 38, 22, 2


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]


def confine(*, memory: int, seconds: int) -> None:
    """Confine this process for good: at most ``memory`` bytes more of address space than it has, ``seconds`` of processor time.

    It dies with its parent, and leaves no core file.

    Raises:
        Refused: the system cannot confine it; nothing that was received may run then.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    limits = ((resource.RLIMIT_AS, _address_space() + memory), (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_CORE, 0))
    try:
        for kind, limit in limits:
            resource.setrlimit(kind, (limit, limit))
    except (OSError, ValueError) as error:
        raise Refused(f"training cannot be confined: no limit can be set ({error})") from error
    _filter(libc)


def _address_space() -> int:
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    return 0


def filter_for(machine: str) -> list[tuple[int, int, int, int]]:
    """The filter's instructions for a processor: class, steps ahead if a test holds and if not, operand.

    Raises:
        Refused: its system calls are not known.
    """
    if machine not in _FORBIDDEN:
        raise Refused(f"training cannot be confined: no list of system calls is known for {machine}")
    architecture, forbidden, clone = _FORBIDDEN[machine]
    count = len(forbidden)
    return [
        (_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER), (_AT_LEAST, count + 5, 0, _X32),
        *((_EQUAL, count + 4 - i, 0, number) for i, number in enumerate(forbidden)),
        (_EQUAL, 5, 0, _CLONE3), (_EQUAL, 0, 2, clone),
        (_LOAD, 0, 0, _FIRST_ARGUMENT), (_ANY_BIT, 0, 1, _CLONE_THREAD),
        (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _DENY), (_RETURN, 0, 0, _MISSING),
    ]  # fmt: skip


def _filter(libc: ctypes.CDLL) -> None:
    code = filter_for(platform.machine())
    buffer = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in code))
    program = _Program(len(code), ctypes.addressof(buffer))
    if (
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
        or libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program), 0, 0) != 0
    ):
        raise Refused(f"training cannot be confined: the system takes no filter ({errno.errorcode.get(ctypes.get_errno(), '?')})")
