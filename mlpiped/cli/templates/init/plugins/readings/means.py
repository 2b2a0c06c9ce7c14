"""The mean of each sensor, as JSON."""

import argparse
import csv
import json
from collections import defaultdict
from statistics import fmean

from mlpiped import Run

parser = argparse.ArgumentParser()
parser.add_argument("clean")
parser.add_argument("--out", required=True)
args = parser.parse_args()

values = defaultdict(list)
with open(args.clean, newline="") as source:
    for sensor, value in csv.reader(source):
        values[sensor].append(float(value))
means = {sensor: round(fmean(readings), 3) for sensor, readings in sorted(values.items())}
with open(args.out, "w") as target:
    json.dump(means, target, indent=2)

run = Run.get_context()
for sensor, mean in means.items():
    run.log(f"mean_{sensor}", mean)
    print(f"{sensor}: {mean}")
