# SPDX-License-Identifier: Apache-2.0
"""A bare-metal child with memory at 0 and processors in 64-bit mode, driven from the root through `rootvisor.mshv`.

Low memory: page tables at 0x1000 (4 GiB one to one, 2 MiB pages), descriptors at 0x7000, code of real mode at 0x8000,
interrupt vectors at 0x9000, counters of vectors at 0xB000, stacks below 0x20000 + 0x1000 * index, vector stubs at
0x30000, 64-bit code at 0x40000; free from 0x80000 on.
"""

from __future__ import annotations

import os
import struct
import threading
from select import select

from rootvisor.mshv import IoPort, Memory, Message, Mshv, Partition, Segment, Table, Vp
from tests.children.code import BASE, DONE_PORT, REAL_BASE, SAY_PORT, Code

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

PAGE_TABLES = 0x1000
GDT = 0x7000
IDT = 0x9000
COUNTERS = 0xB000
STACKS = 0x20000
STUBS = 0x30000
FREE = 0x80000
MIB = 1 << 20

#: Present, writable, user; and large.
_TABLE, _LARGE = 0x7, 0x87
_GDT = (0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00008B0000000067, 0)
SYNTHETIC_FEATURES = 0x10001
#: What QEMU gives its guests.
QEMU_FEATURES = 0x06400FFB

VECTORS = Code(
    f"""
    /* 256 stubs of 16 bytes; a vector counts, and ends its interrupt where there is a local APIC in x2APIC mode */
    .set n, 0
    .rept 256
    .balign 16
    .if !(n == 8 || (n >= 10 && n <= 14) || n == 17 || n == 21)
    pushq $0
    .endif
    pushq $n
    jmp common
    .set n, n + 1
    .endr
common:
    pushq %rax
    pushq %rcx
    pushq %rdx
    movq 24(%rsp), %rax
    lock incq {COUNTERS:#x}(,%rax,8)
    cmpq $32, %rax
    jb exception
    movl $0x80B, %ecx
    xorl %eax, %eax
    xorl %edx, %edx
    wrmsr
    popq %rdx
    popq %rcx
    popq %rax
    addq $16, %rsp
    iretq
exception:
    cmpq $2, %rax
    je leave
    outl %eax, $0xE1                /* the vector, the error code, RIP */
    movq 32(%rsp), %rax
    outl %eax, $0xE2
    movq 40(%rsp), %rax
    outl %eax, $0xE3
leave:
    popq %rdx
    popq %rcx
    popq %rax
    addq $16, %rsp
    iretq
    """,
    base=STUBS,
)
X2APIC_ON = """
    movl $0x1B, %ecx
    rdmsr
    orl $0xC00, %eax
    wrmsr
    movl $0x80F, %ecx
    movl $0x1FF, %eax
    xorl %edx, %edx
    wrmsr
"""


class Unexpected(AssertionError):
    """The guest did something else."""


class Guest:
    """A child. ``code`` is loaded where it is linked, and VP 0 starts there; more VPs wait for a SIPI."""

    def __init__(
        self,
        mshv: Mshv,
        code: Code | None = None,
        *,
        memory: int = 2 * MIB,
        vps: int = 1,
        features: int | None = None,
        interrupts: bool = False,
        large_pages: bool = True,
        early: Callable[[Partition], None] | None = None,
        stage: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.said: list[int] = []
        self.partition = mshv.create_partition(large_pages=large_pages)
        self.vps: list[Vp] = []
        self.memory = Memory(memory)
        stage("created")
        try:
            if features is not None:
                self.partition.set_property(SYNTHETIC_FEATURES, features)
            if early:
                early(self.partition)
            self.partition.initialize()
            stage("initialized")
            self._write_tables()
            for piece in (code, VECTORS if interrupts else None):
                if piece is not None:
                    self.write(piece.base, piece.image)
            self.region = self.partition.map(0, self.memory)
            stage("mapped")
            for index in range(vps):
                self.vps.append(self.partition.create_vp(index))
            stage("vps")
            if code is not None and code.bits == 64:
                self.long_mode(self.vps[0], code.base)
            elif code is not None:
                self.real_mode(self.vps[0], code.base)
        except BaseException:
            self.close()
            raise

    def _write_tables(self) -> None:
        entries = [PAGE_TABLES + 0x1000 | _TABLE]
        self.write(PAGE_TABLES, struct.pack("<Q", *entries))
        self.write(
            PAGE_TABLES + 0x1000,
            struct.pack("<4Q", *(PAGE_TABLES + 0x2000 + 0x1000 * n | _TABLE for n in range(4))),
        )
        self.write(PAGE_TABLES + 0x2000, struct.pack("<2048Q", *(2 * MIB * n | _LARGE for n in range(2048))))
        self.write(GDT, struct.pack("<5Q", *_GDT))
        gate = struct.Struct("<HHHHII")
        gates = [
            gate.pack(STUBS + 16 * n & 0xFFFF, 8, 0x8E00, STUBS + 16 * n >> 16, 0, 0) for n in range(256)
        ]
        self.write(IDT, b"".join(gates))

    @property
    def vp(self) -> Vp:
        """VP 0."""
        return self.vps[0]

    # --- memory -------------------------------------------------------------------------------------------------------
    def write(self, gpa: int, data: bytes) -> None:
        """Writes memory from outside."""
        self.memory.view[gpa : gpa + len(data)] = data

    def read(self, gpa: int, size: int) -> bytes:
        """Reads memory from outside."""
        return bytes(self.memory.view[gpa : gpa + size])

    def u64(self, gpa: int) -> int:
        """A number in memory."""
        return int.from_bytes(self.memory.view[gpa : gpa + 8], "little")

    def interrupts_of(self, vector: int) -> int:
        """How often ``vector`` was taken."""
        return self.u64(COUNTERS + 8 * vector)

    # --- processors ---------------------------------------------------------------------------------------------------
    def long_mode(self, vp: Vp, rip: int = BASE, **more: int) -> None:
        """Puts a processor at ``rip`` in 64-bit mode, with a stack."""
        data = Segment.data()
        registers: dict[str | int, int | Segment | Table] = {
            "cr0": 0x80050033, "cr3": PAGE_TABLES, "cr4": 0x6A0, "efer": 0xD01, "cs": Segment.code64(), "ss": data,
            "ds": data, "es": data, "fs": data, "gs": data, "tr": Segment.tss(), "ldtr": Segment.ldt(),
            "gdtr": Table(GDT, 8 * len(_GDT) - 1), "idtr": Table(IDT, 0xFFF), "rflags": 2, "rip": rip,
            "rsp": STACKS + 0x1000 * vp.index + 0xFF0,
        }  # fmt: skip
        registers.update(more)
        vp.set_registers(registers)

    def real_mode(self, vp: Vp, linear: int = REAL_BASE) -> None:
        """Puts a processor at ``linear`` in real mode, all segments there."""
        segment = Segment.real_data(linear >> 4)
        vp.set_registers(
            cs=Segment.real_code(linear >> 4), ds=segment, es=segment, ss=segment, rip=0, rsp=0xFF0, rflags=2
        )

    def load(self, code: Code) -> None:
        """Lets VP 0, which stands still, begin with ``code``; general registers stay."""
        self.write(code.base, code.image)
        if code.bits == 64:
            self.long_mode(
                self.vp, code.base, pending_interruption=0, interrupt_state=0, internal_activity_state=0
            )
        else:
            self.real_mode(self.vp, code.base)

    def wait_event(self, eventfd: int, seconds: float = 10.0) -> int:
        """The count of an eventfd, when it is signalled."""
        if not select([eventfd], [], [], seconds)[0]:
            raise Unexpected("the eventfd was not signalled")
        return os.eventfd_read(eventfd)

    def run(self, vp: Vp | None = None) -> Message:
        """The next message; a signal is an error here."""
        message = (vp or self.vp).run()
        if message is None:
            raise Unexpected("RUN_VP was interrupted")
        return message

    def skip(self, message: Message, vp: Vp | None = None) -> None:
        """Lets the instruction of an IN or OUT be done."""
        assert isinstance(message, IoPort)
        (vp or self.vp).register_page.rip = message.rip + message.instruction_length

    def reply(self, message: Message, value: int, vp: Vp | None = None) -> None:
        """Completes IN with ``value``."""
        assert isinstance(message, IoPort) and not message.write and not message.string
        page = (vp or self.vp).register_page
        if message.size == 4:
            page.rax = value
        else:
            mask = (1 << 8 * message.size) - 1
            page.rax = page.rax & ~mask | value & mask
        self.skip(message, vp)

    def next(self, vp: Vp | None = None) -> Message:
        """The next message that is not ``say``."""
        while True:
            message = self.run(vp)
            if isinstance(message, IoPort) and message.port == SAY_PORT and not message.string:
                self.said.append(message.value)
                self.skip(message, vp)
                continue
            return message

    def finish(self, vp: Vp | None = None) -> list[int]:
        """Runs until ``done``; what was said."""
        message = self.next(vp)
        if not (isinstance(message, IoPort) and message.port == DONE_PORT):
            raise Unexpected(f"instead of `done`: {message}; said {[hex(one) for one in self.said]}")
        return self.said

    def close(self) -> None:
        """Gives everything back."""
        for vp in self.vps:
            vp.close()
        self.partition.close()
        self.memory.close()

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check(got: object, wanted: object, what: str = "") -> None:
    """An assertion that shows both sides (there is no pytest in the root partition)."""
    if got != wanted:
        raise AssertionError(f"{what or 'got'}: {_hex(got)}, not {_hex(wanted)}")


def _hex(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 9:
        return hex(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(_hex(one) for one in value)}]"
    return repr(value)


def must_be(message: Message, kind: type, **wanted: object) -> Message:
    """``message`` is of ``kind`` and has these attributes."""
    if type(message) is not kind:
        raise Unexpected(f"instead of {kind.__name__}: {message}")
    for name, value in wanted.items():
        check(getattr(message, name), value, name)
    return message


def note(text: str) -> None:
    """A figure for the report of the test."""
    print("note", text, flush=True)


def interrupted_after(vp: Vp, seconds: float) -> bool:
    """Runs the processor in this thread; whether it still ran after ``seconds``, when a signal ends it."""
    timer = threading.Timer(seconds, vp.interrupt)
    timer.start()
    message = vp.run()
    timer.join()
    return message is None


class Runner:
    """Runs a processor in a thread of its own; :meth:`wait` for its next message but `say`, which go to ``said``."""

    def __init__(self, guest: Guest, vp: Vp) -> None:
        self.guest = guest
        self.vp = vp
        self._message: Message | None = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> Runner:
        """Lets it run."""
        self._message = self._error = None
        # a test that fails meanwhile does not keep the root from its end
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        try:
            self._message = self.vp.run()
            while isinstance(self._message, IoPort) and self._message.port == SAY_PORT:
                self.guest.said.append(self._message.value)
                self.guest.skip(self._message, self.vp)
                self._message = self.vp.run()
        except BaseException as error:
            self._error = error

    def wait(self, seconds: float = 30.0) -> Message | None:
        """Its message; None if a signal ended it."""
        assert self._thread is not None
        self._thread.join(seconds)
        if self._thread.is_alive():
            self.vp.interrupt()
            self._thread.join()
            raise Unexpected(f"VP {self.vp.index} runs on")
        if self._error:
            raise self._error
        return self._message

    def stop(self) -> Message | None:
        """Ends it with a signal."""
        self.vp.interrupt()
        return self.wait()
