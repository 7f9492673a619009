# SPDX-License-Identifier: Apache-2.0
"""The part of the bench that runs where KVM works: ``python -I -S inner.py JOB``.

JOB is a JSON file that `outer` wrote. Progress goes to standard output, a line for each stage; the results go to the
file that the job names.
"""

from __future__ import annotations

import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Everything, in the order that gives the exit loops a quiet machine and the boots warm caches."""
    from rootvisor.bench import exits

    results: dict[str, Any] = {"exits": None, "boots": None, "problems": []}
    if job["only"] != "boots":
        try:
            results["exits"] = exits.measure(job, lambda text: print(text, flush=True))
        except exits.ExitLoopError as error:
            results["problems"].append(str(error))
    if job["only"] == "exits":
        return results
    folder = job["scratch"] or _scratch()
    try:
        results["boots"] = _boots(job, folder, results)
    finally:
        if not job["scratch"]:
            import shutil

            shutil.rmtree(folder, ignore_errors=True)
    return results


def _scratch() -> str:
    """A folder in memory: the disk image must not measure a file server."""
    import tempfile

    return tempfile.mkdtemp(prefix="rootvisor-bench-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)


def _boots(job: dict[str, Any], folder: str, results: dict[str, Any]) -> dict[str, Any]:
    """Configuration -> side -> what each run cost. The sides take turns; no run starts after the budget is spent."""
    from rootvisor.bench import boots
    from rootvisor.peers.inner import processor_model

    os.mkdir(f"{folder}/share")
    with open(f"{folder}/disk", "wb") as disk:
        disk.truncate(16 << 20)
    problems = results["problems"]
    job["qemu_cpu"] = processor_model()
    print("boots: warming up", flush=True)
    boots.rootvisor(job, boots.DEVICES["four virtio devices"], folder)
    kernel = _best_for_qemu(job, folder, results) if job["qemu"] else None
    end = time.monotonic() + job["budget_s"]
    found: dict[str, Any] = {name: {"rootvisor": [], "qemu": []} for name in boots.DEVICES}
    for turn in range(job["runs"]):
        for name, devices in boots.DEVICES.items():
            if turn and time.monotonic() > end:
                continue
            print(f"boots: {name}, run {turn + 1} of {job['runs']}", flush=True)
            try:
                found[name]["rootvisor"].append(_facts(boots.rootvisor(job, devices, folder)))
                if kernel:
                    found[name]["qemu"].append(_facts(boots.qemu(job, devices, folder, kernel)))
            except boots.BootError as error:
                problems.append(f"{name}: {error}")
    return found


def _best_for_qemu(job: dict[str, Any], folder: str, results: dict[str, Any]) -> str | None:
    """The image with which QEMU is faster: bzImage through its firmware, or ELF through the PVH entry."""
    from rootvisor.bench import boots

    times: dict[str, float] = {}
    for kind in ("image", "vmlinux"):
        path = job["kernel"][kind]
        if not path:
            continue
        print(f"boots: QEMU with {'bzImage' if kind == 'image' else 'ELF'}", flush=True)
        try:
            boots.qemu(job, (), folder, path)  # fills the page cache
            times[kind] = boots.qemu(job, (), folder, path).user_space_s
        except boots.BootError as error:
            results["problems"].append(str(error))
    results["qemu_images"] = {kind: round(seconds, 3) for kind, seconds in times.items()}
    if not times:
        return None
    best = min(times, key=lambda kind: times[kind])
    results["qemu_image"] = best
    path = job["kernel"][best]
    assert isinstance(path, str)
    return path


def _facts(boot: Any) -> dict[str, Any]:
    """A boot as JSON-able data."""
    facts: dict[str, Any] = {
        "user_space_s": boot.user_space_s,
        "exit_s": boot.exit_s,
        "resident_bytes": boot.resident,
    }
    if boot.report is not None:
        facts["exits"] = boot.report["exits"]
    return facts


def main() -> int:
    """The job; what this machine cannot do is an expected failure."""
    from rootvisor.bench import inner_job
    from rootvisor.bench.boots import BootError
    from rootvisor.kvm.errors import KvmError

    return inner_job.run(measure, (BootError, KvmError, OSError))


if __name__ == "__main__":
    sys.path.insert(0, __file__.rsplit("/", 3)[0])
    sys.exit(main())
