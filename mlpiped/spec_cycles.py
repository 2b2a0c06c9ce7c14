"""Steps that wait for each other: the cycles of a graph. PURE, and linear in its size."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


def cycles_of(before: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """One shortest cycle of each knot of the graph `node -> those it waits for`, as [a, b, a] in running order."""
    found = []
    for knot in _knots(before):
        start = knot[0]
        inside = set(knot)
        if len(knot) == 1:
            if start in before[start]:
                found.append([start, start])
            continue
        parent: dict[str, str] = {}
        layer = [start]
        while start not in parent:
            following = []
            for node in layer:
                for earlier in before[node]:
                    if earlier in inside and earlier not in parent:
                        parent[earlier] = node
                        following.append(earlier)
            layer = following
        path = [start]
        node = parent[start]
        while node != start:
            path.append(node)
            node = parent[node]
        found.append([*path, start])
    return found


def _knots(before: Mapping[str, Sequence[str]]) -> Iterator[list[str]]:
    """The strongly connected parts (Tarjan, without recursion: a chain of 10,000 steps is fine)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    on_stack: set[str] = set()
    order = {node: number for number, node in enumerate(before)}
    for root in before:
        if root in index:
            continue
        work = [(root, iter(before[root]))]
        index[root] = low[root] = len(index)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, rest = work[-1]
            for other in rest:
                if other not in index:
                    index[other] = low[other] = len(index)
                    stack.append(other)
                    on_stack.add(other)
                    work.append((other, iter(before[other])))
                    break
                if other in on_stack:
                    low[node] = min(low[node], index[other])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    knot: list[str] = []
                    while not knot or knot[-1] != node:
                        knot.append(stack.pop())
                    on_stack.difference_update(knot)
                    yield sorted(knot, key=order.__getitem__)
