"""Tables and sentences for people, no wider than what they are read on: the terminal, or 80 columns on a pipe."""

from __future__ import annotations

import io
import itertools
import shutil
import sys
import textwrap
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPE = 80  # columns where there is no terminal
GAP = 2  # columns between two columns of a table


def columns() -> int:
    """How wide what is printed may be: as wide as the terminal, or 80 where standard output is none."""
    on_terminal = sys.stdout is not None and sys.stdout.isatty()  # it is None where standard output is closed
    return shutil.get_terminal_size((PIPE, 24)).columns if on_terminal else PIPE


def prose(text: str, width: int | None = None) -> str:
    """`text` in lines of at most `width` columns (default: `columns()`); words are never cut, for some are paths.

    Lines that fit stay as they are, also those of a table.
    """
    width = width or columns()

    def wrapped(line: str) -> str:
        return line if cell_len(line) <= width else textwrap.fill(
            line, width, break_long_words=False, break_on_hyphens=False
        )  # fmt: skip

    return "\n".join(map(wrapped, text.split("\n")))


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, fixed: int = 1, together: int = 1,
    width: int | None = None,
) -> str:  # fmt: skip
    """Rows under a header, a blank line between pages of columns where they do not all fit beside each other.

    The first `left` columns are aligned left, the others right; the first `fixed` columns are repeated on each page, and the
    others come in groups of `together` that stay on one page. A header may have several lines. A text that is too long for any
    page is broken over lines. Every row has as many cells as the header; assert says otherwise.
    """
    assert all(len(row) == len(header) for row in rows)
    width = width or columns()
    wide = [
        max(cell_len(line) for text in column for line in text.split("\n"))
        for column in zip(header, *rows, strict=True)
    ]
    return "\n\n".join(_page(header, rows, page, left, width, wide) for page in _pages(wide, fixed, together, width))


def _pages(wide: list[int], fixed: int, together: int, width: int) -> list[list[int]]:
    """Which columns each page shows, by their places."""
    first = list(range(fixed))
    room = width - sum(wide[:fixed]) - GAP * fixed
    pages, used = [first[:]], 0
    for start in range(fixed, len(wide), together):
        group = list(range(start, min(start + together, len(wide))))
        needs = sum(wide[i] + GAP for i in group)
        if used and used + needs - GAP > room >= needs - GAP:
            pages, used = [*pages, first[:]], 0
        pages[-1] += group
        used += needs
    return pages


def _page(
    header: Sequence[str], rows: Sequence[Sequence[str]], page: list[int], left: int, width: int, wide: list[int]
) -> str:
    shown = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    for place in page:
        # Only what is longest gives way where a page does not fit: the others keep their width.
        longest = wide[place] == max(wide[i] for i in page)
        shown.add_column(
            Text(header[place]), justify="left" if place < left else "right", vertical="top", overflow="fold",
            no_wrap=not longest, min_width=None if longest else wide[place],
        )  # fmt: skip
    for row in rows:
        shown.add_row(*(Text(row[place]) for place in page))
    file = io.StringIO()
    Console(file=file, width=width, color_system=None, legacy_windows=False).print(shown)
    return "\n".join(line.rstrip() for line in file.getvalue().rstrip("\n").split("\n"))


def block(title: str, *lines: str) -> str:
    """A title and what stands under it, as one text; empty lines are left out."""
    return "\n".join(itertools.chain([prose(title)], filter(None, lines)))
