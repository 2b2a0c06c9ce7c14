"""Who asks, and what may they do. The kernel says who (SO_PEERCRED, read with each request); the config says what.

    read     the daemon's own user, root, members of `control.group`, and whoever may act
    act      operators (`"alice"`, `"@group"`), root, the daemon's own user
    own      whoever may act, and the owner on his own run
    start    whoever may act, and the owner of the plugin's file on his pipeline

Each check raises NotPermitted with the sentence for the person who asks.
"""

from __future__ import annotations

import grp
import os
import pwd
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio.to_thread

from mlpiped.errors import NotPermitted

if TYPE_CHECKING:
    from collections.abc import Sequence

_CREDENTIALS = struct.Struct("3i")
_REMEMBERED = 60.0  # seconds: user data bases may lie on the network
_MOST_REMEMBERED = 1024


@dataclass(frozen=True, slots=True)
class Peer:
    """The process at the other end. `name` is `uid 1234` for a user without one."""

    uid: int
    gid: int
    pid: int
    name: str
    groups: frozenset[str] = field(default_factory=frozenset)


def credentials(sock: socket.socket) -> tuple[int, int, int]:
    """(pid, uid, gid) of the other end of a Unix socket. Raises OSError for any other kind of socket."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(raw)
    return pid, uid, gid


def look_up(uid: int, gid: int) -> tuple[str, frozenset[str]]:
    """A user's name and the names of all his groups. May block: the data base can be on the network."""
    try:
        name = pwd.getpwuid(uid).pw_name
        gids: Sequence[int] = os.getgrouplist(name, gid)
    except (KeyError, OSError):
        name, gids = f"uid {uid}", [gid]
    groups = set()
    for number in gids:
        try:
            groups.add(grp.getgrgid(number).gr_name)
        except KeyError:
            continue
    return name, frozenset(groups)


class Access:
    """The rules of `[control]`. `own_uid` is the daemon's."""

    def __init__(self, group: str | None, operators: Sequence[str], own_uid: int | None = None) -> None:
        self.group = group
        self.users = frozenset(word for word in operators if not word.startswith("@"))
        self.groups = frozenset(word[1:] for word in operators if word.startswith("@"))
        self.own_uid = os.geteuid() if own_uid is None else own_uid
        self._known: dict[tuple[int, int], tuple[float, str, frozenset[str]]] = {}

    async def peer(self, sock: socket.socket) -> Peer:
        pid, uid, gid = credentials(sock)
        known = self._known.get((uid, gid))
        if known is None or time.monotonic() - known[0] > _REMEMBERED:
            name, groups = await anyio.to_thread.run_sync(look_up, uid, gid)
            if len(self._known) >= _MOST_REMEMBERED:
                self._known.clear()
            known = self._known[uid, gid] = (time.monotonic(), name, groups)
        return Peer(uid, gid, pid, known[1], known[2])

    def may_act(self, peer: Peer) -> bool:
        return peer.uid in (0, self.own_uid) or peer.name in self.users or not self.groups.isdisjoint(peer.groups)

    def may_read(self, peer: Peer) -> bool:
        return self.may_act(peer) or (self.group is not None and self.group in peer.groups)

    def read(self, peer: Peer) -> None:
        """Raises NotPermitted."""
        if not self.may_read(peer):
            hint = "ask the administrator to name a `group` in `[control]` and to put you into it"
            if self.group is not None:
                hint = f"ask the administrator to put you into the group `{self.group}`"
            raise NotPermitted(f"`{peer.name}` may not read from this daemon", hint=hint)

    def act(self, peer: Peer, verb: str) -> None:
        """Raises NotPermitted."""
        if not self.may_act(peer):
            raise NotPermitted(f"`{peer.name}` may not {verb}", hint=_ASK)

    def own(self, peer: Peer, verb: str, run: int, owner: str | None) -> None:
        """Raises NotPermitted. `owner` is the name under which the run is kept."""
        if not self.may_act(peer) and (owner is None or owner != peer.name):
            whose = f"it belongs to `{owner}`" if owner else "it has no owner"
            raise NotPermitted(f"`{peer.name}` may not {verb} run {run}: {whose}", hint=_ASK)

    def start(self, peer: Peer, pipeline: str, file: str) -> None:
        """Raises NotPermitted. `file` is the plugin's; its owner may start what it defines."""
        if self.may_act(peer):
            return
        try:
            owner: int | None = os.stat(file).st_uid
        except OSError:
            owner = None
        if owner != peer.uid:
            why = "its file belongs to somebody else"
            raise NotPermitted(f"`{peer.name}` may not start `{pipeline}`: {why}", hint=_ASK)


_ASK = "ask the administrator to name you among the `operators` in `[control]`"
