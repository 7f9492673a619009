# SPDX-License-Identifier: Apache-2.0
"""What `rootvisor.peers.job` writes down for `inner`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rootvisor.peers import job


@pytest.mark.parametrize(
    ("accelerator", "scheduler", "policy"),
    [("mshv", "hypervisor", "SCHED_FIFO"), ("mshv", "root", "SCHED_RR"), ("kvm", "hypervisor", "")],
)
def test_qemu_has_slices_only_where_guests_compute_in_run_vp(
    accelerator: str, scheduler: str, policy: str, tmp_path: Path
) -> None:
    job.prepare(job.Request([], "qemu", accelerator=accelerator, scheduler=scheduler), tmp_path, ["python"])
    assert json.loads((tmp_path / "job.json").read_text())["policy"] == policy
