"""Images for `apptainer_standin.py`, and how it comes to be what the nodes call Apptainer."""

from __future__ import annotations

from pathlib import Path

STANDIN = Path(__file__).with_name("apptainer_standin.py")


def program(folder: Path) -> Path:
    """An executable that stands in for Apptainer."""
    made = folder / "apptainer"
    made.write_text(f'#!/bin/sh\nexec /usr/bin/python3 -I {STANDIN} "$@"\n')
    made.chmod(0o755)
    return made


def image(path: Path, words: str) -> Path:
    """An image in which /etc/which holds `words`. Made anew, as a build does: by rename."""
    root = path.with_suffix(f".{len(list(path.parent.iterdir()))}.root")
    (root / "etc").mkdir(parents=True)
    (root / "etc" / "which").write_text(words + "\n")
    fresh = path.with_suffix(".new")
    fresh.write_text(f"not a real SIF\n{root}\n")
    fresh.rename(path)
    return path
