"""
Tables as HTML, for notebooks: names to the left, figures to the right, sentences below.

Text becomes text, whatever it contains. Styles are those of the notebook.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

LEFT = "text-align:left;white-space:pre"
RIGHT = "text-align:right"


def html_table(titles: Sequence[str], rows: Iterable[Sequence[str]], notes: Iterable[str] = ()) -> str:
    """
    Return a table; a name keeps the blanks that it is indented by.

    Args:
        titles: One per column.
        rows: The cells of each row; the first is a name.
        notes: Sentences below the table.

    """
    from html import escape  # Here, because hardly any program draws one.

    def row(tag: str, cells: Sequence[str]) -> str:
        styles = [LEFT] + [RIGHT] * (len(cells) - 1)
        inside = (f'<{tag} style="{style}">{escape(cell)}</{tag}>' for style, cell in zip(styles, cells, strict=True))
        return f"<tr>{''.join(inside)}</tr>"

    body = "".join(row("td", cells) for cells in rows)
    below = "".join(f"<div>{escape(note)}</div>" for note in notes)
    return f"<table><thead>{row('th', titles)}</thead><tbody>{body}</tbody></table>{below}"
