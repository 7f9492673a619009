# SPDX-License-Identifier: Apache-2.0
"""Disks: raw and qcow2, read and written, read-only; what was flushed is there after the VMM is killed."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

from tests.unit.virtio.qcow2 import read_qcow2, resize_qcow2, write_qcow2
from tests.vmm.guest import FOLDER, Guest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Job = dict[str, Any]

_BYTES = 8 << 20
_BLOCKS = _BYTES // 4096
KILLS = int(os.environ.get("ROOTVISOR_VMM_KILLS", "3"))


def _image(kind: str, content: bytes) -> str:
    """A disk image with this content; a qcow2 image of zeros has no cluster yet, so that writes change its tables."""
    os.makedirs(FOLDER, exist_ok=True)
    path = f"{FOLDER}/disk.{kind}"
    if kind == "raw":
        with open(path, "wb") as file:
            file.write(content)
        return path
    empty = not any(content)
    write_qcow2(Path(path), b"" if empty else content)
    if empty:
        resize_qcow2(Path(path), len(content))
    return path


def _content(path: str, kind: str) -> bytes:
    if kind == "qcow2":
        return read_qcow2(Path(path))
    with open(path, "rb") as file:
        return file.read()


def _sum(data: bytes) -> str:
    from hashlib import md5

    return md5(data, usedforsecurity=False).hexdigest()


def _reads_and_writes(job: Job, kind: str) -> None:
    content = Random(3).randbytes(_BYTES)
    path = _image(kind, content)
    work = """\
await /dev/vda
sum=$(md5sum /dev/vda); echo "guest: sum ${sum%% *}"
dd if=/dev/vda of=/dev/vda bs=64k count=16 seek=64 conv=notrunc,fsync 2>/dev/null && echo "guest: copied"
"""
    with Guest(job, work, "--disk", f"path={path},image_type={kind}", kernel="mshv-elf") as guest:
        assert guest.hears("sum") == _sum(content)
        guest.hears("copied")
        guest.ends()
    after = _content(path, kind)
    assert after == content[: 4 << 20] + content[: 1 << 20] + content[5 << 20 :], "the disk has other bytes"


def test_raw_disk_is_read_and_written(job: Job) -> None:
    _reads_and_writes(job, "raw")


def test_qcow2_disk_is_read_and_written(job: Job) -> None:
    _reads_and_writes(job, "qcow2")


def test_readonly_disk_is_not_written(job: Job) -> None:
    content = Random(4).randbytes(1 << 20)
    path = _image("raw", content)
    work = """\
await /dev/vda
read -r ro </sys/block/vda/ro; echo "guest: readonly $ro"
dd if=/dev/zero of=/dev/vda bs=4k count=1 conv=fsync 2>/dev/null && echo "guest: problem it can be written"
"""
    with Guest(job, work, "--disk", f"path={path},image_type=raw,readonly=on", kernel="mshv-elf") as guest:
        assert guest.hears("readonly") == "1"
        guest.ends()
    assert _content(path, "raw") == content


def _keeps_what_was_flushed(job: Job, kind: str, kills: int) -> None:
    """Numbered blocks, a flush after each; SIGKILL at some moment; all flushed blocks are there. Several times."""
    path = _image(kind, bytes(_BYTES))
    first = 0
    random = Random(11)
    for _ in range(kills):
        if first > _BLOCKS - 200:
            first = 0
        work = f"await /dev/vda\ntool journal /dev/vda {first} {_BLOCKS - first}\n"
        with Guest(job, work, "--disk", f"path={path},image_type={kind}", kernel="mshv-elf") as guest:
            for _ in range(random.randrange(1, 60)):
                last = int(guest.hears("flushed"))
            guest.kill()
            while guest.pump(1.0):  # what it had said before
                pass
            last = max(int(value) for value in guest.values("flushed"))
        content = _content(path, kind)
        for number in range(first, last + 1):
            block = content[number * 4096 : (number + 1) * 4096]
            assert block == _block(number), f"block {number} of {last} flushed ones is lost"
        first = last + 1
    print("note", f"{kind}: {kills} kills, {first} blocks flushed, none lost")


def _block(number: int) -> bytes:
    """As tests/guests/tool.c fills it."""
    mask = (1 << 64) - 1
    state = number * 0x9E3779B97F4A7C15 + 1 & mask
    words = [number]
    for _ in range(511):
        state ^= state << 13 & mask
        state ^= state >> 7
        state ^= state << 17 & mask
        words.append(state)
    return b"".join(word.to_bytes(8, "little") for word in words)


def test_raw_disk_keeps_what_was_flushed_when_the_vmm_is_killed(job: Job) -> None:
    _keeps_what_was_flushed(job, "raw", KILLS)


def test_qcow2_disk_keeps_what_was_flushed_when_the_vmm_is_killed(job: Job) -> None:
    _keeps_what_was_flushed(job, "qcow2", KILLS)


for _test in (
    test_raw_disk_keeps_what_was_flushed_when_the_vmm_is_killed,
    test_qcow2_disk_keeps_what_was_flushed_when_the_vmm_is_killed,
):
    _test.limit = 120 * KILLS + 120  # type: ignore[attr-defined]
del _test
