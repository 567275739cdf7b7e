"""Interventions: copies of the model are trained on the user's own loss, each with one change.

What makes the loss fall below the best constant answer on samples that a copy was not trained on names the cause, and
is the plan. `run` is the way in; each file holds one idea:

- `material`    what copies are trained and judged on
- `bar`         the best constant answer
- `optimizers`  the user's optimizer, made again for a copy
- `candidates`  what is worth trying
- `arm`, `race` copies in training, and who is trained how long
- `score`       when a loss counts as below the bar
- `readout`     whether the states hold the target
- `head`        whether the model's own head reads it there
- `chance`      how likely a training is to learn, from a copy's first updates
- `conclude`    findings and plan
"""

from unvanish.diagnosis.interventions.run import Outcome, Tried, run

__all__ = ["Outcome", "Tried", "run"]
