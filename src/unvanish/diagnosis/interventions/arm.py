"""One copy in training: a candidate, its optimizer, and its losses."""

import copy
import math
import time
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from unvanish.diagnosis.interventions.bar import Bar
from unvanish.diagnosis.interventions.candidates import Candidate
from unvanish.diagnosis.interventions.material import Material
from unvanish.diagnosis.interventions.optimizers import Recipe
from unvanish.diagnosis.interventions.score import CLEAR, SURE_OF_PAIRS, Score, score
from unvanish.flow.model_copy import in_one_block

CHUNK = 25
"""updates between two looks at the clock; also between the first judgements"""
SHRUNK = 0.4
"""shares of the way from the constant answer to the copy's own, for copies that are over-confident"""
SPIKE = 30.0
"""clipping is worth a trial where a gradient's norm reaches this many times its median"""


class Arm:
    """A copy of the user's model with a candidate's changes, trained bit by bit."""

    def __init__(
        self,
        candidate: Candidate,
        material: Material,
        recipe: Recipe,
        bar: Bar | None,
        seed: int,
        start: nn.Module | None = None,
    ) -> None:
        self.candidate, self.material, self.recipe, self.seed = candidate, material, recipe, seed
        self.bar = Bar(torch.zeros(1)) if bar is None else bar
        self.failed = ""
        """why it can be trained no further; "" while it can"""
        self.untrainable = False
        """whether an update raised an error, as opposed to a number that was not finite"""
        self.updates = 0
        self.judging = 0.0
        """seconds that the last judgement took"""
        self.norms: list[float] = []
        self.losses: list[float] = []
        """of the training samples"""
        self.judgements: list[Judgement] = []
        self.model = candidate.applied(material.subject.twin() if start is None else in_one_block(copy.deepcopy(start)))
        if not self.model.training:
            self.model.train()
        self.optimizer = candidate.recipe(recipe).build(self.model)

    def train(self, updates: int, until: float = math.inf) -> None:
        """Make some updates, in the same order of samples for every arm; fewer if the clock is past `until`."""
        end = self.updates + updates
        while self.updates < end and not self.failed and time.perf_counter() < until:
            with self.material.subject.rng(self.seed + self.updates):
                for _ in range(min(CHUNK - self.updates % CHUNK, end - self.updates)):
                    self._update()
                    if self.failed or time.perf_counter() >= until:
                        break

    def _update(self) -> None:
        # Each update has its own random numbers, so that they don't depend on where the clock cut the training.
        torch.manual_seed(self.seed + self.updates)
        self.optimizer.zero_grad()
        try:
            with torch.enable_grad():
                loss = self.material.loss(self.model, self.updates)
                loss.backward()
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            self.failed = f"{type(error).__name__} in update {self.updates + 1}: {str(error).strip()[:200]}"
            self.untrainable = True
            return
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not parameters:
            self.failed, self.untrainable = "no parameter of the optimizer receives a gradient", True
            return
        norm = float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        if self.candidate.clip is not None and math.isfinite(norm):
            nn.utils.clip_grads_with_norm_(parameters, self.candidate.clip, torch.tensor(norm))
        value = float(loss.detach())
        self.norms.append(norm)
        self.losses.append(value)
        if not math.isfinite(value) or not math.isfinite(norm):
            what = "loss" if not math.isfinite(value) else "gradient"
            self.failed = f"the {what} was NaN or infinite in update {self.updates + 1}"
            return
        self.optimizer.step()
        self.updates += 1

    def judge(self) -> None:
        """Record its present losses on the samples it is judged on; see `judged`."""
        begun = time.perf_counter()
        with self.material.subject.rng(self.seed):
            self.judgements.append(judged(self.model, self.material, self.bar, self.updates))
        self.judging = time.perf_counter() - begun

    @property
    def best(self) -> "Judgement":
        """Its best judgement, as if training had been stopped there."""
        return min(self.judgements, key=lambda j: j.score.loss)

    @property
    def clear(self) -> bool:
        """Whether its last two judgements were both clearly below the bar."""
        last = self.judgements[-2:]
        return len(last) == 2 and all(j.clear for j in last)

    @property
    def cleared(self) -> int | None:
        """Updates after which two judgements in a row were clearly below the bar for the first time."""
        return next((b.updates for a, b in pairwise(self.judgements) if a.clear and b.clear), None)

    @property
    def learns(self) -> bool:
        """Whether two judgements in a row were below the bar by more than chance; one, if a loss has no error bar."""
        told = [j.learns for j in self.judgements]
        if not self.material.unseen:
            return bool(told) and self.best.learns
        return any(a and b for a, b in pairwise(told))

    @property
    def memorises(self) -> bool:
        """Whether its loss keeps falling on its training samples and rising on those it is judged on."""
        if not self.material.unseen or self.material.trained_on is None or len(self.judgements) < 4:
            return False
        recent, bar = self.losses[-CHUNK:], self.bar.mean
        fits = sum(recent) / len(recent) < bar - 0.5 * abs(bar)
        losses = [j.score.loss for j in self.judgements]
        return fits and losses[-1] > bar and losses.index(min(losses)) < len(losses) - 3

    @property
    def spikes(self) -> bool:
        """Whether its gradients' norms vary as much as if the gradient exploded now and then."""
        if not self.norms:
            return False
        median = sorted(self.norms)[len(self.norms) // 2]
        return bool(self.failed) or not max(self.norms) < SPIKE * max(median, 1e-12)


@dataclass
class Judgement:
    """A copy's losses at one moment."""

    updates: int
    losses: Tensor
    """`[G]`; infinite where they are NaN"""
    bar: Tensor
    shrunk: float = 1.0
    """share of the way from the constant answer to the copy's own that was judged"""
    informed: float = 0.0
    """see `Material.informed`; looked at where the scatter over groups leaves it open whether the copy learns"""
    score: Score = field(init=False)

    def __post_init__(self) -> None:
        self.losses = torch.where(self.losses.isfinite(), self.losses, math.inf)
        self.score = score(self.losses, self.bar)

    @property
    def learns(self) -> bool:
        """Whether the loss is below the bar by more than chance.

        Where a few samples decide, as with a rare class, the groups scatter though every one of them is answered
        right. Then the answers have to belong to their own samples, which random pairings tell far more surely.
        """
        return self.score.learns or (self.score.visible and self.informed > SURE_OF_PAIRS)

    @property
    def clear(self) -> bool:
        """Whether it learns so well that nothing else needs a trial."""
        return self.learns and self.score.share > CLEAR


def judged(model: nn.Module, material: Material, bar: Bar, updates: int) -> Judgement:
    """A model's losses, of its answers as they are or, where that is lower, shrunk towards the constant answer."""
    found = Judgement(updates, material.judged(model), bar.losses)
    if found.clear or not material.unseen or not updates:
        return found
    with bar.shrunk(model, SHRUNK):
        shrunk = Judgement(updates, material.judged(model), bar.losses, SHRUNK)
        if not shrunk.score.learns and shrunk.score.visible:
            shrunk.informed = material.informed(model)
    if not found.score.learns and found.score.visible:
        found.informed = material.informed(model)
    return min(found, shrunk, key=lambda j: (not j.learns, j.score.loss))


def next_judgement(updates: int) -> int:
    """Updates after which a copy is judged next: often at first, every hundred later."""
    return updates + (CHUNK if updates < 4 * CHUNK else 2 * CHUNK if updates < 12 * CHUNK else 4 * CHUNK)
