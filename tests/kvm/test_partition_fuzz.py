# SPDX-License-Identifier: Apache-2.0
"""A root that creates, feeds, runs, starves and destroys children at random, against a model that knows each answer.

5,000 calls, or as many as ROOTVISOR_PARTITION_CALLS says. Pages, states and statuses are the model's to the last one;
what the model does not follow (register contents, guest code) is only required to be answered with a known status. VPs
run meanwhile, and a second thread takes their messages as a driver on another CPU would.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from rootvisor.hypervisor import calls
from rootvisor.hypervisor.hypercall_table import REP, TABLE, VARIABLE
from rootvisor.tlfs import gpa, intercepts, messages, msrs, ports, registers, status, vp_state
from rootvisor.tlfs import hypercalls as hv
from rootvisor.tlfs import partition_properties as tlfs
from tests.kvm import guest as g
from tests.kvm.guest import Guest
from tests.kvm.parent import CHILD_RAM, FLAGS, POOL, Child, Parent

CALLS = int(os.environ.get("ROOTVISOR_PARTITION_CALLS", "5000"))
SEED = int(os.environ.get("ROOTVISOR_FUZZ_SEED", "20261124"))
CHILDREN = 5
VP_INDICES = (0, 1, 2, 7, 255)
LOST_LIMIT = 100
MEMORY_LIMIT = 4 << 20
#: Real mode: writes memory, speaks to a port, touches what is not mapped.
CODE = b"\xff\x06\x00\x50\xe6\x80\xff\x06\x00\x50\xe4\x81\xa0\xff\xff\xeb\xef"
CREATED, INITIALIZED, FINALIZED = range(3)
KNOWN = frozenset(status.NAMES)
RAM_FIRST = CHILD_RAM >> 12
#: Random calls in a batch: fewer than so many, with a page of input each.
STORM = 64
STORM_INPUTS = CHILD_RAM + (256 << 12)
#: Registers by number; not those by which the root suspends a VP.
NAMES = [
    number
    for name, number in vars(registers).items()
    if name.isupper() and isinstance(number, int) and registers.register_name(number) == f"HV_REGISTER_{name}"
    and number > registers.DISPATCH_SUSPEND
]  # fmt: skip


class Model:
    """What is expected of one child."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.state = CREATED
        #: VP index -> types of its mapped state pages
        self.vps: dict[int, set[int]] = {}
        #: port id -> connected
        self.ports: dict[int, bool] = {}
        self.frozen = 0


class Slots(threading.Thread):
    """Takes messages out of slot 0, as the driver's handler does on another CPU."""

    def __init__(self, parent: Parent) -> None:
        super().__init__()
        self.parent = parent
        self.ending = False
        self.seen: Counter[int] = Counter()
        self.gone: set[int] = set()
        self.wrong = ""
        #: a message was taken that said another waits: EOM is due
        self.more = False

    def run(self) -> None:
        slot = self.parent.slot()
        while not self.ending:
            if any(slot[:4]):
                kind, _size, _, sender = messages.MESSAGE_HEADER.unpack_from(slot)
                if kind not in (messages.OPAQUE_INTERCEPT, messages.SYNIC_SINT_INTERCEPT):
                    self.wrong = f"message {kind:#x}"
                if sender in self.gone:
                    self.wrong = f"message of partition {sender} after FINALIZE"
                self.seen[kind] += 1
                slot[:4] = bytes(4)
                self.more = self.more or bool(
                    slot[messages.MESSAGE_FLAGS_OFFSET] & messages.MESSAGE_FLAG_PENDING
                )
            time.sleep(0.002)


class Fuzzer:
    """Every method is one call: it picks arguments, makes the call, and gives (expected status or None, status)."""

    def __init__(self, guest: Guest, seed: int) -> None:
        self.guest = guest
        self.random = random.Random(seed)
        self.parent = Parent(guest)
        self.slots = Slots(self.parent)
        self.children: list[Model] = []
        self.dead: list[int] = [0, 1 << 40]
        self.statistics: dict[tuple[int, bytes], int] = {}
        self.next_port = 1
        self.seen: Counter[str] = Counter()
        self.random_calls: Counter[str] = Counter()
        self.calls = 0
        everything: dict[Callable[[], tuple[int | None, int]], int] = {
            self.create: 3, self.initialize: 6, self.finalize: 2, self.delete: 3, self.deposit: 10, self.bad_deposit: 3,
            self.withdraw: 6, self.create_vp: 8, self.delete_vp: 4, self.map_state_page: 8, self.unmap_state_page: 4,
            self.map_stats: 5, self.unmap_stats: 4, self.get_property: 4, self.set_property: 6, self.map_gpa: 5,
            self.unmap_gpa: 2, self.access_states: 1, self.enter: 4, self.go: 6, self.resume: 12, self.suspend: 6,
            self.get_registers: 3, self.interrupt: 3, self.port: 3, self.connect: 3, self.disconnect: 2,
            self.delete_port: 2, self.intercept: 1, self.dead_partition: 2, self.garbage: 16,
        }  # fmt: skip
        self.operations = list(everything)
        self.weights = list(everything.values())

    # --- picking ------------------------------------------------------------------------------------------------------
    def some(self) -> Model:
        return self.random.choice(self.children)

    def vp_of(self, model: Model) -> int:
        if model.vps and self.random.random() < 0.9:
            return self.random.choice(list(model.vps))
        return self.random.choice((*VP_INDICES, 256, 0xFFFF_FFFE))

    def at_vp(self, model: Model, index: int) -> int:
        return 0 if index in model.vps else status.INVALID_VP_INDEX

    def in_state(self, model: Model, state: int = INITIALIZED) -> int:
        return 0 if model.state == state else status.INVALID_PARTITION_STATE

    # --- life ---------------------------------------------------------------------------------------------------------
    def create(self) -> tuple[int | None, int]:
        if len(self.children) >= CHILDREN:
            result, _ = self.parent.try_create(FLAGS & ~self.random.choice((tlfs.FLAG_EXO, tlfs.FLAG_LAPIC)))
            return None, result or 0xFFFF
        result, partition_id = self.parent.try_create(FLAGS)
        if result == 0:
            assert partition_id not in self.dead
            assert partition_id not in [model.child.id for model in self.children]
            self.children.append(Model(Child(self.parent, partition_id)))
        return 0, result

    def initialize(self) -> tuple[int | None, int]:
        model = self.some()
        expected = self.in_state(model, CREATED)
        result = model.child.initialize()
        if not result:
            model.state = INITIALIZED
        return expected, result

    def finalize(self) -> tuple[int | None, int]:
        model = self.some()
        expected = self.in_state(model)
        if not expected:
            self.slots.gone.discard(model.child.id)
        result = model.child.finalize()
        if not result:
            # from now on no slot may hold one of its messages
            slot = self.parent.slot()
            kind, _size, _flags, sender = messages.MESSAGE_HEADER.unpack_from(slot)
            assert not kind or sender != model.child.id
            self.slots.gone.add(model.child.id)
            model.state = FINALIZED
            model.vps.clear()
            model.ports.clear()
        return expected, result

    def delete(self) -> tuple[int | None, int]:
        model = self.some()
        if model.state == INITIALIZED:
            return status.INVALID_PARTITION_STATE, model.child.delete()
        lost = len(self.guest.hypervisor.lost)
        left = self.random.randrange(3) if lost < LOST_LIMIT else 0
        while self.pool(model) > left:
            result, pages = model.child.withdraw(min(512, self.pool(model) - left))
            assert pages
            assert result in (0, status.NO_RESOURCES)
        result = model.child.delete()
        if not result:
            self.children.remove(model)
            self.dead.append(model.child.id)
            self.slots.gone.add(model.child.id)
            assert len(self.guest.hypervisor.lost) == lost + self.pool(model)
        return 0, result

    def dead_partition(self) -> tuple[int | None, int]:
        child = Child(self.parent, self.random.choice(self.dead))
        operation = self.random.choice(
            (
                child.initialize, child.finalize, child.delete, lambda: child.create_vp(0), lambda: child.delete_vp(0),
                lambda: child.map_state_page(0, 0)[0], lambda: child.unmap_state_page(0, 0), lambda: child.map(0, [1]),
                lambda: child.try_registers(0, registers.RIP)[0], lambda: child.suspend(0), lambda: child.withdraw()[0],
                lambda: self.parent.deposit_pages(child.id, [POOL[0]]),
                lambda: self.parent.get(child.id, tlfs.PROCESSOR_VENDOR)[0],
                lambda: self.parent.set(child.id, tlfs.TIME_FREEZE, 0),
            )
        )  # fmt: skip
        return status.INVALID_PARTITION_ID, operation()

    # --- pools --------------------------------------------------------------------------------------------------------
    def pool(self, model: Model) -> int:
        """Pages that the model says are in the partition's pool, less those in use."""
        given = sum(owner == model.child.id for owner in self.parent.given.values())
        return given - sum(len(kinds) for kinds in model.vps.values())

    def deposit(self) -> tuple[int | None, int]:
        count = self.random.choice((1, 1, 2, 8, 30))
        partition_id = self.random.choice([1, *[model.child.id for model in self.children]])
        if len(self.parent.free) < count + 8:
            return self.withdraw()
        return 0, self.parent.deposit(partition_id, count)

    def bad_deposit(self) -> tuple[int | None, int]:
        fresh = self.parent.free[-2:]
        bad = [g.OWNED >> 12, g.RAM >> 12, 1 << 45, hv.SELF, *list(self.parent.given)[:1]]
        pages = [*fresh, self.random.choice(bad)]
        if self.random.random() < 0.2:
            pages = [fresh[0], fresh[1], fresh[0]]
        self.random.shuffle(pages)
        return status.INVALID_PARAMETER, self.parent.deposit_pages(self.some().child.id, pages)

    def withdraw(self) -> tuple[int | None, int]:
        model = self.some()
        count = self.random.choice((1, 3, 20, 512))
        there = self.pool(model)
        result, pages = model.child.withdraw(count)
        assert len(pages) == min(count, there)
        return 0 if there >= count else status.NO_RESOURCES, result

    # --- VPs ----------------------------------------------------------------------------------------------------------
    def create_vp(self) -> tuple[int | None, int]:
        model = self.some()
        index = self.random.choice((*VP_INDICES, 256))
        expected = self.in_state(model)
        if not expected and (index in model.vps or index > 255):
            expected = status.INVALID_VP_INDEX
        result = model.child.create_vp(index)
        if not result:
            model.vps[index] = set()
        return expected, result

    def delete_vp(self) -> tuple[int | None, int]:
        model = self.some()
        index = self.vp_of(model)
        expected = self.in_state(model) or self.at_vp(model, index)
        result = model.child.delete_vp(index)
        if not result:
            del model.vps[index]
        return expected, result

    def map_state_page(self) -> tuple[int | None, int]:
        model = self.some()
        index, kind = self.vp_of(model), self.random.choice((0, 1, 1, 2))
        expected = self.at_vp(model, index)
        if kind == vp_state.PAGE_GHCB:
            return None, model.child.map_state_page(index, kind)[0] or 0xFFFF
        if not expected and kind not in model.vps[index] and not self.pool(model):
            expected = status.INSUFFICIENT_MEMORY
        result, page = model.child.map_state_page(index, kind)
        if not result:
            assert self.parent.given[page] == model.child.id
            model.vps[index].add(kind)
            model.child.state_pages[index, kind] = page
        return expected, result

    def unmap_state_page(self) -> tuple[int | None, int]:
        model = self.some()
        index, kind = self.vp_of(model), self.random.choice((0, 1))
        expected = self.at_vp(model, index)
        if not expected and kind not in model.vps[index]:
            expected = status.INVALID_PARAMETER
        result = model.child.unmap_state_page(index, kind)
        if not result:
            model.vps[index].discard(kind)
        return expected, result

    # --- statistics ---------------------------------------------------------------------------------------------------
    def statistics_object(self) -> tuple[int, bytes, int]:
        """(type, identity, expected status)."""
        area = self.random.choice((0, 0, 1, 2))
        kind = self.random.choice((1, 2, 0x10001, 0x10002, 3))
        wrong_area = status.INVALID_PARAMETER if area == 2 else 0
        tail = b"\0" * 3 + bytes((area,))
        if kind in (1, 3):
            return kind, bytes(12) + tail, wrong_area or (status.INVALID_PARAMETER if kind == 3 else 0)
        if kind == 2:
            lp = self.random.choice((0, 0, 5))
            return (
                kind,
                struct.pack("<QI", lp, 0) + tail,
                wrong_area or (status.INVALID_LP_INDEX if lp else 0),
            )
        model = self.some()
        index = self.vp_of(model) if kind == 0x10002 else 0
        expected = self.at_vp(model, index) if kind == 0x10002 else 0
        return kind, struct.pack("<QI", model.child.id, index) + tail, wrong_area or expected

    def map_stats(self) -> tuple[int | None, int]:
        kind, identity, expected = self.statistics_object()
        known = (kind, identity) in self.statistics
        free = sum(owner == 1 for owner in self.parent.given.values()) - len(self.statistics)
        if not expected and not known and not free:
            expected = status.INSUFFICIENT_MEMORY
        result, page = self.parent.map_stats(kind, identity)
        if not result:
            assert self.parent.given[page] == 1
            assert self.statistics.setdefault((kind, identity), page) == page
        return expected, result

    def unmap_stats(self) -> tuple[int | None, int]:
        if self.statistics and self.random.random() < 0.8:
            kind, identity = self.random.choice(list(self.statistics))
        else:
            kind, identity, _ = self.statistics_object()
        expected = 0 if self.statistics.pop((kind, identity), None) else status.INVALID_PARAMETER
        return expected, self.parent.unmap_stats(kind, identity)

    # --- properties ---------------------------------------------------------------------------------------------------
    def get_property(self) -> tuple[int | None, int]:
        model = self.some()
        code = self.random.choice((tlfs.TIME_FREEZE, tlfs.REFERENCE_TIME, tlfs.MAX_XSAVE_DATA_SIZE, 0x12345))
        expected = status.INVALID_PARTITION_STATE if model.state == FINALIZED else 0
        if code == 0x12345:
            expected = expected or status.UNKNOWN_PROPERTY
        result, value = self.parent.get(model.child.id, code)
        if not result and code == tlfs.TIME_FREEZE:
            assert value == model.frozen
        return expected, result

    def set_property(self) -> tuple[int | None, int]:
        model = self.some()
        code = self.random.choice(
            (
                tlfs.TIME_FREEZE, tlfs.TIME_FREEZE, tlfs.REFERENCE_TIME, tlfs.GPA_PAGE_ACCESS_TRACKING,
                tlfs.UNIMPLEMENTED_MSR_ACTION, tlfs.SYNTHETIC_PROC_FEATURES,
            )
        )  # fmt: skip
        value = self.random.choice((0, 1, 1, 2))
        early = code == tlfs.SYNTHETIC_PROC_FEATURES
        expected = status.INVALID_PARTITION_STATE if model.state > (CREATED if early else INITIALIZED) else 0
        if not expected and value == 2 and code not in (tlfs.REFERENCE_TIME, tlfs.SYNTHETIC_PROC_FEATURES):
            expected = status.PROPERTY_VALUE_OUT_OF_RANGE
        result = self.parent.set(model.child.id, code, value)
        if not result and code == tlfs.TIME_FREEZE:
            model.frozen = value
        return expected, result

    # --- memory -------------------------------------------------------------------------------------------------------
    def map_gpa(self) -> tuple[int | None, int]:
        model = self.some()
        expected = self.in_state(model)
        roll = self.random.random()
        gfn, count = self.random.randrange(64), self.random.choice((1, 4, 16))
        if roll < 0.2:
            flags = gpa.MAP_NO_ACCESS
            data = gpa.MAP_GPA_PAGES_INPUT.pack(model.child.id, gfn, flags) + bytes(8 * count)
            return expected, self.guest.call(hv.MAP_GPA_PAGES, data, count=count).status
        if roll < 0.3 and self.parent.given:
            pages = [self.random.choice(list(self.parent.given))]
            return expected or status.INVALID_PARAMETER, model.child.map(gfn, pages)
        first = RAM_FIRST + self.random.randrange(64)
        if roll < 0.6:
            gfn, count, first = 0, 16, RAM_FIRST
        return expected, model.child.map(gfn, list(range(first, first + count)))

    def unmap_gpa(self) -> tuple[int | None, int]:
        model = self.some()
        data = gpa.UNMAP_GPA_PAGES_INPUT.pack(model.child.id, self.random.randrange(32), 0)
        return self.in_state(model), self.guest.call(
            hv.UNMAP_GPA_PAGES, data, count=self.random.choice((1, 8))
        ).status

    def access_states(self) -> tuple[int | None, int]:
        model = self.some()
        data = gpa.GET_GPA_PAGES_ACCESS_STATES_INPUT.pack(model.child.id, self.random.randrange(16), 0)
        answer = self.guest.call(hv.GET_GPA_PAGES_ACCESS_STATES, data, count=64, output=64)
        return self.in_state(model), answer.status

    # --- running ------------------------------------------------------------------------------------------------------
    def enter(self) -> tuple[int | None, int]:
        """Real mode at the code; the VP may run."""
        model = self.some()
        index = self.vp_of(model)
        result = model.child.suspend(index)
        if result:
            return self.at_vp(model, index), result
        segment = 0x009B << 112 | 0xFFFF << 64
        result = model.child.set_registers(
            index, (registers.CS, segment), (registers.RIP, 0x1000), (registers.INTERNAL_ACTIVITY_STATE, 0)
        )
        return self.at_vp(model, index), result

    def resume(self) -> tuple[int | None, int]:
        model = self.some()
        index = self.vp_of(model)
        values = (registers.INTERCEPT_SUSPEND, 0), (registers.EXPLICIT_SUSPEND, 0)
        return self.at_vp(model, index), model.child.set_registers(index, *values)

    def go(self) -> tuple[int | None, int]:
        """Resumes a VP that has what it takes to come to an intercept: code, a place for the message, registers."""
        model = self.some()
        if model.state != INITIALIZED or not model.vps:
            return self.create_vp()
        index, kind = self.random.choice(list(model.vps)), vp_state.PAGE_INTERCEPT_MESSAGE
        if kind not in model.vps[index]:
            if not self.pool(model):
                return self.deposit()
            result, page = model.child.map_state_page(index, kind)
            assert result == 0
            model.vps[index].add(kind)
            model.child.state_pages[index, kind] = page
        assert model.child.suspend(index) == 0
        assert model.child.map(0, list(range(RAM_FIRST, RAM_FIRST + 16))) == 0
        code_segment = 0x009B << 112 | 0xFFFF << 64
        values = (registers.CS, code_segment), (registers.RIP, 0x1000), (registers.INTERNAL_ACTIVITY_STATE, 0)
        assert model.child.set_registers(index, *values) == 0
        model.child.resume(index)
        return 0, 0

    def suspend(self) -> tuple[int | None, int]:
        model = self.some()
        index = self.vp_of(model)
        return self.at_vp(model, index), model.child.suspend(index)

    def get_registers(self) -> tuple[int | None, int]:
        model = self.some()
        index = self.vp_of(model)
        result, _ = model.child.try_registers(index, registers.RIP, registers.EXPLICIT_SUSPEND, registers.RAX)
        return None if not self.at_vp(model, index) else status.INVALID_VP_INDEX, result

    def interrupt(self) -> tuple[int | None, int]:
        model = self.some()
        expected = status.INVALID_PARTITION_STATE if model.state == FINALIZED else None
        data = ports.ASSERT_VIRTUAL_INTERRUPT_INPUT.pack(
            model.child.id, self.random.choice((0, 0, 4, 5, 7)), self.random.getrandbits(1), self.random.randrange(4),
            self.random.randrange(16, 256), 0,
        )  # fmt: skip
        return expected, self.guest.call(hv.ASSERT_VIRTUAL_INTERRUPT, data).status

    # --- ports --------------------------------------------------------------------------------------------------------
    def port(self) -> tuple[int | None, int]:
        model = self.some()
        info = ports.MESSAGE_PORT.pack(5, ports.ANY_VP, 0)
        port_id = self.next_port
        data = struct.pack("<QIBBHQI4x", 1, port_id, 0, 0, 0, model.child.id, ports.PORT_DOORBELL) + info
        result = self.guest.call(hv.CREATE_PORT, data.ljust(56, b"\0")).status
        if not result:
            self.next_port += 1
            model.ports[port_id] = False
        return None, result

    def connect(self) -> tuple[int | None, int]:
        model = self.some()
        if not model.ports:
            return self.port()
        port_id = self.random.choice(list(model.ports))
        address = self.random.randrange(1 << 20, 1 << 21)
        data = struct.pack(
            "<QI4xQI4xI4xQQQQ", model.child.id, port_id, 1, port_id, 4, address, 0, 0x80000000, 0
        )
        result = self.guest.call(hv.CONNECT_PORT, data).status
        if not result:
            model.ports[port_id] = True
        return None, result

    def disconnect(self) -> tuple[int | None, int]:
        model = self.some()
        port_id = self.random.choice([*model.ports, 0xFFFF])
        expected = 0 if model.ports.get(port_id) else status.INVALID_CONNECTION_ID
        result = self.guest.fast(hv.DISCONNECT_PORT, struct.pack("<QII", model.child.id, port_id, 1)).status
        if not result:
            model.ports[port_id] = False
        return expected, result

    def delete_port(self) -> tuple[int | None, int]:
        model = self.some()
        loose = [port for port, connected in model.ports.items() if not connected]
        port_id = self.random.choice([*loose, 0xFFFF])
        expected = 0 if port_id in model.ports else status.INVALID_PORT_ID
        result = self.guest.fast(hv.DELETE_PORT, struct.pack("<QI", 1, port_id)).status
        if not result:
            del model.ports[port_id]
        return expected, result

    def intercept(self) -> tuple[int | None, int]:
        model = self.some()
        data = intercepts.INSTALL_INTERCEPT_INPUT.pack(
            model.child.id,
            self.random.choice((0, 3, 4)),
            self.random.randrange(0x14),
            self.random.randrange(8),
        )
        return None, self.guest.call(hv.INSTALL_INTERCEPT, data).status

    # --- anything -----------------------------------------------------------------------------------------------------
    def random_call(self) -> tuple[int, bytes, int, int]:
        """A call of the table with a child's id and bytes at random: code, input, elements, variable header. Not those
        that the model must know of."""
        code = self.random.choice(
            (
                hv.TRANSLATE_VIRTUAL_ADDRESS, hv.REGISTER_INTERCEPT_RESULT, hv.GET_VP_STATE, hv.SET_VP_STATE,
                hv.GET_VP_CPUID_VALUES, hv.SIGNAL_EVENT_DIRECT, hv.POST_MESSAGE_DIRECT, hv.ASSERT_VIRTUAL_INTERRUPT,
                hv.GET_PARTITION_PROPERTY_EX, hv.GET_PARTITION_PROPERTY, hv.GET_VP_REGISTERS, hv.SET_VP_REGISTERS,
                hv.CLEAR_VIRTUAL_INTERRUPT, hv.INSTALL_INTERCEPT, hv.MAP_GPA_PAGES, hv.UNMAP_GPA_PAGES,
                hv.GET_GPA_PAGES_ACCESS_STATES,
            )
        )  # fmt: skip
        model = self.some()
        data = bytearray(self.random.randbytes(512))
        if self.random.random() < 0.6:
            data[16:512:8] = bytes(len(data[16:512:8]))
        data[0:8] = model.child.id.to_bytes(8, "little")
        data[8:12] = self.vp_of(model).to_bytes(4, "little")
        data[12:16] = bytes(4)
        if code in (hv.GET_VP_STATE, hv.SET_VP_STATE):
            data[16:20] = self.random.choice((0x80000000, 0x80000001, 0x80000002, 4, 9)).to_bytes(4, "little")
            data[40:48] = self.random.choice((RAM_FIRST + 500, 1 << 30, 0)).to_bytes(8, "little")
            data[24:40] = bytes(16)
        elif code == hv.SET_VP_REGISTERS:  # names that exist, mostly
            for at in range(16, 512 - 32, 32):
                data[at : at + 4] = self.random.choice(NAMES).to_bytes(4, "little")
        elif code in (hv.MAP_GPA_PAGES, hv.UNMAP_GPA_PAGES, hv.GET_GPA_PAGES_ACCESS_STATES):
            flags, first = (8, 16) if code == hv.GET_GPA_PAGES_ACCESS_STATES else (16, 8)
            data[8:24] = bytes(16)
            data[first] = self.random.randrange(256)
            data[flags : flags + 4] = (1 << self.random.randrange(32) | self.random.getrandbits(2)).to_bytes(
                4, "little"
            )
        kind = TABLE.calls[code].kind
        count = self.random.randrange(1, 8) if kind == REP else 0
        return code, bytes(data), count, self.random.randrange(26) if kind == VARIABLE else 0

    def garbage(self) -> tuple[int | None, int]:
        """Many random calls at once. They are answered one by one, each with a status that exists."""
        records = []
        for number in range(self.random.randrange(1, STORM)):
            code, data, count, variable = self.random_call()
            gpa = STORM_INPUTS + (number << 12)
            self.guest.ram[gpa : gpa + len(data)] = data
            word = g.control(code, count=count, variable=variable)
            records.append(g.Op(g.HYPERCALL, rcx=word, rdx=gpa, r8=g.OUTPUT))
        self.guest.run(records)
        self.calls += len(records) - 1
        for record in records:
            assert record.fault == 0
            result = record.rax & 0xFFFF
            assert result in KNOWN, f"{record.rcx & 0xFFFF:#x} gives {result:#x}"
            self.random_calls[f"{hv.call_name(record.rcx & 0xFFFF)} {status.status_name(result)}"] += 1
        return None, result

    # --- the run ------------------------------------------------------------------------------------------------------
    def step(self) -> None:
        if self.slots.more:
            self.slots.more = False
            self.guest.wrmsr(msrs.EOM, 0)
        operation = (
            self.create if not self.children else self.random.choices(self.operations, self.weights)[0]
        )
        expected, result = operation()
        self.calls += 1
        name = operation.__name__
        assert result in KNOWN, f"{name} gives {result:#x}"
        if expected is not None:
            assert result == expected, (
                f"{name} gives {status.status_name(result)}, not {status.status_name(expected)}"
            )
        self.seen[f"{name} {status.status_name(result)}"] += 1

    def check(self) -> None:
        self.parent.check_accounts()
        hypervisor = self.guest.hypervisor
        assert hypervisor.statistics.pages.keys() == {_key(*key) for key in self.statistics}
        assert set(hypervisor.statistics.pages.values()) == hypervisor.root.deposits.used
        assert set(hypervisor.partitions) == {1, *(model.child.id for model in self.children)}
        for model in self.children:
            partition = hypervisor.partition(hypervisor.root, model.child.id)
            assert [vp.index for vp in partition.vps] == sorted(model.vps)
            assert len(partition.deposits.used) == sum(len(kinds) for kinds in model.vps.values())
            assert partition.defect is None
            assert partition.ended == ""
        assert not self.slots.wrong

    def clear(self) -> None:
        """Everything is taken down, from whatever state it is in."""
        for model in list(self.children):
            if model.state == INITIALIZED:
                assert model.child.finalize() == 0
                model.vps.clear()
            while self.pool(model):
                model.child.withdraw()
            assert model.child.delete() == 0
            self.children.remove(model)
            self.dead.append(model.child.id)


def _key(kind: int, identity: bytes) -> tuple[int, bytes]:
    used = {1: 0, 2: 4, 0x10001: 8}.get(kind, 12)
    return kind, identity[:used] + identity[15:]


def anonymous_memory() -> int:
    gc.collect()
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))


@contextlib.contextmanager
def fuzzing(guest: Guest, seed: int) -> Iterator[Fuzzer]:
    fuzzer = Fuzzer(guest, seed)
    guest.ram[CHILD_RAM + 0x1000 : CHILD_RAM + 0x1000 + len(CODE)] = CODE
    fuzzer.slots.start()
    try:
        yield fuzzer
    finally:
        fuzzer.slots.ending = True
        fuzzer.slots.join()


@pytest.mark.timeout(3600)
def test_random_lives_of_children(
    guest: Guest, capsys: pytest.CaptureFixture[str], record_property: Callable[[str, object], None]
) -> None:
    calls.load()
    with fuzzing(guest, SEED) as fuzzer:
        for _ in range(500):
            fuzzer.step()
        fuzzer.clear()
        memory, fds, threads = (
            anonymous_memory(),
            len(os.listdir("/proc/self/fd")),
            len(os.listdir("/proc/self/task")),
        )
        started = time.monotonic()
        steps = 0
        while fuzzer.calls < CALLS:
            fuzzer.step()
            steps += 1
            if not steps % 250:
                fuzzer.check()
                with capsys.disabled():
                    print(f"\n{fuzzer.calls} calls, {time.monotonic() - started:.0f} s", end="", flush=True)
        seconds = time.monotonic() - started
        fuzzer.check()
        fuzzer.clear()
        fuzzer.check()
        assert len(os.listdir("/proc/self/fd")) == fds
        assert len(os.listdir("/proc/self/task")) == threads
        grown = anonymous_memory() - memory
        assert grown < MEMORY_LIMIT, f"{grown} bytes more after {fuzzer.calls} calls"
        figures = (
            f"{fuzzer.calls} calls in {seconds:.1f} s, memory {grown >> 10:+} KiB, "
            f"messages {dict(fuzzer.slots.seen)}"
        )
        record_property("fuzz", figures)
        with capsys.disabled():
            print(
                f"\n{figures}; {dict(fuzzer.seen.most_common())}; {dict(fuzzer.random_calls.most_common())}"
            )
        # How many there are depends on how far the VPs come between two calls, on a busy machine not far.
        assert fuzzer.slots.seen[messages.OPAQUE_INTERCEPT] > steps // 1000, "too few intercepts"
    assert guest.partition.ended == ""
