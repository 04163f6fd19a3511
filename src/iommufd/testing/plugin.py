"""The pytest plugin, installed with the package: a machine or a context as a fixture, and nobody leaks unseen.

::

    @pytest.mark.iommufd(backend="both")
    def test_mapping(iommufd_context):
        with iommufd_context.alloc_ioas() as ioas:
            ...

Fixtures: ``iommufd_context`` (an open :class:`~iommufd.client.context.Context`), ``iommufd_machine`` (the software
:class:`~iommufd.machine.machine.Machine` behind it, also for ``iommufd_machine.popen``), ``iommufd_backend`` (which
backend the test runs on). The marker's arguments: ``backend`` ("software", the default, "kernel" or "both"),
``machine`` (a name, a description file, or a function that makes one; default "mock"), ``kernel`` ("6.6"),
``leaks=False`` (what the test leaves alive is its own affair).

This module is imported in every pytest run of whoever has the package, so it imports nothing of it until a fixture is
used.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import pytest

if TYPE_CHECKING:
    from iommufd.client.backend import Backend
    from iommufd.client.context import Context
    from iommufd.machine.machine import Machine

MARKER = (
    'iommufd(backend="software", machine="mock", kernel=None, leaks=True): what the iommufd fixtures of a test are; '
    'backend is "software", "kernel" or "both"'
)
BACKENDS = {"software": ("software",), "kernel": ("kernel",), "both": ("software", "kernel")}
OPEN = re.compile(r"a /dev/iommu context is still open")
OURS = re.compile(r"/dev/iommu$|/dev/vfio/|anon_inode:\[(iommufd|vfio)|/memfd:iommufd")

_passed = pytest.StashKey[bool]()
_found = pytest.StashKey[list[str]]()  # what the context's fixture found, for the machine's, which ends after it


def _fail(message: str) -> NoReturn:
    """Sentences without a traceback through pytest, which would say nothing about them."""
    pytest.fail(message, pytrace=False)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MARKER)


_Options: TypeAlias = dict[str, Any]
"""The marker's arguments, by name; each is looked at where it is used."""


def _options(node: pytest.Item) -> _Options:
    """The marker's arguments, nearest first, with the defaults. A failure for those it does not have."""
    chosen: _Options = {"backend": "software", "machine": "mock", "kernel": None, "leaks": True}
    for marker in reversed(list(node.iter_markers("iommufd"))):
        unknown = [name for name in marker.kwargs if name not in chosen]
        if marker.args or unknown:
            what = f"no argument {unknown[0]!r}" if unknown else "named arguments only"
            _fail(f"{node.nodeid}: the marker iommufd has {what}; it has: {', '.join(chosen)}")
        chosen.update(marker.kwargs)
    if chosen["backend"] not in BACKENDS:
        _fail(f"{node.nodeid}: there is no backend {chosen['backend']!r} to test on; there are: {', '.join(BACKENDS)}")
    return chosen


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "iommufd_backend" not in metafunc.fixturenames:
        return
    backends = BACKENDS[_options(metafunc.definition)["backend"]]
    if "kernel" in backends and "iommufd_machine" in metafunc.definition.fixturenames:
        asked = metafunc.definition.nodeid
        _fail(
            f"{asked}: a test that asks for iommufd_machine runs on software only; ask for iommufd_context, or leave "
            "backend out"
        )
    metafunc.parametrize("iommufd_backend", backends, indirect=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call":
        item.stash[_passed] = report.passed
    return report


@pytest.fixture
def iommufd_backend(request: pytest.FixtureRequest) -> str:
    """``"software"`` or ``"kernel"``: what this test runs on. Skips where the system has no /dev/iommu for us."""
    name: str = getattr(request, "param", "software")
    if name == "kernel" and not os.access("/dev/iommu", os.R_OK | os.W_OK):
        there = os.path.exists("/dev/iommu")
        pytest.skip("this user may not open /dev/iommu" if there else "this system has no /dev/iommu")
    return name


@pytest.fixture
def iommufd_machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A fresh software machine. At the end programs still running are killed and named, as is what was left alive."""
    options = _options(request.node)
    machine = _make(options["machine"], options["kernel"])
    try:
        yield machine
        leaks = request.node.stash.get(_found, [])
        told = any(leak.startswith("descriptor ") for leak in leaks)
        leaks += _left_by_programs(machine)
        leaks += [leak for leak in machine.leaks() if not (told and OPEN.match(leak))]
        leaks += [
            f"{user.locked_pages} pages are still charged to user {user.uid}"
            for user in machine.world.physical.users.values()
            if user.locked_pages and not machine.contexts
        ]
    finally:
        for program in list(machine.programs):
            program.kill_tree()
        machine.close()
    _judge(request, options, leaks)


@pytest.fixture
def iommufd_context(request: pytest.FixtureRequest, iommufd_backend: str) -> Iterator[Context]:
    """A fresh context; objects, mappings and descriptors that the test leaves alive are named."""
    import iommufd

    options = _options(request.node)
    before = _descriptors()
    machine = request.getfixturevalue("iommufd_machine") if iommufd_backend == "software" else None
    context = iommufd.open(machine, backend=iommufd_backend)
    leaks: list[str] = []
    try:
        yield context
        if not context.closed:
            leaks = _alive(context, machine)
    finally:
        context.close()
        backend = context.backend
    leaks += _open_descriptors(backend, before)
    if machine is None:
        _judge(request, options, leaks)
        return
    machine.left.clear()  # named above, with what the client knows of it
    request.node.stash[_found] = leaks


def _make(machine: object, kernel: str | None) -> Machine:
    from iommufd.machine.machine import Machine
    from iommufd.machine.presets import preset

    if callable(machine):
        made = machine()
        if not isinstance(made, Machine):
            _fail(f"the marker's machine function made a {type(made).__name__}, not a Machine")
        return made
    if not isinstance(machine, str):
        _fail(f"the marker's machine is a name, a file or a function, not {machine!r}")
    try:
        return preset(machine, kernel)
    except (ValueError, OSError) as error:
        why = f"the marker iommufd: {error}"
    _fail(why)


def _left_by_programs(machine: Machine) -> list[str]:
    running = [program for program in list(machine.programs) if program.poll() is None]
    return [f"program {program.args!r} (process {program.pid}) is still running" for program in running]


def _alive(context: Context, machine: Machine | None) -> list[str]:
    """What the test has not closed."""
    if machine is None:
        return [f"{obj!r} was never closed" for obj in context.objects]
    return [leak for leak in machine.leaks() if not OPEN.match(leak)]


def _descriptors() -> dict[int, str]:
    """Our open descriptors that may be files of an iommufd."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            link = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # the one that listed them
            continue
        if OURS.match(link):
            found[int(name)] = link
    return found


def _open_descriptors(backend: Backend, before: dict[int, str]) -> list[str]:
    """Files of the backend that are open although the context is closed."""
    own = getattr(backend, "descriptors", None)
    if own is not None:
        return [f"descriptor {fd} ({own.files[fd].link}) was never closed" for fd in own.numbers]
    return [
        f"descriptor {fd} ({link}) was never closed" for fd, link in sorted(_descriptors().items()) if fd not in before
    ]


def _judge(request: pytest.FixtureRequest, options: _Options, leaks: list[str]) -> None:
    """Fails the teardown of a test that passed and left something alive."""
    if leaks and options["leaks"] and request.node.stash.get(_passed, False):
        _fail("\n".join(["the test left alive:", *(f"  {leak}" for leak in leaks)]))
