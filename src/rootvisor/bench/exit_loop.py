# SPDX-License-Identifier: Apache-2.0
"""The other side of exit_loop.c: the same guest in our own run loop. ``python -I -S exit_loop.py IMAGE [bare]``.

Everything between the guest and the printed marks is the product's code: a root partition, `VirtualProcessor`, its
dispatch of ports, MSRs and hypercalls. Only the computer around it is missing. With ``bare`` the processor is run by
the least Python that answers this guest, exit_loop.c word for word: what Python costs without any product of ours.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from rootvisor.hypervisor.root_partition import RootPartition
    from rootvisor.kvm.memory import SharedMemory
    from rootvisor.kvm.vcpu import Vcpu

CALL_GET_PARTITION_ID = 0x46


class _Marks:
    """The device behind the mark port."""

    def __init__(self, partition: RootPartition, end_mark: int) -> None:
        from time import perf_counter_ns

        self._clock = perf_counter_ns
        self._partition = partition
        self._end = end_mark
        self.seen: list[tuple[int, int]] = []

    def read(self, offset: int, size: int) -> int:
        """Nothing to read."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """A mark; the last one ends the partition."""
        self.seen.append((value, self._clock()))
        if value == self._end:
            self._partition.end("poweroff")


class _Device:
    """A device with one register."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def read(self, offset: int, size: int) -> int:
        """The register."""
        return self.value

    def write(self, offset: int, size: int, value: int) -> None:
        """The register."""
        self.value = value


def _run_bare(vcpu: Vcpu, memory: SharedMemory, marks: _Marks, mark_port: int, end_mark: int) -> None:
    """The loop of exit_loop.c."""
    from fcntl import ioctl

    from rootvisor.bus.address_space import write_access
    from rootvisor.hypervisor.hypercall_abi import PORT
    from rootvisor.kvm import abi

    u8, u32, u64 = vcpu.u8, vcpu.u32, vcpu.u64
    ram = memory.view.cast("Q")
    fd = vcpu.fd
    run = abi.KVM_RUN
    rax = abi.RUN_SYNC // 8
    rcx, r8 = rax + 2, rax + 8
    dirty = abi.RUN_DIRTY_REGS // 8
    hypercall = write_access(PORT, 4)
    mark = write_access(mark_port, 1)
    device = 0
    while device != end_mark:
        ioctl(fd, run)
        reason = u32[2]
        if reason == 2:
            access = u64[4]
            if access == hypercall:
                if u64[rcx] == CALL_GET_PARTITION_ID:
                    ram[u64[r8] >> 3] = 1
                    u64[rax] = 0
                else:
                    u64[rax] = 2
                u64[dirty] = abi.SYNC_REGS
            else:
                device = u8[u64[5]]
                if access == mark:
                    marks.write(0, 1, device)
        elif reason == 29:
            u64[6] = 0
        else:
            raise SystemExit(f"KVM stopped with exit {reason}")


def main() -> int:
    """Run the image and print "mark nanoseconds" for every mark."""
    from select import POLLIN, poll

    from rootvisor.bench.guest_code import (
        DATA_PORT,
        END_MARK,
        ENTRY,
        HYPERCALL_GPA,
        MARK_PORT,
        PAGE_TABLE,
        STACK,
    )
    from rootvisor.bus.address_space import GuestMemory, MemoryRegion
    from rootvisor.hypervisor.hypercall_abi import write_page
    from rootvisor.hypervisor.hypervisor import Hypervisor
    from rootvisor.hypervisor.overlay import OwnedPages
    from rootvisor.kvm.memory import SharedMemory
    from rootvisor.kvm.system import Kvm

    with open(sys.argv[1], "rb") as file:
        image = file.read()
    sys.setswitchinterval(1e-4)  # as rootvisor.machine.main does
    memory = SharedMemory("bench", len(image))
    memory.view[:] = image
    hypervisor = Hypervisor(Kvm())
    regions = (MemoryRegion(0, memory.size, memory.view, memory.fd, 0),)
    partition = hypervisor.create_root(GuestMemory(regions), (HYPERCALL_GPA, OwnedPages.needed(1)))
    partition.vm.set_memory(0, 0, memory.size, memory.address)
    write_page(partition.hypercall_page.view)
    partition.create_vps(1, False)
    marks = _Marks(partition, END_MARK)
    partition.ports.add(MARK_PORT, 1, marks)
    partition.ports.add(DATA_PORT, 1, _Device())
    vcpu = partition.vps[0].vcpu
    data = (0, 0xFFFFFFFF, 16, 3, 1, 0, 1, 1, 0, 1, 0, 0)
    segments = dict.fromkeys(("ds", "es", "fs", "gs", "ss"), data)
    segments["cs"] = (0, 0xFFFFFFFF, 8, 11, 1, 0, 0, 1, 1, 1, 0, 0)
    vcpu.set_sregs(segments, cr0=0x80050033, cr3=PAGE_TABLE, cr4=0x20, efer=0x500)
    vcpu.set_regs(rip=ENTRY, rsp=STACK, rflags=2)
    # Kicks come from the VP's own thread only, between two KVM_RUNs; SIGUSR1 must not end the process all the same.
    from signal import SIGUSR1, signal

    signal(SIGUSR1, lambda _number, _frame: None)
    if sys.argv[2:] == ["bare"]:
        _run_bare(vcpu, memory, marks, MARK_PORT, END_MARK)
        hypervisor.close()
        print("\n".join(f"{mark} {ns}" for mark, ns in marks.seen))
        return 0
    waiting = poll()
    waiting.register(partition.ended_fd, POLLIN)
    partition.start()
    while not partition.ended:
        waiting.poll(100)
    partition.stop()
    how, detail = partition.ended, partition.detail
    hypervisor.close()
    if how != "poweroff":
        sys.stderr.write(f"{how}: {detail}\n")
        return 1
    print("\n".join(f"{mark} {ns}" for mark, ns in marks.seen))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, __file__.rsplit("/", 3)[0])
    sys.exit(main())
