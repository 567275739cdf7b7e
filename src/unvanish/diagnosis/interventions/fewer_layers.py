"""Is the model too deep to learn? A copy that keeps only the first layers of each deep stack."""

from collections import Counter
from typing import Any

from torch import nn
from torch.nn.modules import rnn as torchs
from torch.nn.utils.parametrize import is_parametrized

from unvanish.diagnosis.interventions.candidates import Candidate, hooked
from unvanish.diagnosis.plan import Step

DEEP, KEPT = 4, 2
"""the number of stacked layers from which fewer are tried, and how many are kept"""
SUSPECT = 6
"""stacked layers from which depth is a suspect"""
STACKS = (torchs.RNN, torchs.LSTM, torchs.GRU)


def of_depth(model: nn.Module) -> list[Candidate]:
    """The first `KEPT` layers, with their weights, of every stack of torch's that has `DEEP` or more."""
    stacks: list[tuple[str, Any]] = [
        (path, m) for path, m in model.named_modules(remove_duplicate=False) if type(m) in STACKS and path
    ]
    deep = {path: m for path, m in stacks if m.num_layers >= DEEP and not is_parametrized(m) and not hooked(m)}
    # One that has two names, or is partly frozen, could not be exchanged by a line of code.
    names = Counter(id(m) for _, m in stacks)
    deep = {path: m for path, m in deep.items() if names[id(m)] == 1 and all(p.requires_grad for p in m.parameters())}
    if not deep:
        return []
    layers = max(m.num_layers for m in deep.values())
    name = f"{KEPT} of its {layers} layers"
    steps = tuple(_shortened(path, m) for path, m in deep.items())
    return [Candidate(name, "depth", steps, suspect=layers >= SUSPECT)]


def _shortened(path: str, stack: Any) -> Step:
    given, usual = _options(stack), _options(type(stack)(1, 1))
    options = {name: value for name, value in given.items() if value != usual[name]}
    parent, _, name = path.rpartition(".")

    def act(model: nn.Module) -> nn.Module:
        old: Any = model.get_submodule(path)
        new = type(stack)(stack.input_size, stack.hidden_size, KEPT, **options).to(old.weight_ih_l0)
        new.load_state_dict(old.state_dict(), strict=False)
        setattr(model.get_submodule(parent), name, new.train(old.training))
        return model

    arguments = ", ".join([f"{stack.input_size}", f"{stack.hidden_size}", f"{KEPT}",
                           *(f"{name}={value!r}" for name, value in options.items())])  # fmt: skip
    return Step(
        f"keep the first {KEPT} of the {stack.num_layers} layers of {path}",
        f'old = model.get_submodule("{path}")\n'
        f"new = torch.nn.{type(stack).__name__}({arguments}).to(old.weight_ih_l0)\n"
        "new.load_state_dict(old.state_dict(), strict=False)  # the weights of the layers that stay\n"
        f'setattr(model.get_submodule("{parent}"), "{name}", new.train(old.training))',
        act,
    )


def _options(stack: Any) -> dict[str, Any]:
    names = ("bias", "batch_first", "dropout", "bidirectional", "proj_size", "nonlinearity")
    return {name: getattr(stack, name) for name in names if hasattr(stack, name)}
