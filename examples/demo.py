"""`make demo`: an unmodified program on a software /dev/iommu.

The program is the distribution's own python3; its script, examples/raw_ioctl.py, knows nothing of this package. The
demo also checks what it shows (a mapping, a refused call and why, the areas left at exit): it fails if one is missing.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from tools import kernel_tree  # noqa: E402 - a script of this repository, found by its folder
from tools.selftest_report import collect  # noqa: E402 - likewise

PROMISED = (
    "written by a device",  # the mapping works
    "overlaps the area [0x1000000, 0x10fffff]",  # a refused call, and why
    "still maps [0x1000000, 0x10fffff], 1 MiB",  # the areas left at exit
)


def interpreter() -> str:
    """The distribution's python3: a program nobody built for this demo."""
    return "/usr/bin/python3" if Path("/usr/bin/python3").exists() else sys.executable


def show(console: Console, line: str) -> None:
    """A line of the program as it is; a line of ours in colour, the reason on a line of its own."""
    if not line.startswith("iommufd: "):
        console.print(Text(line), soft_wrap=True)
        return
    what, _, why = line.partition("  # ")
    console.print(Text(what, style="yellow"), soft_wrap=True)
    if why:
        console.print(Text(f"    why: {why}", style="bold yellow"), soft_wrap=True)


def run(command: list[str], console: Console) -> tuple[int, str]:
    """Runs the command, showing its output as it comes; returns its exit code and all it printed."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    text: list[str] = []
    for line in process.stdout:
        text.append(line)
        show(console, line.rstrip("\n"))
    return process.wait(), "".join(text)


def selftest(console: Console) -> None:
    """The kernel's own test program, where it was built before; else how to get it."""
    console.print()
    built = kernel_tree.cached("selftests/iommufd")
    if built is None:
        tree = os.environ.get("KERNEL_SRC") or kernel_tree.cached(f"linux-source-{kernel_tree.VERSION}")
        if shutil.which("gcc") and tree:
            console.print("gcc and a kernel tree are here: [bold]make conformance[/] runs the kernel's own selftest.")
        else:
            console.print(
                "With gcc, [bold]make conformance[/] runs the kernel's own selftest program"
                " (KERNEL_SRC=/path/to/linux, or Debian's kernel source)."
            )
        return
    command = [sys.executable, "-m", "iommufd", "run", "--machine", "mock", "--", str(built), "-f", "iommufd_ioas"]
    console.print(Text("$ iommufd run --machine mock -- selftests/iommufd -f iommufd_ioas", style="bold cyan"))
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    report = collect(done.stdout.splitlines())
    console.print(
        f"the kernel's own selftest, fixture iommufd_ioas: {len(report.passed())} of {report.planned} cases"
        " pass ([bold]make conformance[/] runs all of them)"
    )


def main() -> int:
    console = Console(highlight=False)
    console.print(
        Panel(
            "An unmodified program opens [bold]/dev/iommu[/], maps memory, and a device writes into it.\n"
            f"This host has {'a' if Path('/dev/iommu').exists() else 'no'} /dev/iommu; "
            f"you are {'root' if os.geteuid() == 0 else 'an ordinary user'}; the program is "
            f"[bold]{interpreter()}[/].",
            title="iommufd",
            border_style="cyan",
        )
    )
    options = ["run", "--machine", "mock", "--explain", "--check", "--"]
    program = [interpreter(), "-u", str(HERE / "raw_ioctl.py")]
    shown = shlex.join(["iommufd", *options, "python3", "-u", "examples/raw_ioctl.py"])
    console.print(Text(f"$ {shown}", style="bold cyan"), soft_wrap=True)
    code, text = run([sys.executable, "-m", "iommufd", *options, *program], console)

    missing = [what for what in PROMISED if what not in text]
    if code != 1 or missing:
        console.print(
            f"[bold red]demo: exit code {code} (1 was due: it left mappings behind)"
            + (f", not shown: {', '.join(missing)}" if missing else "")
        )
        return 1
    console.print(
        "\nThe program saw an errno; [bold]--explain[/] said why. [bold]--check[/] named what it left behind"
        " and made the exit code 1, as for any leaking program."
    )
    selftest(console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
