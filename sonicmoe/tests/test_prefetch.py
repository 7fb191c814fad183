"""PrefetchLoader: the order of copies, buffers and events on a simulated device whose copies happen late, and structure and ends."""

import contextlib
import dataclasses
import gc
import threading
import time
import traceback
from collections import OrderedDict, namedtuple

import pytest
import torch

from sonicmoe.data import Pass, PrefetchLoader, map_tensors


class LateEvent:
    """An event that passes when somebody waits for it: until then no copy before it has read its source."""

    def __init__(self, backend, copies):
        self.backend, self.copies = backend, copies

    def synchronize(self):
        self.backend.host_waits.append(threading.current_thread())
        self.run()

    def run(self):
        with self.backend.lock:
            for target, source in self.copies:
                target.copy_(source)
            self.copies = []


class LateDevice:
    """A device that copies as late as its events allow, so that a staging buffer refilled too soon gives wrong values."""

    def __init__(self, pinned=()):
        self.lock = threading.Lock()
        self.pending, self.buffers, self.host_waits, self.received, self.begun = [], [], [], [], 0
        self.pinned = {tensor.data_ptr() for tensor in pinned}
        self.ahead = 0
        self.most_ahead = 0

    def producer(self):
        return contextlib.nullcontext()

    def staging(self, nbytes):
        self.buffers.append(torch.full((nbytes,), 255, dtype=torch.uint8))
        return self.buffers[-1]

    def begin_batch(self):
        self.begun += 1

    def needs_staging(self, tensor):
        return tensor.data_ptr() not in self.pinned

    def copy(self, tensor):
        target = torch.full_like(tensor, 77, memory_format=torch.contiguous_format)
        self.pending.append((target, tensor))
        return target

    def record(self):
        copies, self.pending = self.pending, []
        self.ahead += 1
        self.most_ahead = max(self.most_ahead, self.ahead)
        return LateEvent(self, copies)

    def receive(self, event, tensors):
        self.ahead -= 1
        event.run()
        self.received.append(tensors)


def no_prefetch_thread(within_s=5.0):
    deadline = time.monotonic() + within_s
    while any(thread.name == "sonicmoe-prefetch" for thread in threading.enumerate()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_every_batch_arrives_in_order_with_its_values(depth):
    batches = [torch.full((64,), float(index)) for index in range(12)]
    device = LateDevice()
    seen = list(Pass(batches, device, depth))
    assert [batch[0].item() for batch in seen] == list(range(12))
    assert all(torch.equal(one, other) for one, other in zip(seen, batches, strict=True))


def test_values_survive_an_iterable_that_refills_its_own_tensor():
    own = torch.empty(32)
    for device in (LateDevice(), LateDevice(pinned=[own])):
        seen = list(Pass((own.fill_(index) for index in range(9)), device, 3))
        assert [batch.unique().tolist() for batch in seen] == [[index] for index in range(9)]


def test_two_staging_buffers_serve_all_batches_of_one_size():
    device = LateDevice()
    assert len(list(Pass([torch.ones(1000)] * 20, device, 4))) == 20
    assert [buffer.numel() for buffer in device.buffers] == [4096, 4096]


def test_staging_buffers_grow_to_the_largest_batch_only():
    device = LateDevice()
    sizes = [10, 10, 1000, 1000, 500, 500, 1000]
    seen = list(Pass([torch.arange(size) for size in sizes], device, 2))
    assert [batch.numel() for batch in seen] == sizes
    assert all(torch.equal(batch, torch.arange(batch.numel())) for batch in seen)
    assert [buffer.numel() for buffer in device.buffers] == [256, 256, 8192, 8192]


def test_pinned_tensors_are_copied_without_staging():
    tensor = torch.arange(8)
    device = LateDevice(pinned=[tensor])
    assert [batch.tolist() for batch in Pass([tensor, tensor], device, 2)] == [list(range(8))] * 2
    assert device.buffers == []


def test_only_the_producer_waits_for_copies():
    device = LateDevice()
    list(Pass([torch.ones(8)] * 6, device, 2))
    assert device.host_waits
    assert threading.current_thread() not in device.host_waits


def test_consumer_becomes_a_user_of_every_tensor():
    device = LateDevice()
    seen = list(Pass([{"x": torch.ones(2), "y": [torch.zeros(3)]}] * 3, device, 2))
    assert [[id(tensor) for tensor in tensors] for tensors in device.received] == [[id(one["x"]), id(one["y"][0])] for one in seen]


@pytest.mark.parametrize("depth", [1, 3])
def test_no_more_than_depth_batches_are_ahead(depth):
    device = LateDevice()
    asked = []

    def source():
        for index in range(20):
            asked.append(index)
            yield torch.ones(1)

    batches = Pass(source(), device, depth)
    for taken in range(20):
        deadline = time.monotonic() + 5
        while len(asked) < min(20, taken + depth) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.005)
        assert len(asked) == min(20, taken + depth)
        next(batches)
    assert device.most_ahead == depth
    batches.close()


Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass(frozen=True)
class Sample:
    tokens: torch.Tensor
    name: str
    more: dict


def test_nested_structures_keep_their_types_and_other_values():
    marker = object()
    batch = Sample(
        torch.arange(3, dtype=torch.int64),
        "text",
        OrderedDict(pair=Pair(torch.tensor([True, False]), marker), items=[1, (torch.tensor(2.5, dtype=torch.bfloat16), None)]),
    )
    (seen,) = Pass([batch], LateDevice(), 1)
    assert type(seen) is Sample
    assert seen.name == "text"
    assert seen.tokens.tolist() == [0, 1, 2]
    assert type(seen.more) is OrderedDict
    assert type(seen.more["pair"]) is Pair
    assert seen.more["pair"].first.tolist() == [True, False]
    assert seen.more["pair"].second is marker
    assert seen.more["items"][0] == 1
    assert seen.more["items"][1][0].dtype == torch.bfloat16
    assert seen.more["items"][1][0].item() == 2.5
    assert seen.tokens is not batch.tokens
    assert batch.more["pair"].first.tolist() == [True, False]


def test_a_tensor_that_occurs_twice_is_copied_once():
    shared = torch.ones(4)
    (seen,) = Pass([(shared, [shared])], LateDevice(), 1)
    assert seen[0] is seen[1][0]


def test_empty_and_strided_tensors_arrive_whole():
    (seen,) = Pass([(torch.empty(0, 5), torch.arange(6).view(2, 3).T, torch.tensor(3.0, requires_grad=True))], LateDevice(), 1)
    assert seen[0].shape == (0, 5)
    assert seen[1].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert seen[2].item() == 3.0
    assert not seen[2].requires_grad


def test_exception_arrives_after_earlier_batches_with_its_traceback():
    def broken_source():
        yield torch.ones(1)
        raise KeyError("row 17")

    batches = Pass(broken_source(), LateDevice(), 4)
    next(batches)
    with pytest.raises(KeyError, match="row 17") as caught:
        next(batches)
    assert "broken_source" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert list(batches) == []
    assert no_prefetch_thread()


def test_end_leaves_no_thread_and_stays_the_end():
    batches = Pass([torch.ones(1)], LateDevice(), 2)
    assert len(list(batches)) == 1
    assert no_prefetch_thread(0.0)
    assert list(batches) == []


def test_early_exit_ends_the_thread_and_closes_the_iterable():
    closed = threading.Event()

    def endless():
        try:
            while True:
                yield torch.ones(1)
        finally:
            closed.set()

    for _ in Pass(endless(), LateDevice(), 2):
        break
    gc.collect()
    assert closed.wait(5)
    assert no_prefetch_thread()


def test_close_waits_for_the_thread():
    batches = Pass(iter(lambda: torch.ones(1), None), LateDevice(), 2)
    next(batches)
    batches.close()
    assert no_prefetch_thread(0.0)
    batches.close()
    assert list(batches) == []


def test_loader_closes_its_passes_and_can_be_iterated_again(monkeypatch):
    monkeypatch.setattr("sonicmoe.data.CudaBackend", lambda device: LateDevice())
    loader = PrefetchLoader([torch.ones(1)] * 8, "cuda:0", depth=2)
    with loader:
        first, second = iter(loader), iter(loader)
        next(first)
        next(second)
    assert no_prefetch_thread(0.0)
    assert list(first) == []
    assert len(loader) == 8
    assert [len(list(loader)) for _ in range(2)] == [8, 8]


def test_cpu_passes_batches_through_untouched_and_without_a_thread():
    batches = [{"x": torch.ones(2)}, object()]
    loader = PrefetchLoader(batches, "cpu")
    for _ in range(2):
        iterator = iter(loader)
        assert next(iterator) is batches[0]
        assert no_prefetch_thread(0.0)
        assert next(iterator) is batches[1]
    assert len(loader) == 2
    with loader:
        iterator = iter(loader)
        next(iterator)
    assert list(iterator) == []


def test_data_loader_is_taken_as_it_is():
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.arange(10)), batch_size=4)
    assert len(PrefetchLoader(data, "cpu")) == 3
    assert [batch[0].tolist() for batch in Pass(data, LateDevice(), 2)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"depth=0: must be at least 1"):
        PrefetchLoader([], "cpu", depth=0)
    with pytest.raises(ValueError, match=r"device='meta': must be cpu, cuda or cuda:N"):
        PrefetchLoader([], "meta")
    with pytest.raises(TypeError, match=r"batches=3: must be iterable"):
        PrefetchLoader(3, "cpu")
    with pytest.raises(TypeError, match=r"no len\(\)"):
        len(PrefetchLoader(iter([]), "cpu"))


def test_map_tensors_does_not_change_its_argument():
    batch = {"x": [torch.zeros(2)]}
    mapped = map_tensors(batch, lambda tensor: tensor + 1)
    assert mapped["x"][0].tolist() == [1, 1]
    assert batch["x"][0].tolist() == [0, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [False, True])
def test_gpu_values_are_right_while_the_step_is_slow_and_memory_is_reused(pinned):
    generator = torch.Generator().manual_seed(0)
    source = [torch.randn(1 << 20, generator=generator) for _ in range(12)]
    expected = [tensor.double().sum().item() for tensor in source]
    work = torch.randn(4096, 4096, device="cuda")
    sums = []
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for batch in PrefetchLoader([tensor.pin_memory() if pinned else tensor for tensor in source], depth=2):
            assert batch.is_cuda
            for _ in range(8):  # keeps the stream behind, so that a batch freed too early would be overwritten before it is read
                work = torch.tanh(work @ work)
            sums.append(batch.double().sum())
            del batch
    torch.cuda.synchronize()
    assert [value.item() for value in sums] == pytest.approx(expected, rel=1e-9, abs=1e-6)
    assert no_prefetch_thread(0.0)


@pytest.mark.gpu
def test_gpu_batches_made_on_the_gpu_are_ordered_behind_their_kernels():
    def source():
        for index in range(6):
            slow = torch.ones(2048, 2048, device="cuda")
            for _ in range(20):
                slow = slow @ slow / 2048
            yield slow * index

    with torch.cuda.stream(torch.cuda.Stream()):
        seen = [batch.mean() for batch in PrefetchLoader(source(), depth=3)]
    torch.cuda.synchronize()
    assert [value.item() for value in seen] == pytest.approx([0, 1, 2, 3, 4, 5])
