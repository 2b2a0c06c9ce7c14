"""Why a step waits, in whatever state the machines are: what is said is so, is all of it, and is so now."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, cast

from hypothesis import given, settings
from hypothesis import strategies as st

from mlpiped.backends.base import Card
from mlpiped.placement.decide import Need, Place, Spot, candidates
from mlpiped.scheduling.dispatch import Dispatch

G = 1 << 30
NAMES = ("local", "gpu1", "gpu2")
SOMEBODY = "in use by python (pid 4242), not ours"

wants = st.builds(
    dict,
    slots=st.integers(0, 3),
    cpus=st.sampled_from([0.5, 1.0, 3.0]),
    memory=st.sampled_from([None, G, 3 * G]),
    gpus=st.sampled_from([0, 0, 1, 2]),
    gpu_memory=st.sampled_from([None, 6 * G, 16 * G]),
    priority=st.sampled_from([0, 0, 0, 1]),
    computes=st.sampled_from([(), ("gpu1",), ("gpu2", "gpu1"), NAMES]),
)


def machines() -> list[Place]:
    """One without cards, one with a small and a large one, one with two."""

    def card(box: str, n: int, memory: int) -> Card:
        return Card(f"{box}-{n}", n, "RTX", memory)

    return [
        Place("local", 4, cpus=4, memory=4 * G),
        Place("gpu1", 3, memory=6 * G, cards=(card("gpu1", 0, 8 * G), card("gpu1", 1, 24 * G))),
        Place("gpu2", 6, cpus=6, cards=(card("gpu2", 0, 24 * G), card("gpu2", 1, 24 * G))),
    ]


def lacking(place: Place, need: Need) -> set[str]:
    """What `place` has too little of now, counted from who is there; by brute force."""
    holders = place.holders.values()
    short = set()
    if sum(each.slots for each in holders) + need.slots > place.slots:
        short.add("slots")
    if place.cpus is not None and sum(each.cpus for each in holders) + need.cpus > place.cpus:
        short.add("CPUs")
    if place.memory is not None and sum(each.memory or 0 for each in holders) + (need.memory or 0) > place.memory:
        short.add("memory")
    if not any(all(has(place, card, need) for card in some) for some in combinations(place.cards, need.gpus)):
        short.add("cards")
    return short


def has(place: Place, card: Card, need: Need) -> bool:
    """Whether it may have this card."""
    on = place.leased.get(card.uuid, {}).values()
    if card.foreign is not None or (on and (need.gpu_memory is None or None in on)):
        return False
    return sum(each or 0 for each in on) + (need.gpu_memory or 0) <= card.memory


def what_is_told(text: str) -> str:
    for mark, what in (("slot", "slots"), ("CPU", "CPUs"), ("of memory free", "memory")):
        if re.match(rf"\w+ has [\d.]+[GMKB]? ?{mark}", text):
            return what
    return "cards"


@settings(max_examples=200, deadline=None)
@given(st.lists(wants, max_size=8), wants, st.sets(st.sampled_from([(1, 0), (1, 1), (2, 0), (2, 1)]), max_size=2))
def test_what_is_told_is_all_that_is_missing_and_only_that_and_who_is_named_holds_it(
    running: list[dict[str, Any]], wanted: dict[str, Any], foreign: set[tuple[int, int]]
) -> None:
    places = machines()
    for n, words in enumerate(running):
        need = Need(n, 0, **words)
        for place in candidates(need, places):
            if place.could_ever(need) and not place.refusals(need):
                place.take(need)
                break
    for box, n in foreign:  # somebody comes, to cards of ours too
        place = places[box]
        cards = [replace(card, foreign=SOMEBODY) if card.index == n else card for card in place.cards]
        place.cards = tuple(cards)
    need = Need(99, 0, **wanted)
    for place in places:
        if not place.could_ever(need):
            continue
        told = place.refusals(need)
        assert {what_is_told(reason.text("x")) for reason in told} == lacking(place, need), [r.text("x") for r in told]
        assert len(told) == len(lacking(place, need))
        for reason in told:
            text, what = reason.text("x"), what_is_told(reason.text("x"))
            for spot in reason.spots:
                held = place.holders[spot]
                assert {"slots": held.slots, "CPUs": held.cpus, "memory": held.memory, "cards": held.gpus}[what], text
        for spot in {spot for reason in told for spot in reason.spots}:
            place.give_back(*spot)
        named = {int(n) for reason in told for n in re.findall(r"card (\d+) is in use", reason.text())}
        place.cards = tuple(replace(c, foreign=None) if c.index in named else c for c in place.cards)
        assert place.refusals(need) == [], "it fits as soon as what was told is gone"


@dataclass
class Walk:
    """A run of one step that waits, or has a place."""

    id: int
    owner: str
    at: str | None = None
    row: Any = field(init=False)

    def __post_init__(self) -> None:
        self.row = self

    def granted(self, index: int, compute: str, cards: object = ()) -> None:
        assert self.at is None
        self.at = compute

    def get_ready(self, index: int, compute: str) -> None:
        pass

    def since(self, index: int) -> int | None:
        return 0


class Lab:
    def __init__(self) -> None:
        self.places = machines()
        self.dispatch = Dispatch(self.places, {}, 9)
        self.walks: dict[int, Walk] = {}

    def ask(self, words: dict[str, Any], owner: str) -> None:
        walk = Walk(len(self.walks), owner)
        self.walks[walk.id] = self.dispatch.executions[walk.id] = cast(Any, walk)
        self.dispatch.request(cast(Any, walk), 0, Need(walk.id, 0, owner=owner, **words), None)

    def gone(self, walk: Walk) -> None:
        """It ends, or it is cancelled while it waits."""
        if walk.at is None:
            self.dispatch.withdraw(cast(Any, walk), 0)
        else:
            self.dispatch.release(walk.id, 0)
        del self.walks[walk.id]
        self.walks[-walk.id - 1000] = walk  # so that no number is given twice

    def turn(self, place: Place, what: str) -> None:
        """Something happens to a machine, and ends when it happens again."""
        if what == "drained":
            place.drained = not place.drained
        elif what == "broken":
            place.unwell = None if place.unwell else "no route to host"
        elif what == "unseen":
            place.no_cards = None if place.no_cards else "nvidia-smi: mismatch"
        elif place.cards:
            first = place.cards[0]
            place.cards = (replace(first, foreign=None if first.foreign else SOMEBODY), *place.cards[1:])
        self.dispatch.place()

    def check(self) -> None:
        holding = {spot for place in self.places for spot in place.holders}
        for walk in [walk for number, walk in self.walks.items() if number >= 0 and walk.at is None]:
            need = self.dispatch.waiting.get(walk.id, 0)
            said = self.dispatch.why_waiting(walk.id, 0)
            assert need is not None and said is not None
            self.check_sentence(need, said, holding)

    def check_sentence(self, need: Need, said: str, holding: set[Spot]) -> None:
        if said.startswith("can never have a place: "):
            assert not any(place.could_ever(need) for place in candidates(need, self.places))
            return
        assert any(place.could_ever(need) for place in candidates(need, self.places)), said
        if said == "max_running_steps = 9 is reached":
            assert len(holding) >= 9
            return
        assert said.startswith("waits for "), said
        _, _, reasons = said.partition(": ")
        assert reasons and "turn" not in reasons, said
        kept = {int(n) for n in re.findall(r"kept for run (\d+)", said)}
        for run in kept:
            assert self.dispatch.waiting.get(run, 0) is not None, f"nobody waits there: {said}"
        for run in {int(n) for n in re.findall(r"run (\d+)", said)} - kept:
            assert (run, 0) in holding, f"it holds nothing: {said}"
        for place in candidates(need, self.places):
            if place.could_ever(need):
                assert place.name in said, f"nothing of {place.name}: {said}"
                if not place.refusals(need):
                    assert f"{place.name} is kept for" in said
                    assert not place.leaves_room(need, self.dispatch.waiting.kept[place.name])


events = st.one_of(
    st.tuples(st.just("ask"), wants, st.sampled_from(["alice", "bob", "eve"])),
    st.tuples(st.just("ask"), wants, st.sampled_from(["alice", "bob", "eve"])),
    st.tuples(st.just("end"), st.integers(0, 30)),
    st.tuples(st.just("turn"), st.integers(0, 2), st.sampled_from(["drained", "broken", "unseen", "foreign"])),
)


@settings(max_examples=120, deadline=None)
@given(st.lists(events, max_size=40))
def test_whatever_happens_who_waits_is_told_what_is_so_now_and_nobody_waits_for_nothing(
    script: list[tuple[Any, ...]],
) -> None:
    lab = Lab()
    for kind, *words in script:
        if kind == "ask":
            lab.ask(*words)
        elif kind == "end":
            there = [walk for number, walk in lab.walks.items() if number >= 0]
            if there:
                lab.gone(there[words[0] % len(there)])
        else:
            lab.turn(lab.places[words[0]], words[1])
        lab.check()
