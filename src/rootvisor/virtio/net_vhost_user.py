# SPDX-License-Identifier: Apache-2.0
"""Network device served by another process over vhost-user: passt --vhost-user, or a switch."""

from __future__ import annotations

from .net import F_MRG_RXBUF, GUEST_OFFLOADS, HOST_OFFLOADS, QUEUES, NetDevice
from .registers import DEVICE_NET
from .vhost_user import VhostUserDevice


class VhostUserNet(VhostUserDevice, NetDevice):
    """The device.

    Arguments:
        fd: socket connected to the backend, owned by the device from now on.
        mac: the guest's address, six bytes.
        mtu: told to the driver; `None` says nothing, and the driver takes 1500 until DHCP says otherwise.

    Raises `ValueError` for an address or MTU that cannot be, `VhostUserError` when the backend does not answer.
    """

    device_type = DEVICE_NET

    def __init__(
        self, fd: int, mac: bytes, *, mtu: int | None = None, name: str = "net", backend: str = "passt"
    ) -> None:
        offloads = GUEST_OFFLOADS | HOST_OFFLOADS
        VhostUserDevice.__init__(self, name, fd, QUEUES, features=F_MRG_RXBUF | offloads, backend=backend)
        try:
            self.describe(mac, mtu)
        except ValueError:
            self.close()
            raise
