# SPDX-License-Identifier: Apache-2.0
"""From what the bench of direct hardware measured to rows. Pure functions over plain data."""

from __future__ import annotations

from typing import Any

from rootvisor.bench.figures import median, summary
from rootvisor.bench.targets import Row, target_document

THROUGHPUT_RATIO = 0.95
LATENCY_RATIO = 1.2
MIB = 1 << 20

#: What the guest says -> group, name, unit, factor from its unit to the table's.
THROUGHPUT = {
    "read1048576": ("NVMe, 1 VP", "sequential read", "MB/s", MIB),
    "write1048576": ("NVMe, 1 VP", "sequential write", "MB/s", MIB),
    "random-read4096": ("NVMe, 1 VP", "random reads of 4 KiB", "/s", 1),
    "random-write4096": ("NVMe, 1 VP", "random writes of 4 KiB", "/s", 1),
    "receive": ("NIC, 1 VP", "TCP in", "MB/s", 1_000_000),
    "send": ("NIC, 1 VP", "TCP out", "MB/s", 1_000_000),
}
LATENCY = {"random-read4096-us": "one read of 4 KiB", "echo-us": "one byte over TCP and back"}
#: What the guest does -> what it says of that, and how the table calls it.
COUNTED = {
    "read:4096:random": ("random-read4096", "read of 4 KiB"),
    "echo": ("echo", "round trip of a byte"),
}
_OTHER = "QEMU, VFIO"


def rows(results: dict[str, Any]) -> list[Row]:
    """All rows, throughput first; medians over the guests."""
    loads = results["loads"]

    def middle(side: str, key: str, factor: int = 1) -> float | None:
        values = [run[key] * factor for run in loads.get(side, []) if key in run]
        return median(values) if values else None

    found = [
        Row(
            group, name, unit, middle("rootvisor", key, factor), _OTHER, middle("qemu", key, factor),
            THROUGHPUT_RATIO, True, more=True,
        )
        for key, (group, name, unit, factor) in THROUGHPUT.items()
    ]  # fmt: skip
    found += [
        Row(
            "time of one, median", name, "us", middle("rootvisor", key), _OTHER, middle("qemu", key),
            LATENCY_RATIO, True,
        )
        for key, name in LATENCY.items()
    ]  # fmt: skip
    for kind, (_, name) in COUNTED.items():
        ours, theirs = (kvm_exits_each(results, side, kind) for side in ("rootvisor", "qemu"))
        found.append(Row("exits to KVM, each", name, ".2", ours, _OTHER, theirs))
    for kind, (_, name) in COUNTED.items():
        found.append(
            Row("exits to the hypervisor, each", name, ".2", hypervisor_exits_each(results, kind), "", None)
        )
    return found


def kvm_exits_each(results: dict[str, Any], side: str, kind: str) -> float | None:
    """Exits of the processor for each time that the guest did `kind`."""
    key = COUNTED[kind][0]
    values = [
        exits[kind] / (run[key] * results["load_s"])
        for run, exits in zip(results["loads"].get(side, []), results["kvm_exits"].get(side, []), strict=True)
        if run.get(key) and kind in exits
    ]
    return median(values) if values else None


def hypervisor_exits_each(results: dict[str, Any], kind: str) -> float | None:
    """Exits to our process for each time: those of a run that did nothing but `kind`, less those of one that slept."""
    counts = results["hypervisor_exits"]
    if kind not in counts or "idle" not in counts or not counts[kind][0]:
        return None
    return float((counts[kind][1] - counts["idle"][1]) / counts[kind][0])


def document(results: dict[str, Any]) -> dict[str, Any]:
    """The results for machines: every value, and the targets with their verdicts."""
    return {
        "loads": {
            side: {
                key: summary([run[key] for run in runs if key in run], 2)
                for key in dict.fromkeys(key for run in runs for key in run)
            }
            for side, runs in results["loads"].items()
            if runs
        },
        "kvm_exits_each": {
            side: {kind: kvm_exits_each(results, side, kind) for kind in COUNTED}
            for side in results["kvm_exits"]
        },
        "hypervisor_exits": {
            kind: {"count": count, "exits": exits}
            for kind, (count, exits) in results["hypervisor_exits"].items()
        },
        "missing": {"qemu": results.get("qemu")},
        "problems": results.get("problems", []),
        "targets": target_document(rows(results)),
    }
