"""The container of a job: made by the token's name, or found there from before a crash."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol

from mlpiped.backends import folder as folders
from mlpiped.backends.docker import container as containers
from mlpiped.backends.docker import mounts, script
from mlpiped.backends.docker.engine import Engine, Facts, Refused
from mlpiped.errors import BackendUnavailable, InvalidJob

if TYPE_CHECKING:
    from mlpiped.backends.base import Job
    from mlpiped.backends.docker.jobs import Folders
    from mlpiped.backends.threads import Threads


class Settings(Protocol):
    """`[compute.NAME]` with kind = "docker"."""

    @property
    def url(self) -> str: ...
    @property
    def slots(self) -> int: ...
    @property
    def cpus(self) -> float | None: ...
    @property
    def memory(self) -> int | None: ...
    @property
    def gpus(self) -> Literal["auto"] | int: ...
    @property
    def allow_mounts(self) -> tuple[str, ...]: ...
    @property
    def user(self) -> str | None: ...
    @property
    def pull(self) -> str: ...


class Maker:
    def __init__(
        self, engine: Engine, folders: Folders, settings: Settings, name: str, instance: str, do: Threads
    ) -> None:
        self._engine = engine
        self._folders = folders
        self._settings = settings
        self._name = name
        self._instance = instance
        self._do = do
        self._shells: dict[str, bool] = {}  # image -> whether it has one

    async def made(self, job: Job, image: str, folder: str) -> tuple[str, bool]:
        """The token's container, and whether its image has a shell: one that was not seen before is looked into."""
        shell = self._shells.get(image, True)
        while True:
            config = await self._do("make the job's folder", partial(self._prepare, job, folder, shell))
            container = await self._create(job, config)
            try:
                if image not in self._shells:
                    self._shells[image] = await self._engine.has_file(container, script.SHELL)
                if self._shells[image] is shell and not (job.shell and not shell):
                    return container, shell
                await self._engine.remove(container, force=False)
            except Refused as no:
                raise BackendUnavailable(f"no container can be made on `{self._name}`: {no.words}") from None
            shell = self._shells[image]
            if job.shell and not shell:
                raise InvalidJob(
                    f"the step's command is a text for {script.SHELL}, and its image has none",
                    hint='write the command as a list: ["/program", "argument"]',
                )

    def _prepare(self, job: Job, folder: str, shell: bool) -> Facts:
        """Make the folder; the container's configuration. Blocks."""
        paths = [path for paths in job.inputs.values() for path in paths if os.path.lexists(path)]
        with open("/proc/self/mountinfo", errors="surrogateescape") as file:
            mounted = mounts.mount_points(file.read())
        seen = mounts.plan(
            folder, self._folders.readable, paths, self._settings.allow_mounts, mounted, self._folders.state_dir
        )
        order = folders.order(job.argv(folders.output_paths(folder, job)), self._folders.environment(job, folder), job)
        config = containers.configuration(job, folder, self._instance, self._folders.user, seen)
        argv, env = order["argv"], order["env"]
        if shell:
            self._folders.build(job, folder, script.write(folder, argv, env, job.timeout, job.grace))
            return config
        config = containers.bare(config, argv, env)
        self._folders.build(job, folder, None)
        return config

    async def _create(self, job: Job, config: Facts) -> str:
        """The container of the token: made, or made before and not claimed."""
        while True:
            try:
                return await self._engine.create(job.token, config)
            except Refused as no:
                if no.status == 404:
                    raise InvalidJob(f"no image `{job.image}` on `{self._name}`") from None
                if no.status == 400 and "bind source path does not exist" not in no.words:
                    raise InvalidJob(f"the engine refuses the step's container: {no.words}") from None
                if no.status != 409:
                    raise BackendUnavailable(f"no container can be made on `{self._name}`: {no.words}") from None
            found = await self._engine.look(job.token)
            if found is None:
                continue  # it was removed in between
            if found["Config"]["Labels"] and containers.labels(self._instance, job.token).items() <= (
                found["Config"]["Labels"].items()
            ):
                return str(found["Id"])
            raise BackendUnavailable(
                f"a container that is not ours has the name `{job.token}`", hint=f"see `docker inspect {job.token}`"
            )
