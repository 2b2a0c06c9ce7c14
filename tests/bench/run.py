"""`python -m tests.bench.run`: measure what is promised about speed, each against its limit, in one table.

Every benchmark starts a real daemon on a scratch folder and takes it away again. Exit status 1 means that something
could not be measured; a limit that is missed is a finding, printed as such.
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench import docker, durability, figures, moments, slurm, slurm_queue, ssh, work

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BENCHES: dict[str, Callable[[], Iterator[figures.Figure]]] = {
    "import": moments.imports,
    "start": moments.start,
    "manual": moments.manual,
    "arrival": moments.arrival,
    "chain": work.chain,
    "cpu": work.cpu,
    "throughput": work.throughput,
    "status": moments.status,
    "idle": moments.idle,
    "noop": work.noop,
    "docker": docker.containers,
    "ssh-step": ssh.step,
    "ssh-many": ssh.many,
    "ssh-large": ssh.large,
    "slurm-array": slurm.array,
    "slurm-many": slurm.many,
    "slurm-queue": slurm_queue.queue,
    "commits": durability.commits,
    "adopt": durability.adopt,
}


LONG: dict[str, Callable[[], Iterator[figures.Figure]]] = {"million": moments.million, "flood": durability.flood}
"""Only when they are named: they take minutes."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.bench.run", description=__doc__)
    parser.add_argument(
        "--only", action="append", choices=[*BENCHES, *LONG], metavar="NAME", help=", ".join([*BENCHES, *LONG])
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # every `finally` takes its daemon away

    found: list[figures.Figure] = []
    broken: dict[str, str] = {}
    began = time.monotonic()
    for name in options.only or BENCHES:
        print(f"{name} …", file=sys.stderr, flush=True)
        try:
            found.extend({**BENCHES, **LONG}[name]())
        except Exception as error:  # one that breaks must not hide the others
            broken[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            print(f"  could not be measured: {error}", file=sys.stderr, flush=True)
    print(figures.table(found))
    missed = sum(figure.holds is False for figure in found)
    limits = sum(figure.holds is not None for figure in found)
    print(f"\n{limits - missed} of {limits} limits hold; {time.monotonic() - began:.0f} s on {platform.platform()}")
    for name, why in broken.items():
        print(f"not measured: {name}: {why}")
    if options.json:
        document = {"figures": [figure.plain() for figure in found], "not_measured": broken}
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
