# SPDX-License-Identifier: Apache-2.0
"""What is booted: every combination that was asked for, as files in a folder and a job for `inner`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rootvisor.boot.busybox import find_busybox
from rootvisor.boot.errors import InitramfsError
from rootvisor.kernels import Kernel, cache_dir

from . import guest, inner
from .errors import PeerError

PORT = 8099
"""TCP port of the web server on the loopback interface of the root."""

#: QEMU's scheduling policy for `inner`, by the hypervisor's scheduler. Under the root's the guest computes in RUN_VP,
#: and QEMU's main thread would have no turn without a slice (100 ms). Under the hypervisor's, where a processor's
#: thread sleeps meanwhile, the end of a slice can only come at a bad moment.
_POLICIES = {"hypervisor": "SCHED_FIFO", "root": "SCHED_RR"}


@dataclass(frozen=True, slots=True)
class Guest:
    """One guest to boot."""

    kernel: Kernel
    machine: str
    vps: int

    @property
    def name(self) -> str:
        """Short, for tables and messages."""
        return f"{self.machine} {self.kernel.name} {self.vps} VP{'s' if self.vps > 1 else ''}"


@dataclass(frozen=True, slots=True)
class Request:
    """Everything about a series of boots. `accelerator` is `mshv` or `kvm`; `scheduler` is `hypervisor` or `root`;
    `times` repeats the whole series; `append` goes behind the guest's command line."""

    guests: Sequence[Guest]
    program: str
    accelerator: str = "mshv"
    scheduler: str = "hypervisor"
    times: int = 1
    parallel: int = 1
    memory_mib: int = 256
    timeout_s: float = 180.0
    cpu: str = "host"
    append: str = ""


def combinations(kernels: Iterable[Kernel], machines: Iterable[str], vps: Iterable[int]) -> list[Guest]:
    """Every machine with every kernel and every number of processors; the quick ones first."""
    chosen = list(kernels)
    return [
        Guest(kernel, machine, count)
        for count in sorted(set(vps))
        for machine in dict.fromkeys(machines)
        for kernel in chosen
    ]


def prepare(request: Request, folder: Path, python: Sequence[str]) -> list[str]:
    """Write the job into `folder`; the command to run where the accelerator is. Raises :class:`PeerError`."""
    disk = guest.filler(guest.DISK_BYTES, 1)
    page = guest.filler(guest.PAGE_BYTES, 2)
    (folder / "disk").write_bytes(disk)
    (folder / "page").write_bytes(page)
    ramdisks = {one.kernel: _ramdisk(one.kernel, folder) for one in request.guests}
    sums = {"disk": guest.md5(disk), "page": guest.md5(page)}
    guests = [
        {
            "name": one.name,
            "argv": guest.qemu_argv(
                request.program,
                accelerator=request.accelerator,
                cpu=request.cpu if request.accelerator == "mshv" else inner.KVM_MODEL,
                machine=one.machine,
                vps=one.vps,
                memory_mib=request.memory_mib,
                kernel=str(one.kernel.image),
                initrd=str(ramdisks[one.kernel]),
                disk=str(folder / "disk"),
                append=guest.command_line(PORT, one.machine, request.append),
            ),
            "expected": {"up": one.kernel.version, "processors": str(one.vps), **sums},
            "timeout_s": request.timeout_s,
        }
        for one in request.guests
    ]
    job = {
        "guests": guests * request.times,
        "parallel": request.parallel,
        "page": str(folder / "page"),
        "port": PORT,
        "mshv": request.accelerator == "mshv",
        "policy": _POLICIES[request.scheduler] if request.accelerator == "mshv" else "",
    }
    path = folder / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    return [*python, str(Path(inner.__file__).resolve()), str(path)]


def read_line(line: str) -> tuple[str, dict[str, Any]] | None:
    """A line of `inner`: ("boot" or "root", document); None for a line that is none of its own."""
    try:
        document = json.loads(line)
    except ValueError:
        return None
    if not isinstance(document, dict) or len(document) != 1:
        return None
    ((kind, content),) = document.items()
    return (kind, content) if kind in ("boot", "root") and isinstance(content, dict) else None


def _ramdisk(kernel: Kernel, folder: Path) -> Path:
    path = folder / f"initrd-{kernel.name}"
    if not path.exists():
        modules = None if kernel.modules is None else str(kernel.modules)
        try:
            path.write_bytes(guest.ramdisk(modules, find_busybox(str(cache_dir() / "initramfs"))))
        except InitramfsError as error:
            raise PeerError(str(error)) from error
    return path
