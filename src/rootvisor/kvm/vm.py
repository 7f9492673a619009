# SPDX-License-Identifier: Apache-2.0
"""A virtual machine: memory slots, in-kernel interrupt controllers, interrupt routes, event file descriptors."""

from __future__ import annotations

import os
import struct
from _thread import allocate_lock
from fcntl import ioctl

from . import abi
from .coalesced import CoalescedWrites
from .errors import KvmError, ioctl_error
from .memory import PAGE, SharedMemory
from .vcpu import Vcpu

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from .system import Kvm

_REGION = struct.Struct("<IIQQQ")
_ROUTE = struct.Struct("<IIII32x")
_MSI_ROUTE = struct.Struct("<IIIIIIII16x")
_RANGE = struct.Struct("<IIIxxxxQ")


class Vm:
    """One KVM virtual machine. All ioctls raise :class:`KvmError`."""

    __slots__ = ("_route_lock", "_routes", "_slots", "_split", "coalesced", "fd", "kvm", "vcpus")

    def __init__(self, kvm: Kvm) -> None:
        self.kvm = kvm
        try:
            self.fd = ioctl(kvm.fd, abi.KVM_CREATE_VM, 0)
        except OSError as error:
            raise ioctl_error(abi.KVM_CREATE_VM, error) from error
        self._take_tsc_frequency_of_host()
        self.vcpus: list[Vcpu] = []
        self._slots: dict[int, tuple[int, int]] = {}
        self._routes: dict[int, tuple[int, int]] = {}
        self._route_lock = allocate_lock()
        self._split = False
        self.coalesced = CoalescedWrites(self)

    def ioctl(self, request: int, argument: int | bytearray = 0) -> int:
        """An ioctl on the machine; raises KvmError."""
        try:
            return ioctl(self.fd, request, argument)
        except OSError as error:
            raise ioctl_error(request, error) from error

    def _take_tsc_frequency_of_host(self) -> None:
        """Gives future processors the frequency of the host's TSC as it is known now.

        On a host without CONSTANT_TSC KVM takes the one that was known when its module was loaded
        (``arch/x86/kvm/x86.c:kvm_timer_init``). Linux refines its calibration a second after boot; where the later
        figure is lower by 250 ppm, KVM has guests "catch up", and their TSC stands still outside of KVM_RUN, jumps
        and disagrees with MSR_TSC. Kernels before 5.18 do not know the ioctl and keep their default.
        """
        try:
            ioctl(self.fd, abi.KVM_SET_TSC_KHZ, 0)
        except OSError:
            pass

    # --- processors and memory ------------------------------------------------------------------------------------
    def create_vcpu(self, index: int) -> Vcpu:
        """Creates processor ``index`` (its APIC id too)."""
        vcpu = Vcpu(self, index, self.ioctl(abi.KVM_CREATE_VCPU, index))
        self.vcpus.append(vcpu)
        return vcpu

    def set_memory(self, slot: int, gpa: int, size: int, address: int, flags: int = 0) -> None:
        """Maps ``size`` bytes at user address ``address`` to ``gpa``; size 0 removes the slot."""
        if gpa % PAGE or size % PAGE or address % PAGE:
            raise KvmError(f"memory slot {slot} is not page aligned: gpa {gpa:#x}, size {size:#x}")
        self.ioctl(abi.KVM_SET_USER_MEMORY_REGION, bytearray(_REGION.pack(slot, flags, gpa, size, address)))
        if size:
            self._slots[slot] = (gpa, size)
        else:
            self._slots.pop(slot, None)

    def dirty_log(self, slot: int, size: int) -> bytes:
        """The ``size`` bytes of a logged slot's bitmap (bit 0 of byte 0 is its first page); KVM starts anew."""
        import ctypes

        bitmap = ctypes.create_string_buffer(size)
        self.ioctl(abi.KVM_GET_DIRTY_LOG, bytearray(struct.pack("<IIQ", slot, 0, ctypes.addressof(bitmap))))
        return bitmap.raw

    # --- capabilities ---------------------------------------------------------------------------------------------
    def enable_capability(self, capability: int, argument: int) -> None:
        """KVM_ENABLE_CAP with one argument."""
        self.ioctl(abi.KVM_ENABLE_CAP, bytearray(struct.pack("<IIQ88x", capability, 0, argument)))

    def filter_msrs(self, ranges: Iterable[tuple[int, int]], allowed: int | None = None) -> None:
        """Makes every access to the MSRs in ``ranges`` (first, count) leave to user space, before KVM looks at them.

        Count must be a multiple of 8. Unknown and invalid accesses leave too (source: api.rst 4.97, 7.22). KVM looks at
        ``allowed``, one MSR among the first 0x3000 of the first range, all the same.
        """
        self.enable_capability(
            abi.CAP_X86_USER_SPACE_MSR,
            abi.MSR_EXIT_REASON_FILTER | abi.MSR_EXIT_REASON_UNKNOWN | abi.MSR_EXIT_REASON_INVAL,
        )
        # KVM copies the bitmaps; all but the first range share one that is zero (deny).
        bitmaps = SharedMemory("msr-filter", 2 * PAGE)
        packed = bytearray(struct.pack("<II", 0, 0))
        used = 0
        for first, count in ranges:
            if allowed is not None and not used:
                bitmaps.view[allowed - first >> 3] = 1 << (allowed - first & 7)
            while count > 0:
                part = min(count, 0x600 * 8)
                packed += _RANGE.pack(3, part, first, bitmaps.address + (PAGE if used else 0))
                first += part
                count -= part
                used += 1
        packed += bytes((16 - used) * _RANGE.size)
        try:
            self.ioctl(abi.KVM_X86_SET_MSR_FILTER, packed)
        finally:
            bitmaps.close()

    # --- interrupt controllers ------------------------------------------------------------------------------------
    def create_irqchip(self) -> None:
        """In-kernel local APICs, IO-APIC and PICs, and the PIT that old guests want."""
        self.ioctl(abi.KVM_CREATE_IRQCHIP)
        self.ioctl(abi.KVM_CREATE_PIT2, bytearray(64))

    def create_split_irqchip(self, reserved: int) -> None:
        """In-kernel local APICs only, before the first processor. Interrupts arrive as messages; KVM_EXIT_IOAPIC_EOI
        tells of the EOI of a vector that has a level-triggered route (:meth:`set_msi_route`) on a GSI below
        ``reserved``, at most 255 (``arch/x86/kvm/irq.c:kvm_scan_ioapic_routes``).

        Destinations have 32 bits, 31:8 of them in the upper address half; KVM_GET_LAPIC gives x2APIC ids in full.
        """
        self.enable_capability(abi.CAP_SPLIT_IRQCHIP, reserved)
        self.enable_capability(abi.CAP_X2APIC_API, abi.X2APIC_USE_32BIT_IDS)
        self._split = True

    def tsc_khz(self) -> int:
        """Frequency in kHz of the TSC that processors will have."""
        return self.ioctl(abi.KVM_GET_TSC_KHZ)

    def irq_line(self, gsi: int, level: int) -> None:
        """Sets an IO-APIC pin."""
        self.ioctl(abi.KVM_IRQ_LINE, bytearray(struct.pack("<II", gsi, level)))

    def signal_msi(self, message: bytearray) -> bool:
        """Raises a message made by :func:`msi_message`; a bytearray, because KVM_SIGNAL_MSI is on the hot path.

        False when no local APIC took it: none has that id, or it is switched off.
        """
        try:
            return bool(ioctl(self.fd, abi.KVM_SIGNAL_MSI, message))
        except PermissionError:  # KVM's -1, "nobody", taken for an errno
            return False
        except OSError as error:
            raise ioctl_error(abi.KVM_SIGNAL_MSI, error) from error

    def read_ioapic(self) -> bytearray:
        """``struct kvm_irqchip`` of the IO-APIC: redirection entries are u64 at offset 8 + 24 + 8 * pin."""
        buffer = bytearray(520)
        struct.pack_into("<I", buffer, 0, abi.IRQCHIP_IOAPIC)
        self.ioctl(abi.KVM_GET_IRQCHIP, buffer)
        return buffer

    def write_ioapic(self, state: bytearray) -> None:
        """Writes back what :meth:`read_ioapic` gave."""
        self.ioctl(abi.KVM_SET_IRQCHIP, state)

    # --- routes and event file descriptors ------------------------------------------------------------------------
    def set_msi_route(self, gsi: int, message: tuple[int, int] | None) -> None:
        """Routes ``gsi`` (24 and up; any with a split interrupt controller) to the MSI (address, data), or removes
        the route."""
        # KVM gets whole tables: one that was made earlier must not come later, with another thread's old route.
        with self._route_lock:
            if message is None:
                if self._routes.pop(gsi, None) is None:
                    return
            elif self._routes.get(gsi) == message:
                return
            else:
                self._routes[gsi] = message
            self._set_routes()

    def _set_routes(self) -> None:
        table = bytearray()
        count = 0
        # KVM_SET_GSI_ROUTING replaces the table: the pins of an in-kernel IO-APIC and PIC come with it
        for pin in range(0 if self._split else 24):
            table += _ROUTE.pack(pin, abi.ROUTING_IRQCHIP, 0, 0)[:16]
            table += struct.pack("<II24x", abi.IRQCHIP_IOAPIC, pin)
            count += 1
            if pin < 16:
                chip = abi.IRQCHIP_PIC_MASTER if pin < 8 else abi.IRQCHIP_PIC_SLAVE
                table += _ROUTE.pack(pin, abi.ROUTING_IRQCHIP, 0, 0)[:16]
                table += struct.pack("<II24x", chip, pin % 8)
                count += 1
        for number, (address, data) in self._routes.items():
            table += _MSI_ROUTE.pack(
                number, abi.ROUTING_MSI, 0, 0, address & 0xFFFFFFFF, address >> 32, data & 0xFFFFFFFF, 0
            )
            count += 1
        self.ioctl(abi.KVM_SET_GSI_ROUTING, bytearray(struct.pack("<II", count, 0)) + table)

    def irqfd(self, fd: int, gsi: int, assign: bool = True, resample: int = -1) -> None:
        """Connects (or disconnects) an eventfd to ``gsi``.

        With ``resample``, another eventfd, the interrupt is level-triggered: the line stays raised until the guest's
        EOI, which lowers it and signals that eventfd (``Documentation/virt/kvm/api.rst`` 4.75).
        """
        flags = 0 if assign else abi.IRQFD_DEASSIGN
        if resample >= 0:
            flags |= abi.IRQFD_RESAMPLE
        self.ioctl(abi.KVM_IRQFD, bytearray(struct.pack("<IIII16x", fd, gsi, flags, max(resample, 0))))

    def ioeventfd(self, gpa: int, size: int, fd: int, datamatch: int | None, assign: bool = True) -> None:
        """Makes guest writes of ``size`` bytes (0: any size) at MMIO ``gpa`` signal ``fd`` without an exit."""
        flags = (abi.IOEVENTFD_DATAMATCH if datamatch is not None else 0) | (
            0 if assign else abi.IOEVENTFD_DEASSIGN
        )
        self.ioctl(
            abi.KVM_IOEVENTFD, bytearray(struct.pack("<QQIiI36x", datamatch or 0, gpa, size, fd, flags))
        )

    def close(self) -> None:
        """Closes processors and the machine; their threads must have ended."""
        self.coalesced.close()
        for vcpu in self.vcpus:
            vcpu.close()
        self.vcpus.clear()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def msi_message(address: int, data: int) -> bytearray:
    """``struct kvm_msi`` for :meth:`Vm.signal_msi`."""
    return bytearray(struct.pack("<IIII16x", address & 0xFFFFFFFF, address >> 32, data, 0))
