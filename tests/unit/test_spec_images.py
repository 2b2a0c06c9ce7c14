"""A step that names no image: which one it gets of its computes, and that there is no doubt about it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mlpiped.config.computes import images_of
from mlpiped.execution.needs import need_of
from mlpiped.keys import StaticParts
from mlpiped.placement.decide import Place, candidates
from mlpiped.resolve import Graph
from mlpiped.spec import PipelineSpec, StepSpec, version_of
from mlpiped.spec_check import faults_of
from mlpiped.spec_images import with_images

WHERE = {"file": "p.py", "line": 2}
KINDS = {"local": "local", "gpu1": "ssh", "cluster": "slurm", "box": "docker", "box2": "docker", "bare": "docker"}
POOLS = {"work": ("box", "box2"), "mixed": ("local", "box"), "plain": ("local", "bare"), "others": ("gpu1", "cluster")}
SAME = {"box": "python:3", "box2": "python:3"}
OTHER = {"box": "python:3", "box2": "python:4"}


def pipeline(compute: list[str], environment: dict[str, Any]) -> PipelineSpec:
    step = {
        "name": "train",
        "where": WHERE,
        "arguments": [{"kind": "text", "text": "python"}],
        "compute": compute,
        "environment": environment,
    }
    return PipelineSpec.model_validate({"name": "p", "where": WHERE, "experiment": "p", "steps": [step]})


def loaded(spec: PipelineSpec, images: dict[str, str], kinds: dict[str, str] = KINDS) -> StepSpec | str:
    """The step as it runs, or the sentence that says why it does not."""
    offers = images_of(kinds, POOLS, images)
    found = faults_of(spec, images=offers)
    return found[0].message if found else with_images(spec, offers).steps[0]


@pytest.mark.parametrize(
    ("compute", "images", "expected"),
    [
        (["box"], SAME, "python:3"),
        (["box"], {}, "step `train` has no image, and `box` runs containers only"),
        (["work"], SAME, "python:3"),
        (["box", "box2"], SAME, "python:3"),
        (["box", "bare"], SAME, "python:3"),
        (["work"], OTHER, "and `work` would run it in image `python:3` or in image `python:4`: it may make"),
        (["mixed"], SAME, "and `mixed` would run it outside of a container or in image `python:3`: it may make"),
        (["local", "box"], SAME, "and `local` and `box` would run it outside of a container or in image `python:3`"),
        (["mixed"], {}, None),
        (["plain"], SAME, None),
        (["others"], SAME, None),
        ([], SAME, None),
    ],
)
def test_a_step_without_an_image_gets_the_one_of_its_computes_or_a_sentence(
    compute: list[str], images: dict[str, str], expected: str | None
) -> None:
    found = loaded(pipeline(compute, {}), images)
    if isinstance(found, str):
        assert expected is not None and expected in found
    else:
        assert found.environment.image == expected


def test_where_all_computes_run_containers_a_step_that_names_none_gets_their_image() -> None:
    dockers = {"box": "docker", "box2": "docker"}
    one = loaded(pipeline([], {}), SAME, dockers)
    assert isinstance(one, StepSpec) and one.environment.image == "python:3"
    two = loaded(pipeline([], {}), OTHER, dockers)
    assert isinstance(two, str) and "the computes of the config would run it in image `python:3` or" in two


@pytest.mark.parametrize("own", [{"image": "app:1"}, {"dockerfile": "FROM app:1"}])
def test_an_image_of_its_own_stays(own: dict[str, Any]) -> None:
    spec = pipeline(["work"], own)
    assert with_images(spec, images_of(KINDS, POOLS, SAME)) is spec


@pytest.mark.parametrize("own", [{"requirements": "numpy"}, {"requirements": "numpy", "python": "3.11"}])
def test_a_step_that_brings_packages_is_put_into_no_image(own: dict[str, Any]) -> None:
    alone = loaded(pipeline(["box"], own), SAME)
    assert isinstance(alone, str) and "`box` runs containers only" in alone
    beside = loaded(pipeline(["mixed"], own), SAME)
    assert isinstance(beside, StepSpec) and beside.environment.image is None


def test_it_is_the_step_that_names_that_image_itself() -> None:
    env = {"env": {"A": "1"}}
    offers = images_of(KINDS, POOLS, SAME)
    given_one = with_images(pipeline(["work"], env), offers)
    names_it = pipeline(["work"], {**env, "image": "python:3"})
    assert given_one == names_it and version_of(given_one) == version_of(names_it)
    assert StaticParts(given_one.steps[0]).head == StaticParts(names_it.steps[0]).head
    assert StaticParts(given_one.steps[0]).head != StaticParts(pipeline(["work"], env).steps[0]).head


@given(
    computes=st.lists(st.sampled_from([*KINDS, *POOLS]), max_size=3, unique=True),
    images=st.dictionaries(st.sampled_from(["box", "box2", "bare"]), st.sampled_from(["python:3", "python:4"])),
    environment=st.sampled_from([{}, {}, {"image": "app:1"}, {"requirements": "numpy"}]),
)
def test_wherever_a_step_is_placed_it_runs_in_what_its_key_says(
    computes: list[str], images: dict[str, str], environment: dict[str, Any]
) -> None:
    spec = pipeline(computes, environment)
    found = loaded(spec, images)
    assume(not isinstance(found, str))
    assert isinstance(found, StepSpec)
    offers = images_of(KINDS, POOLS, images)
    need = need_of(Graph(with_images(spec, offers)), 0, 1, "")
    names = tuple(name for one in need.computes for name in POOLS.get(one, (one,)))
    places = [Place(name, 4, images=kind == "docker") for name, kind in KINDS.items()]
    able = [place for place in candidates(replace(need, computes=names), places) if place.could_ever(need)]
    assert able, "nobody can run what was found to be sound"
    for place in able:
        inside = KINDS[place.name] == "docker"
        assert inside == (found.environment.image is not None)
        if inside and not environment:
            assert images.get(place.name, found.environment.image) == found.environment.image
