"""Judge the model by the samples that it has never seen."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import joblib
import numpy as np
import samples

from mlpiped import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--test", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()

    run = Run.get_context()
    model = joblib.load(options.model)
    pixels, digits = samples.load(options.test)
    said = model.predict(pixels)
    accuracy = float(np.mean(said == digits))
    run.log("accuracy", accuracy)

    per_digit = {}
    for digit in range(10):
        run.progress(digit + 1, 10)
        per_digit[str(digit)] = round(float(np.mean(said[digits == digit] == digit)), 4)
    report = {"accuracy": round(accuracy, 4), "samples": len(digits), "per_digit": per_digit}
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    hardest = min(per_digit, key=per_digit.__getitem__)
    print(f"accuracy {accuracy:.4f} over {len(digits)} samples; hardest digit: {hardest}")


if __name__ == "__main__":
    main()
