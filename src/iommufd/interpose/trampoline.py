"""What runs between fork and execve when :mod:`.popen` starts a program: install the filter, hand it over, go on.

``subprocess`` starts it as a process of its own (forking an interpreter that has threads is no good), with everything
the caller asked for done already: directory, descriptors, session, user, limits. It changes nothing but the filter and
no_new_privs, and becomes the program with execve, so the process number, the parent and the exit status are the
program's. The environment passed on is the one the kernel gave us, byte for byte.

Arguments: the descriptor of the talk with the supervisor, flags (letters, see FLAGS), the file to execute, its argv.
"""

from __future__ import annotations

import array
import errno
import os
import signal
import socket
import struct
import sys
from typing import NoReturn

from iommufd.interpose.filter import compile_filter, descriptor_range
from iommufd.interpose.launch import REPORT, STEP_EXEC, STEP_PRIVS, STEP_READY, STEP_SECCOMP, install
from iommufd.interpose.libc import PR_SET_NO_NEW_PRIVS, PR_SET_PDEATHSIG, prctl

FLAGS = {"pin_tracking": "p", "die_with_parent": "d", "restore_signals": "s"}
READY = struct.Struct("=cii")  # STEP_READY, base, top; the listener comes beside it


def main() -> NoReturn:
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.set_inheritable(False)
    flags = sys.argv[2]
    program, *argv = (os.fsencode(argument) for argument in sys.argv[3:])
    step = STEP_PRIVS
    try:
        if "d" in flags:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        base, top = _range()
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        step = STEP_SECCOMP
        listener = install(compile_filter(base, top, pin_tracking="p" in flags))
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [listener]))
        channel.sendmsg([READY.pack(STEP_READY, base, top)], [rights])
        os.close(listener)
        if channel.recv(1) != b"g":
            os._exit(1)
        step = STEP_EXEC
        if "s" in flags:
            for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them; a program expects the default
                signal.signal(ignored, signal.SIG_DFL)
        _execute(program, argv)
    except OSError as error:
        channel.send(REPORT.pack(step, error.errno or 0))
    except BaseException:  # whoever waits is told, whatever went wrong
        channel.send(REPORT.pack(step, errno.EINVAL))
    os._exit(127)


def _range() -> tuple[int, int]:
    import resource

    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return descriptor_range(soft if soft != resource.RLIM_INFINITY else 1024)


def _execute(program: bytes, argv: list[bytes]) -> NoReturn:
    """As subprocess does: a name without a slash is looked up in the PATH of the new environment."""
    with open("/proc/self/environ", "rb") as file:
        entries = [entry.partition(b"=") for entry in file.read().split(b"\0") if b"=" in entry]
    env = {name: value for name, _, value in entries}
    candidates = [program]
    if b"/" not in program:
        path = env.get(b"PATH", os.fsencode(os.defpath))
        candidates = [os.path.join(folder or b".", program) for folder in path.split(b":")]
    worst = errno.ENOENT
    for candidate in candidates:
        try:
            os.execve(candidate, argv, env)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                worst = error.errno or worst
    raise OSError(worst, os.strerror(worst))
