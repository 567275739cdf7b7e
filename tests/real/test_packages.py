"""Each package's model: untouched by a watch, recorded rightly, accelerated and restored, diagnosed, and watched by the
callback. What was measured goes into the table of docs/howto/packages.md."""

import re
import warnings
from importlib import metadata
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import unvanish as uv
from tests.real.independent import expected
from tests.real.subjects import SILENT, SUBJECTS, Subject

pytestmark = [
    pytest.mark.real,
    pytest.mark.filterwarnings("ignore"),
]


def build(key: tuple[str, str]) -> Subject:
    torch.manual_seed(0)
    return SUBJECTS[key]()


def step(subject: Subject, model: nn.Module) -> Tensor:
    torch.manual_seed(1)
    loss = subject.loss(model)
    loss.backward()
    return loss.detach()


def norms_of_states(model: nn.Module, subject: Subject) -> dict[str, list[Tensor]]:
    """Name → ‖∂E/∂h_t‖ of each step, by autograd alone."""
    kept: dict[str, list[Tensor]] = {key: [] for key in subject.states}

    def keep(name: str, getter: Any) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            state = getter(module, args, out) if callable(getter) else out[getter]
            state.retain_grad()
            kept[name].append(state)

        return hook

    for name, getter in subject.states.items():
        model.get_submodule(name).register_forward_hook(keep(name, getter))
    step(subject, model)
    zero = lambda s: torch.zeros(len(s))  # noqa: E731
    return {
        name: [zero(s) if s.grad is None else s.grad.flatten(1).norm(dim=1) for s in states]
        for name, states in kept.items()
    }


def error_of(record: uv.flow.LayerFlow, theirs: list[list[float]]) -> float:
    """The largest deviation of dh from the samples' norms, relative to the largest of the sample."""
    assert record.lengths.tolist() == [len(norms) for norms in theirs]
    worst = 0.0
    for b, norms in enumerate(theirs):
        real, mine = torch.tensor(norms, dtype=torch.float64), record.dh[: len(norms), b]
        assert not record.dh[len(norms) :, b].any()
        if len(norms) and float(real.max()) > 0:
            worst = max(worst, float((mine - real).abs().max() / real.max()))
    assert record.dh.any()
    return worst


def watched(subject: Subject, key: tuple[str, str]) -> dict[str, str]:
    model, plain, twin = subject.model, build(key).model, build(key).model
    reference = step(subject, plain)
    with uv.watch(model, states=subject.states) as flow:
        loss = step(subject, model)
    assert torch.equal(loss, reference)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name  # type: ignore[arg-type]
    assert list(flow) == subject.records, flow
    errors, residuals = [], []
    if subject.states:
        for name, rows in norms_of_states(twin, subject).items():
            errors.append(error_of(flow[name], torch.stack(rows, 1).tolist()))
    else:
        for name in subject.records:
            twin.zero_grad()
            errors.append(error_of(flow[name], expected(twin, lambda m: (torch.manual_seed(1), subject.loss(m))[1],
                                                        name)))  # fmt: skip
            assert flow[name].valid, flow[name].problem
            residuals.append(flow[name].residual)
    assert max(errors) < 100 * subject.tolerance
    assert not residuals or max(residuals) < subject.tolerance
    return {
        "recorded": "states=" if subject.states else "by itself",
        "records": str(len(subject.records)),
        "bitwise": "yes",
        "residual": f"{max(residuals):.0e}" if residuals else "–",
        "∂E/∂h off by": f"{max(errors):.0e}",
    }


def accelerated(subject: Subject, key: tuple[str, str]) -> str:
    model, plain = build(key).model, build(key).model
    layers = {name for name, m in model.named_modules() if isinstance(m, nn.RNNBase)}
    if not layers:
        with pytest.raises(ValueError, match="has none"):
            uv.nn.accelerate(model)
        return "none of torch's layers"
    before, kinds = step(subject, plain), {name: type(model.get_submodule(name)) for name in layers}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        uv.nn.accelerate(model)
    text = " ".join(str(w.message) for w in said if "accelerate left" in str(w.message))
    left = {name for name in layers if re.search(rf"(: |; ){re.escape(name)} \(", text)}
    ours = {name for name in layers if isinstance(model.get_submodule(name), uv.nn.layers.EngineSequence)}
    assert ours | left == layers
    assert not ours & left
    torch.testing.assert_close(step(subject, model), before, rtol=1e-4, atol=1e-5)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)
    uv.nn.restore(model)
    assert {name: type(model.get_submodule(name)) for name in layers} == kinds
    model.zero_grad()
    assert torch.equal(step(subject, model), before)
    return "yes" if not left else f"left: {', '.join(sorted(left))}" if not ours else f"but {', '.join(sorted(left))}"


def diagnosed(subject: Subject, key: tuple[str, str]) -> str:
    state = {name: value.clone() for name, value in subject.model.state_dict().items()}
    found = uv.diagnose(subject.model, step=subject.loss, states=subject.states, budget=0)
    assert found.findings
    assert found.layers or any("can't be followed as one sequence" in note for note in found.notes), found
    assert set(found.layers) <= set(subject.records)
    more = uv.diagnose(subject.model, step=subject.loss, states=subject.states, budget=2.0)
    assert more.findings
    assert all(torch.equal(value, subject.model.state_dict()[name]) for name, value in state.items())
    return ", ".join(dict.fromkeys(layer.verdict for layer in found.layers.values())) or "its loop can't be followed"


class Wrapped(lightning.LightningModule):
    """Any model under Lightning; a module of Lightning's trains as it is, with this loss."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.model, self.loss = subject.model, subject.loss

    def training_step(self, batch: Any) -> Tensor:
        return self.loss(self.model)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def called_back(subject: Subject) -> str:
    if subject.own_trainer is not None:
        assert set(subject.own_trainer.latest) == set(subject.records)
        return "/".join(str(found.reach) for found in subject.own_trainer.latest.values()) + ", in its own Trainer"
    states = {f"model.{name}": getter for name, getter in subject.states.items()}
    callback = uv.flow.GradientFlow(every=1, pictures=False, states=states)
    lightning.Trainer(**SILENT, max_steps=2, callbacks=[callback]).fit(
        Wrapped(subject), DataLoader(TensorDataset(torch.zeros(4, 1)), batch_size=2)
    )
    assert set(callback.latest) == {f"model.{name}" for name in subject.records}
    assert all(found.reach >= 0 for found in callback.latest.values())
    return "/".join(str(found.reach) for found in callback.latest.values())


@pytest.mark.parametrize("key", SUBJECTS, ids=" ".join)
def test_a_package(key: tuple[str, str], packages_table: list[dict[str, str]]) -> None:
    package, model = key
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    row = {"package": f"{package} {version}", "model": model}
    row |= watched(build(key), key)
    row["accelerate and restore"] = accelerated(build(key), key)
    row["diagnose"] = diagnosed(build(key), key) if build(key).copies else "can't be copied"
    row["GradientFlow: reach"] = called_back(build(key))
    packages_table.append(row)
