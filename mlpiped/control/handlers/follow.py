"""Verbs that wait: for the end of a run, for what happens next, for what steps print."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio

from mlpiped.control.answers import Stream, event_stream
from mlpiped.control.log_files import LogReader
from mlpiped.control.views import brief_json, event_json, run_json
from mlpiped.errors import UsageError
from mlpiped.model import RunState

if TYPE_CHECKING:
    from aiohttp import web

    from mlpiped.control.requests import EventsQuery, LogsQuery, WaitQuery
    from mlpiped.control.route import Ask
    from mlpiped.ledger.rows import EventRow, RunRow

PAGE = 1000  # events read at once


async def wait(ask: Ask) -> Any:
    """The run as soon as it has finished; as it is when the time is over or the daemon stops."""
    query: WaitQuery = ask.query
    service = ask.service
    row = await service.lookup.run(ask.names["run"])
    with service.ledger.subscribe(runs={row.id}, kinds=("run.finished",)) as news:
        row = await service.ledger.run(row.id) or row
        if row.state is not RunState.FINISHED:
            with anyio.move_on_after(query.timeout):
                async with anyio.create_task_group() as tasks:

                    async def until_closing() -> None:
                        await service.closing.wait()
                        tasks.cancel_scope.cancel()

                    tasks.start_soon(until_closing, name="wait: until closing")
                    async for _ in news:
                        break
                    tasks.cancel_scope.cancel()
    row = await service.ledger.run(row.id) or row
    steps = await service.lookup.steps(row)
    return brief_json(row, steps) if query.brief else run_json(row, steps)


# --- events ---------------------------------------------------------------------------------------------------------
async def events(ask: Ask) -> Any:
    """The last ones, or those after a number; with `follow` as a stream that goes on."""
    query: EventsQuery = ask.query
    service = ask.service
    run = None if query.run is None else await service.lookup.run(query.run)
    after = _after(ask, query.after)
    if query.follow:
        return await event_stream(ask.request, service.closing, lambda stream: _follow(ask, stream, after, run))
    run_id = None if run is None else run.id
    if after is not None:
        rows = await service.ledger.events(after, query.limit, run=run_id)
    elif run_id is not None:
        rows = []
        while page := await service.ledger.events(rows[-1].id if rows else 0, PAGE, run=run_id):
            rows = (rows + page)[-query.limit :]
    else:
        rows = await service.ledger.events(max(0, await service.ledger.last_event() - query.limit), query.limit)
    return {"events": [event_json(row, await _step(ask, row)) for row in rows]}


def _after(ask: Ask, given: int | None) -> int | None:
    """`Last-Event-ID` is what a browser sends when it comes back."""
    last = ask.request.headers.get("Last-Event-ID")
    if last is None:
        return given
    if not (last.isascii() and last.isdigit() and len(last) < 19):
        raise UsageError("`Last-Event-ID` is not a number")
    return int(last)


async def _follow(ask: Ask, stream: Stream, after: int | None, run: RunRow | None) -> None:
    """Committed events in order, each once: history, then what comes. Who was too slow reads history again."""
    ledger = ask.service.ledger
    run_id = None if run is None else run.id
    last = await ledger.last_event() if after is None and run_id is None else after or 0
    while True:
        with ledger.subscribe(runs=None if run_id is None else {run_id}) as news:
            while rows := await ledger.events(last, PAGE, run=run_id):
                last = await _send(ask, stream, rows, last)
            if run_id is not None and await _ended(ask, run_id):
                await stream.end({"run": run_id})
                return
            async for rows in news:
                last = await _send(ask, stream, rows, last)
                if run_id is not None and any(row.kind == "run.finished" for row in rows):
                    await stream.end({"run": run_id})
                    return
        if ask.service.closing.is_set():
            return


async def _send(ask: Ask, stream: Stream, rows: list[EventRow], last: int) -> int:
    for row in rows:
        if row.id > last:
            last = row.id
            await stream.send(event_json(row, await _step(ask, row)), number=row.id)
    return last


async def _step(ask: Ask, row: EventRow) -> str | None:
    if row.run_id is None or row.idx is None:
        return None
    return await ask.service.lookup.step_name(row.run_id, row.idx)


async def _ended(ask: Ask, run_id: int) -> bool:
    row = await ask.service.ledger.run(run_id)
    return row is None or row.state is RunState.FINISHED


# --- logs -----------------------------------------------------------------------------------------------------------
async def logs(ask: Ask) -> web.StreamResponse:
    """What the steps printed, in pieces: {"step", "attempt", "stream", "offset", "text" | "data" (base64)}, and
    "skipped" where so many bytes before `offset` were not kept."""
    query: LogsQuery = ask.query
    service = ask.service
    run = await service.lookup.run(ask.names["run"])
    step = None if query.step is None else await service.lookup.step(run, query.step)
    if query.attempt is not None and step is None:
        raise UsageError("an attempt is one of a step", hint="name the step too: `RUN/STEP --attempt N`")
    streams = ("stdout", "stderr") if query.stream == "both" else (query.stream,)
    reader = LogReader(service, run, step, query.attempt, streams)
    await reader.check()

    async def produce(stream: Stream) -> None:
        with service.ledger.subscribe(runs={run.id}) as news:
            await reader.send_all(stream, news if query.follow else None)
        await stream.end({"run": run.id})

    return await event_stream(ask.request, service.closing, produce)
