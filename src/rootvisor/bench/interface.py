# SPDX-License-Identifier: Apache-2.0
"""Bench of the guest interface: one bare-metal kernel under `rootvisor run --as guest` and under QEMU with KVM's own
Hyper-V emulation, in turns, on the same engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rootvisor.bench.outer import BenchError, compile_program, run_inner

VPS = 4
MEMORY_BYTES = 128 << 20
#: Freestanding 32-bit code; the multiboot header has to be near the start of the file.
_FLAGS = (
    "-m32", "-ffreestanding", "-fno-stack-protector", "-fno-pic", "-no-pie", "-mgeneral-regs-only", "-nostdlib",
    "-Wl,-Ttext=0x400000,--build-id=none",
)  # fmt: skip
_APPLIANCE_MIB = 1536
_DEADLINE_S = 1200.0


@dataclass(frozen=True, slots=True)
class InterfaceRequest:
    """`argv` gives the words that run a kernel file as a guest; `runs` guests on each side."""

    runs: int
    python: Sequence[str]
    argv: Callable[[str], list[str]]


def measure(
    request: InterfaceRequest, folder: Path, *, appliance: bool, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Run the bench; `folder` is private, empty and visible in the appliance. Gives side -> kind -> microseconds, and
    `qemu`: None, or why that column is empty. Raises BenchError."""
    kernel, problem = compile_program(folder, "guest_interface", _FLAGS)
    if kernel is None:
        raise BenchError(f"the guest cannot be made: {problem}", "apt-get install gcc libc6-dev")
    qemu = shutil.which("qemu-system-x86_64")
    results_path = folder / "results.json"
    job = {
        "kernel": kernel,
        "runs": request.runs,
        "ours": request.argv(kernel),
        "qemu": qemu,
        "vps": VPS,
        "memory_mib": MEMORY_BYTES >> 20,
        "results": str(results_path),
    }
    path = folder / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    inner = Path(__file__).resolve().with_name("interface_inner.py")
    progress("starting the appliance" if appliance else "starting")
    results = run_inner(
        [*request.python, str(inner), str(path)],
        folder,
        results_path,
        appliance=appliance,
        memory_mib=_APPLIANCE_MIB,
        deadline_s=_DEADLINE_S,
        progress=progress,
    )
    missing = None if qemu else "qemu-system-x86_64 is missing; apt-get install qemu-system-x86"
    return {**results, "qemu": missing}
