"""The text: what is read, how it is split, and the baselines that a model must beat."""

import math

import pytest
import torch

from sonicmoe.training import text


def test_split_puts_each_segments_last_tenth_into_validation():
    train, validation = text.split(torch.arange(200, dtype=torch.uint8))  # 20 segments of 10
    assert validation.tolist() == list(range(9, 200, 10))
    assert sorted(train.tolist() + validation.tolist()) == list(range(200))
    assert train.tolist() == sorted(train.tolist())


def test_built_in_text_has_no_paragraph_twice():
    loaded = text.load(None, context=128)
    assert loaded.name == "pydoc_data.topics"
    assert loaded.train.numel() > 9 * loaded.validation.numel() > 200_000
    paragraphs = text._built_in_text().decode().split("\n\n")
    assert len(paragraphs) == len(set(paragraphs)) > 2000


def test_batch_is_windows_of_the_text_and_their_next_bytes():
    tokens = torch.arange(256, dtype=torch.uint8)
    inputs, targets = text.training_batch(tokens, batch_size=64, context=16, seed=3, step=5)
    assert inputs.shape == targets.shape == (64, 16)
    assert torch.equal(targets, inputs[:, :1] + torch.arange(1, 17))
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(16))


def test_batch_depends_on_seed_and_step_only():
    tokens = torch.arange(256, dtype=torch.uint8)

    def draw(seed: int, step: int) -> list:
        return text.training_batch(tokens, batch_size=8, context=16, seed=seed, step=step)[0].tolist()

    torch.manual_seed(1)
    first = draw(0, 0)
    torch.manual_seed(2)
    assert draw(0, 0) == first
    assert draw(0, 1) != first
    assert draw(1, 0) != first


def test_shortest_text_gives_its_only_window():
    tokens = torch.arange(17, dtype=torch.uint8)
    inputs, _ = text.training_batch(tokens, batch_size=4, context=16, seed=0, step=0)
    assert torch.equal(inputs, torch.arange(16).expand(4, 16))
    inputs, targets = text.validation_windows(tokens, context=16, max_windows=9)
    assert torch.equal(inputs, torch.arange(16)[None])
    assert torch.equal(targets, torch.arange(1, 17)[None])


def test_validation_windows_are_disjoint_and_spread_over_the_text():
    tokens = torch.arange(101, dtype=torch.uint8)
    inputs, targets = text.validation_windows(tokens, context=10, max_windows=4)
    assert inputs[:, 0].tolist() == [0, 30, 60, 90]
    assert torch.equal(targets, inputs + 1)


def test_unigram_loss_of_known_frequencies():
    train = torch.tensor([0, 0, 0, 1], dtype=torch.uint8)  # add-one: 4, 2 and 254 ones, 260 in all
    loss = text.unigram_loss(train, torch.tensor([[0, 1, 2]]))
    assert loss == pytest.approx((math.log(260 / 4) + math.log(260 / 2) + math.log(260)) / 3)


def test_bigram_loss_of_known_frequencies():
    train = torch.tensor([0, 1, 0, 1], dtype=torch.uint8)  # 0 is followed by 1 twice; one pseudo-count, 3/260 of it on byte 1
    loss = text.bigram_loss(train, torch.tensor([[0]]), torch.tensor([[1]]))
    assert loss == pytest.approx(math.log(3 / (2 + 3 / 260)))


def test_folder_is_read_in_order_without_binary_and_hidden_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_bytes(b"B" * 200)
    (tmp_path / "a.txt").write_bytes(b"A" * 200)
    (tmp_path / "image.bin").write_bytes(b"\0" * 500)
    (tmp_path / ".hidden").write_bytes(b"H" * 500)
    loaded = text.load(str(tmp_path), context=8)
    joined = torch.cat([loaded.train, loaded.validation])
    assert torch.bincount(joined.long(), minlength=256)[list(b"AB\n\0H")].tolist() == [200, 200, 2, 0, 0]
    assert bytes(loaded.train.tolist()).index(b"A") < bytes(loaded.train.tolist()).index(b"B")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, r"--data .*missing\.txt: no such file or folder"),
        ("empty.txt", b"", r"--data .*empty\.txt: the file is empty"),
        (
            "short.txt",
            b"To be, or not to be" * 10,
            r"--data .*short\.txt: 190 bytes of text leave 10 for validation, and context=128 needs",
        ),
    ],
)
def test_unusable_file_is_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        text.load(str(tmp_path / name), context=128)


def test_folder_without_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no text file in that folder"):
        text.load(str(tmp_path), context=8)


def test_advice_for_a_short_text_is_enough(tmp_path):
    path = tmp_path / "short.txt"
    path.write_bytes(b"x" * 30)
    with pytest.raises(ValueError, match="give about") as caught:
        text.load(str(path), context=128)
    advised = int(str(caught.value).split("give about ")[1].split()[0])
    path.write_bytes(b"x" * advised)
    assert text.load(str(path), context=128).validation.numel() > 128
