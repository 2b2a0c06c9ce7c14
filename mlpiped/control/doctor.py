"""What can be wrong with a daemon that seems to run, each with what to do about it. Looks, and changes nothing."""

from __future__ import annotations

import platform
import time
from typing import TYPE_CHECKING

import anyio

from mlpiped.control import doctor_host
from mlpiped.control.overview import faults_of
from mlpiped.control.service import Finding
from mlpiped.errors import LedgerError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from mlpiped.control.service import Service

CHECK_TIME = 20.0  # seconds: a folder on a dead server must not hang the doctor
LEDGER_TIME = 240.0  # seconds: a ledger of years is read whole
YEAR_2024 = 1_704_067_200_000_000  # microseconds


async def examine(service: Service) -> list[Finding]:
    """Every check, in a fixed order; one that cannot be made is a finding of its own."""
    checks: list[tuple[str, Callable[[Service], Awaitable[list[Finding]]]]] = [
        ("versions", _versions),
        ("ledger", _ledger),
        ("sqlite", _sqlite),
        ("disk", doctor_host.disk),
        ("state", doctor_host.state),
        ("socket", doctor_host.socket),
        ("plugins", _plugins),
        ("datastores", doctor_host.datastores),
        ("inotify", doctor_host.inotify),
        ("clock", _clock),
        ("tools", doctor_host.tools),
        ("compute", _compute),
        ("arrivals", _arrivals),
        ("runs", _runs),
        ("processes", _orphans),
    ]
    found: list[Finding] = []
    for name, check in checks:
        try:
            with anyio.fail_after(LEDGER_TIME if name == "ledger" else CHECK_TIME):
                found += await check(service)
        except TimeoutError:
            found.append(Finding(name, "fail", "gave no answer in time", "a file system may hang"))
        except Exception as error:
            hint = "ask again; if it stays so, what the daemon has logged says more"
            found.append(Finding(name, "fail", f"could not be looked at: {error}", hint))
    return found


async def _ledger(service: Service) -> list[Finding]:
    found = []
    if service.ledger.full:
        found.append(Finding("ledger", "fail", "its disk is full: nothing is dispatched", "free space on that disk"))
    if service.ledger.broken:
        found.append(Finding("ledger", "fail", service.ledger.broken.message, service.ledger.broken.hint))
    try:
        faults = [] if service.ledger_faults is None else await service.ledger_faults()
    except LedgerError as error:  # so damaged that not even the check goes through
        faults = [error.message]
    if faults:
        hint = "stop the daemon, keep a copy of the state folder, and bring back a backup with `mlpiped restore FILE`"
        found.append(Finding("ledger", "fail", f"is damaged: {faults[0]}", hint))
    return found or [Finding("ledger", "ok", "it is whole")]


async def _versions(service: Service) -> list[Finding]:
    async with service.ledger.survey() as survey:
        schema = await survey.schema()
    what = f"mlpiped {service.about.version}, ledger {schema}, Python {platform.python_version()}"
    return [Finding("versions", "ok", what)]


async def _sqlite(service: Service) -> list[Finding]:
    version = service.about.sqlite
    if not version:
        return []
    text = ".".join(map(str, version))
    if has_wal_reset_bug(version):
        hint = "install `pysqlite3` (x86_64), or an SQLite of 3.51.3 or later"
        return [Finding("sqlite", "warn", f"version {text} can damage a ledger under rare circumstances", hint)]
    return [Finding("sqlite", "ok", f"version {text}")]


def has_wal_reset_bug(version: tuple[int, ...]) -> bool:
    """3.7.0 to 3.51.2, mended in 3.51.3 and in the older lines 3.44 (from .6) and 3.50 (from .7)."""
    mended = (3, 44, 6) <= version < (3, 45) or (3, 50, 7) <= version < (3, 51)
    return (3, 7, 0) <= version < (3, 51, 3) and not mended


async def _plugins(service: Service) -> list[Finding]:
    faults = faults_of(service)
    found = [Finding("plugins", "fail", str(fault).split("\n")[0], fault.hint or "correct it") for fault in faults]
    missing = [folder for folder in service.about.plugins if not folder.is_dir()]
    found += [Finding("plugins", "warn", f"the folder `{f}` is not there", f"`mkdir {f}`") for f in missing]
    return found or [Finding("plugins", "ok", f"{len(list(service.registry.all()))} pipelines, none broken")]


async def _clock(service: Service) -> list[Finding]:
    now = service.clock.now()
    if now < YEAR_2024:
        hint = "set it, and turn on time synchronisation: `timedatectl set-ntp true`"
        return [Finding("clock", "fail", f"says {time.strftime('%Y-%m-%d', time.gmtime(now / 1e6))}", hint)]
    async with service.ledger.survey() as survey:
        last = await survey.newest_event()
    if last is not None and last > now + 60_000_000:
        hint = "was it set back? `timedatectl` shows whether it is synchronised; cron fires wait until it has caught up"
        return [Finding("clock", "warn", f"is {(last - now) / 60e6:.0f} min behind what happened last", hint)]
    return [Finding("clock", "ok", "is not behind the ledger")]


async def _runs(service: Service) -> list[Finding]:
    found = [Finding("runs", "warn", what, hint) for what, hint in service.actions.stuck()]
    return found or [Finding("runs", "ok", "none waits for a person")]


async def _orphans(service: Service) -> list[Finding]:
    """Steps that run and that nobody waits for: after a restored backup, or left by a step that has ended."""
    if service.orphans is None:
        return []
    found = [
        Finding(
            "processes",
            "warn",
            f"`{token}` still runs, though its attempt has ended or is not known: pid {', '.join(map(str, pids[:8]))}",
            f"see what it is, then `kill {' '.join(map(str, pids[:8]))}`",
        )
        for token, pids in sorted((await service.orphans()).items())
    ]
    return found or [Finding("processes", "ok", "none runs that nobody waits for")]


async def _compute(service: Service) -> list[Finding]:
    """Each compute by what it says now, not only by what it was seen to be last."""
    now = {} if service.healths is None else await service.healths()
    found = []
    for compute in service.actions.compute():
        name, kind = compute["name"], compute["kind"]
        trouble = now.get(name) or compute["health"]
        if trouble:
            found.append(Finding("compute", "fail", f"`{name}`: {trouble}", _helps(name, kind)))
        else:
            has = f"{compute['slots']} slots" + (f", {len(compute['cards'])} cards" if compute["cards"] else "")
            found.append(Finding("compute", "ok", f"`{name}` ({kind}): {has}{', drained' * compute['drained']}"))
        if compute["cards_trouble"]:
            hint = "run `nvidia-smi` there, as the user of the steps"
            found.append(Finding("compute", "warn", f"the cards of `{name}`: {compute['cards_trouble']}", hint))
    return found or [Finding("compute", "ok", "none")]


def _helps(name: str, kind: str) -> str:
    looks = {
        "docker": "`systemctl status docker` on this machine",
        "ssh": f"`mlpiped check`, and log in to `{name}`",
        "slurm": "`sinfo` on this machine, as the daemon's user",
    }
    return f"work for it waits, and goes on by itself; look: {looks.get(kind, '`mlpipectl compute`')}"


async def _arrivals(service: Service) -> list[Finding]:
    """Triggers that look at files the slow way, and why."""
    polled = [v for v in service.schedules() if v.kind == "arrival" and v.mode.startswith("poll")]
    return [Finding("arrivals", "ok", f"`{v.pipeline}` looks at `{v.describe}` by {v.mode}") for v in polled]
