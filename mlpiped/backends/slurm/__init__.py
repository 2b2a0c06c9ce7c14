from mlpiped.backends.slurm.backend import SlurmBackend
from mlpiped.backends.slurm.runner import LoginRunner
from mlpiped.backends.slurm.staged import StagedSlurmBackend

__all__ = ["LoginRunner", "SlurmBackend", "StagedSlurmBackend"]
