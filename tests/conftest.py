"""One thread: the suite's tensors are small, and spinning threads slow a loaded machine tenfold.

In CI the property tests draw the same examples each time, so that a change is not blamed for what it did not do; elsewhere
they go on searching.
"""
import os

import hypothesis
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, database=None)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")
