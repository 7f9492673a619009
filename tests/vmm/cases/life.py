# SPDX-License-Identifier: Apache-2.0
"""Power button, reboot, crash, pause, the API's verbs, killing, devices that come and go."""

from __future__ import annotations

import os
import signal
import time

from tests.vmm.guest import FOLDER, Guest, await_gone

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Job = dict[str, Any]

REBOOTS = int(os.environ.get("ROOTVISOR_VMM_REBOOTS", "3"))

#: Waits for the power button as an init system does: the kernel's input device says it.
_BUTTON = """\
for device in /sys/class/input/event*; do
    read -r name <"$device/device/name"
    [ "$name" = "Power Button" ] && event=${device##*/}
done
echo "guest: button $event"
dd if="/dev/input/$event" bs=24 count=1 of=/dev/null 2>/dev/null
echo "guest: pressed"
"""


def test_power_button_reaches_the_guest_which_powers_off(job: Job) -> None:
    with Guest(job, _BUTTON, kernel="mshv-elf", api=True) as guest:
        assert guest.hears("button").startswith("event")
        guest.calls("PUT", "vm.power-button")
        guest.hears("pressed")
        guest.ends()


def test_sigpwr_is_the_power_button(job: Job) -> None:
    with Guest(job, _BUTTON, kernel="mshv-elf") as guest:
        guest.hears("button")
        os.kill(guest.pid, signal.SIGPWR)
        guest.hears("pressed")
        guest.ends()


def test_guest_reboots_again_and_again(job: Job) -> None:
    started = time.monotonic()
    with Guest(job, "reboot -f\nsleep 100\n", kernel="mshv-elf") as guest:
        for _ in range(REBOOTS + 1):
            guest.hears("up")
        guest.kill(signal.SIGTERM)
        assert guest.status == 128 + signal.SIGTERM, guest.status
        assert not guest.errors, guest.errors
    print("note", f"{REBOOTS} reboots in {time.monotonic() - started:.1f} s")


test_guest_reboots_again_and_again.limit = 60 * REBOOTS + 120  # type: ignore[attr-defined]


def test_panic_with_a_reboot_starts_the_guest_again(job: Job) -> None:
    with Guest(job, "echo c >/proc/sysrq-trigger\nsleep 100\n", kernel="mshv-elf") as guest:
        guest.hears("up")
        guest.hears("up")


def test_triple_fault_starts_the_guest_again(job: Job) -> None:
    with Guest(job, "reboot -f\nsleep 100\n", kernel="mshv-elf", append="reboot=triple") as guest:
        guest.hears("up")
        guest.hears("up")


def test_pause_stops_the_guest_and_its_clock(job: Job) -> None:
    with Guest(job, "tool clock 3\n", kernel="mshv-elf", api=True) as guest:
        guest.hears("up")
        started = time.monotonic()
        guest.hears("clock")
        guest.calls("PUT", "vm.pause")
        said = len(guest.said)
        paused = time.monotonic()
        while time.monotonic() < paused + 15:
            guest.pump(0.5)
        assert len(guest.said) == said
        assert guest.calls("GET", "vm.info")["state"] == "Paused"
        pause = time.monotonic() - paused
        guest.calls("PUT", "vm.resume")
        gap = float(guest.hears("gap"))
        ran = time.monotonic() - started - pause
        guest.ends()
        print(
            "note",
            f"{pause:.1f} s of pause: the guest's clock jumped by {gap:.3f} s at most, it ran {ran:.1f} s",
        )
        assert gap <= ran, "no clock goes on for longer than its guest runs"


def test_api_drives_a_guest_from_create_to_shutdown(job: Job) -> None:
    with Guest(job, "echo guest: ready\nread -r word\n", kernel="mshv-elf", api=True, boot=False) as guest:
        assert guest.calls("GET", "vmm.ping")["version"]
        guest.calls("GET", "vm.info", expect=4)
        config = {
            "payload": guest.payload,
            "cpus": {"boot_vcpus": 2, "max_vcpus": 2},
            "memory": {"size": 192 << 20},
            "console": {"mode": "Tty"},
        }
        guest.calls("PUT", "vm.create", config)
        assert guest.calls("GET", "vm.info")["state"] == "Created"
        guest.calls("PUT", "vm.boot")
        guest.hears("ready")
        info = guest.calls("GET", "vm.info")
        assert info["state"] == "Running" and info["config"]["memory"]["size"] == 192 << 20
        assert "__console" in info["device_tree"], info["device_tree"]
        guest.calls("PUT", "vm.pause")
        guest.calls("PUT", "vm.pause", expect=4)
        guest.calls("PUT", "vm.resume")
        counters = guest.calls("GET", "vm.counters")
        assert any(counters["__console"].values()), counters
        guest.calls("PUT", "vm.reboot")
        guest.hears("ready")
        guest.calls("PUT", "vm.shutdown")
        assert guest.calls("GET", "vm.info")["state"] == "Shutdown"
        guest.calls("PUT", "vm.boot")
        guest.hears("ready")
        guest.calls("PUT", "vm.delete")
        guest.calls("GET", "vm.info", expect=4)
        guest.calls("PUT", "vmm.shutdown")
        guest.ends()


def test_disk_and_net_come_and_go(job: Job) -> None:
    os.makedirs(FOLDER, exist_ok=True)
    path = f"{FOLDER}/plugged.raw"
    with open(path, "wb") as file:
        file.write(bytes(range(256)) * 4096)
    from hashlib import md5

    with open(path, "rb") as file:
        wanted = md5(file.read(), usedforsecurity=False).hexdigest()
    work = f"""\
gone() {{ tries=0; while [ -e "$1" ] && [ $tries -lt 300 ]; do tries=$((tries + 1)); usleep 100000; done
    [ -e "$1" ] && echo "guest: problem $1 stays"; }}
echo "guest: ready"
for round in 1 2; do
    await /dev/vda
    tries=0
    until [ "$(cat /sys/block/vda/size)" = 2048 ] || [ $tries -ge 300 ]; do
        tries=$((tries + 1)); usleep 100000
    done
    sum=$(md5sum /dev/vda 2>&1); echo "guest: sum ${{sum%% *}}"
    gone /dev/vda
    echo "guest: gone disk"
done
network
sum=$(timeout 100 wget -q -O - http://10.0.2.2:{job["port"]}/page | md5sum); echo "guest: page ${{sum%% *}}"
gone /sys/class/net/eth0
echo "guest: gone net"
"""
    with Guest(job, work, kernel="mshv-elf", api=True) as guest:
        guest.hears("ready")
        for _ in range(2):
            added = guest.calls("PUT", "vm.add-disk", {"path": path, "image_type": "Raw", "id": "extra"})
            assert added["id"] == "extra", added
            heard = guest.hears("sum")
            assert heard == wanted, f"{heard} instead of {wanted}"
            guest.calls("PUT", "vm.remove-device", {"id": "extra"})
            # Whether the guest has let go by now or not: never two of one name.
            guest.calls("PUT", "vm.pause")
            if "extra" in guest.calls("GET", "vm.info")["device_tree"]:
                guest.calls("PUT", "vm.add-disk", {"path": path, "id": "extra"}, expect=4)
            guest.calls("PUT", "vm.resume")
            guest.hears("gone")
            await_gone(guest, "extra")
        guest.calls("PUT", "vm.add-net", {"id": "wire", "mac": "52:54:00:01:02:03"})
        assert guest.hears("page") == job["page_md5"]
        guest.calls("PUT", "vm.remove-device", {"id": "wire"})
        assert guest.hears("gone") == "net"
        await_gone(guest, "wire")
        guest.ends()
