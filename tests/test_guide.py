"""The guide's examples run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from iommufd.machine.description import load

GUIDE = Path(__file__).parent.parent / "docs/guide"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = ("machines", "testing")
BLOCKS = [
    pytest.param(kind, text, id=f"{page}-{number}")
    for page in PAGES
    for number, (kind, text) in enumerate(BLOCK.findall((GUIDE / f"{page}.md").read_text()))
]


@pytest.mark.interposed
@pytest.mark.parametrize(("kind", "text"), BLOCKS)
def test_an_example_of_the_guide(kind: str, text: str, tmp_path: Path) -> None:
    assert kind in ("python", "toml")
    if kind == "toml":
        (tmp_path / "described.toml").write_text(text)
        assert len(load(tmp_path / "described.toml").devices) == 2
        return
    path = tmp_path / "test_example.py"
    path.write_text(text)
    how = ["-m", "pytest", "-q", "-p", "no:cacheprovider"] if "\ndef test_" in text else []
    done = subprocess.run(
        [sys.executable, *how, str(path)], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
