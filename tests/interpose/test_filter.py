"""The filter: compiled rules run by a small BPF interpreter, for both architectures (interposition 0)."""

from __future__ import annotations

import struct

import pytest

from iommufd.interpose import bpf
from iommufd.interpose.filter import compile_filter, descriptor_range, rules
from iommufd.interpose.syscalls import AARCH64, X86_64, Arch

BASE, TOP = 768, 1024
NOTIFY, ALLOW = bpf.SECCOMP_RET_USER_NOTIF, bpf.SECCOMP_RET_ALLOW
BOTH = pytest.mark.parametrize("arch", [X86_64, AARCH64], ids=lambda arch: arch.name)


def interpret(program: bytes, data: bytes) -> int:
    """Runs a classic BPF program over struct seccomp_data and returns its verdict."""
    code = list(struct.iter_unpack("=HBBI", program))
    accumulator, at = 0, 0
    while True:
        op, yes, no, k = code[at]
        at += 1
        if op == bpf.LD_W_ABS:
            assert k % 4 == 0, "the kernel refuses unaligned loads"
            (accumulator,) = struct.unpack_from("=I", data, k)
        elif op == bpf.AND_K:
            accumulator &= k
        elif op == bpf.JA:
            at += k
        elif op == bpf.RET_K:
            return int(k)
        else:
            taken = {
                bpf.JEQ_K: accumulator == k,
                bpf.JGT_K: accumulator > k,
                bpf.JGE_K: accumulator >= k,
                bpf.JSET_K: bool(accumulator & k),
            }[op]
            at += yes if taken else no


def verdict(arch: Arch, name: str, *args: int, pin_tracking: bool = True, token: int | None = None) -> int:
    padded = [a & (2**64 - 1) for a in (*args, *[0] * (6 - len(args)))]
    data = struct.pack("=IIQ6Q", arch.numbers[name], arch.token if token is None else token, 0, *padded)
    return interpret(compile_filter(BASE, TOP, pin_tracking=pin_tracking, arch=arch), data)


def test_the_assembler_resolves_labels() -> None:
    program = bpf.assemble(
        [
            bpf.Instruction(bpf.LD_W_ABS, 0),
            bpf.Instruction(bpf.JEQ_K, 5, "five", ""),
            bpf.Instruction(bpf.RET_K, 1),
            bpf.Label("five"),
            bpf.Instruction(bpf.RET_K, 2),
        ]
    )
    assert interpret(program, struct.pack("=I", 5)) == 2
    assert interpret(program, struct.pack("=I", 6)) == 1


@pytest.mark.parametrize(
    "lines",
    [
        [bpf.Instruction(bpf.JEQ_K, 0, "far"), *[bpf.Instruction(bpf.RET_K)] * 256, bpf.Label("far")],
        [bpf.Label("back"), bpf.Instruction(bpf.JEQ_K, 0, "back")],
        [bpf.Label("twice"), bpf.Label("twice")],
    ],
)
def test_the_assembler_refuses_what_bpf_cannot_say(lines: list[bpf.Line]) -> None:
    with pytest.raises(ValueError, match="label"):
        bpf.assemble(lines)


@BOTH
def test_ioctls_are_trapped_by_type_or_descriptor(arch: Arch) -> None:
    assert verdict(arch, "ioctl", 3, 0x3B80) == NOTIFY
    assert verdict(arch, "ioctl", 3, 0x3BFF) == NOTIFY
    assert verdict(arch, "ioctl", 3, 0x5401) == ALLOW
    assert verdict(arch, "ioctl", 3, 0xC0043B80) == ALLOW  # has size bits: not the uAPI's
    assert verdict(arch, "ioctl", BASE, 0x5401) == NOTIFY
    assert verdict(arch, "ioctl", TOP, 0x5401) == ALLOW
    assert verdict(arch, "ioctl", 3, 0xFFFF_FFFF_0000_3B80) == NOTIFY  # the kernel sees 32 bits of the command


@BOTH
@pytest.mark.parametrize("name", [
    "read", "write", "pread64", "pwrite64", "readv", "writev", "preadv2", "lseek", "close", "dup", "fcntl", "fstat",
    "ftruncate", "getdents64",
])  # fmt: skip
def test_descriptor_calls_are_trapped_in_the_range_only(arch: Arch, name: str) -> None:
    for fd, expected in ((0, ALLOW), (BASE - 1, ALLOW), (BASE, NOTIFY), (TOP - 1, NOTIFY), (TOP, ALLOW)):
        assert verdict(arch, name, fd) == expected
    assert verdict(arch, name, 2**32 | BASE) == NOTIFY  # descriptors are 32 bits wide
    assert verdict(arch, name, -1) == ALLOW


@BOTH
def test_calls_with_two_descriptors(arch: Arch) -> None:
    assert verdict(arch, "dup3", 3, BASE, 0) == NOTIFY
    assert verdict(arch, "dup3", BASE, 3, 0) == NOTIFY
    assert verdict(arch, "dup3", 3, 4, 0) == ALLOW
    assert verdict(arch, "splice", 3, 0, BASE) == NOTIFY
    assert verdict(arch, "sendfile", 3, BASE) == NOTIFY


@BOTH
def test_close_range_when_it_reaches_the_range(arch: Arch) -> None:
    assert verdict(arch, "close_range", 3, 2**32 - 1) == NOTIFY
    assert verdict(arch, "close_range", 3, BASE - 1) == ALLOW
    assert verdict(arch, "close_range", TOP, 2**32 - 1) == ALLOW


@BOTH
def test_mmap_by_descriptor_and_by_what_it_replaces(arch: Arch) -> None:
    private, shared, fixed, anonymous = 2, 1, 0x10, 0x20
    assert verdict(arch, "mmap", 0, 4096, 3, private | anonymous, -1) == ALLOW  # -1 lies above the range
    assert verdict(arch, "mmap", 0, 4096, 3, shared, BASE) == NOTIFY
    assert verdict(arch, "mmap", 0, 4096, 3, private | anonymous, BASE) == ALLOW
    assert verdict(arch, "mmap", 4096, 4096, 3, private | anonymous | fixed, -1) == NOTIFY
    assert verdict(arch, "mmap", 4096, 4096, 3, private | anonymous | fixed, -1, pin_tracking=False) == ALLOW


@BOTH
def test_address_space_calls_with_pin_tracking_only(arch: Arch) -> None:
    for name, args in (("munmap", ()), ("mremap", ()), ("brk", ()), ("shmdt", ()), ("madvise", (0, 0, 4))):
        assert verdict(arch, name, *args) == NOTIFY
        assert verdict(arch, name, *args, pin_tracking=False) == ALLOW
    assert verdict(arch, "madvise", 0, 0, 3) == ALLOW  # MADV_WILLNEED takes nothing away


@BOTH
def test_paths_are_always_trapped_and_fstat_by_range(arch: Arch) -> None:
    for name in ("openat", "openat2", "faccessat", "faccessat2", "readlinkat", "execve", "execveat", "exit_group"):
        assert verdict(arch, name, -100) == NOTIFY
    assert verdict(arch, "newfstatat", -100, 0, 0, 0) == NOTIFY
    assert verdict(arch, "newfstatat", 3, 0, 0, 0x1000) == ALLOW  # fstat of an ordinary descriptor
    assert verdict(arch, "newfstatat", BASE, 0, 0, 0x1000) == NOTIFY
    assert verdict(arch, "newfstatat", -100, 0, 0, 0x1000) == NOTIFY
    assert verdict(arch, "statx", 3, 0, 0x1000) == ALLOW
    assert verdict(arch, "statx", 3, 0, 0) == NOTIFY


@BOTH
def test_a_foreign_abi_is_left_alone(arch: Arch) -> None:
    assert verdict(arch, "ioctl", 3, 0x3B80, token=0x40000003) == ALLOW


def test_x32_numbers_are_none_of_ours() -> None:
    data = struct.pack("=IIQ6Q", 0x40000000 | X86_64.numbers["openat"], X86_64.token, 0, *[0] * 6)
    assert interpret(compile_filter(BASE, TOP, arch=X86_64), data) == ALLOW


@BOTH
def test_every_rule_names_a_call_that_exists_somewhere(arch: Arch) -> None:
    known = set(X86_64.numbers)
    assert set(rules()) <= known
    only_here = set(X86_64.numbers) - set(AARCH64.numbers)
    assert only_here == {
        "open", "stat", "lstat", "access", "dup2", "getdents", "creat", "readlink",
    }  # fmt: skip
    assert len(set(arch.numbers.values())) == len(arch.numbers)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (1024, (768, 1024)),
        (20000, (768, 1024)),
        (600, (344, 600)),
        (512, (256, 512)),
        (256, (128, 256)),
        (20, (10, 20)),
    ],
)
def test_the_range_fits_the_limit(limit: int, expected: tuple[int, int]) -> None:
    assert descriptor_range(limit) == expected


def test_the_filter_is_small() -> None:
    """BPF_MAXINSNS is 4096; what costs is the number of instructions on the way of a frequent call."""
    assert len(compile_filter(BASE, TOP, arch=X86_64)) // 8 < 300
