"""The house keeps its shape: imports point downwards, modules stay small and say what they are, starting is light.

The arrows are contracts in pyproject.toml, checked by ``make lint`` and here, so that ``make test`` alone tells.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest

import iommufd

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src/iommufd"
MODULES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = ("src", "tests", "tools", "examples", "bench")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("iommufd", cache_dir=None)


def imports(graph: grimp.ImportGraph, importer: str, imported: str) -> Iterator[str]:
    """Direct imports from anything in ``importer`` to anything in ``imported`` (both may not exist yet)."""
    for module in graph.modules:
        if module == importer or module.startswith(importer + "."):
            for target in graph.find_modules_directly_imported_by(module):
                if target == imported or target.startswith(imported + "."):
                    yield f"{module} imports {target}"


def test_the_contracts_of_pyproject_hold() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command as c; c()",
            "--no-cache",
            "--no-logo",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("importer", ["engine", "client", "selftest", "vfio", "legacy", "interpose", "cli"])
def test_only_the_machine_knows_iommu_drivers(graph: grimp.ImportGraph, importer: str) -> None:
    assert not list(imports(graph, f"iommufd.{importer}", "iommufd.iommu.drivers"))


def test_the_client_proper_knows_no_engine(graph: grimp.ImportGraph) -> None:
    """Only the software backend reaches the machine; everything else of the client would work without it."""
    rooms = ("engine", "machine", "memory", "iommu", "selftest", "vfio", "legacy", "pagetable", "interpose")
    found = [line for room in rooms for line in imports(graph, "iommufd.client", f"iommufd.{room}")]
    assert not [line for line in found if not line.startswith("iommufd.client.backends.software")]


def test_no_module_of_the_package_imports_the_tests_tools(graph: grimp.ImportGraph) -> None:
    for path in MODULES:
        for line in path.read_text().splitlines():
            assert not line.startswith(("import tools", "from tools", "import tests", "from tests")), path


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_says_what_it_is(path: Path) -> None:
    tree = ast.parse(path.read_text())
    if tree.body:
        assert ast.get_docstring(tree), f"{path.relative_to(ROOT)} has no docstring"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_is_one_idea(path: Path) -> None:
    """About 500 lines; tables of facts (uapi) may be longer."""
    limit = 1100 if path.is_relative_to(PACKAGE / "uapi") else 650
    assert len(path.read_text().splitlines()) <= limit


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_left_for_later(path: Path) -> None:
    words = ["TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error"]
    text = path.read_text()
    assert not [word for word in words if word in text]


def modules_after(code: str) -> set[str]:
    """The modules a fresh interpreter has loaded after ``code``."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
        check=True,
        text=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("code", ["import iommufd", "import iommufd.cli.main", "import iommufd.machine.presets"])
def test_heavy_libraries_are_imported_on_first_use(code: str) -> None:
    """design 7: `iommufd run` and `import iommufd` start without them."""
    assert not {"numpy", "typer", "rich", "hypothesis", "pytest"} & modules_after(code)


def test_the_version_is_known() -> None:
    assert iommufd.__version__.count(".") == 2
