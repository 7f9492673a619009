# SPDX-License-Identifier: Apache-2.0
"""A guest's machine with Rootvisor's agent in it: ports for the agent, this process's root file system, one life."""

from __future__ import annotations

from ..daemons.process import DaemonError
from ..daemons.served import spawn_vhost_user
from .controller import MachineError
from .device_makers import plug_configured
from .machine import Machine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..daemons.served import Served
    from .agent import Agent
    from .consoles import Stream
    from .controller import Report
    from .devices import Devices
    from .guest_ram import GuestRam
    from .schema import Document

ROOT_TAG = "root"

#: The BIOS's word for the kind of reset that is wanted, and its value for a warm one. Linux writes it before every
#: reset (`native_machine_emergency_restart`), and `reboot=panic_warm` makes the reset after a panic a warm one: so a
#: panic can be told from a reboot without a device.
RESET_FLAG = 0x472
WARM = b"\x34\x12"
KERNEL_WORDS = "panic=-1 reboot=panic_warm"
"""Has the guest's kernel reset the machine when it panics, in a way that can be told from a reboot."""

_SERVER_SECONDS = 60.0
"""How long the file server may take to start: a busy emulated machine needs ten seconds for it."""

POWEROFF = "poweroff"
RESET = "reset"
CRASH = "crash"
TRIPLE_FAULT = "triple-fault"


class AgentMachine(Machine):
    """Class attributes are what machines of this process are made with.

    ``agent``: the agent's other side. ``initrds``: initial ramdisks, a path or the bytes, loaded one behind the other.
    ``file_server``: command line of the server of the guest's root file system, which listens at descriptor 3.
    ``how``: the first wish of the guest's for an end; a reset ends the guest as well.
    """

    agent: Agent
    initrds: tuple[str | bytes, ...] = ()
    file_server: list[str]
    how = ""

    def __init__(self, config: Document, report: Report) -> None:
        # It takes its time to start; meanwhile everything else is made.
        try:
            self._server: Served | None = spawn_vhost_user("virtiofsd", self.file_server)
        except DaemonError as error:
            raise MachineError(str(error)) from error
        super().__init__(config, report)

    def _plug(self, devices: Devices, console: Stream, ram: GuestRam) -> None:
        consoles = self.agent.consoles()
        if not console.present:  # otherwise that one has to be the first
            devices.plug("__streams", consoles.pop())
        plug_configured(devices, self.config, console, self.terminal, ram)
        for board in consoles:
            devices.plug("__control", board)
        self._plug_root(devices)

    def _plug_root(self, devices: Devices) -> None:
        from ..virtio.fs import Fs

        server, self._server = self._server, None
        assert server is not None
        try:
            server.await_answer(_SERVER_SECONDS)
            device = Fs(server.take_socket(), ROOT_TAG)
        except DaemonError as error:
            raise MachineError(str(error)) from error
        except BaseException:
            server.close()
            raise
        devices.plug("__root", device, server.close)

    def stop(self) -> None:
        """As every machine; the file server too, where it came to no device."""
        super().stop()
        if self._server is not None:
            self._server.close()
            self._server = None

    def _initrds(self) -> list[str | bytes]:
        return list(self.initrds)

    def _end(self, how: str, detail: str) -> None:
        cls = type(self)
        if not cls.how:
            cls.how = how if how == POWEROFF else self._kind_of_reset(detail)
        super()._end(POWEROFF, detail)

    def _kind_of_reset(self, detail: str) -> str:
        if detail == "triple fault":
            return TRIPLE_FAULT
        assert self._ram is not None
        return CRASH if self._ram.low[RESET_FLAG : RESET_FLAG + 2] == WARM else RESET

    def _device_failed(self, name: str, reason: str) -> None:
        """Without its root file system the guest would hang for ever."""
        if name == "__root":
            self._failed(f"the guest's root file system is gone: {reason}")
        else:
            super()._device_failed(name, reason)
