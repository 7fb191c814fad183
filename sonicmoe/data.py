"""Input that arrives before the step asks for it: :class:`PrefetchLoader`.

A thread takes batches from any iterable, copies their tensors into pinned staging buffers and from there to the GPU on a stream of
its own, so that the step's stream never waits for the host and the host never waits for the step::

    iterable --next--> batch --memcpy--> staging slot --copy stream--> GPU tensors --queue--> the training loop
    [------------------------- producer thread ------------------------------]        [- consumer -]

Who may touch what, and when:

- Two staging slots take turns. The producer refills a slot after the event behind its last copy has passed; only the producer waits.
- The consumer's current stream waits for that event (no host wait), and each tensor is marked as used by it (``record_stream``),
  so that the allocator does not hand its memory to a later copy while kernels of the step still read it.
- At most ``depth`` batches are on the GPU and not yet taken.
"""

import contextlib
import copy
import dataclasses
import itertools
import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any, Protocol

import torch

_ALIGNMENT = 256
"""Bytes; what the CUDA allocators align to, so that every copy starts on a full transaction."""
_SLOTS = 2
"""While one slot's copy runs, the other is filled; a third only helps where batches differ much in size."""
_END = object()


class Backend(Protocol):
    """What the producer and the consumer ask of a device; :class:`CudaBackend` in earnest, a simulated one in the tests."""

    def producer(self) -> contextlib.AbstractContextManager:
        """Wraps the producer's whole life in its thread."""

    def staging(self, nbytes: int) -> torch.Tensor:
        """Host memory that the device copies from without the host's help: (nbytes,) uint8."""

    def begin_batch(self) -> None:
        """Called after the iterable gave a batch: copies begin after work that the producer's thread has already launched."""

    def needs_staging(self, tensor: torch.Tensor) -> bool:
        """Whether a copy straight from this tensor would hold up the host."""

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Starts the copy of a tensor to the device, which is done when the next :meth:`record`'s event has passed."""

    def record(self) -> Any:
        """An event behind all copies so far, with ``synchronize()`` for the host."""

    def receive(self, event: Any, tensors: list[torch.Tensor]) -> None:
        """In the consumer's thread: order its current stream behind the event and make it a user of the tensors."""


class CudaBackend:
    """Copies on a stream of its own to one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def producer(self) -> contextlib.AbstractContextManager:
        return torch.cuda.device(self._device)

    def staging(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def begin_batch(self) -> None:
        # A batch that the iterable made on the GPU is complete on the producer's current stream, not on ours.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def needs_staging(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cpu" and tensor.layout == torch.strided and not tensor.is_pinned()

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        with torch.cuda.stream(self._stream):
            return tensor.to(self._device, non_blocking=True)

    def record(self) -> torch.cuda.Event:
        return self._stream.record_event()

    def receive(self, event: torch.cuda.Event, tensors: list[torch.Tensor]) -> None:
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(event)
        for tensor in tensors:
            tensor.record_stream(stream)


class PrefetchLoader:
    """Batches of an iterable, on the device and ahead of time.

    Iterate over it as over the iterable; each ``iter()`` starts a pass of its own. Leaving a loop early, an exception in it and
    garbage collection end the pass and its thread; to be sure when, use the loader as a context manager, or call ``close()`` on it
    or on the iterator. On a CPU the batches are passed through as they are, without a thread.

    Tensors in tuples, lists, mappings, named tuples and dataclasses, nested in any way, are moved (without their gradient
    history, in contiguous layout); everything else is passed on. A tensor that occurs twice in a batch is copied once. Pinned
    tensors, such as those of ``DataLoader(pin_memory=True)``, are copied from where they are; then the next batch is asked for
    only when that copy is done, because an iterable may refill its own buffers.

    An exception in the iterable is raised in the loop, after the batches before it, with the iterable's traceback.

    Args:
        batches: any iterable, a torch DataLoader among them. It is iterated in another thread.
        device: "cuda", "cuda:N", "cpu" or a torch.device; None takes the current GPU where there is one.
        depth: batches that may wait on the device, at least 1.

    Raises:
        TypeError: batches is not iterable.
        ValueError: depth below 1, or a device that is neither a CUDA device nor the CPU.
    """

    def __init__(self, batches: Iterable, device: str | torch.device | None = None, *, depth: int = 2) -> None:
        if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
            raise TypeError(f"batches={batches!r}: must be iterable")
        if depth < 1:
            raise ValueError(f"depth={depth}: must be at least 1")
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(device)
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"device={str(device)!r}: must be cpu, cuda or cuda:N")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.batches = batches
        self.device = device
        self.depth = depth
        self._passes: weakref.WeakSet = weakref.WeakSet()

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator:
        if self.device.type == "cpu":
            iterator = (batch for batch in self.batches)
        else:
            iterator = Pass(self.batches, CudaBackend(self.device), self.depth)
        self._passes.add(iterator)
        return iterator

    def close(self) -> None:
        """End all passes that are under way and wait for their threads."""
        for iterator in list(self._passes):
            iterator.close()

    def __enter__(self) -> "PrefetchLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Pass:
    """One pass over the batches: an iterator with ``close()``. The thread knows nothing of this object, so that it can be collected."""

    def __init__(self, batches: Iterable, backend: Backend, depth: int) -> None:
        self._backend = backend
        self._channel = _Channel(depth)
        self._thread = threading.Thread(target=_produce, args=(batches, backend, self._channel), name="sonicmoe-prefetch", daemon=True)
        self._finalizer = weakref.finalize(self, _stop, self._channel, self._thread, 5.0)
        self._thread.start()

    def __iter__(self) -> "Pass":
        return self

    def __next__(self) -> Any:
        if not self._finalizer.alive:
            raise StopIteration
        item = self._channel.ready.get()
        if item is _END:
            self.close()
            raise StopIteration
        if isinstance(item, _Failure):
            self.close()
            raise item.error
        batch, tensors, event = item
        self._backend.receive(event, tensors)
        self._channel.permits.release()
        return batch

    def close(self) -> None:
        """End the pass; returns when its thread has ended, at the latest when the iterable gives its next batch."""
        if self._finalizer.detach():
            _stop(self._channel, self._thread, None)


@dataclasses.dataclass(frozen=True)
class _Failure:
    error: BaseException


class _Channel:
    """What the two threads share."""

    def __init__(self, depth: int) -> None:
        self.ready: queue.SimpleQueue = queue.SimpleQueue()
        self.permits = threading.Semaphore(depth)
        self.stopped = threading.Event()

    def may_produce(self) -> bool:
        """Waits until there is room for a batch; False when the consumer has left."""
        self.permits.acquire()
        return not self.stopped.is_set()


def _stop(channel: _Channel, thread: threading.Thread, timeout: float | None) -> None:
    channel.stopped.set()
    channel.permits.release()
    # The garbage collector may run in the producer itself, which cannot wait for its own end.
    if thread is not threading.current_thread():
        thread.join(timeout)


def _produce(batches: Iterable, backend: Backend, channel: _Channel) -> None:
    """The thread: fills the channel with (batch, tensors, event), then with the end or the failure."""
    try:
        with backend.producer(), torch.no_grad():
            _produce_all(batches, backend, channel)
        channel.ready.put(_END)
    except BaseException as error:
        channel.ready.put(_Failure(error))


def _produce_all(batches: Iterable, backend: Backend, channel: _Channel) -> None:
    slots = [_Slot(backend) for _ in range(_SLOTS)]
    iterator = iter(batches)
    try:
        for slot in itertools.cycle(slots):
            if not channel.may_produce():
                return
            try:
                batch = next(iterator)
            except StopIteration:
                return
            backend.begin_batch()
            channel.ready.put(slot.send(batch))
            slot.release_sources()
            del batch  # not kept while the next one is made
    finally:
        for slot in slots:  # the buffers must outlive the copies from them
            slot.wait()
        if close := getattr(iterator, "close", None):
            close()


class _Slot:
    """A staging buffer that grows to the largest batch, and the event behind the last copy from it."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._buffer: torch.Tensor | None = None
        self._event: Any = None
        self._reads_source = False

    def send(self, batch: Any) -> tuple[Any, list[torch.Tensor], Any]:
        """Start the copy of a batch; returns it on the device, its tensors, and the event that they are complete behind."""
        self.wait()
        tensors: dict[int, torch.Tensor] = {}
        map_tensors(batch, lambda tensor: tensors.setdefault(id(tensor), tensor))
        staged = {key: tensor for key, tensor in tensors.items() if self._backend.needs_staging(tensor)}
        self._reads_source = len(staged) < len(tensors)
        host = {**tensors, **self._fill(staged)}
        moved = {key: self._backend.copy(tensor) for key, tensor in host.items()}
        self._event = self._backend.record()
        return map_tensors(batch, lambda tensor: moved[id(tensor)]), list(moved.values()), self._event

    def release_sources(self) -> None:
        """Wait for copies that read the iterable's own tensors: it may refill them when it is asked for the next batch."""
        if self._reads_source:
            self.wait()

    def wait(self) -> None:
        """Wait for the last copy from this slot."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None

    def _fill(self, tensors: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """The tensors' values in the buffer, each at an aligned offset."""
        sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors.values()]
        offsets = [0, *itertools.accumulate(sizes)]
        if offsets[-1] and (self._buffer is None or self._buffer.numel() < offsets[-1]):
            self._buffer = None  # given back before the larger one is taken
            self._buffer = self._backend.staging(offsets[-1])
        staged = {}
        for (key, tensor), offset in zip(tensors.items(), offsets, strict=False):
            if tensor.numel() == 0:
                staged[key] = tensor.contiguous()
                continue
            view = self._buffer[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            staged[key] = view.copy_(tensor)
        return staged


def map_tensors(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same nested structure with ``function`` of each tensor; containers are new, other values the same objects."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, function) for item in value))
    if type(value) in (tuple, list):
        return type(value)(map_tensors(item, function) for item in value)
    if isinstance(value, MutableMapping):
        mapped = copy.copy(value)
        for key, item in value.items():
            mapped[key] = map_tensors(item, function)
        return mapped
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        mapped = copy.copy(value)
        for field in dataclasses.fields(value):
            # object.__setattr__ also reaches the fields of frozen dataclasses.
            object.__setattr__(mapped, field.name, map_tensors(getattr(value, field.name), function))
        return mapped
    return value
