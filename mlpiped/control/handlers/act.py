"""Verbs that change something. `routes` says who may; the audit row is written before any of these is called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlpiped import protocol
from mlpiped.control.answers import document
from mlpiped.control.handlers.look import loaded
from mlpiped.errors import Conflict, UnknownName, UsageError
from mlpiped.model import RunState

if TYPE_CHECKING:
    from aiohttp import web

    from mlpiped.control.requests import CancelRun, StartRun, SubmitFile
    from mlpiped.control.route import Ask
    from mlpiped.ledger.rows import RunRow

KEY_LIMIT = 200


# --- who may --------------------------------------------------------------------------------------------------------
async def may_start(ask: Ask) -> None:
    spec = loaded(ask, ask.names["pipeline"]).spec
    ask.service.access.start(ask.peer, spec.name, spec.where.file)


async def may_cancel(ask: Ask) -> None:
    row = await _run(ask)
    ask.service.access.own(ask.peer, "cancel", row.id, row.owner)


async def may_retry(ask: Ask) -> None:
    row = await _run(ask)
    ask.service.access.own(ask.peer, "retry", row.id, row.owner)


async def may_submit(ask: Ask) -> None:
    ask.service.access.act(ask.peer, "submit a file: it runs as the daemon's user")


async def may_pause(ask: Ask) -> None:
    ask.service.access.act(ask.peer, f"pause or resume `{ask.names['pipeline']}`")


async def may_drain(ask: Ask) -> None:
    ask.service.access.act(ask.peer, f"drain or undrain `{ask.names['compute']}`")


async def may_reload(ask: Ask) -> None:
    ask.service.access.act(ask.peer, "reload the config and the plugins")


async def may_gc(ask: Ask) -> None:
    ask.service.access.act(ask.peer, "remove what is old")


async def may_backup(ask: Ask) -> None:
    ask.service.access.act(ask.peer, "copy the ledger")


async def _run(ask: Ask) -> RunRow:
    """The run of the path, looked up once: `latest` must not change between permission and deed."""
    row: RunRow | None = ask.remembered.get("run")
    if row is None:
        row = ask.remembered["run"] = await ask.service.lookup.run(ask.names["run"])
    return row


# --- what is done ---------------------------------------------------------------------------------------------------
async def start(ask: Ask) -> web.Response:
    body: StartRun = ask.body
    spec = loaded(ask, ask.names["pipeline"]).spec
    key = ask.request.headers.get("Idempotency-Key")
    if key is not None and (not key or len(key) > KEY_LIMIT or not key.isprintable()):
        raise UsageError(f"`Idempotency-Key` must be 1 to {KEY_LIMIT} printable characters")
    parameters = protocol.typed_parameters(body.plain_parameters(), spec.parameters)
    _known_steps(ask, [s.name for s in spec.steps])
    run_id, created = await ask.service.actions.start(
        spec.name,
        parameters=dict(parameters),
        force=body.forced(),
        target=body.target,
        tags=body.tags,
        kind="manual" if ask.request.headers.get("User-Agent", "").startswith("mlpipectl") else "api",
        who=ask.peer.name,
        idempotency_key=key,
    )
    return document({"id": run_id, "pipeline": spec.name, "created": created}, 201 if created else 200)


def _known_steps(ask: Ask, names: list[str]) -> None:
    body: StartRun = ask.body
    for name in [*(body.force if isinstance(body.force, list) else ()), *([body.target] if body.target else ())]:
        if name not in names:
            raise UnknownName.among("step", name, names)


async def submit(ask: Ask) -> Any:
    body: SubmitFile = ask.body
    run_id = await ask.service.actions.submit(
        body.file,
        parameters=body.plain_parameters(),
        force=body.forced(),
        target=body.target,
        tags=body.tags,
        who=ask.peer.name,
    )
    return {"id": run_id, "created": True}


async def cancel(ask: Ask) -> Any:
    body: CancelRun = ask.body
    row = await _run(ask)
    if body.step is not None:
        await ask.service.lookup.step(row, body.step)
    if row.state is RunState.FINISHED:
        raise Conflict(f"run {row.id} has finished already: {row.outcome}")
    await ask.service.actions.cancel(row.id, body.step, ask.peer.name)
    return {"id": row.id, "step": body.step, "cancelled": True}


async def retry(ask: Ask) -> Any:
    row = await _run(ask)
    if row.state is not RunState.FINISHED:
        hint = f"`mlpipectl wait {row.id}` waits for its end, `mlpipectl cancel {row.id}` ends it now"
        raise Conflict(f"run {row.id} has not finished yet", hint=hint)
    return {"id": await ask.service.actions.retry(row.id, ask.peer.name), "retry_of": row.id, "created": True}


async def pause(ask: Ask) -> Any:
    spec = loaded(ask, ask.names["pipeline"]).spec
    await ask.service.actions.pause(spec.name, ask.peer.name)
    return {"pipeline": spec.name, "paused": True}


async def resume(ask: Ask) -> Any:
    name = ask.names["pipeline"]
    if name not in await ask.service.ledger.paused():  # one whose plugin is gone can be resumed too
        loaded(ask, name)
    await ask.service.actions.resume(name, ask.peer.name)
    return {"pipeline": name, "paused": False}


async def drain(ask: Ask) -> Any:
    return await _drained(ask, True)


async def undrain(ask: Ask) -> Any:
    return await _drained(ask, False)


async def _drained(ask: Ask, drained: bool) -> Any:
    name = ask.names["compute"]
    await ask.service.actions.drain(name, drained, ask.peer.name)
    return {"compute": name, "drained": drained}


async def gc(ask: Ask) -> Any:
    return await ask.service.gc()


async def reload(ask: Ask) -> Any:
    return await ask.service.actions.reload(ask.peer.name)
