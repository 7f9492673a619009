# SPDX-License-Identifier: Apache-2.0
"""A child partition without a root: the real memory, processors and interrupts, with a stand-in for the partition.

    with LoneChild() as child:
        child.set(rax=1, rbx=0x5000)
        kind, payload = child.run("store32")     # a piece of tests/guests/child.S, until its first intercept

Memory: 4 MiB of the root's RAM at GPA 0, writable; code at CODE, page tables at TABLES (4 GiB identity mapped, 2 MiB
pages, all rings), stack below STACK, descriptor tables at GDT and IDT. From 4 MiB on nothing is mapped.
"""

from __future__ import annotations

import functools
import queue
import signal
import struct
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rootvisor.bus.address_space import GuestMemory, MemoryRegion
from rootvisor.hypervisor import hypercall_abi, init_watch, vp_registers
from rootvisor.hypervisor.child_cpuid import CpuidResults
from rootvisor.hypervisor.child_interrupts import ChildInterrupts
from rootvisor.hypervisor.child_memory import ChildMemory
from rootvisor.hypervisor.child_overlay import OverlayPages
from rootvisor.hypervisor.child_vp import ChildVp
from rootvisor.hypervisor.deposits import DepositPool
from rootvisor.hypervisor.intercepts import InstalledIntercepts
from rootvisor.hypervisor.reference_time import ReferenceTime
from rootvisor.kvm import abi
from rootvisor.kvm.memory import SharedMemory
from rootvisor.kvm.system import Kvm
from rootvisor.tlfs import gpa as gpa_flags
from rootvisor.tlfs import msrs, privileges
from tests.unit.hypervisor.parked_vp import RunningTime

RAM = 8 << 20
MAPPED = 4 << 20
CODE = 0x100000
TABLES = 0x200000
GDT, IDT, TSS = 0x210000, 0x211000, 0x212000
STACK = 0x220000
DATA = 0x300000
UNMAPPED = 0x1000_0000
"""Mapped in the page tables, without memory behind it."""
PARTITION_ID = 7
TIMEOUT_S = 30.0

REGISTERS = abi.REGS


@functools.cache
def pieces() -> tuple[bytes, dict[str, int]]:
    """The code of tests/guests/child.S and where each piece begins in it."""
    source = Path(__file__).resolve().parents[1] / "guests" / "child.S"
    with tempfile.TemporaryDirectory() as folder:
        built, binary = Path(folder) / "child.o", Path(folder) / "child"
        subprocess.run(["gcc", "-c", "-o", str(built), str(source)], check=True)
        subprocess.run(["objcopy", "-O", "binary", "-j", ".text", str(built), str(binary)], check=True)
        lines = subprocess.run(
            ["nm", str(built)], check=True, capture_output=True, text=True
        ).stdout.splitlines()
        names = {name: int(at, 16) for at, _kind, name in (line.split() for line in lines)}
        return binary.read_bytes(), names


class Root:
    """Stands for RootMessages: what the root is told."""

    def __init__(self) -> None:
        self.told: queue.SimpleQueue[int] = queue.SimpleQueue()

    def post_opaque(self, child: Any, vp: ChildVp) -> None:
        assert vp.intercept_suspend
        assert not vp.running
        self.told.put(vp.index)


class Doorbells:
    """Rings for writes listed in ``rings`` as (gpa, size, value or None)."""

    def __init__(self) -> None:
        self.rings: set[tuple[int, int, int | None]] = set()
        self.rung: list[tuple[int, int, int]] = []

    def match(self, gpa: int, size: int, value: int) -> bool:
        if {(gpa, size, value), (gpa, size, None)} & self.rings:
            self.rung.append((gpa, size, value))
            return True
        return False


class StandIn(SimpleNamespace):
    """What a ChildVp sees of a ChildPartition."""

    def vp_failed(self, vp: ChildVp, error: BaseException) -> None:
        self.defect = error


class LoneChild:
    """The child; close it or use it as a context manager."""

    def __init__(self, vps: int = 1, privilege: int = privileges.ACCESS_HYPERCALL_MSRS) -> None:
        signal.signal(signal.SIGUSR1, lambda *_: None)
        self.kvm = Kvm()
        self.root = Root()
        self.doorbells = Doorbells()
        hypervisor: Any = SimpleNamespace(
            kvm=self.kvm, lock=threading.RLock(), messages=self.root, owns=lambda page, count: False,
            root_scheduler=None, root=SimpleNamespace(xsave=False), max_vps=64, max_lps=64,
            version=SimpleNamespace(build=27751, major=10, minor=0, service_pack=0),
        )  # fmt: skip
        self.hypervisor = hypervisor
        self.lock = hypervisor.lock
        self._shared = SharedMemory("lone-child", RAM)
        self.ram = self._shared.view
        self.vm = self.kvm.create_vm()
        self.memory = ChildMemory(self.vm, self.hypervisor)
        self.memory.bind(GuestMemory((MemoryRegion(0, RAM, self.ram, self._shared.fd, 0),)))
        self.vm.filter_msrs([(msrs.FIRST, msrs.COUNT), *init_watch.KVMS])
        partition: Any = StandIn(
            hypervisor=self.hypervisor, id=PARTITION_ID, vm=self.vm, memory=self.memory, flags=1 << 22, vps=[],
            disabled_features=(0, 0, 0), privileges=privilege, features=0, recommendations=0,
            cpuid_results=CpuidResults(), deposits=DepositPool(), guest_os_id=0, crash_parameters=[0] * 5,
            reference_time=ReferenceTime(1_000_000_000, 0), tsc_invariant=0, apic_hz=1_000_000_000,
            intercepts=InstalledIntercepts(), doorbells=self.doorbells, unimplemented_msr_action=0, defect=None,
            trace=None, held=0, pinned=0, hypervisor_present=bool(privilege), last_leaf=0x40000006, max_vps=256,
            time=RunningTime(), timers=None, lazy_eoi=False,
        )  # fmt: skip
        self.partition = partition
        self.partition.interrupts = ChildInterrupts(self.partition)
        self.partition.interrupts.create_irqchip()
        self.overlays = OverlayPages(self.partition)
        self.partition.hypercall_page = self.overlays.allocate()
        self.partition.tsc_page = self.overlays.allocate()
        for index in range(vps):
            vp = ChildVp(
                self.partition,
                index,
                self.vm.create_vcpu(index),
                tuple(self.overlays.allocate() for _ in range(4)),
            )
            self.partition.vps.append(vp)
            with self.lock:
                vp_registers.reset(vp)
            vp.message_page = memoryview(bytearray(4096))
        self.vp: ChildVp = self.partition.vps[0]
        self.root_vp: Any = SimpleNamespace(vcpu=SimpleNamespace(thread=0), waking=[])
        self._load()
        self.map(0, MAPPED)
        self.long_mode()

    def __enter__(self) -> LoneChild:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for vp in self.partition.vps:
            with self.lock:
                vp.stop_and_join()
        defect = self.partition.defect
        self.memory.clear()
        self.overlays.close()
        self.vm.close()
        self.memory.close()
        self.kvm.close()
        if defect is not None:
            raise defect

    # --- memory -------------------------------------------------------------------------------------------------------
    def _load(self) -> None:
        code, self.names = pieces()
        self.ram[CODE : CODE + len(code)] = code
        struct.pack_into("<Q", self.ram, TABLES, TABLES + 0x1007)
        for gib in range(4):
            directory = TABLES + 0x2000 + gib * 0x1000
            struct.pack_into("<Q", self.ram, TABLES + 0x1000 + gib * 8, directory | 7)
            for entry in range(512):
                struct.pack_into("<Q", self.ram, directory + entry * 8, gib << 30 | entry << 21 | 0x87)
        descriptors = (0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00CF9B000000FFFF)
        struct.pack_into("<4Q", self.ram, GDT, *descriptors)

    def map(self, gpa: int, size: int, page: int | None = None, writable: bool = True) -> None:
        """Maps root memory at ``page`` (default: the same number) to ``gpa``."""
        first = (gpa if page is None else page) >> 12
        flags = gpa_flags.MAP_READABLE | (gpa_flags.MAP_WRITABLE if writable else 0)
        with self.lock:
            self.memory.map(gpa >> 12, size >> 12, flags, tuple(range(first, first + (size >> 12))))

    def no_access(self, gpa: int, size: int = 4096) -> None:
        with self.lock:
            self.memory.map(gpa >> 12, size >> 12, gpa_flags.MAP_NO_ACCESS, None)

    def unmap(self, gpa: int, size: int = 4096) -> None:
        with self.lock:
            self.memory.unmap(gpa >> 12, size >> 12)

    # --- registers ----------------------------------------------------------------------------------------------------
    def long_mode(self) -> None:
        flat = (0, 0xFFFFFFFF, 0x10, 3, 1, 0, 1, 1, 0, 1, 0, 0)
        segments = dict.fromkeys(("ds", "es", "fs", "gs", "ss"), flat)
        segments["cs"] = (0, 0xFFFFFFFF, 0x08, 0xB, 1, 0, 0, 1, 1, 1, 0, 0)
        self._state(segments, cr0=0x80050033, cr3=TABLES, cr4=0x620, efer=0x500)

    def protected_mode(self) -> None:
        """32 bits, no paging."""
        flat = (0, 0xFFFFFFFF, 0x10, 3, 1, 0, 1, 1, 0, 1, 0, 0)
        segments = dict.fromkeys(("ds", "es", "fs", "gs", "ss"), flat)
        segments["cs"] = (0, 0xFFFFFFFF, 0x18, 0xB, 1, 0, 1, 1, 0, 1, 0, 0)
        self._state(segments, cr0=0x33, cr3=0, cr4=0x600, efer=0)

    def real_mode(self) -> None:
        flat = (0, 0xFFFF, 0, 3, 1, 0, 0, 1, 0, 0, 0, 0)
        segments = dict.fromkeys(("ds", "es", "fs", "gs", "ss"), flat)
        segments["cs"] = (CODE, 0xFFFF, 0xF000, 0xB, 1, 0, 0, 1, 0, 0, 0, 0)
        self._state(segments, cr0=0x30, cr3=0, cr4=0x600, efer=0)

    def _state(self, segments: Mapping[str, tuple[int, ...]], **control: int) -> None:
        vcpu = self.vp.vcpu
        vcpu.commit_sync_area()
        vcpu.set_sregs(segments, {"gdt": (GDT, 0x1F), "idt": (IDT, 0xFFF)}, **control)
        vcpu.fill_sync_area()
        self.set(rsp=STACK, rflags=2)

    def set(self, vp: ChildVp | None = None, **values: int) -> None:
        """Sets general registers by name."""
        vp = vp or self.vp
        for name, value in values.items():
            vp.u64[abi.SYNC_REGS_AT // 8 + REGISTERS.index(name)] = value
        vp.mark_dirty(abi.SYNC_REGS)

    def get(self, name: str, vp: ChildVp | None = None) -> int:
        return (vp or self.vp).u64[abi.SYNC_REGS_AT // 8 + REGISTERS.index(name)]

    def all(self, vp: ChildVp | None = None) -> dict[str, int]:
        return {name: self.get(name, vp) for name in REGISTERS}

    def address(self, name: str) -> int:
        """RIP of a piece."""
        return CODE + self.names[name]

    # --- running ------------------------------------------------------------------------------------------------------
    def resume(self, vp: ChildVp | None = None) -> None:
        """Both suspend registers := 0."""
        vp = vp or self.vp
        with self.lock:
            vp_registers.before_run(vp)
            vp.clear_intercept_suspend()
            vp.clear_explicit_suspend(self.root_vp)

    def wait(self, vp: ChildVp | None = None) -> tuple[int, bytes]:
        """The next intercept of any VP: type and payload."""
        try:
            index = self.root.told.get(timeout=TIMEOUT_S)
        except queue.Empty:
            where = self.vp.u64[abi.SYNC_REGS_AT // 8 + 16]
            raise TimeoutError(
                f"no intercept; RIP {where:#x}, exits {[(n, c) for n, c in enumerate(self.vp.exits) if c]}, "
                f"defect {self.partition.defect!r}"
            ) from self.partition.defect
        assert vp is None or vp.index == index
        page = self.partition.vps[index].message_page
        assert page is not None
        kind, size, flags, sender = struct.unpack_from("<IBBxxQ", page)
        assert (flags, sender) == (0, PARTITION_ID)
        return kind, bytes(page[16 : 16 + size])

    def again(self) -> tuple[int, bytes]:
        """Resumes, and the next intercept."""
        self.resume()
        return self.wait()

    def run(self, name: str, **registers: int) -> tuple[int, bytes]:
        """Runs a piece until its first intercept."""
        self.set(None, rip=self.address(name), **registers)
        return self.again()

    def wait_page(self) -> bytes:
        """The payload in the message page."""
        page = self.vp.message_page
        assert page is not None
        return bytes(page[16 : 16 + page[4]])

    def quiet(self, seconds: float = 0.2) -> bool:
        """Nobody is told of anything for a while."""
        try:
            self.root.told.get(timeout=seconds)
        except queue.Empty:
            return True
        return False

    def call_page(self, gpa: int) -> None:
        """Enables the hypercall page at ``gpa``."""
        with self.lock:
            hypercall_abi.write_page(self.partition.hypercall_page.view)
            self.partition.hypercall_page.write(gpa | 1)
