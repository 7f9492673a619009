# SPDX-License-Identifier: Apache-2.0
"""Modules from one file: written here, imported by a Python of its own as the VMM's is."""

from __future__ import annotations

import marshal
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rootvisor.cli import archived_modules, module_archive
from rootvisor.cli.paths import source_root

_PYTHON = getattr(sys, "_base_executable", sys.executable)

#: Imports what its arguments name behind the pointer, and says which came from the archive.
_PROGRAM = """\
import sys
sys.path.insert(0, sys.argv[1])
from rootvisor.cli import archived_modules
print(archived_modules.use(sys.argv[2]))
for name in sys.argv[3:]:
    module = __import__(name, fromlist=["x"])
    print(name, type(module.__spec__.loader).__name__, module.__file__)
"""


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROOTVISOR_CACHE", str(tmp_path / "cache"))
    found = module_archive.find_or_write()
    assert found is not None
    return found


def _imports(tmp_path: Path, archive: Path | None, *names: str) -> list[str]:
    pointer = tmp_path / "pointer"
    if archive is not None:
        pointer.write_bytes(os.fsencode(archive))
    done = subprocess.run(
        [_PYTHON, "-I", "-S", "-c", _PROGRAM, str(source_root()), str(pointer), *names],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    return done.stdout.splitlines()


def test_vmm_of_an_archive_is_whole_and_knows_where_its_files_are(tmp_path: Path, archive: Path) -> None:
    root = source_root() / "rootvisor"
    said = _imports(
        tmp_path, archive, "rootvisor.vmm.machine", "rootvisor.vmm.api", "rootvisor.boot.linux", "json"
    )
    assert said[0] == "True"
    assert said[1:4] == [
        f"rootvisor.vmm.machine _Finder {root / 'vmm' / 'machine.py'}",
        f"rootvisor.vmm.api _Finder {root / 'vmm' / 'api.py'}",
        f"rootvisor.boot.linux _Finder {root / 'boot' / 'linux.py'}",
    ]
    assert said[4].startswith("json _Finder ")


def test_no_archive_means_the_files_themselves(tmp_path: Path) -> None:
    said = _imports(tmp_path, None, "rootvisor.vmm.schema")
    assert said[0] == "False" and said[1].startswith("rootvisor.vmm.schema SourceFileLoader ")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nonsense",
        marshal.dumps([1]),
        marshal.dumps({"key": ("another", "interpreter", "place"), "modules": {}}),
    ],
)
def test_archive_that_is_not_for_this_program_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "archive"
    path.write_bytes(content)
    said = _imports(tmp_path, path, "rootvisor.vmm.schema")
    assert said[0] == "False" and said[1].startswith("rootvisor.vmm.schema SourceFileLoader ")


def test_same_sources_are_archived_once_and_changed_ones_anew(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = archive.stat().st_ino
    assert module_archive.find_or_write() == archive and archive.stat().st_ino == written
    monkeypatch.setattr(module_archive, "_PACKAGES", ("tlfs",))
    other = module_archive.find_or_write()
    assert other is not None and other != archive


def test_cache_that_cannot_be_written_means_no_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ROOTVISOR_CACHE", str(tmp_path / "file"))
    assert module_archive.find_or_write() is None


def test_everything_of_ours_that_the_vmm_imports_is_archived(archive: Path) -> None:
    """But for `rootvisor` and `rootvisor.cli`, from which the archive is found."""
    names = set(marshal.loads(archive.read_bytes())["modules"])
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); before = set(sys.modules)\n"
        "import rootvisor.cli, rootvisor.vmm.options, rootvisor.vmm.main, rootvisor.vmm.machine, rootvisor.vmm.api\n"
        "import rootvisor.vmm.api_routes, rootvisor.vmm.snapshot, rootvisor.vmm.processor_state, json\n"
        "for name in sorted(set(sys.modules) - before):\n"
        "    if name.startswith('rootvisor'): print(name)\n"
    )
    done = subprocess.run(
        [_PYTHON, "-I", "-S", "-c", program, str(source_root())],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert set(done.stdout.split()) - names == {"rootvisor", "rootvisor.cli"}


def test_key_names_interpreter_and_place() -> None:
    assert archived_modules.key()[1:] == (sys.version, str(source_root()))
