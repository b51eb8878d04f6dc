"""Settings of the whole test run."""

import torch

# The tensors here are tiny: threads only wait for each other, and the runner keeps the cores busy with several tests.
torch.set_num_threads(1)
