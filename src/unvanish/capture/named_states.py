"""The states of modules, by name, that are not recurrent layers of torch or unvanish; and a search for modules that
seem to have such states."""

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.utils.hooks import RemovableHandle

from unvanish.nn.modules import RecurrentModule

Getter = int | str | tuple[Any, ...] | Callable[[nn.Module, Any, Any], Any]
"""where to find the state in a module's output: an index or key, a path of them, or (module, args, output) → state"""

LAYERS = (nn.RNNBase, nn.RNNCellBase)
"""classes that run torch's kernel, unless a subclass has its own"""

LOOPS = 2
"""how often a module must receive what it has just returned to be regarded as recurrent"""

MOVES = frozenset(
    f"{name}Backward0"
    for name in ("Stack", "Cat", "Select", "Slice", "Split", "Unbind", "Chunk", "View", "UnsafeView", "Unsqueeze",
                 "Squeeze", "Transpose", "Permute", "Expand", "Clone", "Alias", "IndexSelect", "T")
)  # fmt: skip
"""operations that a state may pass through on its way to the next call: they move it without computing"""

NODES = 32
"""nodes of autograd's graph that are searched for a state that was moved"""

STEP_NODES = 256
"""nodes of autograd's graph that are searched for the state of the previous call: as many as one step may have"""


class NamedStates:
    """Reports the state of each named module, once per call, through torch's global module hooks, which attach nothing
    to a module.

    Raises:
        ValueError: the model has no module of that name.
        TypeError: the place of a state is not an index, a path of indices or a function.
    """

    def __init__(
        self,
        model: nn.Module,
        states: Mapping[str, Getter],
        show: Callable[[str, Any], None],
        problems: dict[str, str],
    ) -> None:
        # Modules hash by identity, and are kept alive as long as this object.
        self._getters: dict[nn.Module, list[tuple[str, Getter]]] = {}
        for name, getter in states.items():
            try:
                module = model.get_submodule(name)
            except AttributeError as error:
                known = ", ".join(key for key, _ in model.named_modules() if key)
                raise ValueError(f"states: expected names of the model's modules ({known}), got {name!r}") from error
            if not (isinstance(getter, int | str | tuple) or callable(getter)):
                raise TypeError(
                    f"states: expected for {name!r} an index, a path of indices or a function (module, args, output), "
                    f"got {type(getter).__name__}"
                )
            self._getters.setdefault(module, []).append((name, getter))
        self._show, self._problems = show, problems
        self._unknown = {
            m: name for name, m in model.named_modules() if name and not _known(m) and m not in self._getters
        }
        # torch's own modules keep no state from one call to the next.
        self._may_hold = {id(m) for m in self._unknown if not type(m).__module__.startswith("torch.nn.")}
        self._held: dict[nn.Module, dict[str, Tensor]] = {}
        self._layers: dict[nn.Module, str] = {m: name for name, m in model.named_modules() if isinstance(m, LAYERS)}
        self._called: dict[str, None] = {}
        self._shown: set[str] = set()
        self._ran = False
        self._last: dict[nn.Module, list[Tensor]] = {}
        self._loops: dict[nn.Module, int] = {}
        self._handle: RemovableHandle | None = None

    def open(self) -> None:
        """Begin."""
        self._handle = hooks.register_module_forward_hook(self._after)

    def close(self) -> None:
        """End."""
        if self._handle is not None:
            self._handle.remove()
        self._last.clear()
        self._held.clear()

    @property
    def unrecorded(self) -> dict[str, str]:
        """Unnamed modules that were called step after step on a state that they had returned or keep in attributes."""
        why = (
            "called repeatedly on the state that it returned or stores, but it is not a known recurrent layer; name it "
            "in states= to record it"
        )
        found = {self._unknown[m]: why for m, n in self._loops.items() if n >= LOOPS and m in self._unknown}
        if self._ran:
            found |= {
                name: "named in states=, and no call of it with gradients was seen: it did not run, or its forward is "
                "called directly, as module.forward(...); mark its state with uv.mark"
                for held in self._getters.values()
                for name, _ in held
                if name not in self._shown
            }
        return found

    @property
    def called(self) -> dict[str, str]:
        """Recurrent layers that were called, with the reason why they are not recorded if they run no torch kernel."""
        return dict.fromkeys(
            self._called,
            "its forward computes the recurrence by itself, without the kernel of torch or unvanish; name it in "
            "states= if it reads one step per call, or mark its states with uv.mark",
        )

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        self._ran = True
        if module in self._layers:
            self._called[self._layers[module]] = None
        for name, getter in self._getters.get(module, ()):
            self._shown.add(name)
            try:
                self._show(name, _state_of(getter, module, args, output))
            except Exception as error:
                self._problems[name] = f"its state can't be read: {type(error).__name__}: {error}"
        if module in self._unknown:
            # Kept until the next call, so that no new tensor can get the identity of an old one.
            given, last = _tensors(args), self._last.get(module, [])
            loops = any(_moved(g, last) for g in given)
            if id(module) in self._may_hold:
                held, before = _held(module), self._held.get(module, {})
                loops |= any(_goes_on(v, before.get(key), given) for key, v in held.items())
                self._held[module] = held
            if loops:
                self._loops[module] = self._loops.get(module, 0) + 1
            self._last[module] = [v for v in _tensors(output) if v.requires_grad]


def _known(module: nn.Module) -> bool:
    """Whether a module is a recurrent layer that is recorded anyway, or contains one."""
    return any(isinstance(m, RecurrentModule) for m in module.modules())


def _moved(given: Tensor, returned: list[Tensor]) -> bool:
    """Whether a tensor is one of those returned, or was derived from one without any computation."""
    if any(given is s for s in returned):
        return True
    ends = {s.grad_fn for s in returned}
    waiting, seen = [given.grad_fn], 0
    while ends and waiting and seen < NODES:
        node = waiting.pop()
        seen += 1
        if node is not None and node.name() in MOVES:
            before = [n for n, _ in node.next_functions]
            if any(n in ends for n in before):
                return True
            waiting += before
    return False


def _held(module: nn.Module) -> dict[str, Tensor]:
    """The tensors computed by a call that a module keeps in its attributes."""
    found = (*vars(module).items(), *module._buffers.items())
    return {key: v for key, v in found if isinstance(v, Tensor) and v.grad_fn is not None}


def _goes_on(now: Tensor, before: Tensor | None, given: list[Tensor]) -> bool:
    """Whether a tensor in a module's attributes was computed from its value after the previous call, and not through
    the module's arguments, as attention weights depend on those of the layer below where layers share weights."""
    if before is None or now is before:
        return False
    end, outside = before.grad_fn, {v.grad_fn for v in given}
    waiting, seen = deque([now.grad_fn]), set[Any]()
    while waiting and len(seen) < STEP_NODES:
        node = waiting.popleft()
        if node is None or node in seen or node in outside:
            continue
        if node is end:
            return True
        seen.add(node)
        waiting.extend(n for n, _ in node.next_functions)
    return False


def _state_of(getter: Getter, module: nn.Module, args: Any, output: Any) -> Any:
    if callable(getter):
        return getter(module, args, output)
    for key in getter if isinstance(getter, tuple) else (getter,):
        output = output[key]
    return output


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [v for item in value for v in _tensors(item)] if isinstance(value, tuple | list) else []
