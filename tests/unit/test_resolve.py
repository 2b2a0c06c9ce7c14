"""The walk over a graph: what is ready when, what is blocked, and the reason of each decision."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpiped.errors import UnknownName
from mlpiped.model import OutputFact, StepOutcome
from mlpiped.resolve import Graph, Known, PastResult, Plan, decide
from mlpiped.spec import PipelineSpec


def graph(edges: dict[str, list[str]], **fields: dict[str, Any]) -> Graph:
    """Steps by name, each with those whose output it takes; each makes the output `o`."""
    where = {"file": "p.py", "line": 1}
    steps = []
    for name, needs in edges.items():
        inputs = [{"name": n, "source": {"kind": "upstream", "step": n, "output": "o"}} for n in needs]
        steps.append(
            {
                "name": name,
                "where": where,
                "arguments": [{"kind": "text", "text": "true"}],
                "inputs": inputs,
                "outputs": [{"name": "o", "file_name": "o"}],
                **fields.get(name, {}),
            }
        )
    return Graph(PipelineSpec.model_validate({"name": "p", "where": where, "experiment": "p", "steps": steps}))


DIAMOND = {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"]}


def names(plan: Plan, indexes: list[int]) -> list[str]:
    return [plan.graph.steps[i].name for i in indexes]


def test_a_step_is_ready_when_all_before_it_have_ended_and_is_handed_out_once() -> None:
    plan = Plan(graph(DIAMOND))
    assert names(plan, plan.ready()) == ["a"]
    assert plan.ready() == []
    plan.finished(0, StepOutcome.SUCCEEDED)
    assert names(plan, plan.ready()) == ["b", "c"]
    plan.finished(1, StepOutcome.SUCCEEDED)
    assert plan.ready() == []
    plan.finished(2, StepOutcome.REUSED)
    assert names(plan, plan.ready()) == ["d"]
    assert plan.more_to_do()
    plan.finished(3, StepOutcome.SUCCEEDED)
    assert not plan.more_to_do()


def test_what_comes_after_a_failure_is_blocked_and_says_by_whom() -> None:
    plan = Plan(graph(DIAMOND))
    plan.finished(0, StepOutcome.SUCCEEDED)
    plan.finished(1, StepOutcome.TIMED_OUT)
    assert plan.blocked_by(3) == "`b` timed out"
    assert plan.blocked_by(2) is None


def test_only_what_the_target_is_made_from_is_needed() -> None:
    g = graph(DIAMOND)
    plan = Plan(g, target=g.step("b"))
    assert {g.steps[i].name for i in plan.unneeded} == {"c", "d"}
    assert plan.blocked_by(g.step("d")) == "not needed for the target"


def test_an_unknown_step_is_an_error_with_the_nearest_names() -> None:
    with pytest.raises(UnknownName) as error:
        graph({"prepare": [], "train": []}).step("trian")
    assert error.value.hint == "did you mean `train`?"


OUT = (OutputFact("o", "b3:x", "file", 1, "/store/x"),)


@pytest.mark.parametrize(
    ("fields", "force", "known", "action", "why"),
    [
        ({}, (), Known("k", PastResult(41, "a", OUT)), "reuse", "reused from run 41"),
        ({}, (), Known("k", PastResult(41, "b", OUT)), "reuse", "reused from run 41 (`b`)"),
        ({}, (0,), Known("k", PastResult(41, "a", OUT)), "run", "forced"),
        ({"effect": True}, (), Known("k", PastResult(41, "a", OUT)), "run", "it has an effect"),
        ({"allow_reuse": False}, (), Known("k", PastResult(41, "a", OUT)), "run", "allow_reuse=False"),
        ({}, (), Known("k", PastResult(41, "a", OUT, intact=False)), "run", "missing or was changed"),
        ({}, (), Known("k"), "run", "has not succeeded before"),
        ({}, (), Known("k", None, {}, ["parameter rate 1 -> 2", "code changed"]), "run", "rate 1 -> 2; code changed"),
        ({}, (), Known("k", None, {}, []), "run", "gone from the ledger"),
    ],
)
def test_a_decision_and_its_reason(fields: Any, force: Any, known: Known, action: str, why: str) -> None:
    plan = Plan(graph({"a": []}, a=fields), force=force)
    found = decide(plan, 0, known)
    assert found.action == action
    assert why in found.why
    assert (found.outputs == OUT) == (action == "reuse")


@st.composite
def graphs(draw: st.DrawFn) -> dict[str, list[str]]:
    n = draw(st.integers(1, 12))
    return {f"s{i}": [f"s{j}" for j in draw(st.sets(st.integers(0, i - 1), max_size=4))] if i else [] for i in range(n)}


@given(graphs(), st.data())
def test_whatever_the_order_of_ends_each_step_is_ready_once_and_after_all_before_it(
    edges: dict[str, list[str]], data: st.DataObject
) -> None:
    plan = Plan(graph(edges))
    open_: list[int] = []
    seen: list[int] = []
    while plan.more_to_do():
        found = plan.ready()
        assert all(not plan.waits_for(i) for i in found)
        seen += found
        open_ += found
        chosen = open_.pop(data.draw(st.integers(0, len(open_) - 1)))
        plan.finished(chosen, StepOutcome.SUCCEEDED)
    assert sorted(seen) == list(range(len(edges)))
