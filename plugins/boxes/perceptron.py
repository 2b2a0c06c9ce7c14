"""A network of one hidden layer, two numbers in and a probability out; without any package, and as slow as that."""

from __future__ import annotations

import csv
import math
import random
from pathlib import Path

Sample = tuple[float, float, int]
Weights = list[list[float]]  # of each hidden unit: two for the input, its bias, one for the output


def read(path: Path) -> list[Sample]:
    """CSV without a header: x, y, and the class 0 or 1."""
    with path.open(newline="") as file:
        return [(float(x), float(y), int(label)) for x, y, label in csv.reader(file)]


def hidden(weights: Weights, x: float, y: float) -> list[float]:
    return [math.tanh(a * x + b * y + c) for a, b, c, _ in weights]


def probability(weights: Weights, x: float, y: float) -> float:
    total = sum(h * unit[3] for h, unit in zip(hidden(weights, x, y), weights, strict=True))
    return 1 / (1 + math.exp(-max(-60.0, min(60.0, total))))


def epoch(weights: Weights, samples: list[Sample], rate: float) -> float:
    """One pass of gradient descent; the mean loss on the way."""
    loss = 0.0
    for x, y, label in samples:
        units = hidden(weights, x, y)
        p = probability(weights, x, y)
        loss -= math.log(max(1e-12, p if label else 1 - p))
        for unit, h in zip(weights, units, strict=True):
            back = (p - label) * unit[3] * (1 - h * h)
            unit[3] -= rate * (p - label) * h
            unit[0] -= rate * back * x
            unit[1] -= rate * back * y
            unit[2] -= rate * back
    return loss / len(samples)


def start(width: int) -> Weights:
    chance = random.Random(1)
    return [[chance.uniform(-1, 1) for _ in range(4)] for _ in range(width)]
