"""Judge the model by samples that it has not seen. Needs nothing of ours in the image: a metric is a line of JSON."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import perceptron


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--test", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()

    weights = json.loads(options.model.read_text())
    samples = perceptron.read(options.test)
    right = sum((perceptron.probability(weights, x, y) > 0.5) == bool(label) for x, y, label in samples)
    accuracy = right / len(samples)
    if metrics := os.environ.get("MLPIPED_METRICS"):
        with open(metrics, "a") as file:
            file.write(json.dumps({"kind": "metric", "name": "accuracy", "value": accuracy}) + "\n")
    options.out.write_text(json.dumps({"accuracy": round(accuracy, 4), "samples": len(samples)}) + "\n")
    print(f"accuracy {accuracy:.4f} over {len(samples)} samples")


if __name__ == "__main__":
    main()
