"""What a descriptor says of the file behind it, for mapping the file. No kernel object."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

from iommufd.client.buffers import has_fileno
from iommufd.client.errors import IommufdError
from iommufd.client.numbers import number

if TYPE_CHECKING:
    from iommufd.client.buffers import HasFileno


def descriptor(file: HasFileno | int) -> int:
    """The number of an open file; TypeError for what is none."""
    if isinstance(file, int):
        return number(file, "a descriptor", 2**31 - 1)
    if not has_fileno(file):
        raise TypeError(f"{type(file).__name__} is neither a file nor a descriptor")
    return number(file.fileno(), "a descriptor", 2**31 - 1)


def size_of(fd: int) -> int:
    """Bytes of a memfd or dma-buf; the position of the descriptor stays."""
    try:
        found = os.fstat(fd).st_size
        if not found:  # a dma-buf tells its size by seeking only
            here = os.lseek(fd, 0, os.SEEK_CUR)
            found = os.lseek(fd, 0, os.SEEK_END)
            os.lseek(fd, here, os.SEEK_SET)
    except OSError as error:
        raise IommufdError(error.errno or 0, f"the size of descriptor {fd} cannot be known: give a length") from None
    return found


def writeable(fd: int) -> bool:
    """Whether the descriptor was opened for writing."""
    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE)
    except OSError as error:
        raise IommufdError(error.errno or 0, f"descriptor {fd} is not open") from None
