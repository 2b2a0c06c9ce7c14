"""A measured figure, what it is held against, and the table that people read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Figure:
    """`limit` None: told for its own sake. `floor`: the limit is the least that is good, not the most."""

    name: str
    value: float
    unit: str
    limit: float | None = None
    floor: bool = False
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """How much of the limit is used; for a floor, how often it is reached. None without a limit."""
        return self.value / self.limit if self.limit else None

    @property
    def holds(self) -> bool | None:
        if self.limit is None:
            return None
        return self.value >= self.limit if self.floor else self.value <= self.limit

    def plain(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio, "holds": self.holds}


def row(figure: Figure) -> tuple[str, ...]:
    limit = "" if figure.limit is None else f"{'≥' if figure.floor else '≤'} {_short(figure.limit)}"
    ratio = "" if figure.ratio is None else f"{figure.ratio:.2f} ×"
    verdict = {True: "holds", False: "MISSED", None: ""}[figure.holds]
    return figure.name, f"{_short(figure.value)} {figure.unit}", limit, ratio, verdict, figure.note


def table(figures: Sequence[Figure]) -> str:
    """Aligned columns: figure, measured, limit, ratio, verdict, note."""
    rows = [("figure", "measured", "limit", "ratio", "verdict", "note"), *(row(figure) for figure in figures)]
    widths = [max(len(cell[column]) for cell in rows) for column in range(5)]
    right = {1, 2, 3}
    return "\n".join(
        "  ".join(
            cell.rjust(widths[column]) if column in right else cell.ljust(widths[column])
            for column, cell in enumerate(cells[:5])
        ).rstrip()
        + (f"  {cells[5]}" if cells[5] else "")
        for cells in rows
    )


def _short(number: float) -> str:
    if number == int(number) and abs(number) < 1e6:
        return f"{int(number):,}"
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"
