"""What steps made: taken in by one rename, addressed by content, handed out as copies."""

from __future__ import annotations

from mlpiped.artifacts.checking import OutputFault
from mlpiped.artifacts.store import Store

__all__ = ["OutputFault", "Store"]
