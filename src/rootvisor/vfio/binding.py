# SPDX-License-Identifier: Apache-2.0
"""Moves devices from their driver to vfio-pci and back; a keeper brings them back whatever becomes of this process."""

from __future__ import annotations

import os
import time

from .errors import VfioError, reason
from .host_device import VFIO_DRIVER, HostDevice

_PROBE = "/sys/bus/pci/drivers_probe"
_SETTLE_S = 5.0
#: Waits for the end of its standard input, which the hypervisor holds and never writes to. A driver that is asked to
#: let go waits for the hypervisor's last descriptor. Arguments: a device's folder and its former driver, and so on.
_KEEPER = """trap '' INT TERM HUP QUIT
read -r line
while [ $# -ge 2 ]; do
    name=${1##*/}
    echo >"$1/driver_override"
    [ -e "$1/driver" ] && echo "$name" >"$1/driver/unbind"
    [ -z "$2" ] || echo "$name" >"/sys/bus/pci/drivers/$2/bind" || echo "$name" >/sys/bus/pci/drivers_probe
    shift 2
done 2>/dev/null"""


class Binding:
    """Devices that belong to vfio-pci while this object lives. :meth:`close` returns once they are back."""

    __slots__ = ("_keeper", "_pipe")

    def __init__(self, devices: list[HostDevice]) -> None:
        """Raises :class:`VfioError`; what was moved before then goes back."""
        self._pipe = -1
        self._keeper = 0
        moved = [device for device in devices if device.driver != VFIO_DRIVER]
        if not moved:
            return
        self._start_keeper(moved)
        try:
            for device in moved:
                _take(device)
        except BaseException:
            self.close()
            raise

    def _start_keeper(self, devices: list[HostDevice]) -> None:
        ours, theirs = os.pipe()  # neither is inherited but by the keeper: its end comes with ours
        arguments = ["/bin/sh", "-c", _KEEPER, "rootvisor-device-keeper"]
        for device in devices:
            arguments += [device.folder, device.driver]
        null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        try:
            self._keeper = os.posix_spawn(
                arguments[0],
                arguments,
                {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, ours, 0),
                    (os.POSIX_SPAWN_DUP2, null, 1),
                    (os.POSIX_SPAWN_DUP2, null, 2),
                ],
                setsid=True,
            )
        except OSError as error:
            os.close(theirs)
            raise VfioError(f"cannot start /bin/sh: {reason(error)}", "give the machine a shell") from error
        finally:
            os.close(ours)
            os.close(null)
        self._pipe = theirs

    def close(self) -> None:
        """Back to the old drivers. The devices must have been closed."""
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
            try:
                os.waitpid(self._keeper, 0)
            except ChildProcessError:
                pass


def _take(device: HostDevice) -> None:
    """Binds a device to vfio-pci."""
    step = f"{device.folder}/driver_override"
    try:
        _write(step, VFIO_DRIVER)
        if device.driver:
            step = f"{device.folder}/driver/unbind"
            _write(step, device.address)
        step = _PROBE
        _write(step, device.address)
    except OSError as error:
        raise VfioError(
            f"cannot bind {device.address} to {VFIO_DRIVER}: {step}: {reason(error)}",
            "run as root, with the driver loaded (modprobe vfio-pci)",
        ) from error
    deadline = time.monotonic() + _SETTLE_S
    while HostDevice(device.folder).driver != VFIO_DRIVER:
        if time.monotonic() > deadline:
            raise VfioError(f"{VFIO_DRIVER} does not take {device.address}", "see: dmesg | tail")
        time.sleep(0.01)


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
