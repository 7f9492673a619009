# SPDX-License-Identifier: Apache-2.0
"""Writes the pages of this folder that come from the code: cli.md, exit-statuses.md, hypercalls.md, api.md, and
openapi.json.

python docs/reference/generate.py            write them
python docs/reference/generate.py --check    only say which are out of date (exit status 1)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

FOLDER = Path(__file__).resolve().parent
SOURCE = FOLDER.parents[1] / "src"
WIDTH = 100

sys.path[:0] = [str(SOURCE), str(FOLDER.parents[1])]

from rootvisor.cli.app import cli  # noqa: E402
from rootvisor.cli.errors import EXIT_STATUSES  # noqa: E402
from rootvisor.hypervisor import calls  # noqa: E402
from rootvisor.hypervisor.hypercall_table import (  # noqa: E402
    GUEST_TABLE,
    REP,
    REP_VARIABLE,
    TABLE,
    VARIABLE,
    HypercallTable,
)
from rootvisor.tlfs import hypercalls, privileges  # noqa: E402
from rootvisor.vmm import api_routes, openapi  # noqa: E402
from tests.conformance import table  # noqa: E402

NOTE = "<!-- Made by docs/reference/generate.py; change the code, then run it. -->\n"
CLICK = f"<!-- Laid out by click {'.'.join(version('click').split('.')[:2])}. -->\n"


def pages() -> dict[str, str]:
    """File name to content."""
    return {
        "cli.md": cli_page(),
        "exit-statuses.md": exit_statuses_page(),
        "hypercalls.md": hypercalls_page(),
        "api.md": api_page(),
        "conformance.md": f"{NOTE}\n{table.page(_results())}",
        "openapi.json": json.dumps(openapi.document(), indent=1) + "\n",
    }


def _results() -> dict[str, str] | None:
    """Outcomes of the KVM suite (written where ROOTVISOR_CONFORMANCE says), if they are given on the command line."""
    if len(sys.argv) != 3 or sys.argv[1] != "--results":
        return None
    outcomes: dict[str, str] = json.loads(Path(sys.argv[2]).read_text())
    return outcomes


def cli_page() -> str:
    """The help of every command."""
    parts = [NOTE + CLICK, "# Command line\n"]
    for path, command, context in _commands(
        cli, click.Context(cli, info_name="rootvisor", **cli.context_settings)
    ):
        parts.append(f"## `{path}`\n\n```text\n{command.get_help(context).rstrip()}\n```\n")
    return "\n".join(parts)


def _commands(
    command: click.Command, context: click.Context
) -> Iterator[tuple[str, click.Command, click.Context]]:
    context.terminal_width = WIDTH
    yield context.command_path, command, context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            if child is not None:
                settings = {
                    key: value for key, value in child.context_settings.items() if key == "help_option_names"
                }
                yield from _commands(child, click.Context(child, parent=context, info_name=name, **settings))


def exit_statuses_page() -> str:
    """What `rootvisor run` ends with."""
    rows = "\n".join(f"| {status} | {meaning} |" for status, meaning in EXIT_STATUSES)
    return f"{NOTE}\n# Exit statuses of `rootvisor run`\n\n| status | meaning |\n|---|---|\n{rows}\n"


def hypercalls_page() -> str:
    """The calls that are carried out."""
    calls.load()
    calls.load_children()
    calls.load_guest()
    note = (
        "Every other code is answered with HV_STATUS_INVALID_HYPERCALL_CODE. Input bytes are those of the fixed part; "
        "elements or a variable header follow.\n"
    )
    guest = "Calls that only a guest with a computer of its own (`rootvisor run --as guest`) is offered:\n"
    return f"{NOTE}\n# Hypercalls\n\n{note}\n{_calls(TABLE)}\n## Guests\n\n{guest}\n{_calls(GUEST_TABLE)}"


def _calls(table: HypercallTable) -> str:
    names = {
        value: name
        for name, value in vars(privileges).items()
        if isinstance(value, int) and name.isupper() and not name.startswith("FEATURE_")
    }
    rows = []
    for code, call in sorted(table.calls.items()):
        kind = {REP: "rep", VARIABLE: "variable header", REP_VARIABLE: "rep, variable header"}.get(
            call.kind, "simple"
        )
        purpose = (call.handler.__doc__ or "").strip().split("\n\n")[0]
        purpose = " ".join(purpose.split())
        privilege = names.get(call.privilege, "-") if call.privilege else "-"
        name = hypercalls.call_name(code)
        rows.append(f"| `{code:#06x}` | {name} | {kind} | {call.size} | {privilege} | {purpose} |")
    head = "| code | call | form | input bytes | privilege | what it does |\n|---|---|---|---|---|---|\n"
    return head + "\n".join(rows) + "\n"


def api_page() -> str:
    """The calls of the VMM's API and the fields of their bodies."""
    document = openapi.document()
    rows = [
        f"| `{route.method} {api_routes.ROOT}{route.name}` | {_body_link(route)} | "
        f"{_statuses(document['paths']['/' + route.name][route.method.lower()])} | {route.summary} |"
        for route in api_routes.ROUTES
    ]
    absent = [
        f"| `{path.removeprefix(api_routes.ROOT)}` | {reason} |" for path, reason in api_routes.ABSENT.items()
    ]
    parts = [
        NOTE,
        "# API of `rootvisor vmm`\n",
        "How to use it: [VMM](../use/vmm.md). The same for programs: [OpenAPI 3.0](openapi.json).\n",
        "| call | body | statuses | what it does |\n|---|---|---|---|\n" + "\n".join(rows) + "\n",
        "Calls of Cloud Hypervisor's API that are answered with 501:\n",
        "| call | instead |\n|---|---|\n" + "\n".join(absent) + "\n",
        "## Bodies\n",
        "Fields without a default may be null or left out, unless they are required.\n",
    ]
    for name, schema in document["components"]["schemas"].items():
        if "properties" in schema:
            parts.append(f"### {name}\n\n{schema['description']}\n\n{_fields(schema)}\n")
    return "\n".join(parts)


def _body_link(route: api_routes.Route) -> str:
    return f"[{route.table.name}](#{route.table.name.lower()})" if route.table else ""


def _statuses(operation: dict[str, Any]) -> str:
    return " ".join(operation["responses"])


def _fields(schema: dict[str, Any]) -> str:
    rows = []
    for name, field in schema["properties"].items():
        default = "required" if name in schema.get("required", ()) else json.dumps(field.get("default"))
        default = "" if default == "null" else default
        about = field.get("description", "").replace("|", "\\|")
        rows.append(f"| `{name}` | {_type(field)} | {default} | {about} |")
    return "| field | type | default | |\n|---|---|---|---|\n" + "\n".join(rows)


def _type(field: dict[str, Any]) -> str:
    for reference in (field, *field.get("allOf", ())):
        if "$ref" in reference:
            name = reference["$ref"].rpartition("/")[2]
            return f"[{name}](#{name.lower()})"
    if "enum" in field:
        values = [value for value in field["enum"] if value is not None]
        if values and field.get("type") == "integer" and len(values) > 4:
            return f"power of two, {values[0]} to {values[-1]}"
        return ", ".join(json.dumps(value) for value in values) or "none"
    if "maximum" in field:
        return f"{field['minimum']} to {field['maximum']}"
    if "items" in field:
        return f"list of {_type(field['items'])}" if field["items"] else "empty list"
    return str(field.get("type", ""))


def main() -> int:
    """Write the pages, or check them."""
    stale = [name for name, text in pages().items() if _read(FOLDER / name) != text]
    if "--check" in sys.argv[1:] and CLICK not in _read(FOLDER / "cli.md"):
        stale = [name for name in stale if name != "cli.md"]  # another click lays help out in another way
    if "--check" in sys.argv[1:]:
        for name in stale:
            print(
                f"docs/reference/{name} is out of date; run: python docs/reference/generate.py",
                file=sys.stderr,
            )
        return 1 if stale else 0
    for name in stale:
        (FOLDER / name).write_text(pages()[name], encoding="utf-8")
        print(f"wrote docs/reference/{name}")
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
