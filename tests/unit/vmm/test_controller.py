# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rootvisor.vmm.config import DISK, NET, VSOCK
from rootvisor.vmm.controller import ControlError, Controller, MachineError
from tests.unit.vmm.fake_machine import FakeMachine

CONFIG: dict[str, Any] = {
    "payload": {"kernel": "/boot/vmlinuz"},
    "disks": [{"path": "a"}],
    "balloon": {"size": 4096},
}
RESTORE = {"prefault": False, "memory_restore_mode": "Copy", "resume": False}


class Recorder:
    """Stands for an event monitor."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str, dict[str, str] | None]] = []

    def report(self, source: str, event: str, properties: dict[str, str] | None = None) -> None:
        self.events.append((source, event, properties))


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def controller(machines: list[FakeMachine], recorder: Recorder) -> Iterator[Controller]:
    made = Controller(FakeMachine, recorder)  # type: ignore[arg-type]
    yield made
    made.close()


@pytest.fixture
def running(controller: Controller) -> Controller:
    controller.create(CONFIG)
    controller.boot()
    return controller


def refusal(act: Callable[[], object]) -> tuple[int, str]:
    with pytest.raises(ControlError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return caught.value.status, str(caught.value)


def state(controller: Controller) -> str:
    return str(controller.info()["state"])


def test_life_of_a_virtual_machine_goes_through_its_states(
    controller: Controller, recorder: Recorder
) -> None:
    controller.create(CONFIG)
    assert state(controller) == "Created"
    controller.boot()
    assert state(controller) == "Running"
    controller.pause()
    assert state(controller) == "Paused"
    controller.resume()
    assert state(controller) == "Running"
    controller.shutdown()
    assert state(controller) == "Shutdown"
    controller.boot()
    controller.reboot()
    assert state(controller) == "Running"
    controller.delete()
    assert refusal(controller.info) == (404, "there is no virtual machine; create it first")
    assert [event for source, event, _ in recorder.events if source == "vm"] == [
        "booting", "booted", "pausing", "paused", "resuming", "resumed", "shutdown", "booting", "booted", "rebooting",
        "rebooted", "shutdown", "deleted",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("prepare", "call", "status"),
    [
        ("", "boot", 404), ("", "pause", 404), ("", "resume", 404), ("", "shutdown", 404), ("", "reboot", 404),
        ("", "power_button", 404), ("", "nmi", 404), ("", "info", 404), ("", "counters", 404),
        ("create", "pause", 405), ("create", "resume", 405), ("create", "shutdown", 405), ("create", "reboot", 405),
        ("create", "power_button", 405), ("create", "nmi", 405), ("create", "counters", 405),
        ("create boot", "boot", 405), ("create boot", "resume", 405),
        ("create boot pause", "boot", 405), ("create boot pause", "pause", 405), ("create boot pause", "nmi", 405),
        ("create boot shutdown", "shutdown", 405), ("create boot shutdown", "pause", 405),
    ],
)  # fmt: skip
def test_call_in_the_wrong_state_is_refused_and_changes_nothing(
    controller: Controller, prepare: str, call: str, status: int
) -> None:
    for word in prepare.split():
        if word == "create":
            controller.create(CONFIG)
        else:
            getattr(controller, word)()
    before = controller.info() if prepare else None
    assert refusal(getattr(controller, call))[0] == status
    assert (controller.info() if prepare else None) == before


def test_create_twice_is_a_conflict(controller: Controller) -> None:
    controller.create(CONFIG)
    assert refusal(lambda: controller.create(CONFIG))[0] == 409


def test_create_wrong_configuration_creates_nothing(controller: Controller) -> None:
    assert refusal(lambda: controller.create({"payload": {}})) == (400, "payload.kernel: is missing")
    assert refusal(controller.info)[0] == 404


def test_create_names_all_devices_and_keeps_the_callers_document(controller: Controller) -> None:
    given = json.loads(json.dumps(CONFIG))
    controller.create(given)
    assert given == CONFIG
    config = controller.info()["config"]
    assert config["disks"][0]["id"] == "_disk0"
    config["disks"].clear()
    assert controller.info()["config"]["disks"]


@pytest.mark.parametrize("where", ["make", "start"])
def test_boot_failure_leaves_no_machine_and_can_be_repeated(
    controller: Controller, machines: list[FakeMachine], where: str
) -> None:
    controller.create(CONFIG)
    FakeMachine.failing[where] = MachineError("no memory;\nfree some")
    status, message = refusal(controller.boot)
    assert (status, message.endswith(": no memory; free some")) == (500, True)
    assert state(controller) == "Created"
    assert all(machine.state == "stopped" for machine in machines)
    FakeMachine.failing.clear()
    controller.boot()
    assert state(controller) == "Running"


def test_boot_error_of_the_program_is_an_answer_too(controller: Controller) -> None:
    controller.create(CONFIG)
    FakeMachine.failing["start"] = KeyError("zork")
    assert refusal(controller.boot) == (
        500,
        "the virtual machine cannot be started: internal error: KeyError: 'zork'",
    )


def test_reboot_failure_leaves_it_shut_down(running: Controller) -> None:
    FakeMachine.failing["make"] = OSError(2, "No such file")
    assert refusal(running.reboot)[0] == 500
    assert state(running) == "Shutdown"


def test_pause_failure_leaves_it_running(running: Controller) -> None:
    FakeMachine.failing["pause"] = MachineError("stuck")
    assert refusal(running.pause) == (500, "the virtual machine cannot be paused: stuck")
    assert state(running) == "Running"


def test_info_counts_the_balloon_and_shows_devices(running: Controller) -> None:
    info = running.info()
    assert info["memory_actual_size"] == (512 << 20) - 4096
    assert info["device_tree"]["_disk0"]["pci_bdf"] == "0000:00:01.0"
    assert running.counters() == {"_disk0": {"read_bytes": 0, "write_bytes": 0}}


def test_info_says_where_a_pseudo_terminal_is(controller: Controller) -> None:
    controller.create(CONFIG | {"console": {"mode": "Pty"}})
    assert "file" not in controller.info()["config"]["console"]
    controller.boot()
    config = controller.info()["config"]
    assert config["console"]["file"] == "/dev/pts/console"
    controller.delete()
    controller.create(config)  # what was shown is a configuration


def test_buttons_reach_the_machine(running: Controller, machines: list[FakeMachine]) -> None:
    running.power_button()
    running.nmi()
    assert (machines[-1].buttons, machines[-1].nmis) == (1, 1)


# --- devices ----------------------------------------------------------------------------------------------------------
def test_add_device_running_gives_name_and_address(running: Controller, recorder: Recorder) -> None:
    assert running.add_device("disks", DISK.check({"path": "b"})) == {"id": "_disk1", "bdf": "0000:00:02.0"}
    assert [disk["path"] for disk in running.info()["config"]["disks"]] == ["a", "b"]
    assert ("vm", "device-added", {"id": "_disk1", "bdf": "0000:00:02.0"}) in recorder.events


def test_add_device_before_boot_is_in_the_machine(
    controller: Controller, machines: list[FakeMachine]
) -> None:
    controller.create(CONFIG)
    assert controller.add_device("net", NET.check({"id": "lan"})) is None
    controller.boot()
    assert "lan" in machines[-1].devices


def test_add_device_failure_leaves_the_configuration(running: Controller) -> None:
    FakeMachine.failing["add_disk"] = FileNotFoundError(2, "No such file or directory")
    assert refusal(lambda: running.add_device("disks", DISK.check({"path": "b"})))[0] == 500
    assert len(running.info()["config"]["disks"]) == 1


@pytest.mark.parametrize(
    ("kind", "device", "status", "message"),
    [
        (
            "disks",
            DISK.check({"path": "b", "id": "_disk0"}),
            409,
            "disks[1].id: '_disk0' is that of disks[0]",
        ),
        ("disks", DISK.check({"path": "b", "num_queues": 2}), 400, "disks[1].num_queues: 2 is more than"),
        ("net", NET.check({"id": "_disk0"}), 409, "net[0].id: '_disk0' is that of disks[0]"),
    ],
)
def test_add_device_that_cannot_be_is_refused(
    running: Controller, kind: str, device: dict[str, Any], status: int, message: str
) -> None:
    before = running.info()
    answer = refusal(lambda: running.add_device(kind, device))
    assert (answer[0], answer[1][: len(message)]) == (status, message)
    assert running.info() == before


def test_add_device_second_vsock_is_a_conflict(running: Controller) -> None:
    assert running.add_device("vsock", VSOCK.check({"cid": 3})) == {"id": "_vsock0", "bdf": "0000:00:02.0"}
    assert refusal(lambda: running.add_device("vsock", VSOCK.check({"cid": 4})))[0] == 409
    running.remove_device("_vsock0")
    assert running.add_device("vsock", VSOCK.check({"cid": 4}))


def test_add_device_more_than_there_is_room_for_is_refused(running: Controller) -> None:
    count = 0
    with pytest.raises(ControlError, match="there are more than 30 devices"):
        while count < 100:
            running.add_device("disks", DISK.check({"path": "b"}))
            count += 1
    assert count == 30 - 4  # rng, balloon, console, disk


def test_remove_device_is_gone_from_the_configuration(
    running: Controller, machines: list[FakeMachine]
) -> None:
    running.remove_device("_disk0")
    assert running.info()["config"]["disks"] == []
    assert not machines[-1].devices
    assert refusal(lambda: running.remove_device("_disk0"))[0] == 404


def test_name_of_a_device_is_taken_until_the_guest_has_let_it_go(
    running: Controller, machines: list[FakeMachine], recorder: Recorder
) -> None:
    FakeMachine.keeps_devices = True
    running.remove_device("_disk0")
    assert [disk["id"] for disk in running.info()["config"]["disks"]] == ["_disk0"]
    assert "_disk0" in running.info()["device_tree"]

    def add() -> object:
        return running.add_device("disks", DISK.check({"path": "b", "id": "_disk0"}))

    assert refusal(add)[0] == 409
    assert ("vm", "device-removed", {"id": "_disk0"}) not in recorder.events
    machines[-1].eject("_disk0")
    assert running.info()["config"]["disks"] == []
    assert recorder.events[-1] == ("vm", "device-removed", {"id": "_disk0"})
    assert add() == {"id": "_disk0", "bdf": "0000:00:01.0"}


def test_guest_that_never_lets_a_device_go_is_asked_again_and_has_none_after_a_reboot(
    running: Controller, machines: list[FakeMachine], recorder: Recorder
) -> None:
    FakeMachine.keeps_devices = True
    running.remove_device("_disk0")
    running.remove_device("_disk0")
    assert machines[-1].asked == ["_disk0", "_disk0"]
    running.reboot()
    assert running.info()["config"]["disks"] == [] and not machines[-1].devices
    assert recorder.events.count(("vm", "device-removed", {"id": "_disk0"})) == 1
    running.reboot()
    assert recorder.events.count(("vm", "device-removed", {"id": "_disk0"})) == 1


def test_device_that_the_guest_ejects_by_itself_is_gone(
    running: Controller, machines: list[FakeMachine], recorder: Recorder
) -> None:
    running.add_device("vsock", VSOCK.check({"cid": 3}))
    machines[-1].eject("_vsock0")
    waiter = threading.Thread(target=running.run)
    waiter.start()
    deadline = time.monotonic() + 20
    while recorder.events[-1] != ("vm", "device-removed", {"id": "_vsock0"}):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert "vsock" not in running.info()["config"]
    running.end(0)
    waiter.join(20)
    assert not waiter.is_alive()


def test_remove_device_that_stays_is_refused(running: Controller) -> None:
    assert refusal(lambda: running.remove_device("__rng")) == (400, "device '__rng' cannot be removed")


def test_remove_device_failure_leaves_it(running: Controller) -> None:
    FakeMachine.failing["remove_device"] = MachineError("no")
    assert refusal(lambda: running.remove_device("_disk0"))[0] == 500
    assert len(running.info()["config"]["disks"]) == 1


def test_resize_running_moves_the_balloon_only(running: Controller, machines: list[FakeMachine]) -> None:
    running.resize({"desired_balloon": 64 << 20, "desired_vcpus": 1, "desired_ram": 512 << 20})
    assert machines[-1].balloon == running.info()["config"]["balloon"]["size"] == 64 << 20
    for target in ({"desired_vcpus": 2}, {"desired_ram": 1 << 30}, {"desired_balloon": 1 << 30}):
        assert refusal(lambda target=target: running.resize(target))[0] == 400  # type: ignore[misc]
    assert machines[-1].balloon == 64 << 20


def test_resize_before_boot_changes_the_configuration(
    controller: Controller, machines: list[FakeMachine]
) -> None:
    controller.create(CONFIG)
    controller.resize({"desired_vcpus": 2, "desired_ram": 1 << 30})
    controller.boot()
    assert machines[-1].config["cpus"]["boot_vcpus"] == 2
    assert machines[-1].config["memory"]["size"] == 1 << 30


# --- snapshots --------------------------------------------------------------------------------------------------------
def test_snapshot_and_restore_give_the_same_virtual_machine(running: Controller, tmp_path: Path) -> None:
    assert refusal(lambda: running.snapshot(str(tmp_path / "s")))[0] == 405
    running.pause()
    running.snapshot(f"file://{tmp_path}/s")
    assert state(running) == "Paused"
    before = running.info()
    assert refusal(lambda: running.restore({"source_url": str(tmp_path / "s"), **RESTORE}))[0] == 409
    running.delete()
    running.restore({"source_url": f"file://{tmp_path}/s", **RESTORE})
    assert running.info() == before
    running.resume()
    assert state(running) == "Running"


def test_restore_can_resume_at_once(running: Controller, tmp_path: Path) -> None:
    running.pause()
    running.snapshot(str(tmp_path))
    running.delete()
    running.restore({"source_url": str(tmp_path), **RESTORE, "resume": True})
    assert state(running) == "Running"
    running.delete()
    FakeMachine.failing["resume"] = MachineError("no")
    assert (
        refusal(lambda: running.restore({"source_url": str(tmp_path), **RESTORE, "resume": True}))[0] == 500
    )
    assert refusal(running.info)[0] == 404


def test_snapshot_that_failed_is_none(running: Controller, tmp_path: Path) -> None:
    running.pause()
    FakeMachine.failing["snapshot"] = OSError(28, "No space left on device")
    assert refusal(lambda: running.snapshot(str(tmp_path / "s")))[0] == 500
    assert state(running) == "Paused"
    running.delete()
    status, message = refusal(lambda: running.restore({"source_url": str(tmp_path / "s"), **RESTORE}))
    assert status == 400
    assert "there is no snapshot in" in message


def test_snapshot_does_not_write_over_another(running: Controller, tmp_path: Path) -> None:
    running.pause()
    running.snapshot(str(tmp_path))
    assert refusal(lambda: running.snapshot(str(tmp_path)))[0] == 400


@pytest.mark.parametrize("url", ["tcp://10.0.0.1/x", "file://host/x", "http://x"])
def test_snapshot_other_url_is_refused(running: Controller, url: str) -> None:
    running.pause()
    assert refusal(lambda: running.snapshot(url)) == (400, f"'{url}' is no folder; write file:///path")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"payload": {}}', "\x00", '{"payload": {"kernel": "k"}, "x": 1}']
)
def test_restore_damaged_snapshot_is_refused(controller: Controller, tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    status, message = refusal(lambda: controller.restore({"source_url": str(tmp_path), **RESTORE}))
    assert (status, "is no configuration" in message) == (400, True)
    assert refusal(controller.info)[0] == 404


def test_restore_machine_that_fails_leaves_nothing(running: Controller, tmp_path: Path) -> None:
    running.pause()
    running.snapshot(str(tmp_path))
    running.delete()
    (tmp_path / "state").write_text("half")
    assert refusal(lambda: running.restore({"source_url": str(tmp_path), **RESTORE}))[0] == 500
    assert refusal(running.info)[0] == 404


# --- what the guest does ----------------------------------------------------------------------------------------------
def test_run_guest_that_shuts_down_ends_the_vmm(running: Controller, machines: list[FakeMachine]) -> None:
    machines[-1].report("shutdown", {})
    assert running.run() == 0
    assert machines[-1].state == "stopped"


def test_run_guest_that_reboots_gets_a_new_machine(running: Controller, machines: list[FakeMachine]) -> None:
    first = machines[-1]
    first.report("reboot", {})
    first.report("shutdown", {})  # of a machine that is gone by then
    thread = threading.Thread(target=running.run)
    thread.start()
    deadline = threading.Event()
    for _ in range(1000):
        if len(machines) == 2 and machines[-1].state == "running":
            break
        deadline.wait(0.01)
    assert first.state == "stopped"
    assert state(running) == "Running"
    running.vmm_shutdown()
    thread.join(10)
    assert not thread.is_alive()


def test_run_reboot_that_fails_ends_with_1(running: Controller, machines: list[FakeMachine]) -> None:
    FakeMachine.failing["make"] = MachineError("no memory")
    machines[-1].report("reboot", {})
    assert running.run() == 1
    assert running.failure == "the virtual machine cannot be made: no memory"


def test_run_machine_that_fails_ends_with_1(
    running: Controller, machines: list[FakeMachine], recorder: Recorder
) -> None:
    machines[-1].report("device-failed", {"id": "_disk0", "reason": "gone"})
    machines[-1].report("failed", {"reason": "a VP died"})
    assert running.run() == 1
    assert running.failure == "a VP died"
    assert ("virtio-device", "failed", {"id": "_disk0", "reason": "gone"}) in recorder.events
    assert ("vm", "failed", {"reason": "a VP died"}) in recorder.events


def test_run_vmm_that_stays_outlives_its_guest(machines: list[FakeMachine]) -> None:
    controller = Controller(FakeMachine, stays=True)
    controller.create(CONFIG)
    controller.boot()
    machines[-1].report("shutdown", {})
    controller.press()
    controller.end(143)
    thread = threading.Thread(target=controller.run)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert machines[-1].state == "stopped"
    controller.close()
    controller.press()  # too late, and no error


def test_run_signal_presses_the_button(running: Controller, machines: list[FakeMachine]) -> None:
    running.press()
    running.end(130)
    assert running.run() == 130
    assert machines[-1].buttons == 1


def test_report_panic_and_activation_go_to_the_monitor(
    running: Controller, machines: list[FakeMachine], recorder: Recorder
) -> None:
    machines[-1].report("panic", {"p0": "1"})
    machines[-1].report("activated", {"id": "_disk0"})
    machines[-1].report("reset", {"id": "_disk0"})
    assert recorder.events[-3:] == [
        ("guest", "panic", {"p0": "1"}),
        ("virtio-device", "activated", {"id": "_disk0"}),
        ("virtio-device", "reset", {"id": "_disk0"}),
    ]


def test_calls_of_many_threads_leave_a_sound_machine(
    controller: Controller, machines: list[FakeMachine]
) -> None:
    """The fake machine asserts that no call comes in a state that does not allow it."""
    errors: list[BaseException] = []

    def hammer(seed: int) -> None:
        calls: list[Callable[[], object]] = [
            lambda: controller.create(CONFIG), controller.boot, controller.pause, controller.resume, controller.reboot,
            controller.shutdown, controller.info, controller.counters, controller.power_button, controller.delete,
            lambda: controller.add_device("disks", DISK.check({"path": "x"})),
            lambda: controller.remove_device("_disk1"),
        ]  # fmt: skip
        for number in range(300):
            try:
                calls[(number * 7 + seed * (number // 5 + 1)) % len(calls)]()
            except ControlError as error:
                if "internal error" in str(error):
                    errors.append(error)
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    controller.delete()
    assert len([machine for machine in machines if machine.state != "stopped"]) == 0
