# SPDX-License-Identifier: Apache-2.0
"""Records of the sink become readable dictionaries: codes, statuses and MSRs get their names, inputs their
fields.

Nothing here fails on unknown or damaged input: what has no name stays a number, what does not fit a layout
stays hex.
"""

from __future__ import annotations

from typing import Any

from rootvisor.tlfs import hypercalls, messages, msrs, status
from rootvisor.tlfs.layout import Layout
from rootvisor.trace import sink

VERSION = 1
"""Version of the trace lines, in the first line of every file."""

_SHARED_INPUTS = {
    "GET_VP_REGISTERS": "VP_REGISTERS_INPUT",
    "SET_VP_REGISTERS": "VP_REGISTERS_INPUT",
    "FLUSH_VIRTUAL_ADDRESS_SPACE": "FLUSH_INPUT",
    "FLUSH_VIRTUAL_ADDRESS_LIST": "FLUSH_INPUT",
    "FLUSH_VIRTUAL_ADDRESS_SPACE_EX": "FLUSH_EX_INPUT",
    "FLUSH_VIRTUAL_ADDRESS_LIST_EX": "FLUSH_EX_INPUT",
}
"""Calls whose input layout bears another name than their own in `tlfs.hypercalls`."""


def _input_layouts() -> dict[int, Layout]:
    layouts = {}
    for code, name in hypercalls.NAMES.items():
        layout = getattr(hypercalls, _SHARED_INPUTS.get(name, f"{name}_INPUT"), None)
        if isinstance(layout, Layout):
            layouts[code] = layout
    return layouts


INPUT_LAYOUTS = _input_layouts()
"""Hypercall code to the layout of the fixed part of its input."""


def call_name(code: int) -> str:
    """`CREATE_VP`, or `0x00f3` for a code without a name."""
    return str(hypercalls.NAMES.get(code, f"{code:#06x}"))


def status_name(value: int) -> str:
    """`SUCCESS`, or `0x0042` for a status without a name."""
    return str(status.NAMES.get(value, f"{value:#06x}"))


def msr_name(index: int) -> str:
    """`SINT3`, or `0x40000abc` for an MSR without a name."""
    return str(msrs.msr_name(index)).removeprefix("HV_X64_MSR_")


def message_name(message_type: int) -> str:
    """`UNMAPPED_GPA`, or the number of a message type without a name."""
    names: dict[int, str] = getattr(messages, "NAMES", {})
    return str(names.get(message_type, f"{message_type:#010x}"))


def split_control(control: int) -> dict[str, Any]:
    """The fields of a hypercall control word (TLFS "Hypercall Inputs")."""
    return {
        "code": control & hypercalls.CONTROL_CODE,
        "fast": bool(control & hypercalls.CONTROL_FAST),
        "var": control >> hypercalls.CONTROL_VARIABLE_SHIFT & 0x3FF,
        "rep_count": control >> hypercalls.CONTROL_REP_COUNT_SHIFT & 0xFFF,
        "rep_start": control >> hypercalls.CONTROL_REP_START_SHIFT & 0xFFF,
    }


def decode_input(code: int, data: bytes) -> dict[str, Any]:
    """The input block by its layout; what follows the fixed part is `rest`, in hex."""
    layout = INPUT_LAYOUTS.get(code)
    if layout is None or len(data) < layout.size:
        return {"rest": data.hex()} if data else {}
    fields: dict[str, Any] = {}
    for name, value in zip(layout.fields, layout.unpack_from(data, 0), strict=True):
        fields[name] = value.hex() if isinstance(value, bytes) else value
    if len(data) > layout.size:
        fields["rest"] = data[layout.size :].hex()
    return fields


def decode_record(record: tuple[Any, ...], start_ns: int) -> tuple[dict[str, Any], int]:
    """The trace line of a record, and the start time for the records that follow it."""
    kind = record[0]
    if kind == sink.HEADER:
        return {"t": 0, "kind": "trace", "version": VERSION, "unix_ns": record[2]}, record[1]
    line: dict[str, Any] = {"t": record[1] - start_ns}
    if kind == sink.HYPERCALL:
        _, t0, t1, partition, vp, control, data, result, reps, output = record
        fields = split_control(control)
        code = fields.pop("code")
        line |= {"vp": vp, "partition": partition, "kind": "hypercall", "call": call_name(code), "code": code}
        line |= {name: value for name, value in fields.items() if value}
        line |= {"input": decode_input(code, data), "status": status_name(result), "status_code": result}
        if reps:
            line["reps"] = reps
        if output:
            line["output"] = output.hex()
        line["ns"] = t1 - t0
    elif kind == sink.MSR:
        _, _, partition, vp, index, is_write, value, faulted = record
        line |= {"vp": vp, "partition": partition, "kind": "msr", "msr": msr_name(index), "index": index}
        line |= {"access": "write" if is_write else "read", "value": value}
        if faulted:
            line["fault"] = "#GP"
    elif kind == sink.INTERCEPT:
        _, _, partition, vp, message_type, detail = record
        line |= {"vp": vp, "partition": partition, "kind": "intercept", "message": message_name(message_type)}
        line |= {"type": message_type, "detail": detail}
    elif kind == sink.EVENT:
        _, _, partition, vp, name, detail = record
        line |= {"partition": partition, "kind": "event", "name": name, "detail": detail}
        if vp >= 0:
            line["vp"] = vp
    else:
        line |= {"kind": "unknown", "record": repr(record)}
    return line, start_ns
