"""Fixtures of the interposer's tests: see harness.py."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.interpose.harness import Compile, Supervised


@pytest.fixture
def supervised(tmp_path: Path) -> Supervised:
    return Supervised(tmp_path)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Compiles a C program with gcc; skips the test where there is none."""
    folder = tmp_path_factory.mktemp("c")

    def build(source: str, *options: str) -> str:
        gcc = shutil.which("gcc")
        if gcc is None:
            pytest.skip("there is no gcc here to build the program with")
        name = folder / f"program{len(list(folder.iterdir()))}"
        done = subprocess.run(
            [gcc, "-O1", "-x", "c", "-", "-o", str(name), *options],
            input=source,
            text=True,
            capture_output=True,
            check=False,
        )
        if done.returncode and "-static" in options:
            pytest.skip("gcc cannot link statically here")
        assert done.returncode == 0, done.stderr
        return str(name)

    return build
