"""Which errno each command must have given: the quick matrix of the specification (core 11) as data.

Invariants: a row lists every errno its line of core 11 names ("pin/charge" is EFAULT and ENOMEM); each of them either
can be reached by a program, and then a long run must reach it, or :data:`ELSEWHERE` says why none can and which test
brings it about. Calls whose ``size`` is wrong are not counted: their EINVAL, E2BIG and EFAULT are the dispatcher's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from iommufd.uapi import iommufd as u
from iommufd.uapi.declare import Struct

ENOUGH = 2000  # programs after which nothing that can be reached may be missing

MATRIX: dict[str, tuple[str, ...]] = {
    "DESTROY": ("ENOENT", "EBUSY"),
    "IOAS_ALLOC": ("EOPNOTSUPP", "ENOMEM", "EBUSY", "EFAULT"),
    "IOVA_RANGES": ("EOPNOTSUPP", "ENOENT", "EFAULT", "EMSGSIZE"),
    "ALLOW_IOVAS": ("EOPNOTSUPP", "ENOENT", "EFAULT", "EINVAL", "EADDRINUSE"),
    "MAP": ("EOPNOTSUPP", "EOVERFLOW", "EINVAL", "ENOENT", "EEXIST", "EFAULT", "ENOMEM"),
    "MAP auto": ("EOPNOTSUPP", "EOVERFLOW", "EINVAL", "ENOENT", "ENOSPC", "EFAULT", "ENOMEM"),
    "MAP_FILE": (
        "EOPNOTSUPP",
        "EOVERFLOW",
        "EINVAL",
        "ENOENT",
        "ENODEV",
        "EBADF",
        "EEXIST",
        "ENOSPC",
        "EFAULT",
        "ENOMEM",
    ),
    "COPY": ("EOPNOTSUPP", "EOVERFLOW", "EINVAL", "ENOENT", "EEXIST", "ENOSPC", "EPERM", "EFAULT", "ENOMEM"),
    "UNMAP": ("ENOENT", "EOVERFLOW", "EINVAL", "EBUSY", "EDEADLK"),
    "CHANGE_PROCESS": ("EOPNOTSUPP", "EBUSY", "EINVAL", "ENOMEM"),
    "GET_PA": ("EPERM", "EOPNOTSUPP", "EINVAL", "EOVERFLOW", "ENOENT"),
    "GET_PA revoked": ("EINVAL",),
    "OPTION rlimit": ("EOPNOTSUPP", "EPERM", "EBUSY", "EINVAL"),
    "OPTION huge": ("EOPNOTSUPP", "ENOENT", "EINVAL", "EADDRINUSE"),
    "SET_DIRTY": ("EOPNOTSUPP", "ENOENT"),
    "GET_DIRTY": ("EOPNOTSUPP", "ENOENT", "EINVAL", "EOVERFLOW", "ENOMEM"),
}

ELSEWHERE: dict[tuple[str, str], tuple[str, str]] = {
    ("IOAS_ALLOC", "ENOMEM"): (
        "an allocation of the kernel's own must fail",
        "tests/engine/test_ioas.py::TestAlloc::test_core_4_4_2_no_memory",
    ),
    ("IOAS_ALLOC", "EBUSY"): (
        "needs 2^31 objects in one table",
        "tests/engine/test_ioas.py::TestAlloc::test_core_4_4_2",
    ),
    ("CHANGE_PROCESS", "EBUSY"): (
        "needs a race: a map of another thread that is still pinning",
        "tests/engine/test_concurrency.py::TestInProgress::test_change_process",
    ),
    ("GET_DIRTY", "ENOMEM"): (
        "an allocation of the kernel's own must fail",
        "tests/engine/test_dirty.py::test_no_memory_leaves_dirty_what_was",
    ),
}
"""(row, errno) -> why no program can reach it, and the test that does."""

_ROWS: dict[type[Struct], str] = {
    u.iommu_destroy: "DESTROY",
    u.iommu_ioas_alloc: "IOAS_ALLOC",
    u.iommu_ioas_iova_ranges: "IOVA_RANGES",
    u.iommu_ioas_allow_iovas: "ALLOW_IOVAS",
    u.iommu_ioas_map_file: "MAP_FILE",
    u.iommu_ioas_copy: "COPY",
    u.iommu_ioas_unmap: "UNMAP",
    u.iommu_ioas_change_process: "CHANGE_PROCESS",
    u.iommu_ioas_noiommu_get_pa: "GET_PA",
    u.iommu_hwpt_set_dirty_tracking: "SET_DIRTY",
    u.iommu_hwpt_get_dirty_bitmap: "GET_DIRTY",
}


def row_of(value: Struct, word: str) -> str | None:
    """The row of core 11 that a call belongs to; None when it has none, or the dispatcher refuses its size."""
    if getattr(value, "size", 0) != value.SIZE:
        return None
    if isinstance(value, u.iommu_ioas_map):
        return "MAP" if value.flags & u.IOMMU_IOAS_MAP_FIXED_IOVA else "MAP auto"
    if isinstance(value, u.iommu_option):
        return "OPTION huge" if value.option_id == u.IOMMU_OPTION_HUGE_PAGES else "OPTION rlimit"
    if isinstance(value, u.iommu_ioas_noiommu_get_pa) and value.length and word == "EINVAL":
        return "GET_PA revoked"
    return _ROWS.get(type(value))


class Tally:
    """How often each row gave each errno."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {row: Counter() for row in MATRIX}

    def add(self, value: Struct, word: str) -> None:
        """One answer: an errno's name, or "ok"."""
        row = row_of(value, word)
        if row is not None:
            self.counts[row][word] += 1

    def missing(self) -> list[tuple[str, str]]:
        """What a program could have reached and none did."""
        return [
            (row, word)
            for row, words in MATRIX.items()
            for word in words
            if not self.counts[row][word] and (row, word) not in ELSEWHERE
        ]

    def unlisted(self) -> list[tuple[str, str, int]]:
        """What was given although core 11 does not name it: a rule stated elsewhere in the specification."""
        return [
            (row, word, count)
            for row, counter in self.counts.items()
            for word, count in sorted(counter.items())
            if word != "ok" and word not in MATRIX[row]
        ]

    def lines(self) -> Iterator[str]:
        """The table: commands by errnos; a count, MISSING, or the letter of a note."""
        columns = list(dict.fromkeys(word for words in MATRIX.values() for word in words))
        notes = {key: f"({letter})" for letter, key in zip("abcdefghij", ELSEWHERE, strict=False)}
        yield "  ".join(["core 11       ", *(f"{word:>10}" for word in ["ok", *columns])])
        for row, words in MATRIX.items():
            cells = [str(self.counts[row]["ok"])]
            for word in columns:
                count = self.counts[row][word]
                cells.append(str(count) if count else notes.get((row, word), "MISSING") if word in words else ".")
            yield "  ".join([f"{row:14}", *(f"{cell:>10}" for cell in cells)])
        for (row, word), (why, test) in ELSEWHERE.items():
            yield f"{notes[row, word]} {row} {word}: {why}; {test}"
        for row, word, count in self.unlisted():
            yield f"also given: {row} {word} {count}"
        missing = self.missing()
        yield f"MISSING: {', '.join(f'{row} {word}' for row, word in missing)}" if missing else "nothing is missing"
