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
from .memory import PAGE, SharedMemory

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

    __slots__ = (
        "_debug",
        "_debug_words",
        "_map",
        "fd",
        "has_run",
        "index",
        "thread",
        "u8",
        "u16",
        "u32",
        "u64",
        "vm",
    )

    def __init__(self, vm: Vm, index: int, fd: int) -> None:
        self.vm = vm
        self.index = index
        self.fd = fd
        self.thread = 0
        #: KVM takes no other CPUID from then on; set by whoever runs it
        self.has_run = False
        self._debug = bytearray(128)
        self._debug_words = memoryview(self._debug).cast("Q")
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

    def try_msr(self, index: int) -> int | None:
        """Reads one MSR as the host sees it; None when KVM does not know it."""
        buffer = bytearray(struct.pack("<IIIIQ", 1, 0, index, 0, 0))
        if self.ioctl(abi.KVM_GET_MSRS, buffer) != 1:
            return None
        return int.from_bytes(buffer[16:24], "little")

    def shadow_stack_pointer(self, value: int | None = None) -> int | None:
        """Reads the shadow stack pointer, or stores ``value``; None when KVM has none, or does not take the value."""
        memory = SharedMemory("register", PAGE)
        try:
            if value is not None:
                memory.view[:8] = value.to_bytes(8, "little")
            request = bytearray(struct.pack("<QQ", abi.REG_GUEST_SSP, memory.address))
            ioctl(self.fd, abi.KVM_GET_ONE_REG if value is None else abi.KVM_SET_ONE_REG, request)
            return int.from_bytes(memory.view[:8], "little")
        except OSError:
            return None
        finally:
            memory.close()

    def xcr0(self) -> int:
        """XCR0 as KVM believes it to be (KVM_GET_XCRS); 1 where the processor has no XSAVE."""
        buffer = bytearray(392)
        self.ioctl(abi.KVM_GET_XCRS, buffer)
        return int.from_bytes(buffer[16:24], "little") or 1

    def set_xcr0(self, value: int) -> None:
        """Sets XCR0. KvmError when the processor's CPUID does not allow the value."""
        buffer = bytearray(392)
        struct.pack_into("<IIIIQ", buffer, 0, 1, 0, 0, 0, value)
        self.ioctl(abi.KVM_SET_XCRS, buffer)

    def debug_registers(self) -> bytearray:
        """``struct kvm_debugregs`` (128 bytes): DR0-3, DR6, DR7 as u64."""
        buffer = bytearray(128)
        self.ioctl(abi.KVM_GET_DEBUGREGS, buffer)
        return buffer

    def dr7(self) -> int:
        """DR7 alone."""
        self.ioctl(abi.KVM_GET_DEBUGREGS, self._debug)
        return int(self._debug_words[abi.DEBUGREGS_DR7 >> 3])

    def set_debug_registers(self, state: bytearray) -> None:
        """Writes back what :meth:`debug_registers` gave. KvmError for reserved bits in DR6 and DR7."""
        self.ioctl(abi.KVM_SET_DEBUGREGS, state)

    def xsave(self, buffer: bytearray) -> None:
        """Reads the XSAVE image in the standard format into ``buffer`` (4096 bytes); works without XSAVE too."""
        self.ioctl(abi.KVM_GET_XSAVE, buffer)

    def set_xsave(self, buffer: bytearray) -> None:
        """Writes an image. KvmError for components that CPUID does not allow, and for reserved bits of MXCSR."""
        self.ioctl(abi.KVM_SET_XSAVE, buffer)

    # --- local APIC, activity, events -----------------------------------------------------------------------------
    def lapic(self) -> bytearray:
        """The local APIC's registers (1024 bytes, a u32 every 16)."""
        buffer = bytearray(1024)
        self.ioctl(abi.KVM_GET_LAPIC, buffer)
        return buffer

    def set_lapic(self, registers: bytearray) -> None:
        """Writes the local APIC's registers; the timer starts anew from the current count in them."""
        self.ioctl(abi.KVM_SET_LAPIC, registers)

    def mp_state(self) -> int:
        """One of ``abi.MP_STATE_*``. KVM handles a waiting INIT or SIPI first, which changes registers."""
        buffer = bytearray(4)
        self.ioctl(abi.KVM_GET_MP_STATE, buffer)
        return int.from_bytes(buffer, "little")

    def set_mp_state(self, state: int) -> None:
        """Sets one of ``abi.MP_STATE_*``."""
        self.ioctl(abi.KVM_SET_MP_STATE, bytearray(state.to_bytes(4, "little")))

    def events(self) -> bytearray:
        """``struct kvm_vcpu_events`` (64 bytes), an NMI that has just been raised among them."""
        buffer = bytearray(64)
        self.ioctl(abi.KVM_GET_VCPU_EVENTS, buffer)
        return buffer

    def set_events(self, events: bytearray) -> None:
        """Writes events; the flags say which of the optional ones."""
        self.ioctl(abi.KVM_SET_VCPU_EVENTS, events)

    def interrupt(self, vector: int) -> bool:
        """KVM_INTERRUPT: the ExtINT vector of an interrupt controller of ours (split). False while KVM still
        has one."""
        try:
            ioctl(self.fd, abi.KVM_INTERRUPT, bytearray(vector.to_bytes(4, "little")))
        except FileExistsError:
            return False
        except OSError as error:
            raise ioctl_error(abi.KVM_INTERRUPT, error) from error
        return True

    def enable_capability(self, capability: int, argument: int) -> None:
        """KVM_ENABLE_CAP on this processor, with one argument."""
        self.ioctl(abi.KVM_ENABLE_CAP, bytearray(struct.pack("<IIQ88x", capability, 0, argument)))

    # --- the part of struct kvm_run with registers ----------------------------------------------------------------
    def fill_sync_area(self) -> None:
        """Makes the registers in ``struct kvm_run`` those of the processor, without running it.

        By ioctl: KVM_RUN with immediate_exit would also complete the instruction of the last exit.
        """
        u8 = self.u8
        regs = bytearray(144)
        self.ioctl(abi.KVM_GET_REGS, regs)
        u8[abi.SYNC_REGS_AT : abi.SYNC_SREGS_AT] = regs
        u8[abi.SYNC_SREGS_AT : abi.SYNC_EVENTS_AT] = self.get_sregs()
        u8[abi.SYNC_EVENTS_AT : abi.SYNC_EVENTS_AT + 64] = self.events()

    def commit_sync_area(self) -> None:
        """Hands over by ioctl what is marked dirty in ``struct kvm_run``, which KVM_RUN does not do in every state.

        KvmError when KVM refuses a value; what it has taken is no longer marked.
        """
        u64 = self.u64
        at = abi.RUN_DIRTY_REGS >> 3
        dirty = u64[at]
        if dirty & abi.SYNC_REGS:
            self.ioctl(abi.KVM_SET_REGS, bytearray(self.u8[abi.SYNC_REGS_AT : abi.SYNC_SREGS_AT]))
            u64[at] &= ~abi.SYNC_REGS
        if dirty & abi.SYNC_SREGS:
            self.ioctl(abi.KVM_SET_SREGS, bytearray(self.u8[abi.SYNC_SREGS_AT : abi.SYNC_EVENTS_AT]))
            u64[at] &= ~abi.SYNC_SREGS
        if dirty & abi.SYNC_EVENTS:
            self.ioctl(
                abi.KVM_SET_VCPU_EVENTS, bytearray(self.u8[abi.SYNC_EVENTS_AT : abi.SYNC_EVENTS_AT + 64])
            )
            u64[at] &= ~abi.SYNC_EVENTS

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
