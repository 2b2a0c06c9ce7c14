"""Judge the model by the leaves that it has not seen. Needs nothing of ours: a metric is a line of JSON."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from pathlib import Path

import samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", required=True, type=Path)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()

    weights = json.loads(options.model.read_text())["weights"]
    rows = samples.read(options.sets / "test.csv")
    taken = Counter(f"{species} as {samples.guess(weights, length, width)}" for length, width, species in rows)
    right = sum(taken[f"{species} as {species}"] for species in weights)
    accuracy = round(right / len(rows), 4)
    if metrics := os.environ.get("MLPIPED_METRICS"):
        with open(metrics, "a") as file:
            file.write(json.dumps({"kind": "metric", "name": "accuracy", "value": accuracy}) + "\n")
    report = {"accuracy": accuracy, "leaves": len(rows), "taken": taken}
    options.out.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
    print(f"accuracy {accuracy:.4f} over {len(rows)} leaves")


if __name__ == "__main__":
    main()
