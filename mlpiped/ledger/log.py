"""SQLite's write-ahead log, looked at from outside: was what a commit had made durable damaged since?

SQLite takes the first frame that does not fit for the end of the log, as it must after a power cut, and says nothing of
those behind it. A power cut leaves at most one commit there: the next one is not begun before the last is on the disk.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

HEADER, FRAME_HEADER = 32, 24  # bytes; https://www.sqlite.org/fileformat2.html#the_write_ahead_log
INDEX = struct.Struct("=12x 4x I")  # the head of the log's index, less all but the number of frames that fit
LEFT_BEHIND = 3
"""So many commits may lie behind the end of a log that is well: the one that was cut short, and what others that failed
had written further on."""


def damaged(ledger: Path) -> bool:
    """To be asked while a connection has read the ledger: the log's index is made by then."""
    try:
        with ledger.with_name(f"{ledger.name}-shm").open("rb") as index:
            (frames,) = INDEX.unpack(index.read(INDEX.size))
        with ledger.with_name(f"{ledger.name}-wal").open("rb") as log:
            header = log.read(HEADER)
            if len(header) < HEADER or not any(header):  # it was never begun
                return False
            if not _fits(header):
                return True
            (page,) = struct.unpack(">I", header[8:12])
            log.seek(HEADER + frames * (FRAME_HEADER + page))
            behind = 0
            while len(frame := log.read(FRAME_HEADER)) == FRAME_HEADER:
                behind += frame[8:16] == header[16:24] and any(frame[4:8])
                log.seek(page, 1)
            return behind > LEFT_BEHIND
    except (FileNotFoundError, struct.error):
        return False


def _fits(header: bytes) -> bool:
    """By its own checksum. It lies in one sector, which a power cut does not tear."""
    order = ">" if header[3] & 1 else "<"
    a = b = 0
    for x, y in struct.iter_unpack(f"{order}II", header[:24]):
        a = (a + x + b) & 0xFFFFFFFF
        b = (b + y + a) & 0xFFFFFFFF
    return struct.unpack(">II", header[24:32]) == (a, b)
