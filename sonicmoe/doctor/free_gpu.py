"""``sonicmoe doctor --free-gpu``: stops processes that hold GPU memory, after showing them and asking."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

from sonicmoe.doctor.machine import Machine
from sonicmoe.doctor.processes import Process, Supervisor, holds_gpu, read_process, supervisor_of

PATIENCE_S = 10
"""From SIGTERM to SIGKILL, and again for a process that comes back."""


@dataclass(frozen=True)
class Held:
    """A process with memory on a visible GPU; ``refusal`` says why it is not to be stopped from here, else it is empty."""

    pid: int
    gib: float
    process: Process | None
    supervisor: Supervisor | None
    refusal: str

    def __str__(self) -> str:
        text = f"pid {self.pid}, {self.gib:.1f} GiB: {self.process.name if self.process else 'not visible here'}"
        return f"{text} ({self.refusal})" if self.refusal else text


def find_held(machine: Machine) -> list[Held]:
    """All holders, each once with its memory on all visible GPUs. Ourselves and our parents are never to be stopped."""
    sizes: dict[int, int] = {}
    for gpu in machine.driver.gpus:
        for holder in gpu.holders:
            sizes[holder.pid] = sizes.get(holder.pid, 0) + holder.bytes
    family = _family(machine)
    found = []
    for pid, size in sizes.items():
        process = read_process(machine.proc, pid)
        supervisor = supervisor_of(machine.proc, pid) if process else None
        refusal = ""
        if process is None or not holds_gpu(machine.proc, pid, machine.gpu_nodes):
            refusal = "not a process of this container or user: stop it where it was started"
        elif pid in family:
            refusal = "this command runs inside it"
        elif supervisor:
            refusal = f"{supervisor.kind} would start it again: {supervisor.stop}"
        found.append(Held(pid, size / 2**30, process, supervisor, refusal))
    return found


def _family(machine: Machine) -> set[int]:
    """Our own pid and those of all our parents."""
    family, process = set(), read_process(machine.proc, os.getpid())
    while process is not None:
        family.add(process.pid)
        process = read_process(machine.proc, process.parent)
    return family


def free_gpu(machine: Machine, *, confirm: Callable[[int], bool], say: Callable[[str], None]) -> bool:
    """Stops what may be stopped once ``confirm(number of processes)`` is true; returns whether nothing holds memory any more."""
    held = find_held(machine)
    stoppable = [one for one in held if not one.refusal]
    if not held:
        say("No process holds GPU memory.")
        return True
    for title, group in (("Would stop:", stoppable), ("Would leave alone:", [one for one in held if one.refusal])):
        if group:
            say("\n".join([title, *(f"  {one}" for one in group)]))
    if not stoppable:
        return False
    if not confirm(len(stoppable)):
        say("Nothing was stopped.")
        return False
    before = _running(machine)
    stopped = [one for one in stoppable if _stop(machine, one.process, say)]
    came_back = _watch(machine, stopped, before)
    for old, new in came_back:
        supervisor = supervisor_of(machine.proc, new.pid)
        advice = supervisor.stop if supervisor else f"find what started it: ps -o ppid,args -p {new.pid}, and stop that first"
        say(f"pid {old.pid} came back as pid {new.pid} ({new.name}): it is supervised; {advice}")
    return len(stopped) == len(held) and not came_back


def _same(machine: Machine, process: Process) -> bool:
    """Whether the pid still is this process and not a later one."""
    now = read_process(machine.proc, process.pid)
    return now is not None and now.started == process.started


def _stop(machine: Machine, process: Process, say: Callable[[str], None]) -> bool:
    for number in (signal.SIGTERM, signal.SIGKILL):
        if not _same(machine, process):
            break
        try:
            machine.kill(process.pid, number)
        except ProcessLookupError:
            break
        except PermissionError:
            say(f"pid {process.pid} belongs to another user: sudo kill {process.pid}")
            return False
        for _ in range(PATIENCE_S * 10):
            if not _same(machine, process):
                break
            machine.sleep(0.1)
    if _same(machine, process):
        say(f"pid {process.pid} does not end: it waits in the kernel, reboot the machine")
        return False
    say(f"Stopped pid {process.pid}.")
    return True


def _running(machine: Machine) -> set[Process]:
    pids = [int(entry.name) for entry in machine.proc.iterdir() if entry.name.isdecimal()]
    return {process for pid in pids if (process := read_process(machine.proc, pid))}


def _watch(machine: Machine, stopped: list[Held], before: set[Process]) -> list[tuple[Process, Process]]:
    """(old, new) for each stopped process whose command line comes back. Ranks of one job share it, so those of ``before`` do not count."""
    waiting = [one.process for one in stopped]
    found = []
    for _ in range(PATIENCE_S if waiting else 0):
        for new in _running(machine) - before:
            old = next((one for one in waiting if one.command == new.command), None)
            if old:
                found.append((old, new))
                waiting.remove(old)
                before = {*before, new}
        if not waiting:
            break
        machine.sleep(1.0)
    return found
