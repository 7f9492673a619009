# SPDX-License-Identifier: Apache-2.0
"""The demo's part in the root partition, with a program in the VMM's place."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from rootvisor.cli import demo_root
from rootvisor.cli.evidence import parse_sections

#: Fetches the page, says that it is done, waits for the line that lets it go; its API gives counters once.
VMM = """
import socket, sys, threading, urllib.request
port, api = sys.argv[1:]
listener = socket.socket(socket.AF_UNIX)
listener.bind(api)
listener.listen()
def answer():
    connection, _ = listener.accept()
    connection.recv(4096)
    connection.sendall(b'HTTP/1.1 200 OK\\r\\n\\r\\n{"exits": {}}')
    connection.close()
threading.Thread(target=answer, daemon=True).start()
print(urllib.request.urlopen(f"http://127.0.0.1:{port}/").read().decode(), end="")
print("demo: end", flush=True)
assert sys.stdin.readline() == "\\n"
sys.exit(3)
"""


def run(tmp_path: Path, vmm: str, timeout_s: float) -> dict[str, list[str]]:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    api = str(tmp_path / "api")
    path = tmp_path / "demo.json"
    path.write_text(
        json.dumps(
            {
                "script": "echo '==rootvisor== uname'; echo Linux",
                "argv": [sys.executable, "-c", vmm, str(port), api],
                "api": api,
                "page": "a page\n",
                "port": port,
                "timeout_s": timeout_s,
            }
        )
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", demo_root.__file__, str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stderr == ""
    return parse_sections(done.stdout)


def test_everything_that_is_seen_is_told(tmp_path: Path) -> None:
    sections = run(tmp_path, VMM, 60.0)
    assert sections["uname"] == ["Linux"]
    assert sections["guest"] == ["a page", "demo: end"]
    assert sections["vmm"][:3] == ["status 3", "in-time 1", "requests 1"]
    assert json.loads(sections["counters"][0]) == {"exits": {}}
    assert "end" in sections


def test_guest_that_hangs_is_ended_and_told(tmp_path: Path) -> None:
    sections = run(tmp_path, "import time; print('up', flush=True); time.sleep(1000)", 3.0)
    assert sections["vmm"][:3] == ["status -9", "in-time 0", "requests 0"]
    assert "end" in sections
