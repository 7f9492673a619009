# SPDX-License-Identifier: Apache-2.0
"""`rootvisor bench`: how quick the hypervisor is, side by side with QEMU and with a C loop."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import click

from rootvisor.cli.engine import choose_engine
from rootvisor.cli.errors import OWN_FAILURE, UserError
from rootvisor.cli.help import (
    DocumentedCommand,
    DocumentedCommandWithParts,
    debug_option,
    json_option,
    option,
)
from rootvisor.cli.output import Progress, print_json, table
from rootvisor.cli.partition_options import engine_option, kernel_option
from rootvisor.cli.run_folder import run_folder

_EXAMPLES = (
    ("Measure boots and exits; a few minutes", "rootvisor bench"),
    (
        "Only the targets that are missed",
        "rootvisor bench --json | jq '.targets[] | select(.passed == false)'",
    ),
)
_CHILDREN_EXAMPLES = (
    ("Measure child partitions; five to ten minutes", "rootvisor bench children"),
    (
        "Only the targets that are missed",
        "rootvisor bench children --json | jq '.targets[] | select(.passed == false)'",
    ),
)
_VMM_EXAMPLES = (
    ("Measure our VMM; ten to fifteen minutes", "rootvisor bench vmm"),
    ("Figures for a program", "rootvisor bench vmm --json | jq .targets"),
)
_GUEST_EXAMPLES = (
    ("Measure what a guest pays for the interface; some minutes", "rootvisor bench guest"),
    ("How late timers are", "rootvisor bench guest --json | jq .us.rootvisor.timer"),
)
_STATUSES = (
    ("0", "it measured, whether the targets are met or not"),
    (str(OWN_FAILURE), "it could not measure; the message says what mends it"),
)
_COLOURS = {"pass": "green", "miss": "red"}


@click.group(cls=DocumentedCommandWithParts, examples=_EXAMPLES, statuses=_STATUSES)
@option(
    "--runs", type=click.IntRange(1, 100), default=5, show_default=True, help="Boots of each side, in turns."
)
@option("--only", type=click.Choice(["boots", "exits"]), help="Measure one of the two.")
@kernel_option()
@engine_option()
@json_option
@debug_option
@click.pass_context
def bench(
    ctx: click.Context,
    runs: int,
    only: Literal["boots", "exits"] | None,
    kernel: str,
    engine: str,
    as_json: bool,
) -> None:
    """Measure boot time, memory and the cost of exits.

    The root partition and qemu-system-x86_64 (q35, KVM) boot the same kernel and user space in turns, on the same
    engine, in one run. Exits are compared with a C program that makes the same ioctl and is compiled for it. Absolute
    numbers depend on the machine, so targets are ratios; missing one is no failure.
    """
    if ctx.invoked_subcommand is not None:
        return
    from rootvisor.bench.targets import document, rows

    chosen, results, version = _measure(runs, only, kernel, engine)
    if as_json:
        print_json(
            {"engine": {"name": chosen.name, "reason": chosen.reason}, "kernel": version, **document(results)}
        )
        return
    click.echo(f"engine {chosen.name} ({chosen.reason}); kernel {version}, 1 VP, 512 MiB, `quiet`\n")
    _show(rows(results))
    for line in _remarks(results):
        click.echo(line)


@bench.command(cls=DocumentedCommand, examples=_CHILDREN_EXAMPLES, statuses=_STATUSES)
@option(
    "--runs", type=click.IntRange(1, 20), default=3, show_default=True, help="Guests of QEMU on each side."
)
@engine_option()
@json_option
@debug_option
def children(runs: int, engine: str, as_json: bool) -> None:
    """Measure child partitions: guests under QEMU, intercepts, memory.

    A VMM in the root partition, a hundred lines of C, and an unmodified QEMU do through /dev/mshv what the same
    programs do with KVM on the same engine, in one run.
    """
    from rootvisor.bench.children import COUNT
    from rootvisor.bench.children_rows import document, rows

    chosen, results, version = _measure_children(runs, engine)
    if as_json:
        print_json(
            {
                "engine": {"name": chosen.name, "reason": chosen.reason},
                "kernel": version,
                **document(results, COUNT),
            }
        )
        return
    click.echo(f"engine {chosen.name} ({chosen.reason}); root and guests: kernel {version}, 1 VP each\n")
    _show(rows(results, COUNT))
    click.echo("")
    if results.get("qemu"):
        click.echo(f"No guests under QEMU: {results['qemu']}")
    click.echo("Guests under QEMU: medians. Events and lives: minimum over the guests.")
    for problem in results["problems"]:
        click.echo(f"Failed: {problem}")


@bench.command(cls=DocumentedCommand, examples=_VMM_EXAMPLES, statuses=_STATUSES)
@option(
    "--runs",
    type=click.IntRange(1, 20),
    default=3,
    show_default=True,
    help="Guests of each kind, on each side.",
)
@engine_option()
@json_option
@debug_option
def vmm(runs: int, engine: str, as_json: bool) -> None:
    """Measure our VMM: boots, snapshots, disk, network.

    `rootvisor vmm` and an unmodified QEMU (-M microvm -accel mshv) run the same guest in the same root partition, in
    turns: same kernel, initial ramdisk and disk image. QEMU's network is its own (user), ours is passt.
    """
    from rootvisor.bench.vmm_rows import document, rows

    chosen, results, version = _measure_vmm(runs, engine)
    if as_json:
        print_json(
            {"engine": {"name": chosen.name, "reason": chosen.reason}, "kernel": version, **document(results)}
        )
        return
    click.echo(f"engine {chosen.name} ({chosen.reason}); root and guests: kernel {version}\n")
    _show(rows(results))
    click.echo("")
    if results.get("qemu"):
        click.echo(f"No column for QEMU: {results['qemu']}")
    click.echo("Medians. Resident memory is without guest memory.")
    for problem in results["problems"]:
        click.echo(f"Failed: {problem}")


@bench.command(cls=DocumentedCommand, examples=_GUEST_EXAMPLES, statuses=_STATUSES)
@option(
    "--runs", type=click.IntRange(1, 20), default=3, show_default=True, help="Guests on each side, in turns."
)
@engine_option()
@json_option
@debug_option
def guest(runs: int, engine: str, as_json: bool) -> None:
    """Measure the guest interface: hypercalls, SynIC, timers, IPIs, flushes.

    A bare-metal kernel measures itself as a guest (`rootvisor run --as guest`) and under QEMU, where KVM emulates the
    same interface in the kernel.
    """
    from rootvisor.bench.interface_rows import document, rows

    chosen, results = _measure_guest(runs, engine)
    if as_json:
        print_json({"engine": {"name": chosen.name, "reason": chosen.reason}, **document(results)})
        return
    click.echo(f"engine {chosen.name} ({chosen.reason}); 4 VPs\n")
    _show(rows(results))
    click.echo("")
    if results.get("qemu"):
        click.echo(f"No column for KVM: {results['qemu']}")
    click.echo("Calls: minimum over the rounds.")
    for problem in results["problems"]:
        click.echo(f"Failed: {problem}")


def _measure_guest(runs: int, engine: str) -> tuple[Any, dict[str, Any]]:
    from rootvisor.bench.interface import MEMORY_BYTES, VPS, InterfaceRequest, measure
    from rootvisor.bench.outer import BenchError
    from rootvisor.cli.description import RunOptions
    from rootvisor.cli.launch import argv_in_folder
    from rootvisor.cli.prepare import Standard, prepare, python_argv

    with Progress() as progress, run_folder() as folder:
        chosen = choose_engine(engine)

        def argv(kernel: str) -> list[str]:
            options = RunOptions(
                kernel=kernel, role="guest", vps=VPS, memory_bytes=MEMORY_BYTES, engine=chosen.name
            )
            plan = prepare(options, progress=progress, standard=Standard(False, False))
            place = Path(folder) / "guest"
            place.mkdir()
            return argv_in_folder(plan, place)

        request = InterfaceRequest(runs=runs, python=python_argv(), argv=argv)
        try:
            results = measure(request, folder, appliance=chosen.name == "appliance", progress=progress)
        except BenchError as error:
            raise UserError(str(error), error.mend) from error
    return chosen, results


def _measure_vmm(runs: int, engine: str) -> tuple[Any, dict[str, Any], str]:
    from rootvisor.bench.vmm import ROOT_MIB, VmmRequest, command_of_vmm, measure

    def run(folder: Path, request: dict[str, Any], appliance: bool, progress: Progress) -> dict[str, Any]:
        wanted = VmmRequest(runs=runs, vmm=command_of_vmm(sys.executable), **request)
        return measure(wanted, folder, appliance=appliance, progress=progress)

    return _measure_in_root(engine, ROOT_MIB, run)


def _measure_children(runs: int, engine: str) -> tuple[Any, dict[str, Any], str]:
    from rootvisor.bench.children import ROOT_MIB, ChildrenRequest, measure

    def run(folder: Path, request: dict[str, Any], appliance: bool, progress: Progress) -> dict[str, Any]:
        return measure(ChildrenRequest(runs=runs, **request), folder, appliance=appliance, progress=progress)

    return _measure_in_root(engine, ROOT_MIB, run)


def _measure_in_root(
    engine: str,
    root_mib: int,
    run: Callable[[Path, dict[str, Any], bool, Progress], dict[str, Any]],
) -> tuple[Any, dict[str, Any], str]:
    """Engine, results and kernel of a bench in a root partition of the kernel mshv, with QEMU beside where it is to be
    had."""
    from rootvisor import kernels
    from rootvisor.bench.outer import BenchError
    from rootvisor.cli.description import RunOptions
    from rootvisor.cli.kernel_choice import kernel_error
    from rootvisor.cli.launch import argv_in_folder
    from rootvisor.cli.prepare import Standard, prepare, python_argv
    from rootvisor.peers.errors import PeerError
    from rootvisor.peers.qemu import ensure

    with Progress() as progress, run_folder() as folder:
        chosen = choose_engine(engine)
        try:
            kernel = kernels.ensure("mshv", progress)
        except kernels.KernelError as error:
            raise kernel_error(error) from error
        qemu, problem = None, None
        try:
            qemu = str(ensure(progress).program)
        except PeerError as error:
            problem = str(error)

        def root_argv(command: Sequence[str]) -> list[str]:
            options = RunOptions(
                kernel="mshv", memory_bytes=root_mib << 20, engine=chosen.name, command=tuple(command)
            )
            plan = prepare(options, progress=progress, standard=Standard(False, False))
            place = Path(folder) / "root"
            place.mkdir()
            return argv_in_folder(plan, place)

        request = {
            "kernel": kernel,
            "qemu": qemu,
            "qemu_problem": problem,
            "python": python_argv(),
            "root_argv": root_argv,
        }
        try:
            results = run(folder, request, chosen.name == "appliance", progress)
        except BenchError as error:
            raise UserError(str(error), error.mend) from error
    return chosen, results, f"{kernel.name} {kernel.version}"


def _measure(
    runs: int, only: Literal["boots", "exits"] | None, kernel: str, engine: str
) -> tuple[Any, dict[str, Any], str]:
    from rootvisor.bench.outer import BenchError, BenchRequest, measure
    from rootvisor.cli.kernel_choice import choose_kernel
    from rootvisor.cli.launch import inner_argv
    from rootvisor.cli.prepare import python_argv

    with Progress() as progress, run_folder() as folder:
        chosen = choose_engine(engine)
        image = choose_kernel(kernel, progress=progress, build=True)
        request = BenchRequest(
            image=image.image,
            vmlinux=image.vmlinux,
            name=image.name,
            version=image.version,
            runs=runs,
            python=python_argv(),
            machine_argv=inner_argv("", False)[:-1],
            only=only,
        )
        try:
            results = measure(request, folder, appliance=chosen.name == "appliance", progress=progress)
        except BenchError as error:
            raise UserError(str(error), error.mend) from error
    return chosen, results, f"{image.name} {image.version}"


def _show(found: list[Any]) -> None:
    """The table for people."""
    from rootvisor.bench.report import HEAD, RIGHT, cells

    lines: list[tuple[str, ...]] = []
    group = ""
    for row in found:
        if row.group != group:
            group = row.group
            lines.append((group, *[""] * (len(HEAD) - 1)))
        lines.append(cells(row))
    for line in table(lines, HEAD, RIGHT).splitlines():
        word = line.rsplit(" ", 1)[-1]
        colour = _COLOURS.get(word)
        click.echo(line.removesuffix(word) + click.style(word, fg=colour) if colour else line)


def _remarks(results: dict[str, Any]) -> list[str]:
    """What the table does not say: empty columns, QEMU's better image, failures."""
    lines = [""]
    if results.get("qemu"):
        lines.append(f"No column for QEMU: {results['qemu']}")
    if results.get("gcc"):
        lines.append(f"No column for the C loop: {results['gcc']}")
    images = results.get("qemu_images") or {}
    if len(images) == 2:
        best = {"image": "bzImage", "vmlinux": "ELF (PVH)"}[results["qemu_image"]]
        lines.append(
            f"QEMU boots the {best}, its better one (bzImage {images['image']:.2f} s, ELF {images['vmlinux']:.2f} s)"
        )
    lines.append("Boots: medians. Exits: minimum over the rounds. Resident memory is without guest memory.")
    lines += [f"Failed: {problem}" for problem in results.get("problems", [])]
    return lines
