# SPDX-License-Identifier: Apache-2.0
"""Prepares the bench of direct hardware on this machine: an appliance with a disk and a network card, a kernel, a load;
`hardware_inner` runs in the appliance. The other end of the network is here, behind QEMU's user-mode network."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rootvisor.appliance.hardware import EmulatedDevice, address
from rootvisor.bench import hardware_inner, outer
from rootvisor.bench.vmm import initramfs
from rootvisor.kernels import Kernel

DISK_MIB = 256
LOAD_S = 4
"""Seconds of each kind of load."""
MEMORY_MIB = 512

_APPLIANCE_MIB = 2560
_DEADLINE_S = 2400.0


@dataclass(frozen=True, slots=True)
class HardwareRequest:
    """`machine_argv` is the command of our machine up to its description; `runs` guests on each side."""

    kernel: Kernel
    machine_argv: Sequence[str]
    runs: int
    python: Sequence[str]


def measure(request: HardwareRequest, folder: Path, *, progress: Callable[[str], None]) -> dict[str, Any]:
    """Run the bench; `folder` is private, empty, and visible in the appliance.

    Gives the inner part's results, with `qemu`: None, or why that column is empty. Raises `outer.BenchError`, also
    when there is no C compiler.
    """
    load, problem = outer.compile_program(folder, "guest_load")
    if load is None:
        raise outer.BenchError(f"{problem}", "the load on devices is a program in C")
    (folder / "initramfs").write_bytes(initramfs(Path(load)))
    image = folder / "nvme.img"
    with image.open("wb") as file:
        for _ in range(DISK_MIB):
            file.write(bytes(range(256)) * 4096)
    devices = (EmulatedDevice("nvme", str(image)), EmulatedDevice("nic"))
    qemu = shutil.which("qemu-system-x86_64")
    port = _free_port()
    written = folder / "results.json"
    job = {
        "kernel": str(request.kernel.vmlinux or request.kernel.image),
        "initramfs": str(folder / "initramfs"),
        "machine_argv": list(request.machine_argv),
        "qemu": qemu,
        "devices": [address(number) for number in range(len(devices))],
        "memory_mib": MEMORY_MIB,
        "port": port,
        "load_s": LOAD_S,
        "runs": request.runs,
        "results": str(written),
    }
    path = folder / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    progress("starting the appliance")
    with subprocess.Popen(
        [load, "serve", str(port)], stdout=subprocess.DEVNULL, start_new_session=True
    ) as server:
        try:
            found = outer.run_inner(
                [*request.python, str(Path(hardware_inner.__file__).resolve()), str(path)],
                folder,
                written,
                appliance=True,
                memory_mib=_APPLIANCE_MIB,
                deadline_s=_DEADLINE_S,
                progress=progress,
                devices=devices,
            )
        finally:
            server.kill()  # what it has forked ends with its connection
    missing = None if qemu else "qemu-system-x86_64 is missing; apt-get install qemu-system-x86"
    return found | {"qemu": missing, "load_s": LOAD_S}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port
