"""The committed lists of passing names: they grow, in the program's order, and never lose a name."""

from __future__ import annotations

from pathlib import Path

from tools import conformance, kernel_tree, oracle
from tools.selftest_report import names


def test_update_adds_and_keeps_the_programs_order(tmp_path: Path) -> None:
    path = tmp_path / "passing-iommufd.txt"
    order = ["f.a", "f.b", "f.c"]
    conformance.update(path, ["f.c"], order)
    conformance.update(path, ["f.a"], order)
    assert names(path.read_text()) == ["f.a", "f.c"]
    assert path.read_text().startswith("# ")


def test_update_never_removes_a_name(tmp_path: Path) -> None:
    path = tmp_path / "passing-iommufd.txt"
    path.write_text("# why\nf.old\n")
    conformance.update(path, ["f.a"], ["f.a"])
    assert path.read_text().splitlines() == ["# why", "f.a", "f.old"]


def test_the_committed_lists_name_no_case_twice() -> None:
    for program in kernel_tree.PROGRAMS:
        path = conformance.LISTS / f"passing-{program}.txt"
        if path.exists():
            listed = names(path.read_text())
            assert len(set(listed)) == len(listed)


def test_missing_options_of_a_kernel_configuration() -> None:
    wanted = "# why\nCONFIG_A=y\nCONFIG_B=y\nCONFIG_C=n\n"
    assert kernel_tree.missing_options(wanted, "CONFIG_A=y\n# CONFIG_B is not set\n") == ["CONFIG_B"]


def test_an_archive_has_aligned_members_and_ends() -> None:
    """cpio newc: header of 110 characters, name and content each padded to 4."""
    archive = b"".join(oracle.newc([("init", 0o100755, b"#!/bin/sh\n")]))
    assert archive[:6] == b"070701" and len(archive) % 4 == 0
    assert archive[110:115] == b"init\0" and archive[116:126] == b"#!/bin/sh\n"
    assert b"TRAILER!!!\0" in archive


def test_folders_a_fresh_tmp_would_cover() -> None:
    assert oracle.hidden([Path("/tmp/clone"), Path("/usr"), Path("/tmp/clone")]) == [Path("/tmp/clone")]
