"""What holds of every profile of steps that ran on a GPU, whatever they were."""

import pytest

from sonicmoe.profiling import analysis


def check_invariants(profile: analysis.Profile) -> None:
    """What holds of every recording of steps on a GPU."""
    assert profile.steady.steps >= 1
    assert profile.step_us > 0
    assert sum(row.share for row in profile.kernels) == pytest.approx(1)
    for busy in profile.busy:
        assert 0 < busy.kernel_share <= busy.share <= 1
        assert busy.overlap_us >= -1e-6
    for row in profile.kernels:
        assert row.count > 0
        # What stays in the L2 cache is read faster than a large copy, whose rate the floor has.
        assert row.rate is None or 0 < row.rate.of_floor < 3
    for gap in profile.gaps:
        assert 0 <= gap.idle_us <= gap.duration_us + 1e-6
