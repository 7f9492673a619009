# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest

from rootvisor.vmm.events import EventMonitor


def test_report_file_gets_one_json_document_a_line(tmp_path: Path) -> None:
    monitor = EventMonitor.open({"path": str(tmp_path / "events")})
    monitor.report("vm", "booting")
    monitor.report("virtio-device", "activated", {"id": '_disk0"\n\x00ä'})
    monitor.close()
    first, second = (json.loads(line) for line in (tmp_path / "events").read_text().splitlines())
    assert first["timestamp"]["secs"] == 0
    assert 0 <= first["timestamp"]["nanos"] <= second["timestamp"]["nanos"] < 10**9
    assert (first["source"], first["event"], first["properties"]) == ("vm", "booting", None)
    assert second["properties"] == {"id": '_disk0"\n\x00ä'}
    assert os.stat(tmp_path / "events").st_mode & 0o777 == 0o600


def test_report_fifo_without_reader_does_not_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    monitor = EventMonitor.open({"path": str(tmp_path / "fifo")})
    monitor.report("vm", "booting")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY)
    assert json.loads(os.read(reader, 1000))["event"] == "booting"
    os.close(reader)
    monitor.close()


def test_report_reader_that_does_not_read_costs_events_and_no_time() -> None:
    read, write = os.pipe()
    monitor = EventMonitor(write)
    start = time.monotonic()
    for number in range(5000):
        monitor.report("vm", "filler", {"number": str(number), "more": "x" * 100})
    assert time.monotonic() - start < 5
    received = b""
    thread = threading.Thread(target=monitor.close)
    thread.start()
    while data := os.read(read, 65536):
        received += data
    thread.join()
    os.close(read)
    events = [json.loads(line) for line in received.splitlines()]
    numbers = [int(event["properties"]["number"]) for event in events if event["event"] == "filler"]
    dropped = [int(event["properties"]["count"]) for event in events if event["event"] == "dropped"]
    assert numbers == sorted(numbers)
    assert 1000 <= len(numbers) < 5000
    assert len(numbers) + sum(dropped) == 5000
    assert events[-1]["event"] == "dropped"


def test_report_reader_that_is_gone_is_no_error() -> None:
    read, write = os.pipe()
    monitor = EventMonitor(write)
    os.close(read)
    for _ in range(10):
        monitor.report("vm", "booting")
    monitor.close()


def test_open_path_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        EventMonitor.open({"path": str(tmp_path / "no" / "events")})
