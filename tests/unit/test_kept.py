"""What stays where it was made: when it comes home, when it is believed, and what becomes of it when it is not."""

from __future__ import annotations

import asyncio
import shutil
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from ledger_scene import opened

from mlpiped.artifacts import Store
from mlpiped.backends.base import KeptOutput
from mlpiped.backends.fake import FakeBackend
from mlpiped.clock import SystemClock
from mlpiped.config.settings import Retention
from mlpiped.errors import BackendUnavailable, Conflict
from mlpiped.execution.kept import Kept, digest_for, is_home
from mlpiped.execution.needs import bytes_to_travel
from mlpiped.files.fingerprint import Fingerprinter
from mlpiped.files.hashing import tree_digest
from mlpiped.files.portable import portable_digest
from mlpiped.ledger import moves
from mlpiped.model import OutputFact
from mlpiped.retention.artifacts import STRAY_AGE
from mlpiped.retention.keeper import Keeper
from mlpiped.spec import PipelineSpec, Upstream, version_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from mlpiped.backends.base import Handle, JobOutput
    from mlpiped.ledger import Ledger

pytestmark = pytest.mark.anyio


class KeepingFake(FakeBackend):
    """Its box is a folder: <digest>/<name>."""

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__(name)
        self.folder = folder
        self.bad: set[str] = set()
        self.brought: list[str] = []
        self.dropped: list[tuple[list[str], float]] = []

    async def keep(self, handle: Handle, outputs: Sequence[JobOutput]) -> list[KeptOutput]:
        raise NotImplementedError

    async def bring(self, digest: str, into: Path) -> Path | None:
        await self._call()
        self.brought.append(digest)
        if not (self.folder / digest).exists():
            return None
        (source,) = (self.folder / digest).iterdir()
        into.mkdir(exist_ok=True)
        came = into / f"{len(self.brought)}.came"
        if source.is_dir():
            shutil.copytree(source, came, symlinks=True)
        else:
            shutil.copy(source, came)
        return came

    async def changed(self, digests: Sequence[str] | None = None) -> set[str]:
        await self._call()
        return self.bad if digests is None else self.bad & set(digests)

    async def listed(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    async def drop(self, digests: Sequence[str], min_age: float) -> None:
        self.dropped.append((list(digests), min_age))


class Scene:
    def __init__(self, ledger: Ledger, folder: Path) -> None:
        self.ledger = ledger
        self.store = Store(folder / "state", Fingerprinter(ledger, moves.put_stat_cache))
        (folder / "box").mkdir()
        self.box = KeepingFake("gpu1", folder / "box")
        self.backends = {"local": FakeBackend("local"), "gpu1": self.box}
        self.kept = Kept(ledger, self.store, self.backends, SystemClock())

    def made(self, kind: str = "file") -> OutputFact:
        draft = self.box.folder / "draft"
        if kind == "folder":
            (draft / "a b").mkdir(parents=True)
            (draft / "a b" / "x").write_text("1")
            (draft / "a b" / "x").chmod(0o755)
            (draft / "link").symlink_to("a b/x")
        else:
            draft.write_text("model")
        digest = portable_digest(str(draft))
        (self.box.folder / digest).mkdir()
        draft.rename(self.box.folder / digest / "m.bin")
        return OutputFact("model", digest, kind, 5, self.store.path_of(digest, "m.bin"), compute="gpu1")


@asynccontextmanager
async def scene(folder: Path) -> AsyncIterator[Scene]:
    async with opened(folder / "ledger") as ledger:
        yield Scene(ledger, folder)


@pytest.mark.parametrize("kind", ["file", "folder"])
async def test_it_comes_home_once_and_is_watched_there_like_all_that_is_in_the_store(tmp_path: Path, kind: str) -> None:
    async with scene(tmp_path) as s:
        fact = s.made(kind)
        assert await s.store.intact([fact]) == set() and not is_home(fact)
        await s.kept.bring_home(fact)
        await s.kept.bring_home(fact)
        assert s.box.brought == [fact.digest] and is_home(fact)
        assert portable_digest(fact.path) == fact.digest and await s.store.intact([fact]) == set()
        assert digest_for(fact, "gpu1") == fact.digest and digest_for(fact, "local").startswith(("b3:", "b3t:"))
        copy = await s.store.get(fact, tmp_path / "copy")
        assert portable_digest(str(copy)) == fact.digest
        inner = tmp_path / fact.path / ("a b/x" if kind == "folder" else "")
        inner.chmod(0o644)
        assert await s.store.intact([fact]) == ({0} if kind == "folder" else set()), (
            "an exec bit is of a tree's content"
        )
        inner.write_text("other")
        assert await s.store.intact([fact]) == {0}


async def test_what_comes_home_otherwise_than_it_was_is_refused_and_has_no_bytes_any_more(tmp_path: Path) -> None:
    async with scene(tmp_path) as s:
        fact, lost = s.made(), []
        write = s.ledger.write

        async def watched(*ops: Any, **more: Any) -> Any:
            lost.append(await write(*ops, **more))

        s.ledger.write = watched  # type: ignore[method-assign]
        (s.box.folder / fact.digest / "m.bin").write_text("mode1")
        with pytest.raises(Conflict, match="is gone from `gpu1`, or was changed there"):
            await s.kept.at_hand([fact], "local")
        assert len(lost) == 1 and not is_home(fact) and list(s.store.incoming.iterdir()) == []
        shutil.rmtree(s.box.folder / fact.digest)
        with pytest.raises(Conflict, match="is gone"):
            await s.kept.bring_home(fact)


async def test_a_step_on_the_box_is_given_what_lies_there_only_when_it_is_what_it_was(tmp_path: Path) -> None:
    async with scene(tmp_path) as s:
        fact = s.made()
        await s.kept.at_hand([fact], "gpu1")
        assert s.box.brought == []
        s.box.bad = {fact.digest}
        with pytest.raises(Conflict, match="is gone"):
            await s.kept.at_hand([fact], "gpu1")
        await s.kept.bring_home(fact)
        await s.kept.at_hand([fact], "gpu1")
        assert s.box.dropped == [([fact.digest], 0)], "what came home is sent instead"


async def test_a_box_that_is_away_is_waited_for_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlpiped.execution.kept.FIRST_PAUSE", 0.01)
    async with scene(tmp_path) as s:
        fact, told = s.made(), []
        s.box.unavailable_for = 1
        with pytest.raises(BackendUnavailable):
            await s.kept.at_hand([fact], "local")
        s.box.unavailable_for = 1
        stop = asyncio.Event()
        await s.kept.wait_for([fact], "local", stop, told.append)
        assert told == ["an input is on `gpu1`: `gpu1` does not answer", None] and is_home(fact)
        stop.set()
        s.box.unavailable_for = 1
        await s.kept.wait_for([s.made("folder")], "local", stop, told.append)
        assert s.box.unavailable_for == 1, "who is cancelled asks nobody"


async def test_what_a_compute_keeps_that_the_config_no_longer_has_is_out_of_reach_unless_it_came_home(
    tmp_path: Path,
) -> None:
    async with scene(tmp_path) as s:
        fact, other = s.made(), s.made("folder")
        await s.kept.bring_home(fact)
        del s.backends["gpu1"]
        assert s.kept.within_reach(fact) and not s.kept.within_reach(other)
        with pytest.raises(Conflict, match="which the config no longer has"):
            await s.kept.at_hand([other], "local")


async def test_bytes_travel_to_all_but_the_box_until_they_came_home(tmp_path: Path) -> None:
    async with scene(tmp_path) as s:
        fact = s.made()
        port = SimpleNamespace(name="m", source=Upstream(step="a", output="model"))
        graph = SimpleNamespace(steps=[None, SimpleNamespace(inputs=(port,))], index={"a": 0})
        plan = cast("Any", SimpleNamespace(graph=graph, outputs=[{"model": fact}, None]))
        assert bytes_to_travel(plan, 1, cast("Any", None), s.backends) == {"local": 5}
        await s.kept.bring_home(fact)
        assert bytes_to_travel(plan, 1, cast("Any", None), s.backends) == {}


async def test_gc_drops_on_the_box_what_no_output_has_and_only_what_is_old(tmp_path: Path) -> None:
    async with scene(tmp_path) as s:
        fact = s.made()
        keeper = Keeper(s.ledger, s.store, s.backends, Retention(), {}, SystemClock())
        answer = await keeper.clean()
        assert answer["faults"] == [] and s.box.dropped == [([fact.digest], STRAY_AGE)]


def test_a_tree_has_its_digest_by_names_kinds_and_content_alone(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "d").mkdir(parents=True)
        (tmp_path / name / "d" / "f").write_text("1")
    assert portable_digest(str(tmp_path / "one")) == portable_digest(str(tmp_path / "two"))
    (tmp_path / "two/d/f").chmod(0o755)
    assert portable_digest(str(tmp_path / "one")) != portable_digest(str(tmp_path / "two"))
    assert portable_digest(str(tmp_path / "one"))[4:] != tree_digest([])[4:]


def test_where_an_output_is_kept_is_in_the_version_and_home_is_not_spelled_out() -> None:
    where = {"file": "p.py", "line": 1}
    outputs = [{"name": "m", "file_name": "m"}]

    def version(**more: str) -> str:
        step = {"name": "s", "where": where, "arguments": [], "outputs": [{**outputs[0], **more}]}
        plain = {"name": "p", "where": where, "experiment": "p", "steps": [step]}
        return version_of(PipelineSpec.model_validate(plain))

    assert version() == version(keep="home") != version(keep="remote")
