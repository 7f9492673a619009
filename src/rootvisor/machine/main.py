# SPDX-License-Identifier: Apache-2.0
"""Runs the machine that a run description asks for (docs/develop/run-description.md) and returns the exit status.

The main thread waits here for the end, the agent, signals and the deadline; VPs and devices have threads of their own.
"""

from __future__ import annotations

import os
import sys
from select import POLLIN, poll
from time import CLOCK_BOOTTIME, clock_gettime, monotonic

from ..boot.errors import BootError
from ..hypervisor.errors import HypervisorError
from ..hypervisor.hypervisor import Hypervisor
from ..kvm.errors import KvmError
from ..kvm.selftest import run_guest
from ..kvm.system import Kvm
from ..tlfs.hypercalls import SCHEDULER_HYPERVISOR, SCHEDULER_ROOT
from ..vfio.errors import VfioError
from .computer import Computer
from .console_wiring import Consoles
from .devices import Devices
from .kernel_arguments import kernel_command_line, wants_log
from .operator import Operator
from .outcome import STATUS_FAILURE, ending, exit_status, write_report
from .serial_input import SerialInput

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

VERSION = 1
#: How long the appliance may take to save a picture.
_PICTURE_MS = 20_000
#: A computing Python thread holds every exit back for this long (the default is 5 ms).
_SWITCH_INTERVAL_S = 1e-4
#: How often an unfinished line of the serial port is written, and writes that did not exit are looked for.
_FLUSH_MS = 250


def run(description: dict[str, Any]) -> int:
    """Runs until the partition ends; errors that the user can mend are one line on stderr and status 125."""
    if description.get("version") != VERSION:
        return _failed(f"this run description has version {description.get('version')}, not {VERSION}")
    try:
        while True:
            machine = Machine(description)
            try:
                status = machine.run()
            finally:
                machine.close()
            if machine.how != "reset" or description.get("on_reboot") != "restart":
                return status
    except (KvmError, HypervisorError, BootError, VfioError, OSError) as error:
        return _failed(str(error))


def _failed(text: str) -> int:
    sys.stderr.write(f"rootvisor: {text}\n")
    return STATUS_FAILURE


class Machine:
    """One run: built by the constructor, ended by :meth:`run`, taken apart by :meth:`close`."""

    def __init__(self, description: dict[str, Any]) -> None:
        self.description = description
        self.how = ""
        self._command_status: int | None = None
        self._agent_error = ""
        self._user_space_at = 0.0
        self._trace: Any = None
        self._log_file = -1
        self._computer: Computer | None = None
        self._devices: Devices | None = None
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        self._consoles = Consoles(description, self._open_log())
        #: with a foreign root and no virtio console, the serial port has the terminal
        self._on_serial = not (
            self._consoles.agent
            or "console" in description["devices"]
            or description["kernel"].get("multiboot")
        )
        self._serial_input: SerialInput | None = None
        tty = bool(description.get("tty")) and ("console" in description["devices"] or self._on_serial)
        self._operator = Operator(self._consoles, tty=tty)
        kvm = Kvm()
        scheduler = SCHEDULER_ROOT if description.get("scheduler") == "root" else SCHEDULER_HYPERVISOR
        self._hypervisor = Hypervisor(kvm, scheduler)
        try:
            self._build(kvm)
        except BaseException:
            self.close()
            raise

    def _open_log(self) -> int | None:
        target = self.description.get("console_log")
        if target is None:
            return 2 if self.description.get("verbose") else None
        if target == "stderr":
            return 2
        self._log_file = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        return self._log_file

    def _build(self, kvm: Kvm) -> None:
        description = self.description
        problem, xsave = run_guest(kvm)
        if problem:
            raise HypervisorError(
                f"this machine's KVM does not run ring-0 code: {problem}; use --engine appliance"
            )
        if not self._consoles.agent:
            serial_output: int | None = 1
        else:
            serial_output = self._consoles.log_pipe() if wants_log(description) else None
        self._computer = Computer(
            self._hypervisor,
            description["memory_bytes"],
            description["vps"],
            serial_output,
            guest=description.get("role") == "guest",
            hide=tuple(description.get("hide") or ()),
        )
        partition = self._computer.partition
        if self._on_serial:
            self._serial_input = SerialInput(self._consoles.terminal_input, self._computer.serial)
        self._hypervisor.child_timers = bool(description.get("child_timers"))
        if description.get("watch_deposits"):
            self._hypervisor.root.watch_deposits()
        if description.get("trace"):
            from ..trace.sink import open_sink

            self._trace = partition.trace = open_sink(description["trace"])
        partition.interrupts.report = self._message_refused
        self._devices = Devices(self._computer, description, self._consoles)
        kernel = description["kernel"]
        if kernel.get("multiboot"):
            self._computer.load_bare_metal(
                kernel["image"], description["initrds"], kernel_command_line(description), xsave
            )
            return
        self._computer.load(
            kernel.get("vmlinux") or kernel["image"],
            description["initrds"],
            kernel_command_line(description),
            xsave,
        )

    def _message_refused(self, device_id: int, address: int, data: int) -> None:
        if self._trace is not None:
            self._trace.event(
                "interrupt-refused", f"device {device_id:#x} address {address:#x} data {data:#x}"
            )

    # --- the run --------------------------------------------------------------------------------------------------
    def run(self) -> int:
        """Starts the VPs and waits for the end."""
        computer = self._computer
        assert computer is not None
        partition = computer.partition
        timeout = self.description.get("timeout_s")
        deadline = monotonic() + timeout if timeout else None
        waiting = poll()
        waiting.register(partition.ended_fd, POLLIN)
        consoles = self._consoles
        for fd in (consoles.control_read, consoles.log):
            if fd >= 0:
                waiting.register(fd, POLLIN)
        assigned = self._devices.assigned if self._devices is not None else None
        fault_fd = assigned.fault_fd if assigned is not None else -1
        if fault_fd >= 0:
            waiting.register(fault_fd, POLLIN)
        window = self._devices.console if self._devices is not None else None
        self._operator.begin(waiting, partition, computer.power, window, self._agent_ready)
        serial_input = self._serial_input
        if serial_input is not None:
            serial_input.attach(waiting)
        partition.start()
        while not partition.ended:
            limit: float = _FLUSH_MS
            if deadline is not None:
                limit = min(limit, (deadline - monotonic()) * 1000)
                if limit <= 0:
                    partition.end("timeout", f"after {timeout:g} s")
                    break
            try:
                ready = waiting.poll(limit)
            except InterruptedError:
                continue
            for fd, _events in ready:
                if fd == consoles.control_read:
                    consoles.read_control(self._agent_said)
                elif fd == consoles.log:
                    consoles.read_log()
                elif assigned is not None and fd == fault_fd:
                    assigned.report_faults()
                elif serial_input is None or not serial_input.handle(fd):
                    self._operator.handle(fd)
            computer.serial.flush()
            if serial_input is not None:
                serial_input.push()
            # A guest that writes and then stays quiet: nobody else would look at its coalesced writes.
            partition.vm.coalesced.drain(partition.ports.write, partition.mmio.write)
            self._hypervisor.statistics.tick()
        partition.stop()
        self._drain()
        return self._finish()

    def _drain(self) -> None:
        """Takes what devices still hold: output first, then the agent's last words."""
        if self._devices is not None:
            self._devices.close()
        consoles = self._consoles
        if consoles.control_read >= 0:
            os.set_blocking(consoles.control_read, False)
            while consoles.read_control(self._agent_said):
                pass
        if consoles.log >= 0:
            os.set_blocking(consoles.log, False)
            while consoles.read_log():
                pass

    def _agent_said(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word == "ready":
            self._user_space_at = _since_start()
            if self._trace is not None:
                self._trace.event("user-space", "first line")
        elif word == "exit":
            try:
                self._command_status = int(rest) & 0xFF
                self._take_picture()
            except ValueError:
                self._agent_error = f"unexpected words from the agent: {line}"
        elif word == "error":
            self._agent_error = rest

    def _take_picture(self) -> None:
        """Has the appliance save what the root's display shows; its devices are reset when the run ends."""
        port = self.description.get("screen_port")
        if port is None:
            return
        try:
            fd = os.open(_port_device(port), os.O_RDWR | os.O_CLOEXEC)
            try:
                os.write(fd, b"picture\n")
                waiting = poll()
                waiting.register(fd, POLLIN)
                answer = (
                    os.read(fd, 4096).decode("utf-8", "replace")
                    if waiting.poll(_PICTURE_MS)
                    else "error no answer"
                )
            finally:
                os.close(fd)
        except OSError as error:
            answer = f"error {error.strerror}"
        if answer.startswith("error"):
            sys.stderr.write(
                f"rootvisor: no picture of the display: {answer.removeprefix('error').strip()}\n"
            )

    def _agent_ready(self) -> bool:
        return self._consoles.agent and bool(self._user_space_at)

    def _finish(self) -> int:
        """Restores the terminal, says what the user should know, writes the report."""
        computer = self._computer
        assert computer is not None
        partition = computer.partition
        self.how = how = ending(partition.ended, self._agent_error, partition.crash_report)
        self._operator.end()
        if computer.debug_exit is not None and computer.debug_exit.status is not None:
            self._command_status = computer.debug_exit.status
        status = exit_status(how, self._command_status)
        self._explain(how)
        if self._trace is not None:
            self._trace.event("ended", f"{how} {partition.detail}")
            problem = self._trace.close()
            self._trace = None
            if problem:
                sys.stderr.write(f"rootvisor: {problem}\n")
        if self.description.get("report"):
            facts = {
                "ended": how,
                "detail": partition.detail,
                "status": status,
                "boot_to_userspace_s": round(self._user_space_at, 3) or None,
                "total_s": round(_since_start(), 3),
                "resident_kib": _resident_kib(),
            }
            write_report(self.description["report"], partition, facts)
        if partition.defect is not None:
            raise partition.defect
        return status

    def _explain(self, how: str) -> None:
        computer = self._computer
        assert computer is not None
        partition = computer.partition
        say = sys.stderr.write
        who = "the guest" if self.description.get("role") == "guest" else "the root partition"
        if how == "crash":
            say(f"rootvisor: {who} crashed; its report:\n")
            text = partition.crash_report or bytes(self._consoles.tail)
            say(text.decode("utf-8", "replace").rstrip("\0\n") + "\n")
            parameters = " ".join(f"P{n}={value:#x}" for n, value in enumerate(partition.crash_parameters))
            say(f"rootvisor: crash parameters {parameters}\n")
        elif how == "triple-fault":
            say(f"rootvisor: {who} stopped with a triple fault: {partition.detail}\n")
            self._show_tail()
        elif how == "timeout":
            what = "did not end" if self._user_space_at else "did not reach user space"
            say(f"rootvisor: {who} {what} in time ({partition.detail}); see --timeout and --verbose\n")
            self._show_tail()
        elif how == "reset" and self.description.get("on_reboot") != "restart":
            if self.description.get("verbose"):
                say(f"rootvisor: {who} was reset ({partition.detail})\n")
        elif how == "agent-error":
            say(f"rootvisor: {self._agent_error}\n")
        elif how == "host-error":
            say(f"rootvisor: {partition.detail}\n")

    def _show_tail(self) -> None:
        tail = bytes(self._consoles.tail).decode("utf-8", "replace").strip()
        if tail:
            sys.stderr.write(
                "rootvisor: the last lines of its console:\n" + "\n".join(tail.splitlines()[-20:]) + "\n"
            )

    def close(self) -> None:
        """Takes everything apart; safe after any part of the constructor."""
        self._operator.end()
        if self._devices is not None:
            self._devices.close()
        if self._trace is not None:
            self._trace.close()
        self._hypervisor.close()
        if self._computer is not None:
            self._computer.close()
        self._consoles.close()
        if self._log_file >= 0:
            os.close(self._log_file)
        self._operator.close()


def _port_device(name: str) -> str:
    """The device of the virtio port with this name: nobody in the appliance makes links for them."""
    folder = "/sys/class/virtio-ports"
    for entry in os.listdir(folder):
        try:
            with open(f"{folder}/{entry}/name", encoding="utf-8") as file:
                if file.read().strip() == name:
                    return f"/dev/{entry}"
        except OSError:
            continue
    raise FileNotFoundError(2, f"there is no port {name}")


def _since_start() -> float:
    """Seconds since this process was started (field 22 of /proc/self/stat, in clock ticks since boot)."""
    with open("/proc/self/stat", encoding="ascii") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return clock_gettime(CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _resident_kib() -> int:
    """Resident memory without shared memory: the guest's RAM and the server's shares do not count."""
    private = 0
    with open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith(("RssAnon:", "RssFile:")):
                private += int(line.split()[1])
    return private
