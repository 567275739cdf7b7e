"""Tasks are functions of (seed, split, index), have the chance level they claim, and pose the problem they describe."""

import pytest
import torch

from unvanish.train.tasks import TASKS, make_task
from unvanish.train.tasks.adding import Adding


@pytest.mark.parametrize("name", list(TASKS))
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_any_sample_can_be_drawn_again(name: str, split: str) -> None:
    x, y = make_task(name, seed=3).samples(split, [7, 2, 11])
    again_x, again_y = make_task(name, seed=3).samples(split, [2])
    assert torch.equal(x[1], again_x[0])
    assert torch.equal(y[1], again_y[0])
    other, _ = make_task(name, seed=4).samples(split, [2])
    assert not torch.equal(other, again_x)


@pytest.mark.parametrize("name", list(TASKS))
def test_splits_differ_and_have_their_shape(name: str) -> None:
    task = make_task(name)
    firsts = [task.samples(split, [0])[0] for split in ("train", "validation", "test")]
    assert not torch.equal(firsts[0], firsts[1])
    assert not torch.equal(firsts[1], firsts[2])
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


@pytest.mark.parametrize(
    ("name", "length", "message"),
    [
        ("nope", None, "task: expected one of adding"),
        ("adding", 1, "length: expected at least 2"),
        ("digits", 65, "length: an image"),
    ],
)
def test_wrong_tasks_are_named(name: str, length: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_task(name, length)
