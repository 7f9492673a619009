# SPDX-License-Identifier: Apache-2.0
"""From a device's configuration to the device and the daemon behind it. Each is imported when a guest has one."""

from __future__ import annotations

import os

from .controller import MachineError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..virtio.balloon import Balloon
    from ..virtio.device import VirtioDevice
    from .consoles import Stream
    from .devices import Devices, Plugged
    from .guest_ram import GuestRam
    from .schema import Document
    from .terminal import Terminal

    #: A device, and what goes when it goes.
    Made = tuple[VirtioDevice, Callable[[], None] | None]

#: First byte of made-up addresses: locally administered, one station.
_MAC_PREFIX = 0x52
_BALLOON = "__balloon"


def plug_configured(
    devices: Devices, config: Document, console: Stream, terminal: Terminal | None, ram: GuestRam
) -> None:
    """Everything that a VM's configuration has, in the order in which Linux then numbers it."""
    if console.present:
        from ..virtio.console import Console, Port

        size = terminal.size if terminal is not None and console.tty else None
        board = Console([Port("console", console.input, console.output, True)], size)
        devices.plug("__console", board)
        if size is not None and terminal is not None:
            terminal.on_resize = board.resize
    for kind, plug in (("disks", plug_disk), ("net", plug_net), ("fs", plug_fs)):
        for device in config.get(kind, ()):
            plug(devices, device)
    if "vsock" in config:
        plug_vsock(devices, config["vsock"])
    if "balloon" in config:
        _plug(devices, config["balloon"], lambda document: _balloon(document, ram))
    _plug(devices, config["rng"], _rng)


def plug_disk(devices: Devices, config: Document) -> Plugged:
    """A disk: a raw image here, everything else by qemu-storage-daemon, or a vhost-user back end that is there."""
    return _plug(devices, config, _disk)


def plug_net(devices: Devices, config: Document) -> Plugged:
    """A network device."""
    return _plug(devices, config, _net)


def plug_fs(devices: Devices, config: Document) -> Plugged:
    """A shared folder."""
    return _plug(devices, config, _fs)


def plug_vsock(devices: Devices, config: Document) -> Plugged:
    """Sockets to the guest."""
    return _plug(devices, config, _vsock)


def balloon_of(devices: Devices) -> Balloon:
    """The guest's balloon. MachineError if it has none."""
    from ..virtio.balloon import Balloon

    plugged = devices.plugged.get(_BALLOON)
    if plugged is None or not isinstance(plugged.device, Balloon):
        raise MachineError("the guest has no balloon")
    return plugged.device


def _plug(devices: Devices, config: Document, make: Callable[[Document], Made]) -> Plugged:
    name = config["id"]
    try:
        device, release = make(config)
    except MachineError:
        raise
    except Exception as error:  # what back ends raise: one line each
        if isinstance(error, (OSError, ValueError)) or type(error).__module__.startswith("rootvisor."):
            raise MachineError(f"{name}: {error}") from error
        raise
    return devices.plug(name, device, release)


def _disk(config: Document) -> Made:
    if config["vhost_user"]:
        from ..virtio.vhost_user_block import VhostUserBlock

        return VhostUserBlock(_connect(config["vhost_socket"]), config["num_queues"]), None
    path, readonly = config["path"], config["readonly"]
    if config["image_type"] == "Unknown" and _looks_like_qcow2(path):
        raise MachineError(
            f"{config['id']}: {path} looks like qcow2; say image_type=qcow2, or image_type=raw"
        )
    from ..daemons import storage
    from ..virtio.vhost_user_block import VhostUserBlock

    qcow2 = config["image_type"] == "Qcow2"
    # Only the daemon can do the first three; it knows no serial number.
    needed = qcow2 or config["direct"] or config["num_queues"] > 1
    if not needed and ("serial" in config or not storage.is_installed()):
        return _raw_disk(config)
    if "serial" in config:
        raise MachineError(f"{config['id']}: a serial number needs a raw image, one queue, and no direct=on")
    from ..virtio.disk_image import open_image

    lock = open_image(path, readonly=readonly)
    try:
        served = storage.start_storage(
            path,
            image_format="qcow2" if qcow2 else "raw",
            readonly=readonly,
            direct=config["direct"],
            queues=config["num_queues"],
            backing_files=config["backing_files"],
        )
    except BaseException:
        os.close(lock)
        raise

    def release() -> None:
        served.close()
        os.close(lock)

    try:
        return VhostUserBlock(served.take_socket(), config["num_queues"]), release
    except BaseException:
        release()
        raise


def _raw_disk(config: Document) -> Made:
    """Served by this process."""
    from ..virtio.block import Block
    from ..virtio.disk_image import DiskImage

    image = DiskImage(config["path"], readonly=config["readonly"])
    return Block(image, identity=config.get("serial", "")), None


def _looks_like_qcow2(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"QFI\xfb"
    except OSError:
        return False  # whoever opens it says why


def _net(config: Document) -> Made:
    mac = _mac(config)
    mtu = config.get("mtu")
    if config["vhost_user"]:
        from ..virtio.net_vhost_user import VhostUserNet

        return VhostUserNet(
            _connect(config["vhost_socket"]), mac, mtu=mtu, backend="vhost-user back end"
        ), None
    if "tap" in config:
        from ..virtio.net_tap import tap_net
        from ..virtio.tap import open_tap

        return tap_net(open_tap(config["tap"]), mac, mtu=mtu), None
    from ..daemons.passt import start_passt

    passt = start_passt()
    try:
        if passt.vhost_user:
            from ..virtio.net_vhost_user import VhostUserNet

            return VhostUserNet(passt.take_socket(), mac, mtu=mtu), passt.close
        from ..virtio.net_stream import PasstNet

        return PasstNet(passt.take_socket(), mac, **({} if mtu is None else {"mtu": mtu})), passt.close
    except BaseException:
        passt.close()
        raise


def _mac(config: Document) -> bytes:
    """The guest's address; one that is made up stays in the configuration, for a snapshot."""
    if "mac" not in config:
        address = bytes((_MAC_PREFIX, 0x54, 0x00)) + os.urandom(3)
        config["mac"] = address.hex(":")
    return bytes.fromhex(config["mac"].replace(":", ""))


def _fs(config: Document) -> Made:
    from ..virtio.fs import Fs

    if "socket" in config:
        return Fs(_connect(config["socket"]), config["tag"], request_queues=config["num_queues"]), None
    from ..daemons.virtiofsd import start_virtiofsd

    served = start_virtiofsd(config["path"])
    try:
        device = Fs(served.take_socket(), config["tag"], request_queues=config["num_queues"])
    except BaseException:
        served.close()
        raise
    return device, served.close


def _vsock(config: Document) -> Made:
    from ..virtio.vsock import Vsock, open_vhost_vsock

    return Vsock(config["cid"], open_vhost_vsock()), None


def _balloon(config: Document, ram: GuestRam) -> Made:
    from ..virtio.balloon import Balloon

    device = Balloon(
        config["size"],
        ram.give_back,
        deflate_on_oom=config["deflate_on_oom"],
        reporting=config["free_page_reporting"],
    )
    return device, None


def _rng(_config: Document) -> Made:
    from ..virtio.rng import Rng

    return Rng(), None


def _connect(path: str) -> int:
    """A socket connected to a back end that listens at ``path``."""
    import _socket  # the module behind socket, a tenth of its import time

    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        connection.connect(path)
    except OSError as error:
        connection.close()
        reason = os.strerror(error.errno or 0)
        raise MachineError(f"cannot connect to {path}: {reason}; does the back end run?") from error
    return connection.detach()
