"""What goes back: JSON documents, refusals, and streams that end when the daemon does."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import anyio
import structlog
from aiohttp import web

from mlpiped.errors import LedgerFull, MlpipedError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from mlpiped.protocol import ErrorJson

log = structlog.get_logger("control")

WRITE_LIMIT = 30.0  # seconds that a peer may let a stream stand
PING = 10.0  # seconds


def encoded(value: Any) -> bytes:
    """Compact JSON. Names of files that are no UTF-8 are shown with `?`: a document must be readable whole."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "replace")


def document(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=encoded(value) + b"\n", status=status, content_type="application/json", charset="utf-8")


def problem(error: MlpipedError) -> ErrorJson:
    kind = re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__).lower()
    return {"kind": kind, "message": error.message, "hint": error.hint}


def refusal(error: BaseException) -> web.Response:
    """Any error as its answer. Only what nobody foresaw is logged: with its traceback, which the peer never sees."""
    if isinstance(error, MlpipedError):
        status = 507 if isinstance(error, LedgerFull) else error.http_status
        return document({"error": problem(error)}, status)
    if isinstance(error, web.HTTPException):
        return document({"error": _http_problem(error)}, error.status)
    log.error("a request failed", exc_info=error)
    fault: ErrorJson = {
        "kind": "internal",
        "message": "something went wrong inside the daemon",
        "hint": "its log has the details: `journalctl -u mlpiped`",
    }
    return document({"error": fault}, 500)


def _http_problem(error: web.HTTPException) -> ErrorJson:
    if error.status == 404:
        return {"kind": "no_route", "message": "no such path", "hint": "`GET /v1/openapi.json` lists all of them"}
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return {"kind": "no_method", "message": f"{error.method} is not possible here", "hint": f"possible: {allowed}"}
    if error.status == 413:
        return {"kind": "too_large", "message": "the body is larger than 1 MiB", "hint": None}
    return {"kind": "http", "message": (error.reason or "bad request").lower(), "hint": None}


class Stream:
    """Server-sent events to one peer. Raises ConnectionError when it is gone, TimeoutError when it does not read."""

    def __init__(self, response: web.StreamResponse) -> None:
        self._response = response

    async def send(self, value: Any, *, event: str | None = None, number: int | None = None) -> None:
        lines = [b"event: " + event.encode()] if event else []
        if number is not None:
            lines.append(b"id: %d" % number)
        lines.append(b"data: " + encoded(value))
        await self._write(b"\n".join(lines) + b"\n\n")

    async def end(self, value: Any) -> None:
        """The last word. What follows has no reason to be read."""
        await self.send(value, event="end")

    async def ping(self) -> None:
        while True:
            await anyio.sleep(PING)
            await self._write(b": ping\n\n")

    async def _write(self, data: bytes) -> None:
        with anyio.fail_after(WRITE_LIMIT):
            await self._response.write(data)


async def event_stream(
    request: web.Request, closing: anyio.Event, produce: Callable[[Stream], Awaitable[None]]
) -> web.StreamResponse:
    """Answer `request` with what `produce` sends, until it returns, the peer goes or the daemon stops."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
    await response.prepare(request)
    stream = Stream(response)
    gone = False
    try:
        async with anyio.create_task_group() as tasks:

            async def until_closing() -> None:
                await closing.wait()
                tasks.cancel_scope.cancel()

            tasks.start_soon(until_closing, name="stream: until closing")
            tasks.start_soon(stream.ping, name="stream: ping")
            await produce(stream)
            tasks.cancel_scope.cancel()
    except* (ConnectionError, TimeoutError):
        gone = True
    except* MlpipedError as errors:
        with anyio.move_on_after(1):
            await stream.send({"error": problem(_first(errors))}, event="error")
    if gone:
        response.force_close()
    elif closing.is_set():
        with anyio.move_on_after(0.5):
            await stream.end({"reason": "stopping"})
    return response


def _first(errors: BaseExceptionGroup[MlpipedError]) -> MlpipedError:
    found: BaseException = errors
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert isinstance(found, MlpipedError)
    return found
