# SPDX-License-Identifier: Apache-2.0
"""Interrupts that the root asserts in a child, and what the child's local APICs tell of them.

KVM emulates the local APICs alone (split interrupt controller). A message to them needs nobody's cooperation, so
asserting never waits, whatever the target does. EOIs of level-triggered vectors leave KVM when a level-triggered route
exists for the vector: one is made per vector, for all VPs, the first time that it is asserted so. ExtINT and the LINT
pins depend on the target's state, and are done by its own thread before it enters the guest again
(:meth:`ChildInterrupts.before_entry`).
"""

from __future__ import annotations

from struct import Struct

from ..kvm import abi
from ..kvm.vm import msi_message
from ..tlfs import ports as tlfs
from ..tlfs import status
from ..tlfs.intercepts import APIC_EOI_MESSAGE
from . import intercepts
from .errors import HvError
from .interrupt_remapping import MSI_BASE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .child_partition import ChildPartition
    from .child_vp import ChildVp

#: After the header of a SYNIC_SINT_DELIVERABLE message: the SINTs.
_DELIVERABLE = Struct("<H6x")
_DATA_LEVEL = 1 << 15
_DATA_ASSERT = 1 << 14
_ADDRESS_LOGICAL = 1 << 2
_BROADCAST = 0xFF
_ADDRESS_ALL = _BROADCAST << 12
_FIRST_VECTOR = 16
#: Pins that KVM leaves to us, one per vector; ``kvm_arch.nr_reserved_ioapic_pins`` is a u8, so that 256 were none.
_PINS = 256 - _FIRST_VECTOR
_MESSAGES_REMEMBERED = 1024
_LVT_LINT = (0x350, 0x360)
_LVT_MASKED = 1 << 16
_LVT_MODE_SHIFT = 8


class ChildInterrupts:
    """All of one child. Under Hypervisor.lock, but for what VP threads call."""

    __slots__ = ("_child", "_extint", "_level", "_lint", "_messages", "_routed", "asserted", "pending")

    def __init__(self, child: ChildPartition) -> None:
        self._child = child
        #: (type, control, destination, vector) -> message
        self._messages: dict[tuple[int, int, int, int], bytearray] = {}
        #: vectors last asserted as level-triggered, and those with a route
        self._level: set[int] = set()
        self._routed: set[int] = set()
        #: by VP index: the ExtINT vector, and LINT pins as (pin, vector)
        self._extint: dict[int, int] = {}
        self._lint: dict[int, list[tuple[int, int]]] = {}
        #: some VP has work for :meth:`before_entry`
        self.pending = False
        self.asserted = 0

    def create_irqchip(self) -> None:
        """The local APICs; before the first VP."""
        self._child.vm.create_split_irqchip(_PINS)

    # --- the root's calls ---------------------------------------------------------------------------------------------
    def assert_interrupt(self, interrupt_type: int, control: int, destination: int, vector: int) -> None:
        """ASSERT_VIRTUAL_INTERRUPT: never waits and asks for nothing (contract T19).

        ``control`` is the upper half of the control word (level 1, logical 2). An interrupt that nobody takes is lost,
        as on a bus. HV_STATUS_INVALID_PARAMETER: type, vector below 16 for fixed and lowest priority, or above 255;
        for ExtINT and LINT also a destination that is no VP.
        """
        if vector > 0xFF:
            raise HvError(status.INVALID_PARAMETER)
        self.asserted += 1
        level = control & tlfs.INTERRUPT_LEVEL
        if interrupt_type <= tlfs.INTERRUPT_LOWEST_PRIORITY:
            if vector < _FIRST_VECTOR:
                raise HvError(status.INVALID_PARAMETER)
            if level:
                self._level.add(vector)
                if vector not in self._routed:
                    self._route(vector)
            elif vector in self._level:
                self._level.discard(vector)
        elif interrupt_type in (tlfs.INTERRUPT_EXTINT, tlfs.INTERRUPT_LINT0, tlfs.INTERRUPT_LINT1):
            self._for_thread(interrupt_type, control, destination, vector)
            return
        elif interrupt_type not in (tlfs.INTERRUPT_NMI, tlfs.INTERRUPT_INIT, tlfs.INTERRUPT_SIPI):
            raise HvError(status.INVALID_PARAMETER)
        if destination >> 32:
            return
        if interrupt_type == tlfs.INTERRUPT_INIT:
            self._reset_synics(destination, control)
        key = (interrupt_type, control & 3, destination, vector)
        message = self._messages.get(key)
        if message is None:
            if len(self._messages) >= _MESSAGES_REMEMBERED:
                self._messages.clear()
            message = self._messages[key] = _message(interrupt_type, control, destination, vector)
        self._child.vm.signal_msi(message)
        if not control & tlfs.INTERRUPT_LOGICAL:
            for vp in self._child.vps:
                if vp.apic_id == destination:
                    vp.interrupts += 1
                    break
        self._poke()

    def _poke(self) -> None:
        """Somebody may sleep no longer."""
        scheduler = self._child.hypervisor.root_scheduler
        if scheduler is not None:
            scheduler.poke()

    def waiting_for(self, vp: ChildVp) -> bool:
        """Whether a LINT pin, an ExtINT or a SYNIC_SINT_DELIVERABLE message waits for ``vp`` to run."""
        return vp.index in self._lint or vp.index in self._extint or vp.synic.deliverable() != 0

    def _reset_synics(self, destination: int, control: int) -> None:
        """INIT resets SynIC, timers and assist page, too. (One that another VP sends is noticed: ChildVp.settle.)"""
        if not control & tlfs.INTERRUPT_LOGICAL:
            for vp in self._child.vps:
                if destination in (vp.apic_id, _BROADCAST):
                    vp.reset_synthetic()

    def _route(self, vector: int) -> None:
        self._routed.add(vector)
        self._child.vm.set_msi_route(vector - _FIRST_VECTOR, (MSI_BASE | _ADDRESS_ALL, vector | _DATA_LEVEL))

    def _for_thread(self, interrupt_type: int, control: int, destination: int, vector: int) -> None:
        for vp in self._child.vps:
            if control & tlfs.INTERRUPT_LOGICAL or vp.apic_id == destination:
                break
        else:
            raise HvError(status.INVALID_PARAMETER)
        if interrupt_type == tlfs.INTERRUPT_EXTINT:
            self._extint[vp.index] = vector
        else:
            pins = self._lint.setdefault(vp.index, [])
            wanted = (interrupt_type - tlfs.INTERRUPT_LINT0, vector)
            if wanted not in pins:
                pins.append(wanted)
        self.pending = True
        vp.vcpu.kick()
        self._poke()

    def clear_extint(self) -> None:
        """CLEAR_VIRTUAL_INTERRUPT: an ExtINT that no VP has taken yet is forgotten."""
        self._extint.clear()

    def notify_sints(self, vp: ChildVp, sints: int) -> None:
        """Register DELIVERABILITY_NOTIFICATIONS: ``vp`` tells with a message, once, when the slot of one of these SINTs
        (a bit each) is free."""
        vp.synic.notify_sints = sints
        if sints:
            self.pending = True
            if vp.running:
                vp.vcpu.kick()

    # --- VP threads ---------------------------------------------------------------------------------------------------
    def before_entry(self, vp: ChildVp) -> bytes | None:
        """Pins and ExtINT of ``vp``, and its SINTs; its thread calls it before KVM_RUN while :attr:`pending`, with
        Hypervisor.lock held. Gives the payload of a SYNIC_SINT_DELIVERABLE message, if one is due."""
        vcpu = vp.vcpu
        for pin, vector in self._lint.pop(vp.index, ()):
            self._pin(vp, pin, vector)
        window = 0
        if vp.index in self._extint:
            if vcpu.u8[abi.RUN_READY_FOR_INTERRUPT] and vcpu.interrupt(self._extint[vp.index]):
                del self._extint[vp.index]
            else:
                window = 1  # KVM_EXIT_IRQ_WINDOW_OPEN when it can be taken
        vcpu.u8[abi.RUN_REQUEST_INTERRUPT_WINDOW] = window
        free = vp.synic.take_deliverable()
        self.pending = bool(
            self._extint or self._lint or any(other.synic.notify_sints for other in self._child.vps)
        )
        return intercepts.plain(vp) + _DELIVERABLE.pack(free) if free else None

    def _pin(self, vp: ChildVp, pin: int, vector: int) -> None:
        """LINT0 or LINT1 is raised: the local vector table says what that means."""
        lapic = vp.vcpu.lapic()
        at = _LVT_LINT[pin]
        entry = int.from_bytes(lapic[at : at + 4], "little")
        if entry & _LVT_MASKED:
            return
        mode = entry >> _LVT_MODE_SHIFT & 7
        if mode == tlfs.INTERRUPT_EXTINT:
            self._extint[vp.index] = vector
        elif mode in (tlfs.INTERRUPT_FIXED, tlfs.INTERRUPT_NMI, tlfs.INTERRUPT_INIT):
            vp.interrupts += 1
            self._child.vm.signal_msi(_message(mode, 0, vp.apic_id, entry & 0xFF))

    def ioapic_eoi(self, vp: ChildVp, vector: int) -> bytes | None:
        """KVM_EXIT_IOAPIC_EOI: the payload of the APIC_EOI message for the VP, or None when nobody asked for it."""
        if vector in self._level:
            return APIC_EOI_MESSAGE.pack(vp.index, vector)
        return None


def _message(interrupt_type: int, control: int, destination: int, vector: int) -> bytearray:
    address = MSI_BASE | (destination & 0xFF) << 12 | (destination & 0xFFFFFF00) << 32
    if control & tlfs.INTERRUPT_LOGICAL:
        address |= _ADDRESS_LOGICAL
    # Level-triggered vectors too arrive as edges, so that the trigger mode register of the local APIC stays clear for
    # them: Linux then tells the IO-APIC itself of the EOI (arch/x86/kernel/apic/io_apic.c, ioapic_ack_level). QEMU 11
    # has no use for APIC_EOI messages, and pins of its IO-APIC would be dead after their first interrupt.
    return msi_message(address, vector | interrupt_type << 8 | _DATA_ASSERT)
