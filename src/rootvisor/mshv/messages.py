# SPDX-License-Identifier: Apache-2.0
"""Messages that a processor's run ends with, as objects (``include/hyperv/hvhdk.h``; contract child-partitions 5)."""

from __future__ import annotations

from rootvisor.tlfs import intercepts as types

from .segments import Segment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_PAYLOAD = 16
_HEADER = types.INTERCEPT_HEADER.unpack_from
_MEMORY = types.MEMORY_INTERCEPT.unpack_from
_IO_PORT = types.IO_PORT_INTERCEPT.unpack_from
_MSR = types.MSR_INTERCEPT.unpack_from
_EXCEPTION = types.EXCEPTION_INTERCEPT.unpack_from
_HYPERCALL = types.HYPERCALL_INTERCEPT_MESSAGE.unpack_from

READ = types.ACCESS_READ
WRITE = types.ACCESS_WRITE
EXECUTE = types.ACCESS_EXECUTE


class Message:
    """Any message: ``type`` (``tlfs.intercepts``), and ``payload``, a copy of its 240 bytes."""

    __slots__ = ("payload", "type")

    def __init__(self, buffer: bytes | bytearray | memoryview) -> None:
        self.type = int.from_bytes(buffer[:4], "little")
        self.payload = bytes(buffer[_PAYLOAD:256])

    @property
    def vp_index(self) -> int:
        """The processor that caused it: what all messages begin with."""
        return int.from_bytes(self.payload[:4], "little")

    def __repr__(self) -> str:
        shown = [f"{name}={_shown(getattr(self, name))}" for name in _fields(type(self)) if name != "payload"]
        return f"{type(self).__name__}({', '.join(shown)})"


class Intercept(Message):
    """An instruction or event that stopped the processor at ``rip``.

    ``instruction_length`` is 0 where it does not matter; ``access`` is :data:`READ`, :data:`WRITE` or
    :data:`EXECUTE`. ``cpl``, ``long_mode``, ``interruption_pending`` and ``interrupt_shadow`` tell the state it was in.
    """

    __slots__ = ("_state", "access", "cr8", "instruction_length", "rflags", "rip")

    def __init__(self, buffer: bytes | bytearray | memoryview) -> None:
        super().__init__(buffer)
        fields = _HEADER(self.payload)
        self.instruction_length = fields[1] & 0xF
        self.cr8 = fields[1] >> 4
        self.access = fields[2]
        self._state = fields[3]
        self.rip = fields[8]
        self.rflags = fields[9]

    @property
    def cs(self) -> Segment:
        """The code segment."""
        return Segment(*_HEADER(self.payload)[4:8])

    @property
    def cpl(self) -> int:
        """Privilege level, 0 to 3."""
        return int(self._state) & types.STATE_CPL

    @property
    def long_mode(self) -> bool:
        """EFER.LMA."""
        return bool(self._state & types.STATE_EFER_LMA)

    @property
    def protected_mode(self) -> bool:
        """CR0.PE."""
        return bool(self._state & types.STATE_CR0_PE)

    @property
    def interruption_pending(self) -> bool:
        """The access belongs to the delivery of an interrupt or exception."""
        return bool(self._state & types.STATE_INTERRUPTION_PENDING)

    @property
    def interrupt_shadow(self) -> bool:
        """The instruction follows STI or MOV SS."""
        return bool(self._state & types.STATE_INTERRUPT_SHADOW)


class MemoryAccess(Intercept):
    """The guest touched an address where it has no memory (``mapped`` false), or not with that right.

    ``gpa`` is exact. ``gva`` is None where it is not known. ``instruction``: up to 16 bytes from ``rip`` on.
    """

    __slots__ = ("gpa", "gva", "instruction")

    def __init__(self, buffer: bytes | bytearray | memoryview) -> None:
        super().__init__(buffer)
        fields = _MEMORY(self.payload)
        count, info = fields[11], fields[12]
        self.gva = fields[14] if info & types.MEMORY_GVA_VALID else None
        self.gpa = fields[15]
        self.instruction = fields[16][:count]

    @property
    def mapped(self) -> bool:
        """A region lies there, but the access is not allowed."""
        return self.type == types.GPA_INTERCEPT

    @property
    def gva_is_gpa(self) -> bool:
        """``gva`` is the address that leads to ``gpa``."""
        return bool(self.payload[45] & types.MEMORY_GVA_GPA_VALID)

    @property
    def tpr_priority(self) -> int:
        """Task priority at that moment."""
        return self.payload[46]


class IoPort(Intercept):
    """IN or OUT. ``size`` is 1, 2 or 4; ``write`` is true for OUT, whose value is in the low bytes of ``rax``.

    For IN, put the value into RAX (32-bit results clear the upper half), then RIP behind the instruction. ``string``
    (INS, OUTS) and ``rep``: the value comes from or goes to memory at ``rsi`` or ``rdi``.
    """

    __slots__ = ("instruction", "port", "rax", "rcx", "rdi", "rep", "rsi", "size", "string", "write")

    def __init__(self, buffer: bytes | bytearray | memoryview) -> None:
        super().__init__(buffer)
        fields = _IO_PORT(self.payload)
        self.port = fields[10]
        info = fields[11]
        self.size = info & 7
        self.string = bool(info & types.IO_STRING)
        self.rep = bool(info & types.IO_REP)
        self.rax = fields[13]
        self.instruction = fields[14][: fields[12]]
        self.rcx, self.rsi, self.rdi = fields[23:26]
        self.write = self.access == WRITE

    @property
    def ds(self) -> Segment:
        """The segment of OUTS' operand."""
        return Segment(*_IO_PORT(self.payload)[15:19])

    @property
    def es(self) -> Segment:
        """The segment of INS' operand."""
        return Segment(*_IO_PORT(self.payload)[19:23])

    @property
    def value(self) -> int:
        """What OUT writes."""
        return int(self.rax & ((1 << 8 * self.size) - 1))


class Msr(Intercept):
    """RDMSR or WRMSR of ``number``; ``value`` is what WRMSR writes."""

    __slots__ = ("number", "value", "write")

    def __init__(self, buffer: bytes | bytearray | memoryview) -> None:
        super().__init__(buffer)
        _fields_before, self.number, rdx, rax = _MSR(self.payload)[9:]
        self.value = (rdx & 0xFFFF_FFFF) << 32 | rax & 0xFFFF_FFFF
        self.write = self.access == WRITE


class Cpuid(Intercept):
    """CPUID with ``rax`` and ``rcx``; ``defaults``: what it would answer in RAX, RBX, RCX, RDX."""

    __slots__ = ("defaults", "rax", "rbx", "rcx", "rdx")

    def __init__(self, buffer: bytes | bytearray | memoryview) -> None:
        super().__init__(buffer)
        words = memoryview(self.payload).cast("Q")
        self.rax, self.rcx, self.rdx, self.rbx = words[5:9].tolist()
        rax, rcx, rdx, rbx = words[9:13].tolist()
        self.defaults = (rax, rbx, rcx, rdx)


class ExceptionIntercept(Intercept):
    """An exception, before the guest sees it. ``error_code`` is None where it has none; ``parameter``: CR2 or DR6."""

    __slots__ = ("error_code", "instruction", "parameter", "software", "vector")

    def __init__(self, buffer: bytes | bytearray | memoryview) -> None:
        super().__init__(buffer)
        fields = _EXCEPTION(self.payload)
        self.vector, info, count, code, self.parameter, data = fields[10:16]
        self.error_code = code if info & types.EXCEPTION_ERROR_CODE_VALID else None
        self.software = bool(info & types.EXCEPTION_SOFTWARE)
        self.instruction = data[:count]


class Hypercall(Intercept):
    """A hypercall of the guest that the hypervisor has not: registers are those of its calling convention."""

    __slots__ = ("r8", "rax", "rbx", "rcx", "rdi", "rdx", "rsi", "xmm")

    def __init__(self, buffer: bytes | bytearray | memoryview) -> None:
        super().__init__(buffer)
        self.rax, self.rbx, self.rcx, self.rdx, self.r8, self.rsi, self.rdi, self.xmm = _HYPERCALL(
            self.payload
        )[10:18]


class ApicEoi(Message):
    """The guest ended a level-triggered interrupt: ``vector``."""

    __slots__ = ()

    @property
    def vector(self) -> int:
        """The interrupt's vector."""
        return int.from_bytes(self.payload[4:8], "little")


class Halt(Intercept):
    """HLT, in a partition whose local APICs are not the hypervisor's."""

    __slots__ = ()


class UnrecoverableException(Intercept):
    """A triple fault: the guest is to be reset."""

    __slots__ = ()


class InvalidRegister(Message):
    """The processor cannot run with the registers that it was given."""

    __slots__ = ()


class UnsupportedFeature(Message):
    """The guest uses a feature that the hypervisor has not: ``code`` and ``parameter``."""

    __slots__ = ()

    @property
    def code(self) -> int:
        """Which feature (``hv_unsupported_feature_code``)."""
        return int.from_bytes(self.payload[4:8], "little")

    @property
    def parameter(self) -> int:
        """Its argument."""
        return int.from_bytes(self.payload[8:16], "little")


class InterruptionDeliverable(Intercept):
    """An interrupt that was asked for in DELIVERABILITY_NOTIFICATIONS can be given now: ``kind``."""

    __slots__ = ()

    @property
    def kind(self) -> int:
        """``hv_x64_pending_interruption_type``."""
        return int.from_bytes(self.payload[40:44], "little")


class SintDeliverable(Intercept):
    """Message slots that were asked for are free: ``sints`` has a bit for each."""

    __slots__ = ()

    @property
    def sints(self) -> int:
        """A bit for each SINT whose slot is free."""
        return int.from_bytes(self.payload[40:42], "little")


class Sipi(Intercept):
    """The guest starts ``target`` at page ``vector`` (with an intercept of INIT and SIPI installed)."""

    __slots__ = ()

    @property
    def target(self) -> int:
        """Index of the processor to start."""
        return int.from_bytes(self.payload[40:44], "little")

    @property
    def vector(self) -> int:
        """The page to start at."""
        return int.from_bytes(self.payload[44:48], "little")


_CLASSES: dict[int, Callable[[bytes | bytearray | memoryview], Message]] = {
    types.UNMAPPED_GPA: MemoryAccess,
    types.GPA_INTERCEPT: MemoryAccess,
    types.INVALID_VP_REGISTER_VALUE: InvalidRegister,
    types.UNRECOVERABLE_EXCEPTION: UnrecoverableException,
    types.UNSUPPORTED_FEATURE: UnsupportedFeature,
    types.HYPERCALL_INTERCEPT: Hypercall,
    types.SYNIC_SINT_DELIVERABLE: SintDeliverable,
    types.X64_IO_PORT_INTERCEPT: IoPort,
    types.X64_MSR_INTERCEPT: Msr,
    types.X64_CPUID_INTERCEPT: Cpuid,
    types.X64_EXCEPTION_INTERCEPT: ExceptionIntercept,
    types.X64_APIC_EOI: ApicEoi,
    types.X64_HALT: Halt,
    types.X64_INTERRUPTION_DELIVERABLE: InterruptionDeliverable,
    types.X64_SIPI_INTERCEPT: Sipi,
}


def decode(buffer: bytes | bytearray | memoryview) -> Message:
    """The message in 256 bytes (16 of header, 240 of payload); a plain :class:`Message` for an unknown type."""
    return _CLASSES.get(int.from_bytes(buffer[:4], "little"), Message)(buffer)


def _fields(kind: type) -> list[str]:
    """Names of the public attributes and properties of a message, basic ones first."""
    names = ["type"]
    for one in reversed(kind.__mro__[:-1]):
        for name, value in vars(one).items():
            if not name.startswith("_") and (
                isinstance(value, property) or name in vars(one).get("__slots__", ())
            ):
                names += [name] if name not in names else []
    return names


def _shown(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:#x}" if value > 9 else str(value)
    return value.hex() if isinstance(value, bytes) else repr(value)
