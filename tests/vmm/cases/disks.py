# SPDX-License-Identifier: Apache-2.0
"""Disks: raw and qcow2, read and written, read-only; what was flushed is there after the VMM is killed."""

from __future__ import annotations

import os
import subprocess
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


#: What is in the file system is checked first; then files are written, each told when it is on the disk.
_FILES = """\
await /dev/vda
mount -t ext4 /dev/vda /mnt || echo "guest: problem it cannot be mounted"
for file in /mnt/[0-9]*; do
    [ -e "$file" ] && sum=$(md5sum "$file") && echo "guest: found ${file##*/} ${sum%% *}"
done
echo "guest: looked"
number=FIRST
while :; do
    dd if=/dev/urandom of=/file bs=4k count=$((number % 7 + 1)) 2>/dev/null
    dd if=/file of=/mnt/$number conv=fsync 2>/dev/null || echo "guest: problem file $number cannot be written"
    sum=$(md5sum /file)
    echo "guest: kept $number ${sum%% *}"
    [ $number -lt 40 ] || rm /mnt/$((number - 40))
    number=$((number + 1))
done
"""


def _file_system_stays_whole(job: Job, kind: str, kills: int) -> None:
    """Mount, files with fsync, SIGKILL, mount again: every file that was told to be on the disk is there, whole. The
    last forty are looked at; older ones are removed, which may or may not have come to the disk."""
    path = _image("raw", bytes(32 << 20))
    subprocess.run(["/sbin/mkfs.ext4", "-q", path], check=True, stdin=subprocess.DEVNULL, timeout=120)
    if kind != "raw":
        path = _image(kind, _content(path, "raw"))
    random = Random(13)
    kept: dict[int, str] = {}
    for _ in range(kills + 1):
        work = _FILES.replace("FIRST", str(max(kept, default=-1) + 1))
        with Guest(job, work, "--disk", f"path={path},image_type={kind}", kernel="mshv-elf") as guest:
            guest.hears("looked")
            found = dict(line.split() for line in guest.values("found"))
            for number in sorted(kept)[-40:]:
                assert found.get(str(number)) == kept[number], f"file {number} of {max(kept)} is lost"
            for _ in range(random.randrange(1, 30)):
                guest.hears("kept")
            guest.kill()
            while guest.pump(1.0):  # what it had said before
                pass
            assert not guest.values("problem"), guest.values("problem")
            kept.update((int(number), total) for number, total in map(str.split, guest.values("kept")))
    print("note", f"{kind}: {kills} kills, {len(kept)} files written, none lost")


def test_file_system_on_a_raw_disk_is_whole_after_the_vmm_was_killed(job: Job) -> None:
    _file_system_stays_whole(job, "raw", KILLS)


def test_file_system_on_a_qcow2_disk_is_whole_after_the_vmm_was_killed(job: Job) -> None:
    _file_system_stays_whole(job, "qcow2", KILLS)


for _test in (
    test_raw_disk_keeps_what_was_flushed_when_the_vmm_is_killed,
    test_qcow2_disk_keeps_what_was_flushed_when_the_vmm_is_killed,
    test_file_system_on_a_raw_disk_is_whole_after_the_vmm_was_killed,
    test_file_system_on_a_qcow2_disk_is_whole_after_the_vmm_was_killed,
):
    _test.limit = 120 * KILLS + 120  # type: ignore[attr-defined]
del _test
