"""What a cell of the matrix is, and how testing/matrix.yaml becomes a list of them.

Notation: T tokens, H hidden size, I intermediate size, E experts, K experts per token, R routed rows.
A file that cannot be is refused before anything runs, in one sentence with file, line and cell (MatrixError).
This module, the plan, the gate and the reports need no torch, so that a plain CI runner can plan and decide.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from sonicmoe.names import ACTIVATIONS, LAYOUTS, ROUNDING_MODES
from sonicmoe.thiek import Thiek
from testing.matrix.located import LocatedDict, LocatedList, MatrixError, load
from testing.matrix.speed import Floor, Floors, Rule

DEFAULT_MATRIX = Path(__file__).resolve().parent.parent / "matrix.yaml"
_NOTHING = LocatedDict()
_NOTHING.line, _NOTHING.lines = 0, {}

DTYPES = ("bf16", "fp16", "fp32")
LOADS = ("normal", "skewed", "ties", "non_finite", "recorded")
METHODS = ("top_k", "token_rounding")
SCORINGS = ("softmax", "softmax_topk", "sigmoid")
GROUP_SCORES = ("top2", "max")
TRANSPORTS = ("all_to_all", "symmetric_memory")
SPEED_MODES = ("inference", "forward", "forward+backward")
TENSORS = ("o", "dx", "dw_up", "dw_down", "db_up", "db_down", "drouter")


@dataclass(frozen=True)
class RoutingSpec:
    """A named way to route: the arguments of `routing.top_k` or `routing.token_rounding` that do not depend on sizes."""

    name: str
    method: str = "top_k"
    scoring: str = "softmax"
    renormalize: bool = False
    scale: float = 1.0
    selection_bias: float = 0.0
    """Standard deviation of a random per-expert selection bias; 0 is none."""
    num_groups: int = 1
    groups_per_token: int = 1
    group_score: str = "top2"
    tile_m: int | None = None
    mode: str | None = None


@dataclass(frozen=True)
class Cell:
    """What every cell has."""

    kind: ClassVar[str]
    needs_gpu: ClassVar[bool] = False
    name: str
    line: int

    @property
    def gpus(self) -> int:
        """How many GPUs it needs for itself."""
        return int(self.needs_gpu)


@dataclass(frozen=True)
class LayerCell(Cell):
    """Routing, dispatch, forward and all gradients of one layer."""

    kind: ClassVar[str] = "layer"
    thiek: Thiek
    routing: RoutingSpec
    load: str = "normal"
    counts: tuple[int, ...] | None = None
    """Rows of each expert, for K = 1; overrides `load`."""
    dtype: str = "bf16"
    activation: str = "swiglu"
    layout: str = "interleaved"
    bias: bool = False
    sentinels: float = 0.0
    """Share of the routing's slots that are turned into sentinels, as under expert parallelism."""
    repeats: int | None = None
    """Runs that must give the same bits; None is the profile's number."""


@dataclass(frozen=True)
class RoutingCell(Cell):
    """Routing and dispatch alone, at sizes where experts would not tell more."""

    kind: ClassVar[str] = "routing"
    tokens: int
    experts: int
    per_token: int
    routing: RoutingSpec
    load: str = "normal"


@dataclass(frozen=True)
class CountCell(Cell):
    """count_cumsum for one number of experts over many lengths, int32 and int64, eager and compiled."""

    kind: ClassVar[str] = "count_cumsum"
    experts: int
    lengths: tuple[int, ...] = ()
    powers: tuple[int, ...] = ()
    """Exponents i; each adds the lengths 2**i .. 2**i + 9."""
    random_lengths: int = 0
    """How many lengths of 3000 +- 1000 to draw."""


@dataclass(frozen=True)
class SpeedCell(Cell):
    """The time of one layer in one mode next to the GEMM bound, in one run."""

    kind: ClassVar[str] = "speed"
    needs_gpu: ClassVar[bool] = True
    thiek: Thiek
    routing: RoutingSpec
    mode: str
    dtype: str = "bf16"


@dataclass(frozen=True)
class ParallelCell(Cell):
    """One layer whose experts are spread over processes: outputs and all gradients, put together, against the oracle."""

    kind: ClassVar[str] = "parallel"
    thiek: Thiek
    """T of all processes."""
    routing: RoutingSpec
    processes: int
    on_gpus: bool = False
    """One GPU for each process and NCCL; else CPUs and gloo, on any machine."""
    split: tuple[int, ...] | None = None
    """Tokens of each process; None is as even as can be."""
    chunks: int = 1
    transport: str = "all_to_all"
    dtype: str = "bf16"
    bias: bool = False

    @property
    def needs_gpu(self) -> bool:
        return self.on_gpus

    @property
    def gpus(self) -> int:
        return self.processes if self.on_gpus else 0


@dataclass(frozen=True)
class Limits:
    """How large a layer's experts may be in a profile; None is no limit."""

    routed_rows: int | None
    """R = T*K of the experts' problem; T gives way."""
    weight_elements: int
    """E * (up + down) weight elements; first I gives way (down to min_intermediate), then E."""
    min_intermediate: int | None
    """None keeps I."""
    tile_m: int | None
    """The largest rounding tile of a reduced problem; None keeps it."""


@dataclass(frozen=True)
class Profile:
    """What one kind of machine runs."""

    name: str
    limits: Limits
    repeats: int
    """Runs of each layer that must give the same bits."""
    memory_gib: float
    """All workers of one GPU together, or of the machine where there is none."""
    cell_timeout_s: float


class Threshold(NamedTuple):
    """Largest relative Frobenius error that passes."""

    whole: float
    worst_block: float


@dataclass(frozen=True)
class Matrix:
    """A whole matrix file."""

    path: Path
    cells: tuple[Cell, ...]
    profiles: dict[str, Profile]
    thresholds: dict[str, dict[str, Threshold]]
    """dtype -> tensor -> threshold."""
    groups: dict[str, str]
    """Group -> what it is about."""
    speed_rule: Rule
    floors: list[Floors]
    """Of the speed cells, device by device."""

    def cells_of(self, kind: str) -> list[Cell]:
        return [cell for cell in self.cells if cell.kind == kind]


def load_matrix(path: Path = DEFAULT_MATRIX) -> Matrix:
    """Read and check a matrix file.

    Raises:
        MatrixError: anything in it cannot be; the message names file, line and cell.
    """
    return _Reader(path).read()


class _Reader:
    """Turns the file's sections into dataclasses; every problem becomes one MatrixError with a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: dict[str, int] = {}
        self.groups: dict[str, str] = {}

    def fail(self, line: int, where: str, problem: str) -> None:
        raise MatrixError(f"{self.path}:{line}: {where}: {problem}")

    def read(self) -> Matrix:
        root = load(self.path)
        sections = {"speed_rule", "floors", "accuracy", "profiles", "routings", "layers", "routing", "count_cumsum", "speed"}
        self.check_keys(root, "the file", required=sections, optional={"parallel"})
        thresholds = self.read_thresholds(root["accuracy"])
        profiles = {name: self.read_profile(name, body) for name, body in self.items(root["profiles"], "profiles")}
        self.routings = {name: self.read_routing(name, body) for name, body in self.items(root["routings"], "routings")}
        cells: list[Cell] = []
        for section, build in (
            ("layers", self.read_layer),
            ("routing", self.read_routing_cell),
            ("count_cumsum", self.read_count),
            ("speed", self.read_speed),
        ):
            cells += self.read_groups(root[section], section, build)
        if "parallel" in root:
            cells += self.read_groups(root["parallel"], "parallel", self.read_parallel)
        for cell in cells:
            dtype = getattr(cell, "dtype", None)
            if isinstance(cell, LayerCell | ParallelCell) and dtype not in thresholds:
                self.fail(cell.line, f"cell {cell.name}", f"dtype {dtype} has no thresholds under accuracy")
        rule = self.read_speed_rule(root["speed_rule"])
        floors = self.read_floors(root["floors"], {cell.name for cell in cells if isinstance(cell, SpeedCell)})
        return Matrix(self.path, tuple(cells), profiles, thresholds, self.groups, rule, floors)

    # --- shape of the file ---------------------------------------------------------------------------------------

    def check_keys(self, body: Any, where: str, *, required: set[str], optional: set[str], line: int = 1) -> None:
        if not isinstance(body, LocatedDict):
            self.fail(line, where, f"must be a mapping with the keys {', '.join(sorted(required | optional))}")
        for key in body:
            if key not in required | optional:
                self.fail(body.lines[key], where, f"unknown key {key!r}; known keys are {', '.join(sorted(required | optional))}")
        missing = sorted(required - set(body))
        if missing:
            self.fail(body.line, where, f"{missing[0]} is missing")

    def items(self, body: Any, where: str) -> Iterable[tuple[str, Any]]:
        if not isinstance(body, LocatedDict):
            self.fail(1, where, "must be a mapping of names")
        return body.items()

    def read_groups(self, groups: Any, section: str, build: Callable[[LocatedDict, str, int], Iterable[Cell]]) -> list[Cell]:
        """A section is a list of groups; a group is {group, about, common?, cells}; a cell is one mapping on one line."""
        if not isinstance(groups, list):
            self.fail(1, section, "must be a list of groups")
        cells: list[Cell] = []
        for group, line in zip(groups, groups.lines, strict=True):
            self.check_keys(group, f"a group of {section}", required={"group", "about", "cells"}, optional={"common"}, line=line)
            title = self.word(group, "group", f"a group of {section}")
            self.groups[title] = self.word(group, "about", f"group {title}")
            common, bodies = group.get("common", _NOTHING), group["cells"]
            if not isinstance(common, LocatedDict):
                self.fail(group.lines["common"], f"group {title}", "common must be a mapping of what its cells share")
            if not isinstance(bodies, LocatedList):
                self.fail(group.lines["cells"], f"group {title}", "cells must be a list of cells")
            for body, cell_line in zip(bodies, bodies.lines, strict=True):
                if not isinstance(body, LocatedDict) or "name" not in body:
                    self.fail(cell_line, f"group {title}", "a cell must be a mapping with a name")
                name = f"{title}/{self.word(body, 'name', f'group {title}')}"
                merged = LocatedDict({**common, **body})
                merged.line = cell_line
                merged.lines = {**common.lines, **body.lines}
                for cell in build(merged, name, cell_line):
                    if cell.name in self.names:
                        self.fail(cell_line, f"cell {cell.name}", f"the name was already given on line {self.names[cell.name]}")
                    self.names[cell.name] = cell_line
                    cells.append(cell)
        return cells

    # --- values --------------------------------------------------------------------------------------------------

    def word(self, body: LocatedDict, key: str, where: str) -> str:
        value = body[key]
        if not isinstance(value, str) or not value:
            self.fail(body.lines[key], where, f"{key} {value!r} must be a text")
        return value

    def choice(self, body: LocatedDict, key: str, allowed: Iterable[str], where: str, default: str) -> str:
        value = body.get(key, default)
        if value not in allowed:
            self.fail(body.lines.get(key, body.line), where, f"{key} {value!r} is not one of {', '.join(allowed)}")
        return value

    def whole(self, body: LocatedDict, key: str, where: str, *, low: int, default: int | None = None, none: bool = False) -> Any:
        value = body.get(key, default)
        if value is None and none:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            self.fail(body.lines.get(key, body.line), where, f"{key} {value!r} must be a whole number of at least {low}")
        return value

    def number(self, body: LocatedDict, key: str, where: str, *, low: float, high: float, default: float | None = None) -> float:
        value = body.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            self.fail(body.lines.get(key, body.line), where, f"{key} {value!r} must be a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, body: LocatedDict, key: str, where: str) -> bool:
        value = body.get(key, False)
        if not isinstance(value, bool):
            self.fail(body.lines.get(key, body.line), where, f"{key} {value!r} must be true or false")
        return value

    def integers(self, body: LocatedDict, key: str, where: str, *, low: int) -> tuple[int, ...]:
        value = body.get(key, [])
        if not isinstance(value, list) or any(isinstance(item, bool) or not isinstance(item, int) or item < low for item in value):
            self.fail(body.lines.get(key, body.line), where, f"{key} must be a list of whole numbers of at least {low}")
        return tuple(value)

    def sizes(self, body: LocatedDict, where: str) -> Thiek:
        line = body.lines.get("thiek", body.line)
        value = self.integers(body, "thiek", where, low=0)
        if len(value) != 5:
            self.fail(line, where, f"thiek {list(value)} must be the five numbers [T, H, I, E, K]")
        sizes = Thiek(*value)
        for name, size in (("H", sizes.H), ("I", sizes.I)):
            if size < 8 or size % 8:
                self.fail(line, where, f"{name}={size} must be a positive multiple of 8")
        self.check_routable(sizes.T, sizes.E, sizes.K, line, where)
        return sizes

    def check_routable(self, tokens: int, experts: int, per_token: int, line: int, where: str) -> None:
        if experts < 1:
            self.fail(line, where, f"E={experts} must be at least 1")
        if not 1 <= per_token <= experts:
            self.fail(line, where, f"K={per_token} must be from 1 to E={experts}")
        if tokens * per_token >= 2**31 or experts >= 2**31:
            self.fail(line, where, f"T*K={tokens * per_token} and E={experts} must be below 2**31, for indices are int32")

    # --- the sections --------------------------------------------------------------------------------------------

    def read_thresholds(self, body: Any) -> dict[str, dict[str, Threshold]]:
        self.check_keys(body, "accuracy", required=set(), optional=set(DTYPES))
        result: dict[str, dict[str, Threshold]] = {}
        for dtype, tensors in body.items():
            where = f"accuracy {dtype}"
            self.check_keys(tensors, where, required=set(TENSORS), optional=set(), line=body.lines[dtype])
            result[dtype] = {}
            for tensor, pair in tensors.items():
                at = f"{where} {tensor}"
                self.check_keys(pair, at, required={"whole", "worst_block"}, optional=set(), line=tensors.lines[tensor])
                threshold = Threshold(*(self.number(pair, key, at, low=1e-12, high=1.0) for key in ("whole", "worst_block")))
                if threshold.worst_block < threshold.whole:
                    self.fail(pair.line, at, "worst_block must not be tighter than whole")
                result[dtype][tensor] = threshold
        return result

    def read_speed_rule(self, body: Any) -> Rule:
        self.check_keys(body, "speed_rule", required=set(Rule._fields), optional=set())
        return Rule(*(self.number(body, key, "speed_rule", low=1e-4, high=0.5) for key in Rule._fields))

    def read_floors(self, blocks: Any, speed_cells: set[str]) -> list[Floors]:
        """A list of {device, power_limit_w, cells}; nothing at all before the first recorded run."""
        if blocks is not None and not isinstance(blocks, list):
            self.fail(1, "floors", "must be a list of devices")
        floors = []
        for body in blocks or []:
            where = f"floors of {body['device']}" if isinstance(body, LocatedDict) and "device" in body else "floors"
            self.check_keys(body, where, required={"device", "power_limit_w", "cells"}, optional=set(), line=blocks.line)
            device = self.word(body, "device", "floors")
            power = None if body["power_limit_w"] is None else self.number(body, "power_limit_w", where, low=1, high=10_000)
            cells = {}
            for name, floor in self.items(body["cells"], where):
                if name not in speed_cells:
                    self.fail(body["cells"].lines[name], where, f"{name} is not a speed cell of this file")
                cells[name] = self.read_floor(floor, f"{where}, {name}")
            floors.append(Floors(device, power, cells))
        return floors

    def read_floor(self, body: Any, where: str) -> Floor:
        self.check_keys(body, where, required={"ratio", "tflops", "date"}, optional={"kernels"})
        kernels = dict(self.items(body.get("kernels", LocatedDict()), where))
        values = {name: self.number(body["kernels"], name, where, low=1e-6, high=1e6) for name in kernels}
        ratio, tflops = (self.number(body, key, where, low=1e-6, high=1e6) for key in ("ratio", "tflops"))
        return Floor(ratio, tflops, values, str(body["date"]))

    def read_profile(self, name: str, body: Any) -> Profile:
        where = f"profile {name}"
        self.check_keys(body, where, required={"limits", "repeats", "memory_gib", "cell_timeout_s"}, optional=set())
        limits, at = body["limits"], f"{where} limits"
        self.check_keys(limits, at, required={field.name for field in fields(Limits)}, optional=set(), line=body.lines["limits"])
        return Profile(
            name=name,
            limits=Limits(
                routed_rows=self.whole(limits, "routed_rows", at, low=1, none=True),
                weight_elements=self.whole(limits, "weight_elements", at, low=1),
                min_intermediate=self.whole(limits, "min_intermediate", at, low=8, none=True),
                tile_m=self.whole(limits, "tile_m", at, low=1, none=True),
            ),
            repeats=self.whole(body, "repeats", where, low=2),
            memory_gib=self.number(body, "memory_gib", where, low=1, high=10_000),
            cell_timeout_s=self.number(body, "cell_timeout_s", where, low=1, high=36_000),
        )

    def read_routing(self, name: str, body: Any) -> RoutingSpec:
        where = f"routing {name}"
        known = {field.name for field in fields(RoutingSpec)} - {"name"}
        self.check_keys(body, where, required={"method"}, optional=known - {"method"})
        spec = RoutingSpec(
            name=name,
            method=self.choice(body, "method", METHODS, where, "top_k"),
            scoring=self.choice(body, "scoring", SCORINGS, where, "softmax"),
            renormalize=self.flag(body, "renormalize", where),
            scale=self.number(body, "scale", where, low=1e-3, high=1e3, default=1.0),
            selection_bias=self.number(body, "selection_bias", where, low=0, high=10, default=0.0),
            num_groups=self.whole(body, "num_groups", where, low=1, default=1),
            groups_per_token=self.whole(body, "groups_per_token", where, low=1, default=1),
            group_score=self.choice(body, "group_score", GROUP_SCORES, where, "top2"),
        )
        if spec.groups_per_token > spec.num_groups:
            self.fail(body.line, where, f"groups_per_token {spec.groups_per_token} must not exceed num_groups {spec.num_groups}")
        if spec.method == "top_k":
            for key in ("tile_m", "mode"):
                if key in body:
                    self.fail(body.lines[key], where, f"{key} is for token_rounding only")
            return spec
        for key in ("tile_m", "mode"):
            if key not in body:
                self.fail(body.line, where, f"{key} is missing; token_rounding needs it")
        mode = self.choice(body, "mode", ROUNDING_MODES, where, "nearest")
        return replace(spec, tile_m=self.whole(body, "tile_m", where, low=1), mode=mode)

    def named_routing(self, body: LocatedDict, where: str, experts: int, per_token: int) -> RoutingSpec:
        name = self.choice(body, "routing", tuple(self.routings), where, "")
        line = body.lines["routing"]
        spec = self.routings[name]
        if experts % spec.num_groups:
            self.fail(line, where, f"E={experts} must be a multiple of the {spec.num_groups} groups of routing {name}")
        choosable = experts // spec.num_groups * spec.groups_per_token
        if per_token > choosable:
            self.fail(line, where, f"K={per_token} must not exceed the {choosable} experts that routing {name} leaves to a token")
        return spec

    def read_layer(self, body: LocatedDict, name: str, line: int) -> Iterable[Cell]:
        where = f"cell {name}"
        known = {field.name for field in fields(LayerCell)} - {"line"}
        self.check_keys(body, where, required={"name", "thiek", "routing"}, optional=known - {"name", "thiek", "routing"})
        sizes = self.sizes(body, where)
        routing = self.named_routing(body, where, sizes.E, sizes.K)
        counts = self.integers(body, "counts", where, low=0) or None
        if counts is not None:
            at = body.lines["counts"]
            if sizes.K != 1 or routing.method != "top_k":
                self.fail(at, where, "counts needs K=1 and a top_k routing")
            if len(counts) != sizes.E or sum(counts) != sizes.T:
                wanted = f"E={sizes.E} numbers with sum T={sizes.T}"
                self.fail(at, where, f"counts has {len(counts)} numbers with sum {sum(counts)}; it must be {wanted}")
        yield LayerCell(
            name=name,
            line=line,
            thiek=sizes,
            routing=routing,
            load=self.choice(body, "load", LOADS, where, "normal"),
            counts=counts,
            dtype=self.choice(body, "dtype", DTYPES, where, "bf16"),
            activation=self.choice(body, "activation", ACTIVATIONS, where, "swiglu"),
            layout=self.choice(body, "layout", LAYOUTS, where, "interleaved"),
            bias=self.flag(body, "bias", where),
            sentinels=self.number(body, "sentinels", where, low=0, high=1, default=0.0),
            repeats=self.whole(body, "repeats", where, low=2, none=True),
        )

    def read_routing_cell(self, body: LocatedDict, name: str, line: int) -> Iterable[Cell]:
        where = f"cell {name}"
        required = {"name", "tokens", "experts", "per_token", "routing"}
        self.check_keys(body, where, required=required, optional={"load"})
        tokens, experts, per_token = (self.whole(body, key, where, low=0) for key in ("tokens", "experts", "per_token"))
        self.check_routable(tokens, experts, per_token, line, where)
        routing = self.named_routing(body, where, experts, per_token)
        yield RoutingCell(name, line, tokens, experts, per_token, routing, self.choice(body, "load", LOADS, where, "normal"))

    def read_count(self, body: LocatedDict, name: str, line: int) -> Iterable[Cell]:
        where = f"cell {name}"
        self.check_keys(body, where, required={"name", "experts"}, optional={"lengths", "powers", "random_lengths"})
        cell = CountCell(
            name=name,
            line=line,
            experts=self.whole(body, "experts", where, low=1),
            lengths=self.integers(body, "lengths", where, low=0),
            powers=self.integers(body, "powers", where, low=0),
            random_lengths=self.whole(body, "random_lengths", where, low=0, default=0),
        )
        if not (cell.lengths or cell.powers or cell.random_lengths):
            self.fail(line, where, "one of lengths, powers and random_lengths must be given")
        if any(power > 24 for power in cell.powers):
            self.fail(line, where, "powers must not exceed 24")
        yield cell

    def read_speed(self, body: LocatedDict, name: str, line: int) -> Iterable[Cell]:
        where = f"cell {name}"
        self.check_keys(body, where, required={"name", "thiek", "routing", "modes"}, optional={"dtype"})
        sizes = self.sizes(body, where)
        if sizes.T == 0:
            self.fail(line, where, "T=0 has no speed")
        routing = self.named_routing(body, where, sizes.E, sizes.K)
        if not isinstance(body["modes"], list) or not body["modes"]:
            self.fail(body.lines["modes"], where, f"modes must be a list of {', '.join(SPEED_MODES)}")
        for mode in body["modes"]:
            if mode not in SPEED_MODES:
                self.fail(body.lines["modes"], where, f"mode {mode!r} is not one of {', '.join(SPEED_MODES)}")
            yield SpeedCell(
                name=f"{name}/{mode}",
                line=line,
                thiek=sizes,
                routing=routing,
                mode=mode,
                dtype=self.choice(body, "dtype", ("bf16", "fp16"), where, "bf16"),
            )

    def read_parallel(self, body: LocatedDict, name: str, line: int) -> Iterable[Cell]:
        where = f"cell {name}"
        known = {field.name for field in fields(ParallelCell)} - {"line"}
        required = {"name", "thiek", "routing", "processes"}
        self.check_keys(body, where, required=required, optional=known - required)
        sizes = self.sizes(body, where)
        routing = self.named_routing(body, where, sizes.E, sizes.K)
        if routing.selection_bias:
            self.fail(body.lines["routing"], where, f"routing {routing.name} has a selection bias, which parallel cells do not have")
        processes = self.whole(body, "processes", where, low=1)
        if sizes.E % processes:
            self.fail(body.lines["processes"], where, f"E={sizes.E} must be a multiple of processes={processes}")
        split = self.integers(body, "split", where, low=0) or None
        if split is not None and (len(split) != processes or sum(split) != sizes.T):
            wanted = f"processes={processes} numbers with sum T={sizes.T}"
            self.fail(body.lines["split"], where, f"split has {len(split)} numbers with sum {sum(split)}; it must be {wanted}")
        on_gpus = self.flag(body, "on_gpus", where)
        transport = self.choice(body, "transport", TRANSPORTS, where, "all_to_all")
        if transport == "symmetric_memory" and not on_gpus:
            self.fail(body.lines["transport"], where, "transport symmetric_memory needs on_gpus: true")
        yield ParallelCell(
            name=name,
            line=line,
            thiek=sizes,
            routing=routing,
            processes=processes,
            on_gpus=on_gpus,
            split=split,
            chunks=self.whole(body, "chunks", where, low=1, default=1),
            transport=transport,
            dtype=self.choice(body, "dtype", DTYPES, where, "bf16"),
            bias=self.flag(body, "bias", where),
        )
