"""CuTe-DSL kernels as build artefacts: one cached action per variant, no GPU needed."""

load("//build_defs:python.bzl", "PyFilesInfo")

def _cute_kernel_impl(ctx):
    output = ctx.actions.declare_file("prebuilt/" + ctx.label.name + ".so")
    sources = depset(transitive = [dep[PyFilesInfo].files for dep in [ctx.attr.library, ctx.attr._compiler]])
    ctx.actions.run_shell(
        outputs = [output],
        inputs = sources,
        command = 'PYTHONPATH=. PYTHONDONTWRITEBYTECODE=1 "${PYTHON:-python3}" -m cute_runtime build --quiet --variant "$1" --out "$2"',
        arguments = [ctx.label.name, output.dirname],
        use_default_shell_env = True,  # PYTHON and SONICMOE_TOOLCHAIN, see .bazelrc
        mnemonic = "CuteKernel",
        progress_message = "Compiling %s for sm_90a" % ctx.label.name,
    )
    return [DefaultInfo(files = depset([output]), runfiles = ctx.runfiles(files = [output]))]

_cute_kernel = rule(
    implementation = _cute_kernel_impl,
    attrs = {
        "library": attr.label(mandatory = True, providers = [PyFilesInfo], doc = "the kernel's device half and what it imports"),
        "_compiler": attr.label(default = "//cute_runtime", providers = [PyFilesInfo]),
    },
)

def kernel_sources():
    """The package's files as `:sources`: what its objects are compiled from, and checked against when they are loaded.

    A kernel imports from its own folder alone.
    """
    native.filegroup(
        name = "sources",
        srcs = native.glob(["*.c", "*.py"]),
        visibility = ["//visibility:public"],
    )

def cute_kernels(name, variants, tags = [], visibility = ["//visibility:public"]):
    """One target per variant, named after it, and the group of them all.

    An object lands in prebuilt/ beside the kernel's module, where cute_runtime looks for it: a test that has the group
    in its data finds the kernels without a compiler, and with them `:sources`, from which it compiles other variants.

    Args:
      name: the group.
      variants: VARIANTS of the package's variants.bzl: kernel name (also its sonic_py_library here) to variant names.
      tags: of all targets; "manual" keeps them out of `bazel build //...`.
      visibility: of the group.
    """
    for kernel, names in variants.items():
        for variant in names:
            _cute_kernel(name = variant, library = ":" + kernel, tags = tags, visibility = visibility)
    native.filegroup(
        name = name,
        srcs = [":" + variant for names in variants.values() for variant in names],
        data = [":sources"],
        tags = tags,
        visibility = visibility,
    )

def _kernel_folder_impl(ctx):
    folder = ctx.actions.declare_directory(ctx.label.name)
    ctx.actions.run_shell(
        outputs = [folder],
        inputs = ctx.files.kernels,
        command = 'out=$1; shift; cp -L "$@" "$out"',
        arguments = [folder.path] + [kernel.path for kernel in ctx.files.kernels],
        mnemonic = "KernelFolder",
    )
    return [DefaultInfo(files = depset([folder]))]

kernel_folder = rule(
    implementation = _kernel_folder_impl,
    doc = "All kernels in one folder, for the wheel and for the H100 runners.",
    attrs = {"kernels": attr.label_list(mandatory = True)},
)
