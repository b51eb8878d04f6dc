"""Settings of the whole test run."""

import torch

# The tensors here are tiny: threads only wait for each other, and the runner uses the cores by running tests side by side.
torch.set_num_threads(1)
