# SPDX-License-Identifier: Apache-2.0
"""The part of the bench of our VMM that runs where guests run: ``python -I -S vmm_inner.py engine|root JOB``.

``root`` is in the root partition: it runs guests, the sides in turns, and says what it measured in lines of JSON.
``engine`` is around it, where KVM works: it starts the root partition, passes progress on, and writes the results into
the file that its job names.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from select import POLLIN, poll

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from rootvisor.peers.inner import Boot

COMMAND_LINE = "console=hvc0 loglevel=4 panic=-1"
"""Of every guest; what it is to do stands behind."""

_SCRATCH = "/tmp/rootvisor-bench"
_GUEST_TIMEOUT_S = 300.0
_DEADLINE_S = 2200.0


class GuestError(Exception):
    """A guest did not do its part; one line."""


def follow(boot: Boot, wanted: str = "", heard: Callable[[], None] = lambda: None) -> None:
    """Take what a guest prints until it has said `wanted`, or to its end; `heard` is called each time.

    GuestError when it ends without having said that.
    """
    watched = poll()
    for fd in boot.text:
        watched.register(fd, POLLIN)
    left = len(boot.text)
    while left and not (wanted and wanted in boot.times):
        seconds = boot.deadline - time.monotonic()
        if seconds <= 0:
            boot.expire()
            boot.deadline += 60.0
        for fd, _event in watched.poll(max(0.0, seconds) * 1000 + 1):
            data = os.read(fd, 65536)
            if data:
                boot.feed(fd, data)
                heard()
            else:
                watched.unregister(fd)
                left -= 1
    if wanted and wanted not in boot.times:
        raise GuestError(problem_of(boot.close(), f"ended and had not said `{wanted}`"))


def problem_of(result: dict[str, Any], otherwise: str) -> str:
    """One line about a guest that failed."""
    last = [*result["stderr"].strip().splitlines()[-1:], otherwise][0]
    return f"{result['name']}: {(result['problems'] or [last])[0]}"


def started(name: str, argv: list[str], work: str, *more: str) -> Boot:
    """A guest that does `work`."""
    from rootvisor.peers.inner import Boot

    words = [f"{COMMAND_LINE} {work}" if word == COMMAND_LINE else word for word in argv]
    guest = {
        "name": name,
        "vmm": "the VMM",
        "argv": [*words, *more],
        "expected": {},
        "timeout_s": _GUEST_TIMEOUT_S,
    }
    return Boot(guest)


def ended(boot: Boot) -> dict[str, Any]:
    """Wait for the end of a guest; its result. GuestError when it is not well."""
    follow(boot)
    result = boot.close()
    if not result["ok"]:
        raise GuestError(problem_of(result, "failed"))
    return result


def boot_once(side: str, argv: list[str]) -> dict[str, Any]:
    """A guest that does nothing: seconds to user space and to the end of the VMM, and the VMM's memory."""
    from rootvisor.bench.boots import resident_bytes

    boot = started(side, argv, "guest.work=idle")
    follow(boot, "up")
    resident = resident_bytes(boot.pid)
    result = ended(boot)
    return {"up_s": result["times"]["up"], "exit_s": result["total_s"], "resident_bytes": resident}


def load_options(side: str, disk: str) -> list[str]:
    """A disk and a network for the guest."""
    if side == "rootvisor":
        return ["--disk", f"path={disk},image_type=raw", "--net", "default"]
    return [
        "-drive", f"if=none,id=disk,format=raw,file={disk}", "-device", "virtio-blk-device,drive=disk",
        "-netdev", "user,id=net", "-device", "virtio-net-device,netdev=net",
    ]  # fmt: skip


def load_once(side: str, argv: list[str], job: dict[str, Any]) -> dict[str, float]:
    """A guest under load: requests a second by kind, MB/s and round trips a second of its network."""
    disk = f"{_SCRATCH}/disk"
    work = f"guest.work=load guest.port={job['port']} guest.seconds={job['load_s']}"
    result = ended(started(side, argv, work, *load_options(side, disk)))
    return {key: float(value) for key, value in result["said"] if key not in ("up", "end")}


def call(path: str, name: str, body: object = None) -> None:
    """A PUT to the VMM's API. GuestError when it is refused."""
    data = b"" if body is None else json.dumps(body).encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(120.0)
        connection.connect(path)
        head = f"PUT /api/v1/{name} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        answer = b""
        while b"\r\n" not in answer and (more := connection.recv(4096)):
            answer += more
    if not answer.startswith(b"HTTP/1.1 2"):
        raise GuestError(f"{name}: {answer.decode('utf-8', 'replace')[:200]}")


def restore_once(argv: list[str], restore_argv: list[str], number: int) -> dict[str, float]:
    """A guest to user space; its snapshot; the same guest restored, until it goes on."""
    folder, path = f"{_SCRATCH}/snapshot-{number}", f"{_SCRATCH}/api-{number}"
    boot = started("rootvisor", argv, "guest.work=tick", "--api-socket", f"path={path}")
    try:
        follow(boot, "tick")
        call(path, "vm.pause")
        began = time.monotonic()
        call(path, "vm.snapshot", {"destination_url": f"file://{folder}"})
        snapshot_s = time.monotonic() - began
    finally:
        boot.kill()
    boot.close()
    again = started("rootvisor", restore_argv, "", "--restore", f"source_url=file://{folder},resume=true")
    try:
        follow(again, "tick")
    finally:
        again.kill()
    result = again.close()
    waiting_s = restore_into_waiting(restore_argv, folder, f"{path}-again")
    for name in os.listdir(folder):
        os.unlink(f"{folder}/{name}")
    return {
        "boot_s": boot.times["up"],
        "snapshot_s": snapshot_s,
        "restore_s": result["times"]["tick"],
        "waiting_restore_s": waiting_s,
    }


def restore_into_waiting(restore_argv: list[str], folder: str, path: str) -> float:
    """Seconds from the call of a VMM that waits for one, until the guest of the snapshot goes on."""
    boot = started("rootvisor", restore_argv, "", "--api-socket", f"path={path}")
    try:
        await_socket(boot, path)
        called = time.monotonic() - boot.started
        call(path, "vm.restore", {"source_url": f"file://{folder}", "resume": True})
        follow(boot, "tick")
    finally:
        boot.kill()
    return float(boot.close()["times"]["tick"]) - called


def await_socket(boot: Boot, path: str) -> None:
    """Wait until a VMM answers on its socket. GuestError at the guest's deadline."""
    while time.monotonic() < boot.deadline:
        try:
            call(path, "vm.delete")  # there is none: nothing to do
            return
        except OSError:
            time.sleep(0.05)
    raise GuestError("the VMM's API does not answer")


def in_root(job: dict[str, Any]) -> None:
    """Everything, in the root partition; a line of JSON for each thing that was measured."""
    from rootvisor.peers.inner import KernelLog, bring_up_loopback, partitions

    log = KernelLog()
    bring_up_loopback()
    os.makedirs(_SCRATCH, exist_ok=True)
    with open(f"{_SCRATCH}/disk", "wb") as file:
        for _ in range(job["disk_bytes"] >> 20):
            file.write(os.urandom(1 << 20))
    server = os.posix_spawn(job["serve_argv"][0], job["serve_argv"], os.environ, setpgroup=0)

    def one(kind: str, side: str, measured: Any, *arguments: Any) -> None:
        try:
            _say({"kind": kind, "side": side, "value": measured(*arguments)})
        except (GuestError, OSError, ValueError, KeyError) as error:
            _say({"problem": f"{kind}, {side}: {error}"})

    try:
        for number in range(job["runs"] + 1):
            for side, argv in job["sides"].items():
                # the first round fills the page cache
                one("boots" if number else "warm", side, boot_once, side, argv)
        for _ in range(job["runs"]):
            for side, argv in job["sides"].items():
                one("loads", side, load_once, side, argv, job)
        for number in range(job["runs"]):
            one("restores", "rootvisor", restore_once, job["sides"]["rootvisor"], job["restore_argv"], number)
    finally:
        os.killpg(server, signal.SIGKILL)
        os.waitpid(server, 0)
    for complaint in log.complaints():
        _say({"problem": f"root partition: {complaint}"})
    left = partitions()
    if left:
        _say({"problem": f"{len(left)} child partitions are left"})


def collect(lines: Any) -> dict[str, Any]:
    """The results from the lines that `in_root` wrote; progress goes to standard output."""
    results: dict[str, Any] = {"boots": {}, "loads": {}, "restores": {}, "problems": []}
    for line in lines:
        try:
            document = json.loads(line)
        except ValueError:
            if line.strip() and not line.startswith("guest: serving"):
                results["problems"].append(line.strip())
            continue
        if "problem" in document:
            results["problems"].append(document["problem"])
            continue
        sys.stdout.write(f"vmm: {document['kind']}, {document['side']}\n")
        sys.stdout.flush()
        if document["kind"] in results:
            results[document["kind"]].setdefault(document["side"], []).append(document["value"])
    return results


def around(job: dict[str, Any]) -> None:
    """Start the root partition and collect what comes from it."""
    import subprocess
    from threading import Timer

    process = subprocess.Popen(
        job["root_argv"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, errors="replace",
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    guard = Timer(_DEADLINE_S, lambda: os.killpg(process.pid, signal.SIGKILL))
    guard.start()
    try:
        results = collect(process.stdout)
        status = process.wait()
    finally:
        guard.cancel()
        process.stdout.close()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status:
        results["problems"].append(f"the root partition ended with status {status}")
    with open(job["results"], "w", encoding="utf-8") as file:
        json.dump(results, file)


def _say(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


def main() -> int:
    """What the first word says; status 0 when it could be run."""
    with open(sys.argv[2], encoding="utf-8") as file:
        job = json.load(file)
    if sys.argv[1] == "engine":
        around(job)
    else:
        in_root(job)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, __file__.rsplit("/", 3)[0])
    sys.exit(main())
