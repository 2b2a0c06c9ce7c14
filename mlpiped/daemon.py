"""The composition root: builds every room, starts the one root task group, and stops in a written order.

Start   ledger (and the lock on the state folder) -> rooms -> plugins -> unfinished runs go on -> triggers are known
        -> control socket -> triggers fire -> READY
Stop    1. no new work: triggers and plugins stop
        2. streams are told, the control socket closes
        3. on_stop = "cancel": runs are cancelled; else they are let go
        4. backends let go: steps run on, and are found again at the next start
        5. the ledger writes what is queued, and closes
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from contextlib import AsyncExitStack, suppress
from logging import INFO, WARNING
from typing import TYPE_CHECKING, Any

import anyio
import structlog

import mlpiped
from mlpiped import logs, notify_systemd
from mlpiped.actions import Actions
from mlpiped.artifacts import Store
from mlpiped.clock import SystemClock
from mlpiped.code import CodeReader
from mlpiped.computes import backends_of
from mlpiped.config import settings as config
from mlpiped.config.computes import clusters_of, images_of, own_image
from mlpiped.control.access import Access
from mlpiped.control.server import ControlServer
from mlpiped.control.service import About, Service
from mlpiped.errors import LedgerError, MlpipedError
from mlpiped.execution.facts import World
from mlpiped.execution.images import Finder
from mlpiped.execution.kept import Kept
from mlpiped.files.fingerprint import Fingerprinter
from mlpiped.files.roots import Roots
from mlpiped.ledger import Ledger, moves, sqlite_version
from mlpiped.live_logs import LiveLogs
from mlpiped.loader import Known, Registry, load_file
from mlpiped.log_cap import LogCap
from mlpiped.placement.decide import Place
from mlpiped.retention.keeper import Keeper
from mlpiped.scheduling.dispatch import Dispatch
from mlpiped.scheduling.hosts import Hosts
from mlpiped.scheduling.left_behind import LeftBehind
from mlpiped.scheduling.scheduler import Scheduler
from mlpiped.triggers import Arrivals, Clockwork, LedgerMemory, cron

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from anyio.abc import TaskGroup

    from mlpiped.backends.base import Backend
    from mlpiped.config.settings import Settings
    from mlpiped.loader import LoadResult
    from mlpiped.spec import Trigger
    from mlpiped.triggers import ScheduleView

log = structlog.get_logger("daemon")

HEARTBEAT = 1.0  # seconds
CHECKPOINT = 3600.0  # seconds
FEEDS = 3  # of systemd's watchdog within the time that it waits
LAG_LIMIT = 5.0  # seconds that the loop may be late before the watchdog is let bark
STOP_LIMIT = 5.0  # seconds for each room to close
BROKEN_LIMIT = 300.0  # seconds in which a ledger that takes no writes may get well before the daemon ends
M_ARENA_MAX = -8  # malloc.h
HEALTH_LIMIT = 10.0  # seconds for each compute to say how it is
CANCEL_LIMIT = 20.0  # seconds for all runs to end, with on_stop = "cancel"


def serve(settings: Settings) -> int:
    """Run the daemon until SIGTERM or SIGINT; the exit status. Raises MlpipedError for what keeps it from serving."""
    logs.setup(settings.daemon.log)
    _raise_file_limit()
    _share_one_arena()
    try:
        anyio.run(_serve, settings)
    except BaseExceptionGroup as group:
        raise _first(group) from group
    return 0


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Out of a task group's bundle, the one error that a person should read."""
    own, _ = group.split(MlpipedError)
    found: BaseException = own or group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found


def _raise_file_limit() -> None:
    """A pidfd per running step, a connection per client: the usual soft limit of 1024 is soon reached."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65536)), hard))


def _share_one_arena() -> None:
    """glibc gives each thread an arena of its own, and what one has freed the others cannot use: a run over 10,000
    steps left 209 MB behind, and with one arena 152."""
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


async def _serve(settings: Settings) -> None:
    async with AsyncExitStack() as stack:
        daemon = await Daemon.build(settings, stack)
        async with anyio.create_task_group() as tasks:
            with daemon.starting:
                await daemon.start(tasks)
            await daemon.stopping.wait()
            await daemon.stop()
            tasks.cancel_scope.cancel()
    log.info("stopped")
    if daemon.fatal is not None:
        raise daemon.fatal


class Daemon:
    """Everything, built and connected."""

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        self.settings = settings
        self.clock = SystemClock()
        self.ledger = ledger
        self.starting = anyio.CancelScope()
        self.stopping = anyio.Event()
        self.hung_up = anyio.Event()
        self.lag = 0.0
        self.fatal: LedgerError | None = None  # why it ends, if not because somebody wants it to
        self._broken_since: float | None = None  # of `ledger.broken`
        state = settings.daemon.state_dir
        self.fingerprinter = Fingerprinter(ledger, moves.put_stat_cache, roots=Roots(state / "mounts.json"))
        self.store = Store(state, self.fingerprinter)
        datastores = {name: each.path for name, each in settings.datastores.items()}
        code = CodeReader(self.fingerprinter, state)
        self.backends = backends_of(settings)
        find_image = Finder(self.backends, settings.pools)
        self.kept = Kept(ledger, self.store, self.backends, self.clock)
        self.world = World(ledger, self.fingerprinter, code, self.store, datastores, find_image, self.kept)
        capacities = {name: backend.capacity() for name, backend in self.backends.items()}
        places = [Place(name, c.slots) for name, c in capacities.items()]
        for place in places:
            place.offers(capacities[place.name])
        self.dispatch = Dispatch(places, settings.pools, settings.daemon.max_running_steps, self.clock.now)
        self.hosts = Hosts(self.backends, self.dispatch, ledger, self.clock, self._begin)
        self.dispatch.on_unavailable, self.dispatch.on_taken = self.hosts.unavailable, self.hosts.took
        self.dispatch.on_answered = self.hosts.answered
        self.registry = Registry(settings.daemon.plugins, state, self._known, cron.check, self._plugins_changed)
        self.scheduler = Scheduler(self.world, self.registry, self.backends, self.clock, self.dispatch)
        memory = LedgerMemory(ledger, moves, self.clock)
        self.clockwork = Clockwork(memory, self.clock, self.scheduler.emit)
        self.arrivals = Arrivals(memory, self.fingerprinter, self.clock, self.scheduler.emit, dict(settings.datastores))
        self.scheduler.on_resume = self.arrivals.look
        self.keeper = Keeper(ledger, self.store, self.backends, settings.retention, datastores, self.clock)
        self.log_cap = LogCap(f"{settings.daemon.state_dir}/jobs", self.world.begun.keys, self._printing)
        self.server = AsyncExitStack()  # the control socket
        self.rooms = AsyncExitStack()  # the backends
        self.triggers = anyio.CancelScope()

    @classmethod
    async def build(cls, settings: Settings, stack: AsyncExitStack) -> Daemon:
        """Take the state folder (one daemon a folder) and build every room. `stack` closes the ledger at the end."""
        state = settings.daemon.state_dir
        try:
            state.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as fault:
            raise MlpipedError(f"the state folder cannot be made: `{state}`: {fault.strerror}") from None
        ledger = await Ledger.open(state, SystemClock())
        stack.push_async_callback(_in_time, "ledger", ledger.close)
        return cls(settings, ledger)

    # --- start ------------------------------------------------------------------------------------------------
    async def start(self, tasks: TaskGroup) -> None:
        started = self.clock.monotonic()
        tasks.start_soon(self._signals, name="signals")
        await self.registry.start()
        await self.hosts.restore()
        await self.hosts.start()
        resumed = await self.scheduler.recover(tasks)
        await LeftBehind(self.ledger, self.backends, self.dispatch, self.clock).end(tasks)
        self.hosts.watch(tasks)
        self.ledger.on_full = lambda _: self._disk()
        self.ledger.on_broken(lambda _: self._disk())
        self._disk()
        self._set_triggers()
        await self.scheduler.tell_followers()
        await self._listen(tasks)
        tasks.start_soon(self._reloads, name="reloads")
        tasks.start_soon(self._triggers, name="triggers")
        tasks.start_soon(self._heartbeat, name="heartbeat")
        tasks.start_soon(self._housekeeping, name="housekeeping")
        tasks.start_soon(self.keeper.run, name="keeper")
        tasks.start_soon(self.kept.run, name="kept")
        tasks.start_soon(self.log_cap.run, name="log cap")
        notify_systemd.ready(f"{len(self.registry.all())} pipelines")
        log.info(
            "serving",
            socket=str(self.settings.control.socket),
            pipelines=len(self.registry.all()),
            resumed=resumed,
            seconds=round(self.clock.monotonic() - started, 3),
        )

    async def _begin(self, backend: Backend) -> None:
        await backend.start(self.rooms)

    async def _listen(self, tasks: TaskGroup) -> None:
        settings = self.settings
        self.actions = Actions(
            self.scheduler,
            self.registry,
            self._load,
            self._reread,
            self.hosts.drain,
            self.hosts.look_again,
        )
        self.service = Service(
            access=Access(settings.control.group, settings.control.operators),
            ledger=self.ledger,
            registry=self.registry,
            actions=self.actions,
            schedules=self._schedules,
            clock=self.clock,
            about=About(
                version=mlpiped.__version__,
                pid=os.getpid(),
                started_at=self.clock.now(),
                state_dir=settings.daemon.state_dir,
                socket=settings.control.socket,
                plugins=tuple(settings.daemon.plugins),
                datastores=self.world.datastores,
                sqlite=sqlite_version,
                python=str(settings.daemon.python or sys.executable),
                watch={name: each.watch for name, each in settings.datastores.items()},
            ),
            job_folder=lambda token: settings.daemon.state_dir / "jobs" / token,
            live=LiveLogs(self.scheduler.executions, self.backends, settings.daemon.state_dir / "jobs"),
            gc_plan=self.keeper.plan,
            gc=self.keeper.clean,
            ledger_faults=self.ledger.faults,
            orphans=self.keeper.orphans,
            bring_home=self.kept.bring_home,
            healths=self._healths,
            loop_lag=lambda: self.lag,
        )
        control = ControlServer(settings.control.socket, self.service)
        await control.start(self.server)
        tasks.start_soon(control.guard, name="control socket")

    # --- stop -------------------------------------------------------------------------------------------------
    async def stop(self) -> None:
        """The written order. What is cancelled after it holds no state that is not in the ledger or a job folder."""
        notify_systemd.stopping("steps run on")
        self.triggers.cancel()
        await _in_time("control socket", self.server.aclose)
        if self.settings.daemon.on_stop == "cancel":
            await self._cancel_all()
        await _in_time("backends", self.rooms.aclose)

    async def _cancel_all(self) -> None:
        with anyio.move_on_after(CANCEL_LIMIT):
            for execution in list(self.scheduler.executions.values()):
                await execution.cancel()
                await execution.over.wait()

    async def _signals(self) -> None:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            async for number in signals:
                if number == signal.SIGHUP:
                    self.hung_up.set()
                    continue
                log.info("stopping", signal=signal.Signals(number).name)
                self.stopping.set()
                self.starting.cancel()
                return

    async def _reloads(self) -> None:
        """One for all SIGHUPs that came meanwhile. It may take as long as plugins do, and a SIGTERM does not wait."""
        while True:
            await self.hung_up.wait()
            self.hung_up = anyio.Event()
            notify_systemd.reloading()
            try:
                answer = await self.actions.reload("SIGHUP")
            except Exception:
                log.exception("the reload failed: all is as it was")
                notify_systemd.ready("the last reload failed")
                continue
            said = f"{answer['pipelines']} pipelines, {len(answer['broken'])} faults; config: {answer['config']}"
            log.log(WARNING if answer["config"].startswith("refused") else INFO, "reloaded", what=said)
            notify_systemd.ready(said)

    # --- what goes on -----------------------------------------------------------------------------------------
    async def _triggers(self) -> None:
        with self.triggers:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self.registry.run, name="plugins")
                tasks.start_soon(self.clockwork.run, name="clock")
                tasks.start_soon(self.arrivals.run, name="arrivals")

    async def _heartbeat(self) -> None:
        """Measures how late the loop is; feeds systemd's watchdog while the loop and the ledger's writer go on."""
        interval = notify_systemd.watchdog_interval()
        fed = 0.0
        while True:
            due = self.clock.monotonic() + HEARTBEAT
            await anyio.sleep(HEARTBEAT)
            self.lag = max(0.0, self.clock.monotonic() - due)
            self._end_if_broken()
            if interval is not None and self.lag < LAG_LIMIT and due - fed >= interval / FEEDS:
                fed = due
                await self.ledger.prove()
                notify_systemd.watchdog()

    def _end_if_broken(self) -> None:
        """A disk may come back; it is not waited for until nobody knows any more what has run."""
        fault, since = self.ledger.broken, self._broken_since
        if fault is not None and since is not None and self.clock.monotonic() > since + BROKEN_LIMIT:
            log.error("the ledger takes no writes: the daemon ends, its steps run on", why=fault.message)
            self.fatal = fault
            self.stopping.set()

    async def _housekeeping(self) -> None:
        while True:
            try:
                await self.store.sweep()
                await self.ledger.checkpoint()
            except Exception as fault:  # a full disk, a lock: nothing that a daemon should end for
                log.warning("housekeeping failed; it is tried again", why=str(fault), in_seconds=CHECKPOINT)
            await anyio.sleep(CHECKPOINT)

    def _printing(self) -> list[str]:
        """Of those that have begun and not ended, without those that wait in a queue."""
        return [token for token, backend in self.world.begun.items() if backend.doing(token) is None]

    def _disk(self) -> None:
        """What the ledger can take has changed."""
        fault = self.ledger.broken
        if fault is None or self._broken_since is None:
            self._broken_since = None if fault is None else self.clock.monotonic()
        full = "the disk that holds the ledger is full" if self.ledger.full else None
        self.dispatch.paused = full if fault is None else fault.message
        self.dispatch.place()

    async def _plugins_changed(self) -> None:
        self._set_triggers()
        await self.scheduler.tell_followers()

    def _set_triggers(self) -> None:
        specs: dict[str, tuple[Trigger, ...]] = {each.spec.name: each.spec.triggers for each in self.registry.all()}
        self.clockwork.set(specs)
        self.arrivals.set(specs)

    # --- what people ask --------------------------------------------------------------------------------------
    def _known(self) -> Known:
        settings = self.settings
        kinds = {name: each.kind for name, each in settings.compute.items()}
        images = {
            name: image
            for name, each in settings.compute.items()
            if (image := own_image(each.model_dump())) is not None
        }
        names = {*settings.compute, *settings.pools}
        pools = settings.pools
        steps = images_of(kinds, pools, images), clusters_of(kinds, pools)
        return Known(set(settings.datastores), names, *steps)

    async def _load(self, path: Path) -> LoadResult:
        return await load_file(path, known=self._known(), check_cron=cron.check)

    def _reread(self) -> str:
        if self.settings.path is None or config.load(self.settings.path) == self.settings:
            return "unchanged"
        return "changed: restart the daemon to use it (steps run on meanwhile)"

    async def _healths(self) -> dict[str, str | None]:
        found: dict[str, str | None] = dict.fromkeys(self.backends)

        async def ask(name: str, backend: Backend) -> None:
            found[name] = f"gave no answer in {HEALTH_LIMIT:.0f} s"
            with anyio.move_on_after(HEALTH_LIMIT):
                try:
                    found[name] = await backend.health()
                except MlpipedError as fault:
                    found[name] = fault.message

        async with anyio.create_task_group() as tasks:
            for name, backend in self.backends.items():
                tasks.start_soon(ask, name, backend, name=f"health of {name}")
        return found

    def _schedules(self) -> list[ScheduleView]:
        return [*self.clockwork.next_fires(), *self.arrivals.status()]


async def _in_time(room: str, close: Callable[[], Awaitable[Any]]) -> None:
    """Close a room in its time, also while all is being cancelled."""
    with anyio.move_on_after(STOP_LIMIT, shield=True) as scope:
        await close()
    if scope.cancelled_caught:
        log.warning("closed by force", room=room)
