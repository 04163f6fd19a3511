"""`iommufd machines`: the list, one machine, wrong names."""

from __future__ import annotations

from pathlib import Path

import pytest

from iommufd.cli.machines import main
from iommufd.machine.presets import PRESETS


def test_every_machine_that_can_be_named_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines if line.strip()} >= set(PRESETS)


def test_what_one_has(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["mock@7.3.4"]) == 0
    shown = capsys.readouterr().out
    assert "test hardware" in shown
    assert "defect" in shown
    path = tmp_path / "mine.toml"
    path.write_text("[[iommu]]\nname = 'unit'\ndirty = true\n[[device]]\naddress = '0000:01:00.0'\nvendor = 0x8086\n")
    assert main([str(path), "--kernel", "6.6"]) == 0
    shown = capsys.readouterr().out
    assert "machine mine" in shown
    assert "Linux 6.6" in shown
    assert "dirty tracking" in shown
    assert "8086:10f0 behind unit, group 0" in shown


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "there is no machine 'nowhere'; there are: default"),
        (["./missing.toml"], "./missing.toml: No such file"),
        (["default", "--kernel", "6.1"], "it came with 6.2"),
    ],
)
def test_a_wrong_name_is_one_sentence(capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str) -> None:
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
