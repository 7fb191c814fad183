"""The analysis of traces that were recorded on a GPU: every testing/data/*.json.gz, by `sonicmoe profile --keep-trace FILE --trim`."""

from pathlib import Path

import pytest

from sonicmoe.profiling import analysis, gaps, html, trace, trim
from sonicmoe.tests.profile_invariants import check_invariants

RECORDED = sorted((Path(__file__).absolute().parents[1] / "data").glob("*.json.gz"))
MOST_BYTES = 500_000
"""What a file of this repository may have."""


@pytest.mark.parametrize("path", RECORDED or [None], ids=lambda path: path.name if path else "none")
def test_recorded_trace_gives_whole_tables(path):
    if path is None:
        pytest.skip("testing/data holds no *.json.gz yet: sonicmoe profile --keep-trace FILE --trim records one on a GPU")
    assert path.stat().st_size < MOST_BYTES
    parsed = trace.read(path)
    profile = analysis.analyse(parsed)
    check_invariants(profile)
    assert trim.trim(trace.load(path))["traceEvents"] == trace.load(path)["traceEvents"]
    known = [gap for gap in profile.gaps if gap.kind != gaps.UNKNOWN]
    assert len(known) >= 0.9 * len(profile.gaps)
    assert all(one.where for one in profile.pageable)
    assert "Kernels by time" in html.page(parsed, profile, title="", described="")
