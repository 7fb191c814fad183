"""A recorded routing, and router logits of other sizes rebuilt from it."""

import numpy as np
import pytest
import torch

from sonicmoe.training.recorded import Recording, load_recorded_logits, load_recording, save_recording

K = 2


def top_k_share(logits: torch.Tensor, k: int) -> torch.Tensor:
    """(E,) each expert's rows over the even share, busiest first."""
    load = torch.bincount(logits.topk(k, dim=1).indices.flatten(), minlength=logits.shape[1])
    return (load / (logits.shape[0] * k / logits.shape[1])).sort(descending=True).values


@pytest.fixture
def recording(tmp_path):
    """2 layers, 512 tokens, 16 experts whose mean logits differ, so that their loads do."""
    random = np.random.default_rng(0)
    logits = random.standard_normal((2, 512, 16)) + np.linspace(-1, 1, 16)
    path = tmp_path / "recorded.npz"
    save_recording(path, Recording(logits, np.ones((3, 2, 16)), np.array([2, 4, 5]), {"experts_per_token": K}))
    return path


def test_saved_recording_is_read_back(recording):
    loaded = load_recording(recording)
    assert loaded.logits.shape == (2, 512, 16)
    assert loaded.logits.dtype == np.float16
    assert loaded.load_steps.tolist() == [2, 4, 5]
    assert loaded.metadata == {"experts_per_token": K}


def test_same_arguments_give_the_same_logits(recording):
    first = load_recorded_logits(recording, 100, 24, 7)
    assert first.shape == (100, 24)
    assert first.dtype == torch.float32
    assert torch.equal(first, load_recorded_logits(recording, 100, 24, 7))
    assert not torch.equal(first, load_recorded_logits(recording, 100, 24, 8))


@pytest.mark.parametrize(("num_experts", "k"), [(8, 1), (16, 2), (40, 5), (128, 16)])
def test_skew_is_kept_for_other_expert_counts(recording, num_experts, k):
    recorded = top_k_share(torch.from_numpy(load_recording(recording).logits[-1].astype(np.float32)), K)
    rebuilt = top_k_share(load_recorded_logits(recording, 8192, num_experts, 0), k)
    normal = top_k_share(torch.randn(8192, num_experts, generator=torch.Generator().manual_seed(0)), k)
    assert recorded[0] > 2
    assert rebuilt[0] == pytest.approx(recorded[0].item(), rel=0.2)
    assert rebuilt[-1] < 0.4
    assert normal[0] < 1.2 < 0.8 * rebuilt[0]


def test_load_at_the_recorded_size_is_the_recorded_one(recording):
    recorded = top_k_share(torch.from_numpy(load_recording(recording).logits[0].astype(np.float32)), K)
    rebuilt = top_k_share(load_recorded_logits(recording, 50_000, 16, 0, layer=0), K)
    assert torch.allclose(rebuilt, recorded, atol=0.06)


def test_values_are_recorded_ones_within_half_a_float16_step(recording):
    source = load_recording(recording).logits[-1]
    rebuilt = load_recorded_logits(recording, 300, 40, 0).numpy()
    values = np.sort(source.astype(np.float32).ravel())
    above = np.searchsorted(values, rebuilt).clip(1, values.size - 1)
    distance = np.minimum(abs(rebuilt - values[above]), abs(rebuilt - values[above - 1]))
    assert (distance <= 2.0**-11 * abs(rebuilt) * 1.001 + 2.0**-25).all()
    assert np.unique(rebuilt).size > 0.99 * rebuilt.size > np.unique(rebuilt.astype(np.float16)).size


def test_a_tokens_logits_within_a_block_come_from_one_recorded_token(tmp_path):
    logits = np.arange(64)[:, None] * 8.0 + np.arange(4)  # row r holds 8r .. 8r + 3
    path = tmp_path / "rows.npz"
    save_recording(path, Recording(logits[None], np.ones((1, 1, 4)), np.array([1]), {"experts_per_token": K}))
    rebuilt = load_recorded_logits(path, 200, 4, 0).round()
    assert (rebuilt // 8 == (rebuilt // 8)[:, :1]).all()
    assert (rebuilt % 8).sort(dim=1).values.unique(dim=0).tolist() == [[0, 1, 2, 3]]
    assert (rebuilt // 8)[:, 0].unique().numel() > 50


def test_no_tokens_give_an_empty_matrix(recording):
    assert load_recorded_logits(recording, 0, 512, 0).shape == (0, 512)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tokens": -1}, "num_tokens=-1: must be 0 or more"),
        ({"num_experts": 0}, "num_experts=0: must be at least 1"),
        ({"layer": 2}, "layer=2: the recording has 2 layers"),
    ],
)
def test_impossible_sizes_are_refused(recording, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_recorded_logits(recording, **({"num_tokens": 4, "num_experts": 4, "seed": 0} | arguments))


def test_missing_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_recording(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("not a recording")
    with pytest.raises(ValueError, match="not a recorded routing"):
        load_recording(tmp_path / "text.npz")
    np.savez(tmp_path / "other.npz", weights=np.ones(3))
    with pytest.raises(ValueError, match="not a recorded routing"):
        load_recording(tmp_path / "other.npz")


def test_failed_write_leaves_the_old_file_and_no_other(recording):
    before = recording.read_bytes()
    with pytest.raises(TypeError):
        save_recording(recording, Recording(np.ones((1, 2, 2)), np.ones((1, 1, 2)), np.array([1]), {"experts_per_token": object()}))
    assert recording.read_bytes() == before
    assert [path.name for path in recording.parent.iterdir()] == [recording.name]
