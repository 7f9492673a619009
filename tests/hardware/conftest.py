# SPDX-License-Identifier: Apache-2.0
"""These tests take PCI devices that ``tests/integration/test_hardware_suite.py`` has the appliance emulate."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rootvisor.vfio.host_device import HostDevice

NVME, NIC, DMA = (f"0000:00:{number:02x}.0" for number in (0x10, 0x11, 0x12))
DEVICES = Path("/sys/bus/pci/devices")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "ROOTVISOR_HARDWARE_PORT" not in os.environ:
        for item in items:
            item.add_marker(
                pytest.mark.skip(reason="for tests/integration/test_hardware_suite.py, in the appliance")
            )


def await_true(true: Callable[[], bool], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def driver(address: str) -> str:
    return HostDevice(str(DEVICES / address)).driver


@pytest.fixture
def nvme() -> Path:
    """The disk as this machine has it, with its own driver."""
    await_true(lambda: driver(NVME) == "nvme", "the disk has not come back to its driver")
    found: list[Path] = []

    def appeared() -> bool:
        found[:] = [Path("/dev") / path.name for path in (DEVICES / NVME).glob("nvme/nvme*/nvme*n1")]
        return bool(found) and found[0].exists()

    await_true(appeared, "the disk has no block device")
    return found[0]
