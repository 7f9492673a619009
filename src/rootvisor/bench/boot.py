# SPDX-License-Identifier: Apache-2.0
"""Times of whole boots: from process start to the first line of user space, and to the process's end."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from time import monotonic
from typing import Any

READY = b"rootvisor: ready"
"""The first line of user space, as the agent writes it to a console."""

QEMU_CPU = "CPU"
"""Stands in QEMU's command line for the processor model, which only the measuring process can choose."""

_DEADLINE_S = 240.0
_KEPT_BYTES = 1 << 16


class BootFailed(Exception):
    """A boot did not reach user space, or did not end; one line with the end of its console."""


@dataclass(frozen=True)
class Boot:
    """One boot: seconds to user space and to the end, resident KiB without guest memory at user space."""

    userspace_s: float
    total_s: float
    resident_kib: int


def boot_once(argv: Sequence[str]) -> Boot:
    """Run a machine whose console is its standard output. Raises `BootFailed`."""
    started = monotonic()
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    fd = process.stdout.fileno()
    text = b""
    userspace = 0.0
    resident = 0
    try:
        while True:
            left = started + _DEADLINE_S - monotonic()
            if left <= 0 or not select.select([fd], [], [], left)[0]:
                raise BootFailed(f"{argv[0]} did not end within {_DEADLINE_S:.0f} s: {_tail(text)}")
            data = os.read(fd, 65536)
            if not data:
                break
            text = (text + data)[-_KEPT_BYTES:]
            if not userspace and READY in text:
                userspace = monotonic() - started
                resident = resident_kib(process.pid)
        process.wait(30)
    except subprocess.TimeoutExpired as error:
        raise BootFailed(f"{argv[0]} closed its console and did not end") from error
    finally:
        _kill(process)
    if not userspace:
        raise BootFailed(f"{argv[0]} never reached user space (status {process.returncode}): {_tail(text)}")
    return Boot(userspace, monotonic() - started, resident)


def measure(ours: Sequence[str], qemu: Sequence[str], rounds: int) -> dict[str, Any]:
    """Boots in turn; medians of both, and their ratios. Raises `BootFailed`."""
    results: dict[str, list[Boot]] = {"rootvisor": [], "qemu": []}
    for _ in range(rounds):
        results["rootvisor"].append(boot_once(ours))
        results["qemu"].append(boot_once(qemu))
    table: dict[str, Any] = {}
    for name, boots in results.items():
        table[name] = {
            "userspace_s": round(median(boot.userspace_s for boot in boots), 3),
            "total_s": round(median(boot.total_s for boot in boots), 3),
            "resident_kib": round(median(boot.resident_kib for boot in boots)),
            "boots": [asdict(boot) for boot in boots],
        }
    for field in ("userspace_s", "total_s"):
        table[f"{field.removesuffix('_s')}_ratio"] = round(
            table["rootvisor"][field] / table["qemu"][field], 3
        )
    return table


def with_processor(qemu: Sequence[str], xsave: bool) -> list[str]:
    """The command line with the host's processor; without XSAVE where KVM gets it wrong (emulated SVM)."""
    model = "host" if xsave else "host,-xsave,-avx,-avx2,-pku"
    return [model if word == QEMU_CPU else word for word in qemu]


def resident_kib(pid: int) -> int:
    """Private and file-backed resident memory; guest memory is shared memory in both programs and does not count."""
    total = 0
    try:
        with open(f"/proc/{pid}/status", encoding="ascii") as file:
            for line in file:
                if line.startswith(("RssAnon:", "RssFile:")):
                    total += int(line.split()[1])
    except OSError:
        pass
    return total


def _tail(text: bytes) -> str:
    lines = [line for line in text.decode("utf-8", "replace").splitlines() if line.strip()]
    return " | ".join(lines[-4:]) or "no output"


def _kill(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
