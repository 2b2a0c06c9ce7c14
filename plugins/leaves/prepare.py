"""Drop the rows that are broken or there twice, and part the others into those to learn from and those to judge by."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import samples

HELD_OUT = 64  # of 256


def held_out(sample: samples.Sample) -> bool:
    """Its content alone decides: a row stays on its side whatever arrives later."""
    return hashlib.sha256(repr(sample).encode()).digest()[0] < HELD_OUT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("batches", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()

    rows = sorted({sample for path in options.batches for sample in samples.read(path)})
    scale = [max(abs(row[n]) for row in rows) or 1.0 for n in (0, 1)]
    scaled = [(held_out(row), (row[0] / scale[0], row[1] / scale[1], row[2])) for row in rows]
    options.out.mkdir(exist_ok=True)
    samples.write(options.out / "train.csv", [row for out, row in scaled if not out])
    samples.write(options.out / "test.csv", [row for out, row in scaled if out])
    (options.out / "scale.json").write_text(json.dumps({"length": scale[0], "width": scale[1]}) + "\n")
    print(f"{len(rows)} leaves of {len(options.batches)} files")


if __name__ == "__main__":
    main()
