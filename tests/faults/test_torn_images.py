"""B4: what a power cut may leave of the write-ahead log, cut and garbled at random, reads as all that was acknowledged
and nothing by half.

An image is the ledger as it is on the disk when the power goes: all that was synced, and of the commit (or checkpoint)
that was under way any of its sectors, in any order. MLPIPED_TORN_IMAGES says how many.
"""

from __future__ import annotations

import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest

from mlpiped.clock import SystemClock
from mlpiped.ledger import moves, opening
from mlpiped.ledger.db import connect
from mlpiped.ledger.store import Ledger
from mlpiped.model import Cause, CauseKind, Event

IMAGES = int(os.environ.get("MLPIPED_TORN_IMAGES", "20000"))
LANES = 2
SECTOR, HEADER = 512, 32
WAL = f"{opening.NAME}-wal"
COMMITS = (30, 12)  # before and after the log begins anew


@dataclass(frozen=True)
class Epoch:
    """From one beginning of the log to the next. `acknowledged`: (bytes of the log, runs, events) after each commit."""

    ledger: bytes  # while the log grows
    folded: bytes  # after a checkpoint of all of it
    stale: bytes  # what the log's file held before
    log: bytes
    acknowledged: tuple[tuple[int, int, int], ...]


def length(state: Path) -> int:
    """Of the log, as its index tells it; its file may be longer."""
    (frames,) = struct.unpack("=16xI", (state / f"{opening.NAME}-shm").read_bytes()[:20])
    return HEADER + frames * (24 + 4096)


async def history(state: Path) -> list[Epoch]:
    ledger = await Ledger.open(state, SystemClock())
    await ledger.checkpoint()
    epochs, n, events = [], 0, await ledger.last_event()
    for commits in COMMITS:
        before, stale, runs = (state / opening.NAME).read_bytes(), (state / WAL).read_bytes(), n
        acknowledged = [(0, runs, events)]
        for _ in range(commits):
            ops: list[Any] = []
            for _ in range(1 + n % 5):
                n += 1
                event = Event(f"p{n}", Cause(CauseKind.MANUAL, "x" * (n % 700)), dedupe=f"d{n}", cursor=("s", {"n": n}))
                ops.append(moves.open_run(event, version="v", experiment="e", owner="o", tags={}, options={}, now=n))
            await ledger.write(*ops)
            events = await ledger.last_event()
            acknowledged.append((length(state), n, events))
        assert (state / opening.NAME).read_bytes() == before, "a checkpoint came in between"
        log = (state / WAL).read_bytes()
        await ledger._db.call(lambda c: c.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall())
        epochs.append(Epoch(before, (state / opening.NAME).read_bytes(), stale, log, tuple(acknowledged)))
    await ledger.close()
    return epochs


class Image:
    """The files as a power cut at a random moment of this epoch leaves them, and what must be found in them."""

    def __init__(self, epoch: Epoch, chance: random.Random) -> None:
        if chance.random() < 0.2:  # a checkpoint is under way: the log is whole
            self.least = self.most = len(epoch.acknowledged) - 1
            self.log = epoch.log[: epoch.acknowledged[-1][0]]
            self.ledger = self._torn(epoch.ledger, epoch.folded, 0, len(epoch.folded), chance)
            return
        self.least = chance.randrange(len(epoch.acknowledged) - 1)
        self.most = self.least + 1
        self.ledger = epoch.ledger
        start, end = epoch.acknowledged[self.least][0], epoch.acknowledged[self.most][0]
        if start == 0:  # the log begins anew: its header is synced before the first frame is written
            start, end = (0, HEADER) if chance.random() < 0.2 else (HEADER, end)
        self.log = self._torn(epoch.log[:start] + epoch.stale[start:], epoch.log, start, end, chance)
        if end > len(epoch.stale):  # the file was growing
            self.log = self.log[: chance.randint(start, len(self.log))]

    @staticmethod
    def _torn(old: bytes, new: bytes, start: int, end: int, chance: random.Random) -> bytes:
        """Of the bytes from `start` to `end`, some sectors are new, some old, and rarely one is neither."""
        torn = bytearray(old.ljust(end, b"\0"))
        arrived = chance.random()
        for sector in range(start - start % SECTOR, end, SECTOR):
            left, right = max(sector, start), min(sector + SECTOR, end)
            if chance.random() < arrived:
                torn[left:right] = new[left:right]
            elif start > HEADER and chance.random() < 0.02:
                torn[left:right] = chance.randbytes(right - left)
        return bytes(torn)


def look(state: Path) -> tuple[int, int]:
    """(runs, events) of the ledger there, by the way of a start; AssertionError when they do not fit."""
    opening.check(state / opening.NAME, len(opening.migrations()))
    conn = connect(state / opening.NAME, readonly=True)
    try:
        [(runs, last)] = conn.execute("SELECT count(*), coalesce(max(id), 0) FROM runs")
        [(events,)] = conn.execute("SELECT count(*) FROM events")
        cursor = conn.execute("SELECT cursor FROM schedules WHERE id = 's'").fetchall()
    finally:
        conn.close()
    assert runs == last, "a run in between is missing"
    assert [text for (text,) in cursor] == ([f'{{"n":{runs}}}'] if runs else []), cursor
    return runs, events


def images(folder: Path, epochs: list[Epoch], count: int, seed: int) -> Iterator[str]:
    """What is wrong with any of so many images."""
    chance = random.Random(seed)
    for number in range(count):
        epoch = chance.choice(epochs)
        image = Image(epoch, chance)
        (folder / f"{opening.NAME}-shm").unlink(missing_ok=True)
        (folder / opening.NAME).write_bytes(image.ledger)
        (folder / WAL).write_bytes(image.log)
        try:
            found = look(folder)
            if number % 50 == 0:
                opening.prepare(folder / opening.NAME, opening.migrations())
                assert look(folder) == found
        except Exception as error:
            yield f"seed {seed}, image {number}: {type(error).__name__}: {error}"
            continue
        allowed = {facts[1:] for facts in epoch.acknowledged[image.least : image.most + 1]}
        if found not in allowed:
            yield f"seed {seed}, image {number}: {found} (runs, events) instead of one of {allowed}"


@pytest.mark.slow
@pytest.mark.timeout(60 + IMAGES // 50)
def test_B4_of_any_torn_image_of_the_log_all_that_was_acknowledged_is_read_and_nothing_by_half() -> None:
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="mlpd-torn-", dir=memory if memory.is_dir() else None) as folder:
        epochs = anyio.run(history, Path(folder) / "state")
        shutil.rmtree(Path(folder) / "state")
        (Path(folder) / "epochs").write_bytes(pickle.dumps([tuple(vars(epoch).values()) for epoch in epochs]))
        lanes = []
        for seed in range(LANES):
            words = [sys.executable, __file__, folder, str(IMAGES // LANES), str(seed)]
            lanes.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True))
        said = [lane.communicate()[0] for lane in lanes]
    assert [lane.returncode for lane in lanes] == [0] * LANES
    for answer in said:
        assert answer == f"{IMAGES // LANES} images\n"


if __name__ == "__main__":
    where, so_many, which = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    own = where / f"lane{which}"
    own.mkdir()
    for wrong in images(own, [Epoch(*each) for each in pickle.loads((where / "epochs").read_bytes())], so_many, which):
        print(wrong)
    print(f"{so_many} images")
