# SPDX-License-Identifier: Apache-2.0
"""`rootvisor bench`: how quick the hypervisor is, side by side with QEMU and with a C loop."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import click

from rootvisor.cli.errors import OWN_FAILURE
from rootvisor.cli.help import (
    DocumentedCommand,
    DocumentedCommandWithParts,
    debug_option,
    json_option,
    option,
)
from rootvisor.cli.partition_options import engine_option, kernel_option

_F = TypeVar("_F", bound=Callable[..., Any])

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
_HARDWARE_EXAMPLES = (
    ("Measure physical devices, emulated ones; ten minutes", "rootvisor bench hardware"),
    ("Throughput and time of one", "rootvisor bench hardware --json | jq .loads"),
)
_STATUSES = (
    ("0", "it measured, whether the targets are met or not"),
    (str(OWN_FAILURE), "it could not measure; the message says what mends it"),
)
_NO_QEMU = {"qemu": "No column for QEMU"}


def _runs_option(help_text: str, default: int = 3, most: int = 20) -> Callable[[_F], _F]:
    """`--runs`: how often what is measured runs."""
    return option("--runs", type=click.IntRange(1, most), default=default, show_default=True, help=help_text)


@click.group(cls=DocumentedCommandWithParts, examples=_EXAMPLES, statuses=_STATUSES)
@_runs_option("Boots of each side, in turns.", default=5, most=100)
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
    from rootvisor.bench.outer import BenchRequest, measure
    from rootvisor.bench.targets import document, rows
    from rootvisor.cli.bench_preparation import preparation
    from rootvisor.cli.bench_report import Measured, report
    from rootvisor.cli.kernel_choice import choose_kernel
    from rootvisor.cli.launch import inner_argv
    from rootvisor.cli.prepare import python_argv

    with preparation(engine) as ready:
        image = choose_kernel(kernel, progress=ready.progress, build=True)
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
        results = measure(request, ready.folder, appliance=ready.in_appliance, progress=ready.progress)
    measured = Measured(ready.engine, results, f"{image.name} {image.version}")
    note = "Boots: medians. Exits: minimum over the rounds. Resident memory is without guest memory."
    report(
        measured,
        rows(results),
        document(results),
        setting=f"kernel {measured.kernel}, 1 VP, 512 MiB, `quiet`",
        missing={**_NO_QEMU, "gcc": "No column for the C loop"},
        notes=[*_better_image(results), note],
        as_json=as_json,
    )


@bench.command(cls=DocumentedCommand, examples=_CHILDREN_EXAMPLES, statuses=_STATUSES)
@_runs_option("Guests of QEMU on each side.")
@engine_option()
@json_option
@debug_option
def children(runs: int, engine: str, as_json: bool) -> None:
    """Measure child partitions: guests under QEMU, intercepts, memory.

    A VMM in the root partition, a few hundred lines of C, and an unmodified QEMU do through /dev/mshv what the same
    programs do with KVM on the same engine, in one run.
    """
    from rootvisor.bench.children import COUNT, ROOT_MIB, measure
    from rootvisor.bench.children_rows import document, rows
    from rootvisor.bench.outer import RootRequest
    from rootvisor.cli.bench_preparation import Preparation, measure_in_root
    from rootvisor.cli.bench_report import report

    def run(ready: Preparation, request: RootRequest) -> dict[str, Any]:
        return measure(request, ready.folder, appliance=ready.in_appliance, progress=ready.progress)

    measured = measure_in_root(engine, ROOT_MIB, runs, run)
    report(
        measured,
        rows(measured.results, COUNT),
        document(measured.results, COUNT),
        setting=f"root and guests: kernel {measured.kernel}, 1 VP each",
        missing={"qemu": "No guests under QEMU"},
        notes=["Guests under QEMU: medians. Events and lives: minimum over the guests."],
        as_json=as_json,
    )


@bench.command(cls=DocumentedCommand, examples=_VMM_EXAMPLES, statuses=_STATUSES)
@_runs_option("Guests of each kind, on each side.")
@engine_option()
@json_option
@debug_option
def vmm(runs: int, engine: str, as_json: bool) -> None:
    """Measure our VMM: boots, snapshots, disk, network.

    `rootvisor vmm` and an unmodified QEMU (-M microvm -accel mshv) run the same guest in the same root partition, in
    turns: same kernel, initial ramdisk and disk image. QEMU's network is its own (user), ours is passt.
    """
    from rootvisor.bench.outer import RootRequest
    from rootvisor.bench.vmm import ROOT_MIB, command_of_vmm, measure
    from rootvisor.bench.vmm_rows import document, rows
    from rootvisor.cli.bench_preparation import Preparation, measure_in_root
    from rootvisor.cli.bench_report import report

    def run(ready: Preparation, request: RootRequest) -> dict[str, Any]:
        vmm = command_of_vmm(sys.executable)
        return measure(request, vmm, ready.folder, appliance=ready.in_appliance, progress=ready.progress)

    measured = measure_in_root(engine, ROOT_MIB, runs, run)
    report(
        measured,
        rows(measured.results),
        document(measured.results),
        setting=f"root and guests: kernel {measured.kernel}",
        missing=_NO_QEMU,
        notes=["Medians. Resident memory is without guest memory."],
        as_json=as_json,
    )


@bench.command(cls=DocumentedCommand, examples=_GUEST_EXAMPLES, statuses=_STATUSES)
@_runs_option("Guests on each side, in turns.")
@engine_option()
@json_option
@debug_option
def guest(runs: int, engine: str, as_json: bool) -> None:
    """Measure the guest interface: hypercalls, SynIC, timers, IPIs, flushes.

    A bare-metal kernel measures itself as a guest (`rootvisor run --as guest`) and under QEMU, where KVM emulates the
    same interface in the kernel.
    """
    from rootvisor.bench.interface import MEMORY_BYTES, VPS, InterfaceRequest, measure
    from rootvisor.bench.interface_rows import document, rows
    from rootvisor.cli.bench_preparation import preparation
    from rootvisor.cli.bench_report import Measured, report
    from rootvisor.cli.description import RunOptions
    from rootvisor.cli.prepare import python_argv

    with preparation(engine) as ready:

        def argv(kernel: str) -> list[str]:
            options = RunOptions(
                kernel=kernel, role="guest", vps=VPS, memory_bytes=MEMORY_BYTES, engine=ready.engine.name
            )
            return ready.machine_argv(options, "guest")

        request = InterfaceRequest(runs=runs, python=python_argv(), argv=argv)
        results = measure(request, ready.folder, appliance=ready.in_appliance, progress=ready.progress)
    report(
        Measured(ready.engine, results),
        rows(results),
        document(results),
        setting=f"{VPS} VPs",
        missing={"qemu": "No column for KVM"},
        notes=["Calls: minimum over the rounds."],
        as_json=as_json,
    )


@bench.command(cls=DocumentedCommand, examples=_HARDWARE_EXAMPLES, statuses=_STATUSES)
@_runs_option("Guests on each side, in turns.")
@json_option
@debug_option
def hardware(runs: int, as_json: bool) -> None:
    """Measure direct hardware: NVMe and network card in the root.

    The root partition and an ordinary guest of qemu-system-x86_64 (-accel kvm -device vfio-pci) have the same two
    devices in turns, with the same kernel and program, in an appliance that emulates the devices.
    """
    from rootvisor.bench.hardware import MEMORY_MIB, HardwareRequest, measure
    from rootvisor.bench.hardware_rows import document, rows
    from rootvisor.cli.bench_preparation import preparation
    from rootvisor.cli.bench_report import Measured, report
    from rootvisor.cli.kernel_choice import cached_kernel
    from rootvisor.cli.launch import inner_argv
    from rootvisor.cli.prepare import python_argv

    with preparation("appliance") as ready:
        kernel = cached_kernel("mshv", ready.progress)
        machine = inner_argv("", False)[:-1]
        request = HardwareRequest(kernel=kernel, machine_argv=machine, runs=runs, python=python_argv())
        results = measure(request, ready.folder, progress=ready.progress)
    measured = Measured(ready.engine, results, f"{kernel.name} {kernel.version}")
    report(
        measured,
        rows(results),
        document(results),
        setting=f"root and guest: kernel {measured.kernel}, 1 VP, {MEMORY_MIB} MiB",
        missing=_NO_QEMU,
        notes=["Medians. One thing at a time, past the page cache."],
        as_json=as_json,
    )


def _better_image(results: dict[str, Any]) -> list[str]:
    """Which image QEMU boots, where it could choose."""
    images = results.get("qemu_images") or {}
    if len(images) != 2:
        return []
    best = {"image": "bzImage", "vmlinux": "ELF (PVH)"}[results["qemu_image"]]
    return [
        f"QEMU boots the {best}, its better one (bzImage {images['image']:.2f} s, ELF {images['vmlinux']:.2f} s)"
    ]
