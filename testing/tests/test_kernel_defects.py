"""Defects in kernels: each still fits the source that it is planted in, and a planted tree is what a worker then runs.

That a GPU's results with them fail the gate is what `python -m testing.matrix selftest` shows on a GPU.
"""

import functools
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from sonicmoe import backends
from testing.matrix import gate, runner, selftest
from testing.matrix.__main__ import main
from testing.matrix.cells import load_matrix
from testing.matrix.defects import DEFECTS, EVERY
from testing.matrix.defects_kernels import KERNEL_DEFECTS
from testing.matrix.planting import planted
from testing.matrix.planting_source import ROOT, SourceDefect, edited, plant, work_with
from testing.tests import small_matrix

MATRIX = load_matrix()
WRONG_EXPERT = SourceDefect(
    "sonicmoe/backends/reference.py",
    "wide_y = matmul(a[own], w_down[expert].mT)",
    "wide_y = matmul(a[own], w_down[expert - 1].mT)",
    "layer/one",
)


@pytest.mark.parametrize("name", KERNEL_DEFECTS)
def test_a_defect_fits_the_kernel_and_names_a_cell(name):
    defect = KERNEL_DEFECTS[name]
    compile(edited(defect), defect.file, "exec")
    assert "/kernels/" in defect.file
    assert defect.cell in {cell.name for cell in MATRIX.cells}


def test_a_defect_that_no_longer_fits_is_refused():
    with pytest.raises(ValueError, match=r"dispatch/kernels/count.py: holds 'no such text' 0 times: must be there once"):
        edited(SourceDefect("dispatch/kernels/count.py", "no such text", "", "tokens/t129"))


def test_names_are_of_one_defect_each():
    assert len(EVERY) == len(DEFECTS) + len(KERNEL_DEFECTS) >= 20


def test_a_planted_tree_makes_stale_what_was_built_of_the_changed_source_only(tmp_path):
    defect = KERNEL_DEFECTS["kernel: score not applied in the sum"]
    plant(defect, tmp_path)
    program = """
import sys
from cute_runtime.sources import changed_sources, sources
from cute_runtime import Variant
variants = [Variant.from_name(name) for name in sys.argv[1:]]
print([changed_sources(eval(sys.stdin.readline())) for _ in variants])
"""
    names = ["dispatch.gather_sum-dtype.bfloat16-form.uniform-scored.true", "dispatch.bounds"]
    recorded = "import sys; from cute_runtime import Variant; from cute_runtime.sources import sources\n"
    recorded += "for name in sys.argv[1:]: print(sources(Variant.from_name(name)))"
    before = _python(recorded, names, ROOT)
    assert _python(program, names, tmp_path, before).strip() == "[['dispatch/kernels/gather_sum.py'], []]"


def _python(program, words, tree, given=""):
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, "-c", program, *words]
    return subprocess.run(command, input=given, capture_output=True, text=True, check=True, env=environment, cwd=tree).stdout


def test_a_worker_runs_the_planted_source_and_the_gate_fails(tmp_path):
    """Here in a source that a CPU runs too; in a kernel's it is the same."""
    matrix = small_matrix.load(tmp_path)
    part = replace(matrix, cells=matrix.cells[:1])
    options = runner.RunOptions(1, 1, tmp_path, 1, 1, None, False, 0, "test", quiet=True)
    setup = functools.partial(work_with, "wrong expert", WRONG_EXPERT, str(matrix.path), "cpu", "cpu")
    runner.run_shard(part, matrix.profiles["cpu"], options, setup, {"device": "test"})
    verdict = gate.decide(part, [runner.shard_path(tmp_path, 1, 1)], "cpu")
    assert not verdict.passed
    outcome = selftest.outcome_of("wrong expert", part.cells[0], verdict, matrix, 0.0)
    assert (outcome.caught, outcome.by) == (True, "o whole")


def test_without_a_gpu_kernel_defects_are_said_not_to_run(capsys):
    assert main(["selftest", "--profile", "cpu", "--defects", "kernel: *"]) == 2
    assert "matches defects in kernels only, which need an sm_90 GPU" in capsys.readouterr().err


def test_defects_of_operations_are_planted_in_both_backends_of_a_gpu():
    modules = [backends.load(name) for name in ("reference", "hopper")]
    for name in ("outputs tiny", "pre-activation gradient without the score"):
        attribute = DEFECTS[name].attribute
        rights = [getattr(module, attribute) for module in modules]
        with planted(DEFECTS[name], "cuda"):
            assert all(getattr(module, attribute) is not right for module, right in zip(modules, rights, strict=True))
        assert [getattr(module, attribute) for module in modules] == rights
