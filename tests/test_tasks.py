"""Tasks are functions of (seed, split, index), have the chance level they claim, and pose the problem they describe."""

import gzip
import re
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unvanish.train.tasks import TASKS, make_task
from unvanish.train.tasks.adding import Adding
from unvanish.train.tasks.reber import SYMBOLS, EmbeddedReber
from unvanish.train.tasks.task import IGNORED, Split


def idx(array: np.ndarray) -> bytes:
    """As MNIST's files are written."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.astype(np.uint8).tobytes()


@pytest.fixture(scope="module", autouse=True)
def mnist(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Files like MNIST's, each image of noise, its first pixel the digit times 20; the test files gzipped."""
    folder, rng = tmp_path_factory.mktemp("mnist"), np.random.default_rng(0)
    for part, n in (("train", 5040), ("t10k", 30)):
        labels = np.arange(n) % 10
        images = rng.integers(256, size=(n, 28, 28))
        images[:, 0, 0] = 20 * labels
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            path = folder / f"{part}-{kind}-ubyte"
            if part == "train":
                path.write_bytes(idx(array))
            else:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(idx(array), 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNVANISH_MNIST", str(folder))
        yield folder


@pytest.mark.parametrize("name", list(TASKS))
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_any_sample_can_be_drawn_again(name: str, split: Split) -> None:
    x, y = make_task(name, seed=3).samples(split, [7, 2, 11])
    again_x, again_y = make_task(name, seed=3).samples(split, [2])
    assert torch.equal(x[1], again_x[0])
    assert torch.equal(y[1], again_y[0])
    if name.startswith("mnist-full") and split == "test":
        return  # a file of its own, the same for every seed
    other, _ = make_task(name, seed=4).samples(split, range(20))
    assert not torch.equal(other, make_task(name, seed=3).samples(split, range(20))[0])


@pytest.mark.parametrize("name", list(TASKS))
def test_splits_differ_and_have_their_shape(name: str) -> None:
    task = make_task(name)
    firsts = [task.samples(split, [0])[0] for split in ("train", "validation", "test")]
    if name != "noise-free":
        assert not torch.equal(firsts[0], firsts[1])
        assert not torch.equal(firsts[1], firsts[2])
    if name not in ("copy", "copy-variable"):
        assert firsts[0].shape == (1, task.length, task.inputs)


def test_adding_is_the_sum_of_two_marks_in_two_halves() -> None:
    x, y = Adding(21).samples("train", range(500))
    values, marks = x.unbind(-1)
    assert (marks[:, :10].sum(1) == 1).all()
    assert (marks[:, 10:].sum(1) == 1).all()
    torch.testing.assert_close((values * marks).sum(1, keepdim=True), y)
    assert {int(t) for t in marks.nonzero()[:, 1]} == set(range(21))


def test_chance_is_the_error_of_the_best_constant() -> None:
    _, y = Adding().samples("train", range(20000))
    assert float((y - 1).square().mean()) == pytest.approx(Adding.chance, rel=0.03)
    digits = make_task("digits")
    labels = torch.cat(
        [digits.samples(split, range(digits.size(split)))[1] for split in ("train", "validation", "test")]
    )
    assert len(labels) == 1797
    assert digits.chance == pytest.approx(1 - labels.bincount().max().item() / 1797)


def test_multiplication_is_the_product() -> None:
    x, y = make_task("multiplication", 20).samples("test", range(2000))
    values, marks = x.unbind(-1)
    torch.testing.assert_close((values + (1 - marks)).where(marks > 0, 1.0).prod(1, keepdim=True), y)
    assert float((y - 0.25).square().mean()) == pytest.approx(7 / 144, rel=0.1)


@pytest.mark.parametrize("name", ["copy", "copy-variable"])
def test_copy_asks_for_the_word_after_the_go_signal(name: str) -> None:
    task = make_task(name, 13)
    x, y = task.samples("train", range(200))
    symbols = x.argmax(-1)
    assert x.shape == (200, 33, 10)
    assert (symbols[:, :10] < 8).all()
    go = (symbols == 9).int().argmax(1)
    assert ((symbols == 9).sum(1) == 1).all()
    for b in range(200):
        assert torch.equal(y[b, go[b] + 1 : go[b] + 11], symbols[b, :10])
        assert (y[b, : go[b] + 1] == 8).all()
        assert (y[b, go[b] + 11 :] == 8).all()
    assert len(set(go.tolist())) == (1 if name == "copy" else 13)
    blind = torch.full((200, 33, 9), -30.0)
    blind[..., 8] = 0.0
    for b in range(200):
        blind[b, go[b] + 1 : go[b] + 11] = torch.tensor([0.0] * 8 + [-30.0])
    assert float(task.error(blind, y)) == pytest.approx(task.chance, rel=1e-3)


@pytest.mark.parametrize(("name", "symbols"), [("temporal-order", 2), ("temporal-order-3", 3)])
def test_temporal_order_is_read_off_the_telling_symbols(name: str, symbols: int) -> None:
    task = make_task(name, 60)
    x, y = task.samples("train", range(300))
    shown = x.argmax(-1)
    for b in range(300):
        telling = shown[b][shown[b] < 2]
        assert len(telling) == symbols
        assert int(y[b]) == int("".join(str(int(s)) for s in telling), 2)
    assert task.chance == pytest.approx(1 - 1 / 2**symbols)
    assert set(y.tolist()) == set(range(2**symbols))


@pytest.mark.parametrize("name", ["noise-free", "delayed-recall"])
def test_recall_asks_for_the_first_symbol_alone(name: str) -> None:
    task = make_task(name, 30)
    x, y = task.samples("train", range(200))
    assert torch.equal(x[:, 0].argmax(-1), y)
    assert (x[:, 1:, : task.outputs] == 0).all()
    assert task.chance == 1 - 1 / task.outputs


# Reber's grammar once more, from the drawing in the papers, as what may follow which beginning of an embedded string.
LOOP = "B[TP]B(P|TS*XX)T*(VPXT*)*"
FOLLOWS = {
    "B": "TP",
    "B[TP]": "B",
    "B[TP]B": "TP",
    "B[TP]BTS*": "SX",
    "B[TP]BTS*X": "XS",
    LOOP: "TV",
    f"{LOOP}V": "PV",
    f"{LOOP}VP": "XS",
    f"B[TP]BTS*XS|{LOOP}V(V|PS)": "E",
    "BT.*E": "T",
    "BP.*E": "P",
    "B.*E[TP]": "E",
}
REBER_TASK = EmbeddedReber(20)


def follows(beginning: str) -> str:
    (may,) = (may for pattern, may in FOLLOWS.items() if re.fullmatch(pattern, beginning))
    return may


def strings(task: EmbeddedReber, split: Any) -> list[str]:
    _, y = task.samples(split, range(task.size(split)))
    return ["B" + "".join(SYMBOLS[s] for s in row[row != IGNORED]) for row in y]


def test_reber_strings_are_of_the_grammar_and_the_test_is_not_in_the_training() -> None:
    task = EmbeddedReber(seed=5)
    parts = {split: strings(task, split) for split in ("train", "validation", "test")}
    for part in parts.values():
        assert len(part) == 256
        for string in part:
            assert 9 <= len(string) <= 31
            assert all(string[t] in follows(string[:t]) for t in range(1, len(string))), string
            assert string[1] == string[-2]
    assert not set(parts["train"]) & {*parts["validation"], *parts["test"]}
    shortest = [len(string) == 9 for seed in range(4) for string in strings(EmbeddedReber(seed=seed), "train")]
    assert sum(shortest) / len(shortest) == pytest.approx(1 / 4, abs=0.05)


def test_reber_input_is_the_string_up_to_each_answer() -> None:
    task = EmbeddedReber(20)
    x, y = task.samples("test", range(50))
    assert ((y != IGNORED) == (x.sum(-1) == 1)).all()
    for row, answers, string in zip(x, y, strings(task, "test"), strict=False):
        assert "".join(SYMBOLS[s] for s in row[: len(string) - 1].argmax(-1)) == string[:-1]
        assert (answers[len(string) - 1 :] == IGNORED).all()


def test_reber_nothing_gives_away_how_long_a_string_will_be() -> None:
    x, _ = EmbeddedReber().samples("test", range(256))
    assert len({step.tobytes() for step in x[:, :2].numpy()}) == 2, "B, then T or P, for all alike"


@cache
def perfect(task: EmbeddedReber, split: Any) -> torch.Tensor:
    """Outputs of 1 for the symbols that may follow, else 0."""
    answer = torch.zeros(task.size(split), task.length, len(SYMBOLS))
    for b, string in enumerate(strings(task, split)):
        for t in range(1, len(string)):
            may = [SYMBOLS.index(symbol) for symbol in follows(string[:t])]
            answer[b, t - 1, may] = 1.0
    return answer


def test_reber_counts_the_long_range_symbol_apart() -> None:
    task = EmbeddedReber(24)
    answer, (_, y) = perfect(task, "test"), task.samples("test", range(256))
    assert float(task.error(answer, y)) == 0
    rows = torch.arange(len(y))
    due = (y != IGNORED).sum(1) - 2
    blind = answer.clone()
    blind[rows, due] = torch.eye(7)[SYMBOLS.index("T")]
    long_range, other = task.wrong(blind, y)
    assert torch.equal(long_range, y[rows, due] == SYMBOLS.index("P"))
    assert not other.any()
    assert float(task.error(blind, y)) == pytest.approx(task.chance, abs=0.1)
    both = answer.clone()
    both[rows, due] = torch.eye(7)[[SYMBOLS.index("T"), SYMBOLS.index("P")]].sum(0)
    assert task.wrong(both, y)[0].all(), "two equal outputs are no prediction"


@given(st.integers(0, 255), st.data())
def test_reber_any_one_wrong_prediction_is_seen(b: int, data: st.DataObject) -> None:
    task = REBER_TASK
    answer, (_, y) = perfect(task, "validation")[[b]], task.samples("validation", [b])
    places = (y[0] != IGNORED).nonzero().flatten().tolist()
    t = data.draw(st.sampled_from(places))
    k = data.draw(st.integers(0, 6))
    answer[0, t, k] = 1 - answer[0, t, k]
    long_range, other = task.wrong(answer, y)
    assert bool(long_range | other)
    assert bool(long_range) == (t == len(places) - 2)


def test_reber_loss_is_of_the_answered_steps_alone() -> None:
    task = REBER_TASK
    _, y = task.samples("train", range(4))
    answer = torch.randn(4, task.length, 7, requires_grad=True)
    task.loss(answer, y).backward()
    assert answer.grad is not None
    assert (answer.grad.abs().sum(-1)[y == IGNORED] == 0).all()
    assert (answer.grad.abs().sum(-1)[y != IGNORED] > 0).all()


def test_full_mnist_is_read_from_its_files() -> None:
    task = make_task("mnist-full", seed=1)
    assert [task.size(split) for split in ("train", "validation", "test")] == [40, 5000, 30]
    for split in ("train", "validation", "test"):
        x, y = task.samples(split, range(30))
        torch.testing.assert_close(x[:, 0, 0], 20 * y / 255)
    x, y = task.samples("test", range(30))
    assert torch.equal(y, torch.arange(30) % 10)
    assert x.min() >= 0
    assert x.max() == 1
    assert task.chance == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "t10k-labels-idx1-ubyte .or .gz. can't be read"),
        (b"", "not a whole idx file"),
        (b"\0\0\x08", "not a whole idx file"),
        (b"\0\0\x08\0", "not a whole idx file"),
        (b"\0\0\x0d\x01\0\0\0\x01a", "not a whole idx file"),
        (idx(np.zeros(30))[:-1], "not a whole idx file"),
        (idx(np.zeros(29)), "a digit for each"),
        (idx(np.full(30, 10)), "a digit for each"),
    ],
)
def test_damaged_mnist_is_named(
    content: bytes | None, message: str, mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(mnist, tmp_path, dirs_exist_ok=True)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    if content is not None:
        (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(content)
    monkeypatch.setenv("UNVANISH_MNIST", str(tmp_path))
    with pytest.raises(ValueError, match=message):
        make_task("mnist-full")
    monkeypatch.delenv("UNVANISH_MNIST")
    with pytest.raises(ValueError, match="set the environment variable UNVANISH_MNIST"):
        make_task("mnist-full-permuted")


@pytest.mark.parametrize(("plain", "permuted"), [("mnist", "mnist-permuted"), ("mnist-full", "mnist-full-permuted")])
def test_permuted_pixels_are_the_same_pixels_in_another_order(plain: str, permuted: str) -> None:
    one, other = (make_task(name).samples("test", range(5))[0] for name in (plain, permuted))
    assert not torch.equal(one, other)
    assert torch.equal(one.sort(1).values, other.sort(1).values)


@pytest.mark.parametrize(
    ("name", "length", "message"),
    [
        ("nope", None, "task: expected one of adding"),
        ("adding", 1, "length: expected at least 2"),
        ("embedded-reber", 19, "length: expected at least 20"),
        ("digits", 65, "length: an image of digits has 64"),
    ],
)
def test_wrong_tasks_are_named(name: str, length: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_task(name, length)


@pytest.mark.parametrize("name", [name for name in TASKS if not name.startswith("mnist-full")])
def test_levels_are_plain_numbers(name: str) -> None:
    """Numpy's are not: compared they give a bool that JSON, and so a report, can't hold."""
    task = make_task(name)
    assert (type(task.chance), type(task.solved_below)) == (float, float)
