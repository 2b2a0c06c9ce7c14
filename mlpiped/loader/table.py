"""PURE: which pipeline is served from which file. A file keeps its last good version; a name belongs to the first."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from mlpiped.errors import Fault
from mlpiped.loader.load import Known, LoadResult, checked
from mlpiped.spec import PipelineSpec, version_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mlpiped.spec_check import CheckCron


@dataclass(frozen=True, slots=True)
class Loaded:
    """A pipeline that is served. `owner` is the name of the user whose file it is; times are µs since the epoch."""

    spec: PipelineSpec
    version: str
    file: str
    owner: str
    loaded_at: int


@dataclass(frozen=True, slots=True)
class Broken:
    """A plugin file with faults. `serving` are the last good versions, by pipeline, that fire meanwhile."""

    file: str
    faults: tuple[Fault, ...]
    since: int
    serving: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Good:
    """A version of a pipeline without fault. `order`: when its file first claimed the name."""

    spec: PipelineSpec
    version: str
    order: int
    loaded_at: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """What was loaded, checked against the names that are known now."""

    raw: LoadResult
    versions: tuple[tuple[PipelineSpec, str], ...]
    faults: tuple[Fault, ...]


def prepared(raw: LoadResult, known: Known, check_cron: CheckCron | None) -> Prepared:
    """The costly part of taking a result: fit for a thread."""
    result = checked(raw, known, check_cron)
    return Prepared(raw, tuple((spec, version_of(spec)) for spec in result.pipelines), result.faults)


@dataclass(slots=True)
class Entry:
    """One plugin file: what loading it gave last, and what of it is good."""

    file: str
    owner: str
    raw: LoadResult
    goods: dict[str, Good] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()
    since: int = 0

    def take(self, made: Prepared, now: int, order: int) -> None:
        """Replace what was loaded. `order` is given to the names that the file claims anew."""
        self.raw = made.raw
        if made.raw.imported:  # else nobody knows what it would define: all of it stays
            self.goods = {name: good for name, good in self.goods.items() if name in made.raw.named}
        for spec, version in made.versions:
            old = self.goods.get(spec.name)
            same = old is not None and old.version == version
            self.goods[spec.name] = Good(
                spec,
                version,
                order if old is None else old.order,
                old.loaded_at if old is not None and same else now,
            )
        if made.faults and not self.faults:
            self.since = now
        self.faults = made.faults

    def plain(self) -> dict[str, Any]:
        raw = self.raw
        return {
            "owner": self.owner,
            "since": self.since,
            "files": dict(raw.files),
            "imported": raw.imported,
            "named": sorted(raw.named),
            "refused": raw.refused,
            "faults": [[f.file, f.line, f.message, f.hint] for f in raw.faults],
            "pipelines": [spec.model_dump_json() for spec in raw.pipelines],
            "goods": [
                {
                    "name": name,
                    "order": good.order,
                    "loaded_at": good.loaded_at,
                    "version": good.version,
                    # usually it is what was loaded last, and stored above
                    "spec": None if any(good.spec is one for one in raw.pipelines) else good.spec.model_dump_json(),
                }
                for name, good in list(self.goods.items())
            ],
        }

    @classmethod
    def of_plain(cls, file: str, plain: dict[str, Any]) -> Entry:
        """Raises one of UNREADABLE."""
        raw = LoadResult(
            file,
            tuple(PipelineSpec.model_validate_json(one) for one in plain["pipelines"]),
            tuple(Fault(*one) for one in plain["faults"]),
            dict(plain["files"]),
            plain["imported"],
            frozenset(plain["named"]),
            plain["refused"],
        )
        entry = cls(file, plain["owner"], raw, since=plain["since"])
        last = {spec.name: spec for spec in raw.pipelines}
        for good in plain["goods"]:
            spec = last[good["name"]] if good["spec"] is None else PipelineSpec.model_validate_json(good["spec"])
            entry.goods[spec.name] = Good(spec, str(good["version"]), int(good["order"]), int(good["loaded_at"]))
        return entry


UNREADABLE = (ValueError, KeyError, TypeError, ValidationError)
"""What `Entry.of_plain` raises for something that this version did not write."""


@dataclass(frozen=True, slots=True)
class Table:
    """What all entries together serve."""

    loaded: Mapping[str, Loaded]
    broken: tuple[Broken, ...]


def table_of(entries: Mapping[str, Entry], now: int, since: Mapping[str, int]) -> Table:
    """The first file to claim a name has it; the others get a fault that names both. `since`: by file, of faults."""
    claims = sorted(
        ((good.order, entry.file, name) for entry in entries.values() for name, good in entry.goods.items()),
    )
    loaded: dict[str, Loaded] = {}
    doubles: dict[str, list[Fault]] = {}
    for _, file, name in claims:
        entry = entries[file]
        good = entry.goods[name]
        first = loaded.get(name)
        if first is None:
            loaded[name] = Loaded(good.spec, good.version, file, entry.owner, good.loaded_at)
            continue
        where = good.spec.where
        message = f"pipeline `{name}` is defined in two files: `{first.file}` has it, and `{file}` defines it again"
        fault = Fault(where.file, where.line, message, "rename one of them")
        doubles.setdefault(file, []).append(fault)
    broken = []
    for file, entry in sorted(entries.items()):
        faults = (*entry.faults, *doubles.get(file, ()))
        if faults:
            serving = {name: one.version for name, one in sorted(loaded.items()) if one.file == file}
            began = entry.since if entry.faults else since.get(file, now)
            shown = file.encode(errors="backslashreplace").decode()
            broken.append(Broken(shown, faults, began, serving))
    return Table(dict(sorted(loaded.items())), tuple(broken))
