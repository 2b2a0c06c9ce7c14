"""The API server: a Unix socket, one check of the peer per request, one table of routes.

Order of a request: who asks (403 before anything else is said) -> route -> `permit` -> body, bounded in size and time
-> models -> audit row -> handler. Whatever goes wrong is one JSON refusal.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import TYPE_CHECKING, Any

import anyio
import structlog
from aiohttp import web

from mlpiped.control import listening, requests
from mlpiped.control.access import Peer, credentials
from mlpiped.control.answers import document, refusal
from mlpiped.control.route import Ask, Route
from mlpiped.control.routes import ROUTES
from mlpiped.errors import UsageError
from mlpiped.ledger import moves
from mlpiped.protocol import BODY_LIMIT

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Sequence
    from contextlib import AsyncExitStack
    from pathlib import Path

    from mlpiped.control.service import Service

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = structlog.get_logger("control")

PEER = web.RequestKey("peer", Peer)
BODY_TIME = 10.0  # seconds for a whole body
FIRST_REQUEST_TIME = 10.0  # seconds from the connection to the end of the first request's headers
CONNECTIONS = 256
CONNECTIONS_PER_USER = 128
# From 3.13 on asyncio removes the file of any socket that it served, also of one that systemd keeps.
_FILE_STAYS: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
_BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\n"
    b'Content-Length: 109\r\n\r\n{"error":{"kind":"busy","message":"too many connections to the daemon",'
    b'"hint":"close some, then try again"}}\n'
)


class ControlServer:
    """Serves `service` on `path` from `start` until the stack that it was given unwinds."""

    def __init__(self, path: Path, service: Service, routes: Sequence[Route] = ROUTES) -> None:
        self.path = path
        self.service = service
        self.routes = routes
        self._spoke: set[Any] = set()  # connections that have sent a whole request

    def application(self) -> web.Application:
        app = web.Application(client_max_size=BODY_LIMIT, middlewares=[self._guard])
        for route in self.routes:
            app.router.add_route(route.method, route.path, self._serve(route))
        return app

    async def start(self, stack: AsyncExitStack) -> None:
        """Listen. Raises MlpipedError when the socket cannot be had. On `stack`: streams end, requests at hand get a
        second, the socket file goes (one that systemd keeps stays)."""
        sock, ours = listening.listen(os.environ, self.path, self.service.access.group)
        if ours:
            stack.callback(_unlink, self.path, os.lstat(self.path).st_ino)
        runner = web.AppRunner(
            self.application(), access_log=None, handle_signals=False, shutdown_timeout=1.0, lingering_time=1.0
        )
        await runner.setup()
        loop = asyncio.get_running_loop()
        server = await loop.create_unix_server(lambda: _Door(runner, self._spoke), sock=sock, **_FILE_STAYS)

        async def stop() -> None:
            self.service.closing.set()
            server.close()
            with anyio.move_on_after(5, shield=True):
                await runner.cleanup()

        stack.push_async_callback(stop)

    # --- one request ------------------------------------------------------------------------------------------------
    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self._spoke.add(request.protocol)
        try:
            sock = request.transport.get_extra_info("socket") if request.transport is not None else None
            if sock is None:
                raise ConnectionResetError
            peer = await self.service.access.peer(sock)
            self.service.access.read(peer)
            request[PEER] = peer
            return await handler(request)
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception as error:
            return refusal(error)

    def _serve(self, route: Route) -> Handler:
        async def serve(request: web.Request) -> web.StreamResponse:
            ask = Ask(self.service, request[PEER], request, request.match_info)
            _check_names(ask.names)
            if route.permit is not None:
                await route.permit(ask)
            ask.query = requests.query(route.query or requests.NoQuery, _query(request))
            if route.body is not None:
                ask.body = requests.body(route.body, await _read(request))
            if route.verb is not None:
                self._audit(route.verb, ask)
            answer = await route.handler(ask)
            return answer if isinstance(answer, web.StreamResponse) else document(answer, route.status)

        return serve

    def _audit(self, verb: str, ask: Ask) -> None:
        """Before the deed, so that its row is in the same group commit or an earlier one."""
        args: dict[str, Any] = dict(ask.names)
        if ask.body is not None:
            args |= ask.body.model_dump(mode="json", exclude_defaults=True)
        peer = ask.peer
        self.service.ledger.post(moves.audit(peer.name, peer.uid, peer.pid, verb, args, self.service.clock.now()))


def _check_names(names: Any) -> None:
    for name, value in names.items():
        if len(value) > 300 or not value.isprintable():
            raise UsageError(f"the {name} in the path is no name")


def _query(request: web.Request) -> dict[str, list[str]]:
    return {name: request.query.getall(name) for name in request.query}


async def _read(request: web.Request) -> bytes:
    try:
        with anyio.fail_after(BODY_TIME):
            return await request.read()
    except TimeoutError:
        raise UsageError(f"the body did not arrive within {BODY_TIME:g} s") from None


def _unlink(path: Path, ino: int) -> None:
    """Our own socket file, and not one that was put there since."""
    try:
        if os.lstat(path).st_ino == ino:
            os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning("the control socket could not be removed", path=str(path), error=str(error))


class _Door(asyncio.Protocol):
    """Lets a connection in, or refuses it fast: so many in all, so many of one user. Who says nothing is shown out."""

    def __init__(self, runner: web.AppRunner, spoke: set[Any]) -> None:
        self._runner = runner
        self._spoke = spoke

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        server = self._runner.server
        if server is None or self._full(transport, server):
            transport.write(_BUSY)
            transport.close()
            return
        inner = server()
        transport.set_protocol(inner)
        inner.connection_made(transport)
        asyncio.get_running_loop().call_later(FIRST_REQUEST_TIME, self._look_again, transport, inner)

    def _full(self, transport: asyncio.Transport, server: web.Server) -> bool:
        others = server.connections
        if len(others) < CONNECTIONS_PER_USER:
            return False
        mine = _uid(transport)
        same = sum(1 for other in others if other.transport is not None and _uid(other.transport) == mine)
        return len(others) >= CONNECTIONS or same >= CONNECTIONS_PER_USER

    def _look_again(self, transport: asyncio.Transport, inner: Any) -> None:
        if inner not in self._spoke:
            transport.abort()
        self._spoke.discard(inner)


def _uid(transport: asyncio.BaseTransport) -> int | None:
    sock: socket.socket | None = transport.get_extra_info("socket")
    try:
        return None if sock is None else credentials(sock)[1]
    except OSError:
        return None
