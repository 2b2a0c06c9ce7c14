"""What is written beside the moves: definitions, pauses, the audit trail, the stat cache, what is kept no more."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mlpiped.ledger.db import SQL, Connection, Op, every, one
from mlpiped.ledger.rows import signed
from mlpiped.ledger.text import clean, compact

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mlpiped.files.hashing import StatRow


def save_definition(version: str, pipeline: str, spec_json: str, now: int) -> Op[None]:
    """The spec of a version, once."""

    def op(c: Connection) -> None:
        values = {"version": version, "pipeline": pipeline, "spec": clean(spec_json), "now": now}
        c.execute(SQL["save_definition"], values)

    return op


def pin_code(run_id: int, code: Sequence[Sequence[str | None]]) -> Op[None]:
    """What `Facts.pin` has kept; its options say so from now on. No event: nothing has happened."""

    def op(c: Connection) -> None:
        c.execute(SQL["pin_code"], {"run_id": run_id, "code": json.dumps(code)})

    return op


def set_paused(pipeline: str, paused: bool, who: str, now: int) -> Op[bool]:
    """Pause or resume a pipeline, over restarts. False when it was so already."""

    def op(c: Connection) -> bool:
        values = {"pipeline": pipeline, "who": clean(who), "now": now}
        if one(c, "pause" if paused else "resume", values) is None:
            return False
        kind = "pipeline.paused" if paused else "pipeline.resumed"
        c.emit(None, None, kind, now, compact({"pipeline": pipeline, "who": who}))
        return True

    return op


def set_drained(compute: str, drained: bool, who: str, now: int) -> Op[bool]:
    """Nothing new starts on a compute, over restarts, or it does again. False when it was so already."""

    def op(c: Connection) -> bool:
        if one(c, "drain" if drained else "undrain", {"name": compute, "who": clean(who), "now": now}) is None:
            return False
        kind = "compute.drained" if drained else "compute.undrained"
        c.emit(None, None, kind, now, compact({"compute": compute, "who": who}))
        return True

    return op


def set_unwell(compute: str, why: str | None, now: int) -> Op[bool]:
    """An incident begins, or is over (None). False when it was so already: one event an incident, over restarts too."""

    def op(c: Connection) -> bool:
        if one(c, "well" if why is None else "unwell", {"name": compute, "why": clean(why), "now": now}) is None:
            return False
        kind = "compute.well" if why is None else "compute.unwell"
        c.emit(None, None, kind, now, compact({"compute": compute, "why": why}))
        return True

    return op


def audit(who: str, uid: int | None, pid: int | None, verb: str, args: Mapping[str, Any], now: int) -> Op[None]:
    """Who did what. The caller keeps secrets out of `args`."""

    def op(c: Connection) -> None:
        values = {"who": clean(who), "uid": uid, "pid": pid, "verb": verb, "args": compact(dict(args)), "now": now}
        c.execute(SQL["insert_audit"], values)

    return op


def put_stat_cache(rows: Sequence[StatRow]) -> Op[None]:
    def op(c: Connection) -> None:
        c.executemany(
            SQL["put_stat"],
            [
                (r.path, signed(r.dev), signed(r.ino), r.size, r.mtime_ns, r.ctime_ns, r.hashed_ns, r.digest)
                for r in rows
            ],
        )

    return op


def drop_results(keys: Sequence[str]) -> Op[int]:
    """These keys are not reused any more (an output is missing or changed). Gives how many there were."""

    def op(c: Connection) -> int:
        return int(c.executemany(SQL["drop_result"], [(key,) for key in keys]).rowcount) if keys else 0

    return op


def lose_kept(digest: str, compute: str, now: int) -> Op[int]:
    """What that compute kept is gone or changed there: nothing builds on it any more. Gives how many outputs it was."""

    def op(c: Connection) -> int:
        values = {"digest": digest, "compute": compute, "now": now}
        return int(c.execute(SQL["lose_kept"], values).rowcount)

    return op


def lose_artifacts(digests: Sequence[str], now: int, *, planned: int | None = None) -> Op[list[str]]:
    """Garbage collection takes these bytes next. Their digests stay, and what was made from them stays fresh.

    Gives those that may go: not what an unfinished run builds on, nor what was made or reused after `planned`.
    """

    def op(c: Connection) -> list[str]:
        wanted = {"digests": json.dumps(list(digests)), "planned": now if planned is None else planned}
        lost = [row[0] for row in every(c, "to_lose", wanted)]
        c.executemany(SQL["lose_outputs"], [{"now": now, "digest": digest} for digest in lost])
        return lost

    return op
