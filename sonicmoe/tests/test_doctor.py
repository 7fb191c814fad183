"""The doctor on fabricated machines: an NVML of our making, real dist-info folders, a /proc of files, and real processes of our own."""

import argparse
import importlib
import json
import os
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest

from sonicmoe import cli
from sonicmoe.commands import doctor
from sonicmoe.doctor import checks, disk, machine, packages
from sonicmoe.doctor.findings import Finding, exit_code
from sonicmoe.doctor.machine import Machine
from sonicmoe.doctor.processes import read_process, supervisor_of

GIB = 2**30
HEALTHY = {"version": "2.11.0", "cuda": "12.8"}


class NVMLError(Exception):
    pass


def nvml(*, init=None, capability=(9, 0), holders=(), used=None, cuda=12080, **answers):
    """A pynvml of one GPU. Questions that are not answered raise NVMLError, as on a GPU that does not support them."""

    def unsupported(*_):
        raise NVMLError("Not Supported")

    def initialise():
        if init:
            raise NVMLError(init)

    memory = types.SimpleNamespace(total=80 * GIB, used=sum(size for _, size in holders) if used is None else used)
    module = types.SimpleNamespace(
        NVMLError=NVMLError,
        NVML_MEMORY_ERROR_TYPE_UNCORRECTED=1,
        NVML_VOLATILE_ECC=0,
        nvmlClocksEventReasonHwThermalSlowdown=0x40,
        nvmlClocksEventReasonSwPowerCap=0x4,
        nvmlInit=initialise,
        nvmlShutdown=lambda: None,
        nvmlSystemGetDriverVersion=lambda: "570.1",
        nvmlSystemGetCudaDriverVersion_v2=lambda: cuda,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUUID=lambda handle: "GPU-1234",
        nvmlDeviceGetName=lambda handle: "H100",
        nvmlDeviceGetCudaComputeCapability=lambda handle: capability,
        nvmlDeviceGetMemoryInfo=lambda handle, version=None: memory,
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [types.SimpleNamespace(pid=p, usedGpuMemory=size) for p, size in holders],
        nvmlSystemGetProcessName=unsupported,
    )
    for name, value in answers.items():
        setattr(module, f"nvmlDeviceGet{name}", lambda *_, value=value: value)
    return module


class MissingToolError(Exception):
    pass


def compiler(failure=None):
    """A cute_runtime whose compile step ends in this way."""

    def build(variant, folder):
        if failure:
            raise failure

    return types.SimpleNamespace(Variant=lambda kernel, params: kernel, MissingToolError=MissingToolError, build=build)


def fabricate(tmp_path, module=None, *, probes=None, environ=None, free_gib=1000, failure=None, **more):
    def import_module(name):
        if name == "cute_runtime":
            return compiler(failure)
        if name == "pynvml":
            if module is None:
                raise ModuleNotFoundError("No module named 'pynvml'", name=name)
            return module
        return importlib.import_module(name)

    answers = {"torch": HEALTHY, "kernel": {"device": "H100"}, **(probes or {})}
    defaults = {
        "metadata_path": [str(tmp_path)],
        "site_packages": tmp_path,
        "proc": tmp_path / "proc",
        "disk_usage": lambda _: (0, 0, int(free_gib * GIB)),
    }
    return Machine(
        import_module=import_module,
        probe=lambda name: answers.get(name, {"version": "1.0"}),
        environ={"HOME": str(tmp_path), "TMPDIR": str(tmp_path), **(environ or {})},
        **{**defaults, **more},
    )


def install(tmp_path, name, version, *requires):
    folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {one}" for one in requires)]
    (folder / "METADATA").write_text("\n".join(lines) + "\n")


def add_process(proc, pid, *, parent=1, command=("python", "serve.py"), cgroup="0::/", environ="", started=100):
    folder = proc / str(pid)
    (folder / "fd").mkdir(parents=True)
    (folder / "stat").write_text(f"{pid} (a) name) S {parent} " + "0 " * 17 + f"{started} 0\n")
    (folder / "cmdline").write_bytes("\0".join(command).encode() + b"\0")
    (folder / "cgroup").write_text(cgroup + "\n")
    (folder / "environ").write_text(environ)


def failing(findings):
    return [one for one in findings if one.status == "fail"]


def test_exit_code_is_1_for_failures_and_2_for_warnings_only_when_strict():
    warned = [Finding("a", "ok", ""), Finding("b", "warn", "", "x"), Finding("c", "skipped", "")]
    assert (exit_code(warned, strict=False), exit_code(warned, strict=True)) == (0, 2)
    assert exit_code([*warned, Finding("d", "fail", "", "x")], strict=True) == 1


def test_every_finding_that_needs_action_names_it_in_one_line(tmp_path):
    install(tmp_path, "sonicmoe", "0.1.0", "torch>=2.11,<2.14")
    broken = {
        name: {"error": "ImportError: libfoo\nlibcudart.so: cannot open"}
        for name in ("torch", "tvm_ffi", "numpy", "rich", "cutlass", "kernel")
    }
    sick = nvml(capability=(8, 0), holders=[(7, 2 * GIB)], CurrentClocksEventReasons=0x44, TotalEccErrors=3, MigMode=(1, 1))
    for module in (None, nvml(init="Driver Not Loaded"), sick):
        findings = checks.run_checks(fabricate(tmp_path, module, probes=broken, free_gib=1))
        for one in findings:
            assert "\n" not in one.message + one.remedy
            assert bool(one.remedy) or one.status in ("ok", "skipped"), one
        assert {one.name for one in findings} == set(checks.CHECKS)
        assert {"disk", "packages", "imports", "gpu"} <= {one.name for one in failing(findings)}
        assert not [one for one in findings if "the check itself broke" in one.message]


def test_healthy_gpu_passes_and_power_cap_is_no_throttling(tmp_path):
    module = nvml(CurrentClocksEventReasons=0x4, TotalEccErrors=0, MigMode=(0, 0), CurrPcieLinkWidth=16, MaxPcieLinkWidth=16)
    one = fabricate(tmp_path, module)
    for check in (checks.check_gpu, checks.check_versions, checks.check_memory, checks.check_health):
        assert [finding.status for finding in check(one)] == ["ok"]
    assert [finding.status for finding in checks.check_kernel(one)] == ["ok", "ok"]


def test_health_findings_are_warnings(tmp_path):
    module = nvml(
        CurrentClocksEventReasons=0x40, TotalEccErrors=3, MigMode=(1, 1), RemappedRows=(0, 1, 1, 0),
        CurrPcieLinkWidth=8, MaxPcieLinkWidth=16, CurrPcieLinkGeneration=3, MaxPcieLinkGeneration=5,
    )  # fmt: skip
    findings = list(checks.check_health(fabricate(tmp_path, module)))
    assert {one.status for one in findings} == {"warn"}
    text = " ".join(one.message for one in findings)
    for part in ("thermal", "3 uncorrected ECC", "rows wait", "MIG", "8 of 16 lanes", "generation 3 of 5"):
        assert part in text


def test_gpu_hidden_or_of_another_architecture_fails(tmp_path):
    (hidden,) = checks.check_gpu(fabricate(tmp_path, nvml(), environ={"CUDA_VISIBLE_DEVICES": ""}))
    assert (hidden.status, hidden.remedy) == ("fail", "unset CUDA_VISIBLE_DEVICES")
    (old,) = checks.check_gpu(fabricate(tmp_path, nvml(capability=(8, 0)), environ={"CUDA_VISIBLE_DEVICES": "GPU-12"}))
    assert old.status == "fail"
    assert "sm_80" in old.message


@pytest.mark.parametrize(("cuda", "status"), [("12.9", "ok"), ("13.0", "fail"), (None, "fail")])
def test_torch_must_be_of_a_cuda_major_that_the_driver_runs(tmp_path, cuda, status):
    (found,) = checks.check_versions(fabricate(tmp_path, nvml(cuda=12040), probes={"torch": {"version": "2.11.0", "cuda": cuda}}))
    assert found.status == status


def test_compiler_libraries_newer_than_the_driver_fail(tmp_path):
    install(tmp_path, "nvidia-cutlass-dsl-libs-cu13", "4.8.1")
    found = failing(checks.check_versions(fabricate(tmp_path, nvml(cuda=12080))))
    assert "nvidia-cutlass-dsl-libs-cu13" in found[0].remedy


def test_holders_are_named_with_pid_size_and_supervisor(tmp_path):
    add_process(tmp_path / "proc", 7, cgroup="0::/system.slice/vllm.service")
    module = nvml(holders=[(7, 3 * GIB), (8, GIB // 2)])
    first, second = checks.check_memory(fabricate(tmp_path, module))
    assert first.status == "fail"
    assert "3.0 GiB held by pid 7 (python serve.py), which systemd starts again" in first.message
    assert first.remedy == "sudo systemctl stop vllm.service"
    assert second.status == "warn"
    named = nvml(holders=[(8, 3 * GIB)])
    named.nvmlSystemGetProcessName = lambda pid: "/opt/vllm/server"
    (foreign,) = checks.check_memory(fabricate(tmp_path, named))
    assert "3.0 GiB held by pid 8 (/opt/vllm/server)" in foreign.message
    assert foreign.remedy == "on the host, ask the owner of pid 8 to stop it"
    (unseen,) = checks.check_memory(fabricate(tmp_path, nvml(used=5 * GIB)))
    assert (unseen.status, "5.0 GiB held by processes that NVML does not list" in unseen.message) == ("fail", True)


CONTAINER = "0123456789ab" + "c" * 52


@pytest.mark.parametrize(
    ("cgroup", "stop"),
    [
        ("0::/system.slice/vllm.service", "sudo systemctl stop vllm.service"),
        ("0::/user.slice/user-1.slice/user@1.service/app.slice/a.service", "systemctl --user stop a.service"),
        (f"0::/system.slice/docker-{CONTAINER}.scope", "docker update --restart=no 0123456789ab && docker stop 0123456789ab"),
        (f"4:memory:/docker/{CONTAINER}\n0::/", "docker update --restart=no 0123456789ab && docker stop 0123456789ab"),
        ("0::/user.slice/user-1.slice/session-3.scope", None),
        ("0::/user.slice/user-1.slice/user@1.service", None),
    ],
)
def test_supervisor_is_read_from_the_control_group(tmp_path, cgroup, stop):
    add_process(tmp_path, 7, cgroup=cgroup)
    found = supervisor_of(tmp_path, 7)
    assert (found.stop if found else None) == stop


def test_supervisord_is_found_among_the_parents(tmp_path):
    add_process(tmp_path, 3, command=("/usr/bin/python3", "/usr/bin/supervisord", "-n"))
    add_process(tmp_path, 5, parent=3, command=("sh", "run.sh"))
    add_process(tmp_path, 7, parent=5, environ="SUPERVISOR_PROCESS_NAME=llm\0SUPERVISOR_GROUP_NAME=serve\0")
    assert supervisor_of(tmp_path, 7).stop == "supervisorctl stop serve:llm"


def test_our_own_container_is_no_supervisor(tmp_path):
    add_process(tmp_path, 7, cgroup=f"0::/docker/{CONTAINER}")
    add_process(tmp_path, "self", cgroup=f"0::/docker/{CONTAINER}")
    assert supervisor_of(tmp_path, 7) is None


def test_disk_needs_on_one_file_system_add_up(tmp_path):
    one = fabricate(tmp_path)
    wanted = sum(need.gib for need in disk.needs(one))
    assert [finding.status for finding in disk.check_disk(fabricate(tmp_path, free_gib=wanted))] == ["ok"]
    (short,) = disk.check_disk(fabricate(tmp_path, free_gib=wanted - 0.5))
    assert short.status == "fail"
    assert "free 0.5 GiB" in short.remedy
    assert short.remedy.endswith("set SONICMOE_CACHE, PIP_CACHE_DIR, TMPDIR to folders and make the virtual environment on a larger disk")
    assert wanted > 16  # what a disk of 32 GB, half full with the image and the driver's libraries, does not have
    install(tmp_path, "torch", "2.11.0")
    assert sum(need.gib for need in disk.needs(one)) < wanted


def test_needs_on_two_file_systems_are_compared_with_each_ones_own_space(tmp_path, monkeypatch):
    small = tmp_path / "small"
    small.mkdir()
    stat = disk.Path.stat

    def two_devices(path, **options):
        return types.SimpleNamespace(st_mode=stat(path, **options).st_mode, st_dev=2 if path == small else 1)

    monkeypatch.setattr(disk.Path, "stat", two_devices)
    one = fabricate(tmp_path, environ={"TMPDIR": str(small)}, disk_usage=lambda path: (0, 0, (3 if path == small else 1000) * GIB))
    enough, short = sorted(disk.check_disk(one), key=lambda found: found.status != "ok")
    assert (enough.status, short.status) == ("ok", "fail")
    assert "3.0 GiB free, a full matrix needs 4 GiB (temporary files" in short.message
    assert short.remedy.endswith("or set TMPDIR to folders on a larger disk")


def test_folder_that_cannot_be_made_fails_with_its_variable(tmp_path):
    (tmp_path / "file").touch()
    found = failing(disk.check_disk(fabricate(tmp_path, environ={"SONICMOE_CACHE": str(tmp_path / "file" / "kernels")})))
    assert "SONICMOE_CACHE" in found[0].remedy


def test_demand_of_another_package_warns_with_the_exact_command(tmp_path):
    install(tmp_path, "sonicmoe", "0.1.0", 'nvidia-cutlass-dsl<4.9,>=4.7; extra == "compile"')
    install(tmp_path, "nvidia-cutlass-dsl", "4.8.1")
    install(tmp_path, "quack-kernels", "0.6.5", "nvidia-cutlass-dsl==4.7.0", 'torch; extra == "dev"', "not a requirement !")
    (found,) = packages.check_packages(fabricate(tmp_path))
    assert found.status == "warn"
    assert "quack-kernels 0.6.5 demands ==4.7.0" in found.message
    assert found.remedy == 'python -m pip install "nvidia-cutlass-dsl<4.9,==4.7.0,>=4.7"'


def test_demands_that_exclude_each_other_keep_ours(tmp_path):
    install(tmp_path, "sonicmoe", "0.1.0", "apache-tvm-ffi<0.2,>=0.1.10")
    install(tmp_path, "apache-tvm-ffi", "0.1.5")
    install(tmp_path, "flashinfer-python", "0.3", "apache-tvm-ffi==0.1.5")
    (found,) = packages.check_packages(fabricate(tmp_path))
    assert found.status == "fail"
    command = 'python -m pip uninstall -y flashinfer-python && python -m pip install "apache-tvm-ffi<0.2,>=0.1.10"'
    assert found.remedy.startswith(command)


def test_compiler_with_other_libraries_and_double_installs_fail(tmp_path):
    install(tmp_path, "sonicmoe", "0.1.0", "torch")
    install(tmp_path, "torch", "2.11.0")
    install(tmp_path, "torch", "2.12.0")
    install(tmp_path, "nvidia-cutlass-dsl", "4.8.1", "nvidia-cutlass-dsl-libs-base==4.8.1")
    install(tmp_path, "nvidia-cutlass-dsl-libs-base", "4.4.1")
    libraries, torch = failing(packages.check_packages(fabricate(tmp_path)))
    assert libraries.remedy == 'python -m pip install "nvidia-cutlass-dsl-libs-base==4.8.1"'
    assert "2 versions at once" in torch.message


def test_package_that_installs_into_our_folders_fails(tmp_path):
    """sonic-moe's package is called sonicmoe too."""
    install(tmp_path, "sonicmoe", "0.1.0", "torch")
    install(tmp_path, "torch", "2.11.0")
    install(tmp_path, "sonic-moe", "0.1.1")
    (tmp_path / "sonicmoe-0.1.0.dist-info" / "RECORD").write_text("sonicmoe/__init__.py,,\nrouting/config.py,,\n")
    (tmp_path / "sonic_moe-0.1.1.dist-info" / "RECORD").write_text("sonic_moe-0.1.1.dist-info/METADATA,,\nsonicmoe/__init__.py,,\n")
    (found,) = packages.check_packages(fabricate(tmp_path))
    assert found.status == "fail"
    assert found.message == "sonic-moe 0.1.1 installs its own files into sonicmoe/, as sonicmoe does"
    assert found.remedy == 'python -m pip uninstall -y sonic-moe && python -m pip install --force-reinstall --no-deps "sonicmoe"'


def test_wrong_kernel_values_fail(tmp_path):
    one = fabricate(tmp_path, nvml(), probes={"kernel": {"error": "wrong values: [0.0] for [1.0]"}})
    assert [(found.status, "wrong values" in found.message) for found in checks.check_kernel(one)] == [("ok", False), ("fail", True)]


def test_kernel_that_runs_prebuilt_does_not_hide_a_broken_compiler(tmp_path):
    found = list(checks.check_kernel(fabricate(tmp_path, nvml(), failure=RuntimeError("ptxas died"))))
    assert [(one.status, one.message) for one in found] == [
        ("fail", "gather_sum does not compile: ptxas died"),
        ("ok", "gather_sum on H100 gave its expected values"),
    ]
    skipped, _ = checks.check_kernel(fabricate(tmp_path, nvml(), failure=MissingToolError("no compiler")))
    assert (skipped.status, skipped.message) == ("skipped", "none can be compiled, prebuilt kernels only: no compiler")


@pytest.mark.parametrize(
    ("failure", "status"), [(None, "ok"), (MissingToolError("no compiler"), "skipped"), (RuntimeError("ptxas died"), "fail")]
)
def test_without_a_gpu_the_kernel_is_compiled_only(tmp_path, failure, status):
    (found,) = checks.check_kernel(fabricate(tmp_path, failure=failure))
    assert found.status == status
    assert str(failure or "not run, there is no sm_90 GPU") in found.message


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("raise ImportError('libcudart.so.13: cannot open')", "libcudart.so.13"),
        ("import os; os.kill(os.getpid(), 11)", "SIGSEGV"),
        ("import os; print('noise'); os._exit(3)", "exit code 3"),
    ],
)
def test_module_that_breaks_on_import_is_a_finding(tmp_path, monkeypatch, source, expected):
    (tmp_path / "brokenlib.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert expected in machine.run_probe("brokenlib")["error"]


def test_command_runs_without_torch_and_rich(tmp_path):
    """In a fresh process where both fail to import: the plain table, exit code 1, and torch never imported by the doctor itself."""
    for name in ("torch", "rich", "pynvml"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('broken on purpose')")
    script = """
        import sys
        from sonicmoe import cli
        from sonicmoe.doctor import checks, machine
        checks.CHECKS = {name: checks.CHECKS[name] for name in ("disk", "imports", "gpu")}
        checks._IMPORTS = {name: checks._IMPORTS[name] for name in ("torch", "rich")}
        code = cli.main(["doctor"])
        assert "torch" not in sys.modules
        sys.exit(code)
    """
    path = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("broken on purpose") == 3
    assert "fail     imports   torch cannot be imported" in done.stdout


def arguments(*argv):
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    return parser.parse_args(argv)


def test_json_has_the_findings_and_nothing_else_on_stdout(tmp_path, capsys):
    code = doctor.run(arguments("--json"), fabricate(tmp_path, nvml()))
    said = json.loads(capsys.readouterr().out)
    assert said["exit_code"] == code
    assert {one["name"] for one in said["findings"]} == set(checks.CHECKS)
    assert sum(said["counts"].values()) == len(said["findings"])


def test_yes_without_free_gpu_is_refused(capsys):
    assert cli.main(["doctor", "--yes"]) == 2
    assert capsys.readouterr().err == "sonicmoe doctor: --yes: must come with --free-gpu\n"


@pytest.fixture
def holder(tmp_path):
    """A real process of our own, which holds what counts as a GPU's device file."""
    node = tmp_path / "nvidia0"
    node.touch()
    script = f"import time; file = open({str(node)!r}); print('ready', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def real(tmp_path, pid, **more):
    defaults = {"proc": Path("/proc"), "gpu_nodes": str(tmp_path / "nvidia"), "sleep": lambda _: None}
    return fabricate(tmp_path, nvml(holders=[(pid, 2 * GIB)]), **{**defaults, **more})


def test_free_gpu_shows_and_stops_nothing_unasked(tmp_path, holder, capsys, monkeypatch):
    monkeypatch.setattr("sonicmoe.doctor.free_gpu.supervisor_of", lambda proc, pid: None)
    assert doctor.run(arguments("--free-gpu"), real(tmp_path, holder.pid)) == 1
    assert f"Would stop:\n  pid {holder.pid}, 2.0 GiB" in capsys.readouterr().out
    assert holder.poll() is None


def test_free_gpu_stops_with_yes(tmp_path, holder, capsys, monkeypatch):
    monkeypatch.setattr("sonicmoe.doctor.free_gpu.supervisor_of", lambda proc, pid: None)
    import time

    code = doctor.run(arguments("--free-gpu", "--yes"), real(tmp_path, holder.pid, sleep=lambda s: time.sleep(min(s, 0.1))))
    assert (code, holder.wait(5)) == (0, -15)
    assert f"Stopped pid {holder.pid}." in capsys.readouterr().out


def test_free_gpu_leaves_strangers_and_ourselves_alone(tmp_path, holder, capsys):
    def forbidden(pid, number):
        raise AssertionError(f"kill {pid}")

    stranger = real(tmp_path, holder.pid, gpu_nodes="/dev/no-such-node", kill=forbidden)
    with open(tmp_path / "nvidia0"):
        ourselves = real(tmp_path, os.getpid(), kill=forbidden)
        assert doctor.run(arguments("--free-gpu", "--yes"), stranger) == 1
        assert doctor.run(arguments("--free-gpu", "--yes"), ourselves) == 1
    out = capsys.readouterr().out
    assert "not a process of this container or user" in out
    assert "this command runs inside it" in out


@pytest.mark.parametrize(("answer", "stopped"), [("y", True), ("n", False), ("", False)])
def test_free_gpu_asks_at_a_terminal(tmp_path, holder, monkeypatch, answer, stopped):
    asked = []
    monkeypatch.setattr("sonicmoe.doctor.free_gpu.supervisor_of", lambda proc, pid: None)
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or answer)
    one = real(tmp_path, holder.pid, sleep=lambda s: holder.wait(5) if stopped else None)
    assert doctor.run(arguments("--free-gpu"), one) == (0 if stopped else 1)
    assert asked == ["Stop this process (SIGTERM, after 10 s SIGKILL)? [y/N] "]
    assert (holder.poll() is not None) == stopped


@pytest.mark.parametrize(
    ("cgroup", "advice"),
    [
        ("0::/user.slice/user-1.slice/session-3.scope", "find what started it: ps -o ppid,args -p 9, and stop that first"),
        ("0::/system.slice/vllm.service", "sudo systemctl stop vllm.service"),
        (f"0::/system.slice/docker-{CONTAINER}.scope", "docker update --restart=no 0123456789ab && docker stop 0123456789ab"),
    ],
)
def test_process_that_comes_back_is_called_supervised(tmp_path, capsys, cgroup, advice):
    proc = tmp_path / "proc"
    add_process(proc, 7)
    add_process(proc, 8, started=150)  # another rank of the same job, which was there before
    (proc / "7" / "fd" / "3").symlink_to("/dev/nvidia0")

    def kill(pid, number):
        (proc / "7").rename(tmp_path / "gone")
        add_process(proc, 9, started=200, cgroup=cgroup)

    one = fabricate(tmp_path, nvml(holders=[(7, GIB)]), kill=kill, sleep=lambda _: None)
    assert doctor.run(arguments("--free-gpu", "--yes"), one) == 1
    assert f"pid 7 came back as pid 9 (python serve.py): it is supervised; {advice}\n" in capsys.readouterr().out


def test_process_is_told_apart_from_a_later_one_with_its_pid():
    ours = read_process(Path("/proc"), os.getpid())
    assert ours.pid == os.getpid()
    assert ours.parent == os.getppid()
    assert ours.started > 0


@pytest.mark.gpu
def test_gpu_memory_held_by_a_real_process_is_reported():
    script = "import torch; x = torch.empty(2 << 30, dtype=torch.uint8, device='cuda'); print('ready', flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        found = failing(checks.check_memory(Machine()))
        assert any(f"pid {process.pid} " in one.message or "does not list here" in one.message for one in found), found
    finally:
        process.communicate("\n")


@pytest.mark.gpu
def test_gpu_runs_the_kernel_with_its_expected_values():
    compiled, ran = checks.check_kernel(Machine())
    assert compiled.status in ("ok", "skipped")
    assert (ran.status, "expected values" in ran.message) == ("ok", True)
