"""`sonicmoe bench --peers`: every adapter hands over the same problem and gives results back in our layout; none is silently dropped."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from routing import RouterConfig
from sonicmoe import accuracy, benchmark, cli
from sonicmoe.peers import OURS, PEERS, compare, worker
from sonicmoe.tests import fake_peers
from sonicmoe.thiek import Thiek

QUICK = {"warmup_s": 0.0, "measure_s": 0.0, "min_repeats": 2}
SIZES = Thiek(70, 24, 16, 6, 2)
ADAPTERS = {"ours": OURS, **PEERS}


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """The optional peers' stand-ins, in this process."""
    for name, module in fake_peers.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(compare, "EFFORT", QUICK)


def problem_of(**options):
    router = options.pop("router", RouterConfig(k=SIZES.K))
    return benchmark.Problem(SIZES, router, torch.device("cpu"), backend="reference", seed=4, **options)


def run(tmp_path, name, problem):
    """One adapter in this process: its result and its errors."""
    compare.prepare(problem, 1, tmp_path)
    request = compare.request_of(problem, ADAPTERS[name], test=True)
    result = worker.run(tmp_path, json.loads(json.dumps(request)))
    return result, compare.Judge(problem, tmp_path).errors(tmp_path / "outputs.pt")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ours", {"bias": True}),
        ("grouped_mm", {"bias": True, "activation": "geglu"}),
        ("grouped_mm", {"activation": "relu_squared", "dtype": "fp16"}),
        ("grouped_mm", {"gate_up_layout": "concatenated", "router": RouterConfig(k=2, method="token_rounding", tile_m=16, mode="nearest")}),
        ("sonic-moe", {"bias": True, "gate_up_layout": "concatenated"}),
        ("sonic-moe", {"activation": "relu_squared"}),
        ("scattermoe", {"bias": True, "activation": "reglu"}),
        ("scattermoe", {"activation": "gelu"}),
        ("megablocks", {}),
        ("megablocks", {"activation": "silu"}),
    ],
    ids=str,
)
def test_values_and_gradients_come_back_in_our_layout(tmp_path, name, options):
    problem = problem_of(**options)
    result, errors = run(tmp_path, name, problem)
    biases = {"db_up", "db_down"} if problem.bias else set()
    assert errors.keys() == {"o inference", "o", "dx", "dw_up", "dw_down", "dscore"} | biases
    # Peers round their scores to the inputs' dtype, and accumulate the biases' gradients in it.
    assert all(error.whole < 1.6e-2 for error in errors.values()), errors
    assert result["times"].keys() == {"inference", "forward", "forward+backward", "bound forward", "bound forward+backward"}
    assert all(time["ms"] > 0 for time in result["times"].values())


def test_saved_memory_is_what_the_layer_keeps_beyond_its_inputs(tmp_path):
    ours, peer = (run(tmp_path, name, problem_of())[0]["saved_mib"] for name in ("ours", "grouped_mm"))
    rows, z = SIZES.T * SIZES.K, 2 * SIZES.I
    assert rows * z * 2 / 2**20 < ours < rows * (z * 2 + 40) / 2**20  # z, and indices
    assert peer > rows * (SIZES.H + z + SIZES.I + SIZES.H) * 2 / 2**20  # the rows of x, z, a and y


def test_a_wrong_peer_shows_its_error(tmp_path, monkeypatch):
    monkeypatch.setattr(fake_peers, "_interleaved", lambda z, activation: torch.nn.functional.silu(z[:, 1::2]) * z[:, 0::2])
    _, errors = run(tmp_path, "sonic-moe", problem_of())
    assert errors["o"].whole > 0.5


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("scattermoe", {"router": RouterConfig(k=2, method="token_rounding", tile_m=16)}, "must give every token the same number"),
        ("megablocks", {"bias": True}, "bias: MegaBlocks has none"),
        ("sonic-moe", {"activation": "swiglu_oai"}, "activation='swiglu_oai': sonic-moe has"),
        ("grouped_mm", {"activation": "swiglu_oai"}, "activation='swiglu_oai': must be one of"),
    ],
)
def test_what_a_peer_does_not_take_is_said_in_one_sentence(tmp_path, name, options, why):
    with pytest.raises(ValueError, match=why):
        run(tmp_path, name, problem_of(**options))


@pytest.fixture
def folders(tmp_path):
    """Two folders as --peer-path takes them: sonic-moe, whose package has our name, and a ScatterMoE that breaks.

    What is installed puts itself first on sonic-moe's path, as the .pth file of a package can.
    """
    for package in ("sonic/sonicmoe/functional", "scatter/scattermoe", "installed/sonicmoe"):
        (tmp_path / package).mkdir(parents=True)
    shutil.copy(Path(fake_peers.__file__), tmp_path / "sonic" / "fake_peers.py")
    (tmp_path / "sonic" / "sitecustomize.py").write_text(f"import sys\nsys.path.insert(0, {str(tmp_path / 'installed')!r})\n")
    (tmp_path / "installed" / "sonicmoe" / "__init__.py").write_text("raise ImportError('not the one of --peer-path')\n")
    for module in ("__init__", "functional/__init__", "functional/backward", "count_cumsum", "enums"):
        text = "from fake_peers import *\nfrom fake_peers import _DownProjection, _UpProjection\n"
        (tmp_path / "sonic" / "sonicmoe" / f"{module}.py").write_text(text)
    (tmp_path / "scatter" / "scattermoe" / "__init__.py").write_text("raise OSError('no triton here\\nsecond line')\n")
    return {"sonic-moe": str(tmp_path / "sonic"), "scattermoe": str(tmp_path / "scatter")}


def test_processes_of_their_own_beside_what_is_missing_and_what_fails(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(PEERS, "megablocks", PEERS["megablocks"]._replace(package="megablocks_elsewhere"))
    paths = [option for name, path in folders.items() for option in ("--peer-path", f"{name}={path}")]
    logs = ["--peer-logs", str(tmp_path / "logs")]
    code = cli.main(
        ["bench", "--peers", *list(PEERS)[1:], "--thiek", str(SIZES), "--device", "cpu", "--seed", "4", *paths, *logs, "--json"]
    )
    assert code == 0
    assert "Traceback" in (tmp_path / "logs" / "scattermoe.log").read_text()
    cells = json.loads(capsys.readouterr().out)["cells"]
    modes = ["inference", "forward", "forward+backward"]
    assert [(cell["peer"], cell["mode"], cell["status"]) for cell in cells] == [
        *(("this library", mode, "ran") for mode in modes),
        *(("sonic-moe", mode, "ran") for mode in modes),
        ("ScatterMoE", None, "failed"),
        ("MegaBlocks", None, "not installed"),
    ]
    assert cells[-2]["why"] == "OSError: no triton here"
    assert cells[-1]["why"] == "not installed: package megablocks_elsewhere, github.com/databricks/megablocks"
    for cell in cells[:-2]:
        assert cell["ratio"] == pytest.approx(cell["bound_ms"] / cell["ms"])
        assert cell["tflops"] == pytest.approx((18 if cell["mode"] == modes[2] else 6) * 140 * 24 * 16 / (cell["ms"] * 1e9))
        assert all(error["whole"] < 1.6e-2 for error in cell["errors"].values())
    assert [cell["errors"].keys() for cell in cells[3:6]] == [
        {"o inference"},
        {"o"},
        {"o", "dx", "dw_up", "dw_down", "dscore"},
    ]


def test_the_table_shows_every_peer_and_our_failure_is_the_exit_code(capsys, monkeypatch):
    good = {"status": "ran", "saved_mib": 1.0, "peak_mib": 2048.0, "rows": 140}
    variants = (*compare.MODES, "bound forward", "bound forward+backward")
    good["times"] = {name: {"ms": 2.0, "ms_spread": 0.1, "repeats": 5} for name in variants}
    answers = [
        {**good, "name": "this library", "errors": {"o": accuracy.Error(1.0, 1.0, 1.0)}},
        {"name": "MegaBlocks", "status": "failed", "why": "its process ended with exit status -11"},
    ]
    monkeypatch.setattr(compare, "compare", lambda *arguments, **options: answers)
    assert cli.main(["bench", "--peers", "megablocks", "--thiek", str(SIZES), "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    for word in ("this library", "2,048.0", "1.00e+00 o", "MegaBlocks: its process ended with exit status -11", "o whole 1.00e+00"):
        assert word in printed


def test_a_process_that_dies_or_hangs_is_a_line_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "WORKER", tmp_path / "worker.py")
    (tmp_path / "worker.py").write_text("import os, sys\nprint('about to break', flush=True)\nos.abort()\n")
    assert compare.run_worker(tmp_path, None) == {"status": "failed", "why": "its process ended with exit status -6: about to break"}
    (tmp_path / "worker.py").write_text("import time\ntime.sleep(60)\n")
    assert compare.run_worker(tmp_path, None, timeout_s=0.2)["why"] == "took longer than 0.2 s and was stopped"


ONE_OF_EACH = """
import json, os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
adapter = json.loads((folder / "request.json").read_text())["adapter"]
print(adapter, "began", flush=True)
if adapter == "grouped_mm":
    time.sleep(60)
if adapter == "scattermoe":
    os.abort()
(folder / "result.json").write_text(json.dumps({"status": "ran", "paths": sys.argv[2:]}))
"""


def test_one_that_hangs_and_one_that_crashes_leave_the_others_their_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "WORKER", tmp_path / "worker.py")
    (tmp_path / "worker.py").write_text(ONE_OF_EACH)
    started, options = [], {"test": False, "timeout_s": 1.0, "logs": tmp_path}
    paths = {"megablocks": f"{tmp_path}:{tmp_path.parent}"}
    results = compare.compare(problem_of(), list(PEERS), paths, started=started.append, **options)
    assert started == ["this library", *(peer.title for peer in PEERS.values()), "done"]
    assert [(result["name"], result["status"]) for result in results] == [
        ("this library", "ran"),
        ("torch grouped_mm", "failed"),
        ("sonic-moe", "ran"),
        ("ScatterMoE", "failed"),
        ("MegaBlocks", "ran"),
    ]
    assert results[1]["why"] == "took longer than 1 s and was stopped"
    assert results[3]["why"] == "its process ended with exit status -6: scattermoe began"
    assert (results[0]["paths"], results[4]["paths"]) == ([], [str(tmp_path), str(tmp_path.parent)])
    assert {path.name: path.read_text() for path in tmp_path.glob("*.log")} == {
        f"{name}.log": f"{adapter} began\n" for name, adapter in [("ours", "ours"), *((name, peer.adapter) for name, peer in PEERS.items())]
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "tutel"], "peers='tutel': must be one of grouped_mm, sonic-moe, scattermoe, megablocks"),
        (["--peers", "--peer-path", "scattermoe"], "peer-path='scattermoe': must be NAME=FOLDER"),
        (["--peers", "--peer-path", "scattermoe=/nowhere"], "peer-path=scattermoe=/nowhere: /nowhere is not a folder"),
        (["--peers", "--peer-path", "scattermoe=."], "peer-path=scattermoe=.: must hold the package scattermoe"),
        (["--peer-path", "scattermoe=."], "peer-path: needs --peers"),
        (["--peer-timeout", "5"], "peer-timeout: needs --peers"),
        (["--peers", "--peer-timeout", "0"], "peer-timeout=0: must be above 0 seconds"),
        (["--peers", "--trials", "2"], "trials=2: must be 1 with --peers"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "--thiek", str(SIZES), "--device", "cpu", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


@pytest.mark.gpu
def test_grouped_mm_beside_ours_on_a_gpu(capsys):
    sizes = Thiek(2048, 1024, 512, 16, 4)
    assert cli.main(["bench", "--peers", "grouped_mm", "--thiek", str(sizes), "--device", "cuda", "--seed", "4", "--json"]) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert [cell["status"] for cell in cells] == ["ran"] * 6
    for cell in cells:
        assert all(error["whole"] < 1.6e-2 for error in cell["errors"].values())
        assert cell["peak_mib"] > 16 * 3 * 1024 * 512 * 2 / 2**20  # the weights alone
    ours, peer = (cell["saved_mib"] for cell in cells if cell["mode"] == "forward")
    assert sizes.rows * 2 * 512 * 2 / 2**20 < ours < peer
