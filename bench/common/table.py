"""Plain text tables."""

from collections.abc import Sequence


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: int = 1,
    remarks: Sequence[str | None] = (),
) -> str:
    """Aligned columns, the first ``left`` of them to the left, the others to the right.

    A row may be shorter than the header. ``remarks``, one a row, follow what is there.
    """
    rows = [[*row, *[""] * (len(header) - len(row))] for row in rows]
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def format_line(line: Sequence[str]) -> str:
        cells = (
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    text = list(map(format_line, lines))
    for index, remark in enumerate(remarks, 1):
        if remark is not None:
            text[index] += f"  {remark}"
    return "\n".join(text)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as a Markdown table."""
    lines = [list(header), ["---"] * len(header), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def why_no_time(wrong: str | None, unavailable: str | None) -> str | None:
    """What stands in place of figures: ``WRONG: …`` or ``not run: …``; None if nothing is amiss."""
    if wrong is not None:
        return f"WRONG: {wrong}"
    return None if unavailable is None else f"not run: {unavailable}"


def megabytes(size: float | None) -> str:
    """Bytes in units of 10⁶."""
    if size is None:
        return ""
    value = size / 1e6
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
