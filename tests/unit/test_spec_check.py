"""What is wrong with a pipeline that has the right shape."""

from __future__ import annotations

import graphlib
import re
import string
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpiped.errors import Fault
from mlpiped.spec import PipelineSpec
from mlpiped.spec_check import faults_of, path_fault
from mlpiped.spec_cycles import cycles_of

WHERE = {"file": "p.py", "line": 1}


def text(value: str) -> dict[str, str]:
    return {"kind": "text", "text": value}


def reference(path: str, datastore: str = "lab", glob: bool = False) -> dict[str, Any]:
    return {"kind": "reference", "datastore": datastore, "path": path, "glob": glob}


def upstream(step: str, output: str) -> dict[str, Any]:
    return {"kind": "upstream", "step": step, "output": output}


def port(name: str, source: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "source": source}


def output(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "file_name": name, **more}


def step(name: str, line: int = 2, **more: Any) -> dict[str, Any]:
    return {"name": name, "where": {"file": "p.py", "line": line}, "arguments": [text("run")], **more}


def pipeline(*steps: dict[str, Any], **more: Any) -> PipelineSpec:
    plain = {"name": "p", "where": WHERE, "experiment": "p", "steps": steps, **more}
    return PipelineSpec.model_validate(plain)


def parameter(name: str, type: str = "str", default: Any = "", **more: Any) -> dict[str, Any]:
    return {"name": name, "type": type, "default": default, **more}


def messages(spec: PipelineSpec, **names: Any) -> list[str]:
    return [fault.message for fault in faults_of(spec, **names)]


def test_a_sound_pipeline_has_no_faults() -> None:
    spec = pipeline(
        step("a", inputs=[port("in", reference("x/*.csv", glob=True))], outputs=[output("out")]),
        step(
            "b",
            arguments=[text("run"), {"kind": "input", "port": "in"}, {"kind": "parameter", "name": "rate"}],
            inputs=[port("in", upstream("a", "out"))],
            after=["a"],
            compute=["gpu"],
            outputs=[output("model", datastore="lab", publish="models/{pipeline}/{run_id}")],
        ),
        parameters=[parameter("rate", "float", 0.1)],
        triggers=[{"kind": "cron", "where": WHERE, "expression": "0 6 * * *"}],
    )
    assert faults_of(spec, {"lab"}, {"gpu"}, lambda expression, zone: None) == []


def loop(**more: Any) -> dict[str, Any]:
    return {"kind": "arrival", "where": WHERE, "source": reference("in"), **more}


TABLE: list[tuple[str, PipelineSpec, list[str]]] = [
    ("no steps", pipeline(), ["pipeline `p` has no steps"]),
    (
        "cycle",
        pipeline(
            step("a", inputs=[port("x", upstream("b", "o"))], outputs=[output("o")]),
            step("b", inputs=[port("x", upstream("a", "o"))], outputs=[output("o")]),
        ),
        ["steps wait for each other: a -> b -> a"],
    ),
    (
        "cycle by after",
        pipeline(step("a", after=["b"]), step("b", after=["c"]), step("c", after=["a"])),
        ["steps wait for each other: a -> c -> b -> a"],
    ),
    ("self-edge", pipeline(step("a", after=["a"])), ["step `a` waits for itself: a -> a"]),
    ("unknown after", pipeline(step("prepare"), step("b", after=["prepair"])), ["no step named `prepair`"]),
    ("unknown upstream step", pipeline(step("b", inputs=[port("x", upstream("a", "o"))])), ["no step named `a`"]),
    (
        "unknown upstream output",
        pipeline(step("a", outputs=[output("clean")]), step("b", inputs=[port("x", upstream("a", "clear"))])),
        ["no output of step `a` named `clear`"],
    ),
    ("two steps of one name", pipeline(step("a", 3), step("a", 5)), ["two steps are named `a`: lines 3 and 5"]),
    ("two outputs of one name", pipeline(step("a", outputs=[output("o"), output("o")])), ["two outputs are named `o`"]),
    (
        "two outputs in one place",
        pipeline(
            step("a", outputs=[output("o", datastore="lab", publish="x/o")]),
            step("b", outputs=[output("o", datastore="lab", publish="x/{output}")]),
        ),
        ["two outputs are published at `x/{output}`: `a/o` and `b/o`"],
    ),
    ("bad step name", pipeline(step("../x")), ["not a name for a step: `../x`"]),
    ("name with ESC", pipeline(step("a\x1b[2J")), ["not a name for a step: `a\\x1b[2J`"]),
    (
        "path up",
        pipeline(step("a", inputs=[port("x", reference("a/../../b"))])),
        ["the path of `x` leaves its folder by `..`: `a/../../b`"],
    ),
    (
        "absolute path",
        pipeline(step("a", inputs=[port("x", reference("/etc"))])),
        ["the path of `x` is absolute: `/etc`"],
    ),
    (
        "NUL in a path",
        pipeline(step("a", inputs=[port("x", reference("a\0"))])),
        ["the path of `x` holds a NUL: `a\\x00`"],
    ),
    (
        "file name with folder",
        pipeline(step("a", outputs=[{"name": "o", "file_name": "../o"}])),
        ["the file name of output `o` is not one: `../o`"],
    ),
    (
        "file name dots",
        pipeline(step("a", outputs=[{"name": "o", "file_name": ".."}])),
        ["the file name of output `o` is not one: `..`"],
    ),
    (
        "publish up",
        pipeline(step("a", outputs=[output("o", datastore="lab", publish="../o")])),
        ["the path to publish `o` at leaves its folder by `..`: `../o`"],
    ),
    ("publish nowhere", pipeline(step("a", outputs=[output("o", publish="o")])), ["no datastore to publish `o` in"]),
    (
        "publish field",
        pipeline(step("a", outputs=[output("o", datastore="lab", publish="{home}/o")])),
        ["`{home}/o` names `{home}`, which nobody fills in"],
    ),
    (
        "publish brace",
        pipeline(step("a", outputs=[output("o", datastore="lab", publish="x{")])),
        ["the path to publish `o` at has an odd brace: `x{`"],
    ),
    ("undeclared parameter", pipeline(step("a", parameters=["rate"])), ["no parameter named `rate`"]),
    (
        "undeclared parameter in a text",
        pipeline(
            step("a", arguments=[{"kind": "concat", "parts": [text("-"), {"kind": "parameter", "name": "rate"}]}])
        ),
        ["no parameter named `rate`"],
    ),
    (
        "parameter type",
        pipeline(step("a"), parameters=[parameter("n", "int", True)]),
        ["parameter `n` is of type int, not True"],
    ),
    (
        "parameter choices",
        pipeline(step("a"), parameters=[parameter("n", "int", 1, choices=[2])]),
        ["the default of parameter `n` is none of its choices"],
    ),
    (
        "parameters share a variable",
        pipeline(step("a"), parameters=[parameter("a.b"), parameter("A_b")]),
        ["parameters `a.b` and `A_b` would share the variable `MLPIPED_PARAM_A_B`"],
    ),
    (
        "unknown port",
        pipeline(step("a", arguments=[{"kind": "input", "port": "x"}, {"kind": "output", "port": "y"}])),
        ["no input named `x`", "no output named `y`"],
    ),
    (
        "glob in a text",
        pipeline(
            step(
                "a",
                inputs=[port("x", reference("*", glob=True))],
                arguments=[{"kind": "concat", "parts": [{"kind": "input", "port": "x"}]}],
            )
        ),
        ["the glob `x` is a part of an argument"],
    ),
    ("no command", pipeline(step("a", arguments=[])), ["step `a` has no command"]),
    (
        "shell of two",
        pipeline(step("a", shell=True, arguments=[text("a"), text("b")])),
        ["the shell command of step `a` is not one text"],
    ),
    ("NUL argument", pipeline(step("a", arguments=[text("a\0")])), ["an argument of step `a` holds a NUL"]),
    (
        "script outside",
        pipeline(step("a", source={"directory": "/x", "script": "../s.py"})),
        ["the script of step `a` leaves its folder by `..`: `../s.py`"],
    ),
    (
        "relative source",
        pipeline(step("a", source={"directory": "x", "script": "s.py"})),
        ["the source_directory of step `a` is not absolute: `x`"],
    ),
    ("endless timeout", pipeline(step("a", timeout=float("inf"))), ["timeout is not a duration: inf"]),
    (
        "trigger parameter",
        pipeline(step("a"), triggers=[loop(batch="file", parameter="path")]),
        ["no parameter named `path`"],
    ),
    (
        "trigger parameter type",
        pipeline(step("a"), parameters=[parameter("path", "int", 1)], triggers=[loop(batch="file", parameter="path")]),
        ["parameter `path` takes a path, but is of type int"],
    ),
    (
        "trigger path",
        pipeline(step("a"), triggers=[loop(source=reference("../in"))]),
        ["the path that OnArrival watches leaves its folder by `..`: `../in`"],
    ),
    ("trigger marker", pipeline(step("a"), triggers=[loop(marker="../x")]), ["the marker names a folder: `../x`"]),
    (
        "starts itself",
        pipeline(step("a"), triggers=[{"kind": "success", "where": WHERE, "pipeline": "p"}]),
        ["pipeline `p` would start itself for ever"],
    ),
    (
        "required and triggered",
        pipeline(step("a"), parameters=[parameter("x", default=None, required=True)], triggers=[loop()]),
        ["a trigger cannot choose the required parameter `x`"],
    ),
    (
        "required and bound",
        pipeline(
            step("a"),
            parameters=[parameter("x", default=None, required=True)],
            triggers=[loop(batch="file", parameter="x")],
        ),
        [],
    ),
    (
        "interval",
        pipeline(step("a"), triggers=[{"kind": "every", "where": WHERE, "seconds": 0.1}]),
        ["the interval must be at least a second: 0.1"],
    ),
]


@pytest.mark.parametrize(("spec", "expected"), [one[1:] for one in TABLE], ids=[one[0] for one in TABLE])
def test_each_fault_has_its_sentence(spec: PipelineSpec, expected: list[str]) -> None:
    assert messages(spec) == expected


def test_faults_name_the_line_and_the_next_action() -> None:
    spec = pipeline(
        step("prepare", 3), step("b", 7, after=["prepair"], compute=["gpux"]), step("c", 5, compute=["zzz"])
    )
    assert faults_of(spec, {"lab"}, {"gpu1", "local"}) == [
        Fault("p.py", 5, "no compute or pool named `zzz`", "add it to the config: `[compute.NAME]`"),
        Fault("p.py", 7, "no step named `prepair`", "did you mean `prepare`?"),
        Fault("p.py", 7, "no compute or pool named `gpux`", "did you mean `gpu1`?"),
    ]


def test_datastores_are_checked_wherever_they_are_named() -> None:
    spec = pipeline(
        step("a", inputs=[port("x", reference("x", "lba"))], outputs=[output("o", datastore="lba", publish="o")]),
        triggers=[loop(source=reference("x", "lba"))],
    )
    assert messages(spec) == []
    assert messages(spec, datastores={"lab"}) == ["no datastore named `lba`"] * 3
    assert faults_of(spec, {"lab"})[0].hint == "did you mean `lab`?"


def test_the_crontab_expression_is_read_by_who_can() -> None:
    trigger = {"kind": "cron", "where": WHERE, "expression": "61 * * * *", "timezone": "Europe/Warsaw"}
    spec = pipeline(step("a"), triggers=[trigger])
    assert messages(spec, check_cron=lambda expression, zone: f"{expression} in {zone}") == [
        "61 * * * * in Europe/Warsaw"
    ]
    assert messages(spec, check_cron=lambda expression, zone: None) == []


@pytest.mark.parametrize("path", ["a", "a/b", ".", "a..b", "..a", "a/...", "*.csv", "ż", "a\nb"])
def test_paths_that_stay(path: str) -> None:
    assert path_fault(path) is None


@pytest.mark.parametrize("path", ["", "/", "/a", "..", "../a", "a/..", "a/../b", "a\0", "a" * 5000])
def test_paths_that_may_leave(path: str) -> None:
    assert path_fault(path)


GRAPHS = st.integers(1, 9).flatmap(
    lambda size: st.lists(st.tuples(st.integers(0, size - 1), st.integers(0, size - 1)), max_size=20).map(
        lambda edges: {str(n): [str(b) for a, b in edges if a == n] for n in range(size)}
    )
)


def reachable(graph: dict[str, list[str]], start: str) -> set[str]:
    seen: set[str] = set()
    todo = list(graph[start])
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += graph[node]
    return seen


@given(GRAPHS)
def test_every_knot_of_a_graph_gives_one_true_cycle(graph: dict[str, list[str]]) -> None:
    cycles = cycles_of(graph)
    for cycle in cycles:
        assert cycle[0] == cycle[-1]
        assert len(set(cycle)) == len(cycle) - 1
        assert all(earlier in graph[later] for earlier, later in pairwise(cycle))
    knotted = {node for node in graph if node in reachable(graph, node)}
    knots = {
        frozenset(other for other in knotted if node in reachable(graph, other) and other in reachable(graph, node))
        for node in knotted
    }
    assert sorted(map(sorted, knots)) == sorted(
        sorted(knot) for knot in knots if any(set(cycle) <= knot for cycle in cycles)
    )
    assert len(cycles) == len(knots)


def test_a_chain_of_ten_thousand_steps_is_no_cycle_and_no_recursion_too_deep() -> None:
    def chain(size: int) -> PipelineSpec:
        return pipeline(
            *(
                step(f"s{n}", inputs=[port("x", upstream(f"s{n - 1}", "o"))] if n else [], outputs=[output("o")])
                for n in range(size)
            )
        )

    spec = chain(10_000)
    assert faults_of(spec, {"lab"}, {"local"}) == []


IMAGES = {
    "gpu1": frozenset({False}),
    "gpu2": frozenset({False}),
    "box": frozenset({True}),
    "both": frozenset({False, True}),
}
IMAGE, PLAIN = {"image": "app:1"}, {"env": {"A": "1"}}


@pytest.mark.parametrize(
    ("environment", "compute", "images", "message", "hint"),
    [
        (IMAGE, ["box"], IMAGES, None, None),
        (IMAGE, [], IMAGES, None, None),
        (IMAGE, ["gpu1", "both"], IMAGES, None, None),
        (PLAIN, ["both"], IMAGES, None, None),
        (PLAIN, [], IMAGES, None, None),
        (PLAIN, ["box", "gpu1"], IMAGES, None, None),
        (IMAGE, ["gpu1"], None, None, None),
        (IMAGE, ["gpu1"], IMAGES, "runs in a container, and `gpu1` runs none", "`box` or `both` can"),
        ({"dockerfile": "FROM x"}, ["gpu1", "gpu2"], IMAGES, "in a container, and `gpu1` and `gpu2` run none", "`box`"),
        (IMAGE, [], {"l": frozenset({False})}, "and no compute of the config runs any", 'with `kind = "docker"`'),
        (PLAIN, ["box"], IMAGES, "has no image, and `box` runs containers only", "or name another compute"),
        (PLAIN, [], {"b": frozenset({True})}, "every compute of the config runs containers only", "Environment(image="),
        (IMAGE, ["nowhere"], IMAGES, "no compute or pool named `nowhere`", None),
    ],
)
def test_an_image_and_the_compute_that_is_named_fit_together(
    environment: dict[str, Any], compute: list[str], images: Any, message: str | None, hint: str | None
) -> None:
    spec = pipeline(step("evaluate", 7, environment=environment, compute=compute))
    found = faults_of(spec, computes=set(IMAGES), images=images)
    if message is None:
        assert found == []
        return
    (fault,) = found
    assert message in fault.message and fault.line == 7
    assert hint is None or hint in (fault.hint or "")
    assert message.startswith("no compute or pool") or "`evaluate`" in fault.message


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"environment": {"image": "a", "dockerfile": "FROM a"}},
            "`a` has an image and a Dockerfile: an environment is",
        ),
        (
            {"environment": {"image": "a", "requirements": "x"}},
            "`a` has an image and requirements: an environment is of",
        ),
        (
            {"resources": {"cluster": True}, "environment": {"image": "/a.sif"}},
            "step `a` is started by srun, which its container does not have",
        ),
        ({"resources": {"gpu_memory": 5}}, "`a` asks for memory of a card, and for no card"),
    ],
)
def test_what_the_sdk_would_refuse_is_refused_in_a_spec_too(more: dict[str, Any], message: str) -> None:
    (found,) = messages(pipeline(step("a", **more)))
    assert message in found


def test_a_step_may_ask_for_cards() -> None:
    assert faults_of(pipeline(step("train", resources={"gpus": 1})), computes={"local"}) == []


# --- G5: names ------------------------------------------------------------------------------------------------------
ALLOWED = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")  # beside `NAME`, so that a change of one is seen
NASTY = [
    "../x",
    "a\0b",
    "a\nb",
    "a\n",
    "\x1b[31m",
    "\u202egnp",
    "x" * 10_000,
    "",
    ".",
    "..",
    "a/b",
    "-a",
    "a b",
    "ż",
    "٣",
]
NEARLY = st.text(string.ascii_letters + string.digits + "_.-", max_size=66)
NAMES = st.one_of(st.text(max_size=80), NEARLY, st.sampled_from([*NASTY, "CON", "a" * 64, "a" * 65]))


@settings(max_examples=2000, deadline=None)
@given(NAMES)
def test_G5_a_name_is_taken_only_if_it_is_harmless_in_a_path_and_on_a_terminal(name: str) -> None:
    allowed = ALLOWED.fullmatch(name) is not None
    for spec in (
        pipeline(step("a"), name=name),
        pipeline(step(name)),
        pipeline(step("a", outputs=[{"name": name, "file_name": "x"}])),
    ):
        faults = faults_of(spec)
        assert (not faults) == allowed, (name, faults)
        assert all(fault.message.isprintable() and len(fault.message) < 300 for fault in faults), faults


# --- G7: graphs -----------------------------------------------------------------------------------------------------
@settings(max_examples=1500, deadline=None)
@given(GRAPHS, st.sets(st.integers(0, 8)), st.booleans())
def test_G7_a_graph_is_refused_if_and_only_if_it_cannot_be_walked(
    graph: dict[str, list[str]], by_data: set[int], unknown: bool
) -> None:
    """Edges are `after=` or data; judged by the standard library's own sorter."""
    made = []
    for name, before in graph.items():
        edges = dict.fromkeys(before)
        if int(name) in by_data:
            ports = [port(f"from{other}", upstream(other, "out")) for other in edges]
            made.append(step(name, inputs=ports, outputs=[output("out")]))
        else:
            made.append(step(name, after=list(edges), outputs=[output("out")]))
    if unknown:
        made.append(step("last", inputs=[port("x", upstream("nobody", "out"))]))
    said = messages(pipeline(*made))
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
        knotted = False
    except graphlib.CycleError:
        knotted = True
    cycles = [each for each in said if "nobody" not in each]
    assert bool(cycles) == knotted, said
    assert any("nobody" in each for each in said) == unknown, said
    for sentence in cycles:
        walk = sentence.rpartition(": ")[2].split(" -> ")
        assert walk[0] == walk[-1] and all(a in graph[b] or b in graph[a] for a, b in pairwise(walk)), sentence
