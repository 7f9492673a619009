# SPDX-License-Identifier: Apache-2.0
"""The part of the bench of the guest interface that runs where KVM works: ``python -I -S interface_inner.py JOB``.

JOB is a JSON file that `interface` wrote. Progress goes to standard output; the results go to the file that it names.
"""

from __future__ import annotations

import subprocess
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_DEADLINE_S = 300.0
#: KVM's emulation of the interface, all of it that the guest uses.
_HYPERV = (
    "hv-relaxed,hv-vapic,hv-time,hv-vpindex,hv-runtime,hv-synic,hv-stimer,hv-stimer-direct,hv-tlbflush,hv-ipi,"
    "hv-reset"
)
#: The status that the exit port gives for 0: 2 x 0 + 1.
_DONE = 1


class GuestError(Exception):
    """A guest failed; one line."""


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Side -> kind -> microseconds a call, one value for each round of each guest; `timer`: every lateness."""
    from rootvisor.bench.interface_rows import parse

    sides = {"rootvisor": job["ours"]}
    if job["qemu"]:
        sides["kvm"] = _qemu(job)
    found: dict[str, dict[str, list[float]]] = {side: {} for side in sides}
    problems: list[str] = []
    for turn in range(job["runs"]):
        for side, argv in sides.items():
            print(f"{side}, guest {turn + 1} of {job['runs']}", flush=True)
            try:
                for kind, values in parse(_run(argv)).items():
                    found[side].setdefault(kind, []).extend(values)
            except (GuestError, ValueError) as error:
                problems.append(f"{side}: {error}")
    return {"sides": found, "problems": problems}


def _qemu(job: dict[str, Any]) -> list[str]:
    from rootvisor.peers.inner import processor_model

    return [
        job["qemu"], "-accel", "kvm", "-M", "pc", "-cpu", f"{processor_model()},{_HYPERV}",
        "-smp", str(job["vps"]), "-m", str(job["memory_mib"]), "-nodefaults", "-no-reboot", "-display", "none",
        "-serial", "stdio", "-device", "hyperv-testdev", "-device", "isa-debug-exit,iobase=0xf4,iosize=4",
        "-kernel", job["kernel"],
    ]  # fmt: skip


def _run(argv: list[str]) -> str:
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_DEADLINE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise GuestError(f"{argv[0]}: {error}") from error
    if done.returncode != _DONE:
        words = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise GuestError(f"ended with status {done.returncode}: {words[-1] if words else ''}")
    return done.stdout


def main() -> int:
    """The job; what this machine cannot do is an expected failure."""
    from rootvisor.bench import inner_job
    from rootvisor.kvm.errors import KvmError

    return inner_job.run(measure, (KvmError, OSError))


if __name__ == "__main__":
    sys.path.insert(0, __file__.rsplit("/", 3)[0])
    sys.exit(main())
