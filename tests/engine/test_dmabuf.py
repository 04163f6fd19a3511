"""core 7: dma-buf maps and their revocation."""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial

import pytest

from iommufd.engine.dmabuf import DmaBufFile
from iommufd.errors import KernelError
from iommufd.iommu.extent_domain import ExtentDomain
from iommufd.memory.frames import Extents
from iommufd.uapi import iommufd as u
from tests.engine.fakes import ULMAX, Background, Caller, TestDmaBuf, frames_of

P = 4096
FD = 5


@pytest.fixture
def buffer(c: Caller) -> TestDmaBuf:
    made = TestDmaBuf(c.world, 16)
    c.proc.files[FD] = lambda: made
    return made


def map_file(ioas: int, length: int, start: int = 0, iova: int | None = None, fd: int = FD) -> u.iommu_ioas_map_file:
    flags = 6 if iova is None else 7
    return u.iommu_ioas_map_file(flags=flags, ioas_id=ioas, fd=fd, start=start, length=length, iova=iova or 0)


class Refusing(TestDmaBuf):
    """An exporter that says no at one of its steps."""

    step = ""

    def attach(self) -> None:
        if self.step == "attach":
            raise KernelError(errno.ENODEV, "no")

    def pin(self) -> None:
        if self.step == "pin":
            raise KernelError(errno.EBUSY, "no")

    def phys(self) -> Extents:
        if self.step == "phys":
            return DmaBufFile.phys(self)
        return super().phys()


class TestRows:
    @pytest.mark.parametrize(("start", "length"), [(0, 16 * P + 1), (16 * P, 1), (P, 16 * P), (0, ULMAX - 1)])
    def test_core_7_1(self, c: Caller, buffer: TestDmaBuf, start: int, length: int) -> None:  # core-7-1
        assert "0x10000" in c.refuses(errno.EINVAL, map_file(c.ioas(), length, start))

    def test_core_7_2(self, c: Caller, buffer: TestDmaBuf) -> None:  # core-7-2
        buffer.size = 2**60
        c.refuses(errno.EINVAL, map_file(c.ioas(), (2**32 - 1) * P))

    @pytest.mark.parametrize(
        ("step", "number"),
        [
            pytest.param("attach", errno.ENODEV, id="core-7-4"),
            pytest.param("pin", errno.EBUSY, id="core-7-5"),
            pytest.param("phys", errno.EOPNOTSUPP, id="core-7-6-exporter"),
            pytest.param("revoked", errno.ENODEV, id="core-7-6-revoked"),
        ],
    )
    def test_exporter_refuses(self, c: Caller, step: str, number: int) -> None:
        buffer = Refusing(c.world, 4)
        buffer.step, buffer.revoked = step, step == "revoked"
        c.proc.files[FD] = lambda: buffer
        c.refuses(number, map_file(c.ioas(), P))
        assert buffer.references == 1
        assert not buffer._importers

    def test_core_7_7(self, c: Caller, buffer: TestDmaBuf) -> None:  # core-7-7
        """A refusal of the mapping core gives the attachment back."""
        ioas = c.ioas()
        c.do(map_file(ioas, P, iova=0x1000))
        c.refuses(errno.EEXIST, map_file(ioas, P, iova=0x1000))
        assert (buffer.references, len(buffer._importers)) == (2, 1)


def test_mapped_addresses(c: Caller, buffer: TestDmaBuf) -> None:  # core-4.10-7
    """Index i is at the exporter's base plus the page-rounded start plus i pages; MMIO, nothing pinned or charged."""
    ioas = c.ioas()
    domain = c.add_domain(ioas, ExtentDomain(0xFFFFF800))
    base = buffer.chunk.pfn(0) << 12
    c.do(map_file(ioas, 2 * P, 3 * P, 0x10000))
    assert frames_of(domain, 0x10000, 2 * P) == [base + 3 * P, base + 4 * P]
    c.do(map_file(ioas, 0x800, 0x800, 0x20000))
    assert domain.iova_to_phys(0x20000) == base + 0x800
    assert [segment[4] for segment in domain.segments(0, ULMAX)] == [1 | 2 | 16] * 2
    c.quiet()


def test_automatic_iova_from_the_byte_offset(c: Caller, buffer: TestDmaBuf) -> None:
    ioas = c.ioas()
    assert c.do(map_file(ioas, 4 * P, 2 * P)).iova == 0x2000
    assert c.do(map_file(ioas, 0x800, 0x800)).iova == 0x1800


def test_life(c: Caller, buffer: TestDmaBuf) -> None:
    """The attachment lasts as long as the pages object; COPY shares it."""
    a, b = c.ioas(), c.ioas()
    c.do(map_file(a, 4 * P, iova=0x10000))
    c.copy(b, a, 0x11000, P, 0x20000)
    c.unmap(a, 0, ULMAX)
    assert (buffer.references, len(buffer._importers)) == (2, 1)
    c.do(u.iommu_destroy(id=b))
    assert (buffer.references, len(buffer._importers)) == (1, 0)


class TestRevocation:
    def test_leaves_every_domain_for_good(self, c: Caller, buffer: TestDmaBuf) -> None:
        a, b = c.ioas(), c.ioas()
        domains = [c.add_domain(a), c.add_domain(a), c.add_domain(b)]
        c.do(map_file(a, 4 * P, iova=0x10000))
        c.copy(b, a, 0x10000, 4 * P, 0x10000)
        c.map(a, 0x20000, P)
        buffer.revoke()
        assert [frames_of(domain, 0x10000, 4 * P) for domain in domains] == [[0] * 4] * 3
        assert domains[0].iova_to_phys(0x20000)
        assert c.areas(a)[0] == (0x10000, 0x13FFF)  # the area stays
        buffer.revoke(False)
        late = c.add_domain(a)  # skips it, and succeeds
        assert frames_of(late, 0x10000, 4 * P) == [0] * 4
        assert late.iova_to_phys(0x20000)
        c.copy(b, a, 0x10000, P, 0x30000)  # copies are as dead
        assert domains[2].iova_to_phys(0x30000) == 0
        assert c.unmap(a, 0, ULMAX) == 5 * P
        assert c.unmap(b, 0, ULMAX) == 5 * P
        assert buffer.references == 1

    def test_new_maps(self, c: Caller, buffer: TestDmaBuf) -> None:
        ioas = c.ioas()
        domain = c.add_domain(ioas)
        buffer.revoke()
        c.refuses(errno.ENODEV, map_file(ioas, P, iova=0x10000))
        buffer.revoke(False)
        c.do(map_file(ioas, P, iova=0x10000))
        assert domain.iova_to_phys(0x10000)
        buffer.revoke(False)  # notifies too
        assert domain.iova_to_phys(0x10000) == 0

    def test_iova_of_a_dead_area_can_be_used_by_others_after_unmap(self, c: Caller, buffer: TestDmaBuf) -> None:
        ioas = c.ioas()
        domain = c.add_domain(ioas)
        c.do(map_file(ioas, P, iova=0x10000))
        buffer.revoke()
        c.unmap(ioas, 0x10000, P)
        c.map(ioas, 0x10000, P)
        here = domain.iova_to_phys(0x10000)
        assert here
        buffer.revoke()
        assert domain.iova_to_phys(0x10000) == here

    def test_domains_that_left_are_left_alone(self, c: Caller, buffer: TestDmaBuf) -> None:
        ioas = c.ioas()
        domain = c.add_domain(ioas)
        c.do(map_file(ioas, P, iova=0x10000))
        c.table(ioas).remove_domain(domain)
        domain.map(0x10000, buffer.phys(), 0, P, 3, False)  # somebody else's business now
        buffer.revoke()
        assert domain.iova_to_phys(0x10000)

    def test_against_attach_and_map(self, c: Caller, buffer: TestDmaBuf) -> None:
        """core 9: after revoke returns no domain holds an entry, whatever ran beside it."""
        for _ in range(30):
            buffer.revoked = False
            ioas = c.ioas()
            c.do(map_file(ioas, 16 * P, iova=0x10000))
            jobs: list[Callable[[], object]] = [
                partial(c.add_domain, ioas),
                partial(c.table(ioas).pieces_of, 0x10000, 0x1FFFF),
                buffer.revoke,
            ]
            for job in [Background(j) for j in jobs]:
                job.result()
            for domain in c.domains(ioas):
                assert frames_of(domain, 0x10000, 16 * P) == [0] * 16


def test_a_driver_failure_undoes_all(c: Caller, buffer: TestDmaBuf) -> None:
    ioas = c.ioas()
    first = c.add_domain(ioas)
    second = c.add_domain(ioas, ExtentDomain(0xFFFFF000, 0, 0xFFFF))
    c.table(ioas).remove_reserved(second)
    c.refuses(errno.ERANGE, map_file(ioas, P, iova=0x10000))
    assert first.iova_to_phys(0x10000) == 0
    assert (buffer.references, len(buffer._importers)) == (1, 0)
