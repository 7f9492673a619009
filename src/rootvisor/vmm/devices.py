# SPDX-License-Identifier: Apache-2.0
"""The guest's virtio devices: made from their configuration, plugged in, pulled out, counted."""

from __future__ import annotations

from _thread import allocate_lock

from ..virtio.pci_function import VirtioPciFunction
from .controller import MachineError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ..virtio.device import VirtioDevice
    from .board import Board
    from .schema import Document


class Plugged:
    """A device in its slot. ``release``: what else goes when it goes (the daemon behind it)."""

    __slots__ = ("bdf", "device", "function", "name", "release")

    def __init__(
        self,
        name: str,
        bdf: int,
        device: VirtioDevice,
        function: VirtioPciFunction,
        release: Callable[[], None] | None,
    ) -> None:
        self.name = name
        self.bdf = bdf
        self.device = device
        self.function = function
        self.release = release

    @property
    def address(self) -> str:
        """As Linux writes it."""
        return f"0000:{self.bdf >> 8:02x}:{self.bdf >> 3 & 31:02x}.{self.bdf & 7}"

    def close(self) -> None:
        """Stops the device, then what is behind it."""
        self.function.close()
        if self.release is not None:
            self.release()


class Devices:
    """Everything in the slots, by name. ``failed(name, reason)`` is called from device threads."""

    __slots__ = ("_board", "_failed", "_leaving", "_lock", "plugged", "slots")

    def __init__(self, board: Board, failed: Callable[[str, str], None]) -> None:
        self._board = board
        self._failed = failed
        self._lock = allocate_lock()
        #: being taken out: two processors may eject the same slot
        self._leaving: set[str] = set()
        self.plugged: dict[str, Plugged] = {}
        #: device numbers on bus 0 by name, for those that shall have a certain one
        self.slots: dict[str, int] = {}

    def plug(self, name: str, device: VirtioDevice, release: Callable[[], None] | None = None) -> Plugged:
        """Puts a device into the next free slot. MachineError when there is none, or when the guest still has a device
        of that name: then the device is closed."""
        device.on_failure = lambda reason: self._failed(name, reason)
        board = self._board
        function = VirtioPciFunction(device, board.platform)
        try:
            if name in self.plugged:
                raise ValueError("the guest has not let go the device of this name yet; take another name")
            bdf = board.pci.add(function, self.slots.get(name))
        except ValueError as error:
            function.close()
            if release is not None:
                release()
            raise MachineError(f"{name}: {error}") from error
        one = self.plugged[name] = Plugged(name, bdf, device, function, release)
        return one

    def unplug(self, name: str) -> bool:
        """Takes a device out: there is one of that name until nothing of it is left. False: somebody else does that, or
        has done it."""
        with self._lock:
            one = self.plugged.get(name)
            if one is None or name in self._leaving:
                return False
            self._leaving.add(name)
        try:
            self._board.pci.remove(one.bdf)
            one.close()
            self._board.platform.forget(one.bdf)
            self._board.ecam.follow()
        finally:
            with self._lock:
                del self.plugged[name]
                self._leaving.discard(name)
        return True

    def unplug_slot(self, number: int) -> str:
        """Takes out what is in a slot; its name, or nothing where there is nothing."""
        for name, one in list(self.plugged.items()):
            if one.bdf >> 3 == number and self.unplug(name):
                return name
        return ""

    def pause(self) -> None:
        """Nothing of them touches the guest's memory from now on."""
        paused = []
        try:
            for one in self.plugged.values():
                one.function.transport.pause()
                paused.append(one)
        except BaseException:
            for one in paused:
                one.function.transport.resume()
            raise

    def resume(self) -> None:
        """They go on."""
        for one in self.plugged.values():
            one.function.transport.resume()

    def save(self) -> list[tuple[str, int, dict[str, object]]]:
        """Name, device number and state of each; they are paused."""
        return [(name, one.bdf >> 3, one.function.save()) for name, one in self.plugged.items()]

    def restore(self, saved: list[tuple[str, int, dict[str, Any]]]) -> None:
        """Back to that. KeyError or ValueError when these are other devices."""
        if len(saved) != len(self.plugged):
            raise ValueError(f"the snapshot has {len(saved)} devices, the configuration {len(self.plugged)}")
        for name, _number, state in saved:
            self.plugged[name].function.restore(state)

    def counters(self) -> dict[str, dict[str, int]]:
        """Requests, bytes, interrupts of each device."""
        return {
            name: {
                f"queue{index}_{counter}": getattr(queue, counter)
                for index, queue in enumerate(one.device.counters)
                for counter in type(queue).__slots__
            }
            for name, one in list(self.plugged.items())  # the guest may eject one meanwhile
        }

    def tree(self) -> dict[str, Document]:
        """As ``vm.info`` shows devices."""
        return {
            name: {"id": name, "children": [], "resources": [], "pci_bdf": one.address}
            for name, one in list(self.plugged.items())
        }

    def close(self) -> None:
        """Stops everything."""
        for one in self.plugged.values():
            one.close()
        self.plugged.clear()
