"""IOMMU_TEST_CMD: one command with 23 ops, each with its own arm of the struct (kernel: iommufd_test), mock-device 1.

A table leads from the op to its handler; framing, the response and unknown ops are here.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from iommufd.engine.dispatch import Call, Handler, Respond
from iommufd.errors import KernelError
from iommufd.selftest import access_file, checks, dmabuf, nested, stdev, viommu
from iommufd.uapi import iommufd_test as t
from iommufd.uapi.commands import BY_NAME, Command

if TYPE_CHECKING:
    from iommufd.selftest.driver import MockDriver

TOP_NR = 0xA0

Op = Callable[[Call, Any], "int | None"]
"""``Any`` is the op's own arm of the struct: :data:`t.ARMS` pairs the two."""

_HANDLER_RESPONDS = frozenset({t.IOMMU_TEST_OP_ACCESS_PAGES})


class TestCommand:
    """The command of a machine whose mock IOMMU is ``driver``'s."""

    __slots__ = ("_driver", "_ops")
    __test__ = False  # not a test of ours

    def __init__(self, driver: MockDriver) -> None:
        self._driver = driver
        self._ops: dict[int, Op] = {
            t.IOMMU_TEST_OP_ADD_RESERVED: checks.add_reserved,
            t.IOMMU_TEST_OP_MOCK_DOMAIN: self._mock_domain,
            t.IOMMU_TEST_OP_MD_CHECK_MAP: checks.md_check_map,
            t.IOMMU_TEST_OP_MD_CHECK_REFS: checks.md_check_refs,
            t.IOMMU_TEST_OP_CREATE_ACCESS: access_file.create_access,
            t.IOMMU_TEST_OP_DESTROY_ACCESS_PAGES: access_file.destroy_access_pages,
            t.IOMMU_TEST_OP_ACCESS_PAGES: access_file.access_pages,
            t.IOMMU_TEST_OP_ACCESS_RW: access_file.access_rw,
            t.IOMMU_TEST_OP_SET_TEMP_MEMORY_LIMIT: checks.set_temp_memory_limit,
            t.IOMMU_TEST_OP_MOCK_DOMAIN_REPLACE: stdev.mock_domain_replace,
            t.IOMMU_TEST_OP_ACCESS_REPLACE_IOAS: access_file.access_replace_ioas,
            t.IOMMU_TEST_OP_MOCK_DOMAIN_FLAGS: self._mock_domain,
            t.IOMMU_TEST_OP_DIRTY: checks.dirty,
            t.IOMMU_TEST_OP_MD_CHECK_IOTLB: nested.check_iotlb,
            t.IOMMU_TEST_OP_TRIGGER_IOPF: viommu.trigger_iopf,
            t.IOMMU_TEST_OP_DEV_CHECK_CACHE: viommu.check_cache,
            t.IOMMU_TEST_OP_TRIGGER_VEVENT: viommu.trigger_vevent,
            t.IOMMU_TEST_OP_PASID_ATTACH: stdev.pasid_attach,
            t.IOMMU_TEST_OP_PASID_REPLACE: stdev.pasid_replace,
            t.IOMMU_TEST_OP_PASID_DETACH: stdev.pasid_detach,
            t.IOMMU_TEST_OP_PASID_CHECK_HWPT: stdev.pasid_check_hwpt,
            t.IOMMU_TEST_OP_DMABUF_GET: dmabuf.dmabuf_get,
            t.IOMMU_TEST_OP_DMABUF_REVOKE: dmabuf.dmabuf_revoke,
        }

    def handle(self, call: Call) -> int | None:
        """Runs the op; those that respond copy the whole struct back (mock-device 1)."""
        cmd = call.cmd
        assert isinstance(cmd, t.iommu_test_cmd)
        op = cmd.op
        handler = self._ops.get(op)
        if handler is None or call.world.kernel < cmd.SINCE:
            raise KernelError(errno.EOPNOTSUPP, f"there is no test op {op}")
        result = handler(call, cmd)
        if op in t.RESPONDS and op not in _HANDLER_RESPONDS:
            call.respond()
        return result

    def _mock_domain(self, call: Call, cmd: t.test_mock_domain | t.test_mock_domain_flags) -> None:
        dev_flags = cmd.dev_flags if isinstance(cmd, t.test_mock_domain_flags) else 0
        cmd.out_stdev_id, cmd.out_hwpt_id, cmd.out_idev_id = stdev.mock_domain(call, self._driver, cmd.id, dev_flags)

    @property
    def rows(self) -> list[tuple[Command, Handler, Respond]]:
        """What the test build adds to the dispatch table."""
        return [(BY_NAME["IOMMU_TEST_CMD"], self.handle, Respond.HANDLER)]
