# SPDX-License-Identifier: Apache-2.0
"""What a Linux guest makes of the synthetic interrupt controller, timers and EOIs that are not needed."""

from __future__ import annotations

from tests.vmm.guest import Guest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Job = dict[str, Any]

_LOOK = """\
dmesg | grep -o 'Hyper-V: privilege flags.*' | while read -r line; do echo "guest: offered $line"; done
for cpu in 0 1; do
    read -r event </sys/devices/system/clockevents/clockevent$cpu/current_device
    echo "guest: clockevent $event"
done
tick() { set -- $(grep HVS: /proc/interrupts); echo "guest: ticks ${2:-0} ${3:-0}"; }
tick
usleep 300000
tick
"""
_HOTPLUG = """\
for turn in 1 2 3; do
    echo 0 >/sys/devices/system/cpu/cpu1/online
    echo 1 >/sys/devices/system/cpu/cpu1/online
    read -r event </sys/devices/system/clockevents/clockevent1/current_device
    echo "guest: again $event"
    taskset -c 1 sh -c 'i=0; while [ $i -lt 500 ]; do i=$((i + 1)); done; echo "guest: counted $i"'
done
tick
"""


def test_linux_ticks_by_synthetic_timers_also_after_a_processor_was_off_line(job: Job) -> None:
    with Guest(job, _LOOK + _HOTPLUG, kernel="mshv-elf", cpus=2, hyperv=True) as guest:
        guest.hears("offered")
        for _ in range(2):
            assert guest.hears("clockevent") == "Hyper-V clockevent"
        first, second = ([int(word) for word in guest.hears("ticks").split()] for _ in range(2))
        assert second[0] > first[0] > 0 and second[1] > 0, (first, second)
        for _ in range(3):
            assert guest.hears("again") == "Hyper-V clockevent"
            assert guest.hears("counted") == "500"
        guest.hears("end")
        guest.ends()
        offered = guest.values("offered")[0]
        print("note", f"{offered}; end {guest.times['end']:.2f} s")


def test_linux_ticks_by_the_local_apic_unless_it_is_offered_more(job: Job) -> None:
    with Guest(job, _LOOK + _HOTPLUG, kernel="mshv-elf", cpus=2) as guest:
        for _ in range(2):
            assert guest.hears("clockevent").startswith("lapic")
        guest.hears("end")
        guest.ends()
        offered = guest.values("offered")[0]
        print("note", f"{offered}; end {guest.times['end']:.2f} s")
