"""Data for the example in plugins/boxes.py: two classes that no straight line parts."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def moons(path: Path, count: int, seed: int) -> None:
    """CSV without a header: x, y, and the class 0 or 1."""
    chance = random.Random(seed)
    rows = []
    for n in range(count):
        label, angle = n % 2, chance.uniform(0, math.pi)
        x, y = (1 - math.cos(angle), 0.5 - math.sin(angle)) if label else (math.cos(angle), math.sin(angle))
        rows.append(f"{x + chance.gauss(0, 0.1):.4f},{y + chance.gauss(0, 0.1):.4f},{label}\n")
    path.write_text("".join(rows))
