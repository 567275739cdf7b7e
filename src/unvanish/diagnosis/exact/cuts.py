"""States that are cut from their graph, are reset at every step, or belong to an earlier graph."""

import torch
from torch import Tensor, nn

from unvanish.diagnosis.exact.testbench import RECURRENT, Bench
from unvanish.diagnosis.finding import Finding
from unvanish.diagnosis.structure import detached_copy, graph_tensors, tensors
from unvanish.diagnosis.trace import ModuleCall

MOVES = 1e-7
"""relative change of the answers from which a step counts as being used"""
DO_CUT = (
    "Hand the state on as it is, without detach, .data, numpy or no_grad between the steps. Detach it between batches, "
    "or between pieces that are as long as what has to be remembered."
)


def state_cut(bench: Bench) -> list[Finding]:
    """Answers move when an early step changes, yet ∂ans/∂x_t there is exactly 0: autograd does not see the path."""
    return _by_value(bench) or _by_identity(bench) or _rebuilt(bench)


def _by_value(bench: Bench) -> list[Finding]:
    if bench.reach is None:
        return []
    gradients, moved = bench.reach
    T = bench.steps
    reached = (gradients > 0).any(0)
    if not bool(reached.any()) or bool(reached.all()):
        return []
    first = int(reached.long().argmax())
    # The gradient falls to exactly 0 from one step to the next; a decay would show first.
    if bool(reached[:first].any()) or not bool(reached[first:].all()):
        return []
    used = [t for t in bench.probed if t < first and float(moved[:, t].max()) > MOVES]
    if not used:
        return []
    left = T - first
    wanted = bench.lag if bench.lag is not None else None
    severity = "error" if (left <= max(5, T // 4) or (wanted is not None and wanted > left)) else "warning"
    where = next((path for path, m in bench.model.named_modules() if path and isinstance(m, RECURRENT)), "")
    latest = used[-1]
    return [
        Finding(
            "state_cut", severity, where,
            f"The state is cut from its graph: no gradient reaches any step before step {first}, so nothing can be "
            "learnt from them.",
            f"Step {latest} exchanged moves the answers by {float(moved[:, latest].max()):.2g} of their size, but "
            f"∂answer/∂x is exactly 0 there and up to step {first - 1}; at step {first} it is "
            f"{float(gradients[:, first].max()):.2g}. Uninterrupted: {left} of {T} steps.",
            DO_CUT,
        )
    ]  # fmt: skip


def _by_identity(bench: Bench) -> list[Finding]:
    """A recurrent module is given the state that it returned last, by value, but without its graph."""
    last: dict[str, ModuleCall] = {}
    cuts: dict[str, int] = {}
    calls: dict[str, int] = {}
    longest: dict[str, int] = {}
    for call in bench.training.trace.modules:
        if not isinstance(call.module, RECURRENT) or call.output is None:
            continue
        before = last.get(call.path)
        last[call.path] = call
        calls[call.path] = calls.get(call.path, 0) + 1
        x = call.inputs[0]
        steps = (
            1
            if isinstance(call.module, nn.RNNCellBase) or x.dim() < 3
            else x.shape[0 if not call.module.batch_first else 1]
        )
        longest[call.path] = max(longest.get(call.path, 0), steps)
        if before is None:
            continue
        for state in call.inputs[1:]:
            same = [s for s in before.outputs if s.shape == state.shape and torch.equal(s.detach(), state.detach())]
            if same and state.grad_fn is None and bool((state != 0).any()):
                cuts[call.path] = cuts.get(call.path, 0) + 1
                break
    for path, number in cuts.items():
        total = calls[path]
        piece = longest[path] * total / (number + 1)
        length = longest[path] * total
        short = piece <= max(5, length // 4) or (bench.lag is not None and bench.lag > piece)
        return [
            Finding(
                "state_cut", "error" if short else "warning", path,
                f"`{path}` is given its own last state without its graph: no gradient passes from one piece to the one "
                "before.",
                f"{number} of {total} calls started from the state that the call before had returned, equal in value "
                f"but without a graph. Uninterrupted: about {piece:.0f} of {length} steps.",
                DO_CUT,
            )
        ]  # fmt: skip
    return []


def _rebuilt(bench: Bench) -> list[Finding]:
    """A cell that starts from zeros at every call, and answers that no early step moves."""
    if bench.reach is None:
        return []
    _, moved = bench.reach
    probed = [t for t in bench.probed if t < bench.steps - 1]
    if not probed or float(moved[:, probed].max()) > 0 or float(moved[:, bench.steps - 1].max()) == 0:
        return []
    fresh: dict[str, int] = {}
    total: dict[str, int] = {}
    own: dict[str, int] = {}
    for call in bench.training.trace.modules:
        if isinstance(call.module, RECURRENT):
            total[call.path] = total.get(call.path, 0) + 1
            if all(not bool((s != 0).any()) for s in call.inputs[1:]):
                fresh[call.path] = fresh.get(call.path, 0) + 1
        elif (
            call.path and not isinstance(call.module, nn.Embedding) and next(call.module.parameters(), None) is not None
        ):
            own[call.path] = own.get(call.path, 0) + 1
    least = max(3, bench.steps // 2)
    for path, number in fresh.items():
        if number >= least and number == total[path]:
            proof = f"{number} of {total[path]} calls were given no state, or zeros"
            return [_started_anew(path, proof)]
    if not total:
        for path, number in own.items():
            if number >= max(least, bench.steps - 1):
                return [_started_anew(path, f"`{path}` ran {number} times")]
    return []


def _started_anew(path: str, proof: str) -> Finding:
    return Finding(
        "state_cut", "error", path,
        f"`{path}` starts from a new state at every step: only the last step affects the answer.",
        f"{proof}; no step before the last moves an answer.",
        "Pass the state that a step returns on to the next step.",
    )  # fmt: skip


def state_carried(bench: Bench) -> list[Finding]:
    """Two training passes in a row through one copy: the second must not need the first one's graph."""
    held = graph_tensors(bench.subject.model)
    twin = bench.twin()
    raised = ""
    with torch.enable_grad(), bench.subject.rng(0):
        for number in range(2):
            try:
                value = bench.subject.loss(twin)
                if value.requires_grad:
                    value.backward()
            except Exception as error:
                if number and ("second time" in str(error) or "does not require grad" in str(error)):
                    raised = str(error).split(".")[0]
                break
    if raised:
        names = _attached_names(twin)
        where = names[0] if names else ""
        also = f" It holds {', '.join(f'`{n}`' for n in names)} with a graph." if names else ""
        kept = f" The model given holds {len(held)} tensors of an earlier graph already." if held else ""
        return [
            Finding(
                "state_carried", "error", where,
                "The state kept from one batch to the next belongs to the earlier batch's graph, so the second "
                "backward pass fails.",
                f"Two training passes of a copy in a row: backward of pass 2 raised “{raised}”.{also}{kept}",
                "Detach every kept state before it is used: `self.state = tuple(s.detach() for s in self.state)`; "
                "or start each batch from a new one.",
            )
        ]  # fmt: skip
    return _made_once(bench) or _leaks(bench)


def _made_once(bench: Bench) -> list[Finding]:
    """A tensor with a graph that every backward pass traverses but none rebuilds, e.g. one made in __init__."""
    for path, module in bench.subject.model.named_modules():
        for name, value in vars(module).items():
            if name.startswith("_") or not isinstance(value, Tensor) or value.grad_fn is None:
                continue
            twin = bench.subject.twin()
            leaf = value.detach().clone().requires_grad_()
            vars(twin.get_submodule(path))[name] = leaf
            with torch.enable_grad(), bench.subject.rng(0):
                bench.subject.loss(twin).backward()
            if leaf.grad is None or vars(twin.get_submodule(path)).get(name) is not leaf:
                continue
            place = f"{path}.{name}".removeprefix(".")
            return [
                Finding(
                    "state_carried", "error", place,
                    f"`{place}` was computed once and is used in every batch: each backward pass goes through its old "
                    "graph, which the first one frees.",
                    f"`{place}` has the graph {value.grad_fn.name()}, a pass leaves it as it is, and the norm of "
                    f"∂E/∂{name} is {float(leaf.grad.norm()):.2g}.",
                    "Compute it in forward, or make it an nn.Parameter.",
                )
            ]  # fmt: skip
    return []


def _leaks(bench: Bench) -> list[Finding]:
    """The same batch twice through one copy, in eval mode."""
    twin = detached_copy(bench.model)
    args, named = bench.given
    with torch.no_grad():
        results = []
        for _ in range(2):
            with bench.subject.rng(0):
                results.append([t.clone() for t in bench.subject.answers(twin, args, **named)])
    apart = [
        float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))
        for a, b in zip(*results, strict=False)
        if a.shape == b.shape and a.numel() and bool(a.isfinite().all()) and bool(b.isfinite().all())
    ]
    if not apart or max(apart) <= bench.tolerance * 100:
        return []
    return [
        Finding(
            # This does not prove harm: consecutive pieces of long sequences are trained like this (truncated BPTT).
            "state_carried", "note", "",
            "The model carries a state from one batch to the next: its answers depend on what was run before. With "
            "shuffled batches that belongs to other samples.",
            f"The same batch was run twice through one copy in eval mode: answers differ by {max(apart):.2g} of their "
            "size.",
            "Start each batch from a new state, unless batches continue each other's sequences.",
        )
    ]  # fmt: skip


def _attached_names(model: nn.Module) -> list[str]:
    found = []
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if not name.startswith("_") and any(t.grad_fn is not None for t in tensors(value)):
                found.append(f"{path}.{name}".removeprefix("."))
    return found
