# SPDX-License-Identifier: Apache-2.0
"""`rootvisor bench`: boots and exits side by side with QEMU and with a loop in C, on one engine in one run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click

from rootvisor.bench import boot as boots
from rootvisor.bench import inside
from rootvisor.bench.probe import KINDS, elf_image
from rootvisor.bench.verdict import Target, targets
from rootvisor.boot.busybox import find_busybox
from rootvisor.boot.errors import BootError
from rootvisor.boot.initramfs import STREAMS_TTY, InitRequest, build_base, request_archive
from rootvisor.boot.kernel import probe_kernel
from rootvisor.cli import options as types
from rootvisor.cli.description import KernelImage, RunDescription
from rootvisor.cli.engine import EngineChoice, choose_engine
from rootvisor.cli.errors import OWN_FAILURE, UserError
from rootvisor.cli.help import DocumentedCommand, debug_option, json_option, option
from rootvisor.cli.kernel_choice import choose_kernel
from rootvisor.cli.launch import encode, inner_argv
from rootvisor.cli.output import Progress, format_ns, mark, print_json, table
from rootvisor.cli.paths import cache_dir, make_cache_dir
from rootvisor.cli.prepare import python_argv
from rootvisor.cli.run_folder import run_folder

_GUEST_MEMORY_MIB = 512
_APPLIANCE_MEMORY_MIB = 2048
_EXAMPLES = (
    ("Everything, three rounds", "rootvisor bench"),
    ("Only the cost of exits, more precisely", "rootvisor bench --only exits --rounds 9"),
    ("For a script", "rootvisor bench --json | jq .targets"),
)
_STATUSES = (
    ("0", "measured, whether or not the targets were met (--strict: all were met)"),
    ("1", "--strict, and a target was not met"),
    (str(OWN_FAILURE), "it could not be measured; the message says why"),
)


@click.command(cls=DocumentedCommand, examples=_EXAMPLES, statuses=_STATUSES)
@option(
    "--kernel",
    type=types.KERNEL,
    default="mshv",
    show_default=True,
    help="Kernel to boot: mshv, stock or a path.",
)
@option("--only", type=click.Choice(["boot", "exits"]), help="Measure only this.")
@option(
    "--rounds", type=click.IntRange(1, 99), default=3, show_default=True, help="Rounds; medians are shown."
)
@option(
    "--count", type=click.IntRange(100, 1_000_000), default=5000, show_default=True, help="Exits in a round."
)
@option("--strict", is_flag=True, help="End with status 1 when a target is not met.")
@option(
    "--engine",
    type=click.Choice(["auto", "kvm", "appliance"]),
    default="auto",
    show_default=True,
    help="This machine's KVM, or an emulated machine that has one.",
)
@json_option
@debug_option
@click.pass_context
def bench(
    ctx: click.Context,
    /,
    kernel: str,
    only: str | None,
    rounds: int,
    count: int,
    strict: bool,
    engine: str,
    as_json: bool,
) -> int:
    """Measure boots against QEMU, and exits against a loop in C.

    Both sides of each comparison run on the same engine, in turn, with the same kernel and initial ramdisk. In the
    appliance only the ratios mean something.
    """
    debug = bool(ctx.find_root().meta.get("rootvisor.debug"))
    with Progress() as progress, run_folder() as folder:
        choice = choose_engine(engine)
        specification: dict[str, Any] = {"debug": debug}
        if only != "boot":
            specification["exits"] = _exits(folder, rounds, count)
        if only != "exits":
            image = choose_kernel(kernel, progress=progress, build=True)
            specification["boot"] = _boots(folder, image, rounds)
        what = " and ".join(name for name in ("exits", "boot") if specification.get(name))
        progress(f"measuring {what} ({rounds} rounds, engine {choice.name})")
        result = _measure(choice, specification, folder)
    found = targets(result)
    document = {
        "engine": {"name": choice.name, "reason": choice.reason},
        **result,
        "targets": [
            {"name": target.name, "value": target.value, "limit": target.limit, "met": target.met}
            for target in found
        ],
    }
    if as_json:
        print_json(document)
    else:
        show(document, found)
    return 1 if strict and not all(target.met for target in found) else 0


def show(document: dict[str, Any], found: list[Target]) -> None:
    """The result for people."""
    click.echo(
        f"engine {document['engine']['name']}, Linux {document['kernel']}, {document['processors']} processors"
    )
    if "boot" in document:
        rows = [
            (
                name,
                f"{row['userspace_s']:.2f} s",
                f"{row['total_s']:.2f} s",
                f"{row['resident_kib'] / 1024:.1f} MiB",
            )
            for name in ("rootvisor", "qemu")
            for row in (document["boot"][name],)
        ]
        head = ("boot", "to user space", "to the end", "resident, without guest memory")
        click.echo("\n" + table(rows, head, frozenset({1, 2, 3})))
    if "exits" in document:
        times = [
            (kind, format_ns(row["rootvisor_ns"]), format_ns(row["c_ns"]), f"{row['ratio']:.2f}")
            for kind in KINDS
            for row in (document["exits"][kind],)
        ]
        click.echo("\n" + table(times, ("exit", "rootvisor", "C loop", "ratio"), frozenset({1, 2, 3})))
    click.echo("\ntargets")
    for target in found:
        state = "ok" if target.met else "missing"
        click.echo(
            f"{mark(state)} {target.name}: {target.value:g}{target.unit}, at most {target.limit:g}{target.unit}"
        )


def _exits(folder: Path, rounds: int, count: int) -> dict[str, Any]:
    """What `bench.exits.measure` is given."""
    image = folder / "probe.elf"
    image.write_bytes(elf_image(count))
    return {"image": str(image), "library": compile_loop(), "count": count, "rounds": rounds}


def compile_loop() -> str:
    """The path of the compiled C loop, kept in the cache; `UserError` without a compiler."""
    source = Path(inside.__file__).with_name("exit_loop.c")
    content = source.read_bytes()
    target = make_cache_dir("bench") / f"exit_loop-{hashlib.sha256(content).hexdigest()[:16]}.so"
    if target.exists():
        return str(target)
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise UserError("there is no C compiler for the reference loop", "sudo apt-get install gcc libc6-dev")
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    done = subprocess.run(
        [compiler, "-O2", "-shared", "-fPIC", "-o", str(draft), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[0]
        raise UserError(
            f"the reference loop does not compile: {reason}", "sudo apt-get install gcc libc6-dev"
        )
    draft.replace(target)
    return str(target)


def _boots(folder: Path, image: KernelImage, rounds: int) -> dict[str, Any]:
    """What `bench.boot.measure` is given: two command lines that boot the same things."""
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        raise UserError(
            "there is no qemu-system-x86_64 to compare with", "sudo apt-get install qemu-system-x86"
        )
    base, request = _ramdisk(folder, image)
    description = RunDescription(
        kernel=image, initrds=(base, request), append="quiet", vps=1, memory_bytes=_GUEST_MEMORY_MIB << 20,
        rootfs=None, rootfs_path=None, command=None, tty=False, disks=(), devices=(), scheduler="hypervisor",
        trace=None, timeout_s=None, console_log=None, on_reboot="exit",
    )  # fmt: skip
    path = folder / "description"
    path.write_bytes(encode(description))
    both = folder / "initrd"
    both.write_bytes(Path(base).read_bytes() + Path(request).read_bytes())
    return {
        "rootvisor": inner_argv(str(path), False),
        "qemu": qemu_argv(qemu, qemu_kernel(image), str(both)),
        "rounds": rounds,
    }


def _ramdisk(folder: Path, image: KernelImage) -> tuple[str, str]:
    """The agent's ramdisk, without modules: it says that user space is there, and powers off."""
    cache = str(cache_dir() / "initramfs")
    try:
        base = build_base(find_busybox(cache), None, (), cache)
        content = request_archive(
            InitRequest(argv=("true",), streams=STREAMS_TTY, tty="ttyS0", control=False)
        )
    except BootError as error:
        raise UserError(str(error)) from error
    request = folder / "request.cpio"
    request.write_bytes(content)
    return base, str(request)


def qemu_kernel(image: KernelImage) -> str:
    """The image that QEMU starts fastest: the ELF one if it has a PVH entry, else the bzImage."""
    try:
        if image.vmlinux is not None and probe_kernel(image.vmlinux).pvh_entry is not None:
            return image.vmlinux
    except BootError:
        pass
    return image.image


def qemu_argv(qemu: str, kernel: str, initrd: str) -> list[str]:
    """The QEMU to compare with: a q35 with nothing but a serial port, its memory shared as ours is."""
    return [
        qemu, "-M", "q35,memory-backend=ram", "-accel", "kvm", "-cpu", boots.QEMU_CPU, "-smp", "1",
        "-m", str(_GUEST_MEMORY_MIB),
        "-object", f"memory-backend-memfd,id=ram,size={_GUEST_MEMORY_MIB}M,share=on",
        "-no-user-config", "-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio",
        "-kernel", kernel, "-initrd", initrd, "-append", "console=ttyS0 quiet rdinit=/init",
    ]  # fmt: skip


def _measure(engine: EngineChoice, specification: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run the measuring process on the engine; its result. `UserError` when it fails."""
    path = folder / "specification.json"
    path.write_text(json.dumps(specification), encoding="utf-8")
    argv = [*python_argv(), str(Path(inside.__file__)), str(path)]
    output = folder / "result"
    with output.open("wb") as stdout, open(os.devnull, "rb") as stdin:
        streams = (stdin.fileno(), stdout.fileno(), 2)
        if engine.name == "appliance":
            status = _run_in_appliance(argv, streams)
        else:
            status = subprocess.run(argv, stdin=streams[0], stdout=streams[1], check=False).returncode
    lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if status or not lines:
        raise UserError(f"the measurement ended with status {status}", "the lines above say why; try --debug")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def _run_in_appliance(argv: list[str], streams: tuple[int, int, int]) -> int:
    from rootvisor.appliance import ApplianceError, Request, run

    try:
        return run(
            Request(
                argv=argv, cwd="/", env=dict(os.environ), streams=streams, memory_mib=_APPLIANCE_MEMORY_MIB,
                cpus=max(1, min(2, len(os.sched_getaffinity(0)))),
            )
        )  # fmt: skip
    except ApplianceError as error:
        raise UserError(str(error)) from error
