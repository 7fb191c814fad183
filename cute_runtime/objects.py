"""The file of a compiled kernel: a shared object with its manifest behind it.

``<shared object> <manifest as JSON> <manifest's length, 8 bytes little-endian> <magic, 8 bytes>``. The loader of shared objects
ignores what follows them, so that one file, moved by one rename, says what it is and whether it is whole. The manifest's SHA-256
covers the shared object: mapping a truncated one would kill the process.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from cute_runtime.variant import Variant

FUNCTION = "kernel"
"""Name of the function in every kernel object."""

_MAGIC = b"CUTEOBJ1"


class CorruptObjectError(Exception):
    """The file is not a whole kernel object; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a kernel object was made from."""

    variant: str
    key: str
    compiler: str
    arch: str
    sources: dict[str, str]
    sha256: str


def object_name(variant: Variant) -> str:
    return f"{variant.name}.so"


def write_object(
    path: Path, shared_object: bytes, *, variant: Variant, key: str, compiler: str, arch: str, sources: dict[str, str]
) -> None:
    """Write the kernel object aside and move it into place in one step."""
    digest = hashlib.sha256(shared_object).hexdigest()
    manifest = Manifest(variant=variant.name, key=key, compiler=compiler, arch=arch, sources=sources, sha256=digest)
    trailer = json.dumps(asdict(manifest), sort_keys=True).encode()
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(shared_object + trailer + len(trailer).to_bytes(8, "little") + _MAGIC)
            os.fchmod(file.fileno(), 0o644)
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)
        raise


def split_object(path: Path) -> tuple[Manifest, bytes]:
    """The manifest of a kernel object and the shared object before it.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptObjectError: it is cut short, altered, or something else.
    """
    content = path.read_bytes()
    if content[-8:] != _MAGIC:
        raise CorruptObjectError(f"{path}: is not a kernel object, or is cut short or stripped")
    end = len(content) - 16
    begin = end - int.from_bytes(content[end : end + 8], "little")
    try:
        manifest = Manifest(**json.loads(content[max(begin, 0) : end]))
    except (ValueError, TypeError) as error:
        raise CorruptObjectError(f"{path}: its manifest cannot be read ({error})") from None
    shared_object = content[:begin]
    if hashlib.sha256(shared_object).hexdigest() != manifest.sha256:
        raise CorruptObjectError(f"{path}: its content does not match its checksum")
    return manifest, shared_object
