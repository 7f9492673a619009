# SPDX-License-Identifier: Apache-2.0
"""Kernels, processors, memory, consoles."""

from __future__ import annotations

from tests.vmm.guest import Guest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Job = dict[str, Any]

_PROCESSORS = """\
for folder in /sys/devices/system/cpu/cpu[0-9]*; do
    cpu=${folder##*cpu}
    taskset -c "$cpu" sh -c 'i=0; while [ $i -lt 500 ]; do i=$((i + 1)); done; echo $i' >"/worked$cpu" &
done
wait
count=0
for file in /worked*; do read -r worked <"$file"; [ "$worked" = 500 ] && count=$((count + 1)); done
echo "guest: processors $count"
read -r source </sys/devices/system/clocksource/clocksource0/current_clocksource
echo "guest: clocksource $source"
read -r _ kib _ </proc/meminfo
echo "guest: memory $kib"
dmesg | grep -q 'Hypervisor detected: Microsoft Hyper-V' && echo "guest: child yes"
"""


def boots(job: Job, kernel: str, cpus: int, memory: str, work: str = _PROCESSORS) -> None:
    """A guest with this kernel has its processors, a clock and its memory."""
    with Guest(job, work, kernel=kernel, cpus=cpus, memory=memory) as guest:
        assert guest.hears("up") == job["kernels"][kernel]["version"]
        assert guest.hears("processors") == str(cpus)
        clock = guest.hears("clocksource")
        assert clock.startswith("hyperv_clocksource") or clock == "tsc", clock
        amount = int(guest.hears("memory")) * 1024
        wanted = int(memory[:-1]) << (20 if memory[-1] == "M" else 30)
        assert wanted * 3 // 4 - (32 << 20) < amount <= wanted, amount
        guest.hears("end")
        guest.ends()
        print(
            "note",
            f"{kernel} cpus {cpus} memory {memory}: up {guest.times['up']:.2f} s, end {guest.times['end']:.2f} s",
        )


def test_mshv_kernel_on_one_processor_with_128_mib(job: Job) -> None:
    boots(job, "mshv-elf", 1, "128M")


def test_mshv_kernel_on_two_processors(job: Job) -> None:
    boots(job, "mshv-elf", 2, "256M")


def test_mshv_kernel_on_four_processors(job: Job) -> None:
    boots(job, "mshv-elf", 4, "256M")


def test_stock_kernel_on_one_processor(job: Job) -> None:
    boots(job, "stock-elf", 1, "256M")


def test_stock_kernel_on_two_processors(job: Job) -> None:
    boots(job, "stock-elf", 2, "256M")


def test_stock_kernel_on_four_processors(job: Job) -> None:
    boots(job, "stock-elf", 4, "256M")


def test_bzimage_of_the_mshv_kernel(job: Job) -> None:
    boots(job, "mshv", 1, "128M")


_ABOVE_4_GIB = """\
tool touch 200
read -r _ kib _ </proc/meminfo
echo "guest: memory $kib"
grep -i 'system ram' /proc/iomem | while read -r line; do echo "guest: ram $line"; done
"""


def test_memory_above_4_gib_is_used(job: Job) -> None:
    """The size of the guest is more than the root has: pages come as they are touched."""
    with Guest(job, _ABOVE_4_GIB, kernel="mshv-elf", memory="4G") as guest:
        assert guest.hears("touched") == "200"
        assert int(guest.hears("memory")) > 3 << 20
        guest.hears("end")
        assert any(line.startswith("100000000-") for line in guest.values("ram")), guest.values("ram")
        guest.ends()


def test_serial_port_takes_input_and_gives_output(job: Job) -> None:
    with Guest(job, 'read -r word\necho "guest: heard $word"\n', kernel="mshv-elf", console="ttyS0") as guest:
        guest.hears("up")
        guest.types(b"through the serial port\n")
        assert guest.hears("heard") == "through the serial port"
        guest.ends()


def test_virtio_console_takes_input_and_gives_output(job: Job) -> None:
    with Guest(job, 'read -r word\necho "guest: heard $word"\n', kernel="mshv-elf") as guest:
        guest.hears("up")
        guest.types(b"through the console\n")
        assert guest.hears("heard") == "through the console"
        guest.ends()
