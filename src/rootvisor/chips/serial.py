# SPDX-License-Identifier: Apache-2.0
"""A 16550A serial port (National Semiconductor PC16550D): FIFO, loopback, receive and transmit interrupts.

Output is taken at once, so the transmitter is always empty; what is received waits in a queue until the guest reads.
"""

from __future__ import annotations

import os
from _thread import allocate_lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_DATA, _IER, _IIR, _LCR, _MCR, _LSR, _MSR, _SCRATCH = range(8)
_IER_RECEIVE, _IER_TRANSMIT = 1, 2
_IIR_NONE, _IIR_TRANSMIT, _IIR_RECEIVE = 1, 2, 4
_IIR_FIFO = 0xC0
_LCR_DIVISOR = 0x80
_MCR_OUT2, _MCR_LOOPBACK = 8, 0x10
_LSR_READY, _LSR_EMPTY = 1, 0x60
_MSR_LINES = 0xB0  # carrier, data set ready, clear to send
_OUTPUT_CHUNK = 256
#: Bytes that wait for a guest which does not read.
INPUT_LIMIT = 4096


class SerialPort:
    """``irq(level)`` drives the interrupt line; ``output`` is a descriptor or None (dropped).

    Lines go out whole or in pieces of 256 bytes; call :meth:`flush` from a timer for what remains.

    ``on_room`` is called when :meth:`receive` had to refuse something and the guest has read half of what waits: the
    moment to go on with the host's stream. It runs in the thread of the guest's access and must not block.
    """

    __slots__ = (
        "_chunk", "_divisor", "_fcr", "_ier", "_input", "_irq", "_lcr", "_level", "_lock", "_mcr", "_output",
        "_pending", "_refused", "_scratch", "_transmit_pending", "on_room",
    )  # fmt: skip

    def __init__(self, irq: Callable[[int], None], output: int | None, *, buffered: bool = True) -> None:
        self._irq = irq
        self._output = output
        self._chunk = _OUTPUT_CHUNK if buffered else 1
        self._input = bytearray()
        self._pending = bytearray()
        self._ier = self._lcr = self._mcr = self._scratch = self._fcr = 0
        self._divisor = 12
        self._level = 0
        self._transmit_pending = False
        self._refused = False
        self._lock = allocate_lock()
        self.on_room: Callable[[], None] | None = None

    # --- the guest's side -----------------------------------------------------------------------------------------
    def read(self, offset: int, size: int) -> int:
        """One register; wider reads give ones above it."""
        with self._lock:
            value = self._read(offset)
            room = self._room()
        if room is not None:
            room()
        return value if size == 1 else value | (1 << (size * 8)) - 0x100

    def _read(self, offset: int) -> int:
        if offset == _DATA:
            if self._lcr & _LCR_DIVISOR:
                return self._divisor & 0xFF
            value = self._input.pop(0) if self._input else 0
            self._update()
            return value
        if offset == _IER:
            return self._divisor >> 8 if self._lcr & _LCR_DIVISOR else self._ier
        if offset == _IIR:
            cause = self._cause()
            if cause == _IIR_TRANSMIT:
                self._transmit_pending = False
                self._update()
            return cause | (_IIR_FIFO if self._fcr & 1 else 0)
        if offset == _LCR:
            return self._lcr
        if offset == _MCR:
            return self._mcr
        if offset == _LSR:
            return _LSR_EMPTY | (_LSR_READY if self._input else 0)
        if offset == _MSR:
            if self._mcr & _MCR_LOOPBACK:  # DTR, RTS, OUT1, OUT2 come back as DSR, CTS, RI, DCD
                mcr = self._mcr
                return (mcr & 2) << 3 | (mcr & 1) << 5 | (mcr & 4) << 4 | (mcr & 8) << 4
            return _MSR_LINES
        return self._scratch

    def write(self, offset: int, size: int, value: int) -> None:
        """One register; the low byte of wider writes."""
        value &= 0xFF
        with self._lock:
            if offset == _DATA:
                if self._lcr & _LCR_DIVISOR:
                    self._divisor = self._divisor & 0xFF00 | value
                elif self._mcr & _MCR_LOOPBACK:
                    if len(self._input) < INPUT_LIMIT:
                        self._input.append(value)
                else:
                    self._pending.append(value)
                    if value == 10 or len(self._pending) >= self._chunk:
                        self._flush()
                self._transmit_pending = True
            elif offset == _IER:
                if self._lcr & _LCR_DIVISOR:
                    self._divisor = self._divisor & 0xFF | value << 8
                else:
                    if value & _IER_TRANSMIT and not self._ier & _IER_TRANSMIT:
                        self._transmit_pending = True
                    self._ier = value & 0xF
            elif offset == _IIR:
                self._fcr = value
                if value & 2:
                    self._input.clear()
            elif offset == _LCR:
                self._lcr = value
            elif offset == _MCR:
                self._mcr = value & 0x1F
            elif offset == _SCRATCH:
                self._scratch = value
            self._update()
            room = self._room()
        if room is not None:
            room()

    def _room(self) -> Callable[[], None] | None:
        if not self._refused or len(self._input) > INPUT_LIMIT // 2:
            return None
        self._refused = False
        return self.on_room

    def _cause(self) -> int:
        if self._input and self._ier & _IER_RECEIVE:
            return _IIR_RECEIVE
        if self._transmit_pending and self._ier & _IER_TRANSMIT:
            return _IIR_TRANSMIT
        return _IIR_NONE

    def _update(self) -> None:
        level = int(self._cause() != _IIR_NONE and bool(self._mcr & _MCR_OUT2))
        if level != self._level:
            self._level = level
            self._irq(level)

    # --- the host's side ------------------------------------------------------------------------------------------
    def receive(self, data: bytes) -> int:
        """Input from the host; returns how much was taken. Offer the rest again after :attr:`on_room`."""
        with self._lock:
            room = INPUT_LIMIT - len(self._input)
            self._input += data[:room]
            if len(data) > room:
                self._refused = True
            self._update()
        return min(room, len(data))

    def flush(self) -> None:
        """Writes an unfinished line."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        data, self._pending = self._pending, bytearray()
        if self._output is None:
            return
        try:
            while data:
                del data[: os.write(self._output, data)]
        except OSError:
            self._output = None  # nobody listens any more

    # --- snapshots ------------------------------------------------------------------------------------------------
    def save(self) -> dict[str, Any]:
        """Registers and input that waits. Output that waits is written first."""
        with self._lock:
            self._flush()
            return {
                "ier": self._ier,
                "lcr": self._lcr,
                "mcr": self._mcr,
                "fcr": self._fcr,
                "scratch": self._scratch,
                "divisor": self._divisor,
                "transmit_pending": self._transmit_pending,
                "input": bytes(self._input),
            }

    def restore(self, state: dict[str, Any]) -> None:
        """What :meth:`save` gave; drives the interrupt line accordingly.

        KeyError or TypeError for what cannot be such a state.
        """
        ier, lcr, mcr = state["ier"] & 0xF, state["lcr"] & 0xFF, state["mcr"] & 0x1F
        fcr, scratch, divisor = state["fcr"] & 0xFF, state["scratch"] & 0xFF, state["divisor"] & 0xFFFF
        waiting = bytearray(memoryview(state["input"])[:INPUT_LIMIT])
        transmit_pending = bool(state["transmit_pending"])
        with self._lock:
            self._ier, self._lcr, self._mcr, self._fcr = ier, lcr, mcr, fcr
            self._scratch, self._divisor = scratch, divisor
            self._transmit_pending = transmit_pending
            self._input = waiting
            self._update()
