# SPDX-License-Identifier: Apache-2.0
"""The root's side of child partitions, by hypercalls of the bare-metal agent (tests/kvm/guest.py).

    parent = Parent(guest)
    child = parent.create()              # CREATE_PARTITION; child.id
    child.deposit(208); child.initialize(); child.create_vp(0)

Every method that makes a call returns its status; those that cannot do without its output assert success. Deposited
pages come from :data:`POOL`; the model of who has which page is ``parent.given``.
"""

from __future__ import annotations

import struct
import time

from rootvisor.tlfs import gpa as gpa_flags
from rootvisor.tlfs import hypercalls as hv
from rootvisor.tlfs import messages, msrs, registers, vp_state
from rootvisor.tlfs import partition_properties as properties
from tests.kvm import guest as g
from tests.kvm.guest import Guest

POOL = range((g.SPARE >> 12) + 512, g.OWNED >> 12)
"""Page numbers to deposit."""
CHILD_RAM = g.SPARE
"""512 pages of the root that tests map into children."""
VECTOR = 0xF3
FLAGS = (
    properties.FLAG_EXO | properties.FLAG_INTERCEPT_MESSAGE_PAGE | properties.FLAG_LAPIC | properties.FLAG_X2APIC
    | properties.FLAG_GPA_SUPER_PAGES
)  # fmt: skip
COMPATIBILITY = 0x609
TIMEOUT_S = 20.0
TURNS = 100_000


class Parent:
    """The driver in the root."""

    def __init__(self, guest: Guest, synic: bool = True) -> None:
        self.guest = guest
        self.free = list(reversed(POOL))
        #: page -> partition that it was deposited to
        self.given: dict[int, int] = {}
        if synic:
            for vp in range(len(guest.partition.vps)):
                self.start_synic(vp)

    def start_synic(self, vp: int = 0) -> None:
        """mshv_synic_cpu_init."""
        guest = self.guest
        for index in (msrs.SIMP, msrs.SIEFP, msrs.SIRBP):
            guest.wrmsr(index, guest.rdmsr(index, vp) | 1, vp)
        guest.wrmsr(msrs.SINT0, VECTOR, vp)
        guest.wrmsr(msrs.SINT0 + 5, VECTOR | 1 << 19, vp)
        guest.wrmsr(msrs.SCONTROL, 1, vp)

    def slot(self, vp: int = 0) -> memoryview:
        """Slot 0 of a root VP's message page."""
        gpa = self.guest.partition.vps[vp].synic.simp.gpn << 12
        return self.guest.ram[gpa : gpa + 256]

    def take_message(self, vp: int = 0) -> tuple[int, int, bytes]:
        """Waits for a message in slot 0, and does what mshv_isr does: (type, sender, payload)."""
        slot = self.slot(vp)
        guest = self.guest
        count = guest.interrupts(VECTOR, vp)
        deadline = time.monotonic() + TIMEOUT_S
        while not any(slot[:4]):
            assert time.monotonic() < deadline, "no message"
            count = guest.take(VECTOR, vp, count + 1, TURNS)
        kind, size, flags, sender = messages.MESSAGE_HEADER.unpack_from(slot)
        payload = bytes(slot[16 : 16 + size])
        slot[:4] = bytes(4)
        if flags & messages.MESSAGE_FLAG_PENDING:
            guest.wrmsr(msrs.EOM, 0, vp)
        return kind, sender, payload

    # --- partitions ---------------------------------------------------------------------------------------------------
    def try_create(
        self, flags: int = FLAGS, disabled: tuple[int, int, int] = (0, 0, 0), isolation: int = 0
    ) -> tuple[int, int]:
        data = properties.CREATE_PARTITION_INPUT.pack(flags, 0, COMPATIBILITY, *disabled, isolation)
        answer = self.guest.call(hv.CREATE_PARTITION, data, output=8)
        return answer.status, int.from_bytes(answer.output, "little")

    def create(self, flags: int = FLAGS, disabled: tuple[int, int, int] = (0, 0, 0)) -> Child:
        """A new child."""
        result, partition_id = self.try_create(flags, disabled)
        assert result == 0, f"CREATE_PARTITION gives {result:#x}"
        return Child(self, partition_id)

    def initialized(self, vps: int = 0, deposit: int = 208) -> Child:
        """As the driver does it, with ``vps`` VPs that have their message and register pages."""
        child = self.create()
        assert child.deposit(deposit) == 0
        assert child.initialize() == 0
        for index in range(vps):
            assert child.deposit(4) == 0
            assert child.create_vp(index) == 0
            child.map_state_pages(index)
        return child

    # --- memory pools -------------------------------------------------------------------------------------------------
    def deposit_pages(self, partition_id: int, pages: list[int], start: int = 0) -> int:
        data = hv.DEPOSIT_MEMORY_INPUT.pack(partition_id) + struct.pack(f"<{len(pages)}Q", *pages)
        answer = self.guest.call(hv.DEPOSIT_MEMORY, data, count=len(pages), start=start)
        if answer.status == 0:
            assert answer.reps == len(pages)
        return answer.status

    def deposit(self, partition_id: int, count: int) -> int:
        """Gives ``count`` fresh pages."""
        pages = [self.free.pop() for _ in range(count)]
        for first in range(0, count, 511):
            result = self.deposit_pages(partition_id, pages[first : first + 511])
            if result:
                self.free += reversed(pages[first:])
                return result
            self.given.update(dict.fromkeys(pages[first : first + 511], partition_id))
        return 0

    def withdraw(self, partition_id: int, count: int) -> tuple[int, list[int]]:
        """One call; the status, and the pages that came back."""
        data = hv.WITHDRAW_MEMORY_INPUT.pack(partition_id, 0)
        answer = self.guest.call(hv.WITHDRAW_MEMORY, data, count=count, output=count * 8)
        pages = [page for (page,) in struct.iter_unpack("<Q", answer.output[: answer.reps * 8])]
        for page in pages:
            assert self.given.pop(page) == partition_id
            self.free.append(page)
        return answer.status, pages

    def check_accounts(self) -> None:
        """The hypervisor's books are those of the model."""
        hypervisor = self.guest.hypervisor
        seen: set[int] = set(hypervisor.lost)
        for partition in hypervisor.partitions.values():
            pool = partition.deposits
            pages = [*pool.free, *pool.used]
            assert len(set(pages)) == len(pages)
            assert not seen.intersection(pages)
            seen.update(pages)
            assert all(self.given[page] == partition.id for page in pages)
        assert seen == set(self.given)
        assert len(hypervisor.deposited) == len(seen)
        assert all(page in hypervisor.deposited for page in seen)

    # --- properties ---------------------------------------------------------------------------------------------------
    def get(self, partition_id: int, code: int) -> tuple[int, int]:
        """GET_PARTITION_PROPERTY: status and value."""
        data = hv.GET_PARTITION_PROPERTY_INPUT.pack(partition_id, code)
        answer = self.guest.call(hv.GET_PARTITION_PROPERTY, data, output=8)
        return answer.status, int.from_bytes(answer.output, "little")

    def set(self, partition_id: int, code: int, value: int) -> int:
        """SET_PARTITION_PROPERTY."""
        return self.guest.call(
            hv.SET_PARTITION_PROPERTY, hv.SET_PARTITION_PROPERTY_INPUT.pack(partition_id, code, value)
        ).status

    def get_ex(self, partition_id: int, code: int) -> tuple[int, bytes]:
        """GET_PARTITION_PROPERTY_EX: status and all 4072 bytes."""
        answer = self.guest.call(
            hv.GET_PARTITION_PROPERTY_EX,
            hv.GET_PARTITION_PROPERTY_EX_INPUT.pack(partition_id, code, 0),
            output=properties.PROPERTY_EX_OUTPUT_SIZE,
        )
        return answer.status, answer.output

    # --- statistics ---------------------------------------------------------------------------------------------------
    def map_stats(self, kind: int, identity: bytes) -> tuple[int, int]:
        answer = self.guest.call(hv.MAP_STATS_PAGE, hv.MAP_STATS_PAGE_INPUT.pack(kind, identity), output=8)
        return answer.status, int.from_bytes(answer.output, "little")

    def unmap_stats(self, kind: int, identity: bytes) -> int:
        return self.guest.call(hv.UNMAP_STATS_PAGE, hv.MAP_STATS_PAGE_INPUT.pack(kind, identity)).status

    def counter(self, page: int, index: int) -> int:
        """A u64 of a page of the root."""
        return int.from_bytes(self.guest.ram[(page << 12) + index * 8 :][:8], "little")


class Child:
    """One child."""

    def __init__(self, parent: Parent, partition_id: int) -> None:
        self.parent = parent
        self.guest = parent.guest
        self.id = partition_id
        #: (VP, type) -> page of the root
        self.state_pages: dict[tuple[int, int], int] = {}

    def _fast(self, code: int, vp_index: int | None = None, vp: int = 0) -> int:
        data = struct.pack("<Q", self.id) if vp_index is None else struct.pack("<QI", self.id, vp_index)
        return self.guest.fast(code, data, vp=vp).status

    def initialize(self) -> int:
        return self._fast(hv.INITIALIZE_PARTITION)

    def finalize(self, vp: int = 0) -> int:
        return self._fast(hv.FINALIZE_PARTITION, vp=vp)

    def delete(self) -> int:
        return self._fast(hv.DELETE_PARTITION)

    def deposit(self, count: int) -> int:
        return self.parent.deposit(self.id, count)

    def withdraw(self, count: int = 512) -> tuple[int, list[int]]:
        return self.parent.withdraw(self.id, count)

    def create_vp(self, index: int) -> int:
        data = hv.CREATE_VP_INPUT.pack(self.id, index, 0, 0xEEEE, 0, 0)
        return self.guest.call(hv.CREATE_VP, data).status

    def delete_vp(self, index: int) -> int:
        for key in [key for key in self.state_pages if key[0] == index]:
            del self.state_pages[key]
        return self._fast(hv.DELETE_VP, index)

    def map_state_page(self, index: int, kind: int) -> tuple[int, int]:
        data = vp_state.MAP_VP_STATE_PAGE_INPUT.pack(self.id, index, kind, 0, 0, 0)
        answer = self.guest.call(hv.MAP_VP_STATE_PAGE, data, output=8)
        return answer.status, int.from_bytes(answer.output, "little")

    def map_state_pages(self, index: int) -> None:
        """The intercept page, then the register page."""
        for kind in (vp_state.PAGE_INTERCEPT_MESSAGE, vp_state.PAGE_REGISTERS):
            result, page = self.map_state_page(index, kind)
            assert result == 0
            self.state_pages[index, kind] = page

    def unmap_state_page(self, index: int, kind: int) -> int:
        data = vp_state.UNMAP_VP_STATE_PAGE_INPUT.pack(self.id, index, kind, 0, 0)
        return self.guest.call(hv.UNMAP_VP_STATE_PAGE, data).status

    def map(self, gfn: int, pages: list[int], flags: int = 0) -> int:
        """Readable, writable and executable; pages are the root's."""
        flags |= gpa_flags.MAP_READABLE | gpa_flags.MAP_WRITABLE | 0xC
        data = gpa_flags.MAP_GPA_PAGES_INPUT.pack(self.id, gfn, flags) + struct.pack(
            f"<{len(pages)}Q", *pages
        )
        return self.guest.call(hv.MAP_GPA_PAGES, data, count=len(pages)).status

    def set_registers(self, index: int, *values: tuple[int, int], vp: int = 0) -> int:
        """(name, value) in order."""
        data = hv.VP_REGISTERS_INPUT.pack(self.id, index, 0, bytes(3))
        for name, value in values:
            data += struct.pack("<I12xQQ", name, value & hv.SELF, value >> 64)
        return self.guest.call(hv.SET_VP_REGISTERS, data, count=len(values), vp=vp).status

    def try_registers(self, index: int, *names: int) -> tuple[int, list[int]]:
        data = hv.VP_REGISTERS_INPUT.pack(self.id, index, 0, bytes(3)) + struct.pack(
            f"<{len(names)}I", *names
        )
        answer = self.guest.call(hv.GET_VP_REGISTERS, data, count=len(names), output=16 * len(names))
        values = [low | high << 64 for low, high in struct.iter_unpack("<QQ", answer.output)]
        return answer.status, values

    def register(self, index: int, name: int) -> int:
        result, values = self.try_registers(index, name)
        assert result == 0, f"GET_VP_REGISTERS {name:#x} gives {result:#x}"
        return values[0]

    # --- running ------------------------------------------------------------------------------------------------------
    def load(self, code: bytes, gpa: int = 0x1000) -> None:
        """Maps 16 pages at GPA 0 and puts real-mode code at ``gpa``; sets VP 0 there."""
        first = CHILD_RAM >> 12
        self.guest.ram[CHILD_RAM : CHILD_RAM + (16 << 12)] = bytes(16 << 12)
        self.guest.ram[CHILD_RAM + gpa : CHILD_RAM + gpa + len(code)] = code
        assert self.map(0, list(range(first, first + 16))) == 0
        self.enter(0, gpa)

    def memory(self, gpa: int) -> memoryview:
        """The root's view of what :meth:`load` has mapped, from ``gpa`` to the end of its page."""
        at = CHILD_RAM + gpa
        return self.guest.ram[at : (at | 0xFFF) + 1]

    def enter(self, index: int, gpa: int = 0x1000) -> None:
        """Real mode, CS base 0."""
        code_segment = 0x009B << 112 | 0 << 96 | 0xFFFF << 64
        assert self.set_registers(index, (registers.CS, code_segment), (registers.RIP, gpa)) == 0

    def resume(self, index: int = 0, vp: int = 0) -> None:
        """Both suspend registers, as the driver clears them."""
        both = (registers.INTERCEPT_SUSPEND, 0), (registers.EXPLICIT_SUSPEND, 0)
        assert self.set_registers(index, *both, vp=vp) == 0

    def suspend(self, index: int = 0) -> int:
        return self.set_registers(index, (registers.EXPLICIT_SUSPEND, 1))

    def message(self, index: int = 0, vp: int = 0) -> tuple[int, bytes]:
        """Waits for an intercept of the VP: its type and payload."""
        kind, sender, payload = self.parent.take_message(vp)
        assert (kind, sender) == (messages.OPAQUE_INTERCEPT, self.id)
        assert int.from_bytes(payload[:4], "little") == index
        gpa = self.state_pages[index, vp_state.PAGE_INTERCEPT_MESSAGE] << 12
        message_type, size, _flags, sender = messages.MESSAGE_HEADER.unpack_from(self.guest.ram, gpa)
        assert sender == self.id
        return message_type, bytes(self.guest.ram[gpa + 16 : gpa + 16 + size])

    def run(self, index: int = 0) -> tuple[int, bytes]:
        """Resumes and waits for the next intercept."""
        self.resume(index)
        return self.message(index)

    def port_write(self, payload: bytes) -> tuple[int, int]:
        """(port, RAX) of an IO_PORT payload."""
        return struct.unpack_from("<H", payload, 40)[0], struct.unpack_from("<Q", payload, 48)[0]

    def skip(self, index: int, payload: bytes) -> None:
        """Moves RIP behind the instruction of an intercept."""
        length = payload[4] & 0xF
        rip = struct.unpack_from("<Q", payload, 24)[0]
        assert self.set_registers(index, (registers.RIP, rip + length)) == 0
