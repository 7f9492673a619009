# SPDX-License-Identifier: Apache-2.0
"""A virtual processor: its shared run page, registers, MSRs and the way to stop it from another thread."""

from __future__ import annotations

import mmap
import os
import struct
from _signal import SIGUSR1, pthread_kill  # type: ignore[import-not-found, unused-ignore]
from fcntl import ioctl

from . import abi
from .errors import ioctl_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from .vm import Vm

#: Offset of the XMM registers in ``struct kvm_fpu``: after 128 bytes of x87 registers and 24 of control words.
FPU_XMM = 152

_REGS = struct.Struct("<18Q")
_SEGMENT = struct.Struct("<QIHBBBBBBBBBx")
#: Position of each segment register in struct kvm_sregs.
_SEGMENTS = {"cs": 0, "ds": 24, "es": 48, "fs": 72, "gs": 96, "ss": 120, "tr": 144, "ldt": 168}
_CONTROL = {"cr0": 224, "cr2": 232, "cr3": 240, "cr4": 248, "cr8": 256, "efer": 264, "apic_base": 272}


class Vcpu:
    """One KVM processor. ``u8/u16/u32/u64`` are views of ``struct kvm_run`` in units of that width."""

    __slots__ = ("_map", "fd", "index", "thread", "u8", "u16", "u32", "u64", "vm")

    def __init__(self, vm: Vm, index: int, fd: int) -> None:
        self.vm = vm
        self.index = index
        self.fd = fd
        self.thread = 0
        self._map = mmap.mmap(fd, vm.kvm.run_size)
        self.u8 = memoryview(self._map)
        self.u16 = self.u8.cast("H")
        self.u32 = self.u8.cast("I")
        self.u64 = self.u8.cast("Q")

    def ioctl(self, request: int, argument: int | bytearray = 0) -> int:
        """An ioctl on this processor; raises KvmError."""
        try:
            return ioctl(self.fd, request, argument)
        except OSError as error:
            raise ioctl_error(request, error) from error

    # --- registers ------------------------------------------------------------------------------------------------
    def get_regs(self) -> tuple[int, ...]:
        """The 18 general registers in the order of :data:`abi.REGS`."""
        buffer = bytearray(144)
        self.ioctl(abi.KVM_GET_REGS, buffer)
        return _REGS.unpack(buffer)

    def set_regs(self, **values: int) -> None:
        """Changes the named general registers and keeps the others."""
        regs = list(self.get_regs())
        for name, value in values.items():
            regs[abi.REGS.index(name)] = value
        self.ioctl(abi.KVM_SET_REGS, bytearray(_REGS.pack(*regs)))

    def get_sregs(self) -> bytearray:
        """``struct kvm_sregs`` (312 bytes)."""
        buffer = bytearray(312)
        self.ioctl(abi.KVM_GET_SREGS, buffer)
        return buffer

    def set_sregs(
        self,
        segments: Mapping[str, tuple[int, ...]] | None = None,
        tables: dict[str, tuple[int, int]] | None = None,
        **control: int,
    ) -> None:
        """Changes segments (base, limit, selector, type, present, dpl, db, s, l, g, avl, unusable), the tables
        ``gdt``/``idt`` (base, limit) and control registers by name; the rest stays."""
        sregs = self.get_sregs()
        for name, fields in (segments or {}).items():
            _SEGMENT.pack_into(sregs, _SEGMENTS[name], *(tuple(fields) + (0,) * 12)[:12])
        for name, (base, limit) in (tables or {}).items():
            struct.pack_into("<QH", sregs, abi.SREGS_GDT if name == "gdt" else abi.SREGS_IDT, base, limit)
        for name, value in control.items():
            struct.pack_into("<Q", sregs, _CONTROL[name], value)
        self.ioctl(abi.KVM_SET_SREGS, sregs)

    def set_cpuid(self, entries: list[tuple[int, int, int, int, int, int, int]]) -> None:
        """KVM_SET_CPUID2 with (function, index, flags, eax, ebx, ecx, edx)."""
        packed = bytearray(struct.pack("<II", len(entries), 0))
        for entry in entries:
            packed += struct.pack("<7I12x", *entry)
        self.ioctl(abi.KVM_SET_CPUID2, packed)

    def get_msr(self, index: int) -> int:
        """Reads one MSR as the host sees it."""
        buffer = bytearray(struct.pack("<IIIIQ", 1, 0, index, 0, 0))
        self.ioctl(abi.KVM_GET_MSRS, buffer)
        return int.from_bytes(buffer[16:24], "little")

    def set_msr(self, index: int, value: int) -> bool:
        """Writes one MSR past the filter; False when KVM does not know it."""
        return self.ioctl(abi.KVM_SET_MSRS, bytearray(struct.pack("<IIIIQ", 1, 0, index, 0, value))) == 1

    def tsc_khz(self) -> int:
        """Frequency of the guest's TSC in kHz."""
        return self.ioctl(abi.KVM_GET_TSC_KHZ)

    def xcr0(self) -> int:
        """XCR0 as KVM believes it to be (KVM_GET_XCRS)."""
        buffer = bytearray(392)
        self.ioctl(abi.KVM_GET_XCRS, buffer)
        return int.from_bytes(buffer[16:24], "little")

    def fpu(self) -> bytearray:
        """``struct kvm_fpu`` (416 bytes): XMM n lies at :data:`FPU_XMM` + 16 * n."""
        buffer = bytearray(416)
        self.ioctl(abi.KVM_GET_FPU, buffer)
        return buffer

    def set_fpu(self, state: bytearray) -> None:
        """Writes back what :meth:`fpu` gave."""
        self.ioctl(abi.KVM_SET_FPU, state)

    def translate(self, gva: int) -> int | None:
        """Guest physical address of ``gva`` under the processor's present paging, or None."""
        buffer = bytearray(struct.pack("<QQ8x", gva, 0))
        self.ioctl(abi.KVM_TRANSLATE, buffer)
        return int.from_bytes(buffer[8:16], "little") if buffer[16] else None

    def inject_exception(self, vector: int, error_code: int | None = None) -> None:
        """Makes the processor take exception ``vector`` at its present RIP (KVM_SET_VCPU_EVENTS)."""
        events = bytearray(64)
        self.ioctl(abi.KVM_GET_VCPU_EVENTS, events)
        # struct kvm_vcpu_events.exception: injected, nr, has_error_code, pending, error_code
        struct.pack_into("<BBBBI", events, 0, 1, vector, error_code is not None, 0, error_code or 0)
        self.ioctl(abi.KVM_SET_VCPU_EVENTS, events)

    def finish_exit(self) -> None:
        """Lets KVM complete the instruction of the last exit without running the guest further."""
        self.u8[abi.RUN_IMMEDIATE_EXIT] = 1
        try:
            ioctl(self.fd, abi.KVM_RUN)
        except InterruptedError:
            pass
        except OSError as error:
            raise ioctl_error(abi.KVM_RUN, error) from error
        finally:
            self.u8[abi.RUN_IMMEDIATE_EXIT] = 0

    # --- stopping -------------------------------------------------------------------------------------------------
    def kick(self) -> None:
        """Makes a running KVM_RUN return EINTR, and the next one if none runs now.

        The thread that runs this processor must have set :attr:`thread`; SIGUSR1 needs a handler in the process.
        """
        self.u8[abi.RUN_IMMEDIATE_EXIT] = 1  # first, or a signal that lands just before KVM_RUN is lost
        if self.thread:
            try:
                pthread_kill(self.thread, SIGUSR1)
            except ProcessLookupError:
                pass

    def close(self) -> None:
        """Unmaps the run page and closes the processor."""
        for view in (self.u64, self.u32, self.u16, self.u8):
            view.release()
        self._map.close()
        os.close(self.fd)
