"""A Linux source tree, and what is built from it: the kernel's selftest programs and a kernel for the oracle VM.

Invariants: nothing is built twice (every product lives in the user's cache and is reused while it is there); the
programs are compiled from the tree's sources as they are; nothing of the tree comes into this repository.

The tree is ``KERNEL_SRC`` where that is set, else Debian's package ``linux-source-7.3``, fetched with apt from newer
suites of the mirror this machine already uses. Products of a ``KERNEL_SRC`` are kept apart by a hash of the selftest
sources and headers, so an edited tree is built anew.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

VERSION = "7.3"
PROGRAMS = ("iommufd", "iommufd_fail_nth")
SUITES = ("trixie", "trixie-backports", "forky", "sid", "experimental")
HERE = Path(__file__).resolve().parent

# tool or file that must be there -> Debian package that brings it
FOR_PROGRAMS = {
    "gcc": "gcc",
    "make": "make",
    "rsync": "rsync",
    "/usr/include/sys/capability.h": "libcap-dev",
    "/usr/include/stdlib.h": "libc6-dev",
}
FOR_TREE = {"xz": "xz-utils", "tar": "tar", "dpkg": "dpkg"}
FOR_KERNEL = {
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "/usr/include/libelf.h": "libelf-dev",
    "/usr/include/openssl/ssl.h": "libssl-dev",
}


class CannotBuild(Exception):
    """One sentence for the user: what is missing and how to get it."""


def say(text: str) -> None:
    print(f"==> {text}", file=sys.stderr, flush=True)


def caches() -> list[Path]:
    """Where products are looked for; the first is where they are made."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [base / "iommufd", base / "iommufd-oracle"]


def cached(name: str) -> Path | None:
    """The product ``name`` of an earlier run, if any cache holds it."""
    return next((path for cache in caches() if (path := cache / name).exists()), None)


def run(command: Sequence[str | Path], log: Path | None = None, cwd: Path | None = None) -> None:
    """Runs ``command`` quietly; CannotBuild with the end of its output when it fails."""
    done = subprocess.run(
        command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if log is not None:
        log.write_bytes(done.stdout)
    if done.returncode:
        end = "\n".join(done.stdout.decode(errors="replace").splitlines()[-15:])
        raise CannotBuild(f"`{' '.join(map(str, command[:6]))} …` failed with exit code {done.returncode}:\n{end}")


def require(needs: dict[str, str]) -> None:
    """Installs (as root, with apt) the Debian packages behind what is missing, or says what to install."""
    missing = sorted(
        {
            package
            for need, package in needs.items()
            if not (Path(need).exists() if need.startswith("/") else shutil.which(need))
        }
    )
    if not missing:
        return
    if os.geteuid() or not shutil.which("apt-get"):
        raise CannotBuild(f"missing: {', '.join(missing)}. Install with: sudo apt-get install {' '.join(missing)}")
    say(f"apt-get install {' '.join(missing)}")
    os.environ.setdefault("DEBIAN_FRONTEND", "noninteractive")
    run(["apt-get", "update", "-qq"])
    run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing])


@dataclass(frozen=True)
class Tree:
    """A kernel source tree; ``suffix`` keeps the products of different trees apart."""

    path: Path
    suffix: str = ""


def tree() -> Tree:
    """``KERNEL_SRC``, or Debian's source package unpacked in the cache (fetched on first use)."""
    source = os.environ.get("KERNEL_SRC")
    if source:
        path = Path(source).expanduser().resolve()
        sources = path / "tools/testing/selftests/iommu"
        if not (sources / "iommufd.c").exists():
            raise CannotBuild(f"KERNEL_SRC={source} is not a Linux tree of 6.2 or later: it lacks {sources}/iommufd.c")
        return Tree(
            path,
            "-"
            + _fingerprint(
                [
                    *sources.glob("*.[ch]"),
                    path / "include/uapi/linux/iommufd.h",
                    path / "drivers/iommu/iommufd/iommufd_test.h",
                ]
            ),
        )
    name = f"linux-source-{VERSION}"
    return Tree(cached(name) or _fetch(name))


def _fingerprint(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def _mirrors() -> list[str]:
    """The Debian archives of this machine's apt configuration, in its order (security archives left out)."""
    files = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    texts = [path.read_text() for path in files if path.is_file()]
    found = re.findall(r"^\s*(?:URIs:|deb(?:\s+\[[^]]*\])?)\s+(\S+)", "\n".join(texts), re.MULTILINE)
    return [uri for uri in dict.fromkeys(found) if re.search(r"/debian/?$", uri)]


def _fetch(package: str) -> Path:
    mirrors = _mirrors()
    if not shutil.which("apt-get") or not mirrors:
        raise CannotBuild(f"no Debian mirror to fetch {package} from; set KERNEL_SRC=/path/to/linux (7.3)")
    require(FOR_TREE)
    cache = caches()[0]
    work = cache / "apt"
    for folder in ("lists/partial", "cache/archives/partial"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    signed = f"[signed-by={keyring}] " if Path(keyring).exists() else ""
    options = [
        "-oDir::Etc::sourcelist=" + str(work / "sources.list"),
        "-oDir::Etc::sourceparts=-",
        "-oDir::State::Lists=" + str(work / "lists"),
        "-oDir::Cache=" + str(work / "cache"),
    ]
    if os.geteuid() == 0:
        options.append("-oAPT::Sandbox::User=root")  # the cache of root is closed to _apt
    refused = []
    for suite in SUITES:  # one suite at a time: a mirror need not carry all of them
        say(f"looking for {package} in Debian {suite} at {mirrors[0]}")
        (work / "sources.list").write_text(f"deb {signed}{mirrors[0]} {suite} main\n")
        try:
            run(["apt-get", *options, "update", "-qq"])
            run(["apt-get", *options, "download", "-qq", package], cwd=work)
            break
        except CannotBuild as failure:
            refused.append(f"{suite}: {str(failure).splitlines()[-1]}")
    else:
        lines = "\n  ".join(refused)
        raise CannotBuild(f"no {package} at {mirrors[0]}; set KERNEL_SRC=/path/to/linux\n  {lines}")
    say(f"unpacking {package} (1.7 GB)")
    (deb,) = work.glob(f"{package}_*.deb")
    unpacked = work / "unpacked"
    run(["dpkg", "-x", deb, unpacked])
    fresh = cache / f"{package}.partial"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    run(["tar", "-xf", unpacked / f"usr/src/{package}.tar.xz", "-C", fresh, "--strip-components=1"])
    shutil.rmtree(unpacked)
    deb.unlink()
    return fresh.rename(cache / package)


def _headers(source: Tree) -> Path:
    """The exported uapi headers of the tree, as user space includes them."""
    inside = source.path / "usr/include"
    if (inside / "linux/iommufd.h").exists():
        return inside
    outside = caches()[0] / f"headers{source.suffix}"
    if not (outside / "usr/include/linux/iommufd.h").exists():
        say("exporting the kernel's headers")
        outside.mkdir(parents=True, exist_ok=True)
        try:
            run(["make", "-s", "-C", source.path, f"O={outside}", "headers"])
        except CannotBuild:  # a tree that was built in place refuses O=
            run(["make", "-s", "-C", source.path, "headers"])
            return inside
    return outside / "usr/include"


def selftests() -> dict[str, Path]:
    """The kernel's iommu selftest programs by name, statically linked: built on first use, then from the cache."""
    if not os.environ.get("KERNEL_SRC") and (folder := cached("selftests")):
        found = {name: folder / name for name in PROGRAMS if (folder / name).exists()}
        if len(found) == len(PROGRAMS):
            return found
    require(FOR_PROGRAMS)
    source = tree()
    target = caches()[0] / f"selftests{source.suffix}"
    target.mkdir(parents=True, exist_ok=True)
    programs = {name: target / name for name in PROGRAMS}
    if all(path.exists() for path in programs.values()):
        return programs
    own = source.path / "tools"
    include = ["-isystem", str(_headers(source)), f"-I{own}/testing/selftests", f"-I{own}/include"]
    for name, path in programs.items():
        say(f"compiling {name}.c")
        partial = path.with_suffix(".partial")
        run(
            ["gcc", "-O2", "-static", "-w", "-D_GNU_SOURCE=", *include, "-o", partial, f"{name}.c", "-lcap"],
            cwd=own / "testing/selftests/iommu",
        )
        partial.rename(path)
    return programs


def image() -> Path:
    """A bootable kernel with iommufd and its test support (x86-64): about ten minutes on two cores, once."""
    if not os.environ.get("KERNEL_SRC") and (done := cached("bzImage")):
        return done
    if os.uname().machine != "x86_64":
        raise CannotBuild(f"the oracle's kernel is built on x86_64 only, this is {os.uname().machine}")
    require(FOR_PROGRAMS | FOR_KERNEL)
    source = tree()
    target = caches()[0] / f"bzImage{source.suffix}"
    if target.exists():
        return target
    build = caches()[0] / f"kernel{source.suffix}"
    build.mkdir(parents=True, exist_ok=True)
    log = build / "build.log"
    make = ["make", "-s", "-C", str(source.path), f"O={build}"]
    if any((source.path / trace).exists() for trace in (".config", "include/config", "arch/x86/include/generated")):
        raise CannotBuild(f"{source.path} was built in place; run `make mrproper` in it, or give a clean KERNEL_SRC")
    say(f"building a kernel from {source.path} (about 10 minutes; log: {log})")
    run([*make, "tinyconfig"], log)
    fragment = HERE / "vm/kernel.config"
    merge = source.path / "scripts/kconfig/merge_config.sh"
    run([merge, "-m", "-O", build, build / ".config", fragment], log, cwd=build)
    run([*make, "olddefconfig"], log)
    lost = missing_options(fragment.read_text(), (build / ".config").read_text())
    for option in lost:
        say(f"note: this tree has no {option}")
    run([*make, f"-j{os.cpu_count() or 1}", "bzImage"], log)
    shutil.copyfile(build / "arch/x86/boot/bzImage", target)
    return target


def missing_options(wanted: str, got: str) -> list[str]:
    """The options a fragment switches on that the final configuration lacks."""
    have = set(got.splitlines())
    return [line.partition("=")[0] for line in wanted.splitlines() if line.endswith(("=y", "=m")) and line not in have]
