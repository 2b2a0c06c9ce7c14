"""Learn to tell the species apart: a perceptron for all of them, averaged over its whole way."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import samples


def learn(rows: list[samples.Sample], epochs: int) -> tuple[samples.Weights, list[int]]:
    """The weights, and how often each epoch was wrong."""
    weights: samples.Weights = {species: [0.0] * 4 for species in sorted({row[2] for row in rows})}
    total: samples.Weights = {species: [0.0] * 4 for species in weights}
    order, wrong = random.Random(1), []
    for _ in range(epochs):
        wrong.append(0)
        for length, width, species in order.sample(rows, len(rows)):
            found = samples.guess(weights, length, width)
            if found != species:
                wrong[-1] += 1
                for n, value in enumerate(samples.features(length, width)):
                    weights[species][n] += value
                    weights[found][n] -= value
            for name, own in weights.items():
                total[name] = [sum_ + weight for sum_, weight in zip(total[name], own, strict=True)]
    return total, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", required=True, type=Path)
    parser.add_argument("--epochs", required=True, type=int)
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()

    weights, wrong = learn(samples.read(options.sets / "train.csv"), options.epochs)
    options.out.write_text(json.dumps({"weights": weights, "wrong": wrong}, indent=1, sort_keys=True) + "\n")
    print(f"{len(weights)} species, {wrong[-1]} wrong in the last epoch")


if __name__ == "__main__":
    main()
