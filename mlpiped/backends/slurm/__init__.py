from mlpiped.backends.slurm.backend import SlurmBackend

__all__ = ["SlurmBackend"]
