"""Results for people, as a table, and for programs, as JSON."""

import json
import math
from typing import Any

from etils import epath


def show(title: str, rows: list[tuple[str, Any]]) -> None:
    """Prints names and values under a title."""
    width = max(len(name) for name, _ in rows)
    print(f"\n{title}\n" + "-" * len(title))
    for name, value in rows:
        print(f"{name:<{width}}  {spell(value)}")
    print(flush=True)


def show_columns(title: str, columns: dict[str, dict[str, Any]]) -> None:
    """Prints rows of several columns under a title; a row that a column lacks stays empty."""
    names = list(dict.fromkeys(name for rows in columns.values() for name in rows))
    cells = {column: ["" if name not in rows else spell(rows[name]) for name in names] for column, rows in columns.items()}
    widths = {column: max(map(len, (column, *each))) for column, each in cells.items()}
    first = max(map(len, names))
    print(f"\n{title}\n" + "-" * len(title))
    print(" " * first + "".join(f"  {column:>{widths[column]}}" for column in columns))
    for number, name in enumerate(names):
        print(f"{name:<{first}}" + "".join(f"  {cells[column][number]:>{widths[column]}}" for column in columns))
    print(flush=True)


def write_json(path: str, values: dict[str, Any]) -> None:
    """Writes results to a file, where a path is given."""
    if path:
        epath.Path(path).write_text(json.dumps(values, indent=2) + "\n")


def spell(value: Any) -> str:
    """Numbers with four figures at least, and no more than are of use."""
    if value is None:
        return "not known"
    if not isinstance(value, float):
        return str(value)
    digits = 0 if not value else max(0, 3 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 6)}f}"
