# SPDX-License-Identifier: Apache-2.0
"""A machine without a partition: keeps the rules of `controller.Machine`, and fails where a test wants it to."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, ClassVar

from rootvisor.vmm.controller import MachineError
from rootvisor.vmm.terminal import Terminal

Report = Callable[[str, dict[str, str]], None]


class FakeMachine:
    """Asserts that the controller calls what the machine's state allows.

    ``made``: all machines since the last `forget`. ``failing``: names of methods that raise, and what.
    ``keeps_devices``: the guest lets no device go before `eject`.
    """

    terminal: Terminal | None = None
    made: ClassVar[list[FakeMachine]] = []
    failing: ClassVar[dict[str, Exception]] = {}
    keeps_devices: ClassVar[bool] = False

    def __init__(self, config: dict[str, Any], report: Report, *, state: str = "made") -> None:
        self.fail("make")
        self.config = config
        self.report = report
        self.state = state
        self.buttons = self.nmis = 0
        self.asked: list[str] = []
        self.balloon: int = config.get("balloon", {}).get("size", 0)
        self.devices = {
            device["id"]: f"0000:00:{slot + 1:02x}.0"
            for slot, device in enumerate(
                [
                    *(*config.get("disks", ()), *config.get("net", ()), *config.get("fs", ())),
                    *([config["vsock"]] if "vsock" in config else []),
                ]
            )
        }
        self.made.append(self)

    @classmethod
    def forget(cls) -> None:
        cls.made.clear()
        cls.failing.clear()
        cls.keeps_devices = False

    @classmethod
    def fail(cls, name: str) -> None:
        if name in cls.failing:
            raise cls.failing[name]

    @classmethod
    def restore(
        cls, folder: str, config: dict[str, Any], report: Report, *, prefault: bool, on_demand: bool
    ) -> FakeMachine:
        cls.fail("restore")
        with open(os.path.join(folder, "state"), encoding="utf-8") as file:
            if file.read() != "whole":
                raise MachineError("the snapshot is damaged")
        return cls(config, report, state="paused")

    def start(self) -> None:
        assert self.state == "made"
        self.fail("start")
        self.state = "running"

    def pause(self) -> None:
        assert self.state == "running"
        self.fail("pause")
        self.state = "paused"

    def resume(self) -> None:
        assert self.state == "paused"
        self.fail("resume")
        self.state = "running"

    def stop(self) -> None:
        assert self.state != "stopped"
        self.state = "stopped"

    def press_power_button(self) -> None:
        assert self.state in ("running", "paused")
        self.fail("press_power_button")
        self.buttons += 1

    def inject_nmi(self) -> None:
        assert self.state == "running"
        self.fail("inject_nmi")
        self.nmis += 1

    def add_disk(self, config: dict[str, Any]) -> str:
        self.fail("add_disk")
        return self._add(config)

    def add_net(self, config: dict[str, Any]) -> str:
        self.fail("add_net")
        return self._add(config)

    def add_fs(self, config: dict[str, Any]) -> str:
        return self._add(config)

    def add_vsock(self, config: dict[str, Any]) -> str:
        return self._add(config)

    def _add(self, config: dict[str, Any]) -> str:
        assert self.state in ("running", "paused")
        assert config["id"] not in self.devices
        used = set(self.devices.values())
        address = next(address for slot in range(1, 32) if (address := f"0000:00:{slot:02x}.0") not in used)
        self.devices[config["id"]] = address
        return address

    def remove_device(self, identifier: str) -> None:
        assert self.state in ("running", "paused")
        self.fail("remove_device")
        self.asked.append(identifier)
        if not self.keeps_devices:
            self.devices.pop(identifier, None)

    def eject(self, identifier: str) -> None:
        """What the guest does, in a thread of the machine's."""
        del self.devices[identifier]
        self.report("ejected", {"id": identifier})

    def set_balloon(self, size: int) -> None:
        self.fail("set_balloon")
        self.balloon = size

    def balloon_size(self) -> int:
        return self.balloon

    def counters(self) -> dict[str, dict[str, int]]:
        self.fail("counters")
        return {name: {"read_bytes": 0, "write_bytes": 0} for name in self.devices}

    def device_tree(self) -> dict[str, dict[str, Any]]:
        return {
            name: {"id": name, "resources": [], "children": [], "pci_bdf": address}
            for name, address in self.devices.items()
        }

    def pseudo_terminals(self) -> dict[str, str]:
        names = ("console", "serial")
        return {name: f"/dev/pts/{name}" for name in names if self.config[name]["mode"] == "Pty"}

    def snapshot(self, folder: str) -> None:
        assert self.state == "paused"
        self.fail("snapshot")
        with open(os.path.join(folder, "state"), "w", encoding="utf-8") as file:
            file.write("whole")
