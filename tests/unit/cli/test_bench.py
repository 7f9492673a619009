# SPDX-License-Identifier: Apache-2.0
"""The command line of the benches, with the measurement replaced by what it gives."""

from __future__ import annotations

import json
import marshal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rootvisor import kernels
from rootvisor.bench import children, interface, outer, vmm
from rootvisor.bench.interface_rows import KINDS
from rootvisor.cli import bench_preparation, kernel_choice
from rootvisor.cli.bench_preparation import preparation
from rootvisor.cli.description import KernelImage, RunOptions
from rootvisor.peers.errors import PeerError

Run = Callable[..., tuple[int, str, str]]

_BOOTS = {
    "no PCI device": {
        "rootvisor": [{"user_space_s": 1.0, "exit_s": 2.0, "resident_bytes": 50_000_000, "exits": {"io": 3}}],
        "qemu": [{"user_space_s": 2.0, "exit_s": 3.0, "resident_bytes": 60_000_000}],
    }
}
_SIDE = {**{kind: [2.0, 1.0] for kind in KINDS}, "timer": [5.0, 7.0]}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, bzimage: Path) -> Callable[[Any, dict[str, Any]], list[Any]]:
    """Replaces what measures in a module of the bench; gives the requests."""
    kernel = kernels.Kernel("mshv", "7.3", bzimage, None, None)
    monkeypatch.setattr(kernels, "ensure", lambda *_, **__: kernel)

    def no_qemu(_progress: Any) -> None:
        raise PeerError("no network", "")

    monkeypatch.setattr(bench_preparation, "ensure", no_qemu)

    def install(module: Any, results: dict[str, Any]) -> list[Any]:
        requests: list[Any] = []

        def measure(request: Any, *arguments: Any, appliance: bool, progress: Any) -> dict[str, Any]:
            folder = arguments[-1]
            assert folder.is_dir() and not list(folder.iterdir()) and not appliance and progress
            requests.append(request)
            return results | {"qemu": getattr(request, "qemu_problem", results.get("qemu"))}

        monkeypatch.setattr(module, "measure", measure)
        return requests

    return install


def lines_of(out: str) -> list[str]:
    return [" ".join(line.split()) for line in out.splitlines()]


def test_bench_shows_rows_verdicts_and_what_the_table_does_not_say(
    rootvisor: Run, measured: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = KernelImage("/k", "/v", "mshv", "7.3")
    monkeypatch.setattr(kernel_choice, "choose_kernel", lambda *_, **__: image)
    results = {
        "boots": _BOOTS, "qemu": None, "gcc": "gcc is missing", "problems": ["exits: it broke"],
        "qemu_image": "vmlinux", "qemu_images": {"image": 2.0, "vmlinux": 1.0},
    }  # fmt: skip
    requests = measured(outer, results)
    status, out, err = rootvisor("bench", "--runs", "7", "--only", "boots")
    assert (status, err) == (0, "")
    assert lines_of(out) == [
        "engine kvm (pretended); kernel mshv 7.3, 1 VP, 512 MiB, `quiet`",
        "",
        "rootvisor other ratio target",
        "no PCI device",
        "to user space 1.00 s 2.00 s QEMU 0.50 <= 0.60 x pass",
        "to exit 2.00 s 3.00 s QEMU 0.67",
        "resident 50 MB 60 MB QEMU 0.83 <= 40 MB miss",
        "exits 3 < 400 pass",
        "",
        "No column for the C loop: gcc is missing",
        "QEMU boots the ELF (PVH), its better one (bzImage 2.00 s, ELF 1.00 s)",
        "Boots: medians. Exits: minimum over the rounds. Resident memory is without guest memory.",
        "Failed: exits: it broke",
    ]
    (request,) = requests
    assert (request.runs, request.only, request.image, request.vmlinux) == (7, "boots", "/k", "/v")


def test_bench_vmm_without_qemu_says_so(rootvisor: Run, measured: Callable[..., list[Any]]) -> None:
    requests = measured(vmm, {"boots": {}, "loads": {}, "restores": {}, "problems": []})
    status, out, _ = rootvisor("bench", "vmm", "--runs", "2")
    assert status == 0
    assert lines_of(out)[0] == "engine kvm (pretended); root and guests: kernel mshv 7.3"
    assert lines_of(out)[-2:] == [
        "No column for QEMU: no network",
        "Medians. Resident memory is without guest memory.",
    ]
    (request,) = requests
    assert (request.runs, request.qemu, request.kernel.version) == (2, None, "7.3")


def test_bench_children_as_json_names_engine_kernel_and_what_is_missing(
    rootvisor: Run, measured: Callable[..., list[Any]]
) -> None:
    measured(children, {"loops": {}, "idle": {}, "boots": {}, "problems": ["one"]})
    status, out, _ = rootvisor("bench", "children", "--json")
    document = json.loads(out)
    assert status == 0
    assert list(document)[:2] == ["engine", "kernel"]
    assert document["engine"] == {"name": "kvm", "reason": "pretended"}
    assert document["kernel"] == "mshv 7.3"
    assert (document["missing"], document["problems"]) == ({"qemu": "no network"}, ["one"])
    assert {target["passed"] for target in document["targets"]} == {None}


def test_bench_guest_measures_no_kernel_of_linux(rootvisor: Run, measured: Callable[..., list[Any]]) -> None:
    results = {"sides": {"rootvisor": _SIDE, "kvm": {}}, "problems": [], "qemu": "not here"}
    measured(interface, results)
    status, out, _ = rootvisor("bench", "guest")
    assert status == 0
    assert lines_of(out)[0] == "engine kvm (pretended); 4 VPs"
    assert lines_of(out)[-2:] == ["No column for KVM: not here", "Calls: minimum over the rounds."]
    status, out, _ = rootvisor("bench", "guest", "--json")
    assert "kernel" not in json.loads(out)
    assert json.loads(out)["us"]["rootvisor"]["fast"]["min"] == 1.0


def test_bench_that_cannot_run_is_one_line_with_a_mend_and_leaves_nothing(
    rootvisor: Run, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*_: Any, **__: Any) -> dict[str, Any]:
        raise outer.BenchError("the guest cannot be made", "apt-get install gcc")

    monkeypatch.setattr(interface, "measure", measure)
    status, out, err = rootvisor("bench", "guest")
    assert (status, out) == (125, "")
    assert "the guest cannot be made" in err and "apt-get install gcc" in err
    assert "Traceback" not in err
    assert list((own_cache / "runs").iterdir()) == []


def test_machine_of_a_bench_has_its_files_in_a_folder_of_its_own(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(
        struct.pack("<III", 0x1BADB002, 0, -0x1BADB002 & 0xFFFF_FFFF)
    )  # multiboot: needs no agent
    with preparation("auto") as ready:
        assert not ready.in_appliance
        options = RunOptions(
            kernel=str(kernel), role="guest", vps=2, memory_bytes=128 << 20, engine=ready.engine.name
        )
        description = Path(ready.machine_argv(options, "machine")[-1])
        assert description.parent == ready.folder / "machine"
        assert marshal.loads(description.read_bytes())["vps"] == 2
    assert not description.exists()
