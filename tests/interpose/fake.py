"""A machine of one character device, to test the interposer without the engine: ``python fake.py LOG PROGRAM ARGS…``.

The device at /dev/iommu obeys the ioctls below (type ``;``); what happens to files is written to LOG, a line each.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, ClassVar

from iommufd.engine.file import POLLIN, POLLOUT, File, Pending
from iommufd.errors import KernelError
from iommufd.interpose import session
from iommufd.interpose.children import end_like
from iommufd.interpose.launch import LaunchError
from iommufd.machine.node import Node, directory, link, text_file
from iommufd.memory.physical import Physical

if TYPE_CHECKING:
    from iommufd.engine.task import Task
    from iommufd.machine.sysfs import Tree

REVERSE = 0x3B80  # 40 bytes at arg are reversed; returns 7
COUNT = 0x3B81  # adds one to the device's count and returns it
SLEEP = 0x3B82  # keeps the supervisor's thread for arg milliseconds, then counts
LATER = 0x3B83  # a deferred answer: arg, after 100 ms
NEVER = 0x3B84  # a deferred answer that never comes
BUG = 0x3B85  # an exception inside the machine
QUEUE = 0x3B86  # writes the descriptor of a new queue as u32 to arg
POST = 0x3B87  # posts a byte (arg) to every queue
CAPS = 0x3B88  # returns the low 31 bits of CAP_IPC_LOCK, real uid and 1: cap << 30 | uid
OPAQUE = 0x3B89  # writes the descriptor of a new file without any operation as u32 to arg
WHOSE = 0x3B8A  # returns the tgid
LISTEN = 0x3B8B  # writes the size of the file behind descriptor *arg (u32) to arg


class Log:
    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_CLOEXEC, 0o644)

    def __call__(self, text: str) -> None:
        os.write(self._fd, f"{text}\n".encode())


class Queue(File):
    """Bytes in, bytes out; a read takes one record of up to 8 bytes, EAGAIN when there is none."""

    carrier: ClassVar[str] = "queue"

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.link = "anon_inode:[queue]"
        self._device = device
        self._bytes = bytearray()

    def post(self, value: int) -> None:
        self._bytes.append(value)
        self._tell()

    def _tell(self) -> None:
        if self.poll_changed is not None:
            self.poll_changed(self.poll())

    def poll(self) -> int:
        return POLLOUT | (POLLIN if self._bytes else 0)

    def read(self, task: Task, addr: int, count: int, pos: int | None = None) -> int:
        if pos is not None:
            raise KernelError(errno.ESPIPE, "a queue has no positions")
        if not self._bytes:
            raise KernelError(errno.EAGAIN, "the queue is empty")
        data = bytes(self._bytes[: min(count, 8)])
        task.write(addr, data)
        del self._bytes[: len(data)]
        self._tell()
        return len(data)

    def release(self) -> None:
        self._device.queues.remove(self)
        self._device.log("queue released")
        self._device.put()


class Opaque(File):
    def __init__(self, device: Device) -> None:
        super().__init__()
        self.link = "anon_inode:[opaque]"
        self._device = device

    def release(self) -> None:
        self._device.log("opaque released")


class Device(File):
    """One open of /dev/iommu."""

    mappable: ClassVar[bool] = True

    def __init__(self, log: Log, flags: int) -> None:
        super().__init__()
        self.link = "/dev/iommu"
        self.mode = flags & 3
        self.log = log
        self.count = 0
        self.queues: list[Queue] = []
        self.mappings = 0
        log("opened")

    def ioctl(self, task: Task, cmd: int, arg: int) -> int | Pending:
        handler = self.HANDLERS.get(cmd)
        if handler is None:
            raise KernelError(errno.ENOTTY, f"no ioctl {cmd:#x}")
        return handler(self, task, arg)

    def reverse(self, task: Task, arg: int) -> int:
        task.write(arg, task.read(arg, 40)[::-1])
        return 7

    def add_one(self, task: Task, arg: int) -> int:
        self.count += 1
        return self.count

    def sleep(self, task: Task, arg: int) -> int:
        time.sleep(arg / 1000)
        self.count += 1
        return self.count

    def later(self, task: Task, arg: int) -> Pending:
        pending = Pending()
        threading.Timer(0.1, pending.finish, (arg,)).start()
        return pending

    def never(self, task: Task, arg: int) -> Pending:
        self.log("waiting")
        return Pending(lambda: self.log("dropped"))

    def bug(self, task: Task, arg: int) -> int:
        raise ValueError("the device is broken")

    def open_queue(self, task: Task, arg: int) -> int:
        fd = task.reserve_fd(True)
        task.write(arg, fd.to_bytes(4, "little"))
        queue = Queue(self)
        self.queues.append(queue)
        self.get()
        task.install_fd(fd, queue)
        return 0

    def open_opaque(self, task: Task, arg: int) -> int:
        fd = task.reserve_fd(False)
        task.write(arg, fd.to_bytes(4, "little"))
        task.install_fd(fd, Opaque(self))
        return 0

    def post(self, task: Task, arg: int) -> int:
        for queue in self.queues:
            queue.post(arg)
        return len(self.queues)

    def caps(self, task: Task, arg: int) -> int:
        return task.capable(14) << 30 | task.process.user.uid

    def whose(self, task: Task, arg: int) -> int:
        return task.process.tgid

    def size_of_file(self, task: Task, arg: int) -> int:
        file = task.file(int.from_bytes(task.read(arg, 4), "little", signed=True))
        if isinstance(file, File):
            return 1
        task.write(arg, file.size().to_bytes(4, "little"))
        file.close()
        return 0

    HANDLERS: ClassVar[dict[int, Callable[[Device, Task, int], int | Pending]]] = {
        REVERSE: reverse,
        COUNT: add_one,
        SLEEP: sleep,
        LATER: later,
        NEVER: never,
        BUG: bug,
        QUEUE: open_queue,
        POST: post,
        CAPS: caps,
        OPAQUE: open_opaque,
        WHOSE: whose,
        LISTEN: size_of_file,
    }

    def mmap(self, task: Task, offset: int, length: int, prot: int, shared: bool) -> tuple[int, int]:
        """One page at 0x1000, filled with m; a mapping holds the file."""
        if offset != 0x1000 or length != 4096:
            raise KernelError(errno.ENXIO, f"nothing at {offset:#x}")
        os.pwrite(self.memory_fd, b"m" * 4096, 0x1000)
        self.mapping_opened(offset)
        return self.memory_fd, offset

    def mapping_opened(self, offset: int) -> None:
        self.get()
        self.mappings += 1
        self.log(f"mappings {self.mappings}")

    def mapping_closed(self, offset: int) -> None:
        self.mappings -= 1
        self.log(f"mappings {self.mappings}")
        self.put()

    def release(self) -> None:
        self.log(f"released {self.count}")


class Machine:
    """What the interposer asks of a machine."""

    def __init__(self, log: Log) -> None:
        self.world = SimpleNamespace(physical=Physical(), instruments=[], granted=0)
        self.generation = 0
        self._tree: Tree | None = None

        def opener(task: object, flags: int) -> File:
            return Device(log, flags)

        device = stat.S_IFCHR | 0o666
        nodes = (
            Node("/dev/iommu", device, (10, 125), opener),
            directory("/dev/vfio", whole=True),
            Node("/dev/vfio/vfio", device, (10, 196), opener),
            Node("/dev/private-iommu", stat.S_IFCHR | 0o600, (10, 126), opener),
            text_file("/sys/class/iommu-fake/unit0/name", "unit"),
            link("/sys/class/iommu-fake/first", "/sys/class/iommu-fake/unit0"),
        )
        self._nodes = {node.path: node for node in nodes}

    def paths(self) -> dict[str, Node]:
        return dict(self._nodes)

    def node(self, path: str) -> Node | None:
        return self._nodes.get(path)

    def open(self, path: str, task: Task | None, flags: int) -> File | None:
        node = self._nodes.get(path)
        return node.opener(task, flags) if node is not None and node.opener is not None else None

    @property
    def tree(self) -> Tree:
        if self._tree is None:
            from iommufd.machine.sysfs import Tree

            self._tree = Tree(self._nodes.values())
        return self._tree

    def close(self) -> None:
        if self._tree is not None:
            self._tree.close()


def main(argv: list[str]) -> int:
    machine = Machine(Log(argv[0]))
    try:
        status = session.run(machine, argv[1:])  # type: ignore[arg-type]  # a machine as far as programs see
    except LaunchError as error:
        print(f"iommufd: {error}", file=sys.stderr)
        return error.code
    finally:
        machine.close()
    return end_like(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
