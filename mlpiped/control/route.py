"""One way into the daemon: what is asked, who may, what it must look like, what comes back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from aiohttp import web
    from pydantic import BaseModel

    from mlpiped.control.access import Peer
    from mlpiped.control.service import Service


@dataclass(slots=True)
class Ask:
    """One request, read and checked. `names` are the parts of the path; `body` and `query` are the route's models."""

    service: Service
    peer: Peer
    request: web.Request
    names: Mapping[str, str]
    body: Any = None
    query: Any = None
    remembered: dict[str, Any] = field(default_factory=dict)  # what `permit` has looked up already


@dataclass(frozen=True, slots=True)
class Route:
    """`permit` raises NotPermitted for a reader who may not do this; `verb` names a mutation in the audit.

    A route without a verb changes nothing. The handler returns a JSON value or a finished response.
    """

    method: str
    path: str
    handler: Callable[[Ask], Awaitable[Any]]
    summary: str
    answer: str  # what comes back, in words
    body: type[BaseModel] | None = None
    query: type[BaseModel] | None = None
    verb: str | None = None
    permit: Callable[[Ask], Awaitable[None]] | None = None
    status: int = 200
    media: str = "application/json"
