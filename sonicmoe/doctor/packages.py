"""Packages that fight over one library: who demands which version, from installed metadata, and the command that settles it."""

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from sonicmoe.doctor.findings import FAIL, OK, SKIPPED, WARN, Finding
from sonicmoe.doctor.machine import Machine

_WATCHED = re.compile(r"nvidia-cutlass-dsl(-libs-.*)?|apache-tvm-ffi|torch|cuda-(bindings|python)")
_OURS = "sonicmoe"
_FOLDERS = ("sonicmoe", "routing", "dispatch", "cute_runtime", "testing")
"""What we install into site-packages; another package's folder of that name and ours are one."""


@dataclass(frozen=True)
class Demand:
    """``owner`` (with its version) requires ``package`` in the versions of ``specifier`` (a packaging SpecifierSet)."""

    owner: str
    package: str
    specifier: Any

    def __str__(self) -> str:
        return f"{self.owner} demands {str(self.specifier) or 'any version'}"

    @property
    def owner_name(self) -> str:
        return self.owner.split(" ")[0]


def check_packages(machine: Machine) -> Iterator[Finding]:
    """An unmet demand of sonicmoe or among the watched libraries fails, as do files over ours; another package's demand warns."""
    try:
        machine.import_module("packaging.requirements")
    except Exception as error:
        yield Finding("packages", FAIL, f"packaging cannot be imported: {error}", "python -m pip install packaging")
        return
    installed, demands = read_installed(machine)
    if not any(demand.owner_name == _OURS for demand in demands):
        yield Finding("packages", SKIPPED, "sonicmoe's own demands are not known: it is neither installed nor beside its pyproject.toml")
    found = list(_overwritten(machine))
    for package in sorted({*installed, *(demand.package for demand in demands)}):
        found += judge(package, installed.get(package, []), [demand for demand in demands if demand.package == package])
    yield from found
    if not found:
        listed = ", ".join(f"{name} {versions[0]}" for name, versions in sorted(installed.items()))
        yield Finding("packages", OK, f"all demands are met on {listed or 'the watched libraries, none of which is installed'}")


def read_installed(machine: Machine) -> tuple[dict[str, list[str]], list[Demand]]:
    """Versions of every watched package (more than one after a broken upgrade), and all demands on watched packages."""
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import canonicalize_name

    search = {} if machine.metadata_path is None else {"path": machine.metadata_path}
    installed: dict[str, dict[str, None]] = {}
    owners: dict[str, tuple[str, list[str]]] = {}
    for one in metadata.distributions(**search):
        name = one.metadata["Name"] if one.metadata else None
        if not name:
            continue  # a folder that pip left half removed
        name = canonicalize_name(name)
        if _WATCHED.fullmatch(name):
            installed.setdefault(name, {})[one.version] = None
        # The first on the path is the one that is imported.
        owners.setdefault(name, (f"{name} {one.version}", one.requires or []))
    if _OURS not in owners and (declared := _declared_here()):
        owners[_OURS] = (_OURS, declared)
    demands = []
    for owner, requirements in owners.values():
        for text in requirements:
            try:
                requirement = Requirement(text)
            except InvalidRequirement:
                continue
            package = canonicalize_name(requirement.name)
            extra = "compile" if owner.split(" ")[0] == _OURS and package in installed else ""
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
            if applies and _WATCHED.fullmatch(package):
                demands.append(Demand(owner, package, requirement.specifier))
    return {name: list(versions) for name, versions in installed.items()}, sorted(demands, key=str)


def _overwritten(machine: Machine) -> Iterator[Finding]:
    """Packages that install files into a folder of ours: whichever came last is imported, in part or in whole."""
    from packaging.utils import canonicalize_name

    search = {} if machine.metadata_path is None else {"path": machine.metadata_path}
    ours = re.compile(rf'^"?({"|".join(_FOLDERS)})/', re.MULTILINE)
    for one in metadata.distributions(**search):
        name = canonicalize_name((one.metadata and one.metadata["Name"]) or "")
        folders = sorted({match[1] for match in ours.finditer(one.read_text("RECORD") or "")}) if name not in ("", _OURS) else []
        if folders:
            message = f"{name} {one.version} installs its own files into {', '.join(f'{folder}/' for folder in folders)}, as sonicmoe does"
            again = f'python -m pip uninstall -y {name} && python -m pip install --force-reinstall --no-deps "{_OURS}"'
            yield Finding("packages", FAIL, message, again)


def _declared_here() -> list[str]:
    """What pyproject.toml demands, in a checkout that is not installed."""
    try:
        project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        return []
    optional = project.get("optional-dependencies", {}).get("compile", [])
    return [*project.get("dependencies", []), *(f'{text}; extra == "compile"' for text in optional)]


def judge(package: str, versions: list[str], demands: list[Demand]) -> Iterator[Finding]:
    """Findings on one watched package; none where every demand is met."""
    if len(versions) > 1:
        remedy = f"python -m pip uninstall -y {package}; python -m pip install --force-reinstall {package}=={versions[0]}"
        yield Finding("packages", FAIL, f"{package} is installed in {len(versions)} versions at once: {', '.join(versions)}", remedy)
        return
    unmet = [one for one in demands if not versions or not one.specifier.contains(versions[0], prereleases=True)]
    if not unmet:
        return
    ours = any(one.owner_name == _OURS or _WATCHED.fullmatch(one.owner_name) for one in unmet)
    message = f"{package} {versions[0] if versions else 'is not installed'}, but {'; '.join(map(str, demands))}"
    yield Finding("packages", FAIL if ours else WARN, message, mend(package, demands))


def mend(package: str, demands: list[Demand]) -> str:
    """The command after which the demands are met; where they exclude each other, sonicmoe's and the library's own come first."""
    kept, given_up = None, []
    for one in sorted(demands, key=lambda one: (one.owner_name != _OURS, not _WATCHED.fullmatch(one.owner_name), one.owner)):
        combined = one.specifier if kept is None else kept & one.specifier
        if satisfiable(combined):
            kept = combined
        else:
            given_up.append(one.owner_name)
    install = f'python -m pip install "{package}{kept}"'
    if not given_up:
        return install
    return f"python -m pip uninstall -y {' '.join(given_up)} && {install} (or keep {' and '.join(given_up)} in another virtual environment)"


def satisfiable(specifier: Any) -> bool:
    """Whether some version meets all clauses: tried are the versions that they name and the next ones above each."""
    from packaging.version import Version

    candidates = [Version("0")]
    for clause in specifier:
        version = Version(clause.version.removesuffix(".*"))
        release = version.release
        candidates += [version, Version(".".join(map(str, (*release[:-1], release[-1] + 1)))), Version(".".join(map(str, (*release, 1))))]
    return any(specifier.contains(candidate, prereleases=True) for candidate in candidates)
