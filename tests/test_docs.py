"""The documents: links inside the repository lead somewhere, and what they name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from iommufd.machine.presets import PRESETS

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\[[^]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in LINK.findall(path.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs/README.md").read_text()
    for path in (ROOT / "docs").glob("*.md"):
        assert path.name == "README.md" or f"({path.name})" in index, f"docs/README.md does not link {path.name}"


def test_every_defect_a_machine_repeats_is_a_known_deviation() -> None:
    text = (ROOT / "docs/deviations.md").read_text()
    for name, preset in PRESETS.items():
        if "@" in name:
            for defect in preset.build(name, (7, 3)).world.defects:
                assert f"`{defect}`" in text, f"docs/deviations.md does not list {defect} of {name}"


@pytest.mark.parametrize("target", re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
def test_every_make_target_is_explained(target: str) -> None:
    assert f"make {target}" in (ROOT / "CONTRIBUTING.md").read_text()
