"""Synthetic traces in the form that torch.profiler (Kineto) writes, event by event as recordings on GPUs have them; nothing was measured.

All times are microseconds since an arbitrary begin.
"""

from typing import Any

PID, MAIN, AUTOGRAD, LOADER = 4242, 4242, 4300, 4400
UP = "kernel_cutlass_kernel_sonicmoekernelsgrouped_gemmGroupedGemm_object_at__None_tensorptrbf16gmemalign16odiv8i64div81_0"
GATHER_SUM = "kernel_cutlass__gather_sum_kernel_tensorptrbf16gmemalign16odiv8i64div81_tensorptrf32_gmem_o_1_0"
"""Names that the compiler gives these kernels, cut."""
_BASE = 4715564346292.434
_MEMORY = {"HtoD": ("Pageable", "Device"), "DtoH": ("Device", "Pageable"), "DtoD": ("Device", "Device")}


class SyntheticTrace:
    """Collects events; ``content`` is the JSON object."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.metadata: dict[str, Any] = {}
        self._correlation = 0
        for name, args in (("process_name", {"name": "python"}), ("process_labels", {"labels": "CPU"})):
            self.events.append({"ph": "M", "name": name, "ts": _BASE, "pid": PID, "tid": 0, "args": args})

    @property
    def content(self) -> dict[str, Any]:
        closing = {"ph": "i", "s": "g", "name": "Record Window End", "pid": "", "tid": "", "ts": _BASE + 1e6}
        return {
            "schemaVersion": 1,
            "deviceProperties": [{"id": 0, "name": "NVIDIA H100 80GB HBM3", "totalGlobalMem": 85045084160}],
            "host_name": "build-17",
            "sonicmoe": self.metadata,
            "displayTimeUnit": "ms",
            "baseTimeNanoseconds": 1790857026000000000,
            "traceEvents": [*self.events, closing],
            "traceName": "/tmp/tmp7zrpq9m3.json",
        }

    def kernel(self, name: str, at: float, duration: float, *, stream: int = 7, **launch: Any) -> None:
        """A kernel, and the call that launched it: see `_launch`."""
        correlation = self._launch(launch, at, "cudaLaunchKernel")
        details = {"queued": 0, "device": 0, "context": 1, "stream": stream, "correlation": correlation, "registers per thread": 168}
        details |= {"grid": [132, 1, 1], "block": [384, 1, 1], "est. achieved occupancy %": 19}
        self._event("kernel", name, 0, stream, at, duration, details)
        self._flow(correlation, stream, at)

    def copy(self, kind: str, bytes_: int, at: float, duration: float, *, stream: int = 7, pinned: bool = False, **launch: Any) -> None:
        """A copy; from or to pageable memory unless pinned. The host's call of a pageable one lasts until its end, as it does."""
        if not pinned and kind != "DtoD":
            begin = launch.setdefault("launched", at - 5)
            launch.setdefault("lasting", at + duration + 2 - begin)
        correlation = self._launch(launch, at, "cudaMemcpyAsync")
        source, target = ("Pinned" if pinned and end == "Pageable" else end for end in _MEMORY[kind])
        details = {"device": 0, "context": 1, "stream": stream, "correlation": correlation, "bytes": bytes_}
        details["memory bandwidth (GB/s)"] = bytes_ / duration / 1e3
        self._event("gpu_memcpy", f"Memcpy {kind} ({source} -> {target})", 0, stream, at, duration, details)
        self._flow(correlation, stream, at)

    def memset(self, bytes_: int, at: float, duration: float, *, stream: int = 7, **launch: Any) -> None:
        correlation = self._launch(launch, at, "cudaMemsetAsync")
        details = {"device": 0, "context": 1, "stream": stream, "correlation": correlation, "bytes": bytes_}
        self._event("gpu_memset", "Memset (Device)", 0, stream, at, duration, details)

    def call(self, name: str, at: float, duration: float, *, thread: int = MAIN) -> int:
        """A call of the CUDA runtime; returns its correlation number."""
        self._correlation += 1
        self._event("cuda_runtime", name, PID, thread, at, duration, {"External id": 5, "cbid": 131, "correlation": self._correlation})
        return self._correlation

    def operator(self, name: str, at: float, duration: float, *, thread: int = MAIN, **details: Any) -> None:
        """A PyTorch operator, with the shapes and the call stack that ``details`` name."""
        names = {"dims": "Input Dims", "types": "Input type", "stack": "Call stack", "scalars": "Concrete Inputs"}
        self._event("cpu_op", name, PID, thread, at, duration, {"External id": 5, **{names[key]: value for key, value in details.items()}})

    def annotation(self, name: str, at: float, duration: float, *, thread: int = MAIN) -> None:
        """A range of record_function."""
        self._event("user_annotation", name, PID, thread, at, duration, {"External id": 5})

    def function(self, name: str, at: float, duration: float, *, thread: int = MAIN) -> None:
        """A Python function of ``with_stack``."""
        self._event("python_function", name, PID, thread, at, duration, {"Python id": 1, "Python thread": 0})

    def steps(self, *begins: float, end: float) -> None:
        """ProfilerStep marks that follow each other."""
        for number, (begin, until) in enumerate(zip(begins, [*begins[1:], end], strict=True)):
            self.annotation(f"ProfilerStep#{number + 3}", begin, until - begin)

    def _launch(self, launch: dict[str, Any], at: float, call: str) -> int | None:
        """``launched``: when the host's call begins (10 us before the activity), None for a trace without it; ``lasting``; ``thread``;
        ``correlation``: of a call that launched several activities, a CUDA graph's."""
        if "correlation" in launch:
            return launch["correlation"]
        begin = launch.get("launched", at - 10)
        if begin is None:
            return None
        return self.call(launch.get("call", call), begin, launch.get("lasting", 4), thread=launch.get("thread", MAIN))

    def _event(self, category: str, name: str, pid: int, tid: int, at: float, duration: float, args: dict[str, Any]) -> None:
        times = {"ts": round(_BASE + at, 3), "dur": duration}
        args = {key: value for key, value in args.items() if value is not None}
        self.events.append({"ph": "X", "cat": category, "name": name, "pid": pid, "tid": tid, **times, "args": args})

    def _flow(self, correlation: int | None, stream: int, at: float) -> None:
        if correlation is not None:
            self.events.append(
                {"ph": "f", "id": correlation, "pid": 0, "tid": stream, "ts": _BASE + at, "cat": "ac2g", "name": "ac2g", "bp": "e"}
            )


def training(steps: int = 3, *, gap: float = 0.0) -> SyntheticTrace:
    """A layer's steps of 1000 us, host 200 us ahead: a product of 600 us, a sum of 300 us and ``gap`` us less of it, a memset of 100 us."""
    made = SyntheticTrace()
    for step in range(steps):
        begin = 1000.0 * step + 500
        host = begin - 200
        made.annotation("sonicmoe::up_projection flops=420000000000 bytes=1000000000", host + 5, 20)
        made.kernel(UP, begin, 600, launched=host + 10)
        made.annotation("sonicmoe::gather_sum flops=0 bytes=600000000", host + 30, 20)
        made.kernel(GATHER_SUM, begin + 600, 300 - gap, launched=host + 35)
        made.operator("aten::zero_", host + 60, 15)
        made.memset(4_000_000, begin + 900, 100, launched=host + 65)
    made.steps(*(1000.0 * step + 295 for step in range(steps)), end=1000.0 * steps + 295)
    return made
