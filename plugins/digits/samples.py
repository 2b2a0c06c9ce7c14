"""A batch is CSV without a header: 64 grey values from 0 to 16 and then the digit itself, one sample a line."""

from __future__ import annotations

from pathlib import Path

import numpy as np

DARKEST = 16.0


def read(paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """All samples of all files, in the files' order: (pixels scaled to 0..1, digits)."""
    rows = np.concatenate([np.loadtxt(path, delimiter=",", ndmin=2) for path in paths])
    return rows[:, :-1] / DARKEST, rows[:, -1].astype(np.int64)


def save(folder: Path, pixels: np.ndarray, digits: np.ndarray) -> None:
    """Write one folder of arrays. The same samples make the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "pixels.npy", pixels)
    np.save(folder / "digits.npy", digits)


def load(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """What `save` wrote."""
    return np.load(folder / "pixels.npy"), np.load(folder / "digits.npy")
