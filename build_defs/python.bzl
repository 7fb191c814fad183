"""Python libraries and pytest tests, without rules_python: its toolchains are downloads, and the interpreter that has
torch is the one of the virtual environment anyway. The import path of a file is its path in the repository.
"""

PyFilesInfo = provider(
    doc = "Python files that must lie in a tree, at their repository paths, for a target to be importable.",
    fields = {"files": "depset of File: sources and data of the target and all its dependencies"},
)

def _collect(ctx, files):
    """Returns (depset of files, runfiles) of `files` and everything in deps and data."""
    libraries = ctx.attr.deps + ctx.attr.runtime_deps
    targets = libraries + ctx.attr.data
    transitive = [library[PyFilesInfo].files for library in libraries] + [target.files for target in ctx.attr.data]
    runfiles = ctx.runfiles(files = files + ctx.files.data)
    for target in targets:  # runfiles.merge_all is missing in Bazel 4
        runfiles = runfiles.merge(target[DefaultInfo].default_runfiles)
    return depset(files, transitive = transitive), runfiles

def _library_impl(ctx):
    files, runfiles = _collect(ctx, ctx.files.srcs)
    return [
        DefaultInfo(files = depset(ctx.files.srcs), runfiles = runfiles),
        PyFilesInfo(files = files),
    ]

_COMMON_ATTRS = {
    "data": attr.label_list(allow_files = True, doc = "files read at run time"),
    "deps": attr.label_list(providers = [PyFilesInfo], doc = "exactly the libraries that srcs import"),
    "runtime_deps": attr.label_list(providers = [PyFilesInfo], doc = "libraries that srcs find by name at run time"),
}

_library = rule(
    implementation = _library_impl,
    attrs = dict(
        _COMMON_ATTRS,
        srcs = attr.label_list(allow_files = [".py"], mandatory = True),
    ),
)

_LAUNCHER = """#!/bin/sh
# Runs pytest on the files of {label} inside the tree of its declared dependencies.
set -eu
root="${{TEST_SRCDIR:-$0.runfiles}}/{workspace}"
scratch="${{TEST_TMPDIR:-$(mktemp -d)}}"
cd "$root"
export PYTHONPATH="$root" PYTHONDONTWRITEBYTECODE=1 HOME="$scratch"
exec "${{PYTHON:-python3}}" -m pytest -p no:cacheprovider --basetemp="$scratch/pytest" \\
    --junitxml="${{XML_OUTPUT_FILE:-$scratch/test.xml}}" -m '{marker}' {files} "$@"
"""

def _test_impl(ctx):
    launcher = ctx.actions.declare_file(ctx.label.name + ".sh")
    ctx.actions.write(
        output = launcher,
        is_executable = True,
        content = _LAUNCHER.format(
            label = ctx.label,
            workspace = ctx.workspace_name,
            marker = ctx.attr.marker,
            files = " ".join([f.short_path for f in ctx.files.srcs]),
        ),
    )
    _, runfiles = _collect(ctx, ctx.files.srcs + ctx.files._pytest)
    return [DefaultInfo(executable = launcher, runfiles = runfiles)]

_pytest_test = rule(
    implementation = _test_impl,
    test = True,
    attrs = dict(
        _COMMON_ATTRS,
        srcs = attr.label_list(allow_files = [".py"], mandatory = True),
        marker = attr.string(mandatory = True, doc = "pytest's -m expression"),
        _pytest = attr.label(default = "//:pytest_config"),
    ),
)

def sonic_py_library(name, srcs, deps = [], **kwargs):
    """A library whose deps are exactly its imports (kept by //build_defs/tests:test_build_files).

    Args:
      name: target name; the package's main library has the folder's name.
      srcs: Python files.
      deps: libraries that the files import.
      **kwargs: data, runtime_deps (libraries found by name at run time), visibility and other common attributes.
    """
    _library(name = name, srcs = srcs, deps = deps, **kwargs)

def sonic_py_test(src, deps = [], data = [], gpu = "none", gpu_data = [], tags = [], size = "small", **kwargs):
    """One pytest file as a test target named after it, and its GPU tests as NAME_gpu.

    The GPU target is tagged `gpu` and runs alone on the machine; where there is no sm_90 GPU its tests are skipped by
    conftest.py.

    Args:
      src: the test file.
      deps: libraries that it imports.
      data: files that it reads.
      gpu: which of its tests are marked `gpu`: "none", "some" or "all".
      gpu_data: files that only the GPU tests read, such as prebuilt kernels.
      tags: Bazel tags.
      size: Bazel test size, which says how long it should take; .bazelrc gives every size ample time on a busy machine.
      **kwargs: runtime_deps and common test attributes.
    """
    name = src[:-len(".py")]
    if gpu != "all":
        _pytest_test(
            name = name,
            srcs = [src],
            deps = deps,
            data = data,
            marker = "not gpu",
            tags = tags,
            size = size,
            **kwargs
        )
    if gpu != "none":
        _pytest_test(
            name = name + "_gpu",
            srcs = [src],
            deps = deps,
            data = data + gpu_data,
            marker = "gpu",
            tags = tags + ["gpu", "exclusive"],
            size = size,
            **kwargs
        )

def checked_files():
    """The package's BUILD file and Python files, for //build_defs/tests:test_build_files, which compares the two."""
    native.filegroup(
        name = "checked_files",
        srcs = native.glob(["**/*.py"]) + ["BUILD.bazel"],
        visibility = ["//visibility:public"],
    )
