# SPDX-License-Identifier: Apache-2.0
"""Layouts and numbers of `tlfs` against the kernel's own headers (include/hyperv), by a C program made from both.

The headers come from ROOTVISOR_LINUX_SOURCE (a Linux tree >= 6.15), or from one that a kernel build left in the cache.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from rootvisor.kernels.cache import cache_dir
from rootvisor.tlfs import gpa, hypercalls, messages, status
from rootvisor.tlfs.layout import Layout

LAYOUTS = {
    value.name: value
    for module in (gpa, hypercalls, messages)
    for value in vars(module).values()
    if isinstance(value, Layout)
}

#: Our field -> the kernel's member, where the names differ. None: the kernel has no such member.
MEMBERS: dict[str, dict[str, str | None]] = {
    "hv_output_get_partition_id": {},
    "hv_input_add_logical_processor": {
        "proximity_domain_id": "proximity_domain_info.domain_id",
        "proximity_flags": "proximity_domain_info.flags",
    },
    "hv_output_add_logical_processor": {"status": "startup_status.hv_status", "detail": "startup_status.substatus1"},
    "hv_input_set_system_property": {"value": "reserved0"},
    "hv_input_get_system_property": {"argument": "as_uint64"},
    "hv_output_get_system_property": {"value": "hv_cda_info"},
    "hv_input_map_device_interrupt": {
        "logical_entry": "logical_interrupt_entry",
        "interrupt_type": "interrupt_descriptor.interrupt_type",
        "trigger_mode": "interrupt_descriptor.trigger_mode",
        "vector_count": "interrupt_descriptor.vector_count",
        "vector": "interrupt_descriptor.target.vector",
        "target_flags": "interrupt_descriptor.target.flags",
        "set_format": "interrupt_descriptor.target.vp_set.format",
    },
    "hv_output_map_device_interrupt": {
        "source": "interrupt_entry.source",
        "reserved": "interrupt_entry.reserved1",
        "low": "interrupt_entry.msi_entry",
        "high": None,
    },
    "hv_input_unmap_device_interrupt": {
        "source": "interrupt_entry.source",
        "reserved": "interrupt_entry.reserved1",
        "low": "interrupt_entry.msi_entry",
        "high": None,
    },
    "hv_retarget_device_interrupt": {
        "source": "int_entry.source",
        "reserved": "int_entry.reserved1",
        "address": "int_entry.msi_entry.address",
        "data": "int_entry.msi_entry.data",
        "vector": "int_target.vector",
        "target_flags": "int_target.flags",
        "mask_or_format": "int_target.vp_mask",
    },
    "hv_input_notify_partition_event": {"argument": "input"},
    "hv_input_get_partition_property": {"code": "property_code"},
    "hv_input_set_partition_property": {"code": "property_code", "value": "property_value"},
    "hv_input_get_partition_property_ex": {"code": "property_code", "argument": "arg"},
    "hv_input_get_vp_registers": {"rsvd": "rsvd_z8"},
    "hv_send_ipi": {"target_vtl": "reserved", "reserved": None},
    "hv_send_ipi_ex": {
        "target_vtl": "reserved",
        "reserved": None,
        "set_format": "vp_set.format",
        "bank_mask": "vp_set.valid_bank_mask",
    },
    "hv_tlb_flush_ex": {"set_format": "hv_vp_set.format", "bank_mask": "hv_vp_set.valid_bank_mask"},
    "hv_message_header": {"flags": "message_flags"},
}  # fmt: skip
#: Size of the kernel's structure, where ours leaves its end out on purpose.
SIZES = {
    "hv_input_map_device_interrupt": 80,  # the bank mask belongs to our variable header
    "hv_retarget_device_interrupt": 64,  # here too
    "hv_output_map_device_interrupt": 56,  # 6.12 has 16 bytes, the rest is deprecated
    "hv_input_unmap_device_interrupt": 36,  # 6.12 has 32 bytes
}
#: Not in the kernel's headers (TLFS only).
UNKNOWN_TO_LINUX = {"hv_input_notify_long_spin_wait", "hv_input_get_vp_index_from_apic_id"}

SHIMS = {
    "linux/types.h": """
        #pragma once
        #include <stddef.h>
        #include <stdint.h>
        #include <stdbool.h>
        typedef uint8_t u8, __u8; typedef uint16_t u16, __u16; typedef uint32_t u32, __u32; typedef uint64_t u64, __u64;
        typedef int8_t s8; typedef int16_t s16; typedef int32_t s32; typedef int64_t s64, __s64;
        typedef unsigned long ulong; typedef u16 __le16; typedef u32 __le32; typedef u64 __le64;
        typedef struct { u8 b[16]; } guid_t;
        #define __packed __attribute__((__packed__))
        #define __aligned(x) __attribute__((__aligned__(x)))
        #define IS_ENABLED(x) x
        #define CONFIG_X86 1
        #define DECLARE_FLEX_ARRAY(TYPE, NAME) struct { struct {} empty_##NAME; TYPE NAME[]; }
        #define CONFIG_X86_64 1
        #define static_assert _Static_assert
        #define __TRAILING_OVERLAP(TYPE, NAME, FAM, ATTRS, MEMBERS) \\
            union { TYPE NAME; struct { unsigned char offset_to_##FAM[offsetof(TYPE, FAM)]; MEMBERS } ATTRS; }
    """,
    "linux/bits.h": """
        #pragma once
        #define BIT(n) (1UL << (n))
        #define BIT_ULL(n) (1ULL << (n))
        #define GENMASK(h, l) ((~0UL >> (63 - (h))) & (~0UL << (l)))
        #define GENMASK_ULL(h, l) GENMASK(h, l)
    """,
    "linux/build_bug.h": "#pragma once\n",
}


@pytest.fixture(scope="module")
def headers() -> Path:
    tree = os.environ.get("ROOTVISOR_LINUX_SOURCE")
    candidates = [Path(tree)] if tree else sorted(cache_dir().glob("kernels/**/linux-source-*"))
    for candidate in candidates:
        if (candidate / "include" / "hyperv" / "hvhdk.h").exists():
            return candidate / "include"
    if tree:
        pytest.fail(f"ROOTVISOR_LINUX_SOURCE={tree} has no include/hyperv/hvhdk.h")
    pytest.skip("no Linux source tree here; set ROOTVISOR_LINUX_SOURCE to one >= 6.15")


def probe(headers: Path, folder: Path, lines: list[str]) -> dict[str, int]:
    """Compiles and runs a program with ``lines``; what it prints, by name."""
    for name, text in SHIMS.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    source = folder / "probe.c"
    body = "\n".join(lines)
    source.write_text(
        f"#include <stdio.h>\n#include <hyperv/hvhdk.h>\n"
        f'#define P(name, value) printf(name " %llu\\n", (unsigned long long)(value))\n'
        f"int main(void) {{\n{body}\nreturn 0; }}\n"
    )
    # Only include/hyperv of the tree: its include/linux is no place for a user-space program.
    (folder / "hyperv").symlink_to(headers / "hyperv")
    subprocess.run(
        [
            "gcc",
            "-std=gnu11",
            "-w",
            "-fms-extensions",
            f"-I{folder}",
            "-o",
            str(folder / "probe"),
            str(source),
        ],
        check=True,
    )
    out = subprocess.run([str(folder / "probe")], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in (line.split() for line in out.splitlines())}


def test_every_layout_is_like_the_kernels(headers: Path, tmp_path: Path) -> None:
    lines = []
    wanted: dict[str, int] = {}
    for name, layout in LAYOUTS.items():
        if name in UNKNOWN_TO_LINUX:
            continue
        lines.append(f'P("{name}", sizeof(struct {name}));')
        wanted[name] = SIZES.get(name, layout.size)
        for field, offset in zip(layout.fields, layout.offsets, strict=True):
            member = MEMBERS.get(name, {}).get(field, field)
            if member is not None:
                lines.append(f'P("{name}.{field}", offsetof(struct {name}, {member}));')
                wanted[f"{name}.{field}"] = offset
    assert probe(headers, tmp_path, lines) == wanted
    assert len(wanted) > 80


@pytest.mark.parametrize(
    ("prefix", "numbers"),
    [("HV_STATUS_", status.NAMES), ("HVCALL_", hypercalls.NAMES)],
    ids=["status", "code"],
)
def test_numbers_are_the_kernels(headers: Path, tmp_path: Path, prefix: str, numbers: dict[int, str]) -> None:
    lines = [f'#ifdef {prefix}{name}\nP("{name}", {prefix}{name});\n#endif' for name in numbers.values()]
    found = probe(headers, tmp_path, lines)
    by_name = {name: number for number, name in numbers.items()}
    assert found == {name: by_name[name] for name in found}
    assert len(found) > 20


def test_flags_of_gpa_mappings_are_the_kernels(headers: Path, tmp_path: Path) -> None:
    names = {name: value for name, value in vars(gpa).items() if name.startswith(("MAP_", "UNMAP_"))}
    flags = {name: value for name, value in names.items() if isinstance(value, int) and name != "MAP_KNOWN"}
    states = {
        name: value
        for name, value in vars(gpa).items()
        if name.startswith("ACCESS_") and name != "ACCESS_KNOWN"
    }
    lines = [f'P("{name}", HV_{name.replace("MAP_", "MAP_GPA_")});' for name in flags]
    for name in states:
        lines.append(f"union hv_gpa_page_access_state_flags {name} = {{ .{name[7:].lower()} = 1 }};")
        lines.append(f'P("{name}", {name}.as_uint64);')
    assert probe(headers, tmp_path, lines) == flags | states
