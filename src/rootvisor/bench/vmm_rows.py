# SPDX-License-Identifier: Apache-2.0
"""From the measured values of the bench of our VMM to rows and verdicts. Pure functions over plain data."""

from __future__ import annotations

from typing import Any

from rootvisor.bench.figures import median, summary
from rootvisor.bench.targets import Row, target_document

BOOT_RATIO = 1.0
RESTORE_RATIO = 0.15
RESIDENT_BYTES = 45_000_000
THROUGHPUT_RATIO = 0.9
SMALL_RATIO = 0.7

_OTHER = "QEMU"
#: What guest_load says -> group, name, unit, bytes of one (the rate is of bytes then), least ratio.
LOADS = {
    "read1048576": ("virtio-blk", "1 MiB, sequential read", "MB/s", 1 << 20, THROUGHPUT_RATIO),
    "write1048576": ("virtio-blk", "1 MiB, sequential write", "MB/s", 1 << 20, THROUGHPUT_RATIO),
    "random-read4096": ("virtio-blk", "4 KiB, random read", "/s", 1, SMALL_RATIO),
    "random-write4096": ("virtio-blk", "4 KiB, random write", "/s", 1, SMALL_RATIO),
    "send": ("virtio-net", "TCP, guest to root", "MB/s", 1_000_000, THROUGHPUT_RATIO),
    "receive": ("virtio-net", "TCP, root to guest", "MB/s", 1_000_000, THROUGHPUT_RATIO),
    "echo": ("virtio-net", "round trips of a byte", "/s", 1, SMALL_RATIO),
}


def rows(results: dict[str, Any]) -> list[Row]:
    """All rows: boots, snapshots, disk, network."""
    boots, loads = results.get("boots") or {}, results.get("loads") or {}
    restores = (results.get("restores") or {}).get("rootvisor") or []
    up, resident = ("up_s", "resident_bytes")
    group, again = "Linux guest, 1 VP, 256 MiB", "snapshot and restore"
    found = [
        Row(group, "to user space", "s", _middle(boots, "rootvisor", up), _OTHER, _middle(boots, "qemu", up),
            BOOT_RATIO, True),
        Row(group, "to exit", "s", _middle(boots, "rootvisor", "exit_s"), _OTHER, _middle(boots, "qemu", "exit_s")),
        Row(group, "resident", "B", _middle(boots, "rootvisor", resident), _OTHER, _middle(boots, "qemu", resident),
            RESIDENT_BYTES),
        Row(again, "restore, until it goes on", "s", _median(restores, "restore_s"), "its boot",
            _median(restores, "boot_s"), RESTORE_RATIO, True),
        Row(again, "the same in a VMM that waits", "s", _median(restores, "waiting_restore_s"), "its boot",
            _median(restores, "boot_s"), RESTORE_RATIO, True),
        Row(again, "snapshot", "s", _median(restores, "snapshot_s"), "", None),
    ]  # fmt: skip
    for key, (kind, name, unit, size, least) in LOADS.items():
        ours, theirs = _middle(loads, "rootvisor", key), _middle(loads, "qemu", key)
        found.append(
            Row(kind, name, unit, _times(ours, size), _OTHER, _times(theirs, size), least, True, more=True)
        )
    return found


def document(results: dict[str, Any]) -> dict[str, Any]:
    """The results for machines: every value, and the targets with their verdicts."""
    return {
        **{
            kind: {
                side: {
                    key: summary([run[key] for run in runs if run.get(key) is not None]) for key in runs[0]
                }
                for side, runs in (results.get(kind) or {}).items()
                if runs
            }
            for kind in ("boots", "restores", "loads")
        },
        "missing": {"qemu": results.get("qemu")},
        "problems": results.get("problems", []),
        "targets": target_document(rows(results)),
    }


def _middle(sides: dict[str, list[dict[str, Any]]], side: str, key: str) -> float | None:
    return _median(sides.get(side) or [], key)


def _median(runs: list[dict[str, Any]], key: str) -> float | None:
    values = [run[key] for run in runs if run.get(key) is not None]
    return median(values) if values else None


def _times(value: float | None, factor: int) -> float | None:
    return None if value is None else value * factor
