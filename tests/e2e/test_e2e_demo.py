"""The demo: what it promises is checked by the demo itself; here that it ends well, and what it says when it cannot."""

from __future__ import annotations

import os
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from harness import BIN

from mlpiped.cli import demo, demo_scene
from mlpiped.protocol import SOCKET_PATH_LIMIT


@pytest.mark.slow
@pytest.mark.skipif(
    not all(find_spec(name) for name in demo.NEEDS), reason="the extra [demo] is not installed: make test installs it"
)
def test_the_demo_holds_and_leaves_nothing_but_its_output(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    done = subprocess.run(
        [BIN / "mlpiped", "demo", "--out", tmp_path / "out"],
        env={**os.environ, "TMPDIR": str(scratch)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {demo.PICTURE, demo.MODEL, demo.REPORT}
    assert (tmp_path / "out" / demo.PICTURE).read_bytes().startswith(b"\x89PNG")
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("deep", [False, True])
def test_its_scratch_folder_has_room_for_a_socket_however_long_the_path_for_temporary_files_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deep: bool
) -> None:
    place = tmp_path / ("x" * 100) if deep else Path("/tmp").resolve()
    place.mkdir(exist_ok=True)
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    folder = demo_scene.scratch_folder()
    folder.rmdir()
    assert len(bytes(folder / "run" / "socket")) <= SOCKET_PATH_LIMIT
    assert folder.parent == Path("/tmp").resolve()


def test_without_its_libraries_the_demo_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "NEEDS", {"no_such_library": "no-such-library"})
    with tempfile.TemporaryDirectory() as folder:
        assert demo.main(["--out", folder]) == 1
    said = capsys.readouterr().err
    assert "no-such-library" in said
    assert "mlpiped[demo]" in said
