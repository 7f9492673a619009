# SPDX-License-Identifier: Apache-2.0
"""`rootvisor doctor`: what this machine can do, what is missing, and the command that mends it."""

from __future__ import annotations

from typing import Any

import click

from rootvisor.cli.errors import OWN_FAILURE
from rootvisor.cli.help import DocumentedCommand, debug_option, json_option, option
from rootvisor.cli.host import Check, examine
from rootvisor.cli.output import mark, print_json, table

_EXAMPLES = (
    ("Look at this machine", "rootvisor doctor"),
    (
        "Only the names of what is missing",
        "rootvisor doctor --json | jq -r '.checks[] | select(.state == \"missing\") | .name'",
    ),
)
_STATUSES = (("0", "nothing is missing"), (str(OWN_FAILURE), "something is missing"))


@click.command(cls=DocumentedCommand, examples=_EXAMPLES, statuses=_STATUSES)
@option("--fresh", is_flag=True, help="Test KVM again, even if a verdict is kept from before.")
@json_option
@debug_option
def doctor(fresh: bool, as_json: bool) -> int:
    """Check what Rootvisor needs on this machine, and say how to mend what is missing.

    KVM is judged by running unmodified ring-0 code on it. A machine without usable KVM is no fault: the
    appliance takes its place.
    """
    checks = examine(fresh=fresh)
    lacking = [check for check in checks if check.state == "missing"]
    if as_json:
        print_json(document(checks))
    else:
        show(checks)
    return OWN_FAILURE if lacking else 0


def document(checks: list[Check]) -> dict[str, Any]:
    """The report as JSON-able data."""
    return {
        "ok": all(check.state != "missing" for check in checks),
        "checks": [
            {
                "name": check.name,
                "state": check.state,
                "what": check.what,
                "mend": check.mend or None,
                **({"facts": check.facts} if check.facts else {}),
            }
            for check in checks
        ],
    }


def show(checks: list[Check]) -> None:
    """The report for people: a line each, the mend below what needs one, a verdict at the end."""
    lines = table([(check.name, check.what) for check in checks]).splitlines()
    indent = " " * (max(len(check.name) for check in checks) + 4)
    for check, line in zip(checks, lines, strict=True):
        click.echo(f"{mark(check.state)} {line}")
        if check.mend and check.state != "ok":
            click.echo(f"{indent}{click.style('->', bold=True)} {check.mend}")
    lacking = sum(check.state == "missing" for check in checks)
    click.echo()
    if lacking:
        click.echo(
            f"{lacking} thing{'s are' if lacking > 1 else ' is'} missing; the lines with -> say what to do."
        )
    else:
        click.echo("Ready. Try: rootvisor demo")
