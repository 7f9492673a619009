# SPDX-License-Identifier: Apache-2.0
"""The virtio functions of the root's computer, made from the run description."""

from __future__ import annotations

from ..virtio.pci_function import VirtioPciFunction
from .file_server import FileServer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..virtio.console import Console
    from ..virtio.device import VirtioDevice
    from .assigned_devices import AssignedDevices
    from .computer import Computer
    from .console_wiring import Consoles

ROOTFS_TAG = "root"


class Devices:
    """Everything plugged into the computer; :meth:`close` stops the threads and servers behind it."""

    __slots__ = ("_functions", "_partition", "_servers", "assigned", "console")

    def __init__(self, computer: Computer, description: dict[str, Any], consoles: Consoles) -> None:
        self._functions: list[VirtioPciFunction] = []
        self._servers: list[FileServer] = []
        self.assigned: AssignedDevices | None = None
        self._partition = computer.partition
        self.console: Console | None = None
        wanted = description["devices"]
        try:
            if "console" in wanted:
                boards = consoles.devices()
                self.console = boards[0]
                for board in boards:
                    self._add(computer, board)
            if "rng" in wanted:
                from ..virtio.rng import Rng

                self._add(computer, Rng())
            if "fs" in wanted and description.get("file_server"):
                from ..virtio.fs import Fs

                server = FileServer(description["file_server"])
                self._servers.append(server)
                shares = Fs(server.connection, ROOTFS_TAG)
                self._add(computer, shares)
                shares.on_failure = self._file_server_lost
            if "disk" in wanted:
                for disk in description.get("disks", ()):
                    from ..virtio.block import Block
                    from ..virtio.disk_image import DiskImage

                    self._add(computer, Block(DiskImage(disk["path"], readonly=disk["readonly"])))
            if description.get("assigned"):
                from .assigned_devices import AssignedDevices

                self.assigned = AssignedDevices(computer, description["assigned"])
        except BaseException:
            self.close()
            raise

    def _add(self, computer: Computer, device: VirtioDevice) -> None:
        device.on_failure = self._failed
        function = VirtioPciFunction(device, computer.platform)
        computer.add_function(function)
        self._functions.append(function)

    def _failed(self, reason: str) -> None:
        """A driver broke its rings: the device waits for a reset, the partition goes on."""
        if self._partition.trace is not None:
            self._partition.trace.event("device-failed", reason)

    def _file_server_lost(self, reason: str) -> None:
        """Without its root file system the partition would hang for ever."""
        self._partition.end("host-error", f"the root file system is gone: {reason}")

    def close(self) -> None:
        """Devices first, then the servers they talk to."""
        if self.assigned is not None:
            self.assigned.close()
            self.assigned = None
        for function in self._functions:
            function.close()
        for server in self._servers:
            server.close()
        self._functions.clear()
        self._servers.clear()
