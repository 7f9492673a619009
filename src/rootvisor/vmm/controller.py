# SPDX-License-Identifier: Apache-2.0
"""What the VMM's controller wants of the machine that it drives."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol, Self

    from .schema import Document

    #: What a machine calls, from any thread of its own, when something happens: event and details (text to text).
    #: It returns at once and never calls back into the machine.
    #:
    #: ``shutdown``: the guest powered off. ``reboot``: it wants a reset. ``panic``: its kernel crashed (details: the
    #: crash registers). ``failed``: the machine cannot go on (``reason``, one line). ``device-failed``: a device cannot
    #: go on, and the guest sees that it needs a reset (``id``, ``reason``). ``activated``, ``reset``: a driver took a
    #: device into use, or let it go (``id``).
    Report = Callable[[str, dict[str, str]], None]

    class Machine(Protocol):
        """A partition with its memory, processors and devices.

        Whatever fails raises an exception whose ``str()`` is one line with the reason; `OSError` and `MachineError` are
        expected, others are errors of the program. The controller calls one method at a time, never from a thread
        of the machine's.
        """

        def __init__(self, config: Document, report: Report) -> None:
            """Make everything that the checked ``config`` (a `VM` document with names) asks for; run nothing.

            On failure everything that was made is gone again.
            """

        @classmethod
        def restore(
            cls, folder: str, config: Document, report: Report, *, prefault: bool, on_demand: bool
        ) -> Self:
            """The machine of a snapshot, paused. Same conditions as the constructor."""

        def start(self) -> None:
            """Run the processors from the kernel's entry point."""

        def pause(self) -> None:
            """Stop all processors and devices; when this returns nothing touches guest memory."""

        def resume(self) -> None:
            """Go on after `pause` or `restore`."""

        def stop(self) -> None:
            """End the machine, whatever its state, and give back all that it has. Does not fail; once is enough."""

        def press_power_button(self) -> None:
            """Press and release the ACPI power button."""

        def inject_nmi(self) -> None:
            """Give every processor a non-maskable interrupt."""

        def add_disk(self, config: Document) -> str:
            """Plug a disk into the guest; the PCI address (``0000:00:05.0``)."""

        def add_net(self, config: Document) -> str:
            """Plug a network device into the guest; the PCI address."""

        def add_fs(self, config: Document) -> str:
            """Plug a virtio-fs device into the guest; the PCI address."""

        def add_vsock(self, config: Document) -> str:
            """Plug a vsock device into the guest; the PCI address."""

        def remove_device(self, identifier: str) -> None:
            """Ask the guest to let a device go, and unplug it when it has."""

        def set_balloon(self, size: int) -> None:
            """Ask the guest for this many bytes in all."""

        def balloon_size(self) -> int:
            """Bytes that the guest has given back."""

        def counters(self) -> dict[str, dict[str, int]]:
            """Device name to counter to value (``_disk0``: ``read_bytes``, ...)."""

        def device_tree(self) -> dict[str, Document]:
            """Device name to ``{"id", "children": [...], "resources": [...], "pci_bdf"}``, as ``vm.info`` shows it."""

        def snapshot(self, folder: str) -> None:
            """Write everything that `restore` needs into a folder; the machine is paused and stays so."""


class MachineError(Exception):
    """The machine cannot do what was asked; the message is one line, with what mends it."""
