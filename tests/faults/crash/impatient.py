"""A daemon that waits seconds, not minutes, for what a node of Slurm has written: here all see the same files at once.

python impatient.py [MUTANT] serve --config FILE
"""

from __future__ import annotations

import sys

PATIENCE = 3.0  # seconds

if __name__ == "__main__":
    from mutants import MUTANTS, replace_default

    del sys.path[0]  # this folder: its modules are not for the daemon
    if sys.argv[1] in MUTANTS:
        MUTANTS[sys.argv.pop(1)]()
    from mlpiped.backends.slurm import SlurmBackend, StagedSlurmBackend

    for backend in (SlurmBackend, StagedSlurmBackend):
        replace_default(backend.__init__, "patience", PATIENCE)
    from mlpiped.cli.admin import main

    sys.exit(main(sys.argv[1:]))
