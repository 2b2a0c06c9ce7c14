"""Whether a datastore is there: what a daemon knows of its mount, and the one after it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from mlpiped.errors import StorageAway
from mlpiped.files import roots
from mlpiped.files.mounts import Mount
from mlpiped.files.roots import Roots, passing

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A datastore that is a mount of its own while it has the file `mounted`."""
    root = tmp_path / "lab"
    root.mkdir()
    (root / "mounted").touch()

    def mount_of(path: bytes) -> Mount:
        return Mount(os.fsencode(root) if (root / "mounted").exists() else b"/", "nfs4")

    monkeypatch.setattr(roots, "mount_of", mount_of)
    return root


def unmount(root: Path) -> None:
    root.rename(root.with_name("elsewhere"))
    root.mkdir()


def back(root: Path) -> None:
    root.rmdir()
    root.with_name("elsewhere").rename(root)


def test_F3_a_datastore_that_lost_its_mount_is_away_until_it_is_back(place: Path) -> None:
    known = Roots()
    assert known.away(str(place)) is None
    unmount(place)
    for _ in range(2):
        assert known.away(str(place)) == f"the datastore `{place}` is not mounted: what was at `{place}` is gone"
    back(place)
    assert known.away(str(place)) is None


def test_F3_the_daemon_after_a_restart_knows_it_too_unless_there_are_files(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "mounts.json"
    assert Roots(file).away(str(place)) is None
    unmount(place)
    assert "is not mounted" in (Roots(file).away(str(place)) or "")
    (place / "a file").touch()
    assert Roots(file).away(str(place)) is None, "somebody has put the datastore on this disk"
    (place / "a file").unlink()
    assert Roots(file).away(str(place)) is None, "and it stays there"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}', '{"a": ["b"]}', "null"])
def test_a_file_that_nobody_can_read_is_none(place: Path, tmp_path: Path, text: str) -> None:
    file = tmp_path / "mounts.json"
    file.write_text(text)
    assert Roots(file).away(str(place)) is None


def test_a_folder_that_is_gone_or_a_file_is_no_datastore(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("gone", "file", "file/below"):
        said = Roots().away(str(tmp_path / name))
        assert said == f"the datastore's folder `{tmp_path / name}` is not there"


def test_a_link_that_leads_elsewhere_now_is_another_datastore_and_not_one_that_lost_its_mount(place: Path) -> None:
    link = place.with_name("link")
    link.symlink_to(place)
    known = Roots()
    assert known.away(str(link)) is None
    other = place.with_name("other")
    other.mkdir()
    (place / "mounted").unlink()
    link.unlink()
    link.symlink_to(other)
    assert known.away(str(link)) is None


def test_only_faults_that_pass_are_waited_for(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageAway, match="it cannot be kept: no space left on device: `x`"),
        passing("it cannot be kept"),
    ):
        raise OSError(28, "No space left on device", "x")
    with pytest.raises(PermissionError), passing("it cannot be kept"):
        raise PermissionError(13, "Permission denied")
