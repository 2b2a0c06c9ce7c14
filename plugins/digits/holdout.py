"""Bring the samples that no model may learn from into the form that evaluate reads."""

from __future__ import annotations

import argparse
from pathlib import Path

import samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("holdout", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()

    pixels, digits = samples.read([options.holdout])
    samples.save(options.out, pixels, digits)
    print(f"{len(digits)} samples held out")


if __name__ == "__main__":
    main()
