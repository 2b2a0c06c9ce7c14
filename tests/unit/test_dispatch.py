"""Places and shared work: one attempt per key, whoever asks; nothing is held by a run that is gone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import anyio
import pytest

from mlpiped.dispatch import Dispatch
from mlpiped.placement import Need, Place


@dataclass
class Walk:
    """A run as the dispatcher sees it: it is granted places, and told to decide again."""

    id: int
    granted_to: list[tuple[int, str]] = field(default_factory=list)
    again: list[int] = field(default_factory=list)
    owner: str = "alice"
    turns: dict[int, anyio.Event] = field(default_factory=dict)

    def granted(self, index: int, compute: str, turn: anyio.Event) -> None:
        self.granted_to.append((index, compute))
        self.turns[index] = turn

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
        self.now = 0.0
        self.dispatch = Dispatch([Place("local", slots), Place("other", 1)], pools or {}, most, lambda: self.now)

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
    one, two = lab.run(1), lab.run(2)
    lab.dispatch.occupy(cast(Any, one), 0, Need(1, 0), "local", "key")
    lab.ask(two, 0, "key")
    lab.ask(two, 1)
    lab.ask(two, 2)
    assert two.granted_to == [(1, "local")]
    assert lab.dispatch.places["local"].used_slots == 2


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


# --- promises: who is next where leases are short --------------------------------------------------------------------
def brisk(lab: Lab) -> Walk:
    """Two steps run on the two slots of `local`, and leases there have been short."""
    one = lab.run(1)
    lab.dispatch.places["local"].pace = 0.01
    lab.ask(one, 0)
    lab.ask(one, 1)
    return one


def turns(walk: Walk) -> list[int]:
    return [index for index, turn in walk.turns.items() if turn.is_set()]


def test_where_leases_are_short_the_next_gets_ready_and_has_its_turn_when_a_place_is_free(lab: Lab) -> None:
    one = brisk(lab)
    for index in (2, 3, 4):
        lab.ask(one, index)
    assert list(one.turns) == [0, 1, 2, 3]  # as many ahead as there are slots
    assert turns(one) == [0, 1]
    lab.dispatch.release(1, 1)
    assert turns(one) == [0, 1, 2]
    assert list(one.turns) == [0, 1, 2, 3, 4]
    assert lab.dispatch.places["local"].used_slots == 2


@pytest.mark.parametrize("pace", [None, 2.0])
def test_where_leases_are_long_or_not_known_nothing_is_promised(lab: Lab, pace: float | None) -> None:
    one = brisk(lab)
    lab.dispatch.places["local"].pace = pace
    lab.ask(one, 2)
    assert list(one.turns) == [0, 1]


def test_a_long_lease_ends_promising(lab: Lab) -> None:
    one = brisk(lab)
    lab.now = 60.0
    lab.dispatch.release(1, 0)
    for index in (2, 3):
        lab.ask(one, index)
    assert turns(one) == list(one.turns) == [0, 1, 2]


def test_a_step_that_several_computes_could_take_is_promised_none(lab: Lab) -> None:
    one = brisk(lab)
    lab.dispatch.places["other"].pace = 0.01
    lab.ask(one, 2, computes=())
    lab.ask(one, 3, computes=())
    assert turns(one) == list(one.turns) == [0, 1, 2]


def test_a_promise_that_is_given_up_goes_to_the_next(lab: Lab) -> None:
    one = brisk(lab)
    for index in (2, 3, 4):
        lab.ask(one, index)
    lab.dispatch.release(1, 2)  # cancelled before its turn
    assert list(one.turns) == [0, 1, 2, 3, 4]
    lab.dispatch.release(1, 0)
    assert turns(one) == [0, 1, 3]


def test_a_forgotten_run_is_promised_nothing(lab: Lab) -> None:
    one, two = brisk(lab), lab.run(2)
    lab.ask(one, 2)
    lab.ask(two, 0)
    lab.ask(two, 1)
    lab.dispatch.forget(1)
    assert turns(two) == [0, 1]
    assert not lab.dispatch.places["local"].promised


def test_promises_wait_while_the_limit_of_running_steps_or_a_full_disk_says_so() -> None:
    lab = Lab(slots=2, most=2)
    one = brisk(lab)
    lab.ask(one, 2)
    lab.dispatch.paused = "full"
    lab.dispatch.release(1, 0)
    assert turns(one) == [0, 1]
    lab.dispatch.paused = None
    lab.dispatch.place()
    assert turns(one) == [0, 1, 2]
