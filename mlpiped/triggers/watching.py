"""Hints from the kernel that something changed below a folder. Hints only: inotify loses events, and says nothing.

watchfiles' own generators build their watcher on the event loop (0.2 s for 1,000 folders) and do not tell when it is
armed, so the Rust object beneath them is used in threads of our own: two at most, for trees and for single folders.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import anyio
from anyio import to_thread
from watchfiles._rust_notify import RustNotify

log = logging.getLogger(__name__)

STEP = 20  # milliseconds: changes that come closer together make one hint
DEBOUNCE = 60
TIMEOUT = 60_000
CALM = 10.0  # seconds after which a watcher that broke counts as well again


class Watcher:
    """`want` says which folders; `hint` gets each path that changed, `hint(folder)` when a watch begins or broke;
    both are called in the event loop's thread. `refused` has the folders that the kernel does not watch, and why."""

    def __init__(self, hint: Callable[[bytes], None]) -> None:
        self._hint = hint
        self._wanted: dict[bool, frozenset[bytes]] = {True: frozenset(), False: frozenset()}
        self._poke = {True: anyio.Event(), False: anyio.Event()}
        self._limiter = anyio.CapacityLimiter(16)
        self._pause = {True: 0.0, False: 0.0}
        self._armed: dict[bool, frozenset[bytes]] = {True: frozenset(), False: frozenset()}
        self.refused: dict[bytes, str] = {}

    @property
    def armed(self) -> frozenset[bytes]:
        """The folders that the kernel tells us about now."""
        return self._armed[True] | self._armed[False]

    def want(self, flat: frozenset[bytes], deep: frozenset[bytes], *, again: bool = False) -> None:
        """`again`: arm anew although the paths are the same (one of them is another folder by now)."""
        for kind, paths in ((False, flat - deep), (True, deep)):
            if again or paths != self._wanted[kind]:
                self._wanted[kind] = paths
                self._poke[kind].set()
        self.refused = {path: why for path, why in self.refused.items() if path in flat | deep}

    def again(self) -> None:
        """Ask the kernel once more for all of it."""
        for poke in self._poke.values():
            poke.set()

    async def run(self) -> None:
        """Until cancelled."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._keep, True, name="triggers: watch trees")
            tasks.start_soon(self._keep, False, name="triggers: watch folders")

    async def _keep(self, deep: bool) -> None:
        """A new watcher is armed before the old one is let go, and what it watches is looked at after that."""
        current: _Armed | None = None
        try:
            while True:
                poke = self._poke[deep] = anyio.Event()
                paths = self._wanted[deep]
                armed = await self._arm(paths, deep) if paths else None
                if current is not None:
                    current.stop()
                current = armed
                self._armed[deep] = paths - self.refused.keys() if armed else frozenset()
                for path in paths:
                    self._hint(path)
                if armed is not None:
                    await self._listen(armed, poke, deep)
                else:
                    await poke.wait()
        finally:
            if current is not None:
                current.stop()

    async def _listen(self, armed: _Armed, poke: anyio.Event, deep: bool) -> None:
        """Until something else is wanted or the watcher breaks."""
        began = time.monotonic()
        async with anyio.create_task_group() as tasks:

            async def wanted() -> None:
                await poke.wait()
                tasks.cancel_scope.cancel()

            tasks.start_soon(wanted)
            while True:
                changes = await to_thread.run_sync(armed.next, limiter=self._limiter, abandon_on_cancel=True)
                if changes is None:
                    break
                for path in changes:
                    self._hint(path)
            tasks.cancel_scope.cancel()
        if not poke.is_set():  # it broke: a name that is not UTF-8, or something unforeseen
            calm = time.monotonic() - began > CALM
            self._pause[deep] = 0.0 if calm else min(2 * self._pause[deep] + 0.02, 2.0)
            await anyio.sleep(self._pause[deep])

    async def _arm(self, paths: frozenset[bytes], deep: bool) -> _Armed | None:
        armed, refused = await to_thread.run_sync(_arm, paths, deep, limiter=self._limiter)
        new = refused.keys() - self.refused.keys()
        self.refused = {path: why for path, why in self.refused.items() if path not in paths} | refused
        if new:
            some = ", ".join(os.fsdecode(path) for path in sorted(new)[:3])
            log.warning("%s: looked at by polling instead: %s", refused[min(new)], some)
        return armed


class _Armed:
    def __init__(self, notify: Any) -> None:
        self._notify = notify
        self._stopped = threading.Event()

    def next(self) -> set[bytes] | None:
        """The paths of the next changes, waiting in this thread; None when stopped or broken."""
        while not self._stopped.is_set():
            try:
                changes = self._notify.watch(DEBOUNCE, STEP, TIMEOUT, self._stopped)
            except Exception as error:  # whatever its Rust side does not understand
                log.debug("the watcher broke: %r", error)
                self.stop()
                return None
            if isinstance(changes, set):
                return {os.fsencode(path) for _, path in changes}
            if changes != "timeout":
                break
        self.stop()
        return None

    def stop(self) -> None:
        """Takes effect within a step. The Rust object closes when it is let go: not here, while `next` may be in it."""
        self._stopped.set()


def _arm(paths: frozenset[bytes], deep: bool) -> tuple[_Armed | None, dict[bytes, str]]:
    """A watcher of all folders that the kernel lets us watch, and the reasons for the others."""
    try:
        return _Armed(_notify(paths, deep)), {}
    except Exception as error:
        refused = {next(iter(paths)): _reason(error)} if len(paths) == 1 else {}
    for path in () if refused else paths:  # one bad folder must not blind us to the others
        try:
            _notify([path], deep).close()
        except Exception as error:
            refused[path] = _reason(error)
    good = paths - refused.keys()
    if not good or not refused:
        return None, refused or dict.fromkeys(paths, "the kernel refuses so many watches at once")
    armed, more = _arm(good, deep)
    return armed, refused | more


def _notify(paths: frozenset[bytes] | list[bytes], deep: bool) -> Any:
    return RustNotify([os.fsdecode(path) for path in paths], False, False, 0, deep, False)


def _reason(error: Exception) -> str:
    text = str(error).lower()
    if "watch limit" in text or "no space left" in text:
        return "inotify's limit of watches is reached"
    if "too many open files" in text:
        return "inotify's limit of instances is reached"
    if isinstance(error, PermissionError) or "permission denied" in text:
        return "a folder cannot be read"
    if isinstance(error, FileNotFoundError) or "no such file" in text or "no path was found" in text:
        return "the folder is gone"
    return "inotify failed"
