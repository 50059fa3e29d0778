"""Tables for terminals of any width: no cell is cut."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import rich.box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_UNLIMITED = 10_000  # characters


@dataclasses.dataclass(eq=False)
class Grid:
    """A table with borders if there is room, else without, else a paragraph for each row.

    Columns of words are aligned left, columns of numbers right.

    Args:
      columns: their headings; "\\n" where a heading breaks.
      rows: a cell for each column, or fewer.
      words: the columns of words.
      wraps: {column of words: fewest characters}, where a cell may take several lines.
      heads: number of columns that say what a row is about; a paragraph starts with them.
      bordered: False for a table without borders.
      styles: of rows.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    words: Sequence[str] = ()
    wraps: Mapping[str, int] = dataclasses.field(default_factory=dict)
    heads: int = 1
    bordered: bool = True
    styles: Sequence[str | None] | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        for table in [self._table(bordered) for bordered in (True, False)[not self.bordered :]]:
            needed = Measurement.get(console, options.update(max_width=_UNLIMITED), table).minimum
            if needed <= options.max_width:
                yield table
                return
        if self.title:
            yield Text(self.title, style="bold")
        for row, style in zip(self.rows, self._styles(), strict=True):
            yield Text(self._paragraph(row), style=style or "")

    def _table(self, bordered: bool) -> Table:
        plain: dict[str, Any] = {"box": None, "pad_edge": False, "header_style": "dim"}
        table = Table(
            title=self.title or None,
            title_justify="left",
            title_style="bold",
            collapse_padding=True,
            **({"box": rich.box.HEAVY_HEAD} if bordered else plain),
        )
        for k, name in enumerate(self.columns):
            justify: Any = "left" if name in self.words else "right"
            cells = [
                line for text in (name, *(row[k] for row in self.rows if k < len(row))) for line in text.split("\n")
            ]
            whole = max(map(cell_len, cells))
            table.add_column(
                name, justify=justify, no_wrap=name not in self.wraps, min_width=self.wraps.get(name, whole)
            )
        for row, style in zip(self.rows, self._styles(), strict=True):
            table.add_row(*row, style=style)
        return table

    def _paragraph(self, row: Sequence[str]) -> str:
        cells = [
            f"{name} {cell}".strip()
            for name, cell in zip((" ".join(name.split()) for name in self.columns), row, strict=False)
            if cell
        ]
        return f"{', '.join(cells[: self.heads])}: {', '.join(cells[self.heads :])}"

    def _styles(self) -> Sequence[str | None]:
        return self.styles or [None] * len(self.rows)
