"""Subjects over software machines in this process, chosen by what a check needs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from iommufd.client.backends.software import SoftwareBackend
from iommufd.machine.presets import preset
from iommufd.testing.subject import Subject

MACHINES = {"vtd": "edu", "noiommu": "edu-noiommu"}
"""What a check needs -> the machine that has it."""


def machine_for(needs: frozenset[str]) -> str:
    """The preset that a check is played on: the mock hardware, bit for bit, unless it ``needs`` another."""
    return next((MACHINES[need] for need in sorted(needs & MACHINES.keys())), "mock@7.3.4")


def software_subject(needs: frozenset[str] = frozenset()) -> Subject:
    """A fresh machine with what a check ``needs``, its memory events wired to the subject's arena.

    The caller has every capability, as root on the machine where transcripts are recorded."""
    backend = SoftwareBackend(preset(machine_for(needs)))
    backend.owner.pretended = 2**64 - 1

    @contextlib.contextmanager
    def powerless() -> Iterator[None]:
        backend.owner.pretended = 0
        yield
        backend.owner.pretended = 2**64 - 1

    tree = backend.machine.tree
    return Subject(
        backend,
        before_unmap=backend.owner.space.unmap,
        numbers=lambda: set(backend.descriptors.numbers),
        readlink=lambda path: os.path.realpath(tree.real(path)),
        powerless=powerless,
    )
