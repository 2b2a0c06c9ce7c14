"""What all triggers have in common: how a schedule is named and how it is shown."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from mlpiped.spec import ArrivalSpec, CronSpec, EverySpec, SuccessSpec, canonical

Trigger = CronSpec | EverySpec | ArrivalSpec | SuccessSpec

_POLICY = {"where", "catch_up", "jitter", "settle", "marker", "batch", "parameter", "min_files"}


@dataclass(frozen=True, slots=True)
class ScheduleView:
    """One trigger for `schedules` and `status`. Times in microseconds since the epoch, UTC."""

    id: str
    pipeline: str
    kind: str  # cron | every | arrival
    describe: str
    next_us: int | None = None
    last_us: int | None = None
    waits_for: str = ""
    cursor: dict[str, Any] | None = None
    mode: str = ""  # clock | inotify | poll (why)


def schedule_id(pipeline: str, trigger: Trigger) -> str:
    """16 hex digits. What the trigger looks at is in it, so that an edited schedule starts afresh. How it goes about
    that (catch-up, jitter, settle, batch, …) is not: a longer settle time must not make old files new."""
    plain = {key: value for key, value in trigger.model_dump().items() if key not in _POLICY}
    return hashlib.sha256(canonical({"pipeline": pipeline, "trigger": plain}).encode()).hexdigest()[:16]


def minute_text(us: int) -> str:
    """`2026-11-23T06:00Z`, with seconds only where there are any."""
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us)
    if us % 1_000_000:
        return f"{moment:%Y-%m-%dT%H:%M:%S}.{us // 1000 % 1000:03d}Z"
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}" if moment.second else f"{moment:%Y-%m-%dT%H:%MZ}"


def span_text(seconds: float) -> str:
    """`15m`, `1h30m`, `1.5s`."""
    text, rest = "", seconds
    for unit, size in (("d", 86_400), ("h", 3600), ("m", 60)):
        if rest >= size:
            text, rest = f"{text}{int(rest // size)}{unit}", rest % size
    return f"{text}{rest:g}s" if rest or not text else text
