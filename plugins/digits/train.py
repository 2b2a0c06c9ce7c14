"""Fit a logistic regression to the clean samples. The same samples and C make the same bytes."""

from __future__ import annotations

import argparse
from pathlib import Path

import joblib
import samples
from sklearn.linear_model import LogisticRegression

from mlpiped import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clean", type=Path)
    parser.add_argument("--C", type=float, required=True, help="how little the weights are held back")
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()

    run = Run.get_context()
    pixels, digits = samples.load(options.clean)
    model = LogisticRegression(C=options.C, max_iter=500).fit(pixels, digits)
    joblib.dump(model, options.out)

    run.log("samples", len(digits))
    run.log("iterations", int(model.n_iter_.max()))
    print(f"fitted to {len(digits)} samples in {model.n_iter_.max()} iterations")


if __name__ == "__main__":
    main()
