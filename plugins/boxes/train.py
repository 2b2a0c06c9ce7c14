"""Learn to tell two classes apart; the loss of each epoch becomes a metric."""

from __future__ import annotations

import argparse
import json
import os
import random
from pathlib import Path

import perceptron

from mlpiped import Run

EPOCHS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("batches", nargs="+", type=Path)
    parser.add_argument("--width", required=True, type=int)
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()

    run = Run.get_context()
    print(f"the cards of this step: {os.environ.get('CUDA_VISIBLE_DEVICES') or 'none'}")
    samples = [sample for path in options.batches for sample in perceptron.read(path)]
    random.Random(1).shuffle(samples)
    weights = perceptron.start(options.width)
    for number in range(EPOCHS):
        run.log("loss", perceptron.epoch(weights, samples, rate=0.1), step=number)
        run.progress(number + 1, EPOCHS)
    options.out.write_text(json.dumps(weights) + "\n")
    print(f"{len(samples)} samples, {options.width} units")


if __name__ == "__main__":
    main()
