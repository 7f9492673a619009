# SPDX-License-Identifier: Apache-2.0
"""Numbers and layouts against the kernel's own ``include/uapi/linux/mshv.h``, by a C program.

The header comes from ROOTVISOR_LINUX_SOURCE (a Linux tree >= 6.15), or from one that a kernel build left in the cache.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from rootvisor.kernels.cache import cache_dir
from rootvisor.mshv import abi
from rootvisor.tlfs.layout import Layout

HEADER = "include/uapi/linux/mshv.h"
LAYOUTS = {value.name: value for value in vars(abi).values() if isinstance(value, Layout)}

#: Our constant -> the kernel's expression.
CONSTANTS = {
    "PT_LAPIC": "1 << MSHV_PT_BIT_LAPIC",
    "PT_X2APIC": "1 << MSHV_PT_BIT_X2APIC",
    "PT_GPA_SUPER_PAGES": "1 << MSHV_PT_BIT_GPA_SUPER_PAGES",
    "PT_CPU_AND_XSAVE_FEATURES": "1 << MSHV_PT_BIT_CPU_AND_XSAVE_FEATURES",
    "PT_NESTED_VIRTUALIZATION": "1 << MSHV_PT_BIT_NESTED_VIRTUALIZATION",
    "PT_SMT_ENABLED_GUEST": "1 << MSHV_PT_BIT_SMT_ENABLED_GUEST",
    "CPU_FEATURES_BANKS": "MSHV_NUM_CPU_FEATURES_BANKS",
    "SET_MEM_WRITABLE": "1 << MSHV_SET_MEM_BIT_WRITABLE",
    "SET_MEM_EXECUTABLE": "1 << MSHV_SET_MEM_BIT_EXECUTABLE",
    "SET_MEM_UNMAP": "1 << MSHV_SET_MEM_BIT_UNMAP",
    "IRQFD_DEASSIGN": "1 << MSHV_IRQFD_BIT_DEASSIGN",
    "IRQFD_RESAMPLE": "1 << MSHV_IRQFD_BIT_RESAMPLE",
    "IOEVENTFD_DATAMATCH": "1 << MSHV_IOEVENTFD_BIT_DATAMATCH",
    "IOEVENTFD_PIO": "1 << MSHV_IOEVENTFD_BIT_PIO",
    "IOEVENTFD_DEASSIGN": "1 << MSHV_IOEVENTFD_BIT_DEASSIGN",
    "ACCESS_TYPE_ACCESSED": "MSHV_GPAP_ACCESS_TYPE_ACCESSED",
    "ACCESS_TYPE_DIRTY": "MSHV_GPAP_ACCESS_TYPE_DIRTY",
    "ACCESS_OP_NOOP": "MSHV_GPAP_ACCESS_OP_NOOP",
    "ACCESS_OP_CLEAR": "MSHV_GPAP_ACCESS_OP_CLEAR",
    "ACCESS_OP_SET": "MSHV_GPAP_ACCESS_OP_SET",
    "MMAP_REGISTERS": "MSHV_VP_MMAP_OFFSET_REGISTERS",
    "MMAP_INTERCEPT_MESSAGE": "MSHV_VP_MMAP_OFFSET_INTERCEPT_MESSAGE",
    "PAGE": "MSHV_HV_PAGE_SIZE",
    "MESSAGE_SIZE": "MSHV_RUN_VP_BUF_SZ",
    **{name.removeprefix("MSHV_"): name for name in abi.NAMES.values()},
}
MEMBERS = {"pt_cpu_fbanks0": "pt_cpu_fbanks[0]", "pt_cpu_fbanks1": "pt_cpu_fbanks[1]"}


@pytest.fixture(scope="module")
def header() -> Path:
    tree = os.environ.get("ROOTVISOR_LINUX_SOURCE")
    candidates = [Path(tree)] if tree else sorted(cache_dir().glob("kernels/**/linux-source-*"))
    for candidate in candidates:
        if (candidate / HEADER).exists():
            return candidate / HEADER
    if tree:
        pytest.fail(f"ROOTVISOR_LINUX_SOURCE={tree} has no {HEADER}")
    pytest.skip("no Linux source tree here; set ROOTVISOR_LINUX_SOURCE to one >= 6.15")


def test_numbers_and_layouts_are_the_kernels(header: Path, tmp_path: Path) -> None:
    lines = [f'P("{name}", {expression});' for name, expression in CONSTANTS.items()]
    wanted = {name: getattr(abi, name) for name in CONSTANTS}
    for name, layout in LAYOUTS.items():
        lines.append(f'P("{name}", sizeof(struct {name}));')
        wanted[name] = layout.size
        for field, offset in zip(layout.fields, layout.offsets, strict=True):
            lines.append(f'P("{name}.{field}", offsetof(struct {name}, {MEMBERS.get(field, field)}));')
            wanted[f"{name}.{field}"] = offset
    source = tmp_path / "probe.c"
    body = "\n".join(lines)
    source.write_text(
        f"#include <stddef.h>\n#include <stdio.h>\n#include <sys/ioctl.h>\n#define __packed __attribute__((packed))\n"
        f'#include "{header}"\n'
        f'#define P(name, value) printf(name " %llu\\n", (unsigned long long)(value))\n'
        f"int main(void) {{\n{body}\nreturn 0; }}\n"
    )
    subprocess.run(["gcc", "-std=gnu11", "-w", "-o", str(tmp_path / "probe"), str(source)], check=True)
    out = subprocess.run([str(tmp_path / "probe")], check=True, capture_output=True, text=True).stdout
    assert {name: int(value) for name, value in (line.split() for line in out.splitlines())} == wanted
    assert len(wanted) > 70
