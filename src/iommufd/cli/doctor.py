"""``iommufd doctor``: what this host offers to `iommufd run`, and how to get what is missing.

Every line is tried, not guessed. Exit status: 0 when programs can be run, 1 when they cannot.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import os
import resource
import stat
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from iommufd.cli._text import wrapped

OK, LESS, MISSING = "ok", "less", "missing"
MARKS = {OK: "✓", LESS: "–", MISSING: "✗"}

MINIMUM_KERNEL, ADVISED_KERNEL = (5, 19), (6, 11)
PROCMAP_QUERY, PAGEMAP_SCAN = 0xC0686611, 0xC0606610
CAPABILITIES = {"CAP_IPC_LOCK": 14, "CAP_SYS_RAWIO": 17, "CAP_SYS_RESOURCE": 24}
IN_WATCHES = Path("/proc/sys/fs/inotify/max_user_watches")
IN_INSTANCES = Path("/proc/sys/fs/inotify/max_user_instances")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: ``state`` is ok, less (works, but slower or with a limit) or missing; ``fix`` says what to do."""

    state: str
    what: str
    found: str
    fix: str = ""


def kernel_release(text: str) -> tuple[int, int]:
    """("6.18.44-fc") -> (6, 18)"""
    parts = text.split("-")[0].split("+")[0].split(".")
    return int(parts[0]), int("".join(c for c in parts[1] if c.isdigit()) or 0) if len(parts) > 1 else 0


def kernel() -> Iterator[Finding]:
    text = os.uname().release
    release = kernel_release(text)
    if release < MINIMUM_KERNEL:
        yield Finding(MISSING, "kernel", f"Linux {text}", "Linux 5.19 or later is needed (seccomp WAIT_KILLABLE_RECV)")
    elif release < ADVISED_KERNEL:
        yield Finding(LESS, "kernel", f"Linux {text}", "Linux 6.11 or later is faster and exact")
    else:
        yield Finding(OK, "kernel", f"Linux {text}")
    from iommufd.interpose.syscalls import ARCHES, host_arch

    known = host_arch() is not None
    yield Finding(
        OK if known else MISSING,
        "architecture",
        os.uname().machine,
        "" if known else f"only programs of {', '.join(ARCHES)} can be supervised",
    )


def seccomp() -> Iterator[Finding]:
    """Installs the real filter in a child, and lets it open /dev/iommu into a descriptor of ours."""
    from iommufd.interpose.filter import compile_filter, descriptor_range
    from iommufd.interpose.launch import LaunchError, start
    from iommufd.interpose.notify import NOTIF, NOTIF_SIZE, RECV, Gone, Listener

    base, top = descriptor_range(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    try:
        child = start(["/bin/true"], compile_filter(base, top))
    except LaunchError as error:
        sandboxed = "nested" in str(error)
        fix = "leave the sandbox or the outer `iommufd run`" if sandboxed else "allow seccomp(2) in this container"
        yield Finding(MISSING, "seccomp notification", str(error), fix)
        return
    listener = Listener(child.listener)
    sync = listener.set_sync_wake_up()
    yield Finding(OK, "seccomp notification", "a listener with WAIT_KILLABLE_RECV can be installed")
    yield Finding(
        OK if sync else LESS,
        "seccomp SYNC_WAKE_UP",
        "available" if sync else "not known to this kernel",
        "" if sync else "Linux 6.6 or later makes calls up to five times faster",
    )
    yield from memory_of(child.pid)
    child.begin()
    buffer = bytearray(NOTIF_SIZE)
    given: str | None = None
    try:
        while True:
            buffer[:] = bytes(NOTIF_SIZE)
            try:
                fcntl.ioctl(listener.fd, RECV, buffer)
            except OSError as error:
                if error.errno == errno.EINTR:
                    continue
                break
            number = NOTIF.unpack(buffer)[0]
            if given is None:
                try:
                    with open("/dev/null", "rb") as null:
                        listener.add_fd(number, null.fileno(), base, True, send=False)
                    given = ""
                except (OSError, Gone) as error:
                    given = str(error) or "the caller is gone"
            with suppress(Gone):  # killed meanwhile: there is nobody to let go
                listener.proceed(number)
    finally:
        listener.close()
        child.forget()
        os.waitpid(child.pid, 0)
    yield Finding(
        OK if given == "" else MISSING,
        "seccomp descriptors (ADDFD)",
        "a descriptor can be given to a program" if given == "" else f"refused: {given}",
        "" if given == "" else "Linux 5.14 or later is needed",
    )


def memory_of(pid: int) -> Iterator[Finding]:
    """What we may do with the memory and descriptors of a child of ours."""
    from iommufd.interpose.caller import CallerMemory
    from iommufd.interpose.libc import pidfd_getfd, pidfd_open, same_vm

    start, memory = _writable_mapping(pid), CallerMemory(pid)
    data = memory.read_upto(start, 8) if start is not None else b""
    usable = start is not None and len(data) == 8 and memory.write_upto(start, data) == 8
    yield Finding(
        OK if usable else MISSING,
        "memory of children",
        "readable and writable" if usable else "closed to us",
        "" if usable else "allow process_vm_readv and process_vm_writev (seccomp profile, LSM, ptrace_scope)",
    )
    yield from _contents(pid)
    try:
        pidfd = pidfd_open(pid)
        try:
            os.close(pidfd_getfd(pidfd, 0))
        finally:
            os.close(pidfd)
        yield Finding(OK, "descriptors of children", "pidfd_getfd works")
    except OSError as error:
        if error.errno == errno.EBADF:
            yield Finding(OK, "descriptors of children", "pidfd_getfd works")
        else:
            fix = "containers: run with --cap-add=SYS_PTRACE; without it, dup gives low numbers"
            yield Finding(LESS, "descriptors of children", f"pidfd_getfd: {error.strerror}", fix)
    shared = same_vm(pid, pid)
    yield Finding(
        OK if shared is not None else LESS,
        "comparing address spaces",
        "kcmp works" if shared is not None else "kcmp is refused",
        "" if shared is not None else "containers: --cap-add=SYS_PTRACE; without it, vfork children count as processes",
    )
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    with suppress(OSError):  # a kernel without Yama: nothing to find
        value = scope.read_text().strip()
        fix = "" if value in "01" else "sysctl kernel.yama.ptrace_scope=1"
        yield Finding(LESS if fix else OK, "kernel.yama.ptrace_scope", value, fix)


def _writable_mapping(pid: int) -> int | None:
    with suppress(OSError), open(f"/proc/{pid}/maps", "rb") as maps:  # gone, or not ours to read
        for line in maps:
            if b" rw-" in line:
                return int(line.split(b"-")[0], 16)
    return None


def _contents(pid: int) -> Iterator[Finding]:
    query = bytearray(struct.pack("=15Q", 104, 0x10, *[0] * 13))[:104]
    found = _tries(f"/proc/{pid}/maps", PROCMAP_QUERY, query)
    yield _offered("PROCMAP_QUERY", found, "Linux 6.11 or later; without it pinning parses /proc/PID/maps")
    scan = bytearray(struct.pack("=12Q", 96, 0, 0, 4096, 0, 0, 0, 0, 0, 0, 8, 8))
    found = _tries(f"/proc/{pid}/pagemap", PAGEMAP_SCAN, scan)
    without = "Linux 6.7 or later; without it untouched memory is copied too when pages are rescued"
    yield _offered("PAGEMAP_SCAN", found, without)


def _offered(name: str, found: bool, without: str) -> Finding:
    return Finding(OK if found else LESS, name, "available" if found else "not available", "" if found else without)


def _tries(path: str, request: int, argument: bytearray) -> bool:
    """Whether the ioctl exists on the file: any errno but ENOTTY says so."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.ioctl(fd, request, argument)
    except OSError as error:
        return error.errno not in (errno.ENOTTY, errno.EACCES, errno.EPERM)
    finally:
        os.close(fd)
    return True


def effective_capabilities() -> int:
    """Our own effective set."""
    with suppress(OSError), open("/proc/self/status", "rb") as status:  # no /proc: none that we know of
        for line in status:
            if line.startswith(b"CapEff:"):
                return int(line.split()[1], 16)
    return 0


def limits() -> Iterator[Finding]:
    with suppress(OSError, ValueError):  # no such limits here: nothing to find
        watches, instances = int(IN_WATCHES.read_text()), int(IN_INSTANCES.read_text())
        enough = watches >= 1024 and instances >= 8
        yield Finding(
            OK if enough else LESS,
            "inotify limits",
            f"{watches} watches, {instances} instances",
            "" if enough else "sysctl fs.inotify.max_user_watches=8192 fs.inotify.max_user_instances=128",
        )
    if os.geteuid() == 0:
        lacking = [name for name, bit in CAPABILITIES.items() if not effective_capabilities() >> bit & 1]
        yield Finding(
            LESS if lacking else OK,
            "capabilities of root",
            f"without {', '.join(lacking)}" if lacking else "all that iommufd asks for",
            "calls that need them fail as on the kernel; containers: --cap-add" if lacking else "",
        )
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    many = hard == resource.RLIM_INFINITY or hard >= 4096
    yield Finding(
        OK if many else LESS,
        "open files",
        f"hard limit {'none' if hard == resource.RLIM_INFINITY else hard}",
        "" if many else "each open file of a machine takes one of the supervisor's: raise `ulimit -Hn`",
    )
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    text = "none" if soft == resource.RLIM_INFINITY else f"{soft // 1024} KiB"
    yield Finding(OK, "locked memory (RLIMIT_MEMLOCK)", f"limit {text}; counts as it does for the kernel's iommufd")


def huge_pages() -> Iterator[Finding]:
    with suppress(OSError):  # no /proc: nothing to find
        words = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = int(words.get("HugePages_Total", "0")), int(words.get("HugePages_Free", "0"))
        if total:
            yield Finding(OK, "huge pages", f"{free} of {total} free, {words['Hugepagesize'].strip()} each")
        else:
            fix = "tests that map huge pages need some: sysctl vm.nr_hugepages=64"
            yield Finding(LESS, "huge pages", "none configured", fix)


def real_devices() -> Iterator[Finding]:
    for path, use in (("/dev/iommu", "the kernel backend"), ("/dev/vfio/vfio", "the kernel backend's containers")):
        yield _device(path, use)
    groups = [p for p in _list("/dev/vfio") if p.isdigit()] + _list("/dev/vfio/devices")
    if groups:
        yield Finding(OK, "real VFIO devices", ", ".join(groups))


def _device(path: str, use: str) -> Finding:
    try:
        found = os.stat(path)
    except OSError:
        fix = f"not needed; {use} would use it (CONFIG_IOMMUFD, CONFIG_VFIO)"
        return Finding(LESS, f"real {path}", "none: programs see the software one only", fix)
    if not stat.S_ISCHR(found.st_mode):
        return Finding(LESS, f"real {path}", "exists and is no device")
    allowed = os.access(path, os.R_OK | os.W_OK)
    text = "usable" if allowed else f"not open to you (mode {stat.S_IMODE(found.st_mode):04o})"
    return Finding(OK if allowed else LESS, f"real {path}", text, "" if allowed else f"chmod or chown it to use {use}")


def _list(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


SECTIONS: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
    ("This host", kernel),
    ("Running programs", seccomp),
    ("Limits", limits),
    ("Memory", huge_pages),
    ("Hardware", real_devices),
)


def examine() -> list[tuple[str, list[Finding]]]:
    """All findings, by section."""
    return [(title, list(section())) for title, section in SECTIONS]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="iommufd doctor", description="Say what this host offers to `iommufd run`, and how to get what is missing."
    )
    parser.parse_args(argv)
    sections = examine()
    missing = 0
    for title, findings in sections:
        print(f"{title}:")
        for finding in findings:
            missing += finding.state == MISSING
            print(wrapped(f"  {MARKS[finding.state]} {finding.what}: {finding.found}", indent=4))
            if finding.fix:
                print(wrapped(f"      {finding.fix}", indent=6))
    print()
    if missing:
        print(f"Programs cannot be run here: {missing} requirement{'s' if missing > 1 else ''} missing (✗).")
        return 1
    print("Programs can be run here.")
    sys.stdout.flush()
    return 0
