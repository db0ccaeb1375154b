"""JSON Schemas of the policy language and of every JSON shape; the copies in `schemas/` are what editors use."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pydantic import TypeAdapter

from fwcompiler import shapes
from fwcompiler.catalogue import CATALOGUE
from fwcompiler.policy import Policy

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def _policy() -> dict[str, Any]:
    """The models' schema, with the catalogue's services by name, so that an editor can offer and explain them."""
    schema = Policy.model_json_schema(by_alias=True)
    services = schema["properties"]["services"]
    services["properties"] = {
        s.name: {
            "allOf": [{"$ref": "#/$defs/ServiceEntry"}],
            "description": f"{s.about} ({', '.join(t for p in s.ports for t in p.texts())})",
        }
        for s in CATALOGUE.values()
    }
    return {"$schema": DIALECT, **schema}


def _shape(kind: Any) -> Callable[[], dict[str, Any]]:
    def schema() -> dict[str, Any]:
        return {"$schema": DIALECT, **TypeAdapter(kind).json_schema()}

    return schema


SCHEMAS: dict[str, Callable[[], dict[str, Any]]] = {
    "policy": _policy,
    "check": _shape(shapes.CheckShape),
    "compile": _shape(shapes.CompileShape),
    "diff": _shape(shapes.DiffShape),
    "apply": _shape(shapes.ApplyShape),
    "confirm": _shape(shapes.ConfirmShape),
    "rollback-trial": _shape(shapes.EndedShape),
    "restore": _shape(shapes.RestoreShape),
    "install-boot": _shape(shapes.InstallBootShape),
    "history": _shape(shapes.HistoryShape),
    "status": _shape(shapes.StatusShape),
    "explain": _shape(shapes.ExplainShape),
    "explain-live": _shape(shapes.LiveExplainShape),
    "explain-listing": _shape(shapes.ListingExplainShape),
    "verify": _shape(shapes.VerifyShape),
    "test": _shape(shapes.TestsShape),
    "lab": _shape(shapes.LabShape),
    "audit": _shape(shapes.AuditShape),
    "members": _shape(shapes.MembersShape),
    "members-history": _shape(shapes.MembersHistoryShape),
    "member-change": _shape(shapes.MemberChangeShape),
    "remove": _shape(shapes.RemoveShape),
    "backends": _shape(shapes.BackendsShape),
}


def text(name: str) -> str:
    """A schema as the text of its file in `schemas/`."""
    return json.dumps(SCHEMAS[name](), indent=2) + "\n"
