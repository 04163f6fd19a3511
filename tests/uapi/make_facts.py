"""Writes the facts of a published kernel header: every constant, and size, alignment and members of every struct.

    python tests/uapi/make_facts.py --release 7.3.4 iommufd.h vfio.h    # writes facts/iommufd.json, facts/vfio.json
    python tests/uapi/make_facts.py --check iommufd.h vfio.h            # compares, writes nothing, exits 1 if different

The header is read for names only; every number comes out of a program that gcc compiled with it. Needs gcc. The
committed files let the tests compare ``iommufd.uapi`` with the header where there is no compiler.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FACTS = HERE / "facts"

# what old system headers lack and new uapi headers use
DEFINES = ("-D__user=", "-D__counted_by(x)=", "-D__counted_by_le(x)=")


def _gcc(*arguments: str, source: str | None = None) -> str:
    command = ["gcc", *DEFINES, *arguments]
    return subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout


def _include(header: Path) -> str:
    return f'#include "{header.resolve()}"\n'


def _own_text(header: Path) -> str:
    """The header's own declarations after preprocessing, without those of what it includes."""
    out, own = [], False
    for line in _gcc("-E", "-x", "c", "-", source=_include(header)).splitlines():
        marker = re.match(r'# \d+ "([^"]*)"', line)
        if marker:
            own = marker.group(1) == str(header.resolve())
        elif own:
            out.append(line)
    return "\n".join(out)


def _macros(header: Path) -> list[str]:
    """Names of the object-like macros the header defines, in its order."""
    names = re.findall(r"^[ \t]*#[ \t]*define[ \t]+([A-Za-z]\w*)[ \t]+\S", header.read_text(), re.M)
    return [n for n in dict.fromkeys(names) if n.startswith(("IOMMU", "VFIO"))]


def _enumerators(text: str) -> list[str]:
    names: list[str] = []
    for body in re.findall(r"\benum\b[^{;]*\{([^}]*)\}", text):
        names += [m for item in body.split(",") if (m := item.split("=")[0].strip())]
    return names


def _bodies(text: str) -> dict[str, str]:
    """Body of each named top-level struct; braces inside are kept."""
    found = {}
    for match in re.finditer(r"\bstruct\s+(\w+)\s*\{", text):
        depth, at = 1, match.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        found[match.group(1)] = text[match.end() : at - 1]
    return found


def _members(body: str, bodies: dict[str, str], prefix: str = "") -> list[str]:
    """Paths of the members: those of anonymous unions in place, those of embedded structs behind a dot."""
    body = re.sub(r"\bunion\s*\{(.*?)\}\s*;", r"\1", body, flags=re.S)
    out = []
    for declaration in body.split(";"):
        declaration = re.sub(r"__attribute__\s*\(\(.*?\)\)", " ", declaration).strip()
        match = re.match(r"(.*?)(\w+)\s*(\[\s*\w*\s*\])?$", declaration, re.S)
        if not declaration or match is None:
            continue
        kind, name, is_array = match.group(1).strip(), match.group(2), match.group(3)
        embedded = re.fullmatch(r"struct\s+(\w+)", kind)
        if embedded and not is_array:
            out += _members(bodies[embedded.group(1)], bodies, f"{prefix}{name}.")
        else:
            out.append(prefix + name)
    return out


def _is_integer(header: Path, names: list[str]) -> list[str]:
    """Those of ``names`` that are integer constant expressions (not strings, not function-like)."""
    good = []
    for name in names:
        # gcc's class 1 is "integer"; a string is a pointer, and a function-like or empty macro does not compile
        probe = f'_Static_assert(__builtin_classify_type({name}) == 1, "not an integer");\n'
        try:
            _gcc("-fsyntax-only", "-x", "c", "-", source=_include(header) + probe)
        except subprocess.CalledProcessError:
            continue
        good.append(name)
    return good


def facts_of(header: Path) -> dict[str, Any]:
    """``{"constants": {name: value}, "structs": {name: {"size", "align", "members": {path: [offset, size]}}}}``."""
    text = _own_text(header)
    bodies = _bodies(text)
    constants = _enumerators(text) + _is_integer(header, _macros(header))
    lines = ["#include <stdio.h>", "#include <stddef.h>", _include(header), "int main(void) {"]
    lines += [f'printf("c {name} %lld\\n", (long long)({name}));' for name in constants]
    for name, body in bodies.items():
        tag = f"struct {name}"
        lines.append(f'printf("s {name} %zu %zu\\n", sizeof({tag}), _Alignof({tag}));')
        for path in _members(body, bodies):
            flexible = re.search(rf"\b{re.escape(path)}\s*\[\s*\]", body) is not None
            size = "(size_t)0" if flexible else f"sizeof((({tag} *)0)->{path})"
            lines.append(f'printf("m {name} {path} %zu %zu\\n", offsetof({tag}, {path}), {size});')
    lines.append("return 0; }")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "facts")
        _gcc("-x", "c", "-", "-o", str(program), source="\n".join(lines))
        output = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    result: dict[str, Any] = {"constants": {}, "structs": {}}
    for line in output.splitlines():
        kind, name, *rest = line.split()
        if kind == "c":
            result["constants"][name] = int(rest[0])
        elif kind == "s":
            result["structs"][name] = {"size": int(rest[0]), "align": int(rest[1]), "members": {}}
        else:
            result["structs"][name]["members"][rest[0]] = [int(rest[1]), int(rest[2])]
    return result


def differences(header: Path) -> list[str]:
    """What the committed facts and the header disagree on, one sentence each."""
    committed = json.loads((FACTS / f"{header.stem}.json").read_text())
    found = facts_of(header)
    out = []
    for kind in ("constants", "structs"):
        for name in sorted(committed[kind].keys() | found[kind].keys()):
            ours, theirs = committed[kind].get(name), found[kind].get(name)
            if ours != theirs:
                out.append(f"{header.name}: {name} is {theirs} in the header, {ours} in the facts")
    return out


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed facts instead of writing them")
    parser.add_argument("--release", default="unknown", help="release the headers come from, noted in the files")
    parser.add_argument("headers", nargs="+", type=Path)
    options = parser.parse_args(argv)
    if options.check:
        found = [line for header in options.headers for line in differences(header)]
        print("\n".join(found) or "the facts are current")
        return 1 if found else 0
    for header in options.headers:
        facts = {"header": f"linux/{header.name}", "release": options.release, "abi": "x86_64", **facts_of(header)}
        target = FACTS / f"{header.stem}.json"
        text = json.dumps(facts, indent=1)
        # one line per member instead of four
        text = re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", text)
        target.write_text(text + "\n")
        print(f"{target.name}: {len(facts['constants'])} constants, {len(facts['structs'])} structs")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
