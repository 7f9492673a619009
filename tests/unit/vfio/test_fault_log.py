# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from rootvisor.vfio.fault_log import FaultLog, parse

DEVICES = ["0000:00:11.0", "0001:03:00.1"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            "DMAR: [DMA Write NO_PASID] Request device [00:11.0] fault addr 0x3f800000 [fault reason 0x05] PTE Write",
            ("0000:00:11.0", 0x3F800000, True),
        ),
        (
            "DMAR: [DMA Read NO_PASID] Request device [03:00.1] fault addr 0x1 [fault reason 0x06] PTE Read",
            ("0001:03:00.1", 1, False),
        ),
        (
            "vfio-pci 0000:00:11.0: AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x0012 address=0xfee00000 flags=0x0020]",
            ("0000:00:11.0", 0xFEE00000, True),
        ),
        (
            "vfio-pci 0000:00:11.0: AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x0012 address=0x10 flags=0x0000]",
            ("0000:00:11.0", 0x10, False),
        ),
        ("DMAR: [DMA Write NO_PASID] Request device [00:12.0] fault addr 0x10 [fault reason 0x05]", None),
        ("DMAR: [DMA Write", None),
        ("DMAR: [DMA Write NO_PASID] Request device [] fault addr 0x10", None),
        ("DMAR: [DMA Write NO_PASID] Request device [00:11.0] fault addr zz", None),
        ("vfio-pci 0000:00:11.0: AMD-Vi: Event logged [IO_PAGE_FAULT", None),
        ("something else about 0000:00:11.0", None),
    ],
)
def test_the_kernels_words_are_understood(text: str, fault: tuple[str, int, bool] | None) -> None:
    found = parse(f"3,1234,5678,-;{text}\n SUBSYSTEM=pci\n", DEVICES)
    assert (found and (found.device, found.iova, found.write)) == fault


def test_a_log_that_cannot_be_read_tells_nothing(tmp_path: Path) -> None:
    log = FaultLog(DEVICES, str(tmp_path / "none"))
    assert log.fd == -1 and log.read() == []
    log.close()


def test_only_what_comes_from_now_on_is_told(tmp_path: Path) -> None:
    path = tmp_path / "kmsg"
    line = (
        "3,1,1,-;DMAR: [DMA Write NO_PASID] Request device [00:11.0] fault addr 0x1000 [fault reason 0x05]\n"
    )
    path.write_text(line)
    log = FaultLog(DEVICES, str(path))
    assert log.read() == []
    with path.open("a") as file:
        file.write(line)
    (fault,) = log.read()
    assert fault.iova == 0x1000
    log.close()
