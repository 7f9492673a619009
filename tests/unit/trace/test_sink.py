# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rootvisor.trace import encode, sink
from rootvisor.trace.sink import Sink, TraceError, open_sink


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_become_lines_in_order(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    recorder = open_sink(str(path))
    now = time.monotonic_ns()
    recorder.hypercall(
        2, 0x76, memoryview(bytes.fromhex("01000000020000000300000004000000")), 0x0B, 0, now, now + 5000
    )
    recorder.msr(1, 0x40000002, False, 1)
    recorder.msr(0, 0x4000FFFF, True, 7, faulted=True)
    recorder.intercept(0, 2, 0x80000000, "gpa 0x1000")
    recorder.event("ready")
    assert recorder.close() == ""
    header, call, read, fault, intercept, event = _lines(path)
    assert (header["kind"], header["version"]) == ("trace", 1)
    assert call["t"] >= 0
    assert call["input"] == {"lp_index": 1, "apic_id": 2, "proximity_domain_id": 3, "proximity_flags": 4}
    assert (call["call"], call["status"], call["ns"], call["vp"]) == (
        "ADD_LOGICAL_PROCESSOR", "INSUFFICIENT_MEMORY", 5000, 2,
    )  # fmt: skip
    assert (read["msr"], read["access"], read["value"]) == ("VP_INDEX", "read", 1)
    assert fault["fault"] == "#GP"
    assert (intercept["partition"], intercept["detail"]) == (2, "gpa 0x1000")
    assert (event["kind"], event["name"]) == ("event", "ready")


def test_lines_appear_while_the_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    recorder = open_sink(str(path))
    recorder.event("ready")
    deadline = time.monotonic() + 20
    while path.read_text().count("\n") < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert path.read_text().count("\n") == 2
    recorder.close()


def test_many_threads_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink, "MAX_WAITING", 100)
    path = tmp_path / "trace"
    recorder = open_sink(str(path))

    def record(vp: int) -> None:
        for number in range(2000):
            recorder.msr(vp, 0x40000020, False, number)

    threads = [threading.Thread(target=record, args=(vp,)) for vp in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recorder.close()
    lines = _lines(path)[1:]
    for vp in range(4):
        assert [line["value"] for line in lines if line["vp"] == vp] == list(range(2000))


def test_sudden_end_keeps_what_was_handed_over(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    source = Path(sink.__file__).parents[2]
    program = (
        f"import sys, os; sys.path.insert(0, {str(source)!r})\n"
        "from rootvisor.trace.sink import open_sink\n"
        f"recorder = open_sink({str(path)!r}); recorder.event('one'); recorder.flush(); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, timeout=60)
    assert done.returncode == -9
    deadline = time.monotonic() + 20
    while path.read_text().count("\n") < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [line["kind"] for line in _lines(path)] == ["trace", "event"]


def test_unwritable_file_is_one_line() -> None:
    with pytest.raises(TraceError, match="give another --trace FILE"):
        open_sink("/nowhere/trace")


def test_full_disk_is_said_at_the_end_and_stops_nothing() -> None:
    recorder = open_sink("/dev/full")
    for number in range(1000):
        recorder.msr(0, 0x40000020, False, number)
    assert "incomplete" in recorder.close()


def test_closed_pipe_turns_the_sink_off() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    recorder = Sink(write_end)
    recorder.event("lost")
    recorder.flush()
    recorder.event("lost too")
    assert "incomplete" in recorder.close()
    assert recorder.close() == ""


def test_long_input_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    recorder = open_sink(str(path))
    recorder.hypercall(0, 0xFFFF, bytes(4096), 2, 0, 0, 0)
    recorder.close()
    assert len(_lines(path)[1]["input"]["rest"]) == 2 * sink.MAX_DATA_BYTES


def test_frame_cut_short_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "frames"
    path.write_bytes(b"\x10\x00\x00\x00abc")
    with path.open("rb") as stream:
        assert list(encode.read_frames(stream)) == []


def test_recording_path_imports_nothing_slow() -> None:
    source = Path(sink.__file__).parents[2]
    load = f"import sys; sys.path.insert(0, {str(source)!r}); import rootvisor.trace.sink"
    program = f"{load}; print(sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=True
    )
    for module in ("json", "re", "typing", "enum", "dataclasses", "rootvisor.trace.decode"):
        assert f"'{module}'" not in done.stdout
