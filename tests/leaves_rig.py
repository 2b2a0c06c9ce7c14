"""Data for the example in plugins/leaves.py: three species, and some rows that are none."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

SPECIES = {"birch": (5.0, 4.0), "oak": (11.0, 6.0), "willow": (9.0, 1.5)}  # length and width, cm
SPREAD = 0.7


def leaves(path: Path, count: int, seed: int) -> None:
    """CSV with a header: length, width, species. One row in twenty is broken."""
    chance = random.Random(seed)
    rows = ["length,width,species\n"]
    for n in range(count):
        name = sorted(SPECIES)[n % len(SPECIES)]
        length, width = (chance.gauss(middle, SPREAD) for middle in SPECIES[name])
        rows.append(f"{length:.2f},{width:.2f},{name}\n" if n % 20 else f"{length:.2f},,{name}\n")
    path.write_text("".join(rows))
