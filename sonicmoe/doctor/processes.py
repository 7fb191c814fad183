"""Processes as /proc shows them: what they are called, whether they use a GPU, and who would start them again."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

_CONTAINER = re.compile(r"(?:docker|cri-containerd|crio|libpod)[-/]([0-9a-f]{12})[0-9a-f]{52}")
_UNIT = re.compile(r"([^/]+\.service)$")
_LOGIN_SERVICE = re.compile(r"user@\d+\.service")


@dataclass(frozen=True)
class Process:
    """A process, told apart from a later one with the same pid by the time at which it started (clock ticks since boot)."""

    pid: int
    started: int
    parent: int
    command: tuple[str, ...]

    @property
    def name(self) -> str:
        """The command line, cut to a length that fits a table."""
        text = " ".join(self.command)
        return text if len(text) <= 80 else text[:77] + "..."


@dataclass(frozen=True)
class Supervisor:
    """Who starts a process again when it is killed, and the command that stops it for good."""

    kind: str
    stop: str


def read_process(proc: Path, pid: int) -> Process | None:
    """The process, or None where it has ended or belongs to another pid namespace."""
    try:
        # The name in parentheses may hold spaces and parentheses of its own.
        head, _, rest = (proc / str(pid) / "stat").read_text().rpartition(")")
        command = tuple((proc / str(pid) / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0"))
    except OSError:
        return None
    fields = rest.split()
    if fields[0] in "ZX":
        return None
    return Process(pid, int(fields[19]), int(fields[1]), command if any(command) else (head.partition("(")[2],))


def holds_gpu(proc: Path, pid: int, gpu_nodes: str) -> bool:
    """Whether the process has a GPU's device file open. In a container NVML gives the host's pids, which here may be anybody's."""
    try:
        return any(os.readlink(link).startswith(gpu_nodes) for link in (proc / str(pid) / "fd").iterdir())
    except OSError:
        return False


def supervisor_of(proc: Path, pid: int) -> Supervisor | None:
    """The supervisord, systemd unit or container that would start the process again; None where none is known."""
    ancestor = read_process(proc, pid)
    while ancestor is not None and ancestor.parent > 0:
        ancestor = read_process(proc, ancestor.parent)
        if ancestor is not None and any(Path(word).name == "supervisord" for word in ancestor.command[:3]):
            program = _environment(proc, pid).get("SUPERVISOR_PROCESS_NAME")
            group = _environment(proc, pid).get("SUPERVISOR_GROUP_NAME", program)
            stop = f"supervisorctl stop {group}:{program}" if program else "supervisorctl status, then supervisorctl stop NAME"
            return Supervisor("supervisord", stop)
    group = _cgroup(proc, str(pid))
    container = _CONTAINER.search(group)
    if container and container[1] not in _cgroup(proc, "self"):
        if "kubepods" in group:
            return Supervisor("Kubernetes", f"scale down or delete the pod of container {container[1]} with kubectl")
        return Supervisor("a container", f"docker update --restart=no {container[1]} && docker stop {container[1]}")
    unit = _UNIT.search(group)
    if unit and not _LOGIN_SERVICE.fullmatch(unit[1]) and unit[1] not in _cgroup(proc, "self"):
        user = "--user " if _LOGIN_SERVICE.search(group) else ""
        return Supervisor("systemd", f"{'' if user else 'sudo '}systemctl {user}stop {unit[1]}")
    return None


def _cgroup(proc: Path, pid: str) -> str:
    """The longest control group path among a process's hierarchies (version 1 has several, version 2 one)."""
    try:
        lines = (proc / pid / "cgroup").read_text().splitlines()
    except OSError:
        return ""
    return max((line.split(":", 2)[2] for line in lines if line.count(":") >= 2), key=len, default="")


def _environment(proc: Path, pid: int) -> dict[str, str]:
    try:
        entries = (proc / str(pid) / "environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)
