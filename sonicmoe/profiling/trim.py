"""A trace reduced to what the analysis reads, small enough for a repository and without the recording machine's names."""

import re
from typing import Any

from sonicmoe.profiling import trace
from sonicmoe.profiling.trace import HOST_KINDS

_DETAILS = ("correlation", "bytes", "device", "inDevice", "stream", "Input Dims", "Input type", "Call stack")
_TOP = ("schemaVersion", "displayTimeUnit")
_ABSOLUTE = re.compile(r"(?<![^\s;])(?:/[^/:;()\s]+)+/([^/:;()\s]+)")


def trim(content: dict[str, Any]) -> dict[str, Any]:
    """A smaller trace with the same tables; of gaps the Python function around them is lost.

    Kept are the events of the categories that are read, with the arguments that are read, in microseconds since the first; of
    Python functions only those around copies from pageable memory. Threads and processes are numbered anew, folders of
    absolute paths, host names and the recorder's environment are left out.
    """
    parsed = trace.parse(content)
    uploads = [
        (launch.thread, launch.begin)
        for one in parsed.gpu
        if one.kind == "memcpy" and "Pageable" in one.name and (launch := parsed.launch(one))
    ]
    frames = {
        (event.name, event.thread, event.begin)
        for thread, begin in uploads
        for event in parsed.threads[thread].around(begin)
        if event.kind == "python"
    }
    read = trace.read_events(content)
    base = trace.first_time(read)
    numbers: dict[Any, int] = {}
    kept = []
    for event in read:
        kind = str(event["cat"]).lower()
        begin = float(event["ts"]) - base
        if HOST_KINDS.get(kind) == "python" and (event["name"], trace.Thread(event["pid"], event["tid"]), begin) not in frames:
            continue
        kept.append(_reduced(event, kind, begin, numbers))
    names = [{"name": device.get("name", "")} for device in content.get("deviceProperties") or [] if isinstance(device, dict)]
    top = {key: content[key] for key in _TOP if key in content}
    return {**top, "deviceProperties": names, trace.METADATA: _plain(content.get(trace.METADATA) or {}), "traceEvents": kept}


def _reduced(event: dict[str, Any], kind: str, begin: float, numbers: dict[Any, int]) -> dict[str, Any]:
    routing = str(event["name"]).startswith("sonicmoe_routing::")  # whose work depends on a scalar
    details = {key: value for key, value in (event.get("args") or {}).items() if key in _DETAILS or (routing and key == "Concrete Inputs")}
    if "Call stack" in details:
        details["Call stack"] = _plain(details["Call stack"])
    place = {"pid": event["pid"], "tid": event["tid"]}
    if kind in HOST_KINDS:
        place = {key: numbers.setdefault((key, value), len(numbers) + 1) for key, value in place.items()}
    times = {"ts": round(begin, 3), "dur": round(float(event.get("dur", 0.0)), 3)}
    return {"ph": "X", "cat": event["cat"], "name": _plain(event["name"]), **place, **times, "args": details}


def _plain(value: Any) -> Any:
    """Absolute paths by their last part."""
    if isinstance(value, str):
        return _ABSOLUTE.sub(r"\1", value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
