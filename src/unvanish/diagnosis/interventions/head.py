"""Is it the head that fails? The model's own head against a linear one, each trained alone on the same states.

The recurrent layers of a trained copy stay as they are, and their outputs are detached. A linear layer on the last
states learns the target. If the model's own head does not in at least as many updates, from several values, at several
learning rates, and without dropout, then the fault lies between the states and the loss. If it does, it can read the
states, and something else kept the model from learning.
"""

import time
from typing import Any, NamedTuple

import torch
from torch import nn

from unvanish.diagnosis.interventions.arm import CHUNK, Arm
from unvanish.diagnosis.interventions.candidates import AS_IS, unregularised
from unvanish.diagnosis.interventions.material import BATCH
from unvanish.diagnosis.interventions.optimizers import Recipe
from unvanish.diagnosis.interventions.readout import HOLDS, Question, explained, head_questions
from unvanish.diagnosis.interventions.score import SURE
from unvanish.diagnosis.structure import mapped
from unvanish.nn.modules import RecurrentModule, evaluating
from unvanish.seeding import seeded

RATES = (1e-2, 3e-2, 1e-1)
"""of the linear head, one after the other until it learns; the model's own head gets the same"""
SLOWER = 0.1
"""times that rate, which the model's own head gets besides: several layers may want less than a single one"""
MOST = 300
"""updates of the linear head at each rate, at most"""
LONGER, LEAST = 2, 150
"""how long the model's own head is trained: this many times the updates of the linear one, and at least this many"""


class Linear(NamedTuple):
    """A linear head that learnt."""

    readable: float
    """R on held-out rows"""
    error: float
    """its standard error"""
    updates: int
    """that it took"""
    lr: float


class Head(NamedTuple):
    """The result of heads that were trained alone."""

    where: str
    """the recurrent module whose states they read"""
    linear: Linear
    own: tuple[Arm, ...]
    """the model's own head; trained alone until one of them learnt"""
    dropout: Arm | None = None
    """the one that learnt, retrained with the model's dropout; None where there is none"""

    @property
    def fails(self) -> bool:
        """Whether the model's own head does not learn what a linear one reads in the states."""
        return not any(arm.learns for arm in self.own)

    @property
    def drowned(self) -> bool:
        """Whether it learns without dropout, and with it does not in as many updates."""
        return self.dropout is not None and not self.fails and not self.dropout.learns


def head(arm: Arm, recipe: Recipe, seed: int, until: float) -> Head | None:
    """Both heads on the states of a trained copy; None where they don't hold the target, or time does not allow it."""
    reads = [
        (path, found)
        for path, question in head_questions(arm, seed).items()
        if question.read_out()[0] > HOLDS and (found := _linear(question, seed, until)) is not None
    ]
    if not reads:
        return None
    where, linear = max(reads, key=lambda read: read[1].readable)
    updates = max(LEAST, LONGER * linear.updates)
    names = _behind_the_states(arm)
    own: list[Arm] = []
    for fresh, lr in ((False, linear.lr), (True, linear.lr), (True, SLOWER * linear.lr)) if names else ():
        one = _alone(arm, recipe, names, fresh, lr)
        one.model.eval()
        if not _trained(one, updates, until):
            return None
        own.append(one)
        if one.learns:
            break
    found = Head(where, linear, tuple(own))
    if found.fails or not unregularised(arm.model, recipe.without_decay()):
        return found
    with_dropout = _alone(arm, recipe, names, len(own) > 1, own[-1].recipe.lr)
    return found._replace(dropout=with_dropout) if _trained(with_dropout, own[-1].updates, until) else found


def _linear(question: Question, seed: int, until: float) -> Linear | None:
    """A linear layer that is trained as the model's own head will be; None where it does not learn.

    The states are not rescaled: if gradient descent can't use them, no head is to blame.
    """
    mean, spread = question.y.mean(0), question.y.std(0).clamp_min(1e-9)
    x, x_out = question.x.float(), question.x_out.float()
    y, y_out = ((answers - mean).div(spread).float() for answers in (question.y, question.y_out))
    for lr in RATES:
        with seeded(seed), torch.enable_grad():
            layer = nn.Linear(x.shape[1], y.shape[1]).to(x.device)
            optimizer = torch.optim.Adam(layer.parameters(), lr=lr)
            for update in range(1, MOST + 1):
                at = torch.randint(len(x), (BATCH,)).to(x.device)
                optimizer.zero_grad()
                (layer(x[at]) - y[at]).square().mean().backward()
                optimizer.step()
                if update % CHUNK == 0:
                    readable, error = explained(layer(x_out).detach(), y_out)
                    if readable > max(HOLDS, SURE * error):
                        return Linear(readable, error, update, lr)
                    if time.perf_counter() > until:
                        return None
    return None


def _behind_the_states(arm: Arm) -> tuple[str, ...]:
    """Names of the parameters outside recurrent modules that a gradient reaches if these return detached states."""
    recurrent = {p for m in arm.model.modules() if isinstance(m, RecurrentModule) for p in m.parameters(recurse=False)}
    twin = _alone(arm, arm.recipe, (), False, RATES[0])
    with torch.enable_grad(), evaluating(twin.model), arm.material.subject.rng(arm.seed):
        loss = arm.material.loss(twin.model, 0)
        if not loss.requires_grad:
            return ()
        loss.backward()
    names = {name for name, p in arm.model.named_parameters() if p not in recurrent}
    return tuple(n for n, p in twin.model.named_parameters() if n in names and p.grad is not None)


def _alone(arm: Arm, recipe: Recipe, names: tuple[str, ...], fresh: bool, lr: float) -> Arm:
    """A copy whose recurrent modules return detached states, and of which only these parameters are trained."""
    held = names or tuple(name for name, _ in arm.model.named_parameters())
    one = Arm(AS_IS, arm.material, Recipe(torch.optim.Adam, ((held, {"lr": lr}),), recipe.known, given=True), arm.bar,
              arm.seed, start=arm.model)  # fmt: skip
    for module in one.model.modules():
        if isinstance(module, RecurrentModule):
            module.register_forward_hook(_detached)
    if fresh:
        before = dict(arm.material.subject.model.named_parameters())
        with torch.no_grad():
            for name, p in one.model.named_parameters():
                if name in names and name in before:
                    p.copy_(before[name])
    for p in one.model.parameters():
        p.grad = None
    return one


def _detached(module: nn.Module, args: Any, out: Any) -> Any:
    return mapped(out, torch.detach)


def _trained(one: Arm, updates: int, until: float) -> bool:
    """Train until it learns, can't be trained further or reaches this many updates; whether the time allowed it."""
    one.judge()
    while one.updates < updates and not one.failed and not one.learns:
        if time.perf_counter() + one.judging >= until:
            return False
        one.train(min(2 * CHUNK, updates - one.updates), until - one.judging)
        one.judge()
    return True
