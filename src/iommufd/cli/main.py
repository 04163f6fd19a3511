"""The command ``iommufd``: one module per sub-command, imported when it is called.

``iommufd SUB ARGS…`` runs ``iommufd.cli.SUB.main(ARGS) -> int``; the integer is the exit status. Wrong usage of the
command itself is exit status 2.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import NoReturn, Protocol, cast


class SubCommand(Protocol):
    """What a module of this package offers."""

    __doc__: str | None

    def main(self, argv: Sequence[str]) -> int: ...


def sub_commands() -> list[str]:
    """The names there are, sorted."""
    import pkgutil

    import iommufd.cli

    return sorted(m.name for m in pkgutil.iter_modules(iommufd.cli.__path__) if m.name != "main" and m.name[0] != "_")


def load(name: str) -> SubCommand | None:
    """The module of a sub-command, None when there is none of that name."""
    module = f"iommufd.cli.{name.replace('-', '_')}"
    if name in ("main", "") or not name.replace("-", "").isalnum() or importlib.util.find_spec(module) is None:
        return None
    return cast("SubCommand", importlib.import_module(module))  # a module is what it has: no checker can know


def usage() -> str:
    from iommufd.cli._text import wrapped

    lines = ["usage: iommufd SUB-COMMAND ARGUMENTS…", ""]
    lines += ["Linux's IOMMU user API (/dev/iommu), complete in user space.", ""]
    for name in sub_commands():
        module = load(name)
        first = (module.__doc__ or "").strip().partition("\n")[0] if module is not None else ""
        lines.append(wrapped(f"  {name:<10}{first.partition(': ')[2] or first}", indent=12))
    lines += ["", "`iommufd SUB-COMMAND --help` says more."]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Runs one sub-command and returns the exit status."""
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name in ("-V", "--version"):
        from iommufd import __version__

        print(f"iommufd {__version__}")
        return 0
    module = load(name)
    if module is None:
        print(f"iommufd: there is no sub-command {name!r}; there are: {', '.join(sub_commands())}", file=sys.stderr)
        return 2
    return module.main(argv[1:])


def main_entry() -> NoReturn:
    """The console script."""
    try:
        code = main(sys.argv[1:])
    except BrokenPipeError:  # whoever read our output has had enough
        sys.stdout = None
        code = 1
    sys.exit(code)
