"""What tests of programs that use IOMMUs import: checks for any backend, mock devices, replays, a pytest plugin.

Names are imported on first use, so that the plugin costs nothing where nobody uses it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from iommufd.observe.replay import Report, replay
    from iommufd.testing.check import BackendReport, check_backend
    from iommufd.testing.mock import MockAccess, MockDevice

_HOME = {
    "BackendReport": "iommufd.testing.check",
    "MockAccess": "iommufd.testing.mock",
    "MockDevice": "iommufd.testing.mock",
    "Report": "iommufd.observe.replay",
    "check_backend": "iommufd.testing.check",
    "replay": "iommufd.observe.replay",
}

__all__ = ["BackendReport", "MockAccess", "MockDevice", "Report", "check_backend", "replay"]


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(home), name)
    globals()[name] = found
    return found
