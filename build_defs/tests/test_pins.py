import re
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).absolute().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def constraints() -> dict[str, str]:
    lines = (ROOT / "requirements" / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pins.items()}


def requirements() -> list[Requirement]:
    extras = PROJECT["project"]["optional-dependencies"].values()
    listed = [*PROJECT["project"]["dependencies"], *(text for extra in extras for text in extra)]
    return [requirement for requirement in map(Requirement, listed) if requirement.name != "sonicmoe"]


def test_one_ruff_is_pinned_everywhere():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    revision = next(repo["rev"] for repo in hooks if repo["repo"].endswith("/ruff-pre-commit"))
    ranges = [str(requirement.specifier) for requirement in requirements() if requirement.name == "ruff"]
    pins = {revision.removeprefix("v"), constraints()["ruff"], PROJECT["tool"]["ruff"]["required-version"].removeprefix("=="), *ranges}
    assert {pin.removeprefix("==") for pin in pins} == {revision.removeprefix("v")}


def test_pins_satisfy_the_declared_ranges():
    pins = constraints()
    outside = [
        str(item) for item in requirements() if item.name in pins and not item.specifier.contains(pins[canonicalize_name(item.name)])
    ]
    assert outside == []


def test_what_decides_a_result_is_pinned():
    assert {"torch", "numpy", "nvidia-cutlass-dsl", "apache-tvm-ffi", "pytest", "ruff", "zizmor"} <= constraints().keys()


def test_python_range_is_the_linted_one():
    minimum = re.fullmatch(r">=(\d+)\.(\d+)", PROJECT["project"]["requires-python"])
    assert PROJECT["tool"]["ruff"]["target-version"] == "py{}{}".format(*minimum.groups())
