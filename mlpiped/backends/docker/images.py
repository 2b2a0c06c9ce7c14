"""Images: a tag becomes a digest, a Dockerfile becomes an image, once per content."""

from __future__ import annotations

import io
import re
import tarfile
import time
from typing import TYPE_CHECKING

import anyio
import structlog
from blake3 import blake3

from mlpiped.backends.base import Image
from mlpiped.backends.docker import dockerfile as dockerfiles
from mlpiped.backends.docker.built import BUILT_BY, BuiltImages
from mlpiped.backends.docker.engine import Engine, Refused
from mlpiped.errors import BackendUnavailable, InvalidJob

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path
    from typing import Any

log = structlog.get_logger("docker")
SPOKEN = 5.0  # seconds between two words of progress
REFERENCE = re.compile(
    r"(?:sha256:[0-9a-f]{64}"
    r"|[A-Za-z0-9][A-Za-z0-9.-]*(?::[0-9]+)?(?:/[a-z0-9]+(?:[._-]+[a-z0-9]+)*)*"
    r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(?:@sha256:[0-9a-f]{64})?)"
)
NO_SUCH_IMAGE = re.compile(
    r"manifest unknown|not found|does not exist|(?<!permission )denied|repository name not known|unauthorized"
    r"|no matching manifest|invalid reference"
)
MACHINES_FAULT = re.compile(
    r"dial tcp|no such host|connection refused|timeout|temporary failure|connection reset|no route|unreachable|EOF"
    r"|TLS handshake|proxyconnect|Temporary failure resolving|Could not resolve|Failed to establish a new connection"
    r"|no space left on device|disk quota exceeded",
    re.IGNORECASE,
)


class ImageRoom:
    def __init__(self, engine: Engine, name: str, instance: str, pull: str, marks: Path) -> None:
        self.built = BuiltImages(engine, instance, marks)
        self._engine = engine
        self._name = name
        self._instance = instance
        self._pull_missing = pull == "missing"
        self._locks: dict[str, anyio.Lock] = {}
        self._bringing: dict[str, str] = {}  # reference or Dockerfile -> what is done for it just now

    def bringing(self, reference: str | None, dockerfile: str | None) -> str | None:
        names = [reference or ""] if dockerfile is None else [dockerfile, *dockerfiles.bases(dockerfile)]
        return next((self._bringing[name] for name in names if name in self._bringing), None)

    async def named(self, reference: str) -> Image:
        """By its digest in the registry, if it has one, else by its id. Raises InvalidJob, BackendUnavailable."""
        if not REFERENCE.fullmatch(reference):
            raise InvalidJob(f"no name of an image: `{reference[:200]}`", hint="write it as `name:tag`")
        async with self._locks.setdefault(reference, anyio.Lock()):
            found = await self._look(reference)
            if found is None:
                found = await self._pulled(reference)
        repository = re.sub(r"@.*|:[^/]*$", "", reference)
        digests = dict(text.split("@", 1) for text in found.get("RepoDigests") or () if "@" in text)
        return Image(identity=digests.get(repository, found["Id"]), run=found["Id"])

    async def made(self, text: str) -> Image:
        """What this Dockerfile makes; there is no build context. Raises InvalidJob, BackendUnavailable."""
        bases = {name: await self.named(name) for name in dockerfiles.bases(text)}
        content = blake3(text.encode("utf-8", "surrogateescape"))
        for name, image in sorted(bases.items()):
            content.update(f"\0{name}\0{image.identity}".encode())
        digest = content.hexdigest()
        tag = self.built.name(digest)
        async with self._locks.setdefault(tag, anyio.Lock()):
            await self.built.asked_for(tag)
            found = await self._look(tag)
            if found is None:
                pinned = dockerfiles.pinned(text, {name: image.run for name, image in bases.items()})
                await self._build(pinned, tag, text)
                found = await self._look(tag)
        if found is None:
            raise BackendUnavailable(f"the build on `{self._name}` was cut off")
        return Image(identity=f"b3:{digest}", run=found["Id"])

    async def _look(self, name: str) -> dict[str, Any] | None:
        try:
            return await self._engine.image(name)
        except Refused as no:
            if no.status == 400:
                raise InvalidJob(f"no name of an image: `{name}`: {no.words}") from None
            raise BackendUnavailable(f"the Docker engine cannot tell of image `{name}`: {no.words}") from None

    async def _pulled(self, reference: str) -> dict[str, Any]:
        missing = f"no image `{reference}` on `{self._name}`"
        if not self._pull_missing:
            raise InvalidJob(missing, hint=f'bring it there: `docker pull {reference}`; the config says pull = "never"')
        if reference.startswith("sha256:"):
            raise InvalidJob(missing, hint="an image that is named by its id cannot be pulled")
        log.info("pulling an image", compute=self._name, image=reference)
        try:
            self._bringing[reference] = f"pulls image {reference}"
            await self._spoken("pulling an image", reference, self._engine.pull(reference))
        except Refused as no:
            if NO_SUCH_IMAGE.search(no.words) and not MACHINES_FAULT.search(no.words):
                raise InvalidJob(f"{missing}, and its registry gives none: {no.words[:500]}") from None
            raise BackendUnavailable(f"{missing}, and it cannot be pulled: {no.words[:500]}") from None
        finally:
            self._bringing.pop(reference, None)
        found = await self._look(reference)
        if found is None:
            raise BackendUnavailable(f"{missing}: the pull was cut off")
        return found

    async def _build(self, text: str, tag: str, dockerfile: str) -> None:
        log.info("building an image", compute=self._name, image=tag)
        said: list[str] = []
        try:
            self._bringing[dockerfile] = "builds the image of its Dockerfile"
            context = _context(dockerfiles.labelled(text, BUILT_BY, self._instance))
            async with self.built.build():
                await self._spoken("building an image", tag, self._engine.build(context, tag), said)
        except Refused as no:
            last = "; ".join(line for line in "".join(said).splitlines()[-4:] if line.strip())
            kind = BackendUnavailable if MACHINES_FAULT.search(no.words + last) else InvalidJob
            raise kind(f"the Dockerfile does not build: {no.words[:500]}", hint=last[-500:] or None) from None
        finally:
            self._bringing.pop(dockerfile, None)

    async def _spoken(
        self, what: str, image: str, stream: AsyncIterator[dict[str, Any]], said: list[str] | None = None
    ) -> None:
        """Listen to the end of it, and tell the log now and then how far it is."""
        layers: dict[str, tuple[int, int]] = {}
        spoken = time.monotonic()
        async for word in stream:
            if said is not None and "stream" in word:
                said.append(re.sub(r"\x1b\[[0-9;]*m", "", word["stream"]))
                del said[:-50]
            progress = word.get("progressDetail") or {}
            if progress.get("total"):
                layers[f"{word.get('id')} {word.get('status')}"] = progress.get("current", 0), progress["total"]
                if image in self._bringing:
                    at, whole = (sum(pair[i] for pair in layers.values()) for i in (0, 1))
                    self._bringing[image] = f"pulls image {image}: {100 * min(at, whole) // whole} %"
            if time.monotonic() - spoken > SPOKEN:
                spoken = time.monotonic()
                done, total = (sum(pair[i] for pair in layers.values()) >> 20 for i in (0, 1))
                last = said[-1].strip()[:200] if said else None
                log.info(what, compute=self._name, image=image, done_mb=done, of_mb=total, last=last)


def _context(text: str) -> bytes:
    """A build context with nothing but the Dockerfile."""
    content = text.encode("utf-8", "surrogateescape")
    info = tarfile.TarInfo("Dockerfile")
    info.size = len(content)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.addfile(info, io.BytesIO(content))
    return packed.getvalue()
