"""What is public, name by name: the packages, the modules of the API reference, what each has, how it is called.

tests/public_names.txt says what that is. Whoever adds, renames or drops something sees it there and decides that it is
meant: ``python -m tests.test_public_names`` writes the file anew.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import TypeVar

HERE = Path(__file__).parent
PINNED = HERE / "public_names.txt"
PACKAGES = ("iommufd", "iommufd.testing", "iommufd.client.vfio")
PLAIN = (int, float, str, bytes, bool, type(None), tuple)


def modules() -> list[str]:
    """Those of the API reference, from docs/conf.py; not the headers, which tests/uapi holds against the published
    ones."""
    for node in ast.parse((HERE.parent / "docs/conf.py").read_text()).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "API":
            assert node.value is not None
            listed = [module for _, _, modules in ast.literal_eval(node.value).values() for module in modules]
            return [module for module in listed if not module.startswith(("iommufd.uapi.iommufd", "iommufd.uapi.vfio"))]
    raise LookupError("docs/conf.py has no API")


def signature(function: object) -> str:
    """``(a, b=None, *, c)``; annotations are for type checkers."""
    if not callable(function):
        return ""
    shown = []
    for parameter in inspect.signature(function).parameters.values():
        default = parameter.default
        if isinstance(default, Enum):
            default = Word(str(default.value))
        elif default is not parameter.empty and type(default) not in PLAIN:
            default = Word("...")
        shown.append(parameter.replace(annotation=parameter.empty, default=default))
    return str(inspect.Signature(shown))


class Word:
    """Is shown as it is."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def attributes(cls: type) -> list[str]:
    """What instances have beside what their class has: members of slots and dataclasses, and what ``__init__`` sets."""
    found = dict.fromkeys([*vars(cls).get("__annotations__", {}), *vars(cls).get("__slots__", ())])
    if "__init__" in vars(cls):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(cls.__init__)))  # type: ignore[misc]  # of this class
        except OSError:  # dataclasses write theirs
            return sorted(name for name in found if not name.startswith("_"))
        for node in ast.walk(tree):
            match node:
                case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                    found[name] = None
    return sorted(name for name in found if not name.startswith("_"))


def described(cls: type, path: str) -> Iterator[str]:
    """A class: what it is derived from, how it is made, and what it has of its own."""
    bases = ", ".join(base.__name__ for base in cls.__bases__ if base is not object)
    yield f"{path}{f'  of {bases}' if bases else ''}"
    if (
        "__init__" in vars(cls)
        and not issubclass(cls, Enum | BaseException)
        and not getattr(cls, "_is_protocol", False)
    ):
        yield f"{path}{signature(cls)}"
    if issubclass(cls, Enum):
        yield from (f"{path}.{name} = {member.value}" for name, member in cls.__members__.items())
    own = {name for name in vars(cls) if not name.startswith("_")}
    for name in sorted(own | set(attributes(cls))):
        value = inspect.getattr_static(cls, name, None)
        function = getattr(value, "__func__", value)  # of class methods
        if inspect.isfunction(function) and name in own:
            yield f"{path}.{name}{signature(function)}"
        elif not (issubclass(cls, Enum) and name in cls.__members__):
            yield f"{path}.{name}"


def defined_in(module: ModuleType) -> list[str]:
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and getattr(value, "__module__", None) == module.__name__
        and not isinstance(value, ModuleType | TypeVar)
    )


def public() -> list[str]:
    """A line for every name."""
    lines = [f"{package}: {name}" for package in PACKAGES for name in sorted(importlib.import_module(package).__all__)]
    for name in modules():
        module = importlib.import_module(name)
        for member in defined_in(module):
            value = getattr(module, member)
            if isinstance(value, type):
                lines += described(value, f"{name}.{member}")
            else:
                lines.append(f"{name}.{member}{signature(value) if inspect.isfunction(value) else ''}")
    return lines


def test_the_public_names_are_those_of_the_file() -> None:
    pinned, found = PINNED.read_text().splitlines(), public()
    changes = "\n".join(difflib.unified_diff(pinned, found, "tests/public_names.txt", "the package", lineterm="", n=0))
    assert pinned == found, changes


def test_everything_exported_has_a_page() -> None:
    """A name that a package exports is in a module of the API reference."""
    listed = set(modules())
    for package in PACKAGES:
        for name in importlib.import_module(package).__all__:
            home = getattr(importlib.import_module(package), name).__module__
            assert home in listed, f"{package}.{name} is in {home}"


def test_everything_public_says_what_it_is() -> None:
    silent = []
    for name in modules():
        module = importlib.import_module(name)
        silent += [name] if not module.__doc__ else []
        for member in defined_in(module):
            value = getattr(module, member)
            if not (value.__doc__ or "").strip() and not member.startswith("pytest_"):  # pytest's own hooks
                silent.append(f"{name}.{member}")
            for inner in vars(value) if isinstance(value, type) else ():
                held = inspect.getattr_static(value, inner)
                function = held.fget if isinstance(held, property) else getattr(held, "__func__", held)
                if (
                    not inner.startswith("_")
                    and inspect.isfunction(function)
                    and not inspect.getdoc(getattr(value, inner))
                ):
                    silent.append(f"{name}.{member}.{inner}")
    assert silent == []


if __name__ == "__main__":
    PINNED.write_text("\n".join([*public(), ""]))
