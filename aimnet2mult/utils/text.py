"""Text for people: tables, lists of elements and messages of errors in short."""

from collections.abc import Iterable, Sequence

from aimnet2mult.constants import element_names


def text_table(header: Sequence[str], rows: Iterable[Sequence[str | int]]) -> list[str]:
    """Return a table as lines, each column as wide as it needs to be; integers stand to the right, as ``12,345``."""
    rows = list(rows)
    numeric = [any(isinstance(row[i], int) for row in rows) for i in range(len(header))]
    cells = [list(header), *([f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in cells
    ]


def first_line(error: BaseException) -> str:
    """Return the first line of a message that says anything, or the name of an error that says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def element_ranges(numbers: Iterable[int]) -> str:
    """Return the names of elements, runs of neighbours in short: ``H (1) to Ne (10), Br (35)``."""
    runs: list[list[int]] = []
    for z in numbers:
        if runs and z == runs[-1][-1] + 1:
            runs[-1].append(z)
        else:
            runs.append([z])
    return ", ".join(
        f"{element_names(run[:1])} to {element_names(run[-1:])}" if len(run) > 2 else element_names(run) for run in runs
    )
