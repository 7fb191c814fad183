"""A kernel object is whole or it is refused: nothing maps a file that was cut short."""

import pytest

from cute_runtime import Variant
from cute_runtime.objects import CorruptObjectError, split_object, write_object

VARIANT = Variant("toy.kernels.gemm", {"tile": 128})
CONTENT = b"\x7fELF" + bytes(range(256)) * 8


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "x.so"
    write_object(path, CONTENT, variant=VARIANT, key="k", compiler="c 1.0", arch="sm_90a", sources={"a.py": "0"})
    return path


def test_manifest_and_content_come_back(path):
    manifest, content = split_object(path)
    assert content == CONTENT
    assert (manifest.variant, manifest.key, manifest.compiler, manifest.arch, manifest.sources) == (
        VARIANT.name, "k", "c 1.0", "sm_90a", {"a.py": "0"},
    )  # fmt: skip


def test_content_stays_first_so_that_the_file_still_is_a_shared_object(path):
    assert path.read_bytes().startswith(CONTENT)


@pytest.mark.parametrize("keep", [0, 1, 100, -1, -8, -20])
def test_cut_short_is_refused(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptObjectError, match="is not a kernel object, or is cut short or stripped"):
        split_object(path)


def test_one_altered_bit_is_refused(path):
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptObjectError, match="does not match its checksum"):
        split_object(path)


def test_altered_manifest_is_refused(path):
    path.write_bytes(path.read_bytes().replace(b'"sha256"', b'"sha257"'))
    with pytest.raises(CorruptObjectError, match="its manifest cannot be read"):
        split_object(path)


def test_failed_write_leaves_the_old_object_and_nothing_else(path):
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_object(path, "text", variant=VARIANT, key="k", compiler="c", arch="a", sources={})
    assert path.read_bytes() == before
    with pytest.raises(TypeError):
        write_object(path, CONTENT + CONTENT, variant=VARIANT, key="k", compiler="c", arch="a", sources={"x": object()})
    assert [entry.name for entry in path.parent.iterdir()] == ["x.so"]
    assert path.read_bytes() == before
