"""A Subject over a software machine in this process."""

from __future__ import annotations

from iommufd.client.backends.software import SoftwareBackend
from iommufd.machine.presets import preset
from iommufd.testing.subject import Subject


def software_subject(machine: str = "mock@7.3.4") -> Subject:
    """A fresh machine of a preset, its memory events wired to the subject's arena.

    The caller has every capability, as root on the machine where transcripts are recorded."""
    backend = SoftwareBackend(preset(machine))
    backend.owner.pretended = 2**64 - 1
    return Subject(backend, before_unmap=backend.owner.space.unmap)
