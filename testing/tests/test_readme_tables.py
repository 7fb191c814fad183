"""The README's tables are those of the recorded results: of each device the newest, and nothing else of the README changes."""

import json

import pytest

from testing import readme_tables


@pytest.fixture
def place(tmp_path):
    """A README with the markers and a folder of results."""
    readme, results = tmp_path / "README.md", tmp_path / "results"
    results.mkdir()
    readme.write_text(f"# Title\n\n{readme_tables.BEGIN}\nold\n{readme_tables.END}\n\nrest\n")

    def record(name, device, date, ratio, **changes):
        cell = {"name": name, "thiek": [4096, 4096, 1024, 128, 8], "routing": "softmax", "mode": "forward", "ms": 2.0, "tflops": 412.4}
        result = {"device": device, "power_limit_w": 700.0, "date": date, "commit": "f" * 40, "versions": {}}
        result["cells"] = [{**cell, "bound_ms": 1.5, "ratio": ratio}, {"name": "no speed", "errors": {}}]
        (results / f"{name}.json").write_text(json.dumps({**result, **changes}))

    def run(*options):
        status = readme_tables.main(["--readme", str(readme), "--results", str(results), *options])
        return status, readme.read_text()

    run.record = record
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


def test_check_fails_when_results_and_readme_drift_apart_and_writes_nothing(place):
    place.record("one", "H100", "2026-01-01", 0.61)
    place()
    status, before = place("--check")
    assert status == 0
    place.record("two", "H100", "2026-01-02", 0.62)
    assert place("--check") == (1, before)


def test_without_recorded_results_the_readme_says_so(place):
    status, text = place()
    assert status == 0
    assert readme_tables.NONE_RECORDED in text
    assert "|" not in text.replace("`|`", "")


def test_what_is_no_result_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "bad.json").write_text('{"device": "H100", "cells": []}')
    readme = tmp_path / "README.md"
    readme.write_text(f"{readme_tables.BEGIN}\n{readme_tables.END}\n")
    assert readme_tables.main(["--readme", str(readme), "--results", str(tmp_path)]) == 2
    words = "date is missing: must be a result that one of the project's commands has written"
    assert capsys.readouterr().err == f"error: {tmp_path / 'bad.json'}: {words}\n"


def test_a_readme_without_markers_is_refused(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n")
    assert readme_tables.main(["--readme", str(readme), "--results", str(tmp_path)]) == 2
    assert "0 times: must be there once" in capsys.readouterr().err
    assert readme.read_text() == "# Title\n"
