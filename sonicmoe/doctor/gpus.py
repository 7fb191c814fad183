"""What NVML (nvidia-ml-py) says about the driver and each GPU, as plain values. None stands for what a GPU does not report."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from sonicmoe.doctor.findings import UnavailableError, one_line


@dataclass(frozen=True)
class Holder:
    """A process with memory on a GPU; bytes is 0 where the driver does not say."""

    pid: int
    name: str
    bytes: int


@dataclass(frozen=True)
class Gpu:
    """One GPU. Memory in bytes; ``throttled`` holds the reasons; ``ecc`` counts uncorrected errors since the last reboot."""

    index: int
    uuid: str
    name: str
    capability: tuple[int, int]
    memory_total: int
    memory_used: int
    holders: tuple[Holder, ...]
    throttled: tuple[str, ...]
    ecc: int | None
    rows_pending: bool | None
    mig: bool | None
    pcie_generation: tuple[int, int] | None
    pcie_width: tuple[int, int] | None

    @property
    def label(self) -> str:
        return f"GPU {self.index} ({self.name})"


@dataclass(frozen=True)
class Driver:
    """The driver's version, the newest CUDA it runs (major, minor), the GPUs, and how many CUDA_VISIBLE_DEVICES hides."""

    version: str
    cuda: tuple[int, int]
    gpus: tuple[Gpu, ...]
    hidden: int


# Sw power cap is not among them: an H100 at full load runs into its power limit as a matter of course.
_THROTTLE = {
    "HwSlowdown": "hardware slowdown",
    "HwThermalSlowdown": "hardware thermal slowdown",
    "HwPowerBrakeSlowdown": "power brake",
    "SwThermalSlowdown": "thermal slowdown",
    "ApplicationsClocksSetting": "clocks set below the maximum by nvidia-smi -ac",
}


def read_driver(import_module: Callable[[str], ModuleType], environ: Mapping[str, str]) -> Driver:
    """All facts in one NVML session.

    Raises:
        UnavailableError: nvidia-ml-py or the driver is missing or broken.
    """
    try:
        nvml = import_module("pynvml")
    except Exception as error:
        raise UnavailableError(f"pynvml cannot be imported: {one_line(error)}", "python -m pip install nvidia-ml-py") from None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        remedy = "install an NVIDIA driver and see that nvidia-smi works; in a container start it with --gpus all"
        raise UnavailableError(f"NVML cannot be used: {one_line(error)}", remedy) from None
    try:
        version = nvml.nvmlSystemGetDriverVersion()
        cuda = nvml.nvmlSystemGetCudaDriverVersion_v2()
        gpus = [_read_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError as error:
        remedy = "see nvidia-smi and dmesg (Xid); a GPU that has fallen off the bus needs a reboot"
        raise UnavailableError(f"NVML stopped answering: {one_line(error)}", remedy) from None
    finally:
        nvml.nvmlShutdown()
    visible = _visible(gpus, environ.get("CUDA_VISIBLE_DEVICES"))
    return Driver(str(version), (cuda // 1000, cuda % 1000 // 10), tuple(visible), len(gpus) - len(visible))


def _visible(gpus: list[Gpu], setting: str | None) -> list[Gpu]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves; CUDA too ends the list at the first entry that names none."""
    if setting is None or setting.strip().startswith("MIG-"):
        return gpus
    visible = []
    for entry in map(str.strip, setting.split(",")):
        named = [gpu for gpu in gpus if entry == str(gpu.index) or (entry.startswith("GPU-") and gpu.uuid.startswith(entry))]
        if not named:
            break
        visible += named
    return visible


def _read_gpu(nvml: ModuleType, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)

    def ask(function: str, *args: Any) -> Any:
        """None where this GPU, driver or version of nvidia-ml-py does not answer the question."""
        try:
            return getattr(nvml, function)(handle, *args)
        except (nvml.NVMLError, AttributeError):
            return None

    # Version 2 counts the driver's own reserve (some 0.5 GiB) apart from what processes use.
    memory = ask("nvmlDeviceGetMemoryInfo", getattr(nvml, "nvmlMemory_v2", None)) or nvml.nvmlDeviceGetMemoryInfo(handle)
    reasons = ask("nvmlDeviceGetCurrentClocksEventReasons") or ask("nvmlDeviceGetCurrentClocksThrottleReasons") or 0
    mig = ask("nvmlDeviceGetMigMode")
    rows = ask("nvmlDeviceGetRemappedRows")
    ecc = None
    if hasattr(nvml, "NVML_MEMORY_ERROR_TYPE_UNCORRECTED"):
        ecc = ask("nvmlDeviceGetTotalEccErrors", nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC)
    generation = ask("nvmlDeviceGetCurrPcieLinkGeneration"), ask("nvmlDeviceGetMaxPcieLinkGeneration")
    width = ask("nvmlDeviceGetCurrPcieLinkWidth"), ask("nvmlDeviceGetMaxPcieLinkWidth")
    return Gpu(
        index=index,
        uuid=str(nvml.nvmlDeviceGetUUID(handle)),
        name=str(nvml.nvmlDeviceGetName(handle)),
        capability=tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)),
        memory_total=memory.total,
        memory_used=memory.used,
        holders=_holders(nvml, ask),
        throttled=tuple(text for name, text in _THROTTLE.items() if reasons & _reason(nvml, name)),
        ecc=ecc,
        rows_pending=None if rows is None else bool(rows[2]),
        mig=None if mig is None else bool(mig[0]),
        pcie_generation=None if None in generation else generation,
        pcie_width=None if None in width else width,
    )


def _reason(nvml: ModuleType, name: str) -> int:
    return getattr(nvml, f"nvmlClocksEventReason{name}", 0) or getattr(nvml, f"nvmlClocksThrottleReason{name}", 0)


def _holders(nvml: ModuleType, ask: Callable[..., Any]) -> tuple[Holder, ...]:
    found: dict[int, Holder] = {}
    for kind in ("Compute", "Graphics"):
        for process in ask(f"nvmlDeviceGet{kind}RunningProcesses") or ():
            try:
                name = str(nvml.nvmlSystemGetProcessName(process.pid))
            except nvml.NVMLError:
                name = ""
            found[process.pid] = Holder(process.pid, name, process.usedGpuMemory or 0)
    return tuple(found[pid] for pid in sorted(found))
