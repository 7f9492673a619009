# SPDX-License-Identifier: Apache-2.0
"""What PCI and virtio ask of the machine around them.

Protocols for the type checker alone: the boot path must not pay for importing `typing`.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Protocol

    class IoHandler(Protocol):
        """Registers behind a range of ports or guest physical addresses.

        Offsets count from the start of the registered range; `size` is 1, 2, 4 or 8 bytes. Neither method raises,
        whatever the guest does.
        """

        def read(self, offset: int, size: int) -> int:
            """What the guest reads; wider than `size` bytes never."""
            ...

        def write(self, offset: int, size: int, value: int) -> None:
            """The guest wrote `value`."""
            ...

    class AddressSpace(Protocol):
        """Ports or guest physical addresses to which handlers can be attached at run time.

        `add` may raise `ValueError` for a range that is already taken.
        """

        def add(self, base: int, length: int, handler: IoHandler) -> None:
            """Route the range to `handler`."""
            ...

        def remove(self, base: int) -> None:
            """Undo the `add` at `base`."""
            ...

    class MemoryRegion(Protocol):
        """Guest RAM that one file descriptor backs: bytes `fd_offset`.. of `fd` are guest physical `gpa`.. ."""

        @property
        def gpa(self) -> int:
            """First guest physical address."""
            ...

        @property
        def size(self) -> int:
            """Length in bytes."""
            ...

        @property
        def fd(self) -> int:
            """The file (memfd) that holds the bytes."""
            ...

        @property
        def fd_offset(self) -> int:
            """Where in the file the region starts, in bytes."""
            ...

        @property
        def address(self) -> int:
            """Where the region is mapped in this process; 0 where the platform does not say."""
            ...

    class GuestMemory(Protocol):
        """Guest RAM as the devices see it."""

        @property
        def regions(self) -> Sequence[MemoryRegion]:
            """All guest RAM."""
            ...

        def view(self, gpa: int, length: int) -> memoryview:
            """Writable bytes of guest RAM; `ValueError` unless the range is wholly inside one region."""
            ...

    class MsiVector(Protocol):
        """One interrupt message of a function. Masked and unprogrammed when made."""

        def program(self, address: int, data: int) -> None:
            """The guest set the message; address 0 with data 0 means none."""
            ...

        def mask(self, masked: bool) -> None:
            """While masked the platform delivers nothing; an eventfd signalled meanwhile fires on unmask."""
            ...

        def trigger(self) -> None:
            """Deliver now. Called from device threads, only while unmasked."""
            ...

        def eventfd(self) -> int:
            """An eventfd that triggers this vector when signalled. Owned by the vector."""
            ...

    class PciPlatform(Protocol):
        """The machine or VMM a root complex sits in."""

        @property
        def mmio(self) -> AddressSpace:
            """Guest physical addresses."""
            ...

        @property
        def ports(self) -> AddressSpace:
            """IO ports."""
            ...

        @property
        def memory(self) -> GuestMemory:
            """Guest RAM."""
            ...

        def msi_vector(self, bdf: int) -> MsiVector:
            """A new vector for the function `bdf` (bus 15:8, device 7:3, function 2:0)."""
            ...

        def add_ioeventfd(self, gpa: int, size: int, fd: int, datamatch: int | None) -> None:
            """Signal `fd` on each guest write to `gpa` of `size` bytes; size 0 means of any width.

            `OSError` when that cannot be had: then writes reach the handler.
            """
            ...

        def coalesce_writes(self, gpa: int, size: int, enable: bool) -> None:
            """Guest writes there mean nothing before the next access elsewhere: they may come late, but in order."""
            ...

        def remove_ioeventfd(self, gpa: int, size: int, fd: int, datamatch: int | None) -> None:
            """Undo the `add_ioeventfd` with the same arguments."""
            ...
