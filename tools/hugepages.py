"""Huge pages of this host: which selftest cases need how much, and lending the host what is missing for one run.

Some cases populate hugetlb memory; without it they fail on every kernel. The sysctl belongs to the host's owner, so it
is touched only when asked, and put back afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

SYSCTL = Path("/proc/sys/vm/nr_hugepages")
MIB = 1 << 20

# pattern of case names -> bytes of hugetlb memory the case populates, for the usual page of 2 MiB
NEEDS = {
    "iommufd_ioas.*.access_domain_destory": 4 * MIB,
    "iommufd_mock_domain.*hugepage.*": 4 * MIB,
    "iommufd_dirty_tracking.domain_dirty64M_huge.*": 64 * MIB,
    "iommufd_dirty_tracking.domain_dirty128M_huge.*": 128 * MIB,
    "vfio_compat_mock_domain.*.huge_map": 4 * MIB,
}


def _meminfo() -> dict[str, int]:
    pairs = (line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return {name: int(value.split()[0]) for name, value in pairs}


def page_size() -> int:
    """Bytes of the default huge page."""
    return _meminfo().get("Hugepagesize", 2048) * 1024


def available() -> int:
    """Bytes of huge pages a program could populate now."""
    info = _meminfo()
    overcommit = int((SYSCTL.parent / "nr_overcommit_hugepages").read_text()) if SYSCTL.exists() else 0
    pages = info.get("HugePages_Free", 0) - info.get("HugePages_Rsvd", 0) + overcommit - info.get("HugePages_Surp", 0)
    return pages * page_size()


def need(case: str) -> int:
    """Bytes of huge pages ``case`` populates."""
    return max((size for pattern, size in NEEDS.items() if fnmatchcase(case, pattern)), default=0)


def out_of_reach(cases: Iterable[str], have: int) -> list[str]:
    """The cases that need more than ``have`` bytes of huge pages."""
    return [case for case in cases if need(case) > have]


def wanted_sysctl(cases: Iterable[str], have: int) -> int:
    """The value of vm.nr_hugepages that would allow all ``cases`` when ``have`` bytes are available now."""
    missing = max((need(case) for case in cases), default=0) - have
    return int(SYSCTL.read_text()) + max(0, -(-missing // page_size())) if SYSCTL.exists() else 0


@contextmanager
def lent(cases: Iterable[str], allowed: bool) -> Iterator[bool]:
    """Raises vm.nr_hugepages for the time of the block where ``allowed`` and needed; tells whether it did."""
    cases = list(cases)
    have = available()
    if not allowed or not out_of_reach(cases, have) or not os.access(SYSCTL, os.W_OK):
        yield False
        return
    before = SYSCTL.read_text()
    try:
        SYSCTL.write_text(f"{wanted_sysctl(cases, have)}\n")
        yield True
    except PermissionError:  # a container may show the file as writable and still refuse
        yield False
    finally:
        if SYSCTL.read_text() != before:
            SYSCTL.write_text(before)
