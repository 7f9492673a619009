# SPDX-License-Identifier: Apache-2.0
"""Snapshots of a guest that computes and writes to its disk; restored, it goes on where it was."""

from __future__ import annotations

import os
import time
from shutil import rmtree

from tests.vmm.guest import FOLDER, Guest, await_gone

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Job = dict[str, Any]

CYCLES = int(os.environ.get("ROOTVISOR_VMM_CYCLES", "2"))


def test_restored_guest_goes_on_where_it_was(job: Job) -> None:
    _cycles(job, 1, CYCLES)


def test_restored_guest_of_two_processors_goes_on_where_it_was(job: Job) -> None:
    _cycles(job, 2, CYCLES)


def test_guest_that_ticks_by_synthetic_timers_goes_on_where_it_was(job: Job) -> None:
    _cycles(job, 2, CYCLES, hyperv=True)


def test_shared_folder_that_was_mounted_is_in_no_snapshot(job: Job) -> None:
    """Not mounted yet, mounted, and added again to a restored guest."""
    folder = f"{FOLDER}/shared"
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/file", "w") as file:
        file.write("from the root\n")
    mounting = """\
tries=0
until mount -t virtiofs share /mnt 2>/dev/null || [ $tries -ge 300 ]; do tries=$((tries + 1)); usleep 100000; done
read -r line </mnt/file && echo "guest: mounted $line"
"""
    work = f"""\
echo "guest: ready"; read -r word
{mounting}read -r word
umount /mnt; echo "guest: unmounted"; read -r word
{mounting}umount /mnt
"""
    share = {"id": "share", "tag": "share", "path": folder}
    with Guest(job, work, "--fs", f"id=share,tag=share,path={folder}", kernel="mshv-elf", api=True) as guest:
        guest.hears("ready")
        _snapshot(guest, "before")
    with _restored(job, "before") as guest:
        guest.types(b"go\n")
        assert guest.hears("mounted") == "from the root"
        guest.calls("PUT", "vm.pause")
        body = {"destination_url": f"file://{FOLDER}/while"}
        reasons = guest.calls("PUT", "vm.snapshot", body, expect=5)
        assert "has mounted the shared folder share" in str(reasons), reasons
        guest.calls("PUT", "vm.resume")
        guest.types(b"go\n")
        guest.hears("unmounted")
        guest.calls("PUT", "vm.remove-device", {"id": "share"})
        await_gone(guest, "share")
        _snapshot(guest, "after")
    with _restored(job, "after") as guest:
        guest.calls("PUT", "vm.add-fs", share)
        guest.types(b"go\n")
        assert guest.hears("mounted") == "from the root"
        guest.ends()


def _snapshot(guest: Guest, name: str) -> None:
    rmtree(f"{FOLDER}/{name}", ignore_errors=True)
    guest.calls("PUT", "vm.pause")
    guest.calls("PUT", "vm.snapshot", {"destination_url": f"file://{FOLDER}/{name}"})
    guest.kill()


def _restored(job: Job, name: str) -> Guest:
    return Guest(job, "", "--restore", f"source_url=file://{FOLDER}/{name},resume=true", boot=False, api=True)


def _cycles(job: Job, cpus: int, count: int, hyperv: bool = False) -> None:
    """A chain of numbers, each of the ones before it, that a reference computes too: nothing may be missing."""
    os.makedirs(FOLDER, exist_ok=True)
    disk = f"{FOLDER}/work.raw"
    with open(disk, "wb") as file:
        file.truncate(4 << 20)
    work = "await /dev/vda\n" + "".join(
        f"taskset -c {cpu} sh -c 'while :; do :; done' &\n" for cpu in range(1, cpus)
    )
    work += "tool work /dev/vda 1024\n"
    chain = Chain()
    figures = []
    guest = Guest(
        job,
        work,
        "--disk",
        f"path={disk},image_type=raw",
        kernel="mshv-elf",
        cpus=cpus,
        hyperv=hyperv,
        api=True,
    )
    try:
        for cycle in range(count):
            for _ in range(5):
                chain.check(guest.hears("step"))
            if not cycle:
                figures.append(f"boot {guest.times['up']:.2f} s")
            folder = f"{FOLDER}/snapshot-{cycle}"
            rmtree(folder, ignore_errors=True)
            guest.calls("PUT", "vm.pause")
            guest.pump(0)
            began = time.monotonic()
            guest.calls("PUT", "vm.snapshot", {"destination_url": f"file://{folder}"})
            took = time.monotonic() - began
            guest.kill()
            while guest.pump(0.1):
                pass
            for value in guest.values("step")[chain.heard :]:
                chain.check(value)
            guest.__exit__()
            begun = guest.unfinished_line
            guest = Guest(
                job, work, "--restore", f"source_url=file://{folder},resume=true", boot=False, api=True
            )
            guest.unfinished_line = begun  # Linux gives the console 16 bytes at a time
            chain.heard = 0
            chain.check(guest.hears("step"))
            figures.append(
                f"snapshot {took:.2f} s, restored and on its way after {guest.times['step']:.2f} s"
            )
            rmtree(folder)
        for _ in range(5):
            chain.check(guest.hears("step"))
    finally:
        guest.__exit__()
    print("note", f"{count} cycles with {cpus} processors: {'; '.join(figures[:3])}")
    print("note", f"the guest's clock went on by {chain.longest:.2f} s at most between two steps")


for _test in (
    test_restored_guest_goes_on_where_it_was,
    test_restored_guest_of_two_processors_goes_on_where_it_was,
):
    _test.limit = 90 * CYCLES + 180  # type: ignore[attr-defined]
del _test


class Chain:
    """The numbers that tests/guests/tool.c computes (``work``), in their order."""

    def __init__(self) -> None:
        self.step = -1
        self.heard = 0
        self.clock = 0.0
        self.longest = 0.0
        self._values: dict[int, str] = {}

    def check(self, line: str) -> None:
        """The next one: the step after the last one, later by its clock."""
        self.heard += 1
        step, value, clock = line.split()
        assert int(step) == self.step + 1, f"step {step} comes after step {self.step}"
        assert float(clock) >= self.clock, f"the clock went back from {self.clock} to {clock}"
        if self.step >= 0:
            self.longest = max(self.longest, float(clock) - self.clock)
        self.step, self.clock = int(step), float(clock)
        self._values[self.step] = value
        assert len(set(self._values.values())) == len(self._values), (
            f"the value of step {step} was there before"
        )
