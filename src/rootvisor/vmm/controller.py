# SPDX-License-Identifier: Apache-2.0
"""The controller: owns the configuration, drives the machine, knows in which state the virtual machine is.

States are Cloud Hypervisor's: no virtual machine, Created, Running, Paused, Shutdown. A call that the state does not
allow gives a `ControlError` and changes nothing; a machine that could not be made leaves nothing behind.
"""

from __future__ import annotations

import marshal
import os
import select
from _thread import RLock

from . import config as tables
from .json_text import decoded, encoded
from .schema import ConfigError, shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol, Self

    from .events import EventMonitor
    from .schema import Document
    from .terminal import Terminal

    #: What a machine calls, from any thread of its own, when something happens: event and details (text to text).
    #: It returns at once and never calls back into the machine.
    #:
    #: ``shutdown``: the guest powered off. ``reboot``: it wants a reset. ``panic``: its kernel crashed (details: the
    #: crash registers). ``failed``: the machine cannot go on (``reason``, one line). ``device-failed``: a device cannot
    #: go on, and the guest sees that it needs a reset (``id``, ``reason``). ``activated``, ``reset``: a driver took a
    #: device into use, or let it go (``id``). ``ejected``: the guest has let a device go for good; `device_tree` has it
    #: no more.
    Report = Callable[[str, dict[str, str]], None]

    class Machine(Protocol):
        """A partition with its memory, processors and devices.

        ``terminal``: what consoles in mode Tty are connected to, the same for all machines of the process.

        Whatever fails raises an exception whose ``str()`` is one line with the reason: an `OSError` or one of this
        package's own classes; any other is an error of the program. The controller calls one method at a time, never
        from a thread of the machine's.
        """

        terminal: Terminal | None

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
            """Ask the guest to let a device go, and unplug it when it has: then `device_tree` has it no more."""

        def set_balloon(self, size: int) -> None:
            """Ask the guest for this many bytes in all."""

        def balloon_size(self) -> int:
            """Bytes that the guest has given back."""

        def counters(self) -> dict[str, dict[str, int]]:
            """Device name to counter to value (``_disk0``: ``read_bytes``, ...)."""

        def device_tree(self) -> dict[str, Document]:
            """Device name to ``{"id", "children": [...], "resources": [...], "pci_bdf"}``, as ``vm.info`` shows it."""

        def pseudo_terminals(self) -> dict[str, str]:
            """Paths of the terminals made for mode Pty: ``console`` and ``serial`` to ``/dev/pts/N``."""

        def snapshot(self, folder: str) -> None:
            """Write everything that `restore` needs into a folder; the machine is paused and stays so."""


class MachineError(Exception):
    """The machine cannot do what was asked; the message is one line, with what mends it."""


CREATED = "Created"
RUNNING = "Running"
PAUSED = "Paused"
SHUTDOWN = "Shutdown"

BAD_REQUEST = 400
NOT_FOUND = 404
WRONG_STATE = 405
CONFLICT = 409
FAILED = 500

_CONFIG_FILE = "config.json"
_CHECKED_FILE = "config"
"""Of a snapshot: the text of `_CONFIG_FILE`, and what it came to when it was written (marshal). Whoever edits the text
has it read and checked again; nobody else waits for that."""
_CHECKED_VERSION = 1
_MAX_CONFIG_BYTES = 4 << 20
_ADDERS = {"disks": "add_disk", "net": "add_net", "fs": "add_fs", "vsock": "add_vsock"}


class ControlError(Exception):
    """A call that is not carried out: ``status`` as HTTP has it (400, 404, 405, 409, 500), the message one line."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Controller:
    """The virtual machine and what can be done with it. Every method may be called from any thread.

    ``machine_class``: what a machine is made with. ``monitor``: who is told what happens. ``stays``: the end of the
    guest is not the end of the VMM. `run` waits for that end.
    """

    __slots__ = (
        "_config",
        "_failure",
        "_generation",
        "_happened",
        "_happened_lock",
        "_leaving",
        "_lock",
        "_machine",
        "_machine_class",
        "_monitor",
        "_state",
        "_stays",
        "_wake_read",
        "wake_fd",
    )

    def __init__(
        self, machine_class: type[Machine], monitor: EventMonitor | None = None, *, stays: bool = False
    ) -> None:
        self._machine_class = machine_class
        self._monitor = monitor
        self._stays = stays
        self._lock = RLock()
        self._config: Document | None = None
        self._machine: Machine | None = None
        #: names of devices that the guest was asked to let go
        self._leaving: set[str] = set()
        self._state = ""
        self._generation = 0
        self._failure = ""
        #: (generation of the machine, event): what `run` has to deal with, outside the threads that noticed it
        self._happened: list[tuple[int, str]] = []
        self._happened_lock = RLock()
        self._wake_read, self.wake_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        """A byte written to ``wake_fd`` makes `run` look; for `signal.set_wakeup_fd`. The kernel may hand a signal to
        any thread, and nothing else would tell the main thread, in which Python runs the handlers.
        """

    # --- the virtual machine --------------------------------------------------------------------------------------
    def create(self, config: Document) -> None:
        """Take a configuration (checked or not). Nothing is opened before `boot`."""
        with self._lock:
            if self._config is not None:
                raise ControlError(CONFLICT, "there is a virtual machine already; delete it first")
            self._config = _checked(config)
            self._state = CREATED

    def delete(self) -> None:
        """End the virtual machine if it runs, and forget its configuration. Nothing to do is no error."""
        with self._lock:
            if self._config is None:
                return
            self._end()
            self._config = None
            self._state = ""
            self._report("vm", "deleted")

    def boot(self) -> None:
        """Make the machine and run it."""
        with self._lock:
            config = self._needs_config()
            if self._machine is not None:
                raise ControlError(WRONG_STATE, f"the virtual machine is {self._state} already")
            self._report("vm", "booting")
            self._start(config)
            self._report("vm", "booted")

    def shutdown(self) -> None:
        """End the machine at once; the guest is not asked. Its configuration stays."""
        with self._lock:
            self._needs_machine()
            self._end()

    def reboot(self) -> None:
        """End the machine at once and start from the kernel again."""
        with self._lock:
            self._needs_machine()
            self._report("vm", "rebooting")
            self._end(report=False)
            self._start(self._needs_config())
            self._report("vm", "rebooted")

    def pause(self) -> None:
        """Stop the guest where it is."""
        with self._lock:
            _, machine = self._needs_machine(RUNNING)
            self._report("vm", "pausing")
            self._call("the virtual machine cannot be paused", machine.pause)
            self._state = PAUSED
            self._report("vm", "paused")

    def resume(self) -> None:
        """Let a paused guest go on."""
        with self._lock:
            _, machine = self._needs_machine(PAUSED)
            self._report("vm", "resuming")
            self._call("the virtual machine cannot go on", machine.resume)
            self._state = RUNNING
            self._report("vm", "resumed")

    def power_button(self) -> None:
        """Press the ACPI power button: Linux shuts down."""
        with self._lock:
            _, machine = self._needs_machine()
            self._call("the power button does not work", machine.press_power_button)

    def nmi(self) -> None:
        """Give every processor of the guest a non-maskable interrupt."""
        with self._lock:
            _, machine = self._needs_machine(RUNNING)
            self._call("the interrupt cannot be given", machine.inject_nmi)

    def info(self) -> Document:
        """Configuration, state, bytes of memory less the balloon; with a machine the tree of its devices."""
        with self._lock:
            config = self._needs_config()
            answer: Document = {
                "config": _copy(config),
                "state": self._state,
                "memory_actual_size": config["memory"]["size"],
            }
            if self._machine is not None:
                if "balloon" in config:
                    answer["memory_actual_size"] -= self._call("", self._machine.balloon_size)
                answer["device_tree"] = self._call("", self._machine.device_tree)
                for name, path in self._call("", self._machine.pseudo_terminals).items():
                    answer["config"][name]["file"] = path
            return answer

    def counters(self) -> dict[str, dict[str, int]]:
        """What the devices have done: device name to counter to number."""
        with self._lock:
            _, machine = self._needs_machine()
            counters: dict[str, dict[str, int]] = self._call("there are no counters", machine.counters)
            return counters

    # --- devices --------------------------------------------------------------------------------------------------
    def add_device(self, kind: str, device: Document) -> Document | None:
        """Add a device; ``kind`` is its field of the configuration (``disks``, ``net``, ``fs``, ``vsock``).

        The answer is its name and PCI address; None when there is no machine yet, and the device will be in it.
        """
        with self._lock:
            config = _copy(self._needs_config())
            device = _copy(device)
            tables.name_device(config, kind, device)
            if kind not in tables.LISTS:
                if kind in config:
                    raise ControlError(CONFLICT, f"the virtual machine has a {kind} device; remove it first")
                config[kind] = device
            else:
                config.setdefault(kind, []).append(device)
            config = _checked(config)
            device = _copy(config[kind][-1] if kind in tables.LISTS else config[kind])
            if self._machine is None:
                self._config = config
                return None
            add: Callable[[Document], str] = getattr(self._machine, _ADDERS[kind])
            address = self._call(f"device {shown(device['id'])} cannot be added", add, device)
            self._config = config
            self._report("vm", "device-added", {"id": device["id"], "bdf": address})
            return {"id": device["id"], "bdf": address}

    def remove_device(self, identifier: str) -> None:
        """Take a device away. A running guest is asked: the device stays, its name with it, until the guest lets it go
        or ends. A guest that was asked is asked again.
        """
        with self._lock:
            config = self._needs_config()
            if not any(device["id"] == identifier for _, device in _removable(config)):
                if any(device["id"] == identifier for _, device in tables.devices(config)):
                    raise ControlError(BAD_REQUEST, f"device {shown(identifier)} cannot be removed")
                raise ControlError(NOT_FOUND, f"there is no device {shown(identifier)}")
            if self._machine is None:
                self._forget_device(identifier)
                return
            self._call(
                f"device {shown(identifier)} cannot be removed", self._machine.remove_device, identifier
            )
            self._leaving.add(identifier)
            self._follow_guest()

    def _follow_guest(self) -> None:
        """Forget the devices that the guest has let go, asked or not."""
        if self._machine is None or self._config is None:
            return
        present = self._call("", self._machine.device_tree)
        for _, device in _removable(self._config):
            if device["id"] not in present:
                self._forget_device(device["id"])

    def _forget_device(self, identifier: str) -> None:
        assert self._config is not None
        config = _copy(self._config)
        for kind in tables.LISTS:
            if kind in config:
                config[kind] = [device for device in config[kind] if device["id"] != identifier]
        if config.get("vsock", {}).get("id") == identifier:
            del config["vsock"]
        self._config = config
        self._leaving.discard(identifier)
        self._report("vm", "device-removed", {"id": identifier})

    def resize(self, target: Document) -> None:
        """Another size of the balloon; before the boot also of memory, and another number of processors."""
        with self._lock:
            config = _copy(self._needs_config())
            if self._machine is None:
                self._resize_config(config, target)
                return
            processors, memory = config["cpus"]["boot_vcpus"], config["memory"]["size"]
            if target.get("desired_vcpus", processors) != processors:
                raise ControlError(BAD_REQUEST, f"a running guest keeps its {processors} processors")
            if target.get("desired_ram", memory) != memory:
                raise ControlError(BAD_REQUEST, f"a running guest keeps its {memory} bytes; use the balloon")
            if "desired_balloon" in target:
                if "balloon" not in config:
                    raise ControlError(BAD_REQUEST, "the virtual machine has no balloon")
                config["balloon"]["size"] = target["desired_balloon"]
                config = _checked(config)
                self._report("vm", "resizing")
                self._call("the balloon does not move", self._machine.set_balloon, target["desired_balloon"])
                self._config = config
                self._report("vm", "resized")

    def _resize_config(self, config: Document, target: Document) -> None:
        if "desired_vcpus" in target:
            config["cpus"]["boot_vcpus"] = target["desired_vcpus"]
            config["cpus"]["max_vcpus"] = max(config["cpus"]["max_vcpus"], target["desired_vcpus"])
        if "desired_ram" in target:
            config["memory"]["size"] = target["desired_ram"]
        if "desired_balloon" in target:
            if "balloon" not in config:
                raise ControlError(BAD_REQUEST, "the virtual machine has no balloon")
            config["balloon"]["size"] = target["desired_balloon"]
        self._config = _checked(config)

    # --- snapshots ------------------------------------------------------------------------------------------------
    def snapshot(self, url: str) -> None:
        """Write a paused guest to a folder, which is made if it is not there. The guest stays paused.

        The configuration is written last: a folder without it is no snapshot.
        """
        folder = folder_of(url)
        with self._lock:
            config, machine = self._needs_machine(PAUSED)
            self._report("vm", "snapshotting")
            try:
                os.makedirs(folder, mode=0o700, exist_ok=True)
                path = os.path.join(folder, _CONFIG_FILE)
                if os.path.lexists(path):
                    raise ControlError(BAD_REQUEST, f"there is a snapshot in {folder}; choose another folder")
            except OSError as error:
                raise ControlError(
                    BAD_REQUEST, f"cannot write a snapshot to {folder}: {os.strerror(error.errno or 0)}"
                ) from error
            self._call("the snapshot failed", machine.snapshot, folder)
            text = encoded(config)
            checked = os.path.join(folder, _CHECKED_FILE)
            self._call(
                "the snapshot failed", _replace, checked, marshal.dumps((_CHECKED_VERSION, text, config))
            )
            self._call("the snapshot failed", _write, path, text)
            self._report("vm", "snapshotted")

    def restore(self, request: Document) -> None:
        """The virtual machine of a snapshot; ``request`` is a `RestoreConfig`."""
        folder = folder_of(request["source_url"])
        with self._lock:
            if self._config is not None:
                raise ControlError(CONFLICT, "there is a virtual machine already; delete it first")
            path = os.path.join(folder, _CONFIG_FILE)
            try:
                with open(path, "rb") as file:
                    text = file.read(_MAX_CONFIG_BYTES)
            except OSError as error:
                raise ControlError(
                    BAD_REQUEST, f"there is no snapshot in {folder}: {path}: {os.strerror(error.errno or 0)}"
                ) from error
            config = _checked_before(os.path.join(folder, _CHECKED_FILE), text)
            if config is None:
                try:
                    config = _checked(decoded(text))
                except (ConfigError, ControlError) as error:
                    raise ControlError(BAD_REQUEST, f"{path} is no configuration: {error}") from error
            self._report("vm", "restoring")

            def make(report: Report) -> Machine:
                return self._machine_class.restore(
                    folder,
                    _copy(config),
                    report,
                    prefault=request["prefault"],
                    on_demand=request["memory_restore_mode"] == "OnDemand",
                )

            machine = self._make(make)
            self._config, self._machine, self._state = config, machine, PAUSED
            self._report("vm", "restored")
            if request["resume"]:
                try:
                    self.resume()
                except ControlError:
                    self.delete()
                    raise

    # --- the end --------------------------------------------------------------------------------------------------
    def vmm_shutdown(self) -> None:
        """End the guest and the VMM: `run` returns 0."""
        self.delete()
        self._report("vmm", "shutdown")
        self.end(0)

    def end(self, status: int) -> None:
        """Let `run` end the guest and return ``status``. For signal handlers: does not wait."""
        self._post(0, f"end {status}")

    def press(self) -> None:
        """Press the power button if there is one, later. For signal handlers: does not wait."""
        self._post(0, "press")

    def run(self) -> int:
        """Deal with what the guest does, until the VMM ends; its exit status: 1 when the machine failed, else 0.

        `failure` says why.
        """
        woken = select.poll()
        woken.register(self._wake_read, select.POLLIN)
        while True:
            woken.poll()
            os.read(self._wake_read, 4096)
            while self._happened:
                status = self._deal_with(*self._happened.pop(0))
                if status is not None:
                    self.delete()
                    return status

    def close(self) -> None:
        """End the virtual machine; the controller is not used any more."""
        self.delete()
        with self._happened_lock:
            if self.wake_fd >= 0:
                os.close(self.wake_fd)
                os.close(self._wake_read)
                self.wake_fd = self._wake_read = -1

    def _post(self, generation: int, event: str) -> None:
        """Give `run` something to deal with, from any thread."""
        with self._happened_lock:
            if self.wake_fd >= 0:
                self._happened.append((generation, event))
                try:
                    os.write(self.wake_fd, b"\0")
                except BlockingIOError:
                    pass  # full: `run` will look anyhow

    @property
    def failure(self) -> str:
        """Why the last machine ended against its will; empty: it did not."""
        return self._failure

    def _deal_with(self, generation: int, event: str) -> int | None:
        """Carry out what an event asks for; the exit status if it is the last."""
        word, _, rest = event.partition(" ")
        if word == "end":
            return int(rest)
        with self._lock:
            if word == "press":
                if self._machine is not None:
                    self._ignoring_errors(self.power_button)
                return None
            if generation != self._generation or self._machine is None:
                return None  # of a machine that is gone
            if word == "ejected":
                self._ignoring_errors(self._follow_guest)
                return None
            if word == "reboot":
                if self._ignoring_errors(self.reboot):
                    return None
                return None if self._stays else 1
            self._end()
            self._failure = rest if word == "failed" else ""
            if self._stays:
                return None
            return 1 if word == "failed" else 0

    def _ignoring_errors(self, act: Callable[[], None]) -> bool:
        """Do something that nobody waits for; False and `failure` when it did not work."""
        try:
            act()
        except ControlError as error:
            self._failure = str(error)
            return False
        return True

    # --- inside ---------------------------------------------------------------------------------------------------
    def _start(self, config: Document) -> None:
        """A machine, running. None at all when it fails: the state is Created or Shutdown as before."""
        machine = self._make(lambda report: self._machine_class(_copy(config), report))
        try:
            self._call("the virtual machine cannot be started", machine.start)
        except ControlError:
            self._generation += 1
            machine.stop()
            raise
        self._machine = machine
        self._state = RUNNING

    def _make(self, make: Callable[[Report], Machine]) -> Machine:
        self._generation += 1
        self._failure = ""
        generation = self._generation
        try:
            machine: Machine = self._call(
                "the virtual machine cannot be made",
                make,
                lambda event, details: self._machine_reports(generation, event, details),
            )
        except ControlError:
            self._generation += 1
            raise
        return machine

    def _end(self, *, report: bool = True) -> None:
        """Stop the machine if there is one."""
        machine, self._machine = self._machine, None
        if machine is None:
            return
        for identifier in list(self._leaving):
            self._forget_device(identifier)
        self._generation += 1
        self._state = SHUTDOWN
        machine.stop()
        if report:
            self._report("vm", "shutdown")

    def _machine_reports(self, generation: int, event: str, details: dict[str, str]) -> None:
        """What a machine calls, from any thread of its own."""
        if event in ("activated", "reset", "device-failed"):
            self._report("virtio-device", event.removeprefix("device-"), details)
        elif event == "panic":
            self._report("guest", event, details)
        elif event == "ejected":
            self._post(generation, event)
        elif event == "failed":
            self._report("vm", event, details)
            self._post(generation, f"failed {details.get('reason', '')}")
        else:
            self._report("guest", event, details)
            self._post(generation, event)

    def _report(self, source: str, event: str, properties: dict[str, str] | None = None) -> None:
        if self._monitor is not None:
            self._monitor.report(source, event, properties)

    def _needs_config(self) -> Document:
        if self._config is None:
            raise ControlError(NOT_FOUND, "there is no virtual machine; create it first")
        self._follow_guest()
        return self._config

    def _needs_machine(self, state: str = "") -> tuple[Document, Machine]:
        config = self._needs_config()
        if self._machine is None:
            raise ControlError(WRONG_STATE, f"the virtual machine is {self._state}; boot it first")
        if state and self._state != state:
            raise ControlError(WRONG_STATE, f"the virtual machine is {self._state}, not {state}")
        return config, self._machine

    def _call(self, failure: str, function: Callable[..., Any], *arguments: object) -> Any:
        """Call the machine; whatever it raises becomes a ControlError."""
        try:
            return function(*arguments)
        except Exception as error:
            reason = " ".join(str(error).split())
            if not isinstance(error, OSError) and not type(error).__module__.startswith("rootvisor."):
                reason = f"internal error: {type(error).__name__}: {reason}"
            raise ControlError(FAILED, f"{failure}: {reason}" if failure else reason) from error


def folder_of(url: str) -> str:
    """The folder that a URL names: ``file:///path``, or the path itself. ControlError for any other URL."""
    scheme, separator, path = url.partition("://")
    if not separator:
        return url
    if scheme != "file" or not path.startswith("/"):
        raise ControlError(BAD_REQUEST, f"{shown(url)} is no folder; write file:///path")
    return path


def _removable(config: Document) -> list[tuple[str, Document]]:
    """Field and configuration of every device that can come and go."""
    found = [(kind, device) for kind in tables.LISTS for device in config.get(kind, ())]
    return [*found, ("vsock", config["vsock"])] if "vsock" in config else found


def _checked(config: Document) -> Document:
    """The configuration, checked and with names for all devices. ControlError when it cannot be."""
    try:
        checked = tables.VM.check(config)
    except ConfigError as error:
        raise ControlError(CONFLICT if error.conflict else BAD_REQUEST, str(error)) from error
    tables.name_devices(checked)
    return checked


def _copy(document: Any) -> Any:
    """A document of its own."""
    if isinstance(document, dict):
        return {name: _copy(value) for name, value in document.items()}
    if isinstance(document, list):
        return [_copy(value) for value in document]
    return document


def _checked_before(path: str, text: bytes) -> Document | None:
    """What the text of a configuration came to, if this program said so when it wrote it."""
    try:
        with open(path, "rb") as file:
            version, known, document = marshal.loads(file.read(2 * _MAX_CONFIG_BYTES))
    except (OSError, ValueError, EOFError, TypeError):
        return None
    return document if version == _CHECKED_VERSION and known == text and isinstance(document, dict) else None


def _replace(path: str, content: bytes) -> None:
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(content)


def _write(path: str, text: bytes) -> None:
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(text)
