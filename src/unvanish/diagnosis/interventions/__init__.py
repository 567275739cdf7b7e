"""Interventions: copies of the model are trained on the user's own loss, each with one change.

The change with which the loss falls below the best constant answer, on samples that a copy was not trained on, names
the cause and becomes the plan. `run` is the entry point; each file contains one idea:

- `material`    the samples that copies are trained and judged on
- `bar`         the best constant answer
- `optimizers`  the user's optimizer, rebuilt for a copy
- `candidates`  the changes worth trying
- `arm`, `race` copies in training, and how long each is trained
- `score`       when a loss counts as below the bar
- `readout`     whether the states hold the target
- `head`        whether the model's own head reads it there
- `chance`      how likely a training is to learn, from a copy's first updates
- `conclude`    findings and plan
"""

from unvanish.diagnosis.interventions.run import Outcome, Tried, run

__all__ = ["Outcome", "Tried", "run"]
