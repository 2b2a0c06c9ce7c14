"""Moments as people write them in a query: `2026-11-23`, `2026-11-23T10:00:00Z`, `2d` (that long ago)."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from mlpiped.config import values as config_values
from mlpiped.errors import UsageError

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def moment(text: str, now: int) -> int:
    """Microseconds since the epoch. A time without a zone is UTC. Raises UsageError."""
    try:
        return now - int(config_values.seconds(text) * 1e6)
    except (ValueError, OverflowError):
        pass
    try:
        found = datetime.fromisoformat(text)
        found = found if found.tzinfo else found.replace(tzinfo=UTC)
        return (found - _EPOCH) // timedelta(microseconds=1)
    except (ValueError, OverflowError):
        hint = "as in `2026-11-23`, `2026-11-23T10:00:00Z`, or `2d` for two days ago"
        raise UsageError(f"not a time: `{text}`", hint=hint) from None
