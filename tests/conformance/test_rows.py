"""docs/conformance.md says for every row of the specification what holds it, and is up to date."""

from __future__ import annotations

import pytest

from tools import rows


def test_no_row_is_open_and_the_page_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert rows.main(["--check"]) == 0, f"{capsys.readouterr().out}(make docs/conformance.md: python -m tools.rows)"


def test_reasons_are_for_listed_rows_that_nothing_reaches() -> None:
    listed = set(rows.listed())
    reached = set(rows.checks_by_row()) | set(rows.tests_by_row())
    for row in rows.reasons():
        section, star = row.removesuffix("*"), row.endswith("*")
        assert (star and any(other.startswith(section) for other in listed)) or row in listed, f"no such row: {row}"
        assert row not in reached, f"{row} is held by a test after all"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('("core-4.15-4 core-3-huge-5", 1)', {"core 4.15 row 4", "core 3 huge row 5"}),
        ("# devices 3.6 steps 4, 10", {"devices 3.6 row 4", "devices 3.6 row 10"}),
        ("# devices 3.2 step 3, 3.1 state table", {"devices 3.2 row 3"}),
        ("# mock-device 2.3 row 2, 2.4 row 1", {"mock 2.3 row 2", "mock 2.4 row 1"}),
        ("# devices 4.3 steps 3-5, 8b", {f"devices 4.3 row {n}" for n in ("3", "4", "5", "8b")}),
        ("# devices 3.8 region step 5", {"devices 3.8 region row 5"}),
        ("def test_devices_11_2_rows_1_to_3_and_5(p: P) -> None:", {f"devices 11.2 row {n}" for n in (1, 2, 3, 5)}),
        ("def test_vfio_9_1_rows_1_11(p: P) -> None:", {"vfio 9.1 row 1", "vfio 9.1 row 11"}),
        ("# devices 3.10", set()),
    ],
)
def test_how_tests_name_rows(text: str, named: set[str]) -> None:
    assert rows.rows_named(text) == named
