"""The documents' tables are those of the recorded results: of each device the newest, and nothing else of them changes."""

import json

import pytest

from testing import readme_tables


@pytest.fixture
def place(tmp_path):
    """Documents with the markers and a folder of results."""
    readme, results = tmp_path / "README.md", tmp_path / "results"
    results.mkdir()
    for tables in readme_tables.TABLES:
        document = tmp_path / tables.document
        document.parent.mkdir(exist_ok=True)
        document.write_text(f"# Title\n\n{readme_tables.BEGIN}\nold\n{readme_tables.END}\n\nrest\n")

    def record(name, device, date, ratio, **changes):
        cell = {"name": name, "thiek": [4096, 4096, 1024, 128, 8], "routing": "softmax", "mode": "forward", "ms": 2.0, "tflops": 412.4}
        result = {"device": device, "power_limit_w": 700.0, "date": date, "commit": "f" * 40, "versions": {}}
        result["cells"] = [{**cell, "bound_ms": 1.5, "ratio": ratio}, {"name": "no speed", "errors": {}}]
        (results / f"{name}.json").write_text(json.dumps({**result, **changes}))

    def run(*options):
        status = readme_tables.main(["--root", str(tmp_path), "--results", str(results), *options])
        return status, readme.read_text()

    run.record, run.root = record, tmp_path
    return run


def test_the_newest_run_of_each_device_is_shown(place):
    place.record("old", "H100", "2026-01-01", 0.61)
    place.record("new", "H100", "2026-02-01", 0.75)
    place.record("other", "H200", "2025-01-01", 0.66)
    status, text = place()
    assert status == 0
    assert text.startswith(f"# Title\n\n{readme_tables.BEGIN}\n\nH100")
    assert text.endswith(f"{readme_tables.END}\n\nrest\n")
    rows = [line for line in text.splitlines() if line.startswith("| 4096")]
    assert rows == [f"| 4096,4096,1024,128,8 | softmax | forward | 2.000 | 412 | 1.500 | {ratio} |" for ratio in ("0.75", "0.66")]
    assert "old" not in text


def test_power_limits_commits_and_peers_have_tables_of_their_own(place):
    place.record("a", "H100", "2026-01-01", 0.60, commit="a" * 40)
    place.record("b", "H100", "2026-01-02", 0.70, commit="b" * 40)
    place.record("capped", "H100", "2025-12-01", 0.65, power_limit_w=350.0)
    peer = {"peer": "ScatterMoE", "mode": "forward", "thiek": [8, 8, 8, 8, 2], "routing": "top_k", "ms": 4.0, "tflops": 100.0}
    absent = {
        "peer": "MegaBlocks",
        "mode": None,
        "thiek": [8, 8, 8, 8, 2],
        "status": "not installed",
        "why": "not installed: package megablocks",
    }
    place.record("peers", "H100", "2026-03-01", 0.0, cells=[{**peer, "bound_ms": 1.0, "ratio": 0.25, "saved_mib": 1.6}, absent])
    errors = {"o": {"whole": 0.003, "worst_block": 0.004}, "dx": {"whole": 0.0052, "worst_block": 0.1}}
    other = {**peer, "thiek": [8, 8, 8, 4, 2], "bound_ms": 1.0, "ratio": 0.5, "errors": errors}
    place.record("peers_other_size", "H100", "2026-03-02", 0.0, cells=[other])
    place.record("peers_again", "H100", "2026-03-03", 0.0, cells=[{**other, "ratio": 0.75}])
    _, text = place()
    heads = [line for line in text.splitlines() if line.startswith("H100 ")]
    assert [("700.0 W" in head, "bbbbbbbbbbbb" in head) for head in heads] == [(False, False), (True, True)]
    assert "0.60" not in text
    assert "ScatterMoE" not in text
    peers = (place.root / "docs" / "peers.md").read_text()
    assert "| ScatterMoE | 8,8,8,8,2 | top_k | forward | 4.000 | 100 | 1.000 | 0.25 | 2 |  |  |" in peers
    assert "| ScatterMoE | 8,8,8,4,2 | top_k | forward | 4.000 | 100 | 1.000 | 0.75 |  |  | 5.2e-03 dx |" in peers
    assert "| 0.50 |" not in peers
    assert "\nMegaBlocks: not installed: package megablocks\n" in peers


def test_a_folder_that_does_not_exist_is_an_empty_one(place, tmp_path):
    (tmp_path / "results").rmdir()
    assert readme_tables.NONE_RECORDED in place()[1]


def test_check_fails_when_results_and_readme_drift_apart_and_writes_nothing(place):
    place.record("one", "H100", "2026-01-01", 0.61)
    place()
    status, before = place("--check")
    assert status == 0
    place.record("two", "H100", "2026-01-02", 0.62)
    assert place("--check") == (1, before)


def promise(name, value, limit=1.0, passed=True, **changes):
    return {
        "name": name,
        "bound": {"value": value, "unit": "MiB", "limit": limit, "rule": "at most"},
        "passed": passed,
        "why": "",
        **changes,
    }


def test_promises_take_one_line_for_each_kind_with_the_one_closest_to_its_bound(place):
    place.record("speed", "H100", "2026-01-01", 0.61)
    run = {"suites": ["memory", "step"], "quick": False, "items": None, "complete": True}
    newer = [promise("memory/peak/a", 0.5), promise("memory/peak/b", 0.75), promise("memory/peak/c", 9.0, passed=None)]
    newer += [{"name": "memory/saved/a", "passed": False, "why": "RuntimeError: no"}, {"name": "memory/x/a", "passed": True, "why": ""}]
    place.record("older", "H100", "2026-01-02", 0.99, **run, cells=[promise("step/twice/older", 0, 0)])
    place.record("newer", "H100", "2026-01-03", 0.99, **run, cells=newer)
    place.record("other", "H100", "2026-01-01", 0.99, **run | {"suites": ["step"]}, cells=[promise("step/twice/top_k", 0, 0)])
    for name, changes in {"quick": {"quick": True}, "part": {"items": "memory/peak/a"}, "killed": {"complete": False}}.items():
        place.record(name, "H100", "2026-01-04", 0.99, **run | changes, cells=[promise("memory/peak/a", 2.0, passed=False)])
    status, readme = place()
    assert status == 0
    assert "| 1.500 | 0.61 |" in readme
    assert "0.99" not in readme
    text = (place.root / "docs/measure.md").read_text()
    assert [line for line in text.splitlines() if line.startswith(("| memory", "| step"))] == [
        "| memory/peak | 2 of 2 | 0.75 MiB | at most 1 | b |",
        "| memory/saved | 0 of 1 | RuntimeError: no |  | a |",
        "| step/twice | 1 of 1 | 0 MiB | at most 0 | top_k |",
    ]


def test_without_recorded_results_the_readme_says_so(place):
    status, text = place()
    assert status == 0
    assert readme_tables.NONE_RECORDED in text
    assert "|" not in text.replace("`|`", "")


def test_each_document_shows_the_results_that_are_its_own(place):
    place.record("speed", "H100", "2026-01-01", 0.61)
    cell = {"model": "gpt-oss-20b", "step": "decode 8", "thiek": [8, 2880, 2880, 32, 4], "mode": "inference", "passed": True, "why": ""}
    times = {"eager": (4.0, 3.0), "batched_mm": (2.0, 1.0), "sonicmoe_experts": (1.0, 0.25)}
    cells = [
        {**cell, "implementation": name, "scope": scope, "ms": ms}
        for name, pair in times.items()
        for scope, ms in zip(("layer", "experts"), pair, strict=True)
    ]
    lost = {**cell, "implementation": "grouped_mm", "passed": False, "why": "RuntimeError: not here"}
    cells += [{**lost, "scope": "layer"}, {**lost, "scope": "experts"}]
    place.record("layers", "H100", "2026-02-01", 0.61, cells=cells)
    place.record("trial", "H100", "2026-03-01", 0.61, cells=cells, tiny=True)
    _, readme = place()
    text = (place.root / "docs" / "transformers.md").read_text()
    assert "2026-01-01" in readme
    assert "gpt-oss" not in readme
    assert "2026-02-01" in text
    row = "| gpt-oss-20b | decode 8 | 8 | 4.000 / 3.000 | 2.000 / 1.000 | - / - | 1.000 / 0.250 | 2.00 / 4.00 |"
    assert [line for line in text.splitlines() if line.startswith("| gpt")] == [row]
    assert text.count("- not timed: gpt-oss-20b, decode 8, grouped_mm: RuntimeError: not here\n") == 1


def test_waits_for_input_go_into_their_own_document(place):
    place.record("speed", "H100", "2026-03-01", 0.61)
    waits = {"thiek": [32768, 4096, 1024, 128, 8], "input": "pinned", "batch_mib": 256.0, "ms": 40.0, "input_wait_ms": 5.0}
    waits |= {"input_wait_share": 0.125, "slower_than_resident": 0.1428, "tflops": 500.0}
    place.record("input", "H100", "2026-01-01", 0.61, cells=[waits])
    _, readme = place()
    page = place.root / "docs" / "input.md"
    row = "| 32768,4096,1024,128,8 | pinned | 256 | 40.000 | 5.000 | 12.50% | +14.3% |"
    assert [line for line in page.read_text().splitlines() if line.startswith("| 3")] == [row]
    assert "pinned" not in readme
    (place.root / "results" / "input.json").unlink()
    place()
    assert readme_tables.NO_INPUT_RECORDED in page.read_text()


def test_layers_spread_over_gpus_go_into_one_table_of_their_own(place):
    place.record("speed", "H100", "2026-03-01", 0.61)
    cell = {
        "ranks": 2,
        "thiek": [64, 32, 16, 8, 2],
        "routing": "top_k",
        "transport": "all_to_all",
        "mode": "forward",
        "ms": 2.0,
        "ratio": 0.5,
    }
    cell |= {"compute_ms": 1.5, "exposed_ms": 0.5, "exposed_share": 0.25, "exchange_ms": 0.75, "bus_gb_s": 200.4, "bandwidth_ratio": 0.957}
    judged = {"ranks": 2, "mode": "accuracy", "passed": True}
    place.record("two", "H100", "2026-01-02", 0.61, cells=[judged, {**cell, "chunks": 2}])
    place.record("one", "H100", "2026-01-03", 0.61, cells=[{**cell, "chunks": 1}])
    place.record("older", "H100", "2026-01-01", 0.61, cells=[{**cell, "chunks": 1, "ms": 9.0}])
    place.record("before", "H100", "2025-01-01", 0.61, cells=[{**cell, "chunks": 4}], commit="a" * 40)
    _, readme = place()
    lines = (place.root / "docs" / "expert_parallel.md").read_text().splitlines()
    row = "| 2 | 64,32,16,8,2 | top_k | all_to_all | {} | forward | 2.00 | 1.50 | 25.0% | 0.75 | 200 | 0.96 | 0.50 |"
    assert [line for line in lines if line.startswith("| 2")] == [row.format(chunks) for chunks in (1, 2, 4)]
    assert [line[-11:] for line in lines if line.startswith("H100 ")] == ["2026-01-03:", "2025-01-01:"]
    assert "all_to_all" not in readme


def test_what_is_no_result_is_refused_in_one_line(place, capsys):
    bad = place.root / "results" / "bad.json"
    bad.write_text('{"device": "H100", "cells": []}')
    status, text = place()
    assert status == 2
    assert "old" in text
    words = "date is missing: must be a result that one of the project's commands has written"
    assert capsys.readouterr().err == f"error: {bad}: {words}\n"


def test_a_document_without_markers_is_refused(place, capsys):
    (place.root / "docs" / "transformers.md").write_text("# Title\n")
    status, text = place()
    assert status == 2
    assert "old" in text
    assert "docs/transformers.md: has the marker" in capsys.readouterr().err
