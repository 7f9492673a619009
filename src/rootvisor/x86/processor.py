# SPDX-License-Identifier: Apache-2.0
"""What :func:`.emulator.emulate` needs of a processor, and how an instruction can end that is not carried out."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol
else:
    Protocol = object


class Processor(Protocol):
    """A stopped processor. Registers go by their numbers in instructions: general 0 RAX, 1 RCX, 2 RDX, 3 RBX, 4 RSP,
    5 RBP, 6 RSI, 7 RDI, 8 to 15; segments 0 ES, 1 CS, 2 SS, 3 DS, 4 FS, 5 GS; vectors 0 to 31.

    Memory goes by linear address. Accesses have 1, 2, 4 or 8 bytes and never cross a page; larger operands and those
    that cross come in pieces, the second page probed first. Each of :meth:`read`, :meth:`write` and :meth:`probe` may
    raise :class:`Fault`, for instance a page fault, before it has had any effect.
    """

    #: The instruction's offset in the code segment.
    rip: int
    rflags: int

    def general(self, number: int, /) -> int:
        """A general register, 64 bits."""
        raise NotImplementedError

    def set_general(self, number: int, value: int, /) -> None:
        """Writes a general register; ``value`` has 64 bits."""
        raise NotImplementedError

    def segment_base(self, number: int, /) -> int:
        """Base of a segment; in 64-bit code only FS and GS are asked for."""
        raise NotImplementedError

    def stack_mask(self) -> int:
        """The stack pointer's width: 0xFFFF_FFFF if SS.B is set, else 0xFFFF. Not asked for in 64-bit code."""
        raise NotImplementedError

    def vector(self, number: int, size: int, /) -> int:
        """The low ``size`` bytes (16, 32, 64) of a vector register."""
        raise NotImplementedError

    def set_vector(self, number: int, size: int, value: int, /) -> None:
        """Writes a vector register: 16 bytes and the rest stays as it is, or 64, which is all that there is of it."""
        raise NotImplementedError

    def read(self, address: int, size: int, write_intent: bool, /) -> int:
        """Reads memory. With ``write_intent`` the instruction is going to write there: it faults as a write would."""
        raise NotImplementedError

    def write(self, address: int, size: int, value: int, /) -> None:
        """Writes memory."""
        raise NotImplementedError

    def probe(self, address: int, size: int, write: bool, /) -> None:
        """Raises what :meth:`read` or :meth:`write` would raise; otherwise without effect."""
        raise NotImplementedError

    def input(self, port: int, size: int, /) -> int:
        """Reads a port: 1, 2 or 4 bytes."""
        raise NotImplementedError

    def output(self, port: int, size: int, value: int, /) -> None:
        """Writes a port."""
        raise NotImplementedError


class Fault(Exception):
    """An exception that the guest gets: ``vector``, ``error_code`` (None where there is none), ``address`` for CR2.

    The processor's state is that before the instruction; a repeated string instruction has done what it did before.
    """

    def __init__(self, vector: int, error_code: int | None = None, address: int = 0) -> None:
        super().__init__(vector, error_code, address)
        self.vector = vector
        self.error_code = error_code
        self.address = address

    def __str__(self) -> str:
        code = "" if self.error_code is None else f", error code {self.error_code:#x}"
        return f"exception {self.vector}{code}, address {self.address:#x}"


class Unsupported(Exception):
    """An instruction that is not emulated, or no instruction: ``code`` are the bytes.

    ``incomplete``: they are the beginning of one, and more bytes may help.
    """

    def __init__(self, code: bytes, incomplete: bool = False) -> None:
        super().__init__(code)
        self.code = code
        self.incomplete = incomplete

    def __str__(self) -> str:
        return f"instruction {self.code.hex(' ')} is {'incomplete' if self.incomplete else 'not emulated'}"


DIVIDE_ERROR = 0
GENERAL_PROTECTION = 13
