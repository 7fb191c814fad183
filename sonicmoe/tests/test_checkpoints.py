"""Checkpoints with single experts to this library's parameters and back, as real safetensors files."""

import json
import re
import sys

import pytest
import torch
import torch.nn.functional as F

safetensors_torch = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

from sonicmoe import MoE, cli  # noqa: E402
from sonicmoe.checkpoints import STYLES, convert, files  # noqa: E402
from sonicmoe.checkpoints.convert import PACKED as PACKED_FORM  # noqa: E402
from sonicmoe.commands import convert as command  # noqa: E402

H, I, E = 16, 8, 3
LAYERS = ("model.layers.0.mlp", "model.layers.2.mlp")


def make_checkpoint(style="gate_up_down", *, bias=False, dtype=torch.bfloat16, router="gate"):
    gate, up, down = STYLES[style]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors = {
        "model.embed_tokens.weight": draw(5, H),
        "model.layers.1.mlp.gate_proj.weight": draw(I, H),
        "model.steps": torch.tensor(7, dtype=torch.int64),
        "model.mask": torch.tensor([True, False, True]),
    }
    for layer in LAYERS:
        tensors[f"{layer}.{router}.weight"] = draw(E, H)
        tensors[f"{layer}.shared_experts.gate_proj.weight"] = draw(I, H)
        tensors[f"{layer}.{router}.{'e_score_correction_bias' if router == 'gate' else 'selection_bias'}"] = draw(E, dtype=torch.float32)
        for expert in range(E):
            for part, shape in ((gate, (I, H)), (up, (I, H)), (down, (H, I))):
                tensors[f"{layer}.experts.{expert}.{part}.weight"] = draw(*shape)
                if bias:
                    tensors[f"{layer}.experts.{expert}.{part}.bias"] = draw(shape[0])
    return tensors


def save(folder, tensors, *, shards=1, metadata=None):
    folder.mkdir()
    names = list(tensors)
    for shard in range(shards):
        part = {name: tensors[name] for name in names[shard::shards]}
        safetensors_torch.save_file(part, folder / f"model-{shard + 1}.safetensors", metadata=metadata)
    return folder


def load(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in safetensors_torch.load_file(path).items()}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("layout", ["interleaved", "concatenated"])
def test_converted_layer_computes_what_its_experts_did(style, layout, tmp_path):
    tensors = make_checkpoint(style, bias=True, dtype=torch.float32)
    convert(save(tmp_path / "source", tensors), tmp_path / "target", gate_up_layout=layout)
    converted = load(tmp_path / "target")
    for layer in LAYERS:
        moe = MoE(H, I, E, 2, bias=True, gate_up_layout=layout, selection_bias=True)
        own = {name.removeprefix(f"{layer}."): tensor for name, tensor in converted.items() if name.startswith(f"{layer}.")}
        own.pop("shared_experts.gate_proj.weight")
        moe.load_state_dict(own)
        x = torch.randn(7, H, generator=torch.Generator().manual_seed(1))
        out, router = moe(x, return_router=True)
        expected = torch.zeros_like(x)
        for token, expert, score in zip(*(tensor.tolist() for tensor in router.routing[:3]), strict=True):
            gate, up, down = ([tensors[f"{layer}.experts.{expert}.{part}.{kind}"] for kind in ("weight", "bias")] for part in STYLES[style])
            expected[token] += score * F.linear(F.silu(F.linear(x[token], *gate)) * F.linear(x[token], *up), *down)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize("layout", ["interleaved", "concatenated"])
def test_there_and_back_keeps_every_bit(dtype, layout, tmp_path):
    tensors = make_checkpoint(bias=True, dtype=dtype)
    convert(save(tmp_path / "source", tensors, shards=3), tmp_path / "packed", gate_up_layout=layout)
    convert(tmp_path / "packed", tmp_path / "back", to="gate_up_down")
    view = torch.uint8 if dtype.itemsize == 1 else dtype
    back = load(tmp_path / "back")
    assert_same(*({name: t.view(view) if t.dtype == dtype else t for name, t in each.items()} for each in (back, tensors)))


def test_one_style_becomes_the_other(tmp_path):
    convert(save(tmp_path / "source", make_checkpoint("w1w2w3")), tmp_path / "packed")
    convert(tmp_path / "packed", tmp_path / "target", to="gate_up_down")
    assert_same(load(tmp_path / "target"), make_checkpoint("gate_up_down"))


def test_shards_are_named_and_indexed_as_transformers_reads_them(tmp_path):
    done = convert(save(tmp_path / "source", make_checkpoint()), tmp_path / "target", shard_bytes=2000)
    index = json.loads((tmp_path / "target" / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "target").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert sorted(done.files) == sorted([*shards, "model.safetensors.index.json"])
    assert index["metadata"]["total_size"] == done.bytes == sum(tensor.nbytes for tensor in make_checkpoint().values())
    for name in shards:
        stored = safetensors_torch.load_file(tmp_path / "target" / name)
        assert {key for key, file in index["weight_map"].items() if file == name} == stored.keys()
        assert len(stored) == 1 or sum(tensor.nbytes for tensor in stored.values()) <= 2000


def test_every_tensor_is_aligned_to_its_elements(tmp_path):
    """So that a reader may map the file: bool, bfloat16, float32 and int64 are in one file here."""
    convert(save(tmp_path / "source", make_checkpoint()), tmp_path / "target")
    content = (tmp_path / "target" / "model.safetensors").read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    header.pop("__metadata__")
    assert {tensor["dtype"] for tensor in header.values()} == {"BOOL", "BF16", "F32", "I64"}
    for name, tensor in header.items():
        assert (begin + tensor["data_offsets"][0]) % files.BYTES[tensor["dtype"]] == 0, name


def test_at_most_one_expert_is_in_memory(tmp_path, monkeypatch):
    """What is read between two writes is never more than one expert's gate and up."""
    tensors = {name: tensor for name, tensor in make_checkpoint().items() if ".experts." in name}
    source = save(tmp_path / "source", tensors)
    held, most = 0, 0
    whole = files.Reader.whole

    def counted(reader, name):
        nonlocal held, most
        tensor = whole(reader, name)
        held += tensor.nbytes
        most = max(most, held)
        return tensor

    def written(*_):
        nonlocal held
        held = 0

    monkeypatch.setattr(files.Reader, "whole", counted)
    convert(source, tmp_path / "target", progress=written)
    assert most == 2 * I * H * 2


FIRST = "model.layers.2.mlp.experts"
BF16 = {"dtype": torch.bfloat16}
BROKEN = {
    "shape": (
        "1.up_proj",
        torch.zeros(I + 8, H, **BF16),
        f"1.up_proj.weight is BF16 (16, 16): must be BF16 (8, 16), as {FIRST}.0.gate_proj",
    ),
    "transposed": ("0.down_proj", torch.zeros(I, H, **BF16), f"{FIRST}.0.down_proj.weight is BF16 (8, 16): must be BF16 (16, 8)"),
    "dtype": ("2.gate_proj", torch.zeros(I, H), f"{FIRST}.2.gate_proj.weight is F32 (8, 16): must be BF16"),
    "missing": ("1.down_proj", None, f"{FIRST}.1.down_proj.weight is missing: must be BF16 (16, 8)"),
    "no_first": ("0.gate_proj", None, f"{FIRST}.0.gate_proj.weight is missing: must be there"),
    "gap": ("4.gate_proj", torch.zeros(I, H, **BF16), f"{FIRST}.3.gate_proj.weight is missing"),
    "style": ("1.w1", torch.zeros(I, H, **BF16), f"{FIRST} has tensors called down_proj, gate_proj, up_proj, w1: must be those of one of"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_single_experts_that_do_not_fit_are_refused_by_name(case, tmp_path):
    part, tensor, message = BROKEN[case]
    tensors = make_checkpoint()
    tensors.pop(f"{FIRST}.{part}.weight", None)
    source = save(tmp_path / "source", tensors | ({} if tensor is None else {f"{FIRST}.{part}.weight": tensor}))
    with pytest.raises(ValueError, match=re.escape(message)):
        convert(source, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_name_that_is_taken_is_refused(tmp_path):
    source = save(tmp_path / "source", make_checkpoint() | {f"{LAYERS[1]}.w_up": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.w_up is in the checkpoint already: must not be"):
        convert(source, tmp_path / "target")


PACKED = {"l.w_up": torch.zeros(E, 2 * I, H), "l.w_down": torch.zeros(E, H, I)}


@pytest.mark.parametrize(
    ("changes", "layout", "message"),
    [
        ({"l.w_up": torch.zeros(E, I, H)}, "interleaved", r"l.w_up is F32 \(3, 8, 16\): must be F32 \(3, 16, 16\), as l.w_down"),
        ({"l.w_down": None}, "interleaved", "l.w_down is missing: must be there with shape"),
        ({"l.b_up": torch.zeros(E, 2 * I)}, "interleaved", "l.b_down is missing: must be"),
        ({}, None, "gate_up_layout=None: must be one of interleaved, concatenated, as the checkpoint does not say"),
        ({"l.w_up": None}, "interleaved", "no layer's experts are stored as sonicmoe has them"),
    ],
)
def test_packed_layers_that_do_not_fit_are_refused_by_name(changes, layout, message, tmp_path):
    source = save(tmp_path / "source", {name: tensor for name, tensor in (PACKED | changes).items() if tensor is not None})
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "target", to="w1w2w3", gate_up_layout=layout)
    assert not (tmp_path / "target").exists()


def test_the_noted_layout_wins_over_a_wrong_one(tmp_path):
    convert(save(tmp_path / "source", make_checkpoint()), tmp_path / "packed", gate_up_layout="concatenated")
    with pytest.raises(ValueError, match="gate_up_layout='interleaved': must be 'concatenated', as the checkpoint says"):
        convert(tmp_path / "packed", tmp_path / "target", to="w1w2w3", gate_up_layout="interleaved")


def test_an_interrupted_conversion_leaves_nothing(tmp_path):
    source = save(tmp_path / "source", make_checkpoint())

    def interrupt(written, total):
        if written > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "target", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "bad.safetensors").write_bytes(b"no header")
    twice = save(tmp_path / "twice", {"a": torch.zeros(2)})
    (twice / "copy.safetensors").write_bytes((twice / "model-1.safetensors").read_bytes())
    for source, target, message in (
        ("absent", "new", "absent: must be a .safetensors file or a folder of them"),
        ("target", "new", "target: must be a .safetensors file or a folder"),
        ("bad.safetensors", "new", "bad.safetensors: must be a safetensors file ("),
        ("twice", "new", "a is in two files of"),
        ("twice", "target", "target exists: must be a new folder"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            convert(tmp_path / source, tmp_path / target)


def test_command_converts_and_prints_json_only(tmp_path, capsys):
    source = save(tmp_path / "source", make_checkpoint("w1w2w3"))
    assert cli.main(["convert", str(source), str(tmp_path / "packed"), "--layout", "concatenated", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["layers"], printed["gate_up_layout"], printed["files"]) == (2, "concatenated", ["model.safetensors"])
    assert cli.main(["convert", str(tmp_path / "packed"), str(tmp_path / "back"), "--to", "w1w2w3"]) == 0
    assert "2 layers to w1w2w3 (concatenated)" in capsys.readouterr().out
    assert_same(load(tmp_path / "back"), make_checkpoint("w1w2w3"))


def test_command_refuses_in_one_line(tmp_path, capsys):
    assert cli.main(["convert", str(tmp_path / "absent"), str(tmp_path / "new")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("sonicmoe convert: ")
    assert captured.err.count("\n") == 1


def test_command_names_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert cli.main(["convert", str(tmp_path), str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("pip install 'sonicmoe[checkpoints]'")


def test_command_offers_what_the_function_takes():
    """It names the forms itself, so that --help does not import torch."""
    assert (PACKED_FORM, *STYLES) == command.FORMS


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf", "big"])
def test_command_refuses_a_size_that_no_file_has(size, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["convert", str(tmp_path), str(tmp_path / "new"), f"--shard-gb={size}"])
    assert stopped.value.code == 2
    assert "--shard-gb" in capsys.readouterr().err


def test_command_passes_on_what_the_system_refuses(tmp_path, capsys):
    source = save(tmp_path / "source", make_checkpoint())
    (tmp_path / "file").write_text("")
    assert cli.main(["convert", str(source), str(tmp_path / "file" / "target")]) == 2
    assert "Not a directory" in capsys.readouterr().err
