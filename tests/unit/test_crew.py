"""The threads of the store: what they were given is done, and its end is told, whatever becomes of who asked."""

from __future__ import annotations

import threading

import anyio
import pytest

from mlpiped.artifacts.crew import Crew

pytestmark = pytest.mark.anyio


async def test_what_it_gives_and_what_it_raises_come_to_who_asked() -> None:
    crew = Crew(2, "test")
    assert await crew.do(lambda: 41 + 1) == 42
    with pytest.raises(ZeroDivisionError):
        await crew.do(lambda: 1 // 0)


async def test_no_more_threads_work_at_once_than_it_has_and_all_errands_are_done() -> None:
    crew, lock = Crew(3, "test"), threading.Lock()
    now, most, done = 0, 0, 0
    full = threading.Barrier(3, timeout=20)

    def work() -> None:
        nonlocal now, most, done
        with lock:
            now += 1
            most = max(most, now)
        full.wait()
        with lock:
            now, done = now - 1, done + 1

    async with anyio.create_task_group() as tasks:
        for _ in range(9):
            tasks.start_soon(crew.do, work)
    assert (most, done) == (3, 9)


async def test_who_is_cancelled_waits_until_it_is_done() -> None:
    crew, go, began = Crew(1, "test"), threading.Event(), threading.Event()
    said: list[str] = []

    def work() -> None:
        began.set()
        go.wait(20)
        said.append("done")

    async def ask() -> None:
        try:
            await crew.do(work)
        finally:
            said.append("left")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        await anyio.to_thread.run_sync(began.wait)
        tasks.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            for _ in range(10):
                await anyio.lowlevel.checkpoint()
            assert said == []
            go.set()
    assert said == ["done", "left"]
    assert await crew.do(lambda: "next") == "next"
