"""``--kernel``: commands, struct tails, flags and test ops that came later are unknown to the machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from errno import EOPNOTSUPP

import pytest

from iommufd.client.backends.software import SoftwareBackend
from iommufd.machine.presets import preset
from iommufd.testing.subject import Subject
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t
from iommufd.uapi.declare import release


@contextmanager
def attached(kernel: str) -> Iterator[tuple[Subject, int, int, int]]:
    """A mock machine of that release with a device: subject, descriptor, IOAS, device."""
    s = Subject(SoftwareBackend(preset("mock", kernel)))
    fd = s.open()
    ioas = s.do(fd, u.iommu_ioas_alloc()).out_ioas_id
    yield s, fd, ioas, s.do(fd, t.test_mock_domain(id=ioas)).out_idev_id
    s.finish()


RELEASES = ("6.2", "6.5", "6.6", "6.7", "6.8", "6.10", "6.11", "6.12", "6.13", "6.14", "6.15", "6.18", "6.19")
FLAGS = [
    ("IOMMU_HWPT_ALLOC_NEST_PARENT", "6.6", "6.7"),
    ("IOMMU_HWPT_ALLOC_DIRTY_TRACKING", "6.6", "6.7"),
    ("IOMMU_HWPT_FAULT_ID_VALID", "6.8", "6.11"),
    ("IOMMU_HWPT_ALLOC_PASID", "6.13", "6.15"),
]


@pytest.mark.parametrize(("name", "before", "since"), FLAGS)
def test_a_flag_is_unknown_before_its_release(name: str, before: str, since: str) -> None:
    for kernel in (before, since):
        with attached(kernel) as (s, fd, ioas, device):
            fault = 0
            if kernel == since == "6.11":
                fault = s.do(fd, u.iommu_fault_alloc()).out_fault_id
            make = u.iommu_hwpt_alloc(dev_id=device, pt_id=ioas, flags=getattr(u, name), fault_id=fault)
            make.size = 40 if kernel == "6.7" else 24 if kernel == "6.6" else 0
            if kernel == before:
                s.refuses(EOPNOTSUPP, fd, make)
            else:
                s.do(fd, make)


def test_the_input_type_of_hw_info() -> None:
    for kernel, known in (("6.15", False), ("6.17", True)):
        with attached(kernel) as (s, fd, _, device):
            ask = u.iommu_hw_info(dev_id=device, flags=u.IOMMU_HW_INFO_FLAG_INPUT_TYPE)
            ask.in_data_type = t.IOMMU_HW_INFO_TYPE_SELFTEST
            s.expect((s.ask(fd, ask).errno != EOPNOTSUPP) is known, kernel)


@pytest.mark.parametrize("op", list(t.ARMS))
def test_an_op_of_the_test_command_is_unknown_before_its_release(op: int) -> None:
    arm = t.ARMS[op]
    since = next(at for at in RELEASES if release(at) == arm.SINCE)
    before = RELEASES[RELEASES.index(since) - 1] if since != "6.2" else None
    for kernel, known in ((before, False), (since, True)):
        if kernel is None:
            continue
        s = Subject(SoftwareBackend(preset("mock", kernel)))
        answer = s.ioctl(s.open(), t.IOMMU_TEST_CMD, arm(size=72, op=op, id=99).pack())
        assert (answer.errno != EOPNOTSUPP) is known
        s.finish()
