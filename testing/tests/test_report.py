"""Reports: every cell and every failure is in them, and the page needs nothing but itself."""

from html.parser import HTMLParser

import pytest
from rich.console import Console

from testing.matrix import history, report, report_html, roofline
from testing.matrix.cells import load_matrix
from testing.matrix.describe import describe
from testing.tests import small_matrix

VOID = {"meta", "br", "wbr"}


class Page(HTMLParser):
    """Collects text and checks that tags close in order and that nothing is loaded from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.tags = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        assert not {"src", "href"} & {name for name, _ in attributes}
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def matrix(tmp_path):
    return small_matrix.load(tmp_path)


@pytest.fixture
def result(matrix):
    errors = {name: {"whole": 5e-3, "worst_block": 6e-3} for name in ("o", "dx", "dw_up", "dw_down", "drouter")}
    errors["dx"] = {"whole": 8e-3, "worst_block": None}
    outcomes = {
        "layer/one": {"status": "failed", "passed": False, "why": "dx worst_block is not finite <b>", "errors": errors, "seconds": 1.5},
        "layer/two": {"status": "passed", "passed": True, "why": "", "errors": {**errors, "dx": errors["o"]}, "seconds": 2.5},
        "route/rounded": {"status": "missing", "passed": False, "why": "no result has this cell"},
        "count/e4": {"status": "passed", "passed": True, "why": "", "seconds": 0.5},
        "speed/fast/forward": {"status": "not run", "passed": None, "why": "needs an sm_90 GPU"},
    }
    cells = [{**describe(cell, matrix.profiles["cpu"]), **outcomes[cell.name]} for cell in matrix.cells]
    return {"profile": "cpu", "seed": 3, "seconds": 4.0, "device": "test CPU", "versions": {"torch": "2"}, "cells": cells}


def test_the_page_is_whole_loads_nothing_and_names_every_cell(matrix, result):
    text = report_html.html(matrix, result, passed=False)
    page = Page(text)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "url(" not in text
    assert "http" not in text
    words = "".join(page.words)
    for cell in matrix.cells:
        assert cell.name in words
    for phrase in ("FAIL", "dx worst_block is not finite <b>", "no result has this cell", "needs an sm_90 GPU", "1024,768,256,8,2"):
        assert phrase in words


def test_the_heat_map_shows_the_larger_share_of_the_limits(matrix, result):
    words = Page(report_html.html(matrix, result, passed=False)).words
    assert "50%" in words  # 5e-3 of 1e-2 and 6e-3 of 2e-2
    assert "over" in words  # a value that is not finite


def test_markdown_has_failures_groups_and_what_was_not_run(matrix, result):
    text = report.markdown(matrix, result, passed=False)
    assert "FAIL: 2 passed, 1 failed, 1 missing, 1 not run" in text
    assert "| layer/one | 1024,768,256,8,2 | failed | dx worst_block is not finite <b> |" in text
    assert "| layer | 2 | 1 | 1 | 0 | over | 4 |" in text
    assert "Not run, needs an sm_90 GPU: speed/fast/forward." in text


def test_speed_results_show_their_ratio_to_the_bound(matrix, result):
    speed = {
        "status": "passed",
        "ms": 2.0,
        "ms_spread": 0.1,
        "tflops": 300.0,
        "bound_ms": 1.5,
        "ratio": 0.75,
        "ratio_spread": 0.01,
        "trials": 9,
        "seconds": 3.0,
    }
    result["cells"][-1].update(speed)
    assert "| speed/fast/forward | 1024,768,256,8,2 | 2.000 | 0.100 | 300 | 1.500 | 0.750 ± 0.009 | none yet |" in report.markdown(
        matrix, result, passed=True
    )
    result["cells"][-1].update(status="no threshold yet", passed=None, why="no recorded run has set its threshold")
    assert "Speed not judged, no recorded run has set its threshold: speed/fast/forward." in report.markdown(matrix, result, passed=True)
    assert "What was not judged for speed" in Page(report_html.html(matrix, result, passed=True)).words
    assert "GEMM bound ms" in Page(report_html.html(matrix, result, passed=True)).words


def test_the_terminal_table_lists_what_ran_and_says_what_was_not_run(matrix, result):
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    report.print_table(console, matrix, result, passed=False)
    text = console.export_text()
    assert "not run: 1 cells, needs an sm_90 GPU: speed/fast/forward" in text
    assert "failed: layer/one: dx worst_block is not finite <b>" in text
    ran_at = ",".join(map(str, result["cells"][0]["thiek_experts"]))
    assert ran_at != "1024,768,256,8,2"
    assert ran_at in text


H100 = {"device": "NVIDIA H100 80GB HBM3", "power_limit_w": 700.0, "commit": "c" * 40}


@pytest.fixture
def timed(matrix, result):
    """The result with its speed cell measured on an H100: 0.75 of the bound, its up-projection half as fast as the device allows."""
    up_ms = 4 * 2048 * 768 * 256 / 350e9
    kernels = {"up_projection": {"ms": up_ms, "ratio": 1.5, "ratio_spread": 0.0}}
    speed = {"ms": 2.0, "ms_spread": 0.1, "tflops": 300.0, "bound_ms": 1.5, "ratio": 0.75, "ratio_spread": 0.0, "trials": 9}
    cells = [*result["cells"][:-1], {**result["cells"][-1], **speed, "status": "no threshold yet", "passed": None, "kernels": kernels}]
    cells[-1] |= {"why": "no recorded run has set its threshold", "saved_mib": 2.5, "peak_mib": 5000}
    return {**result, **H100, "date": "2026-03-01", "cells": cells}


def record(date, ratio, **machine):
    cells = [{"name": "speed/fast/forward", "ratio": ratio, "ms": 1.0}, {"name": "layer/one", "errors": {}}]
    return {**H100, "date": date, "cells": cells, **machine}


def test_history_is_of_the_same_device_and_power_limit_and_not_the_run_itself(timed):
    records = [
        record("2026-01-01", 0.6),
        record("2026-02-01", 0.8),
        record("2026-02-02", 0.9, power_limit_w=350.0),
        record("2026-02-03", 0.9, device="NVIDIA H200"),
        record("2026-03-01", 0.75),
    ]
    past = history.of_cells(records, timed)
    assert {name: [entry.ratio for entry in entries] for name, entries in past.items()} == {"speed/fast/forward": [0.6, 0.8]}
    assert history.change_text(past["speed/fast/forward"], 0.75) == "0.800 (-6.2%) 2026-02-01"


def test_the_page_has_speed_history_memory_and_roofline(matrix, timed):
    records = [record("2026-01-01", 0.6), record("2026-02-01", 0.8)]
    page = Page(report_html.html(matrix, timed, passed=True, records=records))
    words = "".join(page.words)
    for title in ("Ratio to the GEMM bound", "History", "Memory", "Roofline by kernel"):
        assert title in words
    assert "-6.2%" in words
    assert "0.800, 2026-02-01, cccccccccccc" in words
    assert "pre-activation alone" in words
    assert "2.0" in page.words  # MiB of z: 2048 rows of 512 values of two bytes
    assert "up_projection of speed/fast/forward: 350 TFLOPS at 146 FLOPs a byte, 80% of what the device can do there" in words
    assert page.tags.count("circle") == 2  # the end of the history and one operation
    assert page.tags.count("polyline") == 2


def test_a_device_whose_limits_are_unknown_has_dots_but_no_roof(matrix, timed):
    page = Page(report_html.html(matrix, {**timed, "device": "another GPU"}, passed=True))
    assert "there is no line" in "".join(page.words)
    assert "No run on this device and power limit is recorded" in "".join(page.words)
    assert (page.tags.count("circle"), page.tags.count("polyline")) == (1, 0)


def test_markdown_has_the_last_record_and_memory(matrix, timed):
    text = report.markdown(matrix, timed, passed=True, records=[record("2026-02-01", 0.8)])
    assert "| 0.750 ± 0.000 | none yet | 0.800 (-6.2%) 2026-02-01 | 2 | 5000 |" in text


def test_the_three_loads_are_shown_with_their_modes_or_why_not():
    matrix = load_matrix()
    cells = [
        {**describe(cell, matrix.profiles["cpu"]), "status": "not run", "passed": None, "why": "needs an sm_90 GPU"}
        for cell in matrix.cells
    ]
    result = {"profile": "cpu", "seed": 3, "seconds": 4.0, "device": "test CPU", "versions": {}, "cells": cells}
    words = "".join(Page(report_html.html(matrix, result, passed=True)).words)
    for load in ("Standard", "High throughput", "More experts"):
        assert f"{load}T,H,I,E,K = " in words
    assert words.count("not run: needs an sm_90 GPU") == 9


def test_work_of_the_operations_by_hand():
    """Four rows of two experts, H = 8, I = 16; the last expert cannot have rows."""
    work = roofline.operation_work([2, 8, 16, 5, 2], "forward+backward")
    assert work["up_projection"] == (4 * 4 * 8 * 16, 2 * (2 * 8 + 4 * 32 * 8 + 4 * 16 + 4 * 32))
    assert work["down_weight_grad"] == (2 * 4 * 8 * 16, 2 * (2 * 8 + 4 * 16 + 4 * 8 * 16))
    products = [one.flops for name, one in work.items() if name != "gather_sum"]
    assert sum(products) == 18 * 4 * 8 * 16
    inference = roofline.operation_work([2, 8, 16, 5, 2], "inference")
    assert set(inference) == {"up_projection", "down_projection", "gather_sum"}
    assert inference["up_projection"].bytes == work["up_projection"].bytes - 2 * 4 * 32
    assert roofline.Roof(700.0, 3.0).attainable(100.0) == pytest.approx(300.0)
