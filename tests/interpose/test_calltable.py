"""The filter and the call table are two halves of one statement: what is trapped is answered, and nothing else is."""

from __future__ import annotations

from unittest.mock import Mock

from iommufd.interpose.calltable import handlers
from iommufd.interpose.credentials import Credentials
from iommufd.interpose.filecalls import FileCalls
from iommufd.interpose.filter import rules
from iommufd.interpose.pathcalls import PathCalls
from iommufd.interpose.syscalls import HOST, name_of
from iommufd.interpose.unmaps import Unmaps


def test_every_trapped_call_has_a_row_and_every_row_is_trapped() -> None:
    table = handlers(Mock(spec=FileCalls), Mock(spec=PathCalls), Mock(spec=Credentials), Mock(spec=Unmaps))
    trapped = {name for name in rules() if name in HOST.numbers}
    assert {name_of(number) for number in table} == trapped
