"""`make demo` keeps its promises: it fails if a mapping, a refusal with its reason, or the leak list is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.interposed
def test_the_demo_shows_what_it_promises(tmp_path: Path) -> None:
    """With an empty cache it must also do without a kernel tree."""
    done = subprocess.run(
        [sys.executable, "examples/demo.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "written by a device" in done.stdout


def test_the_program_of_the_demo_knows_nothing_of_the_package() -> None:
    text = (ROOT / "examples/raw_ioctl.py").read_text()
    imported = {line.split()[1] for line in text.splitlines() if line.startswith(("import ", "from "))}
    assert imported <= set(sys.stdlib_module_names)
