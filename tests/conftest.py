"""Settings for all tests."""

import torch
from hypothesis import settings

# No test is timed, so hypothesis measures no deadline either; derandomised, so that CI means the same twice.
settings.register_profile("unvanish", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("unvanish")
torch.set_num_threads(1)
