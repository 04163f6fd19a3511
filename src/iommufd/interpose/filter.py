"""Which system calls of a supervised program reach the supervisor: the rules as data, compiled to BPF.

The rules (one table, names of system calls):

* ``ioctl`` by number (type ``;``, the uAPI's own) on any descriptor, because a descriptor may have been moved anywhere;
* every call on a descriptor in ``[base, top)``, where the supervisor puts the files of the machine. The upper bound is
  essential: ``mmap`` passes descriptor -1 and the ``*at`` calls pass -100;
* every call that names a path (BPF cannot see strings);
* ``execve`` and ``exit_group``, and what changes credentials, root or the descriptor table as a whole;
* with pin tracking, every call that can take pages away from an address.

A rule is a disjunction of clauses, a clause a conjunction of tests on the low 32 bits of arguments (descriptors,
commands and flags are 32 bits wide in the kernel). Everything else is allowed natively, as is every call of a
foreign ABI.
"""

from __future__ import annotations

from dataclasses import dataclass

from iommufd.interpose import bpf
from iommufd.interpose.bpf import Instruction, Label, Line
from iommufd.interpose.syscalls import HOST, Arch

AT_EMPTY_PATH = 0x1000
MAP_FIXED, MAP_ANONYMOUS = 0x10, 0x20
SHM_REMAP = 0o40000
MADV_DONTNEED, MADV_FREE, MADV_REMOVE, MADV_DONTNEED_LOCKED, MADV_GUARD_INSTALL = 4, 8, 9, 24, 102
ADVICE = (MADV_DONTNEED, MADV_FREE, MADV_REMOVE, MADV_DONTNEED_LOCKED, MADV_GUARD_INSTALL)
IOCTL_TYPE_MASK, IOCTL_TYPE_IOMMUFD = 0xFFFFFF00, 0x3B00

RANGE_SIZE = 256


@dataclass(frozen=True, slots=True)
class Test:
    """One test on the low word of an argument: ``op`` is one of high, eq, set, clear, masked, above, below."""

    argument: int
    op: str
    value: int = 0
    mask: int = 0xFFFFFFFF


Clause = tuple[Test, ...]
Rule = tuple[Clause, ...]

ALWAYS: Rule = ((),)


def high(argument: int) -> Test:
    """The argument is a descriptor in ``[base, top)``."""
    return Test(argument, "high")


def equal(argument: int, value: int) -> Test:
    return Test(argument, "eq", value)


def any_bit(argument: int, bits: int) -> Test:
    return Test(argument, "set", bits)


def no_bit(argument: int, bits: int) -> Test:
    return Test(argument, "clear", bits)


def masked(argument: int, mask: int, value: int) -> Test:
    return Test(argument, "masked", value, mask)


_FD0: Rule = ((high(0),),)

DESCRIPTOR_CALLS: dict[str, Rule] = {
    "ioctl": ((masked(1, IOCTL_TYPE_MASK, IOCTL_TYPE_IOMMUFD),), (high(0),)),
    **dict.fromkeys(
        (
            "read", "write", "readv", "writev", "pread64", "pwrite64", "preadv", "pwritev", "preadv2", "pwritev2",
            "lseek", "close", "dup", "fstat", "ftruncate", "fallocate", "fchmod", "fchown", "fsync", "fdatasync",
            "getdents", "getdents64", "fadvise64", "readahead", "sync_file_range",
        ),
        _FD0,
    ),
    "dup2": ((high(0),), (high(1),)),
    "dup3": ((high(0),), (high(1),)),
    "sendfile": ((high(0),), (high(1),)),
    "splice": ((high(0),), (high(2),)),
    "copy_file_range": ((high(0),), (high(2),)),
    "fcntl": _FD0,
    "close_range": ((Test(0, "below"), Test(1, "above")),),
    "mmap": ((high(4), no_bit(3, MAP_ANONYMOUS)),),
}  # fmt: skip

PATH_CALLS: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "open", "creat", "openat", "openat2", "stat", "lstat", "access", "faccessat", "faccessat2", "readlink",
            "readlinkat", "getxattr", "lgetxattr", "listxattr", "llistxattr",
        ),
        ALWAYS,
    ),
    # fstat of glibc is newfstatat(fd, "", AT_EMPTY_PATH): natively right on every descriptor below the range
    "newfstatat": ((no_bit(3, AT_EMPTY_PATH),), (Test(0, "above"),)),
    "statx": ((no_bit(2, AT_EMPTY_PATH),), (Test(0, "above"),)),
}  # fmt: skip

PROCESS_CALLS: dict[str, Rule] = dict.fromkeys(
    (
        "execve", "execveat", "exit_group", "setuid", "setreuid", "setresuid", "setfsuid", "capset", "unshare", "setns",
        "chroot", "pivot_root",
    ),
    ALWAYS,
)  # fmt: skip

ADDRESS_SPACE_CALLS: dict[str, Rule] = {
    **dict.fromkeys(("munmap", "mremap", "brk", "shmdt"), ALWAYS),
    "mmap": ((any_bit(3, MAP_FIXED),),),
    "shmat": ((any_bit(2, SHM_REMAP),),),
    "madvise": tuple((equal(2, advice),) for advice in ADVICE),
    "process_madvise": tuple((equal(3, advice),) for advice in ADVICE),
}


def descriptor_range(soft_limit: int) -> tuple[int, int]:
    """``[base, top)`` of the descriptors the supervisor hands out, for a soft RLIMIT_NOFILE.

    The top 256 below min(limit, 1024), so that ``select`` can hold them; the upper half of a small limit."""
    top = min(soft_limit, 1024)
    return (top - RANGE_SIZE if top >= 2 * RANGE_SIZE else top // 2), top


def rules(pin_tracking: bool = True) -> dict[str, Rule]:
    """All rules by system call name."""
    merged: dict[str, Rule] = {**DESCRIPTOR_CALLS, **PATH_CALLS, **PROCESS_CALLS}
    if pin_tracking:
        for name, rule in ADDRESS_SPACE_CALLS.items():
            merged[name] = merged.get(name, ()) + rule
    return merged


def compile_filter(base: int, top: int, *, pin_tracking: bool = True, arch: Arch = HOST) -> bytes:
    """The filter for descriptors ``[base, top)`` as an array of struct sock_filter."""
    lines: list[Line] = [
        Instruction(bpf.LD_W_ABS, bpf.OFFSET_ARCH),
        Instruction(bpf.JEQ_K, arch.token, "", "allow-foreign"),
        Instruction(bpf.LD_W_ABS, bpf.OFFSET_NR),
        Instruction(bpf.JA, yes="start"),
        Label("allow-foreign"),
        Instruction(bpf.RET_K, bpf.SECCOMP_RET_ALLOW),
        Label("start"),
    ]
    by_rule: dict[Rule, list[str]] = {}
    for name, rule in rules(pin_tracking).items():
        if name in arch.numbers:
            by_rule.setdefault(rule, []).append(name)
    for index, (rule, names) in enumerate(by_rule.items()):
        lines += _block(f"rule{index}", rule, sorted(arch.numbers[name] for name in names), base, top)
    lines.append(Instruction(bpf.RET_K, bpf.SECCOMP_RET_ALLOW))
    return bpf.assemble(lines)


def _block(name: str, rule: Rule, numbers: list[int], base: int, top: int) -> list[Line]:
    """Tests of the system call number, then the rule; the number stays in the accumulator until one matches."""
    lines: list[Line] = []
    for index, number in enumerate(numbers):
        last = index == len(numbers) - 1
        lines.append(Instruction(bpf.JEQ_K, number, f"{name}-body", f"{name}-end" if last else ""))
    lines.append(Label(f"{name}-body"))
    for index, clause in enumerate(rule):
        following = f"{name}-clause{index + 1}"
        for test in clause:
            lines += _test(test, following, base, top)
        lines.append(Instruction(bpf.RET_K, bpf.SECCOMP_RET_USER_NOTIF))
        lines.append(Label(following))
    if all(rule):  # a clause without tests never falls through
        lines.append(Instruction(bpf.RET_K, bpf.SECCOMP_RET_ALLOW))
    lines.append(Label(f"{name}-end"))
    return lines


def _test(test: Test, otherwise: str, base: int, top: int) -> list[Line]:
    """Loads the argument and falls through when the test holds, else jumps to ``otherwise``."""
    load = Instruction(bpf.LD_W_ABS, bpf.offset_of_low_word(test.argument))
    if test.op == "high":
        return [load, Instruction(bpf.JGE_K, base, "", otherwise), Instruction(bpf.JGE_K, top, otherwise)]
    if test.op == "eq":
        return [load, Instruction(bpf.JEQ_K, test.value, "", otherwise)]
    if test.op == "set":
        return [load, Instruction(bpf.JSET_K, test.value, "", otherwise)]
    if test.op == "clear":
        return [load, Instruction(bpf.JSET_K, test.value, otherwise)]
    if test.op == "masked":
        return [load, Instruction(bpf.AND_K, test.mask), Instruction(bpf.JEQ_K, test.value, "", otherwise)]
    if test.op == "above":  # the argument reaches the range or lies beyond it
        return [load, Instruction(bpf.JGE_K, base, "", otherwise)]
    if test.op == "below":  # the argument lies below the range's end
        return [load, Instruction(bpf.JGE_K, top, otherwise)]
    raise ValueError(f"there is no test {test.op!r}")
