"""Leases: order, fitting, and the reason of each refusal."""

from __future__ import annotations

from typing import Any

import pytest

from mlpiped.backends.base import Capacity, Card
from mlpiped.placement.decide import Need, Place, choose, refusals
from mlpiped.placement.waiting import Waiting

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
        (
            Need(1, 0, memory=16 * G),
            Place("local", 2, memory=16 * G - (1 << 20)),
            "local has 16383M of memory in all, 16384M are asked for",
        ),
        (Need(1, 0, cpus=8), Place("local", 2, cpus=4), "local has 4 CPUs in all, 8 are asked for"),
        (Need(1, 0, cpus=2), Place("local", 4, cpus=4, used_cpus=3), "local has 1 CPU free, 2 are asked for"),
        (Need(1, 0), Place("gpu1", 2, unwell="does not answer"), "gpu1: does not answer"),
        (Need(1, 0, computes=("gpu9",)), Place("local", 2), "no compute named `gpu9` in the config"),
    ],
)
def test_a_refusal_says_why(need: Need, place: Place, reason: str) -> None:
    assert [refusal.text() for refusal in refusals(need, [place])] == [reason]
    assert placed([need], [place]) == []


def test_all_that_keeps_a_step_out_is_told_at_once() -> None:
    place = Place("gpu1", 4, memory=8 * G, cards=(Card("GPU-0", 0, "RTX", 24 * G),))
    place.take(Need(31, 0, slots=3, gpus=1))
    place.take(Need(32, 0, slots=0, memory=6 * G))
    found = place.refusals(Need(1, 0, slots=2, memory=4 * G, gpus=1))
    assert [(reason.text("run x"), reason.spots) for reason in found] == [
        ("gpu1 has 4 slots, 3 in use, 2 are asked for, held by run x", ((31, 0),)),
        ("gpu1 has 2G of memory free, 4G are asked for, held by run x", ((32, 0),)),
        ("gpu1 has 1, held by run x", ((31, 0),)),
    ]


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


# --- cards ------------------------------------------------------------------------------------------------------
def card(n: int, foreign: str | None = None, memory: int = 24 * G) -> Card:
    return Card(f"GPU-{n}", n, "RTX 3090", memory, foreign)


def box(*cards: Card, slots: int = 8, **more: Any) -> Place:
    return Place("gpu1", slots, cards=cards or (card(0), card(1)), **more)


def holding(place: Place, *needs: Need) -> Place:
    for need in needs:
        place.take(need)
    return place


PYTHON = "in use by python (pid 4242), not ours"
SHARED_TOO_FAR = (
    "gpu1 has 1 with 20G of memory, held by run 31 (bob, 40 min so far); card 0 has 14G free, 20G are asked for"
)


@pytest.mark.parametrize(
    ("need", "place", "kind", "text"),
    [
        (Need(1, 0, gpus=1), Place("local", 2), "never", "local has no GPU"),
        (Need(1, 0, gpus=4), box(), "never", "gpu1 has 2 GPUs in all, 4 are asked for"),
        (Need(1, 0, gpus=2), box(card(0)), "never", "gpu1 has 1 GPU in all, 2 are asked for"),
        (Need(1, 0, gpus=1, gpu_memory=80 * G), box(), "never", "gpu1 has no GPU with 80G of memory"),
        (Need(1, 0, gpus=1), box(card(0, PYTHON)), "gpu", f"gpu1: card 0 is {PYTHON}"),
        (
            Need(1, 0, gpus=1),
            holding(box(), Need(31, 0, gpus=2)),
            "gpu",
            "gpu1 has 2, both held by run 31 (bob, 40 min so far)",
        ),
        (
            Need(1, 0, gpus=1),
            holding(box(card(0)), Need(31, 0, gpus=1)),
            "gpu",
            "gpu1 has 1, held by run 31 (bob, 40 min so far)",
        ),
        (
            Need(1, 0, gpus=2),
            holding(box(card(0), card(1), card(2, PYTHON)), Need(31, 0, gpus=1)),
            "gpu",
            f"gpu1 has 3, 1 held by run 31 (bob, 40 min so far); card 2 is {PYTHON}",
        ),
        (
            Need(1, 0, gpus=1),
            holding(box(card(0), card(1), card(2)), Need(31, 0, gpus=3)),
            "gpu",
            "gpu1 has 3, all 3 held by run 31 (bob, 40 min so far)",
        ),
        (
            Need(1, 0, gpus=1, gpu_memory=20 * G),
            holding(box(card(0), card(1, memory=8 * G)), Need(31, 0, gpus=1, gpu_memory=10 * G)),
            "gpu",
            SHARED_TOO_FAR,
        ),
        (Need(1, 0), box(drained=True), "away", "gpu1 is drained: its steps finish, nothing new starts"),
        (Need(1, 0, images=True), Place("local", 2), "never", "local runs no containers"),
        (Need(1, 0, sif=True), Place("local", 2), "never", "local runs no images that are files"),
        (Need(1, 0, sif=True), Place("box", 2, images=True), "never", "box runs no images that are files"),
        (Need(1, 0, images=True), Place("cluster", 2, sifs=True), "never", "cluster runs no containers"),
        (Need(1, 0, modules=True), Place("local", 2), "never", "local loads no environment modules"),
        (
            Need(1, 0, nodes=2, cluster=True),
            Place("local", 2),
            "never",
            "local is no cluster, and 2 nodes are asked for",
        ),
        (
            Need(1, 0, cluster=True),
            Place("local", 2),
            "never",
            "local is no cluster, and the step is started by srun",
        ),
        (
            Need(1, 0, nodes=3, cluster=True),
            Place("cluster", 2, cluster=True, nodes=2),
            "never",
            "cluster has 2 nodes in all, 3 are asked for",
        ),
        (
            Need(1, 0),
            Place("box", 2, images=True),
            "never",
            "box runs containers only, and the step has no image",
        ),
        (Need(1, 0, gpus=1), box(no_cards="nvidia-smi: mismatch"), "away", "gpu1: nvidia-smi: mismatch"),
        (Need(1, 0, gpus=1), Place("gpu1", 2, unwell="no route to host"), "away", "gpu1: no route to host"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_card_and_who_is_on_it(need: Need, place: Place, kind: str, text: str) -> None:
    (found,) = refusals(need, [place])
    assert (found.kind, found.text("run 31 (bob, 40 min so far)" if found.spots else "")) == (kind, text)
    assert placed([need], [place]) == []


def test_only_places_that_could_take_it_are_told_of() -> None:
    need = Need(1, 0, gpus=1)
    assert [r.text() for r in refusals(need, [Place("local", 2), box(drained=True)])] == [
        "gpu1 is drained: its steps finish, nothing new starts"
    ]
    both = [Place("local", 2), Place("other", 2)]
    assert [r.text() for r in refusals(need, both)] == ["local has no GPU", "other has no GPU"]


def test_a_shared_card_takes_what_fits_into_its_memory_and_whole_cards_stay_whole() -> None:
    place = box()
    assert place.take(Need(1, 0, gpus=1, gpu_memory=10 * G)) == ("GPU-0",)
    assert place.take(Need(1, 1, gpus=1, gpu_memory=10 * G)) == ("GPU-0",)
    assert place.take(Need(1, 2, gpus=1)) == ("GPU-1",)
    assert place.refusal(Need(1, 3, gpus=1, gpu_memory=10 * G)) is not None
    assert place.refusal(Need(1, 3, gpus=1, gpu_memory=4 * G)) is None
    place.give_back(1, 0)
    assert place.refusal(Need(1, 4, gpus=1)) is not None  # one of them is on it still
    place.give_back(1, 1)
    assert place.take(Need(1, 5, gpus=1)) == ("GPU-0",)


@pytest.mark.parametrize("mebibytes", [24564, 24576])
def test_two_halves_of_a_card_fit_though_its_driver_keeps_some_of_it(mebibytes: int) -> None:
    place = box(card(0, memory=mebibytes << 20))
    assert place.could_ever(Need(1, 0, gpus=1, gpu_memory=24 * G))
    assert place.could_ever(Need(1, 0, gpus=1, gpu_memory=24 * G + 1)) is False
    for index in range(2):
        assert place.take(Need(1, index, gpus=1, gpu_memory=12 * G)) == ("GPU-0",)
    refusal = place.refusal(Need(1, 2, gpus=1, gpu_memory=1))
    assert refusal is not None and refusal.kind == "gpu"


def test_a_card_of_unknown_memory_is_not_shared() -> None:
    place = box(card(0, memory=0))
    assert place.could_ever(Need(1, 0, gpus=1))
    assert not place.could_ever(Need(1, 0, gpus=1, gpu_memory=G))


def test_what_an_adopted_attempt_has_stays_taken_before_its_cards_are_seen_again() -> None:
    place = Place("gpu1", 4, no_cards="its GPUs have not been looked at yet")
    place.take(Need(1, 0, gpus=1), ["GPU-1"])
    place.offers(Capacity(4, cards=(card(0), card(1))))
    assert place.take(Need(2, 0, gpus=1)) == ("GPU-0",)
    assert place.refusal(Need(3, 0, gpus=1)) is not None


# --- which of those that fit --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("need", "chosen"),
    [
        (Need(1, 0, computes=("b", "a")), "b"),
        (Need(1, 0, computes=("b", "a"), data={"b": G}), "a"),  # what it needs is on a
        (Need(1, 0, computes=("b", "a"), data={"b": 5 << 20}), "b"),  # a few bytes travel in no time
        (Need(1, 0), "c"),  # the one with the most room
        (Need(1, 0, data={"a": 0, "b": G, "c": G}), "a"),
        (Need(1, 0, gpus=1), "gpu1"),
    ],
)
def test_the_place_is_where_the_data_is_then_as_named_then_where_there_is_room(need: Need, chosen: str) -> None:
    places = [Place("a", 4, used_slots=1), Place("b", 4, used_slots=2), Place("c", 4), box()]
    place = choose(need, places)
    assert place is not None and place.name == chosen


def test_a_machine_with_cards_is_left_to_those_that_need_one_while_others_have_room() -> None:
    places = [box(slots=64), Place("local", 1)]
    assert placed([Need(1, 0), Need(1, 1)], places) == [(1, 0, "local"), (1, 1, "gpu1")]


def test_a_cluster_of_which_the_nodes_are_not_known_yet_may_have_enough() -> None:
    assert Place("cluster", 2, cluster=True, nodes=None).refusal(Need(1, 0, nodes=3, cluster=True)) is None
