"""Core groups (devices.md 1.3, 3.3, 3.4, 3.4b): ownership, and moving all members or none."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from iommufd.iommu.domain import BaseDomain, Kind
from iommufd.iommu.driver import Iommu, RegionType, ReservedRegion
from iommufd.iommu.faults import AttachHandle
from iommufd.iommu.group import Group
from tests.engine.flat_task import expect
from tests.engine.hardware import Bench, Blocked, Driver, Log, PagingDomain, PlainDriver


class Rig:
    """A group of three devices whose default domain is not the blocking one."""

    def __init__(self, driver: Any = None, pasids: int = 1 << 20) -> None:
        bench = Bench()
        self.log = bench.log
        self.driver: Any = driver(self.log) if driver is not None else bench.driver
        self.default = Blocked(self.log, "default")
        self.group = Group("g", self.default)
        from iommufd.iommu.device import Device

        iommu = Iommu("i", max_pasids=1 << 20)
        self.devices = [Device(n, driver=self.driver, iommu=iommu, pasid_limit=pasids) for n in "abc"]
        for device in self.devices:
            self.group.add(device)

    def domain(self, label: str = "pt") -> PagingDomain:
        domain = PagingDomain(self.log, label, dirty=False)
        domain.owner = self.driver
        return domain

    def handle(self, domain: Any) -> AttachHandle:
        return AttachHandle(domain, "idev")


@pytest.fixture
def rig() -> Rig:
    return Rig()


# ----------------------------------------------------------------------------------------------------------- ownership


def test_a_claim_blocks_all_members(rig: Rig) -> None:  # devices 1.3 steps 5-7
    rig.group.claim("ctx")
    assert rig.log.take() == [f"attach {n} default->blocked" for n in "abc"]
    rig.group.claim("ctx")  # step 3
    assert (rig.group.owner_cnt, rig.log.take()) == (2, [])
    rig.group.release()
    assert rig.log.take() == []
    rig.group.release()
    assert rig.log.take() == [f"attach {n} blocked->default" for n in "abc"]
    assert (rig.group.owner, rig.group.owner_cnt) == (None, 0)


def test_a_group_has_one_owner(rig: Rig) -> None:  # devices 1.3 step 2
    rig.group.claim("ctx")
    with expect(errno.EPERM):
        rig.group.claim("other")


def test_a_kernel_driver_is_an_owner_nobody_can_be(rig: Rig) -> None:  # devices 1.3 step 2, 1.4
    rig.group.use_dma_api()
    with expect(errno.EPERM):
        rig.group.claim("ctx")
    rig.group.unuse_dma_api()
    rig.group.claim("ctx")
    with expect(errno.EBUSY):
        rig.group.use_dma_api()


def test_a_group_that_is_not_in_its_default_domain(rig: Rig) -> None:  # devices 1.3 step 4
    rig.group.domain = rig.domain()
    with expect(errno.EBUSY):
        rig.group.claim("ctx")


def test_without_a_blocked_domain_an_empty_page_table_blocks() -> None:  # devices 1.3 step 5
    rig = Rig(PlainDriver)
    rig.group.claim("ctx")
    assert rig.log.take() == [f"attach {n} default->plain" for n in "abc"]
    rig.group.release()
    rig.log.take()
    rig.group.claim("ctx")  # chosen once, then kept
    assert rig.log.take() == [f"attach {n} default->plain" for n in "abc"]


def test_a_driver_that_cannot_block(rig: Rig) -> None:  # devices 1.3 step 5
    class Poor:
        name = "poor"
        blocked_domain = identity_domain = None
        user_pasid_table = False

        def __init__(self, log: Log) -> None: ...

        def capable(self, device: object, capability: object) -> bool:
            return True

    with expect(errno.EOPNOTSUPP):
        Rig(Poor).group.claim("ctx")


def test_a_device_with_mandatory_regions_cannot_be_blocked(rig: Rig) -> None:  # devices 1.3 step 6, 3.4 step 3
    rig.devices[1].require_direct = True
    with expect(errno.EINVAL):
        rig.group.claim("ctx")
    assert rig.log.take() == []


def test_regions_of_the_driver_tell_whether_they_are_mandatory() -> None:
    from iommufd.iommu.device import Device

    driver = Driver(Log())
    driver.regions = {"a": [ReservedRegion(0, 4096, RegionType.DIRECT)], "b": [ReservedRegion(0, 4096, RegionType.MSI)]}
    assert Device("a", driver=driver).require_direct
    assert not Device("b", driver=driver).require_direct


# ------------------------------------------------------------------------------------------------------------- the RID


def test_attach_and_detach_move_every_member(rig: Rig) -> None:  # devices 3.3, 3.4
    rig.group.claim("ctx")
    rig.log.take()
    domain = rig.domain()
    handle = rig.handle(domain)
    rig.group.attach(domain, handle)
    assert rig.log.take() == [f"attach {n} blocked->pt" for n in "abc"]
    assert rig.group.handle(0) is handle
    with expect(errno.EBUSY):  # 3.3 step 1
        rig.group.attach(rig.domain(), handle)
    rig.group.detach()
    assert rig.log.take() == [f"attach {n} pt->blocked" for n in "abc"]
    assert rig.group.handle(0) is None


def test_a_failing_member_puts_the_others_back(rig: Rig) -> None:  # devices 3.4 step 5
    rig.group.claim("ctx")
    rig.log.take()
    rig.log.failures["attach c"] = errno.ENOSPC
    domain = rig.domain()
    with expect(errno.ENOSPC):
        rig.group.attach(domain, rig.handle(domain))
    back = [f"attach {n} pt->blocked" for n in "ab"]
    assert rig.log.take() == [*(f"attach {n} blocked->pt" for n in "abc"), *back]
    assert rig.group.domain is rig.driver.blocked_domain
    assert rig.group.handle(0) is None


def test_another_drivers_domain_cannot_be_attached(rig: Rig) -> None:  # devices 3.3 step 3
    rig.group.claim("ctx")
    domain = rig.domain()
    domain.owner = Driver(rig.log)
    with expect(errno.EINVAL):
        rig.group.attach(domain, rig.handle(domain))
    domain.owner = rig.driver
    rig.group.attach(domain, rig.handle(domain))
    foreign = rig.domain("foreign")
    foreign.owner = Driver(rig.log)
    rig.group.replace(foreign, rig.handle(foreign))  # but it can replace (quirk)
    assert rig.group.domain is foreign


def test_a_domain_without_attach_op(rig: Rig) -> None:  # devices 3.4 step 4
    rig.group.claim("ctx")
    domain = BaseDomain(Kind.PAGING, rig.driver)
    with expect(errno.ENODEV):
        rig.group.attach(domain, rig.handle(domain))


def test_the_same_domain_needs_no_driver(rig: Rig) -> None:  # devices 3.4 step 1
    rig.group.claim("ctx")
    domain = rig.domain()
    rig.group.attach(domain, rig.handle(domain))
    rig.log.take()
    rig.group.recovery_cnt = 1
    rig.group.replace(domain, rig.handle(domain))
    assert rig.log.take() == []


def test_a_reset_keeps_changes_out_but_not_detach(rig: Rig) -> None:  # devices 3.4 step 2
    rig.group.claim("ctx")
    domain = rig.domain()
    rig.group.attach(domain, rig.handle(domain))
    rig.group.recovery_cnt = 1
    with expect(errno.EBUSY):
        rig.group.replace(rig.domain("other"), rig.handle(domain))
    rig.group.detach()
    assert rig.group.domain is rig.driver.blocked_domain


def test_detach_goes_on_when_a_member_fails(rig: Rig) -> None:  # devices 3.4, must-succeed mode
    rig.group.claim("ctx")
    domain = rig.domain()
    rig.group.attach(domain, rig.handle(domain))
    rig.log.take()
    rig.log.failures["attach b"] = errno.EIO
    rig.group.detach()
    assert rig.log.take() == [f"attach {n} pt->blocked" for n in "abc"]
    assert rig.group.domain is rig.driver.blocked_domain
    rig.group.release()  # not even the default domain: the member is pushed to the blocking one
    assert rig.log.take() == [
        "attach a blocked->default",
        "attach b blocked->default",
        "attach b blocked->blocked",
        "attach c blocked->default",
    ]


# --------------------------------------------------------------------------------------------------------------- PASID


def test_pasids_of_every_member(rig: Rig) -> None:  # devices 3.4b
    domain, other = rig.domain("x"), rig.domain("y")
    rig.group.attach_pasid(domain, 7, rig.handle(domain))
    assert rig.log.take() == [f"pasid {n} 7 -->x" for n in "abc"]
    with expect(errno.EBUSY):  # step 5
        rig.group.attach_pasid(other, 7, rig.handle(other))
    rig.group.replace_pasid(other, 7, rig.handle(other))
    assert rig.log.take() == [f"pasid {n} 7 x->y" for n in "abc"]
    rig.group.replace_pasid(other, 7, rig.handle(other))  # step 6: the same domain
    assert rig.log.take() == []
    rig.group.detach_pasid(7)
    assert rig.log.take() == [f"pasid {n} 7 y->blocked" for n in "abc"]
    with expect(errno.EINVAL):
        rig.group.replace_pasid(other, 7, rig.handle(other))


def test_a_failing_member_loses_the_pasid_everywhere(rig: Rig) -> None:  # devices 3.4b step 7
    domain = rig.domain("x")
    rig.log.failures["pasid c"] = errno.ENOMEM
    with expect(errno.ENOMEM):
        rig.group.attach_pasid(domain, 7, rig.handle(domain))
    assert rig.log.take()[3:] == [f"pasid {n} 7 x->blocked" for n in "ab"]
    assert rig.group.handle(7) is None


def test_a_failing_replacement_restores_the_pasid(rig: Rig) -> None:  # devices 3.4b step 7
    domain, other = rig.domain("x"), rig.domain("y")
    handle = rig.handle(domain)
    rig.group.attach_pasid(domain, 7, handle)
    rig.log.take()
    rig.log.failures["pasid c"] = errno.ENOMEM
    with expect(errno.ENOMEM):
        rig.group.replace_pasid(other, 7, rig.handle(other))
    assert rig.log.take()[3:] == [f"pasid {n} 7 y->x" for n in "ab"]
    assert rig.group.handle(7) is handle


def test_pasid_limits(rig: Rig) -> None:  # devices 3.4b step 4
    rig.devices[1].pasid_limit = 16
    domain = rig.domain()
    with expect(errno.EINVAL):
        rig.group.attach_pasid(domain, 16, rig.handle(domain))
    rig.group.attach_pasid(domain, 15, rig.handle(domain))


def test_members_without_pasids_are_passed_over() -> None:  # devices 3.4b, quirk
    rig = Rig(pasids=0)
    domain = rig.domain()
    rig.group.attach_pasid(domain, 2**31 - 1, rig.handle(domain))
    rig.group.detach_pasid(2**31 - 1)
    assert rig.log.take() == []


def test_drivers_without_pasids() -> None:  # devices 3.4b step 1
    rig = Rig(PlainDriver)
    domain = rig.domain()
    with expect(errno.EOPNOTSUPP):
        rig.group.attach_pasid(domain, 1, rig.handle(domain))


def test_a_parked_member_keeps_its_pasid(rig: Rig) -> None:  # devices 3.4b, detach
    domain = rig.domain("x")
    rig.group.attach_pasid(domain, 3, rig.handle(domain))
    rig.log.take()
    rig.devices[0].parked = True
    rig.group.detach_pasid(3)
    assert rig.log.take() == [f"pasid {n} 3 x->blocked" for n in "bc"]


def test_an_attached_pasid_keeps_others_from_claiming(rig: Rig) -> None:  # devices 1.3 step 4
    domain = rig.domain()
    rig.group.attach_pasid(domain, 3, rig.handle(domain))
    with expect(errno.EBUSY):
        rig.group.claim("ctx")
