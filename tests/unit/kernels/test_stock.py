# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from rootvisor.kernels import Kernel, KernelError, ensure, find, list_kernels, stock
from rootvisor.kernels.kernel import OfflineError
from tests.unit.kernels.conftest import Stages
from tests.unit.kernels.fakes import FakeApt, make_bzimage, make_deb, make_elf, script

RELEASE = "6.12.117+deb12-cloud-amd64"


@pytest.fixture(autouse=True)
def no_kernel_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock, "installed", lambda pattern="*": None)
    monkeypatch.setattr(stock, "_METAPACKAGE_BYTES", 0)


@pytest.fixture
def depmod(fake_apt: FakeApt) -> None:
    script(fake_apt.bin / "depmod", '#!/bin/sh\n: >"$2/lib/modules/$3/modules.dep"\n')


def kernel_deb(folder: Path, release: str, modules: str = "lib/modules") -> Path:
    return make_deb(
        folder / f"{release}.deb",
        {
            f"boot/vmlinuz-{release}": make_bzimage(make_elf(), version=release),
            f"boot/config-{release}": b"CONFIG_HYPERV=m\n",
            f"{modules}/{release}/kernel/kvm.ko": b"module",
        },
    )


@pytest.mark.parametrize("modules", ["lib/modules", "usr/lib/modules"])
@pytest.mark.usefixtures("depmod")
def test_ensure_fetches_once(fake_apt: FakeApt, tmp_path: Path, stages: Stages, modules: str) -> None:
    fake_apt.add(f"linux-image-{RELEASE}", "6.12.117-1~deb12u1", kernel_deb(tmp_path, RELEASE, modules))
    assert find("stock") is None
    kernel = ensure("stock", stages)
    assert (kernel.name, kernel.version) == ("stock", RELEASE)
    assert kernel.vmlinux is not None
    assert kernel.vmlinux.read_bytes() == make_elf()
    assert kernel.modules is not None
    assert (kernel.modules / "modules.dep").exists()
    assert (kernel.modules / "kernel" / "kvm.ko").read_bytes() == b"module"
    assert kernel.config is not None
    assert stages.seen[-1] == f"unpacking linux-image-{RELEASE}"
    calls = fake_apt.calls()
    fake_apt.switch("offline")
    assert find("stock") == ensure("stock") == kernel
    assert list_kernels() == [kernel]
    assert fake_apt.calls() == calls


@pytest.mark.usefixtures("depmod")
def test_ensure_takes_the_newest_and_refresh_notices_a_newer_one(fake_apt: FakeApt, tmp_path: Path) -> None:
    for version in ("6.12.9", "6.12.10"):
        release = f"{version}-cloud-amd64"
        fake_apt.add(f"linux-image-{release}", f"{version}-1", kernel_deb(tmp_path, release))
    assert ensure("stock").version == "6.12.10-cloud-amd64"
    fake_apt.add("linux-image-7.1.2-cloud-amd64", "7.1.2-1", kernel_deb(tmp_path, "7.1.2-cloud-amd64"))
    assert ensure("stock").version == "6.12.10-cloud-amd64"
    assert ensure("stock", refresh=True).version == "7.1.2-cloud-amd64"
    assert ensure("stock").version == "7.1.2-cloud-amd64"
    assert [kernel.version for kernel in list_kernels()] == ["7.1.2-cloud-amd64"]


@pytest.mark.usefixtures("depmod")
def test_ensure_ubuntu_modules_come_from_a_second_package(fake_apt: FakeApt, tmp_path: Path) -> None:
    release = "6.14.0-37-generic"
    image = make_deb(
        tmp_path / "i.deb", {f"boot/vmlinuz-{release}": make_bzimage(make_elf(), version=release)}
    )
    modules = make_deb(tmp_path / "m.deb", {f"lib/modules/{release}/kernel/kvm.ko": b"module"})
    fake_apt.add(f"linux-image-{release}", "6.14.0-37.37", image)
    fake_apt.add(f"linux-modules-{release}", "6.14.0-37.37", modules)
    kernel = ensure("stock")
    assert kernel.version == release
    assert kernel.modules is not None
    assert (kernel.modules / "kernel" / "kvm.ko").exists()


def test_ensure_nothing_new_enough_is_an_error_with_a_mend(fake_apt: FakeApt, tmp_path: Path) -> None:
    fake_apt.add(
        "linux-image-6.1.0-50-cloud-amd64", "6.1.176-1", kernel_deb(tmp_path, "6.1.0-50-cloud-amd64")
    )
    with pytest.raises(KernelError, match=r"no kernel package >= 6\.12 .* --kernel PATH"):
        ensure("stock")


def test_ensure_offline_with_nothing_cached(fake_apt: FakeApt, cache: Path) -> None:
    fake_apt.switch("offline")
    with pytest.raises(OfflineError, match="cannot fetch the package lists"):
        ensure("stock")
    assert not list(cache.glob("stock*"))


@pytest.mark.usefixtures("depmod")
def test_ensure_package_gone_from_the_mirror_fetches_new_lists(
    fake_apt: FakeApt, tmp_path: Path, stages: Stages
) -> None:
    fake_apt.add(f"linux-image-{RELEASE}", "1", kernel_deb(tmp_path, RELEASE))
    deb = fake_apt.pool / f"linux-image-{RELEASE}.deb"
    content = deb.read_bytes()
    deb.write_bytes(b"")
    with pytest.raises(KernelError, match="cannot fetch"):
        ensure("stock", stages)
    assert "fetching package lists" in stages.seen
    deb.write_bytes(content)
    assert ensure("stock").version == RELEASE


def test_ensure_offline_uses_an_installed_kernel(
    fake_apt: FakeApt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: Stages
) -> None:
    image = tmp_path / "vmlinuz"
    image.write_bytes(make_bzimage(make_elf()))
    kernel = Kernel("stock", "6.12.5-amd64", image)
    monkeypatch.setattr(stock, "installed", lambda pattern="*": kernel if pattern == "*" else None)
    fake_apt.switch("offline")
    assert ensure("stock", stages) == kernel
    assert "using the installed kernel 6.12.5-amd64" in stages.seen[-1]


@pytest.mark.parametrize(
    ("package", "release"),
    [
        (f"linux-image-{RELEASE}", RELEASE),
        (f"linux-image-{RELEASE}-unsigned", RELEASE),
        ("linux-image-6.14.0-37-generic", "6.14.0-37-generic"),
        ("linux-image-unsigned-6.14.0-37-generic", "6.14.0-37-generic"),
    ],
)
def test_release_of(package: str, release: str) -> None:
    assert stock.release_of(package) == release


@pytest.mark.parametrize(
    "package", [f"linux-image-{RELEASE}-dbg", "linux-image-6.12-rt-amd64", "linux-image-amd64"]
)
def test_release_of_other_packages_is_refused(package: str) -> None:
    with pytest.raises(ValueError, match="linux-image"):
        stock.release_of(package)
