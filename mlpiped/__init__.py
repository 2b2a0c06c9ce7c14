"""What plugin authors import: `from mlpiped import Pipeline, PythonScriptStep, …`.

Light on purpose: each name is loaded when it is first used, and everything below `mlpiped.sdk` is standard
library only. A training script that asks for `Run` alone pays for nothing else.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mlpiped.sdk.data import DataReference, Datastore, PipelineData, PipelineParameter
    from mlpiped.sdk.errors import DefinitionError
    from mlpiped.sdk.mpi import MpiStep
    from mlpiped.sdk.pipeline import Pipeline
    from mlpiped.sdk.run import Run
    from mlpiped.sdk.settings import Environment, Resources, Retry
    from mlpiped.sdk.steps import CommandStep, DataTransferStep, PythonScriptStep
    from mlpiped.sdk.triggers import Cron, Every, OnArrival, OnSuccess

__version__ = "0.1.0"

__all__ = [
    "CommandStep",
    "Cron",
    "DataReference",
    "DataTransferStep",
    "Datastore",
    "DefinitionError",
    "Environment",
    "Every",
    "MpiStep",
    "OnArrival",
    "OnSuccess",
    "Pipeline",
    "PipelineData",
    "PipelineParameter",
    "PythonScriptStep",
    "Resources",
    "Retry",
    "Run",
]

_HOME = {
    "DefinitionError": "errors",
    "MpiStep": "mpi",
    "Pipeline": "pipeline",
    "Run": "run",
    **dict.fromkeys(("Datastore", "DataReference", "PipelineData", "PipelineParameter"), "data"),
    **dict.fromkeys(("Environment", "Resources", "Retry"), "settings"),
    **dict.fromkeys(("CommandStep", "DataTransferStep", "PythonScriptStep"), "steps"),
    **dict.fromkeys(("Cron", "Every", "OnArrival", "OnSuccess"), "triggers"),
}


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'mlpiped' has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f"mlpiped.sdk.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
