"""Trap: one trapped system call, and the answers a handler can give besides a number."""

from __future__ import annotations

from typing import Final


class Proceed:
    """The kernel executes the call itself."""


class Answered:
    """The handler has answered already (a descriptor was installed and returned in one step)."""


PROCEED: Final = Proceed()
ANSWERED: Final = Answered()


class Trap:
    """``number`` identifies the notification, ``tid`` the calling thread, ``args`` are its six arguments (unsigned)."""

    __slots__ = ("args", "nr", "number", "tid")

    def __init__(self, number: int, tid: int, nr: int, args: tuple[int, ...]) -> None:
        self.number = number
        self.tid = tid
        self.nr = nr
        self.args = args


def fd_of(argument: int) -> int:
    """A descriptor argument as the kernel sees it: 32 bits, unsigned."""
    return argument & 0xFFFFFFFF


def signed64(argument: int) -> int:
    return argument - 2**64 if argument >= 2**63 else argument


def signed32(argument: int) -> int:
    argument &= 0xFFFFFFFF
    return argument - 2**32 if argument >= 2**31 else argument
