# SPDX-License-Identifier: Apache-2.0
"""A PCI function: its configuration space, BARs, capabilities and interrupts."""

from __future__ import annotations

from . import registers as reg
from .bar import Bar, RomBar
from .config import ConfigSpace
from .msix import MsixTable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .root import PciRoot

# Configuration writes outside these offsets change nothing but bytes.
_DECODING_END = reg.ROM_BASE + 4


class PciFunction:
    """One function with a type 0 header; without an INTx pin, unless a subclass gives it one.

    Arguments:
        class_code: base class, subclass and programming interface, 24 bits.
        express: carry a PCI Express capability as a root complex integrated endpoint; without it Linux takes the
            function for a conventional one and sees 256 bytes of configuration space.
    """

    def __init__(
        self,
        vendor_id: int,
        device_id: int,
        class_code: int,
        *,
        revision: int = 0,
        subsystem_vendor_id: int = 0,
        subsystem_id: int = 0,
        express: bool = True,
    ) -> None:
        self.config = config = ConfigSpace()
        self.bars: list[Bar] = []
        self.msix: MsixTable | None = None
        self.bdf: int | None = None
        self._root: PciRoot | None = None
        self._msix_control = 0
        config.set(reg.VENDOR_ID, 2, vendor_id)
        config.set(reg.DEVICE_ID, 2, device_id)
        config.set(reg.REVISION_ID, 1, revision)
        config.set(reg.CLASS_CODE, 3, class_code)
        config.set(reg.SUBSYSTEM_VENDOR_ID, 2, subsystem_vendor_id)
        config.set(reg.SUBSYSTEM_ID, 2, subsystem_id)
        config.set_mask(reg.COMMAND, 2, reg.COMMAND_WRITABLE)
        config.set_mask(reg.CACHE_LINE_SIZE, 1, 0xFF)
        config.set_mask(reg.INTERRUPT_LINE, 1, 0xFF)
        if express:
            body = bytearray(reg.EXPRESS_BYTES - 2)
            body[0:2] = reg.EXPRESS_FLAGS.to_bytes(2, "little")
            body[2:6] = reg.EXPRESS_DEVICE_CAPABILITIES.to_bytes(4, "little")
            offset = config.add_capability(reg.CAP_EXPRESS, bytes(body))
            config.set_mask(offset + reg.EXPRESS_DEVICE_CONTROL, 2, reg.EXPRESS_DEVICE_CONTROL_WRITABLE)

    @property
    def command(self) -> int:
        """The command register."""
        return self.config.get(reg.COMMAND, 2)

    @property
    def interrupt_pin(self) -> int:
        """Its INTx pin, from 1; 0 for none."""
        return self.config.get(reg.INTERRUPT_PIN, 1)

    def add_bar(
        self, index: int, size: int, *, io: bool = False, wide: bool = False, prefetchable: bool = False
    ) -> Bar:
        """Declare a BAR. A wide (64-bit) one takes the next register too."""
        bar = Bar(index, size, io=io, wide=wide, prefetchable=prefetchable)
        for other in self.bars:
            if other.index in range(index, index + 1 + wide) or (other.wide and other.index + 1 == index):
                raise ValueError(f"BAR {index} is taken")
        self.bars.append(bar)
        self.config.set(bar.register, bar.register_bytes, bar.flags)
        self.config.set_mask(bar.register, bar.register_bytes, bar.mask)
        return bar

    def add_rom(self, size: int) -> RomBar:
        """Declare the expansion ROM's register: one of :attr:`bars`, switched by its own lowest bit too."""
        bar = RomBar(size)
        self.bars.append(bar)
        self.config.set_mask(bar.register, 4, bar.mask | reg.ROM_ENABLE)
        return bar

    def add_msix(self, vectors: int, bar: Bar, table_offset: int, pba_offset: int) -> MsixTable:
        """Give the function MSI-X with its table and pending bits (8-byte aligned) in `bar`."""
        if (table_offset | pba_offset) & 7:
            raise ValueError("the MSI-X table and pending bits are 8-byte aligned")
        body = (vectors - 1).to_bytes(2, "little")
        body += (table_offset | bar.index).to_bytes(4, "little")
        body += (pba_offset | bar.index).to_bytes(4, "little")
        offset = self.config.add_capability(reg.CAP_MSIX, body)
        return self.place_msix(offset, vectors, (bar, table_offset), (bar, pba_offset))

    def place_msix(
        self, offset: int, vectors: int, table: tuple[Bar, int], pba: tuple[Bar, int]
    ) -> MsixTable:
        """Make the MSI-X capability at `offset` of configuration space work; `table` and `pba`: BAR and offset."""
        self.msix = msix = MsixTable(vectors)
        table[0].add_region(table[1], msix.table_bytes, msix.table)
        pba[0].add_region(pba[1], msix.pba_bytes, msix.pba)
        self._msix_control = offset + reg.MSIX_CONTROL
        self.config.set_mask(self._msix_control, 2, reg.MSIX_CONTROL_ENABLE | reg.MSIX_CONTROL_FUNCTION_MASK)
        return msix

    def attach(self, root: PciRoot, bdf: int) -> None:
        """The function got its place; called once by `PciRoot.add`."""
        self._root = root
        self.bdf = bdf
        if self.msix is not None:
            platform = root.platform
            self.msix.attach(lambda: platform.msi_vector(bdf))

    def detach(self) -> None:
        """The function lost its place; called by `PciRoot.remove` after a reset."""
        self._root = None
        self.bdf = None

    def bar_address(self, bar: Bar) -> int:
        """The address that the guest (or firmware) wrote to the BAR."""
        return self.config.get(bar.register, bar.register_bytes) & bar.mask

    def set_bar_address(self, bar: Bar, address: int) -> None:
        """Assign an address as firmware does; decoding follows the command register."""
        self.config.set(bar.register, bar.register_bytes, address & bar.mask | bar.flags)
        self._update_decoding()

    @property
    def config_is_plain(self) -> bool:
        """Whether configuration reads give just the stored bytes now, so that a platform may map them."""
        return True

    def config_read(self, offset: int, size: int) -> int:
        """A guest's configuration read; the caller keeps it inside the 4 KiB."""
        return self.config.get(offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        """A guest's configuration write; the caller keeps it inside the 4 KiB and holds the root's lock."""
        self.config.write(offset, size, value)
        if offset < _DECODING_END and offset + size > reg.COMMAND:
            self._update_decoding()
            self._update_msix()
        elif offset <= self._msix_control + 1 and offset + size > self._msix_control:
            self._update_msix()

    def reset(self) -> None:
        """Back to the state after power-on: nothing decoded, nothing enabled, BARs without an address."""
        self.config.clear_writable()
        self._update_decoding()
        if self.msix is not None:
            self.msix.reset()

    def save(self) -> dict[str, object]:
        """What the guest did to the function, as plain data that `marshal` takes; nothing may change meanwhile."""
        state: dict[str, object] = {"config": self.config.save()}
        if self.msix is not None:
            state["msix"] = self.msix.save()
        return state

    def restore(self, state: dict[str, object]) -> None:
        """Make a function that nobody has touched yet what another one of its kind was when it was saved.

        It is in its place in the root complex already. Raises `ValueError` for what is no such state.
        """
        config, msix = state.get("config"), state.get("msix")
        if not isinstance(config, bytes) or config[:4] != bytes(self.config.save()[:4]):
            raise ValueError(f"the saved state is of another PCI function than {self.describe()}")
        if self.msix is not None:
            if not isinstance(msix, dict):
                raise ValueError(f"the saved state of {self.describe()} lacks its interrupts")
            self.msix.restore(msix)
        self.config.restore(config)
        self._update_decoding()
        self._update_msix()

    def describe(self) -> str:
        """Its ids, for messages."""
        return f"{self.config.get(reg.VENDOR_ID, 2):04x}:{self.config.get(reg.DEVICE_ID, 2):04x}"

    def close(self) -> None:
        """Release what the function holds of the host. It is of no use any more."""

    def bar_moved(self, bar: Bar) -> None:
        """`bar.mapped_at` changed. For subclasses that route accesses elsewhere as well (ioeventfds)."""

    def _update_decoding(self) -> None:
        if self._root is None:
            return
        command = self.command
        for bar in self.bars:
            decoded = bar.is_decoded(command, self.config.get(bar.register, 4))
            self._root.decode(self, bar, self.bar_address(bar) if decoded else None)

    def _update_msix(self) -> None:
        if self.msix is None:
            return
        control = self.config.get(self._msix_control, 2)
        self.msix.set_control(
            enabled=bool(control & reg.MSIX_CONTROL_ENABLE),
            function_masked=bool(control & reg.MSIX_CONTROL_FUNCTION_MASK),
            bus_master=bool(self.command & reg.COMMAND_BUS_MASTER),
        )
