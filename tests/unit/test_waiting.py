"""Whose turn it is: fair to owners, to those who need much, and never more given than there is."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpiped.backends.base import Card
from mlpiped.placement.decide import Need, Place, Spot
from mlpiped.placement.shares import HALF_LIFE, Shares
from mlpiped.placement.waiting import Waiting

G = 1 << 30


def gpu_box(cards: int = 2, slots: int = 8) -> Place:
    return Place("gpu1", slots, cards=tuple(Card(f"GPU-{n}", n, "RTX", 24 * G) for n in range(cards)))


class Lab:
    """Steps that run for so many seconds on these places; one second passes at a time."""

    def __init__(self, *places: Place) -> None:
        self.places = list(places)
        self.waiting = Waiting()
        self.now = 0.0
        self.ends: dict[Spot, float] = {}
        self.started: dict[Spot, float] = {}
        self.takes: dict[Spot, float] = {}
        self.owners: Counter[str] = Counter()

    def add(self, need: Need, seconds: float = 1.0) -> None:
        self.takes[need.spot] = seconds
        self.waiting.add(need)

    def place(self) -> list[Spot]:
        found = []
        for need, _, cards in self.waiting.place(self.places, self.now):
            assert len(set(cards)) == need.gpus
            self.started[need.spot] = self.now
            self.ends[need.spot] = self.now + self.takes[need.spot]
            self.owners[need.owner] += 1
            found.append(need.spot)
        for each in self.places:
            check(each)
        return found

    def tick(self, seconds: float = 1.0) -> list[Spot]:
        self.now += seconds
        for spot in [spot for spot, end in self.ends.items() if end <= self.now]:
            self.end(spot)
        return self.place()

    def end(self, spot: Spot) -> None:
        del self.ends[spot]
        for each in self.places:
            need = each.give_back(*spot)
            if need is not None:
                self.waiting.shares.end(need.owner, need.slots, need.gpus, self.now)


def check(place: Place) -> None:
    """Never more than there is; no card twice but within its memory."""
    holders = place.holders.values()
    assert place.used_slots == sum(need.slots for need in holders) <= place.slots
    assert place.memory is None or place.used_memory == sum(need.memory or 0 for need in holders) <= place.memory
    assert place.cpus is None or sum(need.cpus for need in holders) <= place.cpus + 1e-9
    for uuid, on in place.leased.items():
        card = next(card for card in place.cards if card.uuid == uuid)
        assert card.foreign is None
        if None in on.values():
            assert len(on) == 1, f"{uuid} twice"
        else:
            assert sum(bytes_ or 0 for bytes_ in on.values()) <= card.memory
    on_cards = Counter(spot for on in place.leased.values() for spot in on)
    assert on_cards == Counter({need.spot: need.gpus for need in holders if need.gpus})
    assert place.late <= place.holders.keys()


# --- owners -------------------------------------------------------------------------------------------------------
def test_a_wide_run_of_one_owner_does_not_starve_a_narrow_one_of_another() -> None:
    lab = Lab(Place("local", 4))
    for index in range(1000):
        lab.add(Need(1, index, owner="alice"), 10)
    lab.place()
    lab.tick(30)
    for index in range(3):
        lab.add(Need(2, index, owner="bob"), 10)
    first = lab.tick(10)
    assert [spot[0] for spot in first[:3]] == [2, 2, 2]  # with the next places that are free


def test_owners_who_start_at_the_same_moment_take_turns() -> None:
    lab = Lab(Place("local", 6))
    for index in range(9):
        lab.add(Need(1, index, owner="alice"), 9)
        lab.add(Need(2, index, owner="bob"), 9)
        lab.add(Need(3, index, owner="eve"), 9)
    assert Counter(run for run, _ in lab.place()) == {1: 2, 2: 2, 3: 2}


def test_what_an_owner_gets_counts_for_all_kinds_of_steps_that_he_has() -> None:
    lab = Lab(Place("local", 2))
    lab.add(Need(1, 0, owner="alice"))
    lab.add(Need(1, 1, owner="alice", cpus=0.5))
    lab.add(Need(2, 0, owner="bob"))
    assert lab.place() == [(1, 0), (2, 0)]


def test_who_has_had_less_comes_first_and_use_fades() -> None:
    shares = Shares()
    shares.past("alice", 3600.0, 0.0, when=0.0)
    shares.past("bob", 0.0, 600.0, when=0.0)  # cards count for more
    assert shares.of("bob", 1.0) > shares.of("alice", 1.0) > shares.of("eve", 1.0) == 0.0
    shares.past("eve", 3600.0, 0.0, when=HALF_LIFE)
    assert shares.of("eve", HALF_LIFE) == pytest.approx(2 * shares.of("alice", HALF_LIFE))
    before = shares.of("alice", 2 * HALF_LIFE) / shares.of("eve", 2 * HALF_LIFE)
    later = 2000 * HALF_LIFE  # numbers do not grow for ever
    assert shares.of("alice", later) <= 1e-6
    shares.begin("alice", 1, 0, later)
    assert shares.of("alice", later + 60) == pytest.approx(61.0, rel=0.01) and before == pytest.approx(0.5)


def test_what_runs_now_counts_before_it_has_ended() -> None:
    shares = Shares()
    shares.begin("alice", 2, 0, 0.0)
    shares.begin("bob", 1, 0, 0.0)
    assert shares.of("alice", 100.0) == pytest.approx(2 * shares.of("bob", 100.0))
    shares.end("alice", 2, 0, 100.0)
    assert shares.of("alice", 300.0) < shares.of("bob", 300.0)


def test_priority_goes_before_shares() -> None:
    lab = Lab(Place("local", 1))
    lab.waiting.shares.past("alice", 1e6, 0.0, 0.0)
    lab.add(Need(1, 0, owner="bob"))
    lab.add(Need(2, 0, owner="alice", priority=1))
    assert lab.place() == [(2, 0)]


# --- those who need much ----------------------------------------------------------------------------------------
def test_a_step_for_two_cards_is_not_starved_by_steps_for_one_that_come_after_it() -> None:
    lab = Lab(gpu_box(2))
    lab.add(Need(1, 0, gpus=1), 10)
    lab.add(Need(1, 1, gpus=1), 15)
    lab.place()
    lab.add(Need(2, 0, gpus=2), 5)
    for index in range(50):
        lab.add(Need(3, index, gpus=1), 5)
        lab.add(Need(4, index), 5)
    lab.place()
    assert [spot for spot in lab.started if spot[0] == 4], "who needs no card is not held up"
    for _ in range(16):
        lab.tick()
    assert lab.started[2, 0] == 15
    assert not [spot for spot, at in lab.started.items() if spot[0] == 3 and at < 15]
    lab.tick(5)
    assert [spot for spot in lab.started if spot[0] == 3]


def test_a_step_for_all_slots_gets_them_when_those_before_it_have_ended() -> None:
    lab = Lab(Place("local", 4))
    for index in range(3):
        lab.add(Need(1, index), 10 + index)
    lab.place()
    lab.add(Need(2, 0, slots=4), 3)
    for index in range(100):
        lab.add(Need(3, index), 4)
    for _ in range(12):
        lab.tick()
    assert lab.started[2, 0] == 12
    assert lab.waiting.kept == {} or (2, 0) not in {need.spot for need in lab.waiting.kept.values()}


def test_others_take_what_a_kept_place_can_spare() -> None:
    lab = Lab(Place("local", 8))
    for index in range(6):
        lab.add(Need(1, index), 10)
    lab.place()
    lab.add(Need(2, 0, slots=6), 5)
    lab.add(Need(3, 0), 100)
    lab.add(Need(3, 1), 100)
    assert lab.place() == [(3, 0), (3, 1)]
    lab.tick(10)
    assert (2, 0) in lab.started


def test_what_came_into_a_kept_place_counts_until_it_ends() -> None:
    lab = Lab(Place("local", 8))
    for index in range(8):
        lab.add(Need(1, index), 1 + index)
    lab.place()
    lab.add(Need(2, 0, slots=6), 5)
    for index in range(50):
        lab.add(Need(3, index), 100)
    for _ in range(8):
        lab.tick()
    assert lab.started[2, 0] == 8
    assert len([spot for spot in lab.started if spot[0] == 3]) == 2


def test_no_place_is_kept_for_a_step_that_waits_for_somebody_elses_process() -> None:
    place = gpu_box(2)
    place.cards = (place.cards[0], Card("GPU-1", 1, "RTX", 24 * G, "in use by python (pid 7), not ours"))
    lab = Lab(place)
    lab.add(Need(1, 0, gpus=2))
    lab.add(Need(2, 0, gpus=1))
    assert lab.place() == [(2, 0)]


def test_a_step_that_takes_no_slot_starts_where_none_is_free() -> None:
    lab = Lab(Place("local", 1))
    lab.add(Need(1, 0), 10)
    lab.place()
    lab.add(Need(2, 0))
    lab.add(Need(3, 0, slots=0))
    assert lab.place() == [(3, 0)]


def test_one_that_was_kept_for_and_left_keeps_nobody_out() -> None:
    lab = Lab(gpu_box(2))
    lab.add(Need(1, 0, gpus=1), 100)
    lab.place()
    lab.add(Need(2, 0, gpus=2))
    lab.add(Need(3, 0, gpus=1))
    assert lab.place() == []
    lab.waiting.remove(2, 0)
    assert lab.place() == [(3, 0)]


# --- properties -------------------------------------------------------------------------------------------------
needs = st.builds(
    dict,
    owner=st.sampled_from(["alice", "bob", "eve"]),
    priority=st.sampled_from([0, 0, 0, 1]),
    slots=st.integers(1, 4),
    cpus=st.sampled_from([0.5, 1.0, 3.0]),
    memory=st.sampled_from([None, G, 3 * G]),
    gpus=st.sampled_from([0, 0, 1, 1, 2]),
    gpu_memory=st.none(),
    computes=st.sampled_from([(), ("gpu1",), ("local", "gpu1")]),
)
shared = st.builds(dict, owner=st.just("bob"), gpus=st.integers(1, 2), gpu_memory=st.sampled_from([8 * G, 16 * G]))


def lab_of_two() -> Lab:
    local = Place("local", 4, cpus=6, memory=8 * G)
    box = gpu_box(3, 6)
    box.memory = 8 * G
    return Lab(local, box)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.one_of(needs, shared), st.integers(1, 9), st.integers(0, 3)), max_size=40))
def test_whatever_comes_nothing_is_over_capacity_no_card_is_twice_and_everything_starts(
    script: list[tuple[dict[str, object], int, int]],
) -> None:
    lab = lab_of_two()
    asked = []
    for n, (words, seconds, pause) in enumerate(script):
        need = Need(n % 4, n, **words)  # type: ignore[arg-type]
        lab.add(need, seconds)
        asked.append(need)
        lab.place()
        for _ in range(pause):
            lab.tick()
    for _ in range(40 * 9 + 1):
        lab.tick()
    assert {need.spot for need in asked} == lab.started.keys()
    assert len(lab.waiting) == 0 and not lab.ends
    assert all(place.used_slots == 0 and not place.leased and not place.late for place in lab.places)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 12), st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_a_stream_of_small_steps_of_anybody_starves_no_large_one(
    slots: int, gpus: int, running: int, lengths: list[int]
) -> None:
    """The large one comes first in the order of its owner; small ones of another owner never end to come."""
    lab = Lab(gpu_box(3, 8))
    for index in range(3):
        lab.add(Need(1, index, gpus=1, owner="bob"), running)
    lab.place()
    lab.add(Need(2, 0, slots=slots, gpus=gpus, owner="alice"), 1)
    for n in range(1000):
        lab.add(Need(3, n, gpus=1, owner="bob"), lengths[n % len(lengths)])
        lab.tick()
        if (2, 0) in lab.started:
            break
    assert lab.started[2, 0] <= running + 2 * max(lengths) + 2


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([{"memory": 7 * G}, {"cpus": 7.0}, {"memory": 5 * G, "gpus": 2}]), st.integers(1, 9))
def test_a_stream_of_small_steps_starves_none_that_needs_much_memory_or_many_processors(
    much: dict[str, Any], seconds: int
) -> None:
    box = gpu_box(2, 16)
    box.memory, box.cpus = 8 * G, 8
    lab = Lab(box)
    for n in range(8):
        lab.add(Need(1, n, owner="bob", memory=G, gpus=n % 2), seconds)
    lab.place()
    lab.add(Need(2, 0, owner="alice", **much))
    for n in range(200):
        lab.add(Need(3, n, owner="bob", memory=G, gpus=n % 2), seconds)
        lab.tick()
    assert lab.started[2, 0] <= 2 * seconds + 1


@settings(max_examples=40, deadline=None)
@given(st.permutations([(1, 3), (2, 2), (1, 7)]), st.integers(0, 2))
def test_three_owners_of_wide_runs_have_the_same_of_the_machines_whatever_their_steps_are_like(
    shapes: list[tuple[int, int]], late: int
) -> None:
    """(slots, seconds) of each one's steps; one of them comes late, and catches up with the others from then on."""
    lab = Lab(Place("a", 4), Place("b", 3), Place("broken", 9, unwell="no route to host"), Place("d", 9, drained=True))
    used: Counter[str] = Counter()
    names = ("alice", "bob", "eve")

    def bring(number: int) -> None:
        slots, seconds = shapes[number]
        for n in range(500):
            lab.add(Need(number, n, slots=slots, owner=names[number], computes=("broken", "a", "d", "b")), seconds)

    for number in range(3):
        if number != late:
            bring(number)
    for second in range(230):
        if second == 20:
            bring(late)
        lab.tick()
        for place in lab.places:
            for need in place.holders.values():
                used[need.owner] += need.slots
    assert not lab.places[2].holders and not lab.places[3].holders
    assert sum(used.values()) >= 229 * 6, "nothing stands idle for long"
    assert max(used.values()) - min(used.values()) <= 0.1 * sum(used.values()), used


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["alice", "bob"]), min_size=4, max_size=4), st.integers(2, 6))
def test_over_time_owners_who_always_want_more_have_about_the_same(width: list[str], slots: int) -> None:
    lab = Lab(Place("local", slots))
    for n in range(slots * 41):  # more than one alone could have
        lab.add(Need(1, n, owner="alice"), 3)
        lab.add(Need(2, n, owner="bob"), 3)
    for n, owner in enumerate(width):
        lab.add(Need(3, n, owner=owner), 3)
    lab.place()
    for _ in range(120):
        lab.tick()
    assert abs(lab.owners["alice"] - lab.owners["bob"]) <= slots + 1


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 1)), unique_by=lambda t: t[:2]))
def test_of_one_owner_and_size_the_order_is_priority_run_step(steps: list[tuple[int, int, int]]) -> None:
    waiting = Waiting()
    for run, index, priority in steps:
        waiting.add(Need(run, index, priority, owner="alice"))
    found = [need.rank() for need, *_ in waiting.place([Place("local", 100)])]
    assert found == sorted(found) and len(found) == len(steps)
    assert all(one != two for one, two in pairwise(found))


def test_the_first_are_told_in_order_and_wait_on() -> None:
    waiting = Waiting()
    for index in range(6):
        waiting.add(Need(1, index, cpus=1 + index % 3))
    waiting.add(Need(2, 0, priority=1))
    waiting.remove(1, 0)
    assert [need.spot for need in waiting.first(3)] == [(2, 0), (1, 1), (1, 2)]
    assert [need.spot for need in waiting.first(9)] == [(2, 0), *((1, n) for n in range(1, 6))]
    assert len(list(waiting.place([Place("local", 9)]))) == 6


def test_ten_thousand_steps_of_one_shape_cost_one_look_at_the_first() -> None:
    waiting = Waiting()
    for index in range(10_000):
        waiting.add(Need(1, index, memory=9 * G))
    place = Place("local", 4, memory=8 * G)
    looks = 0
    plain = Place.refusal

    def counted(self: Place, need: Need) -> object:
        nonlocal looks
        looks += 1
        return plain(self, need)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Place, "refusal", counted)
        assert list(waiting.place([place])) == []
    assert looks == 1
