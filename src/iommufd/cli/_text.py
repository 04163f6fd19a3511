"""Text for a terminal: lines no longer than it is wide. No kernel object."""

from __future__ import annotations

import shutil
import sys
import textwrap


def wrapped(text: str, indent: int = 0) -> str:
    """``text`` in lines of the terminal's width, those after the first ``indent`` columns in; in one line where nobody
    reads (a file or a pipe, where lines are searched)."""
    if not sys.stdout.isatty():
        return text
    columns = max(shutil.get_terminal_size().columns, indent + 20)
    return textwrap.fill(
        text, columns - 1, subsequent_indent=" " * indent, break_on_hyphens=False, break_long_words=False
    )
