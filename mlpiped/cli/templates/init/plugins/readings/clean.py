"""Joins the files and leaves out the readings that are no number, or too high to be true."""

import argparse
import csv

from mlpiped import Run

parser = argparse.ArgumentParser()
parser.add_argument("files", nargs="*")
parser.add_argument("--highest", type=float, required=True)
parser.add_argument("--out", required=True)
args = parser.parse_args()

kept, dropped = [], 0
for file in args.files:
    with open(file, newline="") as source:
        for row in csv.DictReader(source):
            try:
                value = float(row["value"])
            except ValueError:
                value = float("nan")
            if value <= args.highest:
                kept.append((row["sensor"], value))
            else:
                dropped += 1
with open(args.out, "w", newline="") as target:
    csv.writer(target).writerows(sorted(kept))

run = Run.get_context()
run.log("kept", len(kept))
run.log("dropped", dropped)
print(f"{len(args.files)} files: {len(kept)} readings kept, {dropped} dropped")
