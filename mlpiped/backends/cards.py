"""The GPUs of one machine: which there are, who sits on them, and the leases that all daemons on it share.

`SCRIPT` does it on any machine that has `sh` and coreutils: `sh -c SCRIPT cards <arguments>`, the same here, in a
container's host and at the far end of ssh. Everything else is pure.

A lease is a symbolic link FOLDER/<boot id>/<card's UUID> whose target text is
"<instance> <token or `shared`> <user> <seconds since the epoch>": making one is atomic, so one daemon wins, and any
user can read it. The folders are 1777: nobody else's lease can be removed. A reboot ends all leases.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from mlpiped.backends.base import Card

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

FOLDER = "/tmp/mlpiped-gpus"
SHARED = "shared"
ANSWER = 20  # seconds for nvidia-smi: a driver that hangs is real
NOT_TOLD = ("[N/A]", "N/A", "[Not Supported]", "[Insufficient Permissions]")  # in the place of a number: no fault
HELD = 3  # exit status of `take`: somebody else has one of the cards

SCRIPT = r"""
# cards look FOLDER INSTANCE | take FOLDER INSTANCE TOKEN UUID... | give FOLDER INSTANCE TOKEN UUID...
# | keep FOLDER INSTANCE UUID=TOKEN...
set -u
LC_ALL=C; export LC_ALL
verb=$1 folder=$2 instance=$3; shift 3
read -r boot </proc/sys/kernel/random/boot_id
here=$folder/$boot

smi() { timeout -k 2 ANSWER nvidia-smi "$@" 2>&1 </dev/null; }

each() { while IFS= read -r line; do printf '%s %s\n' "$1" "$line"; done; }

token_of() { # the MLPIPED_TOKEN of process $1, or of the nearest one above it that has one, or works in its folder
    above=$1 found=
    while [ "$above" -gt 1 ]; do
        found=$(2>/dev/null tr '\0' '\n' <"/proc/$above/environ" | while IFS= read -r line; do
            case $line in MLPIPED_TOKEN=*) printf '%s' "${line#MLPIPED_TOKEN=}"; break ;; esac
        done)
        if [ -z "$found" ]; then # who gives himself another title writes it over his environment
            found=$(2>/dev/null readlink "/proc/$above/cwd")
            case $found in */mlp-[0-9]*) found=mlp-${found##*/mlp-}; found=${found%%/*} ;; *) found= ;; esac
        fi
        case $found in '' | *[!A-Za-z0-9_.-]*) found= ;; *) break ;; esac
        stat=$(2>/dev/null cat "/proc/$above/stat") || break
        stat=${stat##*") "}; stat=${stat#* }; above=${stat%% *}
    done
    printf '%s' "${found:--}"
}

look() {
    printf 'uid %s\n' "$(id -u)"
    if command -v nvidia-smi >/dev/null 2>&1; then
        said=$(smi --query-gpu=uuid,index,name,memory.total --format=csv,noheader,nounits); status=$?
        printf '%s\n' "$said" | each card
        printf 'cards %s\n' "$status"
        smi -L | each list
        said=$(smi --query-compute-apps=gpu_uuid,pid,process_name,used_memory --format=csv,noheader,nounits); status=$?
        printf '%s\n' "$said" | while IFS= read -r line; do
            pid=${line#*, }; pid=${pid%%,*}
            case $pid in '' | *[!0-9]*) pid=0 ;; esac
            printf 'app %s %s\n' "$(token_of "$pid")" "$line"
        done
        printf 'apps %s\n' "$status"
    fi
    for link in "$here"/*; do
        [ -L "$link" ] || continue
        text=$(readlink "$link")
        case ${link##*/}$text in *[!A-Za-z0-9\ _.@:+-]*) continue ;; esac
        printf 'lease %s %s %s\n' "${link##*/}" "$(stat -c %u "$link")" "$text"
    done
}

prepare() {
    for each in "$folder" "$here"; do
        [ -d "$each" ] || mkdir -m 1777 "$each" 2>/dev/null
        if [ ! -d "$each" ] || [ -L "$each" ] || [ ! -k "$each" ]; then
            printf 'no folder for the leases of cards: %s\n' "$each" >&2
            exit 1
        fi
    done
}

ours() { # whether the lease of card $1 is this instance's; its target text -> $text
    text=$(readlink "$here/$1") || return 1
    case $text in "$instance "*) [ "$(stat -c %u "$here/$1")" = "$(id -u)" ] ;; *) return 1 ;; esac
}

lease() { # token $1, card $2; 0: it is leased to this instance for this token
    new="$instance $1 $user $(date +%s)"
    for try in 1 2 3; do
        ln -sT -- "$new" "$here/$2" 2>/dev/null && return 0
        if ours "$2"; then
            case $text in "$instance $1 "*) return 0 ;; esac
            rm -f -- "$here/$2" # left by a step of ours that has ended
        elif [ -n "$text" ] || [ -e "$here/$2" ]; then
            return 1
        fi
    done
    return 1
}

take() {
    token=$1; shift
    prepare
    before=
    for card in "$@"; do
        ours "$card" && case $text in "$instance $token "*) continue ;; esac
        if lease "$token" "$card"; then
            before="$before $card"
            continue
        fi
        printf 'held %s %s\n' "$card" "$text"
        for card in $before; do rm -f -- "$here/$card"; done
        exit 3
    done
}

give() {
    token=$1; shift
    for card in "$@"; do
        ours "$card" && case $text in "$instance $token "*) rm -f -- "$here/$card" ;; esac
    done
    return 0
}

keep() {
    for link in "$here"/*; do
        [ -L "$link" ] && ours "${link##*/}" || continue
        rest=${text#* }
        case " $* " in *" ${link##*/}=${rest%% *} "*) ;; *) rm -f -- "$link" ;; esac
    done
    [ $# -eq 0 ] || prepare
    for each in "$@"; do
        lease "${each#*=}" "${each%%=*}" || printf 'held %s %s\n' "${each%%=*}" "$text"
    done
}

user=$(id -un 2>/dev/null) || user=$(id -u)
case $user in *[!A-Za-z0-9_.@-]*) user=$(id -u) ;; esac
text=
"$verb" "$@"
""".replace("ANSWER", str(ANSWER))

_UUID = re.compile(r"(?:GPU|MIG)-[0-9A-Za-z-]{8,80}")
_ON_MIG = re.compile(r"\s+MIG (\S+)\s+Device\s+(\d+): \(UUID: (\S+)\)")


@dataclass(frozen=True, slots=True)
class Lease:
    uuid: str
    instance: str
    token: str  # or SHARED
    user: str
    since: float  # seconds since the epoch
    uid: int  # who made it


@dataclass(frozen=True, slots=True)
class Process:
    """A process on a card. `token`: that of its step, by itself or by one above it; None: none that we may read."""

    uuid: str
    pid: int  # 0: not told
    name: str
    token: str | None


@dataclass(frozen=True, slots=True)
class Look:
    """What one look at a machine found. `trouble`: why its cards cannot be used, in a sentence."""

    found: tuple[Card, ...] = ()
    whole: tuple[tuple[str, str], ...] = ()  # (slice, the card that it is a part of), by UUID
    processes: tuple[Process, ...] = ()
    leases: tuple[Lease, ...] = ()
    uid: int = -1
    trouble: str | None = None

    def cards(self, instance: str, pids: Collection[int] = ()) -> tuple[Card, ...]:
        """The cards as `instance` may see them: `foreign` where a process or a lease of somebody else is on one.

        `pids` are known to be ours in another way, as a container's are.
        """
        leases = {lease.uuid: lease for lease in self.leases}
        parents = dict(self.whole)
        ours = {u: lease for u, lease in leases.items() if (lease.instance, lease.uid) == (instance, self.uid)}
        seen = []
        for card in self.found:
            foreign = card.foreign
            if foreign is None and card.uuid in leases and card.uuid not in ours:
                foreign = _leased(leases[card.uuid])
            strangers = [
                process
                for process in self.processes
                if process.uuid in (card.uuid, parents.get(card.uuid))
                and process.pid not in pids
                and not _is_ours(process, ours, parents)
            ]
            if foreign is None and strangers:
                foreign = _in_use(strangers)
            seen.append(Card(card.uuid, card.index, card.name, card.memory, foreign))
        return tuple(seen)


def arguments(verb: str, instance: str, *words: str, folder: str = FOLDER) -> list[str]:
    """What follows `sh -c SCRIPT` (or `sh -s` that reads SCRIPT): `look`, `take`, `give` or `keep`."""
    return ["cards", verb, folder, instance, *words]


def take(instance: str, token: str, uuids: Sequence[str], *, folder: str = FOLDER) -> list[str]:
    """Arguments that lease all of `uuids` or none; `token` is SHARED for a card that several steps of ours share.

    Exit status 0: leased, also when they were already. HELD: `holder(stdout)` says by whom. Else stderr says why not.
    """
    return arguments("take", instance, token, *sorted(uuids), folder=folder)


def give(instance: str, token: str, uuids: Sequence[str], *, folder: str = FOLDER) -> list[str]:
    """Arguments that give back those of `uuids` that are leased to this token; a shared one with its last step."""
    return arguments("give", instance, token, *sorted(uuids), folder=folder)


def keep(instance: str, leased: Mapping[str, str], *, folder: str = FOLDER) -> list[str]:
    """Arguments that set right the instance's own leases: exactly `leased` (UUID -> token or SHARED), once done.

    Stdout has a line for each that somebody else has taken meanwhile.
    """
    return arguments("keep", instance, *(f"{uuid}={token}" for uuid, token in sorted(leased.items())), folder=folder)


def holder(said: str) -> str | None:
    """Who has the card that `take` could not lease: "card GPU-… is leased by the mlpiped of bob since 10:12"."""
    for line in said.splitlines():
        if line.startswith("held "):
            uuid, _, text = line.removeprefix("held ").partition(" ")
            lease = _lease(f"{uuid} -1 {text}")
            return f"card {uuid} is {_leased(lease) if lease else 'leased by somebody else'}"
    return None


def look(said: str) -> Look:
    """What the script's `look` printed. Lines that mean nothing are passed over: others' process names are in them."""
    lines: dict[str, list[str]] = {}
    for line in said.split("\n"):
        word, _, rest = line.partition(" ")
        lines.setdefault(word, []).append(rest)
    found = [card for line in lines.get("card", ()) if (card := parse_card(line)) is not None]
    trouble = _trouble(lines, "cards", "card") or _trouble(lines, "apps", "app")
    cards, whole = _with_slices(found, lines.get("list", ()))
    return Look(
        cards,
        whole,
        tuple(process for line in lines.get("app", ()) if (process := parse_process(line)) is not None),
        tuple(lease for line in lines.get("lease", ()) if (lease := _lease(line)) is not None),
        int(lines.get("uid", ["-1"])[0] or -1),
        trouble,
    )


def parse_card(line: str) -> Card | None:
    """A line of `--query-gpu=uuid,index,name,memory.total`: MiB without a unit. Memory that is not told is 0; an error
    in its place means that the card does not answer."""
    head, _, memory = line.rpartition(", ")
    parts = head.split(", ", 2)
    if len(parts) != 3 or not _UUID.fullmatch(parts[0]) or not parts[1].isdecimal():
        return None
    mebibytes = memory.strip().removesuffix(" MiB")
    if mebibytes.isdecimal():
        return Card(parts[0], int(parts[1]), _shown(parts[2]), int(mebibytes) << 20)
    ill = None if mebibytes in NOT_TOLD else f"ill, says its driver: {_shown(mebibytes.strip('[]'))}"
    return Card(parts[0], int(parts[1]), _shown(parts[2]), 0, ill)


def parse_process(line: str) -> Process | None:
    """`<token or -> ` and a line of `--query-compute-apps=gpu_uuid,pid,process_name,used_memory`."""
    token, _, line = line.partition(" ")
    uuid, _, rest = line.partition(", ")
    if not _UUID.fullmatch(uuid):
        return None
    pid, _, rest = rest.partition(", ")
    name = rest.rpartition(", ")[0].rsplit("/", 1)[-1]
    if not name or name.startswith("["):  # [Not Found], [Insufficient Permissions], [N/A]
        name = "a process"
    return Process(uuid, int(pid) if pid.isdecimal() else 0, _shown(name), None if token == "-" else token)


def _with_slices(cards: Sequence[Card], listed: Sequence[str]) -> tuple[tuple[Card, ...], tuple[tuple[str, str], ...]]:
    """A card that MIG has cut up is replaced by its slices, from `nvidia-smi -L`; of their memory nothing is known."""
    slices: dict[str, list[Card]] = {}
    parent: Card | None = None
    for line in listed:
        if line.startswith("GPU "):
            parent = next((card for card in cards if f"(UUID: {card.uuid})" in line), None)
        elif parent is not None and (on := _ON_MIG.fullmatch(line)) is not None and _UUID.fullmatch(on[3]):
            name = f"{parent.name} MIG {_shown(on[1])} device {on[2]}"
            slices.setdefault(parent.uuid, []).append(Card(on[3], parent.index, name, 0))
    whole = tuple((each.uuid, uuid) for uuid, parts in slices.items() for each in parts)
    return tuple(each for card in cards for each in slices.get(card.uuid, (card,))), whole


def _trouble(lines: Mapping[str, Sequence[str]], status: str, words: str) -> str | None:
    code = next(iter(lines.get(status, ())), "0")
    if code == "0":
        return None
    if code in ("124", "137"):
        return f"nvidia-smi has not answered in {ANSWER} s"
    said = [line.strip().removeprefix("- ") for line in lines.get(words, ()) if line.strip()]
    said = [line for line in said if not _UUID.match(line)]  # of the cards that are well
    first = _shown(said[0] if said else f"exit status {code}", 200)
    return None if first.startswith("No devices were found") else f"nvidia-smi: {first}"


def _lease(line: str) -> Lease | None:
    parts = line.split(" ")
    if len(parts) != 6 or not parts[1].lstrip("-").isdecimal() or not re.fullmatch(r"\d{1,11}", parts[5]):
        return None
    uuid, uid, instance, token, user, since = parts
    return Lease(uuid, instance, token, user, float(since), int(uid))


def _is_ours(process: Process, ours: Mapping[str, Lease], parents: Mapping[str, str]) -> bool:
    """Its token is the one to which the card is leased; on a shared card, any."""
    for uuid, lease in ours.items():
        if process.uuid in (uuid, parents.get(uuid)) and process.token is not None:
            if lease.token in (SHARED, process.token):
                return True
    return False


def _leased(lease: Lease) -> str:
    moment = datetime.fromtimestamp(lease.since)
    form = "%H:%M" if moment.date() == datetime.now().date() else "%Y-%m-%d %H:%M"
    return f"leased by the mlpiped of {lease.user} since {moment.strftime(form)}"


def _in_use(strangers: Sequence[Process]) -> str:
    first, more = strangers[0], len(strangers) - 1
    pid = f" (pid {first.pid})" if first.pid else ""
    return f"in use by {first.name}{pid}{f' and {more} more' if more else ''}, not ours"


def _shown(text: str, longest: int = 60) -> str:
    """Somebody else's words, fit for a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text.strip())[:longest]
