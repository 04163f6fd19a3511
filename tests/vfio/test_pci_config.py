"""vfio/pci_config.py: what a program may change, with what Linux 7.3.4 answered on QEMU's edu and e1000e."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iommufd.errors import KernelError
from iommufd.vfio.pci_config import Bar, BarKind, ConfigSpace, PciLayout
from tests.vfio.conftest import EDU, NIC


def _write(config: ConfigSpace, at: int, value: int, size: int = 4) -> int:
    """Writes, and reads the same bytes back."""
    config.write(at, value.to_bytes(size, "little"))
    return _read(config, at, size)


def _read(config: ConfigSpace, at: int, size: int = 4) -> int:
    return int.from_bytes(config.read(at, size), "little")


@pytest.fixture
def edu() -> ConfigSpace:
    return ConfigSpace(EDU, {0: 0xFEA00000})


@pytest.fixture
def nic() -> ConfigSpace:
    return ConfigSpace(NIC, {0: 0xFE840000, 1: 0xFE860000, 2: 0xC000, 3: 0xFE880000, 6: 0xFE800000}, line=10)


def test_the_header(edu: ConfigSpace) -> None:
    assert edu.read(0, 64).hex() == (
        "3412e811030110001000ff00000000000000a0fe00000000000000000000000000000000000000000000"
        "0000f41a0011000000004000000000000000" + "0b010000"
    )


@pytest.mark.parametrize(
    ("at", "before", "ones", "zero"),
    [
        (0x00, 0x11E81234, 0x11E81234, 0x11E81234),
        (0x04, 0x00100103, 0x00100507, 0x00100000),
        (0x08, 0x00FF0010, 0x00FF0010, 0x00FF0010),
        (0x0C, 0x00000000, 0x000000FF, 0x00000000),
        (0x10, 0xFEA00000, 0xFFF00000, 0x00000000),
        (0x14, 0x00000000, 0x00000000, 0x00000000),
        (0x2C, 0x11001AF4, 0x11001AF4, 0x11001AF4),
        (0x30, 0x00000000, 0x00000000, 0x00000000),
        (0x34, 0x00000040, 0x00000040, 0x00000040),
        (0x3C, 0x0000010B, 0x000001FF, 0x00000100),
        (0x40, 0x00800005, 0x008E0005, 0x00000005),  # MSI: its low control byte is the owner's, but for enabling
        (0x44, 0x00000000, 0xFFFFFFFF, 0x00000000),
        (0x48, 0x00000000, 0xFFFFFFFF, 0x00000000),
    ],
)
def test_registers_of_edu(edu: ConfigSpace, at: int, before: int, ones: int, zero: int) -> None:
    assert (_read(edu, at), _write(edu, at, 0xFFFFFFFF), _write(edu, at, 0)) == (before, ones, zero)
    assert _write(edu, at, before) == before


@pytest.mark.parametrize(
    ("at", "ones", "zero"),
    [
        (0x10, 0xFFFE0000, 0x00000000),
        (0x14, 0xFFFE0000, 0x00000000),
        (0x18, 0xFFFFFFE1, 0x00000001),
        (0x1C, 0xFFFFC000, 0x00000000),
        (0x20, 0x00000000, 0x00000000),
        (0x30, 0xFFFC0001, 0x00000000),
    ],
)
def test_address_registers_are_sized_as_hardware_is(nic: ConfigSpace, at: int, ones: int, zero: int) -> None:
    assert (_write(nic, at, 0xFFFFFFFF), _write(nic, at, 0)) == (ones, zero)


def test_an_address_register_by_parts(edu: ConfigSpace) -> None:
    assert _write(edu, 0x13, 0xFF, 1) == 0xFF
    assert _read(edu, 0x10) == 0xFFA00000
    _write(edu, 0x10, 0xFFFF, 2)
    assert _read(edu, 0x10) == 0xFFA00000
    _write(edu, 0x11, 0xFFFFFF, 3)
    assert _read(edu, 0x10) == 0xFFF00000


def test_a_wide_address_register() -> None:
    config = ConfigSpace(PciLayout(bars=(Bar(1 << 34, BarKind.MEMORY, wide=True, prefetchable=True),)), {0: 5 << 34})
    assert _read(config, 0x10, 8) == 5 << 34 | 0xC
    assert _write(config, 0x10, 2**64 - 1, 8) == -(1 << 34) & (2**64 - 1) | 0xC


def test_capabilities_are_a_chain(nic: ConfigSpace) -> None:
    at, found = _read(nic, 0x34, 1), []
    while at:
        found.append(_read(nic, at, 1))
        at = _read(nic, at + 1, 1)
    assert found == [0x01, 0x05, 0x11, 0x10]
    assert _read(nic, 6, 2) & 0x10
    assert _read(ConfigSpace(PciLayout(express=False, msi=0, power_management=False)), 4) == 0x00000103


def test_msix_is_read_only(nic: ConfigSpace) -> None:
    assert _read(nic, nic.msix_at, 12).to_bytes(12, "little")[2:] == bytes([4, 0, 3, 0, 0, 0, 0x53, 0, 0, 0])
    assert _write(nic, nic.msix_at + 2, 0xFFFF, 2) == 4
    nic.set_msix(True)
    assert _write(nic, nic.msix_at + 2, 0, 2) == 0x8004
    nic.set_msix(False)
    assert _read(nic, nic.msix_at + 2, 2) == 4


def test_msi_is_enabled_only_with_vectors() -> None:
    config = ConfigSpace(PciLayout(msi=8))
    at = config.msi_at + 2
    assert _write(config, at, 0x81, 2) == 0x80
    config.set_msi(4)
    assert _write(config, at, 0x80 | 5 << 4 | 1, 2) == 0x80 | 2 << 4 | 1  # not for more than four
    config.set_msi(0)
    assert _read(config, at, 2) == 0x80


def test_express_control_and_function_level_reset(nic: ConfigSpace) -> None:
    def ask(config: ConfigSpace, value: int) -> tuple[int, bool]:
        return _write(config, config.express_at + 8, value, 2), config.reset_requested

    assert ask(nic, 0x7FFF) == (0x70E0, False)
    assert ask(nic, 0x8000) == (0, True)
    assert ask(ConfigSpace(PciLayout(flr=False)), 0x8000) == (0, False)


def test_power_states(nic: ConfigSpace) -> None:
    def go(state: int) -> tuple[int, bool]:
        return _write(nic, nic.pm_at + 4, state, 2) & 3, nic.memory_enabled

    assert go(0) == (0, True)
    assert go(3) == (3, False)
    assert [go(missing) for missing in (1, 2)] == [(3, False)] * 2  # it has no D1 and D2
    assert go(0) == (0, True)


@pytest.mark.parametrize(("command", "memory", "master"), [(0, False, False), (2, True, False), (4, False, True)])
def test_the_command_register(nic: ConfigSpace, command: int, memory: bool, master: bool) -> None:
    nic.write(4, command.to_bytes(2, "little"))
    assert (nic.memory_enabled, nic.bus_master) == (memory, master)
    nic.write(nic.pm_at + 4, b"\3")
    assert (nic.memory_enabled, nic.bus_master) == (False, False)


def test_it_ends_where_it_ends(edu: ConfigSpace, nic: ConfigSpace) -> None:
    for config, size in ((edu, 256), (nic, 4096)):
        assert len(config.read(0, size)) == size
        for at, count in ((size - 4, 8), (size, 1), (0, size + 1)):
            with pytest.raises(KernelError) as caught:
                config.read(at, count)
            assert caught.value.errno == errno.EFAULT
            with pytest.raises(KernelError):
                config.write(at, bytes(count))


@given(st.binary(min_size=1, max_size=64), st.integers(0, 192))
def test_whatever_is_written_goes_again(data: bytes, at: int) -> None:
    config = ConfigSpace(NIC)
    before = config.read(0, config.size)
    config.write(at, data)
    config.restore()
    assert config.read(0, config.size) == before


@pytest.mark.parametrize(
    "make",
    [
        lambda: Bar(12),
        lambda: Bar(8),
        lambda: Bar(2, BarKind.IO),
        lambda: PciLayout(bars=(Bar(16),) * 7),
        lambda: PciLayout(bars=(Bar(16, wide=True), Bar(16))),
        lambda: PciLayout(bars=(None,) * 5 + (Bar(16, wide=True),)),
        lambda: PciLayout(msi=3),
        lambda: PciLayout(msix=2049),
        lambda: PciLayout(msix=4),  # no BAR
        lambda: PciLayout(msix=4, bars=(Bar(64),)),  # no room for the pending bits
    ],
)
def test_impossible_functions_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"BAR|vectors"):
        make()
