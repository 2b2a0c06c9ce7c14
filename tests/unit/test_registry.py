"""The installed plugins: taken up when dropped, kept when broken, known again after a restart."""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path

import anyio
import pytest

from mlpiped.loader.load import Known
from mlpiped.loader.process import Limits
from mlpiped.loader.registry import Registry

pytestmark = pytest.mark.anyio

SECOND = 1.0  # the promise; the tests allow for a busy machine
PATIENCE = 8 * SECOND


@dataclass
class House:
    """A folder of plugins and a registry over it."""

    root: Path
    known: Known = field(default_factory=Known)
    limits: Limits = field(default_factory=lambda: Limits(memory=1 << 30))

    def __post_init__(self) -> None:
        self.plugins = self.root / "plugins"
        self.plugins.mkdir(exist_ok=True)
        self.changes = 0
        self._change = anyio.Event()
        self.registry = self.another()

    def another(self) -> Registry:
        self.registry = Registry(
            [self.plugins],
            self.root,
            lambda: self.known,
            lambda expression, zone: "bad" if expression == "bad" else None,
            self._changed,
            limits=self.limits,
        )
        return self.registry

    async def _changed(self) -> None:
        self.changes += 1
        self._change.set()
        self._change = anyio.Event()

    def write(self, name: str, text: str) -> Path:
        path = self.plugins / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name("." + path.name)
        temporary.write_text(textwrap.dedent(text))
        temporary.rename(path)
        return path

    def pipeline(self, file: str, name: str, command: str = "true", more: str = "") -> Path:
        return self.write(
            file,
            f"from mlpiped import *\n{more}\n{name} = Pipeline({name!r}, steps=[CommandStep([{command!r}])])\n",
        )

    def command(self, name: str) -> str | None:
        loaded = self.registry.get(name)
        return None if loaded is None else loaded.spec.steps[0].arguments[0].text  # type: ignore[union-attr]

    def names(self) -> list[str]:
        return [loaded.spec.name for loaded in self.registry.all()]

    def faults(self) -> list[str]:
        return [fault.message for broken in self.registry.broken() for fault in broken.faults]

    async def until(self, true: Callable[[], bool]) -> None:
        """Wait for changes until `true`."""
        with anyio.move_on_after(PATIENCE) as scope:
            while not true():
                await self._change.wait()
        assert not scope.cancelled_caught, (self.names(), self.faults())

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Registry]:
        await self.registry.start()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.registry.run)
            yield self.registry
            tasks.cancel_scope.cancel()


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


async def test_start_loads_what_lies_there_and_does_not_announce_it(house: House) -> None:
    path = house.pipeline("a.py", "a")
    house.write("helper.py", "x = 1\n")
    await house.registry.start()
    (loaded,) = house.registry.all()
    assert (loaded.spec.name, loaded.file, loaded.version) == ("a", str(path), loaded.version)
    assert loaded.owner
    assert loaded.loaded_at > 0
    assert house.registry.get("b") is None
    assert house.registry.broken() == []
    assert house.changes == 0


async def test_a_drop_a_change_and_a_removal_are_taken_up(house: House) -> None:
    async with house.running():
        path = house.pipeline("a.py", "a", "one")
        await house.until(lambda: house.command("a") == "one")
        first = house.registry.get("a")
        house.pipeline("a.py", "a", "two")
        await house.until(lambda: house.command("a") == "two")
        assert first and house.registry.get("a").version != first.version  # type: ignore[union-attr]
        path.unlink()
        await house.until(lambda: house.names() == [])


async def test_a_file_that_breaks_keeps_its_last_good_version(house: House) -> None:
    path = house.pipeline("a.py", "a", "one")
    async with house.running():
        good = house.registry.get("a")
        assert good
        path.write_text("x = 1\nboom\n")
        await house.until(lambda: house.registry.broken() != [])
        assert house.registry.get("a") == good
        (broken,) = house.registry.broken()
        assert broken.file == str(path)
        assert [(f.line, f.message) for f in broken.faults] == [(2, "NameError: name 'boom' is not defined")]
        assert broken.serving == {"a": good.version}
        assert broken.since >= good.loaded_at
        house.pipeline("a.py", "a", "two")
        await house.until(lambda: house.command("a") == "two" and house.registry.broken() == [])


async def test_the_last_good_version_survives_a_restart_and_nothing_unchanged_is_imported(house: House) -> None:
    for number in range(5):
        house.pipeline(f"p{number}.py", f"p{number}")
    path = house.pipeline("a.py", "a", "one")
    await house.registry.start()
    path.write_text("boom\n")
    await house.another().start()
    assert house.registry.imports == 1
    assert house.command("a") == "one"
    since = house.registry.broken()[0].since

    await house.another().start()
    assert house.registry.imports == 0
    assert house.command("a") == "one"
    assert house.names() == ["a", *(f"p{n}" for n in range(5))]
    assert house.faults() == ["NameError: name 'boom' is not defined"]
    assert house.registry.broken()[0].since == since


async def test_what_was_removed_while_the_daemon_was_down_is_gone_at_start(house: House) -> None:
    path = house.pipeline("a.py", "a")
    await house.registry.start()
    path.unlink()
    await house.another().start()
    assert house.names() == []


@pytest.mark.parametrize("spoil", ["garbage", "{}", '{"v":1,"identity":"x","plugins":{"/x.py":{}}}'])
async def test_a_cache_of_no_use_costs_only_the_imports(house: House, spoil: str) -> None:
    house.pipeline("a.py", "a")
    await house.registry.start()
    (house.root / "plugins.json").write_text(spoil)
    await house.another().start()
    assert (house.names(), house.registry.imports) == (["a"], 1)


async def test_another_version_of_mlpiped_imports_again_but_serves_the_old_meanwhile(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = house.pipeline("a.py", "a", "one")
    await house.registry.start()
    monkeypatch.setattr("mlpiped.loader.cache.identity", lambda: "other")
    path.write_text("boom\n")
    await house.another().start()
    assert (house.command("a"), house.registry.imports) == ("one", 1)


async def test_a_helper_that_changes_reloads_those_that_import_it(house: House) -> None:
    house.write("helper.py", "command = 'one'\n")
    text = "from mlpiped import *\nimport helper\na = Pipeline('a', [CommandStep([helper.command])])\n"
    house.write("a.py", text)
    house.pipeline("b.py", "b")
    async with house.running() as registry:
        imports = registry.imports
        house.write("helper.py", "command = 'two'\n")
        await house.until(lambda: house.command("a") == "two")
        assert registry.imports == imports + 2


async def test_a_helper_that_appears_heals_the_plugin_that_missed_it(house: House) -> None:
    house.write("a.py", "from mlpiped import *\nimport helper\na = Pipeline('a', [CommandStep([helper.command])])\n")
    async with house.running():
        assert house.faults() == ["no module named `helper`"]
        house.write("helper.py", "command = 'two'\n")
        await house.until(lambda: house.command("a") == "two" and house.faults() == [])


async def test_a_script_that_appears_heals_the_plugin_that_missed_it(house: House) -> None:
    house.write(
        "a.py", "from mlpiped import *\na = Pipeline('a', [PythonScriptStep('s.py', source_directory='src')])\n"
    )
    async with house.running():
        assert "no such folder" in house.faults()[0]
        house.write("src/s.py", "")
        await house.until(lambda: house.names() == ["a"] and house.faults() == [])


async def test_a_package_that_grows_in_the_folder_is_loaded(house: House) -> None:
    async with house.running():
        (house.plugins / "lab").mkdir()
        (house.plugins / "lab" / "__init__.py").write_text("from .graph import a\n")
        await house.until(lambda: house.faults() != [])
        house.pipeline("lab/graph.py", "a")
        await house.until(lambda: house.names() == ["a"] and house.faults() == [])
        shutil.rmtree(house.plugins / "lab")
        await house.until(lambda: house.names() == [])


async def test_G6_of_two_pipelines_of_one_name_the_first_stays(house: House) -> None:
    first = house.pipeline("z.py", "same", "first")
    async with house.running():
        second = house.pipeline("a.py", "same", "second", more="own = Pipeline('own', [CommandStep(['x'])])")
        await house.until(lambda: house.faults() != [])
        assert house.command("same") == "first"
        assert house.names() == ["own", "same"]
        (broken,) = house.registry.broken()
        assert broken.file == str(second)
        assert broken.faults[0].line == 3
        assert str(first) in broken.faults[0].message
        assert str(second) in broken.faults[0].message

        await house.another().start()
        assert house.command("same") == "first"

    async with house.running():
        first.unlink()
        await house.until(lambda: house.command("same") == "second" and house.faults() == [])


async def test_G6_at_a_cold_start_the_first_by_path_has_the_name(house: House) -> None:
    for name in "dbca":
        house.pipeline(f"{name}.py", "same", name)
    await house.registry.start()
    assert house.command("same") == "a"
    assert [Path(broken.file).name for broken in house.registry.broken()] == ["b.py", "c.py", "d.py"]


async def test_one_faulty_pipeline_of_a_file_does_not_hold_up_the_others(house: House) -> None:
    house.known = Known({"lab"}, set())
    text = """
        from mlpiped import *
        good = Pipeline("good", [CommandStep(["{0}"])])
        other = Pipeline("other", [CommandStep(["{0}", DataReference("{1}", "x")])])
        """
    house.write("a.py", text.format("one", "lab"))
    async with house.running():
        house.write("a.py", text.format("two", "lba"))
        await house.until(lambda: house.command("good") == "two")
        assert house.command("other") == "one"
        assert house.faults() == ["no datastore named `lba`"]


async def test_a_pipeline_that_is_no_longer_in_its_file_is_gone(house: House) -> None:
    house.pipeline("a.py", "a", more="b = Pipeline('b', [CommandStep(['x'])])")
    async with house.running():
        assert house.names() == ["a", "b"]
        house.pipeline("a.py", "a")
        await house.until(lambda: house.names() == ["a"])


async def test_reload_checks_against_the_names_of_the_new_config_without_an_import(house: House) -> None:
    house.known = Known(set(), set())
    house.write("a.py", "from mlpiped import *\na = Pipeline('a', [CommandStep(['x', DataReference('lab', 'x')])])\n")
    await house.registry.start()
    assert house.faults() == ["no datastore named `lab`"]
    house.known = Known({"lab"}, set())
    await house.registry.reload()
    assert (house.names(), house.faults(), house.registry.imports) == (["a"], [], 1)
    await house.registry.reload(force=True)
    assert house.registry.imports == 2


async def test_G4_what_editors_leave_about_is_ignored(house: House) -> None:
    for name in (".a.py.swp", "a.py~", ".hidden.py", "#a.py#", "notes.txt", "__pycache__/a.py"):
        path = house.plugins / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("boom\n")
    (house.plugins / "source").mkdir()
    (house.plugins / "source" / "train.py").write_text("boom\n")
    await house.registry.start()
    assert (house.registry.imports, house.faults()) == (0, [])


async def test_a_folder_that_goes_away_keeps_its_pipelines_and_is_followed_when_it_returns(house: House) -> None:
    house.pipeline("a.py", "a", "one")
    async with house.running():
        away = house.plugins.rename(house.root / "away")
        await house.until(lambda: house.faults() == ["the plugins folder does not exist"])
        assert house.names() == ["a"]
        away.rename(house.plugins)
        await house.until(lambda: house.faults() == [])
        house.pipeline("a.py", "a", "two")
        await house.until(lambda: house.command("a") == "two")

        shutil.rmtree(house.plugins)
        await house.until(lambda: house.faults() == ["the plugins folder does not exist"])
        house.plugins.mkdir()
        await house.until(lambda: house.names() == [])
        house.pipeline("b.py", "b")
        await house.until(lambda: house.names() == ["b"])


async def test_a_file_name_that_kills_the_watcher_does_not_make_the_registry_deaf(house: House) -> None:
    async with house.running():
        bad = os.fsencode(house.plugins) + b"/caf\xe9.py"
        with open(bad, "w") as file:
            file.write("x = 1\n")
        await house.until(lambda: "its name is not UTF-8" in house.faults())
        house.pipeline("a.py", "a")
        await house.until(lambda: house.names() == ["a"])
        house.registry.broken()[0].file.encode()
        os.unlink(bad)
        await house.until(lambda: house.faults() == [])


async def test_a_refused_file_is_taken_up_once_its_mode_is_right(house: House) -> None:
    path = house.pipeline("a.py", "a")
    path.chmod(0o666)
    async with house.running():
        assert house.faults() == ["everybody may write it: mode 0666"]
        path.chmod(0o644)
        await house.until(lambda: house.names() == ["a"] and house.faults() == [])


async def test_a_hanging_plugin_does_not_hold_up_the_others(house: House) -> None:
    house.limits = Limits(deadline=2, memory=1 << 30)
    house.another()
    async with house.running():
        house.write("hang.py", "while True: pass\n")
        house.pipeline("a.py", "a")
        with anyio.fail_after(1.9):
            await house.until(lambda: house.names() == ["a"])
        await house.until(lambda: house.faults() == ["still loading after 2 s"])


async def test_G4_a_save_loop_is_never_half_loaded_and_ends_with_the_last_text(house: House) -> None:
    async with house.running():
        for number in range(60):
            path = house.plugins / "a.py"
            with path.open("w") as file:
                file.write("from mlpiped import *\n")
                file.flush()
                await anyio.sleep(0.01)  # the pace of the saves
                file.write(f"a = Pipeline('a', [CommandStep(['{number}'])])\n")
        await house.until(lambda: house.command("a") == "59" and house.faults() == [])


async def test_G4_a_file_saved_a_hundred_times_a_second_beside_editors_drafts_is_never_taken_by_half(
    house: House,
) -> None:
    """What is loaded is at any moment one of the texts that were saved, whole: its two steps are of one save."""
    file = "from mlpiped import *\nfirst = CommandStep(['{0}'], name='first')\n"
    rest = "a = Pipeline('a', [first, CommandStep(['{0}'], name='second')])\n"
    path, seen = house.plugins / "a.py", set()

    def look() -> None:
        loaded = house.registry.get("a")
        assert loaded is not None, "its last good version stays"
        said = {arg.text for each in loaded.spec.steps for arg in each.arguments}  # type: ignore[union-attr]
        assert len(said) == 1, said
        seen.update(said)

    path.write_text((file + rest).format(0))
    async with house.running():
        for number in range(1, 100):
            with path.open("w") as out:
                out.write(file.format(number))
                out.flush()
                (house.plugins / f".a.py.swp{number % 3}").write_text("half")
                (house.plugins / "a.py~").write_text("raise SystemExit")
                await anyio.sleep(0.005)  # the pace of the saves
                out.write(rest.format(number))
            await anyio.sleep(0.005)
            look()
        await house.until(lambda: house.command("a") == "99" and house.faults() == [])
        look()


@pytest.mark.parametrize("order", list(permutations("abc")), ids="".join)
async def test_G6_who_holds_a_name_depends_on_who_came_first_and_at_a_cold_start_on_the_path_alone(
    house: House, order: tuple[str, ...]
) -> None:
    async with house.running():
        for number, name in enumerate(order):
            house.pipeline(f"{name}.py", "same", name)
            await house.until(lambda: len(house.names()) + len(house.faults()) == number + 1)  # noqa: B023
            assert house.command("same") == order[0]
        first = str(house.plugins / f"{order[0]}.py")
        assert sorted(Path(broken.file).stem for broken in house.registry.broken()) == sorted(order[1:])
        assert all(first in message for message in house.faults())
    (house.root / "plugins.json").unlink()  # a machine on which nobody came first
    await house.another().start()
    assert house.command("same") == "a"


async def test_a_plugin_that_rewrites_itself_is_not_imported_without_end(house: House) -> None:
    house.write("a.py", "open(__file__, 'a').write('#\\n')\n")
    async with house.running() as registry:
        assert house.faults() == ["changes all the time while it is loaded"]
        seen = registry.imports
        house.pipeline("b.py", "b")
        await house.until(lambda: house.names() == ["b"])
        assert registry.imports <= seen + 3


async def test_a_stop_is_quick(house: House) -> None:
    with anyio.fail_after(2):
        async with house.running():
            house.pipeline("a.py", "a")
            await house.until(lambda: house.names() == ["a"])
