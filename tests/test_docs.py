"""The documents: links inside the repository lead somewhere, what they name exists, and the code in the guide does what
it says there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from iommufd.machine.presets import PRESETS
from tests import snippets

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\[[^]]*\]\(([^)#\s]*)(?:#([^)]*))?\)")
WITH_CODE = [
    *(path for path in sorted((ROOT / "docs").glob("*/*.md")) if path.name not in ("machines.md", "testing.md")),
    *(ROOT / "docs" / name for name in ("vfio.md", "fault-injection.md")),
]  # the two are of tests/test_guide.py
EXAMPLES = sorted({*(ROOT / "examples").glob("*.py")} - {ROOT / "examples/demo.py"})  # tests/test_demo.py has that one


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target, anchor in LINK.findall(path.read_text()):
        if target.startswith(("http:", "https:")):
            continue
        there = path.parent / target if target else path
        assert there.exists(), f"{path.name} links to {target}"
        assert not anchor or anchor in anchors(there), f"{path.name} links to #{anchor} of {there.name}"


@pytest.mark.parametrize("folder", ["docs", "docs/guide", "docs/objects"])
def test_every_page_is_in_the_index_of_its_folder(folder: str) -> None:
    index = (ROOT / folder / "README.md").read_text()
    for path in (ROOT / folder).glob("*.md"):
        assert path.name == "README.md" or f"({path.name}" in index, f"{folder}/README.md does not link {path.name}"


@pytest.mark.parametrize("path", WITH_CODE, ids=lambda path: str(path.relative_to(ROOT / "docs")))
def test_the_programs_of_the_guide_print_what_it_says(path: Path) -> None:
    snippets.run_python(path)


@pytest.mark.interposed
@pytest.mark.parametrize("path", WITH_CODE, ids=lambda path: str(path.relative_to(ROOT / "docs")))
def test_the_commands_of_the_guide_print_what_it_says(path: Path) -> None:
    snippets.run_console(path)


@pytest.mark.parametrize(
    ("wrong", "why"), [("```text\n1\n```", "line 5"), ("```python\n1 / 0\n```", "ZeroDivisionError")]
)
def test_a_page_that_is_wrong_is_found(tmp_path: Path, wrong: str, why: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"```python\nprint(2)\n```\n{wrong}\n")
    with pytest.raises(AssertionError, match=why):
        snippets.run_python(page)
    page.write_text("```console\n$ echo 1\n2\n```\n")
    with pytest.raises(AssertionError, match="echo 1"):
        snippets.run_console(page)


def test_what_stands_for_anything() -> None:
    assert snippets.like("a … b\n⋮\nend", "a 1 b\nx\ny\nend\n") and snippets.like("⋮\nend", "end")
    assert not snippets.like("a …", "a 1\n2") and not snippets.like("a", "ab") and not snippets.like("⋮\nend", "end\nx")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_run(path: Path) -> None:
    """As their docstrings say; what needs a real device or a machine around it has tests of its own."""
    text = path.read_text()
    if "IOMMUFD_MACHINE=mock" not in text and "IOMMUFD_BACKEND=software" not in text:
        others = {"raw_ioctl.py": "tests/test_demo.py", "vfio_edu.py": "the VM of `make oracle`"}
        assert path.name in others, f"nothing runs {path.name}"
        return
    env = {name: value for name, value in os.environ.items() if not name.startswith("IOMMUFD_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path)], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False,
        env={**env, "IOMMUFD_MACHINE": "mock"},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout and not done.stderr, done.stdout + done.stderr


def test_every_defect_a_machine_repeats_is_a_known_deviation() -> None:
    text = (ROOT / "docs/deviations.md").read_text()
    for name, preset in PRESETS.items():
        if "@" in name:
            for defect in preset.build(name, (7, 3)).world.defects:
                assert f"`{defect}`" in text, f"docs/deviations.md does not list {defect} of {name}"


@pytest.mark.parametrize("target", re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
def test_every_make_target_is_explained(target: str) -> None:
    assert f"make {target}" in (ROOT / "CONTRIBUTING.md").read_text()
