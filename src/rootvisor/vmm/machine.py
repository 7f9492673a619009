# SPDX-License-Identifier: Apache-2.0
"""A guest's machine: a child partition with its memory, processors, board and devices."""

from __future__ import annotations

from _thread import allocate_lock

from ..boot.errors import BootError
from ..boot.memory_map import MemoryMap
from ..mshv import NMI, Mshv, Partition
from ..tlfs import partition_properties as properties
from ..x86 import decoder
from .board import Board
from .consoles import SerialInput, Stream
from .controller import MachineError
from .device_makers import balloon_of, plug_configured, plug_disk, plug_fs, plug_net, plug_vsock
from .devices import Devices
from .guest_ram import GuestRam
from .processor import Processor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Self

    from .controller import Report
    from .devices import Plugged
    from .schema import Document
    from .snapshot import MemoryReader
    from .terminal import Terminal

#: What the guest may know and use of the hypervisor: a Linux guest keeps time by the reference TSC, and its local APIC
#: ticks, whose timer is set without an exit. The APIC's MSRs are there because Linux sets up the VP assist page, which
#: is one of them, without asking.
SYNTHETIC_FEATURES = (
    properties.SYNTHETIC_HYPERVISOR_PRESENT
    | properties.SYNTHETIC_HV1
    | properties.SYNTHETIC_REFERENCE_COUNTER
    | properties.SYNTHETIC_APIC_MSRS
    | properties.SYNTHETIC_HYPERCALL_MSRS
    | properties.SYNTHETIC_VP_INDEX
    | properties.SYNTHETIC_REFERENCE_TSC
    | properties.SYNTHETIC_FREQUENCY
)
#: With ``cpus.kvm_hyperv``. Linux prefers these timers to the local APIC's, and each setting is an exit.
_MORE_FEATURES = properties.SYNTHETIC_SYNIC | properties.SYNTHETIC_TIMERS | properties.SYNTHETIC_DIRECT_TIMERS
_MIN_ADDRESS_BITS = 36


class Machine:
    """See :class:`rootvisor.vmm.controller.Machine` for the contract.

    ``terminal``: what consoles in mode Tty are connected to; standard input as it is without one.
    """

    terminal: Terminal | None = None

    def __init__(self, config: Document, report: Report) -> None:
        self._set_up(config, report, None)

    @classmethod
    def restore(
        cls, folder: str, config: Document, report: Report, *, prefault: bool, on_demand: bool
    ) -> Self:
        """The machine of a snapshot, paused. Memory is read at once, whatever is asked for: it takes no longer than
        the pages that a guest needs first, one by one."""
        from .snapshot import read_state

        machine = cls.__new__(cls)
        machine._set_up(config, report, (folder, read_state(folder)))
        return machine

    def _set_up(self, config: Document, report: Report, saved: tuple[str, dict[str, Any]] | None) -> None:
        self.config = config
        self._report = report
        self._lock = allocate_lock()
        self._ended = False
        self._mshv: Mshv | None = None
        self._partition: Partition | None = None
        self._ram: GuestRam | None = None
        self._board: Board | None = None
        self._devices: Devices | None = None
        self._processors: list[Processor] = []
        self._serial_input: SerialInput | None = None
        self._streams: list[Stream] = []
        self._reader: MemoryReader | None = None
        try:
            self._build(saved)
        except BootError as error:
            self.stop()
            raise MachineError(str(error)) from error
        except (KeyError, TypeError, IndexError) as error:
            self.stop()
            if saved is None:
                raise
            raise MachineError(
                f"the snapshot in {saved[0]} is damaged: {type(error).__name__} {error}"
            ) from error
        except BaseException:
            self.stop()
            raise

    def _build(self, saved: tuple[str, dict[str, Any]] | None) -> None:
        config = self.config
        try:
            # Every guest comes to need it: better told now than when its first driver touches a device. One that is
            # restored has touched them, and comes to it when it does so again.
            if saved is None:
                decoder.load()
            else:
                decoder.find()
        except ImportError as error:
            raise MachineError(f"{error}; python3 -m pip install iced-x86") from error
        self._mshv = mshv = Mshv()
        self._partition = partition = mshv.create_partition()
        features = SYNTHETIC_FEATURES | (_MORE_FEATURES if config["cpus"]["kvm_hyperv"] else 0)
        partition.set_property(properties.SYNTHETIC_PROC_FEATURES, features)
        partition.initialize()
        partition.set_property(properties.UNIMPLEMENTED_MSR_ACTION, properties.MSR_ACTION_IGNORE)
        partition.freeze_time(True)
        bits = max(partition.get_property(properties.PHYSICAL_ADDRESS_WIDTH), _MIN_ADDRESS_BITS)
        layout = MemoryMap(config["memory"]["size"], bits)
        self._ram = ram = GuestRam(layout, huge_pages=config["memory"]["thp"])
        if saved is not None:
            from .snapshot import MemoryReader

            self._reader = MemoryReader(saved[0], ram)
        if config["memory"]["prefault"]:
            ram.touch()
        ram.give_to(partition)
        terminal_input = self.terminal.input if self.terminal is not None else 0
        serial = Stream(config["serial"], terminal_input)
        console = Stream(config["console"], terminal_input)
        self._streams = [serial, console]
        self._board = board = Board(
            partition, layout, ram.memory, self._end, self._ejected, serial.present, serial.output
        )
        if board.serial is not None and serial.input is not None:
            self._serial_input = SerialInput(board.serial, serial.input)
        self._devices = devices = Devices(board, self._device_failed)
        if saved is not None:
            devices.slots = {name: number for name, number, _state in saved[1]["devices"]}
            for net in config.get("net", ()):
                net.setdefault("mac", saved[1]["macs"][net["id"]])
        self._plug(devices, console, ram)
        for index in range(config["cpus"]["boot_vcpus"]):
            vp = partition.create_vp(index)
            self._processors.append(
                Processor(
                    vp,
                    board.platform.ports,
                    board.platform.mmio,
                    ram.memory,
                    board.io_apic,
                    self._failed,
                    lambda detail: self._end("reset", detail),
                )
            )
        board.ecam.follow()
        if saved is None:
            self._load()
        else:
            self._restore(*saved)

    def _plug(self, devices: Devices, console: Stream, ram: GuestRam) -> None:
        """All devices that the guest has from the start."""
        plug_configured(devices, self.config, console, self.terminal, ram)

    def _initrds(self) -> list[str | bytes]:
        """Paths or contents of the initial ramdisks."""
        payload = self.config["payload"]
        return [payload["initramfs"]] if "initramfs" in payload else []

    def _load(self) -> None:
        """The kernel and what it finds."""
        from ..boot.linux import load_linux
        from .boot_state import set_entry_state, set_firmware_state

        assert self._board is not None and self._ram is not None
        board, payload = self._board, self.config["payload"]
        board.pci.assign_bars()
        entry = load_linux(
            self._ram.low,
            board.layout,
            kernel=payload["kernel"],
            initrds=self._initrds(),
            command_line=payload.get("cmdline", ""),
            acpi=board.acpi(len(self._processors)),
        )
        for processor in self._processors:
            set_firmware_state(processor.vp)
        set_entry_state(self._processors[0].vp, entry)

    def _restore(self, folder: str, state: dict[str, Any]) -> None:
        """Everything as it was; paused."""
        from .processor_state import restore_processor

        assert self._board is not None and self._ram is not None and self._devices is not None
        assert self._partition is not None and self._reader is not None
        if len(state["processors"]) != len(self._processors):
            raise MachineError(
                f"the snapshot has {len(state['processors'])} processors, the configuration {len(self._processors)}"
            )
        self._devices.pause()
        try:
            self._board.restore(state["board"])
            self._reader.wait()
            self._devices.restore(state["devices"])
        except ValueError as error:
            raise MachineError(f"the snapshot in {folder} does not fit: {error}") from error
        self._partition.set_property(properties.REFERENCE_TIME, state["reference_time"])
        for processor, registers in zip(self._processors, state["processors"], strict=True):
            restore_processor(processor.vp, registers)
        for processor in self._processors:
            processor.ask_to_pause()
            processor.start()
            processor.await_pause()
        self._board.io_apic.deliver_in_service()

    # --- what happens inside ----------------------------------------------------------------------------------------
    def _end(self, how: str, detail: str) -> None:
        """The guest's own wish: the first one counts."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
        self._report({"poweroff": "shutdown", "reset": "reboot"}[how], {"reason": detail})

    def _failed(self, reason: str) -> None:
        with self._lock:
            if self._ended:
                return
            self._ended = True
        self._report("failed", {"reason": reason})

    def _device_failed(self, name: str, reason: str) -> None:
        self._report("device-failed", {"id": name, "reason": reason})

    # --- the controller's verbs -------------------------------------------------------------------------------------
    def start(self) -> None:
        """Runs the processors from the kernel's entry point."""
        assert self._partition is not None
        self._partition.freeze_time(False)
        for processor in self._processors:
            processor.start()

    def pause(self) -> None:
        """Stops all processors, then the devices; the guest's clocks stand still."""
        assert self._partition is not None and self._devices is not None
        for processor in self._processors:
            processor.ask_to_pause()
        for processor in self._processors:
            processor.await_pause()
        self._partition.freeze_time(True)
        try:
            self._devices.pause()
        except BaseException:
            self._go_on()
            raise

    def resume(self) -> None:
        """Goes on after :meth:`pause`, or :meth:`restore`."""
        assert self._devices is not None
        self._devices.resume()
        self._go_on()

    def _go_on(self) -> None:
        assert self._partition is not None
        self._partition.freeze_time(False)
        for processor in self._processors:
            processor.resume()

    def press_power_button(self) -> None:
        """Presses the ACPI power button."""
        assert self._board is not None
        self._board.power.press_power_button()

    def inject_nmi(self) -> None:
        """Gives every processor a non-maskable interrupt."""
        assert self._partition is not None
        for processor in self._processors:
            self._partition.assert_interrupt(0, processor.vp.index, NMI)

    def snapshot(self, folder: str) -> None:
        """Writes everything into a folder; the machine is paused and stays so."""
        from .processor_state import save_processor
        from .snapshot import write_snapshot

        assert self._board is not None and self._ram is not None and self._devices is not None
        assert self._partition is not None
        state = {
            "board": self._board.save(),
            "devices": self._devices.save(),
            "macs": {net["id"]: net["mac"] for net in self.config.get("net", ())},
            "processors": [save_processor(processor.vp) for processor in self._processors],
            "reference_time": self._partition.get_property(properties.REFERENCE_TIME),
        }
        write_snapshot(folder, self._ram, state)

    # --- devices that come and go -----------------------------------------------------------------------------------
    def add_disk(self, config: Document) -> str:
        """Plugs a disk in."""
        return self._added(plug_disk, config)

    def add_net(self, config: Document) -> str:
        """Plugs a network device in."""
        return self._added(plug_net, config)

    def add_fs(self, config: Document) -> str:
        """Plugs a shared folder in."""
        return self._added(plug_fs, config)

    def add_vsock(self, config: Document) -> str:
        """Plugs a vsock device in."""
        return self._added(plug_vsock, config)

    def _added(self, plug: Callable[[Devices, Document], Plugged], config: Document) -> str:
        assert self._devices is not None and self._board is not None
        plugged = plug(self._devices, config)
        self._board.ecam.follow()
        self._board.hotplug.inserted(plugged.bdf >> 3)
        return plugged.address

    def remove_device(self, identifier: str) -> None:
        """Asks the guest to let a device go; it is unplugged when the guest ejects it."""
        assert self._devices is not None and self._board is not None
        plugged = self._devices.plugged.get(identifier)
        if plugged is None:
            raise MachineError(f"there is no device {identifier}")
        self._board.hotplug.ask_to_eject(plugged.bdf >> 3)

    def _ejected(self, number: int) -> None:
        """The guest has let the device in this slot go."""
        assert self._devices is not None
        name = self._devices.unplug_slot(number)
        if name:
            self._report("ejected", {"id": name})

    def set_balloon(self, size: int) -> None:
        """Asks the guest for this many bytes in all."""
        assert self._devices is not None
        balloon_of(self._devices).resize(size)

    def balloon_size(self) -> int:
        """Bytes that the guest has given back."""
        assert self._devices is not None
        return balloon_of(self._devices).actual

    def counters(self) -> dict[str, dict[str, int]]:
        """What devices and processors did."""
        assert self._devices is not None
        counted = self._devices.counters()
        exits: dict[str, int] = {}
        for processor in self._processors:
            for kind, count in processor.exits.items():
                exits[f"{kind:#010x}"] = exits.get(f"{kind:#010x}", 0) + count
        counted["exits"] = exits
        return counted

    def pseudo_terminals(self) -> dict[str, str]:
        """Paths of what consoles in mode Pty lead to."""
        names = ("serial", "console")
        return {name: stream.path for name, stream in zip(names, self._streams, strict=False) if stream.path}

    def device_tree(self) -> dict[str, Document]:
        """Devices by name."""
        assert self._devices is not None
        return self._devices.tree()

    def stop(self) -> None:
        """Ends everything and gives it back, whatever the state."""
        with self._lock:
            self._ended = True
        for processor in self._processors:
            processor.stop()
        if self._serial_input is not None:
            self._serial_input.close()
            self._serial_input = None
        if self._devices is not None:
            self._devices.close()
        if self._board is not None:
            self._board.close()
        for processor in self._processors:
            processor.vp.close()
        self._processors.clear()
        if self._reader is not None:
            self._reader.end()
            self._reader = None
        for handle in (self._partition, self._mshv):
            if handle is not None:
                handle.close()
        if self._board is not None:
            self._board.free()
            self._board = None
        self._devices = None
        if self._ram is not None:
            self._ram.close()
            self._ram = None
        for stream in self._streams:
            stream.close()
        self._streams.clear()
