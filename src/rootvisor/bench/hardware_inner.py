# SPDX-License-Identifier: Apache-2.0
"""The part of the bench of direct hardware that runs where the devices are: ``python -I -S hardware_inner.py JOB``.

JOB is a JSON file that `hardware` wrote. The devices belong to vfio-pci for the whole of it; the root partition and a
guest of QEMU have them in turns. Progress goes to standard output; the results go to the file that the job names.
"""

from __future__ import annotations

import glob
import json
import marshal
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from rootvisor.peers.inner import Boot

_KVM = "/sys/kernel/debug/kvm"
_GUEST_TIMEOUT_S = 180.0


class ExitCounter:
    """The exits of a guest between its words `begin` and `done` of each kind of load."""

    def __init__(self, boot: Boot) -> None:
        self._boot = boot
        self._before = 0
        self._heard = 0
        self.exits: dict[str, int] = {}

    def look(self) -> None:
        """The guest may have said something: when a load begins or ends, what KVM has counted is read."""
        for key, value in self._boot.said[self._heard :]:
            if key == "begin":
                self._before = kvm_exits(self._boot.pid)
            elif key == "done":
                self.exits[value] = kvm_exits(self._boot.pid) - self._before
        self._heard = len(self._boot.said)


def kvm_exits(pid: int) -> int:
    """How often the processors of a process have left the guest, to KVM or beyond."""
    total = 0
    for path in glob.glob(f"{_KVM}/{pid}-*/exits"):
        with open(path, encoding="ascii") as file:
            total += int(file.read())
    return total


def run(name: str, argv: list[str]) -> tuple[dict[str, float], dict[str, int], str | None]:
    """A guest to its end: what it measured by kind, exits by kind, and why that is not everything, if it is not."""
    from rootvisor.bench.vmm_inner import follow, problem_of
    from rootvisor.peers.inner import Boot

    boot = Boot({"name": name, "vmm": name, "argv": argv, "expected": {}, "timeout_s": _GUEST_TIMEOUT_S})
    counter = ExitCounter(boot)
    follow(boot, heard=counter.look)
    result = boot.close()
    values = {key: float(value) for key, value in result["said"] if key not in _WORDS}
    if result["ok"]:
        return values, counter.exits, None
    begun = [value for key, value in result["said"] if key == "begin"]
    return values, counter.exits, f"{problem_of(result, 'failed')}{f' {begun[-1]}' if begun else ''}"


_WORDS = ("up", "begin", "done", "interrupts", "problem", "end")


def append(job: dict[str, Any], only: str = "") -> str:
    """The end of the command line of both sides' kernel."""
    part = f" guest.only={only}" if only else ""
    return f"loglevel=4 panic=-1 guest.work=hardware guest.port={job['port']} guest.seconds={job['load_s']}{part}"


def ours(job: dict[str, Any], folder: str, only: str = "") -> list[str]:
    """The root partition with the devices."""
    description = {
        "version": 1,
        "kernel": {"image": job["kernel"], "vmlinux": job["kernel"], "name": "mshv", "version": ""},
        "initrds": [job["initramfs"]],
        "append": append(job, only),
        "vps": 1,
        "memory_bytes": job["memory_mib"] << 20,
        "rootfs": "none",
        "rootfs_path": None,
        "command": None,
        "tty": False,
        "disks": [],
        "devices": [],
        "assigned": job["devices"],
        "scheduler": "hypervisor",
        "trace": None,
        "timeout_s": _GUEST_TIMEOUT_S,
        "console_log": None,
        "on_reboot": "exit",
        "report": f"{folder}/report",
        "verbose": False,
    }
    path = f"{folder}/description"
    with open(path, "wb") as file:
        file.write(marshal.dumps(description, 2))
    return [*job["machine_argv"], path]


def theirs(job: dict[str, Any], model: str) -> list[str]:
    """QEMU with the same devices, kernel and work."""
    argv = [
        job["qemu"], "-no-user-config", "-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio",
        "-M", "q35,memory-backend=ram", "-accel", "kvm", "-cpu", model, "-smp", "1", "-m", f"{job['memory_mib']}M",
        "-object", f"memory-backend-memfd,id=ram,size={job['memory_mib']}M,share=on",
        "-kernel", job["kernel"], "-initrd", job["initramfs"],
        "-append", f"rdinit=/init console=ttyS0 {append(job)}",
    ]  # fmt: skip
    for number, address in enumerate(job["devices"]):
        # without its ROM, which the firmware would run
        argv += ["-device", f"vfio-pci,host={address},addr={4 + number},rombar=0"]
    return argv


def count(job: dict[str, Any], folder: str, kind: str) -> tuple[float, int]:
    """How many times the root did a thing in its time, and how many exits its whole run had, to the hypervisor."""
    values, _, problem = run("the root partition", ours(job, folder, kind))
    if problem is not None:
        raise OSError(problem)
    with open(f"{folder}/report", encoding="utf-8") as file:
        exits = sum(json.load(file)["exits"].values())
    return next(iter(values.values()), 0.0) * job["load_s"], exits


def _measure_in(job: dict[str, Any], folder: str) -> dict[str, Any]:
    """Side -> kind -> one value for each guest, exits likewise; the root's exits to the hypervisor by kind."""
    from rootvisor.peers.inner import processor_model
    from rootvisor.vfio.binding import Binding
    from rootvisor.vfio.host_device import find

    results: dict[str, Any] = {"loads": {}, "kvm_exits": {}, "hypervisor_exits": {}, "problems": []}
    sides = {"rootvisor": ours(job, folder)}
    if job["qemu"]:
        sides["qemu"] = theirs(job, processor_model())
    binding = Binding([find(address) for address in job["devices"]])
    try:
        for turn in range(job["runs"]):
            for side, argv in sides.items():
                _say(f"{side}, guest {turn + 1} of {job['runs']}")
                values, exits, problem = run(side, argv)
                if problem is not None:
                    results["problems"].append(problem)
                results["loads"].setdefault(side, []).append(values)
                results["kvm_exits"].setdefault(side, []).append(exits)
        for kind in ("idle", "read:4096:random", "echo"):
            _say(f"rootvisor, exits, {kind}")
            try:
                results["hypervisor_exits"][kind] = count(job, folder, kind)
            except (OSError, ValueError) as error:
                results["problems"].append(str(error))
    finally:
        binding.close()
    return results


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Everything that :func:`_measure_in` gives, with a folder for descriptions and reports."""
    import tempfile
    from subprocess import DEVNULL, run

    if not os.path.isdir(_KVM):
        run(["mount", "-t", "debugfs", "debugfs", "/sys/kernel/debug"], stderr=DEVNULL, check=False)
    with tempfile.TemporaryDirectory(prefix="rootvisor-bench-") as folder:
        return _measure_in(job, folder)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> int:
    """Measure and write the results; an expected failure is one line and status 1."""
    from rootvisor.bench import inner_job
    from rootvisor.kvm.errors import KvmError
    from rootvisor.vfio.errors import VfioError

    return inner_job.run(measure, (KvmError, VfioError, OSError))


if __name__ == "__main__":
    sys.path.insert(0, __file__.rsplit("/", 3)[0])
    sys.exit(main())
