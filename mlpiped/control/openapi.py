"""The OpenAPI document, made from the table of routes and the models that check the requests."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from pydantic.json_schema import models_json_schema

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlpiped.control.route import Route

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["kind", "message", "hint"],
            "properties": {
                "kind": {"type": "string"},
                "message": {"type": "string"},
                "hint": {"type": ["string", "null"]},
            },
        }
    },
}


def openapi_document(routes: Sequence[Route], version: str) -> dict[str, Any]:
    bodies = list(dict.fromkeys(route.body for route in routes if route.body is not None))
    _, schemas = models_json_schema(
        [(model, "validation") for model in bodies], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "mlpiped", "version": version, "description": "The control API of the ML-pipeline daemon."},
        "paths": paths,
        "components": {"schemas": {**schemas.get("$defs", {}), "Error": _ERROR}},
    }


def _operation(route: Route) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": f"{route.method.lower()}_{re.sub(r'[^a-z]+', '_', route.path.lower()).strip('_')}",
        "summary": route.summary,
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in re.findall(r"\{(\w+)\}", route.path)
        ],
        "responses": {
            str(route.status): {"description": route.answer, "content": {route.media: {}}},
            "default": {
                "description": "refused, or it went wrong",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
            },
        },
    }
    if route.query is not None:
        for name, schema in route.query.model_json_schema()["properties"].items():
            operation["parameters"].append({"name": name, "in": "query", "required": False, "schema": schema})
    if route.body is not None:
        ref = {"$ref": f"#/components/schemas/{route.body.__name__}"}
        operation["requestBody"] = {"required": False, "content": {"application/json": {"schema": ref}}}
    if route.verb is not None:
        operation["x-audited-as"] = route.verb
    return operation
