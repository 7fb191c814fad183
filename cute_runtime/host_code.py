"""How host code, a C file among the kernels, becomes a shared object with one function of TVM-FFI."""

from pathlib import Path

from cute_runtime.sources import package_folder, source_path
from cute_runtime.variant import Variant


def command(variant: Variant, cc: str, output: Path) -> list[str]:
    """The call of the C compiler. What the object names of libtvm_ffi is found when it is loaded, as with a kernel's."""
    source = source_path(variant.kernel.replace(".", "/") + ".c")
    tvm_ffi = package_folder("tvm_ffi")
    include = [] if tvm_ffi is None else [f"-I{tvm_ffi / 'include'}"]  # apache-tvm-ffi's; without it the compiler names the header
    options = ["-O2", "-std=c11", "-Wall", "-Wextra", "-Wno-unused-parameter", "-fPIC", "-shared", "-Wl,--build-id=none"]
    return [cc, *options, *include, "-o", str(output), str(source)]
