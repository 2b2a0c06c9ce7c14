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
from mlpiped.errors import MlpipedError, UsageError
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
LOOK = 5.0  # seconds between two looks at the socket's file
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
        self._runner: web.AppRunner | None = None
        self._server: asyncio.Server | None = None
        self._name = ""  # of the socket's file, as systemd keeps it
        self._bound = self._ours = False  # the socket has its file at `path`; that is ours to remove

    def application(self) -> web.Application:
        app = web.Application(client_max_size=BODY_LIMIT, middlewares=[self._guard])
        for route in self.routes:
            app.router.add_route(route.method, route.path, self._serve(route))
        return app

    async def start(self, stack: AsyncExitStack) -> None:
        """Listen. Raises MlpipedError when the socket cannot be had. On `stack`: streams end, requests at hand get a
        second, the socket file goes (one that systemd keeps stays)."""
        sock, self._ours = listening.listen(os.environ, self.path, self.service.access.group)
        self._bound = sock.getsockname() == os.fspath(self.path)
        stack.callback(self._unlink)
        self._runner = runner = web.AppRunner(
            self.application(), access_log=None, handle_signals=False, shutdown_timeout=1.0, lingering_time=1.0
        )
        await runner.setup()
        await self._serve_on(sock)

        async def stop() -> None:
            self.service.closing.set()
            if self._server is not None:
                self._server.close()
            with anyio.move_on_after(5, shield=True):
                await runner.cleanup()

        stack.push_async_callback(stop)

    async def guard(self) -> None:
        """Until the server stops: where somebody removes the socket's file (a cleaner of /tmp), it is made anew."""
        while not self.service.closing.is_set():
            if self._bound and not listening.kept_name(self.path):
                await self._anew()
            with anyio.move_on_after(LOOK):
                await self.service.closing.wait()

    async def _anew(self) -> None:
        try:
            sock, self._ours = listening.anew(self.path, self.service.access.group, self._name)
        except MlpipedError as fault:
            log.warning("the control socket's file is gone", path=str(self.path), why=fault.message)
            return
        await self._serve_on(sock)
        log.warning("the control socket's file was gone: it is made anew", path=str(self.path))

    async def _serve_on(self, sock: socket.socket) -> None:
        """From now on. Who is connected stays so."""
        runner, before = self._runner, self._server
        assert runner is not None
        self._name = listening.kept_name(self.path)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: _Door(runner, self._spoke), sock=sock, **_FILE_STAYS)
        if before is not None:
            before.close()

    def _unlink(self) -> None:
        """Our own socket file, and not one that was put there since."""
        try:
            if self._ours and listening.kept_name(self.path) == self._name:
                os.unlink(self.path)
        except OSError as error:
            log.warning("the control socket could not be removed", path=str(self.path), error=str(error))

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
