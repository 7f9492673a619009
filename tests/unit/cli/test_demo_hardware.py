# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from rootvisor.cli import demo_hardware
from rootvisor.cli.app import run
from rootvisor.cli.evidence import Finding, parse_sections
from tests.unit.cli.pictures import FONT, draw, png

SHOWN = """==rootvisor== dmesg
[    0.0] Hyper-V: running as root partition
==rootvisor== devices
0000:00:03.0 0x1af4 0x105a virtio-pci with 2 interrupts
0000:00:04.0 0x1b36 0x0010 nvme with 2 interrupts
0000:00:05.0 0x8086 0x10d3 e1000e with 3 interrupts
0000:00:06.0 0x1234 0x1111 bochs-drm with 0 interrupts
==rootvisor== disk
16777216 bytes (17 MB, 16 MiB) copied, 0.6 s, 27.6 MB/s
16777216 bytes (17 MB, 16 MiB) copied, 0.7 s, 23.9 MB/s
the same
==rootvisor== network
64 bytes from 10.0.2.2: seq=0 ttl=255 time=112.709 ms
3 packets transmitted, 3 packets received, 0% packet loss
==rootvisor== interrupts
 26: 0 2044 HV-PCI-MSIX-0000:00:03.0 2-edge virtio2-requests.0
 32: 0 12 HV-PCI-MSIX-0000:00:05.0 0-edge eth0-rx-0
 35: 0 25 HV-PCI-MSIX-0000:00:04.0 1-edge nvme0q1
==rootvisor== end
"""


def findings(text: str) -> list[bool]:
    return [finding.ok for finding in demo_hardware._findings(parse_sections(text))]


def test_everything_shown_is_evidence() -> None:
    assert findings(SHOWN) == [True] * 5


@pytest.mark.parametrize(
    ("before", "after", "lost"),
    [
        ("running as root partition", "running as guest", 0),
        ("0x10d3 e1000e", "0x10d3 vfio-pci", 1),
        ("0x1111 bochs-drm", "0x1111 simpledrm", 1),
        ("0 25 HV-PCI", "0 0 HV-PCI", 2),
        ("the same\n", "", 3),
        ("3 packets received, 0% packet loss", "0 packets received, 100% packet loss", 4),
    ],
)
def test_what_is_not_shown_is_missing(before: str, after: str, lost: int) -> None:
    assert [index for index, ok in enumerate(findings(SHOWN.replace(before, after))) if not ok] == [lost]


WORDS = "the root partition wrote this: 1234"


def on_screen(tmp_path: Path, lines: list[str], font: str) -> Finding:
    path = tmp_path / "screen.png"
    path.write_bytes(png(draw(lines, 60)))
    return demo_hardware._screen_finding(demo_hardware._read_screen(path, [font]), WORDS, path)


def test_the_screen_is_evidence_by_what_can_be_read_on_it(tmp_path: Path) -> None:
    font = f"{FONT.height} {FONT.glyphs.hex()}"
    log = [f"[    0.{number:06}] the kernel says {number}" for number in range(12)]
    found = on_screen(tmp_path, [*log, WORDS, ""], font)
    assert found.ok and found.lines == (*log[-3:], WORDS, f"picture: {tmp_path / 'screen.png'}")
    assert not on_screen(tmp_path, [*log, "something else", ""], font).ok
    assert not on_screen(tmp_path, [WORDS, ""], font).ok, "no log"
    assert not on_screen(tmp_path, [*log, WORDS, ""], "no font").ok
    assert demo_hardware._read_screen(tmp_path / "none.png", [font]) == []


def test_a_root_that_shows_nothing_proves_nothing() -> None:
    assert not any(findings(""))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--kernel", "stock"], "has no drivers for these devices"),
        (["--engine", "kvm"], "only the appliance has"),
    ],
)
def test_what_cannot_show_it_is_refused(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["demo", "hardware", *options]) == 2
    assert words in capsys.readouterr().err
