import subprocess
import sys

import pytest

import sonicmoe
from sonicmoe import cli


def test_import_loads_neither_torch_nor_a_compiler():
    code = "import sys, sonicmoe, sonicmoe.__main__; print(sorted({'torch', 'cutlass', 'numpy', 'rich'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_help_of_every_command_needs_no_torch():
    code = """
import sys
sys.modules["torch"] = None
from sonicmoe import cli
for command in cli.COMMANDS:
    try:
        cli.main([command, "--help"])
    except SystemExit as ended:
        assert not ended.code
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.count("usage: sonicmoe ") == len(cli.COMMANDS)
    assert "{swiglu,geglu,reglu,swiglu_oai,silu,gelu,relu,relu_squared}" in result.stdout


def test_first_step_does_not_load_torch_compile():
    """It takes seconds, and `torch.library.custom_op` would load it; see `dispatch.operators`."""
    step = "sonicmoe.MoE(16, 8, 4, 2)(torch.randn(3, 16)).sum().backward()"
    code = f"import sys, torch, sonicmoe; {step}; print('torch._dynamo' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_a_layer_does_not_load_what_builds_and_inspects_kernels():
    step = "sonicmoe.MoE(16, 8, 4, 2)(torch.randn(3, 16)).sum().backward()"
    tools = ["tvm_ffi", *(f"cute_runtime.{name}" for name in ("builder", "resources", "cli", "compile_worker", "emulator"))]
    code = f"import sys, torch, sonicmoe; {step}; print(sorted(set(sys.modules) & set({tools})))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_public_name_loads():
    assert set(sonicmoe.__all__) <= set(dir(sonicmoe))
    for name in sonicmoe.__all__:
        assert getattr(sonicmoe, name).__name__ == name


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Moe'"):
        sonicmoe.Moe  # noqa: B018
