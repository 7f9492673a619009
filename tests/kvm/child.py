# SPDX-License-Identifier: Apache-2.0
"""A child of the bare-metal root partition of guest.py, made by hypercalls; the test plays the mshv driver.

    driver = Driver(guest)                       # SynIC of the root's VPs on
    with Child(driver, vps=2) as child:
        child.start(child.entry)                 # tests/guests/child_interrupts.S
        guest.call(hypercalls.ASSERT_VIRTUAL_INTERRUPT, ...)
        driver.wait_for(lambda: child.count(0x40) == 1)

The child has 2 MiB of the root's RAM at GPA 0: code, page tables that map 4 GiB to themselves, descriptor tables.
"""

from __future__ import annotations

import functools
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rootvisor.hypervisor.child_partition import ChildPartition
from rootvisor.hypervisor.child_vp import ChildVp
from rootvisor.tlfs import (
    gpa,
    hypercalls,
    intercepts,
    messages,
    msrs,
    partition_properties,
    registers,
    status,
    vp_state,
)
from rootvisor.tlfs import ports as tlfs
from tests.kvm.guest import SPARE, Guest

TIMEOUT_S = 20.0
#: Root RAM: deposited pages, then the children's memory.
POOL, POOL_PAGES = SPARE, 0x100
MEMORY, SIZE = 0xC00000, 0x100000

CODE = 0x1000
TABLES = 0x10000
GDT, IDT = 0x20000, 0x21000
COUNTERS, KEEP, READY = 0x30000, 0x31000, 0x32000
STACKS = 0x40000  # 4 KiB per VP
PAGES = 0x80000
"""From here on nothing is used: overlay pages, operands."""
CALL_PAGE, OPERANDS, RESULT = PAGES, PAGES + 0x8000, PAGES + 0x9000
UNMAPPED = 0x4000_0000

VECTOR = 0xF3
EXO = partition_properties.FLAG_EXO | partition_properties.FLAG_INTERCEPT_MESSAGE_PAGE
FLAGS = EXO | partition_properties.FLAG_LAPIC | partition_properties.FLAG_X2APIC


@functools.cache
def program() -> bytes:
    """tests/guests/child_interrupts.S, flat."""
    source = Path(__file__).resolve().parents[1] / "guests" / "child_interrupts.S"
    with tempfile.TemporaryDirectory() as folder:
        built, binary = Path(folder) / "child.o", Path(folder) / "child"
        subprocess.run(["gcc", "-c", "-o", str(built), str(source)], check=True)
        subprocess.run(["objcopy", "-O", "binary", "-j", ".text", str(built), str(binary)], check=True)
        return binary.read_bytes()


class Driver:
    """What the mshv driver does with the root's SynIC, a step at a time."""

    def __init__(self, guest: Guest, vps: int = 1) -> None:
        self.guest = guest
        self.tails: dict[int, int] = {}
        for vp in range(vps):
            self.load(vp)

    # --- SynIC --------------------------------------------------------------------------------------------------------
    def load(self, vp: int = 0) -> None:
        """mshv_synic_cpu_init."""
        guest = self.guest
        for index in (msrs.SIMP, msrs.SIEFP, msrs.SIRBP):
            guest.wrmsr(index, guest.rdmsr(index, vp) | 1, vp)
        guest.wrmsr(msrs.SINT0, VECTOR, vp)
        guest.wrmsr(msrs.SINT0 + 5, VECTOR | msrs.SINT_AS_INTERCEPT, vp)
        guest.wrmsr(msrs.SCONTROL, 1, vp)

    def unload(self, vp: int = 0) -> None:
        """mshv_synic_cpu_exit."""
        guest = self.guest
        guest.wrmsr(msrs.SINT0, VECTOR | msrs.SINT_MASKED, vp)
        guest.wrmsr(msrs.SINT0 + 5, VECTOR | msrs.SINT_AS_INTERCEPT | msrs.SINT_MASKED, vp)
        for index in (msrs.SIRBP, msrs.SIEFP, msrs.SIMP):
            guest.wrmsr(index, guest.rdmsr(index, vp) & ~1, vp)
        guest.wrmsr(msrs.SCONTROL, 0, vp)

    def slot(self, vp: int = 0) -> memoryview:
        """Slot 0 of the VP's message page."""
        return self.guest.partition.vps[vp].synic.simp.view[:256]

    def ring(self, vp: int = 0) -> memoryview:
        """The ring of SINT5."""
        return self.guest.partition.vps[vp].synic.sirbp.view[5 * 256 : 6 * 256]

    def wait_for(self, condition: Callable[[], object], what: str = "") -> None:
        """AssertionError when it does not come true."""
        end = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < end, f"waited in vain {what}"
            time.sleep(0.002)

    def message(self, vp: int = 0) -> tuple[int, int, bytes]:
        """Takes the next message as mshv_isr does: type, sender, payload."""
        slot = self.slot(vp)
        self.wait_for(lambda: any(slot[:4]), "for a message")
        kind, size, _flags, sender = messages.MESSAGE_HEADER.unpack_from(slot)
        payload = bytes(slot[16 : 16 + size])
        slot[:4] = bytes(4)
        if slot[messages.MESSAGE_FLAGS_OFFSET] & messages.MESSAGE_FLAG_PENDING:
            self.guest.wrmsr(msrs.EOM, 0, vp)
        return kind, sender, payload

    def doorbells(self, vp: int = 0) -> list[int]:
        """Takes a SINT intercept message and drains the ring: the ids."""
        slot = self.slot(vp)
        self.wait_for(lambda: any(slot[:4]), "for a doorbell")
        kind, _size, _flags, _sender = messages.MESSAGE_HEADER.unpack_from(slot)
        assert (kind, slot[16]) == (messages.SYNIC_SINT_INTERCEPT, 5)
        found = self.drain(vp)
        self.message(vp)
        return found

    def drain(self, vp: int = 0) -> list[int]:
        """synic_event_ring_get_queued_port until it finds nothing."""
        ring = self.ring(vp)
        words = ring.cast("I")
        found: list[int] = []
        while True:
            tail = self.tails.get(vp, 0)
            if not words[1 + tail] and ring[1]:
                ring[1] = 0
                assert (
                    self.guest.call(hypercalls.NOTIFY_PORT_RING_EMPTY, struct.pack("<Q", 5), vp=vp).status
                    == 0
                )
            if not words[1 + tail]:
                ring[0] = 0
                if not words[1 + tail]:
                    return found
                ring[0] = 1
            found.append(words[1 + tail])
            words[1 + tail] = 0
            self.tails[vp] = (tail + 1) % 63

    # --- hypercalls ---------------------------------------------------------------------------------------------------
    def call(self, code: int, data: bytes, output: int = 0, vp: int = 0, **fields: int) -> bytes:
        """A hypercall that succeeds."""
        result = self.guest.call(code, data, output=output, vp=vp, **fields)
        assert result.status == 0, f"{hypercalls.call_name(code)}: {status.status_name(result.status)}"
        return result.output

    def status(self, code: int, data: bytes, vp: int = 0) -> int:
        """The status of a hypercall."""
        return self.guest.call(code, data, output=256, vp=vp).status

    def doorbell(
        self, child: Child, port_id: int, gpa: int, value: int = 0, flags: int = tlfs.DOORBELL_ANY_VALUE
    ) -> None:
        """mshv_register_doorbell."""
        info = tlfs.MESSAGE_PORT.pack(5, tlfs.ANY_VP, 0)
        data = tlfs.CREATE_PORT_INPUT.pack(1, port_id, 0, 0, child.id, tlfs.PORT_DOORBELL, info, 0)
        self.call(hypercalls.CREATE_PORT, data)
        data = tlfs.CONNECT_PORT_INPUT.pack(
            child.id, port_id, 0, bytes(3), 1, port_id, tlfs.PORT_DOORBELL, gpa, value, flags, 0
        )
        self.call(hypercalls.CONNECT_PORT, data)

    def remove_doorbell(self, child: Child, port_id: int) -> None:
        """mshv_unregister_doorbell."""
        for code, data in (
            (hypercalls.DISCONNECT_PORT, tlfs.DISCONNECT_PORT_INPUT.pack(child.id, port_id, 1)),
            (hypercalls.DELETE_PORT, tlfs.DELETE_PORT_INPUT.pack(1, port_id)),
        ):
            result = self.guest.fast(code, data)
            assert (result.op.fault, result.status) == (0, 0)

    def interrupt(
        self,
        child: Child,
        vector: int,
        kind: int = tlfs.INTERRUPT_FIXED,
        destination: int = 0,
        control: int = 0,
    ) -> int:
        """ASSERT_VIRTUAL_INTERRUPT; the status."""
        data = tlfs.ASSERT_VIRTUAL_INTERRUPT_INPUT.pack(child.id, kind, control, destination, vector, 0)
        return self.guest.call(hypercalls.ASSERT_VIRTUAL_INTERRUPT, data).status


class Child:
    """Created, initialized, with memory and VPs, in 64-bit mode; all VPs are parked."""

    def __init__(self, driver: Driver, vps: int = 1, features: int = 0, number: int = 0) -> None:
        """``number`` tells the children of one test apart: each has its own megabyte of the root's RAM."""
        self.driver = driver
        self.guest = guest = driver.guest
        data = struct.pack("<QQIxxxxQQQQ", FLAGS, 0, 0x609, 0, 0, 0, 0)
        self.id = struct.unpack("<Q", driver.call(hypercalls.CREATE_PARTITION, data, 8))[0]
        if features:
            code = partition_properties.SYNTHETIC_PROC_FEATURES
            driver.call(hypercalls.SET_PARTITION_PROPERTY, struct.pack("<QIxxxxQ", self.id, code, features))
        first = (POOL >> 12) + number * POOL_PAGES
        pages = struct.pack(f"<Q{POOL_PAGES}Q", self.id, *range(first, first + POOL_PAGES))
        driver.call(hypercalls.DEPOSIT_MEMORY, pages, count=POOL_PAGES)
        driver.call(hypercalls.INITIALIZE_PARTITION, struct.pack("<Q", self.id))
        self.base = MEMORY + number * SIZE
        self.memory = guest.ram[self.base : self.base + SIZE]
        self.memory[:] = bytes(SIZE)
        self._map()
        self.pages: dict[int, memoryview] = {}
        for vp in range(vps):
            self._create_vp(vp)
        self._load()
        for vp in range(vps):
            self._long_mode(vp)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.guest.partition.ended:
            self.finalize()
            self.driver.call(hypercalls.DELETE_PARTITION, struct.pack("<Q", self.id))

    def finalize(self) -> None:
        """FINALIZE_PARTITION; its interrupt is taken as often as it asks for that."""
        for vp in range(len(self.guest.partition.vps)):
            slot = self.driver.slot(vp)
            if any(slot[:4]):
                self.driver.message(vp)
        self.driver.call(hypercalls.FINALIZE_PARTITION, struct.pack("<Q", self.id))

    @property
    def partition(self) -> ChildPartition:
        """The hypervisor's side."""
        partition = self.guest.hypervisor.partitions[self.id]
        assert isinstance(partition, ChildPartition)
        return partition

    def vp(self, index: int = 0) -> ChildVp:
        """The hypervisor's side of a VP."""
        return self.partition.vp(index)

    def _map(self) -> None:
        flags = gpa.MAP_READABLE | gpa.MAP_WRITABLE | gpa.MAP_KERNEL_EXECUTABLE | gpa.MAP_USER_EXECUTABLE
        first = self.base >> 12
        data = struct.pack("<QQIxxxx256Q", self.id, 0, flags, *range(first, first + 256))
        self.driver.call(hypercalls.MAP_GPA_PAGES, data, count=256)

    def _create_vp(self, vp: int) -> None:
        driver = self.driver
        driver.call(hypercalls.CREATE_VP, hypercalls.CREATE_VP_INPUT.pack(self.id, vp, 0, 0, 0, 0))
        for kind in (vp_state.PAGE_INTERCEPT_MESSAGE, vp_state.PAGE_REGISTERS):
            data = vp_state.MAP_VP_STATE_PAGE_INPUT.pack(self.id, vp, kind, 0, 0, 0)
            page = struct.unpack("<Q", driver.call(hypercalls.MAP_VP_STATE_PAGE, data, 8))[0]
            if kind == vp_state.PAGE_INTERCEPT_MESSAGE:
                self.pages[vp] = self.guest.ram[page << 12 : (page + 1) << 12]

    def _load(self) -> None:
        memory = self.memory
        code = program()
        memory[CODE : CODE + len(code)] = code
        offsets = [CODE + offset for offset in struct.unpack_from("<7Q", code)]
        self.entry, stubs, self.store_loop, self.call_once, self.xapic_entry = offsets[:5]
        self.write_msr, self.read_msr = offsets[5:]
        struct.pack_into("<Q", memory, TABLES, TABLES + 0x1007)
        for gib in range(4):
            directory = TABLES + 0x2000 + gib * 0x1000
            struct.pack_into("<Q", memory, TABLES + 0x1000 + gib * 8, directory | 7)
            for entry in range(512):
                struct.pack_into("<Q", memory, directory + entry * 8, gib << 30 | entry << 21 | 0x87)
        struct.pack_into("<3Q", memory, GDT, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF)
        for vector in range(256):
            at = stubs + vector * 16
            struct.pack_into("<HHBBHIxxxx", memory, IDT + vector * 16, at & 0xFFFF, 8, 0, 0x8E, at >> 16, 0)

    def _long_mode(self, vp: int) -> None:
        data = struct.pack("<QIHH", 0, 0xFFFFFFFF, 0x10, 0xC093)
        code = struct.pack("<QIHH", 0, 0xFFFFFFFF, 0x08, 0xA09B)
        segments = dict.fromkeys((registers.DS, registers.ES, registers.SS, registers.FS, registers.GS), data)
        self.set(
            {
                **segments,
                registers.CS: code,
                registers.IDTR: struct.pack("<6xHQ", 4095, IDT),
                registers.GDTR: struct.pack("<6xHQ", 23, GDT),
                registers.CR0: 0x80050033,
                registers.CR3: TABLES,
                registers.CR4: 0x620,
                registers.EFER: 0x500,
                registers.RSP: STACKS + (vp + 1) * 0x1000,
                registers.RFLAGS: 2,
                registers.RDI: vp,
                registers.INTERNAL_ACTIVITY_STATE: 0,
            },
            vp,
        )

    # --- registers ----------------------------------------------------------------------------------------------------
    def set(self, values: dict[int, int | bytes], vp: int = 0) -> None:
        """SET_VP_REGISTERS, in order."""
        data = hypercalls.VP_REGISTERS_INPUT.pack(self.id, vp, 0, b"")
        for name, value in values.items():
            if isinstance(value, int):
                value = value.to_bytes(16, "little")
            data += struct.pack("<I12x16s", name, value)
        self.driver.call(hypercalls.SET_VP_REGISTERS, data, count=len(values))

    def get(self, name: int, vp: int = 0) -> int:
        """GET_VP_REGISTERS of one."""
        data = hypercalls.VP_REGISTERS_INPUT.pack(self.id, vp, 0, b"") + struct.pack("<I", name)
        return int.from_bytes(self.driver.call(hypercalls.GET_VP_REGISTERS, data, 16, count=1), "little")

    def resume(self, vp: int = 0) -> None:
        """RUN_VP's first call."""
        self.set({registers.INTERCEPT_SUSPEND: 0, registers.EXPLICIT_SUSPEND: 0}, vp)

    def suspend(self, vp: int = 0) -> None:
        """A signal to the VMM's thread."""
        self.set({registers.EXPLICIT_SUSPEND: 1}, vp)

    def start(self, rip: int, vp: int = 0, **values: int) -> None:
        """Sets registers by name, and resumes; a halted VP is no longer."""
        self.set(
            {
                registers.INTERNAL_ACTIVITY_STATE: 0,
                registers.RIP: rip,
                **{getattr(registers, name.upper()): v for name, v in values.items()},
            },
            vp,
        )
        self.resume(vp)

    def ready(self, vp: int = 0) -> None:
        """Starts a VP, and waits until it has its interrupts open."""
        self.start(self.entry, vp)
        self.driver.wait_for(lambda: self.word(READY + vp * 4), "for a VP to be ready")

    def intercept(self, vp: int = 0) -> tuple[int, bytes]:
        """The next OPAQUE message must be this VP's; type and payload from its message page."""
        kind, sender, payload = self.driver.message()
        assert (kind, sender) == (messages.OPAQUE_INTERCEPT, self.id)
        assert payload == struct.pack("<I", vp)
        page = self.pages[vp]
        kind, size, _flags, sender = messages.MESSAGE_HEADER.unpack_from(page)
        assert sender == self.id
        return kind, bytes(page[16 : 16 + size])

    def wrmsr(self, index: int, value: int) -> bool:
        """The guest of VP 0 writes an MSR; False when that faults."""
        faults = self.count(13)
        self.start(self.write_msr, rcx=index, rax=value & 0xFFFFFFFF, rdx=value >> 32)
        return self._outcome(faults)

    def rdmsr(self, index: int) -> int | None:
        """The guest of VP 0 reads an MSR; None when that faults."""
        faults = self.count(13)
        self.start(self.read_msr, rcx=index, r10=RESULT)
        if not self._outcome(faults):
            return None
        return int.from_bytes(self.memory[RESULT : RESULT + 8], "little")

    def _outcome(self, faults: int) -> bool:
        self.driver.wait_for(lambda: any(self.driver.slot()[:4]) or self.count(13) > faults, "for an MSR")
        if self.count(13) > faults:
            self.suspend()
            return False
        kind, _payload = self.intercept()
        assert kind == intercepts.X64_IO_PORT_INTERCEPT
        return True

    # --- what the guest did -------------------------------------------------------------------------------------------
    def word(self, at: int) -> int:
        """A u32 of the child's memory."""
        return int.from_bytes(self.memory[at : at + 4], "little")

    def count(self, vector: int) -> int:
        """How often a vector was taken, by all VPs."""
        return self.word(COUNTERS + vector * 4)
