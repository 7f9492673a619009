# SPDX-License-Identifier: Apache-2.0
"""/dev/mshv and the partitions made from it: memory, interrupts, doorbells, properties, hypercalls."""

from __future__ import annotations

import os

from rootvisor.tlfs import (
    cpuid_results,
    hypercalls,
    intercepts,
    ports,
    registers,
)
from rootvisor.tlfs import gpa as gpa_layouts

from . import abi
from .errors import MshvError
from .handle import Handle
from .memory import Memory
from .vp import Vp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType


ANY_VP = registers.VP_INDEX_ANY

#: Interrupt types of :meth:`Partition.assert_interrupt` (``hv_interrupt_type``).
FIXED = ports.INTERRUPT_FIXED
LOWEST_PRIORITY = ports.INTERRUPT_LOWEST_PRIORITY
NMI = ports.INTERRUPT_NMI
INIT = ports.INTERRUPT_INIT
SIPI = ports.INTERRUPT_SIPI
EXTINT = ports.INTERRUPT_EXTINT
LINT0 = ports.INTERRUPT_LINT0
LINT1 = ports.INTERRUPT_LINT1

# partition properties
TIME_FREEZE = 0x00030003
GPA_PAGE_ACCESS_TRACKING = 0x00050005

_GET_GPA_PAGES_ACCESS_STATES = 0x00C9
_STATES_INPUT = gpa_layouts.GET_GPA_PAGES_ACCESS_STATES_INPUT.pack
_MAX_GET_STATES = 4095


class Mshv(Handle):
    """The open device: creates partitions, and reads properties of the root partition.

        with Mshv() as mshv, mshv.create_partition() as partition:
            partition.initialize()

    MshvError when there is no /dev/mshv or it may not be opened.
    """

    __slots__ = ()

    def __init__(self, path: str = "/dev/mshv") -> None:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise MshvError("open", error.errno or 0) from error
        super().__init__(fd, [])

    def create_partition(
        self,
        *,
        lapic: bool = True,
        x2apic: bool = True,
        large_pages: bool = True,
        nested: bool = False,
        smt: bool = False,
        disabled_features: tuple[int, int] | None = None,
        disabled_xsave: int = 0,
    ) -> Partition:
        """Creates a child partition; :meth:`Partition.initialize` it after early properties are set.

        ``lapic``: the hypervisor emulates local APICs, INIT and SIPI. ``large_pages``: 2 MiB mappings are allowed.
        ``disabled_features``: two banks of processor features that the guest shall not have, as in properties 0x6000A
        and 0x6000B; ``disabled_xsave`` likewise, property 0x60002. None and 0: the guest has what the processor has.
        """
        flags = (
            (abi.PT_LAPIC if lapic else 0)
            | (abi.PT_X2APIC if x2apic else 0)
            | (abi.PT_GPA_SUPER_PAGES if large_pages else 0)
            | (abi.PT_NESTED_VIRTUALIZATION if nested else 0)
            | (abi.PT_SMT_ENABLED_GUEST if smt else 0)
        )
        if disabled_features is None and not disabled_xsave:
            argument = abi.CREATE_PARTITION_V1.pack(flags, 0)
        else:
            argument = abi.CREATE_PARTITION_V2.pack(
                flags | abi.PT_CPU_AND_XSAVE_FEATURES,
                0,
                abi.CPU_FEATURES_BANKS,
                *(disabled_features or (0, 0)),
                disabled_xsave,
            )
        return Partition(self.ioctl(abi.CREATE_PARTITION, argument), self._scratch)

    def __enter__(self) -> Mshv:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Region:
    """A piece of memory that a partition has: ``size`` bytes at guest physical address ``gpa``.

    ``address`` is where it lies in this process. ``memory``, if any, is kept alive by the region.
    """

    __slots__ = ("address", "flags", "gpa", "memory", "partition", "size")

    def __init__(
        self, partition: Partition, gpa: int, size: int, address: int, flags: int, memory: Memory | None
    ) -> None:
        self.partition = partition
        self.gpa = gpa
        self.size = size
        self.address = address
        self.flags = flags
        self.memory = memory

    def unmap(self) -> None:
        """Takes the region from the partition: the guest cannot touch the memory when this returns."""
        self.partition.unmap(self.gpa, self.size, self.address)


class Partition(Handle):
    """A child partition. Closing it, and its VPs, deletes it.

    ``initialize`` comes after early properties and before everything else.
    """

    __slots__ = ()

    def initialize(self) -> None:
        """Initializes the partition; a second time is allowed and does nothing."""
        self.ioctl(abi.INITIALIZE_PARTITION)

    def create_vp(self, index: int = 0) -> Vp:
        """Creates virtual processor ``index`` (below 256, any free one), in the state after reset."""
        return Vp(self, index, self.ioctl(abi.CREATE_VP, abi.CREATE_VP_ARGUMENT.pack(index)))

    def set_property(self, code: int, value: int) -> None:
        """Sets a property. Early ones (0x10001) before :meth:`initialize` only."""
        data = hypercalls.SET_PARTITION_PROPERTY_INPUT.pack(0, code, value)
        self.hypercall(hypercalls.SET_PARTITION_PROPERTY, data)

    def freeze_time(self, frozen: bool) -> None:
        """Stops reference time, TSC and timers as the guest sees them, or lets them go on."""
        self.set_property(TIME_FREEZE, int(frozen))

    # --- memory ---------------------------------------------------------------------------------------------------
    def map(
        self,
        gpa: int,
        memory: Memory,
        *,
        offset: int = 0,
        size: int | None = None,
        writable: bool = True,
        executable: bool = True,
    ) -> Region:
        """Gives ``size`` bytes (all, unless told) of ``memory`` from ``offset`` on to the guest at ``gpa``.

        Pages come into the guest when it touches them. Regions of a partition must not overlap.
        """
        size = memory.size - offset if size is None else size
        if not 0 <= offset < offset + size <= memory.size:
            raise ValueError(f"{size:#x} bytes at {offset:#x} are not in {memory.size:#x} bytes of memory")
        return self.map_address(gpa, memory.address + offset, size, writable, executable, memory)

    def map_address(
        self,
        gpa: int,
        address: int,
        size: int,
        writable: bool = True,
        executable: bool = True,
        memory: Memory | None = None,
    ) -> Region:
        """Gives memory of this process by its address. All three are multiples of 4096.

        A mapping of device memory (VFIO) makes the region one of device memory.
        """
        if gpa % abi.PAGE:
            raise ValueError(f"guest physical address {gpa:#x} is not a multiple of {abi.PAGE}")
        flags = (abi.SET_MEM_WRITABLE if writable else 0) | (abi.SET_MEM_EXECUTABLE if executable else 0)
        self.ioctl(abi.SET_GUEST_MEMORY, abi.USER_MEM_REGION.pack(size, gpa // abi.PAGE, address, flags))
        return Region(self, gpa, size, address, flags, memory)

    def unmap(self, gpa: int, size: int, address: int) -> None:
        """Takes back the region that was mapped with exactly these values."""
        self.ioctl(
            abi.SET_GUEST_MEMORY, abi.USER_MEM_REGION.pack(size, gpa // abi.PAGE, address, abi.SET_MEM_UNMAP)
        )

    def track_access(self, on: bool) -> None:
        """Starts recording which pages the guest accesses and writes, all clean at first; or stops."""
        self.set_property(GPA_PAGE_ACCESS_TRACKING, int(on))

    def access_states(self, gpa: int, pages: int, flags: int = 0) -> bytes:
        """A byte for each of ``pages`` pages from ``gpa`` on: bit 0 accessed, bit 1 dirty, both before the change.

        ``flags`` (``tlfs.gpa.ACCESS_*``) set or clear the states afterwards; 0 only reads. Read this way and not with
        MSHV_GET_GPAP_ACCESS_BITMAP, whose NOOP sets all states (Linux 7.3:
        ``mshv_partition_ioctl_get_gpap_access_bitmap``), and whose result is limited by memory the kernel can get.
        """
        page = gpa // abi.PAGE
        states = []
        while pages > 0:
            count = min(pages, _MAX_GET_STATES)
            data = _STATES_INPUT(0, flags, page)
            states.append(self.hypercall(_GET_GPA_PAGES_ACCESS_STATES, data, count, count))
            page += count
            pages -= count
        return b"".join(states)

    def access_bitmap(
        self, gpa: int, pages: int, kind: int = abi.ACCESS_TYPE_DIRTY, op: int = abi.ACCESS_OP_CLEAR
    ) -> bytes:
        """MSHV_GET_GPAP_ACCESS_BITMAP: a bit for each page that was written (``kind`` 1) or accessed (0) before ``op``
        (1 clears the states, 2 sets them)."""
        size = (pages + 7) // 8
        with Memory(-(-size // abi.PAGE) * abi.PAGE, name="bitmap") as buffer:
            argument = abi.GPAP_ACCESS_BITMAP.pack(kind, op, pages, gpa // abi.PAGE, buffer.address)
            self.ioctl(abi.GET_GPAP_ACCESS_BITMAP, argument)
            return bytes(buffer.view[:size])

    # --- interrupts and doorbells ---------------------------------------------------------------------------------
    def set_msi_routing(self, routes: Iterable[tuple[int, int, int]]) -> None:
        """Replaces the interrupt table: (number below 4096, MSI address, MSI data) for each."""
        entries = [
            abi.USER_IRQ_ENTRY.pack(number, address & 0xFFFF_FFFF, address >> 32, data)
            for number, address, data in routes
        ]
        self.ioctl(abi.SET_MSI_ROUTING, abi.USER_IRQ_TABLE.pack(len(entries)) + b"".join(entries))

    def add_irqfd(self, eventfd: int, number: int, resample: int | None = None) -> None:
        """Each signal of ``eventfd`` raises interrupt ``number`` of the table, without a trip through this process.

        ``resample``: an eventfd that is signalled when the guest ends a level-triggered interrupt.
        """
        flags = 0 if resample is None else abi.IRQFD_RESAMPLE
        self.ioctl(abi.IRQFD, abi.USER_IRQFD.pack(eventfd, resample or 0, number, flags))

    def remove_irqfd(self, eventfd: int, number: int) -> None:
        """Undoes :meth:`add_irqfd`: when this returns, the eventfd raises nothing any more."""
        self.ioctl(abi.IRQFD, abi.USER_IRQFD.pack(eventfd, 0, number, abi.IRQFD_DEASSIGN))

    def add_doorbell(self, gpa: int, eventfd: int, size: int = 0, value: int | None = None) -> None:
        """A write of the guest at ``gpa`` signals ``eventfd`` and does nothing else (MSHV_IOEVENTFD).

        ``size``: 1, 2, 4 or 8 bytes, 0 for any. ``value``: only writes of this value; None for all.
        """
        self._doorbell(gpa, eventfd, size, value, 0)

    def remove_doorbell(self, gpa: int, eventfd: int, size: int = 0, value: int | None = None) -> None:
        """Undoes :meth:`add_doorbell` with the same arguments."""
        self._doorbell(gpa, eventfd, size, value, abi.IOEVENTFD_DEASSIGN)

    def _doorbell(self, gpa: int, eventfd: int, size: int, value: int | None, flags: int) -> None:
        if value is not None:
            flags |= abi.IOEVENTFD_DATAMATCH
        self.ioctl(abi.IOEVENTFD, abi.USER_IOEVENTFD.pack(value or 0, gpa, size, eventfd, flags))

    def assert_interrupt(
        self,
        vector: int,
        destination: int = 0,
        kind: int = FIXED,
        *,
        level: bool = False,
        logical: bool = False,
    ) -> None:
        """Raises an interrupt: ``vector`` for the local APIC(s) that ``destination`` names.

        ``kind``: :data:`FIXED`, :data:`NMI`, :data:`INIT`, :data:`SIPI`, :data:`EXTINT`... With ``level``, the guest's
        end of interrupt arrives as :class:`~rootvisor.mshv.ApicEoi`.
        """
        control = (ports.INTERRUPT_LEVEL if level else 0) | (ports.INTERRUPT_LOGICAL if logical else 0)
        data = ports.ASSERT_VIRTUAL_INTERRUPT_INPUT.pack(0, kind, control, destination, vector, 0)
        self.hypercall(hypercalls.ASSERT_VIRTUAL_INTERRUPT, data)

    def clear_interrupt(self) -> None:
        """Takes back an interrupt of kind EXTINT that no processor has taken yet."""
        self.hypercall(hypercalls.CLEAR_VIRTUAL_INTERRUPT, ports.CLEAR_VIRTUAL_INTERRUPT_INPUT.pack(0))

    def signal_event(self, vp: int, sint: int, flag: int) -> bool:
        """Sets an event flag of the guest's SynIC and raises the SINT; whether the flag was clear before."""
        data = ports.SIGNAL_EVENT_DIRECT_INPUT.pack(0, vp, 0, sint, flag)
        return bool(
            self.hypercall(hypercalls.SIGNAL_EVENT_DIRECT, data, ports.SIGNAL_EVENT_DIRECT_OUTPUT.size)[0]
        )

    def post_message(self, vp: int, sint: int, message_type: int, payload: bytes) -> None:
        """Puts a message into the guest's message slot of ``sint``. MshvError while the slot is in use."""
        if len(payload) > 240:
            raise ValueError("a message has at most 240 bytes of payload")
        message = (
            message_type.to_bytes(4, "little")
            + bytes((len(payload),))
            + bytes(11)
            + payload.ljust(240, b"\0")
        )
        data = ports.POST_MESSAGE_DIRECT_INPUT.pack(0, vp, 0, sint, message)
        self.hypercall(hypercalls.POST_MESSAGE_DIRECT, data)

    # --- processors -----------------------------------------------------------------------------------------------
    def install_intercept(self, kind: int, access: int, parameter: int = 0) -> None:
        """Asks for messages about an event (``tlfs.intercepts.TYPE_*``, ``MASK_*``)."""
        data = intercepts.INSTALL_INTERCEPT_INPUT.pack(0, access, kind, parameter)
        self.hypercall(hypercalls.INSTALL_INTERCEPT, data)

    def register_cpuid(
        self,
        leaf: int,
        subleaf: int | None = None,
        *,
        eax: int = 0,
        ebx: int = 0,
        ecx: int = 0,
        edx: int = 0,
        masks: tuple[int, int, int, int] = (0xFFFF_FFFF,) * 4,
        vp: int = ANY_VP,
        always: bool = True,
    ) -> None:
        """What CPUID shall answer: the bits of ``masks`` (EAX, EBX, ECX, EDX) from the values, the others stay.

        ``subleaf`` None is all of them. ``always``: even where the hypervisor's own value is 0.
        """
        data = cpuid_results.REGISTER_INTERCEPT_RESULT_INPUT.pack(
            0, vp, cpuid_results.INTERCEPT_TYPE_CPUID, leaf, subleaf or 0, subleaf is not None, always,
            eax, masks[0], ebx, masks[1], ecx, masks[2], edx, masks[3],
        )  # fmt: skip
        self.hypercall(hypercalls.REGISTER_INTERCEPT_RESULT, data)

    def __enter__(self) -> Partition:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
