# SPDX-License-Identifier: Apache-2.0
"""The little of QEMU's control protocol that the appliance needs (QEMU docs/interop/qmp-spec.txt)."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Shutdown:
    """QEMU's SHUTDOWN event: the machine has stopped. ``reason`` is guest-shutdown, guest-reset, guest-panic..."""

    reason: str


@dataclass(frozen=True)
class PortOpened:
    """QEMU's VSERPORT_CHANGE event: a program of the guest has opened the virtio-serial port with this id."""

    port: str


Event = Shutdown | PortOpened


class Qmp:
    """QEMU's end of the conversation is read by :meth:`received`; nothing here blocks."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._partial = b""
        self._replies = 0
        self._asked = 0
        self._waiting: dict[int, Callable[[str], None]] = {}
        self._send("qmp_capabilities")

    def _send(self, command: str, **arguments: object) -> None:
        self._asked += 1
        request = {"execute": command, "arguments": arguments}
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except OSError:
            pass  # QEMU is gone, which its process tells

    def sync(self) -> None:
        """Ask something harmless: when :attr:`idle` is true again, QEMU's main loop has come round."""
        self._send("query-status")

    def picture(self, display: str, path: str, done: Callable[[str], None]) -> None:
        """Have QEMU write what a display shows to a PNG file; ``done`` gets an empty string, or what went wrong."""
        self._send("screendump", filename=path, device=display, format="png")
        self._waiting[self._asked] = done

    @property
    def idle(self) -> bool:
        """Whether everything asked has been answered."""
        return self._replies >= self._asked

    def received(self, data: bytes) -> list[Event]:
        """Take bytes from QEMU and give the events in them."""
        *lines, self._partial = (self._partial + data).split(b"\n")
        events: list[Event] = []
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                continue
            if "return" in message or "error" in message:
                self._replies += 1
                waiting = self._waiting.pop(self._replies, None)
                if waiting is not None:
                    waiting(str(message.get("error", {}).get("desc", "")))
                continue
            details = message.get("data", {})
            if message.get("event") == "SHUTDOWN":
                events.append(Shutdown(str(details.get("reason", "unknown"))))
            elif message.get("event") == "VSERPORT_CHANGE" and details.get("open"):
                events.append(PortOpened(str(details.get("id"))))
        return events
