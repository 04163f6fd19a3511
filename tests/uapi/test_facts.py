"""Every size, offset and value of uapi/ against what gcc says of the headers (facts/, from make_facts.py)."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import shutil
from enum import IntEnum, IntFlag
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from iommufd.uapi import iommufd, vfio
from iommufd.uapi.declare import Struct

HERE = Path(__file__).parent


def facts(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((HERE / "facts" / f"{name}.json").read_text())
    return loaded


IOMMUFD = facts("iommufd")
VFIO = facts("vfio")


def structs_of(module: ModuleType) -> dict[str, type[Struct]]:
    found = (v for v in vars(module).values() if inspect.isclass(v) and issubclass(v, Struct) and v is not Struct)
    return {s.C_NAME: s for s in found}


def constants_of(module: ModuleType) -> dict[str, int]:
    return {n: v for n, v in vars(module).items() if isinstance(v, int) and n.startswith(("IOMMU", "VFIO"))}


OUR_IOMMUFD = structs_of(iommufd)
OUR_VFIO = structs_of(vfio)

# What uapi/vfio leaves out on purpose (its docstring says so).
LEFT_OUT = re.compile(
    r"""VFIO_(CCW|AP|EEH)_ | vfio_eeh | SPAPR | spapr | ZPCI | zpci | NVLINK2 | nvlink2 | GFX | gfx
    | REGION_TYPE_(GFX|CCW|MIGRATION) | REGION_SUBTYPE_ | _STATE_V1_ | VFIO_DEVICE_STATE_MASK | STATE_NR$
    | vfio_device_migration_info | UAPIVFIO""",
    re.X,
)


@pytest.mark.parametrize("name", IOMMUFD["structs"])
def test_struct_of_iommufd_h(name: str) -> None:
    compare(OUR_IOMMUFD[name], IOMMUFD["structs"][name])


@pytest.mark.parametrize("name", OUR_VFIO)
def test_struct_of_vfio_h(name: str) -> None:
    compare(OUR_VFIO[name], VFIO["structs"][name])


def compare(ours: type[Struct], published: dict[str, Any]) -> None:
    members = {f.c_name: [f.offset, f.size] for f in ours.FIELDS}
    expected = dict(published["members"])
    arrays_of_structs = {m for m, (_, size) in expected.items() if size == 0 and m not in members}
    for member in arrays_of_structs:  # what follows the struct is a struct of its own
        assert expected.pop(member)[0] == ours.SIZE
    assert members == expected
    assert published["size"] == ours.SIZE
    assert arrays_of_structs or published["align"] == ours.ALIGN


def test_iommufd_h_is_complete() -> None:
    assert constants_of(iommufd) == IOMMUFD["constants"]
    assert OUR_IOMMUFD.keys() == IOMMUFD["structs"].keys()


def test_vfio_h_values_agree_and_only_other_platforms_are_left_out() -> None:
    ours = constants_of(vfio)
    published = dict(VFIO["constants"])
    published["VFIO_REGION_TYPE_PCI_VENDOR_TYPE"] &= 0xFFFFFFFF  # 1 << 31, negative as a C int; its member is unsigned
    assert ours == {n: published[n] for n in ours}
    missing = (VFIO["constants"].keys() - ours.keys()) | (VFIO["structs"].keys() - OUR_VFIO.keys())
    assert sorted(n for n in missing if not LEFT_OUT.search(n)) == []


@pytest.mark.parametrize("module", [iommufd, vfio], ids=["iommufd", "vfio"])
def test_enum_members_are_the_constants(module: ModuleType) -> None:
    constants = constants_of(module)
    classes = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, IntEnum | IntFlag)]
    own = [c for c in classes if c.__module__.startswith(module.__name__)]
    assert own
    for cls in own:
        for member, value in cls.__members__.items():
            # WIDTH_8 of VFIO_DEVICE_IOEVENTFD_8; INTX of VFIO_PCI_INTX_IRQ_INDEX
            middle = re.sub(r"^WIDTH", "", member)
            names = [n for n, v in constants.items() if re.search(f"{middle}(_(REGION|IRQ)_INDEX)?$", n) and v == value]
            assert names, f"{cls.__name__}.{member} = {int(value)} is no constant of the header"


def test_the_facts_are_those_of_the_headers_at_hand() -> None:
    folder = os.environ.get("KERNEL_HEADERS")
    if folder is None:
        pytest.skip("set KERNEL_HEADERS to a folder with the iommufd.h and vfio.h of the release in facts/")
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    spec = importlib.util.spec_from_file_location("make_facts", HERE / "make_facts.py")
    assert spec is not None
    assert spec.loader is not None
    make_facts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_facts)
    headers = [Path(folder, f"{name}.h") for name in ("iommufd", "vfio")]
    assert [line for header in headers for line in make_facts.differences(header)] == []
