# SPDX-License-Identifier: Apache-2.0
"""`rootvisor peer`: VMMs that others wrote, and guests that boot with them in the root partition."""

from __future__ import annotations

import os
import threading
from typing import Any

import click

from rootvisor.cli.errors import OWN_FAILURE, UserError
from rootvisor.cli.help import DocumentedCommand, DocumentedGroup, debug_option, json_option, option
from rootvisor.cli.kernel_choice import NAMES, cached_kernel
from rootvisor.cli.output import Progress, mark, print_json
from rootvisor.cli.partition_options import engine_option, scheduler_option
from rootvisor.cli.run_folder import run_folder
from rootvisor.peers.guest import MACHINES

_GUEST = "Guests"
_HOW = "How they run"
_FAILED = 1
_APPLIANCE_MIB = 1024
_ROOT_MIB = 640
_QEMU_MIB = 128
"""Memory of one QEMU besides that of its guest."""
_MARGIN_S = 120.0

_STATUSES = (
    ("0", "every guest did all it was to do, and the root had nothing to complain about"),
    (str(_FAILED), "a guest did not, or the root complained"),
    (str(OWN_FAILURE), "it did not run; the message says what mends it"),
)


@click.group(
    cls=DocumentedGroup,
    examples=(
        ("Fetch QEMU with -accel mshv (once, 40 MB)", "rootvisor peer fetch"),
        ("Boot a guest with it in the root partition", "rootvisor peer boot"),
        (
            "By hand",
            "rootvisor run -- $(rootvisor peer path) -accel mshv -M microvm -nographic "
            "-kernel $(rootvisor kernel path mshv) -append console=ttyS0",
        ),
    ),
)
def peer() -> None:
    """Use an unmodified QEMU as VMM in the root partition.

    QEMU comes from the distribution, with every library that it needs, into the cache; nothing is installed.
    """


@peer.command(cls=DocumentedCommand)
@option("--refresh", is_flag=True, help="Ask the mirror, even if there is one in the cache.")
@json_option
@debug_option
def fetch(refresh: bool, as_json: bool) -> None:
    """Fetch QEMU into the cache if no fitting one is there or installed, and print the path of its program."""
    with Progress() as progress:
        qemu = _qemu(progress, refresh)
    if as_json:
        print_json({"version": qemu.version, "program": str(qemu.program), "origin": qemu.origin})
    else:
        click.echo(qemu.program)


@peer.command(cls=DocumentedCommand)
@debug_option
def path() -> None:
    """Print the path of the QEMU program."""
    from rootvisor.peers.qemu import find

    qemu = find()
    if qemu is None:
        raise UserError("QEMU with -accel mshv is not on this machine", "fetch it with: rootvisor peer fetch")
    click.echo(qemu.program)


@peer.command(
    cls=DocumentedCommand,
    statuses=_STATUSES,
    examples=(
        ("One guest: microvm, the mshv kernel, one processor", "rootvisor peer boot"),
        (
            "Every combination",
            "rootvisor peer boot --machine microvm,q35 --kernel mshv,stock --vps 1,2,4",
        ),
        ("The same guest with QEMU's KVM on the same engine", "rootvisor peer boot --accel kvm"),
        ("Fifty boots in a row", "rootvisor peer boot --times 50"),
    ),
)
@option(
    "--machine",
    "machines",
    group=_GUEST,
    default="microvm",
    show_default=True,
    metavar="NAMES",
    help="QEMU's machine: microvm, q35, or both (with a comma).",
)
@option(
    "--kernel",
    "kernel_names",
    group=_GUEST,
    default="mshv",
    show_default=True,
    metavar="NAMES",
    help="mshv, stock, or both (with a comma).",
)
@option(
    "--vps",
    "counts",
    group=_GUEST,
    default="1",
    show_default=True,
    metavar="NUMBERS",
    help="Processors of the guest; several numbers with commas.",
)
@option(
    "--times",
    group=_HOW,
    type=click.IntRange(1, 1000),
    default=1,
    show_default=True,
    help="How often all of it.",
)
@option(
    "--parallel",
    group=_HOW,
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Guests at the same time.",
)
@option(
    "--guest-memory",
    group=_GUEST,
    type=click.IntRange(64, 65536),
    default=256,
    show_default=True,
    help="MiB of a guest.",
)
@option(
    "--append",
    group=_GUEST,
    default="",
    metavar="TEXT",
    help="More words for the guest's kernel command line.",
)
@option(
    "--accel",
    group=_HOW,
    type=click.Choice(["mshv", "kvm"]),
    default="mshv",
    show_default=True,
    help="What QEMU uses.",
)
@scheduler_option(group=_HOW, help="Who schedules the guest's processors.")
@option(
    "--root-vps",
    group=_HOW,
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Processors of the root.",
)
@option(
    "--guest-timeout",
    group=_HOW,
    type=click.FloatRange(1),
    default=180.0,
    show_default=True,
    help="Seconds per guest.",
)
@option(
    "--trace", group=_HOW, type=click.Path(), help="Write a trace of the hypervisor (see `rootvisor trace`)."
)
@engine_option(group=_HOW)
@json_option
@debug_option
def boot(
    machines: str,
    kernel_names: str,
    counts: str,
    times: int,
    parallel: int,
    guest_memory: int,
    append: str,
    accel: str,
    scheduler: str,
    root_vps: int,
    guest_timeout: float,
    trace: str | None,
    engine: str,
    as_json: bool,
) -> int:
    """Boot Linux guests with QEMU in the root partition, and look at what they do.

    Each guest lets all its processors work, computes the checksum of its disk, fetches a page from a web server in
    the root, and powers off. A failed guest's console is shown.
    """
    from rootvisor.peers import job

    with Progress() as progress:
        qemu = _qemu(progress, False)
        guests = job.combinations(
            [cached_kernel(name, progress) for name in _choices("--kernel", kernel_names, NAMES)],
            _choices("--machine", machines, MACHINES),
            _numbers("--vps", counts),
        )
    request = job.Request(
        guests=guests,
        program=str(qemu.program),
        accelerator=accel,
        scheduler=scheduler,
        times=times,
        parallel=parallel,
        memory_mib=guest_memory,
        timeout_s=guest_timeout,
        append=append,
    )
    boots: list[dict[str, Any]] = []
    root: dict[str, Any] = {}

    def take(line: str) -> None:
        found = job.read_line(line)
        if found is None:
            if line.strip():
                click.echo(line, err=True)
        elif found[0] == "root":
            root.update(found[1])
        else:
            boots.append(found[1])
            if not as_json:
                _show(len(boots), found[1])

    limit = guest_timeout * len(guests) * times / parallel + _MARGIN_S
    status, engine_name = _run(request, take, scheduler, root_vps, limit, trace, engine)
    if not root:
        raise UserError(
            f"the root partition ended with status {status} before all guests had run",
            "see its log: rootvisor run --console stderr -- true" if accel == "mshv" else "",
        )
    problems = root.get("problems", [])
    good = not problems and all(one["ok"] for one in boots)
    if as_json:
        print_json(
            {
                "ok": good,
                "qemu": {"version": qemu.version, "origin": qemu.origin},
                "engine": engine_name,
                "accelerator": accel,
                "scheduler": scheduler if accel == "mshv" else None,
                "root_problems": problems,
                "boots": boots,
            }
        )
    else:
        for problem in problems:
            click.echo(f"{mark('missing')} the root: {problem}")
        passed = sum(one["ok"] for one in boots)
        click.echo(f"{passed} of {len(boots)} guests passed; QEMU {qemu.version}, engine {engine_name}")
    return 0 if good else _FAILED


def _run(
    request: Any,
    take: Any,
    scheduler: str,
    root_vps: int,
    limit: float,
    trace: str | None,
    engine: str,
) -> tuple[int, str]:
    """Run the job where its accelerator is; the exit status, and the engine's name. `take` gets each line."""
    from rootvisor.cli.prepare import python_argv
    from rootvisor.peers.errors import PeerError
    from rootvisor.peers.job import prepare

    read, write = os.pipe()

    def watch() -> None:
        with open(read, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                take(line.rstrip("\n"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        with run_folder() as folder, open(os.devnull, "rb") as stdin:
            try:
                argv = prepare(request, folder, python_argv())
            except PeerError as error:
                raise UserError(error.message, error.mend) from error
            streams = (stdin.fileno(), write, 2)
            memory = request.parallel * (request.memory_mib + _QEMU_MIB)
            if request.accelerator == "mshv":
                return _in_root(argv, streams, memory, scheduler, root_vps, limit, trace, engine)
            return _beside_kvm(argv, streams, memory, limit, engine)
    finally:
        os.close(write)
        watcher.join(10.0)


def _in_root(
    argv: list[str],
    streams: tuple[int, int, int],
    memory_mib: int,
    scheduler: str,
    root_vps: int,
    limit: float,
    trace: str | None,
    engine: str,
) -> tuple[int, str]:
    from rootvisor.cli.description import RunOptions
    from rootvisor.cli.launch import run_with_streams
    from rootvisor.cli.prepare import Standard, prepare

    options = RunOptions(
        kernel="mshv",
        vps=root_vps,
        memory_bytes=(_ROOT_MIB + memory_mib) << 20,
        scheduler=scheduler,
        engine=engine,
        timeout_s=limit,
        trace=trace,
        command=tuple(argv),
    )
    with Progress() as progress:
        plan = prepare(options, progress=progress, standard=Standard(False, False))
    return run_with_streams(plan, streams), plan.engine.name


def _beside_kvm(
    argv: list[str], streams: tuple[int, int, int], memory_mib: int, limit: float, engine: str
) -> tuple[int, str]:
    import subprocess

    from rootvisor.appliance import ApplianceError, Request, run
    from rootvisor.cli.engine import choose_engine

    chosen = choose_engine(engine)
    if chosen.name == "kvm":
        done = subprocess.run(
            argv, stdin=streams[0], stdout=streams[1], stderr=streams[2], timeout=limit, check=False
        )
        return done.returncode, chosen.name
    try:
        status = run(
            Request(
                argv=argv,
                cwd="/",
                env=dict(os.environ),
                streams=streams,
                memory_mib=_APPLIANCE_MIB + memory_mib,
                timeout=limit,
            )
        )
    except ApplianceError as error:
        raise UserError(str(error)) from error
    return status, chosen.name


def _show(number: int, result: dict[str, Any]) -> None:
    """One guest's line; when it failed, why, and the end of what it printed."""
    up = result["times"].get("up")
    first = f"user space {up:6.2f} s" if up is not None else "no user space"
    click.echo(
        f"{mark('ok' if result['ok'] else 'missing')} {number:3d} {result['name']:<22} {first:<20} "
        f"total {result['total_s']:6.2f} s"
    )
    if result["ok"]:
        return
    for problem in result["problems"]:
        click.echo(f"      {problem}")
    for name in ("console", "stderr"):
        for line in result[name].replace("\r", "").splitlines()[-40:]:
            click.echo(click.style(f"      {name}: {line}", dim=True))


def _qemu(progress: Progress, refresh: bool) -> Any:
    from rootvisor.peers.errors import PeerError
    from rootvisor.peers.qemu import ensure

    try:
        return ensure(progress, refresh)
    except PeerError as error:
        raise UserError(error.message, error.mend) from error


def _choices(name: str, text: str, allowed: tuple[str, ...]) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        if word not in allowed:
            raise click.BadParameter(f"{word!r} is not one of {', '.join(allowed)}", param_hint=name)
    if not words:
        raise click.BadParameter("nothing given", param_hint=name)
    return words


def _numbers(name: str, text: str) -> list[int]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isdecimal() and 1 <= int(word) <= 64 for word in words):
        raise click.BadParameter("numbers from 1 to 64, with commas between them", param_hint=name)
    return [int(word) for word in words]
