"""Reports: every cell and every failure is in them, and the page needs nothing but itself."""

from html.parser import HTMLParser

import pytest
from rich.console import Console

from testing.matrix import report, report_html
from testing.matrix.describe import describe
from testing.tests import small_matrix

VOID = {"meta", "br"}


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
    words = " ".join(page.words)
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
