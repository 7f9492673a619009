# SPDX-License-Identifier: Apache-2.0
"""A root partition with the bare-metal agent of tests/guests/agent.S in it, driven record by record.

    guest = Guest(vps=2)
    guest.call(hypercalls.GET_PARTITION_ID, output=8)     -> Result(status, reps, output)
    guest.rdmsr(msrs.VP_INDEX, vp=1)

Memory (16 MiB of RAM): agent at 1 MiB, page tables and descriptors at 2 MiB, a block per VP at 3 MiB, mailboxes at
4 MiB, operands of calls from 9 MiB on, the hypervisor's own pages at 15 MiB.
"""

from __future__ import annotations

import functools
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self, TypeVar

from rootvisor.bus.address_space import GuestMemory, MemoryRegion
from rootvisor.hypervisor.hypercall_abi import write_page
from rootvisor.hypervisor.hypervisor import Hypervisor
from rootvisor.hypervisor.overlay import OwnedPages
from rootvisor.hypervisor.root_partition import RootPartition
from rootvisor.kvm.memory import SharedMemory
from rootvisor.kvm.system import Kvm
from rootvisor.tlfs import hypercalls, msrs

RAM = 16 << 20
AGENT = 0x100000
PAGE_TABLES = 0x201000
GDT = 0x2F0000
IDT = 0x2F1000
GDT_POINTER, IDT_POINTER, EMPTY_IDT_POINTER, LOW_GDT_POINTER = 0x2F0FF0, 0x2F1FF0 + 0x1000, 0x2F3FF0, 0x8FF0
BLOCKS, BLOCK_SIZE = 0x300000, 0x10000
#: In a block: see agent.S.
EOI_WORD = 0x800
MAILBOXES, MAILBOX_SIZE = 0x400000, 0x100000
INPUT, OUTPUT = 0x900000, 0x902000
SPARE = 0xA00000
"""First byte of RAM that nobody uses; up to the hypervisor's own pages."""
OWNED = 0xF00000
TRAMPOLINE = 0x8000

DOORBELL, PANIC = 0x3D, 0x3E
TIMEOUT_S = 60.0

END, HYPERCALL, RDMSR, WRMSR, CPUID, RING3, LEGACY, AWAIT, RDTSC, LOAD, STORE, TRIPLE_FAULT, HAMMER = range(
    13
)
UD, GP = 0x106, 0x10D

RECORD = struct.Struct("<II7Q96s3Q8x")
assert RECORD.size == 192
BATCH_LIMIT = MAILBOX_SIZE // RECORD.size - 1
_UNTOUCHED = 0xFFFFFFFF
_LVT_X2APIC_ICR = 0x830


class Ended(Exception):
    """The partition ended while it worked."""


@functools.cache
def agent() -> bytes:
    """The agent, assembled."""
    source = Path(__file__).resolve().parents[1] / "guests" / "agent.S"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "agent"
        subprocess.run(
            ["gcc", "-nostdlib", "-static", f"-Wl,-Ttext={AGENT:#x},--oformat=binary,--build-id=none",
             "-o", str(binary), str(source)],
            check=True,
        )  # fmt: skip
        return binary.read_bytes()


class Op:
    """One record: what to do, and afterwards what came of it. ``fault`` is 0, or 0x100 | vector."""

    __slots__ = (
        "fault",
        "fault_rip",
        "kind",
        "r8",
        "rax",
        "rbx",
        "rcx",
        "rdi",
        "rdx",
        "rsi",
        "target",
        "xmm",
    )

    def __init__(
        self,
        kind: int,
        rcx: int = 0,
        rdx: int = 0,
        r8: int = 0,
        rax: int = 0,
        rbx: int = 0,
        rsi: int = 0,
        rdi: int = 0,
        xmm: bytes = b"",
        target: int = 0,
    ) -> None:
        self.kind = kind
        self.rcx, self.rdx, self.r8, self.rax = rcx, rdx, r8, rax
        self.rbx, self.rsi, self.rdi = rbx, rsi, rdi
        self.xmm = xmm.ljust(96, b"\0")
        self.target = target
        self.fault = _UNTOUCHED
        self.fault_rip = 0

    def pack(self, default_target: int) -> bytes:
        return RECORD.pack(
            self.kind, _UNTOUCHED, self.rcx, self.rdx, self.r8, self.rax, self.rbx, self.rsi, self.rdi, self.xmm,
            self.target or default_target, 0, 0,
        )  # fmt: skip

    def unpack(self, memory: memoryview, at: int) -> None:
        (
            self.kind, self.fault, self.rcx, self.rdx, self.r8, self.rax, self.rbx, self.rsi, self.rdi, self.xmm,
            self.target, self.fault_rip, _error,
        ) = RECORD.unpack_from(memory, at)  # fmt: skip


class Result:
    """The answer to a hypercall: RAX taken apart, and the output block."""

    __slots__ = ("op", "output", "reps", "rest", "status")

    def __init__(self, op: Op, rax: int, output: bytes) -> None:
        self.op = op
        self.status = rax & 0xFFFF
        self.reps = rax >> 32 & 0xFFF
        self.rest = rax & 0xFFFF_F000_FFFF_0000
        self.output = output

    def __repr__(self) -> str:
        return f"Result(status={self.status:#x}, reps={self.reps}, output={self.output.hex()})"


def control(
    code: int, *, fast: bool = False, variable: int = 0, count: int = 0, start: int = 0, reserved: int = 0
) -> int:
    """The control word of a hypercall."""
    return (
        code
        | (hypercalls.CONTROL_FAST if fast else 0)
        | variable << hypercalls.CONTROL_VARIABLE_SHIFT
        | count << hypercalls.CONTROL_REP_COUNT_SHIFT
        | start << hypercalls.CONTROL_REP_START_SHIFT
        | reserved
    )


class _Bell:
    """Port DOORBELL: a VP has done its records, and waits in the exit until there are new ones."""

    def __init__(self, vps: int) -> None:
        self.rung = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(vps)]
        self.go = [threading.Semaphore(0) for _ in range(vps)]
        self.closed = False

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        os.eventfd_write(self.rung[value], 1)
        self.go[value].acquire()


class _Panic:
    """Port PANIC: an exception outside every record."""

    def __init__(self, partition: RootPartition) -> None:
        self._partition = partition

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self._partition.end("agent-panic", f"exception {value}")


class Guest:
    """The partition with its agent. :meth:`close` it, or use it as a context manager."""

    def __init__(self, vps: int = 1, privileges: int | None = None, features: int | None = None) -> None:
        signal.signal(signal.SIGUSR1, lambda *_: None)
        self.hypervisor = Hypervisor(Kvm())
        self._shared = SharedMemory("guest", RAM)
        self.ram = self._shared.view
        memory = GuestMemory((MemoryRegion(0, RAM, self.ram, self._shared.fd, 0),))
        self.partition = partition = self._create(memory, vps)
        if privileges is not None:
            partition.privileges = privileges
        if features is not None:
            partition.features = features
        self._bell = _Bell(vps)
        self._started: set[int] = set()
        partition.ports.add(DOORBELL, 1, self._bell)
        partition.ports.add(PANIC, 1, _Panic(partition))
        self._load(vps)
        partition.create_vps(vps, xsave=False)
        self._start()
        self._wait(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _create(self, memory: GuestMemory, vps: int) -> RootPartition:
        """The partition, its memory shown to KVM."""
        self.owned_pages = OwnedPages.needed(vps)
        partition = self.hypervisor.create_root(memory, (OWNED, self.owned_pages))
        partition.vm.set_memory(0, 0, RAM, self._shared.address)
        write_page(partition.hypercall_page.view)
        return partition

    # --- set-up ---------------------------------------------------------------------------------------------------
    def _load(self, vps: int) -> None:
        ram = self.ram
        code = agent()
        ram[AGENT : AGENT + len(code)] = code
        self._entry, stubs, trampoline, length = struct.unpack_from("<4Q", code)
        ram[TRAMPOLINE : TRAMPOLINE + length] = code[trampoline - AGENT : trampoline - AGENT + length]
        # 4 GiB, identity mapped with 2 MiB pages, for all rings
        struct.pack_into("<Q", ram, PAGE_TABLES, PAGE_TABLES + 0x1007)
        for gib in range(4):
            directory = PAGE_TABLES + 0x2000 + gib * 0x1000
            struct.pack_into("<Q", ram, PAGE_TABLES + 0x1000 + gib * 8, directory | 7)
            for entry in range(512):
                struct.pack_into("<Q", ram, directory + entry * 8, gib << 30 | entry << 21 | 0x87)
        descriptors = [
            0,
            0x00AF9B000000FFFF,  # 0x08: 64-bit code
            0x00CF93000000FFFF,  # 0x10: data
            0x00CFF3000000FFFF,  # 0x1B: data of ring 3
            0x00AFFB000000FFFF,  # 0x23: 64-bit code of ring 3
            0x00CF9B000000FFFF,  # 0x28: 32-bit code
        ]
        for vp in range(vps):  # 0x30 + 16 * vp: its TSS
            base = BLOCKS + vp * BLOCK_SIZE + 0x1000
            descriptors += [
                0x67 | (base & 0xFFFFFF) << 16 | 0x89 << 40 | (base >> 24 & 0xFF) << 56,
                base >> 32,
            ]
            struct.pack_into("<Q", ram, base + 4, base + 0x3000)
        struct.pack_into(f"<{len(descriptors)}Q", ram, GDT, *descriptors)
        for vector in range(256):
            at = stubs + vector * 16
            kind = 0xEE if vector == 0x80 else 0x8E
            struct.pack_into(
                "<HHBBHIxxxx", ram, IDT + vector * 16, at & 0xFFFF, 0x08, 0, kind, at >> 16 & 0xFFFF, at >> 32
            )
        pointer = struct.pack("<HQ", len(descriptors) * 8 - 1, GDT)
        ram[GDT_POINTER : GDT_POINTER + 10] = pointer
        ram[LOW_GDT_POINTER : LOW_GDT_POINTER + 10] = pointer
        ram[IDT_POINTER : IDT_POINTER + 10] = struct.pack("<HQ", 4095, IDT)

    def _start(self) -> None:
        data = (0, 0xFFFFFFFF, 0x10, 3, 1, 0, 1, 1, 0, 1, 0)
        segments = dict.fromkeys(("ds", "es", "fs", "gs", "ss"), data)
        segments["cs"] = (0, 0xFFFFFFFF, 0x08, 0xB, 1, 0, 0, 1, 1, 1, 0)
        vcpu = self.partition.vps[0].vcpu
        vcpu.set_sregs(segments, cr0=0x80050033, cr3=PAGE_TABLES, cr4=0x620, efer=0x500)
        vcpu.set_regs(rip=self._entry, rflags=2)
        self.partition.start()

    # --- driving --------------------------------------------------------------------------------------------------
    def _wait(self, vp: int) -> None:
        poll = select.poll()
        bell = self._bell.rung[vp]
        poll.register(bell, select.POLLIN)
        poll.register(self.partition.ended_fd, select.POLLIN)
        ready = [fd for fd, _ in poll.poll(TIMEOUT_S * 1000)]
        if bell in ready:
            os.eventfd_read(bell)
            return
        if not ready:
            raise TimeoutError(f"VP {vp} does not answer; {self._whereabouts(vp)}")
        raise Ended(f"{self.partition.ended}: {self.partition.detail}") from self.partition.defect

    def _whereabouts(self, vp: int) -> str:
        """Where a VP was at its last exit, what its thread does, and what waits in its local APIC."""
        vcpu = self.partition.vps[vp].vcpu
        last = vcpu.u64[54]
        thread = sys._current_frames().get(vcpu.thread)
        does = f"{thread.f_code.co_name}:{thread.f_lineno}" if thread is not None else "gone"
        vcpu.kick()  # KVM answers when the processor is outside of the guest
        registers = vcpu.lapic()
        now = vcpu.get_regs()

        def vectors(at: int) -> list[int]:
            words = [int.from_bytes(registers[at + 16 * n : at + 16 * n + 4], "little") for n in range(8)]
            return [32 * n + bit for n, word in enumerate(words) for bit in range(32) if word >> bit & 1]

        return (
            f"RIP {last:#x} at the last exit, {now[16]:#x} now, RFLAGS {now[17]:#x}; its thread is in {does}; "
            f"in service {vectors(0x100)}, requested {vectors(0x200)}, task priority {registers[0x80]:#x}"
        )

    def run(self, ops: Sequence[Op], vp: int = 0) -> None:
        """Lets VP ``vp`` do the records. Raises :class:`Ended` when the partition ends over them."""
        if len(ops) > BATCH_LIMIT:
            raise ValueError("too many records for one batch")
        base = MAILBOXES + vp * MAILBOX_SIZE
        target = self.partition.hypercall_page.gpn << 12
        packed = b"".join([op.pack(target) for op in ops]) + bytes(4)
        self.ram[base : base + len(packed)] = packed
        self._bell.go[vp].release()
        self._wait(vp)
        for index, op in enumerate(ops):
            op.unpack(self.ram, base + index * RECORD.size)

    def run_packed(self, records: bytes, vp: int = 0) -> bytes:
        """Lets VP ``vp`` do records that are packed already; returns them as they are afterwards."""
        if len(records) > BATCH_LIMIT * RECORD.size:
            raise ValueError("too many records for one batch")
        base = MAILBOXES + vp * MAILBOX_SIZE
        self.ram[base : base + len(records) + 4] = records + bytes(4)
        self._bell.go[vp].release()
        self._wait(vp)
        return bytes(self.ram[base : base + len(records)])

    def one(self, kind: int, vp: int = 0, **fields: int | bytes) -> Op:
        """Does one record and returns it."""
        op = Op(kind, **fields)  # type: ignore[arg-type]
        self.run([op], vp)
        return op

    def start_vp(self, vp: int) -> None:
        """INIT and SIPI from VP 0, the architectural way; returns when the agent runs there."""
        base = MAILBOXES + vp * MAILBOX_SIZE
        self.ram[base : base + 4] = bytes(4)
        for low in (0xC500, 0x8500, 0x600 | TRAMPOLINE >> 12):
            assert self.one(WRMSR, rcx=_LVT_X2APIC_ICR, rax=vp << 32 | low).fault == 0
        if vp in self._started:  # it waits in its doorbell, and meets INIT when it comes out
            self._bell.go[vp].release()
        self._started.add(vp)
        self._wait(vp)

    # --- what tests say -------------------------------------------------------------------------------------------
    def rdmsr(self, index: int, vp: int = 0) -> int:
        """The value; AssertionError on #GP."""
        op = self.one(RDMSR, vp, rcx=index)
        assert op.fault == 0, f"RDMSR {index:#x} faults with {op.fault:#x}"
        return op.rax

    def wrmsr(self, index: int, value: int, vp: int = 0) -> None:
        """Writes; AssertionError on #GP."""
        op = self.one(WRMSR, vp, rcx=index, rax=value)
        assert op.fault == 0, f"WRMSR {index:#x} faults with {op.fault:#x}"

    def rdmsr_fault(self, index: int, vp: int = 0) -> int:
        """0, or the exception of a read (0x100 | vector)."""
        return self.one(RDMSR, vp, rcx=index).fault

    def wrmsr_fault(self, index: int, value: int, vp: int = 0) -> int:
        """0, or the exception of a write (0x100 | vector)."""
        return self.one(WRMSR, vp, rcx=index, rax=value).fault

    def cpuid(self, leaf: int, index: int = 0, vp: int = 0) -> tuple[int, int, int, int]:
        """EAX, EBX, ECX, EDX."""
        op = self.one(CPUID, vp, rax=leaf, rcx=index)
        return op.rax, op.rbx, op.rcx, op.rdx

    def call(
        self,
        code: int,
        data: bytes = b"",
        *,
        output: int = 0,
        vp: int = 0,
        variable: int = 0,
        count: int = 0,
        start: int = 0,
        reserved: int = 0,
        kind: int = HYPERCALL,
        input_gpa: int | None = None,
        output_gpa: int | None = None,
    ) -> Result:
        """A hypercall in the memory form. The output block is filled with 0xEE before."""
        where = INPUT if input_gpa is None else input_gpa
        out = OUTPUT if output_gpa is None else output_gpa
        if input_gpa is None:
            self.ram[INPUT : INPUT + len(data)] = data
        self.ram[OUTPUT : OUTPUT + 4096] = b"\xee" * 4096
        word = control(code, variable=variable, count=count, start=start, reserved=reserved)
        op = self.one(kind, vp, rcx=word, rdx=where, r8=out)
        assert op.fault == 0, f"hypercall {code:#x} faults with {op.fault:#x}"
        return Result(op, op.rax, bytes(self.ram[OUTPUT : OUTPUT + output]))

    def fast(
        self, code: int, data: bytes = b"", *, variable: int = 0, count: int = 0, start: int = 0, vp: int = 0
    ) -> Result:
        """A hypercall in the register form; the output is all 112 bytes of the registers. Check ``op.fault``."""
        block = data.ljust(112, b"\0")
        first, second = struct.unpack_from("<QQ", block)
        word = control(code, fast=True, variable=variable, count=count, start=start)
        op = self.one(HYPERCALL, vp, rcx=word, rdx=first, r8=second, xmm=block[16:])
        return Result(op, op.rax, struct.pack("<QQ", op.rdx, op.r8) + op.xmm)

    def interrupts(self, vector: int, vp: int = 0) -> int:
        """How often the VP's agent has taken the vector."""
        base = BLOCKS + vp * BLOCK_SIZE + vector * 4
        return int.from_bytes(self.ram[base : base + 4], "little")

    def eois_may_be_left_out(self, word: int, vp: int = 0) -> None:
        """The VP's agent looks at the EOI word of the VP assist page there before it ends an interrupt."""
        struct.pack_into("<QI", self.ram, BLOCKS + vp * BLOCK_SIZE + EOI_WORD, word, 0)

    def eois_left_out(self, vp: int = 0) -> int:
        """How often that word said that no EOI is required."""
        at = BLOCKS + vp * BLOCK_SIZE + EOI_WORD + 8
        return int.from_bytes(self.ram[at : at + 4], "little")

    def take(self, vector: int, vp: int = 0, count: int = 1, turns: int = 3_000_000) -> int:
        """Opens interrupts until the vector's counter is ``count``; returns the counter."""
        return self.one(AWAIT, vp, rcx=vector, rdx=count, rbx=turns).rax

    def enable_hypercalls(self) -> None:
        """What a kernel does first: its identity, then the call page."""
        self.wrmsr(msrs.GUEST_OS_ID, 0x8100_0007_0003_0000)
        self.wrmsr(msrs.HYPERCALL, self.rdmsr(msrs.HYPERCALL) | 1)

    def announce(self, vp: int) -> None:
        """ADD_LP and CREATE_VP, as a kernel's boot processor does."""
        added = self.call(
            hypercalls.ADD_LOGICAL_PROCESSOR, hypercalls.ADD_LOGICAL_PROCESSOR_INPUT.pack(vp, vp, 0, 0)
        )
        assert added.status == 0
        created = self.call(
            hypercalls.CREATE_VP, hypercalls.CREATE_VP_INPUT.pack(hypercalls.SELF, vp, 0, 0, 0, vp)
        )
        assert created.status == 0

    def wait_ended(self) -> tuple[str, str]:
        """How the partition ended, and the detail."""
        deadline = time.monotonic() + TIMEOUT_S
        poll = select.poll()
        poll.register(self.partition.ended_fd, select.POLLIN)
        while not self.partition.ended and time.monotonic() < deadline:
            poll.poll(1000)
        return self.partition.ended, self.partition.detail

    def close(self) -> None:
        """Stops the VPs and frees everything."""
        partition = self.partition
        for vp in partition.vps:
            vp.stop()
        for go in self._bell.go:
            go.release()
        partition.stop()
        self.hypervisor.close()
        for fd in self._bell.rung:
            os.close(fd)
        self._shared.close()


_Machine = TypeVar("_Machine", bound=Guest)


def driven(machine: _Machine) -> Iterator[_Machine]:
    """The machine with hypercalls enabled and the agent on every VP; its hypervisor has to be well to the end."""
    with machine:
        machine.enable_hypercalls()
        for vp in range(1, len(machine.partition.vps)):
            machine.announce(vp)
            machine.start_vp(vp)
        yield machine
        assert machine.partition.defect is None
