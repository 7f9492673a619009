# SPDX-License-Identifier: Apache-2.0
"""Figures beside QEMU's: boots, disk, network, resident memory. Not part of the suite: name it to run it.

Both VMMs have the same kernel, initial ramdisk, disk image and root; they take turns. Everything goes out as notes.
ROOTVISOR_VMM_ROUNDS is how often (3), ROOTVISOR_VMM_QEMU the program.
"""

from __future__ import annotations

import os
import signal
import time

from tests.vmm.guest import FOLDER, Guest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Job = dict[str, Any]

ROUNDS = int(os.environ.get("ROOTVISOR_VMM_ROUNDS", "3"))
QEMU = os.environ.get("ROOTVISOR_VMM_QEMU", "")
_PORT = 8097
_DISK_BYTES = 64 << 20
_SECONDS = 4


class QemuGuest(Guest):
    """The same guest under QEMU."""

    machine = "microvm"

    def _spawn(self, words: list[str]) -> None:
        del words
        suffix = "device" if self.machine == "microvm" else "pci"
        self.argv = [
            QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-accel", "mshv", "-cpu", "host",
            "-M", "microvm,rtc=on" if self.machine == "microvm" else self.machine, "-smp", "1", "-m", "256M",
            "-kernel", self.payload["kernel"], "-initrd", self.payload["initramfs"],
            "-append", self.payload["cmdline"],
            "-chardev", "stdio,id=console,signal=off", "-device", f"virtio-serial-{suffix}",
            "-device", "virtconsole,chardev=console",
        ]  # fmt: skip
        if os.path.exists(f"{FOLDER}/bench.raw"):
            self.argv += ["-drive", f"if=none,id=disk,format=raw,file={FOLDER}/bench.raw"]
            self.argv += ["-device", f"virtio-blk-{suffix},drive=disk", "-netdev", "user,id=net"]
            rom = "" if self.machine == "microvm" else ",romfile="
            self.argv += ["-device", f"virtio-net-{suffix},netdev=net{rom}"]
        super()._spawn([])

    def _program(self, words: list[str]) -> None:
        os.execv(QEMU, self.argv)


class Microvm(QemuGuest):
    """QEMU's small machine."""

    machine = "microvm"


class Q35(QemuGuest):
    """QEMU's large machine."""

    machine = "q35"


KINDS: dict[str, type[Guest]] = {"rootvisor": Guest} | ({"microvm": Microvm, "q35": Q35} if QEMU else {})


def _resident(pid: int) -> int:
    """KiB of the process that are no guest memory."""
    with open(f"/proc/{pid}/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["RssAnon"].split()[0]) + int(fields["RssFile"].split()[0])


def test_boot_to_user_space_and_to_power_off(job: Job) -> None:
    if os.path.exists(f"{FOLDER}/bench.raw"):
        os.unlink(f"{FOLDER}/bench.raw")
    best: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for name, kind in KINDS.items():
            with kind(job, "true\n", kernel="mshv-elf", memory="256M") as guest:
                guest.hears("end")
                resident = _resident(guest.pid)
                guest.ends()
                figures = [guest.times["up"], time.monotonic() - guest.started, resident / 1024]
            texts = [f"{one:.2f}" for one in figures]
            print("note", name, "user space, power off (s), resident (MiB):", *texts, flush=True)
            best[name] = [min(pair) for pair in zip(best.get(name, figures), figures, strict=True)]
    for name, figures in best.items():
        print("note", "best of", name, *(f"{one:.2f}" for one in figures))


def test_disk_and_network(job: Job) -> None:
    os.makedirs(FOLDER, exist_ok=True)
    with open(f"{FOLDER}/bench.raw", "wb") as file:
        for _ in range(_DISK_BYTES >> 20):
            file.write(os.urandom(1 << 20))
    server = os.fork()
    if not server:
        os.execv(job["tool"], ["tool", "serve", str(_PORT)])
    work = f"""\
await /dev/vda
network
tool disk /dev/vda read 1048576 {_SECONDS}
tool disk /dev/vda write 1048576 {_SECONDS}
tool disk /dev/vda read 4096 {_SECONDS} random
tool disk /dev/vda write 4096 {_SECONDS} random
tool send 10.0.2.2 {_PORT} {_SECONDS}
tool receive 10.0.2.2 {_PORT} {_SECONDS}
tool echo 10.0.2.2 {_PORT} {_SECONDS}
"""
    try:
        for _ in range(max(1, ROUNDS - 1)):
            for name, kind in KINDS.items():
                options = ("--disk", f"path={FOLDER}/bench.raw,image_type=raw", "--net", "default")
                with kind(job, work, *options, kernel="mshv-elf", memory="256M") as guest:
                    guest.hears("end")
                    said = {key: value for key, value in guest.said if key not in ("up", "end", "serving")}
                    guest.ends()
                print("note", name, " ".join(f"{key} {value}" for key, value in said.items()), flush=True)
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)


for _test in (test_boot_to_user_space_and_to_power_off, test_disk_and_network):
    _test.limit = 1200  # type: ignore[attr-defined]
del _test
