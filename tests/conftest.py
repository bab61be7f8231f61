"""Settings of every test run."""

import torch

# The tensors of the tests are small; threads would only compete with pytest-xdist's workers.
torch.set_num_threads(1)
