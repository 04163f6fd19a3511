"""docs/support.md: written from the tables, up to date, and without a blank."""

from __future__ import annotations

import re

import pytest

from iommufd.uapi.commands import COMMANDS
from iommufd.uapi.iommufd_test import iommu_test_op
from iommufd.uapi.vfio import VFIO_GROUP_GET_STATUS
from iommufd.uapi.vfio.commands import CONTAINER, DEVICE, GROUP
from iommufd.vfio import group
from tools import support


@pytest.fixture(scope="module")
def page() -> tuple[str, list[str]]:
    return support.page()


def test_the_page_is_up_to_date_and_has_no_empty_cell(page: tuple[str, list[str]]) -> None:
    text, wrong = page
    assert wrong == []
    assert support.PAGE.read_text() == text, "python -m tools.support"


def test_every_command_and_op_has_a_row(page: tuple[str, list[str]]) -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", page[0], re.MULTILINE)
    commands = [(command.name, command.number) for command in COMMANDS]
    for name, number in commands + [(command.name, command.number) for command in (*CONTAINER, *GROUP, *DEVICE)]:
        assert (name, f"{number:#x}") in rows
    for op in iommu_test_op:
        assert (f"IOMMU_TEST_OP_{op.name}", str(int(op))) in rows


def test_a_command_without_a_handler_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(group._TABLE, VFIO_GROUP_GET_STATUS)
    monkeypatch.delitem(support.REASONS, "VFIO_DEVICE_IOEVENTFD")
    monkeypatch.setitem(support.REASONS, "IOMMU_NEVER_*", "there is no such thing")
    wrong = support.page()[1]
    assert len(wrong) == 3
    assert "VFIO_GROUP_GET_STATUS" in wrong[0]
    assert "VFIO_DEVICE_IOEVENTFD" in wrong[1]
    assert wrong[2] == "the reason of IOMMU_NEVER_* is not needed"
