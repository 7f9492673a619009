# SPDX-License-Identifier: Apache-2.0
"""A child's VP that is parked, for tests of its registers and state: the attributes that they use, no thread.

On a :class:`FakeVcpu`, which stores what it is told, or on a processor of KVM's.
"""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import Any

from rootvisor.hypervisor import vp_registers
from rootvisor.hypervisor.child_cpuid import CpuidResults
from rootvisor.hypervisor.deposits import DepositedPages, DepositPool
from rootvisor.hypervisor.reference_time import ReferenceTime
from rootvisor.hypervisor.synic import Synic
from rootvisor.hypervisor.vp_registers import StoredState
from rootvisor.kvm import abi
from rootvisor.kvm.errors import KvmError

RUN_SIZE = 4096
ROOT_PAGES = 16

#: A made-up processor, AMD, with XSAVE, AVX and PKU: (leaf, index, flags, eax, ebx, ecx, edx).
SUPPORTED = [
    (0, 0, 0, 0x10, 0x68747541, 0x444D4163, 0x69746E65),
    (1, 0, 0, 0xA20F12, 0x07080800, 0xFEF83203 | 1 << 12 | 1 << 29, 0x178BFBFF),
    (6, 0, 0, 4, 0, 0, 0),
    (7, 0, 1, 1, 0x219C97A9 | 1 << 16, 0x40069C | 1 << 3, 0x10 | 1 << 24),
    (7, 1, 1, 1 << 4, 0, 0, 0),
    (0xA, 0, 0, 2, 0, 0, 0),
    (0xB, 0, 1, 1, 2, 0x100, 7),
    (0xD, 0, 1, 0x2E7, 0x988, 0x988, 0),
    (0xD, 1, 1, 0xF, 0x358, 0x1800, 0),
    (0xD, 2, 1, 0x100, 0x240, 0, 0),
    (0xD, 5, 1, 0x40, 0x340, 0, 0),
    (0xD, 9, 1, 8, 0x980, 2, 0),
    (0xD, 11, 1, 0x10, 0, 1, 0),
    (0x40000000, 0, 0, 0x40000001, 0x4B4D564B, 0x564B4D56, 0x4D),
    (0x80000000, 0, 0, 0x80000021, 0, 0, 0),
    (0x80000001, 0, 0, 0xA20F12, 0, 0x75C237FF, 0x2FD3FBFF),
    (0x80000007, 0, 0, 0, 0, 0, 0x100),
    (0x80000008, 0, 0, 0x3030, 0x111ED205, 0x500B, 0),
    (0x8000001D, 0, 1, 0x4121, 0x1C0003F, 0x3F, 0),
]


class FakeVcpu:
    """A processor that only remembers."""

    def __init__(self, vm: Any, index: int = 0) -> None:
        self.vm = vm
        self.index = index
        self.run = bytearray(RUN_SIZE)
        self.u8 = memoryview(self.run)
        self.u16, self.u32, self.u64 = self.u8.cast("H"), self.u8.cast("I"), self.u8.cast("Q")
        self.u64[abi.SYNC_REGS_AT // 8 + 16] = 0xFFF0
        self.u64[abi.SYNC_REGS_AT // 8 + 17] = 2
        self.u64[(abi.SYNC_SREGS_AT + abi.SREGS_CR0) // 8] = 0x60000010
        self.u64[(abi.SYNC_SREGS_AT + abi.SREGS_APIC_BASE) // 8] = 0xFEE00900
        self.u32[(abi.SYNC_EVENTS_AT + abi.EVENTS_FLAGS) // 4] = (
            abi.EVENTS_VALID_PAYLOAD | abi.EVENTS_VALID_NMI_PENDING
        )
        self.msrs: dict[int, int] = {}
        self.unknown_msrs: set[int] = set()
        self.readonly_msrs: set[int] = set()
        self.cpuid: list[tuple[int, ...]] = []
        self.capabilities: list[tuple[int, int]] = []
        self.image = bytearray(4096)
        self.image[28:32] = (0xFFFF).to_bytes(4, "little")
        self.image[24:28] = (0x1F80).to_bytes(4, "little")
        self.debug = bytearray(128)
        self.page = bytearray(1024)
        self.event_state = bytearray(64)
        self.activity = 0
        self._xcr0 = 1
        self.ssp: int | None = 0
        self.has_run = False
        self.committed = 0
        self.filled = 0
        self.reads_of_xsave = 0

    def set_cpuid(self, entries: list[tuple[int, ...]]) -> None:
        self.cpuid = entries

    def try_msr(self, index: int) -> int | None:
        return None if index in self.unknown_msrs else self.msrs.get(index, 0)

    get_msr = try_msr

    def set_msr(self, index: int, value: int) -> bool:
        if index in self.unknown_msrs or index in self.readonly_msrs:
            return False
        self.msrs[index] = value
        return True

    def shadow_stack_pointer(self, value: int | None = None) -> int | None:
        if value is not None:
            self.ssp = value
        return self.ssp

    def xcr0(self) -> int:
        return self._xcr0

    def set_xcr0(self, value: int) -> None:
        if not value & 1:
            raise KvmError("XCR0 without x87")
        self._xcr0 = value

    def debug_registers(self) -> bytearray:
        return bytearray(self.debug)

    def dr7(self) -> int:
        return int(struct.unpack_from("<Q", self.debug, 40)[0])

    def set_debug_registers(self, state: bytearray) -> None:
        if struct.unpack_from("<Q", state, 40)[0] >> 32:
            raise KvmError("DR7")
        self.debug = bytearray(state)

    def xsave(self, buffer: bytearray) -> None:
        self.reads_of_xsave += 1
        buffer[:] = self.image

    def set_xsave(self, buffer: bytearray) -> None:
        self.image = bytearray(buffer)

    def lapic(self) -> bytearray:
        return bytearray(self.page)

    def set_lapic(self, registers: bytearray) -> None:
        self.page = bytearray(registers)

    def mp_state(self) -> int:
        return self.activity

    def set_mp_state(self, state: int) -> None:
        self.activity = state

    def events(self) -> bytearray:
        return bytearray(self.event_state)

    def set_events(self, events: bytearray) -> None:
        self.event_state = bytearray(events)

    def enable_capability(self, capability: int, argument: int) -> None:
        self.capabilities.append((capability, argument))

    def fill_sync_area(self) -> None:
        self.filled += 1

    def commit_sync_area(self) -> None:
        self.committed |= self.u64[abi.RUN_DIRTY_REGS // 8]
        self.u64[abi.RUN_DIRTY_REGS // 8] = 0


class Page:
    """An overlay page that is nowhere."""

    def __init__(self) -> None:
        self.value = 0
        self.view = memoryview(bytearray(4096))

    @property
    def enabled(self) -> bool:
        return bool(self.value & 1)

    def write(self, value: int) -> None:
        self.value = value

    def disable(self) -> None:
        self.value &= ~1

    reset = disable


class RootMemory:
    """The root's RAM."""

    def __init__(self) -> None:
        self.bytes = memoryview(bytearray(ROOT_PAGES * 4096))

    def view(self, gpa: int, length: int) -> memoryview:
        if gpa + length > len(self.bytes):
            raise ValueError
        return self.bytes[gpa : gpa + length]


class _Interrupts:
    def notify_sints(self, vp: Any, sints: int) -> None:
        vp.synic.notify_sints = sints


class RunningTime:
    """Stands for ChildTime: time that nobody freezes."""

    frozen = False

    def get_tsc(self, vp: Any) -> int:
        value: int = vp.vcpu.get_msr(abi.MSR_TSC)
        return value

    def set_tsc(self, vp: Any, value: int) -> None:
        vp.vcpu.set_msr(abi.MSR_TSC, value)


class ParkedVp:
    """What registers, register page, state and CPUID see of a ChildVp."""

    def __init__(
        self, vcpu: Any = None, xsave: bool = True, supported: Any = None, flags: int = 1 << 22
    ) -> None:
        kvm = SimpleNamespace(supported_cpuid=supported or (lambda: SUPPORTED))
        self.hypervisor = SimpleNamespace(
            kvm=kvm, root=SimpleNamespace(xsave=xsave, memory=RootMemory()),
            version=SimpleNamespace(build=27751, major=10, minor=0, service_pack=0), max_vps=64, max_lps=64,
            deposited=DepositedPages(), root_scheduler=None,
        )  # fmt: skip
        vm = SimpleNamespace(enable_capability=lambda capability, argument: None)
        self.partition: Any = SimpleNamespace(
            hypervisor=self.hypervisor, id=2, flags=flags, disabled_features=(0, 0, 0), privileges=0, features=0,
            recommendations=0, cpuid_results=CpuidResults(), deposits=DepositPool(), guest_os_id=0,
            hypercall_page=Page(), tsc_page=Page(), reference_time=ReferenceTime(1_000_000_000, 0),
            crash_parameters=[0] * 5, vm=vm, vps=[self], interrupts=_Interrupts(), memory=SimpleNamespace(width=40),
            time=RunningTime(), held=0, pinned=0, hypervisor_present=False, last_leaf=0x40000006, max_vps=256,
        )  # fmt: skip
        self.vcpu = vcpu if vcpu is not None else FakeVcpu(vm)
        self.index = self.vcpu.index
        self.apic_id = self.index
        self.u8, self.u32, self.u64 = self.vcpu.u8, self.vcpu.u32, self.vcpu.u64
        self.running = False
        self.explicit_suspend = True
        self.intercept_suspend = False
        self.cpu_clock = 0
        self.message_page: memoryview | None = None
        self.register_page: memoryview | None = None
        self.assist_page = Page()
        self.synic = Synic(Page(), Page(), Page(), lambda vector: None)  # type: ignore[arg-type]
        self.stored = StoredState()
        self.timers: tuple[Any, ...] = ()
        self.resumed_by: Any = None

    @property
    def dirty(self) -> int:
        return int(self.u64[abi.RUN_DIRTY_REGS // 8])

    def mark_dirty(self, blocks: int) -> None:
        self.u64[abi.RUN_DIRTY_REGS // 8] |= blocks

    def assist_page_changed(self) -> None:
        pass

    def notice_init(self) -> None:
        pass

    def suspend(self) -> None:
        self.explicit_suspend = True
        self.running = False

    def clear_explicit_suspend(self, root_vp: Any) -> None:
        self.explicit_suspend = False
        self.resume(root_vp)

    def clear_intercept_suspend(self, root_vp: Any) -> None:
        self.intercept_suspend = False
        self.resume(root_vp)

    def resume(self, root_vp: Any) -> None:
        if not self.explicit_suspend and not self.intercept_suspend:
            vp_registers.before_run(self)  # type: ignore[arg-type]
            self.running = True
            self.resumed_by = root_vp
