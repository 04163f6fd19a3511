"""What the conformance run believes of a selftest program's output."""

from __future__ import annotations

import resource

import pytest

from tools import conformance, hugepages
from tools.selftest_report import Report, Verdict, collect, compare, names

OUTPUT = """\
TAP version 13
1..4
# Starting 4 tests from 3 test cases.
#  RUN           iommufd.simple_close ...
#            OK  iommufd.simple_close
ok 1 iommufd.simple_close
#  RUN           iommufd_ioas.mock_domain.area ...
# iommufd.c:374:area:Expected 0 (0) == ioctl(self->fd, IOMMU_IOAS_MAP, &cmd) (-1)
# area: Test terminated by assertion
#          FAIL  iommufd_ioas.mock_domain.area
not ok 2 iommufd_ioas.mock_domain.area
#  RUN           iommufd_viommu.no_viommu.hw_queue ...
#      SKIP      Skipping test for variant no_viommu
#            OK  iommufd_viommu.no_viommu.hw_queue
ok 3 iommufd_viommu.no_viommu.hw_queue # SKIP Skipping test for variant no_viommu
#  RUN           iommufd_ioas.mock_domain.copy_sweep ...
#            OK  iommufd_ioas.mock_domain.copy_sweep
ok 4 iommufd_ioas.mock_domain.copy_sweep
# FAILED: 3 / 4 tests passed.
# Totals: pass:2 fail:1 xfail:0 xpass:0 skip:1 error:0
"""


@pytest.fixture
def report() -> Report:
    return collect(OUTPUT.splitlines(keepends=True))


def test_every_case_is_read_once_and_in_order(report: Report) -> None:
    assert report.planned == 4 and report.complete
    assert list(report.cases) == [
        "iommufd.simple_close",
        "iommufd_ioas.mock_domain.area",
        "iommufd_viommu.no_viommu.hw_queue",
        "iommufd_ioas.mock_domain.copy_sweep",
    ]


def test_a_skip_is_not_a_pass(report: Report) -> None:
    assert report.cases["iommufd_viommu.no_viommu.hw_queue"].verdict is Verdict.SKIP
    assert report.passed() == ["iommufd.simple_close", "iommufd_ioas.mock_domain.copy_sweep"]


def test_a_failing_case_keeps_the_programs_own_words(report: Report) -> None:
    lines = report.cases["iommufd_ioas.mock_domain.area"].lines
    assert lines == ["iommufd.c:374:area:Expected 0 (0) == ioctl(self->fd, IOMMU_IOAS_MAP, &cmd) (-1)"]
    assert report.cases["iommufd.simple_close"].lines == []


def test_a_program_that_dies_is_not_complete() -> None:
    assert not collect(OUTPUT.splitlines()[:8]).complete
    assert not collect([]).complete


def test_a_listed_name_that_does_not_pass_is_lost(report: Report) -> None:
    missed = ["iommufd_ioas.mock_domain.area", "iommufd.gone", "iommufd_viommu.no_viommu.hw_queue"]
    result = compare(report, ["iommufd.simple_close", *missed])
    assert result.lost == missed
    assert result.gained == ["iommufd_ioas.mock_domain.copy_sweep"]


def test_an_excused_case_is_neither_lost_nor_a_pass(report: Report) -> None:
    result = compare(report, ["iommufd_ioas.mock_domain.area"], excused=["iommufd_ioas.mock_domain.area"])
    assert (result.lost, result.excused) == ([], ["iommufd_ioas.mock_domain.area"])


def test_an_excused_case_that_passes_is_an_ordinary_pass(report: Report) -> None:
    result = compare(report, ["iommufd.simple_close"], excused=["iommufd.simple_close"])
    assert (result.lost, result.excused) == ([], [])


def test_lists_have_comments() -> None:
    assert names("# head\na.b\n\nc.d.e  # why\n") == ["a.b", "c.d.e"]


TABLE = """\
# FIXTURE            VARIANT                   TEST
global
--------------------------------------------------------------------------------
iommufd                                        simple_close
                                               cmd_fail
--------------------------------------------------------------------------------
change_process       account_none              basic
                     account_user
--------------------------------------------------------------------------------
iommufd_dirty_tracking domain_dirty8k            enforce_dirty
                     domain_dirty16k           set_dirty_tracking
                                               get_dirty_bitmap
"""


def test_the_table_of_cases_is_variants_times_tests() -> None:
    assert conformance.listed(TABLE) == [
        "iommufd.simple_close",
        "iommufd.cmd_fail",
        "change_process.account_none.basic",
        "change_process.account_user.basic",
        *(
            f"iommufd_dirty_tracking.{variant}.{test}"
            for variant in ("domain_dirty8k", "domain_dirty16k")
            for test in ("enforce_dirty", "set_dirty_tracking", "get_dirty_bitmap")
        ),
    ]


def test_one_fixture_of_the_table() -> None:
    assert conformance.listed(TABLE, ["iommufd"]) == ["iommufd.simple_close", "iommufd.cmd_fail"]


@pytest.mark.parametrize(
    ("case", "mebibytes"),
    [
        ("iommufd_ioas.two_mock_domain.access_domain_destory", 4),
        ("iommufd_ioas.two_mock_domain.access_pin", 0),
        ("iommufd_mock_domain.one_domain.basic", 0),
        ("iommufd_mock_domain.one_domain_file_hugepage.basic", 4),
        ("iommufd_dirty_tracking.domain_dirty128M.get_dirty_bitmap", 0),
        ("iommufd_dirty_tracking.domain_dirty128M_huge.get_dirty_bitmap", 128),
        ("vfio_compat_mock_domain.Ver1v0.huge_map", 4),
    ],
)
def test_which_cases_need_huge_pages(case: str, mebibytes: int) -> None:
    assert hugepages.need(case) == mebibytes << 20


def test_cases_out_of_reach_are_named() -> None:
    cases = ["a.b", "vfio_compat_mock_domain.Ver1v0.huge_map", "iommufd_dirty_tracking.domain_dirty128M_huge.x"]
    assert hugepages.out_of_reach(cases, 0) == cases[1:]
    assert hugepages.out_of_reach(cases, 4 << 20) == cases[2:]
    assert hugepages.out_of_reach(cases, 128 << 20) == []


def test_what_an_ordinary_user_cannot_have_is_said_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (8 << 20, 8 << 20))
    bitmap = "iommufd_dirty_tracking.domain_dirty64M_huge.get_dirty_bitmap_no_clear"
    other = "iommufd_dirty_tracking.domain_dirty64M.enforce_dirty"
    cases = ["iommufd.global_options", "iommufd.simple_close", bitmap, other]
    why = conformance.not_to_be_had(cases, ordinary=True)
    assert list(why) == [bitmap], "what asks for CAP_SYS_RESOURCE is granted it by the machine"
    assert why[bitmap] == "pins 64 MiB, RLIMIT_MEMLOCK is 8 MiB (ulimit -l)"


def test_root_with_every_capability_can_have_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conformance, "capable", lambda capability: True)
    assert conformance.not_to_be_had(["iommufd.global_options"], ordinary=False) == {}
