"""Training: what two routings share, what a resumed run repeats, and that something is learned."""

import dataclasses

import pytest
import torch

from sonicmoe.training import text
from sonicmoe.training.config import TrainConfig
from sonicmoe.training.experiment import Experiment, read_checkpoint
from sonicmoe.training.learner import NonFiniteLossError
from sonicmoe.training.recorded import MAX_LOGITS

TINY = TrainConfig(
    steps=8, batch_size=4, context=16, hidden_size=32, intermediate_size=16, layers=2, heads=2, num_experts=4, experts_per_token=2, tile_m=8
)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """Tests run next to each other: threads that wait for each other on a busy core take longer than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def built_in():
    return text.load(None, context=64)


def weights(experiment: Experiment) -> dict[str, list[torch.Tensor]]:
    return {routing: [weight.detach().clone() for weight in learner.weights] for routing, learner in experiment.learners.items()}


def assert_same_bits(left: dict[str, list[torch.Tensor]], right: dict[str, list[torch.Tensor]]) -> None:
    assert left.keys() == right.keys()
    for routing in left:
        for a, b in zip(left[routing], right[routing], strict=True):
            assert torch.equal(a, b)


def train(experiment: Experiment, steps: int) -> Experiment:
    while experiment.step < steps:
        experiment.advance()
    return experiment


def test_model_beats_unigram_frequencies(built_in):
    config = dataclasses.replace(TINY, steps=70, batch_size=8, context=32, hidden_size=64, intermediate_size=32, lr=1e-2)
    experiment = train(Experiment(config, built_in, device=CPU), config.steps)
    for result in experiment.results().values():
        assert result["validation_loss_start"] > 5.4  # ln 256 = 5.55: nothing is known yet
        assert result["validation_loss"] < experiment.baselines["unigram"] - 0.3
        assert result["bits_per_byte"] == pytest.approx(result["validation_loss"] * 1.442695, rel=1e-6)


def test_both_routings_start_from_the_same_weights_and_validate_by_top_k(built_in):
    experiment = Experiment(TINY, built_in, device=CPU)
    before = weights(experiment)
    assert_same_bits({"w": before["top_k"]}, {"w": before["nearest"]})
    experiment.advance()
    top_k, nearest = (experiment.learners[routing].history for routing in ("top_k", "nearest"))
    assert top_k.validation[0] == nearest.validation[0]
    assert top_k.loss[0] != nearest.loss[0]  # the first batch was routed differently


def test_token_rounding_trains_on_whole_tiles_and_accounts_for_every_row(built_in):
    experiment = train(Experiment(TINY, built_in, device=CPU), TINY.steps)
    top_k, nearest = (experiment.learners[routing].history for routing in ("top_k", "nearest"))
    rows = TINY.tokens_per_step * TINY.experts_per_token * TINY.layers
    assert nearest.wasted_row_ratio == [0.0] * TINY.steps
    assert (nearest.load % TINY.tile_m == 0).all()
    assert nearest.rows == [rows - d + a for d, a in zip(nearest.dropped_rows, nearest.added_rows, strict=True)]
    assert sum(nearest.dropped_rows) > 0 < sum(nearest.added_rows)
    assert top_k.rows == [rows] * TINY.steps
    assert top_k.load.sum() == rows * TINY.steps
    assert sum(top_k.dropped_rows) == sum(top_k.added_rows) == 0
    assert all(0 < ratio < 1 for ratio in top_k.wasted_row_ratio)
    assert all(1 <= imbalance <= TINY.num_experts for imbalance in top_k.imbalance)


def test_same_seed_gives_the_same_bits_and_another_seed_does_not(built_in):
    runs = [train(Experiment(dataclasses.replace(TINY, seed=seed), built_in, device=CPU), 3) for seed in (1, 1, 2)]
    assert_same_bits(weights(runs[0]), weights(runs[1]))
    assert runs[0].learners["nearest"].history.loss == runs[1].learners["nearest"].history.loss
    assert not torch.equal(weights(runs[0])["top_k"][0], weights(runs[2])["top_k"][0])


def test_training_leaves_the_global_random_state_alone(built_in):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(Experiment(dataclasses.replace(TINY, routing="stochastic"), built_in, device=CPU), 1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("routing", "dtype"), [("both", "float32"), ("stochastic", "bfloat16")])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(built_in, tmp_path, routing, dtype):
    config = dataclasses.replace(TINY, routing=routing, dtype=dtype)
    whole = train(Experiment(config, built_in, device=CPU), config.steps)
    train(Experiment(config, built_in, device=CPU), 3).save(tmp_path / "checkpoint.pt")
    torch.manual_seed(99)  # the rest must not depend on it
    resumed = Experiment(config, built_in, device=CPU)
    resumed.restore(tmp_path / "checkpoint.pt", read_checkpoint(tmp_path / "checkpoint.pt"))
    assert resumed.step == 3
    train(resumed, config.steps)
    assert_same_bits(weights(whole), weights(resumed))
    for routing_name, learner in whole.learners.items():
        expected, got = vars(learner.history), vars(resumed.learners[routing_name].history)
        assert torch.equal(expected["load"], got["load"])
        for name in ("loss", "validation", "gradient_norm", "dropped_rows", "added_rows", "rows"):
            assert expected[name] == got[name]


def test_bfloat16_model_keeps_float32_weights_and_learns(built_in):
    config = dataclasses.replace(TINY, steps=40, routing="top_k", dtype="bfloat16", lr=1e-2)
    experiment = Experiment(config, built_in, device=CPU)
    learner = experiment.learners["top_k"]
    train(experiment, config.steps)
    assert all(weight.dtype == torch.float32 for weight in learner.weights)
    for weight, parameter in zip(learner.weights, learner.model.parameters(), strict=True):
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(weight.bfloat16(), parameter)
    assert learner.history.validation[-1][1] < learner.history.validation[0][1] - 1


def test_non_finite_loss_changes_no_weight(built_in):
    experiment = train(Experiment(dataclasses.replace(TINY, routing="top_k"), built_in, device=CPU), 2)
    with torch.no_grad():
        experiment.learners["top_k"].weights[0][:, 0] = float("nan")
    before = weights(experiment)
    with pytest.raises(NonFiniteLossError, match=r"routing top_k, step 3: loss nan"):
        experiment.advance()
    for a, b in zip(before["top_k"], weights(experiment)["top_k"], strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    assert experiment.step == 2


def test_checkpoint_of_another_text_is_refused(built_in, tmp_path):
    train(Experiment(TINY, built_in, device=CPU), 1).save(tmp_path / "checkpoint.pt")
    path = tmp_path / "other.txt"
    path.write_bytes(b"some other text, " * 100)
    other = Experiment(TINY, text.load(str(path), context=16), device=CPU)
    with pytest.raises(ValueError, match=r"other\.txt: not the text that the checkpoint was trained on \(pydoc_data\.topics\)"):
        other.restore(tmp_path / "checkpoint.pt", read_checkpoint(tmp_path / "checkpoint.pt"))


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        read_checkpoint(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(ValueError, match="not a checkpoint of sonicmoe train"):
        read_checkpoint(tmp_path / "text.pt")
    torch.save({"model": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="not a checkpoint of this version"):
        read_checkpoint(tmp_path / "other.pt")


def test_recording_holds_validation_logits_and_the_load_of_every_period(built_in):
    experiment = train(Experiment(TINY, built_in, device=CPU), TINY.steps)
    recording = experiment.recording()
    assert recording.logits.shape == (TINY.layers, experiment.validation_tokens, TINY.num_experts)
    assert recording.load_steps.tolist() == list(range(1, TINY.steps + 1))
    rows = TINY.tokens_per_step * TINY.experts_per_token
    assert (recording.load.sum(axis=2) == rows).all()
    larger = Experiment(dataclasses.replace(TINY, num_experts=128), built_in, device=CPU)
    larger.advance()
    assert larger.recording().logits.shape == (TINY.layers, MAX_LOGITS // (TINY.layers * 128), 128)
    assert recording.metadata["experts_per_token"] == TINY.experts_per_token


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    config = TrainConfig(steps=100, lr=1.0)
    rates = [config.learning_rate(step) for step in range(100)]
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps=0: must be at least 1"),
        ({"hidden_size": 100}, "hidden_size=100: must be a multiple of 8"),
        ({"intermediate_size": 12}, "intermediate_size=12: must be a multiple of 8"),
        ({"heads": 5}, "hidden_size=128: must be a multiple of twice heads=5"),
        ({"experts_per_token": 17}, "experts_per_token=17: must be between 1 and num_experts=16"),
        ({"routing": "sideways"}, "routing='sideways': must be one of both, top_k, nearest"),
        ({"dtype": "int8"}, "dtype='int8': must be one of float32, bfloat16"),
        ({"lr": float("nan")}, "lr=nan: must be a finite number above 0"),
        ({"z_loss": -1.0}, "z_loss=-1.0: must be a finite number, 0 or more"),
        ({"seed": -1}, "seed=-1: must be between 0 and"),
    ],
)
def test_impossible_option_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**change).validate()
