# SPDX-License-Identifier: Apache-2.0
"""Console device: an hvc console and named serial ports (virtio 1.2, section 5.3).

Queues: 0 and 1 input and output of port 0, 2 and 3 control messages to and from the driver, then a pair per further
port. With one console port and no others the device offers no MULTIPORT and has queues 0 and 1 only.
"""

from __future__ import annotations

import struct

from .console_port import Port as Port
from .device import RING_FEATURES, VirtioDevice
from .queue import QueueError
from .registers import DEVICE_CONSOLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from .queue import Queue

F_SIZE = 1 << 0
F_MULTIPORT = 1 << 1

# Control events (5.3.6.2).
_DEVICE_READY = 0
_PORT_ADD = 1
_PORT_READY = 3
_CONSOLE_PORT = 4
_RESIZE = 5
_PORT_OPEN = 6
_PORT_NAME = 7

_CONTROL = struct.Struct("<IHH")  # port, event, value
_CONFIG = struct.Struct("<HHII")  # columns, rows, ports, emergency write
_SIZE = struct.Struct("<HH")

_CONTROL_IN, _CONTROL_OUT = 2, 3
_PORT_QUEUE_SIZE = 64
_CONTROL_QUEUE_SIZE = 32
# More messages than any honest exchange needs to have waiting.
_MAX_WAITING = 1024


class Console(VirtioDevice):
    """The device.

    Arguments:
        ports: the ports by number; port 0 is the console of drivers without MULTIPORT.
        size: (columns, rows) of the terminal behind port 0, if there is one.
        rows_first: order of the fields in RESIZE messages. The specification has columns first; Linux read rows first
            until the order was mended (seen: rows first in 6.12, columns first in 7.3). Without MULTIPORT the size
            travels in the configuration structure, where all agree.
    """

    device_type = DEVICE_CONSOLE

    def __init__(
        self,
        ports: Sequence[Port],
        size: tuple[int, int] | None = None,
        *,
        name: str = "console",
        rows_first: bool = False,
    ) -> None:
        if not ports or len(ports) > 31:
            raise ValueError(f"a console device has 1 to 31 ports, not {len(ports)}")
        self.ports = tuple(ports)
        self._multiport = len(ports) > 1 or not ports[0].is_console
        features = RING_FEATURES | (F_SIZE if size else 0) | (F_MULTIPORT if self._multiport else 0)
        sizes = [_PORT_QUEUE_SIZE] * 2
        if self._multiport:
            sizes += [_CONTROL_QUEUE_SIZE] * 2 + [_PORT_QUEUE_SIZE] * (2 * len(ports) - 2)
        super().__init__(name, features, sizes)
        self.vectors = 2
        self._size = size
        self._rows_first = rows_first
        self._waiting: list[bytes] = []
        self._driver_ready = False
        self._set_config()
        for port in self.ports:
            port.attach(self.worker, self._input_ended)

    def resize(self, columns: int, rows: int) -> None:
        """The terminal changed its size. From any thread or signal handler."""
        self._size = (columns & 0xFFFF, rows & 0xFFFF)
        self._set_config()
        self.worker.post(self._resized)

    def activate(self, queues: Sequence[Queue | None], features: int) -> None:
        """Serve the queues; a driver without MULTIPORT has port 0 open from the start."""
        super().activate(queues, features)
        if not features & F_MULTIPORT:
            self.ports[0].ready = True
            self.ports[0].opened(True)

    def start_queue(self, queue: Queue) -> None:
        """Give the queue to its port."""
        port, is_output = self._port_of(queue.index)
        if port is not None:
            if is_output:
                port.tx = queue
            else:
                port.rx = queue
        super().start_queue(queue)

    def stop_queue(self, queue: Queue) -> None:
        """Take the queue from its port."""
        super().stop_queue(queue)
        port, _ = self._port_of(queue.index)
        if port is not None:
            port.release(queue)

    def reset(self) -> None:
        """Ports closed, as before the driver came."""
        super().reset()
        self._waiting.clear()
        self._driver_ready = False
        for port in self.ports:
            port.detach_queues()

    def set_dma(self, enabled: bool) -> None:
        """Input waits for the guest's memory too, output for the host on our side."""
        if not enabled:
            for port in self.ports:
                port.settle()
        super().set_dma(enabled)
        if enabled:
            for port in self.ports:
                port.poll_input()

    def handle_queue(self, queue: Queue) -> None:
        """Room for input, output, or control messages."""
        if queue.index == _CONTROL_IN:
            self._flush_control()
        elif queue.index == _CONTROL_OUT:
            self._read_control(queue)
        else:
            port, is_output = self._port_of(queue.index)
            if port is None:
                return
            if is_output:
                port.pump_output()
            else:
                port.poll_input()

    def save(self) -> dict[str, object]:
        """What the driver knows of the ports."""
        return {
            "ready": self._driver_ready,
            "waiting": list(self._waiting),
            "ports": [port.save() for port in self.ports],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Ports are open where they were."""
        ports = state["ports"]
        if len(ports) != len(self.ports):
            raise ValueError(f"{self.name} has {len(self.ports)} ports, not {len(ports)}")
        self._driver_ready = bool(state["ready"])
        self._waiting = [bytes(message) for message in state["waiting"][:_MAX_WAITING]]
        for port, saved in zip(self.ports, ports, strict=True):
            port.restore(saved)
        # The terminal may have another size here.
        self.worker.post(self._resized)

    def close(self) -> None:
        """Write out what is left of the consoles' output and release the descriptors."""
        super().close()
        for port in self.ports:
            port.drain()
            port.close()

    def _port_of(self, index: int) -> tuple[Port | None, bool]:
        if index in (_CONTROL_IN, _CONTROL_OUT):
            return None, False
        number = 0 if index < _CONTROL_IN else index // 2 - 1
        return self.ports[number], bool(index & 1)

    def _set_config(self) -> None:
        columns, rows = self._size or (0, 0)
        self.config = _CONFIG.pack(columns, rows, len(self.ports), 0)

    def _resized(self) -> None:
        if self.driver_features & F_MULTIPORT:
            for number, port in enumerate(self.ports):
                if port.ready and port.is_console:
                    self._send_size(number)
            self._flush_control()
        elif self.active and self.driver_features & F_SIZE:
            self.config_changed()

    def _input_ended(self, port: Port) -> None:
        # A console has no end of input that would mean anything to the guest.
        if port.ready and not port.is_console:
            self._send(self.ports.index(port), _PORT_OPEN, 0)
            self._flush_control()

    def _send(self, number: int, event: int, value: int, more: bytes = b"") -> None:
        if len(self._waiting) >= _MAX_WAITING:
            raise QueueError("the driver asks for more control messages than it reads")
        self._waiting.append(_CONTROL.pack(number, event, value) + more)

    def _send_size(self, number: int) -> None:
        if self._size is not None and self.driver_features & F_SIZE:
            columns, rows = self._size
            pair = (rows, columns) if self._rows_first else (columns, rows)
            self._send(number, _RESIZE, 0, _SIZE.pack(*pair))

    def _flush_control(self) -> None:
        queue = self.queues[_CONTROL_IN] if self._multiport else None
        if queue is None:
            return
        queue.quiet()
        done = False
        while self._waiting:
            chain = queue.pop()
            if chain is None:
                if queue.listen():
                    continue
                break
            queue.push(chain, chain.write(self._waiting.pop(0)))
            done = True
        if done:
            queue.notify()

    def _read_control(self, queue: Queue) -> None:
        while True:
            queue.quiet()
            done = False
            while (chain := queue.pop()) is not None:
                message = chain.read(_CONTROL.size)
                queue.push(chain, 0)
                done = True
                if len(message) == _CONTROL.size:
                    self._control(*_CONTROL.unpack(message))
            more = queue.listen()
            if done:
                queue.notify()
                self._flush_control()
            if not more:
                return

    def _control(self, number: int, event: int, value: int) -> None:
        if event == _DEVICE_READY:
            if value == 1 and not self._driver_ready:
                self._driver_ready = True
                for added in range(len(self.ports)):
                    self._send(added, _PORT_ADD, 0)
            return
        if number >= len(self.ports):
            return
        port = self.ports[number]
        if event == _PORT_READY:
            if value == 1:
                self._introduce(number, port)
        elif event == _PORT_OPEN and bool(value) != port.guest_open:
            if not value:
                port.pump_output()  # what was written before the close goes first
            port.opened(bool(value))

    def _introduce(self, number: int, port: Port) -> None:
        port.ready = True
        if port.is_console:
            self._send(number, _CONSOLE_PORT, 1)
            self._send_size(number)
        # Before the name: once a program finds the port by its name, a read must wait instead of giving the end.
        if port.host_open or port.is_console:
            self._send(number, _PORT_OPEN, 1)
        if port.name:
            self._send(number, _PORT_NAME, 1, port.name.encode())
