import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).absolute().parents[2]


def test_gpu_tests_are_skipped_with_the_reason_where_there_is_no_gpu(tmp_path: Path):
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "test_gpu.py").write_text("import pytest\n@pytest.mark.gpu\ndef test_gpu():\n    assert False\ndef test_cpu():\n    pass\n")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", "test_gpu.py"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "1 passed, 1 skipped" in result.stdout
    assert "needs an sm_90 GPU: no CUDA device" in result.stdout
