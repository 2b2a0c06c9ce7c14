"""G8: a step that ends with 0 and has not made what it promised, each way there is, in a real run."""

from __future__ import annotations

import os

import pytest
from harness import Daemon, step, steps

# Name -> (kind of output, what the step does with its path in $O, a part of the sentence).
KINDS = {
    "missing": ("file", "true", "is missing"),
    "symlink": ("file", "ln -s /etc/passwd $O", "is a symbolic link"),
    "dangling": ("file", "ln -s nowhere $O", "is a symbolic link"),
    "hardlink": ("file", "echo x > $O.other; ln $O.other $O", "hard link"),
    "device": ("file", "mknod $O c 1 3", "is neither"),
    "fifo": ("file", "mkfifo $O", "is neither"),
    "folder": ("file", "mkdir $O", "is a folder"),
    "setuid": ("file", "echo x > $O; chmod u+s $O", "set-user-id"),
    "emptyfolder": ("folder", "mkdir -p $O", "is an empty folder"),
    "leads": ("folder", "mkdir -p $O; ln -s /etc/passwd $O/passwd", "leads outside"),
    "deviceinside": ("folder", "mkdir -p $O; mknod $O/null c 1 3", "is neither"),
}


@pytest.fixture
def own():  # type: ignore[no-untyped-def]
    with Daemon(slots=4) as daemon:
        yield daemon


def test_G8_a_step_without_its_output_has_failed_whatever_lies_there_and_nothing_of_it_is_kept(own: Daemon) -> None:
    kinds = {name: kind for name, kind in KINDS.items() if os.geteuid() == 0 or "mknod" not in kind[1]}
    lines = [
        f"out = PipelineData({name!r}, kind={kind!r})\n"
        f"made.append(CommandStep(['sh', '-c', 'O=$0; ' + {act!r}, out], name={name!r}, outputs=[out]))\n"
        f"made.append(CommandStep(['cat', out], name={'after-' + name!r}))\n"
        for name, (kind, act, _) in kinds.items()
    ]
    own.install("bad", "made = []\n" + "".join(lines) + "pipeline = Pipeline('bad', steps=made)\n")
    for turn in range(2):  # the second time nothing of the first is reused
        run = own.go("bad")
        assert run["outcome"] == "failed"
        for name, (_, _, sentence) in kinds.items():
            found = step(run, name)
            assert (found["outcome"], found["attempts"]) == ("failed", 1), found
            assert sentence in found["why"], found["why"]
        assert {steps(run)[f"after-{name}"] for name in kinds} == {"skipped"}, turn
    assert [path for path in (own.state / "artifacts").rglob("*") if not path.is_dir()] == []
