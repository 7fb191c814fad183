import time

import pytest
import torch

from sonicmoe import timing
from sonicmoe.thiek import Thiek
from sonicmoe.timing import Timing, Variant


def test_only_run_is_on_the_clock():
    variant = Variant(run=lambda pause: time.sleep(pause), prepare=lambda: time.sleep(0.02) or 0.002)
    result = timing.measure({"nap": variant}, device="cpu", warmup_s=0, measure_s=0, min_repeats=3)["nap"]
    assert 2 <= result.ms < 20
    assert result.repeats == 3


def test_variants_take_turns():
    order = []
    variants = {name: Variant(run=lambda _, name=name: order.append(name)) for name in "ab"}
    timing.measure(variants, device="cpu", warmup_s=0, measure_s=0, min_repeats=3)
    assert "".join(order) == "ab" * 4  # one round of warm-up


def test_repeats_stay_within_their_bounds():
    calls = []
    result = timing.measure({"quick": Variant(calls.append)}, device="cpu", warmup_s=0, measure_s=10, max_repeats=7)["quick"]
    assert (result.repeats, len(calls)) == (7, 8)


def test_trials_combine_to_the_median_of_medians():
    trials = [Timing(ms, 99.0, 3) for ms in (5.0, 1.0, 3.0)]
    assert timing.combine(trials) == Timing(3.0, 2.0, 9)
    assert timing.combine(trials[:1]) == trials[0]


def test_flops_of_gated_and_plain_layers():
    gated = timing.model_flops(10, 8, 4, gated=True)
    assert gated == {"inference": 1920, "forward": 1920, "backward": 3840, "forward+backward": 5760}
    assert timing.model_flops(10, 8, 4, gated=False)["forward+backward"] == 12 * 10 * 8 * 4
    assert timing.tflops(3e12, 1500.0) == 2.0


def test_bound_counts_equal_experts():
    assert timing.bound_rows(Thiek(1024, 8, 8, 16, 4)) == 256
    assert timing.bound_rows(Thiek(3, 8, 8, 16, 4)) == 1
    assert timing.bound_rows(Thiek(5, 8, 8, 4, 1)) == 2


@pytest.mark.parametrize("gated", [True, False])
def test_bound_multiplies_exactly_the_layers_flops(monkeypatch, gated):
    thiek = Thiek(32, 24, 8, 4, 2)
    multiplied = []

    def count(a, b):
        multiplied.append(2 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2])

    monkeypatch.setattr(torch, "bmm", count)
    expected = timing.model_flops(thiek.rows, thiek.H, thiek.I, gated=gated)
    for name, variant in timing.gemm_bound_variants(thiek, dtype=torch.float32, device="cpu", gated=gated).items():
        multiplied.clear()
        variant.run(None)
        assert sum(multiplied) == expected[name.removeprefix("bound ")]
