"""A step's code: what it means (its identity), and a snapshot of it that nobody edits."""

from __future__ import annotations

from mlpiped.code.reader import CodeFact, CodeReader
from mlpiped.code.sources import CodeChanged, SourceFault

__all__ = ["CodeChanged", "CodeFact", "CodeReader", "SourceFault"]
