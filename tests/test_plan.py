"""A plan: its code runs as it stands and does what `apply` does; `undo` restores the model bitwise."""

import copy

import pytest
import torch
from torch import nn

import unvanish as uv
from unvanish.diagnosis.interventions.candidates import (
    AS_IS,
    Candidate,
    clipped,
    of_growth,
    of_input,
    of_reach,
    rates,
    unregularised,
)
from unvanish.diagnosis.interventions.fewer_layers import of_depth
from unvanish.diagnosis.interventions.inputs import Fed
from unvanish.diagnosis.interventions.optimizers import recipe
from unvanish.diagnosis.plan import Plan, Prediction


class Model(nn.Module):
    """A recurrent module behind dropout, and a head."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.drop, self.encoder, self.head = nn.Dropout(0.5), rnn, nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.drop(x))[0][:, -1])


class Mixed(nn.Module):
    """A plain RNN before an LSTM, and a GRU whose weights are computed, which no cure can be written into."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.second = nn.RNN(3, 8, batch_first=True), nn.LSTM(8, 8, batch_first=True)
        self.bound = uv.cures.constrain_(nn.GRU(8, 8, batch_first=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bound(self.second(self.first(x)[0])[0])[0][:, -1]


def rnn_of(kind: str) -> nn.Module:
    torch.manual_seed(3)
    options = {"batch_first": True, "num_layers": 2}
    return {
        "lstm": lambda: nn.LSTM(3, 8, **options),
        "gru": lambda: nn.GRU(3, 8, **options),
        "rnn": lambda: nn.RNN(3, 8, **options),
        "relu": lambda: uv.cures.spectral_radius_(nn.RNN(3, 8, nonlinearity="relu", **options), 1.6),
        "ours": lambda: uv.nn.RNN(3, 8, batch_first=True),
        "deep": lambda: nn.LSTM(3, 8, num_layers=5, dropout=0.1, batch_first=True),
        "mgu": lambda: uv.nn.Recurrent(uv.cells.ZOO["mgu"](), 3, 8, **options),
        "indrnn": lambda: uv.nn.Recurrent(uv.cells.ZOO["indrnn"](), 3, 8, batch_first=True),
    }[kind]()


def every_candidate(model: nn.Module) -> list[Candidate]:
    own, _ = recipe(torch.optim.AdamW(model.parameters(), lr=1e-5), model, 1e-3)
    entry = Fed()
    entry.add(torch.randn(5, 4, 3) * 100 + 500, 5)
    path = next(p for p, m in model.named_modules() if isinstance(m, nn.RNNBase | uv.nn.Recurrent))
    found = [
        *of_reach(model, 20, 0),
        *of_depth(model),
        *of_growth(model),
        *of_input(model, {path: entry}),
        *unregularised(model, own),
    ]
    return [*found, *rates(own), clipped(), *(c.with_rate(0.01) for c in found)]


def test_a_stack_of_two_names_or_with_frozen_weights_is_not_shortened() -> None:
    model = Model(rnn_of("deep"))
    assert of_depth(model)
    model.again = model.get_submodule(next(p for p, m in model.named_modules() if isinstance(m, nn.LSTM)))
    assert of_depth(model) == []
    frozen = Model(rnn_of("deep"))
    next(frozen.parameters()).requires_grad_(False)
    assert of_depth(frozen) == []


def plan_of(candidate: Candidate, model: nn.Module) -> Plan:
    own, _ = recipe(torch.optim.AdamW(model.parameters(), lr=1e-5), model, 1e-3)
    return Plan(candidate.plan_steps(own), Prediction(1.0, 0.5, 1.1, 100))


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn", "relu", "ours", "deep", "mgu"])
@pytest.mark.parametrize("root", [False, True])
def test_the_code_of_every_candidate_runs_and_does_what_apply_does(kind: str, root: bool) -> None:
    model = rnn_of(kind) if root else Model(rnn_of(kind))
    candidates = every_candidate(model)
    assert {"reach", "input", "rate", "clip"} <= {c.kind for c in candidates}
    x = torch.randn(4, 5, 3)
    for candidate in candidates:
        plan = plan_of(candidate, model)
        assert plan, candidate.name
        names = {"model": copy.deepcopy(model)}
        exec(plan.code, names)  # as a reader would paste it
        pasted, applied = names["model"].eval(), plan.apply(copy.deepcopy(model)).eval()
        assert type(pasted) is type(applied)
        assert same(state(pasted), state(applied)), candidate.name
        out, other = ((y[0] if isinstance(y, tuple) else y) for y in (pasted(x), applied(x)))
        assert torch.equal(out, other), candidate.name
        if "optimizer" in names:
            out.sum().backward()
            before = state(pasted)
            names["optimizer"].step()
            assert not same(before, state(pasted)), candidate.name


def test_modules_of_different_kinds_are_cured_each_in_its_way_and_computed_weights_are_left_alone() -> None:
    model = Mixed()
    reach = of_reach(model, 20, 0)
    assert {c.name.partition("(")[0] for c in reach} >= {"gated successor with chrono_", "orthogonal_"}
    for candidate in reach:
        plan = plan_of(candidate, model)
        names = {"model": copy.deepcopy(model)}
        exec(plan.code, names)
        changed = plan.apply(copy.deepcopy(model))
        assert same(state(names["model"]), state(changed)), candidate.name
        assert same(state(changed.bound), state(model.bound))
        if "successor" in candidate.name:
            assert isinstance(changed.first, nn.GRU)
        assert not same(state(changed.first), state(model.first)) or not same(
            state(changed.second), state(model.second)
        )


def test_clipping_in_the_code_bounds_the_gradient_of_every_update() -> None:
    model = Model(rnn_of("gru"))
    names = {"model": model}
    exec(plan_of(clipped(), model).code, names)
    (1e4 * model(torch.randn(4, 5, 3)).sum()).backward()
    names["optimizer"].step()
    assert float(nn.utils.get_total_norm([p.grad for p in model.parameters()])) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("kind", ["lstm", "rnn", "relu", "ours", "deep", "mgu", "indrnn"])
@pytest.mark.parametrize("root", [False, True])
def test_undo_restores_weights_bitwise_and_replaced_modules_themselves(kind: str, root: bool) -> None:
    model = rnn_of(kind) if root else Model(rnn_of(kind))
    for candidate in every_candidate(model):
        before, modules = state(model), dict(model.named_modules())
        plan = plan_of(candidate, model)
        changed = plan.apply(model)
        with torch.no_grad():
            for name, parameter in changed.named_parameters():
                if "head" not in name:
                    parameter.add_(1.0)
        touched = [s for s in plan.steps if s.act is not None]
        back = plan.undo(changed)
        assert back is model
        assert dict(model.named_modules()) == modules
        assert not any(m._forward_pre_hooks for m in model.modules())
        if touched and candidate.kind in ("reach", "radius"):
            assert same(state(model.encoder if not root else model), {
                n.removeprefix("encoder."): v for n, v in before.items() if root or n.startswith("encoder.")
            }), candidate.name  # fmt: skip
        model.load_state_dict(before)
        assert root or model.drop.p == 0.5


def test_undo_leaves_modules_that_the_plan_did_not_touch_with_what_they_have_learnt() -> None:
    model = Model(rnn_of("lstm"))
    plan = plan_of(of_reach(model, 20, 0)[0], model)
    plan.apply(model)
    with torch.no_grad():
        model.head.weight.fill_(7.0)
    plan.undo(model)
    assert bool((model.head.weight == 7).all())


def test_a_plan_is_applied_once_and_taken_back_once() -> None:
    model = Model(rnn_of("lstm"))
    plan = plan_of(of_reach(model, 20, 0)[0], model)
    with pytest.raises(ValueError, match="was not applied"):
        plan.undo(model)
    plan.apply(model)
    with pytest.raises(ValueError, match="already"):
        plan.apply(model)
    plan.undo(model)
    plan.apply(model)


def test_an_empty_plan_is_false_and_has_no_code() -> None:
    assert not Plan()
    assert Plan().code == ""
    assert str(Plan()) == "nothing to change"
    assert not AS_IS.plan_steps(recipe(None, Model(rnn_of("lstm")), 1e-3)[0])


def test_a_plan_shows_its_steps_prediction_and_code() -> None:
    model = Model(rnn_of("lstm"))
    shown = str(plan_of(of_reach(model, 20, 0)[0].with_rate(0.01), model))
    assert "1. spread the time constants of the forget gates over 21 steps" in shown
    assert "1 as it is, 0.5 with the plan (best constant answer: 1.1)" in shown
    assert "lr=0.01" in shown
