# SPDX-License-Identifier: Apache-2.0
"""The root complex: configuration access, address assignment and address decoding."""

from __future__ import annotations

from _thread import RLock

from . import registers as reg
from .host_bridge import HostBridge

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .bar import Bar
    from .function import PciFunction
    from .platform import AddressSpace, PciPlatform

_BUS_BYTES = 1 << 20
_DEVICES_PER_BUS = 32


class PciRoot:
    """Functions by bus, device and function number, the IO handler of the ECAM window.

    A function answers at an address only inside the windows given here, and never where another function already
    answers: a BAR that the guest puts elsewhere is simply not decoded.

    Arguments:
        platform: the machine around the root complex.
        ecam_base: guest physical address of the ECAM window (`ecam_bytes` long; the machine adds this object there).
        mmio32, mmio64: (base, size) of the memory windows below and above 4 GiB; a size of 0 means none.
        io_ports: (base, size) of the IO window.
        buses: how many buses configuration space covers; bus 0 alone has functions of our own.
    """

    def __init__(
        self,
        platform: PciPlatform,
        ecam_base: int,
        mmio32: tuple[int, int],
        mmio64: tuple[int, int] = (0, 0),
        *,
        io_ports: tuple[int, int] = (0xC000, 0x3000),
        buses: int = 1,
    ) -> None:
        self.platform = platform
        self.ecam_base = ecam_base
        self.ecam_bytes = buses * _BUS_BYTES
        self._mmio32 = mmio32
        self._mmio64 = mmio64
        self._io_ports = io_ports
        self._functions: dict[int, PciFunction] = {}
        self._lock = RLock()
        # What is decoded now: (is IO, base) -> (end, BAR); and what asks for an address it cannot have yet.
        self._decoded: dict[tuple[bool, int], tuple[int, Bar]] = {}
        self._refused: dict[Bar, PciFunction] = {}
        self.add(HostBridge(), 0)

    @property
    def functions(self) -> dict[int, PciFunction]:
        """The functions by bdf (bus 15:8, device 7:3, function 2:0)."""
        return dict(self._functions)

    def add(self, function: PciFunction, device: int | None = None) -> int:
        """Put a function on bus 0 as function 0 of `device` (default: the first free one); returns its bdf.

        Raises `ValueError` when the place, or every place, is taken.
        """
        with self._lock:
            if device is None:
                free = (n for n in range(_DEVICES_PER_BUS) if n << 3 not in self._functions)
                device = next(free, _DEVICES_PER_BUS)
            bdf = device << 3
            if not 0 <= device < _DEVICES_PER_BUS or bdf in self._functions:
                raise ValueError(f"no free place on PCI bus 0 for device {device}")
            self._functions[bdf] = function
            function.attach(self, bdf)
            return bdf

    def remove(self, bdf: int) -> PciFunction:
        """Take a function out, while the guest runs too: it is reset, and nothing answers in its place any more.

        The function comes back for the caller to close. Raises `KeyError` when there is none.
        """
        with self._lock:
            function = self._functions[bdf]
            function.reset()
            del self._functions[bdf]
            function.detach()
            return function

    def assign_bars(self) -> None:
        """Give every BAR an address, largest first in each window, and enable nothing: the firmware's part.

        64-bit BARs go above 4 GiB when that window has room. Raises `ValueError` when a window is too small.
        """
        cursors = {window: window[0] for window in (self._mmio32, self._mmio64, self._io_ports)}
        bars = [(bar, function) for function in self._functions.values() for bar in function.bars]
        bars.sort(key=lambda item: -item[0].size)
        with self._lock:
            for bar, function in bars:
                if bar.io:
                    windows = [self._io_ports]
                else:
                    windows = [self._mmio64, self._mmio32] if bar.wide else [self._mmio32]
                for window in windows:
                    address = cursors[window] + bar.size - 1 & ~(bar.size - 1)
                    if address + bar.size <= window[0] + window[1]:
                        cursors[window] = address + bar.size
                        function.set_bar_address(bar, address)
                        break
                else:
                    raise ValueError(
                        f"a PCI window is too small for BAR {bar.index} ({bar.size:#x} bytes) of {function.bdf:#06x}"
                    )

    def reset(self) -> None:
        """Reset every function and assign addresses anew."""
        with self._lock:
            for function in self._functions.values():
                function.reset()
            self.assign_bars()

    def config_read(self, bdf: int, offset: int, size: int) -> int:
        """Configuration read; all ones where there is no function or the access crosses the 4 KiB."""
        function = self._functions.get(bdf)
        if function is None or offset < 0 or offset + size > reg.CONFIG_SPACE_BYTES:
            return reg.all_ones(size)
        return function.config_read(offset, size)

    def config_write(self, bdf: int, offset: int, size: int, value: int) -> None:
        """Configuration write; dropped where there is no function or the access crosses the 4 KiB."""
        if offset < 0 or offset + size > reg.CONFIG_SPACE_BYTES:
            return
        with self._lock:
            function = self._functions.get(bdf)
            if function is not None:
                function.config_write(offset, size, value)

    def read(self, offset: int, size: int) -> int:
        """ECAM read: bus 27:20, device 19:15, function 14:12, register 11:0 (PCIe 3.0, 7.2.2)."""
        return self.config_read(offset >> 12, offset & 0xFFF, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """ECAM write."""
        self.config_write(offset >> 12, offset & 0xFFF, size, value)

    def decode(self, function: PciFunction, bar: Bar, address: int | None) -> None:
        """Answer for `bar` at `address` from now on (`None`: nowhere). For `PciFunction`."""
        with self._lock:
            if address is None:
                self._refused.pop(bar, None)
            if bar.mapped_at == address:
                return
            if bar.mapped_at is not None:
                self._unmap(bar)
                function.bar_moved(bar)
                self._retry_refused()
            if address is not None:
                if self._map(bar, address):
                    self._refused.pop(bar, None)
                    function.bar_moved(bar)
                else:
                    self._refused[bar] = function

    def _space(self, bar: Bar) -> AddressSpace:
        return self.platform.ports if bar.io else self.platform.mmio

    def _map(self, bar: Bar, address: int) -> bool:
        windows = (self._io_ports,) if bar.io else (self._mmio32, self._mmio64)
        end = address + bar.size
        if not any(base <= address and end <= base + size for base, size in windows):
            return False
        for (io, base), (taken, _) in self._decoded.items():
            if io == bar.io and address < taken and base < end:
                return False
        space = self._space(bar)
        done: list[int] = []
        for offset, length, handler in bar.regions:
            try:
                space.add(address + offset, length, handler)
            except ValueError:  # something that is not PCI answers there
                for base in done:
                    space.remove(base)
                return False
            done.append(address + offset)
        self._decoded[bar.io, address] = (end, bar)
        bar.mapped_at = address
        return True

    def _unmap(self, bar: Bar) -> None:
        address = bar.mapped_at
        assert address is not None
        space = self._space(bar)
        for offset, _, _ in bar.regions:
            space.remove(address + offset)
        del self._decoded[bar.io, address]
        bar.mapped_at = None

    def _retry_refused(self) -> None:
        """An address became free: whoever wants it gets it, as on a bus where two functions had collided."""
        for bar, function in list(self._refused.items()):
            if self._map(bar, function.bar_address(bar)):
                del self._refused[bar]
                function.bar_moved(bar)
