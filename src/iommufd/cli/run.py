"""``iommufd run -- PROGRAM ARGS…``: runs an unmodified program on a software machine.

Exit status: the program's own (a program that dies of a signal takes this command with it); 125 when the machine or the
supervisor cannot be set up, 126 when the program cannot be executed, 127 when there is none; 1 with ``--check`` when
the program left something behind.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from iommufd.machine.machine import Machine
    from iommufd.observe.trace import TraceWriter

EXIT_SUPERVISOR = 125


class _Parser(argparse.ArgumentParser):
    """Wrong usage is our failure, not the program's: 125, as `env` has it."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(EXIT_SUPERVISOR, f"{self.prog}: {message}\n")


def parser() -> argparse.ArgumentParser:
    made = _Parser(
        prog="iommufd run",
        usage="iommufd run [--machine NAME] [--kernel VERSION] [--explain] [--trace FILE]\n"
        "                   [--check] [--fail RULE] [--grant CAP,…] [--no-pin-tracking]\n"
        "                   [--listen SOCKET | --attach SOCKET] -- PROGRAM [ARG…]",
        description="Run an unmodified program with a software /dev/iommu.",
    )
    made.add_argument(
        "--machine", metavar="NAME", help="the machine (`iommufd machines` lists them), or a description file"
    )
    made.add_argument("--kernel", metavar="VERSION", help="hide what Linux VERSION (such as 6.6) did not have")
    made.add_argument("--explain", action="store_true", help="say on standard error why each failing call failed")
    made.add_argument("--trace", metavar="FILE", help="write one JSON line per call (see `iommufd decode`)")
    made.add_argument("--check", action="store_true", help="list what is alive at the end, and exit 1 if anything is")
    made.add_argument(
        "--fail",
        action="append",
        default=[],
        metavar="RULE",
        help="make calls fail: COMMAND[:nth=N][:every=N][:times=N][:point=NAME][:ERRNO], as IOAS_MAP:nth=3:ENOMEM; "
        "may be given several times",
    )
    made.add_argument(
        "--grant",
        metavar="CAP,…",
        default="",
        help="capabilities the program has on this machine although the host does not give them: ipc_lock, sys_rawio, "
        "sys_resource, or all",
    )
    made.add_argument(
        "--no-pin-tracking",
        action="store_true",
        help="do not follow munmap, madvise and the like: faster, but pinned pages are lost with their address",
    )
    made.add_argument(
        "--listen", metavar="SOCKET", help="let `iommufd run --attach SOCKET` put more programs on this machine"
    )
    made.add_argument("--attach", metavar="SOCKET", help="run the program on the machine that listens there")
    made.add_argument("program", nargs=argparse.REMAINDER, metavar="PROGRAM", help="the program and its arguments")
    return made


def granted(names: str) -> int:
    """``--grant`` as a mask of capability bits; ValueError names what is not known."""
    from iommufd.engine.task import CAPABILITIES

    mask = 0
    for name in filter(None, (part.strip().lower().removeprefix("cap_") for part in names.split(","))):
        if name == "all":
            mask |= sum(1 << bit for bit in CAPABILITIES.values())
        elif name in CAPABILITIES:
            mask |= 1 << CAPABILITIES[name]
        else:
            known = ", ".join(CAPABILITIES)
            raise ValueError(f"--grant {name}: this machine asks for {known} (or all) and nothing else")
    return mask


def say(sentence: str) -> None:
    print(f"iommufd: {sentence}", file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> int:
    options = parser().parse_args(argv)
    program: list[str] = options.program
    if program[:1] == ["--"]:
        program = program[1:]
    if not program:
        parser().error("no program given")

    if options.attach is not None:
        return _attach(options, program)

    from iommufd.interpose.children import end_like
    from iommufd.interpose.launch import LaunchError
    from iommufd.interpose.session import run
    from iommufd.machine.presets import preset

    try:
        machine = preset(options.machine or "default", options.kernel)
        machine.world.granted = granted(options.grant)
        rules = [machine.world.injector.add_rule(text) for text in options.fail]
    except ValueError as error:
        say(str(error))
        return EXIT_SUPERVISOR
    except OSError as error:
        say(f"the machine cannot be read from {options.machine!r}: {error.strerror}")
        return EXIT_SUPERVISOR
    trace: TraceWriter | None = None
    if options.trace is not None:
        try:
            trace = _start_trace(machine, options.trace, program)
        except OSError as error:
            say(f"the trace cannot be written to {options.trace!r}: {error.strerror}")
            return EXIT_SUPERVISOR
    if options.explain:
        from iommufd.observe.explain import Explain

        machine.world.instruments.append(Explain(sys.stderr))
    gc.disable()  # what the engine makes is acyclic, and a collection over a million areas takes a third of a second
    gc.freeze()
    try:
        status = run(machine, program, pin_tracking=not options.no_pin_tracking, listen=options.listen)
    except LaunchError as error:
        say(str(error))
        return error.code
    finally:
        machine.close()
        if trace is not None and (reason := trace.close()) is not None:
            say(f"the trace in {options.trace!r} is not whole: {reason}")
    for text, rule in zip(options.fail, rules, strict=True):
        if not rule.hits:
            say(f"--fail {text} never fired: {rule.count} occurrence{'' if rule.count == 1 else 's'}")
    if options.check and (leaks := machine.leaks()):
        for leak in leaks:
            say(f"left behind: {leak}")
        return 1
    return end_like(status)


def _attach(options: argparse.Namespace, program: Sequence[str]) -> int:
    """``--attach``: the machine is another run's, and so are the options that say what it is."""
    for name in ("machine", "kernel", "explain", "trace", "check", "fail", "grant", "listen"):
        if getattr(options, name):
            parser().error(f"--{name} belongs to the machine: give it to the run that listens, not with --attach")
    from iommufd.interpose.attach import attach
    from iommufd.interpose.children import end_like
    from iommufd.interpose.launch import LaunchError

    try:
        return end_like(attach(options.attach, program, pin_tracking=not options.no_pin_tracking))
    except LaunchError as error:
        say(str(error))
        return error.code


def _start_trace(machine: Machine, path: str, program: Sequence[str]) -> TraceWriter:
    from iommufd.observe.trace import TraceWriter, header

    stream = open(path, "w", encoding="utf-8")  # noqa: SIM115 - the writer closes it
    trace = TraceWriter(stream, header(machine.name, machine.world.kernel, program))
    machine.world.instruments.append(trace)
    return trace
