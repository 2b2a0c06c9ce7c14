"""The daemon about itself: its health, its numbers, its API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiohttp import web

from mlpiped.control import doctor, metrics

if TYPE_CHECKING:
    from mlpiped.control.route import Ask


async def examine(ask: Ask) -> Any:
    findings = await doctor.examine(ask.service)
    worst = max((finding.level for finding in findings), key=["ok", "warn", "fail"].index, default="ok")
    return {
        "level": worst,
        "checks": [{"name": f.name, "level": f.level, "message": f.message, "hint": f.hint} for f in findings],
    }


async def prometheus(ask: Ask) -> web.Response:
    return web.Response(text=await metrics.prometheus(ask.service), content_type="text/plain", charset="utf-8")


async def openapi(ask: Ask) -> Any:
    from mlpiped.control.openapi import openapi_document
    from mlpiped.control.routes import ROUTES

    return openapi_document(ROUTES, ask.service.about.version)
