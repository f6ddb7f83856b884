"""Cells of text laid out in columns, with a tick or a cross beside a value that has a target."""

from collections.abc import Sequence


def layout(lines: Sequence[Sequence[str]]) -> str:
    """Align the columns; the first line is the head."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    shown = [" | ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) for line in ruled]
    return "\n".join(line.rstrip() for line in shown)


def verdict(is_met: bool) -> str:
    return " ✓" if is_met else " ✗"
