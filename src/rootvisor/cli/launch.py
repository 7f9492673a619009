# SPDX-License-Identifier: Apache-2.0
"""Start a prepared run: in place of this process (engine kvm), or in the appliance.

The machine runs without site packages and without click (see `inner`). What it reads, the run description and this
run's part of the initial ramdisk, lies in anonymous files that live as long as the process (engine kvm), or in a
folder that is removed at the end (appliance). Either way nothing is left, however the run ends.
"""

from __future__ import annotations

import marshal
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from rootvisor import kernels
from rootvisor.cli import module_archive
from rootvisor.cli.description import RunDescription
from rootvisor.cli.errors import UserError
from rootvisor.cli.paths import source_root
from rootvisor.cli.prepare import RunPlan, python_argv
from rootvisor.cli.ramdisk import base_archive, request_part
from rootvisor.cli.run_folder import run_folder

Place = Callable[[str, bytes], str]
"""Puts a file (name, content) where the machine can read it; gives the path."""

Streams = tuple[int, int, int]

_OUTPUTS = ("trace", "report", "console_log")
"""Fields of the description that name files which the machine writes."""

_APPLIANCE_MEMORY_MIB = 1024
"""Memory of the appliance beyond that of the root partition: its Linux, the hypervisor, page cache."""

_TIMEOUT_MARGIN_S = 30.0
"""The machine ends the run at its timeout; the appliance does so this much later, if the machine could not."""

_KILL_AFTER_S = 5.0


def launch(plan: RunPlan) -> int:
    """Start the run on this process's streams; its exit status.

    With engine kvm a good start does not return: this process becomes the machine, so that signals, streams and
    exit status need no forwarding.
    """
    _hold_kernel(plan)
    if plan.engine.name == "appliance":
        return _in_appliance(plan, (0, 1, 2))
    return become(_local_argv(plan)[0])


def become(argv: list[str]) -> NoReturn:
    """Go on as another program; `UserError` when that cannot be executed."""
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execv(argv[0], argv)
    except OSError as error:
        raise UserError(f"cannot execute {argv[0]}: {(error.strerror or str(error)).lower()}") from error


def run_with_streams(plan: RunPlan, streams: Streams) -> int:
    """Start the run on other streams and wait for its end; its exit status."""
    _hold_kernel(plan)
    if plan.engine.name == "appliance":
        return _in_appliance(plan, streams)
    argv, fds = _local_argv(plan)
    process = subprocess.Popen(argv, stdin=streams[0], stdout=streams[1], stderr=streams[2], pass_fds=fds)
    try:
        status = process.wait()
    finally:
        _end(process)
        for fd in fds:
            os.close(fd)
    return status if status >= 0 else 128 - status


def _hold_kernel(plan: RunPlan) -> None:
    """Nobody removes the run's kernel from the cache while this process, or the machine that it becomes, lives."""
    kernels.hold(Path(plan.description.kernel.image))


def inner_argv(description_path: str, debug: bool) -> list[str]:
    """Command line of the process that is the machine."""
    script = source_root() / "rootvisor" / "cli" / "inner.py"
    return [*python_argv(), str(script), _packages(), description_path, *(["debug"] if debug else [])]


def _packages() -> str:
    """The folder of the packages that the machine needs, or an empty string; it runs without site packages."""
    package = find_spec("iced_x86")
    return str(Path(package.origin).parents[1]) if package is not None and package.origin else ""


def argv_in_folder(plan: RunPlan, folder: Path) -> list[str]:
    """Command line of the process that is the machine, with what it reads in `folder`: for somebody who starts it where
    the engine is."""
    _hold_kernel(plan)
    own = _complete(plan, lambda name, content: _write(folder / name, content))
    return inner_argv(_write(folder / "description", encode(own)), plan.debug)


def encode(description: RunDescription) -> bytes:
    """The description file's content."""
    return marshal.dumps(description.document(), 2)


def _complete(plan: RunPlan, place: Place) -> RunDescription:
    """The description with its initial ramdisks."""
    description = plan.description
    if not plan.agent:
        return description
    devices = description.devices
    # Only a root partition that sees this machine's files can read it, and only there VMMs start.
    modules = module_archive.find_or_write() if description.rootfs == "host" else None
    part = request_part(description.command, description.rootfs, devices, str(modules) if modules else None)
    request = place("request.cpio", part)
    return replace(description, initrds=(base_archive(description.kernel, devices), request))


def _local_argv(plan: RunPlan) -> tuple[list[str], list[int]]:
    """The machine's command line, and the descriptors of the anonymous files in it, which it has to inherit."""
    fds: list[int] = []

    def place(name: str, content: bytes) -> str:
        fds.append(inherited_file(name, content))
        return f"/proc/self/fd/{fds[-1]}"

    description = _complete(plan, place)
    return inner_argv(place("description", encode(description)), plan.debug), fds


def inherited_file(name: str, content: bytes) -> int:
    """The descriptor of an anonymous file, which whom this process becomes or starts has too."""
    fd = os.memfd_create(f"rootvisor-{name}", 0)
    os.set_inheritable(fd, True)
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    return fd


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a machine that still runs (Ctrl-C in this process)."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_KILL_AFTER_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _in_appliance(plan: RunPlan, streams: Streams) -> int:
    """Run the machine in the appliance."""
    from rootvisor.appliance import ApplianceError, Request, run
    from rootvisor.appliance.hardware import display_id, for_request

    description = plan.description
    for disk in description.disks:
        if not os.path.isfile(disk.path):
            raise UserError(
                f"--disk {disk.path}: a block device of this machine is out of the appliance's reach",
                "use an image file",
            )
    with run_folder() as folder:
        own = _complete(plan, lambda name, content: _write(folder / name, content))
        own, results = _redirect_outputs(own, folder)
        writable = [os.path.dirname(disk.path) for disk in own.disks if not disk.readonly]
        if results:
            writable.append(str(folder))
        path = _write(folder / "description", encode(own))
        timeout = None if own.timeout_s is None else own.timeout_s + _TIMEOUT_MARGIN_S
        words_for_qemu, kernel_args, modules = for_request(plan.emulated)
        request = Request(
            argv=inner_argv(path, plan.debug),
            cwd=_folder_or_root(),
            env=dict(os.environ),
            streams=streams,
            tty=own.tty,
            writable=writable,
            memory_mib=(own.memory_bytes >> 20) + _APPLIANCE_MEMORY_MIB,
            timeout=timeout,
            qemu_args=words_for_qemu,
            kernel_args=kernel_args,
            modules=modules,
            picture=None if plan.screenshot is None else (display_id(plan.emulated) or "", plan.screenshot),
        )
        try:
            return run(request)
        except ApplianceError as error:
            raise UserError(str(error)) from error
        finally:
            _collect(results)


def _redirect_outputs(description: RunDescription, folder: Path) -> tuple[RunDescription, dict[Path, str]]:
    """The description with its output files in `folder`, and where each belongs afterwards."""
    results: dict[Path, str] = {}
    changes: dict[str, str] = {}
    for name in _OUTPUTS:
        target: str | None = getattr(description, name)
        if target is not None and target != "stderr":
            results[folder / name] = target
            changes[name] = str(folder / name)
    return (replace(description, **changes) if changes else description), results  # type: ignore[arg-type]


def _collect(results: dict[Path, str]) -> None:
    """Put output files where the user wants them; what the machine did not write is left out."""
    for source, target in results.items():
        if not source.exists():
            continue
        try:
            shutil.copyfile(source, target)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise UserError(f"cannot write {target}: {reason}", "give another file") from error


def _write(path: Path, content: bytes) -> str:
    try:
        path.write_bytes(content)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(
            f"cannot write {path}: {reason}", "make room there, or set ROOTVISOR_CACHE"
        ) from error
    return str(path)


def _folder_or_root() -> str:
    try:
        return os.getcwd()
    except OSError:
        return "/"
