"""The router's product without a GPU: its kernel emulated against float64, every tile's registers, and which tile and parts are taken."""

import math
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import cute_runtime
from cute_runtime import emulator
from routing import linalg, router_logits_hopper
from routing.kernels import variants
from routing.kernels.logits_tiles import LARGEST_CLUSTER, TILES, Tile, choice

SEEDS = range(3)
TOLERANCE = 1e-6
"""Of a float32 sum of exact products against float64; the device's own sums are test_router_logits_gpu.py's."""


@pytest.fixture(scope="module")
def objects():
    """Of all tiles, two at a time: a compilation is a process of its own."""
    with ThreadPoolExecutor(2) as pool:
        built = pool.map(lambda tile: emulator.compiled(variants.router_logits(dtype="bfloat16", tile=tile)).object, TILES)
        return dict(zip(TILES, built, strict=True))


@pytest.mark.parametrize("tile", TILES)
def test_kernels_multiply_on_the_tensor_cores_and_keep_everything_in_registers(objects, tile):
    kernels = cute_runtime.read_resources(objects[tile])
    assert len(kernels) == len(tile.parts)
    for resources in kernels:
        assert resources.hgmma == 4, "a stage's products, of 16 each"
        assert not resources.uses_local_memory, resources
        assert math.ceil(resources.registers / 8) * 8 * resources.threads <= 65536, resources


def operands(tokens: int, hidden: int, experts: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens + hidden + experts)
    x, weight = (torch.randn(rows, hidden, generator=generator).to(dtype) for rows in (tokens, experts))
    return x, weight


def check(got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """By token, so that one wrong row cannot hide among the others; over what the norm of its logits is on average."""
    want = x.double() @ weight.double().T
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    typical = x.double().norm(dim=1) * weight.double().norm() / x.shape[1] ** 0.5
    assert ((got.double() - want).norm(dim=1) <= TOLERANCE * typical).all()


@pytest.mark.parametrize(
    ("tile", "parts", "tokens", "hidden", "experts", "dtype"),
    [
        (Tile(64, 64), 1, 1, 8, 1, torch.bfloat16),
        (Tile(64, 64), 8, 65, 712, 7, torch.float16),
        (Tile(64, 64), 8, 3, 136, 129, torch.bfloat16),  # parts without a column
        (Tile(128, 64), 2, 130, 200, 65, torch.bfloat16),
        (Tile(128, 64), 4, 127, 1096, 64, torch.float16),
        (Tile(192, 128), 1, 193, 640, 33, torch.float16),
        (Tile(192, 128), 8, 191, 520, 128, torch.bfloat16),
        (Tile(256, 128), 1, 257, 1032, 131, torch.bfloat16),
        (Tile(256, 128), 8, 300, 712, 127, torch.float16),
        (Tile(256, 128, columns=2), 1, 257, 1032, 300, torch.bfloat16),
        (Tile(256, 128, columns=2), 2, 70, 8, 129, torch.float16),
        (Tile(256, 128, columns=2), 4, 140, 904, 255, torch.bfloat16),
    ],
)
def test_emulated_logits_have_float64s_values_and_touch_nothing_else(tile, parts, tokens, hidden, experts, dtype):
    """Tails in all three directions, the ring of stages more than once around; the same bits for every order of warps and blocks."""
    x, weight = operands(tokens, hidden, experts, dtype)
    variant = variants.router_logits(dtype=str(dtype).removeprefix("torch."), tile=tile)
    results = []
    for seed in SEEDS:
        memory = torch.full((tokens * experts + 2,), float("nan"))
        emulator.launch(variant, x, weight, memory[1:-1].view(tokens, experts), parts, seed=seed)
        results.append(memory)
    assert all(memory[[0, -1]].isnan().all() for memory in results)
    first, *others = (memory[1:-1].view(tokens, experts) for memory in results)
    check(first, x, weight)
    assert all(torch.equal(first, other) for other in others)


MEETING = re.compile(r"bar\.sync\s+0;|barrier\.cluster\.arrive;\s+barrier\.cluster\.wait;")


@pytest.mark.parametrize("meeting", [0, 1])
@pytest.mark.parametrize(("tile", "parts"), [(Tile(128, 64), 1), (Tile(128, 64), 4), (Tile(256, 128, columns=2), 2)])
def test_without_one_of_its_meetings_a_kernel_has_a_race(tile, parts, meeting):
    """What the emulator's silence above is worth. The last two of a kernel's three."""
    x, weight = operands(100, 1096, 200, torch.bfloat16)

    def edit(ptx: str) -> str:
        first, *kernels = re.split(r"(?=\.visible \.entry)", ptx)
        for index, kernel in enumerate(kernels):
            one = list(MEETING.finditer(kernel))[-2:][meeting]
            kernels[index] = kernel[: one.start()] + kernel[one.end() :]
        return first + "".join(kernels)

    with pytest.raises(emulator.EmulationError, match="race: "):
        emulator.launch(variants.router_logits(dtype="bfloat16", tile=tile), x, weight, torch.empty(100, 200), parts, edit=edit)


@pytest.mark.parametrize("shape", [(1, 72, 8), (64, 264, 65), (200, 136, 129)])
def test_linear_takes_the_kernel_where_the_rule_says_so(shape):
    x, weight = operands(*shape, torch.bfloat16)
    with emulator.emulation() as statistics:
        got = linalg.linear(x, weight)
        again = linalg.linear(x, weight)
        assert len(statistics) == 2
        linalg.linear(x, weight.float())
        linalg.linear(misaligned(x), weight)
        assert len(statistics) == 2
        assert linalg.linear(x[:0], weight).shape == (0, shape[2])
        assert len(statistics) == 2, "no tokens, no launch"
    check(got, x, weight)
    assert torch.equal(got, again)


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat((tensor.new_zeros(1), tensor.flatten()))[1:].view_as(tensor)


@pytest.mark.parametrize(
    ("change", "supported"),
    [
        (lambda x, weight: (x, weight), True),
        (lambda x, weight: (x.half(), weight.half()), True),
        (lambda x, weight: (x[:, :8].contiguous(), weight[:1, :8].contiguous()), True),
        (lambda x, weight: (x, weight.half()), False),
        (lambda x, weight: (x.float(), weight.float()), False),
        (lambda x, weight: (x[:, :9].contiguous(), weight[:, :9].contiguous()), False),
        (lambda x, weight: (x[:, :8], weight[:, :8].contiguous()), False),
        (lambda x, weight: (x, weight.mT.contiguous().mT), False),
        (lambda x, weight: (misaligned(x), weight), False),
        (lambda x, weight: (x, misaligned(weight)), False),
        (lambda x, weight: (x, weight[:0]), False),
        (lambda x, weight: (x[:, :0], weight[:, :0]), False),
    ],
)
def test_rule_of_the_kernel(monkeypatch, change, supported):
    x, weight = change(*operands(5, 16, 4, torch.bfloat16))
    monkeypatch.setattr(cute_runtime, "is_supported_device", lambda device: True)
    assert router_logits_hopper.supports(x, weight) is supported
    monkeypatch.setattr(cute_runtime, "is_supported_device", lambda device: False)
    assert not router_logits_hopper.supports(x, weight)


@pytest.mark.parametrize(
    ("shape", "tile", "parts"),
    [
        ((32768, 4096, 128), Tile(256, 128), 1),
        ((4096, 4096, 128), Tile(128, 64), 2),
        ((4096, 4096, 256), Tile(192, 128), 2),
        ((24576, 1536, 128), Tile(192, 128), 1),
        ((32768, 4096, 256), Tile(256, 128, columns=2), 1),
        ((1, 4096, 8), Tile(64, 64), 8),
        ((64, 7168, 256), Tile(64, 64), 8),
        ((512, 7168, 256), Tile(128, 64), 4),
    ],
)
def test_tile_and_parts_that_are_taken(shape, tile, parts):
    assert choice(*shape) == (tile, parts)


def test_every_choice_is_among_the_kernels():
    built = set(variants.prebuilt_variants())
    for tokens in (1, 17, 100, 1000, 5000, 40000, 10**6):
        for hidden in (8, 64, 1000, 2048, 16384):
            for experts in (1, 8, 60, 128, 129, 384, 5000):
                tile, parts = choice(tokens, hidden, experts)
                assert parts in tile.parts
                assert parts * tile.columns <= LARGEST_CLUSTER
                assert {variants.router_logits(dtype=dtype, tile=tile) for dtype in variants.HALF} <= built
