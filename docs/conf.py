"""`make docs`: every page of the repository and the API reference as one site in build/docs.

The source folder is the repository's root, so that links from page to page are the same here, in an editor and on a
code host. Pages are Markdown (MyST); the API reference comes from docstrings (autodoc), one page for each module in
API below, written to docs/api/ before each build. Strict: the Makefile passes -W and -n, so that a link, an anchor or a
name in a docstring that leads nowhere ends the build. Nothing is fetched: names of other projects are plain text.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

import iommufd  # noqa: E402 - the tree's own

project = "iommufd for Python"
author = "the iommufd for Python authors"
version = release = iommufd.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]

root_doc = "README"
include_patterns = ["*.md", "docs/**"]
exclude_patterns = [".*", "build", "dist", "src", "tests", "tools", "bench", "examples", "docs/conf.py"]
html_theme = "furo"
html_title = project
html_copy_source = False
pygments_style = "friendly"
myst_heading_anchors = 4
suppress_warnings = [
    "myst.header",  # a generated page begins its tables two levels down
    "ref.python",  # two classes have a member called as a builtin is; missing names are "ref.class" and so on
]
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "undoc-members": True, "show-inheritance": True}
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 100
toc_object_entries = False

# The order of the site: a heading, and pages (globs are sorted).
CONTENTS = {
    "Guide": [
        "docs/guide/README",
        *(f"docs/guide/{name}" for name in ("install", "tasks", "running", "python", "testing", "machines", "failing")),
        "docs/guide/*",
    ],
    "Kernel objects": [
        "docs/objects/README",
        *(f"docs/objects/{name}" for name in ("ioas", "hwpt-paging", "hwpt-nested", "device", "access", "fault-queue")),
        *(f"docs/objects/{name}" for name in ("viommu", "vdevice", "veventq", "hw-queue")),
        "docs/objects/*",
    ],
    "API reference": ["docs/api/index"],
    "More": ["docs/README", "docs/vfio", "docs/fault-injection", "docs/*", "CONTRIBUTING", "*"],
}

# The API reference: a page's title, what it is for, and its modules.
API: dict[str, tuple[str, str, list[str]]] = {
    "client": (
        "iommufd: contexts, address spaces, devices",
        "What :mod:`iommufd` exports (``iommufd.open``, ``iommufd.IOAS``, ...), under the modules it is written in.",
        [
            "iommufd.client.context",
            "iommufd.client.ioas",
            "iommufd.client.mapping",
            "iommufd.client.hwpt",
            "iommufd.client.device",
            "iommufd.client.objects",
            "iommufd.client.handle",
            "iommufd.client.errors",
            "iommufd.client.backend",
        ],
    ),
    "virtual": (
        "iommufd: queues, virtual IOMMUs, vendors' data",
        "What a VMM needs beyond address spaces.",
        [
            "iommufd.client.queues",
            "iommufd.client.fault_queue",
            "iommufd.client.viommu",
            "iommufd.client.veventq",
            "iommufd.client.nesting",
            "iommufd.client.invalidation",
            "iommufd.client.hw_info",
        ],
    ),
    "vfio": (
        "iommufd: VFIO devices",
        "``context.open_device(...)`` gives a :class:`VFIODevice`.",
        [
            "iommufd.client.vfio.device",
            "iommufd.client.vfio.regions",
            "iommufd.client.vfio.irqs",
            "iommufd.client.vfio.migration",
            "iommufd.client.vfio.dma_log",
            "iommufd.client.vfio.discovery",
        ],
    ),
    "machine": (
        "iommufd.machine: software machines",
        "What the software backend and ``iommufd run`` run on, built, looked into and run programs on.",
        [
            "iommufd.machine.machine",
            "iommufd.machine.presets",
            "iommufd.machine.snapshot",
            "iommufd.machine.description",
            "iommufd.vfio.pci_config",
            "iommufd.vfio.pci_function",
            "iommufd.interpose.popen",
            "iommufd.interpose.attach",
        ],
    ),
    "uapi": (
        "iommufd.uapi: the structs and numbers",
        "``linux/iommufd.h`` and ``linux/vfio.h`` under the C names, in ``iommufd.uapi.iommufd`` and ``.vfio``.",
        [
            "iommufd.uapi.declare",
            "iommufd.uapi.iommufd.ioas",
            "iommufd.uapi.iommufd.hwpt",
            "iommufd.uapi.iommufd.hw_info",
            "iommufd.uapi.iommufd.dirty",
            "iommufd.uapi.iommufd.faults",
            "iommufd.uapi.iommufd.viommu",
            "iommufd.uapi.vfio.cdev",
            "iommufd.uapi.vfio.device",
            "iommufd.uapi.vfio.feature",
            "iommufd.uapi.vfio.container",
            "iommufd.uapi.vfio.group",
        ],
    ),
    "testing": (
        "iommufd.testing: for tests",
        "The pytest plugin, mock devices, checks of a backend, replays, failing calls on purpose.",
        [
            "iommufd.testing.plugin",
            "iommufd.testing.mock",
            "iommufd.testing.check",
            "iommufd.observe.replay",
            "iommufd.engine.fail",
            "iommufd.engine.ledger",
        ],
    ),
}


STRUCTS = ("iommufd.uapi.iommufd.", "iommufd.uapi.vfio.")
EVERY_STRUCT = "ALIGN, C_NAME, FIELDS, FORMAT, SIZE, SINCE, pack, unpack"  # told once, of their base


def write_api(app: Any) -> None:
    """The pages of the API reference, rewritten only when they change."""
    folder = ROOT / "docs/api"
    folder.mkdir(exist_ok=True)
    pages = {"index.rst": index_page()}
    for name, (title, about, modules) in API.items():
        text = f"{title}\n{'=' * len(title)}\n\n{about}\n"
        for module in modules:
            text += f"\n{module}\n{'-' * len(module)}\n\n.. automodule:: {module}\n"
            if module.startswith(STRUCTS):
                text += f"   :exclude-members: {EVERY_STRUCT}\n"
        pages[f"{name}.rst"] = text
    for old in folder.iterdir():
        if old.name not in pages:
            old.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def index_page() -> str:
    """The table of public names and where they are described."""
    lines = [
        "API reference",
        "=============",
        "",
        "Built from the docstrings. The public names of :mod:`iommufd`:",
        "",
        ".. list-table::",
        "   :widths: 25 75",
        "",
    ]
    for name in sorted(iommufd.__all__, key=str.lower):
        target = getattr(iommufd, name)
        role = "class" if isinstance(target, type) else "func"
        first = (target.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
        lines += [f"   * - :py:{role}:`{name} <{target.__module__}.{target.__qualname__}>`", f"     - {first}"]
    lines += ["", ".. toctree::", "   :hidden:", ""]
    return "\n".join([*lines, *(f"   {name}" for name in API), ""])


# ------------------------------------------------------------------------------------------------------------ Markdown

LINK = re.compile(r"(?<!!)\[([^]]*)\]\(([^)#\s]+)(#[^)]*)?\)")


def prepare(app: Any, name: str, source: list[str]) -> None:
    """Adds the contents to the front page; turns links to folders into plain text. (Linked files that are no pages
    are copied.)"""
    page = Path(app.env.doc2path(name))
    if page.suffix != ".md":
        return

    def checked(match: re.Match[str]) -> str:
        text, target = match[1], match[2]
        if target.startswith(("http:", "https:")):
            return match[0]
        return text if (page.parent / target).is_dir() else match[0]

    source[0] = LINK.sub(checked, source[0])
    if name == root_doc:
        source[0] += contents(app)


def contents(app: Any) -> str:
    """The table of contents of the whole site, which the sidebar shows."""
    found = sorted(set(app.env.found_docs) - {root_doc})
    listed: set[str] = set()
    blocks = []
    for caption, patterns in CONTENTS.items():
        names: list[str] = []
        for pattern in patterns:
            rule = re.compile(re.escape(pattern).replace(r"\*", "[^/]*"))
            names += [doc for doc in found if doc not in listed | set(names) and rule.fullmatch(doc)]
        listed.update(names)
        lines = "\n".join(f"/{doc}" for doc in names)
        blocks.append(f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{lines}\n```\n")
    return "".join(blocks)


def outdated(app: Any, env: Any, added: set[str], changed: set[str], removed: set[str]) -> list[str]:
    """The front page has the contents, whatever page came or went."""
    return [root_doc] if root_doc in env.found_docs else []


# ---------------------------------------------------------------------------------------------------------- docstrings

OURS = re.compile(r"iommufd(\.|$)")


def resolve(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """A name in a docstring that is written as its readers say it: ``HWPT.alloc_viommu`` for the class's full name.

    Names of other projects (the standard library's, NumPy's) stay text. A name of ours that leads nowhere is left to
    Sphinx, which fails."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    objects = env.get_domain("py").objects
    matches = [name for name in objects if name.endswith("." + target) or name == target]
    if matches:
        from sphinx.util.nodes import make_refnode

        name = min(matches, key=lambda found: (not found.startswith("iommufd.client."), len(found), found))
        found = objects[name]
        return make_refnode(app.builder, node["refdoc"], found.docname, found.node_id, contnode, name)
    owner = owner_of_attribute(target, objects)
    if owner is not None:
        from sphinx.util.nodes import make_refnode

        found = objects[owner]
        return make_refnode(app.builder, node["refdoc"], found.docname, found.node_id, contnode, owner)
    return None if is_public(target) else contnode


def owner_of_attribute(target: str, objects: Any) -> str | None:
    """The class that sets the attribute ``target`` (``VIOMMU.data``) of its instances and says so in its own words."""
    path, _, attribute = target.rpartition(".")
    for name in sorted(objects):
        if path and (name == path or name.endswith("." + path)) and objects[name].objtype == "class":
            module, _, kind = name.rpartition(".")
            text = inspect.getsource(getattr(importlib.import_module(module), kind))
            if re.search(rf"\bself\.{re.escape(attribute)}\b", text):
                return str(name)
    return None


def is_public(target: str) -> bool:
    """Whether ``target`` should have been found: it names a module or class that the reference describes.

    Type variables and what begins with an underscore are in signatures only."""
    head, last = target.split(".")[0], target.rpartition(".")[2]
    if last[0] == "_" or (len(last) == 1 and last.isupper()):
        return False
    modules = [module for _, _, listed in API.values() for module in listed]
    return head in iommufd.__all__ or any(target == module or target.startswith(module + ".") for module in modules)


def redirect(app: Any, error: Exception | None) -> None:
    """The site begins at index.html."""
    if error is None and app.builder.name == "html":
        text = '<!doctype html><meta charset="utf-8"><title>iommufd for Python</title>\n'
        text += '<meta http-equiv="refresh" content="0; url=README.html"><a href="README.html">iommufd for Python</a>\n'
        (Path(app.outdir) / "index.html").write_text(text)


def setup(app: Any) -> dict[str, bool]:
    app.connect("builder-inited", write_api)
    app.connect("env-get-outdated", outdated)
    app.connect("source-read", prepare)
    app.connect("missing-reference", resolve)
    app.connect("build-finished", redirect)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
