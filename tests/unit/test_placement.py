"""Leases: order, fitting, and the reason of each refusal."""

from __future__ import annotations

import pytest

from mlpiped.placement import Need, Place, refusals
from mlpiped.waiting import Waiting

G = 1 << 30


def placed(needs: list[Need], places: list[Place]) -> list[tuple[int, int, str]]:
    waiting = Waiting()
    for need in needs:
        waiting.add(need)
    return [(need.run, need.index, place.name) for need, place, _ in waiting.place(places)]


def test_priority_then_the_older_run_then_the_order_of_steps() -> None:
    needs = [Need(2, 0), Need(1, 1), Need(1, 0), Need(3, 0, priority=5)]
    assert placed(needs, [Place("local", 10)]) == [(3, 0, "local"), (1, 0, "local"), (1, 1, "local"), (2, 0, "local")]


def test_no_more_than_there_are_slots() -> None:
    place = Place("local", 2)
    assert len(placed([Need(1, i) for i in range(5)], [place])) == 2
    assert place.used_slots == 2
    place.give_back(1, 0)
    place.give_back(1, 0)
    assert place.used_slots == 1


def test_a_step_that_does_not_fit_does_not_hold_up_one_that_does() -> None:
    place = Place("local", 4, memory=8 * G, used_memory=6 * G)
    assert placed([Need(1, 0, memory=4 * G), Need(1, 1, memory=G)], [place]) == [(1, 1, "local")]


def test_a_compute_is_chosen_in_the_order_of_preference() -> None:
    assert placed([Need(1, 0, computes=("b", "a"))], [Place("a", 1), Place("b", 1)]) == [(1, 0, "b")]
    assert placed([Need(1, 0, computes=("b", "a"))], [Place("a", 1), Place("b", 1, used_slots=1)]) == [(1, 0, "a")]


@pytest.mark.parametrize(
    ("need", "place", "reason"),
    [
        (Need(1, 0), Place("local", 2, used_slots=2), "local has 2 slots, 2 in use"),
        (Need(1, 0), Place("local", 1, used_slots=1), "local has 1 slot, 1 in use"),
        (Need(1, 0, slots=4), Place("local", 2), "local has 2 slots in all, 4 are asked for"),
        (
            Need(1, 0, memory=64 * G),
            Place("local", 2, memory=32 * G),
            "local has 32G of memory in all, 64G are asked for",
        ),
        (
            Need(1, 0, memory=4 * G),
            Place("local", 2, memory=8 * G, used_memory=6 * G),
            "local has 2G of memory free, 4G are asked for",
        ),
        (Need(1, 0, cpus=8), Place("local", 2, cpus=4), "local has 4 CPUs in all, 8 are asked for"),
        (Need(1, 0, cpus=2), Place("local", 4, cpus=4, used_cpus=3), "local has 1 CPUs free, 2 are asked for"),
        (Need(1, 0), Place("gpu1", 2, unwell="does not answer"), "gpu1: does not answer"),
        (Need(1, 0, computes=("gpu9",)), Place("local", 2), "no compute named `gpu9` in the config"),
    ],
)
def test_a_refusal_says_why(need: Need, place: Place, reason: str) -> None:
    assert [refusal.text() for refusal in refusals(need, [place])] == [reason]
    assert placed([need], [place]) == []


def test_one_that_was_withdrawn_is_not_placed_and_may_come_again() -> None:
    waiting = Waiting()
    waiting.add(Need(1, 0))
    assert waiting.remove(1, 0)
    assert not waiting.remove(1, 0)
    assert list(waiting.place([Place("local", 1)])) == []
    waiting.add(Need(1, 0))
    assert len(waiting) == 1
    assert [need.index for need, *_ in waiting.place([Place("local", 1)])] == [0]
    assert len(waiting) == 0


def test_withdrawn_and_asked_again_before_a_place_is_free_counts_once() -> None:
    waiting = Waiting()
    for _ in range(3):
        waiting.add(Need(1, 0))
        waiting.remove(1, 0)
    waiting.add(Need(1, 0))
    assert [need.index for need, *_ in waiting.place([Place("local", 5)])] == [0]


def test_who_stops_taking_leases_early_loses_none_that_wait() -> None:
    waiting = Waiting()
    for need in (Need(1, 0, memory=9 * G), Need(1, 1), Need(1, 2)):
        waiting.add(need)
    place = Place("local", 4, memory=8 * G)
    for need, *_ in waiting.place([place]):
        assert need.index == 1
        break
    assert [need.index for need, *_ in waiting.place([place])] == [2]
    place.memory = 16 * G
    assert [need.index for need, *_ in waiting.place([place])] == [0]
