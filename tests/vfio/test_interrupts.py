"""VFIO_DEVICE_SET_IRQS: what Linux 7.3.4 answered, in the order it was asked; and what a model's interrupts do."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Iterator

import pytest

from iommufd.vfio.interrupts import ERR, INTX, MSI, MSIX, REQ
from tests.vfio.conftest import ALONE, NETWORK
from tests.vfio.program import BAD, SET_IRQS, Program, eventfds, value

NONE, BOOL, EVENTFD, MASK, UNMASK, TRIGGER = 1, 2, 4, 8, 16, 32


@pytest.fixture
def fd(p: Program) -> int:
    return p.bound(NETWORK, p.iommufd())[0]


@pytest.fixture
def ev() -> Iterator[list[int]]:
    made = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(6)]
    yield made
    for one in made:
        os.close(one)


def test_arguments(p: Program, fd: int) -> None:
    assert p.call(fd, SET_IRQS, BAD) == "EFAULT"
    for argsz in (0, 19):
        assert p.ask(fd, SET_IRQS, "IIIII", argsz, NONE | TRIGGER, 0, 0, 0) == "EINVAL"
    answers = {flags: p.irqs(fd, flags, INTX, 0, 0) for flags in (0x29, 0x31, 1, 2, 4)}
    assert set(answers.values()) == {"ENOTTY"}  # one type of data, but no action or two
    for flags in (0, 8, 0x20, 0x21, 0x22, 0x24, 0x23, 0x25, 0x41, 0x61, 0x11, 9, 0xC, 0x14, 0x12, 0xA):
        assert p.irqs(fd, flags, INTX, 0, 0) == "EINVAL", hex(flags)
    for index in range(7):
        assert p.irqs(fd, NONE | TRIGGER, index, 0, 0) == "EINVAL"
    for index, start, count in ((0, 0, 1), (0, 1, 0), (0, 1, 1), (0, 0, 2), (1, 0, 1), (1, 1, 1), (3, 0, 1), (4, 0, 1)):
        assert p.irqs(fd, NONE | TRIGGER, index, start, count) == "EINVAL"
    for start, count in ((2**32 - 1, 1), (1, 2**32 - 1), (2**32 - 1, 2**32 - 1)):
        assert p.irqs(fd, NONE | TRIGGER, INTX, start, count) == "EINVAL"
    for flags, data in ((EVENTFD, b""), (EVENTFD, bytes(3)), (BOOL, b"")):
        assert p.irqs(fd, flags | TRIGGER, INTX, 0, 1, data) == "EINVAL"
    assert p.ask(fd, SET_IRQS, "IIIII", 24, EVENTFD | TRIGGER, 0, 0, 1) == "EFAULT"
    assert p.irqs(fd, EVENTFD | TRIGGER, INTX, 0, 1, eventfds(0)) == "EINVAL"
    assert p.irqs(fd, EVENTFD | TRIGGER, INTX, 0, 1, eventfds(9999)) == "EBADF"
    assert p.irqs(fd, EVENTFD | TRIGGER, INTX, 0, 1, eventfds(fd)) == "EINVAL"


def test_there_are_no_vectors_without_the_capability(p: Program) -> None:
    fd, _ = p.bound(ALONE, p.iommufd())
    assert p.irqs(fd, EVENTFD | TRIGGER, MSIX, 0, 1, eventfds(-1)) == "EINVAL"


def test_intx(p: Program, fd: int, ev: list[int]) -> None:
    def do(flags: int, data: bytes = b"", count: int = 1) -> object:
        return p.irqs(fd, flags, INTX, 0, count, data)

    assert do(EVENTFD | TRIGGER, eventfds(ev[0])) == 0
    assert (do(NONE | TRIGGER), value(ev[0])) == (0, 1)
    assert (do(BOOL | TRIGGER, b"\1"), value(ev[0])) == (0, 1)
    assert (do(BOOL | TRIGGER, b"\0"), value(ev[0])) == (0, 0)
    assert [do(NONE | MASK), do(NONE | UNMASK), do(BOOL | MASK, b"\1"), do(BOOL | UNMASK, b"\1")] == [0] * 4
    assert [do(EVENTFD | UNMASK, eventfds(ev[1])), do(EVENTFD | UNMASK, eventfds(-1))] == [0, 0]
    assert do(EVENTFD | MASK, eventfds(ev[1])) == "ENOTTY"
    assert do(EVENTFD | TRIGGER, eventfds(ev[2])) == 0  # another one
    assert (do(NONE | TRIGGER), value(ev[0]), value(ev[2])) == (0, 0, 1)
    for index in (MSI, MSIX):
        assert p.irqs(fd, EVENTFD | TRIGGER, index, 0, 1, eventfds(ev[1])) == "EINVAL"
    assert do(EVENTFD | TRIGGER, eventfds(-1)) == 0  # nobody hears it, but it is configured
    assert (do(NONE | TRIGGER), value(ev[2])) == (0, 0)
    assert do(NONE | TRIGGER, count=0) == 0  # off
    assert [do(NONE | MASK), do(NONE | UNMASK), do(NONE | TRIGGER)] == ["EINVAL"] * 3


def test_intx_masks_itself(p: Program, fd: int, ev: list[int]) -> None:
    interrupts = p.machine.pci[NETWORK].function.interrupts
    p.irqs(fd, EVENTFD | TRIGGER, INTX, 0, 1, eventfds(ev[0]))
    interrupts.set_intx(True)
    assert value(ev[0]) == 1
    interrupts.set_intx(True)
    assert value(ev[0]) == 0  # masked since
    assert p.irqs(fd, NONE | UNMASK, INTX, 0, 1) == 0
    assert value(ev[0]) == 1  # the line is still up
    interrupts.set_intx(False)
    p.irqs(fd, NONE | UNMASK, INTX, 0, 1)
    assert value(ev[0]) == 0
    p.irqs(fd, NONE | MASK, INTX, 0, 1)
    interrupts.set_intx(True)
    assert value(ev[0]) == 0
    p.irqs(fd, BOOL | UNMASK, INTX, 0, 1, b"\0")
    assert value(ev[0]) == 0
    p.irqs(fd, BOOL | UNMASK, INTX, 0, 1, b"\1")
    assert value(ev[0]) == 1


def test_intx_is_unmasked_by_an_eventfd(p: Program, fd: int, ev: list[int]) -> None:
    def unmasked_by(number: int) -> object:
        return p.irqs(fd, EVENTFD | UNMASK, INTX, 0, 1, eventfds(number))

    def fires(eventfd: int) -> bool:
        poller = select.poll()
        poller.register(eventfd, select.POLLIN)
        return bool(poller.poll(10_000)) and value(eventfd) == 1

    interrupts = p.machine.pci[NETWORK].function.interrupts
    p.irqs(fd, EVENTFD | TRIGGER, INTX, 0, 1, eventfds(ev[0]))
    assert unmasked_by(ev[1]) == 0
    assert [unmasked_by(ev[2]), unmasked_by(9999), unmasked_by(0)] == ["EBUSY", "EBADF", "EINVAL"]
    interrupts.set_intx(True)
    assert value(ev[0]) == 1
    for _ in range(3):  # the line is still up
        os.eventfd_write(ev[1], 1)
        assert fires(ev[0])
        assert value(ev[1]) == 0
    assert [unmasked_by(-1), unmasked_by(ev[2])] == [0, 0]
    os.eventfd_write(ev[1], 1)
    assert interrupts.masked
    os.eventfd_write(ev[2], 1)
    assert fires(ev[0])
    assert value(ev[1]) == 1


def test_intx_is_silent_while_the_command_register_disables_it(p: Program, fd: int, ev: list[int]) -> None:
    def heard(flags: int) -> tuple[object, int]:
        return p.irqs(fd, flags, INTX, 0, 1), value(ev[0])

    interrupts = p.machine.pci[NETWORK].function.interrupts
    p.irqs(fd, EVENTFD | TRIGGER, INTX, 0, 1, eventfds(ev[0]))
    p.set_config(fd, 4, 0x400, 2)
    assert heard(NONE | TRIGGER) == (0, 0)
    assert p.irqs(fd, BOOL | TRIGGER, INTX, 0, 1, b"\1") == 0
    interrupts.set_intx(True)
    assert heard(NONE | UNMASK) == (0, 0)
    p.set_config(fd, 4, 0x406, 2)
    assert value(ev[0]) == 0
    p.set_config(fd, 4, 6, 2)
    assert value(ev[0]) == 1  # the line is still up
    interrupts.set_intx(False)
    assert heard(NONE | TRIGGER) == (0, 1)
    assert p.irqs(fd, NONE | TRIGGER, INTX, 0, 0) == 0
    p.set_config(fd, 4, 0x400, 2)
    p.irqs(fd, EVENTFD | TRIGGER, INTX, 0, 1, eventfds(ev[0]))
    assert heard(NONE | TRIGGER) == (0, 0)  # it was so before
    p.set_config(fd, 4, 0, 2)
    assert heard(NONE | TRIGGER) == (0, 1)


def test_no_messages_are_configured_asleep(p: Program, fd: int, ev: list[int]) -> None:
    power = p.machine.pci[NETWORK].function.config.pm_at + 4
    for index in (MSI, MSIX):
        p.set_config(fd, power, 3, 2)
        assert p.irqs(fd, EVENTFD | TRIGGER, index, 0, 1, eventfds(ev[0])) == "EINVAL"
        p.set_config(fd, power, 0, 2)
        assert p.irqs(fd, EVENTFD | TRIGGER, index, 0, 1, eventfds(ev[0])) == 0
        p.set_config(fd, power, 3, 2)
        assert (p.irqs(fd, NONE | TRIGGER, index, 0, 1), value(ev[0])) == (0, 1)
        assert p.irqs(fd, EVENTFD | TRIGGER, index, 0, 1, eventfds(ev[1])) == 0  # it is configured
        assert p.irqs(fd, NONE | TRIGGER, index, 0, 0) == 0
    assert p.irqs(fd, EVENTFD | TRIGGER, INTX, 0, 1, eventfds(ev[0])) == 0  # a line needs nothing


def test_closing_the_device_ends_unmasking(p: Program, fd: int, ev: list[int]) -> None:
    p.irqs(fd, EVENTFD | TRIGGER, INTX, 0, 1, eventfds(ev[0]))
    p.irqs(fd, EVENTFD | UNMASK, INTX, 0, 1, eventfds(ev[1]))
    watches = [one for one in threading.enumerate() if one.name == "vfio-unmask"]
    p.close(fd)
    for one in watches:
        one.join(10)
        assert not one.is_alive()
    assert p.machine.pci[NETWORK].function.interrupts.unmask_watch is None


def test_msi(p: Program, fd: int, ev: list[int]) -> None:
    def do(flags: int, data: bytes = b"", count: int = 1) -> object:
        return p.irqs(fd, flags, MSI, 0, count, data)

    assert [do(NONE | MASK), do(NONE | UNMASK)] == ["ENOTTY"] * 2
    assert do(EVENTFD | TRIGGER, eventfds(ev[1])) == 0
    assert (do(NONE | TRIGGER), value(ev[1])) == (0, 1)
    assert (do(BOOL | TRIGGER, b"\1"), value(ev[1])) == (0, 1)
    assert do(EVENTFD | TRIGGER, eventfds(-1)) == 0
    assert (do(NONE | TRIGGER), value(ev[1])) == (0, 0)
    assert do(EVENTFD | TRIGGER, eventfds(ev[2])) == 0
    assert (p.machine.pci[NETWORK].function.interrupts.trigger(), value(ev[2])) == (True, 1)
    for index in (INTX, MSIX):
        assert p.irqs(fd, EVENTFD | TRIGGER, index, 0, 1, eventfds(ev[0])) == "EINVAL"
    assert [do(NONE | TRIGGER, count=0), do(NONE | TRIGGER), do(NONE | TRIGGER, count=0)] == [0, "EINVAL", "EINVAL"]
    assert not p.machine.pci[NETWORK].function.interrupts.trigger()


def test_msix_vectors_come_and_go(p: Program, fd: int, ev: list[int]) -> None:
    def do(flags: int, start: int, count: int, *fds: int) -> object:
        return p.irqs(fd, flags, MSIX, start, count, eventfds(*fds))

    def values() -> list[int]:
        return [value(one) for one in ev]

    assert do(EVENTFD | TRIGGER, 0, 3, *ev[:3]) == 0
    assert (do(NONE | TRIGGER, 0, 3), values()) == (0, [1, 1, 1, 0, 0, 0])
    assert (do(NONE | TRIGGER, 2, 2), values()) == (0, [0, 0, 1, 0, 0, 0])
    assert (p.irqs(fd, BOOL | TRIGGER, MSIX, 0, 3, b"\1\0\1"), values()) == (0, [1, 0, 1, 0, 0, 0])
    assert do(EVENTFD | TRIGGER, 3, 2, ev[3], ev[4]) == 0
    assert (do(NONE | TRIGGER, 0, 5), values()) == (0, [1, 1, 1, 1, 1, 0])
    assert do(EVENTFD | TRIGGER, 4, 2, ev[3], ev[4]) == "EINVAL"
    # the second of three is bad: it and what went before lose their signal
    assert do(EVENTFD | TRIGGER, 0, 3, ev[5], 9999, ev[5]) == "EBADF"
    assert (do(NONE | TRIGGER, 0, 5), values()) == (0, [0, 0, 1, 1, 1, 0])
    assert do(NONE | TRIGGER, 0, 0) == 0
    assert do(EVENTFD | TRIGGER, 2, 2, ev[0], ev[1]) == 0  # the first two exist, unheard
    assert (do(NONE | TRIGGER, 0, 5), values()) == (0, [1, 1, 0, 0, 0, 0])


@pytest.mark.parametrize("index", [MSI, MSIX])
def test_no_vectors_are_no_configuration(p: Program, fd: int, ev: list[int], index: int) -> None:
    assert p.irqs(fd, EVENTFD | TRIGGER, index, 0, 0) == "ERANGE"
    assert p.irqs(fd, EVENTFD | TRIGGER, index, 0, 1, eventfds(ev[0])) == 0
    assert p.irqs(fd, EVENTFD | TRIGGER, index, 0, 0) == 0  # there are some already
    assert (p.irqs(fd, NONE | TRIGGER, index, 0, 1), value(ev[0])) == (0, 1)


def test_a_first_configuration_that_fails_leaves_nothing(p: Program, fd: int, ev: list[int]) -> None:
    assert p.irqs(fd, EVENTFD | TRIGGER, MSIX, 0, 2, eventfds(ev[0], 9999)) == "EBADF"
    interrupts = p.machine.pci[NETWORK].function.interrupts
    assert (interrupts.active, interrupts.vectors) == (None, [])
    assert p.irqs(fd, EVENTFD | TRIGGER, INTX, 0, 1, eventfds(ev[0])) == 0


@pytest.mark.parametrize("index", [ERR, REQ])
def test_notices(p: Program, fd: int, ev: list[int], index: int) -> None:
    def do(flags: int, data: bytes = b"", count: int = 1) -> object:
        return p.irqs(fd, flags, index, 0, count, data)

    interrupts = p.machine.pci[NETWORK].function.interrupts
    assert do(EVENTFD | TRIGGER, eventfds(ev[0])) == 0
    assert (do(NONE | TRIGGER), value(ev[0])) == (0, 1)
    assert (do(BOOL | TRIGGER, b"\1"), value(ev[0])) == (0, 1)
    assert (interrupts.notice(index), value(ev[0])) == (True, 1)
    assert do(EVENTFD | TRIGGER, eventfds(ev[1])) == 0
    assert do(EVENTFD | TRIGGER, eventfds(9999)) == "EBADF"
    assert do(EVENTFD | TRIGGER, eventfds(0)) == "EINVAL"
    assert (interrupts.notice(index), value(ev[0]), value(ev[1])) == (True, 0, 1)
    assert do(EVENTFD | TRIGGER, eventfds(-1)) == 0
    assert [do(NONE | TRIGGER, count=0), do(NONE | TRIGGER), do(BOOL | TRIGGER, b"\1")] == ["EINVAL", "EINVAL", 0]
    assert [do(NONE | MASK), do(EVENTFD | UNMASK, eventfds(-1))] == ["ENOTTY"] * 2
    assert do(NONE | TRIGGER, count=2) == "EINVAL"
    assert not interrupts.notice(index)
    do(EVENTFD | TRIGGER, eventfds(ev[0]))
    assert do(NONE | TRIGGER, count=0) == 0  # off
    assert not interrupts.notice(index)


def test_closing_the_device_forgets_them(p: Program, fd: int, ev: list[int]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    p.irqs(fd, EVENTFD | TRIGGER, MSIX, 0, 3, eventfds(*ev[:3]))
    p.irqs(fd, EVENTFD | TRIGGER, REQ, 0, 1, eventfds(ev[3]))
    assert len(os.listdir("/proc/self/fd")) == before + 4
    interrupts = p.machine.pci[NETWORK].function.interrupts
    p.close(fd)
    assert (interrupts.active, interrupts.notices) == (None, {})
    assert len(os.listdir("/proc/self/fd")) < before


def test_a_full_eventfd_blocks_nobody(p: Program, fd: int) -> None:
    full = os.eventfd(0, os.EFD_NONBLOCK)
    os.eventfd_write(full, 2**64 - 2)
    p.irqs(fd, EVENTFD | TRIGGER, MSI, 0, 1, eventfds(full))
    assert p.irqs(fd, NONE | TRIGGER, MSI, 0, 1) == 0
    os.close(full)
