"""Places and shared work: one attempt per key, whoever asks; nothing is held by a run that is gone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, cast

import pytest

from mlpiped.backends.base import Card
from mlpiped.ledger import AttemptRow
from mlpiped.model import AttemptState
from mlpiped.placement.decide import Need, Place
from mlpiped.scheduling.dispatch import AHEAD, BRISK, Dispatch


@dataclass
class Walk:
    """A run as the dispatcher sees it: it is granted places, and told to decide again."""

    id: int
    granted_to: list[tuple[int, str]] = field(default_factory=list)
    again: list[int] = field(default_factory=list)
    owner: str = "alice"
    cards: dict[int, tuple[str, ...]] = field(default_factory=dict)
    began: dict[int, int] = field(default_factory=dict)  # µs
    ready: list[int] = field(default_factory=list)

    def get_ready(self, index: int, compute: str) -> None:
        self.ready.append(index)

    def granted(self, index: int, compute: str, cards: Sequence[str] = ()) -> None:
        self.granted_to.append((index, compute))
        self.cards[index] = tuple(cards)

    def since(self, index: int) -> int | None:
        return self.began.get(index)

    def decide_again(self, index: int) -> None:
        self.again.append(index)

    @property
    def row(self) -> Any:
        return self

    @property
    def graph(self) -> Any:
        return self

    @property
    def steps(self) -> Any:
        return [type("Step", (), {"name": f"s{n}"}) for n in range(10)]


class Lab:
    def __init__(self, slots: int = 2, pools: dict[str, list[str]] | None = None, most: int | None = None) -> None:
        self.dispatch = Dispatch([Place("local", slots), Place("other", 1)], pools or {}, most)

    def run(self, number: int) -> Walk:
        walk = Walk(number)
        self.dispatch.executions[number] = cast(Any, walk)
        return walk

    def ask(self, walk: Walk, index: int, share: str | None = None, **need: Any) -> None:
        need.setdefault("computes", ("local",))
        self.dispatch.request(cast(Any, walk), index, Need(walk.id, index, **need), share)


@pytest.fixture
def lab() -> Lab:
    return Lab()


def test_a_place_that_is_given_back_goes_to_the_next(lab: Lab) -> None:
    one = lab.run(1)
    for index in range(3):
        lab.ask(one, index)
    assert one.granted_to == [(0, "local"), (1, "local")]
    lab.dispatch.release(1, 0)
    lab.dispatch.release(1, 0)
    assert one.granted_to[2:] == [(2, "local")]


def test_equal_steps_of_two_runs_share_one_attempt(lab: Lab) -> None:
    one, two = lab.run(1), lab.run(2)
    lab.ask(one, 0, "key")
    lab.ask(two, 5, "key")
    assert (one.granted_to, two.granted_to) == ([(0, "local")], [])
    assert lab.dispatch.why_waiting(2, 5) == "shares the attempt of run 1/s0, which has the same key"
    lab.dispatch.release(1, 0)
    lab.dispatch.settled(1, 0)
    assert two.again == [5]


def test_a_step_of_an_equal_one_that_can_have_no_place_takes_its_own(lab: Lab) -> None:
    one, two, three = lab.run(1), lab.run(2), lab.run(3)
    lab.ask(one, 0, "key", slots=9)  # what a step asks for is no part of what it is
    lab.ask(two, 5, "key")
    lab.ask(three, 7, "key")
    assert (one.granted_to, two.granted_to, three.granted_to) == ([], [(5, "local")], [])
    for run, index in ((1, 0), (3, 7)):
        assert lab.dispatch.why_waiting(run, index) == "shares the attempt of run 2/s5, which has the same key"
    assert {walk.id for walk, _ in lab.dispatch.followers(2, 5)} == {1, 3}
    lab.dispatch.release(2, 5)
    lab.dispatch.settled(2, 5)
    assert (one.again, three.again) == ([0], [7])


def test_of_equal_steps_that_wait_the_one_whose_turn_comes_first_leads(lab: Lab) -> None:
    full, one, two = lab.run(9), lab.run(1), lab.run(2)
    for index in range(2):
        lab.ask(full, index)
    for index in range(5):
        lab.ask(one, index, f"key{index}")
    lab.ask(two, 0, "key4", priority=1)
    shares = "; or for run 1/s4, which has the same key and waits too"
    assert (lab.dispatch.why_waiting(2, 0) or "").endswith(shares)
    lab.dispatch.release(9, 0)
    assert (one.granted_to, two.granted_to) == ([], [(0, "local")])
    for index in (0, 1, 2, 3):
        lab.dispatch.release(9, 1) if index == 0 else lab.dispatch.release(1, index - 1)
    assert [index for index, _ in one.granted_to] == [0, 1, 2, 3]  # its fifth follows
    lab.dispatch.release(2, 0)
    lab.dispatch.settled(2, 0)
    assert one.again == [4] and len(one.granted_to) == 4


def test_who_follows_a_step_that_waits_once_more_waits_for_a_place_of_its_own_too(lab: Lab) -> None:
    one, two = lab.run(1), lab.run(2)
    lab.ask(one, 0, "key")
    lab.ask(two, 0, "key", computes=("other",))
    assert two.granted_to == []
    lab.dispatch.places["local"].unwell = "gone"
    lab.dispatch.release(1, 0)  # its machine failed it
    lab.ask(one, 0, "key")
    assert two.granted_to == [(0, "other")]
    lab.dispatch.places["local"].unwell = None
    lab.dispatch.place()
    assert one.granted_to == [(0, "local")]  # the first time, and never beside the other


def test_when_who_led_is_settled_nobody_who_waited_with_it_has_a_place_before_he_decides_again(lab: Lab) -> None:
    full, one, two = lab.run(9), lab.run(1), lab.run(2)
    for index in range(2):
        lab.ask(full, index)
    lab.ask(one, 0, "key")
    lab.ask(two, 0, "key")
    lab.dispatch.withdraw(cast(Any, one), 0)
    lab.dispatch.settled(1, 0)
    lab.dispatch.release(9, 0)
    assert two.again == [0] and two.granted_to == []
    lab.ask(two, 0, "key")
    assert two.granted_to == [(0, "local")]


def test_when_the_leader_failed_the_first_follower_leads(lab: Lab) -> None:
    one, two, three = lab.run(1), lab.run(2), lab.run(3)
    for walk in (one, two, three):
        lab.ask(walk, 0, "key")
    lab.dispatch.release(1, 0)
    lab.dispatch.settled(1, 0)
    assert two.again == three.again == [0]
    lab.ask(two, 0, "key")
    lab.ask(three, 0, "key")
    assert (len(two.granted_to), len(three.granted_to)) == (1, 0)


def test_a_follower_that_withdraws_is_not_told(lab: Lab) -> None:
    one, two = lab.run(1), lab.run(2)
    lab.ask(one, 0, "key")
    lab.ask(two, 0, "key")
    lab.dispatch.withdraw(cast(Any, two), 0)
    lab.dispatch.settled(1, 0)
    assert two.again == []


def test_a_leader_that_withdraws_before_it_ran_leaves_the_key_free(lab: Lab) -> None:
    full, one, two = lab.run(9), lab.run(1), lab.run(2)
    lab.ask(full, 0)
    lab.ask(full, 1)
    lab.ask(one, 0, "key")
    lab.ask(two, 0, "key")
    lab.dispatch.withdraw(cast(Any, one), 0)
    lab.dispatch.settled(1, 0)
    assert two.again == [0]


def test_what_a_forgotten_run_held_waited_for_or_led_is_free(lab: Lab) -> None:
    one, two = lab.run(1), lab.run(2)
    for index in range(4):
        lab.ask(one, index, f"key{index}")
    lab.ask(two, 0, "key0")
    lab.ask(two, 1)
    lab.dispatch.forget(1)
    assert two.again == [0]
    assert two.granted_to == [(1, "local")]
    assert lab.dispatch.places["local"].used_slots == 1
    lab.ask(two, 2, "key3")
    assert two.granted_to[-1] == (2, "local")


def test_an_adopted_attempt_holds_its_place_and_its_key(lab: Lab) -> None:
    two = lab.run(2)
    nothing = None, None, None, None
    live = AttemptRow("mlp-1-0-1-a", 1, 0, 1, "local", "key", AttemptState.SUBMITTED, None, {}, *nothing, 1, 1, None)
    lab.dispatch.occupy(Need(1, 0), live, "key")
    lab.ask(two, 0, "key")
    lab.ask(two, 1)
    lab.ask(two, 2)
    assert two.granted_to == [(1, "local")]
    assert lab.dispatch.places["local"].used_slots == 2


def test_nothing_is_leased_before_all_runs_have_said_what_they_hold(lab: Lab) -> None:
    two, three = lab.run(2), lab.run(3)
    lab.dispatch.expect([1, 2, 3])
    lab.dispatch.restored(2)
    for index, share in enumerate(("key", None, None)):
        lab.ask(two, index, share)
    lab.ask(three, 0)
    lab.dispatch.withdraw(cast(Any, three), 0)
    nothing = None, None, None, None
    live = AttemptRow("mlp-1-0-1-a", 1, 0, 1, "local", "key", AttemptState.SUBMITTED, None, {}, *nothing, 1, 1, None)
    lab.dispatch.occupy(Need(1, 0), live, "key")
    lab.dispatch.restored(1)
    assert two.granted_to == []
    lab.dispatch.forget(3)  # its walk was interrupted
    assert two.granted_to == [(1, "local")]
    assert lab.dispatch.places["local"].used_slots == 2
    lab.dispatch.forget(1)
    assert (two.again, three.granted_to) == ([0], [])


def test_a_pool_is_any_of_its_computes() -> None:
    lab = Lab(slots=1, pools={"gpu": ["other", "local"]})
    one = lab.run(1)
    for index in range(3):
        lab.ask(one, index, computes=("gpu",))
    assert one.granted_to == [(0, "other"), (1, "local")]


def test_the_limit_of_running_steps_holds_over_all_computes() -> None:
    lab = Lab(slots=2, most=2)
    one = lab.run(1)
    for index in range(3):
        lab.ask(one, index, computes=())
    assert len(one.granted_to) == 2
    assert lab.dispatch.why_waiting(1, 2) == "max_running_steps = 2 is reached"
    lab.dispatch.release(1, 0)
    assert len(one.granted_to) == 3


def test_while_the_disk_is_full_nothing_is_granted_and_then_all_is(lab: Lab) -> None:
    one = lab.run(1)
    lab.dispatch.paused = "the disk that holds the ledger is full"
    lab.ask(one, 0)
    assert one.granted_to == []
    assert lab.dispatch.why_waiting(1, 0) == "nothing is started: the disk that holds the ledger is full"
    lab.dispatch.paused = None
    lab.dispatch.place()
    assert one.granted_to == [(0, "local")]


def test_who_waits_is_told_what_is_taken_and_by_whom(lab: Lab) -> None:
    one, two = lab.run(1), lab.run(2)
    lab.ask(one, 0)
    lab.ask(one, 1)
    lab.ask(two, 0)
    assert lab.dispatch.why_waiting(2, 0) == "waits for a place: local has 2 slots, 2 in use, held by run 1 (alice)"
    assert lab.dispatch.why_waiting(1, 0) is None


def test_who_can_never_have_a_place_is_told_so(lab: Lab) -> None:
    one = lab.run(1)
    lab.ask(one, 0, slots=50)
    assert lab.dispatch.why_waiting(1, 0) == "can never have a place: local has 2 slots in all, 50 are asked for"


# --- sentences for who waits --------------------------------------------------------------------------------------
MINUTE = 60_000_000
NOW = 1_795_000_000_000_000


def gpu_lab(*places: Place) -> Lab:
    lab = Lab()
    lab.dispatch = Dispatch(list(places) or [gpu_box()], {}, None, lambda: NOW)
    return lab


def gpu_box(name: str = "gpu1", cards: int = 2, **more: Any) -> Place:
    return Place(name, 8, cards=tuple(Card(f"{name}-{n}", n, "RTX", 24 << 30) for n in range(cards)), **more)


def owned(lab: Lab, number: int, owner: str, minutes: int) -> Walk:
    walk = lab.run(number)
    walk.owner = owner
    walk.began = dict.fromkeys(range(10), NOW - minutes * MINUTE)
    return walk


def test_who_waits_for_a_card_is_told_who_has_them_and_for_how_long() -> None:
    lab = gpu_lab()
    bob, alice = owned(lab, 31, "bob", 40), owned(lab, 32, "alice", 0)
    lab.ask(bob, 0, computes=(), gpus=2)
    assert bob.cards == {0: ("gpu1-0", "gpu1-1")}
    lab.ask(alice, 0, computes=(), gpus=1)
    told = "waits for a GPU: gpu1 has 2, both held by run 31 (bob, 40 min so far)"
    assert lab.dispatch.why_waiting(32, 0) == told


def test_cards_of_several_runs_and_computes_are_told_apart() -> None:
    lab = gpu_lab(gpu_box("gpu1"), gpu_box("gpu2", drained=True), Place("local", 4))
    bob, eve, alice = owned(lab, 31, "bob", 90), owned(lab, 33, "eve", 2 * 1440), owned(lab, 32, "alice", 0)
    lab.ask(bob, 0, computes=(), gpus=1)
    lab.ask(eve, 0, computes=(), gpus=1)
    lab.ask(alice, 0, computes=(), gpus=1)
    assert lab.dispatch.why_waiting(32, 0) == (
        "waits for a GPU: gpu1 has 2, both held by run 31 (bob, 1 h so far) and run 33 (eve, 2 d so far); "
        "gpu2 is drained: its steps finish, nothing new starts"
    )


def test_a_compute_that_is_ill_is_told_with_its_sentence_and_since_when() -> None:
    lab = gpu_lab(gpu_box(unwell="no route to host", unwell_since=NOW - MINUTE))
    since = datetime.fromtimestamp((NOW - MINUTE) / 1e6)
    alice = owned(lab, 32, "alice", 0)
    lab.ask(alice, 0, computes=("gpu1",), gpus=1)
    assert lab.dispatch.why_waiting(32, 0) == f"waits for a place: gpu1: no route to host (since {since:%H:%M})"


def test_who_is_behind_a_step_that_needs_much_is_told_for_whom_the_place_is_kept() -> None:
    lab = gpu_lab()
    bob, alice, eve = owned(lab, 1, "bob", 5), owned(lab, 2, "alice", 0), owned(lab, 3, "eve", 0)
    lab.ask(bob, 0, computes=(), gpus=1)
    lab.ask(alice, 0, computes=(), gpus=2)
    lab.ask(eve, 0, computes=(), gpus=1)
    assert lab.dispatch.why_waiting(2, 0) == "waits for 2 GPUs: gpu1 has 2, 1 held by run 1 (bob, 5 min so far)"
    assert lab.dispatch.why_waiting(3, 0) == (
        "waits for a place: gpu1 is kept for run 2 (alice), which waits for 2 GPUs there"
    )


def test_a_place_is_no_longer_kept_for_a_step_that_is_withdrawn() -> None:
    lab = gpu_lab()
    bob, alice, eve = owned(lab, 1, "bob", 5), owned(lab, 2, "alice", 0), owned(lab, 3, "eve", 0)
    lab.ask(bob, 0, computes=(), gpus=1)
    lab.ask(alice, 0, computes=(), gpus=2)
    lab.ask(eve, 0, computes=(), gpus=1)
    lab.dispatch.withdraw(cast(Any, alice), 0)
    assert eve.granted_to == [(0, "gpu1")]


def test_who_can_never_have_a_place_is_told_so_whatever_else_keeps_it_out() -> None:
    lab = Lab(slots=1, most=1)
    one = lab.run(1)
    lab.ask(one, 0)
    lab.ask(one, 1, slots=50)
    never = "can never have a place: local has 1 slot in all, 50 are asked for"
    assert lab.dispatch.why_waiting(1, 1) == never
    lab.dispatch.paused = "the disk that holds the ledger is full"
    assert lab.dispatch.why_waiting(1, 1) == never


def test_who_can_never_have_a_card_is_told_of_every_compute_that_it_may_use() -> None:
    lab = gpu_lab(gpu_box(), Place("local", 4))
    alice = owned(lab, 2, "alice", 0)
    lab.ask(alice, 0, computes=(), gpus=3)
    never = "can never have a place: gpu1 has 2 GPUs in all, 3 are asked for; local has no GPU"
    assert lab.dispatch.why_waiting(2, 0) == never
    assert lab.dispatch.never(Need(2, 0, gpus=3)) == never
    assert lab.dispatch.never(Need(2, 0, gpus=2)) is None


# --- getting ready: where leases are short ---------------------------------------------------------------------------
def crowd(lab: Lab, run: int = 1, count: int = 100) -> Walk:
    """Two steps run on the two slots of `local`, and many wait."""
    one = lab.run(run)
    for index in range(count):
        lab.ask(one, index)
    return one


def test_after_a_short_lease_those_who_are_next_get_ready_and_have_their_places_in_their_turns(lab: Lab) -> None:
    one = crowd(lab)
    assert one.ready == []
    lab.dispatch.release(1, 0)
    assert one.granted_to[2:] == [(2, "local")]
    assert one.ready == list(range(3, 3 + AHEAD * 2))
    for index in range(1, 20):
        lab.dispatch.release(1, index)
    assert [index for index, _ in one.granted_to] == list(range(22))
    assert one.ready == list(dict.fromkeys(one.ready)), "one of them got ready twice"
    assert len(one.ready) > AHEAD * 2, "more get ready before the last one has its turn"


def test_after_a_long_lease_nobody_gets_ready(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    one = crowd(lab)
    later = time.monotonic() + BRISK + 1
    monkeypatch.setattr(time, "monotonic", lambda: later)
    lab.dispatch.release(1, 0)
    assert (one.granted_to[2:], one.ready) == ([(2, "local")], [])


def test_who_is_ready_waits_for_whoever_comes_later_and_is_better(lab: Lab) -> None:
    one, two = crowd(lab), lab.run(2)
    lab.dispatch.release(1, 0)
    lab.ask(two, 0, priority=5)
    lab.dispatch.release(1, 1)
    assert two.granted_to == [(0, "local")]
    assert lab.dispatch.why_waiting(1, 3) is not None
    lab.dispatch.release(2, 0)
    assert one.granted_to[-1] == (3, "local")


def test_nobody_gets_ready_for_one_of_several_computes_nor_while_nothing_is_started(lab: Lab) -> None:
    one = lab.run(1)
    for index in range(6):
        lab.ask(one, index, computes=("local", "other"))
    lab.dispatch.release(1, 0)
    assert one.ready == []
    two = crowd(lab, 2)
    lab.dispatch.paused = "the disk is full"
    lab.dispatch.release(1, 1)
    assert two.ready == []


def test_who_was_ready_and_has_withdrawn_makes_room_for_the_next(lab: Lab) -> None:
    one = crowd(lab)
    lab.dispatch.release(1, 0)
    for index in list(one.ready):
        lab.dispatch.withdraw(cast(Any, one), index)
    before = len(one.ready)
    lab.dispatch.release(1, 1)
    assert one.granted_to[-1][0] == one.ready[before] - 1
    lab.dispatch.forget(1)
    assert lab.dispatch.why_waiting(1, 60) is None
