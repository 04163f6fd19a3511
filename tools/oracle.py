"""`make oracle`: the real kernel, as judge.

A kernel with iommufd and its test support (:mod:`tools.kernel_tree` builds it once) boots under QEMU's software
emulation in about two seconds, with this machine's files as its read-only root. ``test`` plays the conformance checks
(:mod:`iommufd.testing`) on its ``/dev/iommu`` and brings the transcripts back to ``tests/conformance/transcripts``;
``run`` runs any shell command there; ``selftest`` runs the kernel's own programs natively, to compare with
`make conformance`.

``QEMU_EXTRA`` adds options to QEMU. ``--vfio`` is a ready-made set: an Intel IOMMU and three devices that do DMA, two
of them in one group behind a conventional PCI bridge; the job finds ``tools/vm/bind-vfio`` to hand them to vfio-pci.
``test`` makes its own sets.
KVM is not used: it is not everywhere, and the emulated machine is the same everywhere.
"""

from __future__ import annotations

import argparse
import gzip
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tools import kernel_tree
from tools.selftest_report import Verdict, collect

ROOT = Path(__file__).resolve().parent.parent
TRANSCRIPTS = ROOT / "tests/conformance/transcripts" / f"linux-{kernel_tree.VERSION}"
VFIO = (
    "-M q35,kernel-irqchip=split -device intel-iommu,intremap=on,aw-bits=48,snoop-control=on -device edu"
    " -device pcie-pci-bridge,id=bridge -device edu,bus=bridge,addr=1 -device edu,bus=bridge,addr=2"
)
UNSAFE = "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode"
FOR_VM = {"qemu-system-x86_64": "qemu-system-x86", "/bin/busybox": "busybox-static"}
ALARMS = re.compile(r"WARNING:|BUG:|Oops|general protection|Kernel panic|INFO: task .* blocked")


def newc(files: Sequence[tuple[str, int, bytes]]) -> Iterator[bytes]:
    """A cpio archive (format newc) of (name, mode, content): what a kernel unpacks as its first root."""
    for inode, (name, mode, content) in enumerate([*files, ("TRAILER!!!", 0, b"")], start=1):
        encoded = name.encode() + b"\0"
        fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        yield header + b"\0" * (-len(header) % 4)
        yield content + b"\0" * (-len(content) % 4)


def initrd() -> Path:
    """The first root of the VM: busybox and ``vm/init``. Made anew when either changed."""
    busybox, init = Path("/bin/busybox"), kernel_tree.HERE / "vm/init"
    target = kernel_tree.caches()[0] / "oracle-initrd.gz"
    newest = max(busybox.stat().st_mtime, init.stat().st_mtime, Path(__file__).stat().st_mtime)
    if not target.exists() or target.stat().st_mtime < newest:
        folder, program = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o755
        files = [(name, folder, b"") for name in ("bin", "proc", "sys", "dev", "host", "out")]
        files += [("bin/busybox", program, busybox.read_bytes()), ("init", program, init.read_bytes())]
        files += [
            (f"bin/{tool}", stat.S_IFLNK | 0o777, b"busybox")
            for tool in ("sh", "mount", "mkdir", "chmod", "chroot", "poweroff")
        ]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(gzip.compress(b"".join(newc(files))))
    return target


def boot(
    job: str,
    out: Path,
    extra: Sequence[str] = (),
    timeout: float = 1800.0,
    *,
    memory: str = "4G",
    start: Callable[..., subprocess.Popen[bytes]] = subprocess.Popen,
    qemu: str = "qemu-system-x86_64",
) -> int:
    """Runs the bash script ``job`` on the oracle's kernel, printing what it prints; returns its exit status.

    ``start`` starts ``qemu``, as Popen would: a software machine's ``popen`` puts it there.

    The job sees this machine's files read-only, a fresh /tmp, and ``out`` as the writable /tmp/out. 125: the VM ended
    without telling a status (the console's last lines are printed).
    """
    kernel = kernel_tree.image()
    kernel_tree.require(FOR_VM)
    for name in ("status", "stdout", "stderr"):
        (out / name).unlink(missing_ok=True)
    environment = {"PATH": os.environ["PATH"], "HOME": "/tmp", "TMPDIR": "/tmp", "PYTHONDONTWRITEBYTECODE": "1"}
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in environment.items())
    (out / "job").write_text(f"{exports}cd {shlex.quote(str(ROOT))}\n{job}\n")
    (out / "keep").write_text("".join(f"{path}\n" for path in hidden([ROOT, Path(sys.prefix), Path(sys.base_prefix)])))
    command = [
        qemu,
        *extra,
        *shlex.split(os.environ.get("QEMU_EXTRA", "")),
        "-accel",
        "tcg",
        "-cpu",
        "max",
        "-m",
        memory,
        "-smp",
        "2",
        "-display",
        "none",
        "-no-reboot",
        "-serial",
        f"file:{out / 'console'}",
        "-kernel",
        str(kernel),
        "-initrd",
        str(initrd()),
        "-append",
        "quiet console=ttyS0 panic=-1",
        "-virtfs",
        "local,path=/,mount_tag=root,security_model=none,readonly=on,multidevs=remap",
        "-virtfs",
        f"local,path={out},mount_tag=out,security_model=none",
    ]
    running = start(command, stdin=subprocess.DEVNULL)
    deadline = time.monotonic() + timeout
    shown = {"stdout": 0, "stderr": 0}
    try:
        while running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
            show_new(out, shown)
    finally:
        if running.poll() is None:
            running.kill()
        running.wait()
    show_new(out, shown)
    return verdict(out)


def hidden(paths: Sequence[Path]) -> list[Path]:
    """Those of ``paths`` that a fresh /tmp would cover."""
    return [path for path in dict.fromkeys(paths) if path.is_relative_to("/tmp")]


def show_new(out: Path, shown: dict[str, int]) -> None:
    """Copies what the job printed since the last time to our own stdout and stderr."""
    for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
        path = out / name
        if path.exists() and path.stat().st_size > shown[name]:
            with path.open("rb") as file:
                file.seek(shown[name])
                fresh = file.read()
            shown[name] += len(fresh)
            stream.write(fresh.decode(errors="replace"))
            stream.flush()


def verdict(out: Path) -> int:
    """The job's exit status; alarms of the kernel on its console go to stderr."""
    console = (out / "console").read_text(errors="replace") if (out / "console").exists() else ""
    for line in console.splitlines():
        if ALARMS.search(line):
            print(f"oracle: the kernel says: {line}", file=sys.stderr)
    status = (out / "status").read_text().strip() if (out / "status").exists() else ""
    if status:
        return int(status)
    last = "\n".join(console.splitlines()[-12:])
    print(f"oracle: the VM ended without an answer; its console ended with:\n{last}", file=sys.stderr)
    return 125


def test(checks: Sequence[str], out: Path) -> int:
    """The conformance checks on the real kernel; the transcripts it recorded replace the committed ones.

    Three boots, for no machine has an IOMMU and a device without one: test hardware, VFIO devices, such a device."""
    words = [sys.executable, "-m", "iommufd.testing.record", "--out", "/tmp/out/transcripts"]
    always = "root hugepages processes capabilities"
    status = 0
    for lacking, have, extra, job in (
        ("", always, "", ""),
        ("vtd", f"{always} vtd", VFIO, "tools/vm/bind-vfio > /dev/null\n"),
        ("noiommu", f"{always} noiommu", "-device edu", f"echo 1 > {UNSAFE}\ntools/vm/bind-vfio > /dev/null\n"),
    ):
        told = [*words, "--have", have, *(["--only-needing", lacking] if lacking else []), *checks]
        status = boot(job + shlex.join(told), out, shlex.split(extra)) or status
    recorded = sorted((out / "transcripts").glob("*.json"))
    TRANSCRIPTS.mkdir(parents=True, exist_ok=True)
    for path in recorded:
        shutil.copyfile(path, TRANSCRIPTS / path.name)
    print(f"oracle: {len(recorded)} transcripts recorded in {TRANSCRIPTS.relative_to(ROOT)}")
    return status if checks else client(out) or status


def client(out: Path) -> int:
    """The Python client's own tests, the pytest plugin and the examples, unchanged, on the real kernel: with test
    hardware and with a device behind an IOMMU that does DMA."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    words += ["-m", "oracle or iommufd", "tests/client", "tests/testing/test_plugin.py", "tests/test_examples.py"]
    # CI: hypothesis keeps no database, which it could not write there
    job = "tools/vm/bind-vfio > /dev/null\nCI=true " + shlex.join(words)
    return boot(job, out, shlex.split(VFIO))


def selftest(out: Path) -> int:
    """The kernel's own programs on the kernel itself: what passes there, and how long it takes."""
    programs = kernel_tree.selftests()
    lines = []
    for name, path in programs.items():
        shutil.copy(path, out / f"{name}.program")
        lines.append(f"TIMEFORMAT='{name}: %R s'; time /tmp/out/{name}.program > /tmp/out/{name}.tap 2>&1")
    status = boot("\n".join(lines), out)
    for name in programs:
        report = collect((out / f"{name}.tap").read_text(errors="replace").splitlines())
        print(f"{name}: {len(report.passed())} of {report.planned} pass")
        for case in report.cases.values():
            if case.verdict is not Verdict.PASS:
                print(f"  {case.verdict.value}  {case.name}")
    return status


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools.oracle", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="keep the shared folder here (default: a temporary one)")
    parser.add_argument("--vfio", action="store_true", help="give the VM an Intel IOMMU and three devices")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="build the kernel and the selftest programs")
    commands.add_parser("selftest", help="run the kernel's own selftest programs on it")
    commands.add_parser("run", help="run a shell command on it").add_argument("shell")
    commands.add_parser("client", help="run the Python client's tests and the examples on it")
    commands.add_parser("test", help="run the conformance checks, then the client, on it").add_argument(
        "check", nargs="*"
    )
    options = parser.parse_args(argv)
    extra = shlex.split(VFIO) if options.vfio else []
    with tempfile.TemporaryDirectory(prefix="iommufd-oracle-") as temporary:
        out = (options.out or Path(temporary)).resolve()
        out.mkdir(parents=True, exist_ok=True)
        try:
            if options.command == "build":
                print(kernel_tree.image(), *kernel_tree.selftests().values(), sep="\n")
                return 0
            if options.command == "selftest":
                return selftest(out)
            if options.command == "run":
                return boot(options.shell, out, extra)
            if options.command == "client":
                return client(out)
            return test(options.check, out)
        except kernel_tree.CannotBuild as failure:
            print(f"oracle: {failure}", file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main())
