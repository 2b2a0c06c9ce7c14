"""Boxes that are reached by SSH. `backend` is the way in; the scripts beside it are what runs on the box."""

from mlpiped.backends.ssh.backend import SshBackend
from mlpiped.backends.ssh.login import LoginShell

__all__ = ["LoginShell", "SshBackend"]
