"""The plugins that are installed: kept up to date, and over a restart. The watch is a hint; a scan is the truth."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
from watchfiles import awatch

from mlpiped.clock import Clock, SystemClock
from mlpiped.errors import Fault
from mlpiped.loader import cache
from mlpiped.loader.files import Digests, folders_to_watch, ignored, owner_of, plugins_in
from mlpiped.loader.load import Known, LoadResult, Trust, load_file
from mlpiped.loader.process import Limits
from mlpiped.loader.table import UNREADABLE, Broken, Entry, Loaded, Table, prepared, table_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Sequence

    from anyio.abc import TaskGroup
    from watchfiles import Change

    from mlpiped.spec_check import CheckCron

_log = logging.getLogger("mlpiped.loader")

RESCAN = 30.0  # seconds
_BLIND_RESCAN = 0.5  # while no watcher can be had
_AT_ONCE = 2
_RETRY = 0.5  # seconds until a refused file is looked at again; doubled each time for one that never holds still


class Registry:
    """All plugins of `folders`.

    `known` gives the names of the config, `check_cron` reads a crontab expression. `on_change` is called after
    what `get`, `all` or `broken` give has changed, but not by `start`.
    """

    def __init__(
        self,
        folders: Sequence[str | os.PathLike[str]],
        state_dir: Path,
        known: Callable[[], Known],
        check_cron: CheckCron | None,
        on_change: Callable[[], Awaitable[None]],
        *,
        limits: Limits | None = None,
        trusted: Trust | None = None,
        clock: Clock | None = None,
        rescan: float = RESCAN,
    ) -> None:
        self.folders = [os.path.abspath(os.fspath(one)) for one in folders]
        self.imports = 0  # child processes started
        self._cache = Path(state_dir) / "plugins.json"
        self._known = known
        self._check_cron = check_cron
        self._on_change = on_change
        self._limits = limits or Limits()
        self._trusted = trusted or Trust(strict=True)
        self._clock = clock or SystemClock()
        self._rescan = rescan
        self._digests = Digests()
        self._entries: dict[str, Entry] = {}
        self._table = Table({}, ())
        self._missing: dict[str, Broken] = {}
        self._double_since: dict[str, int] = {}
        self._order = 0
        self._refusals: dict[str, tuple[int, float]] = {}  # how often in a row, and when to try again (monotonic)
        self._looking = anyio.Lock()
        self._tracked: frozenset[str] = frozenset()
        self._loading: set[str] = set()
        self._slots = anyio.CapacityLimiter(_AT_ONCE)
        self._wake = anyio.Event()
        self._rearm = anyio.Event()
        self._watched: frozenset[str] = frozenset()
        self._dirty = False
        self._started = False

    # --- what others ask ---------------------------------------------------------------------------------
    def get(self, name: str) -> Loaded | None:
        return self._table.loaded.get(name)

    def all(self) -> list[Loaded]:
        """Sorted by name."""
        return list(self._table.loaded.values())

    def broken(self) -> list[Broken]:
        """Sorted by file; plugins folders that cannot be read come first."""
        return [*self._missing.values(), *self._table.broken]

    # --- the ways to look --------------------------------------------------------------------------------
    async def start(self) -> None:
        """Take what is unchanged from the cache, and import the rest."""
        await anyio.to_thread.run_sync(self._restore)
        async with anyio.create_task_group() as tasks:
            await self._look(tasks)
        await self._save()
        self._started = True

    async def reload(self, *, force: bool = False) -> None:
        """Look at every byte again, try what is broken again, and check all against the names that are known now.

        With `force` every plugin is imported again. Returns when that is done.
        """
        self._digests.forget()
        self._refusals.clear()
        known = self._known()
        for file, entry in list(self._entries.items()):
            made = await anyio.to_thread.run_sync(prepared, entry.raw, known, self._check_cron)
            if self._entries.get(file) is entry and entry.raw is made.raw:
                entry.take(made, self._clock.now(), self._ticket())
        await self._changed()
        async with anyio.create_task_group() as tasks:
            again = set(self._entries) if force else {file for file, one in self._entries.items() if one.faults}
            await self._look(tasks, again)
        await self._save()

    async def run(self) -> None:
        """Follow the folders until cancelled. A drop, change or removal is taken up within a second."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._watch, name="watch plugins")
            try:
                while True:
                    with anyio.move_on_after(self._patience()):
                        await self._wake.wait()
                    self._wake = anyio.Event()
                    await self._look(tasks)
            finally:
                self._rearm.set()  # lets the watcher's thread go at once

    # --- looking -----------------------------------------------------------------------------------------
    def _ticket(self) -> int:
        """The next place in the order in which names are claimed."""
        self._order += 1
        return self._order

    def _patience(self) -> float:
        """Seconds until the next look without a hint."""
        if not self._watched:
            return _BLIND_RESCAN
        now = self._clock.monotonic()
        return min(
            [
                self._rescan,
                *(max(0.0, at - now) for file, (_, at) in self._refusals.items() if file not in self._loading),
            ]
        )

    async def _look(self, tasks: TaskGroup, again: Collection[str] = ()) -> None:
        """Compare the folders with what is known; drop what is gone, load what is new or changed."""
        async with self._looking:
            found, missing = await anyio.to_thread.run_sync(self._scan)
            changed = self._note_missing(missing)
            lost = tuple(folder + os.sep for folder in missing)
            for file in [one for one in self._entries if one not in found and not one.startswith(lost)]:
                del self._entries[file]
                self._refusals.pop(file, None)
                self._dirty = changed = True
            stale = await anyio.to_thread.run_sync(self._stale, list(found), again)
            if changed:
                await self._changed(True)
            for file in stale:
                if file not in self._loading:
                    self._loading.add(file)
                    tasks.start_soon(self._load, file, self._ticket(), name=f"load {file}")
            if changed and not stale and self._started:
                await self._save()
            watched = await anyio.to_thread.run_sync(self._to_watch)
            if self._watched and watched != self._watched:
                self._rearm.set()

    def _scan(self) -> tuple[dict[str, None], dict[str, str]]:
        """(plugin files in load order, folders that cannot be read and why)."""
        found: dict[str, None] = {}
        missing: dict[str, str] = {}
        for folder in self.folders:
            try:
                found.update(dict.fromkeys(plugins_in(folder)))
            except FileNotFoundError:
                missing[folder] = "the plugins folder does not exist"
            except OSError as error:
                missing[folder] = f"the plugins folder cannot be read: {error.strerror}"
        return found, missing

    def _stale(self, found: Sequence[str], again: Collection[str]) -> list[str]:
        """Those to load: new and changed ones first, then those that are tried again."""
        retried = []
        changed = []
        now = self._clock.monotonic()
        for file in found:
            entry = self._entries.get(file)
            _, at = self._refusals.get(file, (0, 0.0))
            if entry is None or not self._digests.hold(entry.raw.files):
                changed.append(file)
            elif file in again or (entry.raw.refused and now >= at):
                retried.append(file)
        return changed + retried

    def _to_watch(self) -> frozenset[str]:
        entries = list(self._entries.values())
        self._tracked = frozenset(file for entry in entries for file in entry.raw.files)
        return folders_to_watch(self.folders, self._tracked)

    def _note_missing(self, missing: dict[str, str]) -> bool:
        """What a folder that went away held stays: an unmounted disk is not a wish to remove everything."""
        before = self._missing
        self._missing = {
            folder: before.get(folder)
            or Broken(
                folder,
                (Fault(folder, 0, message, "what was loaded from it stays"),),
                self._clock.now(),
            )
            for folder, message in missing.items()
        }
        return before.keys() != self._missing.keys()

    async def _load(self, file: str, ticket: int) -> None:
        try:
            async with self._slots:
                self.imports += 1
                raw = await load_file(
                    file,
                    limits=self._limits,
                    trusted=self._trusted,
                    roots=self.folders,
                    plugins=list(self._entries),
                )
            await self._take(file, raw, ticket)
        except OSError as error:  # no process, no descriptor: ours, not the author's, and it passes
            _log.warning("a plugin could not be loaded now: %s: %s", file, error)
            return
        finally:
            self._loading.discard(file)
        if not self._loading and self._started:
            await self._save()
        self._wake.set()  # it may have changed meanwhile

    async def _take(self, file: str, raw: LoadResult, ticket: int) -> None:
        if raw.refused:
            if not await anyio.to_thread.run_sync(os.path.lexists, file):
                return  # removed meanwhile: the next look drops it
            count = self._refusals.get(file, (0, 0.0))[0] + 1 if raw.restless else 0
            pause = min(self._rescan, _RETRY * 2 ** min(count, 10))
            self._refusals[file] = (count, self._clock.monotonic() + pause)
        else:
            self._refusals.pop(file, None)
        entry = self._entries.get(file)
        if entry is not None and raw.refused and entry.raw.refused and raw.faults == entry.raw.faults:
            return
        made = await anyio.to_thread.run_sync(prepared, raw, self._known(), self._check_cron)
        owner = await anyio.to_thread.run_sync(owner_of, file)
        entry = self._entries.setdefault(file, Entry(file, owner, raw))
        before, entry.owner = entry.faults, owner
        entry.take(made, self._clock.now(), ticket)
        if entry.faults and entry.faults != before:
            faults = "\n".join(map(str, entry.faults))
            _log.warning("a plugin has faults: %s", faults, extra={"detail": raw.detail})
        self._dirty = True
        await self._changed()

    def _settle(self) -> bool:
        """Make the table anew; whether it differs."""
        before = self._table
        self._table = table_of(self._entries, self._clock.now(), self._double_since)
        self._double_since = {one.file: one.since for one in self._table.broken}
        return self._table != before

    async def _changed(self, otherwise: bool = False) -> None:
        if (self._settle() or otherwise) and self._started:
            await self._on_change()

    # --- over a restart ----------------------------------------------------------------------------------
    def _restore(self) -> None:
        same, stored = cache.read(self._cache)
        known = self._known()
        for file in sorted(stored):
            try:
                entry = Entry.of_plain(file, stored[file])
            except UNREADABLE as error:
                _log.warning("a cached plugin cannot be read, it is imported again: %s: %s", file, error)
                continue
            if not same:
                entry.raw = LoadResult(file, files={file: "?"})  # import again; what was good serves until then
            entry.take(prepared(entry.raw, known, self._check_cron), entry.since or self._clock.now(), 0)
            self._order = max([self._order, *(good.order for good in entry.goods.values())])
            self._entries[file] = entry
        self._settle()

    async def _save(self) -> None:
        if self._dirty:
            self._dirty = False
            entries = dict(self._entries)
            await anyio.to_thread.run_sync(self._store, entries)

    def _store(self, entries: dict[str, Entry]) -> None:
        cache.write(self._cache, {file: entry.plain() for file, entry in entries.items()})

    # --- the hint ----------------------------------------------------------------------------------------
    async def _watch(self) -> None:
        """Wake the scan when something in a folder of interest changes. A watcher that dies is replaced."""
        while True:
            self._rearm = anyio.Event()
            watched = await anyio.to_thread.run_sync(self._to_watch)
            try:
                self._watched = watched
                self._wake.set()  # what happened before the watcher was there
                async for batch in awatch(
                    *sorted(watched),
                    watch_filter=self._matters,
                    debounce=300,
                    step=150,  # milliseconds: each one wakes a thread
                    stop_event=self._rearm,
                    recursive=False,
                ):
                    self._wake.set()
                    if any(path in watched for _, path in batch):
                        break  # a watched folder itself came or went: its watch is deaf now
            except Exception as error:  # of its own task group, or of the Rust side: a bad file name, a kernel limit
                self._watched = frozenset()
                self._wake.set()
                _log.warning("the plugins folders cannot be watched, they are scanned instead: %r", error)
                await self._clock.sleep(5.0)

    def _matters(self, change: Change, path: str) -> bool:
        """Whether a change of `path` can concern a plugin: the folders that are watched hold other things too."""
        folder, name = os.path.split(path)
        if path in self._tracked or path in self._watched:
            return True
        if ignored(name):
            return False
        if folder in self.folders or name == "__init__.py":
            return True
        below = path + os.sep
        return any(one.startswith(below) for one in (*self.folders, *self._tracked))
