"""Kernels and the layer's operations by time, with what they achieve of their floors."""

import re
from collections import Counter
from dataclasses import dataclass

from sonicmoe.profiling import work
from sonicmoe.profiling.intervals import clip, length
from sonicmoe.profiling.steady import Steady
from sonicmoe.profiling.trace import GpuActivity, HostEvent, Trace
from sonicmoe.profiling.work import Peaks, Work

_WRAPPERS = ("Kernel", "Kernel2", "device_kernel")


@dataclass(frozen=True)
class Rate:
    """What known work comes to: TFLOPS where products bound it, GB/s where bytes do; and floor time / time, None on the host."""

    tflops: float | None
    gb_per_s: float | None
    of_floor: float | None


@dataclass(frozen=True)
class KernelRow:
    """All calls of one kernel within one operation. ``share`` is of all kernels' time; ``rate`` is None where the work is not known."""

    name: str
    full_name: str
    operation: str
    count: int
    total_us: float
    share: float
    rate: Rate | None

    @property
    def mean_us(self) -> float:
        return self.total_us / self.count


@dataclass(frozen=True)
class OperationRow:
    """All calls of one annotated operation: GPU time of the kernels, copies and memsets within, host time of the call itself."""

    name: str
    calls: int
    gpu_us: float
    host_us: float
    rate: Rate | None


def short_name(name: str) -> str:
    """A kernel's name without return type, namespaces, template arguments, parameters and what compilers append.

    ``void at::native::vectorized_elementwise_kernel<4, at::native::AddFunctor<float>>(int, ...)`` is ``vectorized_elementwise_kernel``.
    CuTe-DSL's are the function, or the class whose method it is; CUTLASS's the product that the wrapper is instantiated with.
    """
    if name.startswith("kernel_cutlass_"):
        if method := re.search(r"([A-Z][A-Za-z0-9]*)_object_at_", name):
            return method[1]
        return name.removeprefix("kernel_cutlass_").split("_tensorptr")[0].strip("_")
    plain = name.replace("(anonymous namespace)::", "").removeprefix("void ").removeprefix("static ")
    head, *rest = re.split(r"[<(]", plain, maxsplit=1)
    short = head.split("::")[-1].strip()
    if rest and short in _WRAPPERS:
        return re.split(r"[<(,>]", rest[0], maxsplit=1)[0].split("::")[-1].strip() or short
    return short or name


def rate_of(done: Work | None, seconds: float, peaks: Peaks | None) -> Rate | None:
    """What ``done`` in ``seconds`` comes to; without peaks, TFLOPS wherever there are FLOPs, and no floor."""
    if done is None or seconds <= 0 or not any(done):
        return None
    by_products = done.flops > 0 and (peaks is None or done.flops / peaks.flops_per_s >= done.bytes / peaks.bytes_per_s)
    return Rate(
        tflops=done.flops / seconds / 1e12 if by_products else None,
        gb_per_s=None if by_products else done.bytes / seconds / 1e9,
        of_floor=peaks.floor_s(done) / seconds if peaks else None,
    )


class _Caller:
    """What launched an activity: the range around the call, else the operator. ``key`` tells calls apart."""

    def __init__(self, trace: Trace, activity: GpuActivity) -> None:
        launch = trace.launch(activity)
        around = list(trace.threads[launch.thread].around(launch.begin)) if launch else []
        self.event: HostEvent | None = None
        self.name, self.work = "", None
        for event in around:
            if event.kind == "annotation" and (known := work.read_range(event.name)):
                self.event, (self.name, self.work) = event, known
                return
        operators = [event for event in around if event.kind == "operator"]
        for event in operators:
            if done := work.of_operator(event.name, event.details):
                self.event, self.name, self.work = event, event.name, done
                return
        if operators:
            self.event = operators[0]
            self.name = next((one.name for one in operators if one.name.startswith("sonicmoe")), self.event.name)


def caller_name(trace: Trace, activity: GpuActivity) -> str:
    """The operation or operator that launched an activity, empty where the trace does not say."""
    return _Caller(trace, activity).name


def kernel_table(trace: Trace, steady: Steady, peaks: Peaks) -> list[KernelRow]:
    """Kernels that begin in the steady state, by time. A kernel's work is known where it is the only one of its operation's call."""
    kernels = [one for one in trace.gpu if one.kind == "kernel" and steady.begin <= one.begin < steady.end]
    callers = {id(one): _Caller(trace, one) for one in kernels}
    kernels_of_call = Counter(callers[id(one)].event for one in kernels)
    groups: dict[tuple[str, str], list[GpuActivity]] = {}
    for one in kernels:
        groups.setdefault((one.name, callers[id(one)].name), []).append(one)
    total = sum(one.duration for one in kernels)
    rows = []
    for (name, operation), own in groups.items():
        time, done = sum(one.duration for one in own), Work(0, 0)
        for one in own:
            caller = callers[id(one)]
            if caller.work is None or kernels_of_call[caller.event] != 1:
                done = None
                break
            done = Work(done.flops + caller.work.flops, done.bytes + caller.work.bytes)
        share = time / total if total else 0.0
        rows.append(KernelRow(short_name(name), name, operation, len(own), time, share, rate_of(done, time * 1e-6, peaks)))
    return sorted(rows, key=lambda row: -row.total_us)


def operation_table(trace: Trace, steady: Steady | None, peaks: Peaks) -> list[OperationRow]:
    """The layer's annotated operations, by time; those called in the steady state's steps, or in all steps without a GPU.

    Without GPU activity the rates are the host's, and there are no floors.
    """
    gpu_time: dict[HostEvent, float] = {}
    for one in trace.gpu:
        if steady is None or steady.begin <= one.begin < steady.end:
            caller = _Caller(trace, one)
            if caller.event is not None and caller.event.kind == "annotation":
                gpu_time[caller.event] = gpu_time.get(caller.event, 0.0) + one.duration
    calls: dict[str, list[tuple[HostEvent, Work | None]]] = {}
    for event in trace.host_events():
        known = work.read_range(event.name) if event.kind == "annotation" else None
        if known and (steady is None or event in gpu_time):
            calls.setdefault(known[0], []).append((event, known[1]))
    rows = []
    for name, own in calls.items():
        gpu, host = sum(gpu_time.get(event, 0.0) for event, _ in own), sum(event.duration for event, _ in own)
        done = None
        if all(each is not None for _, each in own):
            done = Work(sum(each.flops for _, each in own), sum(each.bytes for _, each in own))
        rows.append(
            OperationRow(name, len(own), gpu, host, rate_of(done, gpu * 1e-6, peaks) if steady else rate_of(done, host * 1e-6, None))
        )
    return sorted(rows, key=lambda row: (-row.gpu_us, -row.host_us))


def kernel_time(trace: Trace, steady: Steady) -> float:
    """Microseconds of kernels within the steady state, added up over streams."""
    return length(clip(((one.begin, one.end) for one in trace.gpu if one.kind == "kernel"), steady.window))
