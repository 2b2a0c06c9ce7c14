"""Leaves: two lengths in cm and a species. The files that hold them, and the model that tells them apart."""

from __future__ import annotations

import csv
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

Sample = tuple[float, float, str]
Weights = dict[str, list[float]]
"""Of each species: for the length, the width, their product, and alone."""


def read(path: Path) -> list[Sample]:
    """The rows that are whole: a length, a width, a species."""
    found = []
    with path.open(newline="") as file:
        for row in csv.reader(file):
            try:
                length, width = float(row[0]), float(row[1])
                species = row[2].strip()
            except (ValueError, IndexError):
                continue
            if species and math.isfinite(length) and math.isfinite(width):
                found.append((length, width, species))
    return found


def write(path: Path, samples: Iterable[Sample]) -> None:
    with path.open("w", newline="\n") as file:
        file.writelines(f"{length!r},{width!r},{species}\n" for length, width, species in samples)


def features(length: float, width: float) -> tuple[float, float, float, float]:
    return length, width, length * width, 1.0


def guess(weights: Weights, length: float, width: float) -> str:
    """The species with the highest score; of equals the first by name."""
    values = features(length, width)
    scores = {
        species: math.fsum(weight * value for weight, value in zip(own, values, strict=True))
        for species, own in weights.items()
    }  # `sum` rounds otherwise in Python 3.12 than in 3.11
    return max(sorted(scores), key=scores.__getitem__)
