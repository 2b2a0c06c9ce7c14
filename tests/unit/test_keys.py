"""The key: what is in it, what is not, and how a change is told."""

from __future__ import annotations

from typing import Any

import pytest

from mlpiped import keys
from mlpiped.keys import CodePart, ImagePart, InputPart, StaticParts
from mlpiped.spec import PipelineSpec, StepSpec, version_of

WHERE = {"file": "p.py", "line": 1}


def step(**changed: Any) -> StepSpec:
    plain: dict[str, Any] = {
        "name": "train",
        "where": WHERE,
        "kind": "python",
        "arguments": [
            {"kind": "text", "text": "python"},
            {"kind": "text", "text": "train.py"},
            {"kind": "input", "port": "clean"},
            {"kind": "text", "text": "--rate"},
            {"kind": "parameter", "name": "rate"},
            {"kind": "output", "port": "model"},
        ],
        "inputs": [{"name": "clean", "source": {"kind": "upstream", "step": "prepare", "output": "clean"}}],
        "outputs": [{"name": "model", "file_name": "model"}],
    }
    return StepSpec.model_validate(plain | changed)


def renamed_port(name: str) -> StepSpec:
    arguments = [a.model_dump() for a in step().arguments]
    arguments[2]["port"] = name
    source = {"kind": "upstream", "step": "other", "output": name}
    return step(arguments=arguments, inputs=[{"name": name, "source": source}])


CODE, VALUES, INPUTS = "b3:code", {"rate": 0.1}, {"clean": InputPart("b3:clean", "clean")}


def key(s: StepSpec, code: str | None = CODE, values: Any = None, inputs: Any = None) -> str:
    return StaticParts(s).key(code, VALUES if values is None else values, INPUTS if inputs is None else inputs)


@pytest.mark.parametrize(
    "changed",
    [
        {"name": "another"},
        {"where": {"file": "q.py", "line": 99}},
        {"compute": ["gpu1"]},
        {"resources": {"cpus": 8, "memory": 1 << 30}},
        {"timeout": 60.0},
        {"grace": 1.0},
        {"retry": {"attempts": 5}},
        {"priority": 9},
        {"after": ["something"]},
        {"description": "words"},
        {"source": {"directory": "/elsewhere", "script": "train.py"}},
    ],
    ids=lambda c: next(iter(c)),
)
def test_what_does_not_make_the_result_is_not_in_the_key(changed: dict[str, Any]) -> None:
    assert key(step(**changed)) == key(step())


@pytest.mark.parametrize(
    "changed",
    [
        {"arguments": [{"kind": "text", "text": "python"}]},
        {"shell": True},
        {"outputs": [{"name": "model", "file_name": "model.bin"}]},
        {"outputs": [{"name": "model", "file_name": "model", "output_kind": "folder"}]},
        {"environment": {"requirements": "numpy==2"}},
        {"environment": {"env": {"A": "1"}}},
        {"environment": {"python": "3.99"}},
        {"environment": {"modules": ["cuda/12"]}},
        {"salt": "2"},
    ],
    ids=lambda c: next(iter(c)),
)
def test_what_makes_the_result_is_in_the_key(changed: dict[str, Any]) -> None:
    assert key(step(**changed)) != key(step())


def test_modules_are_in_the_key_in_the_order_in_which_they_are_loaded() -> None:
    one, other = (step(environment={"modules": modules}) for modules in (["a", "b"], ["b", "a"]))
    assert key(one) != key(other)
    assert keys.changes(parts(one), parts(other)) == ['environment: modules ["a", "b"] -> ["b", "a"]']


def test_the_name_of_an_input_in_the_arguments_is_not_in_the_key() -> None:
    assert key(renamed_port("tidy"), inputs={"tidy": InputPart("b3:clean", "tidy")}) == key(step())


def test_content_code_and_parameter_values_are_in_the_key() -> None:
    others = {
        key(step()),
        key(step(), inputs={"clean": InputPart("b3:other", "clean")}),
        key(step(), code="b3:other"),
        key(step(), code=None),
        key(step(), values={"rate": 0.2}),
    }
    assert len(others) == 5


def test_the_identity_of_an_image_is_in_the_key_and_its_names_are_not() -> None:
    def with_image(
        s: StepSpec, identity: str, run: str = "sha256:r", label: str = "l", source: str | None = None
    ) -> str:
        return StaticParts(s).key(CODE, VALUES, INPUTS, ImagePart(identity, run, label, source))

    same = {
        with_image(step(environment={"image": "app:latest"}), "sha256:1"),
        with_image(step(environment={"image": "app:other"}), "sha256:1", "sha256:x", "app:other"),
        with_image(step(environment={"dockerfile": "FROM x"}), "sha256:1", source="b3:text"),
    }
    assert len(same) == 1
    assert with_image(step(environment={"image": "app:latest"}), "sha256:2") not in same
    assert with_image(step(environment={"image": "app:latest", "env": {"A": "1"}}), "sha256:1") not in same


def test_a_container_brings_its_own_python() -> None:
    found = parts(step(environment={"image": "a"}), image=ImagePart("sha256:1", "sha256:1", "a"))
    assert found["environment"] == {"image": "sha256:1"}
    assert "python" in parts()["environment"]


def test_the_key_and_the_version_of_what_was_written_before_containers_came_are_what_they_were() -> None:
    """Computed before: a key that changes makes everybody's steps run again."""
    plain = {
        "name": "train",
        "where": WHERE,
        "kind": "python",
        "arguments": [
            {"kind": "text", "text": "python"},
            {"kind": "text", "text": "train.py"},
            {"kind": "input", "port": "clean"},
            {"kind": "output", "port": "model"},
        ],
        "inputs": [{"name": "clean", "source": {"kind": "reference", "datastore": "lab", "path": "x"}}],
        "outputs": [{"name": "model", "file_name": "model"}],
        "resources": {"cpus": 2, "memory": 1024, "gpus": 1},
        "environment": {"python": "3.11", "env": {"A": "1"}},
    }
    before = "b3:f67d889f8251ed497dcf4459798a0b5a7b75bbe2eed7046a29464d61a88831c2"
    assert key(StepSpec.model_validate(plain)) == before
    pipeline = {"name": "p", "where": WHERE, "experiment": "p", "steps": [plain]}
    assert version_of(PipelineSpec.model_validate(pipeline)) == "c1755b37cf95"
    plain["resources"] = {"cpus": 2, "memory": 1024, "gpus": 1, "network": True}
    assert key(StepSpec.model_validate(plain)) == before
    assert version_of(PipelineSpec.model_validate(pipeline)) != "c1755b37cf95"


def test_a_parameter_counts_by_its_type_too() -> None:
    assert len({key(step(), values={"rate": v}) for v in (1, 1.0, True, "1", None)}) == 5


def test_which_input_is_which_counts() -> None:
    two = step(
        arguments=[{"kind": "input", "port": "a"}, {"kind": "input", "port": "b"}],
        inputs=[
            {"name": n, "source": {"kind": "upstream", "step": "s", "output": n}, "in_arguments": True} for n in "ab"
        ],
    )
    one, other = InputPart("b3:1", "x"), InputPart("b3:2", "x")
    assert key(two, inputs={"a": one, "b": other}) != key(two, inputs={"a": other, "b": one})
    assert key(two, inputs={"a": one, "b": other}) == key(two, inputs={"b": other, "a": one})


def parts(s: StepSpec | None = None, **given: Any) -> dict[str, Any]:
    values = {"code": CodePart("b3:code", "b3:raw", {"train.py": "1"}), "parameters": VALUES, "inputs": INPUTS} | given
    return StaticParts(s or step()).parts(values["code"], values["parameters"], values["inputs"], values.get("image"))


IN_IMAGE, IN_DOCKERFILE = (step(environment=e) for e in ({"image": "app:latest"}, {"dockerfile": "FROM app"}))


def imaged(digit: str, label: str = "app:latest", source: str | None = None) -> dict[str, Any]:
    image = ImagePart("sha256:" + digit * 64, "sha256:" + digit * 64, label, source)
    return parts(IN_DOCKERFILE if source else IN_IMAGE, image=image)


def entries(**files: str) -> dict[str, InputPart]:
    return {"clean": InputPart("b3:" + "".join(files.values()), "samples", files)}


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (parts(), parts(parameters={"rate": 0.2}), "parameter rate 0.1 -> 0.2"),
        (parts(), parts(code=CodePart("b3:2", "", {})), "code changed: train.py (+3 -1)"),
        (parts(), parts(code=None), "code changed: train.py (+3 -1)"),
        (parts(inputs=entries(a="1")), parts(inputs=entries(a="1", b="2")), "input samples changed: b is new"),
        (parts(inputs=entries(a="1")), parts(inputs=entries(a="2")), "input samples changed: a changed"),
        (
            parts(inputs=entries(a="1", z="9")),
            parts(inputs=entries(a="2", b="3", c="4")),
            "input samples changed: 2 files new, 1 changed, 1 gone",
        ),
        (
            parts(),
            parts(inputs={"clean": InputPart("b3:x", "clean", upstream="prepare")}),
            "input clean changed: `prepare` made something else",
        ),
        (parts(), parts(step(salt="2")), "version unset -> 2"),
        (parts(), parts(step(environment={"env": {"A": "1"}})), 'environment: env is new ({"A": "1"})'),
        (imaged("1"), imaged("2"), "environment: image app:latest is now sha256:222222222222"),
        (imaged("1"), imaged("2", "app:2"), "environment: image app:latest -> app:2"),
        (imaged("1", "", "b3:a"), imaged("2", "", "b3:b"), "environment: the Dockerfile changed"),
        (
            imaged("1", "", "b3:a"),
            imaged("2", "", "b3:a"),
            "environment: what the Dockerfile builds on is now sha256:222222222222",
        ),
        (imaged("1"), imaged("2", "", "b3:a"), "environment: image app:latest -> of a Dockerfile"),
        (
            parts(step(kind="command", arguments=[])),
            parts(
                step(kind="command", arguments=[], environment={"image": "a:1"}), image=ImagePart("sha256:1", "", "a:1")
            ),
            "environment: image a:1 is new: sha256:1",
        ),
        (
            parts(),
            parts(step(outputs=[])),
            "declared outputs changed: model is gone",
        ),
    ],
)
def test_a_change_is_told_in_a_sentence(old: dict[str, Any], new: dict[str, Any], sentence: str) -> None:
    assert keys.changes(old, new, "train.py (+3 -1)") == [sentence]


def test_equal_parts_have_no_changes_and_survive_json() -> None:
    import json

    assert keys.changes(json.loads(json.dumps(parts())), parts()) == []


def test_a_changed_command_names_the_arguments() -> None:
    shorter = [a.model_dump() for a in step().arguments][:-1]
    assert keys.changes(parts(), parts(step(arguments=shorter))) == ["command changed: -<output model>"]
