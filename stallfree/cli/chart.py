"""Draws bars on a terminal, exact to an eighth of a line. It does not know what they show."""

from collections.abc import Sequence
from itertools import groupby
from math import ceil

from rich.text import Text

EIGHTHS = " ▁▂▃▄▅▆▇█"
LABEL = 7


def chart(bars: Sequence[float], height: int, top: float, line: float | None = None) -> Text:
    """`height` lines of text: an axis up to `top`, `LABEL` columns wide, and a column for each bar. A bar above `line` is red."""
    step = top / height
    text = Text(no_wrap=True)
    for row in reversed(range(height)):
        at_line = line is not None and row == min(int(line / step), height - 1)
        label = f"{line:.0f}" if at_line else f"{top:.0f}" if row == height - 1 else "0" if row == 0 else ""
        text.append(f"{label:>{LABEL - 1}} ", "yellow" if at_line else "dim")
        cells = [_cell(bar, step, row, at_line, line) for bar in bars]
        for style, same in groupby(cells, key=lambda cell: cell[1]):  # write each style once, not for every bar
            text.append("".join(character for character, _ in same), style)
        text.append("\n" if row else "")
    return text


def _cell(bar: float, step: float, row: int, at_line: bool, line: float | None) -> tuple[str, str]:
    """The character of a bar in a `row`, and its style."""
    eighths = min(max(ceil(8 * (bar / step - row)), 0), 8)
    if not eighths:
        return ("╌", "yellow") if at_line else (" ", "")
    return EIGHTHS[eighths], "cyan" if line is None else "red" if bar > line else "green"
