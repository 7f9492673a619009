# SPDX-License-Identifier: Apache-2.0
"""The API as an OpenAPI 3.0 document, made from the tables that the server works with."""

from __future__ import annotations

import rootvisor

from . import api_tables, config
from .api_http import MAX_BODY_BYTES
from .api_routes import ROOT, ROUTES
from .schema import Listed, Nested

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .api_routes import Route
    from .schema import Document, Kind, Table

_INTEGER = {"type": "integer", "format": "int64"}
_STRING = {"type": "string"}

_ANSWERS: dict[str, Document] = {
    "VmmPingResponse": {
        "type": "object",
        "description": "The VMM.",
        "required": ["build_version", "version", "pid", "features"],
        "properties": {
            "build_version": _STRING,
            "version": _STRING,
            "pid": _INTEGER,
            "features": {"type": "array", "items": _STRING},
        },
    },
    "VmInfo": {
        "type": "object",
        "description": "The virtual machine.",
        "required": ["config", "state", "memory_actual_size"],
        "properties": {
            "config": {"$ref": "#/components/schemas/VmConfig"},
            "state": {"type": "string", "enum": ["Created", "Running", "Paused", "Shutdown"]},
            "memory_actual_size": {**_INTEGER, "description": "Bytes of memory less those in the balloon."},
            "device_tree": {
                "type": "object",
                "description": "The devices of a machine that runs or is paused, by name.",
                "additionalProperties": {"$ref": "#/components/schemas/DeviceNode"},
            },
        },
    },
    "DeviceNode": {
        "type": "object",
        "description": "A device.",
        "required": ["id", "resources", "children"],
        "properties": {
            "id": _STRING,
            "resources": {"type": "array", "items": {"type": "object"}},
            "children": {"type": "array", "items": _STRING},
            "pci_bdf": _STRING,
        },
    },
    "VmCounters": {
        "type": "object",
        "description": "Counters by device and name.",
        "additionalProperties": {"type": "object", "additionalProperties": _INTEGER},
    },
    "PciDeviceInfo": {
        "type": "object",
        "description": "Where a device is that was added.",
        "required": ["id", "bdf"],
        "properties": {
            "id": _STRING,
            "bdf": {
                "type": "string",
                "pattern": "^[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\\.[0-7]$",
                "description": "PCI segment, bus, device and function.",
            },
        },
    },
    "Errors": {
        "type": "array",
        "description": "What went wrong, from the call to the cause.",
        "items": _STRING,
        "minItems": 1,
    },
}


def document() -> Document:
    """The whole document, ready for JSON."""
    return {
        "openapi": "3.0.3",
        "info": {
            "title": "Rootvisor VMM API",
            "description": "Calls and bodies of Cloud Hypervisor's API, as far as `rootvisor vmm` has the thing. "
            "Fields without a default may be null, which is as if they were left out. A body has at most "
            f"{MAX_BODY_BYTES >> 20} MiB and comes with Content-Length.",
            "license": {"name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
            "version": rootvisor.__version__,
        },
        "servers": [{"url": "http://localhost" + ROOT.rstrip("/"), "description": "On the Unix socket."}],
        "paths": {f"/{route.name}": {route.method.lower(): _operation(route)} for route in ROUTES},
        "components": {"schemas": _schemas()},
    }


def _operation(route: Route) -> Document:
    operation: Document = {"summary": route.summary, "operationId": route.name.replace(".", "-")}
    errors = {500: "An error of the program."} | route.errors
    if route.table is not None:
        errors = {400: "The body is wrong."} | errors
        operation["requestBody"] = {
            "required": True,
            "content": _json({"$ref": f"#/components/schemas/{route.table.name}"}),
        }
    else:
        errors = {400: "The call takes no body."} | errors
    responses: Document = {}
    if route.schema:
        answer = _json({"$ref": f"#/components/schemas/{route.schema}"})
        responses["200"] = {"description": "Done.", "content": answer}
    if not route.schema or route.both:
        responses["204"] = {"description": "Done." if not route.schema else "Done; the guest is not running."}
    for status, description in sorted(errors.items()):
        responses[str(status)] = _error(description)
    operation["responses"] = responses
    return operation


def _error(description: str) -> Document:
    return {"description": description, "content": _json({"$ref": "#/components/schemas/Errors"})}


def _json(schema: Document) -> Document:
    return {"application/json": {"schema": schema}}


def _schemas() -> Document:
    """Every table that a body is made of, and the answers."""
    tables: dict[str, Table] = {}

    def visit(table: Table) -> None:
        if table.name not in tables:
            tables[table.name] = table
            for field in table.fields:
                kind: Kind = field.kind.item if isinstance(field.kind, Listed) else field.kind
                if isinstance(kind, Nested):
                    visit(kind.table)

    for table in (
        config.VM,
        api_tables.REMOVE_DEVICE,
        api_tables.RESIZE,
        api_tables.SNAPSHOT,
        api_tables.RESTORE,
    ):
        visit(table)
    schemas = {name: table.schema() for name, table in tables.items()} | _ANSWERS
    return dict(sorted(schemas.items()))
