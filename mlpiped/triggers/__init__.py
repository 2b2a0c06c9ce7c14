"""Time and files -> Events. Nothing here starts anything."""

from __future__ import annotations

from mlpiped.triggers.arrivals import Arrivals
from mlpiped.triggers.clock import Clockwork
from mlpiped.triggers.memory import LedgerMemory
from mlpiped.triggers.schedule import ScheduleView

__all__ = ["Arrivals", "Clockwork", "LedgerMemory", "ScheduleView"]
