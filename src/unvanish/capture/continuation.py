"""Whether a call continues from the state that an earlier one returned.

One rule for all observers; the first case that applies decides:

1. the state is the returned tensor, or a view of it                                continues; a cut if it was detached
2. it requires gradients, and autograd leads from it back to the returned tensor    continues (masked, mixed, dropped)
3. it requires no gradient, and equals the returned tensor in value, at least in
   every sample whose state is not zero                                             continues, with a cut
4. anything else: zeros, a learnt initial state, another model's state              starts a new sequence

In 2 and 3 a sample whose state is zero, and was not when it was returned, has been *reset*.
"""

from collections import deque
from collections.abc import Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unvanish import torch_internals

NODES = 256
"""nodes of autograd's graph that are searched for the state of the call before"""


class Returned(NamedTuple):
    """The states that a call returned. The tensors are kept, so that their memory can't be reused; their graph is not
    kept: its nodes carry the tag."""

    states: tuple[Tensor, ...]
    tag: int


_tags = count(1)
_KEY = "unvanish.returned"


def returned(states: Sequence[Tensor]) -> Returned:
    """The states from which a later call may continue."""
    tag = next(_tags)
    for s in states:
        if s.grad_fn is not None:
            # A set: several watches, or a mark and a layer, may tag the same tensor.
            torch_internals.notes(s.grad_fn).setdefault(_KEY, set()).add(tag)
    return Returned(tuple(s.detach() for s in states), tag)


class Link(NamedTuple):
    """How a call continues the one before."""

    cut: bool
    """whether the state arrived without its graph"""
    resets: Tensor | None
    """[B] samples whose state was set to zero in between; None where the state arrived unchanged"""


def link(given: Sequence[Tensor], last: Returned | None) -> Link | None:
    """The link from the returned states to the states `given`; None where a new sequence starts."""
    if last is None or not given or len(given) != len(last.states):
        return None
    pairs = list(zip(given, last.states, strict=True))
    attached = any(g.requires_grad for g in given)
    if any(_same_memory(g, s) for g, s in pairs):
        return Link(not attached, None)
    fits = all(g.shape == s.shape and g.device == s.device for g, s in pairs)
    if attached:
        if not any(_leads_back(g, last.tag) for g in given):
            return None
        return Link(False, _resets(pairs) if fits else None)
    if not fits:
        return None
    with torch.no_grad():
        zero = torch.stack([_rows(g).eq(0).all(-1) for g, _ in pairs]).all(0)
        equal = torch.stack([_rows(g).eq(_rows(s)).all(-1) for g, s in pairs]).all(0)
        if bool(zero.all()) or not bool((equal | zero).all()):
            return None
        reset = zero & ~equal
    return Link(True, reset if bool(reset.any()) else None)


def _same_memory(given: Tensor, last: Tensor) -> bool:
    if given is last:
        return True
    return given.numel() > 0 and given.untyped_storage().data_ptr() == last.untyped_storage().data_ptr() != 0


def _leads_back(given: Tensor, tag: int) -> bool:
    """Whether autograd's graph leads from a tensor to the returned states; a breadth-first search."""
    if given.grad_fn is None:
        return False
    waiting, seen = deque([given.grad_fn]), set[Any]()
    while waiting and len(seen) < NODES:
        node = waiting.popleft()
        if node in seen:
            continue
        if tag in torch_internals.notes(node).get(_KEY, ()):
            return True
        seen.add(node)
        waiting.extend(n for n, _ in node.next_functions if n is not None)
    return False


def _resets(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor | None:
    with torch.no_grad():
        zero = torch.stack([_rows(g).eq(0).all(-1) for g, _ in pairs]).all(0)
        was = torch.stack([_rows(s).eq(0).all(-1) for _, s in pairs]).all(0)
        found = zero & ~was
    return found if bool(found.any()) else None


def _rows(v: Tensor) -> Tensor:
    """A state `[B, H]`, `[L·D, B, H]` or `[H]` as one row per sample, `[B, ·]`."""
    v = v.detach()
    if v.dim() == 1:
        return v.unsqueeze(0)
    return v if v.dim() == 2 else v.transpose(0, 1).flatten(1)
