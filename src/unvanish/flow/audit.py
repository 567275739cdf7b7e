"""Does the backend compute the gradient of its own forward pass? Every recurrent layer against a float64 reference.

    e(W) = ‖∂E/∂W of the backend − ∂E/∂W of the reference‖ / ‖∂E/∂W of the reference‖

The model runs once as it is. Each call of a recurrent layer is then computed again in float64 on the CPU, by a loop of
the cell's equations under autograd, from the same input, state and weights and under the same gradient at its outputs;
so errors of one layer do not count as errors of another. The error that rounding explains is measured too, with the
same loop in the backend's own dtype.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from unvanish import torch_internals
from unvanish.flow.audit_compare import arrived, compare
from unvanish.flow.audit_report import Audit, LayerAudit
from unvanish.flow.model_copy import detached_copy, forked, without_compile
from unvanish.flow.tapped import Tapped, TappedCall, tap
from unvanish.nn.accelerate import sealed
from unvanish.nn.modules import CellModule, RecurrentModule, cell_of

Loss = Callable[..., Tensor]

SAME_LOSS = 0.02
"""Relative difference up to which two runs count as the same: bfloat16 rounds to 0.004."""


def audit(model: nn.Module, *batch: Any, loss: Loss) -> Audit:
    """Compare the gradients that the backend computes for every recurrent layer with a float64 reference.

        uv.audit(model, x, y, loss=nn.functional.mse_loss)

    Use it for a backend that you do not trust: MPS, torch.compile, a third party's kernel or autograd.Function, mixed
    precision. It compares torch's layers and cells, those of `unvanish.nn`, and their subclasses, in the device, dtype,
    autocast and training mode in which they run. A subclass with its own forward is compared as a whole if it computes
    the same as its base class; otherwise the call of torch's forward inside it is compared.

    The pass runs on a copy: the model, its gradients and buffers and the random number generators stay as they are.

    Args:
        model: any module with recurrent layers.
        batch: the model's inputs, then the target; a single item is the input, and `loss` takes the output alone.
        loss: (output, target) → scalar.

    Returns:
        An Audit: `.layers`, `.worst`, `.says`, `.skipped`, `.to_dataframe()`.

    Raises:
        TypeError: model is not a module, or loss not a function.
        ValueError: there is no recurrent layer or no batch, or the loss is not a scalar that depends on the model.
        RuntimeError: within torch.inference_mode.

    >>> model = nn.LSTM(3, 4)
    >>> found = audit(model, torch.randn(20, 2, 3), loss=lambda out: out[0][-1].square().sum())
    >>> found.ok, list(found.layers["LSTM"].errors)
    (True, ['W_ih', 'W_hh', 'b_ih', 'b_hh', 'x'])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not callable(loss):
        raise TypeError(f"loss: expected a function (output, target) → scalar, got {type(loss).__name__}")
    if not batch:
        raise ValueError("batch: expected the model's input and its target")
    if torch.is_inference_mode_enabled():
        raise RuntimeError("audit: expected gradients to be possible, got torch.inference_mode; call it outside")
    inputs, target = (batch[:-1], batch[-1:]) if len(batch) > 1 else (batch, ())
    twin = without_compile(detached_copy(model))
    names = {_name(path, m): m for path, m in twin.named_modules()}
    skipped = {name: f"it is {form}" for name, m in names.items() if (form := sealed(m)) is not None}
    recurrent = {name: m for name, m in names.items() if isinstance(m, RecurrentModule)}
    skipped |= {name: why for name, m in recurrent.items() if (why := _unknown(m)) is not None}
    taps = {name: tap(m) for name, m in recurrent.items() if name not in skipped}
    if not taps and not skipped:
        raise ValueError(
            "model: expected an nn.RNN, nn.LSTM, nn.GRU, one of their cells or unvanish.nn.Recurrent in it; "
            f"{type(model).__name__} has none"
        )
    for name in _compiled_in_place(model, twin):
        if taps.pop(name, None) is not None:
            skipped[name] = "it is compiled by module.compile(), which a copy loses; audit torch.compile(model) instead"

    def run(model: nn.Module) -> Tensor:
        with forked(model), torch.enable_grad():
            return _checked(loss(model(*inputs), *target))

    value = run(twin)
    gradients = _gradients(value, taps)
    compiled = _compiled(model, run, value)
    layers: dict[str, LayerAudit] = {}
    for name, seen in taps.items():
        if isinstance(compiled.get(name), str):
            skipped[name] = compiled[name]
            continue
        found = _judge(name, seen, gradients, compiled.get(name))
        if isinstance(found, str):
            skipped[name] = found
            continue
        layers[name] = found
        if name in compiled:
            skipped[f"{name}.x"] = "it lies inside a compiled graph, where only the weights' gradients can be seen"
        for call in seen.calls or seen.inner:
            missing = [w for w, v in call.weights.items() if _is_parametrized(seen.module, w) and not v.requires_grad]
            skipped |= {f"{name}.{w}": "it is parametrized: each call recomputes it" for w in missing}
    # The gradient at a layer inside a compiled graph has been rounded by the other layers too.
    rounding = sum(found.explained for found in layers.values())
    layers |= {name: replace(layers[name], explained=rounding) for name in compiled if name in layers}
    return Audit(layers, skipped)


def _compiled(model: nn.Module, run: Callable[[nn.Module], Tensor], expected: Tensor) -> dict[str, Any]:
    """Layer inside a module that torch.compile made → its weights' ∂E/∂W under the compiled code, or why there are
    none.
    """
    if all(torch_internals.compiled(m) is None for m in model.modules()):
        return {}
    twin = detached_copy(model)
    inside = {
        _name(f"{path}.{part}", m): m
        for path, outer in twin.named_modules()
        if torch_internals.compiled(outer) is not None
        for part, m in outer.named_modules()
        if isinstance(m, RecurrentModule)
    }
    with torch_internals.compiler_that_compares():
        value = run(twin)
        wanted = [(name, key, w) for name, m in inside.items() for key, w in m._parameters.items() if w is not None]
        wanted = [(name, key, w) for name, key, w in wanted if w.requires_grad]
        found = torch.autograd.grad(value, [w for _, _, w in wanted], allow_unused=True) if wanted else ()
    if not torch.allclose(value.double(), expected.double(), rtol=SAME_LOSS, atol=0):
        why = f"the compiled model's loss is {float(value):.4g}, without torch.compile {float(expected):.4g}: "
        return dict.fromkeys(inside, f"{why}it draws other random numbers, or its forward pass is wrong; try eval mode")
    gradients: dict[str, Any] = {name: {} for name in inside}
    for (name, key, w), d in zip(wanted, found, strict=True):
        gradients[name][key] = torch.zeros_like(w) if d is None else d
    return gradients


def _compiled_in_place(model: nn.Module, twin: nn.Module) -> set[str]:
    """Layers that module.compile() covers. Their copies run uncompiled, since the compiled function would call the
    original."""
    covered = set()
    for path, m in model.named_modules():
        if m._compiled_call_impl is not None:
            covered |= {_name(f"{path}.{part}", inner) for part, inner in m.named_modules()}
    for m in twin.modules():
        if m._compiled_call_impl is not None:
            m._compiled_call_impl = None
    return covered


def _gradients(value: Tensor, taps: dict[str, Tapped]) -> dict[int, Tensor]:
    """id of a tapped tensor or a weight → its gradient by autograd; no entry where none arrived."""
    calls = [call for seen in taps.values() for call in (*seen.calls, *seen.inner)]
    wanted = {id(v): v for call in calls for v in _tensors(call) if v.requires_grad}
    wanted |= {id(p): p for seen in taps.values() for p in seen.module.parameters() if p.requires_grad}
    if not wanted:
        return {}
    found = torch.autograd.grad(value, list(wanted.values()), allow_unused=True)
    return {key: d for key, d in zip(wanted, found, strict=True) if d is not None}


def _checked(value: Any) -> Tensor:
    """The loss.

    Raises:
        ValueError: it is not a scalar, or depends on nothing that requires a gradient.
    """
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss: expected a scalar tensor, got {got}")
    if not value.requires_grad:
        raise ValueError("loss: expected one that depends on the model's weights or inputs; was the graph detached?")
    return value


def _tensors(call: TappedCall) -> Iterator[Tensor]:
    yield from (_data(call.x), *call.hx, *call.weights.values(), _data(call.y), *call.final)


def _judge(
    name: str, seen: Tapped, gradients: dict[int, Tensor], compiled: dict[str, Tensor] | None
) -> LayerAudit | str:
    """The comparison, or the reason why there is none."""
    why = "; ".join(dict.fromkeys(seen.problems)) or "it was not called"
    for calls in (seen.calls, seen.inner):
        reached = [call for call in calls if any(d is not None for d in arrived(call, gradients))]
        if not reached:
            why = "no gradient reached it: the loss does not depend on it" if calls else why
            continue
        found = compare(name, seen, reached, gradients)
        if calls is seen.calls and seen.own_forward and not (found.output or 0) <= found.explained:
            why = (
                f"its own forward computes something else than the layer it is derived from (the outputs differ by "
                f"{found.output:.0e}), and no call of that layer's forward was seen inside it"
            )
            continue
        if compiled is not None:
            found = compare(name, seen, reached, gradients, compiled)
        return found if found.errors else "none of its weights is trained inside the compiled graph"
    return why


def _unknown(module: RecurrentModule) -> str | None:
    """The reason why the equations of a subclass are not known; None if they are."""
    if isinstance(module, CellModule):
        return None
    try:
        cell_of(module)
    except TypeError:
        return f"the equations of {type(module).__name__} are not known"
    if isinstance(module, nn.RNNCellBase):
        return None
    places = module.num_layers * (2 if module.bidirectional else 1)
    expected = places * (2 + 2 * module.bias + (module.proj_size > 0))
    found = sum(w is not None for w in module._flat_weights)
    return None if found == expected else f"it has {found} weights, where a {module.mode} of its options has {expected}"


def _name(path: str, module: nn.Module) -> str:
    # torch.compile wraps a module into another.
    parts = [part for part in path.split(".") if part not in ("", "_orig_mod")]
    return ".".join(parts) or type(module).__name__


def _is_parametrized(module: Any, weight: str) -> bool:
    return weight in getattr(module, "parametrizations", {})


def _data(v: Any) -> Tensor:
    return v if isinstance(v, Tensor) else v.data
