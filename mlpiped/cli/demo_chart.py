"""The demo's picture: the accuracy of each run's model, over the runs."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

INK, LINE, FAINT = "#1f2933", "#2563eb", "#9aa5b1"


@dataclass(frozen=True, slots=True)
class Point:
    """What one run's model is worth. `fresh` is False where evaluate was reused."""

    run: int
    accuracy: float
    label: str
    fresh: bool


def draw(points: Sequence[Point], path: Path) -> None:
    """One PNG: the runs as points, filled where a model was judged anew and hollow where the result was reused."""
    import_module("matplotlib").use("Agg")
    pyplot = import_module("matplotlib.pyplot")
    percent = import_module("matplotlib.ticker").PercentFormatter(1.0, decimals=0)

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes.plot([p.run for p in points], [p.accuracy for p in points], color=LINE, linewidth=1.5, zorder=1)
    for fresh, fill in ((True, LINE), (False, "white")):
        some = [p for p in points if p.fresh is fresh]
        label = "evaluated in this run" if fresh else "reused"
        axes.scatter(
            [p.run for p in some], [p.accuracy for p in some], s=46, color=fill, edgecolor=LINE, zorder=2, label=label
        )
    for point in points:
        axes.annotate(
            f"{point.accuracy:.1%}\n{point.label}",
            (point.run, point.accuracy),
            xytext=(7, -4),
            textcoords="offset points",
            ha="left",
            va="top",
            fontsize=7.5,
            color=INK,
        )
    lowest = min(p.accuracy for p in points)
    axes.set(xlabel="run", title="digits: accuracy on the samples that were held out")
    axes.set_xticks([p.run for p in points])
    axes.set_xlim(points[0].run - 0.5, points[-1].run + 0.9)
    axes.set_ylim(lowest - 0.08, 1.0)
    axes.yaxis.set_major_formatter(percent)
    axes.grid(axis="y", color=FAINT, alpha=0.35, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False, fontsize=8)
    figure.savefig(path)
    pyplot.close(figure)
