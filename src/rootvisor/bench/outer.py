# SPDX-License-Identifier: Apache-2.0
"""Prepares a bench on this machine and runs its inner part with KVM: here, or in one boot of the appliance."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rootvisor.appliance import ApplianceError, Request
from rootvisor.appliance import run as run_in_appliance
from rootvisor.appliance.hardware import EmulatedDevice, for_request
from rootvisor.bench import exits, guest_code
from rootvisor.kernels import Kernel

_APPLIANCE_MIB = 3072
_DEADLINE_S = 1200.0
_BUDGET_S = 150.0
"""Seconds after which no further round of boots begins (the first is always run)."""


class BenchError(Exception):
    """The bench could not run; `mend` says what helps (may be empty)."""

    def __init__(self, message: str, mend: str = "") -> None:
        super().__init__(message)
        self.mend = mend


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """What is compared: the kernel (`image`, its ELF `vmlinux` or None), how our machine is started (`machine_argv`
    takes a description file as its last word), boots per side and configuration; `only`: boots
    or exits instead of both."""

    image: str
    vmlinux: str | None
    name: str
    version: str
    runs: int
    python: Sequence[str]
    machine_argv: Sequence[str]
    only: Literal["boots", "exits"] | None = None


@dataclass(frozen=True, slots=True)
class RootRequest:
    """What benches in a root partition have in common. `kernel` is the root's and the guests'; `qemu` is a QEMU with
    `-accel mshv`, or None (then `qemu_problem` says why); `runs` is how often each thing is measured."""

    kernel: Kernel
    qemu: str | None
    qemu_problem: str | None
    runs: int
    python: Sequence[str]
    root_argv: Callable[[Sequence[str]], list[str]]
    """The command that boots a root partition, runs a command in it, and gives it its standard streams."""


def measure(
    request: BenchRequest, folder: Path, *, appliance: bool, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Run the bench; `folder` is private, empty and visible in the appliance. Gives the inner part's results, with
    `qemu` and `gcc`: None, or why that column is empty. Raises BenchError."""
    job, missing = _prepare(request, folder)
    path = folder / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    inner = Path(guest_code.__file__).with_name("inner.py").resolve()
    argv = [*request.python, str(inner), str(path)]
    progress("starting the appliance" if appliance else "starting")
    results = run_inner(
        argv,
        folder,
        Path(job["results"]),
        appliance=appliance,
        memory_mib=_APPLIANCE_MIB,
        deadline_s=_DEADLINE_S,
        progress=progress,
    )
    return results | missing


def run_inner(
    argv: list[str],
    folder: Path,
    results: Path,
    *,
    appliance: bool,
    memory_mib: int,
    deadline_s: float,
    progress: Callable[[str], None],
    devices: tuple[EmulatedDevice, ...] = (),
) -> dict[str, Any]:
    """Run an inner part, here or in an appliance with `memory_mib` and emulated `devices`; the document that it wrote
    to `results`, a file in `folder`. `progress` gets its lines. Raises BenchError."""
    status, words = _run(argv, folder, memory_mib if appliance else None, deadline_s, progress, devices)
    try:
        found: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        last = words.strip().splitlines()
        detail = last[-1].removeprefix("rootvisor: ") if last else f"status {status}"
        raise BenchError(f"the bench failed: {detail}", "is another KVM user running? Try again") from None
    return found


def _prepare(request: BenchRequest, folder: Path) -> tuple[dict[str, Any], dict[str, str | None]]:
    """Write the guest programs, compile the C loop; the job, and what is missing on this machine."""
    (folder / "initramfs").write_bytes(guest_code.initramfs())
    (folder / "exit_image").write_bytes(guest_code.exit_image(exits.ROUNDS, exits.EXITS))
    c_loop, gcc_problem = compile_program(folder, "exit_loop")
    qemu = shutil.which("qemu-system-x86_64")
    here = Path(guest_code.__file__).resolve().parent
    job = {
        "kernel": {
            "image": request.image,
            "vmlinux": request.vmlinux,
            "name": request.name,
            "version": request.version,
        },
        "initramfs": str(folder / "initramfs"),
        "exit_image": str(folder / "exit_image"),
        "exit_loop_argv": [*request.python, str(here / "exit_loop.py")],
        "c_loop": c_loop,
        "machine_argv": list(request.machine_argv),
        "qemu": qemu,
        "runs": request.runs,
        "only": request.only,
        "budget_s": _BUDGET_S,
        "scratch": None,
        "results": str(folder / "results.json"),
    }
    qemu_problem = None if qemu else "qemu-system-x86_64 is missing; apt-get install qemu-system-x86"
    return job, {"qemu": qemu_problem, "gcc": gcc_problem}


def compile_program(folder: Path, name: str, flags: Sequence[str] = ()) -> tuple[str | None, str | None]:
    """The program of `name`.c beside this module, or None and why there is none."""
    source = Path(guest_code.__file__).resolve().with_name(f"{name}.c")
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return None, "gcc is missing; apt-get install gcc libc6-dev"
    target = folder / name
    done = subprocess.run(
        [compiler, "-O2", "-static", *flags, "-o", str(target), str(source)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), "it does not compile")
        return None, f"{' '.join(first.split())}; apt-get install libc6-dev"
    return str(target), None


def _run(
    argv: list[str],
    folder: Path,
    appliance_mib: int | None,
    deadline_s: float,
    progress: Callable[[str], None],
    devices: tuple[EmulatedDevice, ...],
) -> tuple[int, str]:
    """Run the inner part; its status and what it said on stderr."""
    read, write = os.pipe()

    def watch() -> None:
        with open(read, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                progress(line.strip())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    complaints = folder / "stderr"
    qemu_args, kernel_args, modules = for_request(devices)
    try:
        with open(os.devnull, "rb") as stdin, complaints.open("wb") as stderr:
            if appliance_mib is not None:
                try:
                    status = run_in_appliance(
                        Request(
                            argv=argv,
                            cwd="/",
                            env=dict(os.environ),
                            streams=(stdin.fileno(), write, stderr.fileno()),
                            writable=[str(folder)],
                            memory_mib=appliance_mib,
                            timeout=deadline_s,
                            qemu_args=qemu_args,
                            kernel_args=kernel_args,
                            modules=modules,
                        )
                    )
                except ApplianceError as error:
                    raise BenchError(str(error)) from error
            else:
                status = _run_here(argv, stdin.fileno(), write, stderr.fileno(), deadline_s)
    finally:
        os.close(write)
        watcher.join(5.0)
    return status, complaints.read_text(encoding="utf-8", errors="replace")


def _run_here(argv: list[str], stdin: int, stdout: int, stderr: int, deadline_s: float) -> int:
    process = subprocess.Popen(argv, stdin=stdin, stdout=stdout, stderr=stderr)
    try:
        return process.wait(deadline_s)
    except subprocess.TimeoutExpired:
        raise BenchError(f"the bench did not end within {deadline_s:.0f} s") from None
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(5.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
