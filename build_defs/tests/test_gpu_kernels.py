import pytest

from build_defs import gpu_kernels


def test_a_declaration_without_a_gpu_test_is_refused(tmp_path):
    tests = tmp_path / "package" / "tests"
    tests.mkdir(parents=True)
    (tests / "test_none.py").write_text("def test_nothing():\n    pass\n")
    (tests / "test_some.py").write_text(
        "import pytest\n\n\ndef gpu_kernels():\n    return []\n\n\n@pytest.mark.gpu\ndef test_it():\n    pass\n"
    )
    assert gpu_kernels.declaring(tmp_path) == ["package.tests.test_some"]
    (tests / "test_none.py").write_text("import pytest\n\n\ndef gpu_kernels():\n    return []\n")
    with pytest.raises(ValueError, match=r"^package/tests/test_none.py: declares gpu_kernels and has no test marked gpu$"):
        gpu_kernels.declaring(tmp_path)
