"""Tables for people, drawn by rich; plain text where no terminal reads."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence


def table_text(heading: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = (), color: bool = False) -> str:
    """An aligned table without lines; ``right`` are the columns of numbers."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, title in enumerate(heading):
        table.add_column(title, justify="right" if index in right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    out = io.StringIO()
    Console(file=out, width=1000, force_terminal=color, no_color=not color, highlight=False, markup=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
