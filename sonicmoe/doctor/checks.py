"""The checks, in the order in which they run. Each takes the Machine and yields Findings."""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata

from sonicmoe.doctor.disk import check_disk
from sonicmoe.doctor.findings import FAIL, OK, SKIPPED, WARN, Finding, UnavailableError, one_line
from sonicmoe.doctor.gpus import Driver, Gpu
from sonicmoe.doctor.machine import Machine
from sonicmoe.doctor.packages import check_packages
from sonicmoe.doctor.processes import read_process, supervisor_of

HELD_FAILS = 2**30
"""Bytes on one GPU. A bare CUDA context is half of it and a warning; more means a program that computes."""

_IMPORTS = {
    "torch": 'python -m pip install "torch>=2.11,<2.14"',
    "tvm_ffi": 'python -m pip install --force-reinstall "apache-tvm-ffi>=0.1.10,<0.2"',
    "numpy": 'python -m pip install --force-reinstall "numpy>=1.26"',
    "rich": 'python -m pip install --force-reinstall "rich>=13"',
    "cutlass": 'python -m pip install --force-reinstall "sonicmoe[compile]"',
}


def check_imports(machine: Machine) -> Iterator[Finding]:
    for module, remedy in _IMPORTS.items():
        answer = machine.ask(module)
        if "error" not in answer:
            yield Finding("imports", OK, f"{module} {answer['version']}")
        elif module == "cutlass" and answer.get("missing"):
            yield Finding("imports", SKIPPED, "nvidia-cutlass-dsl is not installed: only prebuilt kernels run", remedy)
        else:
            yield Finding("imports", FAIL, f"{module} cannot be imported: {one_line(answer['error'])}", remedy)


def check_gpu(machine: Machine) -> Iterator[Finding]:
    try:
        driver = machine.driver
    except UnavailableError as error:
        yield Finding("gpu", FAIL, str(error), error.remedy)
        return
    if not driver.gpus:
        if driver.hidden:
            setting = machine.environ.get("CUDA_VISIBLE_DEVICES", "")
            yield Finding("gpu", FAIL, f"CUDA_VISIBLE_DEVICES={setting!r} hides all {driver.hidden} GPUs", "unset CUDA_VISIBLE_DEVICES")
        else:
            yield Finding("gpu", FAIL, "the driver lists no GPU", "start the container with --gpus all, or rent a machine with a GPU")
    for gpu in driver.gpus:
        major, minor = gpu.capability
        if gpu.capability == (9, 0):
            yield Finding("gpu", OK, f"{gpu.label} is sm_90, {gpu.memory_total / 2**30:.0f} GiB")
        else:
            remedy = 'use an H100 or H200 (set CUDA_VISIBLE_DEVICES to it), or backend="reference"'
            yield Finding("gpu", FAIL, f"{gpu.label} is sm_{major}{minor}: the kernels need sm_90", remedy)


def check_versions(machine: Machine) -> Iterator[Finding]:
    """Within one CUDA major version newer libraries run on an older driver; across majors they do not."""
    driver = _driver(machine)
    if driver is None:
        yield Finding("versions", SKIPPED, "no driver to compare with")
        return
    newest = f"driver {driver.version} runs CUDA up to {driver.cuda[0]}.{driver.cuda[1]}"
    torch = machine.ask("torch")
    if "error" in torch:
        yield Finding("versions", SKIPPED, "torch cannot be imported, see imports")
    elif torch.get("cuda") is None:
        remedy = f'python -m pip install --force-reinstall "torch=={torch["version"].partition("+")[0]}"'
        yield Finding("versions", FAIL, f"torch {torch['version']} is built without CUDA", remedy)
    elif int(torch["cuda"].partition(".")[0]) > driver.cuda[0]:
        remedy = f"install a driver for CUDA {torch['cuda']}, or a torch built for CUDA {driver.cuda[0]} (pytorch.org/get-started)"
        yield Finding("versions", FAIL, f"torch {torch['version']} is built for CUDA {torch['cuda']}, but {newest}", remedy)
    else:
        yield Finding("versions", OK, f"torch {torch['version']} for CUDA {torch['cuda']}; {newest}")
    yield from _check_compiler(machine, driver, newest)


def _check_compiler(machine: Machine, driver: Driver, newest: str) -> Iterator[Finding]:
    search = {} if machine.metadata_path is None else {"path": machine.metadata_path}
    majors = [major for major in (12, 13) if any(metadata.distributions(name=f"nvidia-cutlass-dsl-libs-cu{major}", **search))]
    if not majors:
        return
    if max(majors) > driver.cuda[0]:
        remedy = f"python -m pip uninstall -y nvidia-cutlass-dsl-libs-cu{max(majors)}, or install a driver for CUDA {max(majors)}"
        message = f"the compiler's libraries are for CUDA {max(majors)}, but {newest}"
        yield Finding("versions", FAIL, message, remedy)
    else:
        yield Finding("versions", OK, f"the compiler's libraries are for CUDA {' and '.join(map(str, majors))}; {newest}")


def check_memory(machine: Machine) -> Iterator[Finding]:
    """Memory that others hold: it is missing here, and what they compute spoils every timing."""
    if not _gpus(machine):
        yield Finding("memory", SKIPPED, "no GPU is visible")
    for gpu in _gpus(machine):
        held = sum(holder.bytes for holder in gpu.holders)
        unseen = gpu.memory_used - held
        for holder in gpu.holders:
            process = read_process(machine.proc, holder.pid)
            name = process.name if process else holder.name or "of another container or user"
            message = f"{gpu.label}: {holder.bytes / 2**30:.1f} GiB held by pid {holder.pid} ({name})"
            supervisor = supervisor_of(machine.proc, holder.pid) if process else None
            if supervisor:
                message += f", which {supervisor.kind} starts again when it is killed"
            remedy = supervisor.stop if supervisor else "sonicmoe doctor --free-gpu shows what it would stop, and asks"
            if process is None:
                remedy = f"on the host, ask the owner of pid {holder.pid} to stop it"
            yield Finding("memory", FAIL if holder.bytes >= HELD_FAILS or not holder.bytes else WARN, message, remedy)
        if unseen >= HELD_FAILS:
            remedy = "run nvidia-smi on the host: its processes are not visible from this container"
            yield Finding("memory", FAIL, f"{gpu.label}: {unseen / 2**30:.1f} GiB held by processes that NVML does not list here", remedy)
        elif not gpu.holders:
            yield Finding("memory", OK, f"{gpu.label}: no other process holds memory")


def check_health(machine: Machine) -> Iterator[Finding]:
    """Throttled clocks, ECC errors, MIG, and a PCIe link below what the GPU can do."""
    if not _gpus(machine):
        yield Finding("health", SKIPPED, "no GPU is visible")
    for gpu in _gpus(machine):
        found = list(_health(gpu))
        yield from found or [Finding("health", OK, f"{gpu.label}: clocks, ECC, MIG and PCIe link as they should be")]


def _health(gpu: Gpu) -> Iterator[Finding]:
    if gpu.throttled:
        remedy = "look at nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER; sudo nvidia-smi -rac resets set clocks; else change the machine"
        yield Finding("health", WARN, f"{gpu.label}: clocks are held down: {', '.join(gpu.throttled)}", remedy)
    if gpu.ecc:
        message = f"{gpu.label}: {gpu.ecc} uncorrected ECC errors since the last reboot"
        yield Finding("health", WARN, message, "reset the GPU, and replace it if they return")
    if gpu.rows_pending:
        yield Finding("health", WARN, f"{gpu.label}: faulty memory rows wait to be replaced", "reset the GPU or reboot the machine")
    if gpu.mig:
        yield Finding("health", WARN, f"{gpu.label}: MIG mode is on, a process sees a slice", f"sudo nvidia-smi -i {gpu.index} -mig 0")
    if gpu.pcie_width and gpu.pcie_width[0] < gpu.pcie_width[1]:
        message = f"{gpu.label}: PCIe runs {gpu.pcie_width[0]} of {gpu.pcie_width[1]} lanes"
        yield Finding("health", WARN, message, "reseat the card or change the machine: copies from the host take as much longer")
    if gpu.pcie_generation and gpu.pcie_generation[0] < gpu.pcie_generation[1]:
        message = f"{gpu.label}: PCIe generation {gpu.pcie_generation[0]} of {gpu.pcie_generation[1]}"
        yield Finding("health", WARN, message, "look again under load, an idle link slows down; if it stays, check the slot and the BIOS")


def check_kernel(machine: Machine) -> Iterator[Finding]:
    """One tiny kernel: compiled where there is a compiler, and run against its expected values on an sm_90 GPU."""
    runs = any(gpu.capability == (9, 0) for gpu in _gpus(machine))
    yield from _compile_kernel(machine, runs=runs)
    if not runs:
        return
    answer = machine.ask("kernel")
    if "error" in answer:
        remedy = "mend what the checks above report, or read the log that the message names; then python -m sonicmoe doctor"
        yield Finding("kernel", FAIL, f"gather_sum: {one_line(answer['error'])}", remedy)
    else:
        yield Finding("kernel", OK, f"gather_sum on {answer['device']} gave its expected values")


def _compile_kernel(machine: Machine, *, runs: bool) -> Iterator[Finding]:
    """From the sources into a folder of its own, so that neither a prebuilt nor a cached kernel hides a broken compiler."""
    try:
        cute_runtime = machine.import_module("cute_runtime")
    except Exception as error:
        remedy = 'python -m pip install --force-reinstall "sonicmoe[compile]"'
        yield Finding("kernel", FAIL, f"cute_runtime cannot be imported: {one_line(error)}", remedy)
        return
    variant = cute_runtime.Variant("dispatch.kernels.gather_sum", {"dtype": "float32", "form": "uniform", "scored": True})
    try:
        with tempfile.TemporaryDirectory(prefix="sonicmoe-doctor.") as folder:
            cute_runtime.build(variant, folder)
    except cute_runtime.MissingToolError as error:
        alone = "prebuilt kernels only" if runs else "no sm_90 GPU to run a kernel either"
        yield Finding("kernel", SKIPPED, f"none can be compiled, {alone}: {error}")
    except Exception as error:
        remedy = "mend what packages and imports report; python -m cute_runtime build --package dispatch --out DIR keeps the log"
        yield Finding("kernel", FAIL, f"gather_sum does not compile: {one_line(error)}", remedy)
    else:
        yield Finding("kernel", OK, f"gather_sum compiles for sm_90a{'' if runs else '; not run, there is no sm_90 GPU'}")


def _driver(machine: Machine) -> Driver | None:
    try:
        return machine.driver
    except UnavailableError:
        return None  # check_gpu says so


def _gpus(machine: Machine) -> tuple[Gpu, ...]:
    driver = _driver(machine)
    return driver.gpus if driver else ()


CHECKS: dict[str, Callable[[Machine], Iterable[Finding]]] = {
    "disk": check_disk,
    "packages": check_packages,
    "imports": check_imports,
    "gpu": check_gpu,
    "versions": check_versions,
    "memory": check_memory,
    "health": check_health,
    "kernel": check_kernel,
}
"""Registry: name -> check."""


def run_checks(machine: Machine, *, on_check: Callable[[str], None] = lambda name: None) -> list[Finding]:
    """Run all checks. One that breaks is itself a failure and does not keep the others from running."""
    findings = []
    for name, check in CHECKS.items():
        on_check(name)
        try:
            findings += check(machine)
        except Exception as error:
            remedy = "please report this with the output of sonicmoe doctor --json"
            findings.append(Finding(name, FAIL, f"the check itself broke: {type(error).__name__}: {one_line(error)}", remedy))
    return findings
