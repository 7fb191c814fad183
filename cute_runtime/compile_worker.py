"""The compile step, run in a process of its own: ``python -m cute_runtime.compile_worker REQUEST.json``.

It alone imports the compiler. Its own process keeps the compiler's environment variables, caches and dumps away from the user's
process, and a crash of the compiler from everything else. The request names the kernel, its parameters, the target, the
project's packages, the C compiler, the shared object to write and the function in it; for cute_runtime.emulator also where to put the
PTX, and the CUDA runtime to link into a second shared object.

A kernel module's ``trace(**params)`` returns ``(function, arguments)``: a ``@cute.jit`` function and fake arguments to compile
it for, the last of them ``make_fake_stream(use_tvm_ffi_env_stream=True)``, which becomes the caller's current stream and leaves
the signature. ``None`` among the arguments stays an argument that must be None. It cannot import torch: the compiler would, only
because it is installed, and loading it takes longer than compiling most kernels.
"""

import importlib
import importlib.abc
import importlib.machinery
import json
import os
import subprocess
import sys
from pathlib import Path

_OPTIONS = "--enable-tvm-ffi"


class _PackagesWithoutInit(importlib.abc.MetaPathFinder):
    """Finds the project's packages as bare folders: a kernel depends on the modules it imports, not on what lies around them."""

    def __init__(self, packages: list[str]) -> None:
        self.packages = packages

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in self.packages:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is None or spec.submodule_search_locations is None:
            return spec
        bare = importlib.machinery.ModuleSpec(fullname, None, is_package=True)
        bare.submodule_search_locations = spec.submodule_search_locations
        return bare


def _compile(request: dict, object_file: Path) -> None:
    os.environ["CUTE_DSL_ARCH"] = request["arch"]
    sys.modules["torch"] = None  # its import raises ModuleNotFoundError, as where it is not installed
    sys.meta_path.insert(0, _PackagesWithoutInit(request["packages"]))
    from cutlass import cute

    function, arguments = importlib.import_module(request["kernel"]).trace(**request["params"])
    emulator = request.get("emulator")
    compiled = cute.compile(function, *arguments, options=f"{_OPTIONS} --keep-ptx" if emulator else _OPTIONS)
    compiled.export_to_c(str(object_file), function_name=request["function"])
    if emulator:
        Path(emulator["ptx"]).write_text(compiled.__ptx__)


def _link(request: dict, object_file: Path, output: str, *extra: str) -> None:
    import nvidia_cutlass_dsl

    archives = sorted(Path(next(iter(nvidia_cutlass_dsl.__path__))).glob("cu1*/lib/libcuda_dialect_runtime_static.a"))
    if not archives:
        raise FileNotFoundError("libcuda_dialect_runtime_static.a: not in the installed nvidia-cutlass-dsl")
    shim = Path(__file__).with_name("shim.c")
    command = [request["cc"], "-O2", "-fPIC", "-shared", "-Wl,--build-id=none", "-o", output, object_file, shim, *extra, archives[0]]
    subprocess.run(command, check=True)


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    object_file = Path(request["output"]).with_suffix(".o")
    _compile(request, object_file)
    _link(request, object_file, request["output"])
    if emulator := request.get("emulator"):
        _link(request, object_file, emulator["output"], "-Wl,-Bsymbolic", emulator["cuda"])


if __name__ == "__main__":
    main()
