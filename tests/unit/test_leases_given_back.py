"""What is given back is not taken again: by a look at the same time, by another compute of the same machine."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from smi_rig import Smi

from mlpiped.backends.base import Job
from mlpiped.backends.host_cards import HostCards

A, B = "GPU-6f1c2a8e-0001", "GPU-b22f0cc4-0002"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    smi = Smi.make(tmp_path / "bin", A, B)
    monkeypatch.setenv("PATH", str(smi.folder), prepend=":")
    return tmp_path


def leases(place: Path) -> list[str]:
    (folder,) = (place / "leases").iterdir()
    return sorted(os.listdir(folder))


def test_a_look_that_comes_while_a_lease_is_given_back_does_not_take_it_again(place: Path) -> None:
    looked = threading.Event()
    looker: threading.Thread

    class Slow(HostCards):
        def _run(self, arguments: list[str]) -> tuple[int, str]:
            done = super()._run(arguments)
            if arguments[1] == "give":  # the lease is gone, and the record of it is still there
                looker.start()
                assert looked.wait(30)
                looker.join(0.5)  # as far as it gets
            elif arguments[1] == "look" and threading.current_thread() is looker:
                looked.set()
            return done

    cards = Slow("local", "auto", "us", place / "gpus", folder=f"{place}/leases")
    looker = threading.Thread(target=cards.look)
    cards.take(Job("t-1", (), gpus=(A,)))
    assert leases(place) == [A]
    cards.give("t-1")
    looker.join()
    assert leases(place) == []


def test_a_lease_that_somebody_cleaned_away_is_taken_again(place: Path) -> None:
    cards = HostCards("local", "auto", "us", place / "gpus", folder=f"{place}/leases")
    cards.take(Job("t-1", (), gpus=(A,)))
    (next((place / "leases").iterdir()) / A).unlink()
    cards.look()
    assert leases(place) == [A]


def test_leases_that_cannot_be_taken_again_are_the_cards_trouble_and_not_the_machines(place: Path) -> None:
    cards = HostCards("local", "auto", "us", place / "gpus", folder=f"{place}/leases")
    cards.take(Job("t-1", (), gpus=(A,)))
    (next((place / "leases").iterdir()) / A).unlink()
    (place / "leases").chmod(0o755)  # others could be kept out, or their leases removed
    cards.look()
    assert "no folder for the leases of cards" in (cards.trouble or "")
