# SPDX-License-Identifier: Apache-2.0
"""The configuration of a virtual machine: its tables. Names, units and defaults are those of Cloud Hypervisor's API.

Fields of Cloud Hypervisor's that Rootvisor does nothing with are here too, because clients send them: with the value
that asks for nothing they are accepted, with any other they are refused with the reason. What Rootvisor adds is said
in the field's description.

A checked `VM` document has ``cpus``, ``memory``, ``payload``, ``rng``, ``serial`` and ``console`` always, ``disks``,
``net``, ``fs``, ``vsock`` and ``balloon`` where they were given, and after `name_devices` an ``id`` in each device.
"""

from __future__ import annotations

from .schema import (
    Choice,
    ConfigError,
    Field,
    Flag,
    Identifier,
    Integer,
    Listed,
    MacAddress,
    Nested,
    Path,
    Size,
    Table,
    Text,
    Unsupported,
    shown,
    size_text,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .schema import Document

MAX_VPS = 64
MIN_MEMORY = 32 << 20
MAX_MEMORY = 1 << 40
MAX_DEVICES = 30
MAX_COMMAND_LINE = 2047
"""Bytes of a kernel command line on x86, without the NUL (COMMAND_LINE_SIZE)."""
DISK_SERIAL_BYTES = 20
FS_TAG_BYTES = 36
DEFAULT_MEMORY = 512 << 20
DEFAULT_ENTROPY = "/dev/urandom"

_NO_IOMMU = "the guest has no virtual IOMMU"
_NO_SEGMENTS = "the guest has one PCI segment, 0"
_NO_SLOTS = "the VMM chooses the PCI slot"
_NO_LIMITER = "limit the process or the backend, for example with cgroups"
_NO_HOTPLUG = "the guest's memory does not grow; give it what it will need"
_QUEUES = "the guest chooses the size of its queues."
_ALWAYS_SHARED = "guest memory is one shared memory file in any case"

QUEUE_SIZE = Integer(4, 32768, power_of_two=True)


def _common(own: str = "") -> tuple[Field, ...]:
    """Fields that every PCI device has; ``own`` is the name of a device that exists once."""
    name = "The device's name; by default the VMM makes one, such as `_disk0`."
    return (
        Field("id", Identifier(own), only=(own,), reason=f"the device exists once, and is {own}")
        if own
        else Field("id", Identifier(), name),
        Field("iommu", Flag(), default=False, only=(False,), reason=_NO_IOMMU),
        Field("pci_segment", Integer(0, 0xFFFF), default=0, only=(0,), reason=_NO_SEGMENTS),
        Field("pci_device_id", Integer(0, 31), reason=_NO_SLOTS),
    )


_LIMITER_TEXT = dict.fromkeys(
    (
        "bw_size",
        "bw_one_time_burst",
        "bw_refill_time",
        "ops_size",
        "ops_one_time_burst",
        "ops_refill_time",
    ),
    _NO_LIMITER,
)


def _check_cpus(cpus: Document, name: Callable[[str], str]) -> None:
    most = cpus.setdefault("max_vcpus", cpus["boot_vcpus"])
    if most < cpus["boot_vcpus"]:
        raise ConfigError(name("max_vcpus"), f"{most} is less than {name('boot_vcpus')}={cpus['boot_vcpus']}")


CPU_FEATURES = Table(
    "CpuFeatures",
    "Processor features that are off unless asked for.",
    (Field("amx", Flag(), default=False, only=(False,), reason="the guest gets what the hypervisor offers"),),
)

CPUS = Table(
    "CpusConfig",
    "Virtual processors.",
    (
        Field("boot_vcpus", Integer(1, MAX_VPS), "Processors that the guest has.", default=1, text="boot"),
        Field(
            "max_vcpus",
            Integer(1, 4096),
            "no processor is added to a running guest, it has `boot_vcpus`.",
            inert=True,
            text="max",
        ),
        Field("topology", Unsupported("every virtual processor is a core of one package")),
        Field(
            "kvm_hyperv",
            Flag(),
            "Synthetic interrupt controller and timers too, if the root partition runs with --child-timers.",
            default=False,
        ),
        Field(
            "max_phys_bits",
            Integer(40, 64),
            "nothing lies above 2^40 in any case.",
            inert=True,
            default=46,
        ),
        Field("affinity", Unsupported("pin the VMM's threads, for example with taskset", list)),
        Field("features", Nested(CPU_FEATURES), "Processor features.", text=None),
        Field(
            "nested",
            Flag(),
            "guests of this hypervisor have no virtualization of their own.",
            inert=True,
            default=True,
        ),
        Field(
            "core_scheduling",
            Choice("Vm", "Vcpu", "Off"),
            "the hypervisor schedules virtual processors.",
            inert=True,
            default="Vm",
        ),
        Field(
            "profile",
            Choice("Host"),
            "Processor model.",
            default="Host",
            only=("Host",),
            reason="the guest gets what the hypervisor offers",
        ),
    ),
    _check_cpus,
    shorthand="boot",
    absent_text={"features": "the guest gets what the hypervisor offers"},
)

MEMORY = Table(
    "MemoryConfig",
    "Guest memory.",
    (
        Field(
            "size",
            Size(MIN_MEMORY, MAX_MEMORY, 1 << 20),
            "Bytes of guest memory, a multiple of 1 MiB.",
            default=DEFAULT_MEMORY,
        ),
        Field("shared", Flag(), f"{_ALWAYS_SHARED}.", inert=True, default=False),
        Field(
            "mergeable",
            Flag(),
            default=False,
            only=(False,),
            reason="shared memory files cannot be merged by KSM",
        ),
        Field(
            "hugepages",
            Flag(),
            default=False,
            only=(False,),
            reason="mount /dev/shm with huge=advise instead",
        ),
        Field("hugepage_size", Unsupported("mount /dev/shm with huge=advise instead")),
        Field(
            "hotplug_method",
            Choice("Acpi", "VirtioMem", spellings={"VirtioMem": "virtio-mem"}),
            f"{_NO_HOTPLUG}.",
            inert=True,
            default="Acpi",
        ),
        Field("hotplug_size", Size(0, MAX_MEMORY), only=(0,), reason=_NO_HOTPLUG),
        Field("hotplugged_size", Size(0, MAX_MEMORY), only=(0,), reason=_NO_HOTPLUG),
        Field("prefault", Flag(), "Touch all memory before the guest starts.", default=False),
        Field("reserve", Flag(), default=False, only=(False,), reason="use prefault=on"),
        Field("thp", Flag(), "Ask for transparent huge pages.", default=True),
        Field("zones", Unsupported("guest memory is one zone; give its size", list), text=None),
    ),
    shorthand="size",
)


PAYLOAD = Table(
    "PayloadConfig",
    "What the guest starts from.",
    (
        Field(
            "kernel",
            Path(),
            "Linux kernel: a bzImage, or an ELF file with a PVH entry point.",
            required=True,
        ),
        Field("cmdline", Text(MAX_COMMAND_LINE, minimum=0), "The kernel's command line."),
        Field("initramfs", Path(), "Initial ramdisk."),
        Field("firmware", Unsupported("give a kernel; there is no firmware")),
        Field("igvm", Unsupported("give a kernel; there is no IGVM loader")),
        Field("host_data", Unsupported("there are no confidential guests")),
    ),
)


def _check_disk(disk: Document, name: Callable[[str], str]) -> None:
    if disk["vhost_user"]:
        if "vhost_socket" not in disk:
            raise ConfigError(name("vhost_socket"), "is missing: a vhost-user backend listens on a socket")
        if "path" in disk:
            raise ConfigError(name("path"), "and a vhost-user backend exclude each other")
    elif "path" not in disk:
        raise ConfigError(name("path"), "is missing: the image or block device")
    elif "vhost_socket" in disk:
        raise ConfigError(name("vhost_socket"), f"means something with {name('vhost_user')} only")


DISK = Table(
    "DiskConfig",
    "A virtio-blk device.",
    (
        Field("path", Path(), "Image or block device."),
        Field("readonly", Flag(), "The guest cannot write.", default=False),
        Field("direct", Flag(), "Bypass the page cache (O_DIRECT).", default=False),
        Field(
            "image_type",
            Choice(
                "Raw", "Qcow2", "FixedVhd", "Vhdx", "Unknown", spellings={"FixedVhd": "vhd", "Unknown": ""}
            ),
            "Format. Unknown: raw, but a file that starts as qcow2 does is refused until its format is named, for a "
            "guest can write any beginning to a raw disk.",
            default="Unknown",
            only=("Raw", "Qcow2", "Unknown"),
            reason="convert it with qemu-img",
        ),
        Field(
            "backing_files",
            Flag(),
            "A qcow2 image may stand on backing files, each with its format in the header of the one before. Off: an "
            "image that names one is refused.",
            default=False,
        ),
        Field("serial", Text(DISK_SERIAL_BYTES), "Serial number that the guest reads, at most 20 bytes."),
        Field(
            "num_queues", Integer(1, MAX_VPS), "Queues, at most one for each virtual processor.", default=1
        ),
        Field("queue_size", QUEUE_SIZE, _QUEUES, default=128, inert=True),
        Field("vhost_user", Flag(), "The disk is served by a vhost-user-blk backend.", default=False),
        Field("vhost_socket", Path("SOCKET"), "The backend's socket.", text="socket"),
        Field(
            "sparse",
            Flag(),
            default=True,
            only=(True,),
            reason="the guest's discards free blocks of the image",
        ),
        Field(
            "lock_granularity",
            Choice("ByteRange", "Full", spellings={"ByteRange": "byte-range"}),
            "images are locked as a whole.",
            inert=True,
            default="ByteRange",
        ),
        Field("rate_limiter_config", Unsupported(_NO_LIMITER), text=None),
        Field("rate_limit_group", Unsupported(_NO_LIMITER)),
        Field("queue_affinity", Unsupported("pin the VMM's threads, for example with taskset", list)),
        Field("disable_io_uring", Flag(), "", inert=True, default=False, text="_disable_io_uring"),
        Field("disable_aio", Flag(), "", inert=True, default=False, text="_disable_aio"),
        *_common(),
    ),
    _check_disk,
    shorthand="path",
    absent_text=_LIMITER_TEXT,
)


def _check_net(net: Document, name: Callable[[str], str]) -> None:
    if net["vhost_user"]:
        if "vhost_socket" not in net:
            raise ConfigError(name("vhost_socket"), "is missing: a vhost-user backend listens on a socket")
        if "tap" in net:
            raise ConfigError(name("tap"), "and a vhost-user backend exclude each other")
    elif "vhost_socket" in net:
        raise ConfigError(name("vhost_socket"), f"means something with {name('vhost_user')} only")


_OFFLOADS = "the tap or the back end decides"
_NO_TAP_ADDRESS = "give the tap its address with ip(8), and name it in tap"

NET = Table(
    "NetConfig",
    "A virtio-net device: on a tap interface, a vhost-user backend, or by default on passt, which needs no privileges.",
    (
        Field(
            "tap", Text(15, "INTERFACE"), "Tap interface that is there. Without it passt carries the packets."
        ),
        Field("mac", MacAddress(), "The guest's address; by default one is made up."),
        Field("mtu", Integer(1280, 65520), "Largest packet."),
        Field(
            "num_queues", Integer(2, 2 * MAX_VPS), default=2, only=(2,), reason="there is one pair of queues"
        ),
        Field("queue_size", QUEUE_SIZE, _QUEUES, default=256, inert=True),
        Field("vhost_user", Flag(), "Packets are carried by a vhost-user backend.", default=False),
        Field("vhost_socket", Path("SOCKET"), "The backend's socket.", text="socket"),
        Field(
            "vhost_mode",
            Choice("Client", "Server"),
            "Who listens on the socket: the backend (Client) or the VMM.",
            default="Client",
            only=("Client",),
            reason="let the backend listen",
        ),
        Field("offload_tso", Flag(), default=True, only=(True,), reason=_OFFLOADS),
        Field("offload_ufo", Flag(), default=True, only=(True,), reason=_OFFLOADS),
        Field("offload_csum", Flag(), default=True, only=(True,), reason=_OFFLOADS),
        Field("ip", Text(45, "ADDRESS"), only=("192.168.249.1",), reason=_NO_TAP_ADDRESS),
        Field("mask", Text(45, "ADDRESS"), only=("255.255.255.0",), reason=_NO_TAP_ADDRESS),
        Field("host_mac", MacAddress(), reason=_NO_TAP_ADDRESS),
        Field("fds", Unsupported("name the tap interface", list), text="fd"),
        Field("rate_limiter_config", Unsupported(_NO_LIMITER), text=None),
        *_common(),
    ),
    _check_net,
    absent_text=_LIMITER_TEXT,
)


def _check_fs(fs: Document, name: Callable[[str], str]) -> None:
    if "socket" in fs and "path" in fs:
        raise ConfigError(name("path"), f"and {name('socket')} exclude each other: who serves the files?")
    if "socket" not in fs and "path" not in fs:
        raise ConfigError(
            name("socket"), f"is missing: virtiofsd's socket, or {name('path')}=FOLDER to have one started"
        )


FS = Table(
    "FsConfig",
    "A virtio-fs device: shared files.",
    (
        Field(
            "tag",
            Text(FS_TAG_BYTES, "TAG"),
            "Name by which the guest mounts it, at most 36 bytes.",
            required=True,
        ),
        Field("socket", Path("SOCKET"), "Socket of a virtiofsd that runs."),
        Field(
            "path",
            Path("FOLDER"),
            "Folder for which the VMM starts a virtiofsd of its own (not in Cloud Hypervisor).",
        ),
        Field("num_queues", Integer(1, MAX_VPS), "Request queues.", default=1),
        Field("queue_size", QUEUE_SIZE, _QUEUES, default=1024, inert=True),
        *_common(),
    ),
    _check_fs,
)

VSOCK = Table(
    "VsockConfig",
    "A virtio-vsock device: sockets (AF_VSOCK) between the guest and the root, by the root's /dev/vhost-vsock.",
    (
        Field("cid", Integer(3, 0xFFFFFFFE), "The guest's context identifier.", required=True),
        Field(
            "socket",
            Path("SOCKET"),
            reason="leave it out: programs reach the guest by AF_VSOCK, without a proxy",
        ),
        *_common(),
    ),
)

RNG = Table(
    "RngConfig",
    "A virtio-rng device: entropy.",
    (
        Field(
            "src",
            Path(),
            default=DEFAULT_ENTROPY,
            only=(DEFAULT_ENTROPY, "/dev/random"),
            reason="entropy is that of the root's kernel",
        ),
        *_common("__rng"),
    ),
)

BALLOON = Table(
    "BalloonConfig",
    "A virtio-balloon device.",
    (
        Field("size", Size(0, MAX_MEMORY, 4096), "Bytes that the guest gives back.", required=True),
        Field("deflate_on_oom", Flag(), "A guest out of memory takes from the balloon.", default=False),
        Field(
            "free_page_reporting",
            Flag(),
            "The guest reports free pages, which go back to the root.",
            default=False,
        ),
        *_common("__balloon"),
    ),
    shorthand="size",
)

MODE = Choice("Off", "Null", "Pty", "Tty", "File", "Socket")
_MODES = ("Off", "Null", "Pty", "Tty", "File")
_NO_SOCKET = "use pty, or socat between a pty and a socket"


def _check_console(console: Document, name: Callable[[str], str]) -> None:
    if console["mode"] == "File" and "file" not in console:
        raise ConfigError(name("file"), "is missing: where the output goes")
    if console["mode"] not in ("File", "Pty") and "file" in console:
        raise ConfigError(name("file"), f"means something with {name('mode')} File only")


def _console_fields(default: str, what: str) -> tuple[Field, ...]:
    return (
        Field("mode", MODE, what, default=default, only=_MODES, reason=_NO_SOCKET),
        Field(
            "file",
            Path(),
            "File that output is written to, with mode File. With mode Pty `vm.info` says the terminal's path here.",
        ),
        Field("socket", Unsupported(_NO_SOCKET)),
    )


CONSOLE = Table(
    "ConsoleConfig",
    "The virtio-console device (hvc0).",
    (
        *_console_fields(
            "Tty", "Where it goes: no device, nowhere, a new pseudo terminal, the VMM's terminal, a file."
        ),
        *_common("__console"),
    ),
    _check_console,
    shorthand="mode",
)

SERIAL = Table(
    "SerialConfig",
    "The serial port (ttyS0, 16550).",
    _console_fields(
        "Null", "Where it goes: no device, nowhere, a new pseudo terminal, the VMM's terminal, a file."
    ),
    _check_console,
    shorthand="mode",
)

DEBUG_CONSOLE = Table(
    "DebugConsoleConfig",
    "Debug console of Cloud Hypervisor.",
    (
        Field("mode", MODE, default="Off", only=("Off",), reason="use the serial port"),
        Field("iobase", Integer(0, 0xFFFF), "", inert=True, default=0xE9),
        Field("file", Unsupported("use the serial port")),
    ),
)

PLATFORM = Table(
    "PlatformConfig",
    "The platform.",
    (
        Field("num_pci_segments", Integer(1, 96), default=1, only=(1,), reason=_NO_SEGMENTS),
        Field("iommu_segments", Unsupported(_NO_IOMMU, list)),
        Field(
            "iommu_address_width_bits", Integer(0, 64), "", inert=True, default=64, text="iommu_address_width"
        ),
        *(
            Field(name, Unsupported("there are no SMBIOS tables"))
            for name in (
                "system_serial_number",
                "serial_number",
                "system_uuid",
                "uuid",
                "system_manufacturer",
                "system_product_name",
                "system_version",
                "system_family",
                "system_sku_number",
                "chassis_asset_tag",
            )
        ),
        Field("oem_strings", Unsupported("there are no SMBIOS tables", list)),
        *(
            Field(name, Flag(), default=False, only=(False,), reason="there is nothing of the kind")
            for name in ("tdx", "sev_snp", "iommufd")
        ),
        Field("vfio_p2p_dma", Flag(), "", inert=True, default=True),
    ),
)

_NO_VFIO = "devices of the machine are not passed to guests"


def _check_vm(vm: Document, name: Callable[[str], str]) -> None:
    processors = vm["cpus"]["boot_vcpus"]
    for index, disk in enumerate(vm.get("disks", ())):
        check_disk_queues(disk, processors, f"{name('disks')}[{index}].")
    balloon = vm.get("balloon")
    if balloon is not None and balloon["size"] > vm["memory"]["size"]:
        raise ConfigError(
            f"{name('balloon')}.size",
            f"{size_text(balloon['size'])} is more than the guest has, {size_text(vm['memory']['size'])}",
        )
    names: dict[str, str] = {}
    for path, device in devices(vm):
        if "id" not in device:
            continue
        if device["id"] in names:
            raise ConfigError(
                f"{path}.id", f"{shown(device['id'])} is that of {names[device['id']]}", conflict=True
            )
        names[device["id"]] = path
    if len(list(devices(vm))) > MAX_DEVICES:
        raise ConfigError("", f"there are more than {MAX_DEVICES} devices")


def check_disk_queues(disk: Document, processors: int, prefix: str = "") -> None:
    """ConfigError when a disk has more queues than the guest has processors."""
    if disk["num_queues"] > processors:
        raise ConfigError(
            f"{prefix}num_queues", f"{disk['num_queues']} is more than the guest's {processors} processors"
        )


def _off(name: str, reason: str) -> Field:
    return Field(name, Flag(), default=False, only=(False,), reason=reason, text=None)


VM = Table(
    "VmConfig",
    "A virtual machine.",
    (
        Field("cpus", Nested(CPUS), default={}),
        Field("memory", Nested(MEMORY), default={}),
        Field("payload", Nested(PAYLOAD), required=True),
        Field("disks", Listed(Nested(DISK), MAX_DEVICES)),
        Field("net", Listed(Nested(NET), MAX_DEVICES)),
        Field("fs", Listed(Nested(FS), MAX_DEVICES)),
        Field("vsock", Nested(VSOCK)),
        Field("rng", Nested(RNG), default={}),
        Field("balloon", Nested(BALLOON)),
        Field("serial", Nested(SERIAL), default={}),
        Field("console", Nested(CONSOLE), default={}),
        Field("debug_console", Nested(DEBUG_CONSOLE), inert=True),
        Field("platform", Nested(PLATFORM), inert=True),
        Field("rate_limit_groups", Unsupported(_NO_LIMITER, list)),
        Field("generic_vhost_user", Unsupported("disks, net and fs can be vhost-user devices", list)),
        Field("pmem", Unsupported("use a disk", list)),
        Field("devices", Unsupported(_NO_VFIO, list)),
        Field("user_devices", Unsupported(_NO_VFIO, list)),
        Field("vdpa", Unsupported(_NO_VFIO, list)),
        Field("numa", Unsupported("the guest has one NUMA node", list)),
        Field("pci_segments", Unsupported(_NO_SEGMENTS, list)),
        Field("rtc", Unsupported("the guest has a CMOS clock")),
        Field("tpm", Unsupported("there is no TPM")),
        _off("iommu", _NO_IOMMU),
        _off("watchdog", "there is no watchdog"),
        _off("pvpanic", "panics are reported through Hyper-V's crash registers, with no device"),
        _off("landlock_enable", "confine the process from outside"),
        Field("landlock_rules", Unsupported("confine the process from outside", list)),
    ),
    _check_vm,
)

LISTS = ("disks", "net", "fs")
"""Fields of a VM that list devices."""
PREFIXES = {"disks": "_disk", "net": "_net", "fs": "_fs", "vsock": "_vsock"}
"""Fields of a VM with devices that can be added, and how the VMM names those without a name."""
FIXED = {"rng": "__rng", "balloon": "__balloon", "console": "__console"}
"""Fields of a VM that are one PCI device each, and its name by default."""


def devices(vm: Document) -> Iterator[tuple[str, Document]]:
    """Every PCI device of a VM's configuration, with its path in it (``disks[0]``)."""
    for name in (*FIXED, "vsock"):
        if name in vm and vm[name].get("mode") != "Off":
            yield name, vm[name]
    for name in LISTS:
        for index, device in enumerate(vm.get(name, ())):
            yield f"{name}[{index}]", device


def name_devices(vm: Document) -> None:
    """Give every device an ``id`` that has none, one that is not in use already."""
    for name, identifier in FIXED.items():
        if name in vm:
            vm[name].setdefault("id", identifier)
    if "vsock" in vm:
        name_device(vm, "vsock", vm["vsock"])
    for kind in LISTS:
        for device in vm.get(kind, ()):
            name_device(vm, kind, device)


def name_device(vm: Document, kind: str, device: Document) -> None:
    """Give a device (a part of ``vm``, or one that will be) an ``id`` if it has none: the lowest number that is free,
    ``_disk2`` where there are ``_disk0`` and ``_disk1``.
    """
    if "id" not in device:
        used = {other["id"] for _, other in devices(vm) if "id" in other}
        numbers = range(len(used) + 1)
        device["id"] = next(name for number in numbers if (name := f"{PREFIXES[kind]}{number}") not in used)
