"""What is diagnosed: copies, samples, losses and random numbers."""

import dataclasses
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from unvanish.diagnosis.finding import CODES, Finding, ranked
from unvanish.diagnosis.order import axis_of_time
from unvanish.diagnosis.subject import Subject
from unvanish.flow import model_copy
from unvanish.seeding import seeded

N, T = 12, 7


class Net(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(3, 8, **options), nn.Linear(8, 2)
        self.kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def subject(x: Any, y: Any, **options: Any) -> Subject:
    return Subject(Net(**options), (x,), y, mse_loss)


def test_a_twin_detaches_what_the_model_holds_anywhere() -> None:
    class Meter:
        def __init__(self, value: Tensor) -> None:
            self.value = value

    net = Net()
    grown = net(torch.randn(T, N, 3))
    net.kept = {"list": [grown, (grown.sum(),)], "object": Meter(grown)}
    twin = Subject(net, (torch.randn(T, N, 3),), grown.detach(), mse_loss).twin()
    for held in (twin.kept["list"][0], twin.kept["list"][1][0], twin.kept["object"].value):
        assert held.grad_fn is None
    assert torch.equal(twin.kept["list"][0], grown)
    assert twin.kept["list"][0] is not grown
    assert all(p.requires_grad for p in twin.parameters())
    assert net.kept["object"].value.grad_fn is not None


def test_the_axis_of_the_samples_is_found() -> None:
    x = torch.randn(N, T, 3)
    assert subject(x, torch.randn(N), batch_first=True).samples == N
    assert subject(x, torch.randn(N, T, 2), batch_first=True).samples == N
    assert subject(x.transpose(0, 1), torch.randn(N)).samples == N
    assert subject(x.transpose(0, 1), torch.randn(T, N, 2)).samples == N
    assert subject(x, torch.zeros(N * T, dtype=torch.long), batch_first=True).samples == N
    assert subject({"x": x, "n": torch.zeros(N)}, torch.randn(N)).samples == N
    assert subject(x[0], torch.randn(())).samples is None
    packed = pack_padded_sequence(x, torch.full((N,), T), batch_first=True)
    assert subject(packed, torch.randn(N)).samples == N


def test_rows_are_the_same_samples_of_everything() -> None:
    @dataclasses.dataclass
    class Batch:
        x: Tensor
        scale: float

    x, index = torch.randn(N, T, 3), torch.tensor([4, 1])
    lengths = torch.arange(N) % T + 1
    of = subject(x, torch.randn(N), batch_first=True)
    items = (Batch(x, 2.0), {"n": lengths}, [x[:, 0]], torch.ones(()))
    batch, named, listed, constant = of.rows(items, index)
    assert torch.equal(batch.x, x[index])
    assert batch.scale == 2.0
    assert torch.equal(named["n"], lengths[index])
    assert torch.equal(listed[0], x[index, 0])
    assert constant.dim() == 0
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    few: PackedSequence = of.rows(packed, index)
    padded, left = pad_packed_sequence(few, batch_first=True)
    assert left.tolist() == lengths[index].tolist()
    assert torch.equal(padded[0, : left[0]], x[4, : left[0]])
    folded = subject(x, torch.arange(N * T), batch_first=True)
    assert folded.rows(folded.target, index).tolist() == [*range(4 * T, 5 * T), *range(T, 2 * T)]


def test_copies_hold_weights_in_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    arranged: list[nn.Module] = []
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", lambda layer: arranged.append(layer))
    model = Net()
    for twin in (Subject(model, (torch.zeros(1),), None, mse_loss).twin(), model_copy.detached_copy(model)):
        assert twin.rnn in arranged
        assert twin.rnn is not model.rnn


def test_the_generators_of_every_gpu_go_on_too(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {0: "as the user left it", 1: "another"}
    before = dict(states)
    for name, value in {
        "is_initialized": lambda: True,
        "device_count": lambda: len(states),
        "get_rng_state": lambda device: states[device],
        "set_rng_state": lambda state, device: states.__setitem__(device, state),
        "manual_seed_all": lambda seed: states.update(dict.fromkeys(states, f"seed {seed}")),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    with Subject(Net(), (torch.zeros(1),), None, mse_loss).rng(3), seeded(4):
        assert states == {0: "seed 4", 1: "seed 4"}
    assert states == before


def test_a_seed_that_waits_for_a_gpu_stays_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", waiting.append)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(42)
        with seeded(4):
            assert waiting[-1] == 4
        assert waiting[-1] == 42


def test_random_numbers_go_on_as_if_nothing_had_been_drawn() -> None:
    of = subject(torch.randn(N, T, 3), torch.randn(N))

    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), random.random(), float(np.random.rand())  # noqa: NPY002

    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    expected = draw()
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    with of.rng(3):
        first = draw()
    with of.rng(3):
        assert draw() == first
    assert draw() == expected


def test_the_loss_of_a_step_and_what_it_calls() -> None:
    x, y = torch.randn(T, N, 3), torch.randn(T, N, 2)
    of = Subject(Net(), step=lambda m: mse_loss(m(x), y))
    assert torch.equal(of.call[0][0], x)
    assert torch.equal(of.goals[0], y)
    assert of.samples == N
    assert float(of.loss(of.twin()).detach()) == float(mse_loss(of.model(x), y).detach())
    with pytest.raises(ValueError, match=r"loss: expected a tensor with one number, got \(7, 12, 2\)"):
        Subject(Net(), step=lambda m: m(x)).loss(Net())
    with pytest.raises(TypeError, match="or a LightningModule, got none"):
        Subject(Net(), (x,), y)


def test_findings_are_ranked_and_readable() -> None:
    def finding(code: str, severity: Any = "error") -> Finding:
        return Finding(code, severity, "rnn", "Says.", "3 of 4.", "a\nb")

    made = [finding("depth"), finding("nan", "note"), finding("samples_mixed"), finding("state_cut", "warning")]
    assert [f.code for f in ranked(made)] == ["samples_mixed", "depth", "state_cut", "nan"]
    assert repr(made[0]) == "error: depth (rnn)\n  Says.\n  proof: 3 of 4.\n  do: a\n      b\n  more: findings/depth"
    assert len(set(CODES)) == len(CODES)
    with pytest.raises(ValueError, match=r"code: expected one of nan, .*, got 'other'"):
        finding("other")
    with pytest.raises(ValueError, match="severity: expected error, warning or note, got 'bad'"):
        finding("nan", "bad")


@pytest.mark.parametrize("ids", [False, True])
def test_time_is_the_axis_along_which_neighbours_depend_on_each_other(ids: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(9, (40, 12), generator=generator) if ids else torch.randn(40, 12, 3, generator=generator)
    y = torch.cat([x[:, :1], x[:, :-1]], 1)
    assert axis_of_time(x, [y]) == 1
    assert axis_of_time(x.transpose(0, 1), [y.transpose(0, 1)]) == 0
    assert axis_of_time(x, []) is None


def test_what_all_samples_have_at_a_step_does_not_look_like_time() -> None:
    generator = torch.Generator().manual_seed(0)
    seasonal = torch.randn(40, 12, 1, generator=generator) + 5 * torch.randn(1, 12, 1, generator=generator)
    assert axis_of_time(seasonal, []) is None


def test_one_target_for_each_sample_settles_the_axis_however_the_samples_are_sorted() -> None:
    x = torch.arange(24.0).sin().repeat_interleave(2).reshape(24, 2, 1) + torch.arange(24.0)[:, None, None]
    assert axis_of_time(x * torch.tensor([[[1.0], [-1.0]]]), []) == 0
    assert subject(x * torch.tensor([[[1.0], [-1.0]]]), torch.zeros(24), batch_first=True).samples == 24
