# SPDX-License-Identifier: Apache-2.0
"""`rootvisor demo`: boot the root partition and show the evidence."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import click

from rootvisor.cli.description import RunOptions
from rootvisor.cli.errors import OWN_FAILURE, UserError
from rootvisor.cli.evidence import SCRIPT, Finding, findings, parse_sections
from rootvisor.cli.help import DocumentedCommand, debug_option, json_option
from rootvisor.cli.output import Progress, mark, print_json, say, table
from rootvisor.cli.partition_options import engine_option, kernel_option, vps_option
from rootvisor.cli.run_folder import run_folder

_EXAMPLES = (
    ("Boot the kernel with /dev/mshv and show what happened", "rootvisor demo"),
    (
        "The same with the distribution's own kernel and four processors",
        "rootvisor demo --kernel stock --vps 4",
    ),
)
_STATUSES = (
    ("0", "all the evidence is there"),
    ("1", "the root partition ran, and a piece of evidence is missing"),
    (str(OWN_FAILURE), "it did not run; the message says what mends it"),
)
_MISSING_EVIDENCE = 1
_TIMEOUT_S = 300.0
_MOST_FREQUENT = 4

_NEXT = (
    ("a shell in the root partition, on this machine's files", "rootvisor run"),
    (
        "every hypercall of a boot",
        "rootvisor run --trace boot.trace -- true && rootvisor trace report boot.trace",
    ),
    ("what this machine can do", "rootvisor doctor"),
)


@click.command(cls=DocumentedCommand, examples=_EXAMPLES, statuses=_STATUSES)
@kernel_option()
@vps_option(2)
@engine_option()
@json_option
@debug_option
@click.pass_context
def demo(ctx: click.Context, /, kernel: str, vps: int, engine: str, as_json: bool) -> int:
    """Boot Linux as the root partition of the Microsoft hypervisor and show the evidence.

    The first time a kernel with /dev/mshv is built (a few minutes, shown as it goes); from then on the demo takes
    less than a minute.
    """
    debug = bool(ctx.find_root().meta.get("rootvisor.debug"))
    options = RunOptions(
        kernel=kernel,
        vps=vps,
        engine=engine,
        timeout_s=_TIMEOUT_S,
        debug=debug,
        command=("/bin/sh", "-c", SCRIPT),
    )
    result = _boot(options)
    found = findings(result["sections"], vps, kernel)
    if as_json:
        print_json(document(result, found))
    else:
        show(result, found)
    return 0 if all(finding.ok for finding in found) else _MISSING_EVIDENCE


def _boot(options: RunOptions) -> dict[str, Any]:
    """Boot, run the evidence script; what it printed, the machine's report, and the times."""
    from dataclasses import replace

    from rootvisor.cli.launch import run_with_streams
    from rootvisor.cli.prepare import Standard, prepare

    with Progress() as progress, run_folder() as folder:
        report = folder / "report.json"
        output = folder / "output"
        plan = prepare(
            replace(options, report=str(report)), progress=progress, standard=Standard(False, False)
        )
        image = plan.description.kernel
        progress(f"booting {image.name} {image.version} with {options.vps} VPs, engine {plan.engine.name}")
        started = time.monotonic()
        with output.open("wb") as stdout, open(os.devnull, "rb") as stdin:
            status = run_with_streams(plan, (stdin.fileno(), stdout.fileno(), 2))
        seconds = time.monotonic() - started
        progress.clear()
        if status:
            raise UserError(
                f"the root partition ended with status {status} before it showed anything",
                "see its log: rootvisor run --console stderr -- true",
                status,
            )
        return {
            "engine": {"name": plan.engine.name, "reason": plan.engine.reason},
            "kernel": {"name": image.name, "version": image.version},
            "vps": options.vps,
            "wall_s": round(seconds, 3),
            "report": _read_report(report),
            "sections": parse_sections(output.read_text(encoding="utf-8", errors="replace")),
        }


def _read_report(path: Path) -> dict[str, Any]:
    """The machine's own report, empty when it wrote none."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def document(result: dict[str, Any], found: list[Finding]) -> dict[str, Any]:
    """The demo's outcome as JSON-able data."""
    return {
        "ok": all(finding.ok for finding in found),
        "evidence": [
            {"what": finding.what, "ok": finding.ok, "lines": list(finding.lines)} for finding in found
        ],
        **{name: value for name, value in result.items() if name != "sections"},
    }


def show(result: dict[str, Any], found: list[Finding]) -> None:
    """The report for people."""
    kernel, engine = result["kernel"], result["engine"]
    click.echo(click.style(f"Linux {kernel['version']} ({kernel['name']}) as the root partition", bold=True))
    click.echo()
    for finding in found:
        click.echo(f"{mark('ok' if finding.ok else 'missing')} {finding.what}")
        for line in finding.lines:
            click.echo(f"    {click.style(line, dim=True)}")
    click.echo()
    rows = [*_numbers(result), ("engine", f"{engine['name']} ({engine['reason']})")]
    rows += [("uname -a", line) for line in result["sections"].get("uname", [])[:1]]
    click.echo(table(rows))
    missing = sum(not finding.ok for finding in found)
    click.echo()
    if missing:
        pieces = "1 piece of evidence is" if missing == 1 else f"{missing} pieces of evidence are"
        say(f"rootvisor: {pieces} missing; the kernel's log may say why: rootvisor run -- dmesg")
        return
    click.echo("Next:")
    click.echo(table([(f"  {command}", f"# {purpose}") for purpose, command in _NEXT]))


def _numbers(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Times, exits and hypercalls, as far as the machine reported them."""
    report = result["report"]
    rows = []
    boot = report.get("boot_to_userspace_s")
    if isinstance(boot, (int, float)):
        rows.append(
            ("boot", f"{boot:.2f} s to the first line of user space, {result['wall_s']:.1f} s in all")
        )
    else:
        rows.append(("time", f"{result['wall_s']:.1f} s in all"))
    for name in ("exits", "hypercalls"):
        counts = report.get(name)
        if isinstance(counts, dict) and counts:
            rows.append((name, _counts(counts)))
    return rows


def _counts(counts: dict[str, int]) -> str:
    """The sum, and the most frequent kinds."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{_short(name)} {count}" for name, count in ordered[:_MOST_FREQUENT]]
    others = sum(count for _, count in ordered[_MOST_FREQUENT:])
    if others:
        shown.append(f"others {others}")
    return f"{sum(counts.values())} ({', '.join(shown)})"


def _short(name: str) -> str:
    return name.removeprefix("HVCALL_").removeprefix("x86_")
