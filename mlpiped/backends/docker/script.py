"""What a container executes: a script for the image's /bin/sh, which starts the step and bears witness. Pure text.

It lies in the job's folder, readable by the step's user alone, and empties itself before the step starts: it may hold
secrets, and `docker inspect` shows none of them so. It needs nothing of the image but a POSIX shell; without `sleep`
the daemon alone enforces the timeout.

The shell stays as the step's parent: what it leaves in `ended` says that the step ended by itself, and how. SIGTERM
cannot end it, so a container that ended without a word was ended from outside.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, NamedTuple

from mlpiped.errors import InvalidJob

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SHELL = "/bin/sh"
START, ENDED, TIMED_OUT = "start.sh", "ended", "timed-out"  # in the job's folder
ENDED_SIZE = 128  # bytes that `ended` has from the first: a full disk must not silence the witness
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

TEXT = r"""{
mlpiped=@FOLDER@
: >"$mlpiped/start.sh"
cd "$mlpiped/work" && exec </dev/null >>"$mlpiped/stdout" 2>>"$mlpiped/stderr" || exit 125
trap : TERM HUP INT
@ENVIRONMENT@
@TIMEOUT@
set -- @COMMAND@
mlpiped_fault() (
    case $1 in */*) [ -e "$1" ] || exit 127; [ -f "$1" ] && [ -x "$1" ] || exit 126; exit 0 ;; esac
    set -f; IFS=:
    for mlpiped_place in $PATH; do
        mlpiped_place=${mlpiped_place:-.}/$1
        [ -f "$mlpiped_place" ] && [ -x "$mlpiped_place" ] && exit 0
    done
    exit 127
)
mlpiped_fault "$1"
mlpiped_code=$?
mlpiped_word=fault
if [ "$mlpiped_code" = 0 ]; then
    (exec "$@")
    mlpiped_code=$?
    mlpiped_word=ended
fi
mlpiped_cpu=-; mlpiped_memory=-; mlpiped_kills=-
cd /sys/fs/cgroup 2>/dev/null
[ -r memory.peak ] && read -r mlpiped_memory <memory.peak
[ -r memory/memory.max_usage_in_bytes ] && read -r mlpiped_memory <memory/memory.max_usage_in_bytes
[ -r cpu.stat ] && while read -r mlpiped_key mlpiped_value; do
    [ "$mlpiped_key" = usage_usec ] && mlpiped_cpu=${mlpiped_value}000
done <cpu.stat
[ -r cpuacct/cpuacct.usage ] && read -r mlpiped_cpu <cpuacct/cpuacct.usage
for mlpiped_file in memory.events memory/memory.oom_control; do
    [ -r "$mlpiped_file" ] && while read -r mlpiped_key mlpiped_value; do
        [ "$mlpiped_key" = oom_kill ] && mlpiped_kills=$mlpiped_value
    done <"$mlpiped_file"
done
echo "$mlpiped_word $mlpiped_code $mlpiped_cpu $mlpiped_memory $mlpiped_kills ." 1<>"$mlpiped/ended"
exit "$mlpiped_code"
}
"""
# An orphan, so that the step has no child that it did not start. What it kills leaves only the container's init.
WATCH = r"""command -v sleep >/dev/null && ( (
    trap '' TERM HUP INT; exec >/dev/null 2>&1
    sleep @SECONDS@ && : >"$mlpiped/timed-out" && @KILL@
) & )"""
KILL = "kill -s TERM -- -1; sleep @GRACE@ && kill -s KILL -- -1"


class Ended(NamedTuple):
    """What the script left: `fault` says that the command could not be started (127: not found, 126: no program)."""

    fault: bool
    code: int
    cpu: float | None  # seconds, of the whole container
    memory: int | None  # bytes: its peak, with the page cache that counts to it
    kills: int  # by the kernel, for want of memory


def write(folder: str, argv: Sequence[str], env: Mapping[str, str], timeout: float | None, grace: float) -> bytes:
    """The script. Values of PATH and PYTHONPATH that end in a colon go before the image's own. Raises InvalidJob."""
    lines = []
    for name, value in env.items():
        if not NAME.fullmatch(name):
            raise InvalidJob(f"a container's shell knows no environment variable of this name: `{name[:100]}`")
        more = f'"${{{name}-}}"' if name in ("PATH", "PYTHONPATH") and value.endswith(":") else ""
        lines.append(f"export {name}={_quoted(value)}{more}")
    watch = ""
    if timeout is not None:
        watch = WATCH.replace("@SECONDS@", f"{timeout:.3f}".rstrip("0").rstrip(".")).replace("@KILL@", kill(grace))
    text = TEXT.replace("@TIMEOUT@", watch).replace("@FOLDER@", _quoted(folder))
    head, _, tail = text.partition("@ENVIRONMENT@")
    before, _, after = tail.partition("@COMMAND@")
    whole = head + "\n".join(lines) + before + " ".join(map(_quoted, argv)) + after
    return os.fsencode(whole)


def kill(grace: float) -> str:
    """SIGTERM to all in the container but the shell and its init, SIGKILL after the grace."""
    return KILL.replace("@GRACE@", f"{grace:.3f}".rstrip("0").rstrip("."))


def read(text: bytes) -> Ended | None:
    """What the script said at its end; None: not a word, or not the whole of it."""
    words = text.split(b"\n")[0].split()
    if len(words) != 6 or words[0] not in (b"ended", b"fault") or words[5] != b"." or not words[1].isdigit():
        return None
    cpu, memory, kills = (int(word) if word.isdigit() else None for word in words[2:5])
    return Ended(words[0] == b"fault", int(words[1]), None if cpu is None else cpu / 1e9, memory, kills or 0)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
