# SPDX-License-Identifier: Apache-2.0
"""A root partition without KVM: VPs with a SynIC, and a model of the mshv driver's side (``mshv_synic.c``).

The model's handler is a generator that stops before each access to shared memory (False) and before each exit (True),
and shared memory calls a hook before each access of ours. So a test can let the two sides meet at any point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from rootvisor.hypervisor.doorbells import Doorbells
from rootvisor.hypervisor.errors import HvError
from rootvisor.hypervisor.ports import Port, Ports
from rootvisor.hypervisor.root_messages import RootMessages
from rootvisor.hypervisor.root_partition import RootPartition
from rootvisor.hypervisor.synic import Synic
from rootvisor.tlfs import messages, msrs, status
from rootvisor.tlfs import ports as tlfs

PAGE = 4096
SINT0_VALUE = 0xF3
SINT5_VALUE = 0xF3 | msrs.SINT_AS_INTERCEPT
EVENT_SINT = 5


class Shared:
    """Memory that calls ``hook`` before every access."""

    def __init__(self, memory: memoryview, hook: Callable[[], None]) -> None:
        self.memory = memory
        self.hook = hook

    def __len__(self) -> int:
        return len(self.memory)

    def __getitem__(self, key: int | slice) -> Any:
        if isinstance(key, slice):
            return Shared(self.memory[key], self.hook)
        self.hook()
        return self.memory[key]

    def __setitem__(self, key: int | slice, value: Any) -> None:
        self.hook()
        self.memory[key] = value

    def __eq__(self, other: object) -> bool:
        self.hook()
        return self.memory == other

    __hash__ = None  # type: ignore[assignment]

    def __bytes__(self) -> bytes:
        self.hook()
        return bytes(self.memory)

    def cast(self, code: Any) -> Shared:
        return Shared(self.memory.cast(code), self.hook)


class Page:
    """An overlay page that never moves."""

    def __init__(self, hook: Callable[[], None]) -> None:
        self.memory = memoryview(bytearray(PAGE))
        self.view = Shared(self.memory, hook)
        self.value = 0

    @property
    def enabled(self) -> bool:
        return bool(self.value & 1)

    def write(self, value: int) -> None:
        self.value = value

    def disable(self) -> None:
        self.value &= ~1

    reset = disable


class Vm:
    """Collects interrupts."""

    def __init__(self) -> None:
        self.raised: list[tuple[int, int]] = []

    def signal_msi(self, message: bytearray) -> bool:
        address = int.from_bytes(message[0:4], "little")
        data = int.from_bytes(message[8:12], "little")
        self.raised.append((address >> 12 & 0xFF, data & 0xFF))
        return True


class RootVp:
    def __init__(self, model: RootModel, index: int) -> None:
        self.index = self.apic_id = index
        self.partition = model.root
        self.interrupts = 0
        self.pages = [Page(model.meet) for _ in range(3)]
        simp, siefp, sirbp = self.pages
        self.synic = Synic(simp, siefp, sirbp, self.interrupt)  # type: ignore[arg-type]
        #: the driver's side
        self.tails = [0] * messages.SINT_COUNT
        self.handler: Iterator[bool] | None = None
        self.pending_interrupt = False
        #: the handler stands before an exit, where it would wait for whoever holds the hypervisor's lock
        self.leaving = False

    def settle(self, _caller: object) -> None:
        pass

    def interrupt(self, vector: int) -> None:
        self.interrupts += 1
        self.partition.vm.signal_msi(bytearray(8) + vector.to_bytes(4, "little"))

    @property
    def slot(self) -> memoryview:
        return self.pages[0].memory[:256]

    @property
    def kind(self) -> int:
        return int.from_bytes(self.slot[:4], "little")

    def ring(self, sint: int = EVENT_SINT) -> memoryview:
        return self.pages[2].memory[sint * 256 : (sint + 1) * 256]


class Root(RootPartition):
    """Only what ports look at."""

    __slots__ = ("__dict__",)

    def __init__(self) -> None:
        self.id = 1
        self.vps: list[Any] = []
        self.vm: Any = Vm()


class Child:
    def __init__(self, model: RootModel, partition_id: int) -> None:
        self.id = partition_id
        self.doorbells = Doorbells(model)  # type: ignore[arg-type]
        self.vps: list[Any] = []

    def vp(self, index: int) -> Any:
        for vp in self.vps:
            if vp.index == index:
                return vp
        raise HvError(status.INVALID_VP_INDEX)


class ChildVp:
    def __init__(self, index: int, root_vp: RootVp | None = None) -> None:
        self.index = index
        self.root_vp = root_vp


class RootModel:
    """Hypervisor, root with ``vps`` VPs, and the kernel in them; ``meet`` is called before each access of ours."""

    def __init__(self, vps: int = 1, enabled: bool = True) -> None:
        self.meeting: Callable[[], None] | None = None
        self.root = Root()
        self.guest = None
        self.partitions: dict[int, Any] = {1: self.root}
        self.vps = [RootVp(self, index) for index in range(vps)]
        self.root.vps.extend(self.vps)
        self.root_scheduler = None
        self.ports = Ports(self)  # type: ignore[arg-type]
        self.messages = RootMessages(self)  # type: ignore[arg-type]
        #: what the driver did: ("kick", partition, vp), ("doorbell", port), ("unknown", type)
        self.events: list[tuple[Any, ...]] = []
        if enabled:
            for vp in self.vps:
                self.module_load(vp)

    def meet(self) -> None:
        """One access of ours to shared memory is about to happen."""
        if self.meeting is not None:
            self.meeting()

    def child(self, partition_id: int = 2) -> Child:
        child = self.partitions[partition_id] = Child(self, partition_id)
        return child

    def port(self, port_id: int, child: Child, target_vp: int = tlfs.ANY_VP, sint: int = EVENT_SINT) -> Port:
        info = tlfs.MESSAGE_PORT.pack(sint, target_vp, 0)
        return self.ports.create(self.root, port_id, child, tlfs.PORT_DOORBELL, info)  # type: ignore[arg-type]

    # --- the driver ---------------------------------------------------------------------------------------------------
    def module_load(self, vp: RootVp) -> None:
        """mshv_synic_cpu_init."""
        synic = vp.synic
        for page in (synic.simp, synic.siefp, synic.sirbp):
            synic.write_page(page, page.value | 1)
        synic.write_sint(0, SINT0_VALUE)
        synic.write_sint(EVENT_SINT, SINT5_VALUE)
        synic.write_scontrol(1)

    def module_unload(self, vp: RootVp) -> None:
        """mshv_synic_cpu_exit."""
        synic = vp.synic
        synic.write_sint(0, SINT0_VALUE | msrs.SINT_MASKED)
        synic.write_sint(EVENT_SINT, SINT5_VALUE | msrs.SINT_MASKED)
        for page in (synic.sirbp, synic.siefp, synic.simp):
            synic.write_page(page, page.value & ~1)
        synic.write_scontrol(0)

    def cpu_online(self, vp: RootVp) -> None:
        """hv_cpu_init: tails at 0, then the assist page."""
        vp.tails = [0] * messages.SINT_COUNT
        assert vp.synic.outlet is not None
        vp.synic.outlet.came_online()

    def _drain(self, vp: RootVp, sint: int) -> Iterator[bool]:
        """synic_event_ring_get_queued_port in mshv_doorbell_isr's loop."""
        ring = vp.ring(sint)
        words = ring.cast("I")
        while True:
            tail = vp.tails[sint]
            yield False
            port = words[1 + tail]
            if not port:
                yield False
                if ring[messages.EVENT_RING_FULL_OFFSET]:
                    yield False
                    ring[messages.EVENT_RING_FULL_OFFSET] = 0
                    yield True
                    assert vp.synic.outlet is not None
                    self.messages.rings.refill(vp.synic.outlet, sint)
                    yield False
                    port = words[1 + tail]
                if not port:
                    yield False
                    ring[messages.EVENT_RING_SIGNAL_MASKED_OFFSET] = 0
                    yield False
                    port = words[1 + tail]
                    if not port:
                        return
                yield False
                ring[messages.EVENT_RING_SIGNAL_MASKED_OFFSET] = 1
            yield False
            words[1 + tail] = 0
            vp.tails[sint] = (tail + 1) % messages.EVENT_RING_ENTRIES
            self.events.append(("doorbell", port))

    def isr(self, vp: RootVp) -> Iterator[bool]:
        """mshv_isr."""
        slot = vp.slot
        yield False
        kind = int.from_bytes(slot[:4], "little")
        if not kind:
            return
        _, _, _, sender = messages.MESSAGE_HEADER.unpack_from(slot)
        argument = int.from_bytes(slot[16:20], "little")
        if kind == messages.SYNIC_SINT_INTERCEPT and argument == EVENT_SINT:
            yield from self._drain(vp, EVENT_SINT)
        elif kind == messages.OPAQUE_INTERCEPT:
            self.events.append(("kick", sender, argument))
        else:
            self.events.append(("unknown", kind))
            return
        yield False
        slot[:4] = bytes(4)
        yield False
        if slot[messages.MESSAGE_FLAGS_OFFSET] & messages.MESSAGE_FLAG_PENDING:
            yield True
            vp.synic.end_of_message()

    # --- running the root ---------------------------------------------------------------------------------------------
    def step(self, vp: RootVp) -> bool:
        """One access of the VP's handler; False when it has nothing to do."""
        if vp.handler is None:
            for entry in list(self.root.vm.raised):
                if entry == (vp.index, 0xF3):
                    self.root.vm.raised.remove(entry)
                    vp.pending_interrupt = True
            if not vp.pending_interrupt:
                return False
            vp.pending_interrupt = False
            vp.handler = self.isr(vp)
        following = next(vp.handler, None)
        vp.leaving = bool(following)
        if following is None:
            vp.handler = None
        return True

    def meet_randomly(self, chance: Random) -> None:
        """From now on some VP's handler makes some steps before each access of ours."""

        def meeting() -> None:
            self.meeting = None
            vp = chance.choice(self.vps)
            for _ in range(chance.choice((0, 1, 1, 2, 3, 300))):
                if vp.leaving and self.messages.lock.locked():
                    break
                self.step(vp)
            self.meeting = meeting

        self.meeting = meeting

    def run(self) -> None:
        """Until no VP has anything to do."""
        busy = True
        while busy:
            busy = False
            for vp in self.vps:
                busy |= self.step(vp)

    def kicks(self) -> list[tuple[int, int]]:
        return [event[1:] for event in self.events if event[0] == "kick"]

    def doorbells(self) -> list[int]:
        return [event[1] for event in self.events if event[0] == "doorbell"]
