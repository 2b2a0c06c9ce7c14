from mlpiped.backends.slurm.backend import SlurmBackend
from mlpiped.backends.slurm.runner import LoginRunner

__all__ = ["LoginRunner", "SlurmBackend"]
