"""Plugin files -> Specs, in child processes."""

from __future__ import annotations

from mlpiped.loader.load import Known, LoadResult, load_file
from mlpiped.loader.registry import Registry
from mlpiped.loader.table import Broken, Loaded

__all__ = ["Broken", "Known", "LoadResult", "Loaded", "Registry", "load_file"]
