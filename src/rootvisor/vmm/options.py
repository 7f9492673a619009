# SPDX-License-Identifier: Apache-2.0
"""The command line: option strings such as ``path=disk.img,readonly=on``, and the options of `rootvisor vmm`.

The syntax is Cloud Hypervisor's: pairs with commas between; a value with commas stands in quotation marks (a quotation
mark in it is doubled) or in brackets. Nothing here needs click, which takes a second to import in a root partition.
"""

from __future__ import annotations

from . import api_tables, config
from .schema import ConfigError, Field, Integer, Path, Text, shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .schema import Document, Table

GUEST = "Guest"
DEVICES = "Devices"
CONTROL = "Control"

_HINT = "write name=value pairs with commas between"


class Option:
    """One option of the command line.

    ``names``: its spellings, the usual one first. ``target``: the field of the VM's configuration that it fills,
    ``payload.kernel`` or ``disks``, or what it is called in `CommandLine`. Its value is described by ``table``, or is
    plain text that ``field`` describes; with neither it is a switch. ``repeats``: it may be given several times, and
    several values may follow it.
    """

    __slots__ = ("field", "group", "help", "names", "repeats", "table", "target")

    def __init__(
        self,
        names: str,
        target: str,
        group: str,
        help: str,
        *,
        table: Table | None = None,
        field: Field | None = None,
        repeats: bool = False,
    ) -> None:
        self.names = tuple(names.split())
        self.target = target
        self.group = group
        self.help = help
        self.table = table
        self.field = field
        self.repeats = repeats

    @property
    def is_switch(self) -> bool:
        """Whether it takes no value."""
        return self.table is None and self.field is None

    @property
    def metavar(self) -> str:
        """What stands for the value in help."""
        if self.table is None:
            return self.field.placeholder if self.field is not None else ""
        if self.table in (config.CONSOLE, config.SERIAL):
            return "off|null|pty|tty|file=FILE"
        if self.table in (api_tables.API_SOCKET, api_tables.EVENT_MONITOR):
            return f"[path=]{self.table.fields[0].placeholder}|fd=N"
        first, *more = self.table.syntax().split(",")
        if self.table.shorthand:
            name, _, placeholder = first.partition("=")
            first = f"[{name}=]{placeholder}"
        return f"{first},..." if more else first

    @property
    def full_help(self) -> str:
        """The help, with everything that the value can hold."""
        if self.table is None or "..." not in self.metavar:
            return self.help
        return f"{self.help} Fields: {self.table.syntax().replace(',', ', ')}."


OPTIONS = (
    Option(
        "--kernel",
        "payload.kernel",
        GUEST,
        "Linux kernel: a bzImage, or an ELF file with a PVH entry point.",
        field=Field("kernel", Path()),
    ),
    Option(
        "--initrd --initramfs",
        "payload.initramfs",
        GUEST,
        "Initial ramdisk.",
        field=Field("initramfs", Path()),
    ),
    Option(
        "--append --cmdline",
        "payload.cmdline",
        GUEST,
        "The kernel's command line.",
        field=Field("cmdline", Text(config.MAX_COMMAND_LINE, minimum=0)),
    ),
    Option("--cpus", "cpus", GUEST, "Virtual processors; the default is boot=1.", table=config.CPUS),
    Option(
        "--vps",
        "cpus.boot_vcpus",
        GUEST,
        "The same as --cpus boot=N.",
        field=Field("vps", Integer(1, config.MAX_VPS)),
    ),
    Option(
        "--memory",
        "memory",
        GUEST,
        "Guest memory; the default is 512M.",
        table=config.MEMORY,
    ),
    Option(
        "--disk", "disks", DEVICES, "A disk; may be given several times.", table=config.DISK, repeats=True
    ),
    Option(
        "--net",
        "net",
        DEVICES,
        "A network device on a tap or a vhost-user backend, otherwise on passt (--net default); may be given "
        "several times.",
        table=config.NET,
        repeats=True,
    ),
    Option(
        "--fs",
        "fs",
        DEVICES,
        "Shared files: of a virtiofsd that listens on SOCKET, or of one started for FOLDER; may be given several "
        "times.",
        table=config.FS,
        repeats=True,
    ),
    Option("--vsock", "vsock", DEVICES, "AF_VSOCK sockets between guest and root.", table=config.VSOCK),
    Option(
        "--rng", "rng", DEVICES, "Where entropy comes from; the default is /dev/urandom.", table=config.RNG
    ),
    Option("--balloon", "balloon", DEVICES, "Memory that the guest gives back.", table=config.BALLOON),
    Option(
        "--console",
        "console",
        DEVICES,
        "The virtio console, hvc0; the default is tty, or off with --serial tty.",
        table=config.CONSOLE,
    ),
    Option(
        "--serial", "serial", DEVICES, "The serial port, ttyS0; the default is null.", table=config.SERIAL
    ),
    Option(
        "--api-socket",
        "api_socket",
        CONTROL,
        "Listen for API calls there. Without --kernel, wait for the call that creates a guest.",
        table=api_tables.API_SOCKET,
    ),
    Option(
        "--event-monitor",
        "event_monitor",
        CONTROL,
        "Report events there, as JSON documents.",
        table=api_tables.EVENT_MONITOR,
    ),
    Option(
        "--restore", "restore", CONTROL, "Go on with a snapshot instead of booting.", table=api_tables.RESTORE
    ),
    Option("--no-shutdown", "no_shutdown", CONTROL, "Stay when the guest has shut down."),
)
BY_NAME = {name: option for option in OPTIONS for name in option.names}

_ABSENT = {
    "--firmware": config.PAYLOAD.by_name["firmware"],
    "--memory-zone": config.MEMORY.by_name["zones"],
    "--debug-console": config.DEBUG_CONSOLE.by_name["file"],
    "--rate-limit-group": config.VM.by_name["rate_limit_groups"],
    "--generic-vhost-user": config.VM.by_name["generic_vhost_user"],
    "--pmem": config.VM.by_name["pmem"],
    "--device": config.VM.by_name["devices"],
    "--user-device": config.VM.by_name["user_devices"],
    "--vdpa": config.VM.by_name["vdpa"],
    "--numa": config.VM.by_name["numa"],
    "--pci-segment": config.VM.by_name["pci_segments"],
    "--platform": config.PLATFORM.by_name["oem_strings"],
    "--rtc": config.VM.by_name["rtc"],
    "--tpm": config.VM.by_name["tpm"],
    "--watchdog": config.VM.by_name["watchdog"],
    "--pvpanic": config.VM.by_name["pvpanic"],
    "--landlock": config.VM.by_name["landlock_enable"],
    "--landlock-rules": config.VM.by_name["landlock_rules"],
    "--seccomp": config.VM.by_name["landlock_enable"],
}
"""Options of Cloud Hypervisor's that there are not, each with the field that says why."""


class CommandLine:
    """What a command line asks for.

    ``vm``: a checked configuration, None when none was given. ``restore``: a checked `RestoreConfig` or None.
    ``api_socket``, ``event_monitor``: dicts with ``path`` or ``fd``, or None. ``debug``: internal errors show their
    traceback.
    """

    __slots__ = ("api_socket", "debug", "event_monitor", "no_shutdown", "restore", "vm")

    def __init__(
        self,
        vm: Document | None,
        *,
        restore: Document | None = None,
        api_socket: Document | None = None,
        event_monitor: Document | None = None,
        no_shutdown: bool = False,
        debug: bool = False,
    ) -> None:
        self.vm = vm
        self.restore = restore
        self.api_socket = api_socket
        self.event_monitor = event_monitor
        self.no_shutdown = no_shutdown
        self.debug = debug


def parse_command_line(arguments: Sequence[str]) -> CommandLine:
    """Options to values; nothing is opened. ConfigError with one line when they cannot be right."""
    vm: Document = {}
    own: Document = {"debug": True} if "--debug" in arguments else {}
    given: dict[str, str] = {}
    for option, name, values in _options(arguments):
        target = own if option.group == CONTROL else vm
        where, _, leaf = option.target.rpartition(".")
        if where:
            target = target.setdefault(where, {})
        if option.repeats:
            target.setdefault(leaf, []).extend(_value(option, value, name) for value in values)
            continue
        what = "cpus" if where == "cpus" else option.target
        if what in given:
            twice = given[what] in option.names
            raise ConfigError(name, "is given twice" if twice else f"and {given[what]} exclude each other")
        given[what] = name
        target[leaf] = _value(option, values[0], name) if values else True
    _check_whole(vm, own)
    if vm and "console" not in vm and vm.get("serial", {}).get("mode") == "Tty":
        vm["console"] = {"mode": "Off"}
    return CommandLine(config.VM.check(vm) if vm else None, **own)


def _check_whole(vm: Document, own: Document) -> None:
    """What can be missing or too much only in a whole command line."""
    for name in ("api_socket", "event_monitor"):
        if name in own and len(own[name]) != 1:
            raise ConfigError(f"--{name.replace('_', '-')}", "needs either a path or a file descriptor")
    if "restore" in own:
        if vm:
            raise ConfigError(
                "--restore", "brings the guest's configuration; options of the guest exclude it"
            )
    elif "payload" not in vm or "kernel" not in vm["payload"]:
        if vm:
            raise ConfigError("--kernel", "is missing: a guest starts from a kernel image")
        if "api_socket" not in own:
            raise ConfigError("", "nothing to do: give --kernel, --restore or --api-socket")


def _options(arguments: Sequence[str]) -> Iterator[tuple[Option, str, list[str]]]:
    """Every option with the spelling used and its values."""
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        name, separator, value = word.partition("=")
        option = BY_NAME.get(name)
        if option is None and name in _ABSENT:
            raise ConfigError(name, f"is not supported; {_ABSENT[name].refusal}")
        if word == "--debug":
            continue
        if option is None:
            what = "no such option" if word.startswith("-") else "an option is expected here"
            raise ConfigError(_shortened(name), what)
        if option.is_switch:
            if separator:
                raise ConfigError(name, "takes no value")
            yield option, name, []
            continue
        values = [value] if separator else rest[:1]
        if not separator:
            if not rest or (rest[0].startswith("--") and rest[0].partition("=")[0] in BY_NAME):
                raise ConfigError(name, f"needs a value: {option.metavar}")
            del rest[0]
        while option.repeats and not separator and rest and not rest[0].startswith("-"):
            values.append(rest.pop(0))
        yield option, name, values


def _value(option: Option, text: str, name: str) -> object:
    """The checked value of an option's text."""
    if option.table is not None:
        return parse_option(option.table, text, name)
    assert option.field is not None
    return option.field.check(option.field.kind.parse(text, name), name, True)


def parse_option(table: Table, text: str, option: str = "") -> Document:
    """The checked document of an option string: ``path=disk.img,readonly=on`` to ``{"path": ...}``.

    ``option`` stands before the field's name in the message of a ConfigError (``--disk readonly: ...``).
    """
    document: Document = {}
    for number, part in enumerate(split(text, option)):
        key, separator, value = part.partition("=")
        key = key.strip()
        if not separator:
            key, value = _without_key(table, part, number, option)
            if not key:
                continue
        name = f"{option} {_shortened(key)}" if option else _shortened(key)
        if key in table.absent_text:
            raise ConfigError(name, f"is not supported; {table.absent_text[key]}")
        field = table.by_text.get(key)
        if field is None:
            raise ConfigError(name, f"there is no such field; write {table.syntax()}")
        if field.name in document:
            raise ConfigError(name, "is given twice")
        document[field.name] = field.kind.parse(unquote(value.strip()), name)
    if table in (config.CONSOLE, config.SERIAL) and "file" in document:
        document.setdefault("mode", "File")
    return table.check(document, option, text=True)


def _without_key(table: Table, part: str, number: int, option: str) -> tuple[str, str]:
    """Field and value that a word without ``=`` stands for; no field: it says nothing."""
    if table is config.NET and part == "default" and not number:
        return "", ""
    if table.shorthand and not number:
        return table.by_name[table.shorthand].text or "", part
    raise ConfigError(f"{option} {_shortened(part)}".strip(), f"has no value; {_HINT}")


def split(text: str, option: str = "") -> list[str]:
    """Parts between commas that are neither in quotation marks nor in brackets; quotation marks stay."""
    parts: list[str] = []
    depth = start = 0
    quoted = False
    for index, letter in enumerate(text):
        if letter == '"':
            quoted = not quoted
        elif quoted:
            continue
        elif letter == "[":
            depth += 1
        elif letter == "]":
            depth -= 1
            if depth < 0:
                break
        elif letter == "," and not depth:
            parts.append(text[start:index])
            start = index + 1
    if quoted or depth:
        raise ConfigError(option, f"quotation marks or brackets in {shown(text)} do not match")
    parts.append(text[start:])
    if not all(part.strip() for part in parts):
        raise ConfigError(option, f"{shown(text)} has an empty part; {_HINT}")
    return parts


def unquote(text: str) -> str:
    """The value without its quotation marks; one that is doubled inside them stays as one."""
    if '"' not in text:
        return text
    inside = text.split('"')  # odd parts lie inside; an empty even part between two of them is a doubled mark
    last = len(inside) - 1
    return "".join(
        '"' if not part and 0 < index < last and not index % 2 else part for index, part in enumerate(inside)
    )


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."
