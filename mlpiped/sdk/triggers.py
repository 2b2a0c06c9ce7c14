"""When a pipeline runs by itself: Cron, Every, OnArrival, OnSuccess."""

from __future__ import annotations

from mlpiped.sdk import values
from mlpiped.sdk.data import DataReference, PipelineParameter
from mlpiped.sdk.errors import DefinitionError
from mlpiped.sdk.place import here

TYPE_CHECKING = False
if TYPE_CHECKING:
    from datetime import datetime
    from typing import Literal

    from mlpiped.sdk.pipeline import Pipeline

    CatchUp = Literal["skip", "latest", "all"]

_CATCH_UP = ("skip", "latest", "all")


class Trigger:
    def __init__(self) -> None:
        self.where = here()

    def plain(self) -> dict[str, object]:
        raise NotImplementedError


class Cron(Trigger):
    """At the times of a crontab expression (`m h dom mon dow`, or `@daily` and its kin), in `timezone`.

    Never at load. After downtime `catch_up` fires once for the latest missed time, for none (`skip`) or for all.
    `jitter` delays every fire by up to that long.
    """

    def __init__(
        self,
        expression: str,
        *,
        timezone: str = "UTC",
        catch_up: CatchUp = "latest",
        jitter: str | float = 0,
        start: datetime | str | None = None,
        end: datetime | str | None = None,
    ) -> None:
        super().__init__()
        self.expression = " ".join(values.text(expression, "the cron expression", self.where).split())
        self.timezone = values.text(timezone, "timezone", self.where)
        self.catch_up = values.choice(catch_up, _CATCH_UP, "catch_up", self.where)
        self.jitter = values.seconds(jitter, "jitter", self.where)
        self.start = _moment(start, "start", self.where, self.timezone)
        self.end = _moment(end, "end", self.where, self.timezone)

    def plain(self) -> dict[str, object]:
        return {
            "kind": "cron",
            "expression": self.expression,
            "timezone": self.timezone,
            "catch_up": self.catch_up,
            "jitter": self.jitter,
            "start": self.start,
            "end": self.end,
        }


class Every(Trigger):
    """Once in every `interval`: "15m", "2h", or seconds."""

    def __init__(
        self,
        interval: str | float,
        *,
        catch_up: CatchUp = "latest",
        jitter: str | float = 0,
        start: datetime | str | None = None,
        end: datetime | str | None = None,
    ) -> None:
        super().__init__()
        self.seconds = values.seconds(interval, "the interval", self.where, least=1)
        self.catch_up = values.choice(catch_up, _CATCH_UP, "catch_up", self.where)
        self.jitter = values.seconds(jitter, "jitter", self.where)
        self.start = _moment(start, "start", self.where, None)
        self.end = _moment(end, "end", self.where, None)

    def plain(self) -> dict[str, object]:
        return {
            "kind": "every",
            "seconds": self.seconds,
            "catch_up": self.catch_up,
            "jitter": self.jitter,
            "start": self.start,
            "end": self.end,
        }


class OnArrival(Trigger):
    """When data arrives at `source` and has held still for `settle` (or `marker` exists).

    One run a batch of at least `min_files`; with `batch="file"` one run a file, its path bound to `parameter`.
    """

    def __init__(
        self,
        source: DataReference,
        *,
        settle: str | float = "5s",
        marker: str | None = None,
        batch: Literal["all", "file"] = "all",
        parameter: PipelineParameter | str | None = None,
        min_files: int = 1,
        catch_up: CatchUp = "latest",
    ) -> None:
        super().__init__()
        where = self.where
        if not isinstance(source, DataReference):
            raise DefinitionError(f"OnArrival waits for {values.shown(source)}", where, "give it a `DataReference`")
        self.source = source
        self.settle = values.seconds(settle, "settle", where)
        self.marker = None if marker is None else values.text(marker, "marker", where)
        self.batch = values.choice(batch, ("all", "file"), "batch", where)
        self.parameter = parameter if isinstance(parameter, PipelineParameter) else None
        self.parameter_name = self.parameter.name if self.parameter is not None else None
        if isinstance(parameter, str):
            self.parameter_name = values.name(parameter, "parameter", where)
        elif parameter is not None and self.parameter is None:
            raise DefinitionError(f"parameter is {values.shown(parameter)}", where, "give it a `PipelineParameter`")
        if self.parameter_name is not None and self.batch != "file":
            raise DefinitionError("`parameter` takes the path of one file", where, 'add `batch="file"`')
        self.min_files = values.whole(min_files, "min_files", where, least=1)
        self.catch_up = values.choice(catch_up, _CATCH_UP, "catch_up", where)

    def plain(self) -> dict[str, object]:
        source = self.source
        return {
            "kind": "arrival",
            "source": {"kind": "reference", "datastore": source.datastore, "path": source.path, "glob": source.glob},
            "settle": self.settle,
            "marker": self.marker,
            "batch": self.batch,
            "parameter": self.parameter_name,
            "min_files": self.min_files,
            "catch_up": self.catch_up,
        }


class OnSuccess(Trigger):
    """When another pipeline's run has succeeded."""

    def __init__(self, pipeline: str | Pipeline) -> None:
        super().__init__()
        word = getattr(pipeline, "name", pipeline)
        self.pipeline = values.name(word, "the name of a pipeline", self.where)

    def plain(self) -> dict[str, object]:
        return {"kind": "success", "pipeline": self.pipeline}


def _moment(value: datetime | str | None, what: str, where: tuple[str, int], zone: str | None) -> str | None:
    """RFC 3339. A time without an offset is local time in `zone`, and refused where there is none."""
    if value is None:
        return None
    from datetime import datetime

    try:
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(values.text(value, what, where))
    except ValueError:
        raise DefinitionError(
            f"{what} is not a time: {values.shown(value)}", where, 'write it like "2026-11-23T06:00:00+01:00"'
        ) from None
    if moment.tzinfo is None:
        if zone is None:
            raise DefinitionError(f"{what} has no UTC offset: {values.shown(value)}", where, "add one, as in `+01:00`")
        from zoneinfo import ZoneInfo

        try:
            moment = moment.replace(tzinfo=ZoneInfo(zone))
        except (ValueError, OSError, KeyError):
            raise DefinitionError(f"no time zone named `{zone}`", where, "write it like `Europe/Warsaw`") from None
    return moment.isoformat()
