# SPDX-License-Identifier: Apache-2.0
"""`rootvisor demo`: a root partition, a guest in it, and the evidence."""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rootvisor.cli.demo_guest import DOCUMENT, MEMORY_MIB, prepare_guest, root_alone, write_document
from rootvisor.cli.demo_root import MARK
from rootvisor.cli.description import RunOptions
from rootvisor.cli.errors import OWN_FAILURE, UserError
from rootvisor.cli.evidence import Finding, findings, parse_sections
from rootvisor.cli.guest_evidence import (
    guest_exits,
    guest_findings,
    guest_parts,
    vmm_counters,
    vmm_facts,
)
from rootvisor.cli.help import DocumentedCommand, debug_option, json_option
from rootvisor.cli.output import Progress, mark, print_json, say, table
from rootvisor.cli.partition_options import engine_option, kernel_option, vps_option
from rootvisor.cli.paths import source_root
from rootvisor.cli.run_folder import run_folder

if TYPE_CHECKING:
    from rootvisor.cli.prepare import RunPlan

_EXAMPLES = (
    ("A root partition with a Linux guest in it, and what both of them show", "rootvisor demo"),
    (
        "The root partition alone, with the distribution's own kernel (no /dev/mshv) and four processors",
        "rootvisor demo --kernel stock --vps 4",
    ),
    ("The root partition with devices of its own: disk, network card, display", "rootvisor demo hardware"),
)
_STATUSES = (
    ("0", "all the evidence is there"),
    ("1", "it ran, and a piece of evidence is missing"),
    (str(OWN_FAILURE), "it did not run; the message says what mends it"),
)
_MISSING_EVIDENCE = 1
_TIMEOUT_S = 600.0
_MEMORY_BYTES = 1 << 30
_MOST_FREQUENT = 6
_CONSOLE_LINES = 20

_STAGES = {
    "dmesg": "the root partition is up",
    "guest": "rootvisor vmm starts a guest in it",
    "demo: uname": "the guest is up",
    "demo: web": "the guest fetches a page from the root partition",
    "demo: end": "the guest powers off",
}
"""First line of a part of the output, and what is going on from there on."""

_NEXT = (
    ("a command in a guest, on this machine's files", "rootvisor guest -- uname -a"),
    ("a shell in the root partition", "rootvisor run"),
    (
        "every hypercall that a guest costs",
        "rootvisor guest --trace t -- true && rootvisor trace report t",
    ),
    ("what this machine can do", "rootvisor doctor"),
)


@click.command(cls=DocumentedCommand, examples=_EXAMPLES, statuses=_STATUSES)
@kernel_option(help="Kernel of the root partition and its guest: mshv, stock or a path.")
@vps_option(2)
@engine_option()
@json_option
@debug_option
@click.argument("what", type=click.Choice(["guest", "hardware"]), default="guest", metavar="[guest|hardware]")
@click.pass_context
def demo(ctx: click.Context, /, what: str, kernel: str, vps: int, engine: str, as_json: bool) -> int:
    """Boot Linux as the root partition of the Microsoft hypervisor, boot a guest in it, and show the evidence.

    With `hardware`, the root partition works an NVMe disk, a network card and a display by itself instead; the
    appliance emulates them behind an IOMMU, and the picture of the display is kept as PNG.

    The guest is started by `rootvisor vmm` and uses a disk, a network and shared files. The first time a kernel with
    /dev/mshv is built (a few minutes, shown as it goes); from then on the demo takes about a minute.
    """
    debug = bool(ctx.find_root().meta.get("rootvisor.debug"))
    options = RunOptions(
        kernel=kernel, vps=vps, memory_bytes=_MEMORY_BYTES, engine=engine, timeout_s=_TIMEOUT_S, debug=debug
    )
    if what == "hardware":
        return _hardware(options, as_json)
    result = _boot(options)
    found = findings(result["sections"], vps, kernel)
    expected = result.pop("expected")
    in_guest = [] if expected is None else guest_findings(result["sections"], expected)
    if as_json:
        print_json(document(result, found, in_guest))
    else:
        show(result, found, in_guest)
    return 0 if all(finding.ok for finding in found + in_guest) else _MISSING_EVIDENCE


def _hardware(options: RunOptions, as_json: bool) -> int:
    from rootvisor.cli import demo_hardware

    outcome = demo_hardware.show_hardware(options)
    ok = all(finding.ok for finding in outcome.findings)
    if as_json:
        print_json(
            {
                "ok": ok,
                "evidence": _as_json(outcome.findings),
                "picture": str(outcome.picture),
                "wall_s": round(outcome.seconds, 3),
                "report": outcome.report,
            }
        )
    else:
        _show_findings("Devices that belong to the root partition", outcome.findings)
        demo_hardware.show(outcome)
    return 0 if ok else _MISSING_EVIDENCE


def _boot(options: RunOptions) -> dict[str, Any]:
    """Boot, run the demo's part in the root; what it printed, the machine's report, and the times."""
    from rootvisor.cli.prepare import Standard, prepare, python_argv

    with Progress() as progress, run_folder() as folder:
        report = folder / "report.json"
        kernel = options.kernel
        script = str(source_root() / "rootvisor" / "cli" / "demo_root.py")
        plan = prepare(
            replace(
                options,
                report=str(report),
                command=(*python_argv(), script, str(folder / DOCUMENT)),
            ),
            progress=progress,
            standard=Standard(False, False),
        )
        image = plan.description.kernel
        if kernel == "stock":
            write_document(folder, root_alone())
            expected = None
        else:
            demo, expected = prepare_guest(folder, image)
            write_document(folder, demo)
        status, output, seconds = _timed(plan, progress)
        if status:
            raise UserError(
                f"the root partition ended with status {status} before it showed everything",
                "see its log: rootvisor run --console stderr -- true",
                status,
            )
        sections = parse_sections(output.decode("utf-8", "replace"))
        return {
            "engine": {"name": plan.engine.name, "reason": plan.engine.reason},
            "kernel": {"name": image.name, "version": image.version},
            "vps": options.vps,
            "wall_s": round(seconds, 3),
            "report": _read_report(report),
            "vmm": vmm_facts(sections.get("vmm", [])),
            "counters": vmm_counters(sections.get("counters", [])),
            "sections": sections,
            "expected": expected,
        }


def boot_and_listen(
    options: RunOptions, folder: Path, progress: Progress
) -> tuple[int, bytes, dict[str, Any], float, RunPlan]:
    """Boot with a report in `folder`: exit status, output, report, seconds, and what was run."""
    from rootvisor.cli.prepare import Standard, prepare

    plan = prepare(options, progress=progress, standard=Standard(False, False))
    status, output, seconds = _timed(plan, progress)
    return status, output, _read_report(folder / "report.json"), seconds, plan


def _timed(plan: RunPlan, progress: Progress) -> tuple[int, bytes, float]:
    image, vps = plan.description.kernel, plan.description.vps
    progress(f"booting {image.name} {image.version} with {vps} VPs, engine {plan.engine.name}")
    started = time.monotonic()
    status, output = _run(plan, progress)
    progress.clear()
    return status, output, time.monotonic() - started


def _run(plan: RunPlan, progress: Progress) -> tuple[int, bytes]:
    """The exit status and the output; meanwhile the parts that begin in it are the progress."""
    from rootvisor.cli.launch import run_with_streams

    output = bytearray()
    read, write = os.pipe()

    def collect() -> None:
        while data := os.read(read, 65536):
            start = output.rfind(b"\n") + 1
            output.extend(data)
            for line in output[start:].splitlines():
                stage = _STAGES.get(line.decode("utf-8", "replace").removeprefix(MARK))
                if stage is not None:
                    progress(stage)

    collector = threading.Thread(target=collect)
    collector.start()
    try:
        with open(os.devnull, "rb") as stdin:
            status = run_with_streams(plan, (stdin.fileno(), write, 2))
    finally:
        os.close(write)
        collector.join()
        os.close(read)
    return status, bytes(output)


def _read_report(path: Path) -> dict[str, Any]:
    """The machine's own report, empty when it wrote none."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def document(result: dict[str, Any], found: list[Finding], in_guest: list[Finding]) -> dict[str, Any]:
    """The demo's outcome as JSON-able data."""
    return {
        "ok": all(finding.ok for finding in found + in_guest),
        "evidence": _as_json(found),
        "guest_evidence": _as_json(in_guest),
        **{name: value for name, value in result.items() if name != "sections"},
    }


def _as_json(found: list[Finding]) -> list[dict[str, Any]]:
    return [{"what": finding.what, "ok": finding.ok, "lines": list(finding.lines)} for finding in found]


def show(result: dict[str, Any], found: list[Finding], in_guest: list[Finding]) -> None:
    """The report for people."""
    kernel = result["kernel"]
    _show_findings(f"Linux {kernel['version']} ({kernel['name']}) as the root partition", found)
    if in_guest:
        _show_findings("A Linux guest in a child partition: rootvisor vmm, in the root partition", in_guest)
    click.echo(table(summary(result), ("layer", "what ran", "time", "what it cost")))
    missing = sum(not finding.ok for finding in found + in_guest)
    click.echo()
    if missing:
        _show_console(result)
        pieces = "1 piece of evidence is" if missing == 1 else f"{missing} pieces of evidence are"
        say(f"rootvisor: {pieces} missing; the kernel's log may say why: rootvisor run -- dmesg")
        return
    click.echo("Next:")
    click.echo(table([(f"  {command}", f"# {purpose}") for purpose, command in _NEXT]))


def _show_findings(title: str, found: list[Finding]) -> None:
    click.echo(click.style(title, bold=True))
    for finding in found:
        click.echo(f"{mark('ok' if finding.ok else 'missing')} {finding.what}")
        for line in finding.lines:
            click.echo(f"    {click.style(line, dim=True)}")
    click.echo()


def _show_console(result: dict[str, Any]) -> None:
    """What the VMM and the guest's kernel printed before the guest spoke: there the reason stands, if anywhere."""
    for line in guest_parts(result["sections"].get("guest", []))[""][-_CONSOLE_LINES:]:
        say(f"    {line}")


def summary(result: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """A row for each layer, as far as it reported, more rows for what it did."""
    report, engine, kernel = result["report"], result["engine"], result["kernel"]
    rows = [("engine", f"{engine['name']}: {engine['reason']}", f"{result['wall_s']:.1f} s", "")]
    boot = report.get("boot_to_userspace_s")
    root = f"Linux {kernel['version']}, {result['vps']} VPs"
    up = f"up in {boot:.2f} s" if isinstance(boot, (int, float)) else ""
    exits, calls = report.get("exits") or {}, report.get("hypercalls") or {}
    rows.append(("root partition", root, up, f"exits {_counts(exits)}" if exits else ""))
    if calls:
        rows.append(("", "", "", f"hypercalls {_counts(calls)}"))
    facts = result["vmm"]
    if facts:
        first, total = facts.get("first-output-s", 0.0), facts.get("total-s", 0.0)
        handled = guest_exits(result["counters"])
        rows.append(
            (
                "guest",
                f"Linux {kernel['version']}, 1 VP, {MEMORY_MIB} MiB",
                f"up in {first:.2f} s, {total:.2f} s in all",
                f"exits to the VMM {_counts(handled)}" if handled else "",
            )
        )
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
