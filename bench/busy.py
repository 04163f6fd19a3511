"""A program under the supervisor, beside a device model that computes all the time.

``python -m bench.busy busy|idle PROGRAM [ARG…]``: the machine is ``mock``; with ``busy`` a thread of the supervisor
runs pure Python without a pause, the worst neighbour a device can be.
"""

from __future__ import annotations

import gc
import sys
import threading

from iommufd.interpose.children import end_like
from iommufd.interpose.session import run
from iommufd.machine.presets import preset


class Device(threading.Thread):
    """Computes until told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.over = False
        self.value = 0

    def run(self) -> None:
        while not self.over:
            for number in range(1000):
                self.value = (self.value * 31 + number) & 0xFFFFFFFF


def main(argv: list[str]) -> int:
    device = Device()
    if argv[0] == "busy":
        device.start()
    gc.disable()
    gc.freeze()
    status = run(preset("mock"), argv[1:])
    device.over = True
    return end_like(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
