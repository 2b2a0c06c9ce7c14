"""Put all batches together, without the samples that came twice, and scale them."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("batches", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()

    pixels, digits = samples.read(sorted(options.batches))
    _, first = np.unique(np.column_stack([pixels, digits]), axis=0, return_index=True)
    kept = np.sort(first)
    samples.save(options.out, pixels[kept], digits[kept])
    print(f"{len(options.batches)} batches, {len(digits)} samples, {len(digits) - len(kept)} of them seen before")


if __name__ == "__main__":
    main()
