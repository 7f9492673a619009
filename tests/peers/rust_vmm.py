# SPDX-License-Identifier: Apache-2.0
"""rust-vmm's crate mshv-ioctls (what Cloud Hypervisor is built on) and its own tests, as its authors published them.

Cargo fetches the crate and its dependencies, and compiles the tests; both are kept in Rootvisor's cache.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

from rootvisor.kernels import cache_dir

CRATE = "mshv-ioctls"
VERSION = "0.7.1"
_LIBRARY = "mshv_ioctls"
_MANIFEST = f"""\
[package]
name = "fetch"
version = "0.0.0"
edition = "2021"

[lib]
path = "lib.rs"

[dependencies]
{CRATE} = "={VERSION}"
"""
_BUILD_S = 900.0
_RESULT = re.compile(r"^test (\S+?)(?: - should panic)? \.\.\. (ok|FAILED|ignored)", re.MULTILINE)


class Unavailable(Exception):
    """Why there are no tests to run; one line."""


def program() -> Path:
    """The compiled tests, from the cache if they are there. Raises Unavailable."""
    place = cache_dir() / "peers" / f"{CRATE}-{VERSION}"
    built = place / "tests"
    if built.is_file():
        return built
    cargo = shutil.which("cargo")
    if cargo is None:
        raise Unavailable(f"cargo is missing, with which {CRATE} is built; apt-get install cargo")
    fetch = place / "fetch"
    fetch.mkdir(parents=True, exist_ok=True)
    (fetch / "Cargo.toml").write_text(_MANIFEST, encoding="utf-8")
    (fetch / "lib.rs").touch()
    found = json.loads(_cargo([cargo, "metadata", "--format-version", "1"], fetch))
    manifest = next(one["manifest_path"] for one in found["packages"] if one["name"] == CRATE)
    source = place / "source"
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(Path(manifest).parent, source)
    messages = _cargo(
        [cargo, "test", "--no-run", "--lib", "--message-format", "json", "--target-dir", str(place / "target")], source
    )  # fmt: skip
    for line in messages.splitlines():
        message = json.loads(line)
        if message.get("executable") and message["target"]["name"] == _LIBRARY:
            shutil.copy2(message["executable"], built.with_suffix(".new"))
            built.with_suffix(".new").rename(built)
            shutil.rmtree(place / "target")
            return built
    raise AssertionError("cargo has built no tests")


def _cargo(argv: list[str], folder: Path) -> str:
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=_BUILD_S, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()
        raise Unavailable(f"cargo {argv[1]} failed: {last[-1].strip() if last else done.returncode}")
    return done.stdout


def names(built: Path) -> list[str]:
    """The tests in the program, without those that their authors have switched off."""
    everything = _listed(built)
    ignored = _listed(built, "--ignored")
    return sorted(everything - ignored)


def _listed(built: Path, *more: str) -> set[str]:
    done = subprocess.run(
        [built, "--list", "--format", "terse", *more], capture_output=True, text=True, timeout=60, check=True
    )
    return {line.removesuffix(": test") for line in done.stdout.splitlines() if line.endswith(": test")}


def results(output: str) -> dict[str, str]:
    """Test -> ok, FAILED or ignored, from what the program printed."""
    return dict(_RESULT.findall(output))
